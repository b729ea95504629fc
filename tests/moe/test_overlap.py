"""An output of experts that shares memory with what is read: refused, or else right."""

from __future__ import annotations

import numpy as np
import pytest

import fi_ffi

from tests.helpers import moe_layers
from tests.helpers.overlapping import Memory, axes, moved, shifts, span

# Each mode, and whether it is called with biases and limits of the activation.
MODES = [("half", True), ("fp8", False), ("fp8_block_scale", False), ("mxfp4", False),
         ("int4", False)]  # fmt: skip


def made(mode: str, more: bool) -> moe_layers.Made:
    options = {"biases": True, "limits": ("alpha", "beta", "limit")} if more else {}
    return moe_layers.a(mode, **options)


def given(call: moe_layers.Made) -> dict[str, np.ndarray]:
    """All tensors, the scales by their places."""
    scales = {f"quant_scales[{i}]": scale for i, scale in enumerate(call.scales)}
    return call.tensors | {name: scale for name, scale in scales.items() if scale.size}


def put(call: moe_layers.Made, arrays: dict[str, np.ndarray]) -> None:
    for name, array in arrays.items():
        if name.startswith("quant_scales"):
            call.scales[int(name[13:-1])] = array
        else:
            call.tensors[name] = array


@pytest.mark.parametrize(("mode", "more"), MODES)
def test_the_output(mode, more):
    rng = np.random.default_rng(0)
    call = made(mode, more)
    call.call()
    arrays = given(call)
    output = arrays["output"]
    for name, array in arrays.items():
        if name == "output":
            continue
        found = [*shifts(output, array, (128, 128), rng)]
        found = [found[i] for i in rng.permutation(len(found))[:4]]
        for shift in [*found, *([0] if axes(output) == axes(array) else [])]:
            joined = moved(arrays, "output", name, shift, 128)
            put(call, joined.arrays)
            before = joined.bytes()
            with pytest.raises(fi_ffi.ArgumentError) as caught:
                call.call()
            error = caught.value
            assert error.op in ("cutlass_fused_moe", "FusedMoe") and error.argument == "output"
            assert name in str(error.got) and "overlaps" in str(error.got)
            assert joined.bytes() == before
        put(call, arrays)


@pytest.mark.parametrize(("mode", "more"), MODES)
def test_one_after_another(mode, more):
    rng = np.random.default_rng()
    call = made(mode, more)
    arrays = given(call)
    order = [list(arrays)[i] for i in rng.permutation(len(arrays))]
    memory = Memory(sum(span(array) + 256 for array in arrays.values()))
    at, placed = 0, {}
    for name in order:
        placed[name] = memory.place(arrays[name], at)
        at += -(-span(arrays[name]) // 128) * 128
    put(call, placed)
    assert call.worst(call.call()) <= 1
