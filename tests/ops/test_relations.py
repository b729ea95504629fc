"""Checks between arguments: memory that is shared, sizes given as numbers, rules, absent ones."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

import fi_ffi
from fi_ffi import reference
from fi_ffi.abi.interop import as_desc
from fi_ffi.ops.call.op import Op
from fi_ffi.ops.call.refuse import may_overlap
from fi_ffi.ops.call.row import IN_PLACE, Absent, Row, Rule, Scalar, Tensor
from fi_ffi.reference import norm

from tests.helpers.prepared_calls import refusal_of, same_error


def elements(desc) -> set[int]:
    """The addresses of all bytes."""
    steps = [range(size) for size in desc.shape]
    starts = {
        desc.ptr + sum(i * s for i, s in zip(at, desc.strides, strict=True)) * desc.dtype.itemsize
        for at in itertools.product(*steps)
    }
    return {start + byte for start in starts for byte in range(desc.dtype.itemsize)}


def test_tensors_that_are_said_to_be_apart_are():
    """Any strides; and slices of one buffer, which are told apart wherever they are."""
    rng = np.random.default_rng()
    told_apart = met = 0
    for _ in range(3000):
        both = []
        for dtype in ("float16", rng.choice(["float16", "float8_e4m3fn"])):
            shape = rng.integers(1, 4, rng.integers(1, 4))
            strides = [int(rng.choice([0, 1, 2, 3, 4, 6, 8, 12, 24])) for _ in shape]
            ptr = 4096 + int(rng.integers(0, 24))
            both.append(fi_ffi.TensorDesc(ptr, shape, dtype, strides=strides, device="cpu"))
        share = bool(elements(both[0]) & elements(both[1]))
        met += share
        if not may_overlap(*both):
            told_apart += 1
            assert not share, both
    assert told_apart > 300 and met > 300
    for _ in range(300):
        shape = rng.integers(1, 5, 4)
        whole = np.zeros(shape, np.float16)
        axis = rng.integers(0, 4)
        if shape[axis] < 2:
            continue
        first, second = np.split(whole, [rng.integers(1, shape[axis])], axis=axis)
        assert not may_overlap(as_desc(first), as_desc(second))
        assert not may_overlap(as_desc(second), as_desc(first))
        assert may_overlap(as_desc(first), as_desc(whole))


def double(y, x, nothing, count, factor, zero):
    """y is x times what is given, in its first `count` columns."""
    assert nothing.size == 0 and zero == 0
    y[:, :count] = x[:, :count] * np.float16(factor)


class Related:
    """An op with all of it, and its arguments."""

    row = Row(
        "related", "norm", "related", "here", "Related.",
        (
            Tensor("y", "n h", "T", "result", writes=True, reads=False),
            Tensor("x", "n h", "T", "argument"),
            Absent("nothing"),
            Scalar("count", int, None, "how many columns", size_of="h", or_less=True, low=0),
            Scalar("factor", float, 2.0, "factor"),
            Absent("zero", "int"),
        ),
        {"T": ("float16",)}, ">=0", in_place=(("y", "x"),),
        requires=(
            "h >= 1",
            Rule("factor", "factor <= n", "n or less"),
            Rule("y", f"not {IN_PLACE} or below(count, 8)", "apart", {"below": int.__lt__}),
        ),
    )  # fmt: skip

    def __init__(self, monkeypatch) -> None:
        monkeypatch.setitem(norm.KERNELS["norm"], "related", double)
        for key in [key for key in reference._entries if key[1] == "related"]:
            del reference._entries[key]
        self.op = Op(self.row)
        rng = np.random.default_rng()
        self.memory = rng.standard_normal((4, 4, 16)).astype(np.float16)

    def call(self, y=0, x=1, **more):
        """Among four memories."""
        old, source = self.memory[y].copy(), self.memory[x].copy()
        self.op(as_desc(self.memory[y]), as_desc(self.memory[x]), **more)
        count = more.get("count")
        count = 16 if count is None else count
        assert (self.memory[y][:, :count] == source[:, :count] * more.get("factor", 2.0)).all()
        assert (self.memory[y][:, count:] == old[:, count:]).all()
        self.memory[y] = old


@pytest.fixture
def related(monkeypatch):
    return Related(monkeypatch)


@pytest.fixture(params=["settled", "unsettled"], autouse=True)
def settled(request, related):
    related.op.forget()
    if request.param == "settled":
        related.op.select_release("0.6.13")


def test_each_call_is_as_it_is_given(related):
    """Sizes, numbers and distances that were right once say nothing of the next call."""
    rng = np.random.default_rng()
    for _ in range(200):
        y, x = (int(i) for i in rng.integers(0, 4, 2))
        count, factor = int(rng.integers(0, 17)), float(rng.integers(-4, 7))
        given = {"count": count, "factor": factor}
        if factor <= 4 and (y != x or count < 8):
            related.call(y, x, **given)
            continue
        with pytest.raises(fi_ffi.ArgumentError):
            related.op(as_desc(related.memory[y]), as_desc(related.memory[x]), **given)
    related.call(count=None)
    related.call(1, 1, count=4)


def test_what_is_refused_is_refused_each_time(related):
    y, x = (as_desc(related.memory[i]) for i in (0, 1))
    inside = fi_ffi.TensorDesc(y.ptr + 32, y.shape, "float16", device="cpu")
    for wrong, argument in (
        ({"factor": 5.0}, "factor"), ({"count": 17}, "count"), ({"x": y}, "y"),
        ({"x": inside}, "y"), ({"count": 4.5}, "count"), ({"count": -1}, "count"),
    ):  # fmt: skip
        for _ in range(2):
            related.call()
            values = {"y": y, "x": x} | wrong
            with pytest.raises(fi_ffi.ArgumentError) as caught:
                related.op(**values)
            assert caught.value.argument == argument
            assert same_error(caught.value, refusal_of(related.row, values))
            call = related.op.prepare(y, x)
            with pytest.raises(fi_ffi.ArgumentError) as told:
                call.update(**wrong)
            assert same_error(told.value, caught.value)


def test_updates(related):
    y, x, z = (as_desc(related.memory[i]) for i in (0, 1, 2))
    call = related.op.prepare(y, x)
    call.update(count=8, factor=1.0)
    for given in (
        {"y": x.ptr, "x": z.ptr}, {"y": y.ptr, "x": x.ptr}, {"x": z.ptr}, {"count": 16},
        {"count": None}, {"x": x.ptr, "count": 8},
    ):  # fmt: skip
        call.update(**given)
        call()
    assert (related.memory[0][:, :8] == related.memory[1][:, :8]).all()
    with pytest.raises(fi_ffi.ArgumentError, match="argument `y`: got .*, expected apart"):
        call.update(x=y.ptr)  # in place, of 8 columns
    call.update(x=y.ptr, count=7)
    call()
