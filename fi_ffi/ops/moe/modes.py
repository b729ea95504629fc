"""The quantisations of `fused_moe_90` and Blackwell's modules: dtypes, flags, sizes and scales."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from fi_ffi.abi.tensor import TensorDesc
from fi_ffi.ops.call.arguments import Refusal
from fi_ffi.ops.call.notation import round_up
from fi_ffi.ops.call.releases import of_release, release_in_force
from fi_ffi.ops.moe.interface import FOLDED_RELEASES, W4_RELEASES

HALF = ("float16", "bfloat16")
FP8 = "float8_e4m3fn"
MXFP4_GROUP, INT4_GROUP, BLOCK = 32, 128, 128


@dataclass(frozen=True)
class ScaleShape:
    """One shape that a scale may have, and the dtypes allowed with it.

    In `axes`, ROWS stands for the rows of the first matrix. In `dtypes`, "A" stands for the
    activations' dtype.
    """

    dtypes: tuple[str, ...]
    axes: str

    def fits(self, desc: TensorDesc) -> bool:
        """Whether a tensor has this shape's dtype, rank and axes of 1; sizes are checked later."""
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
    """One of `quant_scales`, with its possible shapes."""

    name: str
    shapes: tuple[ScaleShape, ...]

    @classmethod
    def read(cls, text: str) -> Scale:
        """Parse text such as "fc2_quant: float32[] | float32[experts]"."""
        name, shapes = text.split(": ")
        pairs = re.findall(r"([^][ |]+)\[([^]]*)\]", shapes)
        return cls(name, tuple(ScaleShape(tuple(d.split(",")), axes) for d, axes in pairs))

    def shape_of(self, desc: TensorDesc) -> int:
        """Return the index of a tensor's shape; 0 if it has none of them."""
        for i, shape in enumerate(self.shapes):
            if shape.fits(desc):
                return i
        return 0


@dataclass(frozen=True)
class Blocks:
    """Scales of `size` elements of a row each, in tiles of 128 rows and 4 columns.

    The binding rounds the rows of fc1's linear half and of its gate up to `rows` each.
    """

    size: int
    rows: int

    def columns(self, elements: int) -> int:
        """Return the number of scales in a row, rounded up to whole tiles."""
        return round_up(elements, 4 * self.size) // self.size

    def count(self, rows: int, elements: int, is_swizzled: bool) -> int:
        """Return the number of scales of this many rows, in tiles or in plain rows."""
        return (round_up(rows, 128) if is_swizzled else rows) * self.columns(elements)


@dataclass(frozen=True)
class Mode:
    """A quantisation: dtypes, flags, and the requirements for sizes and scales.

    `flags` are the flags of `init` that are on. One element of a weight has `pack` values; both
    inner sizes are multiples of `multiple`.
    """

    name: str
    about: str
    activations: tuple[str, ...]
    weight: str | None
    multiple: int
    flags: frozenset[str] = frozenset()
    pack: int = 1
    scales: tuple[Scale, ...] = ()
    # Dtypes of results; empty if only the activations' dtype is allowed.
    outputs: tuple[str, ...] = ()
    has_tactics: bool = True
    # The columns of one step of the multiplication, from the columns of a row.
    step: Callable[[int], int] | None = None
    # The block scales of weights, and the scales of quantised activations.
    blocks: Blocks | None = None
    input_sf: Scale | None = None
    # Major compute capabilities with kernels; releases with this layout; releases that have
    # activations without a gate in this mode; releases whose profiler runs it.
    capabilities: tuple[int, ...] = (9,)
    releases: str = ""
    gateless: str = ""
    profiled: str = ""

    def shapes_of(self, scales: list[TensorDesc]) -> tuple[int, ...]:
        """Return the index of each scale's shape; 0 if it has none of them."""
        wanted = self.scales if self.input_sf is None else (*self.scales, self.input_sf)
        both = zip(wanted, scales, strict=True)
        return tuple([0 if len(one.shapes) == 1 else one.shape_of(desc) for one, desc in both])

    @property
    def scale_names(self) -> dict[str, str]:
        """The callers' names of the scale arguments."""
        return {
            f"quant_scales_{i}": f"quant_scales[{i}] ({scale.name})"
            for i, scale in enumerate(self.scales)
        }


def int4_interleave(columns: int) -> int:
    """Return how many groups' scales of a row are adjacent: as many as one step of the kernel
    takes."""
    return 4 if columns % 512 == 0 else 2 if columns % 256 == 0 else 1


def _scales(*texts: str) -> tuple[Scale, ...]:
    return tuple(map(Scale.read, texts))


_BLACKWELL, _EVERY = (10, 11, 12), (9, 10, 11, 12)
PLAIN = Mode(
    "half",
    "float16 or bfloat16, not quantised",
    activations=HALF,
    weight=None,
    multiple=8,
    capabilities=_EVERY,
)
PER_TENSOR = Mode(
    "fp8",
    "fp8 with one scale for each expert",
    activations=(FP8,),
    weight=FP8,
    multiple=16,
    scales=_scales(
        "fc1_dequant: float32[experts]",
        "fc2_quant: float32[] | float32[experts]",
        "fc2_dequant: float32[experts]",
        "fc1_input_dequant: float32[]",
    ),
    outputs=HALF,
    capabilities=_EVERY,
)
BLOCK_SCALE = Mode(
    "fp8_block_scale",
    "fp8 weights with a scale for each block of 128 by 128",
    activations=("bfloat16",),
    weight=FP8,
    multiple=BLOCK,
    flags=frozenset({"use_deepseek_fp8_block_scale"}),
    scales=_scales(
        "fc1_scales: float32[experts ROWS/128 hidden_size/128]",
        "fc2_scales: float32[experts hidden_size/128 inter_size/128]",
    ),
    has_tactics=False,
)
# In 4-bit modes, rows that need only one step give wrong and varying results as soon as a block has
# several tiles (docs/moe.md). MXFP4 weights are interleaved for the conversion to bfloat16; the
# conversion to float16 needs another order.
MXFP4 = Mode(
    "mxfp4",
    "MXFP4 weights with bfloat16 activations",
    activations=("bfloat16",),
    weight="uint8",
    multiple=4 * MXFP4_GROUP,
    flags=frozenset({"use_w4_group_scaling"}),
    pack=2,
    step=lambda columns: 4 * MXFP4_GROUP,
    releases=W4_RELEASES,
    # FlashInfer's callers pass four of these as one int32.
    scales=_scales(
        "fc1_weight_scales: uint8[experts hidden_size/128 4*ROWS]"
        " | int32[experts hidden_size/128 ROWS]",
        "fc2_weight_scales: uint8[experts inter_size/128 4*hidden_size]"
        " | int32[experts inter_size/128 hidden_size]",
    ),
)
INT4 = Mode(
    "int4",
    "int4 weights in groups of 128, activations quantised to fp8",
    activations=HALF,
    weight="uint8",
    multiple=INT4_GROUP,
    flags=frozenset({"use_w4_group_scaling", "use_packed_weights"}),
    pack=2,
    step=lambda columns: INT4_GROUP * int4_interleave(columns),
    releases=W4_RELEASES,
    # The scales of weights are always bfloat16; FlashInfer's callers view them as the activations'
    # dtype.
    scales=_scales(
        "fc1_weight_scales: bfloat16,A[experts groups1 scales1]",
        "fc2_weight_scales: bfloat16,A[experts groups2 scales2]",
        "fc1_act_scales: A[hidden_size] | A[hidden_size 1] | A[1 hidden_size]",
        "fc2_act_scales: A[inter_size] | A[inter_size 1] | A[1 inter_size]",
        "fc1_weight_zeros: float16,bfloat16,float32,uint8[0]",
        "fc2_weight_zeros: float16,bfloat16,float32,uint8[0]",
        "fc1_alpha: float32[experts]",
        "fc2_alpha: float32[experts]",
    ),
)
# Folded scales: a block has those of 64 rows and 128 columns, in lines of 16 bytes. The smallest
# step of any tactic is 128 columns.
_FOLDED: dict[str, Any] = {"step": lambda columns: 128, "releases": FOLDED_RELEASES}
MXFP4_FOLDED = replace(
    MXFP4,
    **_FOLDED,
    scales=_scales(
        "fc1_weight_scales: uint8[experts ROWS/64 hidden_size/128 16 16]"
        " | int32[experts ROWS/64 hidden_size/128 16 4]",
        "fc2_weight_scales: uint8[experts hidden_size/64 inter_size/128 16 16]"
        " | int32[experts hidden_size/64 inter_size/128 16 4]",
    ),
)
INT4_FOLDED = replace(
    INT4,
    **_FOLDED,
    scales=(
        *_scales(
            "fc1_weight_scales: bfloat16,A[experts ROWS/64 hidden_size/128 8 8]",
            "fc2_weight_scales: bfloat16,A[experts hidden_size/64 inter_size/128 8 8]",
        ),
        *INT4.scales[2:],
    ),
)

# Blackwell. 16 values of 4 bits are one int64; the binding takes four scales of weights as one
# int32.
_OF_16, _OF_32 = Blocks(16, 64), Blocks(32, 128)
_SF = "input_sf: uint8,{0}[sf_count] | uint8,{0}[sf_rows sf_columns]"
_SF_OF_16, _SF_OF_32 = map(Scale.read, (_SF.format("float8_e4m3fn"), _SF.format("float8_e8m0fnu")))
_BLOCK_1, _BLOCK_2 = _scales(
    "fc1_weight_block: int32[experts block_rows1 block_columns1]",
    "fc2_weight_block: int32[experts block_rows2 block_columns2]",
)
_ACT_1, _GLOBAL_1, _ACT_2, _GLOBAL_2 = _scales(
    "fc1_act_global: float32[] | float32[experts]",
    "fc1_global: float32[experts]",
    "fc2_act_global: float32[] | float32[experts]",
    "fc2_global: float32[experts]",
)
NVFP4 = Mode(
    "nvfp4",
    "NVFP4 weights, activations quantised to NVFP4 by the kernels",
    activations=HALF,
    weight="int64",
    multiple=32,
    pack=16,
    scales=(_ACT_1, _BLOCK_1, _GLOBAL_1, _ACT_2, _BLOCK_2, _GLOBAL_2),
    blocks=_OF_16,
    capabilities=_BLACKWELL,
)
NVFP4_PACKED = replace(
    NVFP4,
    name="nvfp4_packed",
    about="NVFP4 weights and activations",
    activations=("uint8", "int64"),
    outputs=HALF,
    input_sf=_SF_OF_16,
)
FP8_MXFP4 = Mode(
    "fp8_mxfp4",
    "MXFP4 weights and fp8 activations",
    activations=(FP8,),
    weight="int64",
    multiple=128,
    pack=16,
    scales=(_BLOCK_1, _GLOBAL_1, _ACT_2, _BLOCK_2, _GLOBAL_2),
    outputs=HALF,
    blocks=_OF_32,
    capabilities=_BLACKWELL,
    gateless=">=0.6.10",
)
MXFP8_MXFP4 = replace(
    FP8_MXFP4,
    name="mxfp8_mxfp4",
    about="MXFP4 weights and MXFP8 activations",
    flags=frozenset({"use_mxfp8_act_scaling"}),
    scales=(_BLOCK_1, _GLOBAL_1, _BLOCK_2, _GLOBAL_2),
    input_sf=_SF_OF_32,
)
# No kernels for SM120: its binding makes an object that ignores the scales.
MXFP8 = replace(
    MXFP8_MXFP4,
    name="mxfp8",
    about="MXFP8 weights and activations",
    weight=FP8,
    multiple=64,
    pack=1,
    capabilities=(10,),
    releases=">=0.6.6",
    profiled=">=0.6.15",
)

MODES = (
    PLAIN,
    PER_TENSOR,
    BLOCK_SCALE,
    MXFP4,
    MXFP4_FOLDED,
    INT4,
    INT4_FOLDED,
    NVFP4,
    NVFP4_PACKED,
    FP8_MXFP4,
    MXFP8_MXFP4,
    MXFP8,
)


def mode_of(
    op: str,
    dtypes: tuple[str, str, str],
    flags: frozenset[str],
    names: tuple[str, str, str] = ("activation_dtype", "weight_dtype", "output_dtype"),
) -> Mode:
    """Return the mode of these dtypes of activations, weights and results and of these flags, in
    the layout of the release in force.

    Errors call the dtypes by `names`. Raises `ArgumentError` for combinations that FlashInfer lacks
    in all releases.
    """
    refuse, (activation, weight, output) = Refusal(op), dtypes
    fitting = [
        mode
        for mode in MODES
        if activation in mode.activations
        and weight == (mode.weight or activation)
        and flags == mode.flags
    ]
    for mode in fitting:
        outputs = mode.outputs or (activation,)
        if output not in outputs:
            raise refuse(names[2], output, f"{' or '.join(outputs)}, with {mode.about}")
    if fitting:
        return of_release(fitting, release_in_force()) or fitting[0]
    taking = [mode for mode in MODES if activation in mode.activations]
    if not taking:
        known = dict.fromkeys(name for mode in MODES for name in mode.activations)
        raise refuse(names[0], activation, " or ".join(known))
    each = (f"{mode.weight or activation} with {_on(mode.flags)}" for mode in taking)
    got = f"{weight} weights, {activation} activations and {_on(flags)}"
    raise refuse(names[1], got, f"weights of {', or of '.join(each)}")


def _on(flags: frozenset[str]) -> str:
    return " and ".join(sorted(flags)) or "no flag"
