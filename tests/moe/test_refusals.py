"""What `cutlass_fused_moe` and `FusedMoe` refuse: by whose name, before anything is written."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

import fi_ffi

from tests.helpers import moe_layers
from tests.helpers.moe_layers import F16, F32, a, refused

F64 = np.dtype(np.float64)


def other_dtype(array: np.ndarray) -> np.ndarray:
    return np.zeros(array.shape, F64)


TENSORS = (
    "output", "token_selected_experts", "token_final_scales", "fc2_expert_weights",
    "fc1_expert_biases", "fc2_expert_biases", "swiglu_alpha", "swiglu_beta", "swiglu_limit",
)  # fmt: skip


def elsewhere(array: np.ndarray) -> fi_ffi.TensorDesc:
    return fi_ffi.TensorDesc(4096, array.shape, array.dtype, device="cuda:0")


def whole(mode="half"):
    return a(mode, biases=True, limits=("alpha", "beta", "limit"))


@pytest.mark.parametrize("name", TENSORS)
def test_dtypes(name):
    made = whole()
    made.tensors[name] = other_dtype(made.tensors[name])
    refused(made, name)


@pytest.mark.parametrize("name", ["input", "fc1_expert_weights"])
@pytest.mark.parametrize("dtype", [F64, F32, np.dtype(np.int8), np.dtype(ml_dtypes.float8_e5m2)])
def test_dtypes_that_tell_the_mode(name, dtype):
    made = whole()
    made.tensors[name] = np.zeros(made.tensors[name].shape, dtype)
    refused(made, name)


@pytest.mark.parametrize("name", ["input", "fc1_expert_weights", *TENSORS])
def test_ranks_and_shapes(name):
    for change in (lambda x: x[None], lambda x: np.concatenate([x, x[-1:]]), lambda x: x[..., :-1]):
        made = whole()
        made.tensors[name] = np.ascontiguousarray(change(made.tensors[name]))
        with pytest.raises(fi_ffi.ArgumentError) as caught:
            made.call()
        # Of these the sizes are that others are compared with.
        first = {"output", "fc1_expert_weights", "token_selected_experts"}
        assert caught.value.argument == name or name in first, str(caught.value)


@pytest.mark.parametrize("name", ["input", "fc1_expert_weights", *TENSORS])
def test_strides(name):
    made = whole()
    array = made.tensors[name]
    wide = np.zeros((*array.shape[:-1], 2 * array.shape[-1]), array.dtype)
    made.tensors[name] = wide[..., ::2]
    assert "contiguous" in str(refused(made, name).expected)


@pytest.mark.parametrize("name", ["input", "fc1_expert_weights", *TENSORS])
def test_addresses(name):
    made = whole()
    desc = fi_ffi.as_desc(made.tensors[name])
    for address in (desc.ptr + 1, 0):
        made.tensors[name] = desc.at(address)
        assert "multiple of" in str(refused(made, name).expected)


@pytest.mark.parametrize("name", ["input", "fc1_expert_weights", *TENSORS])
def test_devices(name):
    made = whole()
    made.tensors[name] = elsewhere(made.tensors[name])
    if name == "input":  # the others are compared with it
        for other, array in made.tensors.items():
            if other != "input":
                desc = fi_ffi.as_desc(array)
                made.tensors[other] = desc
        made.tensors["output"] = fi_ffi.as_desc(made.tensors["output"])
        with pytest.raises(fi_ffi.ArgumentError) as caught:
            made.call()
        assert caught.value.argument != "input"
    else:  # the first is compared with the second
        refused(made, "input" if name == "output" else name)


@pytest.mark.parametrize("name", ["output", "input", "token_selected_experts",
                                  "fc1_expert_weights", "fc2_expert_weights"])  # fmt: skip
@pytest.mark.parametrize("value", [None, 3, "x", object()])
def test_no_tensors(name, value):
    made = whole()
    made.tensors[name] = value
    refused(made, name, fi_ffi.ArgumentTypeError)


@pytest.mark.parametrize("name", ["token_final_scales", "swiglu_beta", "fc1_expert_biases"])
def test_no_tensors_where_there_may_be_none(name):
    made = whole()
    made.tensors[name] = 3
    refused(made, name, fi_ffi.ArgumentTypeError)


@pytest.mark.parametrize("name", ["fc1_expert_biases", "fc2_expert_biases"])
def test_biases_go_together(name):
    made = whole()
    del made.tensors[name]
    assert "together" in str(refused(made, name).expected)


def test_the_output_is_memory_apart():
    for name in ("input", "fc2_expert_weights", "fc1_expert_biases"):
        made = whole()
        size = max(made.tensors["output"].size, made.tensors[name].size)
        memory = np.zeros(size, F16)
        for one in ("output", name):
            array = made.tensors[one]
            made.tensors[one] = memory[: array.size].reshape(array.shape)
        assert f"`{name}`" in str(refused(made, "output").got)


def test_the_output_can_be_written():
    made = whole()
    made.tensors["output"].setflags(write=False)
    assert "read-only" in str(refused(made, "output").got)


def test_a_token_has_an_expert_once():
    made = a("half", tokens=4, experts=5, chosen=np.array([[0, 1], [3, 3], [2, 1], [4, 0]], "i4"))
    assert "token 1" in str(refused(made, "token_selected_experts").got)
    away = a("half", tokens=2, experts=3, chosen=np.array([[-1, -1], [7, 7]], "i4"))
    assert not away.call().any()


def rescaled(made) -> None:
    """Give scales the shapes that the weights ask for, as far as there is one."""
    rows, hidden = (made.tensors["fc1_expert_weights"].shape[1], made.tensors["input"].shape[1])
    sizes = {"hidden": hidden, "inter": rows // 2, "rows": rows, "hidden_rows": hidden}
    axes = {
        "fp8_block_scale": [("rows", 128, "hidden", 128), ("hidden", 128, "inter", 128)],
        "mxfp4": [("hidden", 128, "rows", 0.25), ("inter", 128, "hidden", 1)],
    }.get(made.layer.mode, [])
    for i, (one, n, other, m) in enumerate(axes):
        shape = len(made.scales[i]), int(sizes[one] // n), int(sizes[other] // m)
        made.scales[i] = np.zeros(shape, made.scales[i].dtype)
    if made.layer.mode == "int4":
        for i, size in ((2, hidden), (3, rows // 2)):
            made.scales[i] = np.zeros(size, made.scales[i].dtype)


@pytest.mark.parametrize("mode", ["half", "fp8", "fp8_block_scale", "mxfp4", "int4"])
def test_sizes_are_multiples(mode):
    step = {"half": 8, "fp8": 16}.get(mode, 128)
    made = a(mode)
    pack = 2 if mode in ("mxfp4", "int4") else 1
    fc1, fc2 = made.tensors["fc1_expert_weights"], made.tensors["fc2_expert_weights"]
    half = step // 2
    # Half of a step less: of the intermediate size, then of the hidden one.
    made.tensors["fc2_expert_weights"] = np.ascontiguousarray(fc2[..., : -(half // pack)])
    made.tensors["fc1_expert_weights"] = np.ascontiguousarray(fc1[:, : -2 * half])
    rescaled(made)
    assert "inter_size" in str(refused(made, "fc1_expert_weights").expected)
    made.tensors["fc2_expert_weights"] = np.ascontiguousarray(fc2[:, :-half])
    made.tensors["fc1_expert_weights"] = np.ascontiguousarray(fc1[..., : -(half // pack)])
    for name in ("input", "output"):
        made.tensors[name] = np.ascontiguousarray(made.tensors[name][:, :-half])
    rescaled(made)
    assert "hidden_size" in str(refused(made, "output").expected)


@pytest.mark.parametrize(("mode", "size"), [("mxfp4", 128), ("int4", 128), ("int4", 256),
                         ("int4", 512)])  # fmt: skip
@pytest.mark.parametrize("of", ["hidden", "inter"])
def test_one_step_of_4_bit_weights(mode, size, of, monkeypatch):
    """Of the sizes that are multiples, those that the kernels get wrong, and no other."""
    monkeypatch.setattr(moe_layers, "TOO_SMALL", {})
    made = a(mode, **{"hidden": 1024, "inter": 1024, of: size})
    error = refused(made, "fc2_expert_weights")
    assert f"{of}_size = {size}" in error.got and "one step" in error.expected
    a(mode, **{"hidden": 1024, "inter": 1024, of: {128: 384, 256: 768, 512: 1024}[size]}).call()


def test_mxfp4_is_of_bfloat16():
    made = a("mxfp4")
    for name in ("input", "output"):
        made.tensors[name] = np.zeros(made.tensors[name].shape, np.float16)
    assert "float16 activations" in str(refused(made, "fc1_expert_weights").got)


def test_without_a_gate_the_first_weights_are_half():
    made = a("half")
    error = refused(made, "fc2_expert_weights", activation_type="Relu2")
    assert "inter_size = 48" in error.expected
    plain = a("half", activation="Relu2")
    refused(plain, "fc2_expert_weights", activation_type="Swiglu")


def test_no_experts():
    made = a("half", experts=0, top_k=1, chosen=np.zeros((7, 1), "i4"))
    assert "experts of at least 1" in refused(made, "fc1_expert_weights").expected


def test_no_expert_of_a_token():
    made = a("half", chosen=np.zeros((7, 0), "i4"), experts=2)
    refused(made, "token_selected_experts")


def test_more_experts_of_a_token_than_there_are():
    made = a("half", chosen=np.zeros((7, 3), "i4"), experts=2)
    refused(made, "token_selected_experts")
    made.more["ep_size"] = 2
    made.tensors["token_selected_experts"] = np.tile(np.array([2, 3, 1], "i4"), (7, 1))
    made.call()


@pytest.mark.parametrize("mode", ["fp8", "fp8_block_scale", "mxfp4", "int4"])
def test_scales_are_counted(mode):
    made = a(mode)
    scales = made.scales
    for wrong in (scales[:-1], [*scales, scales[-1]], []):
        made.scales = wrong
        expected = str(refused(made, "quant_scales").expected)
        assert str(len(scales)) in expected
    made = a("half")
    made.scales = scales
    refused(made, "quant_scales")


@pytest.mark.parametrize("mode", ["fp8", "fp8_block_scale", "mxfp4", "int4"])
def test_each_scale(mode):
    count = len(a(mode).scales)
    for i in range(count):
        for change in ("dtype", "shape", "strides", "address", "device", "kind"):
            made = a(mode)
            scale = made.scales[i]
            if change in ("strides", "address") and not scale.ndim | (change == "address"):
                continue
            if not scale.size and change in ("address",):
                continue
            made.scales[i] = _changed(scale, change)
            kind = fi_ffi.ArgumentTypeError if change == "kind" else fi_ffi.ArgumentError
            with pytest.raises(kind) as caught:
                made.call()
            assert caught.value.argument.startswith(f"quant_scales[{i}]"), str(caught.value)


def _changed(scale: np.ndarray, change: str):
    desc = fi_ffi.as_desc(scale)
    if change == "dtype":
        return np.zeros(scale.shape, F64)
    if change == "shape":
        return np.zeros((*scale.shape, 3), scale.dtype)
    if change == "strides":
        wide = np.zeros((*scale.shape[:-1], 2 * scale.shape[-1]), scale.dtype)
        return wide[..., ::2] if scale.size else np.zeros((1,), scale.dtype)
    if change == "address":
        return desc.at(desc.ptr + 1)
    if change == "device":
        return elsewhere(scale)
    return "scale"


@pytest.mark.parametrize("scales", [np.zeros(3, F32), "ab", 3, {}])
def test_scales_are_a_list(scales):
    made = a("half")
    with pytest.raises(fi_ffi.ArgumentTypeError, match="quant_scales"):
        fi_ffi.cutlass_fused_moe(**made.tensors, quant_scales=scales)


def test_int4_has_no_zero_points():
    made = a("int4")
    made.scales[4] = np.zeros(made.scales[0].shape, F16)
    refused(made, "quant_scales[4] (fc1_weight_zeros)")
