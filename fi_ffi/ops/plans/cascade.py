"""Cascade attention: keys that requests share are attended to level by level, then merged."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from fi_ffi.abi.interop import TensorLike
from fi_ffi.ops import functions
from fi_ffi.ops.attention.arrays import Indptr, host_ints
from fi_ffi.ops.attention.options import (
    PrefillOptions,
    SignatureWithOptions,
    by_own_names,
    check_keywords,
    take_any_name,
)
from fi_ffi.ops.attention.prefill import BatchPrefillPlan
from fi_ffi.ops.attention.workspace import Workspace
from fi_ffi.ops.call.arguments import Refusal, check_int
from fi_ffi.ops.call.refuse import may_overlap
from fi_ffi.ops.call.support import Support, supports
from fi_ffi.ops.plans.arguments import (
    CascadeKeywords,
    described,
    workspace_for_each,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack

# A level's arrays over pages, by their names in `BatchPrefillPlan`.
_PAGED_ARRAYS = ("qo_indptr", "paged_kv_indptr", "paged_kv_indices", "paged_kv_last_page_len")
_ARRAYS = ("qo_indptr", "kv_indptr", *_PAGED_ARRAYS[1:])
_MERGED_HEAD_DIMS = (64, 128, 256, 512)  # head sizes that `merge_state_in_place` supports
_Levels = Sequence[dict[str, Any]]


class _Cascade:
    """A tuple of plans whose results are merged; the last level has each request's own keys."""

    op: str
    levels: tuple[BatchPrefillPlan, ...]
    _refuse: Refusal

    __signature__ = SignatureWithOptions(PrefillOptions)

    def __init_subclass__(cls) -> None:
        cls._refuse = Refusal(cls.op)
        take_any_name(cls)

    def __repr__(self) -> str:
        levels = getattr(self, "levels", ())
        return f"<{self.op} of {len(levels)} levels: {', '.join(map(repr, levels))}>"

    @classmethod
    def supports(cls, sm: Any = None, **asked: Any) -> Support:
        """Ask whether the levels can be planned and merged on a GPU (`sm=90`), with these of the
        prefill's options. See `Op.supports`."""
        planned = supports(cls.__name__, sm=sm, **asked)
        where = {name: asked[name] for name in ("release", "cuda", "kernels") if name in asked}
        merged = functions.merge_state_in_place.supports(sm, **where)
        return merged if planned and not merged else planned

    def _checked(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return the options of all levels, by the names that these have for them."""
        options = by_own_names(self.op, CascadeKeywords.__annotations__, given)
        check_keywords(self.op, CascadeKeywords.__annotations__, options)
        size = options.get("head_dim_vo") or options.get("head_dim_qk")
        if size not in _MERGED_HEAD_DIMS and size is not None:
            expected = f"one of {_MERGED_HEAD_DIMS}, which can be merged"
            raise self._refuse("head_dim_qk", size, expected)
        return options

    def _plan(
        self, levels: _Levels, workspaces: Sequence[Workspace | None] | None, **options: Any
    ) -> None:
        """Plan each level with its own arguments and those of all levels."""
        chosen = workspace_for_each(self.op, workspaces, len(levels), "level")
        self.levels = tuple(
            BatchPrefillPlan(**level, workspace=workspace, **options)
            for level, workspace in zip(levels, chosen, strict=True)
        )

    def _replan(self, arrays: _Levels, stream: object) -> None:
        """Plan every level anew; if one is refused, no level changes."""
        for level, each in zip(self.levels, arrays, strict=True):
            level._check_replan([each.get(name) for name in _ARRAYS])
        for level, each in zip(self.levels, arrays, strict=True):
            level.replan(**each, stream=stream)

    def _run_levels(
        self, runs: Sequence[Callable[..., None]], stream: object, **outputs: TensorLike
    ) -> None:
        """Run the last level into `o`, and each other level into `tmp_o`, which is merged into
        `o`."""
        descs = described(self.op, **outputs)
        for name, like in (("tmp_o", "o"), ("tmp_lse", "lse")):
            one, other = descs[name], descs[like]
            if (one.shape, one.dtype, one.device) != (other.shape, other.dtype, other.device):
                expected = f"another tensor like `{like}`: {other.layout}"
                raise self._refuse(name, one.layout, expected)
            if may_overlap(one, other):
                raise self._refuse(name, f"memory of `{like}`", "memory of its own")
        o, lse, tmp_o, tmp_lse = (descs[name] for name in ("o", "lse", "tmp_o", "tmp_lse"))
        # The first level runs into scratch memory, so that a refusal comes before `o` is written.
        *others, last = runs
        for run in others[:1]:
            run(tmp_o, tmp_lse)
        last(o, lse)
        for i, run in enumerate(others):
            if i:
                run(tmp_o, tmp_lse)
            functions.merge_state_in_place(o, lse, tmp_o, tmp_lse, stream=stream)


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
        **options: Unpack[CascadeKeywords],
    ) -> None:
        own = self._checked(options)
        arrays = self._arrays(
            qo_indptr_arr, paged_kv_indptr_arr, paged_kv_indices_arr, paged_kv_last_page_len_arr
        )
        levels = [each | {"page_size": page_size} for each in arrays]
        levels[-1]["causal"] = causal
        self._plan(levels, workspaces, **own)

    def _arrays(self, *arrays: Sequence[TensorLike]) -> _Levels:
        """Return each level's arrays, by their names in `BatchPrefillPlan`."""
        first, *_ = arrays
        for name, each in zip(_PAGED_ARRAYS, arrays, strict=True):
            if len(each) != len(first) or not len(each):
                expected = f"{max(len(first), 1)}: an array for each level, as of qo_indptr_arr"
                raise self._refuse(f"{name}_arr", f"{len(each)} arrays", expected)
        totals = [Indptr(self.op, "qo_indptr_arr", each).total for each in first]
        if len({*totals}) > 1:
            raise self._refuse("qo_indptr_arr", f"{totals} queries", "the same in every level")
        return [dict(zip(_PAGED_ARRAYS, level, strict=True)) for level in zip(*arrays, strict=True)]

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
        tensors = q, paged_k_cache, paged_v_cache
        runs = [
            partial(level.paged_run, *tensors, stream=stream, **options) for level in self.levels
        ]
        self._run_levels(runs, stream, o=o, lse=lse, tmp_o=tmp_o, tmp_lse=tmp_lse)


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
        **options: Unpack[CascadeKeywords],
    ) -> None:
        own = self._checked(options)
        shared, last = self._arrays(
            num_shared, qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len
        )
        self._plan([shared, last | {"page_size": page_size, "causal": causal}], workspaces, **own)

    def _arrays(self, num_shared: int, *own: Any) -> _Levels:
        """Return the arrays of the shared keys, and the requests' own by their names in
        `BatchPrefillPlan`."""
        check_int(self.op, "num_shared", num_shared, 1)
        arrays = dict(zip(_PAGED_ARRAYS, own, strict=True))
        if arrays["qo_indptr"] is None:
            count = Indptr(self.op, "paged_kv_indptr", arrays["paged_kv_indptr"]).size
            arrays["qo_indptr"] = host_ints(range(count + 1))
        total = Indptr(self.op, "qo_indptr", arrays["qo_indptr"]).total
        shared = {"qo_indptr": host_ints([0, total]), "kv_indptr": host_ints([0, num_shared])}
        return [shared, arrays]

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
        runs = [
            partial(shared.ragged_run, q, k_shared, v_shared, stream=stream, **options),
            partial(own.paged_run, q, paged_k_cache, paged_v_cache, stream=stream, **options),
        ]
        self._run_levels(runs, stream, o=o, lse=lse, tmp_o=tmp_o, tmp_lse=tmp_lse)
