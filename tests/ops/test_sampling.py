"""Sampled tokens, one by one: on the CPU, and (tests/gpu) on a GPU."""

from __future__ import annotations

import numpy as np
import pytest

import fi_ffi
from fi_ffi.ops.functions import OPS
from fi_ffi.reference import from_formula

from tests.helpers.cases import make_case
from tests.helpers.every_op import check_on, check_replayed
from tests.helpers.inputs.sampling import probabilities
from tests.helpers.sampling_calls import ARRAYS, DRAWING, SAMPLERS, SEEDS, make, run

# One token, odd sizes, whole vectors, a block of the kernel, and vocabularies.
SIZES = (1, 2, 3, 5, 31, 128, 1000, 1024, 4096, 4099, 32000)
LARGE = (128256, 128257, 262144, 1048575)


@pytest.mark.parametrize("dtype", ["int32", "int64"])
@pytest.mark.parametrize("name", DRAWING)
def test_vocabularies(name, dtype, machine, rng):
    for h in SIZES + LARGE * machine.is_gpu:
        for without in ((), (*SEEDS, *ARRAYS, "maybe_indices")):
            case = make(name, rng, h=h, dtype=dtype, without=without)
            assert check_on(machine, case) <= 1, h


@pytest.mark.parametrize("name", DRAWING)
def test_many_outputs(name, machine, rng):
    for n, r in ((1, 1), (300, 300), (500, 3)):
        without = ARRAYS if r < n else ()
        assert check_on(machine, make(name, rng, n=n, r=r, h=64, without=without)) <= 1


@pytest.mark.parametrize("spread", [0.0, 1e-3, 1.0, 6.0, 20.0])
@pytest.mark.parametrize("name", SAMPLERS)
def test_flat_and_peaked_rows(name, spread, machine, rng):
    for h in (50, 3000):
        tables = {"probs": probabilities(rng, 9, h, spread=spread)}
        assert check_on(machine, make(name, rng, n=9, h=h, tables=tables)) <= 1


@pytest.mark.parametrize("name", SAMPLERS)
def test_ties_and_single_tokens(name, machine, rng):
    """Two values only; one token only; a sum that is not 1."""
    h = 64
    two = rng.choice([0.5, 1.0], (9, h))
    one = np.eye(h)[rng.integers(0, h, 9)]
    almost = probabilities(rng, 9, h)
    for probs in (two / two.sum(1, keepdims=True), one, 0.9 * almost, 0.999 * one):
        assert check_on(machine, make(name, rng, n=9, h=h, tables={"probs": probs})) <= 1


@pytest.mark.parametrize("value", [0.0, np.nan])
@pytest.mark.parametrize("name", SAMPLERS)
def test_rows_without_a_token(name, value, machine, rng):
    """They are told of, and the rows beside them are as ever."""
    probs = probabilities(rng, 6, 100)
    probs[[1, 4]] = value
    case = make(name, rng, n=6, tables={"probs": probs}, without=(*SEEDS, *ARRAYS, "maybe_indices"))
    got = run(machine, name, case.arrays, **case.scalars)
    assert case.error("output", got["output"])[1] <= 1
    assert case.error("valid", got["valid"])[1] <= 1
    # Of a row of zeros, 0 is the greatest: min_p leaves all of them.
    expected = [True, False, True, True, False, True]
    if name == "min_p_sampling_from_probs" and value == 0:
        expected = [True] * 6
    else:
        assert (got["output"][[1, 4]] == 0).all()
    assert got["valid"].tolist() == expected


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_nan_among_probabilities_is_never_drawn(name, machine, rng):
    probs = probabilities(rng, 6, 40)
    probs[:, 7] = np.nan
    case = make(name, rng, n=6, h=40, tables={"probs": probs})
    assert check_on(machine, case) <= 1
    assert 7 not in run(machine, name, case.arrays, **case.scalars)["output"]


@pytest.mark.parametrize("name", DRAWING)
def test_the_same_words_are_the_same_tokens(name, machine, rng):
    """From numbers and from arrays, of either dtype; others are of another seed or offset."""
    case = make(name, rng, n=64, h=1000, without=SEEDS, seed_val=2**62 + 5, offset_val=2**40 + 1)
    of_numbers = run(machine, name, case.arrays, **case.scalars)["output"]
    for _ in range(3):
        assert (run(machine, name, case.arrays, **case.scalars)["output"] == of_numbers).all()
    for dtype in (np.int64, np.uint64):
        arrays = case.arrays | {
            "maybe_seed_arr": np.array([2**62 + 5], dtype),
            "maybe_offset_arr": np.array([2**40 + 1], dtype),
        }
        scalars = case.scalars | {"seed_val": 1, "offset_val": 2}
        assert (run(machine, name, arrays, **scalars)["output"] == of_numbers).all()
    for other in ({"seed_val": 2**62 + 6}, {"seed_val": 5}, {"offset_val": 2**40 + 5}):
        tokens = run(machine, name, case.arrays, **case.scalars | other)["output"]
        assert (tokens != of_numbers).any()
    negative = case.scalars | {"seed_val": -1}
    arrays = case.arrays | {"maybe_seed_arr": np.array([2**64 - 1], np.uint64)}
    one, two = (run(machine, name, of, **negative)["output"] for of in (case.arrays, arrays))
    assert (one == two).all()


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("name", DRAWING)
def test_deterministic_or_not(name, deterministic, machine, rng):
    case = make(name, rng, n=33, h=5000, deterministic=deterministic)
    assert check_on(machine, case) <= 1


@pytest.mark.parametrize("name", DRAWING)
def test_outputs_share_rows(name, machine, rng):
    """More outputs than rows, each with words of its own."""
    flat = rng.uniform(1, 2, (200, 50))
    source = {"logits": flat} if "logits" in name else {"probs": flat / flat.sum(1, keepdims=True)}
    for dtype in ("int32", "int64"):
        case = make(name, rng, n=200, r=200, h=50, dtype=dtype, without=ARRAYS,
                    tables={"maybe_indices": rng.integers(0, 2, 200), **source})  # fmt: skip
        assert check_on(machine, case) <= 1
        tokens = run(machine, name, case.arrays, **case.scalars)["output"]
        if "top" not in name and "min" not in name:  # which may leave one token
            assert len({*tokens[case.arrays["maybe_indices"] == 0]}) > 1


@pytest.mark.parametrize("name", [name for name in SAMPLERS if "top" in name])
def test_filters_that_leave_little(name, machine, rng):
    """One token, or the fewest there can be, and none: all of it ends."""
    probs = probabilities(rng, 40, 300)
    for more in ({"top_k_val": 1}, {"top_p_val": 1e-6}, {"top_p_val": 0.0}, {"top_p_val": 1.0}):
        known = {arg.name for arg in OPS[name].row.args}
        if not more.keys() <= known:
            continue
        if "top_k_top_p" in name:
            more = {"top_k_val": 300.0, "top_p_val": 1.0} | more
        case = make(name, rng, n=40, h=300, tables={"probs": probs},
                    without=(*ARRAYS, "maybe_indices"), **more)  # fmt: skip
        got = run(machine, name, case.arrays, **case.scalars)
        assert case.error("output", got["output"])[1] <= 1
        assert case.error("valid", got["valid"])[1] <= 1
        if more.get("top_k_val") == 1 or more.get("top_p_val") == 1e-6:
            assert (got["output"] == probs.argmax(axis=1)).all()
            assert got["valid"].all()
        if more.get("top_p_val") == 0:
            assert not got["valid"].any()


def test_k_of_0_in_an_array_leaves_no_token(machine, rng):
    k = np.array([0, 1, 0, 5])
    case = make("top_k_sampling_from_probs", rng, n=4, tables={"maybe_top_k_arr": k},
                without=("maybe_indices",))  # fmt: skip
    got = run(machine, "top_k_sampling_from_probs", case.arrays, **case.scalars)
    assert case.error("output", got["output"])[1] <= 1
    assert got["valid"].tolist() == [False, True, False, True]


@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
def test_logits(scale, machine, rng):
    for h in (1, 7, 64, 5000):
        logits = scale * rng.standard_normal((20, h))
        case = make("sampling_from_logits", rng, n=20, h=h, tables={"logits": logits})
        assert check_on(machine, case) <= 1


def test_masked_logits_are_never_drawn(machine, rng):
    logits = rng.standard_normal((30, 100)).astype(np.float32)
    logits[:, ::2] = -np.inf
    case = make("sampling_from_logits", rng, n=30, tables={"logits": logits})
    tokens = run(machine, "sampling_from_logits", case.arrays, **case.scalars)["output"]
    assert case.error("output", tokens)[1] <= 1
    assert (tokens % 2 == 1).all()


@pytest.mark.parametrize("name", [*DRAWING, "chain_speculative_sampling"])
def test_replayed(name, machine, rng):
    sizes = {"n": 5, "r": 5, "s": 3, "h": 4096}
    tables = {}
    if "chain" in name:  # which adds to what its results were
        names = ("output_accepted_token_num", "output_emitted_draft_token_num")
        tables = {name: np.full(5, -1) for name in names}
    case = make_case(OPS[name].row, sizes, {"I": "int32", "S": "int64"}, rng, tables)
    for counts in tables:
        case.expected.pop(counts)
    assert check_replayed(machine, case) <= 1


def test_a_graph_draws_anew_from_arrays_that_change(machine, rng):
    """Seeds and offsets in memory, which change between replays; numbers cannot."""
    name, n = "top_p_sampling_from_probs", 64
    machine.need("sampling")
    case = make(name, rng, n=n, h=1000, without=(*ARRAYS, "maybe_indices"), top_p_val=0.9)
    placed = {key: machine.place(array) for key, array in case.arrays.items()}
    descs = {key: array.desc() for key, array in placed.items()}

    def launch():
        OPS[name](**descs, **case.scalars, stream=machine.stream)

    launch()
    machine.synchronize()
    replay, seen = machine.capture(launch), []
    for offset in (0, 32, 64, 0):
        new = machine.place(np.array([offset], np.int64))
        copy_to(machine, placed["maybe_offset_arr"], new)
        replay()
        machine.synchronize()
        tokens = placed["output"].get()
        arrays = case.arrays | {"maybe_offset_arr": np.array([offset], np.int64)}
        assert (tokens == run(machine, name, arrays, **case.scalars)["output"]).all()
        seen.append(tuple(tokens))
    assert len({*seen}) == 3 and seen[0] == seen[3]


def copy_to(machine, placed, new):
    if not machine.is_gpu:
        placed.array[...] = new.array
        return
    from cuda.bindings import runtime

    from fi_ffi.cli.cuda import check

    kind = runtime.cudaMemcpyKind.cudaMemcpyDeviceToDevice
    check(runtime.cudaMemcpyAsync(placed.ptr, new.ptr, new.nbytes, kind, machine.stream))


def test_a_prepared_call_draws_on(machine, rng):
    """An offset that each launch moves on."""
    name = "top_k_sampling_from_probs"
    machine.need("sampling")
    case = make(name, rng, n=32, h=500, without=(*SEEDS, *ARRAYS), top_k_val=200, seed_val=3)
    placed = {key: machine.place(array) for key, array in case.arrays.items()}
    descs = {key: array.desc() for key, array in placed.items()}
    call = OPS[name].prepare(**descs, **case.scalars, stream=machine.stream)
    seen = set()
    for step in range(5):
        call.update(offset_val=32 * step)
        call()
        machine.synchronize()
        tokens = placed["output"].get()
        scalars = case.scalars | {"offset_val": 32 * step}
        assert (tokens == run(machine, name, case.arrays, **scalars)["output"]).all()
        seen.add(tuple(tokens))
    assert len(seen) == 5


def test_streams_at_once(machine, rng):
    """Each call's tokens are its own, whatever else runs."""
    machine.need("sampling")
    cases, calls = [], []
    for stream in machine.streams(4):
        case = make("top_p_sampling_from_probs", rng, n=50, h=4096)
        placed = {key: machine.place(array) for key, array in case.arrays.items()}
        cases.append((case, placed))
        descs = {key: array.desc() for key, array in placed.items()}
        calls.append((descs, case.scalars, stream))
    for _ in range(machine.rounds(20)):
        for descs, scalars, stream in calls:
            fi_ffi.top_p_sampling_from_probs(**descs, **scalars, stream=stream)
    machine.synchronize()
    for case, placed in cases:
        assert case.error("output", placed["output"].get())[1] <= 1
        assert case.error("valid", placed["valid"].get())[1] <= 1


def kernel_of(name, variant=""):
    row = next(row for row in OPS[name].rows if row.variant == variant)
    return from_formula(row.formula, [arg.name for arg in row.args])


@pytest.mark.parametrize("name", SAMPLERS)
def test_up_to_0_6_6_nothing_tells_what_is_valid(name, rng):
    """The older forms' references, beside that of the form with all arguments."""
    case = make(name, rng, n=5, without=SEEDS, seed_val=11, offset_val=3)
    values = [case.arrays.get(arg.name, case.scalars.get(arg.name)) for arg in OPS[name].row.args]
    variants = ("", "_without_valid", "_of_numbers")
    now, before, first = (kernel_of(name, variant) for variant in variants)
    now(*values)
    tokens = case.arrays["output"].copy()
    without = [*values[:2], *values[3:]]
    for kernel, given in ((before, without), (first, [*without[:-4], 11, 3])):
        case.arrays["output"][...] = -1
        kernel(*given)
        assert (case.arrays["output"] == tokens).all()


def test_a_seed_for_each_output(rng):
    """As it is from 0.7.2 on, where an array of parameters is of the rows, too."""
    n, h = 6, 200
    probs = np.tile(probabilities(rng, h), (n, 1))
    seeds, offsets = rng.integers(0, 2**63, n), rng.integers(0, 2**63, n)
    output, valid = np.zeros(n, np.int32), np.zeros(n, np.bool_)
    k = np.arange(1, n + 1, dtype=np.int32) * 20
    indices = rng.integers(0, n, n).astype(np.int32)
    kernel = kernel_of("top_k_sampling_from_probs", "_by_row")
    kernel(probs, output, valid, indices, k, 0, True, seeds, 0, offsets, 0)
    row = next(r for r in OPS["top_k_sampling_from_probs"].rows if r.variant == "_by_row")
    tables = {"probs": probs, "maybe_indices": indices, "maybe_top_k_arr": k,
              "maybe_seed_arr": seeds, "maybe_offset_arr": offsets}  # fmt: skip
    sizes = {"n": n, "r": n, "h": h, "seeds": n, "offsets": n}
    case = make_case(row, sizes, {"I": "int32", "S": "int64"}, rng, tables)
    assert case.error("output", output)[1] <= 1
    output[...] = (output + 1) % h
    assert case.error("output", output)[1] > 1
