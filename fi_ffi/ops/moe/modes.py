"""The quantisations that `fused_moe_90` was written for, and the rows of its methods in each.

What is here follows the binding's own checks and what it does not check: `runMoe` and
`gemm1` of cutlass_fused_moe_kernels.cuh, the launchers of moe_gemm and fp8_blockscale_gemm.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fi_ffi.abi.tensor import TensorDesc
from fi_ffi.errors import ArchitectureError, ArgumentError
from fi_ffi.ops.moe.interface import MODULE, SOURCE, Interface
from fi_ffi.ops.row import Arg, IntArray, Row, Rule, Scalar, Tensor, TensorArray, Vector

HALF = ("float16", "bfloat16")
FP8 = "float8_e4m3fn"
MXFP4_GROUP, INT4_GROUP, BLOCK = 32, 128, 128
_INT32 = 2**31 - 1
_WIDE, _WORD = 16, 4  # bytes that a kernel loads at once
SWIGLU = ("swiglu_alpha", "swiglu_beta", "swiglu_limit")


@dataclass(frozen=True)
class Form:
    """One shape that a scale may have, with the dtypes it may have in that shape.

    In `axes`, ROWS are those of the first matrix; of `dtypes`, "A" is the activations'.
    """

    dtypes: tuple[str, ...]
    axes: str

    def fits(self, desc: TensorDesc) -> bool:
        """Whether a tensor's dtype, rank and axes of 1 are this form's; sizes are checked later."""
        if desc.dtype.name not in self.dtypes and "A" not in self.dtypes:
            return False
        axes = self.axes.split()
        if desc.kind.rank != len(axes):
            return False
        return all(n == 1 for axis, n in zip(axes, desc.shape, strict=True) if axis == "1")

    def names(self, activation: str) -> tuple[str, ...]:
        return tuple(dict.fromkeys(activation if name == "A" else name for name in self.dtypes))


@dataclass(frozen=True)
class Scale:
    """One of `quant_scales`, in the forms that it may have."""

    name: str
    forms: tuple[Form, ...]

    @classmethod
    def read(cls, text: str) -> Scale:
        """From text such as "fc2_quant: float32[] | float32[experts]"."""
        name, forms = text.split(": ")
        found = re.findall(r"([^][ |]+)\[([^]]*)\]", forms)
        return cls(name, tuple(Form(tuple(dtypes.split(",")), axes) for dtypes, axes in found))


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

    def forms_of(self, scales: list[TensorDesc]) -> tuple[int, ...]:
        """Which form each scale has; the first, where it has none of them."""
        return tuple([
            0 if len(one.forms) == 1
            else next((i for i, form in enumerate(one.forms) if form.fits(desc)), 0)
            for one, desc in zip(self.scales, scales, strict=True)
        ])  # fmt: skip

    @property
    def scale_names(self) -> dict[str, str]:
        """What callers call the arguments that are scales."""
        return {
            f"quant_scales_{i}": f"quant_scales[{i}] ({scale.name})"
            for i, scale in enumerate(self.scales)
        }


def int4_interleave(columns: int) -> int:
    """How many groups' scales of a row lie side by side: as many as a step of the kernel takes."""
    return 4 if columns % 512 == 0 else 2 if columns % 256 == 0 else 1


def _scales(*texts: str) -> tuple[Scale, ...]:
    return tuple(map(Scale.read, texts))


PLAIN = Mode(
    "half", "float16 or bfloat16, not quantised", HALF, None, frozenset(), 1, 8,
)  # fmt: skip
PER_TENSOR = Mode(
    "fp8", "fp8 with one scale for each expert", (FP8,), FP8, frozenset(), 1, 16,
    scales=_scales(
        "fc1_dequant: float32[experts]", "fc2_quant: float32[] | float32[experts]",
        "fc2_dequant: float32[experts]", "fc1_input_dequant: float32[]",
    ),
    outputs=HALF,
)  # fmt: skip
BLOCK_SCALE = Mode(
    "fp8_block_scale", "fp8 weights with a scale for each block of 128 by 128", ("bfloat16",), FP8,
    frozenset({"use_deepseek_fp8_block_scale"}), 1, BLOCK,
    scales=_scales(
        "fc1_scales: float32[experts ROWS/128 hidden_size/128]",
        "fc2_scales: float32[experts hidden_size/128 inter_size/128]",
    ),
    has_tactics=False,
)  # fmt: skip
# In 4-bit modes rows of one step alone come out wrong, and differently each time, as soon as a
# block has several tiles: docs/moe.md.  MXFP4's weights are interleaved for bfloat16's conversion,
# and float16 has another.
MXFP4 = Mode(
    "mxfp4", "MXFP4 weights with bfloat16 activations", ("bfloat16",), "uint8",
    frozenset({"use_w4_group_scaling"}), 2, 4 * MXFP4_GROUP,
    step=lambda columns: 4 * MXFP4_GROUP,
    # FlashInfer's callers give four of them as one int32.
    scales=_scales(
        "fc1_weight_scales: uint8[experts hidden_size/128 4*ROWS]"
        " | int32[experts hidden_size/128 ROWS]",
        "fc2_weight_scales: uint8[experts inter_size/128 4*hidden_size]"
        " | int32[experts inter_size/128 hidden_size]",
    ),
)  # fmt: skip
INT4 = Mode(
    "int4", "int4 weights in groups of 128, activations quantised to fp8", HALF, "uint8",
    frozenset({"use_w4_group_scaling", "use_packed_weights"}), 2, INT4_GROUP,
    step=lambda columns: INT4_GROUP * int4_interleave(columns),
    # Scales of weights are bfloat16 whatever the activations are, and seen as their dtype by
    # FlashInfer's callers.
    scales=_scales(
        "fc1_weight_scales: bfloat16,A[experts groups1 scales1]",
        "fc2_weight_scales: bfloat16,A[experts groups2 scales2]",
        "fc1_act_scales: A[hidden_size] | A[hidden_size 1] | A[1 hidden_size]",
        "fc2_act_scales: A[inter_size] | A[inter_size 1] | A[1 inter_size]",
        "fc1_weight_zeros: float16,bfloat16,float32,uint8[0]",
        "fc2_weight_zeros: float16,bfloat16,float32,uint8[0]",
        "fc1_alpha: float32[experts]", "fc2_alpha: float32[experts]",
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
            known = mode.outputs or (activation,)
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
    each = [f"{mode.weight or activation} with {_on(mode.flags)}" for mode in of]
    expected = "weights of " + ", or of ".join(each)
    raise ArgumentError(op, names[1], got=got, expected=expected)


def _on(flags: frozenset[str]) -> str:
    return " and ".join(sorted(flags)) or "no flag"


def _needs_sm100(activation: str, weight: str, flags: frozenset[str]) -> str:
    """What SM100 has of these dtypes and flags; "" where it has nothing either."""
    if weight == "int64" and flags <= {"use_mxfp8_act_scaling"}:
        kind = "MXFP4" if activation == FP8 else "NVFP4"
        return f"{kind} weights (int64) with {activation} activations need SM100"
    if (activation, weight) == (FP8, FP8) and flags == {"use_mxfp8_act_scaling"}:
        return "MXFP8 weights and activations need SM100"
    return ""


# Rows.  Sizes of experts are those of this rank.

_COUNTS = tuple(Scalar(f"{kind}_size", int, 1, "", 1, _INT32) for kind in ("tp", "ep"))
_RANKS = tuple(Scalar(f"{kind}_rank", int, 0, "", 0, _INT32) for kind in ("tp", "ep"))
_NUMBERS: tuple[Arg, ...] = (
    *_COUNTS, *_RANKS, Scalar("enable_alltoall", bool, False, ""),
    Scalar("enable_pdl", bool, False, ""), Scalar("base_activation_type", int, None, ""),
    Scalar("activation_type", int, None, ""), IntArray("profile_ids", "Optional<Array<int>>"),
    Scalar("top_k", int, None, "", 1, _INT32), Scalar("gemm_idx", int, None, ""),
    Scalar("profile_id", int, None, ""), Scalar("do_preparation", bool, None, ""),
)  # fmt: skip
_INNER = ("hidden_size", "inter_size")
_RANK_RULES = tuple(
    Rule(f"{kind}_rank", f"{kind}_rank < {kind}_size", f"less than {kind}_size")
    for kind in ("tp", "ep")
)  # fmt: skip


def _count_rules(argument: str) -> tuple[Rule, ...]:
    """The kernels count in 32 bits."""

    most = {
        "tokens * experts * ep_size": "tokens * experts of all ranks",
        "tokens * top_k": "tokens * experts of a token",
        "top_k * experts * ep_size": "experts of a token * experts of all ranks",
    }
    counts = [Rule(argument, f"{count} <= {_INT32}", f"{told} of at most {_INT32}")
              for count, told in most.items()]  # fmt: skip
    expected = "at most experts * ep_size for a token, which are all there are"
    return *counts, Rule(argument, "top_k <= experts * ep_size", expected)


def _step_rule(axis: str, step: Callable[[int], int]) -> Rule:
    expected = f"a {axis} of more columns than the kernel takes in one step"
    name = f"step_of_{axis}"
    return Rule("fc2_expert_weights", f"{axis} > {name}({axis})", expected, {name: step})


def _int4_rules(gates: int) -> tuple[Rule, ...]:
    """As many scales of a row lie side by side as the kernel takes in one step."""

    def rule(i: int, columns: str, rows: str, times: int) -> Rule:
        def wanted(columns: int, rows: int) -> tuple[int, int]:
            factor = int4_interleave(columns)
            return columns // (INT4_GROUP * factor), times * rows * factor

        def expected(groups: int, scales: int, *sizes: int) -> str:
            return "the shape [experts, {}, {}]".format(*wanted(*sizes))

        name = f"wanted{i}"
        holding = f"(groups{i}, scales{i}) == {name}({columns}, {rows})"
        return Rule(f"quant_scales_{i - 1}", holding, expected, {name: wanted})

    return rule(1, "hidden_size", "inter_size", gates), rule(2, "inter_size", "hidden_size", 1)


def _tensors(mode: Mode, dtypes: tuple[str, str, str], rows: str) -> tuple[Tensor, ...]:
    activation, weight, output = dtypes
    packed = f"/{mode.pack}" if mode.pack > 1 else ""

    def tensor(name: str, axes: str, dtype: str, alignment: int = _WIDE, **more: Any) -> Tensor:
        return Tensor(name, axes, dtype, "", contiguous=True, alignment=alignment, **more)

    return (
        tensor("output", "tokens hidden_size", output, writes=True, reads=False),
        tensor("input", "tokens hidden_size", activation),
        tensor("token_selected_experts", "tokens top_k", "int32", _WORD),
        tensor("token_final_scales", "tokens top_k", "float32", _WORD, optional=True),
        tensor("fc1_expert_weights", f"experts {rows} hidden_size{packed}", weight),
        tensor("fc1_expert_biases", f"experts {rows}", output, optional=True),
        tensor("fc2_expert_weights", f"experts hidden_size inter_size{packed}", weight),
        tensor("fc2_expert_biases", "experts hidden_size", output, optional=True),
        *(tensor(name, "experts", "float32", _WORD, optional=True) for name in SWIGLU),
    )


def _scale_tensor(i: int, form: Form, activation: str, rows: str) -> Tensor:
    axes = form.axes.replace("4*ROWS", "8*inter_size" if rows[0] == "2" else "4*inter_size")
    alignment = _WORD if "float32" in form.dtypes else _WIDE
    return Tensor(
        f"quant_scales_{i}", axes.replace("ROWS", rows), f"S{i}", "", as_object=True,
        contiguous=True, alignment=alignment,
    )  # fmt: skip


@functools.cache
def row_of(
    interface: Interface, method: str, mode: Mode, dtypes: tuple[str, str, str], is_gated: bool,
    forms: tuple[int, ...] = (),
) -> Row:  # fmt: skip
    """A method in a mode, with scales of these forms."""
    function, activation = interface.methods[method], dtypes[0]
    rows = "2*inter_size" if is_gated else "inter_size"
    scales, allowed = [], {}
    for i, number in enumerate(forms):
        form = mode.scales[i].forms[number]
        scales.append(_scale_tensor(i, form, activation, rows))
        allowed[f"S{i}"] = form.names(activation)
    known: dict[str, Any] = {arg.name: arg for arg in (*_tensors(mode, dtypes, rows), *_NUMBERS)}
    if scales:
        known["quant_scales"] = TensorArray("quant_scales", tuple(scales))
    args: tuple[Arg, ...] = tuple(
        known.get(name) or function.absent(name) for name in function.names
    )
    is_run = method == "run_moe"
    rules = [*_RANK_RULES, *_count_rules("token_selected_experts" if is_run else "top_k")]
    if mode.step is not None:
        rules += [_step_rule(axis, mode.step) for axis in _INNER]
    if mode is INT4 and is_run:
        rules += _int4_rules(1 + is_gated)
    limits = [
        "experts >= 1",
        "top_k >= 1" if is_run else "tokens >= 1",
        *(f"{axis} >= {mode.multiple}" for axis in _INNER),
        *(f"{axis} % {mode.multiple} == 0" for axis in _INNER),
        *(f"{axis} <= {_INT32 // 2}" for axis in _INNER),
    ]
    if mode.pack > 1:  # of an expert's 4-bit weights the interleaving and the scales count
        limits.append(f"inter_size * hidden_size <= {_INT32 // (1 + is_gated)}")
    return Row(
        "cutlass_fused_moe" if is_run else f"cutlass_fused_moe.{method}", MODULE, method, SOURCE,
        "", args, allowed, interface.releases, variant=f".{mode.name}", offset_limit=2**63,
        vector=Vector(()), together=("fc1_expert_biases", "fc2_expert_biases"),
        allocates=True, capabilities=(9,), requires=(*limits, *rules),
    )  # fmt: skip
