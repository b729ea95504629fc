"""`BatchDecodePlan`: attention of one query per request over a paged cache."""

from __future__ import annotations

import numbers
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fi_ffi.abi.interop import TensorLike
from fi_ffi.abi.tensor import TensorDesc
from fi_ffi.ops.attention import sizes
from fi_ffi.ops.attention.arrays import PAGES, Batch, host_ints, int32_array
from fi_ffi.ops.attention.bind import RunNames
from fi_ffi.ops.attention.options import DecodeKeywords, DecodeOptions
from fi_ffi.ops.attention.plan import Plan
from fi_ffi.ops.attention.values import Values
from fi_ffi.ops.attention.workspace import Workspace
from fi_ffi.ops.call.arguments import INT32_MAX, check_int, shown

if TYPE_CHECKING:
    from typing_extensions import Unpack

# Indices into `DecodePlanInfo::ToVector` (scheduler.cuh).
_PADDED_BATCH_SIZE, _KV_CHUNK_SIZE_OFFSET = 0, 7
# The binding takes two tensors for their dtypes alone, and does not use the dtypes either.
_NOTHING = TensorDesc(256, (0,), "uint8", device="cpu")


class BatchDecodePlan(Plan):
    """Attention of one query per request over a paged cache, planned once for all layers.

    The kernels use no tensor cores and read keys and values once, so they are fastest if few query
    heads share a key head. The ratio of query heads to key heads is 1, 2, 3, 4 or 8, from
    FlashInfer 0.6.18 on also 6, and from 0.7.1 on also 16. For other ratios, or large ones, use
    `BatchPrefillPlan` with `qo_indptr = range(b + 1)`, which runs on tensor cores.

    Args:
        indptr: [b+1] int32 on the host: where each request's pages start in `indices`; or the
            number b of requests, for a plan of any lengths.
        indices: [indptr[-1] or more] int32 on the host: pages of the cache; None if each run passes
            them on the device, where fi_ffi cannot check them.
        last_page_len: [b] int32 on the host: tokens in each request's last page, 1 to `page_size`;
            None for a plan of any lengths.
        num_qo_heads: heads of q: a multiple of num_kv_heads.
        num_kv_heads: heads of k and v.
        q_data_type ('float16' by default): dtype of q.
        kv_data_type: dtype of k and v, that of q if None; uint8 for NVFP4, two values a byte.
        o_data_type: dtype of the output, that of q if None (float16 if q is fp8); decode can write
            fp8.
        window_left (-1 by default): keys before its own that a query sees; -1 for all.
        logits_soft_cap (0.0 by default): c > 0 makes logits `c * tanh(logits / c)`.
        pos_encoding_mode ('NONE' by default): "NONE", "ROPE_LLAMA" or "ALIBI", applied in the
            kernel.
        enable_cuda_graph (False by default): keep the arrays' addresses and the launch through
            `replan(...)`, so that a captured run stays valid for other lengths of as many requests.
        max_num_indices: with CUDA graphs, the most pages of a replan; this batch's if None.
        head_dim: size of a head.
        page_size: tokens in a page.
        device, workspace, stream: as in `BatchPrefillPlan`.

    A plan of any lengths, `BatchDecodePlan(b, None, None, ...)`, is made once: each run takes the
    three arrays on the device, so that a captured run reads the lengths of its replay. Such a plan
    splits no request. One block attends for a request and key head, so pass the parts of a long
    request as requests, and merge their outputs by `lse` (`merge_states`).

    Raises `ArgumentError` and `ArgumentTypeError` before anything is copied or launched, and
    `KernelNotFoundError` if the kernels in use lack the module.
    Upstream: flashinfer/decode.py, csrc/batch_decode.cu.
    """

    op = "BatchDecodePlan"
    _options_class = DecodeOptions
    _names: Mapping[str, str] = {array: array.removeprefix("kv_") for array in PAGES.values()}
    _first = ("q", "paged_k_cache", "paged_v_cache", "o", "maybe_lse", "kv_layout", "enable_pdl")
    _run_names = RunNames(PAGES, first=_first)

    def __init__(
        self,
        indptr: TensorLike | int,
        indices: TensorLike | None,
        last_page_len: TensorLike | None,
        *,
        device: object = None,
        workspace: Workspace | None = None,
        stream: object = None,
        **options: Unpack[DecodeKeywords],
    ) -> None:
        no_arrays = indices is None and last_page_len is None
        self._is_of_any_lengths = no_arrays and isinstance(indptr, numbers.Integral)
        if self._is_of_any_lengths:
            self._run_names = self._run_names._replace(arrays={})  # runs pass all
        super().__init__((indptr, indices, last_page_len), device, workspace, stream, options)
        self._needs_slopes = self.options.pos_encoding_mode == "ALIBI"

    def replan(
        self,
        indptr: TensorLike | int | None = None,
        indices: TensorLike | None = None,
        last_page_len: TensorLike | None = None,
        *,
        stream: object = None,
        **others: TensorLike | None,
    ) -> None:
        """Plan another batch with the same options, as `BatchPrefillPlan.replan`. A plan of any
        lengths remains one."""
        self._replan_batch((indptr, indices, last_page_len), stream, others)

    def _read(self, arrays: Sequence[object]) -> Batch:
        """Read the arrays; where runs pass them, plan a page a request, which is never split."""
        if not self._is_of_any_lengths:
            return super()._read(arrays)
        count, *rest = arrays
        for name, array in zip(("indices", "last_page_len"), rest, strict=True):
            if array is not None:
                raise self._refuse(name, shown(array), "None: this is a plan of any lengths")
        size = check_int(self.op, "indptr", count, 1, INT32_MAX)
        if self.options.enable_cuda_graph:
            expected = "False: graphs can have the runs of a plan of any lengths as they are"
            raise self._refuse("enable_cuda_graph", True, expected)
        batch = super()._read((host_ints(range(size + 1)), None, host_ints([1] * size)))
        batch.num_indices = 0
        return batch

    def run(
        self,
        q: TensorLike,
        paged_k_cache: TensorLike,
        paged_v_cache: TensorLike,
        o: TensorLike,
        lse: TensorLike | None = None,
        *,
        kv_layout: str = "NHD",
        paged_kv_indices: TensorLike | None = None,
        paged_kv_indptr: TensorLike | None = None,
        paged_kv_last_page_len: TensorLike | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        alibi_slopes: TensorLike | None = None,
        q_scale: float | None = None,
        k_scale: float | None = None,
        enable_pdl: bool = False,
        stream: object = None,
    ) -> None:
        """Compute the attention of `q` over the pages of a cache into `o`, on `stream`.

        Args:
            q: [b, num_qo_heads, head_dim] of `q_data_type`.
            paged_k_cache, paged_v_cache: [num_pages, page_size, num_kv_heads, head_dim], or with
                "HND" [num_pages, num_kv_heads, page_size, head_dim], of `kv_data_type`.
            o: [b, num_qo_heads, head_dim] of `o_data_type`, contiguous, written. An fp8 output
                saturates; if a request is split, each piece is rounded to fp8 before the merge.
            lse: [b, num_qo_heads] float32, written: log2 of the sum of exponentials.
            paged_kv_indptr, paged_kv_last_page_len: for a plan of any lengths, [b+1] and [b] int32
                on the device, where fi_ffi cannot check them. A request without pages gets zeros.
            others: as in `BatchPrefillPlan.paged_run`.
        """
        bound = self._runs.current.get((0, paged_kv_indices is None))
        if bound is None:
            bound = self._bound_run(0, self._check_indices("paged_kv_indices", paged_kv_indices))
        if (
            sm_scale is not None
            or q_scale is not None
            or k_scale is not None
            or rope_scale is not None
            or rope_theta is not None
            or alibi_slopes is not None
            or paged_kv_indices is not None
            or paged_kv_indptr is not None
            or paged_kv_last_page_len is not None
            or self._needs_slopes
        ):
            values = bound.template.fresh()
            values.scales(self.options.head_dim, sm_scale, q_scale, k_scale)
            mode = self.options.pos_encoding_mode
            values.positions(mode, rope_scale, rope_theta, alibi_slopes)
            lengths = {
                "paged_kv_indptr": paged_kv_indptr,
                "paged_kv_last_page_len": paged_kv_last_page_len,
            }
            for name, array in lengths.items():
                if array is not None and not self._is_of_any_lengths:
                    raise self._refuse(name, shown(array), "None: the plan has it")
            values.put(paged_kv_indices=paged_kv_indices, **lengths)
            rest = values.values[len(self._first) :]
            frame = bound.pack(
                bound, q, paged_k_cache, paged_v_cache, o, lse, kv_layout, enable_pdl, *rest
            )
        else:
            frame = bound.pack(
                bound, q, paged_k_cache, paged_v_cache, o, lse, kv_layout, enable_pdl
            )
        self._run_packed(bound, frame, stream)

    def _fill_defaults(self, values: Values) -> None:
        if self.options.pos_encoding_mode != "ALIBI":  # with which every run passes slopes
            values.scales(self.options.head_dim)

    def _facts(self) -> dict[str, Any]:
        return super()._facts() | {"empty_q_data": _NOTHING, "empty_kv_data": _NOTHING}

    def _need_at_most(self, batch: Batch) -> sizes.Need:
        """Return the most that this number of requests, rounded up to 64, needs. The rounding lets
        a batch of slightly more requests reuse the placement."""
        count = -(-batch.size // 64) * 64
        need = self._most.get(count)
        if need is None:
            need = self._most[count] = sizes.decode(self._geometry, count, None)
        return need

    def _exact_need(self, batch: Batch) -> sizes.Need:
        return sizes.decode(self._geometry, batch.size, batch.kv.counts)

    def _check_launch(self, launch: list[int], stage: TensorDesc, batch: Batch) -> None:
        """Check that the grid has a block for each piece.

        The planner does not count requests without pages when it splits for a fixed grid. With many
        of them there are more pieces than blocks, and the kernel would skip the last.
        """
        if not self.device.is_cuda:
            return
        at = TensorDesc(stage.ptr + launch[_KV_CHUNK_SIZE_OFFSET], (1,), "int32", device="cpu")
        (chunk,) = int32_array(self.op, "self", at)
        pieces = sum(-(-max(n, 1) // chunk) for n in batch.kv_lens)
        if pieces > launch[_PADDED_BATCH_SIZE]:
            got = f"{pieces} pieces of {chunk} keys"
            expected = f"{launch[_PADDED_BATCH_SIZE]} at most: too many requests have no pages"
            raise self._refuse("indptr", got, expected)
