"""`BatchDecodePlan`: attention of one query a request over a paged cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fi_ffi.abi.interop import TensorLike, as_desc
from fi_ffi.abi.tensor import TensorDesc
from fi_ffi.ops.attention import sizes
from fi_ffi.ops.attention.again import Again, are_last_page_lens, ints, pages, positions
from fi_ffi.ops.attention.arrays import Arrays, index_room
from fi_ffi.ops.attention.indices import INT32_MAX, PagedLengths, read_ints
from fi_ffi.ops.attention.options import choice, in_use
from fi_ffi.ops.attention.plan import SIZE_ONLY, Plan, WorkspaceSize, form_of
from fi_ffi.ops.attention.rows import BATCH_DECODE_PLAN, BATCH_DECODE_RUN
from fi_ffi.ops.attention.run import Values, softmax_scale
from fi_ffi.ops.attention.spec import DecodeOptions
from fi_ffi.ops.attention.workspace import Workspace
from fi_ffi.ops.row import KV_LAYOUTS

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from fi_ffi.ops.attention.keywords import DecodeKeywords

_NAMES = ("indptr", "indices", "last_page_len")
# Of `DecodePlanInfo::ToVector` (scheduler.cuh).
_PADDED_BATCH_SIZE, _KV_CHUNK_SIZE_OFFSET = 0, 7
# The tensors of a run, as the binding calls them.
_TENSORS = ("q", "paged_k_cache", "paged_v_cache", "o", "maybe_lse")
# What the binding wants for its dtype alone, and does not even read that of.
_NOTHING = TensorDesc(256, (0,), "uint8", device="cpu")


class BatchDecodePlan(Plan):
    """A batch of requests with one query each, planned once on the host and run for every layer.

    The kernels use no tensor cores and read keys and values once: the quickest for few
    query heads a key head.  For many (or any not among 1, 2, 3, 4 and 8), `BatchPrefillPlan`
    with `qo_indptr = range(b + 1)` does the same on tensor cores.

    Args:
        indptr: [b+1] int32 on the host: where each request's pages start in `indices`.
        indices: [indptr[-1] or more] int32 on the host: pages of the cache; None where
            each run is given them on the device (and cannot check them).
        last_page_len: [b] int32 on the host: tokens in each last page, 1 to `page_size`.
        num_qo_heads, num_kv_heads, head_dim, page_size: sizes.
        q_data_type, kv_data_type, o_data_type: dtypes; the latter two default to q's.
        window_left: how many keys before the last are seen; -1 for all.
        logits_soft_cap: c > 0 makes logits `c * tanh(logits / c)`.
        pos_encoding_mode: "NONE", "ROPE_LLAMA" or "ALIBI", applied in the kernel.
        enable_cuda_graph, max_num_indices, device, workspace, stream: as in
            `BatchPrefillPlan`.

    Raises `ArgumentError` and `ArgumentTypeError` before anything is copied or launched,
    `KernelNotFoundError` where the kernels in use lack the module.
    Upstream: flashinfer/decode.py, csrc/batch_decode.cu.
    """

    op = "BatchDecodePlan"
    index_arrays: Mapping[str, str] = {"indptr": "kv_indptr"}
    # What a number of requests takes at most, and that number.
    _most_need: sizes.Need
    _most_of = 0
    backend = "cuda cores"
    backend_reason = "decode kernels have no other"

    def __init__(
        self,
        indptr: TensorLike,
        indices: TensorLike | None,
        last_page_len: TensorLike,
        *,
        device: object = None,
        workspace: Workspace | None = None,
        stream: object = None,
        **options: Unpack[DecodeKeywords],
    ) -> None:
        super().__init__(device, workspace)
        self.options = chosen = DecodeOptions.of(options)
        self.module = chosen.kernel.module("")
        self.geometry = chosen.geometry(self.machine)
        known = {
            "num_qo_heads": chosen.num_qo_heads, "num_kv_heads": chosen.num_kv_heads,
            "head_dim_qk": chosen.head_dim, "head_dim_vo": chosen.head_dim,
        }  # fmt: skip
        rows = in_use((BATCH_DECODE_PLAN, BATCH_DECODE_RUN), self.device)
        self._forms = [form_of(row, chosen.kernel, "", known) for row in rows]
        self._templates = [Values(self.op, row, self.backend, {}) for row in rows]
        batch = self._read((indptr, indices, last_page_len))
        self._max_indices = chosen.max_num_indices or batch.indptr.total
        self._fill_template()
        if self.is_size_only:
            self.needs, self._placed = self._need(batch)
        else:
            self._schedule(batch, stream)

    @classmethod
    def workspace_size(
        cls,
        indptr: TensorLike,
        indices: TensorLike | None,
        last_page_len: TensorLike,
        **arguments: Any,
    ) -> WorkspaceSize:
        """Bytes of the float and int workspaces that a plan of these arguments needs."""
        only: Any = SIZE_ONLY
        plan = cls(indptr, indices, last_page_len, workspace=only, **arguments)
        return WorkspaceSize(plan.needs.float_bytes, plan._placed.end)

    def replan(
        self,
        indptr: TensorLike,
        indices: TensorLike | None,
        last_page_len: TensorLike,
        *,
        stream: object = None,
    ) -> None:
        """Plan another batch with the same options; as `BatchPrefillPlan.replan`."""
        if self.agains and self._replan((indptr, indices, last_page_len), stream):
            return
        batch = self._read((indptr, indices, last_page_len))
        if self.options.enable_cuda_graph:
            self.check_batch_size("indptr", batch.indptr.size, self._batch_size)
            self.check_room("pages", "indices", batch.max_page + 1)
            self.check_room("page indices", "indptr", batch.indptr.total)
            self.check_has_indices("indices", batch.indices is not None)
        self._schedule(batch, stream)

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
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        alibi_slopes: TensorLike | None = None,
        q_scale: float | None = None,
        k_scale: float | None = None,
        enable_pdl: bool = False,
        stream: object = None,
    ) -> None:
        """Attention of `q` over the pages of a cache into `o`, on `stream`.

        Args:
            q: [b, num_qo_heads, head_dim]; o: the same, contiguous, written.
            lse: [b, num_qo_heads] float32, written: log2 of the sum of exponentials.
            others: as in `BatchPrefillPlan.paged_run`.
        """
        options = (
            kv_layout, paged_kv_indices, sm_scale, rope_scale, rope_theta, alibi_slopes, q_scale,
            k_scale, enable_pdl,
        )  # fmt: skip
        tensors = (q, paged_k_cache, paged_v_cache, o, lse)
        if self.repeat(options, tensors, stream):
            return None
        values = self._templates[1].fresh()
        self.put_workspace(values)
        choice(self.op, "kv_layout", kv_layout, tuple(KV_LAYOUTS))
        q = as_desc(q, self.op, "q")
        if not q.shape or q.shape[0] != self._batch_size:
            raise self.refuse("q", q.layout, f"{self._batch_size} rows, as planned")
        values.put(
            q=q, paged_k_cache=paged_k_cache, paged_v_cache=paged_v_cache, o=o, maybe_lse=lse,
            kv_layout=kv_layout, window_left=self.options.window_left, enable_pdl=enable_pdl,
            logits_soft_cap=self.options.logits_soft_cap,
        )  # fmt: skip
        scale = softmax_scale(self.op, sm_scale, self.options.head_dim)
        scale = values.scale("q", q_scale, scale)
        values.put(sm_scale=values.scale("k", k_scale, scale))
        values.positions(self.options.pos_encoding_mode, rope_scale, rope_theta, alibi_slopes)
        self.put_pages(values, paged_kv_indices, "paged_k_cache", kv_layout)
        made: None = self.launch(self._forms[1], values, stream, _TENSORS, options, tensors)
        return made

    def _replan(self, arrays: Sequence[object], stream: object) -> bool:
        """Plan a batch, if one like it was planned; what is new or wrong is left alone."""
        view, indices, lasts = map(ints, arrays)
        starts = positions(view)
        if not starts or view is None or lasts is None:
            return False
        size, total = len(starts) - 1, starts[-1]
        again, found = self.again_for(size, total), pages(indices, total)
        page_size = self.options.page_size
        if again is None or found is None or not are_last_page_lens(lasts, size, page_size):
            return False
        views = {"kv_indptr": view, "last_page_len": lasts, "indices": found[0]}
        if not self.plan_again(again, views, 0, stream):
            return False
        self._batch_size, self._num_indices, self._max_page = size, total, found[1]
        return True

    def _read(self, arrays: Sequence[object]) -> PagedLengths:
        return PagedLengths(self.op, _NAMES, arrays, None, self.options.page_size)

    def _need(self, batch: PagedLengths) -> tuple[sizes.Need, Arrays]:
        graph, count = self.options.enable_cuda_graph, batch.indptr.size
        if graph and batch.indptr.total > self._max_indices:
            got, expected = f"{batch.indptr.total} pages", f"{self._max_indices} at most"
            raise self.refuse("indptr", got, expected)
        rooms = {"kv_indptr": count + 1, "last_page_len": count}
        if batch.indices is not None:
            rooms["indices"] = index_room(self._max_indices if graph else batch.indptr.total)
        need = None if graph or self.is_size_only else self._most(count)
        if need is not None:
            placed = self.place(need, count, rooms)
            have = self.workspace
            if self._owns_workspace or (
                have is not None and have.has(need.float_bytes, placed.end)
            ):
                return need, placed
        need = sizes.decode(self.geometry, count, batch.indptr.counts)
        return need, self.place(need, count, rooms)

    def _most(self, count: int) -> sizes.Need:
        """What so many requests can take at most."""
        if self._most_of != count:
            self._most_need = sizes.decode(self.geometry, count, None)
            self._most_of = count
        return self._most_need

    def _fill_template(self) -> None:
        """Set what is the same for every batch."""
        chosen = self.options
        self._templates[0].put(
            num_qo_heads=chosen.num_qo_heads, num_kv_heads=chosen.num_kv_heads,
            page_size=chosen.page_size, enable_cuda_graph=chosen.enable_cuda_graph,
            window_left=chosen.window_left, logits_soft_cap=chosen.logits_soft_cap,
            head_dim_qk=chosen.head_dim, head_dim_vo=chosen.head_dim,
            empty_q_data=_NOTHING, empty_kv_data=_NOTHING,
        )  # fmt: skip

    def _schedule(self, batch: PagedLengths, stream: object) -> None:
        need, placed = self._need(batch)
        values = self._templates[0].fresh()
        values.put(indptr=batch.indptr.desc, batch_size=batch.indptr.size)
        arrays = {"kv_indptr": batch.indptr.view, "last_page_len": batch.last_page_len.view}
        if batch.indices is not None:
            arrays["indices"] = batch.indices.view
        self._batch = batch
        given = values.values.copy()
        self.schedule(self._forms[0], given, arrays, need, placed, stream)
        size = self._batch_size = batch.indptr.size
        is_most = not self.options.enable_cuda_graph and need == self._most(size)
        if is_most and batch.indices is not None and self.workspace is not None:
            limit = min(placed.where("indices")[1], INT32_MAX // self.options.page_size)
            form, own = self._forms[0], self.workspace
            self.keep_again(Again(form, values.values, placed, own, size, 0, limit))
        self._num_indices, self._max_page = batch.indptr.total, batch.max_page

    def check_launch(self, launch: list[int], stage: TensorDesc) -> None:
        """The planner does not count requests without pages when it splits for a fixed grid:
        with many of them there are more pieces than blocks, and the last would be left out."""
        super().check_launch(launch, stage)
        if not self.device.is_cuda:
            return
        at = TensorDesc(stage.ptr + launch[_KV_CHUNK_SIZE_OFFSET], (1,), "int32", device="cpu")
        (chunk,) = read_ints(at)
        pieces = sum(-(-max(n, 1) // chunk) for n in self._batch.kv_lens)
        if pieces > launch[_PADDED_BATCH_SIZE]:
            got = f"{pieces} pieces of {chunk} keys"
            expected = f"{launch[_PADDED_BATCH_SIZE]} at most: too many requests have no pages"
            raise self.refuse("indptr", got, expected)
