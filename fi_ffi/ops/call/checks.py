"""Generates the lines that check a call's arguments, from its row: shapes, strides, addresses.

Sizes are data: no table is keyed by them. If a comparison fails, `Refusals` words the error. What
depends on dtypes and devices alone is in the variant, found by the tensors' kinds.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from fi_ffi.abi.function import FrameLayout
from fi_ffi.abi.tensor import DTYPES, TensorKind
from fi_ffi.ops.call.arguments import INT64_MAX
from fi_ffi.ops.call.notation import parse_axis
from fi_ffi.ops.call.refuse import unlimited
from fi_ffi.ops.call.row import (
    IN_PLACE,
    MULTIPROCESSORS,
    REQUIRED,
    SHARED_MEMORY,
    Absent,
    Row,
    Scalar,
    Tensor,
    TensorArray,
    Text,
)

_FAR = 2**62  # no tensor reaches this limit
# The local variables of each tensor, as a reader returns them: address, shape, strides, kind.
FIELDS = ("p", "shape", "strides", "kind")


def parameters(row: Row) -> str:
    """Return an op's Python parameters: the ABI's order, then the stream by keyword."""
    both = zip(row.given, row.defaults, strict=True)
    parts = [arg.name + ("" if default is None else f"={default}") for arg, default in both]
    return ", ".join([*parts, "*", "stream=None"])


def call_text(row: Row) -> str:
    """Return how an op is called, for the errors of calls with other arguments."""
    names = parameters(row).replace(f"={REQUIRED}", "")
    written = [arg.name for arg in row.tensors if arg.writes and not arg.is_scratch]
    return f"{row.name}({names}) writes {' and '.join(written) or 'no argument'}"


@dataclass(frozen=True)
class CompileOptions:
    """How functions are compiled from a row.

    `bound` are arguments that are already in the frame (a plan's own), with their kinds, or None
    for a missing tensor; `known` are axes whose sizes the plan has fixed. Errors name `op`, and
    arguments by `names`. Each batch of a plan changes the sizes of the axes in `changing`.
    """

    row: Row
    op: str = ""
    names: Mapping[str, str] = field(default_factory=dict)
    known: tuple[str, ...] = ()
    changing: tuple[str, ...] = ()
    bound: Mapping[str, TensorKind | None] = field(default_factory=dict)
    # Parameters of `pack` that come before the others.
    first: tuple[str, ...] = ()

    @cached_property
    def last(self) -> frozenset[str]:
        """Bound arguments and scratch, whose shapes calls do not write with the others."""
        return frozenset((*self.bound, *(arg.name for arg in self.row.tensors if arg.is_scratch)))

    @cached_property
    def layout(self) -> FrameLayout:
        """Where the row's arguments are in a frame; the shapes of those in `last` come last."""
        slots = self.row.slots
        ranks = [arg.entry_rank if isinstance(arg, (Tensor, Absent)) else None for arg in slots]
        places = [i for i, arg in enumerate(slots) if arg.name in self.last]
        return FrameLayout(ranks, places, len(self.row.args))

    @property
    def packed_names(self) -> list[str]:
        """The parameters of `pack`, if arguments are bound."""
        names = [arg.name for arg in self.row.given if arg.name not in self.bound]
        first = [name for name in self.first if name in names]
        return [*first, *(name for name in names if name not in first)]


class Checks:
    """Lines that check a call's arguments, before a frame is written."""

    def __init__(self, options: CompileOptions, function: str) -> None:
        self.options, self.row, self.function = options, options.row, function
        self.layout = options.layout
        # The variant's memo that this function uses; each function keeps other values.
        self.memo = "memo" if function == "call" else f"memo_of_{function}"
        # Arguments that each call passes, with their index.
        self.given = [
            (i, arg)
            for i, arg in enumerate(self.row.slots)
            if arg.name not in options.bound and not isinstance(arg, (Absent, TensorArray))
        ]
        self.tensors = [(i, arg) for i, arg in self.given if isinstance(arg, Tensor)]
        # The expression of each axis' size, and the argument that fixes it.
        self.sizes: dict[str, str] = {name: f"size__{name}" for name in options.known}
        self.fixed_by: dict[str, str] = {}
        self.maybe: set[str] = set()  # axes that only optional tensors have
        self.dims: dict[str, list[str]] = {}
        # For each tensor the itemsize, the elements loaded at a time, and the bits that its address
        # must not have.
        self.itemsizes: dict[str, str] = {}
        self.steps: dict[str, str] = {}
        self.masks: dict[str, str] = {}

    # Tensors, their kinds and shapes.

    def _read_tensors(self) -> list[str]:
        """Read the tensors."""
        lines = list[str]()
        for _, arg in self.tensors:
            name, caller = arg.name, self.options.names.get(arg.name, arg.name)
            fields = [f"{name}__{field}" for field in FIELDS]
            if arg.or_zeros:
                device = f"{self.tensors[0][1].name}__kind.device"
                lines.append(f"if {name} is None: {name} = zeros({device}, {arg.axes})")
            is_desc = f"if type({name}) is TensorDesc:"
            if arg.may_be_none:
                lines.append(f"if {name} is None:")
                lines.append(f"    {' = '.join(fields[1:])} = None")
                lines.append(f"    {fields[0]} = {name}__end = 0")
                is_desc = f"el{is_desc}"
            lines += [is_desc, *_read_fields(name)]
            given = f"{name}, {self.options.op!r}, {caller!r}"
            reader = f"readers.get(type({name}), read)"
            lines += ["else:", f"    {name} = {reader}({given})"]
            lines.append(f"    {', '.join(fields)}, _ = {name}")
            if arg.is_loose:
                present = f"{name} is not None and " if arg.may_be_none else ""
                lines.append(f"if {present}{name}__kind.rank != 1:")
                lines += [f"    {name} = as_vector(described({name}))", *_read_fields(name)]
        if self.row.kv_layout is not None:
            kv = self.row.kv_layout.name
            lines.append(f"if type({kv}) is not str: refuse.word({kv!r}, {kv}, KV_LAYOUTS)")
        return lines

    def _key(self) -> list[str]:
        """Return what a variant is found by: the tensors' kinds, after the layout of keys."""
        layout = self.row.kv_layout
        kinds = [f"{arg.name}__kind" for _, arg in self.tensors]
        return kinds if layout is None else [layout.name, *kinds]

    def _variant(self) -> list[str]:
        """Find the variant for the tensors' kinds."""
        key = "".join(f"{part}, " for part in self._key())
        descs = "".join(f"{arg.name}, " for _, arg in self.tensors)
        kv = "'NHD'" if self.row.kv_layout is None else self.row.kv_layout.name
        return [
            f"variant = variants.get(({key}))",
            f"if variant is None: variant = add_variant(({descs}), {kv})",
        ]

    def _shapes(self) -> list[str]:
        """Read shapes and strides, and compare sizes with each other."""
        required = [arg for _, arg in self.tensors if not arg.may_be_none]
        lines: list[str] = []
        if any(arg.kv for _, arg in self.tensors):
            lines.append("is_nhd = variant.is_nhd")
        if self.options.known:
            lines.append(
                f"{', '.join(f'size__{name}' for name in self.options.known)}, = bound_row.sizes"
            )
        waiting: list[tuple[Tensor, str, str]] = []
        for arg in required:
            lines += self._shape(arg, waiting)
        for arg, text, size in waiting:  # sums: other tensors first fix all terms but one
            lines += self._solve_axis(arg, text, size)
        for _, arg in self.tensors:
            if arg.optional and not arg.is_scratch:
                lines += self._optional_shape(arg)
        return lines

    def _read(self, arg: Tensor, names: Sequence[str]) -> list[str]:
        name, rank = arg.name, len(names)
        if not rank:
            return []
        steps = [f"{name}__s{k}" for k in range(rank)]
        lines = []
        for of, targets in (("shape", names), ("strides", steps)):
            source = f"{name}__{of}"
            if arg.kv:
                source = f"{source} if is_nhd else exchanged({source})"
            lines.append(f"{', '.join(targets)}, = {source}")
        return lines

    def _shape(self, arg: Tensor, waiting: list[tuple[Tensor, str, str]]) -> list[str]:
        targets, later = [], []
        for k, text in enumerate(arg.axis_names):
            is_new = text.isidentifier() and text not in self.sizes
            if is_new:
                self.sizes[text], self.fixed_by[text] = f"size__{text}", arg.name
                targets.append(f"size__{text}")
                continue
            targets.append(f"{arg.name}__d{k}")
            later.append((text, targets[-1]))
        self.dims[arg.name] = targets
        lines = self._read(arg, targets)
        for text, size in later:
            unknown = [name for name in parse_axis(text).names if name not in self.sizes]
            if len(unknown) > 1:
                waiting.append((arg, text, size))
                continue
            lines += self._solve_axis(arg, text, size)
            if text in self.sizes:  # use the known variable from here on
                targets[targets.index(size)] = self.sizes[text]
        return lines

    def _solve_axis(self, arg: Tensor, text: str, size: str) -> list[str]:
        """Compare a size with what is known, or solve it for an unknown term."""
        axis = parse_axis(text)
        unknown = [(name, times) for name, times in axis.terms if name not in self.sizes]
        terms = [
            f"{times} * {self.sizes[name]}" if times > 1 else self.sizes[name]
            for name, times in axis.terms
            if name in self.sizes
        ]
        if axis.more or not terms:
            terms.append(str(axis.more))
        known = " + ".join(terms)
        if not unknown:
            wanted = known if axis.over == 1 else f"({known}) // {axis.over}"
            fixed = next((self.fixed_by[name] for name in axis.names if name in self.fixed_by), "")
            fixed = "" if fixed == arg.name else fixed
            refusal = f"refuse.size({arg.name!r}, {arg.name}, {text!r}, {wanted}, {fixed!r})"
            return [f"if {size} != {wanted}: {refusal}"]
        ((name, times),) = unknown
        solved = f"size__{name}"
        self.sizes[name], self.fixed_by[name] = solved, arg.name
        if axis.over > 1:  # several values in each element
            assert (len(axis.terms), times, axis.more) == (1, 1, 0), f"{self.row.name}: {text}"
            return [f"{solved} = {size} * {axis.over}"]
        minus = "" if known == "0" else f" - ({known})"
        of = f"{arg.name!r}, {arg.name}, {text!r}"
        unsolved = f"refuse.unsolved({of}, {size}, {known}, {times})"
        if times == 1:
            return [f"{solved} = {size}{minus}", f"if {solved} < 0: {unsolved}"]
        return [
            f"{solved}, rest = divmod({size}{minus}, {times})",
            f"if {solved} < 0 or rest: {unsolved}",
        ]

    def _optional_shape(self, arg: Tensor) -> list[str]:
        """Read the shape of an optional tensor."""
        name, before = arg.name, []
        targets = [f"{name}__d{k}" for k in range(len(arg.axis_names))]
        self.dims[name] = targets
        inside = self._read(arg, targets)
        for text, size in zip(arg.axis_names, targets, strict=True):
            axis = parse_axis(text)
            unknown = [part for part in axis.names if part not in self.sizes or part in self.maybe]
            if not unknown:
                inside += self._solve_axis(arg, text, size)
                continue
            assert axis.names == (text,), f"{self.row.name}: {name} alone has {text}"
            if text in self.maybe:
                of = f"{name!r}, {arg.name}, {text!r}"
                refusal = f"{of}, size__{text}, {self.fixed_by[text]!r}"
                inside += [
                    f"if size__{text} is None: size__{text} = {size}",
                    f"elif {size} != size__{text}: refuse.size({refusal})",
                ]
                continue
            before.append(f"size__{text} = None")
            inside.append(f"size__{text} = {size}")
            self.sizes[text], self.fixed_by[text] = f"size__{text}", name
            self.maybe.add(text)
        # A missing tensor has a first size of 0, like one without elements.
        absent = [*targets, *(f"{name}__s{k}" for k in range(len(targets)))]
        values = 0, *([1] * (len(absent) - 1))
        return [
            *before,
            f"if {name} is None: {', '.join(absent)}, = {values}",
            "else:",
            *(f"    {line}" for line in inside),
        ]

    # Numbers.

    def _numbers(self) -> list[str]:
        lines = []
        for i, arg in self.given:
            name = arg.name
            if isinstance(arg, Scalar):
                checked = f"{name} = refuse.number({name!r}, {name})"
                none = f"{name} is not None and " if arg.size_of else ""
                wrong = _wrong_numbers(arg)
                if arg.instead:
                    any_number = _wrong_numbers(unlimited(arg))
                    limits = " or ".join(part for part in wrong if part not in any_number)
                    wrong = [*any_number, f"{arg.instead} is None and ({limits})"]
                    is_free = f"{arg.instead} is not None"
                    checked = f"{name} = refuse.number({name!r}, {name}, {is_free})"
                lines.append(f"if {none}({' or '.join(wrong)}): {checked}")
                if arg.size_of:
                    size = self.sizes[arg.size_of]
                    other = f"{name} > {size}" if arg.or_less else f"{name} != {size}"
                    refusal = f"refuse.size_of({name!r}, {name}, {size})"
                    lines += [f"if {name} is None: {name} = {size}", f"elif {other}: {refusal}"]
            elif isinstance(arg, Text):
                unknown = f"type({name}) is not str or {name} not in texts{i}"
                lines.append(f"if {unknown}: refuse.word({name!r}, {name}, texts{i})")
        return lines

    # Scratch memory, whose size may depend on other tensors' sizes.

    def _scratch(self) -> list[str]:
        lines = []
        asks = any({MULTIPROCESSORS, SHARED_MEMORY} & {*rule.names} for rule in self.row.rules)
        asks = asks or any(arg.is_scratch for _, arg in self.tensors)
        if asks and self.function != "pack":
            # Refuse a missing stream before asking for a GPU, which may not exist.
            checked = "handle_for(stream, variant.device, refuse.op)"
            lines.append(f"if variant.entry is None: {checked}")
        for i, arg in self.tensors:
            if not arg.is_scratch:
                continue
            name, need = arg.name, f"variant.scratch[{arg.name!r}]"
            if arg.bytes_for is not None:
                known = self.sizes | {given: given for given in arg.bytes_given}
                sizes = ", ".join(f"{axis!r}: {size}" for axis, size in known.items())
                need = f"{need} + scratch{i}.bytes_for({{{sizes}}})"
            (axis,) = arg.axis_names
            size = f"{name}__d0"
            self.dims[name] = [size]
            have = f"{size} * {DTYPES[arg.dtype].itemsize}"
            asked = f"scratch{i}, variant.device, need, stream, {self.function == 'pack'}"
            lines.append(f"need = {need}")
            lines += [
                f"if {name} is None:",
                f"    {name} = scratch_for(refuse, {asked})",
                *_read_fields(name),
            ]
            lines += self._read(arg, [size])
            if not arg.any_size:
                lines.append(f"if {have} < need: refuse.scratch({name!r}, {have}, need)")
            self.sizes.setdefault(axis, size)
        return lines

    # Conditions on sizes.

    def _conditions(self) -> list[str]:
        """Check the row's conditions, if the tensors with those sizes are given."""
        lines = []
        for number, condition in enumerate(self.row.conditions):
            axis, names = condition.axis, condition.names
            fixed_by = self.fixed_by.get(axis)
            first = next(
                (
                    arg
                    for _, arg in self.tensors
                    if (axis in arg.axis_variables if fixed_by is None else arg.name == fixed_by)
                ),
                None,
            )
            if first is None or not {*names} <= self.sizes.keys():
                continue
            sizes = [self.sizes[name] for name in names]
            maybe = [f"{self.sizes[name]} is None" for name in names if name in self.maybe]
            test = " or ".join([*maybe, condition.template.format_map(self.sizes)])
            of = f"{first.name!r}, {first.name}"
            refusal = f"refuse.limit({of}, {number}, ({', '.join(sizes)},))"
            lines.append(f"if not ({test}): {refusal}")
        return lines

    def _together(self) -> list[str]:
        if not self.row.together:
            return []
        present = []
        for _, arg in self.given:
            if arg.name in self.row.together:
                test = f"{arg.name} is not None" if isinstance(arg, Tensor) else arg.name
                present.append(f"({arg.name!r} if {test} else '')")
        return [f"refuse.together([name for name in ({', '.join(present)}) if name])"]

    # How tensors are loaded, and their strides.

    def _loads(self) -> list[str]:
        """Compute how each tensor is loaded; equal values share a variable."""
        lines: list[str] = []
        row, vector, shared = self.row, self.row.vector, dict[str, str]()

        def variable(prefix: str, value: str) -> str:
            if value.isdigit():
                return value
            if value not in shared:
                shared[value] = f"{prefix}__{len(shared)}"
                lines.append(f"{shared[value]} = {value}")
            return shared[value]

        for _, arg in self.tensors:
            axes = [] if arg.broadcast or not arg.in_vectors else arg.axis_variables
            axis = next((name for name in axes if name in vector.axes), None)
            item, step = self._itemsize(arg.dtype), "1"
            if axis is not None:  # the width of a load is a power of 2
                of = self._itemsize(vector.dtype or arg.dtype)
                width = (
                    str(vector.bytes // int(of)) if of.isdigit() else f"({vector.bytes} // {of})"
                )
                if row.block and {*row.block} <= {*arg.axis_names}:
                    lines += self._block(arg, f"-(-{self.sizes[axis]} // {width})")
                step = variable("step", f"gcd({width}, {self.sizes[axis]})")
                loaded = f"{step} * {item}"
                loaded = f"max({loaded}, {arg.alignment})" if arg.alignment > 1 else loaded
                mask = f"({loaded} - 1)"
            elif item.isdigit():
                mask = str(math.lcm(int(item), arg.alignment) - 1)
            else:
                mask = f"(max({item}, {arg.alignment}) - 1)"
            self.itemsizes[arg.name], self.steps[arg.name] = item, step
            self.masks[arg.name] = variable("mask", mask)
        return lines

    def _block(self, arg: Tensor, threads: str) -> list[str]:
        """Check what one thread block covers."""
        if self.row.vector.threads:
            threads = f"min({threads}, {self.row.vector.threads})"
        count = " * ".join(self.sizes[name] for name in self.row.block)
        refusal = f"refuse.block({arg.name!r}, {arg.name}, threads, {count})"
        return [
            f"threads = max({threads}, 1)",
            f"if {count} * threads > 1024: {refusal}",
        ]

    def _itemsize(self, dtype: str) -> str:
        """Return the itemsize: a number if all dtypes have the same, otherwise the variant's."""
        sizes = {DTYPES[name].itemsize for name in self.row.dtypes.get(dtype, (dtype,))}
        return str(*sizes) if len(sizes) == 1 else f"variant.itemsizes[{dtype!r}]"

    def _strides(self, is_scratch: bool) -> list[str]:
        lines = []
        for _, arg in self.tensors:
            if arg.is_scratch is not is_scratch:
                continue
            step, item = self.steps[arg.name], self.itemsizes[arg.name]
            lines.append(f"{arg.name}__span = {self._span(arg)}")
            wrong = self._wrong_strides(arg, step)
            limit = arg.offset_limit or self.row.offset_limit
            reach = [f"{arg.name}__span > {limit}"] if arg.axis_names and limit < _FAR else []
            present = f"{arg.name} is not None and " if arg.optional else ""
            for those in filter(None, (wrong, reach)):
                refusal = f"refuse.strides({arg.name!r}, {arg.name}, {step})"
                lines.append(f"if {present}({' or '.join(those)}): {refusal}")
            if item != "1":  # convert to bytes
                lines.append(f"{arg.name}__span *= {item}")
        if is_scratch:
            return lines
        same = [arg for _, arg in self.tensors if arg.name in self.row.same_strides]
        for arg in same[1:]:
            first = same[0]
            of = f"{arg.name!r}, {arg.name}, {first.name!r}, {first.name}"
            test = f"{arg.name}__strides != {first.name}__strides"
            lines.append(f"if {test}: refuse.same_strides({of})")
        return lines

    def _wrong_strides(self, arg: Tensor, step: str) -> list[str]:
        """Return when strides must be judged; row-major strides need no further look."""
        name, rank, dims = arg.name, len(arg.axis_names), self.dims[arg.name]
        if not rank:
            return []
        steps = [f"{name}__s{k}" for k in range(rank)]
        if arg.transposed:
            dims = [*dims[:-2], dims[-1], dims[-2]]
            steps = [*steps[:-2], steps[-1], steps[-2]]
        rank -= arg.broadcast
        wrong = [f"{step} != 0" for step in steps[rank:]]
        dims, steps = dims[:rank], steps[:rank]
        wrong.append(f"{steps[-1]} != 1")
        inner = f"{dims[-1]} * {arg.parts}" if arg.parts > 1 else dims[-1]
        for k in reversed(range(rank - 1)):
            stride = steps[k]
            if arg.contiguous or arg.parts > 1 or k >= rank - arg.packed:
                wrong.append(f"{stride} != {inner}")
            else:
                least = inner if arg.writes else "0"
                loose = [f"{stride} < {least}"]
                if step != "1":
                    loose.append(f"{stride} % {step}")
                wrong.append(f"{stride} != {inner} and ({' or '.join(loose)})")
            if arg.stride_limit < _FAR:
                wrong.append(f"{stride} >= {arg.stride_limit}")
            inner = f"{dims[k]} * {inner}" if arg.contiguous else f"{dims[k]} * {stride}"
        if arg.kv and rank > 2 and (arg.contiguous or arg.writes):
            wrong.append("not is_nhd")
        return wrong

    def _span(self, arg: Tensor) -> str:
        """Return the number of elements from the lowest address to past the highest; meaningless
        for an empty tensor."""
        dims, name = self.dims[arg.name], arg.name
        if arg.contiguous:
            return " * ".join(dims) or "1"
        last = len(dims) - 1
        if arg.broadcast:
            dims, last = dims[: -arg.broadcast], last - arg.broadcast
        terms = [
            size if k == last and not arg.transposed else f"({size} - 1) * {name}__s{k}"
            for k, size in enumerate(dims)
        ]
        return " + ".join([*terms, "1"] if arg.transposed or not dims else terms)

    # Rules.

    def _rules(self, of_memory: bool) -> list[str]:
        lines = []
        for number, rule in enumerate(self.row.rules):
            if (IN_PLACE in rule.names) is not of_memory:
                continue
            values = {name: self._value(name) for name in rule.names}
            refusal = f"refuse.rule({number}, ({', '.join(values.values())},))"
            lines.append(f"if not ({rule.template.format_map(values)}): {refusal}")
        return lines

    def _value(self, name: str) -> str:
        """Return the expression for a name in a rule."""
        args = {arg.name: arg for _, arg in self.given}
        if isinstance(args.get(name), (Scalar, Text)):
            return name
        if name == IN_PLACE:
            return "is_in_place"
        if name in (MULTIPROCESSORS, SHARED_MEMORY):
            return f"variant.{name}"
        if name in self.sizes:
            return self.sizes[name]
        if isinstance(args.get(name), Tensor):
            return f"({name} is not None)"
        if any(arg.dtype == name for _, arg in self.tensors):
            return f"variant.dtypes.get({name!r})"
        return "None"

    # Addresses.

    def _addresses(self) -> list[str]:
        """Compute where each tensor starts and ends; both are 0 for a missing one."""
        lines, required = [], dict[str, list[tuple[str, str]]]()
        for _, arg in self.tensors:
            name, mask = arg.name, self.masks[arg.name]
            end = f"{name}__end = {name}__p + {name}__span"
            refusal = f"refuse.address({name!r}, {name}, {mask} + 1)"
            if arg.optional:
                test = f"{name}__p & {mask} or not {name}__p"
                lines += [f"if {name} is not None:", f"    {end}", f"    if {test}: {refusal}"]
            else:
                lines.append(end)
                required.setdefault(mask, []).append((f"{name}__p", refusal))
        for mask, those in required.items():
            each = [p for p, _ in those]
            lines.append(f"if ({' | '.join(each)}) & {mask} or not ({' and '.join(each)}):")
            lines += (f"    if {p} & {mask} or not {p}: {refusal}" for p, refusal in those)
        return lines

    def _overlap(self) -> list[str]:
        """Refuse outputs that share memory with inputs or with other outputs."""
        pairs = [
            (a, b)
            for (_, a), (_, b) in itertools.combinations(self.tensors, 2)
            if a.writes or b.writes
        ]
        lines, same = [], []
        # Tests grouped by optional tensor: calls without the tensor skip them.
        tests: dict[str, list[str]] = {}
        for a, b in pairs:
            test = f"{a.name}__p < {b.name}__end and {b.name}__p < {a.name}__end"
            if any({a.name, b.name} == {*pair} for pair in self.row.in_place):
                one = f"{a.name}__p == {b.name}__p"
                same.append(f"({one} and {a.name}__p != 0)")
                test += f" and not ({one} and {a.name}__strides == {b.name}__strides)"
            optional = next((arg.name for arg in (b, a) if arg.optional), "")
            tests.setdefault(optional, []).append(f"({test})")
        if any(IN_PLACE in rule.names for rule in self.row.rules):
            lines.append(f"is_in_place = {' or '.join(same) or 'False'}")
        descs = ", ".join(
            arg.name if arg.name not in self.options.bound else "None" for arg in self.row.tensors
        )
        for optional, those in tests.items():
            for at in range(0, len(those), 8):
                any_of = " or ".join(those[at : at + 8])
                test = f"{optional}__p and ({any_of})" if optional else any_of
                lines.append(f"if {test}: refuse.overlap({descs})")
        if self.options.bound and self.tensors:
            lines.append("start0, end0, start1, end1, first, last = bound_row.memory")
            for _, arg in self.tensors:
                p, end = f"{arg.name}__p", f"{arg.name}__end"
                test = f"{p} < end0 and start0 < {end} or {p} < end1 and start1 < {end}"
                of = f"{arg.name!r}, {arg.name}, bound_row.memory[:4]"
                refusal = f"refuse.overlaps_workspace({of})"
                present = f"{p} and " if arg.optional else ""
                lines.append(f"if {present}{p} < last and first < {end} and ({test}): {refusal}")
        return lines


def _read_fields(name: str) -> list[str]:
    """Return the lines of a block that read a descriptor's fields."""
    sources = ("ptr", "shape", "strides", "kind")
    return [f"    {name}__{to} = {name}.{of}" for to, of in zip(FIELDS, sources, strict=True)]


def _wrong_numbers(arg: Scalar) -> list[str]:
    """Return when a number cannot be written as it is."""
    name, wrong = arg.name, [f"type({arg.name}) is not {arg.type.__name__}"]
    if arg.type is bool:
        return [f"{name} is not False and {name} is not True"]
    if arg.type is float and arg.low is None and arg.high is None:
        wrong.append(f"{name} - {name} != 0.0")  # of what is not finite the difference is NaN
    elif arg.type is float:
        low = "-inf <" if arg.low is None else f"{float(arg.low)!r} <="
        high = "< inf" if arg.high is None else f"<= {float(arg.high)!r}"
        wrong.append(f"not {low} {name} {high}")
    elif arg.type is int:
        least = -INT64_MAX - 1 if arg.low is None else int(arg.low)
        wrong.append(f"not {least} <= {name} <= {INT64_MAX if arg.high is None else int(arg.high)}")
    if arg.multiple_of > 1:
        wrong.append(f"{name} % {arg.multiple_of}")
    return wrong
