"""`BatchMlaPlan`: multi-head latent attention (DeepSeek's) over a paged cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from fi_ffi.abi.interop import TensorLike
from fi_ffi.ops.attention import sizes
from fi_ffi.ops.attention.arrays import Batch
from fi_ffi.ops.attention.backends import CAUSAL, NON_CAUSAL, choose_backend
from fi_ffi.ops.attention.options import MlaKeywords, MlaOptions
from fi_ffi.ops.attention.plan import Plan
from fi_ffi.ops.attention.rows import BATCH_MLA, NEED_KEYS
from fi_ffi.ops.attention.run import Values, softmax_scale
from fi_ffi.ops.attention.workspace import Workspace
from fi_ffi.ops.row import Row

if TYPE_CHECKING:
    from typing_extensions import Unpack


class BatchMlaPlan(Plan):
    """A batch of requests for multi-head latent attention, planned once, run for every layer.

    Each head's query has a part that was multiplied into the space of the compressed keys
    and values (`q_nope`, head_dim_ckv = 512) and a part with the position encoding
    (`q_pe`, head_dim_kpe = 64); keys and values are the compressed cache itself.

    Args:
        qo_indptr: [b+1] int32 on the host: where each request's queries start.
        kv_indptr: [b+1 or more] int32 on the host: where each request's pages start; entries
            after the first b+1 are not read.
        kv_indices: [kv_indptr[b] or more] int32 on the host: pages; None where each run
            is given them on the device.
        kv_len_arr: [b] int32 on the host: tokens of each request.
        {options}
        device, workspace, stream: as in `BatchPrefillPlan`.

    With CUDA graphs `replan` also refuses a batch whose queries would make another number of
    blocks work together.

    Raises as `BatchPrefillPlan` does.
    Upstream: flashinfer/mla/_core.py, csrc/batch_mla_plan.cu, csrc/batch_mla_sm90_plan.cu.
    """

    op = "BatchMlaPlan"
    options_class = MlaOptions
    names: Mapping[str, str] = {
        "qo_indptr": "qo_indptr", "kv_indptr": "kv_indptr", "indices": "kv_indices",
        "kv_len": "kv_len_arr",
    }  # fmt: skip
    run_arrays: Mapping[str, str] = {"kv_indices": "indices"}
    kv_indptr_may_be_longer = True

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
        kv_indptr: TensorLike,
        kv_indices: TensorLike | None,
        kv_len_arr: TensorLike,
        *,
        stream: object = None,
    ) -> None:
        """Plan another batch with the same options; as `BatchPrefillPlan.replan`."""
        self.replan_batch((qo_indptr, kv_indptr, kv_indices, kv_len_arr), stream)

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
        stream: object = None,
    ) -> None:
        """Attention into `o`, on `stream`.

        Args:
            q_nope: [qo_indptr[-1], num_heads, 512]; q_pe: [qo_indptr[-1], num_heads, 64].
            ckv_cache: [num_pages, page_size, 512]; kpe_cache: [num_pages, page_size, 64].
            o: [rows of q_nope, num_heads, 512], written.
            lse: [rows of q_nope, num_heads] float32, written: log2 of the sum of
                exponentials, or their natural logarithm with `return_lse_base_on_e`.
            kv_indices: the pages on the device, where the plan was given none.
            sm_scale: logits are multiplied by it; by default 1 / sqrt(128 + 64), of the
                heads before absorption.
        """
        bound = self.bound_run(0, self.check_indices("kv_indices", kv_indices))
        values = bound.template.fresh()
        if sm_scale is not None:
            values.put(sm_scale=softmax_scale(self.op, sm_scale, 1))
        values.put(
            q_nope=q_nope, q_pe=q_pe, ckv_cache=ckv_cache, kpe_cache=kpe_cache, o=o,
            maybe_lse=lse, kv_indices=kv_indices, return_lse_base_on_e=return_lse_base_on_e,
        )  # fmt: skip
        self.run_packed(bound, values.values, stream)

    def fill_defaults(self, values: Values) -> None:
        # Of the heads before absorption.
        values.put(sm_scale=softmax_scale(self.op, None, 128 + self.options.head_dim_kpe))

    def choose_rows(self) -> Sequence[Row]:
        chosen = self.options
        self.backend, self.backend_reason = choose_backend(
            self.op, chosen.backend, chosen.kernel, self.device
        )
        return BATCH_MLA[self.backend]

    @cached_property
    def _needs_keys(self) -> bool:
        return self._run_rows[0] in NEED_KEYS

    def facts(self) -> dict[str, Any]:
        mask = {"mask_mode_code": CAUSAL if self.options.causal else NON_CAUSAL}
        return super().facts() | mask | {"head_dim_o": self.options.head_dim_ckv}

    def read(self, arrays: Sequence[object]) -> Batch:
        batch = super().read(arrays)
        if self.options.causal:
            self._check_tiles(batch)
            batch.check_keys("with causal=True")
        if self._needs_keys:
            for i, (queries, keys) in enumerate(zip(batch.qo_lens, batch.kv_lens, strict=True)):
                if queries and not keys:
                    expected = "a token or more: MLA's kernels before 0.6.11 fail without"
                    raise self.refuse("kv_len_arr", f"0 for request {i}", expected)
        return batch

    def _check_tiles(self, batch: Batch) -> None:
        """The kernels mask a tile of rows by where it ends, rounded down to whole queries:
        where it ends inside of one, that query loses its last key."""
        heads, lens = self.options.num_heads, batch.qo_lens
        tile = 64 * sizes.mla_cluster(self.geometry, lens)
        if tile % heads and max(lens) * heads > tile:
            got = f"{max(lens)} queries of {heads} heads in a request"
            expected = f"{tile // heads} at most with causal=True, or heads that divide {tile}"
            if max(lens) == 1:
                expected = "causal=False, which is the same for one query a request"
            raise self.refuse("qo_indptr", got, expected)

    def check_same_launch(self, batch: Batch) -> None:
        cluster, before = (
            sizes.mla_cluster(self.geometry, one.qo_lens) for one in (batch, self._batch)
        )
        if cluster != before:
            got = f"queries for which {cluster} blocks work together"
            raise self.refuse("qo_indptr", got, f"{before}, as in the launch captured")

    def exact_need(self, batch: Batch) -> sizes.Need:
        works = sizes.mla_works(self.geometry, batch.qo_lens)
        if works > sizes.MLA_MAX_WORKS:
            got = f"queries for up to {works} work items"
            expected = f"{sizes.MLA_MAX_WORKS} at most: the planner has room for no more"
            raise self.refuse("qo_indptr", got, expected)
        return sizes.mla(self.geometry, batch.qo_lens)
