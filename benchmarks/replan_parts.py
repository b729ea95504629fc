"""What the parts of a replan take, warm and right after 32 runs, and the runs after it.

    python3 benchmarks/replan_parts.py [--plans decode,fa2] [--device cpu] [--steps 200]

`decode` is `BatchDecodePlan`, `fa2` and `fa3` are `BatchPrefillPlan` over ragged keys; each step
has a batch of other requests and lengths.

Host microseconds of each part, the median of all steps, and what is left over for all else.
A part is timed by a wrapper around it, which adds some 0.3 us to each (`a wrapper` in the table);
parts inside others are counted in both.  Needs a GPU and the plans' modules of float16 and
head_dim 128, or `--device cpu` (whose planner and kernels are numpy's).
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
from marks.batches import HEAD_DIM, HEADS, KV_HEADS, PAGE, starts
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
COPY, FIRST, LATER = "the copy of the arrays", "the first run after it", "a later run"
_PAGES = 4096
# What is timed: the owner of a function, its name, and what the table calls it.
PARTS = (
    (planning.Plan, "_read", "reading and checking the arrays"),
    (planning.Plan, "_need", "what it takes, and places"),
    (cuda.Queue, "is_capturing", "whether the stream records a graph"),
    (StagePool, "take", "a free stage"),
    (Arrays, "write", "arrays written into the stage"),
    (Workspace, "_take", "the stream's turn on the workspace"),
    (schedule.Planner, "plan", "the planner, with its frame"),
    (schedule, "launch", "  of it the call itself"),
    (StagePool, "record", "the stage's event"),
    (BoundRuns, "follow", "runs bound to the schedule"),
)


class Stopwatch:
    """Wraps functions, and keeps the nanoseconds that each took in each step."""

    def __init__(self) -> None:
        self.steps: dict[str, list[float]] = defaultdict(list)
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

    def end_step(self, whole: dict[str, float]) -> None:
        """End a step with what was timed as a whole; parts of a run are not told."""
        parts = self._step if "replan" in whole else {}
        for name, taken in (parts | whole).items():
            self.steps[name].append(taken)
        self._step.clear()


def _pages(rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    """A batch of 33 to 64 requests of 65 to 256 tokens."""
    lengths = rng.integers(65, 257, int(rng.integers(33, 65)))
    counts = -(-lengths // PAGE)
    pages, last = rng.permutation(_PAGES)[: counts.sum()], lengths - (counts - 1) * PAGE
    return starts(counts), pages.astype(np.int32), last.astype(np.int32)


class _Planned:
    """A plan, batches for its replans, and the runs of one."""

    def __init__(self, kind: str, device: str, rng: np.random.Generator, steps: int) -> None:
        is_cuda = device.startswith("cuda")
        self.gpu, place = None, lambda array: array
        if is_cuda:
            self.gpu = Gpu(Peers())
            place = self.gpu.put
        self.stream = self.gpu.stream if self.gpu else None
        heads = {"num_qo_heads": HEADS, "num_kv_heads": KV_HEADS}
        how = {"device": device, "stream": self.stream}
        self.is_decode = kind == "decode"
        if self.is_decode:
            cache = _PAGES if is_cuda else 64, PAGE, KV_HEADS, HEAD_DIM
            shapes = [(64, HEADS, HEAD_DIM), cache, cache, (64, HEADS, HEAD_DIM)]
            self.batches = [_pages(rng) for _ in range(steps + 1)]
            self.plan: Any = fi_ffi.BatchDecodePlan(
                *self.batches.pop(), head_dim=HEAD_DIM, page_size=PAGE, **heads, **how
            )
        else:
            # So many requests of 17 to 128 queries and as many keys.
            tokens = [rng.integers(17, 129, int(rng.integers(9, 17))) for _ in range(steps + 1)]
            self.batches = [(starts(lengths),) for lengths in tokens]
            q, k = ((16 * 128, count, HEAD_DIM) for count in (HEADS, KV_HEADS))
            shapes = [q, k, k, q]
            (indptr,) = self.batches.pop()
            self.plan = fi_ffi.BatchPrefillPlan(
                indptr, kv_indptr=indptr, head_dim_qk=HEAD_DIM, causal=True, backend=kind,
                **heads, **how,
            )  # fmt: skip
        placed = [place(np.zeros(shape, np.float16)) for shape in shapes]
        self._descs = [fi_ffi.as_desc(a.desc() if is_cuda else a) for a in placed]
        self._kept = placed

    def replan(self, batch: tuple[np.ndarray, ...]) -> None:
        if self.is_decode:
            self.plan.replan(*batch, stream=self.stream)
        else:
            self.plan.replan(batch[0], kv_indptr=batch[0], stream=self.stream)

    def run_of(self, batch: tuple[np.ndarray, ...]) -> Callable[[], None]:
        q, k, v, out = self._descs
        rows = len(batch[-1]) if self.is_decode else int(batch[0][-1])
        run = self.plan.run if self.is_decode else self.plan.ragged_run
        if not self.is_decode:
            k, v = k.rows(0, rows), v.rows(0, rows)
        return functools.partial(run, q.rows(0, rows), k, v, out.rows(0, rows), stream=self.stream)


def measure(kind: str, device: str, steps: int, runs: int) -> dict[str, float]:
    """Median microseconds of each part of a replan with so many runs between."""
    watch = Stopwatch()
    kept: list[tuple[Any, str, Any]] = [(cuda, "copying", copying := cuda.copying)]
    cuda.copying = lambda *places: watch.wrap(copying(*places), COPY)  # made once for a stage
    planned = _Planned(kind, device, np.random.default_rng(), steps)
    kept = [(owner, name, getattr(owner, name)) for owner, name, _ in PARTS] + kept
    for (owner, name, function), (_, _, told) in zip(kept, PARTS, strict=False):
        setattr(owner, name, watch.wrap(function, told))
    nothing = watch.wrap(lambda: None, "a wrapper")
    try:
        for batch in planned.batches:
            start = perf_counter_ns()
            planned.replan(batch)
            total = perf_counter_ns() - start
            nothing()
            watch.end_step({"replan": total})
            run, taken = planned.run_of(batch), list[int]()
            for _ in range(runs):
                start = perf_counter_ns()
                run()
                taken.append(perf_counter_ns() - start)
            if taken:
                watch.end_step({FIRST: taken[0], LATER: statistics.median(taken[1:])})
            if planned.gpu:
                planned.gpu.settle()
    finally:
        for owner, name, function in kept:
            setattr(owner, name, function)
    return {name: statistics.median(taken) / 1000 for name, taken in watch.steps.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--plans", default="decode,fa2", help="of decode, fa2, fa3")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--steps", type=int, default=200)
    given = parser.parse_args()
    runs = _RUNS if given.device.startswith("cuda") else 0
    found = {
        f"{kind} after {n} runs": measure(kind, given.device, given.steps, n)
        for kind in given.plans.split(",")
        for n in sorted({0, runs})
    }
    print(f"| us | {' | '.join(found)} |\n|---|{'---:|' * len(found)}")
    names = ["replan", *(told for _, _, told in PARTS), COPY, "a wrapper", FIRST, LATER]
    for name in names:
        figures = (f"{times[name]:.1f}" if name in times else "" for times in found.values())
        print(f"| {name} | {' | '.join(figures)} |")


if __name__ == "__main__":
    main()
