"""The results of an op in jax: which arguments are results, and their shapes and dtypes."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from fi_ffi.errors import ArgumentTypeError
from fi_ffi.ops.call.notation import FUNCTIONS, parse_axis, parse_expression
from fi_ffi.ops.call.row import Arg, KvLayout, Row, Rule, Scalar, Tensor, Text

REQUIRED = inspect.Parameter.empty
# Conditions that tell a size by others; one that has only a limit is as large as that.
EQUAL = re.compile(r"(?P<left>\w+) == (?P<value>(?:(?! or | and ).)+)")
_LIMITED = re.compile(r"(?:\w+ or )?(?P<left>\w+) <= (?P<value>[a-z_]\w*)")


class Result(NamedTuple):
    """A result's shape, and the name of its dtype."""

    shape: tuple[int, ...]
    dtype: str


def is_result(arg: object) -> bool:
    """Return whether an argument of an op is only written, and no scratch memory."""
    return isinstance(arg, Tensor) and arg.writes and not arg.reads and not arg.is_scratch


def is_given(arg: object) -> bool:
    """Return whether a caller in jax passes an argument of an op."""
    if isinstance(arg, Tensor):
        return not (is_result(arg) or arg.is_scratch)
    return isinstance(arg, (Scalar, Text, KvLayout))


def signature_of(row: Row) -> inspect.Signature:
    """Return what a function in jax takes: the op's arguments that are no results, in its order,
    and the results by name."""
    named: Any = inspect.Parameter.KEYWORD_ONLY
    kind: Any = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters: list[inspect.Parameter] = []
    for arg in filter(is_given, row.args):
        default = _default(arg)
        if default is REQUIRED and parameters and parameters[-1].default is not REQUIRED:
            kind = named  # a required argument after an optional one
        parameters.append(inspect.Parameter(arg.name, kind, default=default))
    results = filter(is_result, row.args)
    parameters += [inspect.Parameter(arg.name, named, default=None) for arg in results]
    return inspect.Signature(parameters)


def _default(arg: Arg) -> object:
    if isinstance(arg, Tensor):
        return None if arg.may_be_none or arg.or_zeros else REQUIRED
    if isinstance(arg, Scalar) and arg.size_of:
        return None
    default = getattr(arg, "default", None)
    return REQUIRED if default is None else default


def results_of(
    row: Row,
    given: Mapping[str, Result],
    scalars: Mapping[str, Any],
    told: Mapping[str, Result | str | None],
) -> dict[str, Result]:
    """Return the results of a call, in the row's order; those that are arguments too are as given.

    `told` has what the caller says of a result: shape and dtype, its dtype alone, or None.
    """
    sizes, dtypes = _sizes(row, given, scalars), {}
    for arg in row.tensors:
        if arg.name in given and arg.dtype in row.dtypes:
            dtypes[arg.dtype] = given[arg.name].dtype
    found: dict[str, Result] = {}
    for arg in row.tensors:
        said = told.get(arg.name)
        if arg.writes and arg.name in given:
            found[arg.name] = given[arg.name]
        elif isinstance(said, Result):
            found[arg.name] = said
        elif is_result(arg) and (said is not None or not arg.optional):
            dtype = said or _dtype(row, arg, dtypes)
            found[arg.name] = Result(_shape(row, arg, sizes, scalars), dtype)
    return found


def _layout(row: Row, scalars: Mapping[str, Any]) -> str:
    layout = row.kv_layout
    return scalars.get(layout.name, layout.default) if isinstance(layout, KvLayout) else "NHD"


def _sizes(row: Row, given: Mapping[str, Result], scalars: Mapping[str, Any]) -> dict[str, int]:
    sizes: dict[str, int] = {}
    layout = _layout(row, scalars)
    for arg in row.tensors:
        axes = arg.axes_in(layout)
        if arg.name not in given or len(axes) != len(given[arg.name].shape):
            continue  # what is wrong with it the call says
        for text, size in zip(axes, given[arg.name].shape, strict=True):
            axis = parse_axis(text)
            if len(axis.terms) == 1 and axis.over == 1:
                ((name, times),) = axis.terms
                sizes.setdefault(name, (size - axis.more) // times)
    for scalar in row.args:
        if isinstance(scalar, Scalar) and type(scalars.get(scalar.name)) is int:
            sizes.setdefault(scalar.size_of or scalar.name, scalars[scalar.name])
    for pattern in (EQUAL, _LIMITED):
        for rule in row.requires:
            _add_told(pattern, rule, sizes, scalars)
    return sizes


def _add_told(
    pattern: re.Pattern[str], rule: Rule | str, sizes: dict[str, int], scalars: Mapping[str, Any]
) -> None:
    """Add the size that a condition tells, if it tells one by what is known."""
    text, using = (rule, {}) if isinstance(rule, str) else (rule.condition, rule.using)
    sides = re.fullmatch(pattern, text)
    if sides is None:
        return
    pairs = [(sides["left"], sides["value"])]
    if pattern is EQUAL and re.fullmatch(r"\w+", sides["value"]):
        pairs.append((sides["value"], sides["left"]))
    known = {**scalars, **sizes}
    for name, value in pairs:
        if name not in known and {*parse_expression(value)[1]} <= known.keys():
            sizes[name] = int(eval(value, {**FUNCTIONS, **using}, known))
            return


def _shape(
    row: Row, arg: Tensor, sizes: Mapping[str, int], scalars: Mapping[str, Any]
) -> tuple[int, ...]:
    axes = [parse_axis(text) for text in arg.axes_in(_layout(row, scalars))]
    for axis in axes:
        for name in axis.names:
            if name not in sizes:
                got = f"none, and no input has the size {name} of [{arg.axes}]"
                expected = f"{arg.name}=jax.ShapeDtypeStruct(shape, dtype)"
                raise ArgumentTypeError(row.name, arg.name, got=got, expected=expected)
    return tuple(axis.size(sizes) for axis in axes)


def _dtype(row: Row, arg: Tensor, dtypes: Mapping[str, str]) -> str:
    allowed = row.dtypes.get(arg.dtype, (arg.dtype,))
    if arg.dtype in dtypes:
        return dtypes[arg.dtype]
    if len(allowed) == 1 or "int32" in allowed:  # int32 is what jax counts in
        return "int32" if "int32" in allowed else allowed[0]
    expected = f"{arg.name}=DTYPE, one of {', '.join(allowed)}"
    raise ArgumentTypeError(row.name, arg.name, got="none, and no input has it", expected=expected)
