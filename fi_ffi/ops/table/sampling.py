"""Sampling tokens: entries of FlashInfer's `sampling` module.

The rows' requirements beyond the bindings' own checks follow `include/flashinfer/sampling.cuh`. It
loads four floats at a time, counts elements in 32 bits, and indexes arrays by output or by row of
the probabilities without checking their length. docs/sampling.md says what a token depends on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fi_ffi.ops.call.arguments import INT32_MAX
from fi_ffi.ops.call.releases import forms_of
from fi_ffi.ops.call.row import PDL, Arg, Row, Rule, Scalar, Tensor, Vector
from fi_ffi.ops.table import renorm

_SOURCE = "csrc/flashinfer_sampling_binding.cu"
_OUT: dict[str, Any] = {"writes": True, "reads": False, "contiguous": True}
_MAYBE: dict[str, Any] = {"optional": True, "contiguous": True}
_DTYPES = {"I": ("int32", "int64"), "S": ("int64", "uint64")}

_PROBS = Tensor(
    "probs", "r h", "float32", "rows without negative elements that sum to 1", contiguous=True
)
_TOKENS = Tensor("output", "n", "I", "the tokens; 0 for a row without a token", **_OUT)
_FLAGGED = "0.6.7"
_VALID = Tensor("valid", "n", "bool", "True for rows with a token", since=_FLAGGED, **_OUT)
_INDICES = Tensor(
    "maybe_indices",
    "n",
    "I",
    "row that each output is drawn from; default: its own",
    index=("0 <= maybe_indices < r",),
    **_MAYBE,
)
_DETERMINISTIC = Scalar("deterministic", bool, True, "same token for the same arguments each time")
# Seeds were numbers, then there were arrays of one, and then a seed for each output.
_ARRAYS, _EACH = "0.6.4", "0.7.2"


def _drawn(of: str, number: str, doc: str) -> tuple[Arg, ...]:
    """Return a seed or an offset, in each of its forms but the oldest."""
    name, axis = f"maybe_{of}_arr", f"{of}s"
    told = f"the {of}, instead of `{number}`: one element for all outputs"
    more = {"no_index": "numbers of the generator", **_MAYBE}
    return (
        Tensor(name, "1", "S", told, since=_ARRAYS, until=_EACH, **more),
        Tensor(name, axis, "S", f"{told}, or one for each", since=_EACH, **more),
        Scalar(number, int, 0, doc, since=_ARRAYS),
    )


_SEED = "the seed, a signed 64-bit number"
_OFFSET = (
    "random words to skip, because earlier calls have used them: a call with the seed and the "
    "offset of another, such as the defaults, draws the same tokens; `fi_ffi.Philox` counts"
)
_SEEDS = (
    Scalar("philox_seed", int, 0, _SEED, until=_ARRAYS),
    Scalar("philox_offset", int, 0, _OFFSET, until=_ARRAYS),
    *_drawn("seed", "seed_val", _SEED),
    *_drawn("offset", "offset_val", _OFFSET),
)
# Unless an array has one element for each output, the kernel reads its first.
_ONE_OR_EACH = tuple(
    Rule(f"maybe_{of}_arr", f"{of}s in (None, 1, n)", f"1 or n elements of {of}s", since=_EACH)
    for of in ("seed", "offset")
)
_ROW_FOR_EACH = Rule(
    "output",
    "maybe_indices or n <= r",
    "at most as long as there are rows, unless `maybe_indices` is given",
)
# Output i starts at subsequence i * h, modulo 2**32: from this size on, outputs share subsequences.
_OWN_SUBSEQUENCE = Rule(
    "output",
    f"n * gcd(h, {2**32}) <= {2**32}",
    "of at most 2**32 / gcd(h, 2**32) tokens: later ones would reuse the random numbers of the "
    "first",
    using={"gcd": math.gcd},
)
_FLOATS = Vector(("h",), dtype="float32")
_LIMITS: dict[str, Any] = {
    "vector": _FLOATS,
    "nothing_axis": "n",
    "requires": (
        "h >= 1",
        "n == 0 or r >= 1",
        f"h <= {INT32_MAX}",
        f"n <= {INT32_MAX}",
        _ROW_FOR_EACH,
    ),
}


def _read_by_output(name: str) -> Rule:
    return Rule(name, f"not {name} or n <= r", "at least as long as `output`", until=_EACH)


def _sampler(name: str, doc: str, *parameters: Arg, read_by_output: str = "") -> tuple[Row, ...]:
    """Return the forms of a sampler of probabilities."""
    args = (_PROBS, _TOKENS, _VALID, _INDICES, *parameters, _DETERMINISTIC)
    by_output = (_read_by_output(read_by_output),) if read_by_output else ()
    limits = _LIMITS | {"requires": (*_LIMITS["requires"], *by_output)}
    return _seeded(
        name,
        doc,
        args,
        {
            _ARRAYS: {"variant": "_without_valid"},
            _FLAGGED: {"variant": ""},
            _EACH: {"variant": "_by_row" if read_by_output else ""},
        },
        **limits,
    )


def _seeded(
    name: str, doc: str, args: tuple[Arg, ...], later: Mapping[str, Any] | None = None, **more: Any
) -> tuple[Row, ...]:
    """Return the forms of an op that draws random numbers."""
    fields = {"dtypes": _DTYPES, **more}
    fields["requires"] += _ONE_OR_EACH
    row = Row(
        name,
        "sampling",
        name,
        _SOURCE,
        doc,
        (*args, *_SEEDS),
        releases=">=0.6.3",
        variant="_of_numbers",
        **fields,
    )
    return forms_of(row, later or {_ARRAYS: {"variant": ""}})


def _array(name: str, dtype: str, doc: str, **more: Any) -> Tensor:
    return Tensor(name, "r", dtype, doc, **renorm.MAYBE, **more)


_TOP_K_ARR = _array(
    "maybe_top_k_arr",
    "I",
    "`top_k_val` of each row, of the outputs' dtype",
    no_index=renorm.OF_TOKENS,
)
_TOP_P_ARR = _array("maybe_top_p_arr", "float32", "`top_p_val` of each row")
_MIN_P_ARR = _array("maybe_min_p_arr", "float32", "`min_p_val` of each row")
_TOP_K = Scalar(
    "top_k_val",
    int,
    INT32_MAX,
    "number of tokens kept, the most probable ones",
    low=1,
    high=INT32_MAX,
    instead=_TOP_K_ARR.name,
)
_TOP_K_FLOAT = replace(
    _TOP_K, type=float, default=float(INT32_MAX), doc=f"{_TOP_K.doc}, a whole number"
)
_TOP_P = Scalar(
    "top_p_val",
    float,
    1.0,
    "smallest sum of the kept tokens, the most probable ones; with 0 no row has a token",
    low=0.0,
    instead=_TOP_P_ARR.name,
)
_MIN_P = Scalar(
    "min_p_val",
    float,
    0.0,
    "smallest probability of a kept token, as a fraction of the greatest one",
    low=0.0,
    instead=_MIN_P_ARR.name,
)


# Few rows are split into slices of 8192 elements, one for each block.
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
    "Softmax of each row at a temperature: `output = softmax(logits / temperature)`. Logits are "
    "finite or -inf, and not all -inf in a row. A temperature of 0 makes all probabilities equal; "
    "it does not choose the greatest.",
    (
        Tensor(
            "workspace_buffer",
            "workspace_size",
            "uint8",
            writes=True,
            reads=False,
            contiguous=True,
            alignment=8,
            bytes_for=_softmax_bytes,
            doc="scratch of 2^20 bytes (more for rows above 2^23), for one stream at a time; "
            "None: fi_ffi keeps one for each stream",
        ),
        Tensor("logits", "n h", "float32", "rows of logits", contiguous=True),
        Tensor("output", "n h", "float32", "probabilities; may be `logits` itself", **_OUT),
        Tensor(
            "maybe_temperature_arr", "n", "float32", "`temperature_val` of each row", **renorm.MAYBE
        ),
        Scalar(
            "temperature_val",
            float,
            1.0,
            "divisor of the logits",
            low=0.0,
            instead="maybe_temperature_arr",
        ),
        PDL,
    ),
    dtypes={},
    releases=">=0.6.3",
    vector=_FLOATS,
    # A grid's second dimension counts slices.
    requires=("h >= 1", f"h <= {_SLICE * (2**16 - 1)}", f"n <= {INT32_MAX}"),
    in_place=(("output", "logits"),),
)

ROWS = (
    _SOFTMAX,
    *_sampler("sampling_from_probs", "Draw a token from the probabilities of each row."),
    *_seeded(
        "sampling_from_logits",
        "Draw a token from softmax(logits) of each row, as the greatest of logits + Gumbel noise. "
        "Logits are finite or -inf, and not all -inf in a row.",
        (
            Tensor("logits", "r h", "float32", "rows of logits", contiguous=True),
            replace(_TOKENS, doc="the tokens"),
            _INDICES,
            replace(_DETERMINISTIC, doc="ignored: the result is always deterministic"),
        ),
        dtypes=_DTYPES,
        # The kernel counts an output's random words in 32 bits.
        **_LIMITS | {"requires": (*_LIMITS["requires"], _OWN_SUBSEQUENCE)},
    ),
    *_sampler(
        "top_k_sampling_from_probs",
        "Draw a token from the `top_k` most probable ones of each row and ties with the last of "
        "them.",
        _TOP_K_ARR,
        _TOP_K,
        read_by_output="maybe_top_k_arr",
    ),
    *_sampler(
        "top_p_sampling_from_probs",
        "Draw a token from the most probable ones of each row that sum to `top_p`.",
        _TOP_P_ARR,
        _TOP_P,
    ),
    *_sampler(
        "min_p_sampling_from_probs",
        "Draw a token of each row from those with at least `min_p` times the greatest probability.",
        _MIN_P_ARR,
        _MIN_P,
        read_by_output="maybe_min_p_arr",
    ),
    *_sampler(
        "top_k_top_p_sampling_from_probs",
        "Draw a token of each row from those that pass both the `top_k` and the `top_p` filter, "
        "each applied to the whole row (FlashInfer's `joint` order).",
        _TOP_K_ARR,
        _TOP_K_FLOAT,
        _TOP_P_ARR,
        _TOP_P,
    ),
    *renorm.ROWS,
    *_seeded(
        "chain_speculative_sampling",
        "Verify a chain of drafted tokens. Each is accepted with probability `min(1, target / "
        "draft)`, up to the first rejection. Then one more token is drawn from the rest of the "
        "target's distribution.",
        (
            Tensor("draft_probs", "n s h", "float32", "the draft's distributions", contiguous=True),
            Tensor(
                "draft_token_ids",
                "n s",
                "int32",
                "drafted tokens, from 0 to h - 1",
                contiguous=True,
                index=("0 <= draft_token_ids < h",),
            ),
            Tensor(
                "target_probs", "n s+1 h", "float32", "the target's distributions", contiguous=True
            ),
            Tensor(
                "output_token_ids",
                "n s+1",
                "int32",
                "accepted tokens, the drawn one, then -1",
                **_OUT,
            ),
            Tensor(
                "output_accepted_token_num",
                "n",
                "int32",
                "grows by the number of drafted tokens that would be accepted independently",
                writes=True,
                contiguous=True,
                no_index="a number that grows",
            ),
            Tensor(
                "output_emitted_draft_token_num",
                "n",
                "int32",
                "grows by the number of accepted tokens",
                writes=True,
                contiguous=True,
                no_index="a number that grows",
            ),
            _DETERMINISTIC,
        ),
        dtypes={"S": _DTYPES["S"]},
        vector=_FLOATS,
        requires=("h >= 1", "s >= 1", f"h <= {INT32_MAX}", f"n <= {INT32_MAX}"),
    ),
)
