"""Random inputs of `fi_ffi.ops.table.gemm`."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from fi_ffi.loader import machine
from fi_ffi.ops.row import Row
from fi_ffi.ops.table.gemm import CUBLAS_BYTES
from fi_ffi.reference.arrays import Array

from tests.helpers.inputs.family import Inputs, Made


def _scaled(
    row: Row, tables: Mapping[str, Array] | None, sizes: Mapping[str, int],
    scalars: dict[str, Any], without: Collection[str], rng: np.random.Generator,
) -> Made:  # fmt: skip
    """Scales that keep products in float16's range, and as much scratch as a GPU wants."""
    made = dict(tables or {})
    for name in ("A_scale", "B_scale"):
        made.setdefault(name, np.exp(rng.uniform(-5, -2, 1)))
    count = machine.multiprocessors(0) if machine.device_count() else 1
    room = max(sizes.get("workspace_size", 0), count * CUBLAS_BYTES)
    return made, {**sizes, "workspace_size": room}, scalars


def _padded(
    row: Row, tables: Mapping[str, Array] | None, sizes: Mapping[str, int],
    scalars: dict[str, Any], without: Collection[str], rng: np.random.Generator,
) -> Made:  # fmt: skip
    """Room for the scales of 4 rows at a time."""
    return tables or {}, {**sizes, "n4": -(-sizes["n"] // 4) * 4}, scalars


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
