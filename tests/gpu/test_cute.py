"""A module of CuTe DSL, called as any other: of FlashInfer 0.7.2.post1.

`fi-ffi build --release 0.7.2.post1 rmsnorm_cute` makes it; those of `gdn_decode` and `kda_decode`
are called by the tests of tests/ops.
"""

from __future__ import annotations

import numpy as np
import pytest

import fi_ffi

from tests.helpers.untyped_calls import (
    BF16,
    HALF,
    SUM,
    call,
    float64,
    judged,
    module,
    poisoned,
)

RMSNORM = "rmsnorm_sm90a_cute_dsl_rmsnorm_kernel_bfloat16_4096_bias0"


def only(name):
    """The one function of a module, or the test is skipped."""
    found = module(name)
    (symbol,) = found.entries()
    return found.entry(symbol)


@pytest.mark.parametrize("rows", [1, 33, 4096])
def test_rmsnorm(rows, rng, to_gpu, stream):
    entry = only(RMSNORM)
    x, weight = (rng.standard_normal(shape).astype(BF16) for shape in ((rows, 4096), (4096,)))
    expected = float64(x) * float64(weight)
    expected /= np.sqrt((float64(x) ** 2).mean(1, keepdims=True) + 1e-6)
    out = to_gpu(poisoned((rows, 4096), BF16))
    call(entry, to_gpu(x), to_gpu(weight), out, rows, 1e-6, stream=stream)
    judged(out, expected, (HALF[BF16] + SUM) * np.abs(expected) + 1e-30)


def test_a_wrong_call_is_refused(to_gpu, stream):
    entry = only(RMSNORM)
    x = to_gpu(np.zeros((2, 4096), BF16))
    out, weight = to_gpu(poisoned((2, 4096), BF16)), to_gpu(np.zeros(4095, BF16))
    with pytest.raises(fi_ffi.ArgumentTypeError, match=r"Tensor\(\[n0, 4096\], bfloat16\)"):
        call(entry, x, weight, out, 2, stream=stream)
    with pytest.raises(fi_ffi.KernelError, match="Mismatched"):
        call(entry, x, weight, out, 2, 1e-6, stream=stream)
    assert (out.get().view(np.uint16) == 0xFFFF).all()
