"""The RMSNorm family on a GPU: the tests of tests/ops/test_norm.py, and what only a GPU shows."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from cuda.bindings import runtime

import fi_ffi
from fi_ffi.cli.cuda import check
from fi_ffi.ops.functions import OPS

from tests.helpers.bodies import bodies_of
from tests.helpers.calls import CALLS
from tests.helpers.cases import make_case
from tests.helpers.every_op import check_on
from tests.ops import test_norm

globals().update(bodies_of(test_norm))

BF16 = ml_dtypes.bfloat16


@pytest.mark.parametrize(("op", "dtypes"), CALLS)
def test_65536_rows(op, dtypes, machine, rng):
    case = make_case(op.row, {"n": 65536, "k": 2, "h": 128}, dtypes, rng)
    assert check_on(machine, case) <= 1


def test_layernorm_of_more_elements_than_an_int_counts(machine, rng):
    """The same rows again and again, and in front of each time a row of its own."""
    machine.need("norm")
    n, h, block = 175_000, 12_288, 1_000
    assert 2**31 < n * h <= 2**32 and n % block == 0
    rows = rng.standard_normal((block, h), np.float32).astype(BF16)
    own = rng.standard_normal((n // block, h), np.float32).astype(BF16)
    gamma, beta = (machine.place(rng.standard_normal(h, np.float32)) for _ in range(2))
    to_device, to_host = (
        getattr(runtime.cudaMemcpyKind, f"cudaMemcpy{way}")
        for way in ("HostToDevice", "DeviceToHost")
    )
    pointers = [check(runtime.cudaMalloc(2 * n * h)) for _ in range(2)]
    try:
        check(runtime.cudaMemset(pointers[1], 0xFF, 2 * n * h))
        for i, row in enumerate(own):
            start = pointers[0] + i * rows.nbytes
            check(runtime.cudaMemcpy(start, rows.ctypes.data, rows.nbytes, to_device))
            check(runtime.cudaMemcpy(start, row.ctypes.data, row.nbytes, to_device))
        check(runtime.cudaDeviceSynchronize())
        x, out = (fi_ffi.TensorDesc(p, (n, h), "bfloat16", device="cuda:0") for p in pointers)
        fi_ffi.layernorm(out, x, gamma.desc(), beta.desc(), stream=machine.stream)
        machine.synchronize()
        got = np.empty((n // block, block, h), BF16)
        check(runtime.cudaMemcpy(got.ctypes.data, pointers[1], got.nbytes, to_host))
    finally:
        for pointer in pointers:
            check(runtime.cudaFree(pointer))
    bits = got.view(np.uint16)
    assert (bits[1:, 1:] == bits[0, 1:]).all()
    judged = np.concatenate([own, rows[1:]]).astype(np.float64)
    found = np.concatenate([got[:, 0], got[0, 1:]]).astype(np.float64)
    mean, deviation = judged.mean(1, keepdims=True), judged.std(1, keepdims=True)
    scale, shift = gamma.get().astype(np.float64), beta.get().astype(np.float64)
    wanted = (judged - mean) / np.sqrt(deviation**2 + 1e-6) * scale + shift
    size = np.abs(wanted - shift) + np.abs(shift) + np.abs(scale)
    assert (np.abs(found - wanted) <= 2.0**-8 * size).all()


def test_infinities_and_nan_stay_in_their_rows(rng, to_gpu, stream):
    case = make_case(OPS["rmsnorm"].row, {"n": 4, "h": 256}, {"T": "float16"}, rng)
    case.arrays["input"][1, 3], case.arrays["input"][2, 5] = np.nan, np.inf
    arrays = [to_gpu(array) for array in case.arrays.values()]
    fi_ffi.rmsnorm(*(array.desc() for array in arrays), stream=stream)
    finite = np.isfinite(arrays[0].get().astype(np.float32)).all(axis=1)
    assert finite.tolist() == [True, False, False, True]
