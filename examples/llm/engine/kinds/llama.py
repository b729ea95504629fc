"""Llama, and kinds that differ from it by a norm, a bias or a window."""

from typing import ClassVar, Literal

from ..config import FULL, SLIDING, Config, WithoutExperts


class Llama(WithoutExperts, Config, kind="llama"):
    pass


class Qwen3(Llama, kind="qwen3"):
    qk_norm: ClassVar = True


class Qwen2(Llama, kind="qwen2"):
    """Biases of queries, keys and values, which config.json does not tell of."""

    has_out_bias: ClassVar = False
    has_biases: Literal[True] = True


class InWindow:
    """With a `sliding_window` all layers have it."""

    def kind_of(self, i):
        return SLIDING if self.sliding_window else FULL

    @property
    def window(self):
        return self.sliding_window


class Mistral(InWindow, Llama, kind="mistral"):
    pass
