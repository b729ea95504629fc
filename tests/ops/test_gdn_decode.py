"""`gdn_decode` on the CPU and on a GPU, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest

import fi_ffi
from fi_ffi.ops.states.gdn import GdnKernel, least_states, row_of

from tests.attention.machines import Cpu
from tests.helpers.calls import refused
from tests.helpers.decode_calls import BF16, PAD, SIZE, DecodeCall, module_of
from tests.helpers.gates import EDGES

STATES = ("bfloat16", "float32")


def sizes(machine):
    """Qwen3-Next's heads, or on the CPU fewer."""
    return {"h": 16, "hv": 32} if machine.is_gpu else {"h": 2, "hv": 4}


def batches(machine):
    return (1, 64, 512) if machine.is_gpu else (1, 5)


@pytest.mark.parametrize("state_dtype", STATES)
@pytest.mark.parametrize("number", [0, 1, 2])
def test_one_token(number, state_dtype, machine, rng):
    """The states of some requests among others', in any order."""
    if number >= len(batches(machine)):
        pytest.skip("a batch of a GPU alone: the CPU has fewer, for time")
    b = batches(machine)[number]
    call = DecodeCall(rng, b, state_dtype=state_dtype, **sizes(machine))
    if b > 1:
        call.pad(b // 2, 0)
    assert call.worst(machine) <= 1


@pytest.mark.parametrize("state_dtype", STATES)
@pytest.mark.parametrize("t", [2, 4])
@pytest.mark.parametrize("number", [0, 1, 2])
def test_several_tokens(number, t, state_dtype, machine, rng):
    """The tokens of a draft, to be verified."""
    if number >= len(batches(machine)):
        pytest.skip("a batch of a GPU alone: the CPU has fewer, for time")
    b = batches(machine)[number]
    call = DecodeCall(rng, b, t, state_dtype=state_dtype, **sizes(machine))
    if b > 1:
        call.pad(b - 2)
    assert call.worst(machine) <= 1


@pytest.mark.parametrize("state_dtype", STATES)
@pytest.mark.parametrize("b", [1, 5, 64])
def test_states_of_each_token(b, state_dtype, machine, rng):
    """For drafts of which not all tokens are accepted: `state` stays as it is."""
    if b > 5 and not machine.is_gpu:
        pytest.skip("on a GPU alone: the reference takes 64 requests as it takes 5")
    call = DecodeCall(rng, b, 4, state_dtype=state_dtype, **sizes(machine))
    call.keep_each()
    call.options["disable_state_update"] = True
    assert call.worst(machine) <= 1


@pytest.mark.parametrize("state_dtype", STATES)
@pytest.mark.parametrize("t", [1, 2])
def test_states_go_elsewhere(t, state_dtype, machine, rng):
    call = DecodeCall(rng, 5, t, state_dtype=state_dtype, **sizes(machine))
    call.write_elsewhere()
    assert call.worst(machine) <= 1


@pytest.mark.parametrize("layout", ["VK", "KV"])
@pytest.mark.parametrize("state_dtype", STATES)
def test_states_in_order(state_dtype, layout, machine, rng):
    """Without indices the i-th request's is the i-th."""
    if (state_dtype, layout) == ("bfloat16", "KV"):
        layout = "VK"
    call = DecodeCall(rng, 5, state_dtype=state_dtype, is_indexed=False, state_layout=layout,
                      **sizes(machine))  # fmt: skip
    assert call.worst(machine) <= 1


@pytest.mark.parametrize(
    "options",
    [{"scale": 1.0}, {"use_qk_l2norm": False}, {"dt_bias_dtype": "bfloat16"},
     {"state_dtype": "float32", "gate_dtype": "float32"},
     {"state_dtype": "float32", "index_dtype": "int64", "t": 2}],
    ids=lambda options: "-".join(map(str, options.values())),
)  # fmt: skip
def test_options(options, machine, rng):
    """Each is compiled into a module of its own."""
    assert DecodeCall(rng, 3, **options, **sizes(machine)).worst(machine) <= 1


def test_what_padding_leaves_behind(machine, rng):
    """Of float32 states zeros where one token is read, and nothing where there are several."""
    one = DecodeCall(rng, 3, state_dtype="float32", **sizes(machine))
    one.pad(1)
    several = DecodeCall(rng, 3, 2, state_dtype="float32", **sizes(machine))
    several.pad(1)
    for call in (one, several):
        if machine.is_gpu:
            machine.need(call.module())
    assert not one.run(machine)["output"][1].astype(np.float32).any()
    assert np.isnan(several.run(machine)["output"][1].astype(np.float32)).all()


@pytest.mark.parametrize("t", [1, 2])
@pytest.mark.parametrize("state_dtype", STATES)
def test_where_nothing_is_written(state_dtype, t, rng):
    """A state that is read and written nowhere: slot 0 stands for that, except of several tokens'
    float32, whose output is the same."""
    call = DecodeCall(rng, 3, t, state_dtype=state_dtype)
    call.write_elsewhere()
    whole = {name: array.copy() for name, array in call.arrays.items()}
    before = call.arrays["state"].copy()
    lost = call.arrays["output_state_indices"][1]
    call.arrays["output_state_indices"][1] = PAD
    for arrays in (whole, call.arrays):
        fi_ffi.gdn_decode(**arrays, **call.options)
    state, full = call.arrays["state"], whole["state"]
    assert call.arrays["output"].tobytes() == whole["output"].tobytes()
    assert state[lost].tobytes() == before[lost].tobytes() != full[lost].tobytes()
    has_slot = t == 1 or state_dtype == "bfloat16"
    assert state[0].tobytes() == (full[lost] if has_slot else before[0]).tobytes()
    rest = [slot for slot in range(1, len(state)) if slot != lost]
    assert state[rest].tobytes() == full[rest].tobytes()


@pytest.mark.parametrize("t", [1, 2])
@pytest.mark.parametrize("state_dtype", STATES)
def test_what_of_padding_is_judged(state_dtype, t, rng):
    """Of bfloat16, a request without a state reads and writes slot 0, which others may do at once;
    all else is judged."""
    call = DecodeCall(rng, 3, t, state_dtype=state_dtype)
    call.pad(1)
    open_rows = [1] if state_dtype == "bfloat16" else []
    expected = call.expected(np.arange(3))
    for name, nothing in (("output", open_rows), ("state", [*call.slots[: len(open_rows)]])):
        magnitude = expected[name][1].reshape(len(expected[name][1]), -1)
        assert np.flatnonzero(np.isinf(magnitude).all(1)).tolist() == nothing
        assert np.isinf(magnitude).any(1).sum() == len(nothing)


@pytest.mark.parametrize("t", [1, 2])
@pytest.mark.parametrize("pad", [1, 8192])
@pytest.mark.parametrize("number", [0, 1])
def test_bfloat16_slots_that_lie_apart(number, pad, t, machine, rng):
    """As parts of a cache's pages: their number and distance are compiled in."""
    b = (3, 64)[number] if machine.is_gpu else (1, 5)[number]
    call = DecodeCall(rng, b, t, **sizes(machine))
    call.move_apart(pad)
    if b > 1:
        call.pad(b // 2)
    assert f"_t{call.kernel.slot_stride}x16384x128x1_" in call.module()
    assert call.worst(machine) <= 1


def test_slots_that_lie_apart_and_go_elsewhere(machine, rng):
    call = DecodeCall(rng, 3, **sizes(machine))
    call.move_apart(8192)
    call.write_elsewhere()
    assert call.worst(machine) <= 1


@pytest.mark.parametrize("t", [1, 2])
def test_states_in_order_that_lie_apart(t, rng):
    """Without indices, and of float32 with one token."""
    for state_dtype in STATES[:: 1 if t == 1 else 2]:
        call = DecodeCall(rng, 4, t, state_dtype=state_dtype, is_indexed=state_dtype != "bfloat16")
        call.move_apart(64)
        assert call.worst(Cpu()) <= 1


def test_calls_of_other_pools_are_other_kernels(rng):
    """One call's pool says nothing of the next one's."""
    apart, together = DecodeCall(rng, 4), DecodeCall(rng, 4)
    apart.move_apart(16)
    for call in (together, apart, together):
        assert call.worst(Cpu()) <= 1
    one = DecodeCall(rng, 1, slots=1, is_indexed=False)
    one.move_apart(16)  # the distance of a single slot is none
    assert one.kernel.slot_stride == 0 and one.worst(Cpu()) <= 1


@pytest.mark.parametrize("t", [1, 2])
def test_slots_whose_strides_are_refused(t, rng):
    for axis, pad in ((1, 16), (2, 16), (0, -16)):  # heads, rows, and slots that overlap
        call = DecodeCall(rng, 4, t)
        state = call.arrays["state"]
        strides = list(state.strides)
        strides[axis] += 2 * pad
        room = np.zeros(2 * state.size, BF16)
        wrong(call, "state", state=np.lib.stride_tricks.as_strided(room, state.shape, strides))
    call = DecodeCall(rng, 4, state_dtype="float32")
    call.move_apart(2)
    assert "4 elements loaded at a time" in str(wrong(call, "state", state=call.arrays["state"]))
    call = DecodeCall(rng, 4, 2, state_dtype="float32")
    call.move_apart(4)
    wrong(call, "state", state=call.arrays["state"])


def test_float32_slots_that_lie_apart(machine, rng):
    """With one token: as part of a wider pool."""
    call = DecodeCall(rng, 3, state_dtype="float32", **sizes(machine))
    if machine.is_gpu:
        machine.need(call.module())
    together = call.run(machine)
    slots, hv = call.arrays["state"].shape[:2]
    wide = np.full((slots, hv * SIZE * SIZE + 64), 7, np.float32)
    wide[:, :-64] = call.arrays["state"].reshape(slots, -1)
    placed = {name: machine.place(array) for name, array in call.arrays.items() if name != "state"}
    pool = machine.place(wide)
    strides = (wide.shape[1], SIZE * SIZE, SIZE, 1)
    state = fi_ffi.TensorDesc(pool.desc().ptr, (slots, hv, SIZE, SIZE), "float32", strides=strides,
                              device=pool.desc().device)  # fmt: skip
    descs = {name: array.desc() for name, array in placed.items()}
    fi_ffi.gdn_decode(state=state, **descs, **call.options, stream=machine.stream)
    after = pool.get()
    assert (after[:, -64:] == 7).all() and pool.intact()
    assert after[:, :-64].tobytes() == together["state"].tobytes()
    assert placed["output"].get().tobytes() == together["output"].tobytes()


def test_q_k_and_v_that_are_parts_of_one(machine, rng):
    """As a layer's convolution leaves them."""
    call = DecodeCall(rng, 4, **sizes(machine))
    if machine.is_gpu:
        machine.need(call.module())
    alone = call.run(machine)
    parts = [call.arrays[name].reshape(4, -1) for name in ("q", "k", "v")]
    flat = machine.place(np.concatenate(parts, axis=1))
    placed = {
        name: machine.place(array) for name, array in call.arrays.items() if name not in "qkv"
    }
    descs = {name: array.desc() for name, array in placed.items()}
    whole, at = flat.desc(), 0
    for name, part in zip("qkv", parts, strict=True):
        _, _, heads, _ = call.arrays[name].shape
        width = sum(each.shape[1] for each in parts)
        descs[name] = fi_ffi.TensorDesc(
            whole.ptr + 2 * at, (4, 1, heads, SIZE), "bfloat16",
            strides=(width, width, SIZE, 1), device=whole.device,
        )  # fmt: skip
        at += part.shape[1]
    fi_ffi.gdn_decode(**descs, **call.options, stream=machine.stream)
    assert placed["output"].get().tobytes() == alone["output"].tobytes()
    assert placed["state"].get().tobytes() == alone["state"].tobytes()


def test_prepared(machine, rng):
    """A prepared call with another output and other states of the same layout."""
    call = DecodeCall(rng, 4, **sizes(machine))
    if machine.is_gpu:
        machine.need(call.module())
    alone = call.run(machine)
    placed = {name: machine.place(array) for name, array in call.arrays.items()}
    descs = {name: array.desc() for name, array in placed.items()}
    made = fi_ffi.prepare(fi_ffi.gdn_decode, **descs, **call.options, stream=machine.stream)
    made()
    machine.synchronize()
    assert placed["output"].get().tobytes() == alone["output"].tobytes()
    again = {name: machine.place(call.arrays[name]) for name in ("output", "state")}
    made.update(output=again["output"].desc(), state=again["state"].desc().ptr)
    made()
    machine.synchronize()
    for name, array in again.items():
        assert array.get().tobytes() == alone[name].tobytes()


def test_tokens_one_by_one_are_several(machine, rng):
    """A draft's tokens give what the same tokens give alone; float32 states carry all of it."""
    several = DecodeCall(rng, 3, 4, state_dtype="float32", **sizes(machine))
    one = DecodeCall(rng, 3, 1, state_dtype="float32", **sizes(machine))
    if machine.is_gpu:
        machine.need(several.module())
        machine.need(one.module())
    got = several.run(machine)
    state = several.arrays["state"]
    for t in range(4):
        for name in ("q", "k", "v", "a", "b"):
            one.arrays[name] = np.ascontiguousarray(several.arrays[name][:, t : t + 1])
        for name in ("A_log", "dt_bias", "initial_state_indices"):
            one.arrays[name] = several.arrays[name]
        one.arrays["state"] = state
        step = one.run(machine)
        state = step["state"]
        near = np.abs(
            step["output"][:, 0].astype(np.float64) - got["output"][:, t].astype(np.float64)
        )
        assert (near <= 2.0**-7 * np.abs(got["output"][:, t].astype(np.float64)) + 1e-4).all()
    np.testing.assert_allclose(state, got["state"], rtol=1e-3, atol=1e-4)


def test_it_is_its_definition(rng):
    """One element at a time; a step past 20 is itself to about 1e-9."""
    call = DecodeCall(rng, 2, 2, h=1, hv=2, state_dtype="float32")
    call.arrays["a"][...] = np.resize(EDGES, call.arrays["a"].shape)
    call.arrays["dt_bias"][...], call.arrays["A_log"][...] = 0, -3
    given = {name: array.astype(np.float64) for name, array in call.arrays.items()}
    found = {name: value for name, (value, _) in call.expected(np.arange(2)).items()}
    for i, head in np.ndindex(2, 2):
        state = given["state"][int(given["initial_state_indices"][i]), head].copy()
        for t in range(2):
            q, k = given["q"][i, t, 0], given["k"][i, t, 0]
            q = q / np.sqrt(float(q @ q) + 1e-6) / np.sqrt(128)
            k = k / np.sqrt(float(k @ k) + 1e-6)
            dt = np.log(1 + np.exp(given["a"][i, t, head] + given["dt_bias"][head]))
            keep = np.exp(-np.exp(given["A_log"][head]) * dt)
            share = 1 / (1 + np.exp(-given["b"][i, t, head]))
            for d in range(SIZE):
                row = state[d] * keep
                row += share * (given["v"][i, t, head, d] - float(row @ k)) * k
                state[d] = row
                np.testing.assert_allclose(found["output"][i, t, head, d], row @ q, rtol=1e-7)
        slot = np.searchsorted(call.slots, int(given["initial_state_indices"][i]))
        np.testing.assert_allclose(found["state"][slot, head], state, rtol=1e-7, atol=1e-12)


def test_steps_past_20_are_themselves(rng):
    """softplus of what is large, and a share of almost nothing."""
    call = DecodeCall(rng, 2, state_dtype="float32")
    call.arrays["dt_bias"][:] = 25
    call.arrays["A_log"][:] = -6
    call.arrays["b"][0] = -30
    found = {name: value for name, (value, _) in call.expected(np.arange(2)).items()}
    slot = int(call.arrays["initial_state_indices"][0])
    dt = call.arrays["a"][0, 0].astype(np.float64) + 25
    kept = np.exp(-np.exp(-6.0) * dt)[:, None, None] * call.arrays["state"][slot]
    of = found["state"][np.searchsorted(call.slots, slot)]
    np.testing.assert_allclose(of, kept, atol=1e-10)


def test_nothing_to_do(rng):
    call = DecodeCall(rng, 0, slots=3)
    before = call.arrays["state"].tobytes()
    fi_ffi.gdn_decode(**call.arrays, **call.options)
    assert call.arrays["state"].tobytes() == before


def wrong(call: DecodeCall, argument: str, **changes) -> fi_ffi.ArgumentError:
    return refused(fi_ffi.gdn_decode, call.arrays, argument, **{**call.options, **changes})


@pytest.mark.parametrize(
    ("argument", "change"),
    [
        ("q", lambda a: a["q"][0]),
        ("q", lambda a: a["q"].astype(np.float16)),
        ("k", lambda a: np.repeat(a["k"], 2, axis=2)),
        ("v", lambda a: a["v"][0]),
        ("v", lambda a: np.repeat(a["v"], 2, axis=3)[..., ::2]),
        ("state", lambda a: a["state"].astype(np.float16)),
        ("state", lambda a: a["state"][:, :, :64]),
        ("state", lambda _: "states"),
        ("A_log", lambda a: a["A_log"].astype(np.float64)),
        ("a", lambda a: a["a"].astype(np.float32)),
        ("a", lambda a: a["a"][:, :, :3]),
        ("dt_bias", lambda a: a["dt_bias"].astype(np.float16)),
        ("b", lambda a: a["b"].astype(np.float16)),
        ("output", lambda a: a["output"].astype(np.float32)),
        ("output", lambda a: a["v"]),
        ("scale", lambda _: "1"),
        ("scale", lambda _: float("nan")),
        ("use_qk_l2norm", lambda _: 1),
        ("initial_state_indices", lambda a: a["initial_state_indices"][:2]),
        ("initial_state_indices", lambda a: a["initial_state_indices"].astype(np.uint8)),
        ("output_state_indices", lambda a: a["initial_state_indices"].astype(np.int64)),
        ("disable_state_update", lambda _: True),
        ("disable_state_update", lambda _: 1),
        ("intermediate_states_buffer", lambda a: a["state"][None]),
        ("state_layout", lambda _: "KV"),
        ("state_layout", lambda _: "HND"),
        ("state_layout", lambda _: 1),
    ],
    ids=lambda given: given if isinstance(given, str) else "",
)
def test_refusals(argument, change, rng):
    call = DecodeCall(rng)
    wrong(call, argument, **{argument: change(call.arrays)})


def test_refusals_of_some_kinds(rng):
    odd = DecodeCall(rng, h=3)
    wrong(odd, "state")  # 4 heads for 3
    for state_dtype in STATES:
        large = DecodeCall(rng, state_dtype=state_dtype, index_dtype="int64")
        wrong(large, "initial_state_indices")
    order = DecodeCall(rng, is_indexed=False)
    wrong(order, "output_state_indices", output_state_indices=np.arange(3, dtype=np.int32))
    few = np.ascontiguousarray(order.arrays["state"][:2])
    wrong(order, "state", state=few)
    several = DecodeCall(rng, 3, 2, state_dtype="float32")
    told = wrong(several, "initial_state_indices", initial_state_indices=None)
    assert "several tokens" in str(told)
    wrong(several, "a", a=several.arrays["a"].astype(np.float32))
    several.keep_each()
    longer = np.repeat(several.arrays["intermediate_states_buffer"], 2, axis=1)
    wrong(several, "intermediate_states_buffer", intermediate_states_buffer=longer)
    narrow = several.arrays["intermediate_states_buffer"].astype(np.float16)
    wrong(several, "intermediate_states_buffer", intermediate_states_buffer=narrow)


@pytest.mark.parametrize("t", [1, 3])
@pytest.mark.parametrize("state_dtype", ["bfloat16", "float32"])
def test_what_a_gpu_would_read_past_the_states(state_dtype, t, rng):
    call = DecodeCall(rng, slots=5, t=t, state_dtype=state_dtype)
    initial = call.arrays["initial_state_indices"]
    initial[1] = 5
    words = "gdn_decode: argument `initial_state_indices`: got 5 in element 1, .* slots = 5$"
    with pytest.raises(fi_ffi.ArgumentError, match=words):
        fi_ffi.gdn_decode(**call.arrays, **call.options)
    # Of no request nothing is written, wherever: but of bfloat16 states slot 0 is.
    call.arrays["output_state_indices"] = written = np.array([3, 10**6, 4], initial.dtype)
    initial[:] = 0, -1, 1
    if state_dtype == "float32":
        fi_ffi.gdn_decode(**call.arrays, **call.options)
        initial[1] = 2
    words = "`output_state_indices`: got 1000000 in element 1, .* slots = 5$"
    with pytest.raises(fi_ffi.ArgumentError, match=words):
        fi_ffi.gdn_decode(**call.arrays, **call.options)
    written[1] = 0
    fi_ffi.gdn_decode(**call.arrays, **call.options)


def test_supports():
    asked = fi_ffi.gdn_decode.supports(90, release="0.7.2.post1")
    assert not asked and "mtp_ilp4" in asked.module
    command = "fi-ffi build --release 0.7.2.post1 --arch 9.0a gdn_decode"
    assert asked.build == f"{command}:batch=1,state=bf16"
    asked = fi_ffi.gdn_decode.supports(90, release="0.7.2.post1", b=64, state_dtype="float32")
    assert asked.build == command and asked.reason.endswith("ahead of time")
    draft = {"t": 4, "keeps_each": True, "disable_state_update": True, "is_same_pool": False}
    asked = fi_ffi.gdn_decode.supports(90, release="0.7.2.post1", h=2, hv=4, b=8, **draft)
    wanted = "batch=8,q_heads=2,v_heads=4,tokens=4,state=bf16,split=1,steps=1,update=0"
    assert asked.build == f"{command}:{wanted}"
    keys = {"state_dtype": "float32", "state_layout": "KV", "is_indexed": False}
    asked = fi_ffi.gdn_decode.supports(90, release="0.7.2.post1", dt_bias_dtype="bfloat16", **keys)
    assert asked.build == f"{command}_keys_first:batch=1,dt_bias=bf16"
    assert fi_ffi.gdn_decode.supports(90, release="0.7.2.post1", scale=1.0).build is None
    wide = fi_ffi.gdn_decode.supports(90, release="0.7.2.post1", b=64, t=2)
    assert "wide_vec_sm_90a" in wide.module
    apart = {"b": 3, "slots": 15, "slot_stride": 532480}
    asked = fi_ffi.gdn_decode.supports(90, release="0.7.2.post1", **apart)
    assert asked.build == f"{command}:batch=3,state=bf16,slots=15,slot_stride=532480"
    refused = fi_ffi.gdn_decode.supports(90, release="0.6.13")
    assert refused.status == "refused" and ">=0.7.2" in refused.reason
    assert fi_ffi.gdn_decode.supports(80, release="0.7.2.post1").status == "refused"
    with pytest.raises(TypeError, match="unexpected keyword argument 'heads'"):
        fi_ffi.gdn_decode.supports(90, heads=3)


_BF16, _OF = "gdn_decode_bf16_state_sm90a_cute_dsl_", "tfloat32xfloat32xint32"
_FLOAT, _SCALE = "sm_90a_1_16_32_128_128_", "0_08838834764831845_1"
# As FlashInfer's own cache names them, of what it compiles for such calls.
NAMES = [
    ({}, 1, f"{_BF16}mtp_ilp4_sm_90a_mtp_bf16_dynB_1_16_32_128_128_m1_tm1_16_4_0_0_1_0_"
            f"08838834764831845_1_0_20_0_0_1_0_0_0_0_{_OF}"),
    ({}, 64, f"{_BF16}wide_vec_t1_sm_90a_v3_mtp_bf16_tiled_dynB_1_16_32_128_128_m1_tm1_128_0_0_1_0"
             f"_08838834764831845_1_0_20_0_0_1_{_OF}"),
    ({"t": 4, "keeps_each": True, "disable_state_update": True}, 512,
     f"{_BF16}wide_vec_sm_90a_v3_mtp_bf16_tiled_dynB_4_16_32_128_128_m1_tm1_128_1_1_1_0_"
     f"08838834764831845_1_0_20_0_0_1_0_0_0_0_0_{_OF}"),
    ({"state_dtype": "float32"}, 512,
     f"gdn_decode_pretranspose_sm90a_cute_dsl_decode_{_FLOAT}tfloat32xfloat32xbfloat16xfloat32x"
     f"bfloat16xbfloat16_{_SCALE}_1_16384_128_1"),
    ({"t": 2, "state_dtype": "float32"}, 64,
     "gdn_decode_mtp_sm90a_cute_dsl_warp_sm_90a_2_16_32_128_128_2_0_0_none_0_08838834764831845_1_"
     f"64_4_{_OF}xtt0xt2xt0xt3xt3xt3xt2xt3xt0xt0_8_0_0_0_0"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("t", "steps"),
    [(1, {1: 16, 129: 32, 264: 64, 512: 64, 1024: 128}), (2, {1: 16, 128: 32, 512: 64, 1024: 128})],
)
def test_rows_of_a_block(t, steps):
    """Of bfloat16 states, as FlashInfer's own choice on 132 multiprocessors is."""
    for states in range(1, 1100):
        kernel = GdnKernel(1, 1, t, least_states(states, 1, 132))
        tile = steps[max(step for step in steps if step <= states)]
        wide = states >= (512 if t == 1 else 128)
        assert f"_m1_tm1_{tile}_" in module_of(kernel), states
        assert ("wide_vec" in module_of(kernel)) is wide


@pytest.mark.parametrize(("compiled", "b", "name"), NAMES, ids=lambda given: "")
def test_modules_are_called_as_flashinfer_calls_them(compiled, b, name):
    kernel = GdnKernel(16, 32, states=least_states(b, 32, 132), **compiled)
    assert module_of(kernel) == name
    symbol = kernel.names((9, 0), 132)[1]
    assert symbol == name.replace("_sm90a_cute_dsl", "")


def test_names_that_are_too_long_are_cut():
    kernel = GdnKernel(16, 32, t=2, state_dtype="float32", scale=0.123456789012345678901)
    long = GdnKernel(10**30, 10**31, t=10**9, state_dtype="float32", scale=1.5e-05)
    assert "_h" not in module_of(kernel)
    head, _, digest = module_of(long).rpartition("_h")
    assert len(digest) == 16 and len(head) == len("gdn_decode_mtp_sm90a_cute_dsl_") + 180


def test_a_row_is_shared_by_batches_of_one_kernel():
    """Rows are compiled: a batch's size is no key."""
    of = [least_states(b, 32, 132) for b in range(1, 600)]
    assert len({*of}) <= 9
    kinds = {row_of(GdnKernel(2, 4, t=t, state_dtype=s)).variant for t in (1, 2) for s in STATES}
    assert kinds == {"", "_float32", "_float32_tokens"} and PAD < 0
