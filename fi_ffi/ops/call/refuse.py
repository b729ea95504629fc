"""The errors of a row's checks: generated code calls them when a comparison fails.

It passes a tensor as it has it: a descriptor, or the fields read of another library's tensor.

A comparison in generated code is fast and may be too strict (the stride of an axis of one element
is never used). Methods that "judge" look again, and return if nothing is wrong.
"""

from __future__ import annotations

import numbers
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NoReturn, TypeAlias

from fi_ffi.abi.interop import Fields, described
from fi_ffi.abi.tensor import TensorDesc, c_strides, is_row_major
from fi_ffi.errors import ArgumentError, ArgumentTypeError, printed, with_type
from fi_ffi.ops.call.arguments import INT64_MAX, Refusal
from fi_ffi.ops.call.notation import parse_axis
from fi_ffi.ops.call.row import Required, Row, Scalar, Tensor

_Read: TypeAlias = "TensorDesc | Fields"
_BLOCK_THREADS = 1024  # CUDA's limit, on every GPU
DEVICE_TYPES = ("cpu", "cuda")
MAPPED = ("cuda_host", "cuda_managed")  # host memory that a GPU reads and writes over the bus


def unlimited(arg: Scalar) -> Scalar:
    """Return the scalar without limits of its own."""
    return replace(arg, low=None, high=None, multiple_of=1)


class Refusals(Refusal):
    """Errors that name the op and its arguments as the caller knows them.

    A plan has fixed the sizes of the axes in `planned`.
    """

    def __init__(
        self, row: Row, op: str, names: Mapping[str, str], planned: Collection[str] = ()
    ) -> None:
        super().__init__(op)
        self.row, self._names, self._planned = row, names, planned
        self._scalars = {arg.name: arg for arg in row.args if isinstance(arg, Scalar)}
        self._tensors = {arg.name: arg for arg in row.tensors}

    def name(self, argument: str) -> str:
        """Return the caller's name of an argument."""
        return self._names.get(argument, argument)

    def error(self, argument: str, got: object, expected: object) -> ArgumentError:
        """Make the error for an argument by the row's name."""
        return self(self.name(argument), got, expected)

    def size(
        self, argument: str, tensor: _Read, axis: str, size: int, fixed_by: str = ""
    ) -> NoReturn:
        """Refuse a size that differs from the one fixed by another argument or a plan."""
        source = f", as in `{self.name(fixed_by)}`" if fixed_by else ""
        if any(name in self._planned for name in parse_axis(axis).names):
            source = ", as planned"
        expected = f"{axis} = {size}{source}"
        if axis.isdecimal():  # an axis of one size only
            names = self._tensors[argument].axis_names
            expected = f"shape [{', '.join(names)}]"
        raise self.error(argument, described(tensor).layout, expected)

    def unsolved(
        self, argument: str, tensor: _Read, axis: str, size: int, least: int, times: int
    ) -> NoReturn:
        """Refuse a size that no value of its axis' name gives."""
        expected = (
            f"{axis} of at least {least}" if size < least else f"{axis}, a multiple of {times}"
        )
        raise self.error(argument, described(tensor).layout, expected)

    def limit(
        self, argument: str, tensor: _Read | None, number: int, sizes: Sequence[int]
    ) -> NoReturn:
        """Refuse a size for which a condition of the row is false."""
        condition = self.row.conditions[number]
        by_name = dict(zip(condition.names, sizes, strict=True))
        got = "what was planned" if tensor is None else described(tensor).layout
        raise self.error(argument, got, condition.expected(by_name, self._planned))

    def number(self, name: str, value: Any, is_free: bool = False) -> Any:
        """Convert a number that cannot be written as it is, or refuse it.

        A bool is no number; an int is a float; None is kept if it stands for a size. With
        `is_free`, the value is unlimited: the kernel does not use it.
        """
        arg = unlimited(self._scalars[name]) if is_free else self._scalars[name]
        if isinstance(value, Required):
            raise value.missing(self.op, self.name(name))
        if value is None and arg.size_of:
            return None
        if type(value) is not arg.type:
            wanted = {int: numbers.Integral, float: numbers.Real, bool: bool}[arg.type]
            if not isinstance(value, wanted) or (isinstance(value, bool) and arg.type is not bool):
                got, expected = with_type(value), arg.type.__name__
                raise ArgumentTypeError(self.op, self.name(name), got=got, expected=expected)
            try:
                value = arg.type(value)  # type: ignore[call-overload,arg-type]
            except OverflowError:
                raise self.error(name, value, "a finite number") from None
        expected = ""
        if arg.type is int and not -INT64_MAX - 1 <= value <= INT64_MAX:
            expected = "an int64"
        elif arg.type is float and not abs(value) < float("inf"):
            expected = "a finite number"
        elif arg.low is not None and value < arg.low:
            expected = f"{arg.low} or more"
        elif arg.high is not None and value > arg.high:
            expected = f"{arg.high} or less"
        elif arg.multiple_of > 1 and value % arg.multiple_of:
            expected = f"a multiple of {arg.multiple_of}"
        if expected:
            raise self.error(name, value, expected)
        return value

    def word(self, name: str, value: object, words: Iterable[str]) -> NoReturn:
        raise self.error(name, printed(value), " or ".join(map(repr, words)))

    def size_of(self, name: str, value: int, size: int) -> NoReturn:
        arg = self._scalars[name]
        or_less = " or less" if arg.or_less else ""
        raise self.error(name, value, f"{size}{or_less}, the size of {arg.size_of}")

    def rule(self, number: int, values: Sequence[object]) -> NoReturn:
        rule = self.row.rules[number]
        expected = rule.expected if isinstance(rule.expected, str) else rule.expected(*values)
        words = dict(zip(rule.names, values, strict=True))
        for name in self._tensors.keys() & words.keys():
            words[name] = "a tensor" if words[name] else "none"
        got = ", ".join(f"{self.name(name)} = {word}" for name, word in words.items())
        raise self.error(rule.argument, got, expected)

    def scratch(self, name: str, have: int, need: int) -> NoReturn:
        raise self.error(name, f"{have} bytes", f"{need} bytes or more")

    def strides(self, name: str, given: _Read, step: int) -> None:
        """Judge the strides of a tensor; its elements are loaded `step` at a time."""
        tensor, desc = self._tensors[name], described(given)
        shape, strides = desc.shape, desc.strides
        how = ""
        if tensor.transposed:
            how = ", but for its last two axes, which are transposed"
            shape = (*shape[:-2], shape[-1], shape[-2])
            strides = (*strides[:-2], strides[-1], strides[-2])
        if 0 in shape:
            return
        expected = self._wrong_strides(tensor, shape, strides, step, how)
        if expected:
            got = f"{desc.dtype}{list(desc.shape)} with strides {desc.strides}"
            raise self.error(name, got, expected)

    def _wrong_strides(
        self, tensor: Tensor, shape: tuple[int, ...], strides: tuple[int, ...], step: int, how: str
    ) -> str:
        if tensor.contiguous and not is_row_major(shape, strides):
            return f"a contiguous tensor{how}"
        if tensor.broadcast:
            count = len(shape) - tensor.broadcast
            if any(strides[count:]):
                return f"strides of 0 along the last {tensor.broadcast} axes"
            shape, strides = shape[:count], strides[:count]
        count = tensor.packed
        if count > 1 and not is_row_major(shape[-count:], strides[-count:]):
            return f"the last {count} axes without gaps between them"
        if strides and strides[-1] != 1 and not tensor.contiguous:
            return f"a last axis with stride 1{how}"
        # The stride of an axis of one element is never used.
        outer = [(stride, n) for stride, n in zip(strides[:-1], shape, strict=False) if n > 1]
        limit = tensor.offset_limit or self.row.offset_limit
        if any(stride < 0 for stride, _ in outer):
            return "strides of 0 or more"
        if any(stride % step for stride, _ in outer):
            return f"strides in multiples of the {step} elements loaded at a time"
        if any(stride >= tensor.stride_limit for stride, _ in outer):
            return f"strides below {tensor.stride_limit} elements, as far as the kernel counts"
        reach = sum(stride * (n - 1) for stride, n in zip(strides, shape, strict=True)) + 1
        if reach > limit:
            return f"offsets below {limit} elements, as far as the kernel counts"
        if tensor.writes and shape:
            reach = shape[-1] - 1
            for stride, size in sorted(outer):
                if stride <= reach:
                    return "elements that do not overlap, because they are written"
                reach += stride * (size - 1)
        whole = c_strides((*shape[:-1], shape[-1] * tensor.parts)) if tensor.parts > 1 else strides
        if any(n > 1 and a != b for n, a, b in zip(shape, strides, whole, strict=True)):
            return f"{whole}, as one of {tensor.parts} parts of a contiguous tensor has them"
        return ""

    def same_strides(self, name: str, tensor: _Read, first: str, other: _Read) -> NoReturn:
        expected = f"{described(other).strides}, those of `{self.name(first)}`"
        raise self.error(name, f"strides {described(tensor).strides}", expected)

    def address(self, name: str, tensor: _Read, alignment: int) -> None:
        """Judge an address; a tensor without elements may have any."""
        desc = described(tensor)
        if desc.numel:
            expected = f"an address that is a multiple of {alignment} bytes, and not null"
            raise self.error(name, f"{desc.ptr:#x} for {desc.layout}", expected)

    def overlap(self, *tensors: _Read | None) -> None:
        """Judge whether a written tensor shares memory with another without permission."""
        earlier: list[tuple[Tensor, TensorDesc]] = []
        for arg, desc in zip(self.row.tensors, map(described, tensors), strict=True):
            if desc is None or not desc.numel:
                continue
            for other, before in earlier:
                if not (arg.writes or other.writes) or not may_overlap(desc, before):
                    continue
                same = any({arg.name, other.name} == {*two} for two in self.row.in_place)
                if same and desc.ptr == before.ptr and _axes_of(desc) == _axes_of(before):
                    continue
                # The error names the written tensor; of two written ones, the later.
                first, second = (arg, other) if arg.writes else (other, arg)
                beside = before if arg.writes else desc
                expected = "the very same memory, or memory apart" if same else "memory apart"
                raise self.error(first.name, self.overlaps(second.name, beside), expected)
            earlier.append((arg, desc))

    def overlaps(self, other: str, desc: TensorDesc) -> str:
        """Return words for memory that overlaps this argument's."""
        span = f"{desc.ptr:#x} to {desc.ptr + desc.span_bytes:#x}"
        return f"memory that overlaps `{self.name(other)}` ({span})"

    def overlaps_workspace(self, name: str, tensor: _Read, memory: Sequence[int]) -> None:
        """Judge whether a tensor shares memory with a plan's workspaces."""
        desc = described(tensor)
        for start, end in zip(memory[::2], memory[1::2], strict=True):
            if desc.numel and desc.ptr < end and start < desc.ptr + desc.span_bytes:
                span = f"{start:#x} to {end:#x}"
                raise self.error(name, f"memory that overlaps the plan's ({span})", "memory apart")

    def block(self, name: str, tensor: _Read, threads: int, count: int) -> None:
        """Judge what one thread block covers: `threads` times `count`."""
        most = _BLOCK_THREADS // threads
        if count > most:
            axes = " * ".join(self.row.block)
            raise self.error(
                name,
                described(tensor).layout,
                f"{axes} of at most {most}: one thread block covers them",
            )

    def together(self, present: Sequence[str]) -> None:
        """Judge arguments that must be given all or none."""
        if present and len(present) != len(self.row.together):
            missing = next(name for name in self.row.together if name not in present)
            expected = f"a value, as `{self.name(present[0])}` has one: they go together"
            raise self.error(missing, "none", expected)


def _axes_of(desc: TensorDesc) -> list[tuple[int, int]]:
    """Return strides in bytes and sizes of the axes with more than one element."""
    itemsize = desc.kind.itemsize
    both = zip(desc.strides, desc.shape, strict=True)
    return [(abs(stride) * itemsize, size) for stride, size in both if size > 1]


def may_overlap(one: TensorDesc, other: TensorDesc) -> bool:
    """Return False if two tensors share no byte, as two slices of one buffer may."""
    distance = other.ptr - one.ptr
    if distance >= one.span_bytes or -distance >= other.span_bytes:
        return False
    axes = [_axes_of(one), _axes_of(other)]
    periods = {stride for strides in axes for stride, _ in strides if stride}
    for period in sorted(periods, reverse=True):
        # The bytes that each tensor covers within a period, from its start.
        first, second = (
            desc.kind.itemsize + sum((size - 1) * s for s, size in strides if s % period)
            for desc, strides in zip((one, other), axes, strict=True)
        )
        if distance % period >= first and -distance % period >= second:
            return False
    return True
