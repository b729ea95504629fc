"""`BatchDecodePlan`: attention of one query a request over a paged cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from fi_ffi.abi.interop import TensorLike
from fi_ffi.abi.tensor import TensorDesc
from fi_ffi.ops.attention import sizes
from fi_ffi.ops.attention.arrays import Arrays, PagedLengths, read_ints
from fi_ffi.ops.attention.options import in_use
from fi_ffi.ops.attention.plan import SIZE_ONLY, BoundRow, Plan, WorkspaceSize
from fi_ffi.ops.attention.rows import BATCH_DECODE_PLAN, BATCH_DECODE_RUN
from fi_ffi.ops.attention.run import Values, softmax_scale
from fi_ffi.ops.attention.spec import DecodeOptions
from fi_ffi.ops.attention.workspace import Workspace

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from fi_ffi.ops.attention.keywords import DecodeKeywords

_NAMES = ("indptr", "indices", "last_page_len")
# Of `DecodePlanInfo::ToVector` (scheduler.cuh).
_PADDED_BATCH_SIZE, _KV_CHUNK_SIZE_OFFSET = 0, 7
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
    run_arrays: Mapping[str, str] = {
        "paged_kv_indptr": "kv_indptr", "paged_kv_indices": "indices",
        "paged_kv_last_page_len": "last_page_len",
    }  # fmt: skip
    run_not_less: ClassVar = {
        0: (("num_pages", "planned_pages"), ("num_indices", "planned_indices")),
    }
    # What every run is given, in this order.
    run_given = ("q", "paged_k_cache", "paged_v_cache", "o", "maybe_lse", "kv_layout", "enable_pdl")
    # What a number of requests takes at most, and that number.
    _most_need: sizes.Need
    _most_of = 0
    backend = "cuda cores"
    backend_of_module = ""
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
        planner, *self._run_rows = in_use((BATCH_DECODE_PLAN, BATCH_DECODE_RUN), self.device)
        self.bind_planner(planner, chosen.kernel)
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
        plan = cls(indptr, indices, last_page_len, workspace=SIZE_ONLY, **arguments)
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
        bound, values = self._run_arguments(
            q, paged_k_cache, paged_v_cache, o, lse, kv_layout, paged_kv_indices, sm_scale,
            rope_scale, rope_theta, alibi_slopes, q_scale, k_scale, enable_pdl,
        )  # fmt: skip
        self.run_packed(bound, values, stream)

    def _run_arguments(
        self, q: Any, paged_k_cache: Any, paged_v_cache: Any, o: Any, lse: Any = None,
        kv_layout: str = "NHD", paged_kv_indices: Any = None, sm_scale: float | None = None,
        rope_scale: float | None = None, rope_theta: float | None = None,
        alibi_slopes: Any = None, q_scale: float | None = None, k_scale: float | None = None,
        enable_pdl: bool = False,
    ) -> tuple[BoundRow, Sequence[Any]]:  # fmt: skip
        """The row of a run, and what it is given."""
        bound = self._bound_runs.get((0, paged_kv_indices is None))
        if bound is None:
            bound = self.bound_run(0, self.check_indices("paged_kv_indices", paged_kv_indices))
        rest = bound.rest
        is_plain = sm_scale is q_scale is k_scale is rope_scale is rope_theta is alibi_slopes
        is_plain = is_plain and sm_scale is paged_kv_indices is None
        if not is_plain or self.options.pos_encoding_mode == "ALIBI":
            values = bound.template.fresh()
            self._fill_options(
                values, sm_scale, rope_scale, rope_theta, alibi_slopes, q_scale, k_scale
            )
            values.put(paged_kv_indices=paged_kv_indices)
            rest = tuple(values.values[len(self.run_given) :])
        given = q, paged_k_cache, paged_v_cache, o, lse, kv_layout, enable_pdl, *rest
        return bound, given

    def fill_defaults(self, values: Values) -> None:
        if self.options.pos_encoding_mode == "ALIBI":
            return  # every run brings its slopes
        self._fill_options(values, None, None, None, None, None, None)

    def _fill_options(
        self, values: Values, sm_scale: float | None, rope_scale: float | None,
        rope_theta: float | None, alibi_slopes: Any, q_scale: float | None,
        k_scale: float | None,
    ) -> None:  # fmt: skip
        scale = softmax_scale(self.op, sm_scale, self.options.head_dim)
        scale = values.scale("q", q_scale, scale)
        values.put(sm_scale=values.scale("k", k_scale, scale))
        values.positions(self.options.pos_encoding_mode, rope_scale, rope_theta, alibi_slopes)

    def run_constants(self) -> dict[str, Any]:
        chosen = self.options
        return {"window_left": chosen.window_left, "logits_soft_cap": chosen.logits_soft_cap}

    def run_known(self) -> tuple[str, ...]:
        return (
            "b", "num_qo_heads", "num_kv_heads", "head_dim_qk", "head_dim_vo", "page_size",
            "planned_pages", "planned_indices",
        )  # fmt: skip

    def run_sizes(self) -> Sequence[int]:
        chosen = self.options
        return (
            self._batch_size, chosen.num_qo_heads, chosen.num_kv_heads, chosen.head_dim,
            chosen.head_dim, chosen.page_size, self._max_page + 1, self._num_indices,
        )  # fmt: skip

    def _read(self, arrays: Sequence[object]) -> PagedLengths:
        return PagedLengths(self.op, _NAMES, arrays, None, self.options.page_size)

    def _need(self, batch: PagedLengths) -> tuple[sizes.Need, Arrays]:
        graph, count = self.options.enable_cuda_graph, batch.indptr.size
        if graph and batch.indptr.total > self._max_indices:
            got, expected = f"{batch.indptr.total} pages", f"{self._max_indices} at most"
            raise self.refuse("indptr", got, expected)
        rooms = {"kv_indptr": count + 1, "last_page_len": count}
        if batch.indices is not None:
            rooms["indices"] = self._max_indices if graph else batch.indptr.total
        need = None if graph or self.is_size_only else self._most(count)
        if need is not None:
            placed = self.place(need, count, rooms)
            if self.is_room_for(need, placed):
                return need, placed
        need = sizes.decode(self.geometry, count, batch.indptr.counts)
        return need, self.place(need, count, rooms)

    def _most(self, count: int) -> sizes.Need:
        """What so many requests can take at most, and some more: the next batch is of another
        number, and is placed where this one is."""
        count = sizes.aligned(count, 64)
        if self._most_of != count:
            self._most_need = sizes.decode(self.geometry, count, None)
            self._most_of = count
        return self._most_need

    def _fill_template(self) -> None:
        """Set what is the same for every batch."""
        chosen = self.options
        for name in ("num_qo_heads", "num_kv_heads", "page_size", "enable_cuda_graph",
                     "window_left", "logits_soft_cap"):  # fmt: skip
            self._planner.put(name, getattr(chosen, name))
        for name in ("head_dim_qk", "head_dim_vo"):
            self._planner.put(name, chosen.head_dim)
        for name in ("empty_q_data", "empty_kv_data"):
            self._planner.put(name, _NOTHING)

    def _schedule(self, batch: PagedLengths, stream: object) -> None:
        need, placed = self._need(batch)
        given = {"indptr": batch.indptr.desc, "batch_size": batch.indptr.size}
        arrays = {"kv_indptr": batch.indptr.view, "last_page_len": batch.last_page_len.view}
        if batch.indices is not None:
            arrays["indices"] = batch.indices.view
        self._batch = batch
        self.schedule(given, arrays, need, placed, stream)

    def _batch_now(self) -> None:
        batch = self._batch
        self._batch_size, self._num_indices = batch.indptr.size, batch.indptr.total
        self._max_page = batch.max_page

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
