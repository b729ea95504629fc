"""`single_prefill` and `single_decode`: attention of one request, without a plan."""

from __future__ import annotations

from collections.abc import Mapping

from fi_ffi.abi.interop import TensorLike
from fi_ffi.abi.tensor import TensorDesc
from fi_ffi.loader import machine
from fi_ffi.ops.attention.backends import (
    POS_ENCODING_MODES,
    Kernel,
    Target,
    check_encoding,
    check_soft_cap,
    choose_backend,
    decode_groups,
    multiprocessors,
    output_type,
    release_for,
)
from fi_ffi.ops.attention.rows import F16, FORMS, FP4, FP8
from fi_ffi.ops.attention.values import Values, block_scales, compiled_row
from fi_ffi.ops.call.arguments import Refusal, check_choice, check_flag, check_int
from fi_ffi.ops.call.forms import in_force
from fi_ffi.ops.call.row import KV_LAYOUTS
from fi_ffi.ops.plans.arguments import check_causal, check_heads, described, packed_mask
from fi_ffi.ops.plans.rows import SINGLE_DECODE, SINGLE_PREFILL
from fi_ffi.ops.steps.keyword_call import KeywordCall

# By rows of a tile: an upper bound of the blocks of 128 threads on a multiprocessor, from the
# registers that outputs and logits need.
_PREFILL_BLOCKS = {128: 4, 64: 8, 16: 16}
_DECODE_BLOCKS = 16
_MIN_CHUNK = 256  # keys in the smallest piece of a split request


def _on_one_device(op: str, **tensors: TensorLike) -> list[TensorDesc]:
    """Describe the call's tensors and check that they are on one device, before the row is chosen
    by it."""
    descs = described(op, **tensors)
    device = descs["q"].device
    for name, desc in descs.items():
        if desc.device is not device:
            raise Refusal(op)(name, desc.device, f"{device}, the device of `q`")
    return [*descs.values()]


def _sizes(
    op: str, q: TensorDesc, k: TensorDesc, v: TensorDesc, kv_layout: str, rank: int
) -> tuple[int, int]:
    """Return the number of keys and of their heads; the row checks the rest."""
    check_choice(op, "kv_layout", kv_layout, tuple(KV_LAYOUTS))
    for name, desc, wanted in (("q", q, rank), ("k", k, 3), ("v", v, 3)):
        if len(desc.shape) != wanted or not desc.shape[-1]:
            raise Refusal(op)(name, desc.layout, f"rank {wanted}, and heads of at least 1 element")
    tokens, heads = (0, 1) if kv_layout == "NHD" else (1, 0)
    return k.shape[tokens], k.shape[heads]


def _partial_bytes(blocks: int, tiles: int, kv_len: int, rows: int, head_dim: int) -> int:
    """Return the bytes of partial results: an output and a log-sum-exp for each piece of the
    request."""
    chunks = min(blocks // max(tiles, 1), -(-kv_len // _MIN_CHUNK))
    return 0 if chunks <= 1 else chunks * rows * (2 * head_dim + 4)


def check_tmp(op: str, argument: str, tmp: TensorDesc, need: int, call: str) -> None:
    """Raise if `tmp` is too small for the partial results of a call."""
    if tmp.span_bytes < need:
        expected = f"{need} bytes or more, as {call}_workspace_size tells"
        raise Refusal(op)(argument, f"{tmp.span_bytes} bytes", expected)


def single_decode_workspace_size(
    kv_len: int, num_qo_heads: int, num_kv_heads: int, head_dim: int, device: int = 0
) -> int:
    """Return the most bytes that `tmp` of `single_decode` needs on `cuda:device`."""
    op, heads = "single_decode_workspace_size", (num_qo_heads, num_kv_heads)
    _check_sizes(op, *heads, kv_len=kv_len, head_dim=head_dim, device=device)
    return _decode_bytes(kv_len, *heads, head_dim, machine.multiprocessors(device))


def _decode_bytes(kv_len: int, qo_heads: int, kv_heads: int, head_dim: int, sms: int) -> int:
    return _partial_bytes(_DECODE_BLOCKS * sms, kv_heads, kv_len, qo_heads, head_dim)


def single_prefill_workspace_size(
    qo_len: int,
    kv_len: int,
    num_qo_heads: int,
    num_kv_heads: int,
    head_dim_vo: int,
    device: int = 0,
) -> int:
    """Return the most bytes that `tmp` of `single_prefill` needs on `cuda:device`."""
    op, heads = "single_prefill_workspace_size", (num_qo_heads, num_kv_heads)
    sizes = {"qo_len": qo_len, "kv_len": kv_len, "head_dim_vo": head_dim_vo}
    _check_sizes(op, *heads, **sizes, device=device)
    sms = machine.multiprocessors(device)
    return prefill_bytes(qo_len, kv_len, *heads, head_dim_vo, sms)


def _check_sizes(op: str, num_qo_heads: int, num_kv_heads: int, **others: int) -> None:
    for name, value in others.items():
        check_int(op, name, value, 0)
    check_heads(op, num_qo_heads, num_kv_heads)


def prefill_bytes(
    qo_len: int, kv_len: int, qo_heads: int, kv_heads: int, head_dim: int, sms: int
) -> int:
    """Return the most bytes that the pieces of a prefill need."""
    packed = qo_len * (qo_heads // kv_heads)
    tile = 128 if packed > 64 and head_dim < 256 else 64 if packed > 16 else 16
    blocks = _PREFILL_BLOCKS[tile] * sms
    return _partial_bytes(
        blocks, kv_heads * -(-packed // tile), kv_len, qo_len * qo_heads, head_dim
    )


@KeywordCall
def single_decode(
    q: TensorLike,
    k: TensorLike,
    v: TensorLike,
    tmp: TensorLike,
    o: TensorLike,
    lse: TensorLike | None = None,
    *,
    kv_layout: str = "NHD",
    pos_encoding_mode: str = "NONE",
    window_left: int = -1,
    logits_soft_cap: float = 0.0,
    sm_scale: float | None = None,
    rope_scale: float | None = None,
    rope_theta: float | None = None,
    alibi_slopes: TensorLike | None = None,
    q_scale: float | None = None,
    k_scale: float | None = None,
    stream: object = None,
) -> Values:
    """Compute the attention of one query over the keys of one request into `o`, on `stream`.

    Args:
        q: [num_qo_heads, head_dim] float16 or bfloat16. All tensors are contiguous.
        k, v: [kv_len, num_kv_heads, head_dim], or with "HND" [num_kv_heads, kv_len, head_dim]; of
            q's dtype or fp8. num_qo_heads is 1, 2, 3, 4 or 8 times num_kv_heads, from FlashInfer
            0.6.18 on also 6 and from 0.7.1 on 16 times.
        tmp: uint8 scratch of `single_decode_workspace_size` bytes.
        o: as q, of q's dtype or fp8, written.
        lse: [num_qo_heads] float32, written: log2 of the sum of exponentials.
        others: as in `BatchDecodePlan` and its `run`.

    Raises `ArgumentError` and `ArgumentTypeError` before anything is launched.
    Upstream: flashinfer/decode.py, csrc/single_decode.cu.
    """
    op = "single_decode"
    q, k, v, tmp, out = _on_one_device(op, q=q, k=k, v=v, tmp=tmp, o=o)
    kv_len, kv_heads = _sizes(op, q, k, v, kv_layout, 2)
    group, rest = divmod(q.shape[0], max(kv_heads, 1))
    groups = decode_groups(release_for(q.device))
    if rest or group not in groups:
        known = ", ".join(map(str, groups))
        expected = f"{known} heads for each of k's {kv_heads}; single_prefill has any multiple"
        raise Refusal(op)("q", q.layout, expected)
    qo_heads, head_dim = q.shape
    options = pos_encoding_mode, window_left, logits_soft_cap
    kernel = kernel_of(op, _dtypes(q=q, k=k, o=out), (head_dim, head_dim), *options)
    need = _decode_bytes(kv_len, qo_heads, kv_heads, head_dim, multiprocessors(q.device))
    check_tmp(op, "tmp", tmp, need, op)
    row = in_force(FORMS[SINGLE_DECODE], q.device)
    compiled = compiled_row(row, kernel.module(""), kernel.dtypes, op, q.device)
    values = Values(op, compiled, "these kernels", {})
    values.scales(head_dim, sm_scale, q_scale, k_scale)
    values.positions(pos_encoding_mode, rope_scale, rope_theta, alibi_slopes)
    values.put(q=q, k=k, v=v, tmp=tmp, o=out, maybe_lse=lse, kv_layout=kv_layout)
    values.put(window_left=window_left, logits_soft_cap=logits_soft_cap)
    return values


@KeywordCall
def single_prefill(
    q: TensorLike,
    k: TensorLike,
    v: TensorLike,
    tmp: TensorLike,
    o: TensorLike,
    lse: TensorLike | None = None,
    *,
    kv_layout: str = "NHD",
    causal: bool = False,
    custom_mask: TensorLike | None = None,
    pos_encoding_mode: str = "NONE",
    window_left: int = -1,
    logits_soft_cap: float = 0.0,
    use_fp16_qk_reduction: bool = False,
    backend: str = "auto",
    sm_scale: float | None = None,
    rope_scale: float | None = None,
    rope_theta: float | None = None,
    alibi_slopes: TensorLike | None = None,
    q_scale: TensorLike | float | None = None,
    k_scale: TensorLike | float | None = None,
    v_scale: TensorLike | float | None = None,
    k_cache_sf: TensorLike | None = None,
    v_cache_sf: TensorLike | None = None,
    stream: object = None,
) -> Values:
    """Compute the attention of one request's queries over its keys into `o`, on `stream`.

    Args:
        q: [qo_len, num_qo_heads, head_dim_qk].
        k: [kv_len, num_kv_heads, head_dim_qk], or with "HND" [num_kv_heads, kv_len, head_dim_qk].
            uint8 is NVFP4, two values a byte.
        v: as k, with head_dim_vo.
        tmp: uint8 scratch of `single_prefill_workspace_size` bytes.
        o: [qo_len, num_qo_heads, head_dim_vo], written.
        lse: [qo_len, num_qo_heads] float32, written: log2 of the sum of exponentials.
        causal: query i sees keys up to `kv_len - qo_len + i`; kv_len is at least qo_len.
        custom_mask: [(qo_len * kv_len + 7) // 8] uint8: bit `i * kv_len + j` (the lowest bit of a
            byte first) for query i and key j, as `pack_custom_mask` packs it; fa2.
        backend: "auto" (as FlashInfer chooses), "fa2" or "fa3".
        others: as in `BatchPrefillPlan` and its `ragged_run`.

    Raises `ArgumentError` and `ArgumentTypeError` before anything is launched.
    Upstream: flashinfer/prefill.py, csrc/single_prefill.cu, csrc/single_prefill_sm90.cu.
    """
    op = "single_prefill"
    q, k, v, tmp, out = _on_one_device(op, q=q, k=k, v=v, tmp=tmp, o=o)
    kv_len, kv_heads = _sizes(op, q, k, v, kv_layout, 3)
    qo_len, qo_heads, head_dim = q.shape
    head_dim_vo = v.shape[-1] * (2 if v.dtype.name in FP4 else 1)
    options = pos_encoding_mode, window_left, logits_soft_cap, use_fp16_qk_reduction
    kernel = kernel_of(op, _dtypes(q=q, k=k, o=out), (head_dim, head_dim_vo), *options)
    target = Target.of(op, q.device)
    chosen, _ = choose_backend(target, backend, kernel, custom_mask is not None)
    causal = check_causal(op, causal, k, (qo_len, kv_len))
    if pos_encoding_mode == "ROPE_LLAMA" and 0 < kv_len < qo_len:
        expected = f"{qo_len} keys or more (or none) with pos_encoding_mode='ROPE_LLAMA'"
        expected += " (docs/attention.md)"
        raise Refusal(op)("k", k.layout, expected)
    rows, kind = SINGLE_PREFILL, kernel.kind(chosen)
    row = in_force(FORMS[rows[kind]], q.device)
    if chosen == "fa2" and kv_heads and not qo_heads % kv_heads:
        sms = multiprocessors(q.device)
        need = prefill_bytes(qo_len, kv_len, qo_heads, kv_heads, head_dim_vo, sms)
        check_tmp(op, "tmp", tmp, need, op)
    compiled = compiled_row(row, kernel.module(chosen), kernel.dtypes, op, q.device)
    values = Values(op, compiled, chosen, rows)
    values.scales(head_dim, sm_scale, q_scale, k_scale, v_scale)
    values.positions(pos_encoding_mode, rope_scale, rope_theta, alibi_slopes)
    block_scales(values, kernel.kv_data_type, {"k": k, "v": v}, k_cache_sf, v_cache_sf)
    mask, mode = packed_mask(op, custom_mask, causal, (qo_len, kv_len))
    values.put(q=q, k=k, v=v, tmp=tmp, o=out, maybe_lse=lse, kv_layout=kv_layout)
    values.put(window_left=window_left, logits_soft_cap=float(logits_soft_cap))
    values.put(maybe_custom_mask=mask, mask_mode_code=mode)
    return values


def _dtypes(**tensors: TensorDesc) -> dict[str, str]:
    return {name: desc.dtype.name for name, desc in tensors.items()}


def kernel_of(
    op: str,
    dtypes: Mapping[str, str],
    dims: tuple[int, int],
    mode: str,
    window_left: int,
    logits_soft_cap: float,
    use_fp16_qk_reduction: bool = False,
) -> Kernel:
    """Return what the dtypes of q, k and o, by the caller's names, and the options ask of a module;
    refuse what no module has."""
    check_choice(op, "pos_encoding_mode", mode, tuple(POS_ENCODING_MODES))
    window = check_int(op, "window_left", window_left, -1)
    check_flag(op, "use_fp16_qk_reduction", use_fp16_qk_reduction)
    cap = check_soft_cap(op, "logits_soft_cap", logits_soft_cap)
    check_encoding(op, mode, cap)
    is_decode = op == "single_decode"
    of_q, of_kv = (F16, F16 + FP8) if is_decode else (F16 + FP8, F16 + FP8 + FP4)
    for (name, dtype), allowed in zip(dtypes.items(), (of_q, of_kv), strict=False):
        if dtype not in allowed:
            raise Refusal(op)(name, dtype, " or ".join(allowed))
    q, kv, o = dtypes.values()
    output_type(op, [*dtypes][-1], o, q, is_decode)
    if max(dims) >= 2**29:  # more digits than a module's name has
        argument, size = ("q", dims[0]) if dims[0] > dims[1] else ("v", dims[1])
        raise Refusal(op)(argument, f"head_dim = {size}", "64, 128, 256 or such")
    kv = FP4[0] if kv in FP4 else kv
    return Kernel(op, q, kv, o, *dims, mode, window >= 0, cap > 0, use_fp16_qk_reduction)
