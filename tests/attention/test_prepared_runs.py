"""Runs that are prepared and runs that are repeated: the same bits as runs in full.

And calls for one request, prepared.
"""

from __future__ import annotations

import numpy as np
import pytest

import fi_ffi

from tests.attention.batches import bytes_of
from tests.attention.cases import make
from tests.attention.machines import Cpu
from tests.attention.prepared import EVERY_FAMILY, MACHINES, Runs, array_of, on_each, run_of, same
from tests.attention.tables import SINGLE_DECODE, SINGLE_PREFILL
from tests.helpers.prepared_calls import frame_of


@pytest.fixture(params=MACHINES)
def machine(request, monkeypatch):
    yield from on_each(request.param, monkeypatch)


def taller(desc):
    shape = (desc.shape[0] + 1, *desc.shape[1:])
    return fi_ffi.TensorDesc(desc.ptr, shape, desc.dtype, device=desc.device)


@EVERY_FAMILY
def test_the_same_bits(spec, machine, rng):
    """Prepared, updated to other tensors and back, by tensor and by address."""
    made = Runs(spec, machine, rng)
    expected = made.full()
    call = made.prepare()
    assert np.isnan(made.out.o.get().astype(float)).all(), "preparing a run is no run"
    for _ in range(2):
        call()
        assert same(made.out, expected)
        made.clear()
    other = made.case.outputs(made.rows)
    for by in (lambda d: d, lambda d: d.ptr):
        tensors = made.tensors(other)
        call.update(o=by(tensors["o"]), lse=by(tensors["lse"]))
        call()
        assert same(other, expected)
        assert np.isnan(made.out.o.get().astype(float)).all()
        made.clear(other)
        back = made.tensors()
        call.update(**{name: by(desc) for name, desc in back.items()})
        call()
        assert same(made.out, expected)
        made.clear()


@EVERY_FAMILY
def test_inputs_that_are_updated(spec, machine, rng):
    """Each input moved to other memory: what lies there is what is read."""
    made = Runs(spec, machine, rng)
    call = made.prepare()
    call()
    changed = {}
    for name, desc in list(made.tensors().items())[:-2]:
        host = np.array(array_of(desc))
        if name.startswith(("q", "k")):
            host = host[..., ::-1].copy()
        elif "v" in name:
            host = -host
        changed[name] = machine.place(host)
        call.update(**{name: changed[name].desc()})
        call()
        got = np.array(made.out.o.get())
        made.clear()
        tensors = made.tensors() | {n: placed.desc() for n, placed in changed.items()}
        plan = made.case.plan(made.batch)
        options = made.case.run_options(made.batch)
        run_of(plan)(**tensors, stream=machine.stream, **options)
        assert bytes_of(made.out.o.get()) == bytes_of(got), name
        made.clear()


@EVERY_FAMILY
def test_runs_that_are_repeated(spec, machine, rng):
    """Runs with the same layouts: others' tensors, lse or none, options that change."""
    made = Runs(spec, machine, rng)
    options = made.case.run_options(made.batch)
    run, kept = run_of(made.plan), []
    expected = made.full()
    for i in range(12):
        out = made.case.outputs(made.rows)
        tensors = made.tensors(out)
        if i % 3 == 2:
            del tensors["lse"]
        if i % 4 == 3:
            tensors["lse"] = None
        scale = {} if i % 2 else {"sm_scale": 0.125 * (1 + i % 4)}
        run(**tensors, stream=machine.stream, **options | scale)
        plan, alone = made.case.plan(made.batch), made.case.outputs(made.rows)
        there = made.tensors(alone) | {"lse": alone.lse.desc() if tensors.get("lse") else None}
        run_of(plan)(**there, stream=machine.stream, **options | scale)
        assert same(out, alone), i
        assert scale or not tensors.get("lse") or same(out, expected)
        kept.append(out)


def packed(call):
    """All that a prepared run's launch depends on."""
    frame = call.take()
    words = frame.words.tobytes()
    call.give(frame)
    return words, dict(call._given)


@EVERY_FAMILY
def test_updates_that_fail_change_nothing(spec, machine, rng):
    made = Runs(spec, machine, rng)
    call = made.prepare()
    before = packed(call)
    tensors = made.tensors()
    for name, desc in tensors.items():
        others = {n: d.ptr for n, d in tensors.items() if n != name}
        for wrong in (-1, 0, 1, 2**64, "tensor", True, 1.0, None, taller(desc), np.zeros(3)):
            with pytest.raises(fi_ffi.ArgumentError) as caught:
                call.update(**others | {name: wrong})
            error = caught.value
            assert (error.op, error.argument) == (made.plan.op, name), error
            assert "maybe_" not in str(error)
            assert packed(call) == before
    for name in ("sm_scale", "kv_layout", "maybe_lse", "temperature", "stream"):
        with pytest.raises(fi_ffi.ArgumentError, match="prepare another call for other options"):
            call.update(**{name: 1.0})
    with pytest.raises(TypeError):
        call.update(tensors["o"])
    assert packed(call) == before
    made.replan()
    made.check(call)


# Calls for one request.

ONES = {
    name: spec
    for table in (SINGLE_PREFILL, SINGLE_DECODE)
    for name, spec in table.items()
    if spec.lengths[0][1] < 600 and spec.lengths[0][0] < 60
}


@pytest.mark.parametrize("spec", ONES.values(), ids=ONES)
def test_single(spec, rng):
    case, batch = make(spec, Cpu(), rng)
    expected, mine, again = case.run(None, batch), case.outputs(), case.outputs()
    args, options = case.given(batch, mine)
    call = fi_ffi.prepare(case.function, *args, **options)
    call()
    assert same(mine, expected)
    o = case.given(batch, again)[0][4]
    for by in (o, o.ptr):
        call.update(o=by)
        call()
        assert bytes_of(again.o.get()) == bytes_of(expected.o.get())
        case.machine.poison(again.o, None)


@pytest.mark.parametrize("table", [SINGLE_PREFILL, SINGLE_DECODE], ids=["prefill", "decode"])
def test_updates_of_single_calls(table, rng):
    """By the caller's names: others, and wrong ones, change nothing."""
    spec = next(s for s in table.values() if s.lengths[0][1] <= 100 and s.lse)
    case, batch = make(spec, Cpu(), rng)
    mine, other = case.outputs(), case.outputs()
    args, options = case.given(batch, mine)
    op, call = spec.family, fi_ffi.prepare(case.function, *args, **options)
    before = frame_of(call)
    for name in ("sm_scale", "window_left", "mask_mode_code", "maybe_lse", "temperature"):
        with pytest.raises(fi_ffi.ArgumentError, match="prepare another call") as caught:
            call.update(**{name: 1})
        assert caught.value.op == op
    for name in ("q", "k", "v", "o", "lse"):
        for wrong in (1, None, np.zeros((1, 1))):
            with pytest.raises(fi_ffi.ArgumentError) as caught:
                call.update(**{name: wrong})
            assert (caught.value.op, caught.value.argument) == (op, name)
    assert frame_of(call) == before
    *_, o, lse = case.given(batch, other)[0]
    call.update(lse=lse, o=o)
    call()
    case.check(batch, other)
