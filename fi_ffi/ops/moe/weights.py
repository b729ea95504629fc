"""Puts 4-bit weights and their scales in the order in which Hopper's kernels load them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fi_ffi.abi.interop import TensorLike, as_desc
from fi_ffi.ops.call.arguments import INT32_MAX, Refusal, check_choice, check_int
from fi_ffi.ops.call.compiled import CompiledRow
from fi_ffi.ops.call.op import Op
from fi_ffi.ops.call.prepared import Prepared
from fi_ffi.ops.call.row import Row, Rule, Scalar, Tensor, Vector
from fi_ffi.ops.moe.interface import (
    FOLDED_RELEASES,
    INTERLEAVE,
    MODULE,
    SOURCE,
    W4_RELEASES,
)
from fi_ffi.ops.steps.keyword_call import keyword_function

_QUANT_TYPES = {"int4": 0, "fp4": 1}
_ANY: dict[str, Any] = {"offset_limit": 2**63, "vector": Vector(())}
_TARGET = "scales_interleaved"
_READ: dict[str, Any] = {"doc": "", "contiguous": True}
_WRITTEN: dict[str, Any] = {**_READ, "writes": True, "reads": False}

# The kernel permutes tiles of 16 rows and 32 bytes, and counts values in 32 bits.
_ROW = Row(
    INTERLEAVE.signature.name,
    MODULE,
    INTERLEAVE.signature.name,
    SOURCE,
    "",
    (
        Tensor("weight", "experts rows packed", "uint8", alignment=2, **_READ),
        Tensor("weight_interleaved", "experts rows packed", "uint8", alignment=2, **_WRITTEN),
        Scalar("quant_type", int, None, ""),
    ),
    {},
    W4_RELEASES,
    capabilities=(9,),
    requires=("rows % 16 == 0", "packed % 32 == 0", f"rows * packed <= {INT32_MAX // 2}"),
    **_ANY,
)
# The default release's first.
WEIGHTS = Op(_ROW, replace(_ROW, releases=FOLDED_RELEASES, variant=".folded"))


def _interleaved(dtype: str, most: int, least: int) -> CompiledRow:
    """Return the checks of scales with n adjacent groups: n = `most`, or, if `least` is smaller,
    the first of 4, 2 and 1 that divides the groups."""

    def are_interleaved(rows: int, groups: int, steps: int, wide: int) -> bool:
        count = most if least == most else next((n for n in (4, 2) if groups % n == 0), 1)
        return groups == steps * count and wide == rows * count

    expected = f"the shape [experts, groups / n, rows * n] with n of {most}"
    expected += "" if least == most else ", or of 2 or 1 where groups are no multiple"
    holding = "are_interleaved(rows, groups, steps, wide)"
    rule = Rule(_TARGET, holding, expected, {"are_interleaved": are_interleaved})
    return _scales(dtype, "experts steps wide", f"groups % {least} == 0", rule)


def _folded(dtype: str, together: int) -> CompiledRow:
    """Return the checks of scales in blocks of 64 rows and `together` groups, in lines of 16
    bytes."""
    side = 16 if dtype == "uint8" else 8
    axes = f"experts rows/64 groups/{together} {side} {side}"
    return _scales(dtype, axes, "rows % 64 == 0", f"groups % {together} == 0")


def _scales(dtype: str, axes: str, *requires: str | Rule) -> CompiledRow:
    """Return the checks of scales on the host that are written to a tensor of these axes."""
    args = (
        Tensor("scales", "experts rows groups", dtype, host=True, **_READ),
        Tensor(_TARGET, axes, dtype, host=True, **_WRITTEN),
    )
    name = "interleave_moe_scales_for_sm90_mixed_gemm"
    return CompiledRow(Row(name, "", "", "", "", args, {}, "", requires=requires, **_ANY))


# By the size of a group and whether the scales are folded.
_SCALES = {
    (32, False): _interleaved("uint8", 4, 4),
    (128, False): _interleaved("bfloat16", 4, 1),
    (32, True): _folded("uint8", 4),
    (128, True): _folded("bfloat16", 1),
}


def _number(quant_type: object) -> int:
    return _QUANT_TYPES[check_choice(_ROW.name, "quant_type", quant_type, _QUANT_TYPES)]


def _prepare(weight: Any, weight_interleaved: Any, quant_type: Any, stream: object) -> Prepared:
    return WEIGHTS.prepare(weight, weight_interleaved, _number(quant_type), stream=stream)


@keyword_function(_prepare)
def interleave_moe_weights_for_sm90_mixed_gemm(
    weight: TensorLike,
    weight_interleaved: TensorLike,
    quant_type: str = "fp4",
    *,
    stream: object = None,
) -> None:
    """Put 4-bit weights in the order in which the kernels in use load them.

    Without this step the kernels compute with permuted weights. The order of MXFP4 differs in
    releases that fold scales: 0.6.16 to 0.6.16.post2, and 0.6.18 and later.

    Args:
        weight: [experts, rows, columns / 2] uint8, the even column in the lower 4 bits.
        weight_interleaved: as `weight`, written; must not overlap it.
        quant_type: "fp4" for MXFP4, "int4" for int4.

    Raises `ArgumentError` and `ArgumentTypeError`, and `KernelNotFoundError` for releases with an
    unknown order.
    Upstream: flashinfer/fused_moe/core.py, moe_gemm_mixed_utils.cu.
    """
    WEIGHTS(weight, weight_interleaved, _number(quant_type), stream=stream)


def interleave_moe_scales_for_sm90_mixed_gemm(
    scales: TensorLike, scales_interleaved: TensorLike, group_size: int = 32
) -> None:
    """Put the scales of 4-bit weights in the order in which the kernels load them, on the host.

    Args:
        scales: [experts, rows, groups] on the CPU: uint8 (E8M0) for MXFP4 in groups of 32, or
            bfloat16 for int4 in groups of 128.
        scales_interleaved: written; its rank selects the order. Interleaved (releases until 0.6.15,
            0.6.16.post3, 0.6.16.post4 and 0.6.17): [experts, groups / n, rows * n], where n is 4
            for MXFP4, and for int4 the first of 4, 2 and 1 that divides the groups. Folded (0.6.16
            to 0.6.16.post2, and 0.6.18 and later): [experts, rows / 64, groups / 4, 16, 16] for
            MXFP4, and [experts, rows / 64, groups, 8, 8] for int4.
        group_size: 32 or 128.

    FlashInfer's function of this name handled only MXFP4 before releases with folded scales.

    Raises `ArgumentError` and `ArgumentTypeError`.
    Upstream: flashinfer/fused_moe/prepare.py.
    """
    op, name = "interleave_moe_scales_for_sm90_mixed_gemm", "group_size"
    size, target = check_int(op, name, group_size, 1), as_desc(scales_interleaved, op, _TARGET)
    is_folded = target.kind.rank == 5
    compiled = _SCALES.get((size, is_folded))
    if compiled is None:
        raise Refusal(op)(name, group_size, "32 or 128")
    descs, sizes = compiled.check(scales, target)
    # Imported late: numpy takes long to import.
    from fi_ffi.reference.arrays import as_array
    from fi_ffi.reference.moe_weights import fold_scales, interleave_scales

    source, written = (as_array(desc) for desc in descs.values() if desc is not None)
    if is_folded:
        written[...] = fold_scales(source, 128 // size)
    elif sizes["groups"]:
        written[...] = interleave_scales(source, sizes["groups"] // sizes["steps"])
