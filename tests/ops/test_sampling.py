"""Samplers and filters of whole rows: tokens that can be told, and their scratch."""

from __future__ import annotations

import numpy as np
import pytest

import fi_ffi
from fi_ffi.ops.call import memory
from fi_ffi.ops.functions import OPS
from fi_ffi.reference import sampling as reference
from fi_ffi.reference.renorm import top_p_error

from tests.helpers.cases import aligned, make_case
from tests.helpers.every_op import check_on
from tests.helpers.inputs.sampling import ends, probabilities
from tests.helpers.sampling_calls import (
    APART,
    ARRAYS,
    CLOSE,
    DRAWING,
    SAMPLERS,
    SEEDS,
    TOP_P,
    make,
    run,
)
from tests.ops.test_results import CHAIN, SCRATCH, TOP_K

FILTERED = ("maybe_temperature_arr", *ARRAYS)


def of_rows(name, rng, n=5, h=100, dtype="float32", tables=None, **more):
    sizes = {"n": n, "h": h, "workspace_size": 2**20}
    return make_case(OPS[name].row, sizes, {"T": dtype}, rng, tables, **more)


def judged(case, got):
    return all(case.error(out, got[out])[1] <= 1 for out in case.expected)


@pytest.mark.parametrize("value", [0.0, 1e-40, np.nan])
@pytest.mark.parametrize("name", SAMPLERS)
def test_rows_without_a_token(name, value, machine, rng):
    """They are told of, and the rows beside them are as ever. Subnormal numbers count as 0."""
    probs = probabilities(rng, 6, 100)
    probs[[1, 4]] = value
    case = make(name, rng, n=6, tables={"probs": probs}, without=(*SEEDS, *ARRAYS, "maybe_indices"))
    got = run(machine, name, case.arrays, **case.scalars)
    assert judged(case, got)
    # Of a row of zeros, 0 is the greatest: min_p leaves all of them, and draws the last.
    expected = [True, False, True, True, False, True]
    if name == "min_p_sampling_from_probs" and value < 1:
        expected = [True] * 6
        assert (got["output"][[1, 4]] == 99).all()
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
        assert judged(case, got)
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


def test_a_temperature_of_0_makes_all_equal(machine, rng):
    case = of_rows("softmax", rng, 4, 100, temperature_val=0.0, without=FILTERED)
    assert check_on(machine, case) <= 1
    got = run(machine, "softmax", case.arrays, **case.scalars)["output"]
    assert (np.abs(got - 0.01) < 1e-7).all()


def test_masked_logits(machine, rng):
    """-inf is a probability of 0, whole slices of it too; a row of it alone has none."""
    for h in (100, 50000):
        logits = rng.standard_normal((4, h)).astype(np.float32)
        logits[0, ::3] = -np.inf
        logits[1, :-1] = -np.inf
        logits[2, : h // 2] = -np.inf
        case = of_rows("softmax", rng, 4, h, tables={"logits": logits}, without=FILTERED)
        assert check_on(machine, case) <= 1
        logits[3] = -np.inf
        arrays = case.arrays | {"logits": logits}
        got = run(machine, "softmax", arrays, **case.scalars)["output"]
        assert (got[logits == -np.inf][: h // 3] == 0).all()
        assert np.isnan(got[3]).all() and np.isfinite(got[:3]).all()


@pytest.mark.parametrize("name", TOP_K)
def test_ties_are_all_kept(name, machine, rng):
    source = rng.integers(1, 5, (8, 600)) / 1024
    source[7] = source[7, 0]
    for k in (1, 100, 300, 599):
        tables = {OPS[name].row.tensors[0].name: source}
        case = of_rows(name, rng, 8, 600, "bfloat16", tables, without=FILTERED, top_k_val=k)
        assert check_on(machine, case) <= 1
        out = case.row.tensors[1].name
        got = run(machine, name, case.arrays, **case.scalars)[out].astype(np.float64)
        kept = got > (0 if name == "top_k_renorm_probs" else -np.inf)
        assert (kept.sum(axis=1) >= k).all() and kept[7].all()


@pytest.mark.parametrize("name", TOP_K)
def test_an_array_of_k(name, machine, rng):
    """0 leaves nothing, and as many as there are, or more, leave all."""
    k = np.array([0, 1, 2, 99, 100, 101, 2**31 - 1])
    case = of_rows(name, rng, 7, 100, tables={"maybe_top_k_arr": k})
    assert check_on(machine, case) <= 1
    out = case.row.tensors[1].name
    got = run(machine, name, case.arrays, **case.scalars)[out]
    kept = got > (0 if name == "top_k_renorm_probs" else -np.inf)
    assert kept.sum(axis=1).tolist() == [0, 1, 2, 99, 100, 100, 100]


def test_a_search_that_would_not_end_is_known():
    """So that no test here hangs a GPU; tests/gpu has one that does."""
    assert ends(np.array(APART), TOP_P) and not ends(np.array(CLOSE), TOP_P)


def test_top_p_of_rows_of_zeros_and_of_one_token(machine, rng):
    for h in (50, 4000):
        probs = probabilities(rng, 4, h)
        probs[1] = 0
        probs[2] = np.eye(h)[3]
        case = of_rows("top_p_renorm_probs", rng, 4, h, tables={"probs": probs})
        assert check_on(machine, case) <= 1
        got = run(machine, "top_p_renorm_probs", case.arrays, **case.scalars)["renorm_probs"]
        assert (got[1] == 0).all() and got[2, 3] == 1 and got[2].sum() == 1


@pytest.mark.parametrize("is_deterministic", [True, False])
def test_the_workspace_is_as_large_as_it_must_be(is_deterministic, machine, rng):
    """And no byte less; what lies beside it is not written."""
    for n, h in ((1, 2048), (5, 4096), (3, 50_000)):
        case = of_rows("top_p_renorm_probs", rng, n, h, is_deterministic=is_deterministic)
        need = fi_ffi.top_p_renorm_workspace_size(n, h, is_deterministic)
        case.arrays["workspace"] = aligned(need, 128)
        got = run(machine, "top_p_renorm_probs", case.arrays, **case.scalars)
        assert judged(case, got)
        case.arrays["workspace"] = aligned(need - 1, 128)
        with pytest.raises(fi_ffi.ArgumentError, match=f"{need} bytes or more"):
            run(machine, "top_p_renorm_probs", case.arrays, **case.scalars)


# What each filter is given in the numbers' place, and numbers that would be refused alone.
BESIDE = {
    "maybe_temperature_arr": ("temperature_val", (0.0, -1.0)),
    "maybe_top_k_arr": ("top_k_val", (0, -5, 2**31)),
    "maybe_top_p_arr": ("top_p_val", (0.0, 2.5, -1.0)),
    "maybe_min_p_arr": ("min_p_val", (0.0, -0.5)),
}
FILTERING = [
    (name, array) for name, op in OPS.items() for array in BESIDE
    if op.row.module == "sampling" and array in [arg.name for arg in op.row.tensors]
]  # fmt: skip


@pytest.mark.parametrize(("name", "array"), FILTERING)
def test_a_number_for_each_row_in_a_column(name, array, machine, rng):
    """[n, 1] is [n]; and the number beside it is not looked at."""
    case = make(name, rng, n=6, h=300, without=("maybe_indices",)) if name in DRAWING else (
        of_rows(name, rng, 6, 3000))  # fmt: skip
    written = [arg.name for arg in OPS[name].row.tensors if arg.writes and not arg.is_scratch]
    wanted = run(machine, name, case.arrays, **case.scalars)
    assert judged(case, wanted)
    column = case.arrays | {array: case.arrays[array].reshape(-1, 1)}
    scalar, values = BESIDE[array]
    of_type = type(case.scalars[scalar])
    for arrays in (case.arrays, column):
        for value in map(of_type, values):
            got = run(machine, name, arrays, **case.scalars | {scalar: value})
            assert all(got[out].tobytes() == wanted[out].tobytes() for out in written)
    without = {key: value for key, value in case.arrays.items() if key != array}
    with pytest.raises(fi_ffi.ArgumentError, match=scalar):
        run(machine, name, without, **case.scalars | {scalar: of_type(values[-1])})
    for shape in ((1, 6), (3, 2), (6, 1, 2)):
        wrong = np.resize(case.arrays[array], shape)
        with pytest.raises(fi_ffi.ArgumentError, match=array):
            run(machine, name, case.arrays | {array: wrong}, **case.scalars)
    two = np.asfortranarray(np.resize(case.arrays[array], (6, 2)))  # the first of them side by side
    with pytest.raises(fi_ffi.ArgumentError, match=f"{array}.*rank 1"):
        OPS[name](**case.arrays | {array: two}, **case.scalars)
    every_other = np.repeat(case.arrays[array], 2).reshape(-1, 2)[:, :1]
    with pytest.raises(fi_ffi.ArgumentError, match="contiguous"):
        OPS[name](**case.arrays | {array: every_other}, **case.scalars)


def test_draws_beyond_what_a_kernel_counts(rng):
    """Their numbers begin again; on the CPU they have one each, of the same distribution."""
    count, size = 80_000, 2**16 + 4
    assert count * size > 2**32
    logits = np.full((2, size), -np.inf, np.float32)
    chosen = [3, 70, size - 1]
    logits[0, chosen], logits[1, chosen[:2]] = np.log([0.2, 0.5, 0.3]), np.log([0.9, 0.1])
    rows = (np.arange(count) % 4 == 0).astype(np.int32)
    tokens = np.full(count, -1, np.int32)
    seed = int(rng.integers(2**62))
    fi_ffi.sampling_from_logits(logits, tokens, rows, seed_val=seed)
    for row, wanted in enumerate(np.exp(logits[:, chosen].astype(float))):
        of_row = tokens[rows == row]
        parts = [(of_row == token).mean() for token in chosen]
        assert np.isin(of_row, chosen).all()
        assert np.abs(np.array(parts) - wanted).max() < 7 / len(of_row) ** 0.5
    again = np.full(count, -1, np.int32)
    arrays = {name: np.full(count, value, np.uint64) for name, value in
              (("seed_val", seed), ("offset_val", 0))}  # fmt: skip
    assert reference._with_one_number(
        {"output": again, "logits": logits.astype(float), "maybe_indices": rows,
         "maybe_seed_arr": arrays["seed_val"], "maybe_offset_arr": arrays["offset_val"]}
    ).tolist() == tokens.tolist()  # fmt: skip
    # As a kernel counts them: output 2**16 has the numbers of the first.
    first, later = (
        list(reference._from_logits({"seed_val": 5, "offset_val": 0}, x, i, 0, 1.0))
        for x in [rng.standard_normal(2**16)] for i in (1, 2**16 + 1)
    )  # fmt: skip
    assert first == later


def test_draws_that_would_repeat_others():
    """Where output i starts, i * h of 2**32, another has started."""
    cuda = {"device": "cuda:0"}
    for h, most in ((2**20, 2**12), (2**17, 2**15), (128256, 2**24), (3 * 2**18, 2**14)):
        arrays = {
            "logits": fi_ffi.TensorDesc(1 << 40, (1, h), "float32", **cuda),
            "output": fi_ffi.TensorDesc(2 << 40, (most + 1,), "int32", **cuda),
            "maybe_indices": fi_ffi.TensorDesc(3 << 40, (most + 1,), "int32", **cuda),
        }
        with pytest.raises(fi_ffi.ArgumentError, match="gcd"):
            fi_ffi.sampling_from_logits(**arrays, stream=0)


def test_what_may_be_lost_of_all(rng):
    """At 1.0: of a flat row some of those within a quarter of the least's power of two."""
    p = np.full(5000, 2.0**-12)
    p[:100] = 2.0**-13 * rng.uniform(1, 1.25, 100)
    p = p.astype(np.float32).astype(float)
    order = np.argsort(p)

    def error(lost, top_p):
        got = p.copy()
        got[lost] = 0
        return top_p_error(p, got / got.sum(), top_p, 2.0**-19)[1]

    assert error(order[:20], 1.0) <= 1 and error([], 1.0) <= 1
    assert error(order[:20], 0.9999) == np.inf  # enough without, or not enough with
    assert error(order[:150], 1.0) > 1 and error(order[-3:], 1.0) > 1


def test_what_top_p_renorm_needs():
    size = fi_ffi.top_p_renorm_workspace_size
    assert size(1000, 2047) == 0 == size(0, 4096)
    # A state of 384 bytes, 2048 buckets of 12, and two buffers of 256 floats for 64 or less.
    assert size(2, 2048) == 768 + 2 * 2048 * 12 + 2 * 2 * 1024
    assert size(1, 128256) == 512 + 2048 * 12 + 2 * 4 * 4096
    assert size(2, 4096) - size(2, 4096, False) == 2 * 2048 * 4  # floats instead of 64 bits
    with pytest.raises(fi_ffi.ArgumentTypeError, match="is_deterministic"):
        size(2, 4096, 1)
    for wrong in (-1, 1.5, "1", None):
        with pytest.raises(fi_ffi.ArgumentError):
            size(wrong, 4096)
        with pytest.raises(fi_ffi.ArgumentError):
            size(1, wrong)


def test_scratch_grows_with_what_it_is_for(rng):
    """A stream's own: each call has enough, and what is enough is kept."""
    seen = []
    for n, h in ((1, 4096), (20, 4096), (3, 4096), (1, 128), (200, 4096)):
        case = of_rows("top_p_renorm_probs", rng, n, h, without=SCRATCH)
        fi_ffi.top_p_renorm_probs(**case.arrays, **case.scalars)
        assert case.error("renorm_probs", case.arrays["renorm_probs"])[1] <= 1
        (own,) = [
            of for name, of in memory._owned[memory.HOST].items()
            if name[0] == "top_p_renorm_probs"
        ]  # fmt: skip
        have = own.desc.shape[0]
        assert have >= fi_ffi.top_p_renorm_workspace_size(n, h)
        seen.append(have)
    assert seen == sorted(seen)


def test_a_capture_finds_scratch_or_says_what_to_do(gpu, rng):
    """None can be made while a stream records; nor more of it."""
    row = OPS["top_p_renorm_probs"].row
    calls = []
    for n in (1, 300):
        case = of_rows("top_p_renorm_probs", rng, n, 4096, without=SCRATCH)
        placed = {key: gpu.place(array) for key, array in case.arrays.items()}
        calls.append(({key: array.desc() for key, array in placed.items()}, case.scalars, placed))
    stream = gpu.streams(1)[0]
    (small, few, kept), (large, many, _) = calls
    gpu.runtime.capturing.add(stream)
    with pytest.raises(fi_ffi.ArgumentError, match="before the capture"):
        fi_ffi.top_p_renorm_probs(**small, **few, stream=stream)
    gpu.runtime.capturing.clear()
    fi_ffi.top_p_renorm_probs(**small, **few, stream=stream)
    gpu.runtime.capturing.add(stream)
    fi_ffi.top_p_renorm_probs(**small, **few, stream=stream)
    with pytest.raises(fi_ffi.ArgumentError, match=f"{row.name}.*before the capture"):
        fi_ffi.top_p_renorm_probs(**large, **many, stream=stream)
    assert kept


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


def test_certain_targets(machine, rng):
    """One token at each position: taken where it was drafted, and given where it was not."""
    n, s, h = 30, 4, 16
    wanted = rng.integers(0, h, (n, s + 1))
    target = np.eye(h, dtype=np.float32)[wanted]
    ids = wanted[:, :s].copy()
    wrong_from = rng.integers(0, s + 1, n)
    for row, first in zip(ids, wrong_from, strict=True):
        row[first:] = (row[first:] + 1) % h
    tables = {"target_probs": target, "draft_probs": np.full((n, s, h), 1 / h),
              "draft_token_ids": ids}  # fmt: skip
    case = make_case(OPS[CHAIN].row, {"n": n, "s": s, "h": h}, {"S": "int64"}, rng, tables)
    got = run(machine, CHAIN, case.arrays, **case.scalars)
    assert judged(case, got)
    for i, first in enumerate(wrong_from):
        expected = [*wanted[i, : first + 1], *[-1] * (s - first)]
        assert got["output_token_ids"][i].tolist() == expected
    name = "output_emitted_draft_token_num"
    assert (got[name] - case.arrays[name] == wrong_from).all()
