"""`BatchPodPlan`: one batch's prefills and another batch's decode in one launch (POD attention)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from fi_ffi.abi._cffi import ffi
from fi_ffi.abi.function import Frame
from fi_ffi.abi.interop import TensorLike, as_desc
from fi_ffi.abi.streams import handle_for
from fi_ffi.abi.tensor import TensorDesc
from fi_ffi.ops.attention.arrays import Batch
from fi_ffi.ops.attention.prefill import BatchPrefillPlan
from fi_ffi.ops.attention.workspace import Workspace
from fi_ffi.ops.call import cuda, memory
from fi_ffi.ops.call.arguments import check_choice
from fi_ffi.ops.call.row import KV_LAYOUTS, Row, as_nhd
from fi_ffi.ops.plans.arguments import NotOf, PodKeywords, described, workspace_for_each
from fi_ffi.ops.plans.pod import POD_RUN, PodPlan
from fi_ffi.ops.plans.rows import BATCH_POD

if TYPE_CHECKING:
    from typing_extensions import Unpack


class _Prefills(BatchPrefillPlan):
    """The prefill half: planned as a batch of its own, and run with the decode."""

    op = "BatchPodPlan"
    _names: Mapping[str, str] = {
        "qo_indptr": "qo_indptr_p",
        "kv_indptr": "paged_kv_indptr_p",
        "indices": "paged_kv_indices_p",
        "last_page_len": "paged_kv_last_page_len_p",
    }

    def _read(self, arrays: Sequence[object]) -> Batch:
        batch = super()._read(arrays)
        if not batch.rows:
            expected = "one or more: the kernel divides by them"
            raise self._refuse("qo_indptr_p", "no queries", expected)
        return batch

    def run_arguments(self) -> dict[str, Any]:
        """Return this plan's part of a run's arguments, by the row's names."""
        self._check_current()
        assert self._info is not None
        places = {f"{name}_p": desc for name, desc in self._runs.places.items()}
        return places | {"plan_info_vec_p": int(ffi.cast("uintptr_t", self._info.handle))}

    def check(self, q: TensorDesc, k: TensorDesc, v: TensorDesc) -> None:
        """Raise if a run's tensors do not fit the planned batch."""
        rows, pages, page_size = self._batch.rows, self._batch.num_pages, self.options.page_size
        if not q.shape or q.shape[0] != rows:
            raise self._refuse("q_p", q.layout, f"{rows} queries, as planned")
        if k.shape[0] < pages or k.shape[1] != page_size:
            expected = f"{pages} pages or more of {page_size}, as planned"
            raise self._refuse("paged_k_cache_p", k.layout, expected)
        if v.strides != k.strides:
            raise self._refuse("paged_v_cache_p", v.layout, f"the strides of the keys: {k.strides}")

    def make_wait(self, handle: int | None) -> cuda.Event | None:
        """Let a run's stream wait for the plan; return the event to record after the run."""
        workspace = self._check_current()
        if memory.recording() is not None:
            memory.keep_for_graph(workspace, self._info)
        return None if handle in (None, workspace._stream) else workspace._join(handle)


class BatchPodPlan(PodPlan):
    """A batch of prefills and a batch of decodes, planned on the host and run together.

    Args:
        qo_indptr_p: [b_p+1] int32 on the host: where each prefill's queries start; at least one
            query.
        paged_kv_indptr_p, paged_kv_indices_p, paged_kv_last_page_len_p: the prefills' pages, as in
            `BatchPrefillPlan`.
        paged_kv_indptr_d, paged_kv_indices_d, paged_kv_last_page_len_d: the decodes' pages, as in
            `BatchDecodePlan`; at least one request.
        num_qo_heads, num_kv_heads: heads of both halves; at most 16 query heads share a key head.
        head_dim, page_size, window_left: of both halves.
        q_data_type, kv_data_type: dtypes of both halves: float16 or bfloat16; keys also fp8.
        causal_p: whether the prefills are causal.
        workspaces: two of `Workspace`, for the prefills and for the decodes; by default fi_ffi
            allocates them.
        device, stream: as in `BatchPrefillPlan`.

    The plan has its own block counters, reset on the run's stream. So a run may be captured into a
    graph, but two runs of one plan must not overlap. `prefill` is the plan of the prefills.

    Raises as `PodPlan` does.
    Upstream: flashinfer/pod.py (BatchPODWithPagedKVCacheWrapper), csrc/batch_pod.cu.
    """

    op = "BatchPodPlan"
    _pod_row: ClassVar[Row] = BATCH_POD
    _family = "batch_pod"
    _last_page_len = "paged_kv_last_page_len_d"
    _run_names = PodPlan._run_names._replace(info="plan_info_vec_d")
    workspace_size: Any = NotOf()
    _names: Mapping[str, str] = {
        "qo_indptr": "paged_kv_last_page_len_d",
        "kv_indptr": "paged_kv_indptr_d",
        "indices": "paged_kv_indices_d",
        "last_page_len": "paged_kv_last_page_len_d",
    }

    def __init__(
        self,
        qo_indptr_p: TensorLike,
        paged_kv_indptr_p: TensorLike,
        paged_kv_indices_p: TensorLike,
        paged_kv_last_page_len_p: TensorLike,
        paged_kv_indptr_d: TensorLike,
        paged_kv_indices_d: TensorLike,
        paged_kv_last_page_len_d: TensorLike,
        *,
        head_dim: int,
        causal_p: bool = False,
        workspaces: Sequence[Workspace | None] | None = None,
        **options: Unpack[PodKeywords],
    ) -> None:
        of_p, of_d = workspace_for_each(self.op, workspaces, 2, "half")
        # The decode first: its keywords are checked, the prefill's are not.
        super().__init__(
            paged_kv_indptr_d,
            paged_kv_indices=paged_kv_indices_d,
            paged_kv_last_page_len=paged_kv_last_page_len_d,
            head_dim=head_dim,
            workspace=of_d,
            **options,
        )
        self.prefill = _Prefills(
            qo_indptr_p,
            paged_kv_indptr=paged_kv_indptr_p,
            paged_kv_indices=paged_kv_indices_p,
            paged_kv_last_page_len=paged_kv_last_page_len_p,
            head_dim_qk=head_dim,
            backend="fa2",
            causal=causal_p,
            workspace=of_p,
            **options,
        )
        count = self._machine[0] + 2
        self._counters = cuda.allocate(4 * count, self.device)
        where = self._counters.desc.ptr
        self._sched = TensorDesc(where, (count,), "int32", device=self.device)

    def replan(  # type: ignore[override]
        self,
        qo_indptr_p: TensorLike,
        paged_kv_indptr_p: TensorLike,
        paged_kv_indices_p: TensorLike,
        paged_kv_last_page_len_p: TensorLike,
        paged_kv_indptr_d: TensorLike,
        paged_kv_indices_d: TensorLike,
        paged_kv_last_page_len_d: TensorLike,
        *,
        stream: object = None,
    ) -> None:
        """Plan other batches with the same options, in the same workspaces; if one is refused,
        neither changes."""
        of_d = (paged_kv_indptr_d, paged_kv_indices_d, paged_kv_last_page_len_d)
        self._check_replan((self._each_one(paged_kv_last_page_len_d), None, *of_d))
        self.prefill.replan(
            qo_indptr_p,
            paged_kv_indptr=paged_kv_indptr_p,
            paged_kv_indices=paged_kv_indices_p,
            paged_kv_last_page_len=paged_kv_last_page_len_p,
            stream=stream,
        )
        super().replan(
            paged_kv_indptr_d,
            paged_kv_indices=paged_kv_indices_d,
            paged_kv_last_page_len=paged_kv_last_page_len_d,
            stream=stream,
        )

    def run(  # type: ignore[override]
        self,
        q_p: TensorLike,
        paged_k_cache_p: TensorLike,
        paged_v_cache_p: TensorLike,
        o_p: TensorLike,
        q_d: TensorLike,
        paged_k_cache_d: TensorLike,
        paged_v_cache_d: TensorLike,
        o_d: TensorLike,
        *,
        lse_p: TensorLike | None = None,
        lse_d: TensorLike | None = None,
        sm_scale_p: float | None = None,
        sm_scale_d: float | None = None,
        kv_layout: str = "NHD",
        enable_pdl: bool = False,
        stream: object = None,
    ) -> None:
        """Compute the prefills of `q_p` into `o_p` and the decodes of `q_d` into `o_d`.

        Args:
            q_p, o_p: [qo_indptr_p[-1], num_qo_heads, head_dim].
            q_d, o_d: [b_d, num_qo_heads, head_dim].
            lse_p, lse_d: as o_p and o_d without head_dim, float32, written: log2 of the sum of
                exponentials.
            paged_k_cache_p, paged_v_cache_p, paged_k_cache_d, paged_v_cache_d: [num_pages,
                page_size, num_kv_heads, head_dim], or with "HND" [num_pages, num_kv_heads,
                page_size, head_dim]. Keys and values have the same strides. Both halves may use one
                cache.
            sm_scale_p, sm_scale_d: 1 / sqrt(head_dim) by default.
        """
        check_choice(self.op, "kv_layout", kv_layout, tuple(KV_LAYOUTS))
        bound = self._bound_run(POD_RUN, True, self._pod_module(self.options.window_left))
        queries = as_desc(q_p, self.op, "q_p")
        caches = described(
            self.op,
            paged_k_cache_p=paged_k_cache_p,
            paged_v_cache_p=paged_v_cache_p,
            paged_k_cache_d=paged_k_cache_d,
            paged_v_cache_d=paged_v_cache_d,
        )
        for name, cache in caches.items():
            if len(cache.shape) != 4:
                raise self._refuse(name, cache.layout, "rank 4: pages, tokens, heads and elements")
            caches[name] = as_nhd(cache, kv_layout)
        self.prefill.check(queries, caches["paged_k_cache_p"], caches["paged_v_cache_p"])
        values = bound.template.fresh()
        values.put(q_p=queries, q_d=q_d, **caches, **self.prefill.run_arguments())
        values.put(o_p=o_p, o_d=o_d, maybe_lse_p=lse_p, maybe_lse_d=lse_d)
        values.put(sm_aware_sched=self._sched, mask_mode_code_p=self.prefill.options.mask_mode)
        self._put_options(values, sm_scale_p, sm_scale_d, enable_pdl)
        self._run_packed(bound, bound.pack(bound, *values.values), stream)

    def _facts(self) -> dict[str, Any]:
        return super()._facts() | {"window_left_p": self.options.window_left}

    def _check_stream(self, stream: object) -> None:
        pass  # the counters are reset on the run's stream

    def _launch_frame(self, frame: Frame, stream: object) -> None:
        handle = handle_for(stream, self.device, self.op) if self.device.is_cuda else None
        event = self.prefill.make_wait(handle)
        super()._launch_frame(frame, stream)
        if event is not None and handle is not None:
            event.record(handle)
