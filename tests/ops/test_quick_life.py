"""Calls made again, over time: the same bits, other kernels and releases, errors, threads."""

from __future__ import annotations

import inspect
import re
import threading

import numpy as np
import pytest

import fi_ffi
from fi_ffi import reference
from fi_ffi.abi import tensor
from fi_ffi.abi.interop import as_desc
from fi_ffi.ops import form, watching
from fi_ffi.ops.functions import OPS
from fi_ffi.ops.op import Op
from fi_ffi.ops.quick import compile_again, compile_quick, compile_update
from fi_ffi.ops.row import KvLayout, Scalar, Tensor, Text
from fi_ffi.reference import norm

from prepared_calls import EVERY_OP, EVERY_WAY, draw, full, placed, tensors

pytestmark = pytest.mark.usefixtures("settled")


@pytest.mark.parametrize(("op", "dtypes", "more"), EVERY_WAY)
def test_the_same_bits(op, dtypes, more):
    """The first call, the second and the third of the same layouts, in memory of their own."""
    case = draw(op.row, dtypes, more)
    expected, *others = placed(case, more, 5)
    full(op.row, expected)
    for made in others:
        op(**made.values)
        assert not made.differs(expected)
    scalars = draw(op.row, dtypes, more).scalars | {
        name: value for name, value in case.scalars.items() if type(value) is not float
    }
    expected, got = placed(case, more, 2)
    expected.scalars = got.scalars = scalars
    full(op.row, expected)
    op(**got.values)
    assert not got.differs(expected)


@pytest.mark.parametrize(("op", "dtypes", "more"), EVERY_OP)
def test_by_place_and_by_keyword(op, dtypes, more):
    case = draw(op.row, dtypes, more)
    expected, first, second, third = placed(case, more, 4)
    full(op.row, expected)
    op(**first.values)
    ordered = [third.values.get(arg.name) for arg in op.row.given]
    op(**dict(reversed(second.values.items())), stream=None)
    op(*ordered)
    assert not second.differs(expected) and not third.differs(expected)


def test_layouts_that_were_forgotten_and_interned_anew(mine):
    """A layout is another object after the cache of layouts was full: a new key of the same."""
    for _ in range(3):
        y, x = (fi_ffi.TensorDesc(d.ptr, d.shape, d.dtype, device=d.device) for d in mine.descs)
        mine.op(y, x, factor=2.0)
        assert mine.is_done(2)
        mine.op(*mine.descs, factor=3.0)
        assert mine.is_done(3)
        for i in range(tensor._CACHE_LIMIT + 1):
            fi_ffi.TensorDesc(1024, (i, 3), "uint8", device="cpu")
        assert all(desc.layout not in tensor._LAYOUTS.values() for desc in mine.descs)


def test_layouts_are_learnt_of_without_end(mine):
    """More combinations than are kept: each right, and no more kept than that."""
    kept = mine.op._form._settled
    for n in range(form._CACHE_LIMIT + 20):
        y, x = (fi_ffi.TensorDesc(d.ptr, (4, 16), "float16", strides=(16 + 8 * n, 1), device="cpu")
                for d in mine.descs)  # fmt: skip
        y = tensor.make_desc(y.ptr, mine.descs[0].layout)
        if n:
            continue_at = np.zeros((4, 16 + 8 * n), np.float16)
            continue_at[:, :16] = mine.x
            x = as_desc(continue_at[:, :16])
        mine.op(y, x, factor=2.0)
        assert mine.is_done(2)
        assert len(kept) <= form._CACHE_LIMIT


def test_kernels_that_change_in_between(mine, monkeypatch):
    """Other kernels, another release, and back: calls are of what is in force by then."""

    def twice(y, x, w, factor, *_):
        y[...] = x * np.float16(2 * factor)

    mine.op(*mine.descs, factor=2.0)
    for release in ("0.6.13", None, "0.7.0", "0.6.13"):
        mine.op.settle(release)
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
        op.settle(release)
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
        mine.op.settle("0.6.13")
        mine.op.forget()
        mine.op.settle("0.7.0")

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
    (settled,) = mine.op._form._settled.values()
    assert len(settled.frames) == 11 and len({id(frame) for frame in settled.frames}) == 11


def test_errors_of_the_kernel_are_the_same_both_ways(mine):
    def fail():
        raise ValueError("the kernel's own words")

    told = []
    for make in (mine.op._form, mine.op._form.again):
        mine.work = fail
        for _ in range(3):
            with pytest.raises(fi_ffi.KernelError, match="the kernel's own words") as caught:
                make([*mine.descs, None, 2.0, 0, False, "NHD"], None)
            told.append((caught.value.op, caught.value.kind, caught.value.message))
        with pytest.raises(fi_ffi.KernelError) as caught:
            mine.op(*mine.descs)
        told.append((caught.value.op, caught.value.kind, caught.value.message))
        mine.work = lambda: None
        mine.op(*mine.descs, factor=2.0)
        assert mine.is_done(2)
    assert len({*told}) == 1
    (settled,) = mine.op._form._settled.values()
    assert len(settled.frames) == 1


def test_pythons_own_errors_name_the_op(mine):
    mine.op(*mine.descs)
    for wrong, words in (
        ({"temperature": 1}, "unexpected keyword argument 'temperature'"),
        ({}, "missing"),
    ):
        args = mine.descs if wrong else ()
        with pytest.raises(TypeError, match=words) as caught:
            mine.op(*args, **wrong)
        assert str(caught.value).startswith("mine_too()")
    with pytest.raises(TypeError, match="multiple values for argument 'x'"):
        mine.op(*mine.descs, x=mine.x)
    with pytest.raises(TypeError, match="positional argument"):
        mine.op(*mine.descs, None, 1.0, 0, False, "NHD", None)


@pytest.mark.parametrize("op", OPS.values(), ids=list(OPS))
def test_names_in_compiled_code_do_not_meet(op):
    """Arguments have names that the code compiled from rows uses for nothing else."""
    for row in op.rows:
        own = {arg.name for arg in row.given}
        made = [compile_quick(row, {}, len), compile_again(row, {}, len), compile_update(row)]
        for function in made:
            code = function.__code__
            others = [n for n in (*code.co_varnames, *code.co_names) if n not in own]
            assert len({*code.co_varnames}) == len(code.co_varnames)
            assert own <= {*code.co_varnames}
            assert not own & {"self", "stream", "settled", "frame", "words", "m", "values", "bits"}
            assert not [name for name in own if re.fullmatch(r"p\d+", name)], others


def test_a_watchdog_sees_quick_calls(mine):
    mine.op(*mine.descs)
    mine.op(*mine.descs)
    seen, leave, reports = [], threading.Event(), []
    mine.work = lambda: seen.append(len(watching.inboxes))
    with fi_ffi.watchdog(30):
        for _ in range(3):
            mine.op(*mine.descs, factor=2.0)
            assert mine.is_done(2)
    assert seen == [1, 1, 1]

    def tell(text):
        reports.append(text)
        leave.set()

    mine.work = lambda: leave.wait(30)
    with fi_ffi.watchdog(0.2, on_hang=tell):
        mine.op(*mine.descs, factor=2.75)
    assert len(reports) == 1 and "2.75" in reports[0]
    mine.work = lambda: None
    mine.op(*mine.descs, factor=3.0)
    assert mine.is_done(3)


def test_many_threads_call_one_op(mine):
    """Each with memory of its own; none gets another's frame while it is in use."""
    threads, rounds = 8, 200
    barrier, wrong = threading.Barrier(threads), []

    def work(number):
        rng = np.random.default_rng()
        x = rng.standard_normal((4, 16)).astype(np.float16)
        w = rng.standard_normal(16).astype(np.float16)
        y = np.full_like(x, np.nan)
        descs = [as_desc(array) for array in (y, x, w)]
        barrier.wait(60)
        for i in range(rounds):
            factor, with_w = float(number * rounds + i) / 64, i % 3 == 0
            try:
                mine.op(*descs[: 2 + with_w], factor=factor)
            except BaseException as error:
                wrong.append(repr(error))
                return
            expected = x * np.float16(factor) + (w if with_w else 0)
            if not (y == expected).all():
                wrong.append((number, i))
            y[...] = np.nan

    made = [threading.Thread(target=work, args=(i,)) for i in range(threads)]
    for thread in made:
        thread.start()
    for thread in made:
        thread.join()
    assert not wrong, wrong[:5]
    for settled in mine.op._form._settled.values():
        assert 1 <= len(settled.frames) <= threads
        assert len({id(frame) for frame in settled.frames}) == len(settled.frames)


def test_signatures_and_arguments_are_those_of_the_row():
    for op in OPS.values():
        parameters = inspect.signature(op).parameters
        assert [*parameters] == [*(arg.name for arg in op.row.given), "stream"]
        quick = inspect.signature(op._form.quick).parameters
        assert [*quick][1:] == [*parameters]
        assert [p.default for p in quick.values()][1:] == [p.default for p in parameters.values()]
        assert {type(arg) for arg in op.row.given} <= {Tensor, Scalar, Text, KvLayout}
        assert tensors(op.row) == [*op.row.tensors]
