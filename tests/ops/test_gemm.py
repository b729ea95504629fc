"""Matrix products of a NaN, by an algorithm, and by FlashInfer's name: on the CPU, and on a GPU."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

import fi_ffi
from fi_ffi.cli.cases import bound
from fi_ffi.ops.functions import OPS

from tests.helpers.cases import aligned, make_case
from tests.helpers.sampling_calls import run

BF16 = ml_dtypes.bfloat16


def test_bmm_of_a_nan(machine, rng):
    """Its row is NaN, and no other is."""
    op = OPS["bmm_fp8"]
    dtypes = {"TA": "float8_e4m3fn", "TB": "float8_e4m3fn", "T": "bfloat16"}
    case = make_case(op.row, {"b": 1, "m": 6, "n": 16, "k": 64}, dtypes, rng)
    case.arrays["A"][0, 2, 5] = np.nan
    got = run(machine, "bmm_fp8", case.arrays)["D"].astype(float)
    assert np.isnan(got[0, 2]).all()
    assert np.isfinite(np.delete(got, 2, axis=1)).all()


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_bmm_takes_a_scale_as_it_comes(shape, machine, rng):
    """Of no axis, as a maximum has it, or of several; and any workspace."""
    dtypes = {"TA": "float8_e4m3fn", "TB": "float8_e4m3fn", "T": "bfloat16"}
    case = make_case(OPS["bmm_fp8"].row, {"b": 2, "m": 20, "n": 64, "k": 128}, dtypes, rng)
    for of in ("A_scale", "B_scale"):
        case.arrays[of] = case.arrays[of].reshape(shape)
    for size in (0, 256, 1 << 16):
        case.arrays["workspace_buffer"] = aligned(size, 256)
        got = run(machine, "bmm_fp8", case.arrays)["D"]
        assert case.error("D", got)[1] <= 1
    with pytest.raises(fi_ffi.ArgumentError, match="A_scale"):
        run(machine, "bmm_fp8", case.arrays | {"A_scale": np.ones((1, 2), np.float32)})


@pytest.mark.parametrize("room", [1, 3, 100])
def test_algorithms_that_cublaslt_has(room, machine, rng):
    machine.need("gemm")
    dtypes = {"TA": "float8_e4m3fn", "TB": "float8_e5m2", "T": "float16"}
    sizes = {"b": 2, "m": 20, "n": 64, "k": 128}
    case = make_case(OPS["bmm_fp8"].row, sizes, dtypes, rng)
    placed = {name: machine.place(array) for name, array in case.arrays.items()}
    descs = {name: array.desc() for name, array in placed.items()}
    algos = np.full(64 * room, 0xFF, np.uint8)
    count = fi_ffi.bmm_fp8_get_algos(**descs, algo_buffer=algos, stream=machine.stream)
    assert 1 <= count <= room
    for i in range(count):
        machine.poison(placed["D"], machine.stream)
        fi_ffi.bmm_fp8_run_with_algo(**descs, algo_buffer=algos, algo_idx=i, stream=machine.stream)
        machine.synchronize()
        assert case.error("D", placed["D"].get())[1] <= 1
    with pytest.raises(fi_ffi.KernelError, match="out of range"):
        fi_ffi.bmm_fp8_run_with_algo(
            **descs, algo_buffer=algos, algo_idx=room, stream=machine.stream
        )
    with pytest.raises(fi_ffi.ArgumentError, match="algo_idx"):
        fi_ffi.bmm_fp8_run_with_algo(**descs, algo_buffer=algos, algo_idx=-1, stream=machine.stream)
    assert all(array.intact() for array in placed.values())


def test_algorithms_are_kept_on_the_host(machine, rng):
    """The buffer is read before anything is launched."""
    dtypes = {"TA": "float8_e4m3fn", "TB": "float8_e4m3fn", "T": "float16"}
    case = make_case(OPS["bmm_fp8"].row, {"b": 1, "m": 4, "n": 16, "k": 16}, dtypes, rng)
    algos = fi_ffi.TensorDesc(1 << 30, (64,), "uint8", device="cuda:0")
    with pytest.raises(fi_ffi.ArgumentError, match=r"algo_buffer.*on the host"):
        fi_ffi.bmm_fp8_get_algos(**case.arrays, algo_buffer=algos)


@pytest.mark.parametrize("with_bias", [False, True])
def test_flashinfers_function_for_few_rows(with_bias, machine, rng):
    machine.need("tinygemm2")
    x, weight = (rng.standard_normal(shape).astype(BF16) for shape in ((5, 128), (32, 128)))
    bias = rng.standard_normal(32).astype(BF16) if with_bias else None
    out = np.full((5, 32), np.nan, BF16)
    placed = [machine.place(array) for array in (x, weight, out)]
    of_bias = machine.place(bias).desc() if with_bias else None
    fi_ffi.tinygemm_bf16(*(array.desc() for array in placed), of_bias, stream=machine.stream)
    value = x.astype(float) @ weight.T.astype(float) + (bias.astype(float) if with_bias else 0)
    sizes = abs(x.astype(float)) @ abs(weight.T.astype(float)) + 4
    assert (abs(placed[2].get().astype(float) - value) <= bound(value, sizes, x.dtype)).all()
