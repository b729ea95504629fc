"""`TensorDesc`: where a tensor is and how it is laid out; it owns no memory."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any, NoReturn

from fi_ffi.abi._cffi import ffi
from fi_ffi.abi.device import Device, parse_device
from fi_ffi.abi.dtypes import DType, parse_dtype
from fi_ffi.errors import ArgumentError, ArgumentTypeError, printed

_INT64_MAX = 2**63 - 1
MAX_RANK = 64
_CACHE_LIMIT = 8192
_INT = {int}


class Layout:
    """All of a tensor but its address: shape, strides, dtype, device.

    Layouts are interned (the same arguments give the same object while it is in
    the cache), so a check that passed for a layout need not be made again, and
    the C arrays a `DLTensor` points to are made once and never written again.
    """

    __slots__ = (
        "c_shape",
        "c_strides",
        "device",
        "dtype",
        "is_contiguous",
        "last_address",
        "numel",
        "readonly",
        "shape",
        "span_bytes",
        "strides",
    )

    def __init__(
        self,
        shape: tuple[int, ...],
        strides: tuple[int, ...],
        dtype: DType,
        device: Device,
        readonly: bool,
    ) -> None:
        self.shape, self.strides, self.dtype, self.device = shape, strides, dtype, device
        self.readonly = readonly
        self.numel = 1
        for size in shape:
            self.numel *= size
        # Bytes from the lowest to past the highest element touched.
        reach = sum(abs(stride) * (size - 1) for size, stride in zip(shape, strides, strict=True))
        self.span_bytes = (reach + 1) * dtype.itemsize if self.numel else 0
        self.last_address = 2**64 - 1 - self.span_bytes
        self.is_contiguous = self.numel == 0 or all(
            size == 1 or stride == expected
            for size, stride, expected in zip(shape, strides, c_strides(shape), strict=True)
        )
        self.c_shape: Any = ffi.new("int64_t[]", shape)
        self.c_strides: Any = ffi.new("int64_t[]", strides)

    @property
    def key(self) -> tuple[object, ...]:
        """All that makes it what it is; the same for what was interned twice."""
        return self.shape, self.strides, self.dtype, self.device, self.readonly

    def __repr__(self) -> str:
        strides = "" if self.is_contiguous else f", strides={self.strides}"
        return f"{self.dtype}{list(self.shape)}{strides} on {self.device}"


_LAYOUTS: dict[object, Layout] = {}


def c_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Row-major strides of `shape`, in elements."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def _index(value: object) -> int:
    if type(value).__name__ in ("bool", "bool_"):  # numpy's as well, which may have __index__
        raise TypeError
    return operator.index(value)  # type: ignore[arg-type]


def _integers(values: object, argument: str, low: int) -> tuple[int, ...]:
    expected = f"integers from {low} to {_INT64_MAX}, {MAX_RANK} at most"
    try:
        if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
            raise TypeError
        numbers = tuple(_index(value) for value in values)
    except TypeError:
        raise ArgumentTypeError(
            "TensorDesc", argument, got=printed(values), expected=expected
        ) from None
    if len(numbers) > MAX_RANK or any(not low <= number <= _INT64_MAX for number in numbers):
        raise ArgumentError("TensorDesc", argument, got=numbers, expected=expected)
    return numbers


def make_layout(
    shape: object, dtype: object, strides: object, device: object, readonly: bool
) -> Layout:
    """The layout of these arguments, checked; see `TensorDesc` for what they are."""
    shape_ = _integers(shape, "shape", 0)
    dtype_, device_ = parse_dtype(dtype), parse_device(device)
    strides_ = c_strides(shape_) if strides is None else _integers(strides, "strides", -_INT64_MAX)
    if len(strides_) != len(shape_):
        raise ArgumentError(
            "TensorDesc", "strides", got=strides_, expected=f"{len(shape_)} strides for {shape_}"
        )
    key = (shape_, strides_, dtype_, device_, readonly)
    found = _LAYOUTS.get(key)
    if found is None:
        # Sizes first: c_strides of a huge shape may itself be past int64.
        reach = sum(abs(st) * max(n - 1, 0) for n, st in zip(shape_, strides_, strict=True)) + 1
        count = 1
        for size in shape_:
            count *= size
        if max(reach, count, *map(abs, strides_), 0) * dtype_.itemsize > _INT64_MAX:
            got = f"{dtype_}{list(shape_)} with strides {strides_}"
            raise ArgumentError("TensorDesc", "shape", got=got, expected="a size within int64")
        found = _remember(key, Layout(shape_, strides_, dtype_, device_, readonly))
    return found


def _remember(key: object, layout: Layout) -> Layout:
    if len(_LAYOUTS) >= _CACHE_LIMIT:
        _LAYOUTS.clear()
    return _LAYOUTS.setdefault(key, layout)


def _cached_layout(
    shape: object, dtype: object, strides: object, device: object, readonly: bool
) -> Layout:
    # The arguments as given are the quick key; only exact ints may be one, because
    # 1.0 and True hash like 1 and must meet the checks.
    if type(shape) is not tuple or {*map(type, shape)} != _INT:
        return make_layout(shape, dtype, strides, device, readonly)
    if strides is not None and (type(strides) is not tuple or {*map(type, strides)} != _INT):
        return make_layout(shape, dtype, strides, device, readonly)
    key = (shape, dtype, strides, device, readonly)
    try:
        return _LAYOUTS[key]
    except KeyError:
        pass
    except TypeError:  # an unhashable dtype or device: make_layout names it
        return make_layout(shape, dtype, strides, device, readonly)
    return _remember(key, make_layout(shape, dtype, strides, device, readonly))


class TensorDesc:
    """A tensor by address: what a kernel needs to know of it, and no more.

    Args:
        ptr: address of element (0, 0, ...), an int; may be 0 only for a tensor
            that no kernel reads or writes (one with no elements).
        shape: sizes, slowest axis first; any rank.
        dtype: a name from `fi_ffi.DTYPES` ("float16", "bfloat16", ...), or a
            numpy, ml_dtypes or torch dtype.
        strides: in **elements**, not bytes; row-major when not given.
        device: "cuda:0", "cpu", ...

    The descriptor is immutable and owns nothing: the memory must stay valid until
    the work launched with it has finished.  Raises `ArgumentError` (a value out of
    range, a size past int64) and `ArgumentTypeError`.
    """

    __slots__ = ("layout", "owner", "ptr")
    ptr: int
    layout: Layout
    owner: object

    def __new__(
        cls,
        ptr: int,
        shape: Iterable[int],
        dtype: object,
        *,
        strides: Iterable[int] | None = None,
        device: object = "cuda:0",
    ) -> TensorDesc:
        return make_desc(ptr, _cached_layout(shape, dtype, strides, device, False))

    @property
    def shape(self) -> tuple[int, ...]:
        return self.layout.shape

    @property
    def strides(self) -> tuple[int, ...]:
        return self.layout.strides

    @property
    def dtype(self) -> DType:
        return self.layout.dtype

    @property
    def device(self) -> Device:
        return self.layout.device

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(f"TensorDesc is immutable; make a new one to change `{name}`")

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"TensorDesc is immutable; `{name}` stays")

    def __reduce__(self) -> NoReturn:
        raise TypeError("a TensorDesc is an address in this process and cannot be pickled")

    def __repr__(self) -> str:
        return f"TensorDesc({self.ptr:#x}, {self.layout})"


_set_ptr = TensorDesc.__dict__["ptr"].__set__
_set_layout = TensorDesc.__dict__["layout"].__set__
_set_owner = TensorDesc.__dict__["owner"].__set__


def make_desc(ptr: object, layout: Layout, owner: object = None) -> TensorDesc:
    """A descriptor from a checked layout; `owner` is kept alive with it."""
    if type(ptr) is not int:
        ptr = _address(ptr)
    if not 0 <= ptr <= layout.last_address:
        raise ArgumentError(
            "TensorDesc", "ptr", got=hex(ptr), expected=f"an address with room for {layout}"
        )
    desc = object.__new__(TensorDesc)
    _set_ptr(desc, ptr)
    _set_layout(desc, layout)
    _set_owner(desc, owner)
    return desc


def _address(ptr: object) -> int:
    """An address from an int-like object; cuda-python's CUdeviceptr has `__int__` only."""
    kind = type(ptr)
    try:
        # Not of any type: a float has __int__ too, and would lose its fraction.
        if kind.__module__.partition(".")[0] == "cuda" and hasattr(kind, "__int__"):
            return int(ptr)  # type: ignore[call-overload,no-any-return]
        return _index(ptr)
    except TypeError:
        got = f"{kind.__name__} {printed(ptr)}"
        raise ArgumentTypeError("TensorDesc", "ptr", got=got, expected="an int address") from None
