"""The quick way of a call: straight-line Python, compiled from the op's row.

Layouts that were called with before have been checked; what is left to check of a call are
addresses and numbers.  Whatever is new or wrong is left to the full way (`Form`), which has
the words for it: nothing is refused here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from fi_ffi.abi.frame import word_of
from fi_ffi.ops import watching
from fi_ffi.ops.launch import Preparing, launch
from fi_ffi.ops.relations import depends_on, has_relations
from fi_ffi.ops.row import REQUIRED, Absent, KvLayout, PlanInfo, Row, Scalar, Tensor, defaults
from fi_ffi.ops.settled import Settled

_INT64 = 2**63
# What tracebacks call the code compiled from a row: part of the package.
_FILE = __file__.removesuffix(".py") + "/{}"


def has_quick_way(row: Row) -> bool:
    """Whether its calls are of addresses and numbers, and no more."""
    plain = all(
        isinstance(arg, (KvLayout, PlanInfo, Absent))
        or (isinstance(arg, Scalar) and not arg.library)
        or (isinstance(arg, Tensor) and not arg.is_scratch
            and (arg.optional or not arg.as_object))
        for arg in row.args
    )  # fmt: skip
    return plain and not (row.together or row.allocates)


def parameters(row: Row) -> str:
    """An op's Python parameters: the ABI's order, then the stream by keyword."""
    both = zip(row.given, defaults(row.given), strict=True)
    parts = [arg.name + ("" if default is None else f"={default}") for arg, default in both]
    return ", ".join([*parts, "*", "stream=None"])


Settledness = Mapping[tuple[object, ...], Settled]


def compile_quick(
    row: Row, settled: Settledness, full: Callable[[list[Any], object], Any]
) -> Callable[..., Any]:
    """A method with the op's parameters; `full(values, stream)` does what it does not."""
    return _compiled(row, f"def call(self, /, {parameters(row)}):", settled, full)


def compile_again(
    row: Row, settled: Settledness, full: Callable[[list[Any], object], Any]
) -> Callable[[list[Any], object], Any]:
    """The same of `(values, stream)`, the values in the ABI's order."""
    names = ", ".join(arg.name for arg in row.args)
    return _compiled(row, f"def call(_values, stream):\n    {names}, = _values", settled, full)


def _compiled(
    row: Row, header: str, settled: Settledness, full: Callable[[list[Any], object], Any]
) -> Callable[..., Any]:
    namespace: dict[str, Any] = {
        "_settled": settled, "_full": full, "_launch": launch, "_watching": watching,
        "_inf": math.inf, "_Preparing": Preparing, repr(REQUIRED): REQUIRED,
    }  # fmt: skip
    exec(compile(_source(row, header), _FILE.format(row.name), "exec"), namespace)
    made: Callable[..., Any] = namespace["call"]
    made.__name__ = made.__qualname__ = row.name  # which a TypeError of its arguments tells
    return made


def _source(row: Row, header: str) -> str:
    names = ", ".join("None" if isinstance(arg, Absent) else arg.name for arg in row.args)
    full = f"return _full([{names}], stream)"
    if not has_quick_way(row):
        return f"{header}\n    {full}"
    addresses, wrong, writes = _parts(row)
    lines = [
        "try:",
        f"    settled = _settled[{_key(row)}]",
        "    frame = settled.frames.pop()",
        "except (AttributeError, KeyError, IndexError, TypeError):",
        f"    {full}",
        *addresses,
        *_sizes(row),
        "m = settled.masks",
        f"if {' or '.join(wrong)} or _watching.inboxes or type(stream) is _Preparing:",
        "    settled.frames.append(frame)",
        f"    {full}",
        "words = frame.pointers",
        *writes,
        "try:",
        "    _launch(frame, settled.place, stream)",
        *(["    return frame.take_result()"] * (row.result != "void")),
        "finally:",
        "    settled.frames.append(frame)",
    ]
    return "\n".join([header, *(f"    {line}" for line in lines)])


class _Keep:
    def __repr__(self) -> str:
        return "(as it is)"


KEEP: Any = _Keep()  # an argument of an update that stays as it is


def compile_update(row: Row) -> Callable[..., None]:
    """The `update` of the row's prepared calls."""
    namespace = {"_KEEP": KEEP, "_inf": math.inf}
    exec(compile(_update_source(row), _FILE.format(row.name), "exec"), namespace)
    made: Callable[..., None] = namespace["update"]
    return made


def _update_source(row: Row) -> str:
    changes = ", ".join(f"{arg.name!r}: {arg.name}" for arg in row.given)
    change = f"return self.change(frame, {{{changes}}})"
    wrong, writes, n = [], [], 0
    for i, arg in enumerate(row.args):
        if isinstance(arg, Absent):
            continue
        given, tests = f"{arg.name} is not _KEEP", ["True"]
        if isinstance(arg, Tensor):
            tests = [f"type({arg.name}) is not int", f"{arg.name} & m[{n}]"]
            tests.append(f"not 0 < {arg.name} < {_INT64}")
            if arg.optional:  # None, as it was prepared, has no slot for an address
                tests.append(f"not values[{i}]")
            write = f"frame.pointers[{word_of(i, True)}] = values[{i}] = {arg.name}"
            writes += [f"if {given}:", f"    {write}", f"    self.disown({n})"]
            n += 1
        elif isinstance(arg, Scalar):
            tests, words = _wrong_numbers(arg), "floats" if arg.type is float else "ints"
            write = f"frame.{words}[{word_of(i, False)}] = values[{i}] = {arg.name}"
            writes += [f"if {given}:", f"    {write}"]
        wrong.append(f"({given} and ({' or '.join(tests)}))")
    related = has_relations(row)
    if related:
        wrong.append(f"{_updated_relations(row)} not in self._settled.seen")
    body = [
        "m, values = self.masks, self.values",
        f"if {' or '.join(wrong)}:",
        f"    {change}",
        *writes,
    ]
    if not has_quick_way(row):
        body = [change]
    elif not related and not any(arg.optional for arg in row.tensors):
        body = [*_all_addresses(row), *body]
    return _with_frame(row, body)


def _with_frame(row: Row, body: list[str]) -> str:
    """An `update` that does this while it has the frame to itself."""
    lines = [
        f"def update(self, /, {', '.join(f'{arg.name}=_KEEP' for arg in row.given)}):",
        "    try:",
        "        frame = self.take()",
        "    except IndexError:",
        "        frame = self.reclaim()",
        "    try:",
        *(f"        {line}" for line in body),
        "    finally:",
        "        self.give(frame)",
    ]
    return "\n".join(lines)


def _all_addresses(row: Row) -> list[str]:
    """The update that is made most: every tensor by its address, and nothing else."""
    tensors = [(i, arg.name) for i, arg in enumerate(row.args) if isinstance(arg, Tensor)]
    others = [arg.name for arg in row.given if not isinstance(arg, Tensor)]
    names = [name for _, name in tensors]
    # The types first: arrays have an `|` of their own.  Of ints, it is negative where one is; bits
    # that none may have are enough.
    tests = [*(f"type({name}) is int" for name in names), *names]
    tests += [f"not (bits := {' | '.join(names)}) & self.mask", f"0 < bits < {_INT64}"]
    tests += [f"{name} is _KEEP" for name in others]
    writes = [f"words[{word_of(i, True)}] = values[{i}] = {name}" for i, name in tensors]
    return [
        f"if {' and '.join(tests)}:",
        "    words, values, self.owners = frame.pointers, self.values, self.no_owners",
        *(f"    {write}" for write in writes),
        "    return",
    ]


def _key(row: Row) -> str:
    """What the checks depend on, as `Form` keys it."""
    parts = [arg.name for arg in row.args if isinstance(arg, KvLayout)] or ["'NHD'"]
    for arg in row.tensors:
        layout = f"{arg.name}.layout"
        parts.append(f"(None if {arg.name} is None else {layout})" if arg.optional else layout)
    return ", ".join(parts)


def _parts(row: Row) -> tuple[list[str], list[str], list[str]]:
    """Lines that get the addresses, tests of what is wrong, and lines that write the frame."""
    addresses: list[str] = []
    masked: list[str] = []
    wrong: list[str] = []
    writes: list[str] = []
    for i, arg in enumerate(row.args):
        name = arg.name
        if isinstance(arg, Tensor):
            p, there = f"p{len(addresses)}", f"{name} is not None"
            masked.append(f"{p} & m[{len(addresses)}]")
            addresses.append(f"{p} = {name}.ptr" + (f" if {there} else 0" if arg.optional else ""))
            wrong.append(f"({there} and not {p})" if arg.optional else f"not {p}")
            if arg.as_object:
                wrong.append(there)
            writes.append(f"words[{word_of(i, True)}] = {p}")
        elif isinstance(arg, Scalar):
            wrong += _wrong_numbers(arg)
            words = "floats" if arg.type is float else "ints"
            writes.append(f"frame.{words}[{word_of(i, False)}] = {name}")
        elif isinstance(arg, KvLayout):
            wrong.append(f"type({name}) is not str")  # which another type may be equal to
        elif isinstance(arg, PlanInfo):
            writes.append(f"frame.ints[{word_of(i, False)}] = {name}")
    if has_relations(row):
        tensors = [arg.name for arg in row.tensors]
        names = {arg.name: arg.name for arg in row.args}
        names |= {name: f"p{n}" for n, name in enumerate(tensors)}
        wrong.append(f"{_relations(row, names)} not in settled.seen")
    return addresses, [" | ".join(masked), *wrong], writes


def _relations(row: Row, names: Mapping[str, str]) -> str:
    """What checks between arguments depend on, as `check_relations` keys it; `names` are what
    has their values."""
    numbers, tensors = ([names[row.args[i].name] for i in found] for found in depends_on(row))
    parts = [*numbers, *(f"{tensor} - {tensors[0]}" for tensor in tensors[1:])]
    return f"({''.join(f'{part}, ' for part in parts)})"


def _updated_relations(row: Row) -> str:
    """The same once an update is made: what is given, and else what there is."""
    now = "(values[{0}] if {1} is _KEEP else {1})"
    return _relations(row, {arg.name: now.format(i, arg.name) for i, arg in enumerate(row.args)})


def _sizes(row: Row) -> list[str]:
    """Lines that replace None by the size that it stands for."""
    return [
        f"if {arg.name} is None: {arg.name} = settled.checked.sizes[{arg.size_of!r}]"
        for arg in row.args
        if isinstance(arg, Scalar) and arg.size_of
    ]


def _wrong_numbers(arg: Scalar) -> list[str]:
    """When a number cannot be written as it is."""
    name, wrong = arg.name, [f"type({arg.name}) is not {arg.type.__name__}"]
    if arg.type is float:
        low = "-_inf <" if arg.low is None else f"{float(arg.low)!r} <="
        high = "< _inf" if arg.high is None else f"<= {float(arg.high)!r}"
        wrong.append(f"not {low} {name} {high}")
    elif arg.type is int:
        high = f"< {_INT64}" if arg.high is None else f"<= {int(arg.high)}"
        wrong.append(f"not {-_INT64 if arg.low is None else int(arg.low)} <= {name} {high}")
    if arg.multiple_of > 1:
        wrong.append(f"{name} % {arg.multiple_of}")
    return wrong
