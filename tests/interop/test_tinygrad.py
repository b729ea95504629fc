"""The example with tinygrad without a GPU, that its check can fail, and what it describes."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest

import fi_ffi

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "interop"))
tinygrad = pytest.importorskip("tinygrad", reason="tinygrad is not installed")
import tinygrad_layer as example  # noqa: E402


@pytest.fixture(scope="module")
def device():
    found = example.cpu()
    with tinygrad.Context(DEV=found):
        yield found


@pytest.fixture(scope="module")
def step(device):
    """A layer, and what tinygrad alone gives in the first step."""
    layer = example.Layer(device, 8, 2, 1, 8, (15, 3), 1)
    exact = [*example.run(layer, example.ByTinygrad(layer, example.dtypes.float32), 1)]
    assert example.check(layer, exact) < example.BOUND
    return layer, exact


def test_it_steps(device, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["tinygrad_layer.py", "--cpu"])
    example.main()
    assert re.search(rf"^2 steps on {device}: largest error \d", capsys.readouterr().out)


def swapped(k, v, *rest, append=fi_ffi.append_paged_kv_cache, **more):
    append(v, k, *rest, **more)


FAULTS = {
    "append": ("append_paged_kv_cache", swapped),
    "norm": ("fused_add_rmsnorm", fi_ffi.gemma_fused_add_rmsnorm),
    "rope": ("apply_rope_pos_ids", lambda *_, **__: None),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_its_check_can_fail(fault, step, monkeypatch):
    monkeypatch.setattr(fi_ffi, *FAULTS[fault])
    with pytest.raises(AssertionError, match="step 0 is wrong"):
        example.check(*step)


def test_what_it_describes(device, rng):
    """Memory of tinygrad's, also from the middle of it, that both read and write."""
    array = rng.standard_normal((3, 4)).astype(np.float16)
    tensor = tinygrad.Tensor(array, device=device).contiguous().realize()
    whole, rows = example.describe(tensor), example.describe(tensor[1:])
    assert (rows.ptr, rows.shape) == (whole.ptr + 8, (2, 4))
    out = tinygrad.Tensor.empty(2, 4, dtype=example.dtypes.float16, device=device)
    weight = tinygrad.Tensor(np.ones(4, np.float16), device=device).contiguous()
    fi_ffi.rmsnorm(example.describe(out), rows, example.describe(weight))
    x = array[1:].astype(float)
    exact = x / np.sqrt((x**2).mean(1, keepdims=True) + 1e-6)
    assert np.abs((out * 2).numpy() - 2 * exact).max() < 2**-8


def test_what_it_does_not_describe(device, rng):
    array = rng.standard_normal((3, 4)).astype(np.float16)
    tensor = tinygrad.Tensor(array, device=device).contiguous().realize()
    with pytest.raises(RuntimeError, match="non-contiguous view"):
        example.describe(tensor.transpose())
    with pytest.raises(TypeError, match="got the device NPY, expected CUDA, CPU or PYTHON"):
        example.describe(tinygrad.Tensor(array, device="NPY"))
