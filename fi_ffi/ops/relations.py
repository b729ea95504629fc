"""Checks between a call's arguments: numbers, sizes, and where tensors lie.

Of layouts that were checked they depend on a few numbers and on the distances between addresses.
What passed is remembered by these, so that calls like it need not be checked again.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fi_ffi.abi.tensor import TensorDesc
from fi_ffi.errors import ArgumentError
from fi_ffi.loader import machine
from fi_ffi.ops.memory import check_apart
from fi_ffi.ops.row import IN_PLACE, MULTIPROCESSORS, SHARED_MEMORY, Row, Scalar, Tensor

if TYPE_CHECKING:
    from fi_ffi.ops.settled import Settled

_MOST_SEEN = 1024
# What a rule asks of the GPU, by its number; on the CPU there is no end of it.
_OF_THE_GPU: dict[str, Callable[[int], int]] = {
    MULTIPROCESSORS: lambda device: machine.multiprocessors(device),
    SHARED_MEMORY: lambda device: machine.shared_memory(device),
}


@functools.cache
def depends_on(row: Row) -> tuple[list[int], list[int]]:
    """The places of the numbers, and of the tensors, that such checks of a row are of."""
    ruled = {name for rule in row.rules for name in rule.of}
    numbers = [
        i
        for i, arg in enumerate(row.args)
        if isinstance(arg, Scalar) and (arg.size_of or arg.name in ruled)
    ]
    tensors = [i for i, arg in enumerate(row.args) if isinstance(arg, Tensor)]
    return numbers, tensors if row.apart else []


def has_relations(row: Row) -> bool:
    return any(depends_on(row)) or bool(row.rules)


def check_relations(
    row: Row, settled: Settled, descs: Sequence[TensorDesc | None], values: list[Any]
) -> None:
    """Raise unless the arguments fit each other; in `values` None becomes the size it is for."""
    sizes = settled.checked.sizes
    _settle_sizes(row, sizes, values)
    numbers, tensors = depends_on(row)
    key = (*(values[i] for i in numbers), *(values[i] - values[tensors[0]] for i in tensors[1:]))
    if key in settled.seen:
        return
    is_in_place = row.apart and not settled.is_empty and check_apart(row, descs)
    there = {arg.name: bool(desc) for arg, desc in zip(row.tensors, descs, strict=True)}
    dtypes = {
        arg.dtype: desc.dtype.name for arg, desc in zip(row.tensors, descs, strict=True) if desc
    }
    others: dict[str, Any] = {**dtypes, **there, **sizes, IN_PLACE: is_in_place}
    for name, ask in _OF_THE_GPU.items():
        if any(name in rule.of for rule in row.rules):
            on = settled.device
            others[name] = ask(on.index) if on.is_cuda else sys.maxsize
    _check_rules(row, others, values)
    if len(settled.seen) >= _MOST_SEEN:
        settled.seen.clear()
    settled.seen.add(key)


def _settle_sizes(row: Row, sizes: Mapping[str, int], values: list[Any]) -> None:
    for i, arg in enumerate(row.args):
        if not isinstance(arg, Scalar) or not arg.size_of:
            continue
        size = sizes[arg.size_of]
        if values[i] is None:
            values[i] = size
        elif values[i] > size or (values[i] < size and not arg.or_less):
            or_less = " or less" if arg.or_less else ""
            expected = f"{size}{or_less}, the size of {arg.size_of}"
            raise ArgumentError(row.name, arg.name, got=values[i], expected=expected)


def _check_rules(row: Row, others: Mapping[str, Any], values: Sequence[Any]) -> None:
    numbers = {
        arg.name: value
        for arg, value in zip(row.args, values, strict=True)
        if isinstance(arg, Scalar)
    }
    known = {**others, **numbers}
    for rule in row.rules:
        of = {name: known.get(name) for name in rule.of}
        if not rule.holds(*of.values()):
            got = ", ".join(f"{name} = {value}" for name, value in of.items())
            raise ArgumentError(row.name, rule.argument, got=got, expected=rule.expected)
