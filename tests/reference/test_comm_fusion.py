"""All-reduce with what follows it, on reference ranks, against float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fi_ffi.abi.tensor import TensorDesc
from fi_ffi.comm.entries import OPS, setup
from fi_ffi.errors import ArgumentError, KernelError
from fi_ffi.ops.table.comm import PATTERNS
from fi_ffi.reference.peers import waiting_at_most

from tests.helpers import ranks
from tests.helpers.fusion_calls import DTYPES, Call, MoeCall, Sizes
from tests.helpers.ranks import Memory

Array = np.ndarray
Results = list[dict[str, Any]]


def run_calls(
    rank: int, memory: Memory, sizes: Sizes, calls: Sequence[Call | MoeCall], wait_s: float = 240
) -> Results:
    """What a rank gets of each call."""
    pointers = sizes.pointers(memory.addresses(), rank)
    found = []
    with waiting_at_most(wait_s):
        for call in calls:
            outs, inputs = call.outputs(), call.inputs(rank)
            if call.in_place:
                outs[call.same[0]] = inputs[call.same[1]]
            name = "workspace" if "finalize" in call.op else "workspace_ptrs"
            given = inputs | outs | call.numbers() | {name: pointers}
            OPS[call.op](world_size=sizes.ranks, world_rank=rank, **given)
            found.append(outs)
    return found


def begun(sizes: Sizes, kind: str) -> Memory:
    """Memory of all ranks, ready for the first call."""
    memory = Memory(sizes.ranks, sizes.nbytes, shared=kind == "processes")
    for rank in range(sizes.ranks):
        memory.of(rank)[:] = sizes.contents()
    return memory


def judged(kind: str, sizes: Sizes, calls: Sequence[Call | MoeCall]) -> list[Results]:
    memory = begun(sizes, kind)
    try:
        found = ranks.run(kind, sizes.ranks, run_calls, memory, sizes, calls)
    finally:
        memory.close()
    for results in found:
        assert isinstance(results, list), results
        for call, outs, first in zip(calls, results, found[0], strict=True):
            call.judge(outs, sizes.ranks)
            for name, out in outs.items():
                assert (out.view(np.uint8) == first[name].view(np.uint8)).all(), name
    return found


def drawn(rng: np.random.Generator, sizes: Sizes, pattern: int, count: int) -> list[Call]:
    """Calls of any sizes that the workspace has room for, of the dtypes of its itemsize."""
    calls = []
    for _ in range(count):
        one_shot = bool(rng.integers(2))
        least = 1 if one_shot else sizes.ranks + 1
        hidden = int(rng.integers(1, sizes.hidden // 64 + 1)) * 64
        calls.append(Call(
            int(rng.integers(2**32)), pattern, int(rng.integers(least, sizes.tokens + 1)), hidden,
            0 if sizes.itemsize == 4 else int(rng.integers(1, 3)), one_shot,
            bool(rng.integers(2)), float(rng.integers(2)), 2 * int(rng.integers(2)), 64,
            bool(rng.integers(2)),
        ))  # fmt: skip
    return calls


@pytest.mark.parametrize(
    ("pattern", "itemsize"),
    [
        (code, itemsize)
        for kind, codes in PATTERNS.items()
        for code in codes
        for itemsize in ((2,) if kind == "_fp4" else (2, 4))
    ],
)
def test_patterns(pattern, itemsize, rng):
    sizes = Sizes(int(rng.choice([2, 4])), 17, 320, itemsize)
    judged("threads", sizes, drawn(rng, sizes, pattern, 6))


def quantised(pattern: int, rows: Array, gamma: Array, group: int = 128) -> dict[str, Array]:
    """What the first of two ranks gets of a residual, where the addends are zeros."""
    tokens, hidden = rows.shape
    sizes = Sizes(2, tokens, hidden, gamma.itemsize)
    call = Call(0, pattern, tokens, hidden, DTYPES.index(gamma.dtype), group=group)
    given = {"allreduce_in": np.zeros(rows.shape, gamma.dtype), "rms_gamma": gamma}
    given |= {"residual_in": rows.astype(gamma.dtype), **call.numbers()}
    memory = begun(sizes, "threads")

    def body(rank: int) -> dict[str, Array]:
        outs, pointers = call.outputs(), sizes.pointers(memory.addresses(), rank)
        OPS[call.op](world_size=2, world_rank=rank, workspace_ptrs=pointers, **given, **outs)
        return outs

    return ranks.run("threads", 2, body)[0]


@pytest.mark.parametrize("pattern", PATTERNS["_dynamic_fp8"])
def test_tokens_of_almost_nothing(pattern, rng):
    """Their scale is that of 2**-9, and they are no more than their part of 448."""
    hidden = 256
    gamma = np.repeat(np.array([2.0**-8, 2.0**-11], np.float32), hidden // 2)
    rows = rng.choice([-1.0, 1.0], (3, hidden))
    rows[0, hidden // 2 :], rows[1, : hidden // 2], rows[2] = 0, 0, 0
    outs = quantised(pattern, rows, gamma)
    root = 2**0.5  # of a row whose half is zeros
    np.testing.assert_allclose(outs["scale_out"] * 448, [root * 2.0**-8, 2.0**-9, 2.0**-9], 1e-5)
    largest = np.abs(outs["quant_out"].astype(np.float32)).max(axis=1)
    np.testing.assert_allclose(largest, [448, 448 * root / 4, 0], 2.0**-4)


@pytest.mark.parametrize("pattern", PATTERNS["_block_fp8"])
def test_scales_of_groups_are_powers_of_2(pattern, rng):
    """The least that a group's largest element fits in, of 448 elements exactly itself; and none
    below 1e-10."""
    of_group = np.array([448, 224, 449.5, 2.0**-24, 2.0**-25, 1], np.float64)
    gamma = np.repeat(of_group, 32).astype(DTYPES[2])
    rows = rng.choice([-1.0, 1.0], (2, len(gamma)))
    rows[1] = 0
    outs = quantised(pattern, rows, gamma, group=32)
    # Columns of four groups, each with four tokens but the last.
    codes = outs["scale_out"].view(np.uint8).reshape(-1, 4)[[0, 4, 1, 5]].reshape(2, 8)[:, :6]
    assert (codes.astype(int) - 127).tolist() == [[0, -1, 1, -32, -33, -8], [-33] * 6]
    assert (np.abs(outs["quant_out"][0, :64].astype(np.float32)) == 448).all()


@pytest.mark.parametrize("size", [2, 4])
def test_processes(size, rng):
    sizes = Sizes(size, 40, 256)
    judged("processes", sizes, [drawn(rng, sizes, int(p), 1)[0] for p in (0, 1, 2, 4, 5, 1, 0, 9)])


def test_sixteen_ranks(rng):
    sizes = Sizes(16, 20, 128)
    judged("threads", sizes, drawn(rng, sizes, 1, 4))


@pytest.mark.parametrize("finalize", [False, True])
@pytest.mark.parametrize("has_all", [False, True])
def test_experts(finalize, has_all, rng):
    sizes = Sizes(int(rng.choice([2, 4])), 9, 512)
    judged("threads", sizes, [
        MoeCall(int(rng.integers(2**32)), finalize, int(rng.integers(1, 10)),
                int(rng.choice([256, 512])), int(rng.integers(1, 3)), int(rng.integers(1, 5)),
                int(rng.integers(1, 4)), has_all, float(rng.integers(2)))
        for _ in range(5)
    ])  # fmt: skip


def test_additions_are_in_the_order_of_the_ranks(rng):
    """In float32, rounded once, or rounded at each step; in one shot and in two."""
    sizes, same = Sizes(4, 12, 64), int(rng.integers(2**32))
    ways = [(shot, acc) for shot in (True, False) for acc in (True, False)]
    calls = [Call(same, 0, 12, 64, 1, shot, acc) for shot, acc in ways]
    found = judged("threads", sizes, calls)[0]
    addends = [calls[0].inputs(rank)["allreduce_in"] for rank in range(4)]
    wide = addends[0].astype(np.float32)
    stepwise = addends[0]
    for addend in addends[1:]:
        wide, stepwise = wide + addend.astype(np.float32), stepwise + addend
    for (_, acc), outs in zip(ways, found, strict=True):
        assert (outs["allreduce_out"] == (wide.astype(np.float16) if acc else stepwise)).all()
    assert (wide.astype(np.float16) != stepwise).any()


def test_lamport_buffers_are_begun_by_their_own_functions():
    for dtype, empty in (("float16", 0x8000), ("bfloat16", 0x8000), ("float32", 0x80000000)):
        item = np.dtype(f"u{4 if dtype == 'float32' else 2}")
        buffer = np.zeros(80, item)
        start = ranks.address_of(buffer)
        setup("trtllm_lamport_initialize")(start, 16, dtype)
        assert (buffer[:16] == empty).all()
        assert not buffer[16:].any()
        step = 16 * item.itemsize
        setup("trtllm_lamport_initialize_all")(*(start + i * step for i in (1, 2, 4)), step, dtype)
        assert (buffer.reshape(5, 16)[[0, 1, 2, 4]] == empty).all()
        assert not buffer[48:64].any()


@pytest.mark.parametrize("kind", ranks.KINDS)
@pytest.mark.parametrize("use_oneshot", [True, False])
def test_a_rank_that_does_not_come_is_named(kind, use_oneshot):
    sizes = Sizes(4, 8, 64)
    memory = begun(sizes, kind)
    try:
        call = Call(0, 1, 8, 64, 1, use_oneshot)
        found = ranks.run(kind, 4, run_calls, memory, sizes, [call], 2.0, absent=[2])
    finally:
        memory.close()
    for rank in (0, 1, 3):
        assert f"trtllm_allreduce_fusion: rank {rank} waited 2 s for rank 2" in str(found[rank])


def test_more_than_the_workspace_holds_is_refused():
    sizes = Sizes(2, 4, 64)
    memory = begun(sizes, "threads")
    before = memory.of(1).copy()
    found = run_calls_of_one(sizes, memory, Call(0, 0, 5, 64, 1))
    assert "2 times 640 bytes, and a buffer of 1024" in found
    assert (memory.of(1) == before).all()


def run_calls_of_one(sizes: Sizes, memory: Memory, call: Call) -> str:
    with pytest.raises(KernelError) as refused:
        run_calls(0, memory, sizes, [call])
    return str(refused.value)


# ---------------------------------------------------------------- refusals

POINTERS = np.zeros(7, np.int64)


def given_for(pattern: int, tokens: int = 4, **changed: Any) -> tuple[Any, dict[str, Any]]:
    call = Call(0, pattern, tokens, 256, 1)
    op = OPS[call.op]
    given = call.inputs(0) | call.outputs() | call.numbers()
    given |= {"world_size": 2, "world_rank": 0, "workspace_ptrs": POINTERS}
    return op, given | changed


def refused(op: Any, given: dict[str, Any], argument: str, message: str) -> None:
    before = {name: value.copy() for name, value in given.items() if isinstance(value, np.ndarray)}
    with pytest.raises(ArgumentError, match=message) as error:
        op(**given)
    assert error.value.argument == argument
    for name, value in before.items():
        assert (given[name].view(np.uint8) == value.view(np.uint8)).all(), name


X, ONE = np.ones((4, 256), np.float16), np.ones(1, np.float32)


@pytest.mark.parametrize(
    ("pattern", "changed", "argument", "message"),
    [
        (0, {"world_size": 3}, "world_size", "2, 4, 8 or 16"),
        (0, {"world_rank": 2}, "world_rank", "less than world_size"),
        (0, {"workspace_ptrs": POINTERS[:6]}, "workspace_ptrs", r"3 \* world_size \+ 1"),
        (0, {"workspace_ptrs": POINTERS.astype(np.int32)}, "workspace_ptrs", "int64"),
        (0, {"use_oneshot": False, "world_size": 4, "workspace_ptrs": np.zeros(13, np.int64)},
         "use_oneshot", "no more tokens than ranks"),
        (0, {"pattern_code": 3}, "pattern_code", r"one of \(0, 1, 2, 4\)"),
        (0, {"pattern_code": 6}, "pattern_code", r"one of \(0, 1, 2, 4\)"),
        (0, {"allreduce_out": None}, "allreduce_out", "pattern_code 0, and None with another"),
        (0, {"norm_out": X.copy()}, "norm_out", "pattern_code 1 or 4, and None"),
        (0, {"hidden_size": 128}, "hidden_size", "256"),
        (0, {"token_num": 3}, "token_num", "4"),
        (1, {"allreduce_out": X.copy()}, "allreduce_out", "pattern_code 0"),
        (1, {"residual_in": None}, "residual_in", "pattern_code 1 or 2 or 4"),
        (1, {"residual_out": None}, "residual_out", "pattern_code 1 or 2 or 4"),
        (1, {"rms_gamma": None}, "rms_gamma", "pattern_code 1 or 2 or 4"),
        (1, {"norm_out": None}, "norm_out", "pattern_code 1 or 4"),
        (1, {"rms_eps": -1.0}, "rms_eps", "0"),
        (2, {"norm_out": X.copy()}, "norm_out", "pattern_code 1 or 4"),
        (2, {"quant_out": None}, "quant_out", "pattern_code 2 or 4"),
        (2, {"scale_factor": None}, "scale_factor", "pattern_code 2 or 4"),
        (4, {"quant_out": np.zeros((4, 256), np.int8)}, "quant_out", "float8_e4m3fn"),
        (3, {"layout_code": 1}, "layout_code", r"0 \(tiles of 128 x 4\) or 2 \(rows\)"),
        (3, {"scale_out": np.zeros(2047, np.uint8)}, "scale_out", "whole tiles"),
        (3, {"norm_out": X.copy()}, "norm_out", "pattern_code 5"),
        (3, {"quant_out": np.zeros((4, 127), np.uint8)}, "quant_out", "half as many bytes"),
        (8, {"block_quant_group_size": 96}, "block_quant_group_size", "is a multiple of"),
        (8, {"scale_out": np.zeros(3, np.int32)}, "scale_out", "length is a multiple of 4"),
        (8, {"tokens": 5, "block_quant_group_size": 32, "scale_out": np.zeros(12, np.int32)},
         "scale_out", "length is a multiple of 4"),
        (10, {"scale_out": np.zeros(3, np.float32)}, "scale_out", "a scale for each token"),
    ],
)  # fmt: skip
def test_calls_that_cannot_be_are_refused(pattern, changed, argument, message):
    refused(*given_for(pattern, **changed), argument, message)


@pytest.mark.parametrize(("hidden", "is_oneshot"), [(1 << 16, True), (1 << 18, False)])
def test_elements_are_counted_in_32_bits(hidden, is_oneshot):
    """In one shot those of all ranks; in two a sum's beside the addends'."""
    x = TensorDesc(1 << 40, (4096, hidden), "float16", device="cpu")
    _, given = given_for(0, world_size=8, workspace_ptrs=np.zeros(25, np.int64), allreduce_in=x)
    given |= {"allreduce_out": x, "token_num": 4096, "hidden_size": hidden}
    given["use_oneshot"] = is_oneshot
    refused(OPS["trtllm_allreduce_fusion"], given, "token_num", "2147483647 elements of all ranks")


def of_experts(finalize: bool, **changed: Any) -> tuple[Any, dict[str, Any]]:
    call = MoeCall(0, finalize, 4, 256, 1)
    name = "workspace" if finalize else "workspace_ptrs"
    given = call.inputs(0) | call.outputs() | call.numbers() | {name: POINTERS}
    given |= {"world_size": 2, "world_rank": 0} | changed
    return OPS[call.op], given


@pytest.mark.parametrize("finalize", [False, True])
@pytest.mark.parametrize("of_ranks", [False, True])
def test_elements_of_experts_are_counted_in_32_bits(finalize, of_ranks):
    """Those of all ranks, and those of this rank's experts: each where the others are few."""
    tokens, hidden = (4096 if of_ranks else 4095), 1 << 16
    experts, permuted = (1, 1 << 14) if of_ranks else (9, 1 << 15)

    def far(*shape: int) -> TensorDesc:
        return TensorDesc(1 << 40, shape, "float16", device="cpu")

    shapes = {
        "allreduce_in": (permuted, hidden), "norm_weight": (hidden,), "rms_gamma": (hidden,),
        "expert_scale_factor": (tokens, 2),
        "moe_reduction_active_experts_token_input": (experts, tokens, hidden),
    }  # fmt: skip
    op, given = of_experts(finalize, world_size=8, world_rank=0)
    others = {
        "workspace": np.zeros(25, np.int64), "workspace_ptrs": np.zeros(25, np.int64),
        "expanded_idx_to_permuted_idx": np.zeros((tokens, 2), np.int32),
        "moe_reduction_scale_input": np.ones((experts, tokens), np.float32),
    }  # fmt: skip
    for name, value in given.items():
        if name in others:
            given[name] = others[name]
        elif isinstance(value, np.ndarray):
            given[name] = far(*shapes.get(name, (tokens, hidden)))
    argument = "allreduce_in" if finalize else "moe_reduction_scale_input"
    refused(op, given, "residual_in" if of_ranks else argument, "2147483647")


@pytest.mark.parametrize(
    ("finalize", "changed", "argument", "message"),
    [
        (False, {"world_size": 6}, "world_size", "2, 4, 8 or 16"),
        (True, {"workspace": POINTERS[:5]}, "workspace", r"3 \* world_size \+ 1"),
        (False, {"norm_out": None}, "norm_out", "None"),
        (True, {"norm_out": None}, "norm_out", "None"),
        (False, {"moe_reduction_scale_input": np.ones((2, 4), np.float32)},
         "moe_reduction_active_experts_token_input", "experts = 2"),
        (False, {"moe_reduction_scale_input": np.ones((3, 4), np.float16)},
         "moe_reduction_scale_input", "float32"),
        (True, {"expert_scale_factor": np.ones((4, 2), np.float32)}, "expert_scale_factor",
         "float16"),
        (True, {"expanded_idx_to_permuted_idx": np.zeros((4, 2), np.int64)},
         "expanded_idx_to_permuted_idx", "int32"),
    ],
)  # fmt: skip
def test_calls_of_experts_that_cannot_be_are_refused(finalize, changed, argument, message):
    refused(*of_experts(finalize, **changed), argument, message)


def test_experts_rows_are_of_whole_warps():
    call = MoeCall(0, False, 4, 128, 1)
    given = call.inputs(0) | call.outputs() | call.numbers()
    given |= {"world_size": 2, "world_rank": 0, "workspace_ptrs": POINTERS}
    refused(OPS[call.op], given, "rms_gamma", "a multiple of 256 elements, whole warps")


def test_releases_take_what_they_have(rng):
    """Up to 0.6.8 `finalize` has fewer arguments; the reference computes the same."""
    call = replace(MoeCall(int(rng.integers(2**32)), True, 5, 256, 2), has_all=False)
    op = OPS[call.op]
    try:
        op.select_release("0.6.3")
        assert [arg.name for arg in op.row.args][4:7] == [
            "norm_out", "residual_out", "launch_with_pdl",
        ]  # fmt: skip
        sizes = Sizes(2, 5, 256)
        memory = begun(sizes, "threads")

        def body(rank: int) -> dict[str, Any]:
            outs = call.outputs()
            pointers = sizes.pointers(memory.addresses(), rank)
            op(**call.inputs(rank), **outs, eps=1e-5, world_size=2, world_rank=rank,
               workspace=pointers)  # fmt: skip
            return outs

        for outs in ranks.run("threads", 2, body):
            call.judge(outs, 2)
    finally:
        op.forget()


@pytest.mark.parametrize(("dtype", "hidden"), [(np.float16, 4), (np.float32, 2)])
def test_rows_are_of_whole_vectors(dtype, hidden):
    x = np.ones((4, hidden), dtype)
    op, given = given_for(0, allreduce_in=x, allreduce_out=x.copy())
    refused(op, given, "hidden_size", "a multiple of 16 bytes")


def test_no_tokens_are_nothing_to_wait_for():
    op, given = given_for(0, allreduce_in=X[:0], allreduce_out=X[:0].copy())
    op(**given)
    op(**given | {"use_oneshot": False})
    refused(*given_for(0, world_size=1), "world_size", "2 or more|2, 4, 8 or 16")


def test_float32_is_a_workspace_of_its_own(rng):
    """-0 of float32 is no two of float16."""
    sizes = Sizes(2, 8, 64, 4)
    call = Call(int(rng.integers(2**32)), 0, 8, 64, 0)
    assert DTYPES[call.dtype] == np.float32
    judged("threads", sizes, [call, replace(call, seed=7), replace(call, use_oneshot=False)])
