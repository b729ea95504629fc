"""The RMSNorm family on a GPU against float64, outputs poisoned before every call."""

from __future__ import annotations

import zlib

import ml_dtypes
import numpy as np
import pytest

import fi_ffi
from fi_ffi.cli.cases import Case
from fi_ffi.ops.call.op import Op
from fi_ffi.ops.functions import OPS

from calls import CALLS, HIDDEN, padded
from helpers.cases import make_case


def run(op: Op, case: Case, to_gpu, stream: int, *, pad: int = 0, **more: object) -> float:
    """Call on the GPU; returns the worst error as a fraction of its bound."""
    arrays = {
        arg.name: to_gpu(
            padded(case.arrays[arg.name], pad)
            if pad and "n" in arg.axis_names and not arg.contiguous
            else case.arrays[arg.name]
        )
        for arg in op.row.tensors
    }
    op(*(array.desc() for array in arrays.values()), **case.scalars, stream=stream, **more)
    worst = 0.0
    for arg in op.row.tensors:
        got = arrays[arg.name].get()
        assert arrays[arg.name].intact(), f"{arg.name}: bytes outside the rows were written"
        if arg.writes:
            worst = max(worst, case.error(arg.name, got)[1])
        else:
            assert got.tobytes() == case.arrays[arg.name].tobytes(), f"{arg.name} was changed"
    return worst


@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize(("op", "dtypes"), CALLS)
def test_hidden_sizes(op, dtypes, hidden, rng, to_gpu, stream, record_property):
    worst = 0.0
    for rows in (1, 7, 130):
        case = make_case(op.row, {"n": rows, "k": 3, "h": hidden}, dtypes, rng)
        worst = max(worst, run(op, case, to_gpu, stream))
    record_property("error_of_bound", worst)
    assert worst <= 1


@pytest.mark.parametrize(("op", "dtypes"), CALLS)
def test_65536_rows(op, dtypes, rng, to_gpu, stream):
    case = make_case(op.row, {"n": 65536, "k": 2, "h": 128}, dtypes, rng)
    assert run(op, case, to_gpu, stream) <= 1


@pytest.mark.parametrize(("op", "dtypes"), CALLS)
def test_rows_apart(op, dtypes, rng, to_gpu, stream):
    case = make_case(op.row, {"n": 33, "k": 5, "h": 256}, dtypes, rng)
    assert run(op, case, to_gpu, stream, pad=16) <= 1


@pytest.mark.parametrize("eps", [0.0, 1e-5, 0.5])
@pytest.mark.parametrize(("op", "dtypes"), CALLS)
def test_eps_and_pdl(op, dtypes, eps, rng, to_gpu, stream):
    more = {"enable_pdl": True} if any(a.name == "enable_pdl" for a in op.row.args) else {}
    case = make_case(op.row, {"n": 17, "k": 2, "h": 512}, dtypes, rng, eps=eps, **more)
    assert run(op, case, to_gpu, stream) <= 1


@pytest.mark.parametrize(("op", "dtypes"), CALLS)
def test_no_rows(op, dtypes, rng, stream):
    case = make_case(op.row, {"n": 0, "k": 2, "h": 64}, dtypes, rng)
    empty = [
        fi_ffi.TensorDesc(0 if not a.size else 4096, a.shape, a.dtype) for a in case.arrays.values()
    ]
    # Nothing is launched: the other addresses are not even memory.
    op(*empty, **case.scalars, stream=stream)


@pytest.mark.parametrize(("op", "dtypes"), CALLS)
def test_agrees_with_the_reference_kernel(op, dtypes, rng, to_gpu, stream):
    """Within one step of the dtype: both round the same float32 value."""
    case = make_case(op.row, {"n": 64, "k": 4, "h": 1024}, dtypes, rng)
    arrays = {name: to_gpu(array.copy()) for name, array in case.arrays.items()}
    op(*(array.desc() for array in arrays.values()), **case.scalars, stream=stream)
    op(*case.arrays.values(), **case.scalars)
    for name in case.expected:
        gpu, cpu = arrays[name].get(), case.arrays[name]
        scale = np.maximum(np.abs(cpu.astype(np.float64)), 1e-4)
        step = 2 * float(ml_dtypes.finfo(cpu.dtype).eps) * scale
        assert (np.abs(gpu.astype(np.float64) - cpu.astype(np.float64)) <= step).all()
        same = (gpu.view(f"u{gpu.itemsize}") == cpu.view(f"u{cpu.itemsize}")).mean()
        assert same > 0.99, f"{name}: only {same:.4f} of the values are the same bits"


@pytest.mark.parametrize("name", ["rmsnorm", "qk_rmsnorm", "gemma_rmsnorm"])
def test_in_place(name, rng, to_gpu, stream):
    op = OPS[name]
    case = make_case(op.row, {"n": 40, "k": 4, "h": 512}, {"T": "float16"}, rng)
    x, weight = to_gpu(case.arrays["input"]), to_gpu(case.arrays["weight"])
    op(x.desc(), x.desc(), weight.desc(), stream=stream)
    assert case.error("out", x.get())[1] <= 1


def test_heads_inside_a_fused_qkv_buffer(rng, to_gpu, stream):
    """q of a (tokens, q+k+v heads, head_dim) buffer, normalised in place."""
    qkv = rng.standard_normal((50, 12, 128)).astype(np.float16)
    weight = rng.standard_normal(128).astype(np.float16)
    case = make_case(OPS["qk_rmsnorm"].row, {"n": 50, "k": 8, "h": 128}, {"T": "float16"}, rng)
    case.arrays["input"][...] = qkv[:, :8]
    whole, w = to_gpu(qkv), to_gpu(weight)
    q = fi_ffi.TensorDesc(whole.ptr, (50, 8, 128), "float16", strides=(12 * 128, 128, 1))
    fi_ffi.qk_rmsnorm(q, q, w.desc(), stream=stream)
    got = whole.get()
    x = qkv[:, :8].astype(np.float64)
    expected = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * weight.astype(np.float64)
    assert np.abs(got[:, :8] - expected).max() <= np.abs(expected).max() * 2.0**-10
    assert zlib.crc32(got[:, 8:].tobytes()) == zlib.crc32(qkv[:, 8:].tobytes())


def test_infinities_and_nan_stay_in_their_rows(rng, to_gpu, stream):
    case = make_case(OPS["rmsnorm"].row, {"n": 4, "h": 256}, {"T": "float16"}, rng)
    case.arrays["input"][1, 3], case.arrays["input"][2, 5] = np.nan, np.inf
    arrays = [to_gpu(array) for array in case.arrays.values()]
    fi_ffi.rmsnorm(*(array.desc() for array in arrays), stream=stream)
    finite = np.isfinite(arrays[0].get().astype(np.float32)).all(axis=1)
    assert finite.tolist() == [True, False, False, True]
