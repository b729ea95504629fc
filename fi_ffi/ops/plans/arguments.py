"""What plans and calls here have in common: a prefill's options, tensors, masks, workspaces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn, TypedDict

from fi_ffi.abi.interop import TensorLike, as_desc
from fi_ffi.abi.tensor import TensorDesc
from fi_ffi.ops.attention.backends import CAUSAL, CUSTOM, NON_CAUSAL
from fi_ffi.ops.attention.workspace import Workspace
from fi_ffi.ops.call.arguments import Refusal, check_flag, check_int


class _Heads(TypedDict):
    num_qo_heads: int
    num_kv_heads: int


class _Options(TypedDict, total=False):
    """Options of `BatchPrefillPlan` that all plans built on it have; the device and the stream."""

    q_data_type: object
    kv_data_type: object
    o_data_type: object
    disable_split_kv: bool
    device: object
    stream: object


class _BackendOptions(_Options, total=False):
    """Options of plans that run the kernels of `BatchPrefillPlan`."""

    backend: str
    logits_soft_cap: float
    use_fp16_qk_reduction: bool


class SparseKeywords(_BackendOptions, total=False):
    """Keywords of the block-sparse plans: no option that depends on the keys' positions."""

    use_custom_mask: bool
    workspace: Workspace | None


class _CascadeSizes(_Heads):
    head_dim_qk: int


class CascadeKeywords(_CascadeSizes, _BackendOptions, total=False):
    """Keywords for all levels of a cascade: a level does not know the keys' positions either."""

    head_dim_vo: int | None
    fixed_split_size: int | None
    enable_cuda_graph: bool
    max_total_num_rows: int | None
    max_num_indices: int | None


class _PodSizes(_Heads):
    page_size: int


class PodKeywords(_PodSizes, _Options, total=False):
    """Keywords of the POD plans: no option that the POD kernels lack or fix."""

    window_left: int
    fixed_split_size: int | None


class NotOf:
    """An inherited method that a plan class lacks: its access raises `AttributeError`."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._words = f"{owner.__name__!r} has no {name!r}"

    def __get__(self, instance: object, owner: type | None = None) -> NoReturn:
        raise AttributeError(self._words)


def described(op: str, **tensors: TensorLike) -> dict[str, TensorDesc]:
    """Describe a call's tensors, by their names."""
    return {name: as_desc(tensor, op, name) for name, tensor in tensors.items()}


def check_heads(op: str, num_qo_heads: int, num_kv_heads: int) -> int:
    """Return how many query heads share a key head."""
    check_int(op, "num_kv_heads", num_kv_heads, 1)
    if check_int(op, "num_qo_heads", num_qo_heads, 1) % num_kv_heads:
        raise Refusal(op)(
            "num_qo_heads", num_qo_heads, f"a multiple of num_kv_heads = {num_kv_heads}"
        )
    return num_qo_heads // num_kv_heads


def workspace_for_each(
    op: str, workspaces: Sequence[Workspace | None] | None, count: int, part: str
) -> Sequence[Workspace | None]:
    """Return a workspace for each part of a plan; None where fi_ffi allocates it."""
    if workspaces is not None and len(workspaces) != count:
        expected = f"{count}: one for each {part}"
        raise Refusal(op)("workspaces", f"{len(workspaces)} of them", expected)
    return workspaces or [None] * count


def packed_mask(
    op: str, mask: Any, causal: bool, lens: tuple[int, int], suffix: str = ""
) -> tuple[TensorDesc | None, int]:
    """Return one request's packed mask, if any, and the kernel's code for its mask mode.

    `suffix` is appended to the argument names `custom_mask` and `causal` in errors.
    """
    qo_len, kv_len = lens
    if mask is None:
        return None, CAUSAL if causal else NON_CAUSAL
    desc, need = as_desc(mask, op, f"custom_mask{suffix}"), (qo_len * kv_len + 7) // 8
    if causal:
        expected = f"False with custom_mask{suffix}"
        raise Refusal(op)(f"causal{suffix}", True, expected)
    if desc.shape != (need,):
        expected = f"{need} bytes: see pack_custom_mask"
        raise Refusal(op)(f"custom_mask{suffix}", desc.layout, expected)
    return desc, CUSTOM


def check_causal(
    op: str, causal: object, k: TensorDesc, lens: tuple[int, int], suffix: str = ""
) -> bool:
    """Return a request's `causal`; raise if it has fewer keys than causal queries."""
    qo_len, kv_len = lens
    is_causal = check_flag(op, f"causal{suffix}", causal)
    if is_causal and kv_len < qo_len:
        expected = f"{qo_len} keys or more for {qo_len} causal queries"
        raise Refusal(op)(f"k{suffix}", k.layout, expected)
    return is_causal
