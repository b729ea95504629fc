"""The checks a row implies: everything about a call but the addresses.

They run once for each new combination of layouts; a call that repeats one finds
the result in its op's cache.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence

from fi_ffi.abi.dtypes import DType
from fi_ffi.abi.tensor import Layout
from fi_ffi.errors import ArgumentError
from fi_ffi.ops.row import Row, Tensor

_DEVICE_TYPES = ("cpu", "cuda")
_BLOCK_THREADS = 1024  # the most that CUDA allows, on every GPU

Given = Sequence[Layout | None]


class Checked:
    """What the checks found: sizes by axis name, and the alignment of each address in bytes."""

    __slots__ = ("alignments", "sizes")

    def __init__(self, sizes: dict[str, int], alignments: tuple[int, ...]) -> None:
        self.sizes, self.alignments = sizes, alignments


def check_layouts(
    row: Row, layouts: Given, kv_layout: str = "NHD", known: Mapping[str, int] | None = None
) -> Checked:
    """Raise `ArgumentError` unless `layouts` fit the row's tensors.

    `known` are sizes that are settled before (by a plan); an optional tensor that is
    not there has None for a layout.
    """
    sizes = _sizes(row, layouts, kv_layout, dict(known or ()))
    dtypes = _dtypes(row, layouts)
    _check_device(row, layouts)
    _check_relations(row, layouts, sizes)
    _check_products(row, layouts, sizes)
    _check_block(row, layouts, sizes, dtypes)
    alignments = []
    for tensor, layout in zip(row.tensors, layouts, strict=True):
        if layout is None:
            alignments.append(1)
            continue
        if tensor.writes and layout.readonly:
            raise ArgumentError(row.name, tensor.name, got="read-only memory", expected="writable")
        step = _step(row, tensor, layout, sizes, dtypes)
        _check_strides(row, tensor, layout, step)
        alignments.append(math.lcm(step * layout.dtype.itemsize, tensor.alignment))
    _check_same_strides(row, layouts)
    return Checked(sizes, tuple(alignments))


def _present(row: Row, layouts: Given) -> Iterator[tuple[Tensor, Layout]]:
    for tensor, layout in zip(row.tensors, layouts, strict=True):
        if layout is not None:
            yield tensor, layout


def _sizes(row: Row, layouts: Given, kv_layout: str, sizes: dict[str, int]) -> dict[str, int]:
    for tensor, layout in _present(row, layouts):
        names = tensor.axes_in(kv_layout)
        axes = " ".join(names)

        def refuse(expected: str, tensor: Tensor = tensor, got: Layout = layout) -> ArgumentError:
            return ArgumentError(row.name, tensor.name, got=got, expected=expected)

        if len(layout.shape) != len(names):
            raise refuse(f"rank {len(names)} ({axes})")
        for name, size in zip(names, layout.shape, strict=True):
            base, plus, more = name.partition("+")
            if name.isdigit():
                bound = int(name)
            elif plus:
                bound = sizes.setdefault(base, size - int(more)) + int(more)
            else:
                bound = sizes.setdefault(name, size)
            if size != bound:
                raise refuse(f"{name} = {bound} of ({axes})")
            if size < row.min_sizes.get(name, 1 if plus else 0):
                raise refuse(f"{name} of at least {row.min_sizes.get(name, 1)}")
            if size not in row.sizes_in.get(name, (size,)):
                raise refuse(f"{name} of {' or '.join(map(str, row.sizes_in[name]))}")
            for divisor, multiple in row.divides:
                if name not in (divisor, multiple) or not {divisor, multiple} <= sizes.keys():
                    continue
                if not sizes[divisor] or sizes[multiple] % sizes[divisor]:
                    raise refuse(
                        f"{multiple} = {sizes[multiple]} to be a multiple of "
                        f"{divisor} = {sizes[divisor]}"
                    )
    return sizes


def _refusal(row: Row, layouts: Given, axis: str, expected: str) -> ArgumentError:
    """An error of the first tensor that has an axis."""
    tensor, layout = next(
        (tensor, layout)
        for tensor, layout in _present(row, layouts)
        if axis in (name.partition("+")[0] for name in tensor.axis_names)
    )
    return ArgumentError(row.name, tensor.name, got=layout, expected=expected)


def _check_relations(row: Row, layouts: Given, sizes: dict[str, int]) -> None:
    """Sizes that follow from other tensors' sizes."""
    for axis, (extreme, *of) in row.extremes.items():
        bound = extreme(*(sizes[name] for name in of))
        if sizes[axis] != bound:
            told = " and ".join(f"{name} = {sizes[name]}" for name in of)
            expected = f"{axis} = {bound}, the {extreme.__name__} of {told}"
            raise _refusal(row, layouts, axis, expected)
    for more, less in row.not_less:
        if sizes[more] < sizes[less]:
            raise _refusal(row, layouts, more, f"{more} of at least {less} = {sizes[less]}")


def _check_products(row: Row, layouts: Given, sizes: dict[str, int]) -> None:
    refuse = functools.partial(_refusal, row, layouts)
    if row.nothing_axis and sizes[row.nothing_axis]:
        for axis in row.needed:
            if not sizes[axis]:
                told = f"{axis} of at least 1, for {row.nothing_axis} = {sizes[row.nothing_axis]}"
                raise refuse(axis, told)
    for axes, limit in row.max_products.items():
        product = math.prod(sizes[axis] for axis in axes)
        if product > limit:
            told = f"{' * '.join(axes)} = {product} of at most {limit}, as far as the kernel counts"
            raise refuse(axes[0], told)


def _check_block(row: Row, layouts: Given, sizes: dict[str, int], dtypes: dict[str, DType]) -> None:
    if not row.block:
        return
    for tensor, layout in _present(row, layouts):
        axis = _vector_axis(row, tensor)
        if axis is None or not set(row.block) <= set(tensor.axis_names):
            continue
        threads = -(-sizes[axis] // _vector_width(row, layout, dtypes))
        threads = min(threads, row.vector.threads or threads)
        most = _BLOCK_THREADS // threads
        if math.prod(sizes[name] for name in row.block) > most:
            expected = f"{' * '.join(row.block)} of at most {most}: one thread block covers them"
            raise ArgumentError(row.name, tensor.name, got=layout, expected=expected)


def _dtypes(row: Row, layouts: Given) -> dict[str, DType]:
    bound: dict[str, DType] = {}
    for tensor, layout in _present(row, layouts):
        allowed = row.dtypes.get(tensor.dtype, (tensor.dtype,))
        if layout.dtype.name not in allowed:
            expected = " or ".join(allowed)
            raise ArgumentError(row.name, tensor.name, got=layout.dtype, expected=expected)
        same = bound.setdefault(tensor.dtype, layout.dtype)
        if layout.dtype is not same:
            expected = f"{same}, the {tensor.dtype} of this call"
            raise ArgumentError(row.name, tensor.name, got=layout.dtype, expected=expected)
    return bound


def _check_device(row: Row, layouts: Given) -> None:
    first: tuple[str, Layout] | None = None
    for tensor, layout in _present(row, layouts):
        device = layout.device
        if tensor.host:
            if device.type != "cpu":
                expected = "an array on the host: it is read before anything is launched"
                raise ArgumentError(row.name, tensor.name, got=device, expected=expected)
            continue
        if device.type not in _DEVICE_TYPES:
            expected = " or ".join(_DEVICE_TYPES)
            raise ArgumentError(row.name, tensor.name, got=device, expected=expected)
        if first is None:
            first = tensor.name, layout
        elif device is not first[1].device:
            expected = f"{first[1].device}, the device of `{first[0]}`"
            raise ArgumentError(row.name, tensor.name, got=device, expected=expected)


def _vector_axis(row: Row, tensor: Tensor) -> str | None:
    return next((name for name in tensor.axis_names if name in row.vector.axes), None)


def _vector_width(row: Row, layout: Layout, dtypes: dict[str, DType]) -> int:
    vector = row.vector
    element = layout.dtype if vector.dtype is None else dtypes[vector.dtype]
    return vector.bytes // element.itemsize


def _step(
    row: Row, tensor: Tensor, layout: Layout, sizes: dict[str, int], dtypes: dict[str, DType]
) -> int:
    """Elements the kernel loads at a time from this tensor."""
    axis = _vector_axis(row, tensor)
    return 1 if axis is None else math.gcd(_vector_width(row, layout, dtypes), sizes[axis])


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
    if any(stride >= tensor.stride_limit for stride, _ in outer):
        raise refuse(f"strides below {tensor.stride_limit} elements, as far as the kernel counts")
    limit = tensor.offset_limit or row.offset_limit
    if layout.span_bytes // layout.dtype.itemsize > limit:
        raise refuse(f"offsets below {limit} elements, as far as the kernel counts")
    if tensor.writes:
        reach = shape[-1] - 1
        for stride, size in sorted(outer):
            if stride <= reach:
                raise refuse("elements that do not overlap, because they are written")
            reach += stride * (size - 1)


def _check_same_strides(row: Row, layouts: Given) -> None:
    wanted = [pair for pair in _present(row, layouts) if pair[0].name in row.same_strides]
    for tensor, layout in wanted[1:]:
        first, other = wanted[0]
        if layout.strides != other.strides:
            got, expected = f"strides {layout.strides}", f"{other.strides}, those of `{first.name}`"
            raise ArgumentError(row.name, tensor.name, got=got, expected=expected)
