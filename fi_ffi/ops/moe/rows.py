"""The rows of the methods of `fused_moe_90` in each mode. Their number of experts is this rank's.

The limits follow the binding's own checks, and what the binding does not check: `runMoe`, `gemm1`,
`expandInputRowsKernel` and `getOffsetWeightSF` of cutlass_fused_moe_kernels.cuh, and the launchers
of moe_gemm and fp8_blockscale_gemm.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

from fi_ffi.ops.call.arguments import INT32_MAX
from fi_ffi.ops.call.notation import round_up
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
from fi_ffi.ops.moe.activations import SWIGLU
from fi_ffi.ops.moe.interface import MODULE, MODULES, SOURCE, Interface, NamedSignature
from fi_ffi.ops.moe.modes import INT4, INT4_GROUP, Blocks, Mode, ScaleShape, int4_interleave

_WIDE, _WORD = 16, 4  # bytes that a kernel loads at once
_OTHERS = "others than this rank's experts are skipped"
# Values in an element of packed activations.
_PACKED_INPUTS = {"uint8": 2, "int64": 16}

_NUMBERS: tuple[Arg, ...] = (
    *(Scalar(f"{kind}_size", int, 1, "", 1, INT32_MAX) for kind in ("tp", "ep")),
    *(Scalar(f"{kind}_rank", int, 0, "", 0, INT32_MAX) for kind in ("tp", "ep")),
    Scalar("top_k", int, None, "", 1, INT32_MAX),
    *(Scalar(name, bool, False, "") for name in ("enable_alltoall", "enable_pdl")),
    *(Scalar(name, int, None, "") for name in ("base_activation_type", "activation_type")),
    *(Scalar(name, int, None, "") for name in ("gemm_idx", "profile_id")),
    Scalar("do_preparation", bool, None, ""),
    IntArray("profile_ids", "Optional<Array<int>>"),
)
_INNER = ("hidden_size", "inter_size")
_RANK_RULES = tuple(
    Rule(f"{kind}_rank", f"{kind}_rank < {kind}_size", f"less than {kind}_size")
    for kind in ("tp", "ep")
)


@functools.cache
def row_of(
    interface: Interface,
    method: str,
    mode: Mode,
    dtypes: tuple[str, str, str],
    is_gated: bool,
    shapes: tuple[int, ...] = (),
) -> Row:
    """Return the row of a method in a mode, with scales of these shapes."""
    function, is_run = interface.methods[method], method == "run_moe"
    rows = "2*inter_size" if is_gated else "inter_size"
    known: dict[str, Any] = {arg.name: arg for arg in (*_tensors(mode, dtypes, rows), *_NUMBERS)}
    allowed: dict[str, tuple[str, ...]] = {}
    scales = []
    for name, scale, number in zip(mode.scale_names, mode.scales, shapes, strict=False):
        tensor = _scale_tensor(name, scale.shapes[number], rows)
        allowed[tensor.dtype] = scale.shapes[number].names(dtypes[0])
        scales.append(tensor)
    if scales:
        known["quant_scales"] = TensorArray("quant_scales", tuple(scales))
    if mode.input_sf is not None and is_run:
        shape = mode.input_sf.shapes[shapes[-1]]
        allowed["SF"] = shape.dtypes
        known["input_sf"] = Tensor(
            "input_sf", shape.axes, "SF", "", contiguous=True, entry_optional=True
        )
        known["swizzled_input_sf"] = Scalar("swizzled_input_sf", bool, True, "")
    return Row(
        "cutlass_fused_moe" if is_run else f"cutlass_fused_moe.{method}",
        MODULE,
        method,
        SOURCE,
        "",
        tuple(known.get(name) or function.absent(name) for name in function.names),
        allowed,
        interface.releases,
        variant=f".{mode.name}",
        offset_limit=2**63,
        vector=Vector(()),
        together=("fc1_expert_biases", "fc2_expert_biases"),
        allocates=True,
        capabilities=mode.capabilities,
        modules=MODULES,
        requires=(
            *_limits(mode, is_gated, "top_k" if is_run else "tokens"),
            *_RANK_RULES,
            *_count_rules("token_selected_experts" if is_run else "top_k"),
            *_step_rules(mode, is_run),
            *(_run_rules(function, mode, is_gated, shapes) if is_run else ()),
        ),
    )


def _limits(mode: Mode, is_gated: bool, counted: str) -> Iterator[str]:
    """Limit sizes; `counted` is the axis or argument that must be 1 or more."""
    yield from ("experts >= 1", f"{counted} >= 1")
    yield from (f"{axis} >= {mode.multiple}" for axis in _INNER)
    yield from (f"{axis} % {mode.multiple} == 0" for axis in _INNER)
    yield from (f"{axis} <= {INT32_MAX // 2}" for axis in _INNER)
    if mode.pack > 1:  # interleaving and scales of 4-bit weights are counted in 32 bits
        yield f"inter_size * hidden_size <= {INT32_MAX // (1 + is_gated)}"


def _run_rules(
    function: NamedSignature, mode: Mode, is_gated: bool, shapes: tuple[int, ...]
) -> Iterator[Rule]:
    """Yield the rules of `run_moe` for scales."""
    if mode is INT4:
        yield from _int4_rules(1 + is_gated)
    if mode.blocks is not None:
        yield from _block_rules(mode, mode.blocks, is_gated)
        if mode.input_sf is not None:
            yield from _input_sf_rules(
                mode.blocks, shapes[-1], "swizzled_input_sf" in function.names
            )


def _tensors(mode: Mode, dtypes: tuple[str, str, str], rows: str) -> tuple[Tensor, ...]:
    activation, weight, output = dtypes
    packed = f"/{mode.pack}" if mode.pack > 1 else ""
    of_input = f"/{_PACKED_INPUTS[activation]}" if activation in _PACKED_INPUTS else ""

    def tensor(name: str, axes: str, dtype: str, alignment: int = _WIDE, **more: Any) -> Tensor:
        return Tensor(name, axes, dtype, "", contiguous=True, alignment=alignment, **more)

    return (
        tensor("output", "tokens hidden_size", output, writes=True, reads=False),
        tensor("input", f"tokens hidden_size{of_input}", activation),
        tensor("token_selected_experts", "tokens top_k", "int32", _WORD, no_index=_OTHERS),
        tensor("token_final_scales", "tokens top_k", "float32", _WORD, optional=True),
        tensor("fc1_expert_weights", f"experts {rows} hidden_size{packed}", weight),
        tensor("fc1_expert_biases", f"experts {rows}", output, optional=True),
        tensor("fc2_expert_weights", f"experts hidden_size inter_size{packed}", weight),
        tensor("fc2_expert_biases", "experts hidden_size", output, optional=True),
        *(tensor(name, "experts", "float32", _WORD, optional=True) for name in SWIGLU),
    )


def _scale_tensor(name: str, shape: ScaleShape, rows: str) -> Tensor:
    axes = shape.axes.replace("4*ROWS", "8*inter_size" if rows[0] == "2" else "4*inter_size")
    alignment = _WORD if "float32" in shape.dtypes else _WIDE
    variable = f"S{name.removeprefix('quant_scales_')}"
    fields: dict[str, Any] = {"as_object": True, "contiguous": True, "alignment": alignment}
    fields["no_index"] = "scales"
    return Tensor(name, axes.replace("ROWS", rows), variable, "", **fields)


def _count_rules(argument: str) -> Iterator[Rule]:
    """Limit sizes to what the kernels count in 32 bits."""
    counts = {
        "tokens * experts * ep_size": "tokens * experts of all ranks",
        "tokens * top_k": "tokens * experts of a token",
        "top_k * experts * ep_size": "experts of a token * experts of all ranks",
    }
    for count, words in counts.items():
        yield Rule(argument, f"{count} <= {INT32_MAX}", f"{words} of at most {INT32_MAX}")
    expected = "at most experts * ep_size for a token, which are all there are"
    yield Rule(argument, "top_k <= experts * ep_size", expected)


# Whether calls may have 4-bit rows of one step if they have so few tiles that no block gets two.
# `test_one_step_of_few_tokens` in tests/gpu/test_moe.py says whether these are right.
ONE_STEP_OF_FEW_TOKENS = False
# The rows and columns of the smallest tile of any tactic.
_TILE = 64, 16


def _most_tiles(experts: int, tokens: int, top_k: int, inter: int, hidden: int) -> int:
    """Return the most tiles that either product of a call has."""
    pairs, rows = tokens * top_k, max(2 * inter, hidden)
    return -(-rows // _TILE[0]) * (min(experts, pairs) + pairs // _TILE[1])


def _step_rules(mode: Mode, is_run: bool) -> Iterator[Rule]:
    """Require rows of 4-bit weights of more than one step."""
    if mode.step is not None:
        for axis in _INNER:
            yield _step_rule(axis, mode.step, is_run)


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
    most = INT32_MAX * blocks.size
    for axis in _INNER:
        counted = f"tokens * {axis} of at most {most}"
        yield Rule("input", f"(tokens + 127) * {axis} <= {most}", counted)


def _input_sf_rules(blocks: Blocks, shape: int, has_flag: bool) -> Iterator[Rule]:
    """Require enough scales of activations, in rows as long as the kernels assume."""
    flag = "swizzled_input_sf" if has_flag else "True"
    count = "sf_rows * sf_columns" if shape else "sf_count"
    using: dict[str, Callable[..., int]] = {"count": blocks.count, "columns": blocks.columns}
    enough = "as many scales as there are in "
    enough += f"{'' if has_flag else 'tiles of '}[tokens, hidden_size / {blocks.size}], rounded up "
    enough += f"to multiples of 128 and 4{'; in rows, only the columns are' if has_flag else ''}"
    yield Rule("input_sf", f"{count} >= count(tokens, hidden_size, {flag})", enough, using)
    if shape and has_flag:
        told = f"hidden_size / {blocks.size} columns, rounded up to a multiple of 4"
        yield Rule("input_sf", f"{flag} or sf_columns == columns(hidden_size)", told, using)
