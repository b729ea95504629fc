"""`selective_state_update` on the CPU and on a GPU, and what is refused."""

from __future__ import annotations

import struct

import numpy as np
import pytest

import fi_ffi
from fi_ffi.ops.states import mamba
from fi_ffi.ops.states.mamba import ALGORITHMS

from tests.helpers.calls import refused
from tests.helpers.gates import EDGES
from tests.helpers.state_calls import PAD, StateCall
from tests.helpers.state_definition import Defined

FLOATS = "float32 bfloat16 bfloat16 float32"
# The modules that GPU tests have: dtypes of states, inputs, weights and A, of indices, and tokens.
MODULES = [(FLOATS, "int64", 1), ("bfloat16 bfloat16 bfloat16 float32", "int32", 4)]
OTHERS = [
    ("float16 float16 float32 float32", "int32", 3),
    ("float32 float32 float32 float32", "int64", 2),
]


SMALL = {"heads": 4, "dim": 16, "dstate": 32}


def sizes(machine):
    """Those that modules are compiled for, or on the CPU smaller ones."""
    return {} if machine.is_gpu else SMALL


@pytest.mark.parametrize("algorithm", ["auto", "simple", "vertical", "horizontal"])
@pytest.mark.parametrize("b", [1, 3, 70])
def test_one_token(b, algorithm, machine, rng):
    """The states of some requests among others', which stay as they are."""
    for gated, softplus in ((True, True), (False, False)):
        call = StateCall(rng, b=b, gated=gated, biased=softplus, **sizes(machine))
        call.read_from(*([b // 2] if b > 1 else []))
        call.options |= {"algorithm": algorithm, "dt_softplus": softplus}
        assert call.worst(machine) <= 1


def test_states_go_elsewhere(machine, rng):
    call = StateCall(rng, b=5, slots=20, **sizes(machine))
    call.read_from(2)
    call.write_to(2)
    assert call.worst(machine) <= 1
    call.options["disable_state_update"] = True
    assert call.worst(machine) <= 1


def test_states_in_order(machine, rng):
    """Without indices the i-th request's is the i-th; modules are then compiled for int32."""
    if machine.is_gpu:
        pytest.skip("no module of int32 for one token is built")
    assert StateCall(rng, b=5, slots=5, **sizes(machine)).worst(machine) <= 1


@pytest.mark.parametrize(("dtypes", "indices", "steps"), MODULES + OTHERS, ids=str)
def test_several_tokens(dtypes, indices, steps, machine, rng):
    if machine.is_gpu and (dtypes, indices, steps) not in MODULES:
        pytest.skip("no such module is built")
    for b, algorithm in ((1, "auto"), (5, "simple"), (40, "auto")):
        call = StateCall(rng, "steps", b, steps, dtypes=dtypes, indices=indices, **sizes(machine))
        call.read_from(*([b - 2] if b > 1 else []))
        call.options["algorithm"] = algorithm
        assert call.worst(machine) <= 1
        call.options["disable_state_update"] = True
        assert call.worst(machine) <= 1


def test_one_token_by_the_kernels_of_several(machine, rng):
    call = StateCall(rng, b=7, **sizes(machine))
    call.read_from(3)
    call.options["cache_steps"] = 1
    case = StateCall(rng, "steps", 7, 1, **sizes(machine))
    case.arrays = {
        name: a[:, None] if name in ("x", "dt", "B", "C", "z", "out") else a
        for name, a in call.arrays.items()
    }
    case.options = call.options
    expected = case.case().expected
    if machine.is_gpu:
        machine.need(case.module())
    got = call.run(machine)["out"].astype(np.float64)
    value, magnitude = (each[:, 0] for each in expected["out"])
    assert (np.abs(got - value) <= magnitude * 2.0**-16 + np.abs(value) * 2.0**-7).all()


@pytest.mark.parametrize("is_kept", ["each", "at targets"])
def test_states_of_each_token(is_kept, machine, rng):
    """For drafts of which not all are accepted."""
    dtypes, indices, steps = MODULES[1]
    call = StateCall(
        rng, "steps", 6, steps, dtypes=dtypes, indices=indices, slots=60, **sizes(machine)
    )
    if is_kept == "each":
        call.read_from(4)
        call.keep_each(steps + 1)
    else:
        call.read_from(4, width=steps)
        call.write_to(4, width=steps)
        accepted = rng.integers(0, steps + 1, 6)
        call.arrays["num_accepted_tokens"] = accepted.astype(np.int32)
    assert call.worst(machine) <= 1


def test_sequences(machine, rng):
    """Of any length up to a limit, none among them, one after another."""
    dtypes, indices, steps = MODULES[1]
    for b in (1, 9):
        call = StateCall(
            rng, "sequences", b, steps, dtypes=dtypes, indices=indices, **sizes(machine)
        )
        call.read_from(*([b // 2] if b > 1 else []))
        assert call.worst(machine) <= 1


def elsewhere(call: StateCall) -> None:
    call.read_from()
    call.write_to(0)


def at_targets(call: StateCall) -> None:
    call.read_from(width=call.steps)
    call.write_to(width=call.steps)
    accepted = call.rng.integers(0, call.steps + 1, call.b)
    call.arrays["num_accepted_tokens"] = accepted.astype(np.int32)


def kept(call: StateCall) -> None:
    call.read_from(1)
    call.keep_each(call.steps + 1)


WAYS = {
    "in place": lambda call: None, "in any order": lambda call: call.read_from(1),
    "elsewhere": elsewhere, "at targets": at_targets, "kept": kept,
    "not updated": lambda call: call.options.update(disable_state_update=True),
    "without softplus": lambda call: call.options.update(dt_softplus=False),
}  # fmt: skip
OF_KINDS = [(kind, way) for way in WAYS for kind in ("one", "steps", "sequences")
            if kind == "steps" or way not in ("at targets", "kept")]  # fmt: skip


@pytest.mark.parametrize("state", ["float32", "int16"])
@pytest.mark.parametrize(("kind", "way"), OF_KINDS)
def test_it_is_its_definition(kind, way, state, rng):
    """One number at a time; a step past 20 is itself to about 1e-9."""
    steps = 1 if kind == "one" else 3
    call = StateCall(
        rng, kind, 3, steps, heads=4, groups=2, dim=3, dstate=16, slots=30,
        dtypes=f"{state} bfloat16 bfloat16 float32", gated=way != "kept",
        biased=way != "at targets",
    )  # fmt: skip
    WAYS[way](call)
    edges = np.resize(EDGES, call.arrays["dt"].shape)
    if way != "without softplus":
        call.arrays["dt"][...] = edges
    Defined(call).check()


# The modules of int16 and of random rounding that GPU tests have.
QUANTISED = [("int16 bfloat16 bfloat16 float32", "int32", 1),
             ("int16 bfloat16 bfloat16 float32", "int32", 4)]  # fmt: skip
AT_RANDOM = [("float16 bfloat16 bfloat16 float32", "int32", 1),
             ("float16 bfloat16 bfloat16 float32", "int32", 4)]  # fmt: skip
OF_INT16 = {"heads": 4, "dim": 16, "dstate": 64}


def of(rng, machine, given, b, kind="one", **more) -> StateCall:
    dtypes, indices, steps = given
    small = {} if machine.is_gpu else OF_INT16
    made = {"dtypes": dtypes, "indices": indices, **small, **more}
    return StateCall(rng, kind, b, steps, **made)


@pytest.mark.parametrize("algorithm", ["auto", "simple", "vertical"])
@pytest.mark.parametrize("b", [1, 5, 70])
def test_int16_states_of_one_token(b, algorithm, machine, rng):
    """With their scales; a pad where the kernels of several tokens take it."""
    call = of(rng, machine, QUANTISED[0], b, gated=b != 5)
    call.options["algorithm"] = algorithm
    assert call.worst(machine) <= 1
    call.read_from(*([b // 2] if algorithm == "auto" and b > 1 else []))
    assert call.worst(machine) <= 1
    call.options["disable_state_update"] = True
    assert call.worst(machine) <= 1


@pytest.mark.parametrize("algorithm", ["auto", "simple"])
def test_int16_states_go_elsewhere(algorithm, machine, rng):
    call = of(rng, machine, QUANTISED[0], 5, slots=20)
    call.options["algorithm"] = algorithm
    call.read_from()
    call.write_to()
    assert call.worst(machine) <= 1
    call.options["disable_state_update"] = True
    before = {name: call.arrays[name].tobytes() for name in ("state", "state_scale")}
    if machine.is_gpu:
        machine.need(call.module())
    got = call.run(machine)
    assert before == {name: got[name].tobytes() for name in before}


@pytest.mark.parametrize("kind", ["steps", "sequences"])
@pytest.mark.parametrize("b", [1, 9])
def test_int16_states_of_several_tokens(kind, b, machine, rng):
    call = of(rng, machine, QUANTISED[1], b, kind, slots=60)
    call.read_from(*([b - 1] if b > 1 else []))
    assert call.worst(machine) <= 1
    if kind == "steps":
        call.write_to(width=4)
        assert call.worst(machine) <= 1
        del call.arrays["dst_state_batch_indices"]
        call.keep_each(5)
        assert call.worst(machine) <= 1


def test_rows_of_0_have_a_scale_of_1(machine, rng):
    call = of(rng, machine, QUANTISED[0], 3)
    for name in ("state", "x"):
        call.arrays[name] = np.zeros_like(call.arrays[name])
    if machine.is_gpu:
        machine.need(call.module())
    got = call.run(machine)
    assert (got["state_scale"][:3] == 1).all() and not got["state"][:3].any()
    assert not got["out"].astype(np.float64).any()
    assert got["state_scale"][3:].tobytes() == call.arrays["state_scale"][3:].tobytes()


def test_int16_is_what_the_scale_says(rng):
    """One row at a time, in plain Python."""
    call = StateCall(rng, b=2, dtypes=QUANTISED[0][0], **OF_INT16, gated=False)
    call.options["dt_softplus"] = False
    a = {name: array.astype(np.float64) for name, array in call.arrays.items()}
    fi_ffi.selective_state_update(**call.arrays, **call.options)
    for i, head, d in np.ndindex(2, 4, 16):
        dt = a["dt"][i, head] + a["dt_bias"][head]
        row = a["state"][i, head, d] * a["state_scale"][i, head, d] * np.exp(a["A"][head] * dt)
        row = row + dt * a["B"][i, head // 2] * a["x"][i, head, d]
        scale = call.arrays["state_scale"][i, head, d]
        assert abs(scale - max(map(abs, row)) / 32767) <= 1e-6 * scale
        got = call.arrays["state"][i, head, d]
        assert max(map(abs, got.tolist())) == 32767
        assert np.abs(got * np.float64(scale) - row).max() <= 0.503 * scale


@pytest.mark.parametrize("algorithm", ["auto", "simple", "vertical", "horizontal"])
@pytest.mark.parametrize("b", [1, 70])
def test_rounding_at_random_of_one_token(b, algorithm, machine, rng):
    """To a neighbour; by `simple` to the one that its bits say, but where float32 is off."""
    call = of(rng, machine, AT_RANDOM[0], b)
    call.read_from(*([b // 2] if b > 1 else []))
    call.at_random(2**40 + 12345)
    call.options["algorithm"] = algorithm
    assert call.worst(machine) <= 1
    if algorithm == "simple":
        assert share_of_the_same(call, machine) > 0.99


@pytest.mark.parametrize("kind", ["steps", "sequences"])
def test_rounding_at_random_of_several_tokens(kind, machine, rng):
    call = of(rng, machine, AT_RANDOM[1], 6, kind, slots=60)
    call.read_from(2)
    call.at_random(-7)
    call.options["algorithm"] = "simple"
    assert call.worst(machine) <= 1 and share_of_the_same(call, machine) > 0.99
    if kind == "steps":
        call.keep_each(4)
        assert call.worst(machine) <= 1


def share_of_the_same(call: StateCall, machine) -> float:
    """Of the states that the reference rounds up or down as was got."""
    expected = call.case().expected["state"].value()
    got = call.run(machine)["state"].astype(np.float64)
    return float((got == expected).mean())


def test_rounding_at_random_is_fair(machine, rng):
    """Over seeds the mean is the number, and another seed rounds others."""
    call = of(rng, machine, AT_RANDOM[0], 4, gated=False)
    if machine.is_gpu:
        call.at_random(0)
        machine.need(call.module())
    plain = of(rng, machine, AT_RANDOM[0], 4, gated=False)
    plain.arrays = {**call.arrays}
    plain.arrays.pop("rand_seed", None)
    exact = plain.case().expected["state"][0][:4]
    found = []
    for seed in range(40):
        call.at_random(seed * 2**33 + 1)
        found.append(call.run(machine)["state"][:4].astype(np.float64))
    large = np.abs(exact) > 2.0**-13
    step = 2.0 ** (np.floor(np.log2(np.abs(exact[large]))) - 10)
    off = ((np.mean(found, axis=0)[large] - exact[large]) / step).mean()
    assert abs(off) < 5 / np.sqrt(40 * large.sum() / 8), "of so many, eight at a time alike"
    assert any((one != found[0]).any() for one in found[1:])
    nearest = plain.case().expected["state"][0][:4].astype(np.float16).astype(np.float64)
    assert 0.05 < (found[0] != nearest)[large].mean() < 0.5


def test_the_bits_of_philox(rng):
    """Of one element, counted in plain Python."""
    call = StateCall(rng, b=3, dtypes=AT_RANDOM[0][0], indices="int32", **OF_INT16)
    call.read_from()
    seed = -(2**50) + 77
    call.at_random(seed)
    case = call.case()
    got = case.expected["state"].value()
    plain = StateCall(rng, b=3, dtypes=AT_RANDOM[0][0], indices="int32", **OF_INT16)
    plain.arrays = {name: a for name, a in call.arrays.items() if name != "rand_seed"}
    exact = plain.case().expected["state"][0]
    for slot in call.arrays["state_batch_indices"].tolist():
        for head, d, n in ((0, 0, 0), (3, 15, 63), (2, 7, 33)):
            place = ((slot * 4 + head) * 16 + d) * 64 + n
            value = float(exact[slot, head, d, n])
            (bits,) = struct.unpack("<I", struct.pack("<f", value))
            total = (bits & 0x7FFFFFFF) + (philox4(seed, place - n % 2)[n % 2] & 0x1FFF)
            size = ((total >> 13) - (112 << 10)) if total >> 23 >= 113 else 0
            (half,) = struct.unpack("<e", struct.pack("<H", size | bits >> 31 << 15))
            assert got[slot, head, d, n] == half


def philox4(seed: int, place: int) -> list[int]:
    key = [seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF]
    c = [place & 0xFFFFFFFF, place >> 32, 0, 0]
    for _ in range(10):
        first, third = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [third >> 32 ^ c[1] ^ key[0], third & 0xFFFFFFFF,
             first >> 32 ^ c[3] ^ key[1], first & 0xFFFFFFFF]  # fmt: skip
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


def test_inputs_that_are_parts_of_one(machine, rng):
    """x, B and C as a layer's convolution leaves them, states apart, and FlashInfer's strides."""
    call = StateCall(rng, b=4, **sizes(machine))
    call.read_from()
    if machine.is_gpu:
        machine.need(call.module())
    expected = call.case().expected["out"]
    arrays = call.arrays
    b, (heads, dim), (groups, dstate) = 4, arrays["x"].shape[1:], arrays["B"].shape[1:]
    flat = np.concatenate([arrays[name].reshape(b, -1) for name in ("x", "B", "C")], axis=1)
    placed = {name: machine.place(a) for name, a in arrays.items() if name not in ("x", "B", "C")}
    placed["flat"] = machine.place(flat)
    descs = {name: array.desc() for name, array in placed.items() if name != "flat"}
    whole, width = placed["flat"].desc(), flat.shape[1]

    def part(start: int, n: int, size: int) -> fi_ffi.TensorDesc:
        at = whole.ptr + start * flat.itemsize
        return fi_ffi.TensorDesc(at, (b, n, size), "bfloat16", strides=(width, size, 1),
                                 device=whole.device)  # fmt: skip

    def wide(name: str, *sizes: int) -> fi_ffi.TensorDesc:
        desc = descs[name]
        strides = (*desc.strides, *[0] * len(sizes))
        return fi_ffi.TensorDesc(desc.ptr, (*desc.shape, *sizes), desc.dtype, strides=strides,
                                 device=desc.device)  # fmt: skip

    descs |= {"x": part(0, heads, dim), "B": part(heads * dim, groups, dstate)}
    descs |= {"C": part(heads * dim + groups * dstate, groups, dstate)}
    descs |= {"dt": wide("dt", dim), "A": wide("A", dim, dstate), "D": wide("D", dim)}
    descs |= {"dt_bias": wide("dt_bias", dim)}
    fi_ffi.selective_state_update(**descs, **call.options, stream=machine.stream)
    got, (value, magnitude) = placed["out"].get().astype(np.float64), expected
    assert (np.abs(got - value) <= magnitude * 2.0**-16 + np.abs(value) * 2.0**-7).all()
    assert placed["out"].intact() and placed["state"].intact()


def test_prepared(machine, rng):
    call = StateCall(rng, b=4, **sizes(machine))
    call.read_from()
    if machine.is_gpu:
        machine.need(call.module())
    expected = call.case()
    placed = {name: machine.place(array) for name, array in call.arrays.items()}
    descs = {name: array.desc() for name, array in placed.items()}
    made = fi_ffi.prepare(fi_ffi.selective_state_update, **descs, **call.options,
                          stream=machine.stream)  # fmt: skip
    made()
    machine.synchronize()
    assert expected.error("out", placed["out"].get())[1] <= 1


def wrong(call: StateCall, argument: str, **changes) -> None:
    options = {**call.options, **changes}
    refused(fi_ffi.selective_state_update, call.arrays, argument, **options)


@pytest.mark.parametrize(
    ("argument", "change"),
    [
        ("state", lambda a: a["state"][0]),
        ("state", lambda a: a["state"][:2]),  # fewer than requests
        ("state", lambda a: a["state"].astype(np.float64)),
        ("state", lambda a: np.repeat(a["state"], 2, axis=2)[:, :, ::2]),  # rows apart
        ("x", lambda a: a["x"][..., :8]),
        ("x", lambda a: np.repeat(a["x"], 2, axis=1)[:, ::2]),
        ("dt", lambda a: np.repeat(a["dt"][..., None], 16, axis=-1)),  # values of their own
        ("dt", lambda a: np.lib.stride_tricks.as_strided(a["dt"], (3, 4, 16), (8, 2, 2))),
        ("dt", lambda a: a["dt"][:, :3]),
        ("A", lambda a: np.repeat(a["A"], 2)[::2]),
        ("B", lambda a: a["B"].astype(np.float32)),
        ("C", lambda a: np.repeat(a["C"], 3, axis=1)[:, :3]),  # more groups than B
        ("D", lambda a: a["D"].astype(np.float16)),
        ("z", lambda a: a["z"][:1]),
        ("out", lambda a: a["out"].astype(np.float32)),
        ("out", lambda a: a["x"]),
        ("state_batch_indices", lambda a: a["state_batch_indices"][:2]),
        ("state_batch_indices", lambda a: a["state_batch_indices"].astype(np.uint8)),
        ("algorithm", lambda _: "fastest"),
        ("pad_slot_id", lambda _: 2**31),
        ("cache_steps", lambda _: -1),
        ("dt_softplus", lambda _: 1),
        ("num_accepted_tokens", lambda _: np.ones(3, np.int32)),
        ("intermediate_states_buffer", lambda a: a["state"][None]),
    ],
    ids=lambda given: given if isinstance(given, str) else "",
)
def test_refusals(argument, change, rng):
    call = StateCall(rng, **SMALL)
    call.read_from()
    wrong(call, argument, **{argument: change(call.arrays)})


@pytest.mark.parametrize(
    ("argument", "change"),
    [
        ("state_scale", lambda _: None),
        ("state_scale", lambda a: a["state_scale"][:-1]),
        ("state_scale", lambda a: a["state_scale"].astype(np.float16)),
        ("state_scale", lambda a: a["state_scale"][..., None].repeat(2, axis=-1)),
        ("state_scale", lambda a: np.repeat(a["state_scale"], 2, axis=1)[:, ::2]),
        ("state_scale", lambda a: a["x"]),
        ("rand_seed", lambda _: np.zeros(1, np.int64)),
        ("algorithm", lambda _: "horizontal"),
        ("intermediate_state_scales", lambda a: a["state_scale"][None]),
        ("philox_rounds", lambda _: 0),
    ],
    ids=lambda given: given if isinstance(given, str) else "",
)
def test_refusals_of_int16(argument, change, rng):
    call = StateCall(rng, dtypes=QUANTISED[0][0], **OF_INT16)
    wrong(call, argument, **{argument: change(call.arrays)})
    four = {**call.arrays, "state_scale": call.arrays["state_scale"][..., None]}
    fi_ffi.selective_state_update(**four, **call.options)  # FlashInfer's shape


def test_refusals_of_int16_and_of_rounding(rng):
    call = StateCall(rng, "steps", 3, 4, dtypes=QUANTISED[1][0], **OF_INT16)
    call.read_from()
    call.keep_each(4)
    scales = call.arrays["intermediate_state_scales"]
    wrong(call, "intermediate_state_scales", intermediate_state_scales=None)
    wrong(call, "intermediate_state_scales", intermediate_state_scales=scales[:, :3].copy())
    wrong(call, "intermediate_state_scales", intermediate_state_indices=None,
          intermediate_states_buffer=np.zeros((12, 4, 4, 16, 64), np.int16))  # fmt: skip
    for dstate in (32, 96, 320):
        narrow = StateCall(rng, dtypes=QUANTISED[0][0], heads=4, dim=16, dstate=dstate)
        wrong(narrow, "state")
    plain = StateCall(rng, **SMALL)
    wrong(plain, "state_scale", state_scale=np.ones((12, 4, 16), np.float32))
    wrong(plain, "rand_seed", rand_seed=np.zeros(1, np.int64))
    half = StateCall(rng, dtypes=AT_RANDOM[0][0], **SMALL)
    for seed in (np.zeros(2, np.int64), np.zeros(1, np.int32), 7):
        wrong(half, "rand_seed", rand_seed=seed)
    half.at_random(3)
    for rounds in (0, -1, True, 2.0):
        wrong(half, "philox_rounds", philox_rounds=rounds)
    padded = StateCall(rng, dtypes=QUANTISED[0][0], **OF_INT16)
    padded.read_from(1)
    padded.options["algorithm"] = "simple"
    with pytest.raises(fi_ffi.ArgumentError, match="`state_batch_indices`: got -1 .* whose scale"):
        fi_ffi.selective_state_update(**padded.arrays, **padded.options)


def test_modules_of_int16_and_of_rounding(rng):
    """Named as FlashInfer's generator names them."""
    names = (
        "selective_state_update_s_{}_i_bf16_w_bf16_a_f32_si_i32_d_64_ds_128_nt_{}_cs_i32_na_i32{}"
    )
    for given, kind, more in ((QUANTISED[0], "i16", "_sc_f32"), (AT_RANDOM[1], "f16", "_pr_10")):
        dtypes, indices, steps = given
        call = StateCall(rng, "steps", 2, steps, dtypes=dtypes, indices=indices)
        call.read_from()
        if kind == "f16":
            call.at_random(1)
        assert call.module("cpu") == names.format(kind, steps, more) + "_sm90"
    asked = {"state_dtype": "float16", "philox_rounds": 7, "release": "0.6.13"}
    told = fi_ffi.selective_state_update.supports(90, **asked)
    assert told.status == "missing" and "_pr_7_sm90" in told.build
    early = fi_ffi.selective_state_update.supports(90, **asked | {"release": "0.6.9"})
    assert early.status == "refused" and ">=0.6.12" in early.reason


def test_refusals_of_several_tokens(rng):
    call = StateCall(rng, "steps", 3, 4, **SMALL)
    call.read_from(width=4)
    narrow = call.arrays["state_batch_indices"][:, :3]
    wrong(call, "state_batch_indices", state_batch_indices=narrow)
    wrong(call, "state_batch_indices", state_batch_indices=None,
          num_accepted_tokens=np.ones(3, np.int32))  # fmt: skip
    wrong(call, "num_accepted_tokens", num_accepted_tokens=np.ones(2, np.int32))
    call.keep_each(4)
    wrong(call, "cache_steps", cache_steps=3)
    wrong(call, "dst_state_batch_indices",
          dst_state_batch_indices=call.arrays["state_batch_indices"])  # fmt: skip
    wrong(call, "intermediate_states_buffer", intermediate_state_indices=None)
    odd = StateCall(rng, groups=3, **SMALL)
    wrong(odd, "state")  # 4 heads in 3 groups
    heads = StateCall(rng, "steps", 3, 4, groups=2, **{**SMALL, "heads": 6})
    wrong(heads, "B")
    long = StateCall(rng, "sequences", 3, 4, **SMALL)
    wrong(long, "cache_steps", cache_steps=0)


def test_what_a_gpu_would_read_past_the_states(rng):
    call = StateCall(rng, **SMALL)
    call.read_from()
    call.arrays["state_batch_indices"][1] = len(call.arrays["state"])
    with pytest.raises(fi_ffi.ArgumentError, match="`state_batch_indices`: got 12 .* less than 12"):
        fi_ffi.selective_state_update(**call.arrays, **call.options)


def misplaced(call: StateCall, argument: str, at: int, value: int) -> str:
    """Give an index another value; the refusal, which wrote nothing."""
    array = call.arrays[argument].copy()
    array[at] = value
    arrays = {**call.arrays, argument: array}
    before = {name: each.tobytes() for name, each in arrays.items()}
    with pytest.raises(fi_ffi.ArgumentError) as caught:
        fi_ffi.selective_state_update(**arrays, **call.options)
    assert {name: each.tobytes() for name, each in arrays.items()} == before
    assert (caught.value.op, caught.value.argument) == ("selective_state_update", argument)
    return f"{caught.value.got}, {caught.value.expected}"


@pytest.mark.parametrize("indices", ["int32", "int64"])
def test_indices_that_name_no_place(indices, rng):
    """Below 0 (but for the padding), past the end, and as far as the dtype reaches."""
    limits = np.iinfo(indices)
    far = (limits.max, limits.min, -2)
    call = StateCall(rng, indices=indices, **SMALL)
    call.read_from()
    call.write_to()
    slots = len(call.arrays["state"])
    for name in ("state_batch_indices", "dst_state_batch_indices"):
        for value in (slots, *far):
            at = int(rng.integers(call.b))
            told = misplaced(call, name, at, value)
            assert told == f"{value} for request {at}, 0 or more, and less than {slots}"
    each = StateCall(rng, "steps", 3, 4, indices=indices, **SMALL)
    each.read_from()
    each.keep_each(4)
    room = len(each.arrays["intermediate_states_buffer"])
    for value in (room, -1, *far):
        told = misplaced(each, "intermediate_state_indices", 1, value)
        assert told == f"{value} for request 1, 0 or more, and less than {room}"


def test_starts_past_the_tokens(rng):
    call = StateCall(rng, "sequences", 3, 4, **SMALL)
    count = len(call.arrays["x"])
    assert misplaced(call, "cu_seqlens", 0, -1) == "-1 in element 0, 0 or more"
    told = misplaced(call, "cu_seqlens", 3, count + 1)
    assert told == f"{count + 1} in element 3, tokens = {count} or less"
    longer = StateCall(rng, "sequences", 2, 4, **SMALL)
    longer.options["cache_steps"] = 3  # the first has 4
    with pytest.raises(fi_ffi.ArgumentError, match="steps.cu_seqlens. = 4 in element 0"):
        fi_ffi.selective_state_update(**longer.arrays, **longer.options)


def test_more_accepted_than_there_are_slots_for(rng):
    call = StateCall(rng, "steps", 3, 4, **SMALL)
    call.read_from(width=4)
    call.arrays["num_accepted_tokens"] = np.array([1, 4, 2], np.int32)
    fi_ffi.selective_state_update(**call.arrays, **call.options)
    told = misplaced(call, "num_accepted_tokens", 1, 5)
    assert told == "num_accepted_tokens[:b] = 5 in element 1, width = 4 or less"


def test_supports():
    asked = fi_ffi.selective_state_update.supports(90, release="0.6.13")
    assert not asked and asked.status == "missing" and asked.build.endswith("_sm90")
    assert (
        "_ds_64_nt_4_"
        in fi_ffi.selective_state_update.supports(
            100, release="0.6.13", dstate=64, ntokens_mtp=4
        ).module
    )
    refused = fi_ffi.selective_state_update.supports(90, release="0.6.3")
    assert refused.status == "refused"
    with pytest.raises(TypeError, match="unexpected"):
        fi_ffi.selective_state_update.supports(90, heads=3)
    assert set(ALGORITHMS) >= {"auto", "simple"} and PAD == -1


@pytest.mark.parametrize(("major", "arch"), [(8, ""), (9, "sm90"), (10, "sm100"), (12, "sm100")])
def test_modules_of_each_generation(major, arch):
    """FlashInfer has a generator for each, and one for all before."""
    assert mamba._arch(major) == arch
