"""A step of decoding as a runtime makes it: a batch never seen before, planned and run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from time import perf_counter_ns
from typing import NamedTuple

import numpy as np

import fi_ffi
from fi_ffi import TensorDesc
from fi_ffi.cli.cuda import POISON
from fi_ffi.reference.arrays import Array
from fi_ffi.reference.attention.formula import Options, exact_batch, from_pages
from marks import Missing, Wrong
from marks.batches import (
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    PAGE,
    SM_SCALE,
    check_attention,
    random,
    starts,
)
from marks.bench import Bench
from marks.report import Line
from marks.timing import Side

LEAST, MOST, RUNS = 33, 64, 32
# Of a step: what is timed.
PARTS = ("step", "the replan", "the first run", "the mean of the later runs")
_TOKENS = 65, 256  # the least and the most of a request
_PAGES = MOST * -(-_TOKENS[1] // PAGE)
_CHECKED = 3  # batches, of each side, before and after it is timed


class Step(NamedTuple):
    """How many requests there are, and the tables of their pages."""

    size: int
    tables: tuple[Array, Array, Array]


# Makes steps, and tells the nanoseconds of each of the parts.
Loop = Callable[[list[Step]], Array]


def _draw(rng: np.random.Generator) -> Step:
    """A batch of other requests, whose pages lie anywhere in the cache."""
    size = int(rng.integers(LEAST, MOST + 1))
    lengths = rng.integers(_TOKENS[0], _TOKENS[1] + 1, size)
    counts = -(-lengths // PAGE)
    pages = rng.permutation(_PAGES)[: counts.sum()].astype(np.int32)
    last = (lengths - (counts - 1) * PAGE).astype(np.int32)
    return Step(size, (starts(counts), pages, last))


class Steps:
    """Queries, a cache and outputs on the GPU, and who can make a step."""

    def __init__(self, bench: Bench) -> None:
        self.bench, self.gpu = bench, bench.gpu
        rng = np.random.default_rng()
        self.q = self.gpu.put(random(rng, MOST, HEADS, HEAD_DIM))
        cache = (_PAGES, PAGE, KV_HEADS, HEAD_DIM)
        self.k, self.v = (self.gpu.put(random(rng, *cache)) for _ in range(2))
        self.out = self.gpu.nothing((MOST, HEADS, HEAD_DIM))
        self.plan = fi_ffi.BatchDecodePlan(
            *_draw(rng).tables, num_qo_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=HEAD_DIM,
            page_size=PAGE, device=self.gpu.device, stream=self.gpu.stream,
        )  # fmt: skip
        # The peer is given the batches that the whole step is; no other side sees those of another.
        self._seed = int(rng.integers(2**32))

    def side(self, name: str, loop: Loop, made: Callable[[Step], Step], part: int) -> Side:
        """`loop` makes steps of batches that `made` prepares before; a `part` of it is timed."""
        timed, others = np.random.default_rng([self._seed, part]), np.random.default_rng()

        def run(count: int) -> float:
            return float(loop([made(_draw(timed)) for _ in range(count)])[part])

        def check() -> None:
            for _ in range(_CHECKED):
                step = _draw(others)
                self.check(step, lambda: loop([made(step)]))  # noqa: B023

        return Side(name, run, check)

    def check(self, step: Step, call: Callable[[], object]) -> None:
        """Raise `Wrong` unless a call leaves the step's results, and the rest poisoned."""
        self.gpu.poison(self.out)
        call()
        got, indptr = self.out.get(), np.arange(step.size + 1)

        def keys(request: int) -> tuple[Array, Array]:
            k, v = (from_pages(cache.host, *step.tables, request) for cache in (self.k, self.v))
            return k, v

        exact = exact_batch(self.q.host[: step.size], indptr, keys, Options(SM_SCALE))
        check_attention(got[: step.size], exact, f"attention of {step.size} requests")
        if not (got[step.size :].view(np.uint8) == POISON).all():
            raise Wrong(f"attention of {step.size} requests wrote past its rows")

    def ours(self) -> Loop:
        """A replan and the runs, typed, in a stream scope."""
        replan, run, stream = self.plan.replan, self.plan.run, self.gpu.stream
        q_ptr, out_ptr, k, v = self.q.ptr, self.out.ptr, self.k.desc(), self.v.desc()

        def loop(steps: list[Step]) -> Array:
            total = np.zeros(len(PARTS))
            for size, tables in steps:
                start = perf_counter_ns()
                with fi_ffi.stream(stream):
                    replan(*tables)
                    planned = perf_counter_ns()
                    q = TensorDesc(q_ptr, (size, HEADS, HEAD_DIM), "float16")
                    out = TensorDesc(out_ptr, (size, HEADS, HEAD_DIM), "float16")
                    ready = perf_counter_ns()
                    run(q, k, v, out)
                    ran = perf_counter_ns()
                    for _ in range(RUNS - 1):
                        run(q, k, v, out)
                    ran_all = perf_counter_ns()
                end = perf_counter_ns()
                later = (ran_all - ran) / (RUNS - 1)
                total += end - start, planned - start, ran - ready, later
            return total

        return loop

    def undisturbed(self, name: str) -> Side:
        """The first run of a plan after another plan's replan, which changes nothing for it: what
        it takes longer than a later run, it takes for the processor's caches alone."""
        stream, batch = self.gpu.stream, _draw(np.random.default_rng())
        plan = fi_ffi.BatchDecodePlan(
            *batch.tables, num_qo_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=HEAD_DIM,
            page_size=PAGE, device=self.gpu.device, stream=stream,
        )  # fmt: skip
        replan, run, k, v = self.plan.replan, plan.run, self.k.desc(), self.v.desc()
        shape = (batch.size, HEADS, HEAD_DIM)
        q, out = (TensorDesc(of.ptr, shape, "float16") for of in (self.q, self.out))

        def loop(steps: list[Step]) -> float:
            total = 0
            for step in steps:
                with fi_ffi.stream(stream):
                    replan(*step.tables)
                    start = perf_counter_ns()
                    run(q, k, v, out)
                    total += perf_counter_ns() - start
                    for _ in range(RUNS - 1):
                        run(q, k, v, out)
            return total

        rng = np.random.default_rng()
        return Side(
            name, lambda count: loop([_draw(rng) for _ in range(count)]),
            lambda: self.check(batch, lambda: loop([_draw(rng)])),
        )  # fmt: skip

    def streamed(self) -> Loop:
        """A replan and the runs, each given the stream, and the descriptors of each run made."""
        replan, run, stream = self.plan.replan, self.plan.run, self.gpu.stream
        q_ptr, out_ptr, k, v = self.q.ptr, self.out.ptr, self.k.desc(), self.v.desc()

        def loop(steps: list[Step]) -> Array:
            start = perf_counter_ns()
            for size, tables in steps:
                replan(*tables, stream=stream)
                for _ in range(RUNS):
                    q = TensorDesc(q_ptr, (size, HEADS, HEAD_DIM), "float16")
                    out = TensorDesc(out_ptr, (size, HEADS, HEAD_DIM), "float16")
                    run(q, k, v, out, stream=stream)
            return np.array([perf_counter_ns() - start])

        return loop

    def theirs(self) -> Loop:
        """FlashInfer's wrapper, planned and run as it is quickest."""
        flashinfer = self.bench.peers.flashinfer(self.plan.module)
        torch = self.bench.peers.need("torch")
        buffer = torch.empty(128 * 2**20, dtype=torch.uint8, device=self.gpu.device)
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(buffer, "NHD")
        queries, k, v, outputs = map(self.gpu.tensor, (self.q, self.k, self.v, self.out))
        plan, run, cache = wrapper.plan, wrapper.run, (k, v)

        def loop(steps: list[Step]) -> Array:
            start = perf_counter_ns()
            for size, tables in steps:
                plan(*tables, HEADS, KV_HEADS, HEAD_DIM, PAGE)
                q, out = queries[:size], outputs[:size]
                for _ in range(RUNS):
                    run(q, cache, out=out, enable_pdl=False)
            return np.array([perf_counter_ns() - start])

        return loop

    def on_torch(self, step: Step) -> Step:
        """The same tables as torch tensors on the host."""
        from_numpy = self.bench.peers.need("torch").from_numpy
        indptr, indices, last = map(from_numpy, step.tables)
        return Step(step.size, (indptr, indices, last))


def step(bench: Bench) -> Iterator[Line]:
    """The whole step beside the wrapper's, and what its parts take."""
    steps = Steps(bench)
    sides = [steps.side(name, steps.ours(), lambda step: step, i) for i, name in enumerate(PARTS)]
    sides.append(steps.side("step, stream=", steps.streamed(), lambda step: step, 0))
    sides.append(steps.undisturbed("the first run after another plan's replan"))
    missing = None
    try:
        name = f"BatchDecodeWithPagedKVCacheWrapper.plan, {RUNS} run(out=)"
        sides.append(steps.side(name, steps.theirs(), steps.on_torch, 0))
    except Missing as error:  # of the peer: what a step takes can be told without it
        missing = error
    measured = bench.measure(sides, bench.less(20, 1)).values()
    whole, replan, first, later, streamed, undisturbed, *peer = measured
    if peer:
        yield Line("decode step", whole, peer[0])
        yield Line("decode step streamed", streamed, peer[0])
    yield Line("", replan, None, "decode step: the replan")
    yield Line("", first, None, "decode step: the first run")
    yield Line("", later, None, f"decode step: each of the {RUNS - 1} later runs")
    yield Line("first run", first, later)
    yield Line("", undisturbed, later, f"decode step: {undisturbed.name}")
    if missing is not None:
        raise missing
