"""`cutlass_fused_moe` on the CPU against float64, in every mode."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

import fi_ffi

from tests.helpers.moe_bounds import moe, worst
from tests.helpers.moe_layers import (
    BF16,
    BLACKWELL,
    EVERY,
    F16,
    F32,
    GATED,
    MODES,
    PLAIN,
    SHARED,
    U8,
    make,
    of_ranks,
    of_tensor_ranks,
    part,
)

IDS = [f"{mode}-{act.name}-{out.name}" for mode, act, out in EVERY]
SMALL = {"hidden": 128, "inter": 128, "experts": 3}
each_mode = pytest.mark.parametrize(("mode", "act", "out"), EVERY, ids=IDS)
# Of Blackwell's one of each: what does not depend on the dtypes.
FEWER = [*MODES, *BLACKWELL[::2]]
each_kind = pytest.mark.parametrize(
    ("mode", "act", "out"), FEWER, ids=[f"{mode}-{act.name}-{out.name}" for mode, act, out in FEWER]
)


@each_kind
@pytest.mark.parametrize("activation", [*GATED, *PLAIN])
def test_activations(mode, act, out, activation, rng):
    for biases in (False, True):
        made = make(rng, mode, act, out, activation=activation, biases=biases, **SMALL)
        assert made.worst(made.call()) <= 1


@pytest.mark.parametrize("given", [{"activation": "GegluTanh"},  # of later releases' kernels
                                   {"activation": "SwigluStep", "limits": ("limit",)}])  # fmt: skip
def test_activations_of_16_bits_alone(given, rng):
    made = make(rng, "half", F16, F16, **given)
    assert made.worst(made.call()) <= 1


SHAPES = {
    **{f"{n} tokens": {"tokens": n, "hidden": 128, "inter": 128} for n in (0, 1, 2, 65, 130)},
    **{f"{n} experts of a token": {"top_k": n, "experts": 9, "hidden": 128, "inter": 128}
       for n in range(1, 9)},
    # int4's scales lie together in fours, twos or ones, as the columns are multiples of.
    **{f"{h} by {i}": {"hidden": h, "inter": i, "tokens": 3, "experts": 2}
       for h, i in ((128, 256), (256, 128), (512, 640), (384, 1024))},
    "one expert has all tokens": {"tokens": 9, "top_k": 1, "chosen": np.full((9, 1), 3, np.int32)},
    "a single expert": {"experts": 1, "top_k": 1},
    "no final scales": {"final": False, "top_k": 3},
}  # fmt: skip


@each_kind
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(mode, act, out, shape, rng):
    made = make(rng, mode, act, out, **SHAPES[shape])
    assert made.worst(made.call()) <= 1


@pytest.mark.parametrize("sizes", [(8, 8), (24, 40), (1032, 8)])
def test_small_and_odd_sizes_of_16_bits(sizes, rng):
    made = make(rng, "half", BF16, BF16, hidden=sizes[0], inter=sizes[1])
    assert made.worst(made.call()) <= 1


def test_experts_that_nobody_has_add_nothing(rng):
    chosen = np.array([[0, -1], [5, 2], [-1, -1], [2**31 - 1, 5]], np.int32)
    made = make(rng, "half", F16, F16, tokens=4, experts=5, chosen=chosen)
    got = made.call()
    assert made.worst(got) <= 1
    assert not got[2].any() and not got[3].any()


@pytest.mark.parametrize("activation", ["Swiglu", "SwigluBias"])
@pytest.mark.parametrize(
    "limits", [("alpha",), ("beta",), ("limit",), ("alpha", "beta", "limit"), ("beta", "limit")]
)
@pytest.mark.parametrize(("mode", "act", "out"), EVERY[1::3], ids=IDS[1::3])
def test_alpha_beta_and_limit(mode, act, out, limits, activation, rng):
    made = make(rng, mode, act, out, activation=activation, limits=limits)
    assert made.worst(made.call()) <= 1
    without = make(rng, mode, act, out, activation=activation)
    layer = part(made, layer={"limits": without.layer.limits})
    assert layer.worst(made.call()) > 1, "they changed nothing"


@pytest.mark.parametrize("out", [F16, BF16])
def test_one_quantisation_scale_for_all_experts(out, rng):
    made = make(rng, "fp8", np.dtype(ml_dtypes.float8_e4m3fn), out, per_expert_quant=False)
    assert made.scales[1].ndim == 0
    assert made.worst(made.call()) <= 1


@pytest.mark.parametrize("mode", ["nvfp4", "nvfp4_packed", "fp8_mxfp4"])
def test_one_scale_of_all_experts_activations(mode, rng):
    act, out = next((act, out) for one, act, out in BLACKWELL if one == mode)
    made = make(rng, mode, act, out, per_expert_quant=False)
    assert [scale.ndim for scale in made.scales].count(0) == len(SHARED[mode])
    assert made.worst(made.call()) <= 1


@pytest.mark.parametrize("mode", ["nvfp4_packed", "mxfp8", "mxfp8_mxfp4"])
@pytest.mark.parametrize("tokens", [5, 130])
def test_orders_and_shapes_of_the_scales_of_activations(mode, tokens, rng):
    dtype = ml_dtypes.float8_e4m3fn if mode == "nvfp4_packed" else ml_dtypes.float8_e8m0fnu
    act, out = next((act, out) for one, act, out in BLACKWELL if one == mode)
    made = make(rng, mode, act, out, tokens=tokens, hidden=384)
    tiles, expected = made.tensors["input_sf"], made.call().tobytes()
    columns = 384 // (16 if mode == "nvfp4_packed" else 32)
    padded = -(-tokens // 128) * 128
    assert tiles.size == padded * columns
    row, column = np.arange(tokens)[:, None], np.arange(columns)
    tile = (row // 128 * (columns // 4) + column // 4) * 512
    rows = tiles[tile + row % 32 * 16 + row % 128 // 32 * 4 + column % 4]
    more = np.concatenate([tiles, tiles[:512]])
    for given, is_swizzled in (
        (tiles.view(dtype), True), (tiles.reshape(padded, columns), True), (more, True),
        (rows, False), (rows.reshape(-1).view(dtype), False),
    ):  # fmt: skip
        made.tensors["input_sf"] = np.ascontiguousarray(given)
        assert made.call(swizzled_input_sf=is_swizzled).tobytes() == expected
    if tokens > 128:  # enough of them, and in another order
        made.tensors["input_sf"] = tiles
        assert made.worst(made.call(swizzled_input_sf=False)) > 1


def test_packed_activations_are_bytes_or_int64(rng):
    made = make(rng, "nvfp4_packed", U8, F16, hidden=160)
    expected = made.call().tobytes()
    made.tensors["input"] = made.tensors["input"].view(np.int64)
    assert made.call().tobytes() == expected


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_of_experts_sum_to_the_whole(ranks, rng):
    made = make(rng, "half", F16, F16, experts=8, top_k=3, tokens=33)
    total = np.zeros(made.tensors["output"].shape)
    for rank in of_ranks(made, ranks):
        got = rank.call()
        assert rank.worst(got) <= 1
        total += got
        away = ~np.isin(made.layer.experts // (8 // ranks), rank.more["ep_rank"]).any(axis=1)
        assert not got[away].any(), "tokens of other ranks"
    whole = np.zeros(total.shape, F16) + total.astype(F16)
    assert worst(whole, made.layer) <= 1.5  # each rank rounds once more


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_of_tensors_sum_to_the_whole(ranks, rng):
    made = make(rng, "half", F16, F16, hidden=64, inter=128, biases=True)
    total = np.zeros(made.tensors["output"].shape)
    for one in of_tensor_ranks(made, ranks):
        got = one.call()
        assert one.worst(got) <= 1
        total += got
    assert worst(total, made.layer) <= 1.5


@each_mode
def test_the_class_does_the_same(mode, act, out, rng):
    made = make(rng, mode, act, out)
    weight = made.tensors["fc1_expert_weights"].dtype
    flags = {name: made.more.pop(name) for name in [*made.more] if name.startswith("use_")}
    moe_ = fi_ffi.FusedMoe(act, weight, out, device="cpu", **flags)
    got = made.call_of(moe_).copy()
    made.more |= flags
    assert got.tobytes() == made.call().tobytes()
    assert moe_.tactics == (1, 1) and moe_.workspace_size(4, 256, 256, 8, 2) == 0
    assert moe_.mode.name == mode and mode in repr(moe_)


@pytest.mark.parametrize("profile_ids", [None, (0, 0), (-1, 0), [0, -1]])
def test_tactics_on_the_cpu(profile_ids, rng):
    made = make(rng, "half", F16, F16)
    assert made.worst(made.call(profile_ids=profile_ids)) <= 1


def test_profiles_on_the_cpu_choose_nothing(rng):
    made = make(rng, "half", F16, F16)
    moe_ = fi_ffi.FusedMoe(F16, device="cpu")
    found = moe_.profile(
        made.tensors["input"], made.tensors["fc1_expert_weights"],
        made.tensors["fc2_expert_weights"], top_k=2,
    )  # fmt: skip
    assert found.profile_ids == (-1, -1)
    assert made.worst(made.call_of(moe_, profile_ids=found.profile_ids)) <= 1


@pytest.mark.parametrize("what", ["input", "fc1_expert_weights", "token_final_scales"])
@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_what_is_no_number_reaches_its_own_tokens_only(what, number, rng):
    made = make(rng, "half", BF16, BF16, tokens=12, top_k=2, experts=6)
    array = made.tensors[what] = made.tensors[what].copy()
    array.reshape(len(array), -1)[3] = number
    got = made.call()
    hit = np.zeros(12, bool)
    hit[3] = True
    if what == "fc1_expert_weights":
        hit = (made.layer.experts == 3).any(axis=1)
    assert np.isfinite(got[~hit].astype(np.float32)).all()
    assert not np.isfinite(got[hit].astype(np.float32)).all(axis=1).any()


def test_what_is_too_large_for_fp8_becomes_its_largest(rng):
    made = make(rng, "fp8", np.dtype(ml_dtypes.float8_e4m3fn), F16)
    made.scales[1] = (made.scales[1] * np.float32(1e6)).astype(F32)
    made.scales[2] = (made.scales[2] * np.float32(1e-4)).astype(F32)
    made.layer.scales |= {
        "quant": made.scales[1].astype(float),
        "fc2": made.scales[2].astype(float),
    }
    got = made.call()
    assert np.isfinite(got).all() and made.worst(got) <= 1


# What must not go unseen: everything 5 % off, one expert's share left out, the halves of the
# first product exchanged.
@each_mode
def test_the_judge_sees_what_is_wrong(mode, act, out, rng):
    made = make(rng, mode, act, out, tokens=40)
    got = made.call()
    value, allowed = moe(made.layer)
    assert (np.abs(1.05 * value - value) / allowed).max() > 1
    final = made.layer.final.copy()
    final.flat[final.argmax()] = 0  # the largest of all
    assert part(made, layer={"final": final}).worst(got) > 3
    halves = np.roll(made.layer.w1, made.layer.w1.shape[1] // 2, axis=1)
    assert part(made, layer={"w1": halves}).worst(got) > 3


def test_inputs_are_left_alone(rng):
    for mode, act, out in EVERY:
        made = make(rng, mode, act, out, biases=True)
        names = [name for name in made.tensors if name != "output"]
        before = {name: made.tensors[name].tobytes() for name in names}
        made.call()
        assert before == {name: made.tensors[name].tobytes() for name in names}


def test_the_reference_numbers_activations_alike():
    from fi_ffi.ops.moe import activations, interface
    from fi_ffi.reference import moe

    assert moe.ACTIVATIONS == activations.ACTIVATIONS
    assert moe.KERNELS[interface.MODULE].keys() >= {interface.INTERLEAVE.signature.name}
