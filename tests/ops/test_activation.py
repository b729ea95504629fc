"""Gated activations against float64: the same tests on the CPU, and (tests/gpu) on a GPU."""

from __future__ import annotations

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

import fi_ffi
from fi_ffi.ops.call.op import Op
from fi_ffi.ops.functions import OPS

from tests.helpers.calls import EVERY_CALL
from tests.helpers.cases import make_case
from tests.helpers.every_op import check_on, check_replayed

NAMES = ("silu_and_mul", "gelu_and_mul", "gelu_tanh_and_mul")
CALLS = [call for call in EVERY_CALL if call.values[0].row.name in NAMES]
# One vector, a block that is no warp, the first after 1024 threads with a vector each, and
# what models have.
HALVES = (8, 24, 344, 1024, 8184, 8192, 8200, 11008, 14336, 28672)


@pytest.mark.parametrize("d", HALVES)
@pytest.mark.parametrize(("op", "dtypes"), CALLS)
def test_sizes(op, dtypes, d, machine, rng):
    for n in (1, 7):
        assert check_on(machine, make_case(op.row, {"n": n, "d": d}, dtypes, rng)) <= 1


@pytest.mark.parametrize(("op", "dtypes"), CALLS)
def test_many_rows(op, dtypes, machine, rng):
    n = 70_000 if machine.is_gpu else 1000  # more than a grid's second dimension has
    assert check_on(machine, make_case(op.row, {"n": n, "d": 8}, dtypes, rng)) <= 1


@pytest.mark.parametrize(("op", "dtypes"), CALLS)
def test_no_rows(op, dtypes, machine, rng):
    assert check_on(machine, make_case(op.row, {"n": 0, "d": 64}, dtypes, rng)) == 0


@pytest.mark.parametrize(("op", "dtypes"), CALLS)
def test_dependent_launch(op, dtypes, machine, rng):
    case = make_case(op.row, {"n": 33, "d": 512}, dtypes, rng, enable_pdl=True)
    assert check_on(machine, case) <= 1


@pytest.mark.parametrize(("op", "dtypes"), CALLS)
def test_recorded_and_replayed(op, dtypes, machine, rng):
    assert check_replayed(machine, make_case(op.row, {"n": 50, "d": 4096}, dtypes, rng)) <= 1


def every(dtype: str) -> np.ndarray:
    """Every value of a 16-bit dtype that is finite."""
    values = np.arange(2**16, dtype=np.uint16).view(fi_ffi.DTYPES[dtype].numpy)
    return values[np.isfinite(values.astype(np.float32))]


@pytest.mark.parametrize("factor", [1.0, -1.5, 2.0**-14, 0.0])
@pytest.mark.parametrize(("op", "dtypes"), CALLS)
def test_every_number(op, dtypes, factor, machine):
    """Of the largest, which are infinite after a product, the sign is left."""
    numbers = every(dtypes["T"])
    numbers = np.concatenate([numbers, numbers[: -len(numbers) % 8]]).reshape(-1, 8)
    other = np.full_like(numbers, factor)
    case = make_case(
        op.row, {"n": len(numbers), "d": 8}, dtypes, np.random.default_rng(),
        {"input": np.concatenate([numbers, other], axis=1)},
    )  # fmt: skip
    value, magnitude = case.expected["out"]
    largest = float(ml_dtypes.finfo(numbers.dtype).max)
    fits = np.abs(value) <= largest

    def worst(got: np.ndarray) -> tuple[float, float]:
        if not (np.where(fits, 0, got) == np.where(fits, 0, np.copysign(np.inf, value))).all():
            return np.inf, np.inf
        cut = {"out": (np.where(fits, value, 0), np.where(fits, magnitude, 0))}
        return replace(case, expected=cut).error("out", np.where(fits, got, np.zeros_like(got)))

    assert check_on(machine, replace(case, expected={"out": worst})) <= 1


@pytest.mark.parametrize(("op", "dtypes"), CALLS)
def test_infinities_and_nan_stay_where_they_are(op, dtypes, machine, rng):
    """The limit at minus infinity is 0; kernels give NaN for 0 times infinity, and so do we."""
    case = make_case(op.row, {"n": 3, "d": 16}, dtypes, rng)
    x = case.arrays["input"]
    x[0, 1], x[0, 2], x[0, 3], x[1, 16 + 4] = np.nan, -np.inf, np.inf, np.nan
    x[0, 16 + 3] = 1
    expected = np.zeros((3, 16))
    expected[0, 1] = expected[0, 2] = expected[1, 4] = np.nan
    expected[0, 3] = np.inf

    def strange(got: np.ndarray) -> tuple[float, float]:
        found = got.astype(np.float64)
        found = np.where(np.isfinite(found), 0, found)
        return (0.0, 0.0) if np.array_equal(found, expected, equal_nan=True) else (np.inf, np.inf)

    assert check_on(machine, replace(case, expected={"out": strange})) <= 1


@pytest.mark.parametrize("name", NAMES)
def test_halves_that_are_no_whole_vectors(name):
    """Refused for kernels that load 16 bytes where such a half starts, and right for others."""
    first, later = OPS[name].rows
    assert (first.releases, later.releases) == (">=0.6.3,<0.7.2", ">=0.7.2")
    for d in (1, 2, 12, 20, 3420):
        case = make_case(first, {"n": 3, "d": d}, {"T": "float16"}, np.random.default_rng())
        with pytest.raises(fi_ffi.ArgumentError, match=f"d = {d} to be a multiple of 8"):
            Op(first)(**case.arrays)
        Op(later)(**case.arrays)
        assert case.error("out", case.arrays["out"])[1] <= 1


@pytest.mark.parametrize("name", NAMES)
def test_more_rows_than_a_grid_has(name):
    n = 2**31
    out = fi_ffi.TensorDesc(16, (n, 8), "float16", device="cpu")
    both = fi_ffi.TensorDesc(16, (n, 16), "float16", device="cpu")
    with pytest.raises(fi_ffi.ArgumentError, match="n = 2147483648 of at most 2147483647"):
        OPS[name](out, both)


@pytest.mark.parametrize("name", NAMES)
def test_rows_apart_are_refused(name, rng):
    """The kernel takes no strides."""
    wide = np.zeros((4, 48), np.float16)
    with pytest.raises(fi_ffi.ArgumentError, match="a contiguous tensor"):
        OPS[name](np.zeros((4, 16), np.float16), wide[:, :32])
    with pytest.raises(fi_ffi.ArgumentError, match="a contiguous tensor"):
        OPS[name](wide[:, :16], np.zeros((4, 32), np.float16))


def test_a_wrong_activation_is_seen(machine, rng):
    """The bound tells GELU from its approximation, and a factor 1 % off, in float16."""
    row = OPS["gelu_and_mul"].row
    case = make_case(row, {"n": 64, "d": 256}, {"T": "float16"}, rng)
    got = {name: array.copy() for name, array in case.arrays.items()}
    fi_ffi.gelu_tanh_and_mul(**got)
    assert case.error("out", got["out"])[1] > 1
    fi_ffi.gelu_and_mul(**got)
    assert case.error("out", got["out"])[1] <= 1
    assert case.error("out", (got["out"].astype(np.float32) * 1.01).astype(np.float16))[1] > 1
