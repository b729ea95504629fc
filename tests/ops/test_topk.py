"""The greatest of each row: which they are where it is said, and rows that are not whole."""

from __future__ import annotations

import numpy as np
import pytest

from fi_ffi.ops.call.op import Op
from fi_ffi.ops.functions import OPS

from tests.helpers.cases import make_case
from tests.helpers.sampling_calls import run
from tests.ops.test_results import PAGES, PLAIN, RAGGED, TOP_K_LARGE, TOP_K_SIZES

__all__ = ["PAGES", "PLAIN", "RAGGED"]
DTYPES = ("float32", "float16", "bfloat16")


def make(name, rng, n=5, d=100, k=10, dtype="float32", tables=None, **more):
    sizes = {"n": n, "d": d, "top_k": k, "workspace_size": 2**20}
    return make_case(OPS[name].row, sizes, {"T": dtype}, rng, tables, **more)


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_are_those_of_the_indices(dtype, machine, rng):
    """Bit for bit, and sorted where that is asked."""
    for d, k in TOP_K_SIZES + TOP_K_LARGE * machine.is_gpu:
        for more in ({}, {"deterministic": True}, {"tie_break": 1}, {"dsa_graph_safe": True},
                     {"sorted_output": True}, {"sorted_output": True, "deterministic": True}
                     ):  # fmt: skip
            if k > 2048 and more.keys() - {"deterministic"}:
                continue
            case = make(PLAIN, rng, 3, d, k, dtype, **more)
            got = run(machine, PLAIN, case.arrays, **case.scalars)
            assert all(case.error(out, got[out])[1] <= 1 for out in case.expected), (d, k, more)
            indices, values = got["output_indices"].astype(int), got["output_values"]
            assert (
                np.take_along_axis(case.arrays["input"], indices, 1).tobytes() == values.tobytes()
            )
            if "sorted_output" in more:
                assert (np.diff(values.astype(np.float64), axis=1) <= 0).all()


def test_a_tie_break_takes_the_first_or_the_last(machine, rng):
    rows = np.zeros((2, 100))
    rows[0, [3, 50, 98]] = 5
    for tie_break, others in ((1, [0, 1]), (2, [99, 97])):
        # Without `deterministic`, from 0.6.18 on, in any order.
        case = make(PLAIN, rng, 2, 100, 5, tables={"input": rows}, tie_break=tie_break,
                    deterministic=True)  # fmt: skip
        got = run(machine, PLAIN, case.arrays, **case.scalars)["output_indices"]
        assert got[0].tolist() == sorted([3, 50, 98, *others])
        last = [0, 1, 2, 3, 4] if tie_break == 1 else [95, 96, 97, 98, 99]
        assert got[1].tolist() == last
        scalars = case.scalars | {"sorted_output": True}
        got = run(machine, PLAIN, case.arrays, **scalars)["output_indices"]
        assert got.tolist() == [[3, 50, 98, *sorted(others)], last]


@pytest.mark.parametrize("tie_break", [1, 2])
@pytest.mark.parametrize("name", [PLAIN, PAGES, RAGGED])
def test_equal_rows_in_order(name, tie_break, machine, rng):
    """Of elements that are all equal, the first or the last, the first of them first."""
    for n, d, k in ((4, 300, 20), (2, 5000, 2048), (74, 16 * 1024, 512)):
        rows = np.repeat(rng.standard_normal((n, 1)), d, axis=1)
        tables = {
            "input": rows, "lengths": np.full(n, d), "offsets": np.zeros(n),
            "src_page_table": np.tile(np.arange(d), (n, 1)),
        }  # fmt: skip
        wanted = {arg.name for arg in OPS[name].row.tensors}
        tables = {key: table for key, table in tables.items() if key in wanted}
        sizes = {"n": n, "d": d, "m": d, "b": n, "top_k": k, "workspace_size": 2**20}
        without = ("maybe_row_starts", "maybe_row_to_batch", "maybe_page_table_row_starts")
        case = make_case(OPS[name].row, sizes, {"T": "float32"}, rng, tables, without,
                         tie_break=tie_break, deterministic=True)  # fmt: skip
        got = run(machine, name, case.arrays, **case.scalars)
        first = 0 if tie_break == 1 else d - k
        out = "output_page_table" if name == PAGES else "output_indices"
        assert (got[out] == np.arange(first, first + k)).all()
        assert name != PLAIN or (got["output_values"] == case.arrays["input"][:, :1]).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_of_a_row_is_itself(dtype, machine, rng):
    """As many as there are: unsorted, each where it was; sorted, the greatest first."""
    for d, more in ((1, {}), (300, {}), (2048, {"tie_break": 2}), (5000, {"deterministic": True}),
                    (131072, {"deterministic": True})):  # fmt: skip
        case = make(PLAIN, rng, 2, d, d, dtype, **more)
        got = run(machine, PLAIN, case.arrays, **case.scalars)
        assert (got["output_indices"] == np.arange(d)).all()
        assert got["output_values"].tobytes() == case.arrays["input"].tobytes()
    case = make(PLAIN, rng, 2, 300, 300, dtype, sorted_output=True)
    got = run(machine, PLAIN, case.arrays, **case.scalars)
    assert all(case.error(out, got[out])[1] <= 1 for out in case.expected)
    assert (np.diff(got["output_values"].astype(float), axis=1) <= 0).all()


def test_a_row_that_is_chosen_whole(machine, rng):
    """In order, and then -1."""
    case = make(RAGGED, rng, 3, 8, 12, tables={"lengths": np.array([8, 0, 3]),
                "offsets": np.array([100, 200, 300])}, without=("maybe_row_starts",))  # fmt: skip
    got = run(machine, RAGGED, case.arrays, **case.scalars)["output_indices"]
    expected = [[*range(100, 108), *[-1] * 4], [-1] * 12, [300, 301, 302, *[-1] * 9]]
    assert got.tolist() == expected


def test_how_many_is_told_by_the_output(machine, rng):
    """`top_k` may be left out."""
    case = make(PLAIN, rng)
    got = run(machine, PLAIN, case.arrays)
    assert all(case.error(out, got[out])[1] <= 1 for out in case.expected)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("row", [OPS[PLAIN].row, OPS[PLAIN].rows[-1]], ids=["first", "last"])
def test_where_the_order_of_ties_is_open(row, deterministic, rng):
    """A judge takes another order only where the release says none."""
    sizes = {"n": 1, "d": 50, "top_k": 9, "workspace_size": 2**20}
    case = make_case(row, sizes, {"T": "float32"}, rng, tie_break=1,
                     deterministic=deterministic, sorted_output=False)  # fmt: skip
    Op(row)(**case.arrays, **case.scalars)
    got = case.arrays["output_indices"]
    assert case.error("output_indices", got)[1] == 0
    is_open = bool(row.variant) and not deterministic
    assert (case.error("output_indices", got[:, ::-1])[1] == 0) == is_open
    assert case.error("output_indices", got[:, [0] * 9])[1] == np.inf
