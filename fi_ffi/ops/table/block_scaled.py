"""Block-scaled numbers: FP4 caches, the order of scales, and quantisation to MXFP8 and FP4.

The quantising kernels (`csrc/nv_internal/tensorrt_llm/kernels/quantization.cuh`) have a body for
SM100 and later only. FlashInfer builds them for SM90 too, where they are launched and write
nothing. The launch of `nvfp4_kv_dequant` fails without an error if a row's scales do not fit a
block's shared memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fi_ffi.ops.call.arguments import INT32_MAX
from fi_ffi.ops.call.notation import round_up
from fi_ffi.ops.call.releases import forms_of
from fi_ffi.ops.call.row import Absent, Row, Rule, Scalar, Tensor, Vector

# What kernels without a body are compiled to.
_EMPTY = "for other GPUs {} has an empty kernel, which would write nothing"
# The same sources, compiled for a GPU each; for those of 12.x together.
_FP4_MODULES = {
    capability: f"fp4_quantization_{name}"
    for capability, name in (
        ((9, 0), "90"),
        ((10, 0), "100"),
        ((10, 3), "103"),
        ((11, 0), "110"),
        ((12, 0), "120f"),
        ((12, 1), "120f"),
    )
}
_THOP = "csrc/nv_internal/tensorrt_llm/thop"
_OUT: dict[str, Any] = {"writes": True, "reads": False, "contiguous": True}
# Scales that fit 48 kB of shared memory, with one more number.
_MOST_BLOCKS = 48 * 1024 - 4

# `QuantizationSFLayout` in include/flashinfer/fp4_layout.cuh.
TILES_OF_128, TILES_OF_8, ROWS_IN_ORDER = range(3)


def scales_of(n: int, padded_k: int, layout: int) -> int:
    """Return the number of scales of 32 elements in a layout."""
    if layout == ROWS_IN_ORDER:
        return n * (padded_k // 32)
    return round_up(n, 128 if layout == TILES_OF_128 else 8) * round_up(padded_k // 32, 4)


def layout_of(is_swizzled: bool, is_8x4: bool) -> int:
    return (TILES_OF_8 if is_8x4 else TILES_OF_128) if is_swizzled else ROWS_IN_ORDER


_COUNT: dict[str, Callable[..., int]] = {"scales_of": scales_of, "layout_of": layout_of}


def _forms(
    name: str, module: str, source: str, doc: str, *args: Tensor | Scalar | Absent, **more: Any
) -> tuple[Row, ...]:
    fields: dict[str, Any] = {"symbol": name, "vector": Vector(()), "offset_limit": 2**31} | more
    return forms_of(Row(name, module, source=source, doc=doc, args=args, **fields))


def _interleave(name: str, doc: str, *args: Tensor, **more: Any) -> tuple[Row, ...]:
    return _forms(
        name,
        "fp4_quantization_90",
        f"{_THOP}/fp4Op.cpp",
        doc,
        *args,
        symbol=f"{name}_sm100",
        releases=">=0.6.3",
        capabilities=(9, 10, 11, 12),
        modules=_FP4_MODULES,
        **more,
    )


_IN_TILES = (
    "tiles of 128 rows and 4 columns: row i of a tile starts at 16 * (i % 32) + 4 * (i // 32)"
)
_LAYOUTS = "0.6.7"  # the release that names an order; before there were two
_ARE_SCALES = "a scale for every 32 elements of padded_k, padded to whole tiles"
# The code of the default recipe.
_NO_RECIPE = Absent("nvfp44Over6Code", "int", since="0.7.1")

ROWS = (
    *_forms(
        "nvfp4_kv_dequant",
        "fp4_kv_dequant",
        "csrc/fp4_kv_dequantization.cu",
        "Dequantise FP4 to 16 bits, with a scale for every 16 elements of a row: `output = value * "
        "scale * global_scale`.",
        Tensor("fp4_data", "n 8*blocks", "uint8",
               "two e2m1 elements in a byte, the first in the low half",
               contiguous=True, alignment=2),
        Tensor("block_scales", "n blocks", "S", "scales, in float8_e4m3fn or as bytes",
               contiguous=True),
        Tensor("global_scale", "1", "float32", "factor of all numbers"),
        Tensor("output", "n 16*blocks", "T", "the numbers", alignment=4, **_OUT),
        dtypes={"T": ("bfloat16", "float16"), "S": ("uint8", "float8_e4m3fn")},
        releases=">=0.6.7",
        requires=("blocks >= 1", f"n <= {INT32_MAX}", f"blocks <= {_MOST_BLOCKS}"),
    ),
    *_interleave(
        "block_scale_interleave",
        f"Put scales into {_IN_TILES}; 0 in padding.",
        Tensor("blockScale", "n rows cols", "T", "scales of n matrices", contiguous=True),
        Tensor("interleavedBlockScale", "swizzled", "T", "tile after tile", **_OUT),
        dtypes={"T": ("uint8", "bfloat16")},
        requires=(
            Rule("interleavedBlockScale",
                 "swizzled == n * round_up(rows, 128) * round_up(cols, 4)",
                 "whole tiles of 128 rows and 4 columns of each matrix"),
        ),
    ),
    *_interleave(
        "block_scale_interleave_reverse",
        "Undo `block_scale_interleave`: put scales from tiles back into rows.",
        Tensor("blockScale", "n rows cols", "uint8", "scales in tiles", contiguous=True),
        Tensor("reversedBlockScale", "n rows cols", "uint8", "in rows", **_OUT),
        dtypes={},
        requires=("rows % 128 == 0", "cols % 4 == 0"),
    ),
    *_forms(
        "mxfp8_quantize",
        "mxfp8_quantization_sm100",
        f"{_THOP}/fp8Quantize.cpp",
        "Quantise to MXFP8: float8_e4m3fn elements, and for every 32 elements of a row the "
        "smallest power of 2 that keeps them within 448.",
        Tensor("input", "n k", "T", "rows to quantise", contiguous=True, alignment=32),
        Tensor("valMxFP8", "n padded_k", "float8_e4m3fn",
               "the elements divided by their scale; 0 beyond k",
               alignment=16, **_OUT),
        Tensor("scaleFP8SF", "num_scales", "uint8",
               "exponent + 127 of each scale; 0 in padding", **_OUT),
        Scalar("isSfSwizzledLayout", bool, True,
               "True: scales in tiles of 128 x 4; False: in rows", until=_LAYOUTS),
        Scalar("sfSwizzleLayout", int, TILES_OF_128,
               "order of the scales: 0 for tiles of 128 x 4, 1 for tiles of 8 x 4, 2 for rows",
               low=0, high=2, since=_LAYOUTS),
        Scalar("alignment", int, 32, "padded_k is a multiple of this", low=32, high=2**20,
               multiple_of=32),
        Scalar("enable_pdl", bool, False,
               "programmatic dependent launch: start while the previous kernel finishes"),
        dtypes={"T": ("float16", "bfloat16")},
        releases=">=0.6.3",
        offset_limit=2**63,
        requires=(
            "k >= 1",
            "k % 32 == 0",
            f"n <= {INT32_MAX - 127}",
            f"padded_k <= {INT32_MAX - 127}",
            Rule("valMxFP8", "padded_k == round_up(k, alignment)",
                 "padded_k = k, rounded up to a multiple of alignment"),
            Rule("scaleFP8SF", "num_scales == scales_of(n, padded_k, sfSwizzleLayout)",
                 _ARE_SCALES, _COUNT, since=_LAYOUTS),
            Rule("scaleFP8SF",
                 "num_scales == scales_of(n, padded_k, layout_of(isSfSwizzledLayout, False))",
                 _ARE_SCALES, _COUNT, until=_LAYOUTS),
        ),
        capabilities=(10, 11, 12),
        elsewhere=_EMPTY.format("mxfp8_quantization_sm100"),
    ),
    *_forms(
        "nvfp4_kv_quant",
        "fp4_kv_quant",
        "csrc/fp4_kv_quantization.cu",
        "Quantise 16-bit numbers to the FP4 of `nvfp4_kv_dequant`: the scale for every 16 elements "
        "of a row is `largest / 6 / global_scale`.",
        Tensor("input", "n 16*blocks", "T", "the numbers", contiguous=True, alignment=4),
        Tensor("global_scale", "1", "float32", "divisor of all numbers"),
        Tensor("fp4_output", "n 8*blocks", "uint8",
               "two e2m1 elements in a byte, the first in the low half", alignment=4, **_OUT),
        Tensor("block_scales", "n blocks", "uint8", "bytes of float8_e4m3fn", **_OUT),
        dtypes={"T": ("bfloat16", "float16")},
        releases=">=0.6.7",
        requires=("blocks >= 1", f"n <= {INT32_MAX}"),
        capabilities=(10, 11, 12),
        elsewhere="for other GPUs the kernel writes zeros",
    ),
    *_forms(
        "fp4_quantize",
        "fp4_quantization_100",
        f"{_THOP}/fp4Quantize.cpp",
        "Quantise to FP4 (e2m1) with a scale for every 16 or 32 elements of a row. NVFP4: the "
        "scale is `globalScale * largest / 6` in float8_e4m3fn. MXFP4: it is the smallest power "
        "of 2 that keeps the elements within 6.",
        Tensor("input", "n 2*half", "T", "rows to quantise", contiguous=True, alignment=32),
        Tensor("globalScale", "1", "float32",
               "factor of all scales, usually 448 * 6 / the largest element; elements are divided "
               "by scale / globalScale", optional=True),
        Tensor("valueE2M1", "n half", "uint8", "two elements in a byte, the first in the low half",
               alignment=8, **_OUT),
        Tensor("scaleFP8SF", "num_scales", "uint8",
               "bytes of the scales, or exponent + 127; 0 in padding", **_OUT),
        Scalar("sfVecSize", int, 16, "elements for each scale", low=16, high=32, multiple_of=16),
        Scalar("sfUseUE8M0", bool, False, "True: scales are powers of 2 (MXFP4)"),
        Scalar("isSfSwizzledLayout", bool, True, "True: scales in tiles; False: in rows"),
        Scalar("isSf8x4Layout", bool, False, "True: tiles of 8 rows; False: of 128"),
        Scalar("isGlobalScaleInversed", bool, False,
               "True: divide by `globalScale` instead of multiplying",
               since="0.6.11"),
        Scalar("enable_pdl", bool, False, "programmatic dependent launch"),
        _NO_RECIPE,
        dtypes={"T": ("float16", "bfloat16")},
        releases=">=0.6.3",
        offset_limit=2**63,
        requires=(
            "half >= 1",
            "half % 8 == 0",
            f"n <= {INT32_MAX - 127}",
            f"half <= {2**30 - 128}",
            Rule("sfVecSize", "sfVecSize == (32 if sfUseUE8M0 else 16)",
                 "32 with sfUseUE8M0, and 16 without"),
            Rule("input", "2 * half % sfVecSize == 0",
                 "rows of whole blocks of sfVecSize elements"),
            Rule("globalScale", "globalScale or sfUseUE8M0",
                 "a globalScale, unless sfUseUE8M0 is set"),
            # As many as of blocks of 32 in a row that is so long.
            Rule("scaleFP8SF",
                 "num_scales == scales_of(n, 2 * half // sfVecSize * 32, "
                 "layout_of(isSfSwizzledLayout, isSf8x4Layout))",
                 "a scale for every sfVecSize elements, padded to whole tiles",
                 _COUNT),
        ),
        capabilities=(10, 11, 12),
        elsewhere=_EMPTY.format("fp4_quantization_90"),
        modules=_FP4_MODULES,
    ),
    *_forms(
        "fp4_batched_quantize",
        "fp4_quantization_100",
        f"{_THOP}/fp4Quantize.cpp",
        "Quantise several matrices to NVFP4, as `fp4_quantize` does with one. The scale for every "
        "16 elements of a row is `globalScale * largest / 6` in float8_e4m3fn; each matrix has "
        "its own tiles.",
        Tensor("input", "b n 2*half", "T", "matrices to quantise", contiguous=True, alignment=32,
               as_object=True),
        Tensor("globalScale", "scales", "float32", "one for all matrices, or one for each row",
               contiguous=True, as_object=True),
        Tensor("valueE2M1", "b n half", "uint8",
               "two elements in a byte, the first in the low half", alignment=8, as_object=True,
               **_OUT),
        Tensor("scaleFP8SF", "b num_scales", "uint8",
               "bytes of the scales, in tiles of 128 x 4; 0 in padding", as_object=True, **_OUT),
        Absent("sfVecSize", "int", 16),
        Absent("sfUseUE8M0", "bool"),
        _NO_RECIPE,
        dtypes={"T": ("float16", "bfloat16")},
        releases=">=0.6.3",
        offset_limit=2**63,
        requires=(
            "half >= 1",
            "half % 8 == 0",
            f"b * (n + 128) <= {2**31}",
            f"half <= {2**30 - 128}",
            Rule("globalScale", "scales == 1 or scales == n", "one scale, or n", since="0.6.11"),
            Rule("globalScale", "scales == 1", "one scale", until="0.6.11"),
            Rule("scaleFP8SF", f"num_scales == scales_of(n, 4 * half, {TILES_OF_128})",
                 "a scale for every 16 elements of a matrix, in whole tiles", _COUNT),
        ),
        capabilities=(10, 11, 12),
        elsewhere=_EMPTY.format("fp4_quantization_90"),
        modules=_FP4_MODULES,
    ),
)  # fmt: skip
