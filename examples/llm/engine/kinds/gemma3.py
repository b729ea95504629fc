"""Gemma 3, its text: norms around both halves of a layer, and RoPE of its own in a window."""

from typing import ClassVar, Literal

from pydantic import model_validator

from .. import config
from ..weights import with_one


class Gemma3(config.WithoutExperts, config.Config, kind="gemma3_text"):
    qk_norm: ClassVar = True
    adds_one: ClassVar = True
    is_silu: ClassVar = False
    turns: ClassVar = {"rope_theta": 1e6}
    quantised: ClassVar = None

    tied: bool = config.named("tie_word_embeddings", default=True)
    hidden_act: Literal["gelu_pytorch_tanh"] = config.named("hidden_activation", "hidden_act")
    scale: config.Factor = config.named("query_pre_attn_scalar", default=256)
    use_sliding_window: Literal[True] = True
    sliding_window: config.Count = 4096
    pattern: config.Size = config.named(
        "sliding_window_pattern", "_sliding_window_pattern", default=6
    )
    local_theta: config.within(1.0, 1e12) = config.named("rope_local_base_freq", default=10000.0)
    use_bidirectional_attention: Literal[False] = False

    @model_validator(mode="before")
    @classmethod
    def _of_layers(cls, raw):
        """RoPE by kind of layer, as newer files have it, in the words of older ones."""
        found = raw.get("rope_parameters") or {}
        if isinstance(found, dict) and isinstance(local := found.get(config.SLIDING), dict):
            theta = local.get("rope_theta", 10000.0)
            raw = raw | {"rope_parameters": found.get(config.FULL), "rope_local_base_freq": theta}
        return raw

    def kind_of(self, i):
        return config.SLIDING if (i + 1) % self.pattern else config.FULL

    @property
    def sm_scale(self):
        return self.scale**-0.5

    @property
    def embedding_scale(self):
        return self.hidden**0.5

    def rope_of(self, kind):
        return config.Rope(rope_theta=self.local_theta) if kind == config.SLIDING else self.rope

    def norms(self):
        """`attended_norm` and `mlp_norm` are of what is added to the residual."""
        names = {
            "input_norm": "input", "attended_norm": "post_attention",
            "post_norm": "pre_feedforward", "mlp_norm": "post_feedforward",
        }  # fmt: skip
        return {name: {f"{of}_layernorm.weight": (self.hidden,)} for name, of in names.items()}

    def arranged(self, layer, i):
        return with_one(layer)
