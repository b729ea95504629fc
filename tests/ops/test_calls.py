"""Typed calls, one after another: the same bits, whatever came before, and nothing is left."""

from __future__ import annotations

import builtins
import copy
import dis
import gc
import linecache
import math
import pickle
import traceback
import tracemalloc
from types import FunctionType

import numpy as np
import pytest

import fi_ffi
from fi_ffi import reference
from fi_ffi.abi.interop import as_desc
from fi_ffi.abi.tensor import make_desc
from fi_ffi.ops.call import compiled
from fi_ffi.ops.call.compiled import CompiledRow
from fi_ffi.ops.call.op import Op
from fi_ffi.ops.functions import OPS
from fi_ffi.reference import norm

from tests.helpers.plan_calls import KINDS
from tests.helpers.plan_calls import Case as PlanCase
from tests.helpers.prepared_calls import (
    EVERY_WAY,
    draw,
    full,
    placed,
    refusal_of,
    same_error,
)

pytestmark = pytest.mark.usefixtures("settled")


@pytest.mark.parametrize(("op", "dtypes", "more"), EVERY_WAY)
def test_by_place_and_by_keyword(op, dtypes, more, recorded):
    """The same bits in memory of their own; then of other numbers."""
    case = draw(op.row, dtypes, more)
    expected, first, second, third = placed(case, more, 4)
    full(op.row, expected)
    op(**first.values)
    ordered = [third.values.get(arg.name) for arg in op.row.given]
    op(**dict(reversed(second.values.items())), stream=None)
    op(*ordered)
    assert not any(made.differs(expected) for made in (first, second, third))
    numbers = draw(op.row, dtypes, more).scalars
    expected, got = placed(case, more, 2)
    for name, value in numbers.items():
        if type(value) is float:
            expected.scalars[name] = got.scalars[name] = value
    full(op.row, expected)
    op(**got.values)
    assert not got.differs(expected)


def test_sizes_and_strides_are_each_calls_own(mine):
    """Nothing of an earlier call's sizes is left: larger and smaller ones, and strides."""
    rng = np.random.default_rng()
    for _ in range(300):
        rows, columns, pad = (int(n) for n in rng.integers((1, 1, 0), (9, 40, 9)))
        pad *= 8  # of loads
        wide = rng.standard_normal((rows, columns + pad)).astype(np.float16)
        x, room = wide[:, :columns], np.full((rows, columns + pad), np.nan, np.float16)
        w = rng.standard_normal(columns).astype(np.float16) if rng.random() < 0.5 else None
        mine.op(room[:, :columns], as_desc(x), w, factor=2.0)
        assert (room[:, :columns] == x * np.float16(2) + (0 if w is None else w)).all()
        assert np.isnan(room[:, columns:]).all()
    assert {type(variant) for variant in mine.op.compiled.variants.values()} == {compiled.Variant}
    assert len(mine.op.compiled.variants) <= 2, "of kinds alone: with w, and without"


def test_sizes_are_not_remembered():
    """100 000 sizes: one variant, one frame, and no more memory than before."""
    op, most = OPS["rmsnorm"], 317
    x, out, w = (np.ones(shape, np.float16) for shape in ((most, most), (most, most), most))
    out[...] = np.nan
    anew, frames, written = CompiledRow(op.row), set(), 0

    def work(numbers):
        nonlocal written
        for i in numbers:
            n, h = i // most + 1, i % most + 1
            # Of its own rows, as the strides must be multiples of what is loaded at a time.
            one = out.ravel()[: n * h].reshape(n, h), x.ravel()[: n * h].reshape(n, h), w[:h]
            variant, frame, _, _ = anew.pack(*one)
            frames.add(id(frame))
            variant.frames.append(frame)
            if i % 50 == 0:
                op(*one)
                written = max(written, n * h)

    work(range(2000))
    gc.collect()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        work(range(2000, 4000))
        gc.collect()
        grown = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    work(range(4000, 100_000))
    assert grown < 20_000, f"{grown} bytes"
    (variant,) = anew.variants.values()
    assert len(frames) == 1 == len(variant.frames)
    assert (out.ravel()[:written] == 1).all() and np.isnan(out.ravel()[written:]).all()


def test_variants_are_bounded(mine, monkeypatch):
    """Kinds without end (devices, dtypes, read-only memory): no more are kept than that."""
    monkeypatch.setattr(compiled, "_MAX_VARIANTS", 3)
    read_only = [array.view() for array in (mine.x, mine.w)]
    for array in read_only:
        array.flags.writeable = False
    for _ in range(3):
        for x in (mine.x, read_only[0]):
            for w in (None, mine.w, read_only[1]):
                for layout in ("NHD", "HND"):
                    mine.op(mine.y, x, w, factor=2.0, kv_layout=layout)
                    assert mine.is_done(2, 0 if w is None else mine.w)
                    assert mine.given[-1][-1] == ("NHD", "HND").index(layout)
                    assert len(mine.op.compiled.variants) <= 3


def put_in_force(op, release):
    """A release, or (None) the one that the next call finds."""
    if release is None:
        op.forget()
    else:
        op.select_release(release)


def test_kernels_that_change_in_between(mine, monkeypatch):
    """Other kernels, another release, and back: calls are of what is in force by then."""

    def twice(y, x, w, factor, *_):
        y[...] = x * np.float16(2 * factor)

    mine.op(*mine.descs, factor=2.0)
    for release in ("0.6.13", None, "0.7.0", "0.6.13"):
        put_in_force(mine.op, release)
        for _ in range(2):
            mine.op(*mine.descs, factor=2.0)
            assert mine.is_done(2)
    with monkeypatch.context() as patch:
        patch.setitem(norm.KERNELS["norm"], mine.row.name, twice)
        entries = dict(reference._entries)
        patch.setattr(reference, "_entries", {})
        mine.op(*mine.descs, factor=2.0)
        assert mine.is_done(2), "what was learnt is kept until it is forgotten"
        mine.op.forget()
        for _ in range(2):
            mine.op(*mine.descs, factor=2.0)
            assert mine.is_done(4)
    assert entries
    mine.op.forget()
    mine.op(*mine.descs, factor=2.0)
    assert mine.is_done(2)


def test_a_release_with_other_arguments(monkeypatch):
    """The method is another one then: `scale` was a number before 0.6.7."""
    op = Op(*OPS["rmsnorm_quant"].rows)
    dtypes = {"T": "float16", "O": "float8_e4m3fn"}
    for release in ("0.6.13", "0.6.4", "0.6.13", "0.6.4", None, "0.6.4"):
        put_in_force(op, release)
        case = draw(op.row, dtypes, {})
        expected, first, second = placed(case, {}, 3)
        full(op.row, expected)
        for made in (first, second):
            op(**made.values)
            assert not made.differs(expected)
        is_number = release == "0.6.4"
        wrong = second.values | {"scale": as_desc(np.ones(1, np.float32)) if is_number else 1.0}
        with pytest.raises(fi_ffi.ArgumentTypeError, match="`scale`"):
            op(**wrong)


def test_a_call_during_which_another_release_is_settled(mine):
    def settle():
        mine.work = lambda: None
        mine.op.select_release("0.6.13")
        mine.op.forget()
        mine.op.select_release("0.7.0")

    for _ in range(2):
        mine.work = settle
        mine.op(*mine.descs, factor=2.0)
        assert mine.is_done(2)
        mine.op(*mine.descs, factor=3.0)
        assert mine.is_done(3)


def test_a_kernel_that_calls_its_own_op(mine):
    """Ten deep: each call has a frame of its own, and all are given back."""
    depth = []

    def again():
        if len(depth) < 10:
            depth.append(len(depth))
            mine.op(*mine.descs, factor=float(len(depth)), count=4 * len(depth))

    mine.op(*mine.descs)
    mine.given.clear()
    mine.work = again
    mine.op(*mine.descs, factor=7.0, count=4)
    assert mine.given == [(7.0, 4, False, 0), *((float(i), 4 * i, False, 0) for i in range(1, 11))]
    assert mine.is_done(7)
    (variant,) = mine.op.compiled.variants.values()
    assert len(variant.frames) == 11 and len({id(frame) for frame in variant.frames}) == 11


def test_errors_of_the_kernel(mine):
    """The same each time; the frame is given back."""

    def fail():
        raise ValueError("the kernel's own words")

    told = []
    prepared = mine.op.prepare(*mine.descs)
    for _ in range(3):
        mine.work = fail
        for call in (lambda: mine.op(*mine.descs), prepared):
            with pytest.raises(fi_ffi.KernelError, match="the kernel's own words") as caught:
                call()
            told.append((caught.value.op, caught.value.kind, caught.value.message))
        mine.work = lambda: None
        mine.op(*mine.descs, factor=2.0)
        assert mine.is_done(2)
    assert len({*told}) == 1
    (variant,) = mine.op.compiled.variants.values()
    assert len(variant.frames) == 1


def test_pythons_own_errors_name_the_op(mine):
    mine.op(*mine.descs)
    for wrong, words in (
        ({"temperature": 1}, "unexpected keyword argument 'temperature'"),
        ({}, "missing"),
    ):
        args = mine.descs if wrong else ()
        with pytest.raises(TypeError, match=words) as caught:
            mine.op(*args, **wrong)
        assert str(caught.value).startswith("mine_too(y, x, ") and " writes y: mine_too() " in str(
            caught.value
        )
    with pytest.raises(TypeError, match="multiple values for argument 'x'"):
        mine.op(*mine.descs, x=mine.x)
    with pytest.raises(TypeError, match="positional argument"):
        mine.op(*mine.descs, None, 1.0, 0, False, "NHD", None)


def unknown(function: FunctionType) -> set[str]:
    """Globals that a function reads, and that are not there."""
    read = {one.argval for one in dis.get_instructions(function) if one.opname == "LOAD_GLOBAL"}
    return {name for name in read - {*vars(builtins)} if name not in function.__globals__}


@pytest.mark.parametrize("op", OPS.values(), ids=list(OPS))
def test_names_in_compiled_code(op):
    """All are known, where no test goes too; arguments' are used for nothing else."""
    for row in op.rows:
        own = {arg.name for arg in row.given}
        form = CompiledRow(row)
        for function in (form.call, form.pack, form.check, form.arguments, form.update):
            code = function.__code__
            assert not unknown(function)
            assert len({*code.co_varnames}) == len(code.co_varnames)
            count = code.co_argcount + code.co_kwonlyargcount
            others = {
                str(i.argval) for i in dis.get_instructions(code) if i.opname.endswith("_GLOBAL")
            }
            others |= {*code.co_varnames[count:]}
            assert own <= {*code.co_varnames[:count]}
            assert not own & (others | {"self", "stream"}), own & others
            assert not [name for name in own if "__" in name]


WRONG_NUMBERS = [
    "1", None, 1j, [1.0], math.nan, math.inf, -math.inf, -1.0, -9, -7, 1, 3, 2**63, 2**64, 10**400,
    True, np.bool_(True), np.float32(-1), np.int64(-4), np.float64(0.5), np.float64("nan"), 0.5, 4,
    -2**63, False, b"1", np.zeros(3), object(),
]  # fmt: skip


@pytest.mark.parametrize("name", ["factor", "count", "flag"])
def test_every_kind_of_number_that_a_row_can_have(name, mine):
    good = {"factor": 2.0, "count": 8, "flag": True}
    mine.op(*mine.descs, **good)
    for value in WRONG_NUMBERS:
        values = dict(zip(("y", "x"), mine.descs, strict=True)) | good | {name: value}
        mine.given.clear()
        expected = refusal_of(mine.row, values)
        for _ in range(2):
            if expected is None:
                mine.op(**values)
            else:
                with pytest.raises(fi_ffi.ArgumentError) as caught:
                    mine.op(**values)
                assert same_error(caught.value, expected)
        # What the kernel was given is what it is given by a call in full.
        if expected is None:
            full(mine.row, type("Placed", (), {"values": values}))
            first, again, slowly = mine.given
            assert [*map(repr, first)] == [*map(repr, again)] == [*map(repr, slowly)]
        else:
            assert not mine.given


class Derived(fi_ffi.TensorDesc):
    """A descriptor all the same."""

    __slots__ = ()


def test_descriptors_of_a_derived_class(mine):
    y, x = (Derived(d.ptr, d.shape, d.dtype, device=d.device) for d in mine.descs)
    for _ in range(3):
        mine.op(y, x, factor=2.0)
        assert mine.is_done(2)
    mine.op(*mine.descs, factor=2.0)
    with pytest.raises(fi_ffi.ArgumentError, match="not null"):
        mine.op(Derived(0, x.shape, x.dtype, device=x.device), x)


class Refuses:
    """What raises when it is looked at."""

    def __init__(self, error):
        self.error = error

    def __getattr__(self, name):
        raise self.error


@pytest.mark.parametrize("error", [AttributeError("no"), KeyError("no"), TypeError("no")])
def test_what_raises_when_it_is_looked_at_is_no_tensor(error, mine):
    mine.op(*mine.descs, factor=3.0)
    for _ in range(3):
        with pytest.raises(fi_ffi.ArgumentTypeError, match="`x`"):
            mine.op(mine.descs[0], Refuses(error))
    mine.op(*mine.descs, factor=3.0)
    assert mine.is_done(3)


def test_addresses_that_no_memory_has(mine):
    y, x = mine.descs
    for ptr in (0, 1, 3, 2**63 + 1, 2**64 - 1 - x.span_bytes):
        with pytest.raises(fi_ffi.ArgumentError, match="not null"):
            mine.op(y, make_desc(ptr, x.shape, x.dtype, x.strides, x.device))


def test_optional_tensors_come_and_go(mine):
    w = as_desc(mine.w)
    none = fi_ffi.TensorDesc(0, (16,), "float16", device="cpu")
    odd = fi_ffi.TensorDesc(w.ptr + 1, (16,), "float16", device="cpu")
    for given, added in [(None, 0), (w, mine.w), (None, 0), (w, mine.w), (mine.w, mine.w)] * 2:
        mine.op(*mine.descs, given, factor=2.0)
        assert mine.is_done(2, added)
        for wrong in (none, odd, 0, False, 7):
            values = {"y": mine.descs[0], "x": mine.descs[1], "w": wrong}
            with pytest.raises(fi_ffi.ArgumentError, match="`w`") as caught:
                mine.op(**values)
            assert same_error(caught.value, refusal_of(mine.row, values))
    assert np.isnan(mine.y).all()


# What is shown of a call that fails.


def test_tracebacks_show_the_compiled_code(mine):
    """The code has no file; its lines are shown all the same."""

    def fail():
        raise ValueError("no")

    mine.work = fail
    calls = (
        lambda: mine.op(*mine.descs),
        lambda: mine.op(mine.descs[0], mine.descs[1].at(0)),
        lambda: mine.op(*mine.descs, count=3),
    )
    # Which are in no line that is shown of this test itself.
    lines = ("launch(frame, stream)", "refuse.address('x'", "refuse.number('count'")
    for line, call in zip(lines, calls, strict=True):
        for _ in range(2):
            with pytest.raises((fi_ffi.KernelError, fi_ffi.ArgumentError)) as caught:
                call()
            shown = "".join(traceback.format_exception(caught.value))
            assert line in shown, shown
            assert "<mine_too, call, " in shown
            linecache.checkcache()  # which drops what is no file


def test_refusals_are_raised_in_the_handling_of_nothing(mine):
    """Their tracebacks have no other error's before them."""
    calls = [
        lambda: mine.op(mine.descs[0], mine.descs[1].at(0)),
        lambda: mine.op(*mine.descs, factor=10**400),
        lambda: mine.op(*mine.descs, kv_layout="nhd"),
        lambda: mine.op(mine.x[:, :3], mine.x),
        lambda: mine.op(mine.x, [1, 2]),
        lambda: mine.op.prepare(*mine.descs, count=3),
        lambda: mine.op.prepare(*mine.descs).update(x=-1),
    ]
    for call in calls:
        with pytest.raises(fi_ffi.ArgumentError) as caught:
            call()
        shown = "".join(traceback.format_exception(caught.value))
        assert "During handling" not in shown and caught.value.__cause__ is None, shown


# What has a frame has one owner.


COPIES = [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))]


def the_very_same(make, one):
    """Whether a copy is the thing itself, or none can be made."""
    try:
        return make(one) is one
    except TypeError:
        return True


@pytest.mark.parametrize("make", COPIES, ids=["copy", "deepcopy", "pickle"])
def test_copies(make):
    """Of ops and plans the very same; of what has packed arguments there are none."""
    for name in ("rmsnorm", "append_paged_kv_cache", "gdn_prefill"):
        op = OPS[name]
        (first,) = placed(draw(op.row, {n: d[0] for n, d in op.row.dtypes.items()}, {}), {}, 1)
        call = op.prepare(**first.values)
        frame = call.frame
        with pytest.raises(TypeError, match="cannot be (copied|pickled)|copied or pickled"):
            make(call)
        assert the_very_same(make, op) and the_very_same(make, call.variant.entry)
        assert call.frame is frame
        call()
    for kind in KINDS:
        case = PlanCase(kind)
        plan = case.plan()
        run = getattr(plan, {"ragged": "ragged_run", "paged": "paged_run"}.get(kind, "run"))
        call = fi_ffi.prepare(run, **{name: case.memory[name] for name in case.run_names})
        for one in (plan, plan.workspace, call):
            assert the_very_same(make, one), f"two owners of a {type(one).__name__}"
        call()
        case.check()
