"""What tests/gpu/test_threads_stress.py's worker processes do; they import it."""

from __future__ import annotations

import numpy as np

import fi_ffi


def norm(number: int) -> int:
    """By a kernel on the GPU: rmsnorm of equal numbers is the weight."""
    from cuda.bindings import runtime

    from fi_ffi.cli.cuda import DeviceArray, check

    x, weight = np.full((2, 64), 3, np.float16), np.full(64, number, np.float16)
    arrays = [DeviceArray(array) for array in (np.full_like(x, np.nan), x, weight)]
    check(runtime.cudaDeviceSynchronize())
    fi_ffi.rmsnorm(*(array.desc() for array in arrays), stream=0)
    check(runtime.cudaDeviceSynchronize())
    out = arrays[0].get()
    assert (np.abs(out.astype(float) - number) < 0.01).all()
    return round(float(out[0, 0]))
