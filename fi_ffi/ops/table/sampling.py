"""Sampling tokens: entries of FlashInfer's `sampling` module.

What the rows demand beyond the bindings' own checks follows `include/flashinfer/sampling.cuh`: four
floats at a time, elements counted in 32 bits, and arrays that are read by output or by row of the
probabilities without being asked how long they are.  docs/sampling.md says what a token depends on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fi_ffi.ops.releases import forms_of
from fi_ffi.ops.row import PDL, Arg, Row, Rule, Scalar, Tensor, Vector
from fi_ffi.ops.table import renorm

_SOURCE = "csrc/flashinfer_sampling_binding.cu"
_OUT: dict[str, Any] = {"writes": True, "reads": False, "contiguous": True}
_MAYBE: dict[str, Any] = {"optional": True, "contiguous": True}
_DTYPES = {"I": ("int32", "int64"), "S": ("int64", "uint64")}
_INT = 2**31 - 1

_PROBS = Tensor("probs", "r h", "float32", "rows that sum to 1, of nothing below 0",
                contiguous=True)  # fmt: skip
_TOKENS = Tensor("output", "n", "I", "the tokens; 0 where a row has none",
                 **_OUT)  # fmt: skip
_FLAGGED = "0.6.7"
_VALID = Tensor("valid", "n", "bool", "whether a row had a token", since=_FLAGGED, **_OUT)
_INDICES = Tensor(
    "maybe_indices",
    "n",
    "I",
    "the row that each output is drawn from; without it, its own",
    **_MAYBE,
)
_DETERMINISTIC = Scalar(
    "deterministic", bool, True, "the same token for the same arguments each time"
)
# Seeds were numbers, then there were arrays of one, and then a seed for each output.
_ARRAYS, _EACH = "0.6.4", "0.7.2"


def _drawn(of: str, number: str, doc: str) -> tuple[Arg, ...]:
    """A seed or an offset, in each of its forms but the oldest."""
    name, axis = f"maybe_{of}_arr", f"{of}s"
    told = f"the {of}, instead of `{number}`: one element for all outputs"
    return (
        Tensor(name, "1", "S", told, since=_ARRAYS, until=_EACH, **_MAYBE),
        Tensor(name, axis, "S", f"{told}, or one for each", since=_EACH, **_MAYBE),
        Scalar(number, int, 0, doc, since=_ARRAYS),
    )


_SEED = "the seed, 64 bits of which the sign is one"
_OFFSET = "the random words to skip, which calls before have used"
_SEEDS = (
    Scalar("philox_seed", int, 0, _SEED, until=_ARRAYS),
    Scalar("philox_offset", int, 0, _OFFSET, until=_ARRAYS),
    *_drawn("seed", "seed_val", _SEED),
    *_drawn("offset", "offset_val", _OFFSET),
)
# The kernel reads the first of anything that is not one for each output.
_ONE_OR_EACH = tuple(
    Rule(
        f"maybe_{of}_arr", f"{of}s in (None, 1, n)", f"1 or n elements of {of}s", since=_EACH,
    )
    for of in ("seed", "offset")
)  # fmt: skip
_ROW_FOR_EACH = Rule(
    "output",
    "maybe_indices or n <= r",
    "as long as there are rows at most, unless there are `maybe_indices`",
)
# Output i starts at subsequence i * h, of 2**32; from here on, where another did.
_NUMBERS_OF_ITS_OWN = Rule(
    "output", f"n * gcd(h, {2**32}) <= {2**32}",
    "of 2**32 / gcd(h, 2**32) tokens at most: those after are drawn with the numbers of the first",
    using={"gcd": math.gcd},
)  # fmt: skip
_FLOATS = Vector(("h",), dtype="float32")
_LIMITS: dict[str, Any] = {
    "vector": _FLOATS,
    "nothing_axis": "n",
    "requires": ("h >= 1", "n == 0 or r >= 1", f"h <= {_INT}", f"n <= {_INT}", _ROW_FOR_EACH),
}


def _read_by_output(name: str) -> Rule:
    return Rule(
        name,
        f"not {name} or n <= r",
        "at least as long as `output`, by whose elements it is read",
        until=_EACH,
    )


def _sampler(
    name: str, doc: str, *parameters: Arg, read_by_output: str = ""
) -> tuple[Row, ...]:  # fmt: skip
    """The forms of a sampler of probabilities."""
    args = (_PROBS, _TOKENS, _VALID, _INDICES, *parameters, _DETERMINISTIC)
    by_output = (_read_by_output(read_by_output),) if read_by_output else ()
    limits = _LIMITS | {"requires": (*_LIMITS["requires"], *by_output)}
    return _seeded(
        name, doc, args, {
            _ARRAYS: {"variant": "_without_valid"},
            _FLAGGED: {"variant": ""},
            _EACH: {"variant": "_by_row" if read_by_output else ""},
        }, **limits,
    )  # fmt: skip


def _seeded(
    name: str, doc: str, args: tuple[Arg, ...], later: Mapping[str, Any] | None = None, **more: Any
) -> tuple[Row, ...]:
    """The forms of what is drawn."""
    fields = {"dtypes": _DTYPES, **more}
    fields["requires"] += _ONE_OR_EACH
    row = Row(name, "sampling", name, _SOURCE, doc, (*args, *_SEEDS), releases=">=0.6.3",
              variant="_of_numbers", **fields)  # fmt: skip
    return forms_of(row, later or {_ARRAYS: {"variant": ""}})


def _array(name: str, dtype: str, doc: str) -> Tensor:
    return Tensor(name, "r", dtype, doc, **renorm.MAYBE)


_TOP_K_ARR = _array("maybe_top_k_arr", "I", "`top_k_val` of each row, of the outputs' dtype")
_TOP_P_ARR = _array("maybe_top_p_arr", "float32", "`top_p_val` of each row")
_MIN_P_ARR = _array("maybe_min_p_arr", "float32", "`min_p_val` of each row")
_TOP_K = Scalar("top_k_val", int, _INT, "how many of the most probable tokens are left",
                low=1, high=_INT, instead=_TOP_K_ARR.name)  # fmt: skip
_TOP_K_FLOAT = replace(_TOP_K, type=float, default=float(_INT), doc=f"{_TOP_K.doc}, a whole number")
_TOP_P = Scalar("top_p_val", float, 1.0, "what the most probable tokens that are left sum to at "
                "least; with 0 no row has a token", low=0.0,
                instead=_TOP_P_ARR.name)  # fmt: skip
_MIN_P = Scalar("min_p_val", float, 0.0, "of the greatest probability, the part that a token must "
                "have to be left", low=0.0, instead=_MIN_P_ARR.name)  # fmt: skip


# For few rows, which the blocks for 8192 elements each share.
_SHARED_ROWS, _SHARED_FROM, _SLICE, _PARTIAL_BYTES = 128, 24576, 8192, 8


def _softmax_bytes(sizes: Mapping[str, int]) -> int:
    n, h = sizes["n"], sizes["h"]
    is_shared = n <= _SHARED_ROWS and h >= _SHARED_FROM
    return max(2**20, is_shared * n * -(-h // _SLICE) * _PARTIAL_BYTES)


_SOFTMAX = Row(
    "softmax",
    "sampling",
    "softmax",
    _SOURCE,
    "Softmax of each row at a temperature: `output = softmax(logits / temperature)`.  Logits are "
    "finite or -inf, not all of a row -inf.  A temperature of 0 is no greedy choice: it makes all "
    "probabilities equal.",
    (
        Tensor("workspace_buffer", "workspace_size", "uint8", writes=True, reads=False,
               contiguous=True, alignment=8, bytes_for=_softmax_bytes,
               doc="scratch of 2^20 bytes (rows of more than 2^23 take more) that no other stream "
                   "uses; for None each stream has its own of fi_ffi's"),
        Tensor("logits", "n h", "float32", "rows of logits", contiguous=True),
        Tensor("output", "n h", "float32", "probabilities; may be `logits` itself",
               **_OUT),
        Tensor("maybe_temperature_arr", "n", "float32", "`temperature_val` of each row",
               **renorm.MAYBE),
        Scalar("temperature_val", float, 1.0, "what logits are divided by", low=0.0,
               instead="maybe_temperature_arr"),
        PDL,
    ),
    dtypes={},
    releases=">=0.6.3",
    vector=_FLOATS,
    # A grid's second dimension has a block for each slice.
    requires=("h >= 1", f"h <= {_SLICE * (2**16 - 1)}", f"n <= {_INT}"),
    in_place=(("output", "logits"),),
)  # fmt: skip

ROWS = (
    _SOFTMAX,
    *_sampler("sampling_from_probs", "Draw a token of each row by its probabilities."),
    *_seeded(
        "sampling_from_logits",
        "Draw a token of each row by softmax(logits): the greatest of logits and Gumbel noise.  "
        "Logits are finite or -inf, not all of a row -inf.",
        (
            Tensor("logits", "r h", "float32", "rows of logits", contiguous=True),
            replace(_TOKENS, doc="the tokens"),
            _INDICES,
            replace(_DETERMINISTIC, doc="no matter: it always is"),
        ),
        dtypes=_DTYPES,
        # The words of an output's elements are counted in 32 bits.
        **_LIMITS | {"requires": (*_LIMITS["requires"], _NUMBERS_OF_ITS_OWN)},
    ),
    *_sampler(
        "top_k_sampling_from_probs",
        "Draw a token of each row from its `top_k` most probable ones, and those as probable as "
        "the last of them.",
        _TOP_K_ARR,
        _TOP_K,
        read_by_output="maybe_top_k_arr",
    ),
    *_sampler(
        "top_p_sampling_from_probs",
        "Draw a token of each row from the most probable ones that sum to `top_p`.",
        _TOP_P_ARR,
        _TOP_P,
    ),
    *_sampler(
        "min_p_sampling_from_probs",
        "Draw a token of each row from those that have `min_p` of the greatest probability at "
        "least.",
        _MIN_P_ARR,
        _MIN_P,
        read_by_output="maybe_min_p_arr",
    ),
    *_sampler(
        "top_k_top_p_sampling_from_probs",
        "Draw a token of each row from those that both the `top_k` and the `top_p` filter leave, "
        "each of the whole row (FlashInfer's `joint` order).",
        _TOP_K_ARR,
        _TOP_K_FLOAT,
        _TOP_P_ARR,
        _TOP_P,
    ),
    *renorm.ROWS,
    *_seeded(
        "chain_speculative_sampling",
        "Verify a chain of drafted tokens: each is emitted with probability "
        "`min(1, target / draft)` as long as those before it were; then one more is drawn, of the "
        "rest of the target's distribution.",
        (
            Tensor("draft_probs", "n s h", "float32", "the draft's distributions", contiguous=True),
            Tensor("draft_token_ids", "n s", "int32", "the drafted tokens, from 0 to h - 1",
                   contiguous=True),
            Tensor("target_probs", "n s+1 h", "float32", "the target's distributions",
                   contiguous=True),
            Tensor("output_token_ids", "n s+1", "int32",
                   "the tokens emitted, the one after them, and -1",
                   **_OUT),
            Tensor("output_accepted_token_num", "n", "int32", "grows by the drafted tokens that "
                   "would be taken one by one", writes=True, contiguous=True),
            Tensor("output_emitted_draft_token_num", "n", "int32",
                   "grows by the drafted tokens emitted", writes=True, contiguous=True),
            _DETERMINISTIC,
        ),
        dtypes={"S": _DTYPES["S"]},
        vector=_FLOATS,
        requires=("h >= 1", "s >= 1", f"h <= {_INT}", f"n <= {_INT}"),
    ),
)  # fmt: skip
