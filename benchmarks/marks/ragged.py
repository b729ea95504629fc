"""Ragged prefill's plans, fa2 and fa3, beside FlashInfer's wrapper."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

import fi_ffi
from fi_ffi.reference.arrays import Array
from marks.batches import HEAD_DIM, HEADS, KV_HEADS, Ragged
from marks.bench import Bench
from marks.plans import STEPS, Planner, lines
from marks.report import Line

BATCH = 16


class Prefill:
    """A batch on the GPU, and who can run it."""

    def __init__(self, bench: Bench, backend: str) -> None:
        self.bench, self.gpu, self.backend = bench, bench.gpu, backend
        tokens = np.random.default_rng().integers(17, 129, BATCH)
        self.batch = batch = Ragged(tokens, STEPS)
        self.arrays = [self.gpu.put(array) for array in (batch.q, batch.k, batch.v)]
        self.arrays.append(self.gpu.nothing(batch.q.shape))
        self.tables = [batch.indptr(step) for step in range(STEPS)]
        self.plan = self.new_plan(self.tables[0])

    def new_plan(self, indptr: Array, workspace: Any = None) -> Any:
        return fi_ffi.BatchPrefillPlan(
            indptr, kv_indptr=indptr, num_qo_heads=HEADS, num_kv_heads=KV_HEADS,
            head_dim_qk=HEAD_DIM, causal=True, backend=self.backend, device=self.gpu.device,
            workspace=workspace, stream=self.gpu.stream,
        )  # fmt: skip

    def plan_run(self, plan: Any, step: int) -> None:
        rows = int(self.tables[step][-1])
        descs = [array.desc() for array in self.arrays]
        parts = [fi_ffi.TensorDesc(d.ptr, (rows, *d.shape[1:]), d.dtype) for d in descs]
        plan.ragged_run(*parts, stream=self.gpu.stream)

    @functools.cached_property
    def wrapper(self) -> Any:
        """FlashInfer's, planned with the first tables."""
        peers = self.bench.peers
        flashinfer, torch = peers.flashinfer(self.plan.module), peers.need("torch")
        buffer = torch.empty(128 * 2**20, dtype=torch.uint8, device=self.gpu.device)
        made = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(buffer, "NHD", backend=self.backend)
        indptr = torch.from_numpy(self.tables[0])
        made.plan(indptr, indptr, HEADS, KV_HEADS, HEAD_DIM, causal=True)
        return made

    def wrapper_run(self, step: int) -> None:
        rows = int(self.tables[step][-1])
        q, k, v, out = (self.gpu.tensor(array)[:rows] for array in self.arrays)
        self.wrapper.run(q, k, v, out=out)

    def check(self, call: Callable[[], object], step: int) -> None:
        """That a call leaves the step's results in the output."""
        out = self.arrays[-1]
        self.gpu.poison(out)
        call()
        self.batch.check(step, out.get()[: int(self.tables[step][-1])])


def plan(bench: Bench, backend: str, key: str) -> Iterator[Line]:
    """`replan`: prompts a token longer each time; `key` names its mark."""
    prefill = Prefill(bench, backend)
    wrapper, stream = prefill.wrapper, bench.gpu.stream
    ours = prefill.plan

    def replan(indptr: Array) -> None:
        ours.replan(indptr, kv_indptr=indptr, stream=stream)

    def theirs(name: str, made: Callable[[Any], Any]) -> Planner:
        steps = [(made(table), made(table)) for table in prefill.tables]
        arguments = [(*both, HEADS, KV_HEADS, HEAD_DIM) for both in steps]
        return Planner(
            f"the {backend} wrapper's plan, {name}", wrapper.plan, arguments,
            lambda _, step: prefill.wrapper_run(step), {"causal": True},
        )  # fmt: skip

    workspace = fi_ffi.Workspace.allocate(bench.gpu.device)
    same = [(table,) for table in prefill.tables]
    first = Planner("first", prefill.new_plan, same, prefill.plan_run, {"workspace": workspace})
    mine = Planner("replan", replan, same, lambda _, step: prefill.plan_run(ours, step))
    what = f"ragged prefill replan, {backend}"
    yield from lines(bench, key, what, prefill.check, mine, first, theirs, _direct(prefill), same)


def _direct(prefill: Prefill) -> Planner:
    """The module's own `plan`, given what the wrapper gives it."""
    wrapper, torch = prefill.wrapper, prefill.bench.peers.need("torch")
    module = prefill.bench.peers.module(prefill.plan.module)
    page_size, no_graph, causal, no_window = 1, False, True, -1
    more = (-1, False, 0) if prefill.backend == "fa2" else ()  # how requests are split

    def arguments(table: Array) -> tuple[Any, ...]:
        indptr, lengths = torch.from_numpy(table), torch.from_numpy(np.diff(table))
        return (
            wrapper._float_workspace_buffer, wrapper._int_workspace_buffer,
            wrapper._pin_memory_int_workspace_buffer, indptr, indptr, lengths, int(table[-1]),
            BATCH, HEADS, KV_HEADS, page_size, no_graph, HEAD_DIM, HEAD_DIM, causal, no_window,
            *more,
        )  # fmt: skip

    def run(info: Any, step: int) -> None:
        indptr = torch.from_numpy(prefill.tables[step]).to(prefill.gpu.device)
        wrapper._plan_info, wrapper._qo_indptr_last = info, int(prefill.tables[step][-1])
        wrapper._qo_indptr_buf = wrapper._kv_indptr_buf = indptr
        prefill.wrapper_run(step)

    steps = [arguments(table) for table in prefill.tables]
    return Planner(f"the {prefill.backend} module's plan through tvm_ffi", module.plan, steps, run)
