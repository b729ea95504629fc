"""Random numbers in blocks, and the sizes that their scales have."""

from __future__ import annotations

import numpy as np

from fi_ffi.ops.call.notation import round_up
from fi_ffi.ops.table.block_scaled import ROWS_IN_ORDER, TILES_OF_128, layout_of, scales_of

from tests.helpers.inputs.family import Call, Inputs


def make(call: Call) -> None:
    sizes, scalars, rng, n = call.sizes, call.scalars, call.rng, call.sizes["n"]
    if call.row.name == "nvfp4_kv_dequant":
        # Any scale but a NaN.
        codes = np.array([code for code in range(256) if code % 128 < 127], np.uint8)
        call.default(
            fp4_data=rng.integers(0, 256, (n, 8 * sizes["blocks"])),
            block_scales=rng.choice(codes, (n, sizes["blocks"])),
            global_scale=np.exp(rng.uniform(-4, 1, 1)),
        )
    elif call.row.name == "mxfp8_quantize":
        layout = scalars.get("sfSwizzleLayout", TILES_OF_128)
        if not scalars.get("isSfSwizzledLayout", True):
            layout = ROWS_IN_ORDER
        sizes["padded_k"] = padded_k = round_up(sizes["k"], scalars.get("alignment", 32))
        sizes["num_scales"] = scales_of(n, padded_k, layout)
    elif call.row.name == "nvfp4_kv_quant":
        call.default(global_scale=np.exp(rng.uniform(-4, -1, 1)))
    elif call.row.name == "fp4_quantize":
        scalars.setdefault("sfVecSize", 32 if scalars.get("sfUseUE8M0", False) else 16)
        layout = layout_of(
            scalars.get("isSfSwizzledLayout", True), scalars.get("isSf8x4Layout", False)
        )
        # As many as of blocks of 32 in a row that is so long.
        length = 2 * sizes["half"] // scalars["sfVecSize"] * 32
        call.default(globalScale=np.exp(rng.uniform(1, 4, 1)))
        sizes["num_scales"] = scales_of(n, length, layout)
    elif call.row.name == "fp4_batched_quantize":
        sizes["scales"] = n if scalars.pop("by_row", False) else 1
        call.default(globalScale=np.exp(rng.uniform(1, 4, sizes["scales"])))
        sizes["num_scales"] = scales_of(n, 4 * sizes["half"], TILES_OF_128)
    else:
        sizes["swizzled"] = n * round_up(sizes["rows"], 128) * round_up(sizes["cols"], 4)


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
    "fp4_batched_quantize": Inputs(
        {"b": 2, "n": 3, "half": 24},
        {"b": 8, "n": 32, "half": 2048},
        make,
        variants={"a scale for each row": {"by_row": True}},
    ),
    "mxfp8_quantize": Inputs({"n": 3, "k": 96}, {"n": 32, "k": 4096}, make),
}
