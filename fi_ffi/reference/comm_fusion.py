"""All-reduce fused with the next op, as in FlashInfer's `trtllm_comm`, in host memory.

As in `include/flashinfer/comm/trtllm_allreduce_fusion.cuh`, every rank knows every rank's three
buffers, and has five numbers of its own (`_Workspace`). In one shot, a rank writes its addends to
all others and reads theirs once none of them is -0, with which buffers are filled before. In two
shots, each rank adds up some tokens between two barriers. Stored results have the tensors' dtype,
and later steps start from the stored value. Everything else is float32, or float64 rounded to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from fi_ffi.reference.arrays import Array, bits, store_saturated
from fi_ffi.reference.block_scaled import fp4_quantize, scales_in_layout
from fi_ffi.reference.peers import at, fence, wait

_SLOTS = 256  # flags of barriers, one for each possible thread block
_COUNTER, _FLAG, _TURN, _STRIDE, _TO_CLEAR = range(5)
_E4M3_MAX = np.float32(448)
# FlashInfer's `AllReduceFusionPattern`: what follows the sum.
ALL_REDUCE, NORM = 0, 1
FP8, FP4, GROUP_FP8, DYNAMIC_FP8 = (2, 4), (3, 5), (8, 9), (10, 11)
LINEAR = 2  # the layout code of scales in plain rows


@dataclass
class _Workspace:
    """A rank's view of all ranks' buffers.

    `workspace_ptrs` has their addresses, followed by the address of the rank's own numbers: the
    count of thread blocks that have read them, the barriers' flag, the third of the Lamport buffers
    in use, the bytes of a third, and the elements of the last third to clear.
    """

    table: Array
    rank: int
    size: int
    call: str

    def __post_init__(self) -> None:
        if self.table.size != 3 * self.size + 1:
            raise ValueError(f"{self.table.size} pointers, of {self.size} ranks")
        pointers = self.table.tolist()
        self.buffers, self.flags, self.lamport = (
            pointers[i * self.size : (i + 1) * self.size] for i in range(3)
        )
        self.numbers = at(pointers[-1], np.int32, 5)

    def one_shot(self, x: Array) -> list[Array]:
        """Exchange addends; return those of every rank."""
        turn, stride = int(self.numbers[_TURN]), int(self.numbers[_STRIDE])
        if self.size * x.nbytes > stride:
            raise ValueError(f"{self.size} times {x.nbytes} bytes, and a buffer of {stride}")
        whole = bits(x.reshape(-1))
        empty = whole.dtype.type(1 << 8 * whole.itemsize - 1)
        sent = np.where(whole == empty, whole.dtype.type(0), whole)
        for address in self.lamport:
            at(address + turn * stride + self.rank * x.nbytes, whole.dtype, x.size)[:] = sent
        mine = self.lamport[self.rank]
        before = at(mine + (turn + 2) % 3 * stride, whole.dtype, int(self.numbers[_TO_CLEAR]))
        before[:] = empty
        received = at(mine + turn * stride, whole.dtype, self.size, x.size)
        missing = [*range(self.size)]

        def still_missing() -> list[int]:
            missing[:] = [rank for rank in missing if (received[rank] == empty).any()]
            return missing

        wait(self.call, self.rank, still_missing)
        addends = [*received.copy().view(x.dtype).reshape(self.size, *x.shape)]
        self.numbers[_TURN], self.numbers[_TO_CLEAR] = (turn + 1) % 3, x.size * self.size
        return addends

    def barrier(self) -> None:
        value = (int(self.numbers[_FLAG]) + 1) % 3
        fence()
        for address in self.flags:
            at(address, np.int32, _SLOTS, self.size)[:, self.rank] = value
        mine = at(self.flags[self.rank], np.int32, _SLOTS, self.size)
        before = (value + 2) % 3
        wait(self.call, self.rank, lambda: np.flatnonzero((mine == before).any(axis=0)).tolist())
        self.numbers[_FLAG] = value

    def two_shots(self, x: Array, in_float32: bool) -> Array:
        """Return the sum. Each rank adds up a part of the tokens; the first ranks have one more."""
        offsets = 0, x.nbytes
        addends, sums = ([at(p + o, x.dtype, *x.shape) for p in self.buffers] for o in offsets)
        addends[self.rank][...] = x
        self.barrier()
        count, more = divmod(len(x), self.size)
        begin, end = (count * rank + min(rank, more) for rank in (self.rank, self.rank + 1))
        part = added([addend[begin:end] for addend in addends], in_float32)
        for total in sums:
            total[begin:end] = part
        self.barrier()
        whole: Array = sums[self.rank].copy()
        return whole


def added(addends: Sequence[Array], in_float32: bool = False) -> Array:
    """Add in this order, rounding once or at each step."""
    dtype = addends[0].dtype
    between = np.dtype(np.float32) if in_float32 else dtype
    total = addends[0].astype(between)
    for addend in addends[1:]:
        total = _rounded_sum(total, addend, between)
    return total.astype(dtype)


def _rounded_sum(a: Array, b: Array, dtype: np.dtype[Any]) -> Array:
    total: Array = (a.astype(np.float32) + b.astype(np.float32)).astype(dtype)
    return total


def _norm(x: Array, gamma: Array, eps: float, bias: float) -> Array:
    wide = x.astype(np.float32)
    mean = np.square(x.astype(np.float64)).mean(axis=-1, keepdims=True)
    root = (1 / np.sqrt(mean + np.float32(eps))).astype(np.float32)
    norm: Array = (wide * root * (np.float32(bias) + gamma.astype(np.float32))).astype(x.dtype)
    return norm


def _quantise_fp4(
    norm: Array, quant_out: Array, scale_out: Array, scale: float, layout: int
) -> None:
    """Quantise as `fp4_quantize`, but leave scales that pad a tile unchanged."""
    inputs = {
        "input": norm.astype(np.float64),
        "valueE2M1": quant_out,
        "sfVecSize": 16,
        "sfUseUE8M0": False,
        "globalScale": np.array([scale]),
        "isSfSwizzledLayout": layout != LINEAR,
        "isSf8x4Layout": False,
    }
    quantised: Any = fp4_quantize(inputs)
    quant_out[...] = quantised["valueE2M1"].value()
    is_scale = scales_in_layout(layout)(np.ones((len(norm), norm.shape[1] // 16), bool))
    flat = scale_out.reshape(-1)
    flat[: is_scale.size][is_scale] = quantised["scaleFP8SF"].value()[is_scale]


def _quantise_groups(norm: Array, quant_out: Array, scale_out: Array, group: int) -> None:
    """Quantise with scales that are powers of 2, stored as exponents.

    Four groups of a token are adjacent; the tokens follow each other in columns, padded to a
    multiple of four tokens.
    """
    tokens, hidden = norm.shape
    wide = norm.astype(np.float32).reshape(tokens, hidden // group, group)
    least = np.maximum(np.abs(wide).max(axis=-1) / _E4M3_MAX, np.float32(1e-10))
    mantissa, exponent = np.frexp(least)
    exponent = np.where(mantissa == 0.5, exponent - 1, exponent)
    scale = np.ldexp(np.float32(1), exponent)
    _store_fp8(quant_out, (wide / scale[..., None]).reshape(norm.shape))
    column, columns = -(-tokens // 4) * 4, -(-scale.shape[1] // 4)
    packed = np.zeros((columns, column, 4), np.uint8)
    codes = np.zeros((tokens, columns * 4), np.uint8)
    codes[:, : scale.shape[1]] = exponent + 127
    packed[:, :tokens] = codes.reshape(tokens, columns, 4).transpose(1, 0, 2)
    # The last column is not padded.
    flat = scale_out.reshape(-1).view(np.uint8)
    count = 4 * (tokens + (columns - 1) * column)
    flat[:count] = packed.reshape(-1)[:count]


def _store_fp8(out: Array, value: Array) -> None:
    store_saturated(out.view(ml_dtypes.float8_e4m3fn), value)


@dataclass(frozen=True)
class _Norm:
    """What follows the sum: the residual, its norm, and the quantised norm."""

    residual_in: Array
    gamma: Array
    eps: float | None
    bias: float | None
    # Of the quantised norm: its scale, the layout of block scales, and the size of groups.
    scale: Array | float | None = None
    layout: int | None = None
    group: int | None = None

    def store(
        self,
        total: Array,
        pattern: int,
        residual_out: Array | None,
        norm_out: Array | None,
        quant_out: Array | None = None,
        scale_out: Array | None = None,
    ) -> None:
        """Write the results of a pattern that are asked for."""
        residual = _rounded_sum(total, self.residual_in, total.dtype)
        norm = _norm(residual, self.gamma, self.eps or 0.0, self.bias or 0.0)
        for out, value in ((residual_out, residual), (norm_out, norm)):
            if out is not None:
                out[...] = value
        if quant_out is not None:
            self._store_quantised(norm, pattern, quant_out, scale_out)

    def _store_quantised(
        self, norm: Array, pattern: int, quant_out: Array, scale_out: Array | None
    ) -> None:
        wide, scale = norm.astype(np.float32), np.asarray(self.scale, np.float32).reshape(-1)[0]
        if pattern in FP8:
            _store_fp8(quant_out, wide * (np.float32(1) / scale))
        elif pattern in DYNAMIC_FP8 and scale_out is not None:
            least = np.float32(2.0**-9) / _E4M3_MAX
            scales = np.maximum(np.abs(wide).max(axis=-1) / _E4M3_MAX, least)
            _store_fp8(quant_out, wide / scales[:, None])
            scale_out.reshape(-1)[: len(scales)] = scales
        elif pattern in GROUP_FP8 and scale_out is not None:
            _quantise_groups(norm, quant_out, scale_out, self.group or 0)
        elif pattern in FP4 and scale_out is not None:
            _quantise_fp4(norm, quant_out, scale_out, float(scale), self.layout or 0)


def trtllm_allreduce_fusion(
    allreduce_in: Array,
    world_size: int,
    world_rank: int,
    token_num: int,
    hidden_size: int,
    workspace_ptrs: Array,
    launch_with_pdl: bool,
    use_oneshot: bool,
    trigger_completion_at_end: bool,
    fp32_acc: bool,
    pattern_code: int,
    allreduce_out: Array | None,
    residual_in: Array | None,
    residual_out: Array | None,
    norm_out: Array | None,
    quant_out: Array | None,
    scale_out: Array | None,
    rms_gamma: Array | None,
    rms_eps: float | None,
    scale_factor: Array | None,
    layout_code: int | None,
    block_quant_group_size: int | None = None,
    weight_bias: float | None = None,
) -> None:
    x = allreduce_in.reshape(token_num, hidden_size)
    ranks = _Workspace(workspace_ptrs, world_rank, world_size, "trtllm_allreduce_fusion")
    in_float32 = fp32_acc or x.dtype == np.float32
    one_shot = added(ranks.one_shot(x), in_float32) if use_oneshot else None
    total = ranks.two_shots(x, in_float32) if one_shot is None else one_shot
    if pattern_code == ALL_REDUCE:
        if allreduce_out is not None:
            allreduce_out[...] = total
        return
    if residual_in is None or rms_gamma is None:
        raise ValueError(f"pattern {pattern_code} without residual_in or rms_gamma")
    settings = scale_factor, layout_code, block_quant_group_size
    norm = _Norm(residual_in, rms_gamma, rms_eps, weight_bias, *settings)
    norm.store(total, pattern_code, residual_out, norm_out, quant_out, scale_out)


def trtllm_moe_allreduce_fusion(
    world_size: int,
    world_rank: int,
    token_num: int,
    hidden_size: int,
    workspace_ptrs: Array,
    launch_with_pdl: bool,
    residual_in: Array,
    rms_gamma: Array,
    rms_eps: float,
    scale_factor: float,
    moe_reduction_device_num_experts: int,
    moe_reduction_scale_input: Array,
    moe_reduction_active_experts_token_input: Array,
    moe_reduction_token_input: Array,
    layout_code: int | None,
    moe_allreduce_out: Array | None,
    residual_out: Array | None,
    norm_out: Array | None,
    quant_out: Array | None,
    scale_out: Array | None,
    weight_bias: float | None = None,
) -> None:
    """All-reduce of each rank's scaled experts' results plus the token's other input, and what
    follows."""
    dtype = moe_reduction_token_input.dtype
    total = np.zeros((token_num, hidden_size), dtype)
    scales = moe_reduction_scale_input.reshape(-1, token_num, 1)
    experts = moe_reduction_active_experts_token_input.reshape(-1, token_num, hidden_size)
    for expert in range(moe_reduction_device_num_experts):
        scaled = (experts[expert].astype(np.float32) * scales[expert]).astype(dtype)
        total = _rounded_sum(total, scaled, dtype)
    total = _rounded_sum(total, moe_reduction_token_input, dtype)
    ranks = _Workspace(workspace_ptrs, world_rank, world_size, "trtllm_moe_allreduce_fusion")
    total = added(ranks.one_shot(total))
    if moe_allreduce_out is not None:
        moe_allreduce_out[...] = total
    norm = _Norm(residual_in, rms_gamma, rms_eps, weight_bias, scale_factor, layout_code)
    norm.store(total, FP4[1], residual_out, norm_out, quant_out, scale_out)


def trtllm_moe_finalize_allreduce_fusion(
    allreduce_in: Array,
    residual_in: Array,
    norm_weight: Array,
    expanded_idx_to_permuted_idx: Array,
    norm_out: Array | None,
    residual_out: Array | None,
    quant_out: Array | None,
    scale_out: Array | None,
    launch_with_pdl: bool,
    workspace: Array,
    world_rank: int,
    world_size: int,
    eps: float,
    shared_expert_output: Array | None,
    expert_scale_factor: Array | None,
    routed_scaling_factor: float | None = None,
    weight_bias: float | None = None,
) -> None:
    """All-reduce of the weighted rows that each rank's experts computed, and what follows."""
    dtype = residual_in.dtype
    total = np.zeros(residual_in.shape, dtype)
    for k in range(expanded_idx_to_permuted_idx.shape[-1]):
        rows = expanded_idx_to_permuted_idx.reshape(len(total), -1)[:, k]
        results = allreduce_in[np.maximum(rows, 0)]
        if expert_scale_factor is not None:
            weights = expert_scale_factor.reshape(len(total), -1)[:, k, None]
            results = (results.astype(np.float32) * weights.astype(np.float32)).astype(dtype)
        total = np.where(rows[:, None] == -1, total, _rounded_sum(total, results, dtype))
    if routed_scaling_factor not in (None, 1.0):
        factor = np.float32(routed_scaling_factor)
        total = (total.astype(np.float32) * factor).astype(dtype)
    if shared_expert_output is not None:
        total = _rounded_sum(total, shared_expert_output, dtype)
    ranks = _Workspace(workspace, world_rank, world_size, "trtllm_moe_finalize_allreduce_fusion")
    if quant_out is not None or scale_out is not None:
        raise ValueError("the kernel quantises by a scale that nobody sets")
    norm = _Norm(residual_in, norm_weight, eps, weight_bias)
    norm.store(added(ranks.one_shot(total)), NORM, residual_out, norm_out)


def _finalize_without_quantisation(*args: Any) -> None:
    """The entry up to 0.6.8, without tensors for quantised results."""
    trtllm_moe_finalize_allreduce_fusion(*(*args[:6], None, None, *args[6:]))


def trtllm_lamport_initialize(buffer_ptr: int, size: int, dtype: Any) -> None:
    """Fill a buffer with -0; `size` counts elements."""
    kind = np.dtype(f"u{dtype.itemsize}")
    at(buffer_ptr, kind, size)[:] = 1 << 8 * kind.itemsize - 1


def trtllm_lamport_initialize_all(
    buffer_0_ptr: int, buffer_1_ptr: int, buffer_2_ptr: int, size: int, dtype: Any
) -> None:
    """Fill three buffers with -0; `size` counts bytes."""
    for pointer in (buffer_0_ptr, buffer_1_ptr, buffer_2_ptr):
        trtllm_lamport_initialize(pointer, size // dtype.itemsize, dtype)


KERNELS: dict[str, dict[str, Any]] = {
    "trtllm_comm": {
        function.__name__: function
        for function in (
            trtllm_allreduce_fusion,
            trtllm_moe_allreduce_fusion,
            trtllm_moe_finalize_allreduce_fusion,
            trtllm_lamport_initialize,
            trtllm_lamport_initialize_all,
        )
    }
    | {"trtllm_moe_finalize_allreduce_fusion_plain": _finalize_without_quantisation},
}
