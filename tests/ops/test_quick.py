"""Calls made again go a quicker way, which refuses what is refused in full, and nothing else."""

from __future__ import annotations

import contextlib
import inspect
import math

import numpy as np
import pytest

import fi_ffi
from fi_ffi.abi import tensor
from fi_ffi.abi.interop import as_desc

from ops import test_refusals as in_full
from prepared_calls import refusal_of, same_error

pytestmark = pytest.mark.usefixtures("settled")


# The refusals.  These are the tests of test_refusals.py themselves; each bad call is made after
# a good one, with which it has most of its arguments in common.


@pytest.fixture
def _after_a_good_call(monkeypatch):
    def refused(op, case, values, argument):
        good = in_full.described(case)
        if refusal_of(op.row, good) is None:
            op(**good)
            op(**good)
        error = call_refused(op, case, values, argument)
        with contextlib.suppress(fi_ffi.LoaderError):  # of a GPU that is not there
            expected = refusal_of(op.row, values)
            assert expected is not None and same_error(error, expected), (error, expected)
            try:
                op.prepare(**values)
            except fi_ffi.ArgumentError as told:
                # To prepare takes no stream: what else is wrong is told.
                assert expected.argument == "stream" or same_error(told, expected)
            else:
                pytest.fail("it can be prepared")
        return error

    call_refused = in_full.call_refused
    monkeypatch.setattr(in_full, "call_refused", refused)


for _name, _test in inspect.getmembers(in_full, inspect.isfunction):
    # Those that a fixture can be asked for: hypothesis calls its own many times.
    if _name.startswith("test_") and not hasattr(_test, "hypothesis"):
        globals()[_name] = pytest.mark.usefixtures("_after_a_good_call")(_test)


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
            form = type(mine.op._form)(mine.row)
            form(*form.bind(**values))
            first, again, slowly = mine.given
            assert [*map(repr, first)] == [*map(repr, again)] == [*map(repr, slowly)]
        else:
            assert not mine.given


LAYOUTS = ["NHD", "HND"]


class Text(str):
    """Equal to a layout's name, and not one."""


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("alias", [Text, np.str_, lambda name: name.encode(), LAYOUTS.index])
def test_what_is_equal_to_a_layout_is_none(layout, alias, mine):
    mine.op(*mine.descs, kv_layout=layout)
    for wrong in (alias(layout), [layout], None):
        with pytest.raises(fi_ffi.ArgumentError, match="kv_layout"):
            mine.op(*mine.descs, kv_layout=wrong)
    assert [given[-1] for given in mine.given] == [LAYOUTS.index(layout)]


def test_each_layout_goes_to_the_kernel_as_its_own(mine):
    """Also where the first call of a layout failed before anything was packed."""
    for layout in [*LAYOUTS, *reversed(LAYOUTS), *LAYOUTS]:
        mine.op(*mine.descs, kv_layout=layout)
        assert mine.given[-1][-1] == LAYOUTS.index(layout)


def test_a_frame_that_was_never_packed_is_none_of_another_layout(mine, monkeypatch):
    from fi_ffi.ops import form

    def fail(*_):
        raise RuntimeError("before anything was packed")

    with monkeypatch.context() as patch:
        patch.setattr(form, "launch_fully", fail)
        with pytest.raises(RuntimeError, match="before anything"):
            mine.op(*mine.descs, kv_layout="HND")
    mine.op(*mine.descs, kv_layout="HND")
    assert mine.given[-1][-1] == LAYOUTS.index("HND")


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


class Tensorlike:
    """Another library's tensor, whose layout is something else."""

    def __init__(self, array, layout):
        self.array, self.layout = array, layout

    @property
    def __array_interface__(self):
        return self.array.__array_interface__


@pytest.mark.parametrize("layout", ["strided", None, 3, [1], {}, float("nan"), object()])
def test_tensors_with_a_layout_of_their_own(layout, mine):
    mine.op(*mine.descs, factor=3.0)
    assert mine.is_done(3)
    for _ in range(3):
        mine.op(Tensorlike(mine.y, layout), Tensorlike(mine.x, layout), factor=2.0)
        assert mine.is_done(2)


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


def test_addresses(mine):
    """Each word is written by each call: nothing of an earlier one is left."""
    sets = [(np.full_like(mine.y, np.nan), np.full_like(mine.x, i)) for i in range(1, 6)]
    for y, x in sets * 2:
        mine.op(as_desc(y), as_desc(x), factor=2.0)
        assert (y == 2 * x).all()
    for i, (y, x) in enumerate(sets):
        assert (y == 2 * (i + 1)).all() and (x == i + 1).all()
    (y, x), last = map(as_desc, sets[0]), sets[-1][0].copy()
    for ptr in (0, 1, 3, 2**63 + 1, 2**64 - 1 - x.layout.span_bytes):
        with pytest.raises(fi_ffi.ArgumentError, match="not null"):
            mine.op(y, tensor.make_desc(ptr, x.layout))
    assert (sets[-1][0] == last).all()
