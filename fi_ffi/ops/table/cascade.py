"""Merging attention states: entries of FlashInfer's `cascade` module.

A state is the result of attention over some of the keys: an output, and a log-sum-exp of the logits
to base 2. The kernels (`include/flashinfer/attention/cascade.cuh`) count elements in 32 bits, and a
thread block covers a token's heads; only `merge_states` with at least as many sets as tokens has a
block for each head.
"""

from __future__ import annotations

from typing import Any

from fi_ffi.ops.call.arguments import INT32_MAX
from fi_ffi.ops.call.releases import forms_of
from fi_ffi.ops.call.row import Row, Rule, Tensor, Vector

_V, _S = "n num_heads head_dim", "n num_heads"
_OUT: dict[str, Any] = {"writes": True, "reads": False}
_LIMITS = ("head_dim in (64, 128, 256, 512)", f"n <= {INT32_MAX}")


def _tensor(name: str, axes: str, doc: str, **more: Any) -> Tensor:
    is_output = "head_dim" in axes
    return Tensor(name, axes, "T" if is_output else "float32", doc, contiguous=True, **more)


def _rows(name: str, doc: str, *args: Tensor, **more: Any) -> tuple[Row, ...]:
    """Return the forms: from 0.7.0 on, empty states merge to an empty one instead of NaN."""
    fields: dict[str, Any] = {
        "dtypes": {"T": ("float16", "bfloat16")},
        "vector": Vector(("head_dim",), threads=32),
        "offset_limit": 2**32,
        "requires": _LIMITS,
    }
    row = Row(
        name,
        "cascade",
        name,
        "csrc/flashinfer_cascade_binding.cu",
        doc,
        args,
        releases=">=0.6.3",
        **(fields | more),
    )
    return forms_of(row, {"0.7.0": {"variant": "_of_empty_ones"}})


ROWS = (
    *_rows(
        "merge_state",
        "Merge two attention states, of keys A and of keys B, into one of all keys.",
        _tensor("v_a", _V, "A's output"),
        _tensor("s_a", _S, "A's log-sum-exp, base 2"),
        _tensor("v_b", _V, "B's output"),
        _tensor("s_b", _S, "B's log-sum-exp"),
        _tensor("v_merged", _V, "output over all keys", **_OUT),
        _tensor("s_merged", _S, "log-sum-exp over all keys", **_OUT),
        block=("num_heads",),
        # Safe in place, as in `merge_state_in_place`: a thread writes the elements of v that it has
        # read, and threads of one warp read and write a head's sum.
        in_place=tuple((f"{of}_merged", f"{of}_{part}") for of in "vs" for part in "ab"),
    ),
    *_rows(
        "merge_state_in_place",
        "Merge another attention state into this one.",
        _tensor("v", _V, "output; becomes the output over all keys", writes=True),
        _tensor("s", _S, "its log-sum-exp, base 2; becomes that over all keys", writes=True),
        _tensor("v_other", _V, "the other's output"),
        _tensor("s_other", _S, "the other's log-sum-exp"),
        Tensor(
            "mask",
            "n",
            "M",
            "tokens with 0 stay unchanged; default: all are merged",
            contiguous=True,
            optional=True,
        ),
        dtypes={"T": ("float16", "bfloat16"), "M": ("bool", "uint8")},
        block=("num_heads",),
    ),
    *_rows(
        "merge_states",
        "Merge the attention states of any number of sets of keys. Without sets the output is 0.",
        _tensor("v", "n num_index_sets num_heads head_dim", "each set's output"),
        _tensor("s", "n num_index_sets num_heads", "each set's log-sum-exp, base 2"),
        _tensor("v_merged", _V, "output over all sets", **_OUT),
        _tensor("s_merged", _S, "log-sum-exp over all sets", **_OUT),
        requires=(
            *_LIMITS,
            f"num_heads <= {2**16 - 1}",
            Rule(
                "v",
                "num_index_sets >= n or num_heads * min(head_dim // 8, 32) <= 1024",
                "num_index_sets of at least n, or num_heads that fit a block of 1024 threads, "
                "with head_dim / 8 (at most 32) threads each",
            ),
        ),
    ),
)
