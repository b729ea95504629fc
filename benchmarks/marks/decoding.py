"""Batch decode: prepared and typed runs, and plans, beside FlashInfer's wrapper."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

import fi_ffi
from fi_ffi.reference.arrays import Array
from marks import native
from marks.batches import HEAD_DIM, HEADS, KV_HEADS, PAGE, SM_SCALE, Decoding
from marks.bench import Bench
from marks.peers import kernels
from marks.plans import STEPS, Planner, lines
from marks.report import Line
from marks.timing import Side, repeated, with_turns

BATCH = 64


def lengths() -> Array:
    """Tokens of each request: 65 to 256."""
    return np.random.default_rng().integers(65, 257, BATCH)


class Decode:
    """A batch on the GPU, and who can run it."""

    def __init__(self, bench: Bench, tokens: Array, steps: int = 1) -> None:
        self.bench, self.gpu, self.batch = bench, bench.gpu, Decoding(tokens, steps)
        batch = self.batch
        self.q, self.k, self.v = map(self.gpu.put, (batch.q, batch.k, batch.v))
        self.out = self.gpu.nothing(batch.q.shape)
        self.descs = tuple(array.desc() for array in (self.q, self.k, self.v, self.out))

    def new_plan(self, *tables: Array, workspace: Any = None) -> Any:
        return fi_ffi.BatchDecodePlan(
            *tables, num_qo_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=HEAD_DIM, page_size=PAGE,
            device=self.gpu.device, workspace=workspace, stream=self.gpu.stream,
        )  # fmt: skip

    @functools.cached_property
    def plan(self) -> Any:
        return self.new_plan(*self.batch.tables(0))

    @functools.cached_property
    def tensors(self) -> tuple[Any, Any, Any, Any]:
        """q, k, v and out for torch."""
        q, k, v, out = map(self.gpu.tensor, (self.q, self.k, self.v, self.out))
        return q, k, v, out

    @functools.cached_property
    def wrapper(self) -> Any:
        """FlashInfer's, planned with the first tables."""
        peers = self.bench.peers
        flashinfer, torch = peers.flashinfer(self.plan.module), peers.need("torch")
        buffer = torch.empty(128 * 2**20, dtype=torch.uint8, device=self.gpu.device)
        made = flashinfer.BatchDecodeWithPagedKVCacheWrapper(buffer, "NHD")
        made.plan(*map(torch.from_numpy, self.batch.tables(0)), HEADS, KV_HEADS, HEAD_DIM, PAGE)
        return made

    def wrapper_run(self) -> None:
        q, k, v, out = self.tensors
        self.wrapper.run(q, (k, v), out=out, enable_pdl=False)

    def plan_run(self, plan: Any) -> None:
        plan.run(*self.descs, stream=self.gpu.stream)

    def check(self, call: Callable[[], object], step: int = 0) -> None:
        """That a call leaves the step's results in the output."""
        self.gpu.poison(self.out)
        call()
        self.batch.check(step, self.out.get())

    @functools.cached_property
    def module(self) -> Any:
        return self.bench.peers.module(self.plan.module)

    def module_run(self) -> functools.partial[object]:
        """The module's own `run`, given what the wrapper gives it."""
        wrapper, (q, k, v, out) = self.wrapper, self.tensors
        nhd, no_window, pdl, soft_cap, rope = 0, -1, False, 0.0, (1.0, 1e-4)
        return functools.partial(
            self.module.run, wrapper._float_workspace_buffer, wrapper._int_workspace_buffer,
            wrapper._plan_info, q, k, v, wrapper._paged_kv_indptr_buf,
            wrapper._paged_kv_indices_buf, wrapper._paged_kv_last_page_len_buf, out, None,
            nhd, no_window, pdl, None, soft_cap, SM_SCALE, *rope,
        )  # fmt: skip


def run(bench: Bench) -> Iterator[Line]:
    """`run(out=)`: prepared and typed, and the module's own."""
    decode, stream = Decode(bench, lengths()), bench.gpu.stream
    prepared = fi_ffi.prepare(decode.plan.run, *decode.descs)
    scoped, module = bench.in_scope(prepared), decode.module_run()
    native_run = native.entry_loop(kernels(decode.plan.module), "run", module.args, stream)
    plan_run, wrapper_run, (tq, tk, tv, tout) = decode.plan.run, decode.wrapper.run, decode.tensors

    def typed(turns: list[Any]) -> None:
        for q, k, v, out in turns:
            plan_run(q, k, v, out, stream=stream)

    def wrapper(turns: list[Any]) -> None:
        for q, cache, out in turns:
            wrapper_run(q, cache, out=out, enable_pdl=False)

    def side(name: str, run: Callable[[int], float], least: int = 1) -> Side:
        return Side(name, run, lambda: decode.check(lambda: run(least)))

    found = bench.measure([
        side("prepared", scoped, 0),
        side("typed", with_turns(typed, [decode.descs])),
        side(
            "BatchDecodeWithPagedKVCacheWrapper.run(out=)",
            with_turns(wrapper, [(tq, (tk, tv), tout)]),
        ),
        side("the module's run through tvm_ffi", repeated(module)),
        side("the module's run from C++", native_run),
    ])  # fmt: skip
    mine, typed_, peer, direct, native_ = found.values()
    yield Line("decode prepared", mine, peer)
    yield Line("decode typed", typed_, peer)
    yield Line("", mine, direct, "batch decode run, prepared")
    yield Line("", mine, native_, "batch decode run, prepared")
    yield Line("", native_, peer, "the module's batch decode run from C++")


def plan(bench: Bench) -> Iterator[Line]:
    """`replan`: tables of the next token each time."""
    decode = Decode(bench, lengths(), STEPS)
    wrapper, ours, sizes = decode.wrapper, decode.plan, (HEADS, KV_HEADS, HEAD_DIM, PAGE)
    tables = [decode.batch.tables(step) for step in range(STEPS)]

    def theirs(name: str, made: Callable[[Any], Any]) -> Planner:
        return Planner(
            f"the wrapper's plan, {name}", wrapper.plan,
            [(*map(made, step), *sizes) for step in tables], lambda *_: decode.wrapper_run(),
        )  # fmt: skip

    mine = Planner(
        "replan", ours.replan, tables, lambda *_: decode.plan_run(ours),
        {"stream": bench.gpu.stream},
    )  # fmt: skip
    workspace = fi_ffi.Workspace.allocate(bench.gpu.device)
    first = Planner(
        "first", decode.new_plan, tables, lambda made, _: decode.plan_run(made),
        {"workspace": workspace},
    )  # fmt: skip
    what = "batch decode replan"
    yield from lines(
        bench,
        "decode plan",
        what,
        decode.check,
        mine,
        first,
        theirs,
        _direct(decode, tables),
        tables,
    )


def _direct(decode: Decode, tables: list[tuple[Array, Array, Array]]) -> Planner:
    """The module's own `plan`, given what the wrapper gives it."""
    wrapper, torch = decode.wrapper, decode.bench.peers.need("torch")
    no_graph, no_window, no_cap = False, -1, 0.0
    nothing = torch.empty(0, dtype=torch.float16)

    def arguments(indptr: Array) -> tuple[Any, ...]:
        return (
            wrapper._float_workspace_buffer, wrapper._int_workspace_buffer,
            wrapper._pin_memory_int_workspace_buffer, torch.from_numpy(indptr), BATCH, HEADS,
            KV_HEADS, PAGE, no_graph, no_window, no_cap, HEAD_DIM, HEAD_DIM, nothing, nothing,
        )  # fmt: skip

    def run(info: Any, step: int) -> None:
        indptr, indices, last = (torch.from_numpy(x).to(decode.gpu.device) for x in tables[step])
        wrapper._plan_info = info
        wrapper._paged_kv_indptr_buf, wrapper._paged_kv_indices_buf = indptr, indices
        wrapper._paged_kv_last_page_len_buf = last
        decode.wrapper_run()

    steps = [arguments(indptr) for indptr, _, _ in tables]
    return Planner("the module's plan through tvm_ffi", decode.module.plan, steps, run)
