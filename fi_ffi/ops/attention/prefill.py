"""`BatchPrefillPlan`: attention of many queries a request, over ragged or paged keys and values."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fi_ffi.abi.interop import TensorLike
from fi_ffi.ops.attention import sizes
from fi_ffi.ops.attention.arrays import Arrays, host_ints, index_room
from fi_ffi.ops.attention.batch import Batch
from fi_ffi.ops.attention.indices import check_keys, described_ints
from fi_ffi.ops.attention.options import choose_backend, in_use
from fi_ffi.ops.attention.plan import SIZE_ONLY, WorkspaceSize, form_of
from fi_ffi.ops.attention.prefill_replans import PrefillReplans
from fi_ffi.ops.attention.rows import BATCH_PREFILL, BATCH_PREFILL_SINK, FP8
from fi_ffi.ops.attention.run import Values
from fi_ffi.ops.attention.spec import PrefillOptions
from fi_ffi.ops.attention.workspace import Workspace

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from fi_ffi.ops.attention.keywords import PrefillKeywords

_KNOWN = ("num_qo_heads", "num_kv_heads", "head_dim_qk", "head_dim_vo")


class BatchPrefillPlan(PrefillReplans):
    """A batch of requests, planned once on the host and run for every layer.

    Every request has its own number of queries and of keys.  Keys and values are ragged
    (side by side, `kv_indptr`) or paged (`paged_kv_indptr`, `paged_kv_indices`,
    `paged_kv_last_page_len` and `page_size`).  All arrays are int32 **on the host**: they
    are checked here and copied to the device in order with `stream`; nothing is ever
    copied back.

    Args:
        qo_indptr: [b+1] where each request's queries start; the last is how many there are.
        kv_indptr: [b+1] where each request's keys start, for `ragged_run`.
        paged_kv_indptr: [b+1] where each request's pages start in `paged_kv_indices`.
        paged_kv_indices: [paged_kv_indptr[-1] or more] pages of the cache; None where
            each run is given them on the device (and cannot check them).
        paged_kv_last_page_len: [b] tokens in each request's last page: 1 to `page_size`.
        num_qo_heads, num_kv_heads: the first is a multiple of the second.
        head_dim_qk, head_dim_vo: sizes of a head of q and k, and of v and the output.
        page_size: tokens in a page; None for ragged keys.
        q_data_type, kv_data_type, o_data_type: dtypes; the latter two default to q's,
            except that fp8 queries have float16 output.
        causal: query i of a request sees keys up to `kv_len - qo_len + i`.
        window_left: how many keys before that it sees; -1 for all.
        logits_soft_cap: c > 0 makes logits `c * tanh(logits / c)`.
        pos_encoding_mode: "NONE", "ROPE_LLAMA" or "ALIBI", applied in the kernel.
        use_fp16_qk_reduction: float16 sums in q @ k (fa2, float16 queries).
        use_custom_mask: runs bring a packed mask (`pack_custom_mask`); fa2.
        use_multi_item_scoring: runs bring prefix and item lengths.
        use_attention_sink: runs bring `sink`, a logit of each head that takes part in the
            softmax's sum (GPT-OSS).
        backend: "auto" (as FlashInfer chooses: fa3 on SM90 where it can), "fa2" or "fa3".
        fixed_split_size, disable_split_kv: how requests are split among blocks (fa2): in
            pieces of so many pages, for results that do not depend on the batch; or not.
        enable_cuda_graph: keep addresses and launch, so that a captured run serves after
            `replan(...)` for other lengths of the same number of requests.
        max_total_num_rows, max_num_indices: with CUDA graphs, the most queries and pages
            that replans may have; those of this batch by default.
        device: where runs are; "cuda:0", or the workspace's.
        workspace: a `Workspace` that is this plan's until another takes it; one is
            allocated (and grown) through cuda-python otherwise.
        stream: what the copies are ordered with.

    `backend` and `backend_reason` say what was chosen and why; `module` names the kernels;
    `plan_info` is what the planner returned; `workspace_size(...)` takes the same arguments.

    Raises `ArgumentError` and `ArgumentTypeError` before anything is copied or launched,
    `KernelNotFoundError` where the kernels in use lack the module.
    Upstream: flashinfer/prefill.py, csrc/batch_prefill.cu, csrc/batch_prefill_sm90.cu.
    """

    op = "BatchPrefillPlan"

    def __init__(
        self,
        qo_indptr: TensorLike,
        *,
        kv_indptr: TensorLike | None = None,
        paged_kv_indptr: TensorLike | None = None,
        paged_kv_indices: TensorLike | None = None,
        paged_kv_last_page_len: TensorLike | None = None,
        device: object = None,
        workspace: Workspace | None = None,
        stream: object = None,
        **options: Unpack[PrefillKeywords],
    ) -> None:
        super().__init__(device, workspace)
        self.options = chosen = PrefillOptions.of(options)
        self.backend, self.backend_reason = choose_backend(
            self.op, chosen.backend, chosen.kernel, self.device, chosen.use_custom_mask,
            chosen.page_size is not None,
        )  # fmt: skip
        self._check_backend_options()
        self.module = chosen.kernel.module(self.backend)
        self.geometry = chosen.geometry(self.machine)
        kind = self.backend + ("_fp8" if chosen.q_data_type in FP8 else "")
        self._families = BATCH_PREFILL_SINK if chosen.use_attention_sink else BATCH_PREFILL
        self._rows = in_use(self._families[kind], self.device)
        known = {name: getattr(chosen, name) for name in _KNOWN}
        kernel = chosen.kernel
        self._forms = [form_of(row, kernel, self.backend, known) for row in self._rows]
        self._templates = [
            Values(self.op, row, self.backend, {k: v[i] for k, v in self._families.items()})
            for i, row in enumerate(self._rows)
        ]
        paged = (paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len)
        batch = self._read((qo_indptr, kv_indptr, *paged))
        self._max_rows = chosen.max_total_num_rows or batch.rows
        self._max_indices = chosen.max_num_indices or batch.num_indices
        self._fill_template()
        if self.is_size_only:
            self.needs, self._placed, _ = self._need(batch)
        else:
            self._schedule(batch, stream)

    @classmethod
    def workspace_size(cls, qo_indptr: TensorLike, **arguments: Any) -> WorkspaceSize:
        """Bytes of the float and int workspaces that a plan of these arguments needs."""
        plan = cls(qo_indptr, workspace=SIZE_ONLY, **arguments)  # type: ignore[arg-type]
        return WorkspaceSize(plan.needs.float_bytes, plan._placed.end)

    def replan(
        self,
        qo_indptr: TensorLike,
        *,
        kv_indptr: TensorLike | None = None,
        paged_kv_indptr: TensorLike | None = None,
        paged_kv_indices: TensorLike | None = None,
        paged_kv_last_page_len: TensorLike | None = None,
        stream: object = None,
    ) -> None:
        """Plan another batch with the same options, in the same workspace.

        With CUDA graphs, in place: the arrays' addresses and the launch stay, and what would
        change them (another number of requests, more queries or pages than there is room
        for, a cache or mask smaller than the batch needs) is refused and changes nothing.
        """
        paged = (paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len)
        is_ragged = all(array is None for array in paged)
        if is_ragged and self.replan_again(qo_indptr, kv_indptr, stream):
            return
        batch = self._read((qo_indptr, kv_indptr, *paged))
        if self.options.enable_cuda_graph:
            self._check_replan(batch)
        self._schedule(batch, stream)

    def _check_backend_options(self) -> None:
        chosen = self.options
        if self.backend == "fa3":
            for name, value in (
                ("fixed_split_size", chosen.fixed_split_size),
                ("disable_split_kv", chosen.disable_split_kv or None),
            ):
                if value is not None:
                    expected = "its default, or backend='fa2': fa3 never splits requests"
                    raise self.refuse(name, value, expected)
        if chosen.use_multi_item_scoring and chosen.q_data_type in FP8:
            expected = "False: the kernels for fp8 queries lack it"
            raise self.refuse("use_multi_item_scoring", True, expected)

    def _check_replan(self, batch: Batch) -> None:
        self.check_batch_size("qo_indptr", batch.size, self._batch_size)
        if batch.pages is not None:
            self.check_room("pages", "paged_kv_indices", batch.pages.max_page + 1)
            self.check_room("page indices", "paged_kv_indptr", batch.num_indices)
        else:
            self.check_room("keys", "kv_indptr", batch.kv.total)
        if self.options.use_custom_mask:
            self.check_room("mask bytes", "qo_indptr", batch.mask_indptr[-1])
        self.check_has_indices("paged_kv_indices", batch.page_indices is not None)
        split = self._need(batch)[0].split
        if split != self.needs.split:
            got = f"requests {'split' if split else 'not split'}"
            expected = "as captured: fixed_split_size makes it depend on the lengths"
            raise self.refuse("fixed_split_size", got, expected)

    def _read(self, arrays: tuple[Any, ...]) -> Batch:
        chosen, (qo_indptr, kv_indptr, *paged) = self.options, arrays
        batch = Batch(self.op, chosen.page_size, qo_indptr, kv_indptr, tuple(paged))
        if chosen.causal:
            check_keys(self.op, batch.qo.counts, batch.kv_lens, "with causal=True")
        if chosen.pos_encoding_mode == "ROPE_LLAMA":
            why = "with pos_encoding_mode='ROPE_LLAMA'"
            check_keys(self.op, batch.qo.counts, batch.kv_lens, why)
        if chosen.use_multi_item_scoring:
            why = "with use_multi_item_scoring=True"
            check_keys(self.op, batch.qo.counts, batch.kv_lens, why)
        if chosen.use_custom_mask:
            batch.check_mask(self.op)
        return batch

    def _need(self, batch: Batch) -> tuple[sizes.Need, Arrays, bool]:
        graph = self.options.enable_cuda_graph
        if graph and batch.rows > self._max_rows:
            raise self.refuse("qo_indptr", f"{batch.rows} queries", f"{self._max_rows} at most")
        if graph and batch.num_indices > self._max_indices:
            expected = f"{self._max_indices} at most"
            raise self.refuse("paged_kv_indptr", f"{batch.num_indices} pages", expected)
        rooms = {"qo_indptr": batch.size + 1, "kv_indptr": batch.size + 1}
        if self.options.use_custom_mask:
            rooms["mask_indptr"] = batch.size + 1
        if batch.pages is not None:
            rooms["last_page_len"] = batch.size
        if batch.page_indices is not None:
            rooms["indices"] = index_room(self._max_indices if graph else batch.num_indices)
        if not (graph or self.is_size_only or self.geometry.fixed_split_size > 0):
            need = sizes.prefill_most(self.geometry, self.backend, batch.size, batch.rows)
            placed = self.place(need, batch.size, rooms)
            if self.is_room_for(need, placed):
                return need, placed, True
        size = sizes.prefill_fa3 if self.backend == "fa3" else sizes.prefill_fa2
        rows = self._max_rows if graph else batch.rows
        need = size(self.geometry, batch.qo.counts, batch.kv.counts, rows)
        return need, self.place(need, batch.size, rooms), False

    def _fill_template(self) -> None:
        """Set what is the same for every batch."""
        chosen = self.options
        self._templates[0].put(
            num_qo_heads=chosen.num_qo_heads, num_kv_heads=chosen.num_kv_heads,
            page_size=chosen.page_size or 1, enable_cuda_graph=chosen.enable_cuda_graph,
            head_dim_qk=chosen.head_dim_qk, head_dim_vo=chosen.head_dim_vo, causal=chosen.causal,
            window_left=chosen.window_left, fixed_split_size=chosen.fixed_split_size or -1,
            disable_split_kv=self.geometry.disable_split_kv, num_colocated_ctas=0,
        )  # fmt: skip

    def _schedule(self, batch: Batch, stream: object) -> None:
        need, placed, is_most = self._need(batch)
        graph, pages = self.options.enable_cuda_graph, batch.pages
        values = self._templates[0].fresh()
        rows = self._max_rows if graph else batch.rows
        values.put(
            qo_indptr=batch.qo.desc, kv_indptr=batch.kv.desc, total_num_rows=rows,
            batch_size=batch.size,
        )  # fmt: skip
        if values.has("kv_len_arr"):
            values.put(kv_len_arr=described_ints(host_ints(batch.kv_lens)))
        arrays = {"qo_indptr": batch.qo.view, "kv_indptr": batch.kv.view}
        if self.options.use_custom_mask:
            arrays["mask_indptr"] = host_ints(batch.mask_indptr)
        if pages is not None:
            arrays["last_page_len"] = pages.last_page_len.view
        if batch.page_indices is not None:
            arrays["indices"] = batch.page_indices
        given = values.values.copy()
        self.schedule(self._forms[0], given, arrays, need, placed, stream)
        if is_most:
            self.remember(batch, placed, values.values)
        self._batch_size, self._rows_now = batch.size, rows
        self._kv_total = batch.kv.total
        self._mask_bytes = batch.mask_indptr[-1] if self.options.use_custom_mask else 0
        self._num_indices = batch.num_indices
        self._max_page = pages.max_page if pages is not None else -1
