"""`xqa`, decode attention by TensorRT-LLM's kernels, for one query or several drafted queries per
request, without a plan; and `xqa_mla`, the same over a latent cache."""

from __future__ import annotations

import numbers

from fi_ffi.abi.interop import TensorLike, as_desc
from fi_ffi.abi.tensor import Device, TensorDesc, make_desc
from fi_ffi.loader import machine
from fi_ffi.loader.distributions import is_in
from fi_ffi.ops.attention.backends import module_name, multiprocessors, release_for
from fi_ffi.ops.attention.rows import FORMS
from fi_ffi.ops.attention.values import Values, compiled_row
from fi_ffi.ops.call.arguments import Refusal, check_choice, check_int, check_number, shown
from fi_ffi.ops.call.forms import in_force
from fi_ffi.ops.call.row import KV_LAYOUTS, as_nhd
from fi_ffi.ops.plans.arguments import described
from fi_ffi.ops.plans.rows import XQA, XQA_MLA, XQA_ROWS, XQA_SPEC_DEC, query_blocks
from fi_ffi.ops.steps.keyword_call import KeywordCall

# The binding has camel-case names; callers use those of FlashInfer's Python function.
_NAMES = {
    "qScaleTensor": "q_scale",
    "qScale": "q_scale",
    "kvScaleTensor": "kv_scale",
    "kvCacheScale": "kv_scale",
    "attentionSinks": "sinks",
    "kCacheVLLM": "k_cache",
    "vCacheVLLM": "v_cache",
    "kvCachePageList": "page_table",
    "seqLen": "seq_lens",
    "slidingWinSize": "sliding_win_size",
    "rcpOutScale": "rcp_out_scale",
    "multiProcessorCount": "sm_count",
    "scratch": "workspace_buffer",
}
_OP, _MLA = "xqa", "xqa_mla"
_refuse, _refuse_mla = Refusal(_OP), Refusal(_MLA)
_HOPPER = 9
# Releases in which each of several queries has a window of its own.
WINDOWS_OF_EACH = ">=0.6.16"
# The limit for sizes that go into a module's name or count its heads.
_SIZE_LIMIT = 2**29


@KeywordCall
def xqa(
    q: TensorLike,
    k_cache: TensorLike,
    v_cache: TensorLike,
    page_table: TensorLike,
    seq_lens: TensorLike,
    output: TensorLike,
    workspace_buffer: TensorLike | None = None,
    semaphores: TensorLike | None = None,
    *,
    sinks: TensorLike | None = None,
    q_scale: TensorLike | float = 1.0,
    kv_scale: TensorLike | float = 1.0,
    sliding_win_size: int = 0,
    kv_layout: str = "NHD",
    sm_count: int | None = None,
    enable_pdl: bool = False,
    rcp_out_scale: float = 1.0,
    mask: TensorLike | None = None,
    stream: object = None,
) -> Values:
    """Compute the attention of one query, or several drafted queries, per request over a paged
    cache.

    Args:
        q: [batch_size, 1, num_q_heads, head_dim] float16 or bfloat16, or for several queries
            (speculative decoding) [batch_size, 1, q_seq_len, num_q_heads, head_dim]; contiguous.
        k_cache, v_cache: [num_pages, page_size, num_kv_heads, head_dim], or with "HND" [num_pages,
            num_kv_heads, page_size, head_dim], of q's dtype or float8_e4m3fn; with the same
            strides, which are multiples of head_dim. page_size is 16, 32, 64 or 128.
        page_table: [batch_size, max_pages] int32: each request's pages.
        seq_lens: [batch_size, 1] uint32 or int32: each request's keys, at least 1. They include the
            keys of its queries, so several queries need at least q_seq_len.
        output: as q, written; of q's dtype, or float8_e4m3fn with fp8 keys; contiguous.
        workspace_buffer: uint8 scratch that no other stream uses. By default each stream has
            scratch and semaphores allocated by fi_ffi.
        semaphores: uint32, [batch_size * num_kv_heads] or more, for several queries times
            ceil(q_seq_len * num_q_heads / num_kv_heads / 32). All 0 before the first call, and
            after an aborted one; the kernel resets them.
        sinks: [num_kv_heads, num_q_heads / num_kv_heads] float32: one more logit in each head's
            softmax.
        q_scale: a number, or [1] float32 on the device.
        kv_scale: the same, for fp8 caches.
        sliding_win_size: each query sees this many of the last keys, its own included; 0 for all.
            Query i of a request is at `seq_lens - q_seq_len + i`, in a tree of drafts too. With
            several queries, FlashInfer 0.6.16 and later; before, only 0, or as many as the pages of
            `page_table` hold, which is the same.
        mask: required for several queries: [batch_size, q_seq_len, 2 * ceil(q_seq_len / 32)]
            uint16. Bit j of row i (lowest first, 16 a word) says whether query i sees the key of
            query j. Every query must see its own key, and sees all earlier keys.
        sm_count: multiprocessors to use, at most and by default all of the device's.
        rcp_out_scale: factor of a float8_e4m3fn output.

    The rest of each request's last page must not hold NaN or infinities. The module depends on the
    dtypes, page_size, head_dim, the query heads that share a key, and whether there is a window.
    The wheels have head_dim 64, 128 and 256, and 1, 2, 4 or 8 query heads a key head. On SM90, one
    query with an fp8 cache takes a kernel that multiplies in fp8; that kernel ignores masks, so
    several queries do not take it. NVFP4 caches are not supported here: use `fi_ffi.module`.

    Raises `ArgumentError` and `ArgumentTypeError` before anything is launched, `ArchitectureError`
    on GPUs before SM90, and `KernelNotFoundError` if the kernels in use lack the module.
    Upstream: flashinfer/xqa.py, csrc/xqa/xqa_wrapper.cu.
    """
    check_choice(_OP, "kv_layout", kv_layout, tuple(KV_LAYOUTS))
    q, output = as_desc(q, _OP, "q"), as_desc(output, _OP, "output")
    keys, values_of = (
        _cache(name, desc, kv_layout)
        for name, desc in described(_OP, k_cache=k_cache, v_cache=v_cache).items()
    )
    table = as_desc(page_table, _OP, "page_table")
    if len(table.shape) != 2:
        raise _refuse("page_table", table.layout, "rank 2 (b max_pages)")
    page_size, kv_heads, head_dim = keys.shape[1:]
    batch, queries, heads = _heads(q, kv_heads)
    group, room = heads // kv_heads, table.shape[1] * page_size
    _check_dtypes(q, keys, output)
    bits = _check_several(mask, batch, queries, group, sinks is not None)
    window = _window(sliding_win_size, queries, room, release_for(q.device))
    dtypes = {"Q": q.dtype.name, "KV": keys.dtype.name, "O": output.dtype.name}
    module = module_name(
        "xqa",
        input_dtype=dtypes["Q"],
        output_dtype=dtypes["O"],
        kv_cache_dtype=dtypes["KV"],
        page_size=page_size,
        head_dim=head_dim,
        head_group_ratio=group,
        use_sliding_window=window > 0,
        q_seq_len=queries,
    )
    row = in_force(FORMS[XQA if queries == 1 else XQA_SPEC_DEC], q.device)
    values = Values(_OP, compiled_row(row, module, dtypes, _OP, q.device, names=_NAMES), "xqa", {})
    count = multiprocessors(q.device)
    if sm_count is not None:
        count = min(check_int(_OP, "sm_count", sm_count, 1), count)
    values.put(
        run_sm90_fp8_mha=queries == 1 and _on_hopper(q.device) and keys.dtype.itemsize == 1,
        # Each block of queries makes this many pieces, and the scratch must hold all of them.
        multiProcessorCount=max(count // query_blocks(queries, group), 1),
        rcpOutScale=check_number(_OP, "rcp_out_scale", rcp_out_scale, 0.0),
    )
    values.put(nbKHeads=kv_heads, slidingWinSize=window, qSeqLen=queries)
    values.put(q=q, output=output, attentionSinks=sinks, mask=bits)
    values.put(kCacheVLLM=keys, vCacheVLLM=values_of, kvCachePageList=table)
    values.put(maxSeqLen=room, seqLen=seq_lens, batchSize=batch, enable_pdl=enable_pdl)
    values.put(semaphores=semaphores, scratch=workspace_buffer)
    _put_scales(values, q_scale, kv_scale)
    return values


@KeywordCall
def xqa_mla(
    q: TensorLike,
    k_cache: TensorLike,
    v_cache: TensorLike,
    page_table: TensorLike,
    seq_lens: TensorLike,
    output: TensorLike,
    workspace_buffer: TensorLike | None = None,
    semaphores: TensorLike | None = None,
    *,
    q_scale: TensorLike | float = 1.0,
    kv_scale: TensorLike | float = 1.0,
    sm_count: int | None = None,
    enable_pdl: bool = False,
    stream: object = None,
) -> Values:
    """Compute multi-head latent attention of one query per request over a paged cache, on SM120.

    Args:
        q: [batch_size, 1, 128, 576] float8_e4m3fn or bfloat16: 512 elements of the absorbed query,
            then 64 with the position encoding. Contiguous.
        k_cache, v_cache: [num_pages, page_size, 576] of q's dtype, optionally with an axis of 1
            (the head) before or after `page_size`; usually the same tensor. The values are the
            first 512 elements of `v_cache`. Both have the same strides. page_size is 16, 32, 64 or
            128.
        page_table: [batch_size, max_pages] int32: each request's pages.
        seq_lens: [batch_size, 1] uint32 or int32: each request's keys, at least 1.
        output: [batch_size, 1, 128, 512] bfloat16, written; contiguous.
        workspace_buffer: uint8 scratch that no other stream uses, 18432 bytes per request. By
            default each stream has scratch and semaphores allocated by fi_ffi.
        semaphores: uint32, [batch_size] or more, all 0.
        q_scale, kv_scale: numbers, or [1] float32 on the device. The logits are multiplied by both
            and by nothing else, so `q_scale` includes the softmax scale. The output is multiplied
            by `kv_scale`, for bfloat16 as well.
        sm_count: no effect, as in FlashInfer: requests are not split.

    The kernel reads the rest of each request's last page and multiplies it by 0, so it must not
    hold NaN or infinities. Probabilities are rounded to q's dtype.

    Raises `ArgumentError` and `ArgumentTypeError` before anything is launched, `ArchitectureError`
    on other GPUs, and `KernelNotFoundError` if the kernels in use lack the module.
    Upstream: flashinfer/xqa.py, csrc/xqa/mla_sm120.cu.
    """
    q = as_desc(q, _MLA, "q")
    keys, values_of = (
        _latent(name, desc)
        for name, desc in described(_MLA, k_cache=k_cache, v_cache=v_cache).items()
    )
    table = as_desc(page_table, _MLA, "page_table")
    for name, desc, rank in (("q", q, 4), ("page_table", table, 2)):
        if len(desc.shape) != rank:
            raise _refuse_mla(name, desc.layout, f"rank {rank}")
    if q.dtype.name not in XQA_MLA.dtypes["Q"]:
        raise _refuse_mla("q", q.dtype, " or ".join(XQA_MLA.dtypes["Q"]))
    page_size, own = keys.shape[2], q.dtype.name
    module = module_name(
        "xqa_mla",
        input_dtype=own,
        kv_cache_dtype=own,
        page_size=page_size,
        use_sliding_window=False,
    )
    row = in_force(FORMS[XQA_MLA], q.device)
    compiled = compiled_row(row, module, {"Q": own}, _MLA, q.device, names=_NAMES)
    values = Values(_MLA, compiled, "xqa_mla", {})
    count = multiprocessors(q.device)
    if sm_count is not None:
        count = check_int(_MLA, "sm_count", sm_count, 1)
    values.put(multiProcessorCount=count, q=q, output=output)
    values.put(kCacheVLLM=keys, vCacheVLLM=values_of, kvCachePageList=table)
    values.put(maxSeqLen=table.shape[1] * page_size, seqLen=seq_lens, batchSize=q.shape[0])
    values.put(semaphores=semaphores, scratch=workspace_buffer, enable_pdl=enable_pdl)
    _put_scales(values, q_scale, kv_scale)
    return values


def _latent(name: str, desc: TensorDesc) -> TensorDesc:
    """View a cache of one head with the head before the tokens, as the kernel expects the
    strides."""
    shape, strides = list(desc.shape), list(desc.strides)
    if len(shape) == 4 and 1 in shape[1:3]:
        at = 1 if shape[1] == 1 else 2
        del shape[at], strides[at]
    if len(shape) != 3 or not 0 < min(shape[1:]) <= max(shape[1:]) < _SIZE_LIMIT:
        expected = "(num_pages page_size 576), with an axis of 1 beside page_size or without"
        raise _refuse_mla(name, desc.layout, expected)
    shape.insert(1, 1)
    strides.insert(1, strides[1])
    return make_desc(desc.ptr, tuple(shape), desc.dtype, tuple(strides), desc.device, owner=desc)


def _cache(name: str, desc: TensorDesc, kv_layout: str) -> TensorDesc:
    """View a cache as NHD, as the kernels expect it."""
    if len(desc.shape) != 4 or not 0 < min(desc.shape[1:]) <= max(desc.shape[1:]) < _SIZE_LIMIT:
        expected = f"rank 4, and pages, heads and elements of at least 1, and below {_SIZE_LIMIT}"
        raise _refuse(name, desc.layout, expected)
    head_dim = desc.shape[-1]
    if any(stride % head_dim for stride in desc.strides[:-1]):
        got, expected = f"strides {desc.strides}", f"strides that are multiples of {head_dim}"
        raise _refuse(name, got, expected)
    return as_nhd(desc, kv_layout)


def _heads(q: TensorDesc, kv_heads: int) -> tuple[int, int, int]:
    """Return the numbers of requests, of queries per request, and of query heads."""
    rank = len(q.shape)
    if rank not in (4, 5) or q.shape[1] != 1 or max(q.shape[2:-1]) >= _SIZE_LIMIT:
        expected = f"rank 4 (batch_size 1 num_q_heads head_dim), and less than {_SIZE_LIMIT} heads"
        raise _refuse("q", q.layout, expected)
    if rank == 5 and q.shape[2] < 2:
        raise _refuse("q", q.layout, "two queries or more in rank 5, and one in rank 4")
    heads = q.shape[-2]
    if not heads or heads % kv_heads:
        raise _refuse("q", q.layout, f"heads in a multiple of the cache's {kv_heads}")
    return q.shape[0], q.shape[2] if rank == 5 else 1, heads


def _check_several(
    mask: object, batch: int, queries: int, group: int, has_sinks: bool
) -> TensorDesc | None:
    """Return the mask of several queries; raise for combinations that the kernels compute
    wrongly."""
    if queries == 1:
        if mask is not None:
            raise _refuse("mask", shown(mask), "None with one query of each request")
        return None
    if mask is None:
        raise _refuse("mask", "None", "a mask with several queries: which keys each of them sees")
    desc, shape = as_desc(mask, _OP, "mask"), (batch, queries, 2 * -(-queries // 32))
    if desc.shape != shape:
        expected = f"shape {shape}: a bit for each query, in words of 16, two at a time"
        raise _refuse("mask", desc.layout, expected)
    if has_sinks and query_blocks(queries, group) > 1 and XQA_ROWS % group:
        got = f"{queries} queries of {group} heads that share keys"
        expected = f"None: tiles of {XQA_ROWS} rows would begin at different heads"
        raise _refuse("sinks", got, expected)
    return desc


def _check_dtypes(q: TensorDesc, k: TensorDesc, output: TensorDesc) -> None:
    """Check the dtypes that modules exist for: a cache of q's dtype or fp8, an output of q's dtype,
    or fp8 with an fp8 cache."""
    fp8 = "float8_e4m3fn"
    own = q.dtype.name
    if own not in ("float16", "bfloat16"):
        raise _refuse("q", q.dtype, "float16 or bfloat16")
    if k.dtype.name not in (own, fp8):
        raise _refuse("k_cache", k.dtype, f"{own}, as q, or {fp8}")
    allowed = (own, fp8) if k.dtype.name == fp8 else (own,)
    if output.dtype.name not in allowed:
        raise _refuse("output", output.dtype, " or ".join(allowed))


def _put_scales(values: Values, q_scale: object, kv_scale: object) -> None:
    """Set scales as the entry takes them: a number, or a tensor on the device."""
    for name, scale, number, tensor in (
        ("q_scale", q_scale, "qScale", "qScaleTensor"),
        ("kv_scale", kv_scale, "kvCacheScale", "kvScaleTensor"),
    ):
        if isinstance(scale, numbers.Real):
            values.put(**{number: check_number(values.op, name, scale, 0.0), tensor: None})
        else:
            values.put(**{number: 1.0, tensor: as_desc(scale, values.op, name)})


def _window(size: object, queries: int, room: int, release: str | None) -> int:
    """Return a window's size, 0 if it hides nothing; refuse one that the kernels lack."""
    window = check_int(_OP, "sliding_win_size", size, 0)
    if queries > 1 and window >= room:
        return 0
    if queries > 1 and window and release is not None and not is_in(release, WINDOWS_OF_EACH):
        expected = f"0, or {room} or more, with several queries: the kernels of FlashInfer "
        expected += f"{release} hide only whole tiles"
        raise _refuse("sliding_win_size", window, expected)
    return window


def _on_hopper(device: Device) -> bool:
    return device.is_cuda and machine.capability(device.index)[0] == _HOPPER
