"""The quantisations that `fused_moe_90` was written for, and what each demands of its tensors.

What is here follows the binding's own checks and what it does not check: `runMoe` and
`gemm1` of cutlass_fused_moe_kernels.cuh, the launchers of moe_gemm and fp8_blockscale_gemm.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from fi_ffi.errors import ArchitectureError, ArgumentError
from fi_ffi.ops.moe.interface import MODULE

HALF = ("float16", "bfloat16")
FP8 = "float8_e4m3fn"
MXFP4_GROUP, INT4_GROUP, BLOCK = 32, 128, 128


@dataclass(frozen=True)
class Sizes:
    """What a call's tensors agree on; of experts, those of this rank."""

    tokens: int
    hidden: int
    inter: int
    experts: int
    top_k: int
    is_gated: bool

    @property
    def rows(self) -> int:
        """Of the first matrix: with a gate, the values it multiplies come first."""
        return 2 * self.inter if self.is_gated else self.inter

    def matrix(self, of_fc1: bool) -> tuple[int, int]:
        """Rows and columns of an expert's first or second matrix."""
        return (self.rows, self.hidden) if of_fc1 else (self.hidden, self.inter)


# The shapes that a scale may have, by dtype.
Shapes = Mapping[str, tuple[tuple[int, ...], ...]]


@dataclass(frozen=True)
class Scale:
    """One of `quant_scales`, for an activation dtype and sizes."""

    name: str
    shapes: Callable[[str, Sizes], Shapes]


@dataclass(frozen=True)
class Mode:
    """A quantisation: dtypes, flags, and what sizes and scales must be.

    `flags` are those of the init that are on.  `pack` values of a row of weights are in one
    element; both inner sizes are multiples of `multiple`.
    """

    name: str
    about: str
    activations: tuple[str, ...]
    weight: str | None
    flags: frozenset[str]
    pack: int
    multiple: int
    scales: tuple[Scale, ...] = ()
    # Of results, where the activations' own dtype is not the only one.
    outputs: tuple[str, ...] = ()
    has_tactics: bool = True
    # How many columns one step of the multiplication takes of rows of so many.
    step: Callable[[int], int] | None = None

    @property
    def is_w4(self) -> bool:
        return self.pack == 2

    def outputs_of(self, activation: str) -> tuple[str, ...]:
        return self.outputs or (activation,)


FLAGS = (
    "use_deepseek_fp8_block_scale", "use_w4_group_scaling", "use_mxfp8_act_scaling",
    "use_packed_weights",
)  # fmt: skip


def _per_expert(activation: str, sizes: Sizes) -> Shapes:
    return {"float32": ((sizes.experts,),)}


def _number(activation: str, sizes: Sizes) -> Shapes:
    return {"float32": ((),)}


def _number_or_per_expert(activation: str, sizes: Sizes) -> Shapes:
    return {"float32": ((), (sizes.experts,))}


def _blocks(of_fc1: bool) -> Callable[[str, Sizes], Shapes]:
    def shapes(activation: str, sizes: Sizes) -> Shapes:
        rows, columns = sizes.matrix(of_fc1)
        return {"float32": ((sizes.experts, -(-rows // BLOCK), -(-columns // BLOCK)),)}

    return shapes


def _mxfp4_groups(of_fc1: bool) -> Callable[[str, Sizes], Shapes]:
    def shapes(activation: str, sizes: Sizes) -> Shapes:
        rows, columns = sizes.matrix(of_fc1)
        blocks = columns // (4 * MXFP4_GROUP)
        # FlashInfer's callers give four of them as one int32.
        return {
            "uint8": ((sizes.experts, blocks, 4 * rows),),
            "int32": ((sizes.experts, blocks, rows),),
        }

    return shapes


def int4_interleave(columns: int) -> int:
    """How many groups' scales of a row lie together: what one step of the kernel takes."""
    return 4 if columns % 512 == 0 else 2 if columns % 256 == 0 else 1


def _int4_groups(of_fc1: bool) -> Callable[[str, Sizes], Shapes]:
    def shapes(activation: str, sizes: Sizes) -> Shapes:
        rows, columns = sizes.matrix(of_fc1)
        factor = int4_interleave(columns)
        shape = (sizes.experts, columns // (INT4_GROUP * factor), rows * factor)
        # bfloat16 whatever the activations are, and seen as their dtype by FlashInfer's callers.
        return dict.fromkeys(("bfloat16", activation), (shape,))

    return shapes


def _columns(of_fc1: bool) -> Callable[[str, Sizes], Shapes]:
    def shapes(activation: str, sizes: Sizes) -> Shapes:
        count = sizes.hidden if of_fc1 else sizes.inter
        return {activation: ((count,), (count, 1), (1, count))}

    return shapes


def _nothing(activation: str, sizes: Sizes) -> Shapes:
    return dict.fromkeys((*HALF, "float32", "uint8"), ((0,),))


PLAIN = Mode(
    "half", "float16 or bfloat16, not quantised", HALF, None, frozenset(), 1, 8,
)  # fmt: skip
PER_TENSOR = Mode(
    "fp8", "fp8 with one scale for each expert", (FP8,), FP8, frozenset(), 1, 16,
    scales=(
        Scale("fc1_dequant", _per_expert),
        Scale("fc2_quant", _number_or_per_expert),
        Scale("fc2_dequant", _per_expert),
        Scale("fc1_input_dequant", _number),
    ),
    outputs=HALF,
)  # fmt: skip
BLOCK_SCALE = Mode(
    "fp8_block_scale", "fp8 weights with a scale for each block of 128 by 128", ("bfloat16",), FP8,
    frozenset({"use_deepseek_fp8_block_scale"}), 1, BLOCK,
    scales=(Scale("fc1_scales", _blocks(True)), Scale("fc2_scales", _blocks(False))),
    has_tactics=False,
)  # fmt: skip
# In 4-bit modes rows of one step alone come out wrong, and differently each time, as soon as a
# block has several tiles: docs/moe.md.  MXFP4's weights are interleaved for bfloat16's conversion,
# and float16 has another.
MXFP4 = Mode(
    "mxfp4", "MXFP4 weights with bfloat16 activations", ("bfloat16",), "uint8",
    frozenset({"use_w4_group_scaling"}), 2, 4 * MXFP4_GROUP,
    step=lambda columns: 4 * MXFP4_GROUP,
    scales=(
        Scale("fc1_weight_scales", _mxfp4_groups(True)),
        Scale("fc2_weight_scales", _mxfp4_groups(False)),
    ),
)  # fmt: skip
INT4 = Mode(
    "int4", "int4 weights in groups of 128, activations quantised to fp8", HALF, "uint8",
    frozenset({"use_w4_group_scaling", "use_packed_weights"}), 2, INT4_GROUP,
    step=lambda columns: INT4_GROUP * int4_interleave(columns),
    scales=(
        Scale("fc1_weight_scales", _int4_groups(True)),
        Scale("fc2_weight_scales", _int4_groups(False)),
        Scale("fc1_act_scales", _columns(True)),
        Scale("fc2_act_scales", _columns(False)),
        Scale("fc1_weight_zeros", _nothing),
        Scale("fc2_weight_zeros", _nothing),
        Scale("fc1_alpha", _per_expert),
        Scale("fc2_alpha", _per_expert),
    ),
)  # fmt: skip

MODES = (PLAIN, PER_TENSOR, BLOCK_SCALE, MXFP4, INT4)


def mode_of(
    op: str, activation: str, weight: str, output: str, flags: frozenset[str],
    names: tuple[str, str, str] = ("activation_dtype", "weight_dtype", "output_dtype"),
) -> Mode:  # fmt: skip
    """The mode of these dtypes, which errors call by `names`, and flags.

    Raises `ArchitectureError` for what FlashInfer has for SM100 only, `ArgumentError` for what
    it has nowhere.
    """
    for mode in MODES:
        wanted = mode.weight or activation
        if activation in mode.activations and weight == wanted and flags == mode.flags:
            known = mode.outputs_of(activation)
            if output not in known:
                expected = f"{' or '.join(known)}, with {mode.about}"
                raise ArgumentError(op, names[2], got=output, expected=expected)
            return mode
    later = _needs_sm100(activation, weight, flags)
    if later:
        raise ArchitectureError(f"{op}: {later}: {MODULE} has no kernel for it (docs/moe.md)")
    of = [mode for mode in MODES if activation in mode.activations]
    if not of:
        raise ArgumentError(op, names[0], got=activation, expected=" or ".join((*HALF, FP8)))
    got = f"{weight} weights, {activation} activations and {_on(flags)}"
    raise ArgumentError(op, names[1], got=got, expected=_expected(activation, of))


def _on(flags: frozenset[str]) -> str:
    return " and ".join(sorted(flags)) or "no flag"


def _needs_sm100(activation: str, weight: str, flags: frozenset[str]) -> str:
    """What of Blackwell's it would be; "" where it is nothing of the kind."""
    if weight == "int64" and flags <= {"use_mxfp8_act_scaling"}:
        kind = "MXFP4" if activation == FP8 else "NVFP4"
        return f"{kind} weights (int64) with {activation} activations need SM100"
    if (activation, weight) == (FP8, FP8) and flags == {"use_mxfp8_act_scaling"}:
        return "MXFP8 weights and activations need SM100"
    return ""


def _expected(activation: str, of: list[Mode]) -> str:
    each = [f"{mode.weight or activation} with {_on(mode.flags)}" for mode in of]
    return "weights of " + ", or of ".join(each)
