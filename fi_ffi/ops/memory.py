"""Memory that a call is given or must not share: a stream's own scratch, and overlaps."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from fi_ffi.abi.device import Device
from fi_ffi.abi.streams import launching
from fi_ffi.abi.tensor import TensorDesc, make_desc
from fi_ffi.errors import ArgumentError
from fi_ffi.loader import machine
from fi_ffi.ops import cuda
from fi_ffi.ops.launch import Preparing
from fi_ffi.ops.row import Row, Tensor

_lock = threading.Lock()
# By op, device and stream.  Kept for the life of the process: a kernel may still use one
# when its stream's handle is given to another stream.
_scratch: dict[tuple[str, Device, int], cuda.Memory] = {}


def scratch_bytes(arg: Tensor, device: Device) -> int:
    """What a scratch argument needs on a device."""
    count = machine.multiprocessors(device.index) if device.is_cuda else 1
    return arg.bytes + arg.bytes_per_multiprocessor * count


def scratch_for(
    row: Row, arg: Tensor, device: Device, given: TensorDesc | None, stream: object
) -> TensorDesc:
    """What the caller gave, if it is enough, or the stream's own."""
    if device.type not in ("cpu", "cuda"):  # which the row's checks refuse
        return given or TensorDesc(0, (0,), "uint8", device=device)
    is_prepared = type(stream) is Preparing
    # Before the machine is asked anything: a missing stream is told first.
    handle = 0
    if device.is_cuda and not is_prepared:
        handle = launching(stream, device, row.name).handle
    need = scratch_bytes(arg, device)
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
        return make_desc(memory.desc.ptr, memory.desc.layout, memory)
    key = (row.name, device, handle)
    with _lock:
        if key not in _scratch:
            if device.is_cuda and cuda.is_capturing(handle):
                expected = "memory, or a call on this stream before the capture"
                raise ArgumentError(row.name, arg.name, got="none", expected=expected)
            _scratch[key] = cuda.allocate(need, device, arg.zeroed)
        return _scratch[key].desc


def check_apart(row: Row, descs: Sequence[TensorDesc | None]) -> None:
    """Raise where a written tensor shares memory with another, and may not."""
    named = [
        (arg, desc.ptr, desc.ptr + desc.layout.span_bytes)
        for arg, desc in zip(row.tensors, descs, strict=True)
        if desc is not None and desc.layout.numel
    ]
    for i, (arg, start, end) in enumerate(named):
        for other, first, last in named[:i]:
            if start >= last or first >= end or not (arg.writes or other.writes):
                continue
            pair = {arg.name, other.name}
            if start == first and end == last and any(pair == {*two} for two in row.in_place):
                continue
            got = f"memory that overlaps `{other.name}` ({start:#x} to {end:#x})"
            same = any(pair == {*two} for two in row.in_place)
            expected = "the very same memory, or memory apart" if same else "memory apart"
            raise ArgumentError(row.name, arg.name, got=got, expected=expected)
