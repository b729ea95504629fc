"""Tensors of a call in one memory: what they share, and what they do not."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import numpy as np
import pytest

import fi_ffi
from fi_ffi.cli.cases import Case
from fi_ffi.ops.call.compiled import CompiledRow
from fi_ffi.ops.call.row import Row, Tensor

from tests.helpers.prepared_calls import room_for

_BASE = 4096  # what the start of a memory is a multiple of
_POISON = 0xA5


class Memory:
    """Poisoned bytes that arrays are placed in."""

    def __init__(self, count: int) -> None:
        room = np.full(count + _BASE, _POISON, np.uint8)
        self.bytes = room[-room.ctypes.data % _BASE :][:count]

    def place(self, array: np.ndarray, at: int, strides: Any = None) -> np.ndarray:
        """A copy at an offset, of the same strides or of others."""
        strides = array.strides if strides is None else strides
        part = np.ndarray(array.shape, array.dtype, self.bytes.data, at, strides)
        part[...] = array
        return part


def span(array: np.ndarray) -> int:
    """Bytes from the first element's to the last one's."""
    steps = zip(array.shape, array.strides, strict=True)
    return array.itemsize + sum((n - 1) * step for n, step in steps)


def axes(array: np.ndarray) -> tuple[int, list[tuple[int, int]]]:
    """What must be equal of arrays that are the very same memory, besides the address."""
    both = zip(array.strides, array.shape, strict=True)
    return array.itemsize, [(step, size) for step, size in both if size > 1]


def touched(array: np.ndarray) -> np.ndarray:
    """Which bytes, from the first element's, are some element's."""
    mask = np.zeros(span(array), bool)
    shape, strides = (*array.shape, array.itemsize), (*array.strides, 1)
    np.ndarray(shape, bool, mask.data, 0, strides)[...] = True
    return mask


def meet(one: np.ndarray, other: np.ndarray, shift: int) -> bool:
    """Whether they share a byte where `one` starts so many bytes after `other`."""
    low, high = max(shift, 0), min(shift + span(one), span(other))
    if low >= high:
        return False
    first, second = (touched(array) for array in (one, other))
    return bool((first[low - shift : high - shift] & second[low:high]).any())


class Joined:
    """A case's arrays: those that are `put` in one memory, and all others in their own."""

    def __init__(self, arrays: Mapping[str, np.ndarray], put: Collection[str] = ()) -> None:
        self.rooms = {name: room_for(a) for name, a in arrays.items() if name not in put}
        self.arrays = {name: array for name, (_, array) in self.rooms.items()}
        self._given = arrays
        self.memory: Memory | None = None

    def put(self, placed: Mapping[str, tuple[int, Any]], count: int) -> Joined:
        """These at offsets of one memory, with strides if given; each over those before."""
        self.memory = Memory(count)
        for name, (at, strides) in placed.items():
            self.arrays[name] = self.memory.place(self._given[name], at, strides)
            self.rooms.pop(name, None)
        return self

    @property
    def descs(self) -> dict[str, Any]:
        return {name: fi_ffi.as_desc(array) for name, array in self.arrays.items()}

    def bytes(self) -> dict[str, bytes]:
        """All memory, with what is around the arrays."""
        found = {name: whole.tobytes() for name, (whole, _) in self.rooms.items()}
        return found | ({} if self.memory is None else {"": self.memory.bytes.tobytes()})

    def outside(self) -> bytes:
        """What of the memory is no array's."""
        assert self.memory is not None
        inside = np.zeros(len(self.memory.bytes), bool)
        for name, array in self.arrays.items():
            if name not in self.rooms:
                at = array.ctypes.data - self.memory.bytes.ctypes.data
                inside[at : at + span(array)] |= touched(array)
        return self.memory.bytes[~inside].tobytes()


def shifted(arrays: Mapping[str, np.ndarray], one: str, other: str, shift: int) -> Joined:
    """`one` so many bytes after where `other` starts; `other` is written last."""
    first, second = arrays[one], arrays[other]
    at = -(-(span(first) + abs(shift)) // _BASE) * _BASE
    room = at + abs(shift) + span(first) + span(second) + _BASE
    both = {one: (at + shift, None), other: (at, None)}
    return Joined(arrays, both).put(both, room)


def moved(
    arrays: Mapping[str, np.ndarray], one: str, other: str, shift: int, aligned: int
) -> Joined:
    """As `shifted`; where `one` has to be aligned more than the shift is, `other` is not."""
    if shift % aligned == 0:
        return shifted(arrays, one, other, shift)
    joined = shifted(arrays, other, one, -shift)
    # What is read keeps its values: those of `one` were written last.
    joined.arrays[other][...] = arrays[other]
    return joined


def shifts(
    one: np.ndarray, other: np.ndarray, steps: tuple[int, int], rng: np.random.Generator
) -> Iterator[int]:
    """By how much `one` may start after `other` and share some bytes, but not the very same
    memory: a step, a row, all but a step from either end, and anything between."""
    step = min(steps)
    row = max(one.strides[0] if one.ndim else 0, step)
    last, first = (span(other) - 1) // step * step, -((span(one) - 1) // step * step)
    found = {0, step, -step, row, -row, first, last}
    found |= {int(i) * step for i in rng.integers(first // step, last // step + 1, 2)}
    for shift in sorted(found):
        if shift % step or (shift % steps[0] and shift % steps[1]):
            continue
        if shift == 0 and axes(one) == axes(other):
            continue
        if meet(one, other, shift):
            yield shift


def interleaved(
    arrays: Mapping[str, np.ndarray], one: str, other: str, axis: int, step: int,
    overlap: bool = False,
) -> Joined | None:  # fmt: skip
    """Both as slices of one buffer, which alternate along an axis; with `overlap` they share a
    few bytes of each.  None where they cannot."""
    inner = {name: math.prod(arrays[name].shape[axis + 1 :]) * arrays[name].itemsize
             for name in (one, other)}  # fmt: skip
    whole = {name: -(-size // step) * step for name, size in inner.items()}
    starts = {one: 0, other: whole[one]}
    if overlap:
        starts[other] -= step
    period = sum(whole.values())
    placed = {}
    for name, start in starts.items():
        array = arrays[name]
        steps = [array.itemsize]
        for size in array.shape[:axis:-1]:
            steps.append(steps[-1] * size)
        steps[-1] = period
        for size in array.shape[axis:0:-1]:
            steps.append(steps[-1] * size)
        # An axis of one element, or none, has the stride that a contiguous one would.
        placed[name] = (_BASE + start, tuple(reversed(steps)))
    reach = max(
        sum((n - 1) * s for n, s in zip(arrays[name].shape, placed[name][1], strict=True))
        for name in placed
    )
    joined = Joined(arrays).put(placed, 2 * _BASE + reach + 2 * period)
    first, second = joined.arrays[one], joined.arrays[other]
    shift = second.ctypes.data - first.ctypes.data
    return joined if meet(second, first, shift) == overlap else None


def steps_of(row: Row, case: Case) -> dict[str, int]:
    """What each tensor's address, and its strides, are multiples of: bytes."""
    descs = Joined(case.arrays).descs
    _, _, _, masks = CompiledRow(row).pack(**descs, **case.scalars)
    return {
        arg.name: math.lcm(mask + 1, descs[arg.name].dtype.itemsize)
        for arg, mask in zip(row.tensors, masks, strict=True)
        if arg.name in descs
    }


def pairs(row: Row, present: Mapping[str, Any]) -> Iterator[tuple[Tensor, Tensor]]:
    """Each tensor that is written, and every other one."""
    for one, other in itertools.product(row.tensors, row.tensors):
        if not {one.name, other.name} <= present.keys() or one is other or not one.writes:
            continue
        later = row.tensors.index(one) > row.tensors.index(other)
        if not other.writes or later:
            yield one, other


def is_listed(row: Row, one: str, other: str) -> bool:
    return any({one, other} == {*pair} for pair in row.in_place)


def refused(
    function: Callable[..., Any], joined: Any, op: str, names: tuple[str, ...],
    /, **values: Any,
) -> fi_ffi.ArgumentError:  # fmt: skip
    """The call's refusal, which names the op, one of these as the argument, and the other;
    nothing was written."""
    with pytest.raises(fi_ffi.ArgumentError) as caught:
        function(**values)
    error = caught.value
    assert error.op == op, str(error)
    assert error.argument in names, str(error)
    assert "overlaps" in str(error.got), str(error)
    assert all(name in str(error) for name in names), str(error)
    return error


class Named:
    """A call that has other names for a row's arguments, or gives it some of its own.

    `run` takes what `arrays` has; `written` names the outputs, and `scratch` those that it is not
    given by the call (a plan's workspaces), as the memory that they are.  Addresses are multiples
    of `step` bytes.
    """

    def __init__(
        self, op: str, arrays: Mapping[str, np.ndarray], written: tuple[str, ...],
        run: Callable[..., Any], scratch: Mapping[str, np.ndarray] | None = None,
        prepare: Callable[..., Any] | None = None, step: int = 16,
        known_as: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        self.op, self.arrays, self.written, self.run = op, arrays, written, run
        self.scratch, self.prepare, self._step = scratch or {}, prepare, step
        # What refusals call an argument, where that is not what the caller does.
        self._known_as = known_as or {}

    def calls(self) -> list[Callable[..., Any]]:
        """Ways of making it, after it was made in memory apart: again, as arrays and described;
        and prepared, or updated to other tensors, where it can be."""
        kept = Joined(self.arrays)

        def described(**given: Any) -> None:
            self.run(**{name: fi_ffi.as_desc(array) for name, array in given.items()})

        self.run(**kept.arrays)
        for _ in range(2):
            described(**kept.arrays)
        ways = [self.run, described]
        if self.prepare is not None:
            made = self.prepare(**kept.arrays)
            ways += [self.prepare, lambda **given: made.update(**given)]
        return ways

    def check(self, rng: np.random.Generator, most: int = 3) -> int:
        """No output may share memory with another tensor; how many calls were refused."""
        ways, count = self.calls(), itertools.count()
        for one, other in itertools.product(self.written, self.arrays):
            if one == other:
                continue
            first, second = self.arrays[one], self.arrays[other]
            found = [*shifts(first, second, (self._step, self._step), rng)]
            found = [found[i] for i in rng.permutation(len(found))[:most]]
            if axes(first) == axes(second):
                found.append(0)
            for shift in found:
                joined = moved(self.arrays, one, other, shift, self._step)
                way = ways[next(count) % len(ways)]
                self._refused(way, joined, (one, other), joined.arrays)
        for one, (name, room) in itertools.product(self.written, self.scratch.items()):
            array = self.arrays[one]
            for at in (0, (len(room) - span(array)) // 32 * 16, len(room) - span(array)):
                if at < 0 or at % 16 or (at and name.startswith("int_workspace_buffer")):
                    continue  # of that one, only the first part is one plan's
                joined = Joined({n: a for n, a in self.arrays.items() if n != one})
                view = np.ndarray(array.shape, array.dtype, room.data, at)
                way = ways[next(count) % len(ways)]
                self._refused(way, joined, (one, name), {**joined.arrays, one: view})
        return next(count)

    def _refused(
        self, way: Callable[..., Any], joined: Joined, names: tuple[str, str],
        given: Mapping[str, Any],
    ) -> None:  # fmt: skip
        with pytest.raises(fi_ffi.ArgumentError) as caught:
            way(**given)
        error = caught.value
        assert error.op == self.op, str(error)
        told = error.argument.removeprefix("maybe_")
        assert told in {self._known_as.get(name, name) for name in names}, str(error)
        assert "overlaps" in str(error.got), str(error)

    def one_after_another(self, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """The arrays after a call of tensors that lie one after another, in any order."""
        order = [list(self.arrays)[i] for i in rng.permutation(len(self.arrays))]
        starts, at = {}, _BASE
        for name in order:
            starts[name] = (at, None)
            at += -(-span(self.arrays[name]) // self._step) * self._step
        joined = Joined(self.arrays).put(starts, at + _BASE)
        outside = joined.outside()
        self.run(**joined.arrays)
        assert joined.outside() == outside
        return joined.arrays
