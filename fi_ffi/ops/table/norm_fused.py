"""Fused kernels of diffusion transformers: the rest of FlashInfer's `norm` module.

`fused_qk_rmsnorm_rope` (`include/flashinfer/norm/fused_qk_rmsnorm_rope.cuh`) has a thread block
of a warp for each head, and ends the process where its numbers do not fit each other.  The layer
norms (`fused_dit_layernorm.cuh`) are for 3072 elements, read what they multiply and shift by from
tables of six parts, and read each bias whether there is one or not: zeros stand for none.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fi_ffi.ops.row import Absent, Row, Rule, Scalar, Tensor, Vector

_SOURCE = "csrc/flashinfer_norm_binding.cu"
# Less than this is taken for a mistake: the kernel divides by it in float32.
_LEAST = 1e-6
_EPS = Scalar("eps", float, 1e-6, "added to the mean square before the root", low=0.0)
_IN: dict[str, Any] = {"dtype": "T", "contiguous": True}
_OUT: dict[str, Any] = {"dtype": "O", "contiguous": True, "writes": True, "reads": False}
_HEADS = ("num_heads_q", "num_heads_k", "num_heads_v")
_CHANNELS = ("num_frame_channels", "num_height_channels", "num_width_channels")


def _size(name: str, axis: str = "") -> Scalar:
    return Scalar(name, int, None, "what the tensors have", low=0, size_of=axis or name)


def _count(name: str, doc: str) -> Scalar:
    return Scalar(name, int, None, doc, low=1, high=2**31 - 1)


def _channels(name: str, doc: str) -> Scalar:
    return Scalar(name, int, None, doc, low=0, high=256, multiple_of=2)


_ROWS_OF = "n num_rows 3072"
# In its six parts; counted in 64 bits.
_TABLE: dict[str, Any] = {"dtype": "T", "parts": 6, "alignment": 16, "offset_limit": 2**63}
_BIAS: dict[str, Any] = {"dtype": "float32", "contiguous": True, "alignment": 32}
_INPUT = Tensor("input", _ROWS_OF, doc="what is added to the residual", alignment=16, **_IN)
_RESIDUAL = Tensor("residual", _ROWS_OF, doc="the residual", alignment=16, **_IN)
_NEW: dict[str, Any] = {**_IN, "alignment": 16, "writes": True, "reads": False}


def _from_table(*names: str) -> tuple[Tensor, ...]:
    """What is multiplied or shifted by, and a bias of it."""
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
        name, "norm", "fused_dit_layernorm", _SOURCE, doc,
        (
            *args,
            Tensor("residual_out", _ROWS_OF, doc="the new residual", **_NEW),
            Tensor("norm_out", _ROWS_OF, doc="it normalised", **_NEW),
            Absent("sf_out"),
            Absent("sf_scale"),
            Tensor("input_sf_scale", "1", "float32", "multiplies `input`", optional=True,
                   empty=True),
            Scalar("epsilon", float, 1e-6, "added to the variance before the root", low=0.0),
            Absent("mode", "int", mode),
            Absent("output_format", "int"),  # bfloat16
        ),
        dtypes={"T": ("bfloat16",)},
        releases=">=0.6.11",
        vector=Vector(()),
        offset_limit=2**32,
        requires=(f"n <= {2**31 - 1}", f"num_rows <= {2**31 - 1}"),
        # A thread has read its own 8 elements of both before it writes the same ones.
        in_place=tuple((out, of) for out in ("residual_out", "norm_out")
                       for of in ("input", "residual")),
    )  # fmt: skip


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
        0, _INPUT, _RESIDUAL, *_from_table("gate"), *_GAMMA, *_NO_SHIFT,
    ),
    _layernorm(
        "fused_dit_residual_layernorm_scale_shift",
        "Layer-normalise `residual_out = input + residual`, then `norm_out = normalised * "
        f"{_SHIFTED}",
        1, _INPUT, replace(_RESIDUAL, optional=True, empty=True), *_NO_GATE, *_NO_GAMMA,
        *_from_table("scale", "shift"),
    ),
    _layernorm(
        "fused_dit_gate_residual_layernorm_scale_shift",
        "Layer-normalise `residual_out = input * (gate + gate_bias) + residual`, then "
        f"`norm_out = normalised * {_SHIFTED}",
        2, _INPUT, _RESIDUAL, *_from_table("gate"), *_NO_GAMMA, *_from_table("scale", "shift"),
    ),
)  # fmt: skip

ROWS = (
    Row(
        "fused_qk_rmsnorm_rope",
        "norm",
        "fused_qk_rmsnorm_rope",
        _SOURCE,
        "RMS-normalise queries and keys over all their heads, turn them by where their patch is "
        "in a video, and copy values: see docs/norm_fused.md.",
        (
            Tensor("qkv_in", "n num_heads_q+num_heads_k+num_heads_v head_dim",
                   doc="queries, keys and values of each token", **_IN),
            Tensor("q_weight", "num_heads_q head_dim", doc="scales of the queries",
                   **_IN),
            Tensor("k_weight", "num_heads_k head_dim", doc="scales of the keys",
                   **_IN),
            Tensor("q_out", "n num_heads_q head_dim", doc="the queries",
                   **_OUT),
            Tensor("k_out", "n num_heads_k head_dim", doc="the keys", **_OUT),
            Tensor("v_out", "n num_heads_v head_dim", doc="the values", **_OUT),
            _size("num_tokens", "n"),
            _count("seq_len", "tokens of one video; token i is its token i % seq_len"),
            _count("ppf", "patches in time"),
            _count("pph", "patches from top to bottom"),
            _count("ppw", "patches from left to right, which follow one another"),
            _channels("num_frame_channels", "elements of a head that turn with time, the first"),
            _channels("num_height_channels", "those that turn with the height, the next"),
            _channels("num_width_channels", "those that turn with the width"),
            *map(_size, _HEADS),
            _size("head_dim"),
            _EPS,
            Scalar("base", float, 10000.0, "pair i of c channels turns by base**(-2 * i / c) of a "
                   "patch", low=_LEAST),
            Scalar("interleave", bool, True, "pairs are neighbours; or else an element, and that "
                   "half a head further on"),
            Scalar("factor", float, 1.0, "YaRN's, by which slow pairs are slower; 1.0 for none",
                   low=_LEAST),
            Scalar("low", float, 0.0, "the pair up to which none is slower", low=0.0),
            Scalar("high", float, 0.0, "the pair from which all are", low=0.0),
            Scalar("attention_factor", float, 1.0, "what YaRN multiplies queries and keys by",
                   low=0.0),
            Scalar("is_qk_norm", bool, True, "whether to normalise"),
            Scalar("output_fp8", bool, False, "whether the outputs are float8"),
            Scalar("output_quant_scale", float, 1.0, "what float8 queries and keys are multiplied "
                   "by, before they are clamped to ±448", low=0.0),
            Scalar("v_quant_scale", float, 1.0, "the same of values", low=0.0),
        ),
        dtypes={"T": ("bfloat16",), "O": ("bfloat16", "float8_e4m3fn")},
        releases=">=0.6.12",
        # What goes into the rotation is rounded, but for float8.
        rounding="T",
        vector=Vector(("head_dim",), dtype="T"),
        offset_limit=2**63,
        requires=(
            "head_dim in (64, 128, 256)",
            f"n <= {2**31 - 1}",
            *(f"{heads} <= 32" for heads in _HEADS),
            Rule("seq_len", "seq_len == ppf * pph * ppw", "seq_len = ppf * pph * ppw"),
            Rule("num_frame_channels", f"head_dim == {' + '.join(_CHANNELS)}",
                 f"{' + '.join(_CHANNELS)} = head_dim"),
            # In float32, which is what the kernel compares.
            Rule("attention_factor", "attention_factor == 1 or abs(factor - 1) > 2**-23",
                 "an attention_factor of 1.0, or a factor that is not"),
            Rule("output_fp8", "output_fp8 == (O == 'float8_e4m3fn')",
                 "output_fp8 where O is float8_e4m3fn, and only there"),
        ),
    ),
    *_LAYERNORMS,
)  # fmt: skip
