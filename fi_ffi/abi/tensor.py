"""Tensors by address: element types, devices, and `TensorDesc`, which owns no memory."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from fi_ffi.errors import ArgumentError, ArgumentTypeError, printed, with_type

if TYPE_CHECKING:
    import numpy

_Kept = TypeVar("_Kept")

_INT64_MAX = 2**63 - 1
MAX_RANK = 64
_MAX_NAMES = 4096


@dataclass(frozen=True, eq=False)
class DType:
    """An element type; the only instances are those in `DTYPES`.

    `code`, `bits` and `lanes` are the fields of a `DLDataType` (dlpack.h). `itemsize` is the number
    of bytes of one packed element, or of the byte that it shares with others.
    """

    name: str
    code: int
    bits: int
    lanes: int = 1

    @property
    def itemsize(self) -> int:
        return (self.bits * self.lanes + 7) // 8

    @property
    def shares_bytes(self) -> bool:
        """Whether elements are smaller than a byte: two share a byte, the first in the low half."""
        return self.bits * self.lanes < 8

    def bytes_of(self, count: int) -> int:
        """Return the number of bytes of `count` contiguous elements."""
        return (count * self.bits * self.lanes + 7) // 8

    @functools.cached_property
    def numpy(self) -> numpy.dtype[Any]:
        """The numpy dtype with the same bytes; ml_dtypes provides those that numpy lacks."""
        import ml_dtypes
        import numpy

        # ml_dtypes uses a byte for each element of int4, uint4 and float4_e2m1fn.
        if self.lanes > 1 or self.shares_bytes:
            return numpy.dtype(numpy.uint8)
        return numpy.dtype(getattr(ml_dtypes, self.name, self.name))

    def __repr__(self) -> str:
        return self.name


_INT, _UINT, _FLOAT, _BFLOAT, _BOOL = 0, 1, 2, 4, 6
_FLOAT8_E4M3FN, _FLOAT8_E5M2, _FLOAT8_E8M0FNU, _FLOAT4_E2M1FN = 10, 12, 14, 17

DTYPES: dict[str, DType] = {
    dtype.name: dtype
    for dtype in (
        DType("float16", _FLOAT, 16),
        DType("bfloat16", _BFLOAT, 16),
        DType("float32", _FLOAT, 32),
        DType("float64", _FLOAT, 64),
        DType("float8_e4m3fn", _FLOAT8_E4M3FN, 8),
        DType("float8_e5m2", _FLOAT8_E5M2, 8),
        DType("float8_e8m0fnu", _FLOAT8_E8M0FNU, 8),
        # Two values in a byte, counted as one element, as in FlashInfer and in torch's
        # float4_e2m1fn_x2.
        DType("float4_e2m1fn_x2", _FLOAT4_E2M1FN, 4, 2),
        # Two values in a byte, counted one by one, as in DLPack.
        DType("float4_e2m1fn", _FLOAT4_E2M1FN, 4),
        DType("int4", _INT, 4),
        DType("uint4", _UINT, 4),
        DType("int8", _INT, 8),
        DType("int16", _INT, 16),
        DType("int32", _INT, 32),
        DType("int64", _INT, 64),
        DType("uint8", _UINT, 8),
        DType("uint16", _UINT, 16),
        DType("uint32", _UINT, 32),
        DType("uint64", _UINT, 64),
        DType("bool", _BOOL, 8),
    )
}
_BY_CODE = {(d.code, d.bits, d.lanes): d for d in DTYPES.values()}


def parse_dtype(dtype: object, *, op: str = "TensorDesc", argument: str = "dtype") -> DType:
    """Return the table's entry for a name, a `DType`, or a numpy, ml_dtypes or torch dtype.

    Raises `ArgumentTypeError` for anything else; the message lists the known names.
    """
    # numpy dtypes have a `name`, numpy scalar types a `__name__`; torch dtypes print as
    # torch.float16.
    name = getattr(dtype, "name", None) or getattr(dtype, "__name__", None) or dtype
    name = name if isinstance(name, str) else printed(name)
    # numpy before 2.0 calls its bool bool_.
    found = DTYPES.get(name.rpartition(".")[2].removesuffix("_"))
    if found is None or getattr(dtype, "byteorder", "=") == ">":
        raise ArgumentTypeError(op, argument, got=printed(dtype), expected=f"one of {list(DTYPES)}")
    return found


def dtype_of(written: Any) -> DType | None:
    """Return the table's entry for a `DLDataType`, or None."""
    return _BY_CODE.get((written.code, written.bits, written.lanes))


# DLDeviceType of dlpack.h
DEVICE_TYPES = {"cpu": 1, "cuda": 2, "cuda_host": 3, "cuda_managed": 13}
_TYPE_NAMES = {code: name for name, code in DEVICE_TYPES.items()}
_MAX_INDEX = 2**31 - 1


@dataclass(frozen=True, eq=False)
class Device:
    """A device; equal devices are the same object (see `parse_device`)."""

    type: str
    index: int

    @functools.cached_property
    def type_code(self) -> int:
        return DEVICE_TYPES[self.type]

    @functools.cached_property
    def is_cuda(self) -> bool:
        return self.type == "cuda"

    def __str__(self) -> str:
        return self.type if self.type in ("cpu", "cuda_host") else f"{self.type}:{self.index}"

    def __repr__(self) -> str:
        return str(self)


_DEVICES: dict[object, Device] = {}


def device_from_code(type_code: int, index: int) -> Device | None:
    """Return the device for the fields of a `DLDevice`, or None if no such device can exist."""
    name = _TYPE_NAMES.get(type_code)
    if name is None or not 0 <= index <= _MAX_INDEX:
        return None
    key = name, index
    return _DEVICES.get(key) or _DEVICES.setdefault(key, Device(*key))


def parse_device(device: object, *, op: str = "TensorDesc", argument: str = "device") -> Device:
    """Return the `Device` for `"cuda:1"`, `"cuda"` (index 0), `"cpu"`, or a `Device`.

    Raises `ArgumentTypeError` for anything else.
    """
    # A Device may have been constructed directly, and is not checked then.
    text = f"{device.type}:{device.index}" if isinstance(device, Device) else device
    if isinstance(text, str):
        known = _DEVICES.get(text)
        if known is not None:
            return known
        name, colon, index = text.partition(":")
        digits = index if colon else "0"
        if name in DEVICE_TYPES and digits.isascii() and digits.isdigit() and len(digits) < 11:
            known = device_from_code(DEVICE_TYPES[name], int(digits))
            if known is not None:
                return _DEVICES.setdefault(text, known)
    expected = f"'<type>:<index>' with type in {[*DEVICE_TYPES]}"
    raise ArgumentTypeError(op, argument, got=printed(text), expected=expected)


class TensorKind:
    """The key that selects a compiled call: dtype, device, rank, and whether memory is read-only.

    Equal kinds are the same object; `tensor_kind` makes them.
    """

    __slots__ = ("device", "dtype", "itemsize", "rank", "readonly", "shares_bytes")

    def __init__(self, dtype: DType, device: Device, rank: int, readonly: bool) -> None:
        self.dtype, self.device, self.rank, self.readonly = dtype, device, rank, readonly
        self.itemsize, self.shares_bytes = dtype.itemsize, dtype.shares_bytes

    def __repr__(self) -> str:
        access = ", read-only" if self.readonly else ""
        return f"{self.dtype} of rank {self.rank} on {self.device}{access}"


_KINDS: dict[tuple[DType, Device, int, bool], TensorKind] = {}
# Kinds by dtype and device as the caller spelled them, so that each spelling is parsed once.
_NAMED: dict[tuple[object, object, int], TensorKind] = {}


def tensor_kind(dtype: DType, device: Device, rank: int, readonly: bool = False) -> TensorKind:
    """Return the kind with these fields."""
    key = dtype, device, rank, readonly
    return _KINDS.get(key) or _KINDS.setdefault(key, TensorKind(*key))


class _Fields:
    __slots__ = ("kind", "owner", "ptr", "shape", "strides")
    ptr: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    kind: TensorKind
    owner: object


class Made(_Fields):
    """A `TensorDesc` whose fields can still be set."""

    __slots__ = ()


_new = object.__new__


class TensorDesc(_Fields):
    """A tensor by address: everything that a kernel needs to know about it, and nothing else.

    Args:
        ptr: address of element (0, 0, ...), an int; may be 0 only for a tensor
            that no kernel reads or writes (one with no elements).
        shape: sizes, slowest axis first; any rank.
        dtype: a name from `fi_ffi.DTYPES` ("float16", "bfloat16", ...), or a
            numpy, ml_dtypes or torch dtype.
        strides: in **elements**, not bytes; row-major if omitted.
        device: "cuda:0", "cpu", ...

    The descriptor is immutable and owns nothing: the memory must stay valid until the work launched
    with it has finished. `at` and `rows` derive descriptors from a checked one. Raises
    `ArgumentError` (a value out of range, a size past int64) and `ArgumentTypeError`.
    """

    __slots__ = ()
    # Set by `fi_ffi.export`, so that other libraries can read the tensor.
    __array_interface__: dict[str, Any]
    __cuda_array_interface__: dict[str, Any]
    __array__: Callable[..., numpy.ndarray[Any, Any]]
    __dlpack__: Callable[..., object]
    __dlpack_device__: Callable[[], tuple[int, int]]

    def __new__(
        cls,
        ptr: int,
        shape: Iterable[int],
        dtype: object,
        *,
        strides: Iterable[int] | None = None,
        device: object = "cuda:0",
    ) -> TensorDesc:
        # Straight-line code for the descriptors that runtimes make in every step: exact ints,
        # row-major.
        if strides is None and type(shape) is tuple and type(ptr) is int:
            try:
                kind = _NAMED.get((dtype, device, len(shape)))
            except TypeError:  # an unhashable dtype or device
                kind = None
            if kind is None:
                return make_desc(ptr, shape, dtype, strides, device)
            # The bits of several sizes are a negative number if one of them is.
            step, rank = 0, kind.rank
            steps: tuple[int, ...]
            if rank == 2:
                n0, n1 = shape
                if type(n0) is int is type(n1) and n0 | n1 >= 0:
                    step = n1 or 1
                    steps = (step, 1)
            elif rank == 3:
                n0, n1, n2 = shape
                if type(n0) is int is type(n1) and type(n2) is int and n0 | n1 | n2 >= 0:
                    last = n2 or 1
                    step = (n1 or 1) * last
                    steps = (step, last, 1)
            elif rank == 1:
                (n0,) = shape
                if type(n0) is int and n0 >= 0:
                    step, steps = 1, (1,)
            else:
                return make_desc(ptr, shape, dtype, strides, device)
            # Checked for an empty tensor too: its strides are written as int64.
            if step and (n0 or 1) * step * kind.itemsize <= _INT64_MAX >= ptr >= 0:
                made: Any = _new(Made)
                made.ptr, made.shape, made.strides = ptr, shape, steps
                made.kind, made.owner = kind, None
                made.__class__ = TensorDesc
                return made  # type: ignore[no-any-return]
        return make_desc(ptr, shape, dtype, strides, device)

    @property
    def dtype(self) -> DType:
        return self.kind.dtype

    @property
    def device(self) -> Device:
        return self.kind.device

    @property
    def readonly(self) -> bool:
        """Whether the memory must not be written."""
        return self.kind.readonly

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def span_bytes(self) -> int:
        """Number of bytes from the lowest to the end of the highest element."""
        return self.dtype.bytes_of(span(self.shape, self.strides))

    @property
    def is_contiguous(self) -> bool:
        """Whether the elements are contiguous in row-major order."""
        return is_row_major(self.shape, self.strides)

    @property
    def layout(self) -> str:
        """Dtype, shape, strides and device as text, in the form that errors use."""
        strides = "" if self.is_contiguous else f", strides={self.strides}"
        return f"{self.dtype}{list(self.shape)}{strides} on {self.device}"

    def at(self, ptr: int, owner: object = None) -> TensorDesc:
        """Return the same layout at another address; the descriptor keeps `owner` alive."""
        if type(ptr) is not int or not 0 <= ptr <= _INT64_MAX:
            ptr = _address(ptr, self.span_bytes, self)
        return frozen(ptr, self.shape, self.strides, self.kind, owner)

    def rows(self, start: int, stop: int) -> TensorDesc:
        """Return rows `start` to `stop` (exclusive) of the first axis, in the same memory.

        Raises `ArgumentError` unless `0 <= start <= stop <= shape[0]`.
        """
        shape, kind = self.shape, self.kind
        if type(start) is not int or type(stop) is not int:
            try:
                start, stop = index_of(start), index_of(stop)
            except TypeError:
                got, expected = f"{printed(start)}, {printed(stop)}", "two ints"
                raise ArgumentTypeError("TensorDesc", "rows", got=got, expected=expected) from None
        if not shape or not 0 <= start <= stop <= shape[0]:
            expected = f"rows within 0 to {shape[0]}" if shape else "a tensor of rank 1 or more"
            raise ArgumentError("TensorDesc", "rows", got=(start, stop), expected=expected)
        strides = self.strides
        if kind.shares_bytes:
            before = _bytes_before(self, start, stop)
        else:
            before = start * strides[0] * kind.itemsize
        return frozen(self.ptr + before, (stop - start, *shape[1:]), strides, kind, self.owner)

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(f"TensorDesc is immutable; make a new one to change `{name}`")

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"TensorDesc is immutable; `{name}` stays")

    def __reduce__(self) -> NoReturn:
        raise TypeError("a TensorDesc is an address in this process and cannot be pickled")

    def __copy__(self) -> TensorDesc:
        return self

    def __repr__(self) -> str:
        return f"TensorDesc({self.ptr:#x}, {self.layout})"


def frozen(
    ptr: int, shape: tuple[int, ...], strides: tuple[int, ...], kind: TensorKind, owner: object
) -> TensorDesc:
    """Return a descriptor with fields that are already checked.

    The fields are set on a mutable object whose class is changed afterwards; setting the slots of
    an immutable object takes twice as long.
    """
    made: Any = _new(Made)
    made.ptr, made.shape, made.strides, made.kind, made.owner = ptr, shape, strides, kind, owner
    made.__class__ = TensorDesc
    return made  # type: ignore[no-any-return]


def _bytes_before(desc: TensorDesc, start: int, stop: int) -> int:
    """Return the bytes before a row; refuse rows that start in the middle of one."""
    dtype, before = desc.dtype, start * desc.strides[0]
    if before % 2 and stop > start:
        expected = f"rows that start at a whole byte, which holds two {dtype} elements"
        raise ArgumentError("TensorDesc", "rows", got=(start, stop), expected=expected)
    return before * dtype.bits // 8


def as_vector(desc: TensorDesc) -> TensorDesc:
    """View a tensor without its trailing axes of size 1; a scalar becomes a vector."""
    shape, strides = desc.shape or (1,), desc.strides or (1,)
    while len(shape) > 1 and shape[-1] == 1:
        shape, strides = shape[:-1], strides[:-1]
    return viewed(desc, shape, strides)


def viewed(desc: TensorDesc, shape: tuple[int, ...], strides: tuple[int, ...]) -> TensorDesc:
    """View the same memory with other axes, which are not checked."""
    kind = tensor_kind(desc.dtype, desc.device, len(shape), desc.readonly)
    return frozen(desc.ptr, shape, strides, kind, desc)


def c_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the row-major strides of `shape`, in elements."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size or 1
    strides.reverse()
    return tuple(strides)


def is_row_major(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Return whether elements are contiguous; the stride of an axis of size 1 is ignored."""
    step = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and stride != step:
            return 0 in shape
        step *= size
    return True


def span(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Return the number of elements from the lowest to the highest; 0 for an empty tensor."""
    reach = 1
    for size, stride in zip(shape, strides, strict=True):
        if not size:
            return 0
        reach += abs(stride) * (size - 1)
    return reach


def make_desc(
    ptr: object,
    shape: object,
    dtype: object,
    strides: object,
    device: object,
    readonly: bool = False,
    owner: object = None,
) -> TensorDesc:
    """Check all arguments and return a descriptor, which keeps `owner` alive."""
    shape_ = _integers(shape, "shape", 0)
    dtype_, device_ = parse_dtype(dtype), parse_device(device)
    strides_ = c_strides(shape_) if strides is None else _integers(strides, "strides", -_INT64_MAX)
    if len(strides_) != len(shape_):
        raise ArgumentError(
            "TensorDesc", "strides", got=strides_, expected=f"{len(shape_)} strides for {shape_}"
        )
    if dtype_.shares_bytes and not isinstance(dtype, (str, DType)):
        got = f"{printed(dtype)}, which has a byte for each element"
        expected = f"the name {dtype_.name!r} for two in a byte, or 'int8' or 'uint8' for the bytes"
        raise ArgumentTypeError("TensorDesc", "dtype", got=got, expected=expected)
    kind = tensor_kind(dtype_, device_, len(shape_), readonly)
    desc = checked(ptr, shape_, strides_, kind, owner)
    if not readonly:
        remember(_NAMED, (dtype, device, kind.rank), kind, _MAX_NAMES)
    return desc


def checked(
    ptr: object, shape: tuple[int, ...], strides: tuple[int, ...], kind: TensorKind, owner: object
) -> TensorDesc:
    """Return a descriptor of these sizes and strides, which are int64, if it can be one."""
    if kind.shares_bytes and not is_row_major(shape, strides):
        expected = f"row-major strides: elements of {kind.dtype} share bytes"
        raise ArgumentError("TensorDesc", "strides", got=strides, expected=expected)
    # Before the address: c_strides of a huge shape may itself exceed int64.
    reach, most = 1, math.prod(shape)
    for size, stride in zip(shape, strides, strict=True):
        reach, most = reach + abs(stride) * max(size - 1, 0), max(most, abs(stride))
    if max(reach, most) * kind.itemsize > _INT64_MAX:
        got = f"{kind.dtype}{list(shape)} with strides {strides}"
        raise ArgumentError("TensorDesc", "shape", got=got, expected="a size within int64")
    if type(ptr) is not int or not 0 <= ptr <= _INT64_MAX:
        described = frozen(0, shape, strides, kind, None)
        ptr = _address(ptr, described.span_bytes, described)
    return frozen(ptr, shape, strides, kind, owner)


def remember(cache: dict[Any, _Kept], key: object, value: _Kept, most: int) -> _Kept:
    """Store a value in a cache, which is emptied when it holds `most` entries."""
    if len(cache) >= most:
        cache.clear()
    with contextlib.suppress(TypeError):  # an unhashable key
        cache[key] = value
    return value


def index_of(value: object) -> int:
    """Return an int-like object as an int; raise `TypeError` for others and for bools."""
    if type(value).__name__ in ("bool", "bool_"):  # numpy's bool as well, which may have __index__
        raise TypeError
    return operator.index(value)  # type: ignore[arg-type]


def _integers(values: object, argument: str, low: int) -> tuple[int, ...]:
    expected = f"integers from {low} to {_INT64_MAX}, {MAX_RANK} at most"
    try:
        if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
            raise TypeError
        # Bounded: an iterable may be endless.
        numbers = tuple([index_of(value) for value in itertools.islice(values, MAX_RANK + 1)])
    except TypeError:
        got = printed(values)
        raise ArgumentTypeError("TensorDesc", argument, got=got, expected=expected) from None
    if len(numbers) > MAX_RANK or any(not low <= number <= _INT64_MAX for number in numbers):
        raise ArgumentError("TensorDesc", argument, got=numbers, expected=expected)
    return numbers


def _address(ptr: object, span_bytes: int, described: TensorDesc) -> int:
    """Return the address of an int-like object; cuda-python's CUdeviceptr has `__int__` only."""
    kind = type(ptr)
    try:
        # Only for cuda-python's types: a float has __int__ too, and would lose its fraction.
        if kind.__module__.partition(".")[0] == "cuda" and hasattr(kind, "__int__"):
            address: int = int(ptr)  # type: ignore[call-overload]
        else:
            address = index_of(ptr)
    except TypeError:
        got, expected = with_type(ptr), "an int address"
        if ptr is None:
            expected += ": an allocation failed? `fi-ffi doctor` tells of GPUs"
        raise ArgumentTypeError("TensorDesc", "ptr", got=got, expected=expected) from None
    if not 0 <= address <= 2**64 - 1 - span_bytes:
        expected = f"an address with room for {described.layout}"
        raise ArgumentError("TensorDesc", "ptr", got=hex(address), expected=expected)
    return address
