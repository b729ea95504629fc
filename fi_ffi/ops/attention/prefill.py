"""`BatchPrefillPlan`: attention of many queries a request, over ragged or paged keys and values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from fi_ffi.abi.interop import TensorLike, as_desc
from fi_ffi.ops.attention import sizes
from fi_ffi.ops.attention.arrays import (
    Arrays,
    Batch,
    check_keys,
    described_ints,
    host_ints,
)
from fi_ffi.ops.attention.options import choose_backend, in_use
from fi_ffi.ops.attention.plan import SIZE_ONLY, BoundRow, Plan, WorkspaceSize
from fi_ffi.ops.attention.rows import BATCH_PREFILL, BATCH_PREFILL_SINK, FP8
from fi_ffi.ops.attention.run import Values, only_with, softmax_scale
from fi_ffi.ops.attention.spec import PrefillOptions
from fi_ffi.ops.attention.workspace import Workspace
from fi_ffi.ops.call.arguments import check_int
from fi_ffi.ops.row import Row

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from fi_ffi.ops.attention.keywords import PrefillKeywords

# Kinds of run, by their place among a family's rows without the planner's.
_RAGGED, _PAGED = 0, 1


class BatchPrefillPlan(Plan):
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
    run_arrays: Mapping[str, str] = {
        "qo_indptr": "qo_indptr", "kv_indptr": "kv_indptr", "paged_kv_indptr": "kv_indptr",
        "paged_kv_indices": "indices", "paged_kv_last_page_len": "last_page_len",
        "maybe_mask_indptr": "mask_indptr",
    }  # fmt: skip
    run_not_less: ClassVar = {
        _RAGGED: (("nnz_kv", "planned_keys"),),
        _PAGED: (("num_pages", "planned_pages"), ("num_indices", "planned_indices")),
    }
    # Of the batch that is planned: keys (or pages), and bytes of its mask.
    _kv_total: int
    _mask_bytes: int

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
        planner, *self._run_rows = in_use(self._families[kind], self.device)
        self.bind_planner(planner, chosen.kernel)
        paged = (paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len)
        batch = self._read((qo_indptr, kv_indptr, *paged))
        self._max_rows = chosen.max_total_num_rows or batch.rows
        self._max_indices = chosen.max_num_indices or batch.num_indices
        self._fill_template()
        if self.is_size_only:
            self.needs, self._placed = self._need(batch)
        else:
            self._schedule(batch, stream)

    @classmethod
    def workspace_size(cls, qo_indptr: TensorLike, **arguments: Any) -> WorkspaceSize:
        """Bytes of the float and int workspaces that a plan of these arguments needs."""
        plan = cls(qo_indptr, workspace=SIZE_ONLY, **arguments)
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

    def _need(self, batch: Batch) -> tuple[sizes.Need, Arrays]:
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
            rooms["indices"] = self._max_indices if graph else batch.num_indices
        if not (graph or self.is_size_only or self.geometry.fixed_split_size > 0):
            need = sizes.prefill_most(self.geometry, self.backend, batch.size, batch.rows)
            placed = self.place(need, batch.size, rooms)
            if self.is_room_for(need, placed):
                return need, placed
        size = sizes.prefill_fa3 if self.backend == "fa3" else sizes.prefill_fa2
        rows = self._max_rows if graph else batch.rows
        need = size(self.geometry, batch.qo.counts, batch.kv.counts, rows)
        return need, self.place(need, batch.size, rooms)

    def _fill_template(self) -> None:
        """Set what is the same for every batch."""
        chosen, planner = self.options, self._planner
        for name in ("num_qo_heads", "num_kv_heads", "enable_cuda_graph", "head_dim_qk",
                     "head_dim_vo", "causal", "window_left"):  # fmt: skip
            planner.put(name, getattr(chosen, name))
        planner.put("page_size", chosen.page_size or 1)
        planner.put("fixed_split_size", chosen.fixed_split_size or -1)
        planner.put("disable_split_kv", self.geometry.disable_split_kv)
        for name in ("num_colocated_ctas", "uniform_q_len"):
            planner.put(name, 0)

    def _schedule(self, batch: Batch, stream: object) -> None:
        need, placed = self._need(batch)
        graph, pages = self.options.enable_cuda_graph, batch.pages
        rows = self._max_rows if graph else batch.rows
        given = {
            "qo_indptr": batch.qo.desc, "kv_indptr": batch.kv.desc, "total_num_rows": rows,
            "batch_size": batch.size,
        }  # fmt: skip
        if "kv_len_arr" in self._planner.template.index:
            given["kv_len_arr"] = described_ints(host_ints(batch.kv_lens))
        arrays = {"qo_indptr": batch.qo.view, "kv_indptr": batch.kv.view}
        if self.options.use_custom_mask:
            arrays["mask_indptr"] = host_ints(batch.mask_indptr)
        if pages is not None:
            arrays["last_page_len"] = pages.last_page_len.view
        if batch.page_indices is not None:
            arrays["indices"] = batch.page_indices
        self._batch = batch
        self.schedule(given, arrays, need, placed, stream)

    def _batch_now(self) -> None:
        batch, graph, pages = self._batch, self.options.enable_cuda_graph, self._batch.pages
        self._batch_size, self._rows_now = batch.size, self._max_rows if graph else batch.rows
        self._kv_total = batch.kv.total
        self._mask_bytes = batch.mask_indptr[-1] if self.options.use_custom_mask else 0
        self._num_indices = batch.num_indices
        self._max_page = pages.max_page if pages is not None else -1

    # Runs.

    def ragged_run(
        self,
        q: TensorLike,
        k: TensorLike,
        v: TensorLike,
        o: TensorLike,
        lse: TensorLike | None = None,
        *,
        kv_layout: str = "NHD",
        stream: object = None,
        **options: Any,
    ) -> None:
        """Attention of `q` over ragged `k` and `v` into `o`, on `stream`.

        Args:
            q: [qo_indptr[-1], num_qo_heads, head_dim_qk]; with CUDA graphs
                [max_total_num_rows, ...], as for `o` and `lse`.
            k: [kv_indptr[-1] or more, num_kv_heads, head_dim_qk], or with "HND" the
                first two axes exchanged; v: the same with head_dim_vo.
            o: [rows of q, num_qo_heads, head_dim_vo], written.
            lse: [rows of q, num_qo_heads] float32, written: log2 of the sum of exponentials.
            options: see `paged_run`.
        """
        bound, values = self._ragged_run_arguments(q, k, v, o, lse, kv_layout, **options)
        self.run_packed(bound, values, stream)

    def _ragged_run_arguments(
        self, q: Any, k: Any, v: Any, o: Any, lse: Any = None, kv_layout: str = "NHD",
        **options: Any,
    ) -> tuple[BoundRow, Sequence[Any]]:  # fmt: skip
        """The row of a ragged run, and what it is given."""
        if self.options.page_size not in (None, 1):
            expected = "paged_run, which this was planned for (page_size)"
            raise self.refuse("self", "ragged_run", expected)
        if self.options.use_multi_item_scoring:
            raise self.refuse("self", "ragged_run", "paged_run: only that has multi-item scoring")
        bound = self.bound_run(_RAGGED, False)
        values = self._values(bound, q, o, lse, kv_layout, options)
        values.put(k=k, v=v)
        return bound, values.values

    def paged_run(
        self,
        q: TensorLike,
        paged_k_cache: TensorLike,
        paged_v_cache: TensorLike,
        o: TensorLike,
        lse: TensorLike | None = None,
        *,
        kv_layout: str = "NHD",
        paged_kv_indices: TensorLike | None = None,
        stream: object = None,
        **options: Any,
    ) -> None:
        """Attention of `q` over the pages of a cache into `o`, on `stream`.

        Args:
            q, o, lse: as in `ragged_run`.
            paged_k_cache: [num_pages, page_size, num_kv_heads, head_dim_qk], or with "HND"
                the middle axes exchanged; paged_v_cache: the same with head_dim_vo and the
                same strides.  For one tensor of both see `split_paged_kv_cache`.
            paged_kv_indices: the pages on the device, where the plan was given none.
            sm_scale: q @ k is multiplied by it; 1 / sqrt(head_dim_qk) by default.
            rope_scale, rope_theta: of "ROPE_LLAMA"; 1 and 10000 by default.
            alibi_slopes: [num_qo_heads] float32, with "ALIBI".
            custom_mask: [bytes] uint8 with `use_custom_mask`: see `pack_custom_mask`.
            prefix_len_ptr, token_pos_in_items_ptr, token_pos_in_items_len,
            max_item_len_ptr: with `use_multi_item_scoring`: [b] uint32, [b *
                token_pos_in_items_len] uint16, int, [b] uint16.
            sink: [num_qo_heads] float32 with `use_attention_sink`.
            q_scale, k_scale, v_scale: numbers that q, k and v are multiplied by; with fp8
                queries also [heads] float32.  fa2 has no `v_scale`.
            enable_pdl: programmatic dependent launch (SM90 and later).
        """
        bound, values = self._paged_run_arguments(
            q, paged_k_cache, paged_v_cache, o, lse, kv_layout, paged_kv_indices, **options
        )
        self.run_packed(bound, values, stream)

    def _paged_run_arguments(
        self, q: Any, paged_k_cache: Any, paged_v_cache: Any, o: Any, lse: Any = None,
        kv_layout: str = "NHD", paged_kv_indices: Any = None, **options: Any,
    ) -> tuple[BoundRow, Sequence[Any]]:  # fmt: skip
        """The row of a paged run, and what it is given."""
        if self.options.page_size is None:
            raise self.refuse("self", "paged_run", "ragged_run, which this was planned for")
        has_indices = self.check_indices("paged_kv_indices", paged_kv_indices)
        bound = self.bound_run(_PAGED, has_indices)
        values = self._values(bound, q, o, lse, kv_layout, options)
        values.put(
            paged_k_cache=paged_k_cache, paged_v_cache=paged_v_cache,
            paged_kv_indices=paged_kv_indices,
        )  # fmt: skip
        return bound, values.values

    def _values(
        self, bound: BoundRow, q: Any, o: Any, lse: Any, kv_layout: str, options: dict[str, Any]
    ) -> Values:
        values = bound.template.fresh()
        if options or self._needs_options:
            self._apply(values, **options)
        values.put(q=q, o=o, maybe_lse=lse, kv_layout=kv_layout)
        return values

    @property
    def _needs_options(self) -> bool:
        """Whether every run brings something that the plan's options ask for."""
        chosen = self.options
        return bool(
            chosen.pos_encoding_mode == "ALIBI" or chosen.use_custom_mask
            or chosen.use_attention_sink or chosen.use_multi_item_scoring
        )  # fmt: skip

    def fill_defaults(self, values: Values) -> None:
        if not self._needs_options:
            self._apply(values)

    def other_rows(self, kind: int) -> Mapping[str, Row]:
        return {backend: rows[1 + kind] for backend, rows in self._families.items()}

    def run_constants(self) -> dict[str, Any]:
        chosen = self.options
        return {
            "window_left": chosen.window_left, "logits_soft_cap": chosen.logits_soft_cap,
            "mask_mode_code": chosen.mask_mode,
        }  # fmt: skip

    def run_known(self) -> tuple[str, ...]:
        return (
            "nnz_qo", "b", "num_qo_heads", "num_kv_heads", "head_dim_qk", "head_dim_vo",
            "page_size", "planned_keys", "planned_pages", "planned_indices",
        )  # fmt: skip

    def run_sizes(self) -> Sequence[int]:
        chosen = self.options
        return (
            self._rows_now, self._batch_size, chosen.num_qo_heads, chosen.num_kv_heads,
            chosen.head_dim_qk, chosen.head_dim_vo or chosen.head_dim_qk, chosen.page_size or 1,
            self._kv_total, self._max_page + 1, self._num_indices,
        )  # fmt: skip

    def _apply(
        self,
        values: Values,
        *,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        alibi_slopes: TensorLike | None = None,
        custom_mask: TensorLike | None = None,
        prefix_len_ptr: TensorLike | None = None,
        token_pos_in_items_ptr: TensorLike | None = None,
        token_pos_in_items_len: int | None = None,
        max_item_len_ptr: TensorLike | None = None,
        sink: TensorLike | None = None,
        q_scale: TensorLike | float | None = None,
        k_scale: TensorLike | float | None = None,
        v_scale: TensorLike | float | None = None,
        enable_pdl: bool = False,
    ) -> None:
        """The options of a run."""
        chosen = self.options
        scale = softmax_scale(self.op, sm_scale, chosen.head_dim_qk)
        for of, value in (("q", q_scale), ("k", k_scale), ("v", v_scale)):
            scale = values.scale(of, value, scale)
        values.put(sm_scale=scale, enable_pdl=enable_pdl)
        values.positions(chosen.pos_encoding_mode, rope_scale, rope_theta, alibi_slopes)
        only_with(self.op, "sink", sink, "use_attention_sink", chosen.use_attention_sink)
        values.put(sink=sink)
        self._apply_mask(values, custom_mask)
        items = {
            "prefix_len_ptr": prefix_len_ptr,
            "token_pos_in_items_ptr": token_pos_in_items_ptr,
            "token_pos_in_items_len": token_pos_in_items_len,
            "max_item_len_ptr": max_item_len_ptr,
        }
        self._apply_items(values, items)

    def _apply_items(self, values: Values, items: dict[str, Any]) -> None:
        is_planned = self.options.use_multi_item_scoring
        for name, value in items.items():
            only_with(self.op, name, value, "use_multi_item_scoring", is_planned, "a value")
            values.option(name, value)
        if is_planned:
            length, name = "token_pos_in_items_len", "token_pos_in_items_ptr"
            need = check_int(self.op, length, items[length], 0) * self._batch_size
            desc = as_desc(items[name], self.op, name)
            if desc.shape != (need,):
                expected = f"{need} positions: {length} for each of {self._batch_size} requests"
                raise self.refuse(name, desc.layout, expected)

    def _apply_mask(self, values: Values, custom_mask: Any) -> None:
        is_planned = self.options.use_custom_mask
        only_with(self.op, "custom_mask", custom_mask, "use_custom_mask", is_planned)
        if not is_planned:
            return
        desc, need = as_desc(custom_mask, self.op, "custom_mask"), self._mask_bytes
        have = desc.shape[0] if len(desc.shape) == 1 else -1
        if have != need and not (self.options.enable_cuda_graph and have > need):
            expected = f"{need} bytes, as the lengths say: see pack_custom_mask"
            raise self.refuse("custom_mask", desc.layout, expected)
        values.put(maybe_custom_mask=desc)


# What Python's own error for a wrong keyword calls the function.
BatchPrefillPlan._apply.__qualname__ = "BatchPrefillPlan.paged_run"
