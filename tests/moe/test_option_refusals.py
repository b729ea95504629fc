"""What options `cutlass_fused_moe` and `FusedMoe` refuse, and which modes."""

from __future__ import annotations

import numpy as np
import pytest

import fi_ffi

from tests.helpers.moe_layers import BF16, F8, F16, a, refused


@pytest.mark.parametrize(
    "flag",
    ["use_deepseek_fp8_block_scale", "use_w4_group_scaling", "use_packed_weights",
     "enable_alltoall", "enable_pdl"],
)  # fmt: skip
@pytest.mark.parametrize("value", [1, 0, None, "yes"])
def test_flags_are_bools(flag, value):
    refused(a("half"), flag, fi_ffi.ArgumentTypeError, **{flag: value})


@pytest.mark.parametrize("kind", ["tp", "ep"])
def test_ranks(kind):
    made = a("half")
    refused(made, f"{kind}_size", **{f"{kind}_size": 0})
    refused(made, f"{kind}_rank", **{f"{kind}_rank": 1})
    refused(made, f"{kind}_rank", **{f"{kind}_rank": -1})
    for name in (f"{kind}_size", f"{kind}_rank"):
        refused(made, name, **{name: 2**31})
        for value in (1.0, True, None, "1"):
            refused(made, name, fi_ffi.ArgumentTypeError, **{name: value})


def test_counters_that_would_wrap():
    made = a("half")
    refused(made, "token_selected_experts", ep_size=2**30)


def test_activations_by_name():
    made = a("half")
    refused(made, "activation_type", activation_type="swiglu")
    for value in (3, None, 1.0, object(), [], type("Listed", (), {"name": []})):
        refused(made, "activation_type", fi_ffi.ArgumentTypeError, activation_type=value)

    class Enum:
        name = "Swiglu"

    got = made.call(activation_type=Enum)
    assert made.worst(got) <= 1


@pytest.mark.parametrize("name", ["alpha", "beta", "limit"])
@pytest.mark.parametrize("activation", ["Geglu", "Relu2", "Gelu", "SwigluStep"])
def test_limits_of_activations_that_take_none(name, activation):
    made = a("half", activation=activation, limits=(name,))
    if (name, activation) == ("limit", "SwigluStep"):
        assert np.isfinite(made.call().astype(np.float32)).all()
        return
    refused(made, f"swiglu_{name}")


def test_block_scales_of_the_input():
    made = a("half")
    refused(made, "input_sf", input_sf=np.zeros(4, np.uint8))


@pytest.mark.parametrize("value", [(0,), (0, 0, 0), (1, 0), (0, 1), (-2, 0)])
def test_tactics_that_there_are_not(value):
    refused(a("half"), "profile_ids", profile_ids=value)


@pytest.mark.parametrize("value", [0, "00", (0, None), (0.0, 0), {0, 1}])
def test_tactics_that_are_no_pairs(value):
    refused(a("half"), "profile_ids", fi_ffi.ArgumentTypeError, profile_ids=value)


def test_the_output_dtype_is_the_outputs():
    made = a("half")
    made.call(output_dtype="float16")
    refused(made, "output", output_dtype="bfloat16")
    refused(made, "output_dtype", fi_ffi.ArgumentTypeError, output_dtype="half")
    bf16 = a("half")
    bf16.tensors["output"] = bf16.tensors["output"].astype(BF16)
    refused(bf16, "output")


@pytest.mark.parametrize(
    ("act", "weight", "flags"),
    [
        (F8, np.dtype(np.int64), {}),
        (F8, np.dtype(np.int64), {"use_mxfp8_act_scaling": True}),
        (BF16, np.dtype(np.int64), {}),
        (F8, F8, {"use_mxfp8_act_scaling": True}),
    ],
)
def test_what_needs_a_later_gpu(act, weight, flags):
    made = a("half")
    made.tensors["input"] = made.tensors["input"].astype(act)
    made.tensors["fc1_expert_weights"] = np.zeros((5, 48, 8), weight)
    with pytest.raises(fi_ffi.ArchitectureError, match="SM100"):
        made.call(**flags)


@pytest.mark.parametrize(
    ("act", "weight", "flags"),
    [
        ("bfloat16", "float8_e4m3fn", ()),  # scales are asked for that it is not given
        ("float16", "float8_e4m3fn", ("use_deepseek_fp8_block_scale",)),
        ("float8_e4m3fn", "float8_e4m3fn", ("use_deepseek_fp8_block_scale",)),
        ("bfloat16", "bfloat16", ("use_deepseek_fp8_block_scale",)),
        ("bfloat16", "uint8", ()),
        ("bfloat16", "uint8", ("use_packed_weights",)),
        ("bfloat16", "bfloat16", ("use_packed_weights",)),
        ("float8_e4m3fn", "uint8", ("use_w4_group_scaling",)),
        ("float16", "bfloat16", ()),
        ("float32", "float32", ()),
        ("float8_e5m2", "float8_e5m2", ()),
        ("int8", "int8", ()),
    ],
)
def test_modes_that_there_are_not(act, weight, flags):
    given = dict.fromkeys(flags, True)
    with pytest.raises(fi_ffi.ArgumentError) as caught:
        fi_ffi.FusedMoe(act, weight, "bfloat16", device="cpu", **given)
    assert caught.value.argument in ("activation_dtype", "weight_dtype")


def test_what_the_class_is_made_with():
    for wrong in ("float8_e4m3fn", "float32", "float16"):
        with pytest.raises(fi_ffi.ArgumentError) as caught:
            fi_ffi.FusedMoe("bfloat16", output_dtype=wrong)
        assert caught.value.argument == "output_dtype"
    with pytest.raises(fi_ffi.ArgumentError, match="output_dtype"):
        fi_ffi.FusedMoe("float8_e4m3fn")
    for name in ("activation_dtype", "weight_dtype", "output_dtype"):
        with pytest.raises(fi_ffi.ArgumentTypeError, match=name):
            fi_ffi.FusedMoe(**{"activation_dtype": "float16", name: "no dtype"})
    with pytest.raises(fi_ffi.ArgumentTypeError, match="device"):
        fi_ffi.FusedMoe("float16", device="gpu")
    with pytest.raises(fi_ffi.ArgumentError, match="device"):
        fi_ffi.FusedMoe("float16", device="cuda_host")
    with pytest.raises(fi_ffi.ArgumentTypeError, match="use_packed_weights"):
        fi_ffi.FusedMoe("float16", use_packed_weights=1)


def test_what_profiles_refuse():
    made = a("half")
    given = {name: made.tensors[name] for name in ("input", "fc1_expert_weights",
                                                   "fc2_expert_weights")}  # fmt: skip
    moe = fi_ffi.FusedMoe("float16", device="cpu")
    moe.profile(**given, top_k=2)
    for name, value, kind in (
        ("top_k", 0, fi_ffi.ArgumentError), ("top_k", 6, fi_ffi.ArgumentError),
        ("top_k", 2.0, fi_ffi.ArgumentTypeError), ("repeats", 0, fi_ffi.ArgumentError),
        ("input", made.tensors["input"][:0], fi_ffi.ArgumentError),
        ("input", made.tensors["input"][:, :-1].copy(), fi_ffi.ArgumentError),
        ("fc2_expert_weights", None, fi_ffi.ArgumentTypeError),
        ("fc1_expert_biases", np.zeros((5, 48), F16), fi_ffi.ArgumentError),
        ("tp_rank", 1, fi_ffi.ArgumentError), ("ep_size", 2**30, fi_ffi.ArgumentError),
        ("input", fi_ffi.TensorDesc(4096, made.tensors["input"].shape, F16), fi_ffi.ArgumentError),
    ):  # fmt: skip
        with pytest.raises(kind) as caught:
            moe.profile(**{**given, "top_k": 2, name: value})
        assert caught.value.op == "FusedMoe.profile"


def test_what_workspace_sizes_refuse():
    moe = fi_ffi.FusedMoe("float16", device="cpu")
    for i in range(5):
        sizes = [4, 64, 64, 8, 2]
        sizes[i] = 0
        with pytest.raises(fi_ffi.ArgumentError):
            moe.workspace_size(*sizes)
    with pytest.raises(fi_ffi.ArgumentError, match="ep_rank"):
        moe.workspace_size(4, 64, 64, 8, 2, ep_rank=1)


def test_a_stream_is_asked_for_on_a_gpu():
    """Before kernels are looked for."""
    made = a("half")
    for name, array in made.tensors.items():
        desc = fi_ffi.as_desc(array)
        made.tensors[name] = fi_ffi.TensorDesc(desc.ptr, desc.shape, desc.dtype)
    refused(made, "stream")
    refused(made, "stream", fi_ffi.ArgumentTypeError, stream="s")
