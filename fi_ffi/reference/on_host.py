"""Collectives of ranks on the CPU, over memory that all ranks see, in place of NCCL."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fi_ffi.abi.tensor import TensorDesc
from fi_ffi.reference.arrays import Array, as_array
from fi_ffi.reference.peers import at, fence, wait

HEADER = 64  # bytes before the data, with the number of exchanges that a rank has begun


class HostCollectives:
    """A rank. Each of `addresses` has `HEADER` bytes, zeroed, followed by `room` bytes.

    Raises `TimeoutError` as `fi_ffi.reference.peers.wait` does.
    """

    def __init__(self, rank: int, addresses: Sequence[int], room: int) -> None:
        self._rank, self._room = rank, room
        self._data = [address + HEADER for address in addresses]
        self._counts = [at(address, np.uint64, 1) for address in addresses]
        self._call = ""

    def _barrier(self) -> None:
        count = self._counts[self._rank][0] + np.uint64(1)
        fence()
        self._counts[self._rank][0] = count

        def behind() -> list[int]:
            return [rank for rank, other in enumerate(self._counts) if other[0] < count]

        wait(self._call, self._rank, behind)

    def all_gather(self, x: TensorDesc, out: TensorDesc, stream: int = 0) -> None:
        self._call = "all_gather"
        source = as_array(x).reshape(-1)
        gathered = as_array(out).reshape(len(self._data), -1)
        for part in self._parts(source):
            for rank, array in enumerate(self._exchanged(source[part])):
                gathered[rank, part] = array
            self._barrier()  # before any rank overwrites what others still read

    def reduce_scatter(self, x: TensorDesc, out: TensorDesc, stream: int = 0) -> None:
        self._call = "reduce_scatter"
        addends = as_array(x).reshape(len(self._data), -1)
        result = as_array(out).reshape(-1)
        for rank in range(len(addends)):
            for part in self._parts(addends[rank]):
                total = self._sum(addends[rank][part])
                if rank == self._rank:
                    result[part] = total
                self._barrier()

    def all_reduce(self, x: TensorDesc, out: TensorDesc, stream: int = 0) -> None:
        self._call = "all_reduce"
        addend, result = as_array(x).reshape(-1), as_array(out).reshape(-1)
        for part in self._parts(addend):
            total = self._sum(addend[part])
            self._barrier()
            result[part] = total

    def _sum(self, mine: Array) -> Array:
        total: Array = np.sum([a.astype(np.float64) for a in self._exchanged(mine)], axis=0)
        return total.astype(mine.dtype)

    def _parts(self, addend: Array) -> list[slice]:
        step = max(self._room // addend.itemsize, 1)
        return [slice(at, min(at + step, len(addend))) for at in range(0, len(addend), step)]

    def _exchanged(self, mine: Array) -> list[Array]:
        at(self._data[self._rank], mine.dtype, len(mine))[:] = mine
        self._barrier()
        return [at(address, mine.dtype, len(mine)) for address in self._data]
