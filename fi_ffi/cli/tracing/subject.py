"""What a definition is of: a call, dumped, or given by an op and sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fi_ffi.abi.tensor import DTYPES
from fi_ffi.cli.replaying.recorded import Recorded, load
from fi_ffi.cli.tracing.published import MLA_DECODE, PUBLISHED, Axis, Published
from fi_ffi.errors import ArgumentError
from fi_ffi.loader.uris import parse
from fi_ffi.ops.attention.rows import ROWS as ATTENTION
from fi_ffi.ops.attention.run import NEUTRAL as OPTIONS
from fi_ffi.ops.functions import OPS
from fi_ffi.ops.notation import axis_size, parse_axis
from fi_ffi.ops.row import KvLayout, Row, Scalar, Tensor, Text
from fi_ffi.ops.watch.call_record import is_scratch

# What attention's entries are given for an option that is left out.
NEUTRAL: dict[str, Any] = {**OPTIONS, "window_left": -1, "return_lse_base_on_e": False}


@dataclass(frozen=True)
class Subject:
    """A call of a row: its tensors by their axes, and its numbers and words."""

    row: Row
    published: Published
    # The tensors that are there, the plan's among them, in order.
    tensors: Mapping[str, Tensor]
    # The axes of each in the order that it has them, as the row writes them.
    axes: Mapping[str, tuple[str, ...]]
    sizes: Mapping[str, int]
    dtypes: Mapping[str, str]
    values: Mapping[str, Any]
    # How the kernel's module turns positions into logits: 0 where it does not.
    pos_encoding_mode: int = 0


def _published(row: Row) -> Published:
    known = PUBLISHED.get(row.name)
    if known is not None:
        return known
    name = row.name.replace(".", "_")
    consts = {*row.vector.axes, *row.limits("in"), *row.limits(">="), *row.limits("%")}
    for condition in row.conditions:
        if condition.extreme:
            consts.add(condition.axis)
        elif condition.divisors:
            consts |= {condition.axis, *condition.divisors}
    axes = {
        text: Axis(_word(text), parse_axis(text).more != 0 or {*parse_axis(text).names} <= consts)
        for tensor in row.tensors
        for text in tensor.axis_names
        if "+" not in text
    }
    return Published(row.module, name, f"fi_ffi.{row.name}", axes)


def _word(text: str) -> str:
    """An axis as a name."""
    if text.isidentifier():
        return text
    word = text.replace("*", "_times_").replace("+", "_plus_")
    return word if word.isidentifier() else f"size_{word}"


def word_of(axis: str, published: Published) -> Axis:
    known = published.axes.get(axis)
    return known if known is not None else Axis(_word(axis), axis.isdigit())


# ---------------------------------------------------------------- of a dump


def of_dump(path: Path) -> Subject:
    """The call in a dump; `ArtifactError` for what is none, `ArgumentError` for a plan's."""
    recorded = load(path)
    if recorded.row is None or recorded.row.symbol == "plan":
        expected = "a call of a row's entry that is no plan"
        raise ArgumentError("trace", "file", got=recorded.document.get("op"), expected=expected)
    return _of_recorded(recorded.row, recorded)


def _of_recorded(row: Row, recorded: Recorded) -> Subject:
    values = {**recorded.values}
    published, plan = _published(row), recorded.plan
    if row.name == "batch_mla.run" and plan is not None:
        starts = plan.tensors["qo_indptr"].elements
        if starts is not None and list(starts) == list(range(len(starts))):
            published = MLA_DECODE
    tensors = {arg.name: arg for arg in row.tensors}
    there = {name: of for name, of in recorded.tensors.items() if not of.is_scratch}
    for name in published.planned:
        if plan is None or plan.row is None:
            expected = "a run whose plan was made while the log was open"
            raise ArgumentError("trace", "file", got=str(recorded.path), expected=expected)
        there[name] = plan.tensors[name]
        tensors[name] = next(arg for arg in plan.row.tensors if arg.name == name)
    layout = values.get("kv_layout") or "NHD"
    axes = {name: tensors[name].axes_in(layout) for name in there}
    sizes: dict[str, int] = {}
    for name, of in there.items():
        for text, size in zip(axes[name], of.shape, strict=True):
            unknown = parse_axis(text).unknown(sizes)
            if len(unknown) == 1:
                found = parse_axis(text).solve(size, sizes)
                if found is not None:
                    sizes[unknown[0][0]] = found
    dtypes = {name: of.dtype.name for name, of in there.items()}
    module = parse(recorded.module)
    encoding = 0 if module is None else int(module.params.get("pos_encoding_mode") or 0)
    kept = {name: tensors[name] for name in there}
    return Subject(row, published, kept, axes, sizes, dtypes, values, encoding)


# ---------------------------------------------------------------- of an op and sizes


def names() -> list[str]:
    """The ops that a definition can be asked of by name."""
    return sorted([*OPS, *_attention_rows()])


def _attention_rows() -> dict[str, tuple[Row, Published]]:
    found = {
        PUBLISHED[row.name].name: (row, PUBLISHED[row.name])
        for row in reversed(ATTENTION)  # the first form of each name is fa2's
        if row.name in PUBLISHED
    }
    return found | {MLA_DECODE.name: (found["mla_paged_prefill"][0], MLA_DECODE)}


def of_op(
    name: str, sizes: Mapping[str, int], dtypes: Mapping[str, str], values: Mapping[str, Any],
    given: tuple[str, ...] = (),
) -> Subject:  # fmt: skip
    """An op's call with these sizes, dtypes (by the row's variables) and numbers.

    Optional tensors are there where `given` has them.  Raises `ArgumentError`.
    """
    if name in OPS:
        row, published = OPS[name].row, _published(OPS[name].row)
    elif name in _attention_rows():
        row, published = _attention_rows()[name]
    else:
        raise ArgumentError("trace", "op", got=name, expected=f"one of {', '.join(names())}")
    tensors = {
        arg.name: arg
        for arg in row.tensors
        if not is_scratch(arg) and (not arg.optional or arg.name in given)
    }
    if published.planned:
        planning = next(of for of in ATTENTION if of.name == f"{row.module}.plan")
        for arg in planning.tensors:
            if arg.name in published.planned:
                tensors[arg.name] = arg
    for known, wanted in (("dtype", dtypes), ("set", values)):
        _check_names(row, known, wanted)
    kept = {name: _value(arg, values) for arg in row.args if (name := arg.name) in _named(row)}
    layout = kept.get("kv_layout") or "NHD"
    axes = {name: arg.axes_in(layout) for name, arg in tensors.items()}
    known_sizes = _all_sizes(row, published, axes, sizes)
    if "sm_scale" in kept and "sm_scale" not in values:
        kept["sm_scale"] = usual_scale(known_sizes)
    used = {name: _dtype(row, arg, dtypes) for name, arg in tensors.items()}
    return Subject(row, published, tensors, axes, known_sizes, used, kept)


def usual_scale(sizes: Mapping[str, int]) -> float:
    """What attention's logits are scaled by where nothing else is said."""
    dim: int = sizes.get("head_dim_qk", 128 + sizes.get("head_dim_kpe", 0))
    return float(dim**-0.5)


def _named(row: Row) -> set[str]:
    return {arg.name for arg in row.args if isinstance(arg, (Scalar, Text, KvLayout))}


def _check_names(row: Row, option: str, wanted: Mapping[str, Any]) -> None:
    allowed = {*row.dtypes} if option == "dtype" else _named(row)
    for name in wanted:
        if name not in allowed:
            expected = f"one of {', '.join(sorted(allowed)) or 'none'}"
            raise ArgumentError("trace", option, got=name, expected=expected)


def _value(arg: Any, values: Mapping[str, Any]) -> Any:
    if arg.name in values:
        return values[arg.name]
    if isinstance(arg, Scalar) and arg.default is None:
        return NEUTRAL.get(arg.name, arg.type(0))
    return arg.default


def _dtype(row: Row, arg: Tensor, dtypes: Mapping[str, str]) -> str:
    allowed = row.dtypes.get(arg.dtype, (arg.dtype,))
    wanted = dtypes.get(arg.dtype, allowed[0])
    if wanted not in allowed or wanted not in DTYPES:
        expected = " or ".join(allowed)
        raise ArgumentError("trace", "dtype", got=f"{arg.dtype}={wanted}", expected=expected)
    return wanted


def _all_sizes(
    row: Row, published: Published, axes: Mapping[str, tuple[str, ...]], given: Mapping[str, int]
) -> dict[str, int]:
    """Every axis' size: the constant ones must be given, and of the others any will do."""
    sizes = {name: of[0] for name, of in row.limits("in").items() if len(of) == 1} | {**given}
    for condition in row.conditions:
        if condition.extreme and {*condition.extreme[1:]} <= sizes.keys():
            extreme, one, other = condition.extreme
            wanted = {"max": max, "min": min}[extreme](sizes[one], sizes[other])
            sizes.setdefault(condition.axis, wanted)
    for axis, other in published.same.items():
        if other in sizes:
            sizes.setdefault(axis, sizes[other])
    texts = dict.fromkeys(text for of in axes.values() for text in of)
    missing = {
        name
        for text in texts
        for name in parse_axis(text).names
        if name not in {*sizes, *published.same} and word_of(text, published).is_const
    }
    if missing:
        expected = "the sizes that are part of the definition"
        got = f"none of {', '.join(sorted(missing))}"
        raise ArgumentError("trace", "size", got=got, expected=expected)
    for text in texts:
        for name in parse_axis(text).names:
            sizes.setdefault(name, 1)
        axis_size(text, sizes)
    return sizes
