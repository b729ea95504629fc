"""Random numbers in blocks, and the sizes that their scales have."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from fi_ffi.ops.notation import round_up
from fi_ffi.ops.row import Row
from fi_ffi.ops.table.block_scaled import ROWS_IN_ORDER, TILES_OF_128, layout_of, scales_of
from fi_ffi.reference.arrays import Array

from tests.helpers.inputs.family import Inputs, Made


def make(
    row: Row, tables: Mapping[str, Array] | None, sizes: Mapping[str, int],
    scalars: dict[str, Any], without: Collection[str], rng: np.random.Generator,
) -> Made:  # fmt: skip
    made = dict(tables or {})
    if row.name == "nvfp4_kv_dequant":
        n, blocks = sizes["n"], sizes["blocks"]
        made.setdefault("fp4_data", rng.integers(0, 256, (n, 8 * blocks)))
        # Any scale but a NaN.
        codes = np.array([code for code in range(256) if code % 128 < 127], np.uint8)
        made.setdefault("block_scales", rng.choice(codes, (n, blocks)))
        made.setdefault("global_scale", np.exp(rng.uniform(-4, 1, 1)))
        return made, sizes, scalars
    if row.name == "mxfp8_quantize":
        layout = scalars.get("sfSwizzleLayout", TILES_OF_128)
        if not scalars.get("isSfSwizzledLayout", True):
            layout = ROWS_IN_ORDER
        padded_k = round_up(sizes["k"], scalars.get("alignment", 32))
        more = {"padded_k": padded_k, "num_scales": scales_of(sizes["n"], padded_k, layout)}
        return made, {**sizes, **more}, scalars
    if row.name == "nvfp4_kv_quant":
        made.setdefault("global_scale", np.exp(rng.uniform(-4, -1, 1)))
        return made, sizes, scalars
    if row.name == "fp4_quantize":
        is_power = scalars.get("sfUseUE8M0", False)
        scalars = {"sfVecSize": 32 if is_power else 16} | scalars
        layout = layout_of(
            scalars.get("isSfSwizzledLayout", True), scalars.get("isSf8x4Layout", False)
        )
        # As many as of blocks of 32 in a row that is so long.
        length = 2 * sizes["half"] // scalars["sfVecSize"] * 32
        made.setdefault("globalScale", np.exp(rng.uniform(1, 4, 1)))
        return made, {**sizes, "num_scales": scales_of(sizes["n"], length, layout)}, scalars
    tiles = round_up(sizes["rows"], 128) * round_up(sizes["cols"], 4)
    return made, {**sizes, "swizzled": sizes["n"] * tiles}, scalars


# By module, or by op.
INPUTS: dict[str, Inputs] = {
    "nvfp4_kv_dequant": Inputs({"n": 5, "blocks": 3}, {"n": 512, "blocks": 8}, make),
    "block_scale_interleave": Inputs(
        {"n": 2, "rows": 3, "cols": 5}, {"n": 4, "rows": 1000, "cols": 64}, make
    ),
    "block_scale_interleave_reverse": Inputs(
        {"n": 2, "rows": 128, "cols": 8}, {"n": 4, "rows": 1024, "cols": 64}, make
    ),
    "nvfp4_kv_quant": Inputs({"n": 5, "blocks": 3}, {"n": 512, "blocks": 8}, make),
    "fp4_quantize": Inputs(
        {"n": 3, "half": 32},
        {"n": 32, "half": 2048},
        make,
        variants={"powers": {"sfUseUE8M0": True, "without": ("globalScale",)}},
    ),
    "mxfp8_quantize": Inputs({"n": 3, "k": 96}, {"n": 32, "k": 4096}, make),
}
