"""What the parts of a replan take: `BatchDecodePlan.replan`, warm and right after 32 runs.

    python3 benchmarks/replan_parts.py [--device cpu] [--steps 200]

Host microseconds of each part, the median of all steps, and what is left over for all else.
A part is timed by a wrapper around it, which adds some 0.3 us to each (`a wrapper` in the table);
parts inside others are counted in both.  Needs a GPU and the modules `batch_decode` of float16
and head_dim 128, or `--device cpu` (whose planner and kernels are numpy's).
"""

from __future__ import annotations

import argparse
import functools
import statistics
from collections import defaultdict
from collections.abc import Callable
from time import perf_counter_ns
from typing import Any

import numpy as np
from marks.batches import HEAD_DIM, HEADS, KV_HEADS, PAGE
from marks.gpu import Gpu
from marks.peers import Peers

import fi_ffi
from fi_ffi.ops.attention import plan as planning
from fi_ffi.ops.attention import schedule
from fi_ffi.ops.attention.arrays import Arrays
from fi_ffi.ops.attention.bind import BoundRuns
from fi_ffi.ops.attention.workspace import Workspace
from fi_ffi.ops.call import cuda
from fi_ffi.ops.call.staging import StagePool

_RUNS = 32
_PAGES = 4096
# What is timed: the owner of a function, its name, and what the table calls it.
PARTS = (
    (planning.Plan, "_read", "reading and checking the arrays"),
    (planning.Plan, "_need", "what it takes, and places"),
    (cuda, "is_capturing", "whether the stream records a graph"),
    (StagePool, "take", "a free stage"),
    (Arrays, "write", "arrays written into the stage"),
    (Workspace, "_take", "the stream's turn on the workspace"),
    (schedule.Planner, "plan", "the planner, with its frame"),
    (schedule, "launch", "  of it the call itself"),
    (planning, "send", "the copy of the arrays"),
    (StagePool, "record", "the stage's event"),
    (BoundRuns, "follow", "runs bound to the schedule"),
)


class Stopwatch:
    """Wraps functions, and keeps the nanoseconds that each took in each step."""

    def __init__(self) -> None:
        self.steps: dict[str, list[int]] = defaultdict(list)
        self._step: dict[str, int] = defaultdict(int)

    def wrap(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = perf_counter_ns()
            try:
                return function(*args, **kwargs)
            finally:
                self._step[name] += perf_counter_ns() - start

        return timed

    def end_step(self, total: int) -> None:
        for name, taken in (self._step | {"replan": total}).items():
            self.steps[name].append(taken)
        self._step.clear()


def _tables(rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    """A batch of 33 to 64 requests of 65 to 256 tokens."""
    size = int(rng.integers(33, 65))
    lengths = rng.integers(65, 257, size)
    counts = -(-lengths // PAGE)
    indptr = np.concatenate([[0], np.cumsum(counts)])
    pages, last = rng.permutation(_PAGES)[: indptr[-1]], lengths - (counts - 1) * PAGE
    return tuple(table.astype(np.int32) for table in (indptr, pages, last))


def measure(device: str, steps: int, runs: int) -> dict[str, float]:
    """Median microseconds of each part of a replan with so many runs between."""
    rng, watch = np.random.default_rng(), Stopwatch()
    is_cuda = device.startswith("cuda")
    if is_cuda:
        gpu = Gpu(Peers())
        place, stream = gpu.put, gpu.stream
    else:
        place, stream = (lambda array: array), None
    heads = (64, HEADS, HEAD_DIM), (64, HEADS, HEAD_DIM)
    cache = _PAGES if is_cuda else 64, PAGE, KV_HEADS, HEAD_DIM
    q, out = (place(np.zeros(shape, np.float16)) for shape in heads)
    k, v = (place(np.zeros(cache, np.float16)) for _ in range(2))
    descs = [fi_ffi.as_desc(array.desc() if is_cuda else array) for array in (q, out, k, v)]
    plan = fi_ffi.BatchDecodePlan(
        *_tables(rng), num_qo_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=HEAD_DIM,
        page_size=PAGE, device=device, stream=stream,
    )  # fmt: skip
    batches = [_tables(rng) for _ in range(steps)]
    kept = [(owner, name, getattr(owner, name)) for owner, name, _ in PARTS]
    for (owner, name, function), (_, _, told) in zip(kept, PARTS, strict=True):
        setattr(owner, name, watch.wrap(function, told))
    nothing = watch.wrap(lambda: None, "a wrapper")
    try:
        for tables in batches:
            start = perf_counter_ns()
            plan.replan(*tables, stream=stream)
            total = perf_counter_ns() - start
            nothing()
            watch.end_step(total)
            size = len(tables[2])
            rows = descs[0].rows(0, size), descs[1].rows(0, size)
            for _ in range(runs):
                plan.run(rows[0], descs[2], descs[3], rows[1], stream=stream)
            if is_cuda:
                gpu.settle()
    finally:
        for owner, name, function in kept:
            setattr(owner, name, function)
    return {name: statistics.median(taken) / 1000 for name, taken in watch.steps.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--steps", type=int, default=200)
    given = parser.parse_args()
    runs = _RUNS if given.device.startswith("cuda") else 0
    found = {f"after {n} runs": measure(given.device, given.steps, n) for n in sorted({0, runs})}
    print(f"| us | {' | '.join(found)} |\n|---|{'---:|' * len(found)}")
    names = ["replan", *(told for _, _, told in PARTS), "a wrapper"]
    for name in names:
        figures = (f"{times[name]:.1f}" if name in times else "" for times in found.values())
        print(f"| {name} | {' | '.join(figures)} |")


if __name__ == "__main__":
    main()
