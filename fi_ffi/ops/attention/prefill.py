"""`BatchPrefillPlan`: attention of many queries per request over ragged or paged keys and
values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from fi_ffi.abi.interop import TensorLike, as_desc
from fi_ffi.errors import ArgumentError
from fi_ffi.loader.distributions import is_in
from fi_ffi.ops.attention import sizes
from fi_ffi.ops.attention.arrays import PAGES, Batch
from fi_ffi.ops.attention.backends import release_for
from fi_ffi.ops.attention.bind import BoundRow, RunNames
from fi_ffi.ops.attention.options import PrefillKeywords, PrefillOptions, check_keywords
from fi_ffi.ops.attention.plan import Plan
from fi_ffi.ops.attention.rows import FP4
from fi_ffi.ops.attention.values import OWN_STRIDES, Values, block_scales
from fi_ffi.ops.attention.workspace import Workspace
from fi_ffi.ops.call.arguments import check_int, shown
from fi_ffi.ops.call.row import Row

if TYPE_CHECKING:
    from typing_extensions import Unpack

# Kinds of run: indices into a family's rows after the planner's.
_RAGGED, _PAGED = 0, 1
_RAGGED_NAMES = {"qo_indptr": "qo_indptr", "kv_indptr": "kv_indptr"}
_PAGED_NAMES = {"qo_indptr": "qo_indptr"} | {array: name for name, array in PAGES.items()}
# Arguments of runs that the plan's options require: of an option, and what it takes.
_PLANNED = {
    "sink": ("use_attention_sink", "a tensor"),
    "custom_mask": ("use_custom_mask", "a tensor"),
    "prefix_len_ptr": ("use_multi_item_scoring", "a value"),
    "token_pos_in_items_ptr": ("use_multi_item_scoring", "a value"),
    "token_pos_in_items_len": ("use_multi_item_scoring", "a value"),
    "max_item_len_ptr": ("use_multi_item_scoring", "a value"),
}
_SCALES = ("sm_scale", "q_scale", "k_scale", "v_scale")
_POSITIONS = ("rope_scale", "rope_theta", "alibi_slopes")
RUN_OPTIONS = (*_SCALES, *_POSITIONS, "enable_pdl", *_PLANNED)


class BatchPrefillPlan(Plan):
    """Attention of a batch of requests, planned once on the host and run for every layer.

    Each request has its own number of queries and of keys. Keys and values are ragged (one request
    after another, `kv_indptr`) or paged (`paged_kv_indptr`, `paged_kv_indices`,
    `paged_kv_last_page_len` and `page_size`). All index arrays are int32 **on the host**. The plan
    checks them and copies them to the device on `stream`; it copies nothing back.

    Args:
        qo_indptr: [b+1] where each request's queries start; the last entry is their number.
        kv_indptr: [b+1] where each request's keys start, for `ragged_run`.
        paged_kv_indptr: [b+1] where each request's pages start in `paged_kv_indices`.
        paged_kv_indices: [paged_kv_indptr[-1] or more] pages of the cache; None if each run passes
            them on the device, where fi_ffi cannot check them.
        paged_kv_last_page_len: [b] tokens in each request's last page: 1 to `page_size`.
        num_qo_heads: heads of q: a multiple of num_kv_heads.
        num_kv_heads: heads of k and v.
        head_dim_qk: size of a head of q and k.
        q_data_type ('float16' by default): dtype of q.
        kv_data_type: dtype of k and v, that of q if None; uint8 for NVFP4, two values a byte.
        o_data_type: dtype of the output, that of q if None (float16 if q is fp8); decode can write
            fp8.
        window_left (-1 by default): keys before its own that a query sees; -1 for all.
        logits_soft_cap (0.0 by default): c > 0 makes logits `c * tanh(logits / c)`.
        pos_encoding_mode ('NONE' by default): "NONE", "ROPE_LLAMA" or "ALIBI", applied in the
            kernel.
        causal (False by default): query i of a request sees keys up to `kv_len - qo_len + i`.
        backend ('auto' by default): "auto" (as FlashInfer: fa3 on SM90 if it can serve), "fa2" or
            "fa3".
        max_total_num_rows: with CUDA graphs, the most queries of a replan; this batch's if None.
        enable_cuda_graph (False by default): keep the arrays' addresses and the launch through
            `replan(...)`, so that a captured run stays valid for other lengths of as many requests.
        max_num_indices: with CUDA graphs, the most pages of a replan; this batch's if None.
        head_dim_vo: size of a head of v and the output; head_dim_qk if None.
        page_size: tokens in a page; None for ragged keys.
        use_fp16_qk_reduction (False by default): sum q @ k in float16 (fa2, float16 queries).
        use_custom_mask (False by default): each run passes a mask (`pack_custom_mask`); fa2.
        use_multi_item_scoring (False by default): each run passes prefix and item lengths; the mask
            is causal as well.
        use_attention_sink (False by default): each run passes `sink`, one more logit in each head's
            softmax (GPT-OSS).
        fixed_split_size: split requests among blocks in pieces of this many pages, so that results
            do not depend on the batch; fa2.
        disable_split_kv (False by default): do not split requests among blocks; fa2.
        num_colocated_ctas (0 by default): blocks of another kernel that runs at the same time,
            subtracted from the pieces that requests are split in; fa2.
        uniform_q_len (0 by default): with CUDA graphs, the number of queries if all requests of all
            batches have the same, which sets the tile size; 0 for any; fa2, FlashInfer 0.6.16 and
            later.
        device: where runs happen; "cuda:0", or the workspace's device.
        workspace: a `Workspace`, which this plan owns until another plan takes it; by default
            fi_ffi allocates one and grows it.
        stream: the stream on which the arrays are copied.

    `backend` and `backend_reason` name the chosen kernels and why; `module` is their module;
    `plan_info` is the planner's result; `workspace_size(...)` takes the same arguments and returns
    bytes.

    Raises `ArgumentError` and `ArgumentTypeError` before anything is copied or launched, and
    `KernelNotFoundError` if the kernels in use lack the module.
    Upstream: flashinfer/prefill.py, csrc/batch_prefill.cu, csrc/batch_prefill_sm90.cu.
    """

    op = "BatchPrefillPlan"
    _options_class = PrefillOptions
    _run_methods: Sequence[str] = ("ragged_run", "paged_run")
    _run_names = RunNames(
        _RAGGED_NAMES | PAGES | {"maybe_mask_indptr": "mask_indptr"},
        first=("q", "k", "v", "paged_k_cache", "paged_v_cache", "o", "maybe_lse", "kv_layout"),
    )

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
        paged = paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len
        super().__init__((qo_indptr, kv_indptr, *paged), device, workspace, stream, options)

    def replan(
        self,
        qo_indptr: TensorLike,
        *,
        kv_indptr: TensorLike | None = None,
        paged_kv_indptr: TensorLike | None = None,
        paged_kv_indices: TensorLike | None = None,
        paged_kv_last_page_len: TensorLike | None = None,
        stream: object = None,
        **others: TensorLike | None,
    ) -> None:
        """Plan another batch with the same options, in the same workspace.

        `others` are arrays by FlashInfer's other names.

        With CUDA graphs the arrays' addresses and the launch stay. A batch that would change them
        is refused and changes nothing: another number of requests, more queries or pages than
        reserved, or more keys or mask bytes than captured runs were given.
        """
        arrays = qo_indptr, kv_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len
        self._replan_batch(arrays, stream, others)

    def _other_rows(self, kind: int) -> Mapping[str, Row]:
        return {backend: rows[1 + kind] for backend, rows in self.options.rows.items()}

    def _facts(self) -> dict[str, Any]:
        mask = {"mask_mode_code": self.options.mask_mode}
        return {"uniform_q_len": 0} | super()._facts() | mask

    @cached_property
    def _names(self) -> Mapping[str, str]:  # type: ignore[override]
        return _RAGGED_NAMES if self.options.page_size is None else _PAGED_NAMES

    def _read(self, arrays: Sequence[object]) -> Batch:
        chosen, (qo_indptr, kv_indptr, indptr, indices, lasts) = self.options, arrays
        is_ragged = chosen.page_size is None
        no_pages = indptr is None and indices is None and lasts is None
        if is_ragged and kv_indptr is not None and no_pages:
            batch = super()._read((qo_indptr, kv_indptr))
        elif not is_ragged and kv_indptr is None and indptr is not None is not lasts:
            batch = super()._read((qo_indptr, indptr, indices, lasts))
        else:
            raise self._misplaced(arrays)
        if self._why_keys:
            batch.check_keys(self._why_keys)
        if chosen.use_custom_mask:
            batch.use_mask()
        if chosen.uniform_q_len and {*batch.qo_lens} != {chosen.uniform_q_len}:
            got = f"{min(batch.qo_lens)} to {max(batch.qo_lens)} queries a request"
            expected = f"{chosen.uniform_q_len} of each, as uniform_q_len says"
            raise self._refuse("qo_indptr", got, expected)
        return batch

    def _misplaced(self, arrays: Sequence[object]) -> ArgumentError:
        """Make the error for the first array that is missing, or has no place in this plan."""
        is_ragged = self.options.page_size is None
        for name, array in zip(("kv_indptr", *PAGES), arrays[1:], strict=True):
            is_read = (name == "kv_indptr") == is_ragged
            if array is not None and not is_read:
                word = "without" if is_ragged else "with"
                return self._refuse(name, "an array", f"None {word} page_size")
            if array is None and is_read and name != "paged_kv_indices":
                break
        how = "; a paged cache comes" if is_ragged else ""
        return self._refuse(name, None, f"an array{how} with page_size")

    @cached_property
    def _why_keys(self) -> str:
        """With which option each request needs as many keys as queries; "" for none."""
        chosen = self.options
        if chosen.causal:
            return "with causal=True"
        if chosen.pos_encoding_mode == "ROPE_LLAMA":
            return "with pos_encoding_mode='ROPE_LLAMA' (docs/attention.md)"
        return "with use_multi_item_scoring=True" if chosen.use_multi_item_scoring else ""

    def _need_at_most(self, batch: Batch) -> sizes.Need | None:
        g, size, rows = self._geometry, batch.size, batch.rows
        if g.fixed_split_size > 0:
            return None
        kind = sizes.prefill_kind(g, self.backend, size, rows)
        most_size, most_rows, need = self._most.get(kind, (0, 0, None))
        if size > most_size or rows > most_rows:
            need = sizes.prefill_most(g, self.backend, size, rows)
            self._most[kind] = size, rows, need
        return need  # type: ignore[no-any-return]

    def _exact_need(self, batch: Batch) -> sizes.Need:
        size = sizes.prefill_fa3 if self.backend == "fa3" else sizes.prefill_fa2
        return size(self._geometry, batch.qo_lens, batch.kv.counts, batch.room_for_rows)

    def _check_same_launch(self, batch: Batch) -> None:
        split = self._need(batch)[0].split
        if split != self._needs.split:
            got = f"requests {'split' if split else 'not split'}"
            expected = "as captured: fixed_split_size makes it depend on the lengths"
            raise self._refuse("fixed_split_size", got, expected)

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
        k_cache_sf: TensorLike | None = None,
        v_cache_sf: TensorLike | None = None,
        stream: object = None,
        **options: Any,
    ) -> None:
        """Compute the attention of `q` over ragged `k` and `v` into `o`, on `stream`.

        Args:
            q: [qo_indptr[-1], num_qo_heads, head_dim_qk]; with CUDA graphs [max_total_num_rows,
                ...], as for `o` and `lse`.
            k: [kv_indptr[-1] or more, num_kv_heads, head_dim_qk], or with "HND" [num_kv_heads,
                tokens, head_dim_qk].
            v: as k, with head_dim_vo.
            o: [rows of q, num_qo_heads, head_dim_vo], written.
            lse: [rows of q, num_qo_heads] float32, written: log2 of the sum of exponentials.
            k_cache_sf, v_cache_sf, options: see `paged_run`.
        """
        if self.options.page_size not in (None, 1):
            expected = "paged_run, which this was planned for (page_size)"
            raise self._refuse("self", "ragged_run", expected)
        if self.options.use_multi_item_scoring:
            raise self._refuse("self", "ragged_run", "paged_run: only that has multi-item scoring")
        bound = self._bound_run(_RAGGED, False)
        if self._needs_options or options or not k_cache_sf is v_cache_sf is None:
            values = self._values(bound, q, o, lse, kv_layout, options)
            dtype = self.options.kv_data_type
            block_scales(values, dtype, {"k": k, "v": v}, k_cache_sf, v_cache_sf)
            values.put(k=k, v=v)
            frame = bound.pack(bound, *values.values)
        else:
            frame = bound.pack(bound, q, k, v, o, lse, kv_layout)
        self._run_packed(bound, frame, stream)

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
        k_cache_sf: TensorLike | None = None,
        v_cache_sf: TensorLike | None = None,
        stream: object = None,
        **options: Any,
    ) -> None:
        """Compute the attention of `q` over the pages of a cache into `o`, on `stream`.

        Args:
            q, o, lse: as in `ragged_run`.
            paged_k_cache: [num_pages, page_size, num_kv_heads, head_dim_qk], or with "HND"
                [num_pages, num_kv_heads, page_size, head_dim_qk].
            paged_v_cache: as paged_k_cache, with head_dim_vo and the same strides. For one tensor
                that has both see `split_paged_kv_cache`.
            paged_kv_indices: the pages, int32 on the device, if the plan has none.
            sm_scale: factor of q @ k; 1 / sqrt(head_dim_qk) by default.
            rope_scale, rope_theta: with "ROPE_LLAMA"; 1 and 10000 by default.
            alibi_slopes: [num_qo_heads] float32, with "ALIBI".
            custom_mask: [bytes] uint8 with `use_custom_mask`: see `pack_custom_mask`.
            prefix_len_ptr: [b] uint32 with `use_multi_item_scoring`: tokens of each prefix.
            token_pos_in_items_ptr: [positions] uint16 with `use_multi_item_scoring`: one position
                for each token after the prefix. Those of request i start at `i *
                token_pos_in_items_len`. Without CUDA graphs the array may end early: the last
                request needs at least one position for each of its queries, which suffices if its
                prefix is all keys before them.
            token_pos_in_items_len: int with `use_multi_item_scoring`: positions for each request.
            max_item_len_ptr: [b] uint16 with `use_multi_item_scoring`: tokens of the longest item.
            sink: [num_qo_heads] float32 with `use_attention_sink`.
            q_scale, k_scale, v_scale: factors of q, k and v: numbers, or with fp8 queries also
                [heads] float32. fa2 has no `v_scale`.
            k_cache_sf, v_cache_sf: scales of NVFP4 keys and values (`kv_data_type` uint8, head_dim
                / 2 bytes a head): float8_e4m3fn, one for 16 elements. The shape is that of the keys
                (values) with a last axis of head_dim / 16, and strides are an eighth of theirs
                (those of pages may differ, from FlashInfer 0.6.15 on). Pass the scale of the whole
                key tensor as `k_scale`; multiply the output by that of the values.
            enable_pdl: programmatic dependent launch (SM90 and later).
        """
        if self.options.page_size is None:
            raise self._refuse("self", "paged_run", "ragged_run, which this was planned for")
        has_indices = self._check_indices("paged_kv_indices", paged_kv_indices)
        bound = self._bound_run(_PAGED, has_indices)
        is_plain = has_indices and not options and k_cache_sf is v_cache_sf is None
        if self._needs_options or not is_plain:
            values = self._values(bound, q, o, lse, kv_layout, options)
            caches = {"paged_k_cache": paged_k_cache, "paged_v_cache": paged_v_cache}
            dtype, own = self.options.kv_data_type, self._have_own_strides
            block_scales(values, dtype, caches, k_cache_sf, v_cache_sf, own)
            values.put(**caches, paged_kv_indices=paged_kv_indices)
            frame = bound.pack(bound, *values.values)
        else:
            frame = bound.pack(bound, q, paged_k_cache, paged_v_cache, o, lse, kv_layout)
        self._run_packed(bound, frame, stream)

    @cached_property
    def _have_own_strides(self) -> bool:
        """Whether the kernels address the scales of pages by the scales' own strides."""
        of = release_for(self.device)
        return of is None or is_in(of, OWN_STRIDES)

    def _values(
        self, bound: BoundRow, q: Any, o: Any, lse: Any, kv_layout: str, options: dict[str, Any]
    ) -> Values:
        values = bound.template.fresh()
        if options or self._needs_options:
            self._apply(values, options)
        values.put(q=q, o=o, maybe_lse=lse, kv_layout=kv_layout)
        return values

    @cached_property
    def _needs_options(self) -> bool:
        """Whether the plan's options require an argument of every run."""
        planned = [getattr(self.options, option) for option, _ in _PLANNED.values()]
        has_alibi = self.options.pos_encoding_mode == "ALIBI"
        return any(planned) or has_alibi or self.options.kv_data_type in FP4

    def _fill_defaults(self, values: Values) -> None:
        if not self._needs_options:
            self._apply(values, {})

    def _apply(self, values: Values, options: Mapping[str, Any]) -> None:
        """Set the options of a run."""
        check_keywords("BatchPrefillPlan.paged_run", RUN_OPTIONS, options)
        chosen = self.options
        values.scales(chosen.head_dim_qk, *map(options.get, _SCALES))
        values.positions(chosen.pos_encoding_mode, *map(options.get, _POSITIONS))
        values.put(enable_pdl=options.get("enable_pdl", False))
        for name, (option, what) in _PLANNED.items():
            value, is_planned = options.get(name), getattr(chosen, option)
            if (value is not None) != is_planned:
                expected = f"{what if is_planned else 'None'}: this was planned with "
                raise self._refuse(name, shown(value), f"{expected}{option}={is_planned}")
            values.option(name, value)
        if chosen.use_custom_mask:
            self._put_mask(values, options["custom_mask"])
        if chosen.use_multi_item_scoring:
            self._check_items(options)

    def _check_items(self, options: Mapping[str, Any]) -> None:
        length, name = "token_pos_in_items_len", "token_pos_in_items_ptr"
        each = check_int(self.op, length, options[length], 0)
        last, requests = self._batch.qo_lens[-1], self._batch.size
        most, least = each * requests, each * (requests - 1)
        least += each if self.options.enable_cuda_graph else min(last, each)
        desc = as_desc(options[name], self.op, name)
        if len(desc.shape) != 1 or not least <= desc.shape[0] <= most:
            expected = f"{most} positions: {length} for each of {requests} requests"
            if least < most:
                expected += f", or {least} and more: the last has {last} queries"
            raise self._refuse(name, desc.layout, expected)

    def _put_mask(self, values: Values, custom_mask: Any) -> None:
        need = self._batch.views["mask_indptr"][-1]
        desc = as_desc(custom_mask, self.op, "custom_mask")
        have = desc.shape[0] if len(desc.shape) == 1 else -1
        if have != need and not (self.options.enable_cuda_graph and have > need):
            expected = f"{need} bytes, as the lengths say: see pack_custom_mask"
            raise self._refuse("custom_mask", desc.layout, expected)
        values.put(maybe_custom_mask=desc)
