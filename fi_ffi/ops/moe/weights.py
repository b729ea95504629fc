"""4-bit weights and their scales, put in the order in which Hopper's kernels load them."""

from __future__ import annotations

from fi_ffi.abi.interop import TensorLike, as_desc
from fi_ffi.abi.streams import launching
from fi_ffi.abi.tensor import TensorDesc
from fi_ffi.errors import ArgumentError, ArgumentTypeError, printed
from fi_ffi.ops import cuda, watching
from fi_ffi.ops.moe.check import Want, check_apart
from fi_ffi.ops.moe.interface import INTERLEAVE, MODULE, W4_RELEASES
from fi_ffi.ops.moe.options import integer
from fi_ffi.ops.moe.runner import check_w4_release

_QUANT_TYPES = {"int4": 0, "fp4": 1}
_ROWS, _BYTES = 16, 32  # that change places among one another
_INT32 = 2**31


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
    op = INTERLEAVE.signature.name
    if not isinstance(quant_type, str) or quant_type not in _QUANT_TYPES:
        kind = ArgumentError if isinstance(quant_type, str) else ArgumentTypeError
        raise kind(op, "quant_type", got=printed(quant_type), expected="'fp4' or 'int4'")
    source = as_desc(weight, op, "weight")
    target = as_desc(weight_interleaved, op, "weight_interleaved")
    if len(source.shape) != 3:
        raise ArgumentError(op, "weight", got=source.layout, expected="rank 3")
    _, rows, packed = source.shape
    if rows % _ROWS or packed % _BYTES or 2 * rows * packed >= _INT32:
        expected = f"rows in multiples of {_ROWS}, columns of {2 * _BYTES}, under {_INT32} values"
        raise ArgumentError(op, "weight", got=source.layout, expected=expected)
    wants = [Want(name, ("uint8",), (source.shape,), 2) for name in INTERLEAVE.names[:2]]
    for want, desc in zip(wants, (source, target), strict=True):
        want.check_layout(op, desc.layout)
        want.check_address(op, desc)
    if target.device is not source.device:
        raise ArgumentError(op, wants[1].name, got=target.device, expected=source.device)
    check_apart(op, target, wants, [source, target], wants[1].name)
    if source.layout.numel:
        _interleave(op, source, target, quant_type, stream)


def _interleave(
    op: str, source: TensorDesc, target: TensorDesc, quant_type: str, stream: object
) -> None:
    if not source.device.is_cuda:
        # Not above: numpy takes long to import.
        from fi_ffi.reference.arrays import as_array
        from fi_ffi.reference.moe_weights import interleave

        as_array(target)[...] = interleave(as_array(source), quant_type)
        return
    from fi_ffi.loader import runtime, search

    check_w4_release(op, search.release())
    on_stream = launching(stream, source.device, op)
    entry = runtime.kernel_entry(MODULE, INTERLEAVE.signature, W4_RELEASES, source.device.index)
    with cuda.current(source.device), on_stream:
        values = source, target, _QUANT_TYPES[quant_type]
        if watching.inboxes:
            tensors = [("0", source), ("1", target)]
            watching.called(entry.name, lambda: entry(*values), values, tensors, source.device)
        else:
            entry(*values)


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
    op = "interleave_moe_scales_for_sm90_mixed_gemm"
    dtypes = {32: "uint8", 128: "bfloat16"}
    if integer(op, "group_size", group_size, 1) not in dtypes:
        raise ArgumentError(op, "group_size", got=group_size, expected="32 or 128")
    source = as_desc(scales, op, "scales")
    target = as_desc(scales_interleaved, op, "scales_interleaved")
    for name, desc in (("scales", source), ("scales_interleaved", target)):
        if desc.device.type != "cpu":
            expected = "host memory: it is done once, where weights are loaded"
            raise ArgumentError(op, name, got=desc.device, expected=expected)
        if len(desc.shape) != 3:
            raise ArgumentError(op, name, got=desc.layout, expected="rank 3")
    experts, rows, groups = source.shape
    factor = 4 if group_size == 32 else 4 if groups % 4 == 0 else 2 if groups % 2 == 0 else 1
    if groups % factor:
        raise ArgumentError(op, "scales", got=source.layout, expected="groups in multiples of 4")
    shapes = source.shape, (experts, groups // factor, rows * factor)
    names = ("scales", "scales_interleaved")
    wants = [Want(n, (dtypes[group_size],), (s,), 1) for n, s in zip(names, shapes, strict=True)]
    for want, desc in zip(wants, (source, target), strict=True):
        want.check_layout(op, desc.layout)
        want.check_address(op, desc)
    check_apart(op, target, wants, [source, target], names[1])
    from fi_ffi.reference.arrays import as_array
    from fi_ffi.reference.moe_weights import interleave_scales

    as_array(target)[...] = interleave_scales(as_array(source), factor)
