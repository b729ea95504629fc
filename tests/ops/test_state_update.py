"""`selective_state_update` on the CPU and on a GPU, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest

import fi_ffi
from fi_ffi.ops.mamba import ALGORITHMS

from tests.helpers.state_calls import PAD, StateCall

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


def test_it_is_its_definition(rng):
    """One element at a time."""
    call = StateCall(rng, "steps", 2, 3, heads=2, groups=1, dim=16, dstate=32)
    call.read_from()
    given = {name: array.astype(np.float64) for name, array in call.arrays.items()}
    found = {name: value for name, (value, _) in call.case().expected.items()}
    for i, head, d in np.ndindex(2, 2, 16):
        state = given["state"][int(given["state_batch_indices"][i]), head, d].copy()
        for step in range(3):
            dt = np.log(1 + np.exp(given["dt"][i, step, head] + given["dt_bias"][head]))
            x, z = given["x"][i, step, head, d], given["z"][i, step, head, d]
            for n in range(32):
                state[n] = state[n] * np.exp(given["A"][head] * dt)
                state[n] += dt * given["B"][i, step, 0, n] * x
            read = float(state @ given["C"][i, step, 0]) + given["D"][head] * x
            read *= z / (1 + np.exp(-z))
            np.testing.assert_allclose(found["out"][i, step, head, d], read, rtol=1e-9)
        slot = int(given["state_batch_indices"][i])
        np.testing.assert_allclose(found["state"][slot, head, d], state, rtol=1e-9)


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
    before = {name: array.copy() for name, array in call.arrays.items()}
    with pytest.raises((fi_ffi.ArgumentError, fi_ffi.ArgumentTypeError)) as raised:
        fi_ffi.selective_state_update(**{**call.arrays, **call.options, **changes})
    assert raised.value.argument == argument
    for name in ("state", "out"):
        assert call.arrays[name].tobytes() == before[name].tobytes()


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
    with pytest.raises(fi_ffi.KernelError, match="has state 12 of 12"):
        fi_ffi.selective_state_update(**call.arrays, **call.options)


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
