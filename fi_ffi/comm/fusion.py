"""All-reduce fused with residual addition, RMS norm and quantisation: FlashInfer's `trtllm_comm`.

A rank's memory holds, in this order, a buffer for two-shot calls (addends, then sums), barrier
flags (zeros), and three Lamport buffers filled with -0, which are used in turn. In a one-shot call
a rank writes its addends into every rank's Lamport buffer and waits until its own holds no -0.
`workspace_ptrs`, on the device, lists the addresses of the three areas for every rank, and then the
address of five numbers of this rank. Source: `csrc/trtllm_allreduce_fusion.cu`.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from fi_ffi.abi._cffi import ffi
from fi_ffi.abi.streams import PER_THREAD
from fi_ffi.abi.tensor import DTYPES, Device, TensorDesc, parse_dtype
from fi_ffi.comm import entries as entries
from fi_ffi.errors import ArgumentError, ArgumentTypeError
from fi_ffi.ops.call import cuda
from fi_ffi.ops.call.arguments import check_int
from fi_ffi.ops.call.notation import round_up
from fi_ffi.ops.steps.memory import copy_now
from fi_ffi.ops.table.comm import PATTERNS

# numbers of ranks that allreduce_fusion_op() of trtllm_allreduce_fusion.cuh supports
SIZES = (2, 4, 8, 16)
RANKS = f"{', '.join(map(str, SIZES[:-1]))} or {SIZES[-1]} ranks that reach each other's memory"
_ALIGNMENT = 256
_SLOTS = 256  # kBarrierFlagCount
_VECTOR = 16
# Limit of a Lamport buffer: the kernels count the bytes of two buffers in 32 bits (`clear_offset *
# comm_size`), which FlashInfer's MAX_COMM_SIZE (flashinfer/comm/trtllm_ar.py) overflows.
_MAX_LAMPORT = 2**30 - 2**21
# Largest one-shot message by ranks, from _use_oneshot_heuristics in that file, tuned on a B200.
_MAX_ONESHOT = {2: 128 << 20, 4: 8 << 20, 8: 42 << 16, 16: 1 << 20}
_THREADS = 512  # most threads that share a token of a long all-reduce message
_COUNTER, _FLAG, _TURN, _STRIDE = range(4)  # indices of the five numbers
_DTYPES = ("float16", "bfloat16", "float32")
_RELEASED = b"\xff"  # flag byte that no barrier uses
_CHUNK = 4 << 20


class AllReduceFusionPattern(enum.IntEnum):
    """The operations after the sum, by FlashInfer's names and numbers; releases differ."""

    kAllReduce = 0
    kARResidualRMSNorm = 1
    kARResidualRMSNormFP8Quant = 2
    kARResidualRMSNormFP4Quant = 3
    kARResidualRMSNormOutFP8Quant = 4
    kARResidualRMSNormOutFP4Quant = 5
    kARResidualRMSNormPerTokenGroupFP8PackedQuant = 8
    kARResidualRMSNormOutPerTokenGroupFP8PackedQuant = 9
    kARResidualRMSNormDynamicFP8Quant = 10
    kARResidualRMSNormOutDynamicFP8Quant = 11


class FusionSize(NamedTuple):
    """The largest message of `allreduce_fusion`: `max_tokens` rows of `hidden_size` elements.

    Tensors of another shape fit if they have no more bytes.  float16 and bfloat16 share a
    workspace; float32 has one of its own.
    """

    max_tokens: int
    hidden_size: int
    dtype: object = "bfloat16"

    @property
    def itemsize(self) -> int:
        return parse_dtype(self.dtype).itemsize

    @property
    def message_bytes(self) -> int:
        return self.max_tokens * self.hidden_size * self.itemsize

    def checked(self) -> FusionSize:
        """Return a copy with plain values. Raises `ArgumentError` and `ArgumentTypeError`."""
        tokens, hidden = (
            check_int("FusionSize", name, value, 1)
            for name, value in (("max_tokens", self.max_tokens), ("hidden_size", self.hidden_size))
        )
        dtype = parse_dtype(self.dtype, op="FusionSize").name
        if dtype not in _DTYPES:
            raise ArgumentError("FusionSize", "dtype", got=dtype, expected=", ".join(_DTYPES))
        size = FusionSize(tokens, hidden, dtype)
        if size.message_bytes % _VECTOR:
            got, expected = f"{size.message_bytes} bytes", f"a multiple of {_VECTOR} bytes"
            raise ArgumentError("FusionSize", "hidden_size", got=got, expected=expected)
        return size


class Fusion:
    """One rank's workspace of `trtllm_comm`."""

    op = "allreduce_fusion"

    def __init__(
        self, rank: int, addresses: Sequence[int], fusion: FusionSize, device: Device
    ) -> None:
        self.rank, self.size, self.device, self.fusion = rank, len(addresses), device, fusion
        parts = self._parts(fusion, self.size)
        starts = [sum(parts[:i]) for i in range(3)]
        self._flags, self._lamport = (addresses[rank] + start for start in starts[1:])
        self._stride, self._lamport_bytes = self._stride_of(fusion, self.size), parts[2]
        numbers = [0, 0, 0, self._stride, 0]
        self._numbers = cuda.allocate(4 * len(numbers), device)
        self._fill(self._numbers, "int32_t[]", numbers)
        pointers = [address + start for start in starts for address in addresses]
        pointers.append(self._numbers.desc.ptr)
        self._pointers = cuda.allocate(8 * len(pointers), device)
        self._fill(self._pointers, "int64_t[]", pointers)
        workspace = TensorDesc(self._pointers.desc.ptr, (len(pointers),), "int64", device=device)
        self._of_ranks: dict[str, Any] = {
            "world_size": self.size,
            "world_rank": rank,
            "workspace_ptrs": workspace,
        }
        count, dtype = parts[2] // fusion.itemsize, DTYPES[str(fusion.dtype)]
        place, stream = (str(device), PER_THREAD) if device.is_cuda else (None, None)
        initialize = entries.setup("trtllm_lamport_initialize")
        initialize(self._lamport, count, dtype, stream=stream, device=place)
        if device.is_cuda:
            cuda.synchronize(device)
        self._message_bytes = 0  # size of the last call's message

    @staticmethod
    def _stride_of(fusion: FusionSize, size: int) -> int:
        return min(size * fusion.message_bytes, _MAX_LAMPORT)

    @classmethod
    def _parts(cls, fusion: FusionSize, size: int) -> tuple[int, int, int]:
        """Return the sizes in bytes of the two-shot buffer, the flags, and the Lamport buffers."""
        lamport = round_up(3 * cls._stride_of(fusion, size), _ALIGNMENT)
        addends = round_up(2 * fusion.message_bytes, _ALIGNMENT)
        return addends, round_up(size * _SLOTS * 4, _ALIGNMENT), lamport

    @classmethod
    def nbytes(cls, fusion: FusionSize, size: int) -> int:
        """Return the size in bytes of each rank's memory."""
        return sum(cls._parts(fusion, size))

    def _fill(self, memory: cuda.Memory, kind: str, values: Sequence[int]) -> None:
        source = ffi.new(kind, list(values))
        copy_now(
            memory.desc.ptr, int(ffi.cast("uintptr_t", source)), ffi.sizeof(source), self.device
        )

    @property
    def max_bytes(self) -> int:
        """Largest one-shot message in bytes."""
        return min(self.fusion.message_bytes, self._stride // self.size // _VECTOR * _VECTOR)

    def check(self, op: str, x: TensorDesc) -> None:
        """Raise for a message that does not fit the workspace."""
        if x.dtype.itemsize != self.fusion.itemsize:
            expected = f"{self.fusion.dtype} as in FusionSize, or a dtype of the same size"
            raise ArgumentError(op, "x", got=x.dtype, expected=expected)
        if x.span_bytes > self.fusion.message_bytes:
            expected = (
                f"at most {self.fusion.message_bytes}, which Group(fusion=FusionSize(...)) sets"
            )
            raise ArgumentError(op, "x", got=f"{x.span_bytes} bytes", expected=expected)

    def use_oneshot(self, nbytes: int, tokens: int, wanted: bool | None) -> bool:
        """Return whether to make a call in one shot: as the caller said, or by size."""
        if wanted is not None:
            return wanted
        if tokens <= self.size:
            return True
        return nbytes <= min(_MAX_ONESHOT[self.size], self.max_bytes)

    def all_reduce(self, x: TensorDesc, out: TensorDesc, stream: int, is_oneshot: bool) -> None:
        """Reduce a vector into another; both are whole multiples of 16 bytes."""
        tokens = tokens_of(x.span_bytes // _VECTOR, self.size, is_oneshot)
        x, out = (
            TensorDesc(each.ptr, (tokens, x.numel // tokens), x.dtype, device=self.device)
            for each in (x, out)
        )
        pattern = AllReduceFusionPattern.kAllReduce
        self.call(x, pattern, is_oneshot, stream, {"allreduce_out": out})

    def call(
        self, x: object, pattern: int, is_oneshot: bool, stream: int, more: dict[str, Any]
    ) -> None:
        """Call the entry with the workspace's arguments."""
        kind = next((kind for kind, codes in PATTERNS.items() if pattern in codes), None)
        if kind is None:
            expected = f"one of {sorted(sum(PATTERNS.values(), ()))}"
            raise ArgumentError(self.op, "pattern", got=pattern, expected=expected)
        nbytes = x.span_bytes if isinstance(x, TensorDesc) else 0
        if is_oneshot and nbytes > self.max_bytes:
            expected = f"False for more than {self.max_bytes} bytes"
            raise ArgumentError(self.op, "use_oneshot", got=True, expected=expected)
        before, self._message_bytes = self._message_bytes, nbytes
        try:
            entries.OPS[f"trtllm_allreduce_fusion{kind}"](
                x,
                use_oneshot=is_oneshot,
                pattern_code=int(pattern),
                stream=stream if self.device.is_cuda else None,
                **self._of_ranks,
                **more,
            )
        except ArgumentError:  # the last call may still wait
            self._message_bytes = before
            raise

    # ------------------------------------------------------- what a GPU's kernels wait for

    def state(self, read: Callable[[int, int], bytes]) -> tuple[bytes, Iterable[int]]:
        """Return the state that calls change, and the ranks that a kernel waits for now.

        A kernel that has started has counted its blocks. In a two-shot call, a rank is missing if
        its flag is the one before this rank's own. In a one-shot call, a rank is missing if it left
        -0 in this rank's buffer.
        """
        data = read(self._numbers.desc.ptr, 20)
        numbers = memoryview(data).cast("i")
        if not numbers[_COUNTER]:
            return data, ()
        flags = memoryview(read(self._flags, 4 * self.size)).cast("i")
        before = (flags[self.rank] + 2) % 3
        missing = {rank for rank in range(self.size) if flags[rank] == before}
        if not missing:
            turn = self._lamport + numbers[_TURN] % 3 * self._stride
            places = [turn + rank * self._message_bytes for rank in range(self.size)]
            missing = {i for i, at in enumerate(places) if self._is_empty(read(at, _VECTOR))}
        # If the sizes differ from the last call's, the missing rank may be any but this one.
        return data + bytes(flags), missing or {*range(self.size)} - {self.rank}

    def _is_empty(self, data: bytes) -> bool:
        size = self.fusion.itemsize
        empty = (1 << 8 * size - 1).to_bytes(size, "little")
        return any(data[i : i + size] == empty for i in range(0, len(data), size))

    def release(
        self, read: Callable[[int, int], bytes], write: Callable[[int, bytes], None]
    ) -> None:
        """Release a waiting kernel: write flags of no barrier, and buffers without -0."""
        if not memoryview(read(self._numbers.desc.ptr, 4)).cast("i")[0]:
            return
        write(self._flags, _RELEASED * (self.size * _SLOTS * 4))
        for start in range(0, self._lamport_bytes, _CHUNK):
            write(self._lamport + start, bytes(min(_CHUNK, self._lamport_bytes - start)))


def tokens_of(vectors: int, size: int, is_oneshot: bool) -> int:
    """Return the rows to pass for a message; the kernels give each row hundreds of threads."""
    if is_oneshot:
        return 1 if vectors <= 2 * _THREADS else vectors // math.gcd(vectors, _THREADS)
    # Two-shot calls need more rows than ranks.
    return vectors // math.gcd(vectors, min(_THREADS, max(vectors // (2 * size), 1)))


def has_two_shots(vectors: int, size: int) -> bool:
    """Return whether a two-shot call works: more rows than ranks, with enough vectors each."""
    tokens = tokens_of(vectors, size, is_oneshot=False)
    return tokens > size and vectors // tokens >= size


def is_even(nbytes: int) -> bool:
    """Return whether a message divides into rows of many threads."""
    vectors = nbytes // _VECTOR
    return vectors <= 2 * _THREADS or math.gcd(vectors, _THREADS) >= 64


def pattern_of(op: str, pattern: object) -> AllReduceFusionPattern:
    """Return a pattern by its number or by FlashInfer's name."""
    try:
        if isinstance(pattern, str):
            return AllReduceFusionPattern[pattern]
        return AllReduceFusionPattern(pattern)  # type: ignore[arg-type]
    except (KeyError, ValueError, TypeError):
        expected = "an AllReduceFusionPattern: " + ", ".join(AllReduceFusionPattern.__members__)
        raise ArgumentTypeError(op, "pattern", got=repr(pattern), expected=expected) from None
