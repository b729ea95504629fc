"""`cutlass_fused_moe`: a call of the `FusedMoe` of its dtypes, flags and device."""

from __future__ import annotations

import threading

from fi_ffi.abi.dtypes import parse_dtype
from fi_ffi.abi.interop import TensorLike, as_desc
from fi_ffi.abi.tensor import TensorDesc
from fi_ffi.errors import ArgumentError
from fi_ffi.ops.moe.fused import FusedMoe
from fi_ffi.ops.moe.modes import FLAGS, mode_of
from fi_ffi.ops.moe.options import flag

_OP = "cutlass_fused_moe"
_NAMES = ("input", "fc1_expert_weights", "output")
_lock = threading.Lock()
_made: dict[tuple[object, ...], FusedMoe] = {}


def forget() -> None:
    """Drop the runners, after the source of kernels changed."""
    with _lock:
        _made.clear()


def cutlass_fused_moe(
    output: TensorLike,
    input: TensorLike,
    token_selected_experts: TensorLike,
    token_final_scales: TensorLike | None,
    fc1_expert_weights: TensorLike,
    fc2_expert_weights: TensorLike,
    output_dtype: object = None,
    quant_scales: object = None,
    fc1_expert_biases: TensorLike | None = None,
    fc2_expert_biases: TensorLike | None = None,
    input_sf: TensorLike | None = None,
    swiglu_alpha: TensorLike | None = None,
    swiglu_beta: TensorLike | None = None,
    swiglu_limit: TensorLike | None = None,
    tp_size: int = 1,
    tp_rank: int = 0,
    ep_size: int = 1,
    ep_rank: int = 0,
    *,
    enable_alltoall: bool = False,
    use_deepseek_fp8_block_scale: bool = False,
    use_w4_group_scaling: bool = False,
    use_mxfp8_act_scaling: bool = False,
    use_packed_weights: bool = False,
    activation_type: object = "Swiglu",
    profile_ids: object = None,
    enable_pdl: bool = False,
    stream: object = None,
) -> None:
    """A layer of experts: route each token to its experts, and sum what they make of it.

    Args:
        output: [tokens, hidden], written.
        input: [tokens, hidden].
        token_selected_experts: [tokens, top_k] int32, distinct for each token.  One that is not
            of this rank adds nothing.
        token_final_scales: [tokens, top_k] float32; None is 1 for each.
        fc1_expert_weights: [experts, rows, hidden]; with a gated activation rows are twice the
            intermediate size: first what is multiplied, then the gate.
        fc2_expert_weights: [experts, hidden, inter].  4-bit weights are two in a byte, and
            interleaved.
        output_dtype: of `output`, which is compared with it; None takes what `output` has.
        quant_scales: a list of tensors, as the mode has it (docs/moe.md).
        fc1_expert_biases, fc2_expert_biases: [experts, rows], [experts, hidden] of the output's
            dtype; both or neither.  The second is added on tp_rank 0 only.
        input_sf: None: no kernel for Hopper takes it.
        swiglu_alpha, swiglu_beta, swiglu_limit: [experts] float32.
        tp_size, tp_rank, ep_size, ep_rank: which part of the whole the weights are.
        enable_alltoall: leave rows of tokens alone that have no expert of this rank.
        activation_type: "Swiglu", "Geglu", "SwigluBias", "SwigluStep", "GegluTanh", "Gelu",
            "Relu", "Silu", "Relu2", "Identity", or FlashInfer's `ActivationType`.
        profile_ids: tactics of both multiplications, from `FusedMoe.profile`; None is the
            kernels' own choice.
        flags: as in `FusedMoe`.

    The workspace comes from the device's pool, in the stream's order, while the call runs.

    Raises `ArgumentError` and `ArgumentTypeError` before anything is launched.
    Upstream: flashinfer/fused_moe/core.py, csrc/fused_moe/cutlass_backend.
    """
    if input_sf is not None:
        raise ArgumentError(_OP, "input_sf", got="a tensor", expected="None on Hopper")
    asked = (
        use_deepseek_fp8_block_scale, use_w4_group_scaling, use_mxfp8_act_scaling,
        use_packed_weights,
    )  # fmt: skip
    for name, value in zip(FLAGS, asked, strict=True):
        flag(_OP, name, value)
    x, out = as_desc(input, _OP, "input"), as_desc(output, _OP, "output")
    weights = as_desc(fc1_expert_weights, _OP, "fc1_expert_weights")
    if output_dtype is not None:
        wanted = parse_dtype(output_dtype, op=_OP, argument="output_dtype")
        if out.dtype is not wanted:
            raise ArgumentError(_OP, "output", got=out.layout, expected=f"output_dtype {wanted}")
    _moe_for(x, weights, out, asked)(
        out, x, token_selected_experts, token_final_scales, weights, fc2_expert_weights,
        quant_scales, fc1_expert_biases=fc1_expert_biases, fc2_expert_biases=fc2_expert_biases,
        swiglu_alpha=swiglu_alpha, swiglu_beta=swiglu_beta, swiglu_limit=swiglu_limit,
        tp_size=tp_size, tp_rank=tp_rank, ep_size=ep_size, ep_rank=ep_rank,
        enable_alltoall=enable_alltoall, activation_type=activation_type,
        profile_ids=profile_ids, enable_pdl=enable_pdl, stream=stream,
    )  # fmt: skip


def _moe_for(
    x: TensorDesc, weights: TensorDesc, out: TensorDesc, asked: tuple[bool, ...]
) -> FusedMoe:
    """The one for these dtypes and flags on this device, made once."""
    key = (x.device, x.dtype, weights.dtype, out.dtype, asked)
    moe = _made.get(key)
    if moe is None:
        given = dict(zip(FLAGS, asked, strict=True))
        flags = frozenset(name for name, value in given.items() if value)
        dtypes = (x.dtype.name, weights.dtype.name, out.dtype.name)
        mode_of(_OP, *dtypes, flags, _NAMES)  # what is wrong is told of the call
        made = FusedMoe(*dtypes, device=x.device, **given)
        with _lock:
            moe = _made.setdefault(key, made)
    return moe
