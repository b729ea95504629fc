"""Memory of every rank that all ranks can write to, and its addresses in this process.

On GPUs, ranks of one process take memory of a pool to which exactly their GPUs have access: peer
access of whole devices would map all memory of the process, code included, so that a kernel is not
loaded before the peers' kernels end, which wait for this rank. Ranks of several processes take
`cudaMalloc` and CUDA IPC, which exports no memory of pools. No multicast object is ever created. On
the CPU it is plain memory. If ranks are processes it is an in-memory file, which peers open by its
descriptor and which needs no clean-up.
"""

from __future__ import annotations

import functools
import mmap
import os
import pickle
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from fi_ffi.abi import library
from fi_ffi.abi._cffi import ffi
from fi_ffi.abi.streams import PER_THREAD
from fi_ffi.abi.tensor import Device, TensorDesc
from fi_ffi.comm.presence import Place, Process, this_machine, this_process
from fi_ffi.comm.ranks import Ranks
from fi_ffi.errors import FiFfiError, LoaderError
from fi_ffi.loader import machine
from fi_ffi.ops.call import cuda

_ROUND = 2 << 20  # CUDA shares memory between processes in whole blocks of this size
_WITHIN_DEVICE = 3  # cudaMemcpyDeviceToDevice
_LAZY_PEER_ACCESS = 1  # cudaIpcMemLazyEnablePeerAccess
_ALREADY_ENABLED = 704  # cudaErrorPeerAccessAlreadyEnabled
_ACCESS_SUPPORTED = 2  # cudaDevP2PAttrAccessSupported
_NATIVE_ATOMICS = 3  # cudaDevP2PAttrNativeAtomicSupported
_BUS_ID_CHARS = 32
_PINNED, _ON_DEVICE = 1, 1  # cudaMemAllocationTypePinned, cudaMemLocationTypeDevice
_READ_WRITE = 3  # cudaMemAccessFlagsProtReadWrite


def place_of(device: Device) -> Place:
    """Return this rank's place."""
    bus_id = ""
    if device.is_cuda:
        text = ffi.new("char[]", _BUS_ID_CHARS)
        code = machine.load_cudart()[0].cudaDeviceGetPCIBusId(text, _BUS_ID_CHARS, device.index)
        cuda.check(code, "cudaDeviceGetPCIBusId")
        bus_id = ffi.string(text).decode()
    return Place(this_machine(), this_process(), bus_id)


def _index_of(place: Place) -> int | None:
    """Return this process's index of another rank's GPU; None if the GPU is not visible."""
    runtime, index = machine.load_cudart()[0], ffi.new("int *")
    code = runtime.cudaDeviceGetByPCIBusId(index, ffi.new("char[]", place.bus_id.encode()))
    cuda.forget(code, "cudaDeviceGetByPCIBusId")
    return None if code else int(index[0])


def peer_topology(places: Sequence[Place]) -> tuple[bool, bool]:
    """Return whether all GPUs reach each other's memory, and whether all are linked by NVLink.

    A GPU has native atomics on the other's memory over NVLink, and not over PCIe. A pair that is
    not visible counts as reachable and not linked.
    """
    indices = [_index_of(place) for place in places]
    reach = linked = True
    for mine in indices:
        for other in indices:
            if mine is None or other is None:  # the process sees only one of them
                linked = False
            elif mine != other:
                reach = reach and _attribute(_ACCESS_SUPPORTED, mine, other)
                linked = linked and _attribute(_NATIVE_ATOMICS, mine, other)
    return reach, reach and linked


def _attribute(attribute: int, mine: int, other: int) -> bool:
    runtime, value = machine.load_cudart()[0], ffi.new("int *")
    code = runtime.cudaDeviceGetP2PAttribute(value, attribute, mine, other)
    cuda.check(code, "cudaDeviceGetP2PAttribute")
    return bool(value[0])


class _Piece:
    """A rank's own memory and its number of users in this process; freed when that is 0."""

    def __init__(self, memory: Any, free: Callable[[], None] = lambda: None) -> None:
        self.memory, self.free, self.users = memory, free, 1


# Pieces of this process by address. A piece that is not closed is never freed: a peer may write to
# it.
_pieces: dict[int, _Piece] = {}
_lock = threading.Lock()
library.renew_after_fork(globals(), "_lock", threading.Lock)


def _release(address: int) -> None:
    with _lock:
        piece = _pieces[address]
        piece.users -= 1
        if piece.users:
            return
        del _pieces[address]
    piece.free()


class PeerMemory:
    """`count` zeroed bytes on each rank; `addresses` lists where they are in this process."""

    def __init__(self, ranks: Ranks, places: Sequence[Place], count: int, device: Device) -> None:
        self._ranks, self._device = ranks, device
        self._is_same_process = all(place[:2] == places[ranks.rank][:2] for place in places)
        self._opened: list[Callable[[], None]] = []
        address, handle = _make(count, device, self._is_same_process, places)
        try:
            handles = [
                pickle.loads(data) for data in ranks.all_gather(pickle.dumps((address, handle)))
            ]
            self.addresses = [address] * ranks.size
            failed: FiFfiError | None = None
            try:
                for rank, (place, peer) in enumerate(zip(places, handles, strict=True)):
                    if rank != ranks.rank:
                        self.addresses[rank] = self._open(place, peer, count)
            except FiFfiError as error:  # perhaps a peer has given up and freed its memory
                failed = error
            # No rank may free before all have opened.
            told = [data.decode() for data in ranks.all_gather(str(failed or "").encode())]
            if failed:
                raise failed
            for rank, why in enumerate(told):
                if why:
                    raise LoaderError(f"rank {rank} cannot open the others' memory: {why}")
        except BaseException:
            for close in self._opened:
                close()
            _release(address)
            raise
        self._own = address

    def _open(self, place: Place, peer: tuple[int, Any], count: int) -> int:
        """Open a peer's memory and keep its closing function."""
        address, handle = peer
        if place[:2] == (this_machine(), this_process()):
            if self._device.is_cuda and not self._is_same_process:
                self._enable(place)
            with _lock:
                if address not in _pieces:
                    raise LoaderError(f"a rank's memory, {address:#x}, is no longer there")
                _pieces[address].users += 1
            self._opened.append(functools.partial(_release, address))
            return address
        if not self._device.is_cuda:
            view, mapped = _map(place.process, handle, count)
            self._opened.append(functools.partial(_unmap, view, mapped))
            return int(ffi.cast("uintptr_t", view))
        runtime, slot = machine.load_cudart()[0], ffi.new("void **")
        shared = ffi.new("cudaIpcMemHandle_t *", {"reserved": handle})
        with cuda.current(self._device), cuda.relaxed():
            code = runtime.cudaIpcOpenMemHandle(slot, shared[0], _LAZY_PEER_ACCESS)
            cuda.check(code, f"cudaIpcOpenMemHandle of {place.bus_id}'s on {self._device}")
        self._opened.append(functools.partial(self._close_handle, slot[0]))
        return int(ffi.cast("uintptr_t", slot[0]))

    def _enable(self, place: Place) -> None:
        peer = _index_of(place)
        if peer is None or peer == self._device.index:
            return
        with cuda.current(self._device), cuda.relaxed():
            code = machine.load_cudart()[0].cudaDeviceEnablePeerAccess(peer, 0)
        cuda.forget(code, "cudaDeviceEnablePeerAccess")
        if code not in (0, _ALREADY_ENABLED):
            cuda.check(code, f"cudaDeviceEnablePeerAccess of cuda:{peer} on {self._device}")

    def _close_handle(self, pointer: Any) -> None:
        with cuda.current(self._device):
            close = machine.load_cudart()[0].cudaIpcCloseMemHandle
            cuda.at_end_of(self, functools.partial(close, pointer))()

    def close(self, is_broken: bool = False) -> None:
        """Close the peers' memory, wait for the peers, and free this rank's memory.

        If the group is broken, do not wait, since some ranks may not come. GPU memory that other
        processes have open then stays allocated, because they may still write to it.
        """
        for close in self._opened:
            close()
        self._opened = []
        if not self._is_same_process:
            if is_broken and self._device.is_cuda:
                return
            if not is_broken:
                self._ranks.barrier()
        _release(self._own)


def _make(
    count: int, device: Device, is_same_process: bool, places: Sequence[Place]
) -> tuple[int, Any]:
    """Allocate this rank's memory; return it with the handle that another process opens it by."""
    if not device.is_cuda and not is_same_process:
        handle = make_file("fi_ffi.comm.peers", count)
        view, mapped = _map(this_process(), handle, count)

        def free() -> None:
            _unmap(view, mapped)
            os.close(handle.descriptor)

        return _keep(int(ffi.cast("uintptr_t", view)), _Piece(None, free)), handle
    size = -(-count // _ROUND) * _ROUND if device.is_cuda else count
    peers = {_index_of(place) for place in places} if device.is_cuda and is_same_process else set()
    others = sorted(peer for peer in peers if peer is not None and peer != device.index)
    if others:
        memory = _allocate_for(others, size, device)
    else:
        memory = cuda.allocate(size, device, zeroed=True)
    address = _keep(memory.desc.ptr, _Piece(memory))
    if not device.is_cuda or is_same_process:
        return address, None
    shared = ffi.new("cudaIpcMemHandle_t *")
    with cuda.current(device), cuda.relaxed():
        code = machine.load_cudart()[0].cudaIpcGetMemHandle(shared, cuda.pointer(address))
    if code:
        _release(address)
        cuda.check(code, "cudaIpcGetMemHandle")
    return address, bytes(ffi.buffer(shared))


def _allocate_for(peers: Sequence[int], count: int, device: Device) -> cuda.Memory:
    """Allocate zeroed memory to which these GPUs have access as well."""
    runtime, pool, slot = machine.load_cudart()[0], ffi.new("void **"), ffi.new("void **")
    here = {"type": _ON_DEVICE, "id": device.index}
    props = ffi.new("cudaMemPoolProps *", {"allocType": _PINNED, "location": here})
    access = ffi.new(
        "cudaMemAccessDesc[]",
        [{"location": {"type": _ON_DEVICE, "id": peer}, "flags": _READ_WRITE} for peer in peers],
    )
    stream = cuda.pointer(PER_THREAD)

    def given_back() -> list[functools.partial[int]]:
        ends = (runtime.cudaFree, slot), (runtime.cudaMemPoolDestroy, pool)
        return [functools.partial(end, at[0]) for end, at in ends if at[0] != ffi.NULL]

    with cuda.current(device), cuda.relaxed():
        cuda.check(runtime.cudaMemPoolCreate(pool, props), f"cudaMemPoolCreate on {device}")
        try:
            code = runtime.cudaMemPoolSetAccess(pool[0], access, len(peers))
            cuda.check(code, f"cudaMemPoolSetAccess of GPUs {peers} on {device}")
            code = runtime.cudaMallocFromPoolAsync(slot, count, pool[0], stream)
            cuda.check(code, f"cudaMallocFromPoolAsync of {count} bytes on {device}")
            cuda.check(runtime.cudaMemsetAsync(slot[0], 0, count, stream), "cudaMemsetAsync")
            cuda.check(runtime.cudaStreamSynchronize(stream), "cudaStreamSynchronize")
        except BaseException:
            cuda.at_end_of(pool, *given_back())()
            raise
    desc = TensorDesc(int(ffi.cast("uintptr_t", slot[0])), (count,), "uint8", device=device)
    return cuda.Memory(desc, *given_back())


def _keep(address: int, piece: _Piece) -> int:
    with _lock:
        _pieces[address] = piece
    return address


class File(NamedTuple):
    """An in-memory file of a process, which other processes of its user can open."""

    descriptor: int
    inode: int  # tells it from a later file with the same descriptor


def make_file(name: str, count: int) -> File:
    """Make an in-memory file of zeros."""
    descriptor = os.memfd_create(name, os.MFD_CLOEXEC)
    os.ftruncate(descriptor, max(count, 1))
    return File(descriptor, os.fstat(descriptor).st_ino)


def map_file(process: Process, file: File, count: int) -> mmap.mmap:
    """Map a process's in-memory file; `LoaderError` if it cannot be opened."""
    path = f"/proc/{process.pid}/fd/{file.descriptor}"
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise LoaderError(f"a rank's memory, {path}, cannot be opened: {error}") from error
    try:
        if os.fstat(descriptor).st_ino != file.inode:
            raise LoaderError(f"a rank's memory, {path}, is no longer there")
        return mmap.mmap(descriptor, max(count, 1))
    finally:
        os.close(descriptor)


def _map(process: Process, file: File, count: int) -> tuple[Any, mmap.mmap]:
    """Map an in-memory file; return the view that keeps it mapped, and the map."""
    mapped = map_file(process, file, count)
    return ffi.from_buffer(mapped), mapped


def _unmap(view: Any, mapped: mmap.mmap) -> None:
    ffi.release(view)
    mapped.close()


def copy(target: int, source: int, count: int, device: Device, stream: int) -> None:
    """Queue a copy within a device's memory; on the CPU, copy at once."""
    to, of = cuda.pointer(target), cuda.pointer(source)
    if not device.is_cuda:
        ffi.memmove(to, of, count)
        return
    runtime = machine.load_cudart()[0]
    code = runtime.cudaMemcpyAsync(to, of, count, _WITHIN_DEVICE, cuda.pointer(stream))
    cuda.check(code, "cudaMemcpyAsync")
