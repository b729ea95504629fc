"""Prepared calls on a GPU: streams, updates, graphs, threads."""

from __future__ import annotations

import numpy as np
import pytest
from cuda.bindings import runtime

import fi_ffi
from fi_ffi.cli.cases import case_of
from fi_ffi.cli.cuda import check
from fi_ffi.ops.functions import OPS

from tests.helpers.calls import EVERY_CALL
from tests.helpers.prepared_calls import OnGpu, draw, frame_of, norm_sets, poison, settle

RMSNORM = OPS["rmsnorm"]


@pytest.fixture
def norms(rng, to_gpu):
    return norm_sets(rng, to_gpu)


# Ops.


@pytest.mark.parametrize(("op", "dtypes"), EVERY_CALL)
def test_every_op(op, dtypes, machine, to_gpu):
    """Prepared in a scope and for a stream; updated by address and by tensor."""
    machine.need(op.row.module)
    if op.row.capabilities:
        from fi_ffi.loader import machine as of_loader

        if of_loader.capability(0)[0] not in op.row.capabilities:
            pytest.skip("the kernel is for other GPUs")
    # How much scratch is enough, the GPU says: calls bring their own.
    drawn = draw(op.row, dtypes, {"without": ("workspace_buffer",)})
    case = case_of(op.row, drawn.arrays, drawn.scalars)
    sets = [OnGpu(case, to_gpu) for _ in range(5)]
    op(**sets[0].descs, **case.scalars, stream=machine.stream)
    assert sets[0].is_right()
    call = op.prepare(**sets[1].descs, **case.scalars, stream=machine.stream)
    assert sets[1].is_untouched(), "preparing a call is no call"
    call()
    scoped = op.prepare(**sets[2].descs, **case.scalars)
    with fi_ffi.stream(machine.stream):
        scoped()
        scoped.update(**sets[3].addresses)
        scoped()
    call.update(**sets[4].descs)
    call()
    settle(machine.stream)
    scratch = {arg.name for arg in op.row.tensors if arg.is_scratch}
    names = sets[0].arrays.keys() - scratch
    expected = {name: sets[0].arrays[name].get().tobytes() for name in names}
    for made in sets[1:]:
        assert made.is_right()
        got = {name: made.arrays[name].get().tobytes() for name in names}
        assert [name for name in got if got[name] != expected[name]] == [], "other bits"
    with pytest.raises(fi_ffi.ArgumentError, match="`stream`"):
        scoped()


def test_arguments_are_those_of_the_launch(norms, stream):
    """Many launches are queued, an update before each: none sees a later one's arguments."""
    sets = norms(40, rows=7, hidden=2048)
    call = RMSNORM.prepare(**sets[0].descs, stream=stream)
    for made in sets:
        call.update(**made.addresses)
        call()
    settle(stream)
    assert all(made.is_right() for made in sets)
    before = frame_of(call)
    for wrong in ({"out": 0}, {"out": sets[0].addresses["out"] + 2}, {"eps": -1.0}):
        with pytest.raises(fi_ffi.ArgumentError):
            call.update(**sets[0].addresses | wrong)
        assert frame_of(call) == before


@pytest.mark.parametrize("how", ["stream", "scope", "typed again", "entry"])
def test_is_ordered_after_its_streams_work(how, norms, to_gpu, streams, gate):
    """The input arrives on a stream that is held up; a call on another stream misses it."""
    (same, other), (stream, other_stream) = norms(2), streams
    late = to_gpu(same.case.arrays["input"])
    handles, entry = {stream: same, other_stream: other}, fi_ffi.module("norm").rmsnorm
    calls = {}
    for handle, made in handles.items():
        calls[handle] = RMSNORM.prepare(**made.descs, stream=None if how == "scope" else handle)
        with fi_ffi.stream(handle):
            calls[handle]()
            RMSNORM(**made.descs)
            entry(*made.descs.values(), 1e-6, False)
        settle(handle)
        poison(made.arrays["input"], made.arrays["out"])
    kind = runtime.cudaMemcpyKind.cudaMemcpyDeviceToDevice
    target = same.arrays["input"]
    gate.hold(stream)
    check(runtime.cudaMemcpyAsync(target.ptr, late.ptr, target.nbytes, kind, stream))
    for handle, made in handles.items():
        if how == "typed again":
            RMSNORM(**made.descs | {"input": target.desc()}, stream=handle)
        elif how == "entry":
            descs = made.descs | {"input": target.desc()}
            entry(*descs.values(), 1e-6, False, stream=handle)
        else:
            calls[handle].update(input=target.ptr)
            with fi_ffi.stream(handle):
                calls[handle]()
    settle(other_stream)
    gate.open()
    settle(stream)
    assert same.is_right()
    seen = other.arrays["out"].get().astype(np.float32)
    assert np.isnan(seen).all(), "the control saw the late input"


def test_captured_into_a_graph(norms, machine):
    """A graph keeps the arguments that it was captured with."""
    first, second = norms(2)
    call = RMSNORM.prepare(**first.descs, stream=machine.stream)
    call()
    settle(machine.stream)
    out = first.arrays["out"]
    replay = machine.capture(call)
    machine.poison(out, machine.stream)
    assert np.isnan(out.get().astype(np.float32)).all()
    call.update(**second.addresses)
    for _ in range(3):
        machine.poison(out, machine.stream)
        replay()
        settle(machine.stream)
        assert first.is_right() and np.isnan(second.arrays["out"].get().astype(np.float32)).all()
    call()
    settle(machine.stream)
    assert second.is_right()
