"""Serving a batch of prompts and timing it: what each side of benchmarks/llm.py has to do."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Protocol

import numpy as np
from engine import Engine, Sampling

Prompts = list[list[int]]


class Served(Protocol):
    """A request: `tokens` grows as the host is told of them."""

    tokens: list[int]


class Side(Protocol):
    name: str
    # Called with the requests that get a token, and their logits (a numpy array), where set.
    on_logits: Callable[[list[Any], np.ndarray], None] | None

    def start(self, prompts: Prompts, sampling: Sampling) -> list[Served]:
        """Take these in; nothing is computed yet."""

    def step(self) -> bool:
        """Go on by one step; False where nothing was left to do."""


class Ours:
    """examples/llm."""

    def __init__(self, engine: Engine, name: str = "fi_ffi") -> None:
        self.engine, self.name = engine, name

    @property
    def on_logits(self) -> Callable[[list[Any], np.ndarray], None] | None:
        return self.engine.steps.on_logits

    @on_logits.setter
    def on_logits(self, called: Callable[[list[Any], np.ndarray], None] | None) -> None:
        self.engine.steps.on_logits = called

    def start(self, prompts: Prompts, sampling: Sampling) -> list[Any]:
        return [self.engine.submit(prompt, sampling) for prompt in prompts]

    def step(self) -> bool:
        return self.engine.step() is not None


@dataclass(frozen=True)
class Timing:
    """Of one batch: `decode` counts from when the host has the first token of every request."""

    prefill_tokens: int
    prefill_s: float
    decode_tokens: int
    decode_s: float
    decode_steps: int

    @property
    def prefill_rate(self) -> float:
        return self.prefill_tokens / self.prefill_s

    @property
    def decode_rate(self) -> float:
        return self.decode_tokens / self.decode_s

    @property
    def step_ms(self) -> float:
        return self.decode_s / self.decode_steps * 1e3


def prefill(side: Side, requests: list[Served]) -> None:
    """Steps until every request has a token."""
    while requests:
        side.step()
        requests = [request for request in requests if not request.tokens]


def finish(side: Side) -> int:
    """Steps until nothing is left; how many."""
    steps = 0
    while side.step():
        steps += 1
    return steps


def timed(side: Side, prompts: Prompts, sampling: Sampling) -> Timing:
    """Serve a batch; no garbage is collected meanwhile."""
    gc.collect()
    gc.disable()
    try:
        requests = side.start(prompts, sampling)
        start = perf_counter()
        prefill(side, requests)
        middle, before = perf_counter(), sum(len(request.tokens) for request in requests)
        steps = finish(side)
        end = perf_counter()
    finally:
        gc.enable()
    after = sum(len(request.tokens) for request in requests)
    assert after == len(prompts) * sampling.max_tokens, f"{side.name}: {after} tokens"
    return Timing(
        sum(map(len, prompts)), middle - start, after - before, end - middle, max(steps, 1)
    )


class RandomPrompts:
    """Fresh random prompts each time: none has the beginning of one before in the cache."""

    def __init__(self, vocab: int, length: int, rng: np.random.Generator) -> None:
        self.vocab, self.length, self.rng = vocab, length, rng

    def __call__(self, count: int) -> Prompts:
        return self.rng.integers(0, self.vocab, (count, self.length)).tolist()
