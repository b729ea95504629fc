"""`BatchPodPlan`: one batch's prefills and another batch's decode in one launch (POD attention)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from fi_ffi.abi._cffi import ffi
from fi_ffi.abi.function import Frame
from fi_ffi.abi.interop import TensorLike, as_desc
from fi_ffi.abi.tensor import TensorDesc
from fi_ffi.errors import ArgumentError
from fi_ffi.ops.attention.arrays import Batch
from fi_ffi.ops.attention.prefill import BatchPrefillPlan
from fi_ffi.ops.attention.rows import BATCH_POD
from fi_ffi.ops.attention.run import NotOf
from fi_ffi.ops.attention.workspace import Workspace
from fi_ffi.ops.call import cuda, memory
from fi_ffi.ops.call.arguments import check_choice, check_flag
from fi_ffi.ops.call.row import KV_LAYOUTS, Row, as_nhd
from fi_ffi.ops.plans.pod import PodKeywords, PodPlan

if TYPE_CHECKING:
    from typing_extensions import Unpack

# The kind of run: its row follows those of a prefill plan.
_POD = 2
_ARRAYS = ("paged_kv_indptr", "paged_kv_indices", "paged_kv_last_page_len")


class _Prefills(BatchPrefillPlan):
    """The prefill half: planned as a batch of its own, and run with the decode."""

    op = "BatchPodPlan"
    _names: Mapping[str, str] = {
        "qo_indptr": "qo_indptr_p", "kv_indptr": "paged_kv_indptr_p",
        "indices": "paged_kv_indices_p", "last_page_len": "paged_kv_last_page_len_p",
    }  # fmt: skip

    def _read(self, arrays: Sequence[object]) -> Batch:
        batch = super()._read(arrays)
        if not batch.rows:
            raise self._refuse(
                "qo_indptr_p", "no queries", "one or more: the kernel divides by them"
            )
        return batch

    def given(self) -> dict[str, Any]:
        """Return this plan's part of a run's arguments, by the row's names."""
        workspace, info = self._check_current(), self._info
        assert info is not None
        arrays = {f"{name}_p": self._descs.get(array) for name, array in self._run_arrays.items()}
        return arrays | {
            "float_workspace_buffer_p": workspace.float_buffer,
            "int_workspace_buffer_p": self._descs["int_workspace_buffer"],
            "plan_info_vec_p": int(ffi.cast("uintptr_t", info.handle)),
        }

    def check(self, q: TensorDesc, k: TensorDesc, v: TensorDesc) -> None:
        """Raise if a run's tensors do not fit the planned batch."""
        batch = self._batch
        if not q.shape or q.shape[0] != batch.rows:
            raise self._refuse("q_p", q.layout, f"{batch.rows} queries, as planned")
        if (
            len(k.shape) != 4
            or k.shape[0] < batch.num_pages
            or k.shape[1] != self.options.page_size
        ):
            expected = f"{batch.num_pages} pages or more of {self.options.page_size}, as planned"
            raise self._refuse("paged_k_cache_p", k.layout, expected)
        if v.strides != k.strides:
            raise self._refuse("paged_v_cache_p", v.layout, f"the strides of the keys: {k.strides}")

    def hold(self, handle: int | None) -> cuda.Event | None:
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
    _run_info = "plan_info_vec_d"
    workspace_size: Any = NotOf()
    _names: Mapping[str, str] = {
        "qo_indptr": "paged_kv_last_page_len_d", "kv_indptr": "paged_kv_indptr_d",
        "indices": "paged_kv_indices_d", "last_page_len": "paged_kv_last_page_len_d",
    }  # fmt: skip

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
        if workspaces is not None and len(workspaces) != 2:
            got = f"{len(workspaces)} of them"
            raise ArgumentError(self.op, "workspaces", got=got, expected="2: one for each half")
        of_p, of_d = workspaces or (None, None)
        pages = (paged_kv_indptr_p, paged_kv_indices_p, paged_kv_last_page_len_p)
        # The decode first: its keywords are checked, the prefill's are not.
        super().__init__(
            paged_kv_indptr_d, paged_kv_indices=paged_kv_indices_d,
            paged_kv_last_page_len=paged_kv_last_page_len_d, head_dim=head_dim, workspace=of_d,
            **options,
        )  # fmt: skip
        of_prefills: dict[str, Any] = dict(zip(_ARRAYS, pages, strict=True))
        self.prefill = _Prefills(
            qo_indptr_p, **of_prefills, head_dim_qk=head_dim, backend="fa2", causal=causal_p,
            workspace=of_p, **options,
        )  # fmt: skip
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
        pages = (paged_kv_indptr_p, paged_kv_indices_p, paged_kv_last_page_len_p)
        of_p = dict(zip(_ARRAYS, pages, strict=True))
        of_d = (paged_kv_indptr_d, paged_kv_indices_d, paged_kv_last_page_len_d)
        self._read((self._each_one(paged_kv_last_page_len_d), None, *of_d))
        self.prefill.replan(qo_indptr_p, **of_p, stream=stream)
        super().replan(
            paged_kv_indptr_d, paged_kv_last_page_len=paged_kv_last_page_len_d,
            paged_kv_indices=paged_kv_indices_d, stream=stream,
        )  # fmt: skip

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
        bound = self._bound_run(_POD, True, self._pod_module(self.options.window_left))
        given = {
            "q_p": q_p, "paged_k_cache_p": paged_k_cache_p, "paged_v_cache_p": paged_v_cache_p,
            "paged_k_cache_d": paged_k_cache_d, "paged_v_cache_d": paged_v_cache_d,
        }  # fmt: skip
        descs = {name: as_desc(tensor, self.op, name) for name, tensor in given.items()}
        for name in [*descs][1:]:
            if len(descs[name].shape) != 4:
                expected = "rank 4: pages, tokens, heads and elements"
                raise self._refuse(name, descs[name].layout, expected)
            descs[name] = as_nhd(descs[name], kv_layout)
        self.prefill.check(*(descs[name] for name in [*descs][:3]))
        values = bound.template.fresh()
        values.put(
            **descs, **self.prefill.given(), o_p=o_p, q_d=q_d, o_d=o_d, maybe_lse_p=lse_p,
            maybe_lse_d=lse_d, sm_scale_p=self._scale("sm_scale_p", sm_scale_p),
            sm_scale_d=self._scale("sm_scale_d", sm_scale_d), sm_aware_sched=self._sched,
            enable_pdl=check_flag(self.op, "enable_pdl", enable_pdl),
            mask_mode_code_p=self.prefill.options.mask_mode,
        )  # fmt: skip
        self._run_packed(bound, values.values, stream)

    def _facts(self) -> dict[str, Any]:
        return super()._facts() | {"window_left_p": self.options.window_left}

    def _check_stream(self, stream: object) -> None:
        pass  # the counters are reset on the run's stream

    def _launch_frame(self, frame: Frame, stream: object) -> None:
        handle = self._stream_handle(stream) if self.device.is_cuda else None
        event = self.prefill.hold(handle)
        super()._launch_frame(frame, stream)
        if event is not None and handle is not None:
            event.record(handle)
