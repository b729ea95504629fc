"""Cascade attention: keys that requests share are attended to level by level, then merged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypedDict

from fi_ffi.abi.interop import TensorLike, as_desc
from fi_ffi.abi.tensor import TensorDesc
from fi_ffi.errors import ArgumentError
from fi_ffi.ops import functions
from fi_ffi.ops.attention.arrays import Indptr, host_ints
from fi_ffi.ops.attention.options import PrefillOptions, SignatureWithOptions, refuse_options
from fi_ffi.ops.attention.prefill import BatchPrefillPlan
from fi_ffi.ops.attention.workspace import Workspace
from fi_ffi.ops.call.arguments import check_int
from fi_ffi.ops.call.refuse import may_overlap
from fi_ffi.ops.call.support import Support, supports

if TYPE_CHECKING:
    from typing_extensions import Unpack


# Options that depend on the keys' positions in the request, which a level does not know.
_POSITIONAL_OPTIONS = (
    "window_left", "pos_encoding_mode", "use_multi_item_scoring", "use_custom_mask",
    "use_attention_sink",
)  # fmt: skip

_ARRAYS = ("qo_indptr", "kv_indptr", "paged_kv_indptr", "paged_kv_indices",
           "paged_kv_last_page_len")  # fmt: skip
_MERGED_HEAD_DIMS = (64, 128, 256, 512)  # head sizes that `merge_state_in_place` supports


class CascadeKeywords(TypedDict, total=False):
    """Prefill options that apply to all levels."""

    num_qo_heads: int
    num_kv_heads: int
    head_dim_qk: int
    head_dim_vo: int | None
    q_data_type: object
    kv_data_type: object
    o_data_type: object
    backend: str
    logits_soft_cap: float
    use_fp16_qk_reduction: bool
    fixed_split_size: int | None
    disable_split_kv: bool
    enable_cuda_graph: bool
    max_total_num_rows: int | None
    max_num_indices: int | None


class _Cascade:
    """A tuple of plans whose results are merged; the last level has each request's own keys."""

    op: str
    levels: tuple[BatchPrefillPlan, ...]

    __signature__ = SignatureWithOptions(PrefillOptions)

    def __repr__(self) -> str:
        levels = getattr(self, "levels", ())
        return f"<{self.op} of {len(levels)} levels: {', '.join(map(repr, levels))}>"

    @classmethod
    def supports(cls, sm: Any = None, **asked: Any) -> Support:
        """Ask whether the levels can be planned and merged on a GPU (`sm=90`), with these of the
        prefill's options. See `Op.supports`."""
        found = supports(cls.__name__, sm=sm, **asked)
        where = {name: asked[name] for name in ("release", "cuda", "kernels") if name in asked}
        merged = functions.merge_state_in_place.supports(sm, **where)
        return merged if found and not merged else found

    def _check_options(self, options: Mapping[str, object]) -> None:
        refuse_options(self.op, _POSITIONAL_OPTIONS, options)
        size = options.get("head_dim_vo") or options.get("head_dim_qk")
        if size not in _MERGED_HEAD_DIMS and size is not None:
            raise self._refuse(
                "head_dim_qk", size, f"one of {_MERGED_HEAD_DIMS}, which can be merged"
            )

    def _replan(self, arrays: Sequence[dict[str, Any]], stream: object) -> None:
        """Plan every level anew; if one is refused, no level changes."""
        for level, each in zip(self.levels, arrays, strict=True):
            level._read([each.get(name) for name in _ARRAYS])
        for level, each in zip(self.levels, arrays, strict=True):
            level.replan(**each, stream=stream)

    def _refuse(self, argument: str, got: object, expected: str) -> ArgumentError:
        return ArgumentError(self.op, argument, got=got, expected=expected)

    def _workspaces(
        self, given: Sequence[Workspace | None] | None, count: int
    ) -> Sequence[Workspace | None]:
        if given is not None and len(given) != count:
            raise self._refuse(
                "workspaces", f"{len(given)} of them", f"{count}: one for each level"
            )
        return given or [None] * count

    def _merged(
        self, runs: Sequence[Any], o: TensorLike, lse: TensorLike, tmp_o: TensorLike,
        tmp_lse: TensorLike, stream: object,
    ) -> None:  # fmt: skip
        """Run the last level into `o`, and each other level into `tmp_o`, which is merged into
        `o`."""
        given = {"o": o, "lse": lse, "tmp_o": tmp_o, "tmp_lse": tmp_lse}
        descs = {name: as_desc(tensor, self.op, name) for name, tensor in given.items()}
        for name, like in (("tmp_o", "o"), ("tmp_lse", "lse")):
            one, other = descs[name], descs[like]
            if (one.shape, one.dtype, one.device) != (other.shape, other.dtype, other.device):
                raise self._refuse(
                    name, one.layout, f"another tensor like `{like}`: {other.layout}"
                )
            if may_overlap(one, other):
                raise self._refuse(name, f"memory of `{like}`", "memory of its own")
        # The first level runs into scratch memory, so that a refusal comes before `o` is written.
        *others, last = runs
        for run in others[:1]:
            run(descs["tmp_o"], descs["tmp_lse"])
        last(descs["o"], descs["lse"])
        for i, run in enumerate(others):
            if i:
                run(descs["tmp_o"], descs["tmp_lse"])
            functions.merge_state_in_place(
                descs["o"], descs["lse"], descs["tmp_o"], descs["tmp_lse"], stream=stream
            )


class MultiLevelCascadePlan(_Cascade):
    """Attention over pages that groups of requests share, in levels, and over each request's own.

    Level 0 has the keys that most requests share; the last level has each request's own. In each
    level, a "request" is a group of consecutive queries that see the same pages of the level.

    Args:
        qo_indptr_arr: for each level [groups + 1] int32 on the host: where each group's queries
            start; all levels end with the same number.
        paged_kv_indptr_arr, paged_kv_indices_arr, paged_kv_last_page_len_arr: each level's pages,
            as in `BatchPrefillPlan`.
        page_size: tokens in a page, in all levels.
        causal: whether the last level is causal; queries see all keys of the other levels.
        workspaces: a `Workspace` for each level; by default fi_ffi allocates them.
        options: of `BatchPrefillPlan`, for all levels: heads, `head_dim_qk`, dtypes,
            `logits_soft_cap`, `backend`. Windows and position encodings are excluded, because a
            level counts positions within itself.
        device, stream: as in `BatchPrefillPlan`.

    `levels` is the tuple of plans. Raises as `BatchPrefillPlan` does.
    Upstream: flashinfer/cascade.py (MultiLevelCascadeAttentionWrapper).
    """

    op = "MultiLevelCascadePlan"

    def __init__(
        self,
        qo_indptr_arr: Sequence[TensorLike],
        paged_kv_indptr_arr: Sequence[TensorLike],
        paged_kv_indices_arr: Sequence[TensorLike],
        paged_kv_last_page_len_arr: Sequence[TensorLike],
        *,
        page_size: int,
        causal: bool = False,
        workspaces: Sequence[Workspace | None] | None = None,
        device: object = None,
        stream: object = None,
        **options: Unpack[CascadeKeywords],
    ) -> None:
        self._check_options(options)
        arrays = self._arrays(
            qo_indptr_arr, paged_kv_indptr_arr, paged_kv_indices_arr, paged_kv_last_page_len_arr
        )
        last = len(arrays) - 1
        more: dict[str, Any] = {"page_size": page_size, "device": device, "stream": stream}
        more |= options
        self.levels = tuple(
            BatchPrefillPlan(
                **each, causal=causal if i == last else False, workspace=workspace, **more
            )
            for i, (each, workspace) in enumerate(
                zip(arrays, self._workspaces(workspaces, len(arrays)), strict=True)
            )
        )

    def _arrays(self, *given: Sequence[TensorLike]) -> list[dict[str, Any]]:
        """Return each level's arrays, by their names in `BatchPrefillPlan`."""
        names = ("qo_indptr", "paged_kv_indptr", "paged_kv_indices", "paged_kv_last_page_len")
        for name, each in zip(names, given, strict=True):
            if len(each) != len(given[0]) or not len(each):
                expected = f"{max(len(given[0]), 1)}: an array for each level, as of qo_indptr_arr"
                raise self._refuse(f"{name}_arr", f"{len(each)} arrays", expected)
        totals = [Indptr(self.op, "qo_indptr_arr", each).total for each in given[0]]
        if len({*totals}) > 1:
            raise self._refuse("qo_indptr_arr", f"{totals} queries", "the same in every level")
        return [dict(zip(names, level, strict=True)) for level in zip(*given, strict=True)]

    def replan(
        self,
        qo_indptr_arr: Sequence[TensorLike],
        paged_kv_indptr_arr: Sequence[TensorLike],
        paged_kv_indices_arr: Sequence[TensorLike],
        paged_kv_last_page_len_arr: Sequence[TensorLike],
        *,
        stream: object = None,
    ) -> None:
        """Plan another batch of as many levels with the same options, in the same workspaces."""
        arrays = self._arrays(
            qo_indptr_arr, paged_kv_indptr_arr, paged_kv_indices_arr, paged_kv_last_page_len_arr
        )
        if len(arrays) != len(self.levels):
            expected = f"{len(self.levels)} levels, as planned"
            raise self._refuse("qo_indptr_arr", f"{len(arrays)} levels", expected)
        self._replan(arrays, stream)

    def run(
        self,
        q: TensorLike,
        paged_k_cache: TensorLike,
        paged_v_cache: TensorLike,
        o: TensorLike,
        lse: TensorLike,
        tmp_o: TensorLike,
        tmp_lse: TensorLike,
        *,
        stream: object = None,
        **options: Any,
    ) -> None:
        """Compute the attention of `q` over all levels' pages of a cache into `o`, on `stream`.

        Args:
            q, paged_k_cache, paged_v_cache, o, lse: as in `BatchPrefillPlan.paged_run`; outputs are
                float16 or bfloat16, contiguous, with head_dim 64, 128 or 256.
            tmp_o, tmp_lse: scratch of the shape and dtype of `o` and `lse`, written: a level's
                results before the merge.
            options: of `BatchPrefillPlan.paged_run`: `kv_layout`, `sm_scale`, scales.
        """

        def level(plan: BatchPrefillPlan) -> Any:
            def run(out: TensorDesc, sums: TensorDesc) -> None:
                plan.paged_run(
                    q, paged_k_cache, paged_v_cache, out, sums, stream=stream, **options
                )  # fmt: skip

            return run

        self._merged([level(plan) for plan in self.levels], o, lse, tmp_o, tmp_lse, stream)


class SharedPrefixPlan(_Cascade):
    """Attention over ragged keys that all requests share, and over each request's own pages.

    Args:
        num_shared: number of keys that all requests share, at least 1.
        qo_indptr: [b+1] int32 on the host: where each request's queries start; None for one query
            per request.
        paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len: each request's own pages, as in
            `BatchPrefillPlan`.
        causal: whether the requests' own keys are causal; queries see all shared keys.
        workspaces: a `Workspace` for the shared keys and one for the requests' own.
        page_size, options, device, stream: as in `MultiLevelCascadePlan`.

    `levels` is the tuple of plans. Raises as `BatchPrefillPlan` does.
    Upstream: flashinfer/cascade.py (BatchDecodeWithSharedPrefixPagedKVCacheWrapper,
    BatchPrefillWithSharedPrefixPagedKVCacheWrapper).
    """

    op = "SharedPrefixPlan"

    def __init__(
        self,
        num_shared: int,
        qo_indptr: TensorLike | None,
        paged_kv_indptr: TensorLike,
        paged_kv_indices: TensorLike,
        paged_kv_last_page_len: TensorLike,
        *,
        page_size: int,
        causal: bool = False,
        workspaces: Sequence[Workspace | None] | None = None,
        device: object = None,
        stream: object = None,
        **options: Unpack[CascadeKeywords],
    ) -> None:
        self._check_options(options)
        shared, own = self._arrays(
            num_shared, qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len
        )
        of_shared, of_own = self._workspaces(workspaces, 2)
        where: dict[str, Any] = {"device": device, "stream": stream, **options}
        self.levels = (
            BatchPrefillPlan(**shared, workspace=of_shared, **where),
            BatchPrefillPlan(
                **own, page_size=page_size, causal=causal, workspace=of_own, **where
            ),
        )  # fmt: skip

    def _arrays(
        self, num_shared: int, qo_indptr: TensorLike | None, indptr: TensorLike,
        indices: TensorLike, last_page_len: TensorLike,
    ) -> tuple[dict[str, Any], dict[str, Any]]:  # fmt: skip
        check_int(self.op, "num_shared", num_shared, 1, 2**31 - 1)
        starts: Any = qo_indptr
        if starts is None:
            count = Indptr(self.op, "paged_kv_indptr", indptr).size
            starts = host_ints(range(count + 1))
        total = Indptr(self.op, "qo_indptr", starts).total
        own = {
            "qo_indptr": starts, "paged_kv_indptr": indptr, "paged_kv_indices": indices,
            "paged_kv_last_page_len": last_page_len,
        }  # fmt: skip
        shared = {"qo_indptr": host_ints([0, total]), "kv_indptr": host_ints([0, num_shared])}
        return shared, own

    def replan(
        self,
        num_shared: int,
        qo_indptr: TensorLike | None,
        paged_kv_indptr: TensorLike,
        paged_kv_indices: TensorLike,
        paged_kv_last_page_len: TensorLike,
        *,
        stream: object = None,
    ) -> None:
        """Plan another batch with the same options, in the same workspaces."""
        arrays = self._arrays(
            num_shared, qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len
        )
        self._replan(arrays, stream)

    def run(
        self,
        q: TensorLike,
        k_shared: TensorLike,
        v_shared: TensorLike,
        paged_k_cache: TensorLike,
        paged_v_cache: TensorLike,
        o: TensorLike,
        lse: TensorLike,
        tmp_o: TensorLike,
        tmp_lse: TensorLike,
        *,
        stream: object = None,
        **options: Any,
    ) -> None:
        """Compute the attention of `q` over the shared and the own keys into `o`, on `stream`.

        Args:
            k_shared, v_shared: [num_shared or more, num_kv_heads, head_dim], or with "HND"
                [num_kv_heads, tokens, head_dim].
            others: as in `MultiLevelCascadePlan.run`.
        """
        shared, own = self.levels

        def of_shared(out: TensorDesc, sums: TensorDesc) -> None:
            shared.ragged_run(q, k_shared, v_shared, out, sums, stream=stream, **options)

        def of_own(out: TensorDesc, sums: TensorDesc) -> None:
            own.paged_run(q, paged_k_cache, paged_v_cache, out, sums, stream=stream, **options)

        self._merged([of_shared, of_own], o, lse, tmp_o, tmp_lse, stream)
