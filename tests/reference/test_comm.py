"""Ranks of the reference all-reduce, as threads and as processes, against sums in float64."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from fi_ffi.comm.entries import OPS, init_custom_ar, setup
from fi_ffi.errors import ArgumentError, KernelError, KernelNotFoundError
from fi_ffi.reference.peers import waiting_at_most

from tests.helpers import ranks
from tests.helpers.ranks import Memory, address_of
from tests.helpers.rounding import step

DTYPES = tuple(map(np.dtype, (np.float32, np.float16, ml_dtypes.bfloat16)))
META = 3456
Sizes = list[tuple[int, int]]  # elements, and which dtype
all_reduce = OPS["all_reduce"]


def addend(seed: int, call: int, rank: int, n: int, dtype: np.dtype[Any]) -> np.ndarray:
    rng = np.random.default_rng([seed, call, rank])
    return (rng.standard_normal(n) * 10.0 ** rng.integers(-2, 3)).astype(dtype)


def reduce(rank: int, memory: Memory, seed: int, calls: Sizes, wait_s: float = 240) -> list[Any]:
    """What a rank gets of each call, in place where the number of the call is odd."""
    half = (memory.nbytes - META) // 2
    table = np.zeros(64, np.uint8)
    fa = init_custom_ar(memory.addresses(), table, rank, True)
    buffers = [address + META + half for address in memory.addresses()]
    setup("register_buffer")(fa, buffers)
    found = []
    with waiting_at_most(wait_s):
        for call, (n, kind) in enumerate(calls):
            x = addend(seed, call, rank, n, DTYPES[kind])
            out = x if call % 2 else np.full(n, np.nan, x.dtype)
            all_reduce(fa, x, out, buffers[rank], half, 1 + call % 36)
            found.append(out)
    setup("dispose")(fa)
    return found


def drawn(rng: np.random.Generator, count: int) -> Sizes:
    """From one vector to what any number of ranks reduces in two stages."""
    sizes = 8 * 2 ** rng.uniform(0, 15, count)  # below the buffers' megabyte
    return [(int(size) // 8 * 8, int(rng.integers(3))) for size in sizes]


@pytest.mark.parametrize(
    ("kind", "size"), [*(("threads", n) for n in (2, 4, 6, 8)), ("processes", 2), ("processes", 4)]
)
def test_all_reduce(kind, size, rng):
    seed, calls = int(rng.integers(2**32)), [*drawn(rng, 12), (1 << 18, 0), (8, 1)]
    memory = Memory(size, META + (8 << 18), shared=kind == "processes")
    try:
        found = ranks.run(kind, size, reduce, memory, seed, calls)
    finally:
        memory.close()
    for call, (n, of) in enumerate(calls):
        given = [addend(seed, call, rank, n, DTYPES[of]).astype(np.float64) for rank in range(size)]
        total, magnitude = np.sum(given, axis=0), np.sum(np.abs(given), axis=0)
        assert isinstance(found[0], list), found[0]
        first = found[0][call]
        error = np.abs(first.astype(np.float64) - total)
        assert (error <= 0.5001 * step(total, DTYPES[of]) + magnitude * size * 2.0**-23).all()
        for of_rank in found:
            assert (of_rank[call].view(np.uint8) == first.view(np.uint8)).all()


@pytest.mark.parametrize("n", [4, 1 << 17])
def test_additions_are_in_the_kernels_order(n, rng):
    """In float32: of one stage from rank 0 on, of two from the rank on that adds."""
    seed, size = int(rng.integers(2**32)), 4
    memory = Memory(size, META + 8 * n, shared=False)
    found = ranks.run("threads", size, reduce, memory, seed, [(n, 0)])
    given = [addend(seed, 0, rank, n, DTYPES[0]) for rank in range(size)]
    if n * 4 < 512 << 10:
        wanted = ((given[0] + given[1]) + given[2]) + given[3]
    else:
        parts = []
        for first in range(size):
            a, b, c, d = (np.split(given[(first + i) % size], size)[first] for i in range(size))
            parts.append(((a + b) + c) + d)
        wanted = np.concatenate(parts)
    assert all((of_rank[0] == wanted).all() for of_rank in found)


@pytest.mark.parametrize("kind", ranks.KINDS)
def test_a_rank_that_does_not_come_is_named(kind, rng):
    memory = Memory(4, META + 4096, shared=kind == "processes")
    try:
        found = ranks.run(kind, 4, reduce, memory, 0, [(64, 0)], 2.0, absent=[1, 2])
    finally:
        memory.close()
    for rank in (0, 3):
        error = str(found[rank])
        assert f"TimeoutError: all_reduce: rank {rank} waited 2 s for ranks 1, 2" in error


def test_memory_is_as_upstream_lays_it_out():
    assert setup("meta_size")() == META
    table, memory = np.zeros(130, np.uint8), Memory(2, META, shared=False)
    fa = setup("init_custom_ar")(memory.addresses(), table, 0, False)
    setup("register_buffer")(fa, [16, 32])
    setup("register_buffer")(fa, [48, 64])
    assert table.view(np.uint16)[: 64].view(np.int64).reshape(2, 8)[:, :2].tolist() == [
        [16, 32], [48, 64],
    ]  # fmt: skip
    with pytest.raises(KernelError, match="Rank data buffer is overflowed by 1"):
        setup("register_buffer")(fa, [80, 96])
    assert [list(found) for found in setup("get_graph_buffer_ipc_meta")(fa)] == [[], []]
    setup("register_graph_buffers")(fa, [[], []], [[], []])
    setup("dispose")(fa)
    with pytest.raises(KernelError, match="none of init_custom_ar's, or was disposed of"):
        setup("dispose")(fa)


@pytest.mark.parametrize(
    ("pointers", "rank", "full_nvlink", "message"),
    [
        ([16] * 3, 0, True, "Odd num gpus"),
        ([], 0, True, "Odd num gpus"),
        ([16] * 10, 0, True, "world size > 8"),
        ([16] * 2, 2, True, "invalid rank"),
        ([16] * 4, 0, False, "without full_nvlink, nothing is launched"),
    ],
)
def test_the_reference_refuses_ranks_that_cannot_be(pointers, rank, full_nvlink, message):
    with pytest.raises(KernelError, match=message):
        setup("init_custom_ar")(pointers, np.zeros(64, np.uint8), rank, full_nvlink)


TABLE, ROOM = np.zeros(64, np.uint8), np.zeros(96, np.uint8)
AT_8 = ROOM[(8 - address_of(ROOM)) % 16 :][:64]  # not of 16 bytes, as a row is read


@pytest.mark.parametrize(
    ("changed", "argument", "message"),
    [
        ({"pointers": [128] * 3}, "pointers", "2, 4, 6 or 8 ranks"),
        ({"pointers": []}, "pointers", "2, 4, 6 or 8 ranks"),
        ({"pointers": [128, 0]}, "pointers", "multiples of 128"),
        ({"pointers": [128, 192]}, "pointers", "multiples of 128"),
        ({"rank": 2}, "rank", "from 0 to 1"),
        ({"rank": True}, "rank", "int"),
        ({"pointers": [128] * 4, "full_nvlink": False}, "full_nvlink", "launch nothing"),
        ({"rank_data": TABLE[:63]}, "rank_data", "64 of each buffer"),
        ({"rank_data": TABLE.view(np.int64)}, "rank_data", "uint8"),
        ({"rank_data": np.zeros(128, np.uint8)[::2]}, "rank_data", "contiguous"),
        ({"rank_data": AT_8}, "rank_data", "a multiple of 16"),
    ],
)
def test_ranks_that_cannot_be_are_refused(changed, argument, message):
    given = {"pointers": [128, 256], "rank_data": TABLE, "rank": 0, "full_nvlink": True} | changed
    with pytest.raises(ArgumentError, match=message) as refused:
        init_custom_ar(**given)
    assert (refused.value.op, refused.value.argument) == ("init_custom_ar", argument)


def test_two_ranks_need_no_nvlink():
    setup("dispose")(init_custom_ar([128, 256], TABLE, 1, False))
    with pytest.raises(KernelError, match="none of init_custom_ar's"):
        setup("dispose")(0)


X = np.zeros(64, np.float16)


@pytest.mark.parametrize(
    ("changed", "argument", "message"),
    [
        ({"fa": 0}, "fa", "1 or more"),
        ({"inp": X[:60], "out": X[:60].copy()}, "inp", "a multiple of 16 bytes"),
        ({"out": np.zeros(64, np.float32)}, "out", "float16"),
        ({"out": np.zeros(56, np.float16)}, "out", "n = 64"),
        ({"inp": X.astype(np.int16), "out": np.zeros(64, np.int16)}, "inp", "float32 or float16"),
        ({"out": np.zeros(128, np.float16)[::2]}, "out", "contiguous|stride"),
        ({"reg_buffer_sz_bytes": 127}, "reg_buffer_sz_bytes", "the bytes of `inp`, or more"),
        ({"num_ctas": 37}, "num_ctas", "36"),
        ({"num_ctas": 0}, "num_ctas", "1"),
        ({"reg_buffer": 0, "out": X}, "out", "other memory than `inp`"),
        ({"inp": np.zeros(80, np.float16)[1:65]}, "inp", "16"),
    ],
)
def test_calls_that_cannot_be_are_refused(changed, argument, message):
    given = {
        "fa": 2**40, "inp": X, "out": np.full(64, 7, np.float16), "reg_buffer": address_of(X),
        "reg_buffer_sz_bytes": 128, "num_ctas": 36,
    } | changed  # fmt: skip
    before = given["out"].copy()
    with pytest.raises(ArgumentError, match=message) as refused:
        all_reduce(**given)
    assert (refused.value.op, refused.value.argument) == ("all_reduce", argument)
    assert (given["out"] == before).all()


def test_no_elements_are_nothing_to_wait_for():
    nothing = np.zeros(0, np.float16)
    all_reduce(2**40, nothing, nothing.copy(), 16, 0, 1)
    with pytest.raises(KernelError, match="none of init_custom_ar's"):
        all_reduce(2**40, X, X.copy(), 16, 128, 1)


ZEROS = np.zeros(64, np.float16)
LAUNCHED = {"handle": 2**40, "blocks": 4, "threads": 128, "algorithm": 0}


@pytest.mark.parametrize(
    ("name", "sizes", "changed", "argument", "message"),
    [
        ("all_reduce", (64, 64), {"handle": 0}, "handle", "1 or more"),
        ("all_reduce", (60, 60), {}, "inp", "a multiple of 16 bytes"),
        ("all_reduce", (64, 56), {}, "out", "n = 64"),
        ("all_reduce", (64, 64), {"threads": 1025}, "threads", "1024"),
        ("all_reduce", (64, 64), {"algorithm": 7}, "algorithm", "6"),
        ("all_gather", (16, 48), {}, "out", "2, 4 or 8 times as many"),
        ("all_gather", (12, 24), {}, "inp", "a multiple of 16 bytes"),
        ("all_gather", (16, 32), {"threads": 48}, "threads", "32"),
        ("all_gather", (16, 32), {"algorithm": 3}, "algorithm", "2"),
        ("reduce_scatter", (48, 16), {}, "inp", "2, 4 or 8 times as many"),
        ("reduce_scatter", (24, 12), {}, "out", "a multiple of 16 bytes"),
        ("reduce_scatter", (32, 16), {"blocks": 65}, "blocks", "64"),
    ],
)
def test_calls_over_pcie_that_cannot_be_are_refused(name, sizes, changed, argument, message):
    inp, out = (ZEROS[:size].copy() for size in sizes)
    op = OPS[f"pcie_ipc_{name}"]
    with pytest.raises(ArgumentError, match=message) as refused:
        op(**{"inp": inp, "out": out, **LAUNCHED, **changed})
    assert refused.value.argument == argument


def test_over_pcie_there_are_no_cpus():
    with pytest.raises(KernelNotFoundError, match="it runs on CUDA only"):
        OPS["pcie_ipc_all_reduce"](inp=ZEROS, out=ZEROS.copy(), **LAUNCHED)
    with pytest.raises(KernelNotFoundError, match="it runs on CUDA only"):
        setup("pcie_ipc_init")([256, 512], 0, 64, 2, 4)
