"""4-bit weights and their scales, put in the order in which Hopper's kernels load them."""

from __future__ import annotations

from typing import Any

from fi_ffi.abi.interop import TensorLike
from fi_ffi.errors import ArgumentError
from fi_ffi.ops.call.arguments import check_choice, check_int
from fi_ffi.ops.call.compiled import CompiledRow
from fi_ffi.ops.call.launching import launching, prepare_row
from fi_ffi.ops.call.prepared import Prepared
from fi_ffi.ops.moe.interface import INTERLEAVE, MODULE, SOURCE, W4_RELEASES
from fi_ffi.ops.row import Row, Rule, Scalar, Tensor, Vector

_QUANT_TYPES = {"int4": 0, "fp4": 1}
_INT32 = 2**31 - 1
_ANY: dict[str, Any] = {"offset_limit": 2**63, "vector": Vector(())}
_WRITTEN: dict[str, Any] = {"doc": "", "contiguous": True, "writes": True, "reads": False}

# 16 rows of 32 bytes change places among one another; values are counted in 32 bits.
WEIGHTS = CompiledRow(
    Row(
        INTERLEAVE.signature.name, MODULE, INTERLEAVE.signature.name, SOURCE, "",
        (
            Tensor("weight", "experts rows packed", "uint8", "", contiguous=True, alignment=2),
            Tensor("weight_interleaved", "experts rows packed", "uint8", alignment=2, **_WRITTEN),
            Scalar("quant_type", int, None, ""),
        ),
        {}, W4_RELEASES, capabilities=(9,), **_ANY,
        requires=("rows % 16 == 0", "packed % 32 == 0", f"rows * packed <= {_INT32 // 2}"),
    )
)  # fmt: skip


def _scales(dtype: str, most: int, least: int) -> CompiledRow:
    """The checks of scales of which n lie side by side: `most`, or the first of 4, 2 and 1 that
    divides the groups where `least` is less."""

    def holds(rows: int, groups: int, steps: int, wide: int) -> bool:
        count = together(groups)
        return groups == steps * count and wide == rows * count

    def together(groups: int) -> int:
        return next((n for n in (4, 2) if groups % n == 0), 1) if least < most else most

    name = "interleave_moe_scales_for_sm90_mixed_gemm"
    args = (
        Tensor("scales", "experts rows groups", dtype, "", contiguous=True, host=True),
        Tensor("scales_interleaved", "experts steps wide", dtype, host=True, **_WRITTEN),
    )
    expected = f"the shape [experts, groups / n, rows * n] with n of {most}"
    expected += "" if least == most else ", or of 2 or 1 where groups are no multiple"
    holding = "are_interleaved(rows, groups, steps, wide)"
    rule = Rule("scales_interleaved", holding, expected, {"are_interleaved": holds})
    return CompiledRow(
        Row(name, "", "", "", "", args, {}, "", requires=(f"groups % {least} == 0", rule),
            **_ANY)
    )  # fmt: skip


# By the size of a group.
_SCALES = {32: _scales("uint8", 4, 4), 128: _scales("bfloat16", 4, 1)}


def forget() -> None:
    """Drop what was learnt of the kernels, after their source changed."""
    WEIGHTS.forget()


def _number(quant_type: object) -> int:
    return _QUANT_TYPES[check_choice(WEIGHTS.refuse.op, "quant_type", quant_type, _QUANT_TYPES)]


def _prepare(weight: Any, weight_interleaved: Any, quant_type: Any, stream: object) -> Prepared:
    return prepare_row(WEIGHTS, stream, weight, weight_interleaved, _number(quant_type))


@launching(_prepare)
def interleave_moe_weights_for_sm90_mixed_gemm(
    weight: TensorLike,
    weight_interleaved: TensorLike,
    quant_type: str = "fp4",
    *,
    stream: object = None,
) -> None:
    """Put 4-bit weights in the order in which the kernels load them.

    Without it their results are other weights'.

    Args:
        weight: [experts, rows, columns / 2] uint8, the even column in the lower half.
        weight_interleaved: the same, written, and memory apart.
        quant_type: "fp4" for MXFP4, "int4" for int4.

    Raises `ArgumentError` and `ArgumentTypeError`; `KernelNotFoundError` for releases that have
    another order.  Upstream: flashinfer/fused_moe/core.py, moe_gemm_mixed_utils.cu.
    """
    WEIGHTS.call(None, weight, weight_interleaved, _number(quant_type), stream=stream)


def interleave_moe_scales_for_sm90_mixed_gemm(
    scales: TensorLike, scales_interleaved: TensorLike, group_size: int = 32
) -> None:
    """Put the scales of 4-bit weights in the order in which the kernels load them, on the host.

    Args:
        scales: [experts, rows, groups] on the CPU: uint8 (E8M0) of MXFP4, in groups of 32, or
            bfloat16 of int4, in groups of 128.
        scales_interleaved: [experts, groups / n, rows * n], written.  n is 4 for MXFP4; for int4
            4, 2 or 1, whichever first divides the groups.
        group_size: 32 or 128.

    FlashInfer's own function of this name has MXFP4's only.  Raises `ArgumentError` and
    `ArgumentTypeError`.
    """
    op, name = "interleave_moe_scales_for_sm90_mixed_gemm", "group_size"
    compiled = _SCALES.get(check_int(op, name, group_size, 1))
    if compiled is None:
        raise ArgumentError(op, name, got=group_size, expected="32 or 128")
    descs, sizes = compiled.check(scales, scales_interleaved)
    # Here, not above: numpy takes long to import.
    from fi_ffi.reference.arrays import as_array
    from fi_ffi.reference.moe_weights import interleave_scales

    source, target = (as_array(desc) for desc in descs.values() if desc is not None)
    if sizes["groups"]:
        target[...] = interleave_scales(source, sizes["groups"] // sizes["steps"])
