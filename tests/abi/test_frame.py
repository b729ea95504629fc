"""Packed calls: frames filled again and again."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest

from fi_ffi.abi.frame import Frame, TensorSlot
from fi_ffi.abi.function import Entry, make_array
from fi_ffi.abi.objects import Array
from fi_ffi.abi.tensor import TensorDesc
from fi_ffi.errors import KernelError

LAYOUTS = [
    TensorDesc(0, (2, 3), "float16", device="cpu").layout,
    TensorDesc(0, (), "int64", device="cuda:1").layout,
    TensorDesc(0, (0, 4), "bfloat16", strides=(9, 2)).layout,
]


@pytest.mark.parametrize("as_object", [False, True])
def test_slots_arrive_in_order(as_object: bool, callback: Callable[..., Entry]) -> None:
    calls: list[tuple[object, ...]] = []
    entry = callback(lambda *args: calls.append(args), 6)
    tensors = [TensorSlot(layout, as_object) for layout in LAYOUTS]
    frame = Frame([tensors[0], int, tensors[1], float, bool, tensors[2]])
    values = [
        (0x1000, -(2**63), 0x2000, 1.5, True, 0),
        (2**63, 2**63 - 1, 0x3000, float("-inf"), False, 0x4000),
    ]
    for each in values:
        assert frame.call(entry, each) is None
    for got, sent in zip(calls, values, strict=True):
        sent_descs = zip(sent[0::2][:2] + sent[5:], LAYOUTS, strict=True)
        assert [repr(got[i]) for i in (0, 2, 5)] == [
            f"TensorDesc({p:#x}, {x})" for p, x in sent_descs
        ]
        assert (got[1], got[3], got[4]) == (sent[1], sent[3], sent[4])
        assert [type(value) for value in got][1::2][:2] == [int, float]
        assert type(got[4]) is bool


def test_no_arguments(callback: Callable[..., Entry]) -> None:
    assert Frame([]).call(callback(lambda: 7, 0), []) == 7


def test_results_are_owned_and_cleared(callback: Callable[..., Entry]) -> None:
    results: list[object] = [5, None, "a longer string", None]
    entry = callback(lambda: results.pop(0), 0)
    frame = Frame([])
    assert [frame.call(entry, []) for _ in range(4)] == [5, None, "a longer string", None]

    array = make_array([1])
    made = frame.call(callback(lambda: array, 0), [])
    assert isinstance(made, Array)
    assert array.use_count == 2
    frame.call(callback(lambda: None, 0), [])
    del made
    assert array.use_count == 1


def test_a_wrong_number_of_values(callback: Callable[..., Entry]) -> None:
    with pytest.raises(ValueError, match="zip"):
        Frame([int]).call(callback(lambda a: None), [])


def test_a_frame_survives_a_failure(callback: Callable[..., Entry]) -> None:
    def sometimes(tensor: TensorDesc, number: int) -> int:
        if number < 0:
            raise ValueError(number)
        return tensor.ptr + number

    entry = callback(sometimes, 2)
    for as_object in (False, True):
        frame = Frame([TensorSlot(LAYOUTS[0], as_object), int])
        for _ in range(3):
            with pytest.raises(KernelError, match="ValueError: -1"):
                frame.call(entry, [0x1000, -1])
            assert frame.call(entry, [0x1000, 2]) == 0x1002


def test_a_frame_keeps_its_layouts(callback: Callable[..., Entry]) -> None:
    """Layouts fall out of their cache; the C arrays in use must not fall with them."""
    from fi_ffi.abi import tensor

    seen: list[TensorDesc] = []
    frame = Frame([TensorSlot(TensorDesc(0, (3, 1, 4, 1, 5), "int8").layout, False)])
    tensor._LAYOUTS.clear()
    gc.collect()
    clutter = [TensorDesc(0, (9,) * 5, "int8", strides=(i,) * 5) for i in range(1000)]
    frame.call(callback(seen.append), [0x1000])
    assert seen[0].shape == (3, 1, 4, 1, 5)
    assert len(clutter) == 1000
