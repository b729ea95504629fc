"""Layouts of tensors at their bounds: sizes of 0 and 1, elements of half a byte, 64 bits."""

from __future__ import annotations

import pytest

import fi_ffi
from fi_ffi.abi.tensor import c_strides, is_row_major, span
from fi_ffi.errors import ArgumentError

MOST = 2**63 - 1


@pytest.mark.parametrize(
    ("shape", "strides", "is_whole", "elements"),
    [((), (), True, 1), ((1,), (1,), True, 1), ((1,), (7,), True, 1), ((1,), (0,), True, 1),
     ((2,), (1,), True, 2), ((2,), (2,), False, 3), ((2,), (0,), False, 1), ((2,), (-1,), False, 2),
     ((0,), (5,), True, 0), ((3, 1), (1, 9), True, 3), ((1, 3), (99, 1), True, 3),
     ((2, 3), (3, 1), True, 6), ((2, 3), (4, 1), False, 7), ((2, 3), (1, 2), False, 6),
     ((2, 1, 3), (3, 0, 1), True, 6), ((2, 0, 3), (9, 9, 9), True, 0),
     ((2, 3, 1), (3, 1, 5), True, 6), ((2, 3, 1), (4, 1, 5), False, 7),
     ((2, 2**40), (2**40, 1), True, 2**41), ((2, 2**40), (2**41, 1), False, 3 * 2**40)],
)  # fmt: skip
def test_elements_without_gaps(shape, strides, is_whole, elements):
    """The stride of one element is no matter, and that of none either."""
    assert is_row_major(shape, strides) is is_whole
    assert span(shape, strides) == elements


@pytest.mark.parametrize(
    ("shape", "strides"),
    [((), ()), ((5,), (1,)), ((2, 3), (3, 1)), ((2, 1, 3), (3, 3, 1)), ((0, 3), (3, 1)),
     ((3, 0), (1, 1)), ((2, 0, 4), (4, 4, 1)), ((2, 2**31, 4), (2**33, 4, 1))],
)  # fmt: skip
def test_strides_of_a_shape(shape, strides):
    assert c_strides(shape) == strides


@pytest.mark.parametrize(
    ("dtype", "count", "nbytes"),
    [("float4_e2m1fn", 0, 0), ("float4_e2m1fn", 1, 1), ("float4_e2m1fn", 2, 1),
     ("float4_e2m1fn", 3, 2), ("float4_e2m1fn_x2", 3, 3), ("int8", 3, 3), ("bfloat16", 3, 6),
     ("int4", 2**40 + 1, 2**39 + 1), ("float64", 2**40, 2**43)],
)  # fmt: skip
def test_bytes_of_elements(dtype, count, nbytes):
    assert fi_ffi.DTYPES[dtype].bytes_of(count) == nbytes
    assert fi_ffi.TensorDesc(4096, (count,), dtype, device="cpu").span_bytes == nbytes


@pytest.mark.parametrize(
    ("dtype", "row", "step", "is_right"),
    [("float16", 1, 2**31, True), ("float16", 2**30, 2**31, True), ("int4", 2, 3, True),
     ("int4", 1, 3, False), ("int4", 0, 3, True), ("int4", 1, 4, True), ("uint4", 3, 2**31, True),
     ("float64", 2**29, 8, True)],
)  # fmt: skip
def test_rows_beyond_2_gib(dtype, row, step, is_right):
    """Where a row starts, at addresses that are never read."""
    desc = fi_ffi.TensorDesc(4096, (row + 2, step), dtype, strides=(step, 1), device="cpu")
    if not is_right:
        with pytest.raises(ArgumentError, match="a whole byte"):
            desc.rows(row, row + 1)
        return
    bits = {"float16": 16, "float64": 64}.get(dtype, 4)
    found = desc.rows(row, row + 1)
    assert found.ptr == 4096 + row * step * bits // 8
    assert found.shape == (1, step) and found.strides == (step, 1)
    assert desc.rows(row, row).shape == (0, step)


@pytest.mark.parametrize(
    ("shape", "strides", "dtype", "is_right"),
    [((MOST,), None, "int8", True), ((2**62,), None, "float16", False),
     ((2**62 - 1,), None, "float16", True), ((2**61,), None, "float32", False),
     ((2**60 - 1,), None, "float64", True), ((2**60,), None, "float64", False),
     ((2,), (MOST - 1,), "int8", True), ((2,), (MOST,), "int8", False),
     ((1,), (MOST,), "int8", True), ((1,), (MOST,), "float16", False),
     ((2,), (-(MOST - 1),), "int8", True), ((2**32, 2**31), None, "int8", False),
     ((2**31, 2**31), None, "int8", True), ((2**31 - 1, 2**32), None, "int8", True)],
)  # fmt: skip
def test_bytes_are_counted_in_63_bits(shape, strides, dtype, is_right):
    def make() -> fi_ffi.TensorDesc:
        return fi_ffi.TensorDesc(0, shape, dtype, strides=strides, device="cpu")

    if is_right:
        assert make().shape == shape
        return
    with pytest.raises(ArgumentError, match="a size within int64"):
        make()


@pytest.mark.parametrize("count", [0, 1, 4096])
def test_the_last_address_that_has_room(count):
    desc = fi_ffi.TensorDesc(0, (count,), "uint8", device="cpu")
    last = 2**64 - 1 - count
    assert desc.at(last).ptr == last
    for beyond in (last + 1, -1, 2**64):
        with pytest.raises(ArgumentError, match="an address with room for"):
            desc.at(beyond)
