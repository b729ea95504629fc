"""The gated delta rule's prefill on SM90: the entry of FlashInfer's `gdn_prefill_sm90`.

What the rows demand beyond the launcher's own checks follows the kernel, in
`include/flashinfer/flat/hopper/`: it was compiled for heads of 128 elements and keeps
states at that size, counts a state's elements in 32 bits, and waits for ever on a
sequence without tokens.
"""

from __future__ import annotations

from typing import Any

from fi_ffi.ops.releases import forms_of
from fi_ffi.ops.row import Row, Scalar, Tensor, Vector

_TOKENS = "total_seq_len"
_GATE: dict[str, Any] = {"dtype": "float32", "contiguous": True, "optional": True}
_STATE: dict[str, Any] = {"dtype": "float32", "contiguous": True, "offset_limit": 2**31}
_STATE_AXES = "num_seqs num_sab_heads head_size head_size"
# Bytes of a TMA descriptor: the kernel keeps one for each multiprocessor.
_DESCRIPTOR_BYTES = 128

_ARGS = (
    Tensor("output", f"{_TOKENS} num_sab_heads head_size", "T", "what the tokens read",
           writes=True, reads=False, contiguous=True),
    Tensor("output_state", _STATE_AXES, writes=True, reads=False, **_STATE,
           doc="the state after each sequence, as [value, key]; may be `input_state` itself"),
    Tensor("q", f"{_TOKENS} num_q_heads head_size", "T",
           "queries, of length 1 as a rule; all sequences' tokens one after another",
           contiguous=True),
    Tensor("k", f"{_TOKENS} num_k_heads head_size", "T", "keys, of length 1", contiguous=True),
    Tensor("v", f"{_TOKENS} num_v_heads head_size", "T", "values", contiguous=True),
    Tensor("cu_seqlens", "num_seqs+1", "int64", contiguous=True,
           doc="where each sequence starts, and the end: from 0, and rising, for the kernel "
               "never ends on a sequence without tokens; see `fi_ffi.cu_seqlens`"),
    Tensor("input_state", _STATE_AXES, optional=True, **_STATE,
           doc="the state before each sequence, as [value, key]; zero where there is none"),
    Tensor("alpha", f"{_TOKENS} num_sab_heads", **_GATE,
           doc="how much of the state is kept before a token, 0 to 1 (not its logarithm); 1"),
    Tensor("beta", f"{_TOKENS} num_sab_heads", **_GATE,
           doc="how much of a token is written, 0 to 1; 1"),
    Scalar("scale", float, 0.0, "of the output; 0.0 means 1 / sqrt(head_size)", low=0.0),
    Tensor("workspace_buffer", "workspace_size", "uint8", writes=True, reads=False,
           contiguous=True, alignment=128, bytes_per_multiprocessor=_DESCRIPTOR_BYTES,
           doc="scratch of `gdn_prefill_workspace_size()` bytes that no other stream uses; "
               "without it each stream has its own of fi_ffi's"),
)  # fmt: skip
_CHECKPOINTED = "0.6.8"
_CHECKPOINTS = (
    Tensor("state_checkpoints", "total_checkpoints num_sab_heads head_size head_size", "float32",
           "states on the way, as [value, key]", writes=True, reads=False, contiguous=True,
           optional=True, since=_CHECKPOINTED),
    Tensor("checkpoint_cu_starts", "num_seqs+1", "int64", contiguous=True, optional=True,
           since=_CHECKPOINTED,
           doc="where each sequence's checkpoints start: see `fi_ffi.checkpoint_cu_starts`"),
    Scalar("checkpoint_every_n_tokens", int, 0, "tokens between checkpoints; 0 for none",
           low=0, multiple_of=64, since=_CHECKPOINTED),
)  # fmt: skip

_ROW = Row(
    "gdn_prefill",
    "gdn_prefill_sm90",
    "gdn_prefill",
    "csrc/gdn_prefill_launcher.cu",
    "The gated delta rule over ragged sequences, a state for each head: for every token "
    "`state *= alpha`, `state += beta * outer(v - state @ k, k)`, `output = scale * state @ q`. "
    "Heads are those of q (GQA: q's are a multiple of k's and v's) or of v (GVA: v's are a "
    "multiple of q's and k's), whichever are more.",
    (*_ARGS, *_CHECKPOINTS),
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
        f"num_seqs * num_sab_heads <= {2**31 - 1}",
        f"{_TOKENS} <= {2**31 - 1}",
    ),
    nothing_axis="num_seqs",
    together=tuple(arg.name for arg in _CHECKPOINTS),
    in_place=(("output_state", "input_state"),),
    capabilities=(9,),
)

ROWS = forms_of(_ROW)
