"""Sizes and choices of groups at each threshold, from FlashInfer's sources and plain numbers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

import fi_ffi
from fi_ffi import comm
from fi_ffi.abi.tensor import parse_device
from fi_ffi.comm import fusion, vllm
from fi_ffi.comm.entries import setup
from fi_ffi.errors import ArgumentError

from tests.comm.test_group import on_all

MIB = 1 << 20
GPU = parse_device("cuda:0")


def up(count: int) -> int:
    """The next multiple of 256."""
    return 256 * len(range(0, count, 256))


@pytest.mark.parametrize(
    ("vectors", "rows"),
    [(1, 1), (2, 1), (1023, 1), (1024, 1), (1025, 1025), (1026, 513), (1088, 17), (1536, 3),
     (2047, 2047), (2048, 4), (2049, 2049)],
)  # fmt: skip
def test_rows_of_one_shot(vectors, rows):
    """One of up to 1024 vectors; above, as many vectors a row as divide it and 512."""
    for size in fusion.SIZES:
        assert fusion.tokens_of(vectors, size, is_oneshot=True) == rows


# Vectors and ranks: the rows of two shots, each of as many vectors as divide the message and leave
# twice as many rows as ranks; and whether there are more rows than ranks, of a vector for each.
TWO_SHOTS = [
    (2, 2, 2, False), (3, 2, 3, False), (4, 2, 4, False), (6, 2, 6, False), (7, 2, 7, False),
    (8, 2, 4, True), (9, 2, 9, False), (12, 2, 4, True), (2044, 2, 4, True), (2048, 2, 4, True),
    (2049, 2, 2049, False), (4096, 2, 8, True), (24, 4, 8, False), (31, 4, 31, False),
    (32, 4, 8, True), (33, 4, 33, False), (120, 8, 120, False), (127, 8, 127, False),
    (128, 8, 16, True), (480, 16, 32, False), (512, 16, 32, True), (2**20, 16, 2048, True),
]  # fmt: skip


@pytest.mark.parametrize(("vectors", "size", "rows", "has"), TWO_SHOTS)
def test_rows_of_two_shots(vectors, size, rows, has):
    assert fusion.tokens_of(vectors, size, is_oneshot=False) == rows
    assert fusion.has_two_shots(vectors, size) is has


@pytest.mark.parametrize(
    ("vectors", "is_even"),
    [(1, True), (1023, True), (1024, True), (1025, False), (1056, False), (1087, False),
     (1088, True), (1120, False), (1152, True), (2048, True), (2049, False)],
)  # fmt: skip
def test_messages_that_divide_into_rows(vectors, is_even):
    """Of 64 vectors or more, where there are more than 1024."""
    assert fusion.is_even(16 * vectors) is is_even
    assert fusion.is_even(16 * vectors + 15) is is_even  # whole vectors count


@pytest.mark.parametrize(
    ("size", "is_right"),
    [((1, 8), True), ((1, 7), False), ((1, 9), False), ((8, 1), True), ((7, 1), False),
     ((3, 16), True), ((1, 4, "float32"), True), ((1, 3, "float32"), False),
     ((1, 5, "float32"), False), ((0, 8), False), ((1, 0), False), ((2**31 - 1, 8), True),
     ((2**31, 8), False)],
)  # fmt: skip
def test_sizes_of_whole_vectors(size, is_right):
    if is_right:
        assert comm.FusionSize(*size).checked().message_bytes % 16 == 0
        return
    with pytest.raises(ArgumentError, match="16 bytes|from 1"):
        comm.FusionSize(*size).checked()


# Three Lamport buffers of what all ranks send are 32 bits' worth at most.
LAMPORT = 2**30 - 2**21


@pytest.mark.parametrize("size", fusion.SIZES)
def test_memory_of_fused_calls(size):
    """Addends and sums, a flag of 4 bytes for each of 256 blocks and rank, and three buffers."""
    for vectors in (1, 2, 7, 8, 9, 15, 16, 17, 2**20, LAMPORT // 16 // size - 1,
                    LAMPORT // 16 // size, LAMPORT // 16 // size + 1, 2**27):  # fmt: skip
        message = 16 * vectors
        buffers = up(3 * min(size * message, LAMPORT))
        expected = up(2 * message) + 1024 * size + buffers
        of = comm.FusionSize(vectors, 8)
        assert fusion.Fusion.nbytes(of, size) == expected, vectors


def workspace(size: int, stride: int, message: int) -> Any:
    """A rank's workspace, as far as choices look at it."""
    made: Any = object.__new__(fusion.Fusion)
    made.size, made._stride = size, stride
    made.fusion = comm.FusionSize(message // 16, 8)
    return made


@pytest.mark.parametrize(
    ("size", "most"), [(2, 128 * MIB), (4, 8 * MIB), (8, 2752512), (16, MIB)]
)  # of _use_oneshot_heuristics in trtllm_ar.py
def test_shots_by_size(size, most):
    made = workspace(size, size * 2**28, 2**28)
    assert made.max_bytes == 2**28
    for nbytes, is_one in ((16, True), (most - 16, True), (most, True), (most + 16, False)):
        assert made.use_oneshot(nbytes, size + 1, None) is is_one
        assert made.use_oneshot(nbytes, size, None) is True  # two shots have more rows than ranks
        for wanted in (True, False):
            assert made.use_oneshot(nbytes, size + 1, wanted) is wanted
    small = workspace(size, size * 4096, 8192)  # buffers that are smaller than a message
    assert small.max_bytes == 4096
    assert small.use_oneshot(4096, size + 1, None)
    assert not small.use_oneshot(4112, size + 1, None)


@pytest.mark.parametrize("stride", [size + off for size in (32, 48) for off in (0, 2, 30, 31)])
def test_one_shot_takes_whole_vectors(stride):
    assert workspace(2, stride, 2**20).max_bytes == 16 * len(range(31, stride, 32))


@pytest.mark.parametrize("most", [1, 255, 256, 257, 511, 512, 513, 8 * MIB])
def test_memory_of_vllm(most):
    """Counters and partial sums, then the registered buffer, each from a multiple of 256 on."""
    counters = int(setup("meta_size")(device=None))
    expected = up(counters + most) + up(most)
    assert vllm.VllmAllReduce.nbytes(most, parse_device("cpu")) == expected


def test_buffers_side_by_side():
    """What touches the registered buffer by a byte overlaps it; what ends before it does not."""
    kernels: Any = object.__new__(vllm.VllmAllReduce)
    kernels._buffer, kernels.max_bytes = 4096, 256

    def at(ptr: int, count: int) -> Any:
        return SimpleNamespace(ptr=ptr, span_bytes=count)

    for ptr, count, overlaps in (
        (4000, 96, False), (4000, 97, True), (4096, 1, True), (4351, 1, True), (4352, 1, False),
        (4000, 1000, True), (4351, 8, True),
    ):  # fmt: skip
        assert kernels.overlaps(at(ptr, count)) is overlaps, ptr
        assert kernels.starts_with(at(ptr, count)) is (ptr == 4096)


@pytest.mark.parametrize(
    ("size", "one", "other"),
    [(2, 4 * MIB, 8 * MIB), (3, 0, 4 * MIB), (4, MIB // 2, 4 * MIB), (8, MIB // 4, 4 * MIB)],
)
def test_algorithms_by_size(size, one, other):
    """One shot up to a message, `vllm` up to another, and NCCL above; of three ranks no shots, and
    no `vllm`."""

    def body(rank, given, gpus):
        with comm.Group(given[rank], device="cpu", max_bytes=other) as group:
            return [
                group.algorithm_for(n) for n in (one - 2, one, one + 2, other, other + 2) if n > 0
            ]

    expected = ["oneshot", "oneshot", "vllm", "vllm", "nccl"] if one else ["nccl"] * 3
    assert on_all("threads", size, body) == [expected] * size


def test_captured_calls_of_a_group_are_counted(monkeypatch):
    """16,383 of them have a row of addresses each; one more is refused, and a call that is none
    goes on."""
    launched: list[int] = []
    capturing = {0x10}
    monkeypatch.setattr(vllm.cuda, "is_capturing", lambda stream: stream in capturing)
    monkeypatch.setitem(
        vllm.entries.OPS, "all_reduce", lambda *args, stream: launched.append(stream)
    )
    made = vllm.VllmAllReduce.__new__(vllm.VllmAllReduce)
    made.device, made._buffer, made._handle, made.max_bytes, made._captured = GPU, 4096, 1, 64, 1
    x = fi_ffi.TensorDesc(8192, (8,), "float16", device=GPU)
    for _ in range(16_383):
        made.all_reduce(x, x, 0x10)
    with pytest.raises(ArgumentError, match="`stream`: got one more, expected at most 16383"):
        made.all_reduce(x, x, 0x10)
    made.all_reduce(x, x, 0x20)
    assert launched == [0x10] * 16_383 + [0x20]
