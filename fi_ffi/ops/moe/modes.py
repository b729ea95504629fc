"""The quantisations of `fused_moe_90` and Blackwell's modules, and the rows of their methods.

The limits follow the binding's own checks, and what the binding does not check: `runMoe`, `gemm1`,
`expandInputRowsKernel` and `getOffsetWeightSF` of cutlass_fused_moe_kernels.cuh, and the launchers
of moe_gemm and fp8_blockscale_gemm.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from fi_ffi.abi.tensor import TensorDesc
from fi_ffi.errors import ArgumentError
from fi_ffi.ops.call.notation import round_up
from fi_ffi.ops.call.providers import release_in_force
from fi_ffi.ops.call.releases import is_in
from fi_ffi.ops.call.row import (
    MULTIPROCESSORS,
    Arg,
    IntArray,
    Row,
    Rule,
    Scalar,
    Tensor,
    TensorArray,
    Vector,
)
from fi_ffi.ops.moe.interface import (
    FOLDED_RELEASES,
    MODULE,
    MODULES,
    SOURCE,
    W4_RELEASES,
    Interface,
)

HALF = ("float16", "bfloat16")
FP8 = "float8_e4m3fn"
MXFP4_GROUP, INT4_GROUP, BLOCK = 32, 128, 128
_INT32 = 2**31 - 1
_WIDE, _WORD = 16, 4  # bytes that a kernel loads at once
SWIGLU = ("swiglu_alpha", "swiglu_beta", "swiglu_limit")


@dataclass(frozen=True)
class Form:
    """One shape that a scale may have, and the dtypes allowed with it.

    In `axes`, ROWS stands for the rows of the first matrix. In `dtypes`, "A" stands for the
    activations' dtype.
    """

    dtypes: tuple[str, ...]
    axes: str

    def fits(self, desc: TensorDesc) -> bool:
        """Whether a tensor has this form's dtype, rank and axes of 1; sizes are checked later."""
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
    """One of `quant_scales`, with its possible forms."""

    name: str
    forms: tuple[Form, ...]

    @classmethod
    def read(cls, text: str) -> Scale:
        """Parse text such as "fc2_quant: float32[] | float32[experts]"."""
        name, forms = text.split(": ")
        found = re.findall(r"([^][ |]+)\[([^]]*)\]", forms)
        return cls(name, tuple(Form(tuple(dtypes.split(",")), axes) for dtypes, axes in found))


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
    flags: frozenset[str]
    pack: int
    multiple: int
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

    def forms_of(self, scales: list[TensorDesc]) -> tuple[int, ...]:
        """Return the index of each scale's form; 0 if it has none of them."""
        wanted = self.scales if self.input_sf is None else (*self.scales, self.input_sf)
        return tuple([
            0 if len(one.forms) == 1
            else next((i for i, form in enumerate(one.forms) if form.fits(desc)), 0)
            for one, desc in zip(wanted, scales, strict=True)
        ])  # fmt: skip

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
    "half", "float16 or bfloat16, not quantised", HALF, None, frozenset(), 1, 8,
    capabilities=_EVERY,
)  # fmt: skip
PER_TENSOR = Mode(
    "fp8", "fp8 with one scale for each expert", (FP8,), FP8, frozenset(), 1, 16,
    scales=_scales(
        "fc1_dequant: float32[experts]", "fc2_quant: float32[] | float32[experts]",
        "fc2_dequant: float32[experts]", "fc1_input_dequant: float32[]",
    ),
    outputs=HALF, capabilities=_EVERY,
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
# In 4-bit modes, rows that need only one step give wrong and varying results as soon as a block has
# several tiles (docs/moe.md). MXFP4 weights are interleaved for the conversion to bfloat16; the
# conversion to float16 needs another order.
MXFP4 = Mode(
    "mxfp4", "MXFP4 weights with bfloat16 activations", ("bfloat16",), "uint8",
    frozenset({"use_w4_group_scaling"}), 2, 4 * MXFP4_GROUP,
    step=lambda columns: 4 * MXFP4_GROUP, releases=W4_RELEASES,
    # FlashInfer's callers pass four of these as one int32.
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
    step=lambda columns: INT4_GROUP * int4_interleave(columns), releases=W4_RELEASES,
    # The scales of weights are always bfloat16; FlashInfer's callers view them as the activations'
    # dtype.
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
# Folded scales: a block has those of 64 rows and 128 columns, in lines of 16 bytes. The smallest
# step of any tactic is 128 columns.
_FOLDED: dict[str, Any] = {"step": lambda columns: 128, "releases": FOLDED_RELEASES}
MXFP4_FOLDED = replace(
    MXFP4, **_FOLDED,
    scales=_scales(*(
        f"fc{i}_weight_scales: uint8[experts {rows}/64 {columns}/128 16 16]"
        f" | int32[experts {rows}/64 {columns}/128 16 4]"
        for i, rows, columns in ((1, "ROWS", "hidden_size"), (2, "hidden_size", "inter_size"))
    )),
)  # fmt: skip
INT4_FOLDED = replace(
    INT4, **_FOLDED,
    scales=(
        *_scales("fc1_weight_scales: bfloat16,A[experts ROWS/64 hidden_size/128 8 8]",
                 "fc2_weight_scales: bfloat16,A[experts hidden_size/64 inter_size/128 8 8]"),
        *INT4.scales[2:],
    ),
)  # fmt: skip

# Blackwell. 16 values of 4 bits are one int64; the binding takes four scales of weights as one
# int32.
_OF_16, _OF_32 = Blocks(16, 64), Blocks(32, 128)
_BLOCKS_1, _BLOCKS_2 = (
    f"fc{i}_weight_block: int32[experts block_rows{i} block_columns{i}]" for i in (1, 2)
)
_NVFP4_SCALES = _scales(
    "fc1_act_global: float32[] | float32[experts]", _BLOCKS_1, "fc1_global: float32[experts]",
    "fc2_act_global: float32[] | float32[experts]", _BLOCKS_2, "fc2_global: float32[experts]",
)  # fmt: skip
_MX_SCALES = _scales(
    _BLOCKS_1, "fc1_global: float32[experts]", _BLOCKS_2, "fc2_global: float32[experts]"
)
_SF = "input_sf: uint8,{0}[sf_count] | uint8,{0}[sf_rows sf_columns]"
_SF_OF_16, _SF_OF_32 = map(Scale.read, (_SF.format("float8_e4m3fn"), _SF.format("float8_e8m0fnu")))
_MXFP8 = frozenset({"use_mxfp8_act_scaling"})
NVFP4 = Mode(
    "nvfp4", "NVFP4 weights, activations quantised to NVFP4 by the kernels", HALF, "int64",
    frozenset(), 16, 32, _NVFP4_SCALES, blocks=_OF_16, capabilities=_BLACKWELL,
)  # fmt: skip
NVFP4_PACKED = Mode(
    "nvfp4_packed", "NVFP4 weights and activations", ("uint8", "int64"), "int64", frozenset(), 16,
    32, _NVFP4_SCALES, HALF, blocks=_OF_16, input_sf=_SF_OF_16, capabilities=_BLACKWELL,
)  # fmt: skip
FP8_MXFP4 = Mode(
    "fp8_mxfp4", "MXFP4 weights and fp8 activations", (FP8,), "int64", frozenset(), 16, 128,
    _scales(_BLOCKS_1, "fc1_global: float32[experts]",
            "fc2_act_global: float32[] | float32[experts]", _BLOCKS_2,
            "fc2_global: float32[experts]"),
    HALF, blocks=_OF_32, capabilities=_BLACKWELL, gateless=">=0.6.10",
)  # fmt: skip
MXFP8_MXFP4 = Mode(
    "mxfp8_mxfp4", "MXFP4 weights and MXFP8 activations", (FP8,), "int64", _MXFP8, 16, 128,
    _MX_SCALES, HALF, blocks=_OF_32, input_sf=_SF_OF_32, capabilities=_BLACKWELL,
    gateless=">=0.6.10",
)  # fmt: skip
# No kernels for SM120: its binding makes an object that ignores the scales.
MXFP8 = Mode(
    "mxfp8", "MXFP8 weights and activations", (FP8,), FP8, _MXFP8, 1, 64, _MX_SCALES, HALF,
    blocks=_OF_32, input_sf=_SF_OF_32, capabilities=(10,), releases=">=0.6.6",
    gateless=">=0.6.10", profiled=">=0.6.15",
)  # fmt: skip

MODES = (
    PLAIN, PER_TENSOR, BLOCK_SCALE, MXFP4, MXFP4_FOLDED, INT4, INT4_FOLDED, NVFP4, NVFP4_PACKED,
    FP8_MXFP4, MXFP8_MXFP4, MXFP8,
)  # fmt: skip
# Values in an element of packed activations.
_PACKED_INPUTS = {"uint8": 2, "int64": 16}


def mode_of(
    op: str, activation: str, weight: str, output: str, flags: frozenset[str],
    names: tuple[str, str, str] = ("activation_dtype", "weight_dtype", "output_dtype"),
) -> Mode:  # fmt: skip
    """Return the mode of these dtypes and flags, in the layout of the release in use.

    Errors call the dtypes by `names`. Raises `ArgumentError` for combinations that FlashInfer lacks
    in all releases.
    """
    found = []
    for mode in MODES:
        wanted = mode.weight or activation
        if activation in mode.activations and weight == wanted and flags == mode.flags:
            known = mode.outputs or (activation,)
            if output not in known:
                expected = f"{' or '.join(known)}, with {mode.about}"
                raise ArgumentError(op, names[2], got=output, expected=expected)
            found.append(mode)
    if found:
        if len(found) == 1:
            return found[0]
        release = release_in_force()
        return next((one for one in found if is_in(release, one.releases)), found[0])
    of = [mode for mode in MODES if activation in mode.activations]
    if not of:
        known = tuple(dict.fromkeys(name for mode in MODES for name in mode.activations))
        raise ArgumentError(op, names[0], got=activation, expected=" or ".join(known))
    got = f"{weight} weights, {activation} activations and {_on(flags)}"
    each = [f"{mode.weight or activation} with {_on(mode.flags)}" for mode in of]
    expected = "weights of " + ", or of ".join(each)
    raise ArgumentError(op, names[1], got=got, expected=expected)


def _on(flags: frozenset[str]) -> str:
    return " and ".join(sorted(flags)) or "no flag"


# Rows. The number of experts is that of this rank.

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
    """Limit sizes to what the kernels count in 32 bits."""

    most = {
        "tokens * experts * ep_size": "tokens * experts of all ranks",
        "tokens * top_k": "tokens * experts of a token",
        "top_k * experts * ep_size": "experts of a token * experts of all ranks",
    }
    counts = [Rule(argument, f"{count} <= {_INT32}", f"{told} of at most {_INT32}")
              for count, told in most.items()]  # fmt: skip
    expected = "at most experts * ep_size for a token, which are all there are"
    return *counts, Rule(argument, "top_k <= experts * ep_size", expected)


# Whether calls may have 4-bit rows of one step if they have so few tiles that no block gets two.
# `test_one_step_of_few_tokens` in tests/gpu/test_moe.py says whether these are right.
ONE_STEP_OF_FEW_TOKENS = False
# The rows and columns of the smallest tile of any tactic.
_TILE = 64, 16


def _most_tiles(experts: int, tokens: int, top_k: int, inter: int, hidden: int) -> int:
    """Return the most tiles that either product of a call has."""
    pairs, rows = tokens * top_k, max(2 * inter, hidden)
    return -(-rows // _TILE[0]) * (min(experts, pairs) + pairs // _TILE[1])


def _step_rule(axis: str, step: Callable[[int], int], is_run: bool) -> Rule:
    expected = f"a {axis} of more columns than the kernel takes in one step"
    name = f"step_of_{axis}"
    holds = f"{axis} > {name}({axis})"
    using: dict[str, Callable[..., int]] = {name: step}
    if ONE_STEP_OF_FEW_TOKENS and is_run:
        # With a margin, for kernels that do not use all multiprocessors.
        tiles = "tiles(experts, tokens, top_k, inter_size, hidden_size)"
        holds += f" or 2 * {tiles} <= {MULTIPROCESSORS}"
        expected += ", or fewer tokens"
        using["tiles"] = _most_tiles
    return Rule("fc2_expert_weights", holds, expected, using)


def _int4_rules(gates: int) -> tuple[Rule, ...]:
    """Require as many adjacent scales of a row as the kernel takes in one step."""

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


def _block_rules(mode: Mode, blocks: Blocks, is_gated: bool) -> Iterator[Rule]:
    """Require the sizes of block scales, and that each expert's scales start where the kernels
    look."""
    gates = 1 + is_gated
    sizes = {
        1: ("hidden_size", "inter_size", lambda rows: gates * round_up(rows, blocks.rows)),
        2: ("inter_size", "hidden_size", lambda rows: round_up(rows, 128)),
    }
    places = [i for i, scale in enumerate(mode.scales) if scale.name.endswith("weight_block")]
    for place, (i, (columns, rows, padded)) in zip(places, sizes.items(), strict=True):

        def wanted(
            columns: int, rows: int, padded: Callable[[int], int] = padded
        ) -> tuple[int, int]:
            return padded(rows), blocks.columns(columns) // 4

        def expected(
            first: int, second: int, *sizes: int, wanted: Callable[..., tuple[int, int]] = wanted
        ) -> str:
            return "the shape [experts, {}, {}]".format(*wanted(*sizes))

        holding = f"(block_rows{i}, block_columns{i}) == blocks{i}({columns}, {rows})"
        yield Rule(f"quant_scales_{place}", holding, expected, {f"blocks{i}": wanted})
    if gates * blocks.rows != 128:
        short = "an inter_size of a multiple of 128, or more than 64 over one: of others each "
        short += "expert's scales are not where the kernels look for them"
        yield Rule("fc1_expert_weights", "-inter_size % 128 < 64", short)
    # The kernels count the scales of an expert's activations in 32 bits.
    most = _INT32 * blocks.size
    for axis in _INNER:
        counted = f"tokens * {axis} of at most {most}"
        yield Rule("input", f"(tokens + 127) * {axis} <= {most}", counted)


def _input_sf_rules(blocks: Blocks, form: int, has_flag: bool) -> Iterator[Rule]:
    """Require enough scales of activations, in rows as long as the kernels assume."""
    flag = "swizzled_input_sf" if has_flag else "True"
    given = "sf_rows * sf_columns" if form else "sf_count"
    using: dict[str, Callable[..., int]] = {"count": blocks.count, "columns": blocks.columns}
    enough = "as many scales as there are in "
    enough += f"{'' if has_flag else 'tiles of '}[tokens, hidden_size / {blocks.size}], rounded up "
    enough += f"to multiples of 128 and 4{'; in rows, only the columns are' if has_flag else ''}"
    yield Rule("input_sf", f"{given} >= count(tokens, hidden_size, {flag})", enough, using)
    if form and has_flag:
        told = f"hidden_size / {blocks.size} columns, rounded up to a multiple of 4"
        yield Rule("input_sf", f"{flag} or sf_columns == columns(hidden_size)", told, using)


def _tensors(mode: Mode, dtypes: tuple[str, str, str], rows: str) -> tuple[Tensor, ...]:
    activation, weight, output = dtypes
    packed = f"/{mode.pack}" if mode.pack > 1 else ""
    held = f"/{_PACKED_INPUTS[activation]}" if activation in _PACKED_INPUTS else ""

    def tensor(name: str, axes: str, dtype: str, alignment: int = _WIDE, **more: Any) -> Tensor:
        return Tensor(name, axes, dtype, "", contiguous=True, alignment=alignment, **more)

    return (
        tensor("output", "tokens hidden_size", output, writes=True, reads=False),
        tensor("input", f"tokens hidden_size{held}", activation),
        tensor("token_selected_experts", "tokens top_k", "int32", _WORD),
        tensor("token_final_scales", "tokens top_k", "float32", _WORD, optional=True),
        tensor("fc1_expert_weights", f"experts {rows} hidden_size{packed}", weight),
        tensor("fc1_expert_biases", f"experts {rows}", output, optional=True),
        tensor("fc2_expert_weights", f"experts hidden_size inter_size{packed}", weight),
        tensor("fc2_expert_biases", "experts hidden_size", output, optional=True),
        *(tensor(name, "experts", "float32", _WORD, optional=True) for name in SWIGLU),
    )


def _scale_tensor(i: int, form: Form, rows: str) -> Tensor:
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
    """Return the row of a method in a mode, with scales of these forms."""
    function, activation = interface.methods[method], dtypes[0]
    rows = "2*inter_size" if is_gated else "inter_size"
    scales, allowed = [], {}
    for i, (scale, number) in enumerate(zip(mode.scales, forms, strict=False)):
        form = scale.forms[number]
        scales.append(_scale_tensor(i, form, rows))
        allowed[f"S{i}"] = form.names(activation)
    known: dict[str, Any] = {arg.name: arg for arg in (*_tensors(mode, dtypes, rows), *_NUMBERS)}
    if scales:
        known["quant_scales"] = TensorArray("quant_scales", tuple(scales))
    is_run = method == "run_moe"
    if mode.input_sf is not None and is_run:
        form = mode.input_sf.forms[forms[-1]]
        allowed["SF"] = form.dtypes
        known["input_sf"] = Tensor(
            "input_sf", form.axes, "SF", "", contiguous=True, entry_optional=True
        )
        known["swizzled_input_sf"] = Scalar("swizzled_input_sf", bool, True, "")
    args: tuple[Arg, ...] = tuple(
        known.get(name) or function.absent(name) for name in function.names
    )
    rules = [*_RANK_RULES, *_count_rules("token_selected_experts" if is_run else "top_k")]
    if mode.step is not None:
        rules += [_step_rule(axis, mode.step, is_run) for axis in _INNER]
    if mode is INT4 and is_run:
        rules += _int4_rules(1 + is_gated)
    if mode.blocks is not None and is_run:
        rules += _block_rules(mode, mode.blocks, is_gated)
        if mode.input_sf is not None:
            has_flag = "swizzled_input_sf" in function.names
            rules += _input_sf_rules(mode.blocks, forms[-1], has_flag)
    limits = [
        "experts >= 1",
        "top_k >= 1" if is_run else "tokens >= 1",
        *(f"{axis} >= {mode.multiple}" for axis in _INNER),
        *(f"{axis} % {mode.multiple} == 0" for axis in _INNER),
        *(f"{axis} <= {_INT32 // 2}" for axis in _INNER),
    ]
    if mode.pack > 1:  # interleaving and scales of 4-bit weights are counted in 32 bits
        limits.append(f"inter_size * hidden_size <= {_INT32 // (1 + is_gated)}")
    return Row(
        "cutlass_fused_moe" if is_run else f"cutlass_fused_moe.{method}", MODULE, method, SOURCE,
        "", args, allowed, interface.releases, variant=f".{mode.name}", offset_limit=2**63,
        vector=Vector(()), together=("fc1_expert_biases", "fc2_expert_biases"),
        allocates=True, capabilities=mode.capabilities, modules=MODULES,
        requires=(*limits, *rules),
    )  # fmt: skip
