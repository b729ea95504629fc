"""`BatchMlaPlan`: multi-head latent attention (DeepSeek's) over a paged cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from fi_ffi.abi.interop import TensorLike
from fi_ffi.ops.attention import sizes
from fi_ffi.ops.attention.arrays import PAGES_OF_LENGTHS, Batch
from fi_ffi.ops.attention.backends import CAUSAL, NON_CAUSAL
from fi_ffi.ops.attention.bind import RunNames
from fi_ffi.ops.attention.options import MlaKeywords, MlaOptions
from fi_ffi.ops.attention.plan import Plan
from fi_ffi.ops.attention.rows import FP8, NEED_KEYS
from fi_ffi.ops.attention.values import Values, softmax_scale
from fi_ffi.ops.attention.workspace import Workspace
from fi_ffi.ops.call.arguments import check_number, shown

if TYPE_CHECKING:
    from typing_extensions import Unpack


class BatchMlaPlan(Plan):
    """Multi-head latent attention of a batch of requests, planned once for all layers.

    The query of a head has two parts: `q_nope` (head_dim_ckv = 512), multiplied into the space of
    the compressed keys and values, and `q_pe` (head_dim_kpe = 64) with the position encoding. The
    compressed cache serves as keys and as values.

    Args:
        qo_indptr: [b+1] int32 on the host: where each request's queries start.
        kv_indptr: [b+1 or more] int32 on the host: where each request's pages start; entries after
            the first b+1 are ignored.
        kv_indices: [kv_indptr[b] or more] int32 on the host: pages of the cache; None if each run
            passes them on the device, where fi_ffi cannot check them.
        kv_len_arr: [b] int32 on the host: tokens of each request.
        num_heads: heads of the queries.
        page_size: tokens in a page.
        causal (False by default): query i of a request sees keys up to `kv_len - qo_len + i`.
        backend ('auto' by default): "auto" (as FlashInfer: fa3 on SM90 if it can serve), "fa2" or
            "fa3".
        max_total_num_rows: with CUDA graphs, the most queries of a replan; this batch's if None.
        enable_cuda_graph (False by default): keep the arrays' addresses and the launch through
            `replan(...)`, so that a captured run stays valid for other lengths of as many requests.
        max_num_indices: with CUDA graphs, the most pages of a replan; this batch's if None.
        head_dim_ckv (512 by default): size of the compressed keys and values.
        head_dim_kpe (64 by default): size of the part with the position encoding.
        q_data_type ('bfloat16' by default): dtype of q: float16 or bfloat16.
        kv_data_type: dtype of the cache: that of q (also if None); or fp8 e4m3 with bfloat16 q.
        device, workspace, stream: as in `BatchPrefillPlan`.

    With CUDA graphs, `replan` also refuses a batch whose number of queries changes how many blocks
    form a cluster.

    Raises as `BatchPrefillPlan` does.
    Upstream: flashinfer/mla/_core.py, csrc/batch_mla_plan.cu, csrc/batch_mla_sm90_plan.cu.
    """

    op = "BatchMlaPlan"
    _options_class = MlaOptions
    _names = PAGES_OF_LENGTHS
    _run_names = RunNames({"kv_indices": "indices"})
    _kv_indptr_may_be_longer = True

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
        **options: Unpack[MlaKeywords],
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
        q_nope: TensorLike,
        q_pe: TensorLike,
        ckv_cache: TensorLike,
        kpe_cache: TensorLike,
        o: TensorLike,
        lse: TensorLike | None = None,
        *,
        kv_indices: TensorLike | None = None,
        sm_scale: float | None = None,
        return_lse_base_on_e: bool = False,
        ckv_scale: float | None = None,
        ckv_scale_arr: TensorLike | None = None,
        kpe_scale: float | None = None,
        stream: object = None,
    ) -> None:
        """Compute latent attention into `o`, on `stream`.

        Args:
            q_nope: [qo_indptr[-1], num_heads, 512] of `q_data_type`.
            q_pe: [qo_indptr[-1], num_heads, 64] of `q_data_type`.
            ckv_cache: [num_pages, page_size, 512] of `kv_data_type`.
            kpe_cache: [num_pages, page_size, 64] of `kv_data_type`.
            o: [rows of q_nope, num_heads, 512] of `q_data_type`, written.
            lse: [rows of q_nope, num_heads] float32, written: log2 of the sum of exponentials, or
                their natural logarithm with `return_lse_base_on_e`.
            kv_indices: the pages, int32 on the device, if the plan has none.
            sm_scale: factor of the logits; by default 1 / sqrt(128 + 64), from the head size before
                absorption.
            ckv_scale, kpe_scale: factors of the two parts of a float8_e4m3fn cache; both are
                required with one. The kernels round the scales, and the scaled values, to bfloat16.
            ckv_scale_arr: [num_pages, page_size, 4] float32 in place of `ckv_scale`: one for each
                128 elements of a token (FlashInfer 0.6.18 and later).
        """
        bound = self._bound_run(0, self._check_indices("kv_indices", kv_indices))
        values = bound.template.fresh()
        if sm_scale is not None:
            values.put(sm_scale=softmax_scale(self.op, sm_scale, 1))
        values.put(q_nope=q_nope, q_pe=q_pe, ckv_cache=ckv_cache, kpe_cache=kpe_cache, o=o)
        values.put(kv_indices=kv_indices, maybe_lse=lse, return_lse_base_on_e=return_lse_base_on_e)
        if self._is_fp8 or not (ckv_scale is None and ckv_scale_arr is None and kpe_scale is None):
            self._put_scales(values, ckv_scale, ckv_scale_arr, kpe_scale)
        self._run_packed(bound, bound.pack(bound, *values.values), stream)

    def _put_scales(self, values: Values, ckv_scale: Any, array: Any, kpe_scale: Any) -> None:
        scales = {"ckv_scale": ckv_scale, "ckv_scale_arr": array, "kpe_scale": kpe_scale}
        if not self._is_fp8:
            name = next(name for name, value in scales.items() if value is not None)
            expected = f"None with a cache of {self.options.kv_data_type}"
            raise self._refuse(name, shown(scales[name]), expected)
        if (ckv_scale is None) == (array is None):
            got = "neither" if array is None else "both"
            expected = "ckv_scale or ckv_scale_arr, one of them, with a float8_e4m3fn cache"
            raise self._refuse("ckv_scale", got, expected)
        if kpe_scale is None:
            raise self._refuse("kpe_scale", None, "a number, with a float8_e4m3fn cache")
        for name in ("ckv_scale", "kpe_scale"):
            if scales[name] is not None:
                values.put(**{name: check_number(self.op, name, scales[name], above=0)})
        values.option("ckv_scale_arr", array)

    @cached_property
    def _is_fp8(self) -> bool:
        return self.options.kv_data_type in FP8

    def _fill_defaults(self, values: Values) -> None:
        # 128: the head size before absorption.
        values.put(sm_scale=softmax_scale(self.op, None, 128 + self.options.head_dim_kpe))

    @cached_property
    def _needs_keys(self) -> bool:
        return self._runs.rows[0] in NEED_KEYS

    def _facts(self) -> dict[str, Any]:
        mask = {"mask_mode_code": CAUSAL if self.options.causal else NON_CAUSAL}
        return super()._facts() | mask | {"head_dim_o": self.options.head_dim_ckv}

    def _read(self, arrays: Sequence[object]) -> Batch:
        batch = super()._read(arrays)
        if self.options.causal:
            self._check_tiles(batch)
            batch.check_keys("with causal=True")
        if self._needs_keys:
            for i, (queries, keys) in enumerate(zip(batch.qo_lens, batch.kv_lens, strict=True)):
                if queries and not keys:
                    expected = "a token or more: MLA's kernels before 0.6.11 fail without"
                    raise self._refuse("kv_len_arr", f"0 for request {i}", expected)
        return batch

    def _check_tiles(self, batch: Batch) -> None:
        """Refuse causal batches in which a tile ends inside a query.

        The kernels mask a tile of rows by its end, rounded down to whole queries, so that query
        would lose its last key.
        """
        heads = self.options.num_heads
        tile = 64 * sizes.mla_cluster(self._geometry, batch.size, batch.rows)
        if not tile % heads:
            return
        most = max(batch.qo_lens)
        if most * heads > tile:
            got = f"{most} queries of {heads} heads in a request"
            expected = f"{tile // heads} at most with causal=True, or heads that divide {tile}"
            if most == 1:
                expected = "causal=False, which is the same for one query a request"
            raise self._refuse("qo_indptr", got, expected)

    def _check_same_launch(self, batch: Batch) -> None:
        cluster, before = (
            sizes.mla_cluster(self._geometry, one.size, one.rows) for one in (batch, self._batch)
        )
        if cluster != before:
            got = f"queries for which {cluster} blocks work together"
            raise self._refuse("qo_indptr", got, f"{before}, as in the launch captured")

    def _exact_need(self, batch: Batch) -> sizes.Need:
        g = self._geometry
        cluster = sizes.mla_cluster(g, batch.size, batch.rows)
        # Each request has one tile at most that is not full.
        tiles = batch.rows * g.num_qo_heads // (64 * cluster) + batch.size
        if tiles + g.multiprocessors // cluster > sizes.MLA_MAX_WORKS:
            works = sizes.mla_works(g, batch.qo_lens)
            if works > sizes.MLA_MAX_WORKS:
                got = f"queries for up to {works} work items"
                expected = f"{sizes.MLA_MAX_WORKS} at most: the planner has room for no more"
                raise self._refuse("qo_indptr", got, expected)
        return self._needs_of_clusters[cluster]

    @cached_property
    def _needs_of_clusters(self) -> Mapping[int, sizes.Need]:
        return {size: sizes.mla_of_clusters(self._geometry, size) for size in (1, 2)}
