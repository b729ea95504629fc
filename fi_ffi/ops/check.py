"""The checks a row implies: everything about a call but the addresses.

They run once for each new combination of layouts; a call that repeats one finds
the result in its op's cache.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from fi_ffi.abi.dtypes import DType
from fi_ffi.abi.tensor import Layout
from fi_ffi.errors import ArgumentError
from fi_ffi.ops.row import Row, Tensor

_DEVICE_TYPES = ("cpu", "cuda")


def check_layouts(row: Row, layouts: Sequence[Layout]) -> tuple[int, ...]:
    """Raise `ArgumentError` unless `layouts` fit the row's tensors.

    Returns the alignment in bytes that each tensor's address must have.
    """
    sizes, dtypes = _sizes(row, layouts), _dtypes(row, layouts)
    _check_device(row, layouts)
    vector = _vector(row, sizes, dtypes)
    alignments = []
    for tensor, layout in zip(row.tensors, layouts, strict=True):
        if tensor.writes and layout.readonly:
            raise ArgumentError(row.name, tensor.name, got="read-only memory", expected="writable")
        step = vector if row.vector_axis in tensor.axis_names else 1
        _check_strides(row, tensor, layout, step)
        alignments.append(step * layout.dtype.itemsize)
    return tuple(alignments)


def _sizes(row: Row, layouts: Sequence[Layout]) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for tensor, layout in zip(row.tensors, layouts, strict=True):
        names = tensor.axis_names
        if len(layout.shape) != len(names):
            expected = f"rank {len(names)} ({tensor.axes})"
            raise ArgumentError(row.name, tensor.name, got=layout, expected=expected)
        for name, size in zip(names, layout.shape, strict=True):
            bound = int(name) if name.isdigit() else sizes.setdefault(name, size)
            if size != bound:
                expected = f"{name} = {bound} of ({tensor.axes})"
                raise ArgumentError(row.name, tensor.name, got=layout, expected=expected)
            if size < row.min_sizes.get(name, 0):
                expected = f"{name} of at least {row.min_sizes[name]}"
                raise ArgumentError(row.name, tensor.name, got=layout, expected=expected)
    return sizes


def _dtypes(row: Row, layouts: Sequence[Layout]) -> dict[str, DType]:
    bound: dict[str, DType] = {}
    for tensor, layout in zip(row.tensors, layouts, strict=True):
        allowed = row.dtypes.get(tensor.dtype, (tensor.dtype,))
        if layout.dtype.name not in allowed:
            expected = " or ".join(allowed)
            raise ArgumentError(row.name, tensor.name, got=layout.dtype, expected=expected)
        same = bound.setdefault(tensor.dtype, layout.dtype)
        if layout.dtype is not same:
            expected = f"{same}, the {tensor.dtype} of this call"
            raise ArgumentError(row.name, tensor.name, got=layout.dtype, expected=expected)
    return bound


def _check_device(row: Row, layouts: Sequence[Layout]) -> None:
    first = layouts[0].device
    for tensor, layout in zip(row.tensors, layouts, strict=True):
        if layout.device.type not in _DEVICE_TYPES:
            expected = " or ".join(_DEVICE_TYPES)
            raise ArgumentError(row.name, tensor.name, got=layout.device, expected=expected)
        if layout.device is not first:
            expected = f"{first}, the device of `{row.tensors[0].name}`"
            raise ArgumentError(row.name, tensor.name, got=layout.device, expected=expected)


def _vector(row: Row, sizes: dict[str, int], dtypes: dict[str, DType]) -> int:
    """Elements the kernel loads at a time along the row's vector axis."""
    element = dtypes[next(iter(row.dtypes))]
    return math.gcd(row.vector_bytes // element.itemsize, sizes[row.vector_axis])


def _check_strides(row: Row, tensor: Tensor, layout: Layout, step: int) -> None:
    shape, strides = layout.shape, layout.strides

    def refuse(expected: str) -> ArgumentError:
        got = f"{layout.dtype}{list(shape)} with strides {strides}"
        return ArgumentError(row.name, tensor.name, got=got, expected=expected)

    if layout.numel == 0:
        return
    if tensor.contiguous and not layout.is_contiguous:
        raise refuse("a contiguous tensor")
    if strides[-1] != 1:
        raise refuse("a last axis with stride 1")
    # The stride of an axis of one element is never used.
    outer = [(stride, n) for stride, n in zip(strides[:-1], shape, strict=False) if n > 1]
    if any(stride < 0 for stride, _ in outer):
        raise refuse("strides of 0 or more")
    if any(stride % step for stride, _ in outer):
        raise refuse(f"strides in multiples of the {step} elements loaded at a time")
    if layout.span_bytes // layout.dtype.itemsize > row.offset_limit:
        raise refuse(f"offsets below {row.offset_limit} elements, as far as the kernel counts")
    if tensor.writes:
        reach = shape[-1] - 1
        for stride, size in sorted(outer):
            if stride <= reach:
                raise refuse("elements that do not overlap, because they are written")
            reach += stride * (size - 1)
