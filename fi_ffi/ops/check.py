"""The checks a row implies: everything about a call but the addresses.

They run once for each new combination of layouts; a call that repeats one finds
the result in its op's cache.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

from fi_ffi.abi.dtypes import DType
from fi_ffi.abi.tensor import Layout, c_strides
from fi_ffi.errors import ArgumentError
from fi_ffi.ops.axes import parse_axis
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
    check_device(row, layouts)
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
        if tensor.parts > 1:
            _check_part(row, tensor, layout)
        alignments.append(math.lcm(step * layout.dtype.itemsize, tensor.alignment))
    _check_same_strides(row, layouts)
    return Checked(sizes, tuple(alignments))


def _present(row: Row, layouts: Given) -> Iterator[tuple[Tensor, Layout]]:
    for tensor, layout in zip(row.tensors, layouts, strict=True):
        if layout is not None:
            yield tensor, layout


Refuse = Callable[[str], ArgumentError]


def _sizes(row: Row, layouts: Given, kv_layout: str, sizes: dict[str, int]) -> dict[str, int]:
    """Every axis' size by its name."""
    waiting: list[tuple[str, int, Refuse]] = []
    for tensor, layout in _present(row, layouts):
        names = tensor.axes_in(kv_layout)
        refuse: Refuse = functools.partial(_refused, row, tensor, layout)
        if len(layout.shape) != len(names):
            raise refuse(f"rank {len(names)} ({' '.join(names)})")
        for name, size in zip(names, layout.shape, strict=True):
            if len(parse_axis(name).unknown(sizes)) > 1:
                waiting.append((name, size, refuse))  # until other tensors tell its parts
            else:
                _bind(row, name, size, sizes, refuse)
    for name, size, refuse in waiting:
        _bind(row, name, size, sizes, refuse)
    return sizes


def _refused(row: Row, tensor: Tensor, got: Layout, expected: str) -> ArgumentError:
    return ArgumentError(row.name, tensor.name, got=got, expected=expected)


def _bind(row: Row, text: str, size: int, sizes: dict[str, int], refuse: Refuse) -> None:
    """Hold an axis' size against what is known, or learn from it."""
    axis = parse_axis(text)
    unknown = axis.unknown(sizes)
    if unknown:
        found = axis.solve(size, sizes)
        if found is None:
            least = axis.size({name: sizes.get(name, 0) for name in axis.names})
            if size < least:
                raise refuse(f"{text} of at least {least}")
            raise refuse(f"{text}, a multiple of {unknown[0][1]}")
        sizes[unknown[0][0]] = found
    bound = axis.size(sizes)
    if size != bound:
        raise refuse(f"{text} = {bound}")
    for name in axis.names:
        _check_size(row, name, sizes, refuse)


def _check_size(row: Row, name: str, sizes: dict[str, int], refuse: Refuse) -> None:
    size = sizes[name]
    if size < row.min_sizes.get(name, 0):
        raise refuse(f"{name} of at least {row.min_sizes[name]}")
    if size not in row.sizes_in.get(name, (size,)):
        raise refuse(f"{name} of {' or '.join(map(str, row.sizes_in[name]))}")
    step = row.multiples.get(name, 1)
    if size % step:
        raise refuse(f"{name} = {size} to be a multiple of {step}")
    for divisor, multiple in row.divides:
        if name not in (divisor, multiple) or not {divisor, multiple} <= sizes.keys():
            continue
        if not sizes[divisor] or sizes[multiple] % sizes[divisor]:
            raise refuse(
                f"{multiple} = {sizes[multiple]} to be a multiple of {divisor} = {sizes[divisor]}"
            )


def _refusal(row: Row, layouts: Given, axis: str, expected: str) -> ArgumentError:
    """An error of the first tensor that has an axis."""
    tensor, layout = next(
        (tensor, layout)
        for tensor, layout in _present(row, layouts)
        if any(axis in parse_axis(name).names for name in tensor.axis_names)
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
    for lacking in row.lacks:
        if all(name in bound and bound[name].name == dtype for name, dtype in lacking.items()):
            tensor = next(tensor for tensor in row.tensors if tensor.dtype in lacking)
            others = " and ".join(name for name in lacking if name != tensor.dtype)
            got, expected = bound[tensor.dtype], f"another dtype with such {others}"
            raise ArgumentError(row.name, tensor.name, got=got, expected=expected)
    return bound


def check_device(row: Row, layouts: Given) -> None:
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
    """The one that is loaded several elements at a time, by the name of its size."""
    named = (parse_axis(text).names for text in tensor.axis_names)
    return next((name for names in named for name in names if name in row.vector.axes), None)


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
    shape, strides, is_contiguous = layout.shape, layout.strides, layout.is_contiguous
    if tensor.transposed:
        shape = (*shape[:-2], shape[-1], shape[-2])
        strides = (*strides[:-2], strides[-1], strides[-2])
        is_contiguous = all(
            n == 1 or own == wanted
            for n, own, wanted in zip(shape, strides, c_strides(shape), strict=True)
        )

    def refuse(expected: str) -> ArgumentError:
        got = f"{layout.dtype}{list(layout.shape)} with strides {layout.strides}"
        return ArgumentError(row.name, tensor.name, got=got, expected=expected)

    if layout.numel == 0:
        return
    how = ", but for its last two axes, which are transposed" if tensor.transposed else ""
    if tensor.contiguous and not is_contiguous:
        raise refuse(f"a contiguous tensor{how}")
    if strides[-1] != 1:
        raise refuse(f"a last axis with stride 1{how}")
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


def _check_part(row: Row, tensor: Tensor, layout: Layout) -> None:
    strides = c_strides((*layout.shape[:-1], layout.shape[-1] * tensor.parts))
    both = zip(layout.shape, layout.strides, strides, strict=True)
    if layout.numel and any(n > 1 and stride != wanted for n, stride, wanted in both):
        expected = f"{strides}, as one of {tensor.parts} parts of a contiguous tensor has them"
        got = f"strides {layout.strides}"
        raise ArgumentError(row.name, tensor.name, got=got, expected=expected)


def _check_same_strides(row: Row, layouts: Given) -> None:
    wanted = [pair for pair in _present(row, layouts) if pair[0].name in row.same_strides]
    for tensor, layout in wanted[1:]:
        first, other = wanted[0]
        if layout.strides != other.strides:
            got, expected = f"strides {layout.strides}", f"{other.strides}, those of `{first.name}`"
            raise ArgumentError(row.name, tensor.name, got=got, expected=expected)
