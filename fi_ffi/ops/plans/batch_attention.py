"""`BatchAttentionPlan`: prefills and decodes of a batch in one launch, over a paged cache."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

from fi_ffi.abi.interop import TensorLike
from fi_ffi.ops.attention import sizes
from fi_ffi.ops.attention.arrays import PAGES_OF_LENGTHS, Batch
from fi_ffi.ops.attention.backends import CAUSAL, NON_CAUSAL, Target, fa2_lacks
from fi_ffi.ops.attention.bind import RunNames
from fi_ffi.ops.attention.options import (
    Choice,
    Count,
    Flag,
    Graphs,
    HeadDim,
    OptionalCount,
    Options,
    SoftCap,
    dtype,
)
from fi_ffi.ops.attention.plan import Plan
from fi_ffi.ops.attention.rows import F16, FP4, FP8
from fi_ffi.ops.attention.values import Values, block_scales
from fi_ffi.ops.attention.workspace import Workspace
from fi_ffi.ops.call.arguments import check_number
from fi_ffi.ops.plans.rows import BATCH_ATTENTION, BATCH_ATTENTION_FP4

if TYPE_CHECKING:
    from typing_extensions import Unpack

# The kernel counts the tokens of all listed pages in 32 bits.
_TOKEN_LIMIT = 2**32


# The work items that the planner reserves, and checks, for tiles of 128 rows and of 16.
_MAX_WORKS, _TILES = 65536, (128, 16)


def workspace_need(g: sizes.Geometry) -> sizes.Need:
    """`TwoStageHolisticPlan`, which reserves the same for every batch."""
    blocks = g.multiprocessors * (1 if g.head_dim_vo >= 256 else 2)
    pieces = 4 * blocks * sum(_TILES)
    # For each kind of tile, nine arrays of work items and one of each block's start.
    arrays = [_MAX_WORKS] * 10 * len(_TILES)
    int_bytes = sizes.bytes_of_ints(*arrays, len(_TILES), pieces, pieces, 1)
    return sizes.Need(sizes.partial_bytes(g, pieces * g.num_kv_heads, 2), int_bytes)


class _Sizes(HeadDim):
    page_size: Count


class AttentionKeywords(_Sizes, Graphs, total=False):
    """Keywords of `BatchAttentionPlan`."""

    head_dim_vo: OptionalCount
    causal: Flag
    q_data_type: Annotated[object, dtype("bfloat16", *F16)]
    kv_data_type: Annotated[object, dtype(None, *F16, *FP8, *FP4)]
    logits_soft_cap: SoftCap
    max_total_num_rows: OptionalCount


class AttentionOptions(Options, op="BatchAttentionPlan", keywords=AttentionKeywords):
    """Options of `BatchAttentionPlan`."""

    family = "batch_attention"
    pos_encoding_mode, window_left, o_data_type = "NONE", -1, None

    def check_together(self) -> None:
        super().check_together()
        lacks = fa2_lacks(self.kernel)
        if lacks:
            raise self.refuse("kv_data_type", self.kv_data_type, f"{self.q_data_type}: {lacks}")

    def choose(self, target: Target) -> Choice:
        rows = BATCH_ATTENTION_FP4 if self.kv_data_type in FP4 else BATCH_ATTENTION
        return Choice("persistent", "batch attention has no other", rows)


class BatchAttentionPlan(Plan):
    """Prefills and decodes of a batch in one launch over a paged cache, planned once for all
    layers.

    This is FlashInfer's `BatchAttention`: one persistent kernel with as many blocks as the GPU
    holds, which balances long prefills and single queries among them.

    Args:
        qo_indptr: [b+1] int32 on the host: where each request's queries start.
        kv_indptr: [b+1] int32 on the host: where each request's pages start in `kv_indices`.
        kv_indices: [kv_indptr[-1] or more] int32 on the host: pages of the cache; None if each run
            passes them on the device, where fi_ffi cannot check them.
        kv_len_arr: [b] int32 on the host: tokens of each request.
        num_qo_heads: heads of q: a multiple of num_kv_heads.
        num_kv_heads: heads of k and v.
        head_dim_qk: size of a head of q and k.
        page_size: tokens in a page.
        enable_cuda_graph (False by default): keep the arrays' addresses and the launch through
            `replan(...)`, so that a captured run stays valid for other lengths of as many requests.
        max_num_indices: with CUDA graphs, the most pages of a replan; this batch's if None.
        head_dim_vo: size of a head of v and the output; head_dim_qk if None.
        causal (False by default): query i of a request sees keys up to `kv_len - qo_len + i`.
        q_data_type ('bfloat16' by default): dtype of q and the output: float16 or bfloat16.
        kv_data_type: dtype of k and v: that of q (also if None), fp8, or uint8 for NVFP4, two
            values a byte (FlashInfer 0.6.10 to 0.6.14).
        logits_soft_cap (0.0 by default): c > 0 makes logits `c * tanh(logits / c)`.
        max_total_num_rows: with CUDA graphs, the most queries of a replan; this batch's if None.
        device, workspace, stream: as in `BatchPrefillPlan`.

    The size of the workspace depends on the GPU and the heads alone: 302 MiB and 6 MiB for 132
    multiprocessors, 8 key heads and head_dim 128. A captured launch serves any batch.

    Raises as `BatchPrefillPlan` does, and `KernelError` if the planner finds more than 65,536
    pieces of work.
    Upstream: flashinfer/attention/_core.py, csrc/batch_attention.cu.
    """

    op = "BatchAttentionPlan"
    _options_class = AttentionOptions
    _names = PAGES_OF_LENGTHS
    _run_names = RunNames({"kv_indices": "indices"})

    def __init__(
        self,
        qo_indptr: TensorLike,
        kv_indptr: TensorLike,
        kv_indices: TensorLike | None,
        kv_len_arr: TensorLike,
        *,
        device: object = None,
        workspace: Workspace | None = None,
        stream: object = None,
        **options: Unpack[AttentionKeywords],
    ) -> None:
        arrays = qo_indptr, kv_indptr, kv_indices, kv_len_arr
        super().__init__(arrays, device, workspace, stream, options)

    def replan(
        self,
        qo_indptr: TensorLike,
        kv_indptr: TensorLike | None = None,
        kv_indices: TensorLike | None = None,
        kv_len_arr: TensorLike | None = None,
        *,
        stream: object = None,
        **others: TensorLike | None,
    ) -> None:
        """Plan another batch with the same options, as `BatchPrefillPlan.replan`."""
        self._replan_batch((qo_indptr, kv_indptr, kv_indices, kv_len_arr), stream, others)

    def run(
        self,
        q: TensorLike,
        k_cache: TensorLike,
        v_cache: TensorLike,
        o: TensorLike,
        lse: TensorLike | None = None,
        *,
        kv_layout: str = "NHD",
        kv_indices: TensorLike | None = None,
        sm_scale: float | None = None,
        k_scale: float | None = None,
        v_scale: float | None = None,
        k_cache_sf: TensorLike | None = None,
        v_cache_sf: TensorLike | None = None,
        stream: object = None,
    ) -> None:
        """Compute the attention of `q` over the pages of a cache into `o`, on `stream`.

        Args:
            q: [qo_indptr[-1], num_qo_heads, head_dim_qk]; with CUDA graphs [max_total_num_rows,
                ...], as for `o` and `lse`.
            k_cache: [num_pages, page_size, num_kv_heads, head_dim_qk], or with "HND" [num_pages,
                num_kv_heads, page_size, head_dim_qk].
            v_cache: as k_cache, with head_dim_vo and the same strides.
            o: [rows of q, num_qo_heads, head_dim_vo], contiguous, written.
            lse: [rows of q, num_qo_heads] float32, written: log2 of the sum of exponentials.
            kv_indices: the pages, int32 on the device, if the plan has none.
            sm_scale: factor of q @ k; 1 / sqrt(head_dim_qk) by default.
            k_scale, v_scale: factors of k and v, such as the scales of an fp8 cache.
            k_cache_sf, v_cache_sf: scales of NVFP4 keys and values, as in
                `BatchPrefillPlan.paged_run`; their strides are an eighth of those of the cache.
        """
        bound = self._bound_run(0, self._check_indices("kv_indices", kv_indices))
        values = bound.template.fresh()
        if sm_scale is not None or k_scale is not None:
            values.scales(self.options.head_dim_qk, sm_scale, None, k_scale)
        if v_scale is not None:
            values.put(v_scale=check_number(self.op, "v_scale", v_scale, -math.inf))
        dtype = self.options.kv_data_type
        caches = {"k_cache": k_cache, "v_cache": v_cache}
        block_scales(values, dtype, caches, k_cache_sf, v_cache_sf)
        values.put(q=q, k_cache=k_cache, v_cache=v_cache, o=o, maybe_lse=lse)
        values.put(kv_layout=kv_layout, kv_indices=kv_indices)
        self._run_packed(bound, bound.pack(bound, *values.values), stream)

    def _fill_defaults(self, values: Values) -> None:
        values.scales(self.options.head_dim_qk)
        values.put(v_scale=1.0)

    def _facts(self) -> dict[str, Any]:
        mask = CAUSAL if self.options.causal else NON_CAUSAL
        own = {"mask_mode_code": mask, "head_dim_o": self.options.head_dim_vo}
        return super()._facts() | own

    def _read(self, arrays: Sequence[object]) -> Batch:
        batch = super()._read(arrays)
        if self.options.causal:
            batch.check_keys("with causal=True")
        tokens = batch.kv.total * self.options.page_size
        if tokens >= _TOKEN_LIMIT:
            expected = f"less than {_TOKEN_LIMIT} tokens in all pages that are listed"
            raise self._refuse("kv_indptr", f"{tokens} tokens", expected)
        return batch

    def _exact_need(self, batch: Batch) -> sizes.Need:
        return workspace_need(self._geometry)
