"""Packed calls: frames written again and again."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence

import pytest

from fi_ffi.abi.function import NO_STREAM, Entry, Frame, FrameLayout, Slot, make_array
from fi_ffi.abi.objects import Array
from fi_ffi.abi.tensor import TensorDesc
from fi_ffi.errors import KernelError

from tests.helpers.frames import write_tensor

pytestmark = pytest.mark.usefixtures("heap")

DESCS = [
    TensorDesc(0, (2, 3), "float16", device="cpu"),
    TensorDesc(0, (), "int64", device="cuda:1"),
    TensorDesc(0, (0, 4), "bfloat16", strides=(9, 2)),
]
AS_OBJECT = pytest.mark.parametrize("as_object", [False, True])


def make_frame(entry: Entry, slots: Sequence[Slot]) -> Frame:
    """A frame whose tensors and scalars are these."""
    layout = FrameLayout([slot[0].rank if isinstance(slot, tuple) else None for slot in slots])
    return Frame(layout, slots, entry)


def call(frame: Frame, *values: TensorDesc | float) -> object:
    for i, value in enumerate(values):
        if isinstance(value, TensorDesc):
            write_tensor(frame, i, value)
        else:
            view = frame.floats if isinstance(value, float) else frame.words
            view[frame.layout.value(i)] = value
    frame.place_objects()
    return frame.call()


@AS_OBJECT
def test_slots_arrive_in_order(as_object: bool, callback: Callable[..., Entry]) -> None:
    calls: list[tuple[object, ...]] = []
    entry = callback(lambda *args: calls.append(args), 6)
    tensors = [(desc.kind, as_object) for desc in DESCS]
    frame = make_frame(entry, [tensors[0], int, tensors[1], float, bool, tensors[2]])
    first, second, third = DESCS
    values = [
        (first.at(0x1000), -(2**63), second.at(0x2000), 1.5, True, third),
        (first.at(2**63), 2**63 - 1, second.at(0x3000), float("-inf"), False, third.at(0x4000)),
        (first, 0, second, 0.0, True, third),
    ]
    for each in values:
        assert call(frame, *each) is None
    for got, sent in zip(calls, values, strict=True):
        assert [repr(got[i]) for i in (0, 2, 5)] == [repr(sent[i]) for i in (0, 2, 5)]
        assert (got[1], got[3], got[4]) == (sent[1], sent[3], sent[4])
        assert [type(got[i]) for i in (1, 3, 4)] == [int, float, bool]


@AS_OBJECT
def test_sizes_and_failures_are_each_calls_own(
    as_object: bool, callback: Callable[..., Entry]
) -> None:
    """A frame is for all tensors of a kind; none gets the sizes of one before, and it goes on
    after a call that failed."""
    seen: list[str] = []

    def sometimes(tensor: TensorDesc, number: int) -> int:
        if number < 0:
            raise ValueError(number)
        seen.append(repr(tensor))
        return tensor.ptr + number

    frame = make_frame(callback(sometimes, 2), [(DESCS[0].kind, as_object), int])
    sent = [
        TensorDesc(0x1000, (3, n), "float16", strides=(3 + n, 1), device="cpu")
        for n in (*range(9), 2**31 - 1, 2**31, 2**32 + 1)
    ]
    for desc in sent:
        with pytest.raises(KernelError, match="ValueError: -1"):
            call(frame, desc, -1)
        assert call(frame, desc, 2) == 0x1002
    assert seen == [repr(desc) for desc in sent]


def test_no_arguments(callback: Callable[..., Entry]) -> None:
    frame = make_frame(callback(lambda: 7, 0), [])
    assert frame.words[frame.layout.before] == NO_STREAM  # nothing to put back
    assert call(frame) == 7


def test_results_are_owned_and_cleared(callback: Callable[..., Entry]) -> None:
    array = make_array([1])
    results: list[object] = [5, None, "a longer string", None, array, None]
    frame = make_frame(callback(lambda: results.pop(0), 0), [])
    assert [frame.call() for _ in range(4)] == [5, None, "a longer string", None]
    made = frame.call()
    assert isinstance(made, Array)
    gc.collect()
    assert array.use_count == 2
    del made
    assert array.use_count == 1


def test_what_comes_last_comes_last() -> None:
    """Shapes of what a plan has bound lie behind those that each call writes."""
    layout = FrameLayout([2, None, 3, 1], last=[0])
    assert layout.first_dims == layout.dims[2] < layout.dims[3] < layout.dims[0]
    assert layout.dims[3] - layout.dims[2] == 6
    assert layout.words == layout.dims[0] + 4


def test_a_result_that_is_taken_is_gone(callback: Callable[..., Entry]) -> None:
    frame = make_frame(callback(lambda: 7, 0), [])
    assert call(frame) == 7
    assert frame.peek_result() is None
    assert not any(frame.words[frame.layout.result :][:2])
