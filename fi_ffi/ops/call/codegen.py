"""Generates the source of a row's calls: straight-line Python, compiled once for each row.

A call reads addresses, sizes and strides, compares them (`Checks`), writes them into a frame, and
launches it.
"""

from __future__ import annotations

import itertools
import operator
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence

from fi_ffi.abi.library import TypeIndex
from fi_ffi.ops.call.arguments import INT64_MAX
from fi_ffi.ops.call.checks import Checks, parameters
from fi_ffi.ops.call.notation import parse_axis, parse_expression
from fi_ffi.ops.call.row import Absent, Arg, IntArray, Scalar, Tensor, Text

# Local variables that checks of shapes and strides set.
_LOCALS = re.compile(r"\b(?:size__\w+|\w+__[ds]\d+|\w+__span|mask__\d+|step__\d+)\b")
_NAME = re.compile(r"\b[A-Za-z_]\w*")
_SET = re.compile(r"(?:^|: ) *((?:\w+, )*\w+),? = (.+)", re.MULTILINE)  # an assignment
Source = tuple[str, list[str]]  # a function's header, and its lines
# What is compiled from a row: methods of `Writer`, and of `CompiledRow`.
FUNCTIONS = ("call", "pack", "check", "arguments", "update")


class Writer(Checks):
    """Writes one of a row's functions."""

    def call(self) -> Source:
        """Write a method `call(self, /, ..., *, stream=None)` that launches."""
        return f"def call(self, /, {parameters(self.row)}):", self._lines(self._launch)

    def pack(self) -> Source:
        """Write a function of the same parameters that packs.

        It returns the variant, a frame (None if there is nothing to do), the scratch memory taken,
        and the bits that new addresses must not have; with bound arguments, only the frame.
        """
        bound = f"bound_row, {', '.join(self.options.packed_names)}"
        header = f"def pack({bound if self.options.bound else parameters(self.row)}):"
        return header, self._lines(lambda: [self._packed("frame")])

    def check(self) -> Source:
        """Write a function of the same parameters that raises what a call would; it returns the
        tensors by name, and the axes' sizes."""

        def end() -> list[str]:
            sizes = ", ".join(f"{axis!r}: {size}" for axis, size in self.sizes.items())
            descs = ", ".join(f"{arg.name!r}: described({arg.name})" for arg in self.row.tensors)
            return [f"return {{{descs}}}, {{{sizes}}}"]

        return f"def check({parameters(self.row)}):", self._lines(end)

    def arguments(self) -> Source:
        """Write a function of the same parameters that returns them by name, and the stream."""
        header = f"def arguments({parameters(self.row)}):"
        return header, [f"return {_by_name(self.row.given)}, stream"]

    def update(self) -> Source:
        """Write a prepared call's `update`, with a fast path for addresses."""
        row = self.row
        header = f"def update(self, /, {', '.join(f'{arg.name}=KEEP' for arg in row.given)}):"
        change = [f"self.change({_by_name(row.given)})"]
        if row.allocates or any(arg.optional or arg.is_scratch for arg in row.tensors):
            return header, change
        places = [(i, arg.name) for i, arg in enumerate(row.slots) if isinstance(arg, Tensor)]
        now, then, tests = list[str](), list[str](), list[str]()
        for k, (i, name) in enumerate(places):
            word, p = self.layout.value(i), f"{name}__p"
            now.append(f"{p} = {name} if {name} is not KEEP else addresses[{word}]")
            then.append(f"addresses[{word}] = {p}")
            then.append(f"if {name} is not KEEP: self.owners[{k}] = None")
            tests.append(f"type({p}) is int and 0 < {p} <= {INT64_MAX} and not {p} & masks[{k}]")
        tests += [f"{arg.name} is KEEP" for arg in row.given if not isinstance(arg, Tensor)]
        for (a, one), (b, other) in itertools.combinations(enumerate(row.tensors), 2):
            if one.writes or other.writes:
                x, y = f"{one.name}__p", f"{other.name}__p"
                tests.append(f"({x} >= {y} + spans[{b}] or {y} >= {x} + spans[{a}])")
        return header, [
            "try:",
            "    frame = self.take()",
            "except IndexError:",
            "    frame = self.reclaim()",
            "try:",
            "    if frame is not None:",
            "        addresses, masks, spans = frame.addresses, self.masks, self.spans",
            *(f"        {line}" for line in now),
            f"        if {' and '.join(tests)}:",
            *(f"            {line}" for line in (*then, "return")),
            "finally:",
            "    self.give(frame)",
            *change,
        ]

    def _lines(self, end: Callable[[], Sequence[str]]) -> list[str]:
        """Return a function's lines up to a written frame, and those of `end`."""
        writes = self.function != "check"
        checks = [
            *self._shapes(),
            *self._conditions(),
            *self._loads(),
            *self._strides(is_scratch=False),
            *self._packed_dims(),
        ]
        after = [
            *self._numbers(),
            *self._together(),
            *self._scratch(),
            *self._strides(is_scratch=True),
            *self._rules(of_memory=False),
            *(self._nothing() if writes else []),
            *self._addresses(),
            *self._overlap(),
            *self._rules(of_memory=True),
            *(self._writes() if writes else []),
            *end(),
        ]
        return [*self._read_tensors(), *self._checked(checks, after), *after]

    def _checked(self, checks: Sequence[str], after: Sequence[str]) -> list[str]:
        """Skip the checks of shapes and strides if these are those of the call before.

        A decoder's layers, and most loops, repeat them. A call with another layout costs one more
        comparison (docs/performance.md has both). A plan's runs, which are of the same kinds nearly
        always, look for no variant either.
        """
        is_bound = bool(self.options.bound)
        if not self.tensors and not is_bound:
            return [*self._variant(), *checks]
        text = "\n".join(after)
        scratch = tuple(f"{arg.name}__" for _, arg in self.tensors if arg.is_scratch)
        kept = {name for name in _LOCALS.findall(text) if not name.startswith(scratch)}
        layouts, names = self._layouts(), _listed(sorted(kept))
        if self.options.changing:
            checks = self._of_batch(checks, kept)
        memo, first = f"variant.{self.memo}", self._variant()
        if is_bound:
            layouts += f"{_listed(self._key())}bound_row.sizes, "
            checks = [*first, *checks, "free = bound_row.frames_of(variant)"]
            memo, first, names = "bound_row.memo", [], f"variant, free, {names}"
        return [
            *first,
            f"layouts = ({layouts})",
            f"memo = {memo}",
            "if memo[0] != layouts:",
            *(f"    {line}" for line in checks),
            f"    memo = {memo} = (layouts, {names})",
            f"_, {names} = memo",
        ]

    def _layouts(self, growing: Collection[str] = ()) -> str:
        """Return the source of the tensors' shapes and strides, without the first sizes of some."""
        layouts = []
        for _, arg in self.tensors:
            if arg.is_scratch:
                continue
            shape = f"{arg.name}__shape"
            if arg.name in growing:
                shape += f"[{'variant.is_nhd' if arg.kv else 1}:]"
                shape = f"None if {arg.name} is None else {shape}" if arg.optional else shape
            layouts += [shape, f"{arg.name}__strides"]
        return _listed(layouts)

    def _of_batch(self, checks: Sequence[str], kept: set[str]) -> list[str]:
        """Leave out what another batch changes nothing of, if that is as in the call before.

        The rest are the statements that depend on the sizes of the axes `changing`.
        """
        axes = {*self.options.changing}
        first = {arg.name: arg.axis_names[0] for _, arg in self.tensors if arg.axis_names}
        growing = [name for name, text in first.items() if axes & {*parse_axis(text).names}]
        changing = {f"size__{axis}" for axis in axes} | {f"{name}__d0" for name in growing}
        changing |= {self.dims[name][0] for name in growing}
        again, same = _depending(checks, changing)
        names = _listed(sorted(same & (_names("\n".join(again)) | kept)))
        return [
            f"planned = ({self._layouts(growing)}bound_row.own_sizes)",
            "memo = variant.memo_of_plan",
            "if memo[0] != planned:",
            *(f"    {line}" for line in checks),
            f"    variant.memo_of_plan = (planned, {names})",
            "else:",
            f"    _, {names} = memo",
            *(f"    {line}" for line in again),
        ]

    def _writes(self) -> list[str]:
        """Get a frame, and write into it what the memo of layouts does not have."""
        if self.options.bound:
            lines = [
                "try:",
                "    frame = free.pop()",
                "except IndexError:",
                "    frame = bound_row.new_frame(variant)",
                "if frame.state is not bound_row.state: bound_row.write(frame)",
            ]
        else:
            stream = "" if self.function == "pack" else "stream"
            lines = [
                "try:",
                "    frame = variant.frames.pop()",
                "except IndexError:",
                "    frame = None",
                f"if frame is None: frame = variant.new_frame({stream})",
            ]
        if any(isinstance(arg, (Tensor, IntArray)) for _, arg in self.given):
            lines.append("addresses = frame.addresses")
        words = "frame.words"
        for i, arg in self.given:
            word = self.layout.value(i)
            if isinstance(arg, Tensor):
                lines.append(f"addresses[{word}] = {arg.name}__p")
            elif isinstance(arg, IntArray):
                if arg.optional:
                    kind = f"{int(TypeIndex.ARRAY)} if {arg.name} else {int(TypeIndex.NONE)}"
                    lines.append(f"{words}[{word - 1}] = {kind}")
                lines.append(f"addresses[{word}] = {arg.name}")
            elif isinstance(arg, Text):
                lines.append(f"{words}[{word}] = texts{i}[{arg.name}]")
            elif isinstance(arg, Scalar):
                value = arg.name
                if arg.library:
                    value = f"{value} or own_handle({arg.library!r}, variant.device)"
                if arg.zero:
                    value = f"{value} or {parse_expression(arg.zero)[0].format_map(self.sizes)}"
                view = "frame.floats" if arg.type is float else words
                lines.append(f"{view}[{word}] = {value}")
        for i, other in enumerate(self.row.args):
            if isinstance(other, Absent) and other.of:
                number = parse_expression(other.of)[0].format_map(self.sizes)
                lines.append(f"{words}[{self.layout.value(i)}] = {number}")
        if self.layout.last_dims > self.layout.first_dims:
            write = "frame.dims[:] = frame.written = dims__d0"
            lines.append(f"if frame.written is not dims__d0: {write}")
        for i, arg in self.tensors:
            if arg.is_scratch:
                at = self.layout.dims[i]
                dims = enumerate(self._dims(arg), at)
                lines += [f"frame.words[{word}] = {value}" for word, value in dims]
        return lines

    def _packed_dims(self) -> list[str]:
        """Pack all shapes and strides that are adjacent in a frame into bytes."""
        dims = [
            part
            for i, arg in enumerate(self.row.slots)
            if i in self.layout.tensors and arg.name not in self.options.last
            for part in self._dims(arg)
        ]
        return [f"dims__d0 = pack_dims({', '.join(dims)})"] if dims else []

    def _dims(self, arg: Arg) -> list[str]:
        if isinstance(arg, Absent):
            steps = itertools.accumulate(reversed(arg.shape[1:]), operator.mul, initial=1)
            return [*map(str, arg.shape), *reversed([str(step) for step in steps])]
        assert isinstance(arg, Tensor)
        name, rank = arg.name, len(arg.axis_names)
        if arg.view:
            sizes = (" * ".join(self.dims[name][k] for k in axes) for axes in arg.view)
            return [*sizes, *(f"{name}__s{axes[-1]}" for axes in arg.view)]
        if arg.kv and self.row.kv_layout is not None and not self.row.kv_layout.strided:
            return [f"*{name}__shape", f"*{name}__strides"]
        return [*self.dims[name], *(f"{name}__s{k}" for k in range(rank))]

    def _nothing(self) -> list[str]:
        row = self.row
        nothing = self._packed("None") if self.function == "pack" else "return None"
        if row.nothing_axis:
            return [f"if not {self.sizes[row.nothing_axis]}: {nothing}"]
        written = [arg for _, arg in self.tensors if arg.writes and not arg.is_scratch]
        if not written:
            return []
        empty = [f"not ({' * '.join(self.dims[arg.name]) or '1'})" for arg in written]
        return [f"if {' and '.join(empty)}: {nothing}"]

    def _packed(self, frame: str) -> str:
        """Return the expression that a packed call returns."""
        if self.options.bound:
            return f"return {frame}"
        scratch = "".join(f"described({arg.name}), " for _, arg in self.tensors if arg.is_scratch)
        masks = "".join(f"{self.masks[arg.name]}, " for _, arg in self.tensors)
        return f"return variant, {frame}, ({scratch}), ({masks})"

    def _launch(self) -> list[str]:
        row = self.row
        if row.allocates or any(arg.as_object for arg in row.tensors):
            return [
                "try:",
                "    return variant.run(frame, stream)",
                "finally:",
                "    frame.give_back(frame)",
            ]
        return [
            "try:",
            "    launch(frame, stream)",
            *(["    return frame.take_result()"] if row.result != "void" else []),
            "finally:",
            "    frame.give_back(frame)",
        ]


def _by_name(args: Sequence[Arg]) -> str:
    """Return the source of a dict of arguments."""
    return f"{{{', '.join(f'{arg.name!r}: {arg.name}' for arg in args)}}}"


def _listed(names: Iterable[str]) -> str:
    """Return the source of a tuple's items."""
    return "".join(f"{name}, " for name in names)


def _names(text: str) -> set[str]:
    return {*_NAME.findall(text)}


def _depending(lines: Sequence[str], changing: set[str]) -> tuple[list[str], set[str]]:
    """Return the statements in which a name of `changing` occurs, or one that is computed from
    these, and the names that the other statements set."""
    statements: list[list[str]] = []
    for line in lines:
        if line.startswith((" ", "el")):
            statements[-1].append(line)
        else:
            statements.append([line])
    texts = ["\n".join(statement) for statement in statements]
    found = [[(_names(of), _names(value)) for of, value in _SET.findall(text)] for text in texts]
    # What is set twice is not known by its name.
    times = Counter(name for sets in found for name in set().union(*(of for of, _ in sets)))
    changing |= {name for name, count in times.items() if count > 1}
    again, same = list[str](), set[str]()
    for statement, text, sets in zip(statements, texts, found, strict=True):
        if changing.isdisjoint(_names(text)):
            same.update(*(of for of, _ in sets))
            continue
        again += statement
        changing.update(*(of for of, value in sets if changing & value))
    return again, same
