"""Memory that a call is given or must not share: a stream's own scratch, and overlaps."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence

from fi_ffi.abi import forks
from fi_ffi.abi.device import Device
from fi_ffi.abi.dtypes import DTYPES
from fi_ffi.abi.streams import launching
from fi_ffi.abi.tensor import TensorDesc, make_desc, make_layout
from fi_ffi.errors import ArgumentError
from fi_ffi.loader import machine
from fi_ffi.ops import cuda
from fi_ffi.ops.launch import Preparing
from fi_ffi.ops.row import Row, Tensor

_lock = threading.Lock()
forks.renew(globals(), "_lock", threading.Lock)
# By op, argument, device and stream.  Kept for the life of the process: a kernel may still use one
# when its stream's handle is given to another stream.
_scratch: dict[tuple[str, str, Device, int], cuda.Memory] = {}
# What streams have outgrown, twice as large each time: graphs may still use it.
_outgrown: list[cuda.Memory] = []


def scratch_bytes(arg: Tensor, device: Device, sizes: Mapping[str, int] | None = None) -> int:
    """What a scratch argument needs on a device, for tensors of these sizes."""
    count = machine.multiprocessors(device.index) if device.is_cuda else 1
    demanded: int = arg.bytes_for(sizes or {}) if arg.bytes_for else 0
    return arg.bytes + arg.bytes_per_multiprocessor * count + demanded


def scratch_for(
    row: Row, arg: Tensor, device: Device, given: TensorDesc | None, stream: object,
    sizes: Mapping[str, int],
) -> TensorDesc:  # fmt: skip
    """What the caller gave, if it is enough, or the stream's own."""
    if device.type not in ("cpu", "cuda"):  # which the row's checks refuse
        return given or TensorDesc(0, (0,), "uint8", device=device)
    is_prepared = type(stream) is Preparing
    # Before the machine is asked anything: a missing stream is told first.
    handle = 0
    if device.is_cuda and not is_prepared:
        handle = launching(stream, device, row.name).handle
    need = scratch_bytes(arg, device, sizes)
    if given is not None:
        # Of what is refused for its rank or dtype, the size says nothing.
        fits = len(given.shape) == 1 and given.dtype.name == arg.dtype
        have = given.shape[0] * given.dtype.itemsize if fits else need
        if have < need:
            expected = f"{need} bytes or more"
            raise ArgumentError(row.name, arg.name, got=f"{have} bytes", expected=expected)
        return given
    if is_prepared:  # for any stream: it gets its own
        memory = cuda.allocate(need, device, arg.zeroed)
        return _typed(arg, memory, memory)
    key = (row.name, arg.name, device, handle)
    with _lock:
        own = _scratch.get(key)
        have = 0 if own is None else own.desc.layout.numel
        if own is None or have < need:
            if device.is_cuda and cuda.is_capturing(handle):
                expected = "memory, or a call on this stream before the capture"
                raise ArgumentError(row.name, arg.name, got="none", expected=expected)
            if own is not None:
                _outgrown.append(own)
            own = _scratch[key] = cuda.allocate(max(need, 2 * have), device, arg.zeroed)
        return _typed(arg, own)


def _typed(arg: Tensor, memory: cuda.Memory, owner: object = None) -> TensorDesc:
    """Memory as the argument's dtype."""
    dtype, device = DTYPES[arg.dtype], memory.desc.device
    count = memory.desc.layout.numel // dtype.itemsize
    return make_desc(memory.desc.ptr, make_layout((count,), dtype, None, device, False), owner)


def check_apart(row: Row, descs: Sequence[TensorDesc | None]) -> bool:
    """Raise where a written tensor shares memory with another, and may not.

    Returns whether any is the very memory of one that is read.
    """
    is_in_place = False
    earlier: list[tuple[Tensor, TensorDesc, int, int]] = []
    written: list[tuple[Tensor, TensorDesc, int, int]] = []
    for arg, desc in zip(row.tensors, descs, strict=True):
        if desc is None or not desc.layout.numel:
            continue
        start, end = desc.ptr, desc.ptr + desc.layout.span_bytes
        for other, before, first, last in earlier if arg.writes else written:
            if start >= last or first >= end or not _may_meet(desc, before):
                continue
            same = any({arg.name, other.name} == {*two} for two in row.in_place)
            if same and desc.ptr == before.ptr and _axes(desc) == _axes(before):
                is_in_place = True
                continue
            got = f"memory that overlaps `{other.name}` ({start:#x} to {end:#x})"
            expected = "the very same memory, or memory apart" if same else "memory apart"
            raise ArgumentError(row.name, arg.name, got=got, expected=expected)
        earlier.append((arg, desc, start, end))
        if arg.writes:
            written.append(earlier[-1])
    return is_in_place


def _axes(desc: TensorDesc) -> list[tuple[int, int]]:
    """Strides in bytes and sizes, of the axes that have more than one element."""
    itemsize = desc.dtype.itemsize
    both = zip(desc.strides, desc.shape, strict=True)
    return [(abs(stride) * itemsize, size) for stride, size in both if size > 1]


def _may_meet(one: TensorDesc, other: TensorDesc) -> bool:
    """False where two tensors share no byte, as slices of one buffer may not."""
    apart = other.ptr - one.ptr
    if apart >= one.layout.span_bytes or -apart >= other.layout.span_bytes:
        return False
    axes = [_axes(one), _axes(other)]
    for period in {stride for strides in axes for stride, _ in strides if stride}:
        # How much of each period a tensor reaches over, from where it starts.
        first, second = (
            desc.dtype.itemsize + sum((size - 1) * s for s, size in strides if s % period)
            for desc, strides in zip((one, other), axes, strict=True)
        )
        if apart % period >= first and -apart % period >= second:
            return False
    return True
