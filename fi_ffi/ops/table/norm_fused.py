"""Fused kernels for diffusion transformers: the rest of FlashInfer's `norm` module.

`fused_qk_rmsnorm_rope` (`include/flashinfer/norm/fused_qk_rmsnorm_rope.cuh`) runs a thread block of
one warp for each head, and ends the process if its sizes are inconsistent. The layer norms
(`fused_dit_layernorm.cuh`) are for 3072 elements, read their scales and shifts from tables of six
parts, and read each bias whether it is given or not: zeros stand for a missing one.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fi_ffi.ops.call.arguments import INT32_MAX
from fi_ffi.ops.call.row import Absent, Row, Rule, Scalar, Tensor, Vector

_SOURCE = "csrc/flashinfer_norm_binding.cu"
# The least value that is not taken for a mistake: the kernel divides by it in float32.
_LEAST = 1e-6
_EPS = Scalar("eps", float, 1e-6, "added to the mean square before the root", low=0.0)
_IN: dict[str, Any] = {"dtype": "T", "contiguous": True}
_OUT: dict[str, Any] = {"dtype": "O", "contiguous": True, "writes": True, "reads": False}
_HEADS = ("num_heads_q", "num_heads_k", "num_heads_v")
_CHANNELS = ("num_frame_channels", "num_height_channels", "num_width_channels")


def _size(name: str, axis: str = "") -> Scalar:
    return Scalar(name, int, None, "same as in the tensors", low=0, size_of=axis or name)


def _count(name: str, doc: str) -> Scalar:
    return Scalar(name, int, None, doc, low=1, high=INT32_MAX)


def _channels(name: str, doc: str) -> Scalar:
    return Scalar(name, int, None, doc, low=0, high=256, multiple_of=2)


_ROWS_OF = "n num_rows 3072"
# One of the table's six parts; its elements are counted in 64 bits.
_TABLE: dict[str, Any] = {"dtype": "T", "parts": 6, "alignment": 16, "offset_limit": 2**63}
_BIAS: dict[str, Any] = {"dtype": "float32", "contiguous": True, "alignment": 32}
_INPUT = Tensor("input", _ROWS_OF, doc="added to the residual", alignment=16, **_IN)
_RESIDUAL = Tensor("residual", _ROWS_OF, doc="the residual", alignment=16, **_IN)
_NEW: dict[str, Any] = {**_IN, "alignment": 16, "writes": True, "reads": False}


def _from_table(*names: str) -> tuple[Tensor, ...]:
    """Return the scales or shifts of a table, and the bias of each."""
    pairs = (
        (
            Tensor(name, _ROWS_OF, doc=f"the {name} of each row, a part of a table", **_TABLE),
            Tensor(f"{name}_bias", "3072", doc=f"added to `{name}`", or_zeros=True, **_BIAS),
        )
        for name in names
    )
    return tuple(tensor for pair in pairs for tensor in pair)


def _layernorm(name: str, doc: str, mode: int, *args: Tensor | Absent) -> Row:
    return Row(
        name,
        "norm",
        "fused_dit_layernorm",
        _SOURCE,
        doc,
        (
            *args,
            Tensor("residual_out", _ROWS_OF, doc="the new residual", **_NEW),
            Tensor("norm_out", _ROWS_OF, doc="the normalised residual", **_NEW),
            Absent("sf_out"),
            Absent("sf_scale"),
            Tensor(
                "input_sf_scale", "1", "float32", "factor of `input`", optional=True, empty=True
            ),
            Scalar("epsilon", float, 1e-6, "added to the variance before the root", low=0.0),
            Absent("mode", "int", mode),
            Absent("output_format", "int"),  # bfloat16
        ),
        dtypes={"T": ("bfloat16",)},
        releases=">=0.6.11",
        vector=Vector(()),
        offset_limit=2**32,
        requires=(f"n <= {INT32_MAX}", f"num_rows <= {INT32_MAX}"),
        # A thread reads its 8 elements of both tensors before it writes the same elements.
        in_place=tuple(
            (out, of) for out in ("residual_out", "norm_out") for of in ("input", "residual")
        ),
    )


_NO_GATE, _NO_GAMMA = (Absent("gate"), Absent("gate_bias")), (Absent("gamma"), Absent("beta"))
_GAMMA = (
    Tensor("gamma", "3072", doc="scale of each column", **_BIAS),
    Tensor("beta", "3072", doc="shift of each column", **_BIAS),
)
_NO_SHIFT = tuple(map(Absent, ("scale", "scale_bias", "shift", "shift_bias")))
_SHIFTED = "(1 + scale + scale_bias) + shift + shift_bias`."
_LAYERNORMS = (
    _layernorm(
        "fused_dit_gate_residual_layernorm_gamma_beta",
        "Layer-normalise `residual_out = input * (gate + gate_bias) + residual`, then "
        "`norm_out = normalised * gamma + beta`.",
        0,
        _INPUT,
        _RESIDUAL,
        *_from_table("gate"),
        *_GAMMA,
        *_NO_SHIFT,
    ),
    _layernorm(
        "fused_dit_residual_layernorm_scale_shift",
        "Layer-normalise `residual_out = input + residual`, then `norm_out = normalised * "
        f"{_SHIFTED}",
        1,
        _INPUT,
        replace(_RESIDUAL, optional=True, empty=True),
        *_NO_GATE,
        *_NO_GAMMA,
        *_from_table("scale", "shift"),
    ),
    _layernorm(
        "fused_dit_gate_residual_layernorm_scale_shift",
        "Layer-normalise `residual_out = input * (gate + gate_bias) + residual`, then "
        f"`norm_out = normalised * {_SHIFTED}",
        2,
        _INPUT,
        _RESIDUAL,
        *_from_table("gate"),
        *_NO_GAMMA,
        *_from_table("scale", "shift"),
    ),
)

ROWS = (
    Row(
        "fused_qk_rmsnorm_rope",
        "norm",
        "fused_qk_rmsnorm_rope",
        _SOURCE,
        "RMS-normalise queries and keys over all heads, rotate them by the position of their patch "
        "in a video, and copy values: see docs/norm_fused.md.",
        (
            Tensor(
                "qkv_in",
                "n num_heads_q+num_heads_k+num_heads_v head_dim",
                doc="queries, keys and values of each token",
                **_IN,
            ),
            Tensor("q_weight", "num_heads_q head_dim", doc="scales of the queries", **_IN),
            Tensor("k_weight", "num_heads_k head_dim", doc="scales of the keys", **_IN),
            Tensor("q_out", "n num_heads_q head_dim", doc="the queries", **_OUT),
            Tensor("k_out", "n num_heads_k head_dim", doc="the keys", **_OUT),
            Tensor("v_out", "n num_heads_v head_dim", doc="the values", **_OUT),
            _size("num_tokens", "n"),
            _count("seq_len", "tokens in a video; token i is token i % seq_len of its video"),
            _count("ppf", "patches in time"),
            _count("pph", "patches from top to bottom"),
            _count("ppw", "patches from left to right, in this order in memory"),
            _channels("num_frame_channels", "elements of a head rotated by time: the first ones"),
            _channels("num_height_channels", "elements rotated by height: the next ones"),
            _channels("num_width_channels", "elements rotated by width"),
            *map(_size, _HEADS),
            _size("head_dim"),
            _EPS,
            Scalar(
                "base",
                float,
                10000.0,
                "pair i of c channels turns by base**(-2 * i / c) for each patch",
                low=_LEAST,
            ),
            Scalar(
                "interleave",
                bool,
                True,
                "True: pairs are neighbours; False: an element and the one half a head later",
            ),
            Scalar("factor", float, 1.0, "YaRN's factor for slow pairs; 1.0: no YaRN", low=_LEAST),
            Scalar("low", float, 0.0, "the last pair that YaRN leaves alone", low=0.0),
            Scalar("high", float, 0.0, "the first pair that YaRN scales in full", low=0.0),
            Scalar("attention_factor", float, 1.0, "YaRN's factor of queries and keys", low=0.0),
            Scalar("is_qk_norm", bool, True, "True: normalise"),
            Scalar("output_fp8", bool, False, "True: the outputs are float8"),
            Scalar(
                "output_quant_scale",
                float,
                1.0,
                "factor of float8 queries and keys, before they are clamped to ±448",
                low=0.0,
            ),
            Scalar("v_quant_scale", float, 1.0, "the same for values", low=0.0),
        ),
        dtypes={"T": ("bfloat16",), "O": ("bfloat16", "float8_e4m3fn")},
        releases=">=0.6.12",
        # The rotation's input is rounded, except for float8.
        rounding="T",
        vector=Vector(("head_dim",), dtype="T"),
        offset_limit=2**63,
        requires=(
            "head_dim in (64, 128, 256)",
            f"n <= {INT32_MAX}",
            *(f"{heads} <= 32" for heads in _HEADS),
            Rule("seq_len", "seq_len == ppf * pph * ppw", "seq_len = ppf * pph * ppw"),
            Rule(
                "num_frame_channels",
                f"head_dim == {' + '.join(_CHANNELS)}",
                f"{' + '.join(_CHANNELS)} = head_dim",
            ),
            # The kernel compares in float32.
            Rule(
                "attention_factor",
                "attention_factor == 1 or abs(factor - 1) > 2**-23",
                "an attention_factor of 1.0, or a factor that is not",
            ),
            Rule(
                "output_fp8",
                "output_fp8 == (O == 'float8_e4m3fn')",
                "output_fp8 if and only if O is float8_e4m3fn",
            ),
        ),
    ),
    *_LAYERNORMS,
)
