"""Anything anywhere: each call is refused by a typed error that names it, or works.

And what a GPU's plan refuses, as far as no kernel is needed to see it.
"""

from __future__ import annotations

import inspect
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fi_ffi
from fi_ffi.loader import machine
from fi_ffi.ops.attention.plan import Plan

from tests.helpers.plan_calls import KINDS, OPTIONS, Case, aligned, changed, refused

# A descriptor of memory that the host could read is of nothing, or of no elements.
_DESCS = st.builds(
    lambda ptr, shape, dtype, device: fi_ffi.TensorDesc(ptr, shape, dtype, device=device),
    st.one_of(st.just(0), st.integers(1, 2**40)),
    st.lists(st.integers(0, 2**12), max_size=4),
    st.sampled_from(list(fi_ffi.DTYPES)),
    st.sampled_from(["cuda:0", "cuda:7", "cuda_managed:0"]),
)
_NOTHING = st.builds(
    lambda shape, dtype, device: fi_ffi.TensorDesc(0, shape, dtype, device=device),
    st.lists(st.integers(0, 5), max_size=4),
    st.sampled_from(list(fi_ffi.DTYPES)),
    st.sampled_from(["cpu", "cuda_host"]),
)
_INTS = st.lists(st.integers(-3, 12), max_size=7).map(lambda values: np.array(values, np.int32))
_ARRAYS = st.builds(
    lambda shape, dtype: np.zeros(shape, dtype),
    st.lists(st.integers(0, 5), max_size=4),
    st.sampled_from([np.float16, np.float32, np.float64, ml_dtypes.bfloat16, np.uint8, np.int32,
                     np.uint16, np.uint32, ml_dtypes.float8_e4m3fn]),
)  # fmt: skip
_WORDS = st.sampled_from(["auto", "fa2", "fa3", "NONE", "ALIBI", "ROPE_LLAMA", "NHD", "HND", "cpu",
                          "cuda_host", *fi_ffi.DTYPES])  # fmt: skip
ANYTHING: st.SearchStrategy[Any] = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.integers(-3, 200),
    st.floats(),
    st.complex_numbers(),
    st.text(max_size=5),
    st.binary(max_size=5),
    st.lists(st.integers(), max_size=3),
    _WORDS,
    _DESCS,
    _NOTHING,
    _INTS,
    _ARRAYS,
)
_SETTINGS = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def attempt(case: Any, function: Any, *args: Any, **arguments: Any) -> object:
    """What the call returns; None where it was refused in the right way."""
    before = case.bytes()
    try:
        return function(*args, **arguments)
    except fi_ffi.ArgumentError as error:
        assert error.op == case.op, error
        assert f"`{error.argument}`: got " in str(error)
        assert str(error.expected)
        assert case.bytes() == before, error
    return None


def drawn(data: st.DataObject, names: list[str], least: int = 1) -> dict[str, Any]:
    chosen = data.draw(st.lists(st.sampled_from(names), min_size=least, max_size=3, unique=True))
    return {name: data.draw(ANYTHING, name) for name in chosen}


@_SETTINGS
@given(data=st.data())
def test_plans(data):
    kind = data.draw(st.sampled_from(KINDS))
    case = Case(kind)
    names = [*case.arrays, *OPTIONS[kind].table, "device", "workspace", "stream"]
    # Whether its items are right is known where the kernels run.
    changes = drawn(data, [name for name in names if name != "use_multi_item_scoring"])
    if changes.get("device", "cpu") is None:  # that is a GPU
        changes["device"] = "cpu"
    plan = attempt(case, case.plan, **changes)
    if isinstance(plan, Plan):
        # Whatever was planned: a run of what was not planned for is told so too.
        attempt(case, case.run, plan)
        attempt(case, plan.replan, **case.arrays | drawn(data, list(case.arrays), 0))
        if plan.workspace.generation == plan._generation:
            attempt(case, case.run, plan)


@_SETTINGS
@given(data=st.data())
def test_replans(data):
    kind = data.draw(st.sampled_from(KINDS))
    case = Case(kind, enable_cuda_graph=data.draw(st.booleans()))
    plan = case.plan()
    case.run(plan)
    accepted = False
    for _ in range(3):
        arrays = drawn(data, [*case.arrays, "stream"])
        accepted |= attempt(case, lambda a=arrays: (case.replan(plan, **a), True)) is not None
    case.memory["o"][:] = np.nan
    attempt(case, case.run, plan)
    if not accepted:
        case.check()


@_SETTINGS
@given(data=st.data())
def test_runs(data):
    kind = data.draw(st.sampled_from(KINDS))
    backend = {} if kind == "decode" else {"backend": data.draw(st.sampled_from(["fa2", "fa3"]))}
    case = Case(kind, **backend)
    plan = case.plan()
    method = {"ragged": plan.ragged_run, "paged": plan.paged_run} if kind in KINDS[:2] else {}
    parameters = inspect.signature(method.get(kind) or plan.run).parameters
    names = {name for name in parameters if name != "options"}
    if "options" in parameters:
        names |= inspect.signature(plan._apply).parameters.keys() - {"values"}
    attempt(case, case.run, plan, **drawn(data, sorted(names)))
    case.memory["o"][:] = np.nan
    case.run(plan)
    case.check()


@_SETTINGS
@given(data=st.data())
def test_singles(data):
    op = data.draw(st.sampled_from(["single_prefill", "single_decode"]))
    heads = (3, 4) if op == "single_prefill" else (4,)
    case = Case("decode")
    case.op = op
    shapes = {"q": (*heads, 64), "k": (5, 2, 64), "v": (5, 2, 64), "o": (*heads, 64)}
    case.memory = {name: np.zeros(shape, np.float16) for name, shape in shapes.items()}
    case.memory |= {"tmp": aligned(64), "lse": np.zeros(heads, np.float32)}
    function = getattr(fi_ffi, op)
    changes = drawn(data, list(inspect.signature(function).parameters))
    attempt(case, function, **case.memory | changes)


@_SETTINGS
@given(data=st.data())
def test_workspaces(data):
    case = Case("decode")
    case.op = "Workspace"
    names = list(inspect.signature(fi_ffi.Workspace).parameters)
    arguments = dict(zip(names, list(case.memory.values())[:3], strict=True)) | drawn(data, names)
    attempt(case, fi_ffi.Workspace, **arguments)


def on_a_gpu(kind: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Case, Plan, dict[str, Any]]:
    """A plan of cuda:0 up to what the planner would say, and tensors that are there."""

    def schedule(self, batch, stream):
        _, placed = self._need(batch)
        self._descs = placed.descs(self.workspace.int_buffer, {})
        self._descs["int_workspace_buffer"] = self.workspace.int_buffer
        self._info, self._generation = info, self.workspace.generation
        self._batch = batch
        self.workspace._stream = 0

    case = Case(kind)
    info = case.plan()._info
    monkeypatch.setattr(machine, "capability", lambda index: (9, 0))
    monkeypatch.setattr(machine, "multiprocessors", lambda index: 132)
    monkeypatch.setattr(Plan, "schedule", schedule)
    monkeypatch.setattr(Plan, "stream", lambda self, stream: 0)
    there = {name: changed(case.memory[name], device="cuda:0") for name in case.memory}
    workspace = fi_ffi.Workspace(there["float"], there["int"])
    plan = case.plan(workspace=workspace, device=None)
    assert str(plan.device) == "cuda:0"
    return case, plan, {name: there[name] for name in case.run_names}


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_that_are_not_on_the_plans_gpu(kind, monkeypatch):
    case, plan, there = on_a_gpu(kind, monkeypatch)
    for name in case.run_names:
        for device in ("cpu", "cuda:1"):
            tensors = there | {name: changed(case.memory[name], device=device)}
            refused(case, name, f"got {device}, expected cuda:0", case.run, plan, **tensors)


@pytest.mark.parametrize("kind", KINDS[1:])
def test_page_indices_that_are_not_on_the_plans_gpu(kind, monkeypatch):
    case, plan, there = on_a_gpu(kind, monkeypatch)
    name = "kv_indices" if kind == "mla" else "paged_kv_indices"
    plan._descs.pop("indices")  # as if planned without
    refused(case, name, "got None", case.run, plan, **there)
    words = "got cpu, expected cuda:0"
    refused(case, name, words, case.run, plan, **there, **{name: case.indices})


@pytest.mark.parametrize("kind", KINDS)
def test_arrays_of_a_plan_for_a_gpu(kind, monkeypatch):
    case, plan, _ = on_a_gpu(kind, monkeypatch)
    for name, array in case.arrays.items():
        on_device = {name: changed(array, device="cuda:0")}
        words = "got cuda:0, expected an array on the host"
        refused(case, name, words, case.plan, workspace=plan.workspace, device=None, **on_device)
        refused(case, name, words, case.replan, plan, **on_device)
