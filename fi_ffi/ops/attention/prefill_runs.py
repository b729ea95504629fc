"""The runs of a `BatchPrefillPlan`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fi_ffi.abi.interop import TensorLike, as_desc
from fi_ffi.ops.attention.options import choice, integer
from fi_ffi.ops.attention.plan import Plan
from fi_ffi.ops.attention.run import Values, only_with, softmax_scale
from fi_ffi.ops.form import Form
from fi_ffi.ops.row import KV_LAYOUTS

_RAGGED, _PAGED = 1, 2
# The tensors of a run, as the bindings call them.
_RAGGED_TENSORS = ("q", "k", "v", "o", "maybe_lse")
_PAGED_TENSORS = ("q", "paged_k_cache", "paged_v_cache", "o", "maybe_lse")


class PrefillRuns(Plan):
    """What is run of a batch that was planned."""

    _forms: Sequence[Form]
    _templates: Sequence[Values]
    # Of the batch that is planned: requests, rows of q, keys (or pages), bytes of its mask.
    _batch_size: int
    _rows_now: int
    _kv_total: int
    _mask_bytes: int

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
        key = (_RAGGED, kv_layout, *options, *options.values())
        tensors = (q, k, v, o, lse)
        if self.repeat(key, tensors, stream):
            return None
        if self.options.page_size not in (None, 1):
            expected = "paged_run, which this was planned for (page_size)"
            raise self.refuse("self", "ragged_run", expected)
        if self.options.use_multi_item_scoring:
            raise self.refuse("self", "ragged_run", "paged_run: only that has multi-item scoring")
        values = self._values(_RAGGED, q, o, lse, kv_layout, options)
        values.put(k=k, v=v, kv_indptr=self._descs["kv_indptr"])
        desc, axis = as_desc(k, self.op, "k"), 1 if kv_layout == "HND" else 0
        have = desc.shape[axis] if len(desc.shape) > axis else 0
        if have < self._kv_total:
            keys = f"{self._kv_total} keys at axis {axis} ({kv_layout})"
            raise self.refuse("k", desc.layout, f"{keys}, as planned, or more")
        values.room["keys"] = have
        form = self._forms[_RAGGED]
        made: None = self.launch(form, values, stream, _RAGGED_TENSORS, key, tensors)
        return made

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
        if self.options.page_size is None:
            raise self.refuse("self", "paged_run", "ragged_run, which this was planned for")
        key = (_PAGED, kv_layout, paged_kv_indices, *options, *options.values())
        tensors = (q, paged_k_cache, paged_v_cache, o, lse)
        if self.repeat(key, tensors, stream):
            return None
        values = self._values(_PAGED, q, o, lse, kv_layout, options)
        values.put(paged_k_cache=paged_k_cache, paged_v_cache=paged_v_cache)
        self.put_pages(values, paged_kv_indices, "paged_k_cache", kv_layout)
        form = self._forms[_PAGED]
        made: None = self.launch(form, values, stream, _PAGED_TENSORS, key, tensors)
        return made

    def _values(
        self, kind: int, q: Any, o: Any, lse: Any, kv_layout: str, options: dict[str, Any]
    ) -> Values:
        chosen = self.options
        values = self._templates[kind].fresh()
        self.put_workspace(values)
        choice(self.op, "kv_layout", kv_layout, tuple(KV_LAYOUTS))
        q = as_desc(q, self.op, "q")
        if not q.shape or q.shape[0] != self._rows_now:
            raise self.refuse("q", q.layout, f"{self._rows_now} rows, as planned")
        values.put(
            q=q, o=o, maybe_lse=lse, kv_layout=kv_layout,
            qo_indptr=self._descs["qo_indptr"], mask_mode_code=chosen.mask_mode,
            window_left=chosen.window_left, logits_soft_cap=chosen.logits_soft_cap,
        )  # fmt: skip
        self._apply(values, **options)
        return values

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
            need = integer(self.op, length, items[length], 0) * self._batch_size
            layout = as_desc(items[name], self.op, name).layout
            if layout.shape != (need,):
                expected = f"{need} positions: {length} for each of {self._batch_size} requests"
                raise self.refuse(name, layout, expected)

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
        values.room["mask bytes"] = have
        values.put(maybe_custom_mask=desc, maybe_mask_indptr=self._descs["mask_indptr"])


# What Python's own error for a wrong keyword calls the function.
PrefillRuns._apply.__qualname__ = "BatchPrefillPlan.paged_run"
