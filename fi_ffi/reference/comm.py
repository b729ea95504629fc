"""All-reduce across ranks as in FlashInfer's `vllm_comm`, in host memory.

A rank's memory begins with counters (`meta_size()` bytes, zeroed), followed by room for partial
sums of the largest message. As in `include/flashinfer/comm/vllm_custom_all_reduce.cuh`, sums are
float32 and rounded once, and every rank gets the same bits. Small messages are added in the order
of the ranks. Of larger messages each rank adds up one part, starting with its own addend.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from fi_ffi.abi.function import array_values, make_array
from fi_ffi.abi.objects import Array as ArrayObject
from fi_ffi.reference.arrays import Array
from fi_ffi.reference.comm_fusion import added
from fi_ffi.reference.peers import address_of, at, fence, wait

_BLOCKS, _RANKS = 36, 8
META_SIZE = 3 * _BLOCKS * _RANKS * 4
_ROW = 8 * _RANKS  # bytes of rank_data for a registered buffer
_VECTOR = 16
# The least bytes of a message that is reduced in two stages, by the largest number of ranks.
_TWO_STAGES = {4: 512 << 10, 8: 256 << 10}
_DTYPES = ("float32", "float16", "bfloat16")


class _CustomAllReduce:
    """A rank of a group: the addresses of the ranks' counters, and the buffers it has
    registered."""

    def __init__(self, signals: Sequence[int], rank_data: Array, rank: int) -> None:
        self.signals, self.rank, self.size = signals, rank, len(signals)
        self.table = address_of(rank_data)
        self.room, self.used = rank_data.size // _ROW, 0
        self.buffers: dict[int, int] = {}

    def register(self, pointers: Sequence[int]) -> None:
        if self.used >= self.room:
            raise RuntimeError("Rank data buffer is overflowed by 1")
        row = self.table + self.used * _ROW
        at(row, np.int64, len(pointers))[:] = pointers
        self.buffers[pointers[self.rank]] = row
        self.used += 1

    def barrier(self, call: str) -> None:
        """Increment the counter, signal each peer, and wait for the signals of all peers."""
        counts = at(self.signals[self.rank], np.uint32, 3, _BLOCKS, _RANKS)
        value = (int(counts[0, 0, 0]) + 1) % 2**32
        counts[0, 0, : self.size] = value
        turn = 1 + value % 2
        fence()
        for signal in self.signals:
            at(signal, np.uint32, 3, _BLOCKS, _RANKS)[turn, 0, self.rank] = value
        mine = counts[turn, 0, : self.size]
        wait(call, self.rank, lambda: np.flatnonzero(mine != value).tolist())

    def parts(self, count: int) -> list[slice]:
        """Return the part of a message that each rank adds in two stages; the last rank takes the
        remainder."""
        part = count // self.size
        ends = [*(i * part for i in range(self.size)), count]
        return [slice(*pair) for pair in itertools.pairwise(ends)]


_ranks: dict[int, _CustomAllReduce] = {}
_handles = itertools.count(1)


def _of(handle: int) -> _CustomAllReduce:
    if handle not in _ranks:
        raise ValueError(f"{handle} is none of init_custom_ar's, or was disposed of")
    return _ranks[handle]


def init_custom_ar(ipc_ptrs: ArrayObject, rank_data: Array, rank: int, full_nvlink: bool) -> int:
    signals = array_values(ipc_ptrs)
    if len(signals) > _RANKS:
        raise ValueError(f"world size > {_RANKS} is not supported")
    if len(signals) % 2 or not signals:
        raise ValueError("Odd num gpus is not supported for now")
    if not 0 <= rank < len(signals):
        raise ValueError("invalid rank passed in")
    if len(signals) > 2 and not full_nvlink:
        raise ValueError("without full_nvlink, nothing is launched for more than two ranks")
    handle = next(_handles)
    _ranks[handle] = _CustomAllReduce(signals, rank_data, rank)
    return handle


def all_reduce(
    handle: int, inp: Array, out: Array, reg_buffer: int, reg_buffer_sz_bytes: int, num_ctas: int
) -> None:
    own, call = _of(handle), "all_reduce"
    if inp.dtype != out.dtype or inp.size != out.size or out.dtype.name not in _DTYPES:
        raise ValueError(f"all_reduce of {inp.size} {inp.dtype} to {out.size} {out.dtype}")
    if inp.nbytes % _VECTOR or not 0 < num_ctas <= _BLOCKS:
        raise ValueError(f"{inp.nbytes} bytes, {num_ctas} blocks of at most {_BLOCKS}")
    if not inp.size:
        return
    if reg_buffer:
        if inp.nbytes > reg_buffer_sz_bytes:
            raise ValueError(f"{inp.nbytes} bytes in a buffer of {reg_buffer_sz_bytes}")
        at(reg_buffer, inp.dtype, *inp.shape)[...] = inp
    buffer = reg_buffer or address_of(inp)
    if buffer not in own.buffers:
        raise RuntimeError(f"buffer address {buffer} is not registered!")
    pointers = at(own.buffers[buffer], np.int64, own.size).tolist()
    addends = [at(pointer, inp.dtype, inp.size) for pointer in pointers]
    own.barrier(call)
    if own.size == 2 or inp.nbytes < _TWO_STAGES[4 if own.size <= 4 else 8]:
        result = added(addends, in_float32=True)
        own.barrier(call)  # before any rank overwrites what others still read
        out[...] = result.reshape(out.shape)
        return
    # Parts are whole vectors.
    width = _VECTOR // inp.itemsize
    parts = [slice(part.start * width, part.stop * width) for part in own.parts(inp.size // width)]
    mine = parts[own.rank]
    order = [(own.rank + i) % own.size for i in range(own.size)]
    at(own.signals[own.rank] + META_SIZE, inp.dtype, mine.stop - mine.start)[:] = added(
        [addends[rank][mine] for rank in order], in_float32=True
    )
    own.barrier(call)
    result = np.concatenate(
        [
            at(signal + META_SIZE, inp.dtype, part.stop - part.start)
            for signal, part in zip(own.signals, parts, strict=True)
        ]
    )
    out[...] = result.reshape(out.shape)


def meta_size() -> int:
    return META_SIZE


def dispose(handle: int) -> None:
    _of(handle)
    del _ranks[handle]


def register_buffer(handle: int, ipc_ptrs: ArrayObject) -> None:
    own, pointers = _of(handle), array_values(ipc_ptrs)
    if len(pointers) != own.size:
        raise ValueError(f"{len(pointers)} pointers of {own.size} ranks")
    own.register(pointers)


def get_graph_buffer_ipc_meta(handle: int) -> ArrayObject:
    """Return nothing: no graph is captured on the CPU."""
    _of(handle)
    return make_array((make_array(()), make_array(())))


def register_graph_buffers(handle: int, handles: ArrayObject, offsets: ArrayObject) -> None:
    own = _of(handle)
    for each in (handles, offsets):
        if len(array_values(each)) != own.size:
            raise ValueError(f"of {own.size} ranks: a list each")


KERNELS: dict[str, dict[str, Any]] = {
    "vllm_comm": {
        function.__name__: function
        for function in (
            init_custom_ar,
            all_reduce,
            meta_size,
            dispose,
            register_buffer,
            get_graph_buffer_ipc_meta,
            register_graph_buffers,
        )
    },
}
