"""Plans over time: the same tests on the CPU, and (tests/gpu) on a GPU."""

from __future__ import annotations

import functools
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import fi_ffi
from fi_ffi.comm.memory import copy
from fi_ffi.loader.distributions import is_in
from fi_ffi.ops.attention.arrays import Arrays
from fi_ffi.ops.attention.rows import UNIFORM
from fi_ffi.ops.call import cuda
from fi_ffi.ops.call.releases import release_in_force
from fi_ffi.ops.call.staging import MAX_STAGES
from fi_ffi.reference.attention.formula import Options, exact, from_pages

from tests.attention import judge
from tests.attention.batches import Batch, bytes_of
from tests.attention.cases import (
    Case,
    Result,
    Service,
    check_results,
    exact_workspace,
    graph_options,
    make,
    refused,
)
from tests.attention.tables import FIXED_SPLIT, GRAPHS, LATER_KEYS, SERVED, TILES_INSIDE, Spec
from tests.helpers import plan_calls

# On the CPU nothing waits; a pretended GPU tells what a real one would wait for.
WITH_STREAMS = pytest.mark.parametrize("machine", ["pretended gpu"], indirect=True)
SERVICES = pytest.mark.parametrize("spec", SERVED.values(), ids=SERVED)


@SERVICES
@pytest.mark.parametrize("graph", [False, True], ids=["plain", "graph"])
def test_exact_workspace(spec, graph, machine, rng):
    """`workspace_size` is enough for the planner and the run; one byte less is refused."""
    service = Service(spec, machine, rng)
    case, batch = service.case, service.batch()
    more = graph_options(service) if graph else {}
    rows = case.rows if graph else batch.rows
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


@pytest.mark.parametrize("page_size", [0, 16])
def test_as_many_queries_of_each(page_size, machine, rng):
    """Told to the planner, with CUDA graphs, of a workspace that has not a byte more."""
    spec = Spec(lengths=((3, 300), (3, 3), (3, 70)), causal=True, page_size=page_size)
    case, batch = make(spec, machine, rng)
    graph = {"enable_cuda_graph": True, "uniform_q_len": 3}
    if machine.is_gpu and not is_in(release_in_force(), UNIFORM):
        with pytest.raises(fi_ffi.ArgumentError, match="uniform_q_len.*expected 0: FlashInfer >="):
            case.plan(batch, **graph)
        return
    workspace, placed = exact_workspace(case, batch, **graph)
    plan = case.plan(batch, workspace=workspace, **graph)
    case.check(batch, case.run(plan, batch))
    assert all(array.intact() for array in placed), "bytes beside the workspace"
    with pytest.raises(fi_ffi.ArgumentError, match="got 3 to 3 queries a request, expected 2 of"):
        case.plan(batch, **graph | {"uniform_q_len": 2})
    case.check(batch, case.run(plan, batch))


@pytest.mark.parametrize("page_size", [0, 1, 16])
def test_a_workspace_that_other_lengths_would_not_fit(page_size, machine, rng):
    """Of 128 MiB: on 132 multiprocessors, batches of so many queries take up to 139,493,376."""
    lengths = ((100, 300), (3, 30))
    spec = Spec(heads=32, kv_heads=4, lengths=lengths, causal=True, page_size=page_size)
    case, batch = make(spec, machine, rng)
    workspace = fi_ffi.Workspace.allocate(machine.device, 1 << 27, 1 << 23)
    plan = case.plan(batch, workspace=workspace)
    assert plan._needs.float_bytes <= 1 << 27
    case.check(batch, case.run(plan, batch))


@SERVICES
def test_many_replans(spec, machine, rng):
    """Replans one after the other, none waited for: each run has its own plan's lengths."""
    service = Service(spec, machine, rng)
    case, plan = service.case, None
    batches = [service.batch() for _ in range(machine.rounds(200))]
    kept = [case.outputs(batch.rows) for batch in batches]
    workspace = fi_ffi.Workspace.allocate(machine.device, 1 << 27, 1 << 23)
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


@SERVICES
@WITH_STREAMS
def test_replans_while_copies_are_not_done(spec, machine, rng, monkeypatch):
    """Each plans in another piece of page-locked memory, until they are used again in turn."""
    service = Service(spec, machine, rng)
    case, waits = service.case, list[cuda.Event]()
    monkeypatch.setattr(cuda.Event, "is_done", lambda _: False)
    monkeypatch.setattr(cuda.Event, "wait", lambda event: waits.append(event))
    plan, pieces = case.plan(service.batch()), set[int]()
    for _ in range(2 * MAX_STAGES):
        batch = service.batch()
        case.replan(plan, batch)
        case.check(batch, case.run(plan, batch, case.outputs(batch.rows)))
        pieces.add(plan.workspace._stages.last.desc.ptr)
    assert len(pieces) >= MAX_STAGES and waits


@SERVICES
@WITH_STREAMS
def test_another_stream(spec, machine, rng):
    """A run on another stream waits for its plan, a replan for such a run and for the last plan."""
    service = Service(spec, machine, rng)
    case = service.case
    one, other = machine.streams(2)
    order = [(one, other)] * 3 + [(one, one), (other, one), (other, other), (one, other)]
    workspace = fi_ffi.Workspace.allocate(machine.device, 1 << 27, 1 << 23)
    batches = [service.batch() for _ in order]
    kept = [case.outputs(batch.rows) for batch in batches]
    case.inputs(0)  # placed before anything is queued
    plan = None
    for turn, (batch, out) in enumerate(zip(batches, kept, strict=True)):
        planning, running = order[turn]
        machine.delay(one if turn % 2 else other)
        if plan is None:
            plan = case.plan(batch, planning, workspace=workspace)
        else:
            case.replan(plan, batch, planning)
        case.run(plan, batch, out, running)
    machine.synchronize()
    machine.check_order(one, other)
    for batch, out in zip(batches, kept, strict=True):
        case.check(batch, out)


@pytest.mark.parametrize(
    "names", [("prefill fa2", "prefill fa3"), ("decode", "prefill fa2"), ("mla fa2", "mla fa3")]
)
@WITH_STREAMS
def test_two_plans_interleaved(names, machine, rng):
    """Two plans on two streams, with a workspace each, that neither waits for."""
    services = [Service(spec, machine, rng) for spec in map(SERVED.get, names)]
    streams = machine.streams(2)
    work: list[list[tuple[Batch, Result]]] = []
    for service in services:
        batches = [service.batch() for _ in range(machine.rounds(50))]
        work.append([(batch, service.case.outputs(batch.rows)) for batch in batches])
    spaces = [fi_ffi.Workspace.allocate(machine.device, 1 << 27, 1 << 23) for _ in range(2)]
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
    machine.check_apart(*streams)
    for stream in streams:
        machine.check_order(stream)
    for service, done in zip(services, work, strict=True):
        for batch, out in done:
            service.case.check(batch, out)


@pytest.mark.parametrize("spec", FIXED_SPLIT.values(), ids=FIXED_SPLIT)
def test_fixed_split_size_does_not_depend_on_the_batch(spec, machine, rng):
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


@pytest.mark.parametrize("spec", GRAPHS.values(), ids=GRAPHS)
def test_graphs(spec, machine, rng):
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


@pytest.mark.parametrize("spec", TILES_INSIDE.values(), ids=TILES_INSIDE)
def test_tiles_that_end_inside_a_query_are_refused(spec, machine, rng):
    words = rf"`qo_indptr`: got \d queries of {spec.heads} heads in a request"
    with pytest.raises(fi_ffi.ArgumentError, match=words):
        check_results(spec, machine, rng)
    check_results(replace(spec, causal=False), machine, rng)


@pytest.mark.parametrize("spec", LATER_KEYS.values(), ids=LATER_KEYS)
def test_windows_with_all_later_keys(spec, machine, rng):
    check_results(spec, machine, rng)


def test_room_for_as_many_requests_as_have_starts():
    """Where each request's pages start takes one number more than there are requests."""
    arrays = Arrays(1000, ["indptr"], size=3)
    most = arrays.where("indptr")[1] - 1
    for size in (1, most, most + 1, 2 * most):
        batch: Any = SimpleNamespace(size=size, num_indices=0, views={"indptr": None})
        assert arrays.holds(1000, batch) == (size <= most)


def _write(machine: Any, placed: Any, values: np.ndarray) -> None:
    """Other values where a graph reads them."""
    if machine.is_gpu:
        source = machine.place(values).desc()
        device = fi_ffi.parse_device(machine.device)
        copy(placed.desc().ptr, source.ptr, values.nbytes, device, machine.stream)
    else:
        placed.array[...] = values


@pytest.mark.parametrize("way", ["typed", "prepared", "graph"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_decodes_of_any_lengths(dtype, way, machine, rng):
    """One plan; each run finds the lengths and pages of its batch on the device."""
    b, page_size, heads, dim = 7, 16, (8, 4), 128
    made = {"num_qo_heads": 8, "num_kv_heads": 4, "head_dim": dim, "page_size": page_size}
    plan = fi_ffi.BatchDecodePlan(
        b, None, None, q_data_type=dtype, device=machine.device, stream=machine.stream, **made
    )
    machine.need(plan.module)
    assert plan.workspace_size(b, None, None, device=machine.device, **made).int_bytes
    most, pages = 5, b * 5
    numpy = fi_ffi.DTYPES[dtype].numpy
    arrays = {
        "q": rng.standard_normal((b, heads[0], dim)).astype(numpy),
        "paged_k_cache": rng.standard_normal((pages, page_size, heads[1], dim)).astype(numpy),
        "paged_v_cache": rng.standard_normal((pages, page_size, heads[1], dim)).astype(numpy),
        "o": np.full((b, heads[0], dim), np.nan, numpy),
        "lse": np.full((b, heads[0]), np.nan, np.float32),
        "paged_kv_indptr": np.zeros(b + 1, np.int32),
        "paged_kv_indices": np.zeros(pages, np.int32),
        "paged_kv_last_page_len": np.ones(b, np.int32),
    }
    placed = {name: machine.place(array) for name, array in arrays.items()}
    given = {name: each.desc() for name, each in placed.items()}
    launch = functools.partial(plan.run, **given, stream=machine.stream)
    if way == "prepared":
        launch = fi_ffi.prepare(plan.run, **given, stream=machine.stream)
    elif way == "graph":
        launch()
        launch = machine.capture(launch)
    rounding = judge.reference(dtype, rope=False, prefill=False)
    if machine.is_gpu:  # of what is never split
        rounding = judge.rounding("batch_decode", "", dtype, dtype, dtype, least_piece=1 << 30)
    for _ in range(machine.rounds(40)):
        lengths = rng.integers(1, most * page_size + 1, b)
        lengths[rng.integers(b, size=2)] = 0, 1
        indptr = np.cumsum([0, *(-(-lengths // page_size))]).astype(np.int32)
        indices, last = rng.permutation(pages).astype(np.int32), (lengths - 1) % page_size + 1
        for name, values in (("paged_kv_indptr", indptr), ("paged_kv_indices", indices),
                             ("paged_kv_last_page_len", last.astype(np.int32))):  # fmt: skip
            _write(machine, placed[name], values)
        for name in ("o", "lse"):
            machine.poison(placed[name], machine.stream)
        launch()
        machine.synchronize()
        o, lse = placed["o"].get(), placed["lse"].get()
        for i, length in enumerate(lengths):
            caches = arrays["paged_k_cache"], arrays["paged_v_cache"]
            k, v = (from_pages(cache, indptr, indices, last, i) for cache in caches)
            expected = exact(arrays["q"][i : i + 1], k, v, Options(dim**-0.5))
            assert judge.worst(expected, o[i : i + 1], lse[i : i + 1], rounding, length) <= 1
    assert all(each.intact() for each in placed.values())


def test_decodes_of_any_lengths_refused(machine):
    """What such a plan has and lacks, by name."""
    options: dict[str, Any] = {
        "num_qo_heads": 2, "num_kv_heads": 2, "head_dim": 128, "page_size": 16,
        "device": machine.device, "stream": machine.stream,
    }  # fmt: skip
    make, ints = functools.partial(fi_ffi.BatchDecodePlan, **options), np.array([0, 1], np.int32)
    for argument, match, call in (
        ("indptr", "got 0, expected an int from 1", lambda: make(0, None, None)),
        ("indptr", "got bool True, expected int", lambda: make(True, None, None)),
        ("last_page_len", "NoneType", lambda: make(ints, None, None)),
        ("indptr", "got int 1", lambda: make(1, ints, None)),
        ("indptr", "got int 1", lambda: make(1, None, ints)),
        ("enable_cuda_graph", "got True", lambda: make(1, None, None, enable_cuda_graph=True)),
    ):
        with pytest.raises((fi_ffi.ArgumentError, fi_ffi.ArgumentTypeError), match=match) as found:
            call()
        assert found.value.argument == argument
    plan = make(1, None, None)
    machine.need(plan.module)
    with pytest.raises(fi_ffi.ArgumentError, match="last_page_len.*None: this is a plan of any"):
        plan.replan(1, None, ints)
    with pytest.raises(fi_ffi.ArgumentTypeError, match="indptr.*ndarray, expected int"):
        plan.replan(ints, None, None)
    x = machine.place(np.zeros((1, 2, 128), np.float16)).desc()
    cache = machine.place(np.zeros((1, 16, 2, 128), np.float16)).desc()
    values = ([0, 1], [0], [1])
    indptr, page, last = (machine.place(np.array(a, np.int32)).desc() for a in values)
    o = machine.place(np.full((1, 2, 128), np.nan, np.float16))
    run = functools.partial(plan.run, x, cache, cache, o.desc(), stream=machine.stream)
    arrays = {"paged_kv_indptr": indptr, "paged_kv_indices": page, "paged_kv_last_page_len": last}
    for name in arrays:
        with pytest.raises((fi_ffi.ArgumentError, fi_ffi.ArgumentTypeError), match=name):
            run(**arrays | {name: None})
        with pytest.raises(fi_ffi.ArgumentError, match=f"{name}.*rank 1"):
            run(**arrays | {name: x})
    with pytest.raises(fi_ffi.ArgumentError, match=r"paged_kv_indptr.*b\+1 = 2"):
        run(**arrays | {"paged_kv_indptr": last})
    planned = make(np.array([0, 1], np.int32), np.zeros(1, np.int32), np.ones(1, np.int32))
    for name in ("paged_kv_indptr", "paged_kv_last_page_len"):
        with pytest.raises(fi_ffi.ArgumentError, match=f"{name}.*None: the plan has it"):
            planned.run(x, cache, cache, o.desc(), **{name: arrays[name]}, stream=machine.stream)
    machine.synchronize()
    assert np.isnan(o.get().astype(np.float32)).all()
    run(**arrays)
    machine.synchronize()
    assert not o.get().any()
    # Of three requests two have no pages: one page is enough.
    plan = make(3, None, None)
    x, out = (machine.place(np.ones((3, 2, 128), np.float16)) for _ in "qo")
    indptr, last = (machine.place(np.array(a, np.int32)).desc() for a in ([0, 0, 1, 1], [1] * 3))
    plan.run(
        x.desc(), cache, cache, out.desc(), paged_kv_indptr=indptr, paged_kv_indices=page,
        paged_kv_last_page_len=last, stream=machine.stream,
    )  # fmt: skip
    machine.synchronize()
    assert not out.get().any()


def test_unknown_options_of_runs():
    """A run refuses an option that it lacks as Python does, and names one like it."""
    case = plan_calls.Case("paged")
    with pytest.raises(TypeError, match=r"paged_run\(\) got an .* 'sm_scal'.*sm_scale"):
        case.run(case.plan(), sm_scal=1.0)
