"""Random matrices, and scales in tiles."""

from __future__ import annotations

import numpy as np

from fi_ffi.ops.call.notation import round_up

from tests.helpers.inputs.family import Call, Inputs


def make(call: Call) -> None:
    sizes, rng = call.sizes, call.rng
    sizes.setdefault("workspace_size", 32 << 20)
    if call.row.name in ("bf16_gemm", "bmm_bf16", "tgv_gemm"):
        return
    is_fp4 = call.row.name == "fp4_gemm"
    columns = sizes["half"] // 8 if is_fp4 else sizes["k"] // 32
    for name, rows in (("a", "m"), ("b", "n")):
        count = sizes.get("b", 1) * sizes[rows]
        sizes[f"scales_{name}"] = round_up(count, 128) * round_up(columns, 4)
    # Positive and finite, and so that products fit float16.
    codes = (40, 60) if is_fp4 else (120, 128)
    call.default(
        mat1Scale=rng.integers(*codes, sizes["scales_a"]),
        mat2Scale=rng.integers(*codes, sizes["scales_b"]),
    )
    if is_fp4:
        call.default(
            mat1=rng.integers(0, 256, (sizes["m"], sizes["half"])),
            mat2=rng.integers(0, 256, (sizes["n"], sizes["half"])),
            globalScale=np.exp(rng.uniform(-5, -3, 1)),
        )


_OWN = {"own scratch": {"without": ("workspace_buffer",)}}
# By module, or by op.
INPUTS: dict[str, Inputs] = {
    "fp4_gemm": Inputs({"m": 3, "n": 32, "half": 48}, {"m": 64, "n": 160, "half": 128}, make, _OWN),
    "mxfp8_gemm": Inputs({"m": 3, "n": 32, "k": 96}, {"m": 64, "n": 160, "k": 256}, make, _OWN),
    # Of several matrices each has whole tiles of scales.
    "bmm_mxfp8": Inputs(
        {"b": 2, "m": 128, "n": 128, "k": 32}, {"b": 2, "m": 128, "n": 256, "k": 64}, make, _OWN
    ),
    "bmm_bf16": Inputs(
        {"b": 2, "m": 3, "n": 16, "k": 16}, {"b": 3, "m": 48, "n": 80, "k": 128}, make, _OWN
    ),
    "bf16_gemm": Inputs({"m": 3, "n": 16, "k": 16}, {"m": 48, "n": 80, "k": 512}, make, _OWN),
    "tgv_gemm": Inputs(
        {"m": 16, "n": 3, "k": 16}, {"m": 256, "n": 8, "k": 512}, make,
        {"no bias": {"without": ("bias",)}},
    ),
}  # fmt: skip
