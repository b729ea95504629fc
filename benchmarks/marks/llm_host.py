"""What a step of decoding costs the host in examples/llm, where launches do nothing.

The whole of `Engine.step`: which tokens, pages, the arrays of the step, their upload, the
plan, what has arrived.  Left out is what is not Python of the engine's or of fi_ffi's plan:
kernels, copies, the planner in C++, the driver.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
from engine import Engine, Sampling, load_model
from engine.device import Cpu

from fi_ffi.ops.attention.schedule import Planner
from marks.llm_models import MODELS, RandomWeights, config_of
from marks.llm_sides import Ours, RandomPrompts, prefill

STEPS, PAGE = 100, 16


class NoGraph:
    def launch(self) -> None:
        pass


def engine(batch: int, tokens: int) -> Engine:
    """An engine that has as many heads as Qwen3-0.6B, and computes nothing."""
    raw = MODELS["tiny"] | {"num_attention_heads": 16, "num_key_value_heads": 8}
    weights = RandomWeights(raw, np.random.default_rng())
    pages = 1 + batch * -(-tokens // PAGE)
    made = load_model(config_of(raw), weights, "cpu", pages, PAGE, batch, 8192, True)
    model, runner = made.model, made.runner
    # Plans are made as for graphs.
    model.device.is_gpu = runner.use_graphs = runner.has_pieces = True
    logits = model.scratch("logits", batch, made.config.vocab, dtype="float32", most=batch)
    model.forward = lambda given: logits.rows(0, (given.last or given.tokens).shape[0])
    sizes = made.steps.sizes
    tokens = model.scratch("drawn", batch, 1, dtype="int32")
    model.device.zero(tokens)
    runner.graphs = {
        (size, True, is_in_pieces): (NoGraph(), (logits.rows(0, size), tokens.rows(0, size)))
        for size in sizes for is_in_pieces in (False, True)
    }  # fmt: skip
    return made


@contextmanager
def no_planner() -> Iterator[None]:
    """Once a kind of plan was made, planning it again returns what that has returned."""
    real, made = Planner.plan, dict[int, Any]()

    def planned(self: Any, *given: Any) -> Any:
        if id(self) not in made:
            made[id(self)] = real(self, *given)
        return made[id(self)]

    Planner.plan = planned  # type: ignore[method-assign]
    try:
        yield
    finally:
        Planner.plan = real  # type: ignore[method-assign]


def step_ms(batch: int, prompt: int = 128) -> float:
    """Milliseconds of a step, the median of many."""
    side = Ours(engine(batch, prompt + STEPS + 8))
    prompts = RandomPrompts(side.engine.config.vocab, prompt, np.random.default_rng())
    times = []
    with no_planner():
        sampling = Sampling(max_tokens=STEPS + 8, ignore_eos=True)
        prefill(side, side.start(prompts(batch), sampling))
        gc.collect()
        gc.disable()
        for _ in range(STEPS):
            start = perf_counter()
            side.step()
            times.append(perf_counter() - start)
        gc.enable()
    side.engine.close()
    assert isinstance(side.engine.model.device, Cpu)
    return median(times) * 1e3
