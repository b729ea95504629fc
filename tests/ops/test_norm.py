"""The RMSNorm family on CPU tensors, through libtvm_ffi, against float64."""

from __future__ import annotations

import numpy as np
import pytest

import fi_ffi
from fi_ffi.ops.functions import OPS

from calls import CALLS, HIDDEN, padded
from helpers.cases import make_case


def errors(case, arrays) -> float:
    for arg in case.row.tensors:
        if not arg.writes:
            assert arrays[arg.name].tobytes() == case.arrays[arg.name].tobytes(), arg.name
    return max(case.error(name, arrays[name])[1] for name in case.expected)


@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize(("op", "dtypes"), CALLS)
def test_hidden_sizes(op, dtypes, hidden, rng):
    case = make_case(op.row, {"n": 7, "k": 3, "h": hidden}, dtypes, rng)
    arrays = {name: array.copy() for name, array in case.arrays.items()}
    op(**arrays, **case.scalars)
    assert errors(case, arrays) <= 1


@pytest.mark.parametrize(("op", "dtypes"), CALLS)
def test_rows_apart_keep_their_gaps(op, dtypes, rng):
    case = make_case(op.row, {"n": 9, "k": 4, "h": 64}, dtypes, rng)
    arrays = {
        arg.name: padded(case.arrays[arg.name], 16)
        if "n" in arg.axis_names and not arg.contiguous
        else case.arrays[arg.name].copy()
        for arg in op.row.tensors
    }
    op(**arrays, **case.scalars)
    assert errors(case, arrays) <= 1
    for array in arrays.values():
        if array.base is not None and array.base.shape != array.shape:
            gaps = array.base[..., array.shape[-1] :].astype(np.float32)
            assert np.isnan(gaps).all(), "the bytes between rows were written"


@pytest.mark.parametrize("eps", [0.0, 1e-5, 0.5, 3])
@pytest.mark.parametrize(("op", "dtypes"), CALLS)
def test_eps(op, dtypes, eps, rng):
    case = make_case(op.row, {"n": 3, "k": 2, "h": 128}, dtypes, rng, eps=eps)
    op(**case.arrays, **case.scalars)
    assert max(case.error(name, case.arrays[name])[1] for name in case.expected) <= 1


@pytest.mark.parametrize(("op", "dtypes"), CALLS)
def test_no_rows(op, dtypes, rng):
    case = make_case(op.row, {"n": 0, "k": 2, "h": 64}, dtypes, rng)
    assert op(**case.arrays, **case.scalars) is None


@pytest.mark.parametrize("name", ["rmsnorm", "qk_rmsnorm", "gemma_rmsnorm"])
def test_in_place(name, rng):
    case = make_case(OPS[name].row, {"n": 5, "k": 4, "h": 64}, {"T": "float16"}, rng)
    x = case.arrays["input"]
    OPS[name](x, x, case.arrays["weight"])
    assert case.error("out", x)[1] <= 1


def test_quantised_values_are_clamped_as_the_kernel_does():
    """±448 in both fp8 dtypes, and 448 for a NaN (CUDA's fminf prefers the number)."""
    x = np.array([[1, -1, 1e-3, np.nan]] * 2, np.float16)
    x[0, 3] = 1
    weight, scale = np.ones(4, np.float16), np.array([1e-6], np.float32)
    for dtype in ("float8_e4m3fn", "float8_e5m2"):
        out = np.zeros((2, 4), fi_ffi.DTYPES[dtype].numpy)
        fi_ffi.rmsnorm_quant(out, x, weight, scale)
        assert out[0, :2].astype(float).tolist() == [448, -448]
        assert out[1].astype(float).tolist() == [448] * 4


def test_a_repeated_call_reads_its_new_arguments(rng):
    """Frames are reused: neither addresses nor scalars may stay from the call before."""
    row = OPS["rmsnorm"].row
    for _ in range(3):
        eps = float(rng.uniform(0, 2))
        case = make_case(row, {"n": 4, "h": 32}, {"T": "float16"}, rng, eps=eps)
        fi_ffi.rmsnorm(**case.arrays, eps=eps)
        assert case.error("out", case.arrays["out"])[1] <= 1


def test_stream_is_allowed_and_unused_on_the_cpu(rng):
    case = make_case(OPS["rmsnorm"].row, {"n": 4, "h": 32}, {"T": "float16"}, rng)
    fi_ffi.rmsnorm(**case.arrays, stream=0)
    assert case.error("out", case.arrays["out"])[1] <= 1
