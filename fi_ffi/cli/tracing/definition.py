"""Definitions as FlashInfer-Bench reads them: axes, inputs, outputs and a reference."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from fi_ffi.abi.tensor import DTYPES
from fi_ffi.cli.cases import default_dtypes, make_case
from fi_ffi.cli.inputs import inputs_of
from fi_ffi.cli.tracing import attention
from fi_ffi.cli.tracing.published import Axis
from fi_ffi.cli.tracing.reference import Reference
from fi_ffi.cli.tracing.source import NoSource
from fi_ffi.cli.tracing.subject import NEUTRAL, Subject, usual_scale, word_of
from fi_ffi.errors import ArgumentError
from fi_ffi.ops.notation import axis_size, parse_axis
from fi_ffi.ops.row import Row, Scalar
from fi_ffi.reference.exact import EXACT, MOVES
from fi_ffi.reference.formula import Formula, Move

Definition = dict[str, Any]
_NUMBERS = {float: "float32", int: "int32", bool: "bool"}
# Tensors of attention that its formulas do not have.
_UNKNOWN = {
    "maybe_custom_mask", "maybe_mask_indptr", "maybe_alibi_slopes", "maybe_prefix_len_ptr",
    "maybe_token_pos_in_items_ptr", "maybe_max_item_len_ptr", "maybe_k_cache_sf",
    "maybe_v_cache_sf", "maybe_scale_q", "maybe_scale_k", "maybe_scale_v", "maybe_ckv_scale_arr",
}  # fmt: skip
# Those that they have.
_KNOWN = {"window_left", "logits_soft_cap", "enable_pdl"}
# Numbers that change nothing in what is computed.
_NO_MATTER = {"enable_pdl", "kv_layout", "page_size", "num_heads"}


def define(subject: Subject) -> Definition:
    """A call's definition.

    Raises `ArgumentError` for options that its formula does not have, and `NoSource` where
    there is no formula.
    """
    _check_options(subject)
    published = subject.published
    axes = _axes(subject)
    inputs: dict[str, Any] = {}
    outputs: dict[str, Any] = {}
    for name in _inputs(subject):
        inputs[published.inputs.get(name, name)] = _tensor(subject, name)
    for name, arg in subject.tensors.items():
        if arg.writes:
            outputs[published.outputs.get(name, name)] = _tensor(subject, name)
    for name in _numbers(subject):
        inputs[name] = _number(subject, name)
    constants = _constants(subject)
    reference = Reference(
        formula=_formula(subject),
        moves=subject.row.formula in MOVES,
        inputs={published.inputs.get(name, name): name for name in _inputs(subject)}
        | {name: name for name in _numbers(subject)},
        constants={name: value for name, value in subject.values.items() if value is not None},
        outputs=[(name, subject.dtypes[name]) for name, arg in subject.tensors.items()
                 if arg.writes],
        shapes={name: [_resolved(subject, text) for text in subject.axes[name]]
                for name in subject.tensors},
        sizes=dict(subject.sizes),
        largest=_largest(subject),
    )  # fmt: skip
    definition: Definition = {
        "name": _definition_name(subject, axes, constants),
        "description": _description(subject, constants),
        "op_type": published.op_type,
        "tags": [f"fi_api:{published.api}", f"fi_ffi:{subject.row.name}"],
        "axes": {axis.name: entry for axis, entry in axes.items()},
    }
    constraints = list(_constraints(subject))
    if constraints:
        definition["constraints"] = constraints
    return {**definition, "inputs": inputs, "outputs": outputs, "reference": reference.text()}


def _formula(subject: Subject) -> Formula | Move | None:
    row = subject.row
    if row.formula in EXACT and _has_many_results(row):
        raise NoSource(f"of {row.name} many results may be right: it has no one reference")
    return EXACT.get(row.formula) or MOVES.get(row.formula) or attention.EXACT.get(row.name)


@functools.cache
def _has_many_results(row: Row) -> bool:
    """Whether what an op's formula gives is a judge, and not a value."""
    case = make_case(row, inputs_of(row).small, default_dtypes(row), np.random.default_rng())
    return not all(isinstance(expected, tuple) for expected in case.expected.values())


def _check_options(subject: Subject) -> None:
    if subject.row.name not in attention.EXACT:
        return
    wrong: list[tuple[str, object]] = [
        (name, "a tensor") for name in subject.tensors if name in _UNKNOWN
    ]
    wrong += [
        (name, value)
        for name, value in subject.values.items()
        if name in NEUTRAL and name not in _KNOWN and value != NEUTRAL[name]
    ]
    if subject.values.get("mask_mode_code") not in (0, 1, None):
        wrong.append(("mask_mode_code", subject.values["mask_mode_code"]))
    if subject.pos_encoding_mode:
        wrong.append(("pos_encoding_mode", subject.pos_encoding_mode))
    for name, value in wrong:
        expected = "none: definitions have no word for it"
        raise ArgumentError("trace", name, got=value, expected=expected)


def _inputs(subject: Subject) -> list[str]:
    there = [name for name, arg in subject.tensors.items() if arg.reads]
    first = [name for name in subject.published.order if name in there]
    return first + [name for name in there if name not in first]


def _numbers(subject: Subject) -> list[str]:
    """The scalars that are inputs."""
    there = {arg.name for arg in subject.row.args}
    return [name for name in subject.published.numbers if name in there]


def _number(subject: Subject, name: str) -> dict[str, Any]:
    arg = next(arg for arg in subject.row.args if arg.name == name)
    assert isinstance(arg, Scalar)
    return {"shape": None, "dtype": _NUMBERS[arg.type], "description": arg.doc}


def _resolved(subject: Subject, text: str) -> str:
    """An axis, or the one that it counts as."""
    other, sizes = subject.published.same.get(text), subject.sizes
    if other is not None and other in sizes and axis_size(text, sizes) == sizes[other]:
        return other
    return text


def _tensor(subject: Subject, name: str) -> dict[str, Any]:
    """One element in an axis of 1 is a number."""
    axes, arg = subject.axes[name], subject.tensors[name]
    words = [word_of(_resolved(subject, text), subject.published).name for text in axes]
    shape = None if axes == ("1",) else words
    entry: dict[str, Any] = {"shape": shape, "dtype": subject.dtypes[name]}
    if arg.optional:
        entry["optional"] = True
    return {**entry, "description": arg.doc}


def _axes(subject: Subject) -> dict[Axis, dict[str, Any]]:
    """The axes that the tensors have, as published, and their entries."""
    published = subject.published
    there = dict.fromkeys(
        _resolved(subject, text) for of in subject.axes.values() if of != ("1",) for text in of
    )
    ordered = [text for text in published.axes if text in there]
    ordered += [text for text in there if text not in published.axes]
    found: dict[Axis, dict[str, Any]] = {}
    for text in ordered:
        axis = word_of(text, published)
        entry: dict[str, Any] = {"type": "const" if axis.is_const else "var"}
        if axis.is_const:
            entry["value"] = axis_size(text, subject.sizes)
        if not any(axis.name == other.name for other in found):
            found[axis] = entry
    return found


def _constraints(subject: Subject) -> Iterator[str]:
    """Axes that are made of others."""
    published = subject.published
    texts = dict.fromkeys(_resolved(subject, text) for of in subject.axes.values() for text in of)
    for text in texts:
        axis = parse_axis(text)
        if text.isdigit() or text in axis.names or not all(name in texts for name in axis.names):
            continue
        terms = [
            (f"{times} * " if times != 1 else "") + word_of(name, published).name
            for name, times in axis.terms
        ]
        terms += [str(axis.more)] * bool(axis.more)
        yield f"{word_of(text, published).name} == {' + '.join(terms)}"


def _constants(subject: Subject) -> dict[str, Any]:
    """Numbers that are part of the definition and not what they are by default."""
    found: dict[str, Any] = {}
    for arg in subject.row.args:
        name, value = arg.name, subject.values.get(arg.name)
        if name in _NO_MATTER or name in _numbers(subject) or value is None:
            continue
        default = getattr(arg, "default", None)
        if name == "sm_scale":
            default = usual_scale(subject.sizes)
        if value != (NEUTRAL.get(name, 0) if default is None else default):
            found[name] = value
    if subject.values.get("kv_layout") == "HND":
        found["kv_layout"] = "HND"
    return found


def _definition_name(
    subject: Subject, axes: Mapping[Axis, dict[str, Any]], constants: Mapping[str, Any]
) -> str:
    parts = [subject.published.name]
    for axis, entry in axes.items():
        word = axis.name if axis.abbreviation is None else axis.abbreviation
        if axis.is_const and word:
            parts.append(f"{word}{entry['value']}")
    if constants.get("mask_mode_code") == 1:
        parts.append("causal")
    for name, value in constants.items():
        if name == "kv_layout":
            parts.append(str(value).lower())
        elif name != "mask_mode_code":
            parts.append(f"{name}{value}".replace("-", "m").replace(".", "p"))
    return "_".join(parts)


def _description(subject: Subject, constants: Mapping[str, Any]) -> str:
    text = subject.row.doc
    if constants:
        told = ", ".join(f"{name} = {value}" for name, value in constants.items())
        text += f" Here {told}."
    return text


def _largest(subject: Subject) -> dict[str, float]:
    found = {}
    for name, dtype in subject.dtypes.items():
        numpy = DTYPES[dtype].numpy
        if numpy.kind not in "iub":
            found[name] = float(ml_dtypes.finfo(numpy).max)
    return found
