"""Prefill of the gated delta rule: `gdn_prefill_sm90`, and CuTe DSL kernels from 0.6.14 on.

The rows' requirements beyond the launcher's own checks follow the kernel in
`include/flashinfer/flat/hopper/`. It is compiled for heads of 128 elements and stores states at
that size, counts a state's elements in 32 bits, and never terminates on a sequence without tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fi_ffi.ops.call.arguments import INT32_MAX
from fi_ffi.ops.call.releases import forms_of
from fi_ffi.ops.call.row import Absent, Arg, Row, Rule, Scalar, Tensor, Vector

_TOKENS = "total_seq_len"
_GATE: dict[str, Any] = {"dtype": "float32", "contiguous": True, "optional": True}
_STATE: dict[str, Any] = {"dtype": "float32", "contiguous": True, "offset_limit": 2**31}
_STATE_AXES = "num_seqs num_sab_heads head_size head_size"
# Bytes of a TMA descriptor; the kernel keeps one for each multiprocessor.
_DESCRIPTOR_BYTES = 128
_CHECKPOINTED = "0.6.8"
_IN_ORDER = (f"0 <= cu_seqlens <= {_TOKENS}", "cu_seqlens[0] <= 0")


def _checkpoints(tokens: str) -> tuple[str, ...]:
    """Return where the checkpoints of sequences that count as so many tokens may start."""
    most = f"total_checkpoints - {tokens} // checkpoint_every_n_tokens"
    return (f"0 <= checkpoint_cu_starts[:-1] <= {most}",)


_ARGS = (
    Tensor("output", f"{_TOKENS} num_sab_heads head_size", "T", "output of each token",
           writes=True, reads=False, contiguous=True),
    Tensor("output_state", _STATE_AXES, writes=True, reads=False, **_STATE,
           doc="the state after each sequence, as [value, key]; may be `input_state` itself"),
    Tensor("q", f"{_TOKENS} num_q_heads head_size", "T",
           "queries, usually normalised to length 1; the tokens of all sequences in order",
           contiguous=True),
    Tensor("k", f"{_TOKENS} num_k_heads head_size", "T",
           "keys, normalised to length 1", contiguous=True),
    Tensor("v", f"{_TOKENS} num_v_heads head_size", "T", "values", contiguous=True),
    Tensor("cu_seqlens", "num_seqs+1", "int64", contiguous=True,
           doc="start of each sequence, and the end: from 0, and rising. The kernel never ends on "
               "a sequence without tokens; see `fi_ffi.cu_seqlens`",
           index=(*_IN_ORDER, "1 <= steps(cu_seqlens)")),
    Tensor("input_state", _STATE_AXES, optional=True, **_STATE,
           doc="the state before each sequence, as [value, key]; default: zero"),
    Tensor("alpha", f"{_TOKENS} num_sab_heads", **_GATE,
           doc="decay of the state before each token, 0 to 1 (not its logarithm); default: 1"),
    Tensor("beta", f"{_TOKENS} num_sab_heads", **_GATE,
           doc="strength of each token's update, 0 to 1; default: 1"),
    Scalar("scale", float, 0.0, "factor of the output; 0.0 means 1 / sqrt(head_size)", low=0.0),
    Tensor("workspace_buffer", "workspace_size", "uint8", writes=True, reads=False,
           contiguous=True, alignment=128, bytes_per_multiprocessor=_DESCRIPTOR_BYTES,
           doc="scratch of `gdn_prefill_workspace_size()` bytes, for one stream at a time; by "
               "default fi_ffi keeps one for each stream"),
    Tensor("state_checkpoints", "total_checkpoints num_sab_heads head_size head_size", "float32",
           "intermediate states, as [value, key]", writes=True, reads=False, contiguous=True,
           optional=True, since=_CHECKPOINTED),
    Tensor("checkpoint_cu_starts", "num_seqs+1", "int64", contiguous=True, optional=True,
           since=_CHECKPOINTED,
           doc="start of each sequence's checkpoints: see `fi_ffi.checkpoint_cu_starts`",
           index=_checkpoints("(steps(cu_seqlens) + 63) // 64 * 64")),
    Scalar("checkpoint_every_n_tokens", int, 0, "tokens between checkpoints; 0: no checkpoints",
           low=0, multiple_of=64, since=_CHECKPOINTED),
)  # fmt: skip

_ROW = Row(
    "gdn_prefill",
    "gdn_prefill_sm90",
    "gdn_prefill",
    "csrc/gdn_prefill_launcher.cu",
    "The gated delta rule over ragged sequences, with a state for each head. For every token: "
    "`state *= alpha`, `state += beta * outer(v - state @ k, k)`, `output = scale * state @ q`. "
    "The number of heads is that of q (GQA: a multiple of the heads of k and v) or of v (GVA: a "
    "multiple of the heads of q and k).",
    _ARGS,
    dtypes={"T": ("float16", "bfloat16")},
    releases=">=0.6.3,<0.6.14",
    rounding="T",
    vector=Vector(("head_size",)),
    offset_limit=2**63,
    requires=(
        "num_q_heads >= 1",
        "num_k_heads >= 1",
        "num_v_heads >= 1",
        "head_size in (128,)",
        "num_sab_heads % num_k_heads == 0",
        "num_sab_heads == max(num_q_heads, num_v_heads)",
        "num_k_heads == min(num_q_heads, num_v_heads)",
        f"{_TOKENS} >= num_seqs",  # every sequence has a token
        f"num_seqs * num_sab_heads <= {INT32_MAX}",
        f"{_TOKENS} <= {INT32_MAX}",
    ),
    nothing_axis="num_seqs",
    together=tuple(arg.name for arg in _ARGS if arg.since == _CHECKPOINTED),
    in_place=(("output_state", "input_state"),),
    capabilities=(9,),
)

_CUTE = "gdn_prefill_sm90_sm90a_cute_dsl_fully_fused_delta_rule_sm90_"
# The most common of the modules.
CUTE_MODULE = f"{_CUTE}bfloat16_alpha_beta_init_float32_float32_nocheckpoints_noindices_int64"
# The entry's views of q, k, v and output, in the order of axes that TMA takes.
_KEYS_LAST, _KEYS_FIRST = ((0,), (2,), (1,)), ((2,), (0,), (1,))
_FLOATS = ("float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2")
_OLD_DTYPES = dict.fromkeys(("S", "S0", "C"), ("float32",)) | dict.fromkeys(("L", "L0"), ("int64",))
_OF_OLD: dict[str, Any] = {arg.name: arg for arg in _ARGS}


def _as(name: str, **changed: Any) -> Any:
    """Return an argument of the compiled kernel as the CuTe DSL kernel has it."""
    return replace(_OF_OLD[name], since="", **changed)


def _size(name: str, of: str = "") -> Absent:
    return Absent(name, "int", of=of or name)


_POOL = "slots num_sab_heads head_size head_size"
_FREE: dict[str, Any] = {"axes": _POOL, "offset_limit": None}
_CUTE_ARGS: tuple[Arg, ...] = (
    _as("q", view=_KEYS_LAST, alignment=16),
    _as("k", view=_KEYS_FIRST, alignment=16),
    _as("v", view=_KEYS_FIRST, alignment=16),
    _as("output", view=_KEYS_FIRST, alignment=16),
    _as("alpha", view=((0, 1),), alignment=16),
    _as("beta", view=((0, 1),), alignment=16),
    _as(
        "output_state",
        dtype="S",
        **_FREE,
        alignment=16,
        doc="the state after each sequence, as [value, key]; may be `input_state` itself",
    ),
    _as("input_state", dtype="S0", **_FREE, alignment=16),
    Tensor(
        "state_indices",
        "num_seqs",
        "I",
        "slot of each sequence's state in `input_state` and `output_state`, which then are "
        "pools; each slot at most once",
        contiguous=True,
        optional=True,
        since="0.7.0",
        index=("0 <= state_indices < slots where steps(cu_seqlens) > 0",),
    ),
    _as("state_checkpoints", dtype="C", view=((0, 1, 2, 3),), alignment=16),
    _as("checkpoint_cu_starts", dtype="L0", alignment=8, index=_checkpoints("steps(cu_seqlens)")),
    _as("workspace_buffer"),
    _as(
        "cu_seqlens",
        dtype="L",
        alignment=8,
        doc="start of each sequence, and the end: from 0, and not decreasing; the state of a "
        "sequence without tokens is not written",
        index=(*_IN_ORDER, "0 <= steps(cu_seqlens)"),
    ),
    _as("scale", zero="head_size ** -0.5"),
    *map(_size, ("num_q_heads", "num_k_heads", "num_v_heads", "num_sab_heads", "num_seqs")),
    _size("total_checkpoints", "(total_checkpoints or 1)"),
    _as("checkpoint_every_n_tokens"),
    _size("grid_x", "num_seqs * num_sab_heads"),
)


def _compiled_for(row: Row, dtypes: Mapping[str, str]) -> Row:
    """Return the row of the module for tensors of these dtypes; missing tensors have none."""
    return _row_for(row, tuple(dtypes.items()))


@functools.cache
def _row_for(row: Row, dtypes: tuple[tuple[str, str], ...]) -> Row:
    of = dict(dtypes)
    parts = (
        of["q"],
        "alpha" if "alpha" in of else "noalpha",
        "beta" if "beta" in of else "nobeta",
        _part("init", of.get("input_state")),
        of["output_state"],
        _part("checkpoints", of.get("state_checkpoints")),
        _part("indices", of.get("state_indices")),
        of["cu_seqlens"],
    )
    module = f"{_CUTE}{'_'.join(parts)}"
    symbol = module.replace("_sm90a_cute_dsl", "", 1)
    args = tuple(_compiled(arg, arg.name in of) for arg in row.args)
    return replace(row, module=module, modules={}, symbol=symbol, args=args)


def _part(option: str, dtype: str | None) -> str:
    """Return an optional tensor's part of the module's name."""
    return f"{option}_{dtype}" if dtype else f"no{option}"


def _compiled(arg: Arg, is_given: bool) -> Arg:
    """Return the argument of the compiled kernel, which no longer is optional."""
    if isinstance(arg, Tensor) and arg.optional:
        return replace(arg, optional=False) if is_given else Absent(arg.name, "None")
    return arg


_ROW_CUTE = replace(
    _ROW,
    args=_CUTE_ARGS,
    source="flashinfer/gdn_kernels/delta_rule_dsl/delta_rule_sm90.py",
    modules={(9, 0): CUTE_MODULE},
    variant="_cute",
    releases=">=0.6.14",
    dtypes={"T": ("bfloat16", "float16"), **_OLD_DTYPES},
    requires=(
        *(each for each in _ROW.requires if each != f"{_TOKENS} >= num_seqs"),
        Rule(
            "output_state",
            "state_indices or slots == num_seqs",
            "a state for each sequence, unless state_indices is given",
        ),
    ),
    order=(*(arg.name for arg in _ARGS), "state_indices"),
    compiled_for=_compiled_for,
)

_NEW_DTYPES = {
    "T": ("bfloat16", "float16"),
    "S": _FLOATS,
    "S0": _FLOATS,
    "C": _FLOATS,
    "L": ("int64", "int32"),
    "L0": ("int64", "int32"),
    "I": ("int32", "int64"),
}

ROWS = (*forms_of(_ROW), *forms_of(_ROW_CUTE, {"0.7.0": {"dtypes": _NEW_DTYPES}}))
