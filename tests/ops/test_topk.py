"""The greatest of each row: on the CPU, and (tests/gpu) on a GPU."""

from __future__ import annotations

import numpy as np
import pytest

import fi_ffi
from fi_ffi import reference
from fi_ffi.ops.functions import OPS

from tests.helpers.cases import make_case
from tests.helpers.every_op import check_on, check_replayed
from tests.helpers.sampling_calls import run

PLAIN, PAGES, RAGGED = (
    "radix_topk", "radix_topk_page_table_transform", "radix_topk_ragged_transform",
)  # fmt: skip
NAMES = (PLAIN, PAGES, RAGGED)
DTYPES = ("float32", "float16", "bfloat16")
STATES, STARTS = "maybe_row_states_buffer", "maybe_row_starts"
# Rows that a block takes, and (on an H100) rows that blocks share: above 32768 floats of few
# rows, or 16384 of two bytes, and with more than 2048 to choose.
SIZES = ((1, 1), (2, 1), (31, 5), (128, 127), (1000, 10), (4096, 64), (4099, 1), (5000, 3000))
LARGE = (
    (16384, 2048), (16385, 2048), (32768, 100), (32769, 2049), (65536, 512), (128256, 2048),
    (131072, 4096), (262144, 1), (1000000, 2048), (1048576, 70000),
)  # fmt: skip
# Floats that a block has room for on an H100: page tables of longer rows are deterministic.
ROOM = 57592


def make(name, rng, n=5, d=100, k=10, dtype="float32", tables=None, **more):
    if name == PAGES and d > ROOM and not (more.get("tie_break") or more.get("dsa_graph_safe")):
        more.setdefault("deterministic", True)
    sizes = {"n": n, "d": d, "top_k": k, "workspace_size": 2**20}
    return make_case(OPS[name].row, sizes, {"T": dtype}, rng, tables, **more)


def sizes_of(machine):
    return SIZES + LARGE * machine.is_gpu


def check_values(got, case):
    """The values are those that the indices name, bit for bit."""
    values = np.take_along_axis(case.arrays["input"], got["output_indices"].astype(int), axis=1)
    assert values.tobytes() == got["output_values"].tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_sizes(name, dtype, machine, rng):
    for d, k in sizes_of(machine):
        for without in ((), (STATES, STARTS, "maybe_row_to_batch")):
            case = make(name, rng, 3, d, k, dtype, without=without)
            assert check_on(machine, case) <= 1, (d, k)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_many_rows(name, deterministic, machine, rng):
    shapes = [(200, 50, 7), (33, 3000, 100)]
    if machine.is_gpu:
        shapes += [(70, 131072, 100), (100, 60000, 2048), (5000, 1000, 50), (65537, 16, 3)]
    for n, d, k in shapes:
        case = make(name, rng, n, d, k, deterministic=deterministic)
        assert check_on(machine, case) <= 1, (n, d, k)


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_are_those_of_the_indices(dtype, machine, rng):
    for d, k in sizes_of(machine):
        for more in ({}, {"deterministic": True}, {"tie_break": 1}, {"dsa_graph_safe": True}):
            if k > 2048 and ("tie_break" in more or "dsa_graph_safe" in more):
                continue
            case = make(PLAIN, rng, 3, d, k, dtype, **more)
            got = run(machine, PLAIN, case.arrays, **case.scalars)
            assert all(case.error(out, got[out])[1] <= 1 for out in case.expected), (d, k, more)
            check_values(got, case)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sorted(dtype, deterministic, machine, rng):
    for d, k in sizes_of(machine):
        if k > 2048:
            continue
        case = make(PLAIN, rng, 4, d, k, dtype, sorted_output=True, deterministic=deterministic)
        got = run(machine, PLAIN, case.arrays, **case.scalars)
        assert all(case.error(out, got[out])[1] <= 1 for out in case.expected), (d, k)
        check_values(got, case)
        assert (np.diff(got["output_values"].astype(np.float64), axis=1) <= 0).all()


@pytest.mark.parametrize("tie_break", [0, 1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_ties(name, dtype, tie_break, machine, rng):
    """A few values only, and one: which of them are chosen is said, or open."""
    for d, k in ((50, 7), (3000, 1000), (4096, 1)) + ((128256, 2048),) * machine.is_gpu:
        rows = rng.integers(-2, 3, (6, d)).astype(np.float64)
        rows[5] = 1
        case = make(name, rng, 6, d, k, dtype, {"input": rows}, tie_break=tie_break)
        assert check_on(machine, case) <= 1, (d, k)


def test_a_tie_break_takes_the_first_or_the_last(machine, rng):
    rows = np.zeros((2, 100))
    rows[0, [3, 50, 98]] = 5
    for tie_break, others in ((1, [0, 1]), (2, [99, 97])):
        case = make(PLAIN, rng, 2, 100, 5, tables={"input": rows}, tie_break=tie_break)
        got = run(machine, PLAIN, case.arrays, **case.scalars)["output_indices"]
        assert sorted(got[0].tolist()) == sorted([3, 50, 98, *others])
        last = [0, 1, 2, 3, 4] if tie_break == 1 else [95, 96, 97, 98, 99]
        assert sorted(got[1].tolist()) == last


@pytest.mark.parametrize("dtype", DTYPES)
def test_extremes(dtype, machine, rng):
    """Infinities, zeros of both signs, and the dtype's largest numbers."""
    largest = float(np.finfo(np.float16).max) if dtype == "float16" else 3e38
    values = [np.inf, -np.inf, 0.0, -0.0, largest, -largest, 1.0, -1.0, 2.0**-14]
    rows = rng.choice(values, (20, 300))
    for k in (1, 30, 150, 299, 300):
        case = make(PLAIN, rng, 20, 300, k, dtype, {"input": rows})
        assert check_on(machine, case) <= 1


def test_the_same_each_time(machine, rng):
    """Deterministic is the same order, too."""
    for name in NAMES:
        for d, k in ((3000, 100),) + ((131072, 500), (128256, 4000)) * machine.is_gpu:
            rows = rng.integers(0, 50, (4, d)).astype(np.float32)
            case = make(name, rng, 4, d, k, tables={"input": rows}, deterministic=True)
            out = next(iter(case.expected))
            first = run(machine, name, case.arrays, **case.scalars)[out]
            for _ in range(machine.rounds(20)):
                assert (run(machine, name, case.arrays, **case.scalars)[out] == first).all()


@pytest.mark.parametrize("name", [PAGES, RAGGED])
def test_lengths(name, machine, rng):
    """None, one, as many as are chosen, one more, and all; in parts that start anywhere."""
    d, k = 64, 10
    lengths = np.array([0, 1, k - 1, k, k + 1, d - 1, d, 0, 5, k])
    for starts in (np.zeros(10, int), np.array([0, 63, 20, 54, 53, 1, 0, 64, 59, 30])):
        tables = {"lengths": lengths, "maybe_row_starts": starts}
        for more in ({}, {"deterministic": True}, {"tie_break": 2}, {"dsa_graph_safe": True}):
            case = make(name, rng, 10, d, k, tables=tables, **more)
            assert check_on(machine, case) <= 1, more


def test_more_is_chosen_than_there_is(machine, rng):
    for name in (PAGES, RAGGED):
        for k in (65, 500, 5000):
            assert check_on(machine, make(name, rng, 7, 64, k)) <= 1
    case = make(RAGGED, rng, 3, 8, 12, tables={"lengths": np.array([8, 0, 3]),
                "offsets": np.array([100, 200, 300])}, without=(STARTS,))  # fmt: skip
    got = run(machine, RAGGED, case.arrays, **case.scalars)["output_indices"]
    assert got[0].tolist() == [*range(100, 108), *[-1] * 4]
    assert got[1].tolist() == [-1] * 12
    assert got[2].tolist() == [300, 301, 302, *[-1] * 9]


def test_page_tables_are_shared_and_wider(machine, rng):
    """Rows of two requests; a table that is longer than the rows."""
    sizes = {"n": 30, "d": 50, "top_k": 9, "b": 2, "m": 70, "workspace_size": 2**20}
    for without in ((), (STARTS,)):
        case = make_case(OPS[PAGES].row, sizes, {"T": "float16"}, rng, without=without)
        assert check_on(machine, case) <= 1


@pytest.mark.parametrize("name", NAMES)
def test_scratch_serves_calls_of_any_kind(name, machine, rng):
    """One buffer, zero before the first: shared rows of one kind and of another in turn."""
    machine.need("topk")
    shapes = [(5, 100, 7), (1, 5000, 3000)]
    if machine.is_gpu:
        shapes += [(3, 131072, 4000), (64, 131072, 2500), (1, 1000000, 3000), (2, 60000, 100)]
    scratch = machine.place(np.zeros(2**20, np.uint8))
    for _ in range(3):
        for n, d, k in shapes:
            for deterministic in (False, True)[name == PAGES and d > ROOM :]:
                for dtype in ("float32", "bfloat16"):
                    case = make(name, rng, n, d, k, dtype, without=(STATES,),
                                deterministic=deterministic)  # fmt: skip
                    placed = {key: machine.place(array) for key, array in case.arrays.items()}
                    descs = {key: array.desc() for key, array in placed.items()}
                    OPS[name](**descs, **{STATES: scratch.desc()}, **case.scalars,
                              stream=machine.stream)  # fmt: skip
                    assert all(
                        case.error(out, placed[out].get())[1] <= 1 for out in case.expected
                    ), (n, d, k, deterministic)
    assert scratch.intact()


@pytest.mark.parametrize("name", NAMES)
def test_replayed(name, machine, rng):
    for d, k in ((500, 20),) + ((131072, 2500), (131072, 500)) * machine.is_gpu:
        case = make(name, rng, 4, d, k, without=(STATES,))
        assert check_replayed(machine, case) <= 1


def test_page_tables_of_shared_rows_are_refused():
    """But where blocks take their time: what FlashInfer's launcher decides, on an H100."""
    (rule,) = (rule for rule in OPS[PAGES].row.rules if rule.argument == "deterministic")
    (holds,) = rule.using.values()
    h100, small = 227 << 10, 99 << 10
    unordered = (False, 0, False)
    for size, most in (("float32", 57592), ("bfloat16", 115184), ("float16", 115184)):
        assert holds(1, most, 2049, size, h100, *unordered)
        assert not holds(1, most + 8, 2049, size, h100, *unordered)
        assert not holds(1, most + 8, 2048, size, h100, *unordered)
        for ordered in ((True, 0, False), (False, 1, False), (False, 0, True)):
            assert holds(1, most + 8, 2048, size, h100, *ordered)
    # Many rows of floats are taken by a block each, where it has the memory for that.
    assert holds(9, 131072, 2048, "float32", h100, *unordered)
    assert not holds(8, 131072, 2048, "float32", h100, *unordered)
    assert not holds(9, 131072, 2048, "float32", small, *unordered)
    assert not holds(1, 30000, 100, "float32", small, *unordered)


@pytest.mark.parametrize("name", NAMES)
def test_streams_have_scratch_of_their_own(name, machine, rng):
    machine.need("topk")
    d, k = (20000, 64) if machine.is_gpu else (300, 9)
    calls = []
    for stream in machine.streams(4):
        case = make(name, rng, 6, d, k, without=(STATES,))
        placed = {key: machine.place(array) for key, array in case.arrays.items()}
        calls.append((case, placed, {key: a.desc() for key, a in placed.items()}, stream))
    for _ in range(machine.rounds(20)):
        for case, _, descs, stream in calls:
            OPS[name](**descs, **case.scalars, stream=stream)
    machine.synchronize()
    for case, placed, _, _ in calls:
        assert all(case.error(out, placed[out].get())[1] <= 1 for out in case.expected)


def test_how_many_is_told_by_the_output(machine, rng):
    """`top_k` may be left out, and must not be anything else."""
    case = make(PLAIN, rng)
    got = run(machine, PLAIN, case.arrays)
    assert all(case.error(out, got[out])[1] <= 1 for out in case.expected)
    for wrong in (9, 11, 0, -1):
        with pytest.raises(fi_ffi.ArgumentError, match="`top_k`"):
            fi_ffi.radix_topk(**case.arrays, top_k=wrong)


def test_what_does_not_fit_is_refused(rng):
    case = make(PLAIN, rng, 3, 3000, 2100)
    for option in ({"sorted_output": True}, {"tie_break": 1}, {"dsa_graph_safe": True}):
        with pytest.raises(fi_ffi.ArgumentError, match="`top_k`.*2048 at most"):
            fi_ffi.radix_topk(**case.arrays, **option)
    with pytest.raises(fi_ffi.ArgumentError, match="`tie_break`"):
        fi_ffi.radix_topk(**case.arrays, tie_break=3)
    wide = np.zeros((3, 3001), np.int32), np.zeros((3, 3001), np.float32)
    with pytest.raises(fi_ffi.ArgumentError, match="d of at least top_k"):
        fi_ffi.radix_topk(case.arrays["input"], *wide)
    case = make(PAGES, rng, 5, 40, 4, without=("maybe_row_to_batch",))
    table = case.arrays["src_page_table"]
    for wrong, words in ((table[:4].copy(), "maybe_row_to_batch"), (table[:, :39].copy(), "m of")):
        arrays = case.arrays | {"src_page_table": wrong}
        with pytest.raises(fi_ffi.ArgumentError, match=f"`src_page_table`.*{words}"):
            fi_ffi.radix_topk_page_table_transform(**arrays)


@pytest.mark.parametrize("name", NAMES)
def test_wrong_results_are_refused(name, rng):
    tables = {"input": rng.permutation(300).reshape(3, 100), "lengths": np.array([100, 60, 4])}
    if name == PLAIN:
        tables.pop("lengths")
    case = make(name, rng, 3, 100, 10, tables=tables, without=(STARTS,))
    OPS[name](**case.arrays, **case.scalars)
    for out in case.expected:
        right = case.arrays[out]
        assert case.error(out, right)[1] <= 1
        for i in range(3):
            for change in (lambda row: row + 1, lambda row: np.roll(row, 1) * (row >= 0) - 1):
                wrong = right.copy()
                wrong[i] = change(wrong[i])
                assert case.error(out, wrong)[1] > 1
            wrong = right.copy()
            wrong[i, 0] = wrong[i, 1]
            assert case.error(out, wrong)[1] > 1


def test_from_0_6_17_on_pages_have_starts_and_sizes(rng):
    """The later forms' references, by their own formula."""
    n, d, k, size = 6, 64, 9, 4
    later = next(row for row in OPS[PAGES].rows if row.variant == "_with_page_size")
    lengths = rng.integers(0, d + 1, n)
    tables = {
        "lengths": lengths,
        "maybe_row_starts": rng.integers(0, d - lengths + 1),
        "maybe_page_table_row_starts": rng.integers(0, 5, n),
        "src_page_table": rng.permutation(6 * 24).reshape(6, 24),
    }
    sizes = {"n": n, "d": d, "top_k": k, "b": 6, "m": 24, "workspace_size": 2**20}
    case = make_case(later, sizes, {"T": "float32"}, rng, tables, page_size=size)
    values = [case.arrays.get(arg.name, case.scalars.get(arg.name)) for arg in later.args]
    reference.from_formula(later.formula, [arg.name for arg in later.args])(*values)
    for out in case.expected:
        assert case.error(out, case.arrays[out])[1] <= 1
        assert case.error(out, np.roll(case.arrays[out], 1, axis=0))[1] > 1
    raw, pages = (case.arrays[f"{of}"] for of in ("maybe_output_raw_indices", "output_page_table"))
    for i in range(n):
        chosen = raw[i][raw[i] >= 0]
        assert len(chosen) == min(k, lengths[i])
        start, row = tables["maybe_page_table_row_starts"][i], case.arrays["maybe_row_to_batch"][i]
        table = tables["src_page_table"][row]
        assert (
            pages[i, : len(chosen)] == table[start + chosen // size] * size + chosen % size
        ).all()
