"""All-reduce by FlashInfer's `vllm_comm`: one kernel, over memory that all ranks read.

A rank's memory holds, in this order, the kernels' counters, space for partial sums, and the
registered buffer, from which peers read the addend. Source: `csrc/vllm_custom_all_reduce.cu`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from fi_ffi.abi._cffi import ffi
from fi_ffi.abi.streams import PER_THREAD
from fi_ffi.abi.tensor import Device, TensorDesc
from fi_ffi.comm import entries
from fi_ffi.errors import ArgumentError
from fi_ffi.ops.call import cuda
from fi_ffi.ops.call.notation import round_up
from fi_ffi.ops.steps.memory import copy_now
from fi_ffi.ops.table.comm import MAX_CTAS

SIZES = (2, 4, 6, 8)  # numbers of ranks that allreduce() of vllm_custom_all_reduce.cuh supports
_ALIGNMENT = 256
_BLOCKS, _RANKS = 36, 8  # kMaxBlocks, and the number of peers in a counter
_COUNTERS = _BLOCKS * _RANKS * 4  # bytes of each of the three tables in a Signal
_ROW = 8 * _RANKS  # bytes of a RankData
# Rows for captured calls; each takes one and never returns it. The rows take 1 MiB.
MAX_CAPTURED = 1 << 14


def _place(device: Device) -> str | None:
    return str(device) if device.is_cuda else None


class VllmAllReduce:
    """One rank's handle of `vllm_comm`, with its `rank_data` and its registered buffer."""

    op = "all_reduce"

    def __init__(
        self,
        rank: int,
        addresses: Sequence[int],
        max_bytes: int,
        device: Device,
        full_nvlink: bool,
    ) -> None:
        self.size, self.device, self.max_bytes = len(addresses), device, max_bytes
        self._own = addresses[rank]
        offset = self._buffer_offset(max_bytes, device)
        buffers = [address + offset for address in addresses]
        self._buffer = buffers[rank]
        rows = MAX_CAPTURED if device.is_cuda else 1
        self._rows = cuda.allocate(rows * _ROW, device)
        place = _place(device)
        self._handle: int = entries.setup("init_custom_ar")(
            list(addresses), self._rows.desc, rank, full_nvlink, stream=PER_THREAD, device=place
        )
        entries.setup("register_buffer")(self._handle, buffers, device=place)
        # A captured call's kernel reads the next row after the registered ones. Every row holds
        # `buffers`, because all calls go through them; nothing has to be exchanged after a capture.
        row = ffi.new("int64_t[]", buffers + [0] * (_RANKS - self.size))
        table = bytes(ffi.buffer(row)) * rows
        source = ffi.from_buffer(table)
        copy_now(self._rows.desc.ptr, int(ffi.cast("uintptr_t", source)), len(table), device)
        self._captured = 1  # row 0 is the registered buffer

    @staticmethod
    def _buffer_offset(max_bytes: int, device: Device) -> int:
        counters = int(entries.setup("meta_size")(device=_place(device)))
        return round_up(counters + max_bytes, _ALIGNMENT)

    @classmethod
    def nbytes(cls, max_bytes: int, device: Device) -> int:
        """Return the size in bytes of each rank's memory."""
        return cls._buffer_offset(max_bytes, device) + round_up(max_bytes, _ALIGNMENT)

    def buffer(self, shape: tuple[int, ...], dtype: str) -> TensorDesc:
        """Return the registered buffer as a tensor."""
        return TensorDesc(self._buffer, shape, dtype, device=self.device)

    def starts_with(self, desc: TensorDesc) -> bool:
        """Return whether a tensor starts where the registered buffer starts."""
        return desc.ptr == self._buffer

    def overlaps(self, desc: TensorDesc) -> bool:
        """Return whether any part of a tensor is in the registered buffer."""
        before_end = desc.ptr < self._buffer + self.max_bytes
        return before_end and desc.ptr + desc.span_bytes > self._buffer

    def all_reduce(self, x: TensorDesc, out: TensorDesc, stream: int) -> None:
        """Reduce a vector into another; both are whole multiples of 16 bytes.

        `out` must not overlap the registered buffer, which peers read meanwhile; `x` may only be at
        its start.
        """
        if self.device.is_cuda and cuda.is_capturing(stream):
            if self._captured >= MAX_CAPTURED:
                expected = f"at most {MAX_CAPTURED - 1} captured calls of a group"
                raise ArgumentError("all_reduce", "stream", got="one more", expected=expected)
            self._captured += 1
        buffer = 0 if self.starts_with(x) else self._buffer
        place = stream if self.device.is_cuda else None
        reduce = entries.OPS["all_reduce"]
        reduce(self._handle, x, out, buffer, self.max_bytes, MAX_CTAS, stream=place)

    def close(self) -> None:
        entries.setup("dispose")(self._handle, device=_place(self.device))

    # ------------------------------------------------------- what a GPU's kernels wait for

    def state(self, read: Callable[[int, int], bytes]) -> tuple[bytes, Iterable[int]]:
        """Return the state that calls change, and the ranks that a kernel waits for now.

        A waiting kernel has incremented `self_counter`, and one of the two alternating
        `peer_counter` tables does not have this count for some peer yet.
        """
        data = read(self._own, 3 * _COUNTERS)
        words = memoryview(data).cast("I")
        count = _BLOCKS * _RANKS
        own, peers = words[:count], (words[count : 2 * count], words[2 * count :])
        waiting = (i for i in range(count) if peers[own[i] % 2][i] != own[i])
        return data, {i % _RANKS for i in waiting}

    def release(
        self, read: Callable[[int, int], bytes], write: Callable[[int, bytes], None]
    ) -> None:
        """Release a waiting kernel: write the counts that the peers would have sent."""
        own = read(self._own, _COUNTERS)
        for table in (1, 2):
            write(self._own + table * _COUNTERS, own)
