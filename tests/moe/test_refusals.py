"""What `cutlass_fused_moe` and `FusedMoe` refuse: by whose name, before anything is written."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

import fi_ffi
from fi_ffi.ops.call import compiled
from fi_ffi.ops.moe import rows

from tests.helpers import moe_layers
from tests.helpers.moe_layers import BF16, F16, F32, a, refused

F64 = np.dtype(np.float64)
QUANTISED = ("fp8", "fp8_block_scale", "mxfp4", "int4")
BLOCKED = ("nvfp4", "nvfp4_packed", "fp8_mxfp4", "mxfp8_mxfp4", "mxfp8")
WITH_SF = ("nvfp4_packed", "mxfp8_mxfp4", "mxfp8")
TENSORS = (
    "output", "input", "token_selected_experts", "token_final_scales", "fc1_expert_weights",
    "fc2_expert_weights", "fc1_expert_biases", "fc2_expert_biases", "swiglu_alpha", "swiglu_beta",
    "swiglu_limit",
)  # fmt: skip
# Of these the sizes are that others are compared with.
FIRST = {"output", "fc1_expert_weights", "token_selected_experts", "input"}


def whole() -> moe_layers.Made:
    return a("half", biases=True, limits=("alpha", "beta", "limit"))


def elsewhere(array: np.ndarray) -> fi_ffi.TensorDesc:
    return fi_ffi.TensorDesc(4096, array.shape, array.dtype, device="cuda:0")


def strided(array: np.ndarray) -> np.ndarray:
    wide = np.zeros((*array.shape[:-1], 2 * array.shape[-1]), array.dtype)
    return wide[..., ::2] if array.size else np.zeros(1, array.dtype)


# What is done to a tensor, and what is expected of it then.
CHANGES: dict[str, tuple[Any, str]] = {
    "dtype": (lambda x: np.zeros(x.shape, F64), ""),
    "rank": (lambda x: np.zeros((*x.shape, 3), x.dtype), ""),
    "rows": (lambda x: np.concatenate([x, x[-1:]]), ""),
    "columns": (lambda x: np.ascontiguousarray(x[..., :-1]), ""),
    "strides": (strided, "contiguous"),
    "odd": (lambda x: fi_ffi.as_desc(x).at(x.ctypes.data + 1), "multiple of"),
    "null": (lambda x: fi_ffi.as_desc(x).at(0), "multiple of"),
    "device": (elsewhere, ""),
    "type": (lambda x: 3, ""),
    "text": (lambda x: "x", ""),
}


@pytest.mark.parametrize("change", CHANGES)
def test_each_tensor(change):
    function, expected = CHANGES[change]
    kind = fi_ffi.ArgumentTypeError if change in ("type", "text") else fi_ffi.ArgumentError
    for name in TENSORS:
        made = whole()
        made.tensors[name] = function(made.tensors[name])
        with pytest.raises(kind) as caught:
            made.call()
        error, may = caught.value, {name}
        if change in ("rows", "columns") and name in FIRST:
            may = {*TENSORS}
        if change == "device":  # `output` is compared with `input`, which says where the call is
            may = {"output": {"input"}, "input": {"stream"}}.get(name, may)
        assert error.op == "cutlass_fused_moe" and error.argument in may, str(error)
        assert expected in str(error.expected)


def test_tensors_that_there_must_be():
    for name in ("output", "input", "token_selected_experts", "fc1_expert_weights",
                 "fc2_expert_weights"):  # fmt: skip
        made = whole()
        made.tensors[name] = None
        refused(made, name, fi_ffi.ArgumentTypeError)


@pytest.mark.parametrize("name", ["input", "fc1_expert_weights"])
def test_dtypes_that_tell_the_mode(name):
    for dtype in (F64, F32, np.dtype(np.int8), np.dtype(ml_dtypes.float8_e5m2)):
        made = whole()
        made.tensors[name] = np.zeros(made.tensors[name].shape, dtype)
        refused(made, name)


def test_biases_go_together():
    for name in ("fc1_expert_biases", "fc2_expert_biases"):
        made = whole()
        del made.tensors[name]
        assert "together" in str(refused(made, name).expected)


def test_the_output_is_memory_apart_that_can_be_written():
    for name in ("input", "fc2_expert_weights", "fc1_expert_biases"):
        made = whole()
        size = max(made.tensors["output"].size, made.tensors[name].size)
        memory = np.zeros(size, F16)
        for one in ("output", name):
            array = made.tensors[one]
            made.tensors[one] = memory[: array.size].reshape(array.shape)
        assert f"`{name}`" in str(refused(made, "output").got)
    made = whole()
    made.tensors["output"].setflags(write=False)
    assert "read-only" in str(refused(made, "output").got)


# Sizes and experts.


def test_a_token_has_an_expert_once():
    made = a("half", tokens=4, experts=5, chosen=np.array([[0, 1], [3, 3], [2, 1], [4, 0]], "i4"))
    assert "token 1" in str(refused(made, "token_selected_experts").got)
    away = a("half", tokens=2, experts=3, chosen=np.array([[-1, -1], [7, 7]], "i4"))
    assert not away.call().any()


def test_how_many_experts():
    made = a("half", experts=0, top_k=1, chosen=np.zeros((7, 1), "i4"))
    assert "experts of at least 1" in refused(made, "fc1_expert_weights").expected
    refused(a("half", chosen=np.zeros((7, 0), "i4"), experts=2), "token_selected_experts")
    made = a("half", chosen=np.zeros((7, 3), "i4"), experts=2)
    refused(made, "token_selected_experts")
    made.more["ep_size"] = 2
    made.tensors["token_selected_experts"] = np.tile(np.array([2, 3, 1], "i4"), (7, 1))
    made.call()
    for ranks in (2**27, 2**30):  # counters would wrap: of all tokens, of one token
        refused(a("half"), "token_selected_experts", ep_size=ranks)


@pytest.mark.parametrize("mode", ["half", *QUANTISED])
def test_sizes_are_multiples(mode):
    """Half of a step less: of the intermediate size, then of the hidden one."""
    half = moe_layers.MULTIPLE[mode] // 2
    pack = 2 if mode in ("mxfp4", "int4") else 1

    def cut(*places: tuple[str, Any], scales: Any, refusal: str, told: str) -> None:
        made = a(mode)
        for name, at in places:
            made.tensors[name] = np.ascontiguousarray(made.tensors[name][at])
        hidden, rows = made.tensors["input"].shape[1], made.tensors["fc1_expert_weights"].shape[1]
        for i, shape in scales(rows, hidden).get(mode, {}).items():
            made.scales[i] = np.zeros(shape, made.scales[i].dtype)
        assert told in str(refused(made, refusal).expected)

    def scales(rows: int, hidden: int) -> dict[str, dict[int, tuple[int, ...]]]:
        """Those of the shapes that the weights ask for, as far as there are any."""
        inter, experts = rows // 2, 5
        blocks = {
            0: (experts, rows // 128, hidden // 128),
            1: (experts, hidden // 128, inter // 128),
        }
        groups = {0: (experts, hidden // 128, 4 * rows), 1: (experts, inter // 128, hidden)}
        columns = {2: (hidden,), 3: (inter,)}
        return {"fp8_block_scale": blocks, "mxfp4": groups, "int4": columns}

    short, both = np.s_[..., : -(half // pack)], np.s_[:, :-half]
    cut(("fc2_expert_weights", short), ("fc1_expert_weights", np.s_[:, : -2 * half]), scales=scales,
        refusal="fc1_expert_weights", told="inter_size")  # fmt: skip
    cut(("fc2_expert_weights", both), ("fc1_expert_weights", short), ("input", both),
        ("output", both), scales=scales, refusal="output", told="hidden_size")  # fmt: skip


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


@pytest.mark.parametrize("of", ["hidden", "inter"])
def test_one_step_of_few_tokens(of, monkeypatch):
    """Where the switch is on: as long as no block can have two tiles."""
    monkeypatch.setattr(moe_layers, "TOO_SMALL", {})
    monkeypatch.setattr(rows, "ONE_STEP_OF_FEW_TOKENS", True)
    # On the CPU there are as many multiprocessors as a call could need.
    monkeypatch.setattr(compiled.Variant, "multiprocessors", 132)
    sizes = {"hidden": 256, "inter": 256, "experts": 5} | {of: 128}
    # 66 tiles at most: of 64 rows 4 or 8, and of each 5 and one for every 16 of two for a token.
    most = 95 if of == "inter" else 31
    rows.row_of.cache_clear()
    try:
        for tokens, is_refused in ((1, False), (most, False), (most + 1, True)):
            made = a("mxfp4", tokens=tokens, **sizes)
            tensors = made.tensors
            layer = fi_ffi.FusedMoe(BF16, "uint8", device="cpu", use_w4_group_scaling=True)
            flags = {name: made.more[name] for name in made.more if not name.startswith("use_")}
            if is_refused:
                with pytest.raises(fi_ffi.ArgumentError, match="or fewer tokens"):
                    layer(**tensors, quant_scales=made.scales, **flags)
            else:
                layer(**tensors, quant_scales=made.scales, **flags)
                assert made.worst(tensors["output"]) <= 1
    finally:
        rows.row_of.cache_clear()


def test_without_a_gate_the_first_weights_are_half():
    error = refused(a("half"), "fc2_expert_weights", activation_type="Relu2")
    assert "inter_size = 48" in error.expected
    refused(a("half", activation="Relu2"), "fc2_expert_weights", activation_type="Swiglu")


# Scales.


@pytest.mark.parametrize("mode", [*QUANTISED, *BLOCKED])
def test_scales_are_counted(mode):
    made = a(mode)
    scales = made.scales
    for wrong in (scales[:-1], [*scales, scales[-1]], []):
        made.scales = wrong
        assert str(len(scales)) in str(refused(made, "quant_scales").expected)
    made = a("half")
    made.scales = scales
    refused(made, "quant_scales")


@pytest.mark.parametrize("mode", [*QUANTISED, *BLOCKED])
@pytest.mark.parametrize("change", ["dtype", "rank", "strides", "odd", "device", "text"])
def test_each_scale(mode, change):
    for i, scale in enumerate(a(mode).scales):
        if (change == "strides" and not scale.ndim) or (change == "odd" and not scale.size):
            continue
        made = a(mode)
        made.scales[i] = CHANGES[change][0](scale)
        kind = fi_ffi.ArgumentTypeError if change == "text" else fi_ffi.ArgumentError
        with pytest.raises(kind) as caught:
            made.call()
        assert caught.value.argument.startswith(f"quant_scales[{i}]"), str(caught.value)


def test_scales_of_4_bit_weights_lie_together():
    made = a("int4")
    rows = made.scales[0].shape[-1]
    made.scales[0] = np.ascontiguousarray(made.scales[0][..., :-8])
    error = refused(made, "quant_scales[0] (fc1_weight_scales)")
    assert f"scales1 = {rows - 8}" in error.got
    assert error.expected == f"the shape [experts, 3, {rows}]"


@pytest.mark.parametrize("mode", BLOCKED)
def test_scales_of_blocks_are_in_whole_tiles(mode):
    """Rows and columns of the binding's own count."""
    for i, scale in enumerate(a(mode).scales):
        for axis in (1, 2) if scale.ndim == 3 else ():
            made = a(mode)
            more = [(0, int(k == axis)) for k in range(3)]
            made.scales[i] = np.pad(scale, more)
            with pytest.raises(fi_ffi.ArgumentError) as caught:
                made.call()
            error, shape = caught.value, ", ".join(map(str, scale.shape[1:]))
            assert error.argument.startswith(f"quant_scales[{i}] (fc")
            assert error.expected == f"the shape [experts, {shape}]"


@pytest.mark.parametrize("mode", BLOCKED)
def test_sizes_of_blocks_are_multiples(mode):
    """The sizes that are multiples of half of what they should be."""
    step = {"nvfp4": 32, "nvfp4_packed": 32, "mxfp8": 64}.get(mode, 128)
    for of in ("hidden", "inter"):
        made = a(mode, hidden=256, inter=256)
        name = "fc1_expert_weights" if of == "hidden" else "fc2_expert_weights"
        held = {"int64": 16}.get(made.tensors[name].dtype.name, 1)
        cut = slice(0, (256 - step // 2) // held)
        made.tensors[name] = np.ascontiguousarray(made.tensors[name][..., cut])
        if of == "inter":
            first = made.tensors["fc1_expert_weights"]
            made.tensors["fc1_expert_weights"] = first[:, : 2 * (256 - step // 2)].copy()
        else:
            held = {"uint8": 2, "int64": 16}.get(made.tensors["input"].dtype.name, 1)
            first = made.tensors["input"][:, : (256 - step // 2) // held]
            made.tensors["input"] = np.ascontiguousarray(first)
            made.tensors["output"] = made.tensors["output"][:, : 256 - step // 2].copy()
            second = made.tensors["fc2_expert_weights"][:, : 256 - step // 2]
            made.tensors["fc2_expert_weights"] = np.ascontiguousarray(second)
        with pytest.raises(fi_ffi.ArgumentError) as caught:
            made.call()
        # 16 numbers of an int64 may be more than the half.
        assert f"{of}_size" in str(caught.value.expected) or held > step // 2


@pytest.mark.parametrize(("mode", "activation", "inter", "good"), [
    ("nvfp4", "Relu2", 64, 96), ("nvfp4_packed", "Silu", 160, 224), ("mxfp8", "Swiglu", 192, 256),
])  # fmt: skip
def test_scales_that_begin_elsewhere(mode, activation, inter, good):
    """The binding counts an expert's rows otherwise than the kernels, which take whole tiles."""
    made = a(mode, inter=inter, activation=activation, hidden=128)
    error = refused(made, "fc1_expert_weights")
    assert f"inter_size = {inter}" in error.got and "128" in error.expected
    assert (-good) % 128 < 64 <= (-inter) % 128
    made = a(mode, inter=good, activation=activation, hidden=128)
    assert made.worst(made.call()) <= 1
    other = {"nvfp4": "Swiglu", "nvfp4_packed": "Geglu", "mxfp8": "Relu2"}[mode]
    made = a(mode, inter=inter, activation=other, hidden=128)  # there they are the same
    assert made.worst(made.call()) <= 1


# Scales of activations that come quantised.


@pytest.mark.parametrize("mode", WITH_SF)
def test_scales_of_activations_there_must_be(mode):
    made = a(mode)
    sf = made.tensors.pop("input_sf")
    assert refused(made, "input_sf").got is None
    made.tensors["input_sf"] = sf
    for wrong in (sf[:-1].copy(), sf.view(np.int8), sf.astype(F32), sf[None, None], strided(sf)):
        made.tensors["input_sf"] = wrong
        refused(made, "input_sf")
    made.tensors["input_sf"] = "x"
    refused(made, "input_sf", fi_ffi.ArgumentTypeError)
    made.tensors["input_sf"] = sf
    for wrong in (1, None, "yes"):
        refused(made, "swizzled_input_sf", fi_ffi.ArgumentTypeError, swizzled_input_sf=wrong)


@pytest.mark.parametrize("mode", ["half", *QUANTISED, "nvfp4", "fp8_mxfp4"])
def test_scales_of_activations_that_come_without(mode):
    made = a(mode)
    made.tensors["input_sf"] = np.zeros(4096, np.uint8)
    assert refused(made, "input_sf").expected.startswith("None with")
    refused(a(mode), "swizzled_input_sf", fi_ffi.ArgumentTypeError, swizzled_input_sf=1)


def test_scales_in_rows_are_as_long_as_the_kernels_count_them():
    """96 of hidden are 6 scales, and 8 with what fills the tile."""
    made = a("nvfp4_packed", hidden=96)
    made.more["swizzled_input_sf"] = False
    made.tensors["input_sf"] = np.zeros((7, 6), np.uint8)
    assert "multiples of 128 and 4" in refused(made, "input_sf").expected
    made.tensors["input_sf"] = np.zeros((14, 4), np.uint8)
    assert "columns" in refused(made, "input_sf").expected
    made.tensors["input_sf"] = np.zeros((7, 8), np.uint8)
    assert not made.call().any()


@pytest.mark.parametrize("scales", [np.zeros(3, F32), "ab", {}])
def test_scales_are_a_list(scales):
    made = a("half")
    with pytest.raises(fi_ffi.ArgumentTypeError, match="quant_scales"):
        fi_ffi.cutlass_fused_moe(**made.tensors, quant_scales=scales)


def test_int4_has_no_zero_points():
    made = a("int4")
    made.scales[4] = np.zeros(made.scales[0].shape, F16)
    refused(made, "quant_scales[4] (fc1_weight_zeros)")


# Options.

# Options with a value that none takes, and those with one of another type.
VALUES: dict[str, tuple[object, ...]] = {
    "tp_size": (0, 2**31), "ep_size": (0, 2**31), "tp_rank": (1, -1, 2**31),
    "ep_rank": (1, -1, 2**31), "activation_type": ("swiglu",), "input_sf": (np.zeros(4, "u1"),),
    "profile_ids": ((0,), (0, 0, 0), (1, 0), (0, 1), (-2, 0)),
}  # fmt: skip
TYPES: dict[str, tuple[object, ...]] = {
    **dict.fromkeys(("tp_size", "ep_size", "tp_rank", "ep_rank"), (1.0, True, None, "1")),
    **dict.fromkeys(("use_deepseek_fp8_block_scale", "use_w4_group_scaling", "use_packed_weights",
                     "use_mxfp8_act_scaling", "enable_alltoall", "enable_pdl",
                     "swizzled_input_sf"), (1, None, "yes")),
    "activation_type": (3, None, 1.0, [], type("Listed", (), {"name": []})),
    "profile_ids": (0, "00", (0, None), (0.0, 0), {0, 1}), "output_dtype": ("half",),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "table"), [(fi_ffi.ArgumentError, VALUES),
                                             (fi_ffi.ArgumentTypeError, TYPES)])  # fmt: skip
def test_options(kind, table):
    made = a("half")
    for name, values in table.items():
        for value in values:
            error = refused(made, name, kind, **{name: value})
            assert type(error) is kind


def test_activations_by_name():
    made = a("half")

    class Enum:
        name = "Swiglu"

    assert made.worst(made.call(activation_type=Enum)) <= 1


@pytest.mark.parametrize("name", ["alpha", "beta", "limit"])
@pytest.mark.parametrize("activation", ["Geglu", "Relu2", "SwigluStep"])
def test_limits_of_activations_that_take_none(name, activation):
    made = a("half", activation=activation, limits=(name,))
    if (name, activation) == ("limit", "SwigluStep"):
        assert np.isfinite(made.call().astype(np.float32)).all()
        return
    refused(made, f"swiglu_{name}")


def test_the_output_dtype_is_the_outputs():
    made = a("half")
    made.call(output_dtype="float16")
    refused(made, "output", output_dtype="bfloat16")
    made.tensors["output"] = made.tensors["output"].astype(BF16)
    refused(made, "output")


# Modes and the class.


def test_mxfp4_is_of_bfloat16():
    made = a("mxfp4")
    for name in ("input", "output"):
        made.tensors[name] = np.zeros(made.tensors[name].shape, np.float16)
    assert "float16 activations" in str(refused(made, "fc1_expert_weights").got)


BLOCK_SCALE, W4, PACKED = ("use_deepseek_fp8_block_scale", "use_w4_group_scaling",
                           "use_packed_weights")  # fmt: skip
MXFP8 = "use_mxfp8_act_scaling"


@pytest.mark.parametrize(
    ("act", "weight", "flags"),
    [
        ("bfloat16", "float8_e4m3fn", ()),  # scales are asked for that it is not given
        ("float16", "float8_e4m3fn", (BLOCK_SCALE,)), ("bfloat16", "bfloat16", (BLOCK_SCALE,)),
        ("float8_e4m3fn", "float8_e4m3fn", (BLOCK_SCALE,)), ("bfloat16", "uint8", ()),
        ("bfloat16", "uint8", (PACKED,)), ("bfloat16", "bfloat16", (PACKED,)),
        ("float8_e4m3fn", "uint8", (W4,)), ("float16", "bfloat16", ()), ("float32", "float32", ()),
        ("float8_e5m2", "float8_e5m2", ()), ("int8", "int8", ()),
        ("bfloat16", "int64", (MXFP8,)), ("uint8", "int64", (MXFP8,)), ("uint8", "uint8", ()),
        ("float8_e4m3fn", "int64", (W4,)), ("bfloat16", "bfloat16", (MXFP8,)),
        ("int32", "int64", ()),
    ],
)  # fmt: skip
def test_modes_that_there_are_not(act, weight, flags):
    with pytest.raises(fi_ffi.ArgumentError) as caught:
        fi_ffi.FusedMoe(act, weight, "bfloat16", device="cpu", **dict.fromkeys(flags, True))
    assert caught.value.argument in ("activation_dtype", "weight_dtype")


@pytest.mark.parametrize(
    ("argument", "kind", "given"),
    [
        *(("output_dtype", fi_ffi.ArgumentError, {"activation_dtype": "bfloat16",
                                                  "weight_dtype": weight, "output_dtype": wrong})
          for wrong in ("float8_e4m3fn", "float32", "float16") for weight in (None, "int64")),
        ("output_dtype", fi_ffi.ArgumentError, {"activation_dtype": "float8_e4m3fn"}),
        *((name, fi_ffi.ArgumentTypeError, {name: "no dtype"})
          for name in ("activation_dtype", "weight_dtype", "output_dtype")),
        ("device", fi_ffi.ArgumentTypeError, {"device": "gpu"}),
        ("device", fi_ffi.ArgumentError, {"device": "cuda_host"}),
        ("use_packed_weights", fi_ffi.ArgumentTypeError, {"use_packed_weights": 1}),
    ],
)  # fmt: skip
def test_what_the_class_is_made_with(argument, kind, given):
    with pytest.raises(kind) as caught:
        fi_ffi.FusedMoe(**{"activation_dtype": "float16", **given})
    assert caught.value.argument == argument


def test_what_profiles_refuse():
    made = a("half")
    given = {name: made.tensors[name] for name in ("input", "fc1_expert_weights",
                                                   "fc2_expert_weights")}  # fmt: skip
    moe = fi_ffi.FusedMoe("float16", device="cpu")
    moe.profile(**given, top_k=2)
    x = given["input"]
    for name, value, kind in (
        ("top_k", 0, fi_ffi.ArgumentError), ("top_k", 6, fi_ffi.ArgumentError),
        ("top_k", 2.0, fi_ffi.ArgumentTypeError), ("repeats", 0, fi_ffi.ArgumentError),
        ("input", x[:0], fi_ffi.ArgumentError), ("input", x[:, :-1].copy(), fi_ffi.ArgumentError),
        ("fc2_expert_weights", None, fi_ffi.ArgumentTypeError),
        ("fc1_expert_biases", np.zeros((5, 48), F16), fi_ffi.ArgumentError),
        ("tp_rank", 1, fi_ffi.ArgumentError), ("ep_size", 2**30, fi_ffi.ArgumentError),
        ("input", elsewhere(x), fi_ffi.ArgumentError),
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
    made.tensors = {name: elsewhere(array) for name, array in made.tensors.items()}
    for i, name in enumerate(made.tensors):  # apart
        made.tensors[name] = made.tensors[name].at((i + 1) << 20)
    refused(made, "stream")
    refused(made, "stream", fi_ffi.ArgumentTypeError, stream="s")
