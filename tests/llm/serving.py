"""An engine on a device, what its requests got, and how far from the truth that is."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from engine import Engine, Request, Sampling, load
from tiny import make_tiny

from tests.llm.forward import Forward

KINDS = ("llama", "qwen3", "qwen3_next", "llama_fp8", "qwen3_fp8", "qwen3_moe",
         "qwen3_moe_fp8", "gpt_oss", "gpt_oss_mxfp4")  # fmt: skip
# Kinds that are made of parts of these and a few of their own.
MORE = ("qwen2", "mistral", "mixtral", "gemma3_text")
# Half a step of each dtype, by which the operations of a model round.
ROUNDING = {"float16": 2.0**-11, "bfloat16": 2.0**-8}
# Layers that suffice: two, or of a hybrid two with states and one without.
FEW = {"num_hidden_layers": 2}
LAYERS = {
    "qwen3_next": {"num_hidden_layers": 3, "full_attention_interval": 3},
    **dict.fromkeys(
        ("gpt_oss", "gpt_oss_mxfp4"),
        FEW | {"layer_types": ["sliding_attention", "full_attention"]},
    ),
}
# How far off logits may be, in parts of what roundings of that size do to them by chance.
BOUND = 3


class Serving:
    """One checkpoint of a kind, the independent forward of it, and engines that serve it."""

    def __init__(
        self, where: str, path: Path, kind: str, rng: Any, is_deep: bool = False, **changes: Any
    ) -> None:
        self.where, self.rng = where, rng
        layers = {} if is_deep else LAYERS.get(kind, FEW)
        self.path = make_tiny(path, kind, rng, **layers | changes)
        self.forward = Forward(self.path)
        self.dtype = self.forward.raw["torch_dtype"]
        self.engines: list[Engine] = []
        self.options: dict[str, Any] = {"num_pages": 64, "max_batch": 8, "max_tokens": 128}
        # The logits of each request's tokens.
        self.logits: dict[Request, list[np.ndarray]] = defaultdict(list)

    def engine(self, **options: Any) -> Engine:
        engine = load(self.path, self.where, **self.options | options)
        engine.steps.on_logits = self._keep
        self.engines.append(engine)
        return engine

    def _keep(self, requests: list[Request], logits: np.ndarray) -> None:
        assert np.isfinite(logits).all()
        for request, row in zip(requests, logits, strict=True):
            self.logits[request].append(row)

    def prompt(self, length: int) -> list[int]:
        return self.rng.integers(0, 256, length).tolist()

    def expected(self, prompt: list[int], got: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """The logits of a request's tokens; how far off each row is by roundings."""
        tokens, first = (prompt + got)[:-1], len(prompt) - 1
        exact, spread = self.forward.spread(tokens, ROUNDING[self.dtype])
        return exact[first:], spread[first:]

    def error(self, request: Request) -> float:
        """The worst row of what a request got (root of the mean square), as a part of its bound."""
        expected, spread = self.expected(request.prompt, request.tokens)
        got = np.array(self.logits[request][: len(request.tokens)], np.float64)
        assert got.shape == expected.shape
        return (np.sqrt(((got - expected) ** 2).mean(1)) / spread).max() / BOUND


def check_empty(engine: Engine) -> None:
    """Nothing is running, and every page and slot is back."""
    pages = engine.pages
    assert not engine.running
    assert not engine.waiting
    assert sorted([*pages.free, *pages.idle]) == [*range(1, pages.total + 1)]
    assert not any(pages.users)
    assert sorted(engine.slots) == [*range(engine.runner.job.max_batch)]
    assert set(pages.known.values()) == set(pages.key_of)


def greedy(max_tokens: int = 8) -> Sampling:
    return Sampling(temperature=0, max_tokens=max_tokens, ignore_eos=True)


def texts(engine: Engine, prompts: list[list[int]], *samplings: Sampling) -> list[list[int]]:
    """The tokens of requests that are served together."""
    every = samplings if len(samplings) == len(prompts) else samplings * len(prompts)
    requests = [engine.submit(p, s) for p, s in zip(prompts, every, strict=True)]
    engine.run()
    return [request.tokens for request in requests]
