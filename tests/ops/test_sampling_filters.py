"""Softmax and filters of whole rows: on the CPU, and (tests/gpu) on a GPU."""

from __future__ import annotations

import numpy as np
import pytest

import fi_ffi
from fi_ffi.ops.functions import OPS
from fi_ffi.reference.renorm import top_p_error

from tests.helpers.cases import make_case
from tests.helpers.every_op import check_on, check_replayed
from tests.helpers.inputs.sampling import probabilities
from tests.helpers.sampling_calls import APART, CLOSE, TOP_P, ends, run

TOP_K = ("top_k_renorm_probs", "top_k_mask_logits")
DTYPES = ("float32", "float16", "bfloat16")
ROWS = (*TOP_K, "top_p_renorm_probs")
SOURCES = {"top_k_renorm_probs": "probs", "top_k_mask_logits": "logits"}
SCRATCH = ("workspace_buffer", "workspace", "row_states_buffer")
ARRAYS = ("maybe_temperature_arr", "maybe_top_k_arr", "maybe_top_p_arr")
# On an H100 a block has room for 57592 floats, or twice as many of two bytes.
SIZES = (1, 2, 3, 31, 100, 128, 1000, 2047, 2048, 2049, 4096, 4099, 32000)
LARGE = (57344, 57593, 115016, 115185, 128256, 128257, 262144, 1000000)


def make(name, rng, n=5, h=100, dtype="float32", tables=None, **more):
    tables = dict(tables or {})
    if name == "top_k_mask_logits":
        tables.setdefault("logits", 4 * rng.standard_normal((n, h)))
    sizes = {"n": n, "h": h, "workspace_size": 2**20}
    case = make_case(OPS[name].row, sizes, {"T": dtype}, rng, tables, **more)
    if name == "top_p_renorm_probs" and h < 2048 and not all_end(case):
        return make(name, rng, n, h, dtype, redrawn(tables, rng), **more)
    return case


def all_end(case):
    """Whether no kernel searches for ever in a row: docs/sampling.md."""
    top_p = case.arrays.get(
        "maybe_top_p_arr", [case.scalars["top_p_val"]] * len(case.arrays["probs"])
    )
    return all(of >= 1 or ends(p, of) for p, of in zip(case.arrays["probs"], top_p, strict=True))


def redrawn(tables, rng):
    """Rows a little different from those before."""
    if "probs" not in tables:
        return tables
    probs = tables["probs"] * (1 + 1e-5 * rng.standard_normal(tables["probs"].shape))
    return tables | {"probs": probs / np.maximum(probs.sum(axis=1, keepdims=True), 1e-9)}


def sizes_of(machine):
    return SIZES + LARGE * machine.is_gpu


@pytest.mark.parametrize("enable_pdl", [False, True])
def test_softmax(enable_pdl, machine, rng):
    """Each of the kernel's ways: a row in a block, kept or read twice, and rows in slices."""
    shapes = [(1, 1), (3, 7), (16, 4096), (17, 4096), (32, 2048), (40, 2048), (200, 30)]
    shapes += [(1, 24575), (3, 24576), (2, 24577)]
    if machine.is_gpu:
        shapes += [(128, 24576), (129, 24576), (4, 128256), (5, 128257), (1000, 32000)]
        shapes += [(1, 2**23 + 4), (65536, 64)]
    for n, h in shapes:
        for without in ((), (*ARRAYS, *SCRATCH)):
            case = make("softmax", rng, n, h, without=without, enable_pdl=enable_pdl)
            assert check_on(machine, case) <= 1, (n, h)


@pytest.mark.parametrize("temperature", [0.01, 0.5, 1.0, 100.0])
def test_temperatures(temperature, machine, rng):
    logits = 5 * rng.standard_normal((6, 1000))
    for tables in ({}, {"logits": logits}, {"logits": 100 * logits}):
        for without in (ARRAYS, ()):
            more = {"temperature_val": temperature, "without": without}
            if not without:
                tables = tables | {"maybe_temperature_arr": temperature * rng.uniform(0.5, 2, 6)}
                more["temperature_val"] = 7.0  # which an array is instead of
            assert check_on(machine, make("softmax", rng, 6, 1000, tables=tables, **more)) <= 1


def test_a_temperature_of_0_makes_all_equal(machine, rng):
    case = make("softmax", rng, 4, 100, temperature_val=0.0, without=ARRAYS)
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
        case = make("softmax", rng, 4, h, tables={"logits": logits}, without=ARRAYS)
        assert check_on(machine, case) <= 1
        logits[3] = -np.inf
        arrays = case.arrays | {"logits": logits}
        got = run(machine, "softmax", arrays, **case.scalars)["output"]
        assert (got[logits == -np.inf][: h // 3] == 0).all()
        assert np.isnan(got[3]).all() and np.isfinite(got[:3]).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", TOP_K)
def test_top_k(name, dtype, machine, rng):
    for h in sizes_of(machine):
        for without in ((), (*ARRAYS, *SCRATCH)):
            case = make(name, rng, 5, h, dtype, without=without)
            assert check_on(machine, case) <= 1, h
    for k in (1, 7, 999, 1000, 1001, 2**31 - 1):
        case = make(name, rng, 5, 1000, dtype, without=ARRAYS, top_k_val=k)
        assert check_on(machine, case) <= 1, k


@pytest.mark.parametrize("name", TOP_K)
def test_top_k_of_many_rows(name, machine, rng):
    """More than blocks, and more than groups of blocks that share a row."""
    shapes = [(300, 64), (1, 3000)]
    if machine.is_gpu:
        shapes += [(1000, 1000), (200, 128256), (65537, 8)]
    for n, h in shapes:
        assert check_on(machine, make(name, rng, n, h)) <= 1, (n, h)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", TOP_K)
def test_ties_are_all_kept(name, dtype, machine, rng):
    source = rng.integers(1, 5, (8, 600)) / 1024
    source[7] = source[7, 0]
    for k in (1, 100, 300, 599):
        case = make(name, rng, 8, 600, dtype, {SOURCES[name]: source}, without=ARRAYS,
                    top_k_val=k)  # fmt: skip
        assert check_on(machine, case) <= 1
        out = case.row.tensors[1].name
        got = run(machine, name, case.arrays, **case.scalars)[out].astype(np.float64)
        kept = got > (0 if name == "top_k_renorm_probs" else -np.inf)
        assert (kept.sum(axis=1) >= k).all() and kept[7].all()


@pytest.mark.parametrize("name", TOP_K)
def test_an_array_of_k(name, machine, rng):
    """0 leaves nothing, and as many as there are, or more, leave all."""
    k = np.array([0, 1, 2, 99, 100, 101, 2**31 - 1])
    case = make(name, rng, 7, 100, tables={"maybe_top_k_arr": k})
    assert check_on(machine, case) <= 1
    out = case.row.tensors[1].name
    got = run(machine, name, case.arrays, **case.scalars)[out]
    kept = got > (0 if name == "top_k_renorm_probs" else -np.inf)
    assert kept.sum(axis=1).tolist() == [0, 1, 2, 99, 100, 100, 100]


@pytest.mark.parametrize("name", TOP_K)
def test_scratch_serves_calls_of_any_size(name, machine, rng):
    """One buffer, zero before the first: rows that are shared and rows that are not in turn."""
    machine.need("sampling")
    shapes = [(5, 100), (1, 5000), (40, 64)]
    if machine.is_gpu:
        shapes += [(3, 128256), (60, 128256), (1, 1000000), (70, 60000), (5, 100)]
    scratch = machine.place(np.zeros(2**20, np.uint8))
    for _ in range(2):
        for n, h in shapes:
            for dtype in ("float32", "bfloat16"):
                case = make(name, rng, n, h, dtype, without=("row_states_buffer",))
                placed = {key: machine.place(array) for key, array in case.arrays.items()}
                descs = {key: array.desc() for key, array in placed.items()}
                OPS[name](**descs, row_states_buffer=scratch.desc(), **case.scalars,
                          stream=machine.stream)  # fmt: skip
                assert all(case.error(out, placed[out].get())[1] <= 1 for out in case.expected), (
                    n,
                    h,
                )
    assert scratch.intact()


def test_a_search_that_would_not_end_is_known():
    """So that no test here hangs a GPU; tests/gpu has one that does."""
    assert ends(np.array(APART), TOP_P) and not ends(np.array(CLOSE), TOP_P)


@pytest.mark.parametrize("is_deterministic", [True, False])
def test_top_p(is_deterministic, machine, rng, record_property):
    worst = 0.0
    for h in sizes_of(machine):
        for without in ((), (*ARRAYS, *SCRATCH)):
            case = make("top_p_renorm_probs", rng, 5, h, without=without,
                        is_deterministic=is_deterministic)  # fmt: skip
            error = check_on(machine, case)
            worst = max(worst, error)
            assert error <= 1, h
    record_property("error_of_bound", worst)


@pytest.mark.parametrize("spread", [0.3, 2.0, 6.0])
def test_top_p_of_flat_and_peaked_rows(spread, machine, rng):
    for h in (300, 5000) + (128256,) * machine.is_gpu:
        tables = {"probs": probabilities(rng, 20, h, spread=spread)}
        for top_p in (1e-4, 0.1, 0.5, 0.9, 0.999, 1.0, 4.0):
            case = make("top_p_renorm_probs", rng, 20, h, tables=tables, without=ARRAYS,
                        top_p_val=top_p)  # fmt: skip
            assert check_on(machine, case) <= 1, (h, top_p)
            if top_p > 1:
                got = run(machine, "top_p_renorm_probs", case.arrays, **case.scalars)
                assert ((got["renorm_probs"] > 0) == (case.arrays["probs"] > 0)).all()


def test_top_p_of_many_rows(machine, rng):
    for n, h in ((300, 40), (40, 3000)) + ((2000, 5000), (5000, 8)) * machine.is_gpu:
        assert check_on(machine, make("top_p_renorm_probs", rng, n, h)) <= 1


def test_top_p_of_rows_of_zeros_and_of_one_token(machine, rng):
    for h in (50, 4000):
        probs = probabilities(rng, 4, h)
        probs[1] = 0
        probs[2] = np.eye(h)[3]
        case = make("top_p_renorm_probs", rng, 4, h, tables={"probs": probs})
        assert check_on(machine, case) <= 1
        got = run(machine, "top_p_renorm_probs", case.arrays, **case.scalars)["renorm_probs"]
        assert (got[1] == 0).all() and got[2, 3] == 1 and got[2].sum() == 1


def test_top_p_is_the_same_each_time(machine, rng):
    """Deterministic is bit for bit."""
    h = 128256 if machine.is_gpu else 3000
    case = make("top_p_renorm_probs", rng, 20, h, is_deterministic=True)
    first = run(machine, "top_p_renorm_probs", case.arrays, **case.scalars)["renorm_probs"]
    for _ in range(machine.rounds(30)):
        again = run(machine, "top_p_renorm_probs", case.arrays, **case.scalars)["renorm_probs"]
        assert (again == first).all()


@pytest.mark.parametrize("name", [*ROWS, "softmax"])
def test_in_place(name, machine, rng):
    for h in (100, 4096) + (128256,) * machine.is_gpu:
        case = make(name, rng, 6, h)
        source, out = (arg.name for arg in case.row.tensors if arg.axes == "n h")
        machine.need("sampling")
        placed = {key: machine.place(a) for key, a in case.arrays.items() if key != out}
        descs = {key: array.desc() for key, array in placed.items()}
        OPS[name](**descs, **{out: descs[source]}, **case.scalars, stream=machine.stream)
        assert case.error(out, placed[source].get())[1] <= 1
        assert placed[source].intact()


@pytest.mark.parametrize("name", [*ROWS, "softmax"])
def test_overlapping_rows_are_refused(name, rng):
    case = make(name, rng, 4, 64)
    source, out = (arg.name for arg in case.row.tensors if arg.axes == "n h")
    room = np.zeros((5, 64), np.float32)
    with pytest.raises(fi_ffi.ArgumentError, match="the very same memory, or memory apart"):
        OPS[name](**case.arrays | {source: room[:4], out: room[1:]}, **case.scalars)


@pytest.mark.parametrize("name", [*ROWS, "softmax"])
def test_replayed(name, machine, rng):
    for h in (500, 30000) + (128256,) * machine.is_gpu:
        assert check_replayed(machine, make(name, rng, 4, h, without=SCRATCH)) <= 1


@pytest.mark.parametrize("name", [*ROWS, "softmax"])
def test_streams_have_scratch_of_their_own(name, machine, rng):
    """Calls one after the other on each of several streams; rows that are shared take turns."""
    machine.need("sampling")
    h = 40000 if machine.is_gpu else 2500
    calls = []
    for stream in machine.streams(4):
        case = make(name, rng, 6, h, without=SCRATCH)
        placed = {key: machine.place(array) for key, array in case.arrays.items()}
        calls.append((case, placed, {k: array.desc() for k, array in placed.items()}, stream))
    for _ in range(machine.rounds(20)):
        for case, _, descs, stream in calls:
            OPS[name](**descs, **case.scalars, stream=stream)
    machine.synchronize()
    for case, placed, _, _ in calls:
        assert all(case.error(out, placed[out].get())[1] <= 1 for out in case.expected)


@pytest.mark.parametrize("top_p", [1.0000001, 1.5, 3.99, np.inf, np.nan])
def test_top_p_that_the_kernel_gets_wrong(top_p, rng):
    case = make("top_p_renorm_probs", rng, 3, 3000, without=ARRAYS)
    got = case.arrays["renorm_probs"]
    before = got.tobytes()
    with pytest.raises(fi_ffi.ArgumentError) as caught:
        OPS["top_p_renorm_probs"](**case.arrays, **case.scalars | {"top_p_val": top_p})
    assert caught.value.argument == "top_p_val" and got.tobytes() == before


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
