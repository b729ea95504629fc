"""`BatchMlaPlan`: multi-head latent attention (DeepSeek's) over a paged cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from fi_ffi.abi.interop import TensorLike
from fi_ffi.errors import ArgumentError
from fi_ffi.ops.attention import sizes
from fi_ffi.ops.attention.arrays import (
    Arrays,
    HostArray,
    Indptr,
    check_keys,
    page_indices,
)
from fi_ffi.ops.attention.options import CAUSAL, NON_CAUSAL, choose_backend, in_use
from fi_ffi.ops.attention.plan import SIZE_ONLY, BoundRow, Plan, WorkspaceSize
from fi_ffi.ops.attention.rows import BATCH_MLA, NEED_KEYS
from fi_ffi.ops.attention.run import Values, softmax_scale
from fi_ffi.ops.attention.spec import MlaOptions
from fi_ffi.ops.attention.workspace import Workspace

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from fi_ffi.ops.attention.keywords import MlaKeywords


class _Batch:
    """Where each request's queries and pages are, and how many tokens it has."""

    __slots__ = ("indices", "kv", "kv_len", "max_page", "qo")

    def __init__(self, op: str, page_size: int, qo: Any, kv: Any, indices: Any, kv_len: Any):
        self.qo = Indptr(op, "qo_indptr", qo)
        count = len(self.qo.counts)
        self.kv = Indptr(op, "kv_indptr", kv, count + 1)
        self.kv_len = HostArray(op, "kv_len_arr", kv_len, count)
        pairs = zip(self.kv_len.view.tolist(), self.kv.counts, strict=True)
        for i, (length, pages) in enumerate(pairs):
            if not max(pages - 1, 0) * page_size <= length <= pages * page_size:
                got = f"{length} for request {i} with {pages} pages of {page_size}"
                expected = "tokens that fill its pages"
                raise ArgumentError(op, "kv_len_arr", got=got, expected=expected)
        self.indices, self.max_page = page_indices(op, "kv_indices", indices, self.kv.total)


class BatchMlaPlan(Plan):
    """A batch of requests for multi-head latent attention, planned once, run for every layer.

    Each head's query has a part that was multiplied into the space of the compressed keys
    and values (`q_nope`, head_dim_ckv = 512) and a part with the position encoding
    (`q_pe`, head_dim_kpe = 64); keys and values are the compressed cache itself.

    Args:
        qo_indptr: [b+1] int32 on the host: where each request's queries start.
        kv_indptr: [b+1] int32 on the host: where each request's pages start.
        kv_indices: [kv_indptr[-1] or more] int32 on the host: pages; None where each run
            is given them on the device.
        kv_len_arr: [b] int32 on the host: tokens of each request.
        num_heads, page_size: sizes.
        q_data_type, kv_data_type: float16 or bfloat16, the same.
        causal: query i of a request sees keys up to `kv_len - qo_len + i`.
        backend: "auto" (fa3 on SM90, as FlashInfer has it), "fa2" or "fa3".
        enable_cuda_graph, max_total_num_rows, max_num_indices, device, workspace, stream:
            as in `BatchPrefillPlan`; `replan` also refuses a batch whose queries would
            make another number of blocks work together.

    Raises as `BatchPrefillPlan` does.
    Upstream: flashinfer/mla/_core.py, csrc/batch_mla_plan.cu, csrc/batch_mla_sm90_plan.cu.
    """

    op = "BatchMlaPlan"
    run_arrays: Mapping[str, str] = {"kv_indices": "indices"}
    run_not_less: ClassVar = {
        0: (("num_pages", "planned_pages"), ("num_indices", "planned_indices")),
    }

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
        super().__init__(device, workspace)
        self.options = chosen = MlaOptions.of(options)
        kernel = chosen.kernel
        self.backend, self.backend_reason = choose_backend(
            self.op, chosen.backend, kernel, self.device
        )
        self.module = kernel.module(self.backend)
        self.geometry = chosen.geometry(self.machine)
        planner, *self._run_rows = in_use(BATCH_MLA[self.backend], self.device)
        self._needs_keys = self._run_rows[0] in NEED_KEYS
        self.bind_planner(planner, kernel)
        for name, value in (
            ("num_heads", chosen.num_heads), ("head_dim_o", chosen.head_dim_ckv),
            ("causal", chosen.causal),
        ):  # fmt: skip
            self._planner.put(name, value)
        batch = self._read(qo_indptr, kv_indptr, kv_indices, kv_len_arr)
        self._max_rows = chosen.max_total_num_rows or batch.qo.total
        self._max_indices = chosen.max_num_indices or batch.kv.total
        if self.is_size_only:
            self.needs, self._placed = self._need(batch)
        else:
            self._schedule(batch, stream)

    @classmethod
    def workspace_size(
        cls,
        qo_indptr: TensorLike,
        kv_indptr: TensorLike,
        kv_indices: TensorLike | None,
        kv_len_arr: TensorLike,
        **arguments: Any,
    ) -> WorkspaceSize:
        """Bytes of the float and int workspaces that a plan of these arguments needs."""
        plan = cls(qo_indptr, kv_indptr, kv_indices, kv_len_arr, workspace=SIZE_ONLY, **arguments)
        return WorkspaceSize(plan.needs.float_bytes, plan._placed.end)

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
        batch = self._read(qo_indptr, kv_indptr, kv_indices, kv_len_arr)
        if self.options.enable_cuda_graph:
            self._check_replan(batch)
        self._schedule(batch, stream)

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
        bound, values = self._run_arguments(
            q_nope, q_pe, ckv_cache, kpe_cache, o, lse, kv_indices, sm_scale, return_lse_base_on_e
        )
        self.run_packed(bound, values, stream)

    def _run_arguments(
        self, q_nope: Any, q_pe: Any, ckv_cache: Any, kpe_cache: Any, o: Any, lse: Any = None,
        kv_indices: Any = None, sm_scale: float | None = None, return_lse_base_on_e: bool = False,
    ) -> tuple[BoundRow, Sequence[Any]]:  # fmt: skip
        """The row of a run, and what it is given."""
        bound = self.bound_run(0, self.check_indices("kv_indices", kv_indices))
        values = bound.template.fresh()
        if sm_scale is not None:
            values.put(sm_scale=softmax_scale(self.op, sm_scale, 1))
        values.put(
            q_nope=q_nope, q_pe=q_pe, ckv_cache=ckv_cache, kpe_cache=kpe_cache, o=o,
            maybe_lse=lse, kv_indices=kv_indices, return_lse_base_on_e=return_lse_base_on_e,
        )  # fmt: skip
        return bound, values.values

    def fill_defaults(self, values: Values) -> None:
        # Of the heads before absorption.
        values.put(sm_scale=softmax_scale(self.op, None, 128 + self.options.head_dim_kpe))

    def run_constants(self) -> dict[str, Any]:
        chosen = self.options
        return {
            "mask_mode_code": CAUSAL if chosen.causal else NON_CAUSAL,
            "num_heads": chosen.num_heads, "page_size": chosen.page_size,
        }  # fmt: skip

    def run_known(self) -> tuple[str, ...]:
        return (
            "nnz_qo", "num_heads", "page_size", "head_dim_ckv", "head_dim_kpe", "planned_pages",
            "planned_indices",
        )  # fmt: skip

    def run_sizes(self) -> Sequence[int]:
        chosen = self.options
        return (
            self._rows_now, chosen.num_heads, chosen.page_size, chosen.head_dim_ckv,
            chosen.head_dim_kpe, self._max_page + 1, self._num_indices,
        )  # fmt: skip

    def _read(self, qo: Any, kv: Any, indices: Any, kv_len: Any) -> _Batch:
        batch = _Batch(self.op, self.options.page_size, qo, kv, indices, kv_len)
        if self.options.causal:
            self._check_tiles(batch)
            check_keys(self.op, batch.qo.counts, batch.kv_len.view.tolist(), "with causal=True")
        if self._needs_keys:
            for i, (queries, keys) in enumerate(
                zip(batch.qo.counts, batch.kv_len.view.tolist(), strict=True)
            ):
                if queries and not keys:
                    expected = "a token or more: MLA's kernels before 0.6.11 fail without"
                    raise self.refuse("kv_len_arr", f"0 for request {i}", expected)
        return batch

    def _check_tiles(self, batch: _Batch) -> None:
        """The kernels mask a tile of rows by where it ends, rounded down to whole queries:
        where it ends inside of one, that query loses its last key."""
        heads, lens = self.options.num_heads, batch.qo.counts
        tile = 64 * sizes.mla_cluster(self.geometry, lens)
        if tile % heads and max(lens) * heads > tile:
            got = f"{max(lens)} queries of {heads} heads in a request"
            expected = f"{tile // heads} at most with causal=True, or heads that divide {tile}"
            if max(lens) == 1:
                expected = "causal=False, which is the same for one query a request"
            raise self.refuse("qo_indptr", got, expected)

    def _check_replan(self, batch: _Batch) -> None:
        self.check_batch_size("qo_indptr", len(batch.qo.counts), self._batch_size)
        self.check_room("pages", "kv_indices", batch.max_page + 1)
        self.check_room("page indices", "kv_indptr", batch.kv.total)
        self.check_has_indices("kv_indices", batch.indices is not None)
        cluster = sizes.mla_cluster(self.geometry, batch.qo.counts)
        if cluster != self._cluster:
            got = f"queries for which {cluster} blocks work together"
            raise self.refuse("qo_indptr", got, f"{self._cluster}, as in the launch captured")

    def _need(self, batch: _Batch) -> tuple[sizes.Need, Arrays]:
        graph = self.options.enable_cuda_graph
        if graph and batch.qo.total > self._max_rows:
            expected = f"{self._max_rows} at most"
            raise self.refuse("qo_indptr", f"{batch.qo.total} queries", expected)
        if graph and batch.kv.total > self._max_indices:
            expected = f"{self._max_indices} at most"
            raise self.refuse("kv_indptr", f"{batch.kv.total} pages", expected)
        works = sizes.mla_works(self.geometry, batch.qo.counts)
        if works > sizes.MLA_MAX_WORKS:
            got = f"queries for up to {works} work items"
            expected = f"{sizes.MLA_MAX_WORKS} at most: the planner has room for no more"
            raise self.refuse("qo_indptr", got, expected)
        need = sizes.mla(self.geometry, batch.qo.counts)
        rooms = {}
        if batch.indices is not None:
            rooms["indices"] = self._max_indices if graph else batch.kv.total
        return need, self.place(need, batch.qo.size, rooms)

    def _schedule(self, batch: _Batch, stream: object) -> None:
        given = {
            "qo_indptr": batch.qo.desc, "kv_indptr": batch.kv.desc, "kv_len": batch.kv_len.desc,
        }  # fmt: skip
        arrays = {} if batch.indices is None else {"indices": batch.indices.view}
        need, placed = self._need(batch)
        self._batch = batch
        self.schedule(given, arrays, need, placed, stream)

    def _batch_now(self) -> None:
        batch = self._batch
        self._batch_size = batch.qo.size
        self._num_indices, self._max_page = batch.kv.total, batch.max_page
        self._cluster = sizes.mla_cluster(self.geometry, batch.qo.counts)
        graph = self.options.enable_cuda_graph
        self._rows_now = self._max_rows if graph else batch.qo.total
