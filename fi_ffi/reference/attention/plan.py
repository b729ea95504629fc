"""Planning: checks the lengths of a batch, and keeps them in the int workspace for its runs.

The kernels keep a schedule there. A run of fa3 or MLA takes its lengths only from the plan. Runs of
fa2 and decode get the lengths again; here they must be the planned ones. The reference uses the
first bytes of the workspace: 12 for each request and 8 more.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from fi_ffi.abi.function import array_values, make_array
from fi_ffi.abi.objects import Array as Object
from fi_ffi.reference.arrays import Array
from fi_ffi.reference.attention.variant import Compiled

# Kinds of planners. A run takes a plan of its own kind, as the kernels' vectors have different
# lengths.
FA2, FA3, DECODE, MLA, ATTENTION = range(5)
_NAMES = ("fa2 prefill", "fa3 prefill", "decode", "MLA", "batch attention")


class Lengths(NamedTuple):
    """The planned lengths; `kv_indptr` counts pages, or the tokens of ragged keys."""

    window_left: int
    causal: bool
    qo_indptr: Array
    kv_indptr: Array
    kv_len: Array
    is_of_any_lengths: bool = False  # runs may have other pages than the planned ones

    @property
    def batch_size(self) -> int:
        return len(self.kv_len)

    def must_have(self, name: str, planned: Array, given: Array) -> None:
        """Refuse a run's indptr that differs from the planned one, apart from spare room at its
        end."""
        if not np.array_equal(planned, given[: len(planned)]):
            raise ValueError(f"{name} is not what was planned: plan again for other lengths")


def save(kind: int, lengths: Lengths, int_workspace: Array, staging: Array) -> Object:
    """Write lengths into the workspaces; return their offsets."""
    stored = [np.ascontiguousarray(array, np.int32) for array in lengths[2:5]]
    starts = np.cumsum([0, *(array.nbytes for array in stored)]).tolist()
    for name, workspace in (
        ("int_workspace_buffer", int_workspace),
        ("page_locked_int_workspace_buffer", staging),
    ):
        if len(workspace) < starts[-1]:
            raise ValueError(f"{name} has {len(workspace)} bytes; this batch takes {starts[-1]}")
        for start, array in zip(starts, stored, strict=False):
            workspace[start : start + array.nbytes] = array.view(np.uint8)
    flags = int(lengths.causal), int(lengths.is_of_any_lengths)
    return make_array((kind, lengths.batch_size, lengths.window_left, *flags, *starts[:-1]))


def load(kind: int, int_workspace: Array, plan_info: Object) -> Lengths:
    """Read the lengths of a plan from the workspace."""
    info = array_values(plan_info)
    if len(info) != 8 or info[0] != kind:
        what = _NAMES[info[0]] if len(info) == 8 and 0 <= info[0] < len(_NAMES) else "another"
        raise ValueError(f"plan_info_vec is of {what}, not a plan of {_NAMES[kind]}")
    _, batch_size, window_left, causal, is_of_any_lengths, *offsets = info
    counts = (batch_size + 1, batch_size + 1, batch_size)
    arrays = [
        np.frombuffer(int_workspace[start : start + 4 * count].tobytes(), np.int32)
        for start, count in zip(offsets, counts, strict=True)
    ]
    qo_indptr, kv_indptr, kv_len = arrays
    return Lengths(window_left, bool(causal), qo_indptr, kv_indptr, kv_len, bool(is_of_any_lengths))


def prefill(
    kind: int,
    float_workspace: Array,
    int_workspace: Array,
    staging: Array,
    qo_indptr: Array,
    kv_indptr: Array,
    kv_len: Array,
    total_num_rows: int,
    batch_size: int,
    num_qo_heads: int,
    num_kv_heads: int,
    page_size: int,
    enable_cuda_graph: bool,
    head_dim_qk: int,
    head_dim_vo: int,
    causal: bool,
    window_left: int,
    *split: Any,
    compiled: Compiled,
) -> Object:
    """`plan` of batch prefill; its schedule does not depend on what the module was compiled for."""
    _check_heads(num_qo_heads, num_kv_heads)
    _check_sizes(
        batch_size, qo_indptr=(qo_indptr, 1), kv_indptr=(kv_indptr, 1), kv_len_arr=(kv_len, 0)
    )
    lengths = Lengths(
        window_left,
        causal,
        qo_indptr[: batch_size + 1],
        kv_indptr[: batch_size + 1],
        kv_len[:batch_size],
    )
    if total_num_rows < lengths.qo_indptr[-1]:
        raise ValueError(f"total_num_rows is {total_num_rows}; qo_indptr ends at {qo_indptr[-1]}")
    return save(kind, lengths, int_workspace, staging)


def decode(
    float_workspace: Array,
    int_workspace: Array,
    staging: Array,
    indptr: Array,
    batch_size: int,
    num_qo_heads: int,
    num_kv_heads: int,
    page_size: int,
    enable_cuda_graph: bool,
    window_left: int,
    logits_soft_cap: float,
    head_dim_qk: int,
    head_dim_vo: int,
    empty_q_data: Array,
    empty_kv_data: Array,
    *,
    compiled: Compiled,
) -> Object:
    """`plan` of batch decode."""
    _check_heads(num_qo_heads, num_kv_heads)
    _check_sizes(batch_size, indptr=(indptr, 1))
    of_one = np.arange(batch_size + 1)
    unknown = np.zeros(batch_size)
    planned = indptr[: batch_size + 1]
    # A schedule that splits no request has nothing of lengths: runs may pass others.
    is_of_any = not enable_cuda_graph and bool((np.diff(planned) == 1).all())
    lengths = Lengths(window_left, False, of_one, planned, unknown, is_of_any)
    return save(DECODE, lengths, int_workspace, staging)


def mla(
    float_workspace: Array,
    int_workspace: Array,
    staging: Array,
    qo_indptr: Array,
    kv_indptr: Array,
    kv_len: Array,
    num_heads: int,
    head_dim_o: int,
    causal: bool,
    *,
    compiled: Compiled,
) -> Object:
    """`plan` of MLA."""
    batch_size = len(kv_len)
    _check_sizes(batch_size, qo_indptr=(qo_indptr, 1), kv_indptr=(kv_indptr, 1))
    end = batch_size + 1
    lengths = Lengths(-1, causal, qo_indptr[:end], kv_indptr[:end], kv_len)
    return save(MLA, lengths, int_workspace, staging)


def attention(
    float_workspace: Array,
    int_workspace: Array,
    staging: Array,
    qo_indptr: Array,
    kv_indptr: Array,
    kv_len: Array,
    batch_size: int,
    num_qo_heads: int,
    num_kv_heads: int,
    head_dim_o: int,
    causal: bool,
    *,
    compiled: Compiled,
) -> Object:
    """`plan` of batch attention."""
    _check_heads(num_qo_heads, num_kv_heads)
    _check_sizes(batch_size, qo_indptr=(qo_indptr, 1), kv_indptr=(kv_indptr, 1), kv_len=(kv_len, 0))
    end = batch_size + 1
    lengths = Lengths(-1, causal, qo_indptr[:end], kv_indptr[:end], kv_len[:batch_size])
    return save(ATTENTION, lengths, int_workspace, staging)


def _check_heads(num_qo_heads: int, num_kv_heads: int) -> None:
    if num_qo_heads % num_kv_heads:
        raise ValueError(
            f"num_qo_heads {num_qo_heads} should be divisible by num_kv_heads {num_kv_heads}"
        )


def _check_sizes(batch_size: int, **arrays: tuple[Array, int]) -> None:
    for name, (array, more) in arrays.items():
        if len(array) < batch_size + more:
            raise ValueError(f"{name} has {len(array)} elements for {batch_size} requests")
