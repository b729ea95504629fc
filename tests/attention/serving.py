"""The tests of plans over time: workspaces, replans, streams, and CUDA graphs."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import fi_ffi

from tests.attention.arrays import bytes_of
from tests.attention.batches import SPARE, Batch, draw
from tests.attention.bodies import check_results
from tests.attention.cases import Case, Result
from tests.attention.machines import POISON, Cpu, part
from tests.attention.mla import MlaCase
from tests.attention.specs import Spec


class Service:
    """One cache that batches of many lengths are planned over."""

    def __init__(self, spec: Spec, machine: Cpu, rng: np.random.Generator) -> None:
        self.spec, self.rng = spec, rng
        self.most_keys = min(spec.keys, machine.most_keys)
        self.rows = spec.batch * spec.queries
        room = SPARE + spec.batch * -(-self.most_keys // spec.page_size) + 2
        kind = MlaCase if spec.family == "batch_mla" else Case
        self.case = kind(spec, machine, rng, self.rows, room)
        for name in self.case.caches():
            self.case.tensors[name][:SPARE] = np.nan  # no batch has these pages

    def batch(self) -> Batch:
        """Another batch of the same number of requests."""
        spec = self.spec
        size = spec.page_size
        qo, kv = draw(spec.batch, spec.queries, self.most_keys, size, self.rng,
                      no_keys=spec.no_keys)  # fmt: skip
        if spec.family == "batch_decode":
            qo = [1] * spec.batch
        elif spec.family == "batch_mla":
            # As many that the number of blocks that work together stays the same.
            qo = [spec.queries] * spec.batch
            kv = [max(n, spec.queries) for n in kv]
        return self.case.batch(qo, kv)


def exact_workspace(
    case: Case, batch: Batch, less: tuple[int, int] = (0, 0), **more: Any
) -> tuple[fi_ffi.Workspace, list[Any]]:
    """A workspace of just as many bytes as are asked for, or fewer, poisoned."""
    sizes = case.workspace_size(batch, **more)
    device = case.machine.device
    placed = [case.machine.place(np.full(max(n, 16), POISON, np.uint8)) for n in sizes]
    counts = [n - m for n, m in zip(sizes, less, strict=True)]
    parts = [part(array, n, device) for array, n in zip(placed, counts, strict=True)]
    return fi_ffi.Workspace(*parts), placed


def check_exact_workspace(spec: Spec, machine: Cpu, rng: np.random.Generator, **more: Any) -> None:
    """`workspace_size` is enough for the planner and the run; one byte less is refused."""
    service = Service(spec, machine, rng)
    case, batch = service.case, service.batch()
    if more.get("enable_cuda_graph"):
        more |= graph_options(service)
    rows = case.rows if more else batch.rows
    workspace, placed = exact_workspace(case, batch, **more)
    plan = case.plan(batch, workspace=workspace, **more)
    case.check(batch, case.run(plan, batch, case.outputs(rows)))
    assert all(array.intact() for array in placed), "bytes beside the workspace"
    for i, size in enumerate(case.workspace_size(batch, **more)):
        if size:
            less = (int(i == 0), int(i == 1))
            workspace, _ = exact_workspace(case, batch, less, **more)
            with pytest.raises(fi_ffi.ArgumentError, match=f"got {size - 1} bytes.* {size} bytes"):
                case.plan(batch, workspace=workspace, **more)


def check_stale(spec: Spec, machine: Cpu, rng: np.random.Generator) -> None:
    """A workspace is one plan's at a time, until that one is planned again."""
    service = Service(spec, machine, rng)
    case = service.case
    workspace = fi_ffi.Workspace.allocate(machine.device)
    batches = [service.batch() for _ in range(2)]
    plans = [case.plan(batch, workspace=workspace) for batch in batches]
    for holder in (1, 0, 1):
        case.replan(plans[holder], batches[holder])
        out = case.outputs(batches[holder].rows)
        other = 1 - holder
        with pytest.raises(fi_ffi.ArgumentError, match="a stale plan"):
            case.run(plans[other], batches[other], case.outputs(batches[other].rows))
        with pytest.raises(fi_ffi.ArgumentError, match="a stale plan"):
            _ = plans[other].plan_info
        case.check(batches[holder], case.run(plans[holder], batches[holder], out))


def check_many_replans(spec: Spec, machine: Cpu, rng: np.random.Generator) -> None:
    """Replans one after the other, none waited for: each run has its own plan's lengths."""
    service = Service(spec, machine, rng)
    case, plan = service.case, None
    batches = [service.batch() for _ in range(machine.rounds(200))]
    kept = [case.outputs(batch.rows) for batch in batches]
    workspace = fi_ffi.Workspace.allocate(machine.device, 1 << 27, 1 << 22)
    case.inputs(0)  # placed before anything is queued
    machine.delay(machine.stream)
    for batch, out in zip(batches, kept, strict=True):
        if plan is None:
            plan = case.plan(batch, workspace=workspace)
        else:
            case.replan(plan, batch)
        case.run(plan, batch, out)
    machine.synchronize()
    for batch, out in zip(batches, kept, strict=True):
        case.check(batch, out)


def check_interleaved(specs: tuple[Spec, Spec], machine: Cpu, rng: np.random.Generator) -> None:
    """Two plans on two streams, with a workspace each, that neither waits for."""
    services = [Service(spec, machine, rng) for spec in specs]
    streams = machine.streams(2)
    work: list[list[tuple[Batch, Result]]] = []
    for service in services:
        batches = [service.batch() for _ in range(machine.rounds(50))]
        work.append([(batch, service.case.outputs(batch.rows)) for batch in batches])
    spaces = [fi_ffi.Workspace.allocate(machine.device, 1 << 27, 1 << 22) for _ in range(2)]
    plans: list[Any] = [None, None]
    for service, stream in zip(services, streams, strict=True):
        service.case.inputs(0)
        machine.delay(stream)
    for turn in range(len(work[0])):
        for i, (service, stream) in enumerate(zip(services, streams, strict=True)):
            batch, out = work[i][turn]
            if plans[i] is None:
                plans[i] = service.case.plan(batch, stream, workspace=spaces[i])
            else:
                service.case.replan(plans[i], batch, stream)
            service.case.run(plans[i], batch, out, stream)
    machine.synchronize()
    for service, done in zip(services, work, strict=True):
        for batch, out in done:
            service.case.check(batch, out)


def check_another_stream(spec: Spec, machine: Cpu, rng: np.random.Generator) -> None:
    """A run on another stream waits for its plan, and a replan for such a run."""
    service = Service(spec, machine, rng)
    case = service.case
    planning, running = machine.streams(2)
    workspace = fi_ffi.Workspace.allocate(machine.device, 1 << 27, 1 << 22)
    batches = [service.batch() for _ in range(6)]
    kept = [case.outputs(batch.rows) for batch in batches]
    case.inputs(0)  # placed before anything is queued
    plan = None
    for turn, (batch, out) in enumerate(zip(batches, kept, strict=True)):
        machine.delay(planning if turn % 2 else running)
        if plan is None:
            plan = case.plan(batch, planning, workspace=workspace)
        else:
            case.replan(plan, batch, planning)
        case.run(plan, batch, out, planning if turn == 4 else running)
    machine.synchronize()
    for batch, out in zip(batches, kept, strict=True):
        case.check(batch, out)


def check_fixed_split(spec: Spec, machine: Cpu, rng: np.random.Generator) -> None:
    """With `fixed_split_size`, requests of a batch come out as they do alone, bit for bit."""
    spec = replace(spec, plan={"fixed_split_size": 2})
    service = Service(spec, machine, rng)
    case = service.case
    kv = [int(n) for n in rng.integers(spec.queries, service.most_keys, spec.batch)]
    whole = case.batch([spec.queries] * spec.batch, kv)
    together = case.run(case.plan(whole), whole)
    case.check(whole, together)
    assert whole.indices is not None and whole.last_page_len is not None
    for i in range(spec.batch):
        pages = whole.indices[whole.kv_indptr[i] : whole.kv_indptr[i + 1]]
        alone = Batch(
            [whole.qo[i]], [whole.kv[i]], np.array([0, spec.queries], np.int32),
            np.array([0, len(pages)], np.int32), pages, whole.last_page_len[[i]],
        )  # fmt: skip
        rows = slice(i * spec.queries, (i + 1) * spec.queries)
        lone = Case(spec, machine, rng, spec.queries, case.room)
        lone.tensors = case.tensors | {"q": case.tensors["q"][rows]}
        result = lone.run(lone.plan(alone), alone)
        for name in ("o", "lse"):
            ours, theirs = getattr(result, name).get(), getattr(together, name).get()[rows]
            assert bytes_of(ours) == bytes_of(theirs), f"{name} of request {i}: {whole.kv=}"


def check_refused_or_right(spec: Spec, machine: Cpu, rng: np.random.Generator) -> None:
    """What a kernel may not be able to do is refused, not done wrong."""
    with contextlib.suppress(fi_ffi.ArgumentError):
        check_results(spec, machine, rng)


# CUDA graphs; on the CPU a run is repeated instead of a graph.


def graph_options(service: Service) -> dict[str, Any]:
    """Room for every batch of a service."""
    made = {"enable_cuda_graph": True, "max_num_indices": service.case.room}
    if service.spec.family != "batch_decode":
        made["max_total_num_rows"] = service.rows
    return made


def check_graph(spec: Spec, machine: Cpu, rng: np.random.Generator) -> None:
    """One captured run serves other lengths after a replan; refused replans change nothing."""
    service = Service(spec, machine, rng)
    case, batch = service.case, service.batch()
    options = graph_options(service)
    workspace, placed = exact_workspace(case, batch, **options)
    plan = case.plan(batch, workspace=workspace, **options)
    out = case.outputs()
    case.check(batch, case.run(plan, batch, out))
    current = batch
    replay = machine.capture(lambda: case.run(plan, current, out))

    def play() -> None:
        for array in (out.o, out.lse):
            machine.poison(array, machine.stream)
        replay()
        machine.synchronize()
        case.check(batch, out)

    for _ in range(machine.rounds(50)):
        batch = service.batch()
        case.replan(plan, batch)
        play()
    for wrong in refused(service, batch):
        with pytest.raises(fi_ffi.ArgumentError):
            case.replan(plan, wrong)
        play()
    assert all(array.intact() for array in placed), "bytes beside the workspace"

    def replan_inside() -> None:
        with pytest.raises(fi_ffi.ArgumentError, match="captur"):
            case.replan(plan, batch)
        case.run(plan, batch, out)

    if machine.is_gpu:
        machine.capture(replan_inside)
        play()


def refused(service: Service, like: Batch) -> list[Batch]:
    """Batches that would change what was captured."""
    assert like.indices is not None and like.last_page_len is not None
    fewer = service.case.batch(like.qo[:-1], like.kv[:-1])
    past = like.indices.copy()
    past[0] = service.case.room + 5  # a page that the cache has not
    wrong = [fewer, replace(like, indices=past)]
    if service.spec.family != "batch_decode":
        more = [n + service.rows for n in like.qo]
        starts = np.cumsum([0, *more]).astype(np.int32)
        wrong.append(replace(like, qo=more, qo_indptr=starts))
    counts = np.diff(like.kv_indptr) + service.case.room
    starts = np.cumsum([0, *counts]).astype(np.int32)
    full = np.full(len(like.last_page_len), service.spec.page_size, np.int32)
    pages = np.zeros(starts[-1], np.int32)
    kv = [int(n) * service.spec.page_size for n in counts]
    wrong.append(replace(like, kv=kv, kv_indptr=starts, indices=pages, last_page_len=full))
    return wrong
