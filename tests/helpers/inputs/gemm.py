"""Random inputs of `fi_ffi.ops.table.gemm`."""

from __future__ import annotations

import numpy as np

from fi_ffi.loader import machine
from fi_ffi.ops.table.gemm import CUBLAS_BYTES

from tests.helpers.inputs.family import Call, Inputs


def _scaled(call: Call) -> None:
    """Scales that keep products in float16's range, and as much scratch as a GPU wants."""
    of_a, of_b = np.exp(call.rng.uniform(-5, -2, (2, 1)))
    call.default(A_scale=of_a, B_scale=of_b)
    count = machine.multiprocessors(0) if machine.device_count() else 1
    room = max(call.sizes.get("workspace_size", 0), count * CUBLAS_BYTES)
    call.sizes["workspace_size"] = room


def _padded(call: Call) -> None:
    """Room for the scales of 4 rows at a time."""
    call.sizes["n4"] = -(-call.sizes["n"] // 4) * 4


_ROUTER = Inputs(small={"n": 3}, usual={"n": 16})
# By module, or by op.
INPUTS: dict[str, Inputs] = {
    "bmm_fp8": Inputs(
        small={"b": 2, "m": 5, "n": 16, "k": 32, "workspace_size": CUBLAS_BYTES},
        usual={"b": 2, "m": 48, "n": 80, "k": 512},
        make=_scaled,
        variants={"own scratch": {"without": ("workspace_buffer",)}},
    ),
    "tinygemm2": Inputs(small={"n": 3, "m": 16, "k": 128}, usual={"n": 8, "m": 512, "k": 1024}),
    "dsv3_router_gemm": _ROUTER,
    "fp8_quantize_1x128": Inputs(
        small={"n": 9, "k128": 2}, usual={"n": 32, "k128": 16}, make=_padded
    ),
}
