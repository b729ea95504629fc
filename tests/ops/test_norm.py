"""The RMSNorm family against float64: the same tests on the CPU, and (tests/gpu) on a GPU."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import fi_ffi
from fi_ffi.ops.functions import OPS

from tests.helpers.calls import CALLS, HIDDEN, padded
from tests.helpers.cases import make_case
from tests.helpers.every_op import check_on


@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize(("op", "dtypes"), CALLS)
def test_hidden_sizes(op, dtypes, hidden, machine, rng, record_property):
    worst = 0.0
    for rows in (1, 7, 130) if machine.is_gpu else (7,):
        case = make_case(op.row, {"n": rows, "k": 3, "h": hidden}, dtypes, rng)
        worst = max(worst, check_on(machine, case))
    record_property("error_of_bound", worst)
    assert worst <= 1


@pytest.mark.parametrize(("op", "dtypes"), CALLS)
def test_rows_apart_keep_their_gaps(op, dtypes, machine, rng):
    case = make_case(op.row, {"n": 33, "k": 5, "h": 256}, dtypes, rng)
    arrays = {
        arg.name: padded(case.arrays[arg.name], 16)
        if "n" in arg.axis_names and not arg.contiguous
        else case.arrays[arg.name]
        for arg in op.row.tensors
    }
    assert check_on(machine, replace(case, arrays=arrays)) <= 1


@pytest.mark.parametrize("eps", [0.0, 1e-5, 0.5, 3])
@pytest.mark.parametrize(("op", "dtypes"), CALLS)
def test_eps_and_pdl(op, dtypes, eps, machine, rng):
    more = {"enable_pdl": True} if any(a.name == "enable_pdl" for a in op.row.args) else {}
    case = make_case(op.row, {"n": 17, "k": 2, "h": 512}, dtypes, rng, eps=eps, **more)
    assert check_on(machine, case) <= 1


@pytest.mark.parametrize(("op", "dtypes"), CALLS)
def test_no_rows(op, dtypes, machine, rng):
    case = make_case(op.row, {"n": 0, "k": 2, "h": 64}, dtypes, rng)
    # Nothing is launched: the other addresses are not even memory.
    descs = [
        fi_ffi.TensorDesc(4096 if a.size else 0, a.shape, a.dtype, device=machine.device)
        for a in case.arrays.values()
    ]
    assert op(*descs, **case.scalars, stream=machine.stream) is None


@pytest.mark.parametrize("name", ["rmsnorm", "qk_rmsnorm", "gemma_rmsnorm"])
def test_in_place(name, machine, rng):
    case = make_case(OPS[name].row, {"n": 40, "k": 4, "h": 512}, {"T": "float16"}, rng)
    x, weight = (machine.place(case.arrays[of]) for of in ("input", "weight"))
    OPS[name](x.desc(), x.desc(), weight.desc(), stream=machine.stream)
    assert x.intact() and case.error("out", x.get())[1] <= 1


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
