"""Memory for tensors that kernels allocate themselves.

A kernel asks libtvm_ffi for a tensor (`TVMFFIEnvTensorAlloc`). libtvm_ffi asks the allocator set on
the calling thread, or else the one set for the process. fi_ffi sets its allocator on the thread,
around a call that needs one, and never for the process: calls of other libraries keep their own
allocator.
"""

from __future__ import annotations

import atexit
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any, NamedTuple

from fi_ffi.abi import library
from fi_ffi.abi._cffi import ffi
from fi_ffi.abi.dlpack import dims_of
from fi_ffi.abi.failure import (
    check,
    is_foreign,
    message_of,
    set_escaped,
    set_raised,
    signal_again,
)
from fi_ffi.abi.tensor import Device, c_strides, device_from_code

_DLPACK_MAJOR = 1
_HEADER = ffi.sizeof("DLManagedTensorVersioned")
_WORD = ffi.sizeof("int64_t")
_ALIGNMENT = 256  # Also satisfies the alignment of device memory.


class MemoryPool(NamedTuple):
    """Allocation and deallocation on one type of device; both are ordered after a stream's work."""

    take: Callable[[int, Device, int], int]  # (bytes, device, stream) -> address
    give_back: Callable[[int, Device, int], None]  # (address, device, stream)


def _take_host(count: int, device: Device | None = None, stream: int = 0) -> int:
    return library.address_of(library.aligned(count, _ALIGNMENT))


def _free_host(address: int, device: Device | None = None, stream: int = 0) -> None:
    library.c_library.free(ffi.cast("void *", address))


HOST = MemoryPool(_take_host, _free_host)


class Allocator:
    """Allocates tensors for kernels, by device type.

    Allocation and deallocation are ordered on the stream that is current for the thread and device
    at the time of allocation. That stream must not be destroyed before the tensor is released.
    """

    def __init__(self, sources: Mapping[str, MemoryPool]) -> None:
        self._sources = dict(sources)
        # Deallocators, keyed by the address of the structure handed to libtvm_ffi. A single dict
        # operation needs no lock, and a deleter must not wait for one: it may run on any thread.
        self._blocks: dict[int, Callable[[], None]] = {}
        self._is_closed = False
        self._callback = ffi.callback(
            "DLPackManagedTensorAllocator", self._allocate, error=-1, onerror=set_escaped
        )
        self._deleter = ffi.callback(
            "void(DLManagedTensorVersioned *)", self._delete, onerror=self._delete_again
        )
        _ALLOCATORS.append(self)

    @property
    def count(self) -> int:
        """Number of allocated tensors that are not freed yet."""
        return len(self._blocks)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Allocate for kernels called on this thread inside the block."""
        before = ffi.new("DLPackManagedTensorAllocator *")
        swap = library.lib.TVMFFIEnvSetDLPackManagedTensorAllocator
        check(swap(self._callback, 0, before), "allocator")
        try:
            yield
        finally:
            check(swap(before[0], 0, ffi.NULL), "allocator")

    def close(self) -> None:
        """Detach all live tensors from Python: their memory is never freed."""
        self._is_closed = True
        for address in list(self._blocks):
            ffi.cast("DLManagedTensorVersioned *", address).deleter = ffi.NULL

    def _allocate(self, prototype: Any, out: Any, error_context: Any, set_error: Any) -> int:
        try:
            out[0] = self._make(prototype)
        except BaseException as error:  # no exception may reach the calling C++
            words = (type(error).__name__, message_of(error))
            kind, message = (ffi.new("char[]", word.encode(errors="replace")) for word in words)
            set_error(error_context, kind, message)
            if is_foreign(error):
                set_raised(error)
            return -1
        return 0

    def _make(self, prototype: Any) -> Any:
        if self._is_closed:
            raise RuntimeError("no tensor is allocated while the interpreter exits")
        code = prototype.device.device_type
        device = device_from_code(code, prototype.device.device_id)
        source = self._sources.get(device.type) if device is not None else None
        if device is None or source is None:
            raise ValueError(f"no tensor is allocated on {device or f'device type {code}'}")
        shape, _ = dims_of(prototype)
        if min(shape, default=0) < 0:
            raise ValueError(f"a tensor of shape {shape} was asked for")
        # Round up: packed sub-byte elements may end within a byte.
        count = (math.prod(shape) * prototype.dtype.bits * prototype.dtype.lanes + 7) // 8
        handle = library.address_of(library.lib.TVMFFIEnvGetStream(code, device.index))
        header = _take_host(_HEADER + 2 * _WORD * len(shape))
        try:
            address = source.take(count, device, handle)
        except BaseException:
            _free_host(header)
            raise
        self._blocks[header] = functools.partial(source.give_back, address, device, handle)
        managed = ffi.cast("DLManagedTensorVersioned *", header)
        managed.version.major, managed.version.minor = _DLPACK_MAJOR, 0
        managed.manager_ctx, managed.flags, managed.deleter = ffi.NULL, 0, self._deleter
        managed.dl_tensor, tensor, rank = prototype[0], managed.dl_tensor, len(shape)
        tensor.data, tensor.byte_offset = ffi.cast("void *", address), 0
        tensor.shape = ffi.cast("int64_t *", header + _HEADER)
        tensor.strides = tensor.shape + rank
        tensor.shape[0:rank], tensor.strides[0:rank] = shape, c_strides(shape)
        return managed

    def _delete(self, managed: Any) -> None:
        header = library.address_of(managed)
        give_back = self._blocks.pop(header, None)
        if give_back is not None:
            _free_host(header)
            give_back()

    def _delete_again(
        self, kind: type[BaseException], error: BaseException, frames: TracebackType
    ) -> None:
        """Delete what an interrupted `_delete` has left, and raise the signal once more. Another
        error goes to sys.unraisablehook, as from a `__del__`."""
        again = signal_again(BaseException.with_traceback(error, frames))
        if again is None:

            def fail(_: Any) -> None:
                raise error

            ffi.release(ffi.gc(ffi.cast("void *", 1), fail))
            return
        self._delete(frames.tb_frame.f_locals["managed"])


# Kept for the life of the process: tensors point to the allocators' deleters.
_ALLOCATORS: list[Allocator] = []


@atexit.register
def _close_all() -> None:
    """Close every allocator, since libtvm_ffi may release tensors after the interpreter ended."""
    for allocator in _ALLOCATORS:
        allocator.close()
