"""Ops whose rows are independent, in programs that XLA divides among devices: each device calls the
op on its rows."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from jax.experimental.custom_partitioning import custom_partitioning
from jax.interpreters import mlir
from jax.sharding import NamedSharding, PartitionSpec

from fi_ffi.errors import ArgumentError
from fi_ffi.jax.results import EQUAL, Result
from fi_ffi.jax.xla import CallText
from fi_ffi.ops.call.notation import parse_axis, parse_expression
from fi_ffi.ops.call.row import Row, Scalar, Tensor
from fi_ffi.ops.functions import OPS

_EXPECTED = "rows alone divided among devices, or the arrays of one device: see jax.shard_map"


@functools.cache
def rows_of(op: str) -> str | None:
    """Return the axis by which an op can be divided: the first of its results, if a row of these
    depends on nothing but the same row of inputs, and on inputs without rows."""
    row = OPS[op].row
    axes = [arg.axis_names[0] for arg in row.tensors if _is_result(arg) and arg.axis_names]
    rows = axes[0] if axes else ""
    return rows if rows.isidentifier() and not any(_depend(row, rows)) else None


def _is_result(arg: Tensor) -> bool:
    return arg.writes and not arg.is_scratch and not arg.optional


def _depend(row: Row, rows: str) -> Iterator[bool]:
    """Yield whether something makes rows depend on each other, or on where they are."""
    tensors = [arg for arg in row.tensors if not arg.is_scratch]
    inputs = [arg for arg in tensors if arg.reads]
    yield not any(_has_rows(arg, rows) for arg in inputs)
    for arg in tensors:
        others = arg.axis_names[1 if _has_rows(arg, rows) else 0 :]
        yield any(rows in parse_axis(axis).names for axis in others)
        yield _is_result(arg) and not _has_rows(arg, rows)
    for arg in inputs:  # integers of no row are indices, which count rows of the whole
        dtypes = row.dtypes.get(arg.dtype, (arg.dtype,))
        yield not _has_rows(arg, rows) and not {"int32", "int64"}.isdisjoint(dtypes)
    for each in row.args:  # random numbers are drawn by a row's index
        yield "seed" in getattr(each, "name", "")
        yield isinstance(each, Scalar) and each.size_of == rows
    for rule in row.requires:  # such as scales whose places depend on how many rows there are
        sides = EQUAL.fullmatch(rule if isinstance(rule, str) else rule.condition)
        yield sides is not None and rows in {sides["left"], *parse_expression(sides["value"])[1]}


def _has_rows(arg: Tensor, rows: str) -> bool:
    return bool(arg.axis_names) and arg.axis_names[0] == rows


class _Call(NamedTuple):
    """A call that is to be divided: which of its arrays and results have rows."""

    op: str
    arguments: tuple[str, ...]
    are_split: tuple[bool, ...]
    results: tuple[Result, ...]
    bind: Callable[..., Sequence[Any]]

    def whole(self, *arrays: Any) -> tuple[Any, ...]:
        return tuple(self.bind(*arrays, results=self.results))

    def of_rows(self, *arrays: Any) -> tuple[Any, ...]:
        """Call the op on one device's rows."""
        count = next(
            len(array) for array, has_rows in zip(arrays, self.are_split, strict=True) if has_rows
        )
        results = tuple(Result((count, *shape[1:]), dtype) for shape, dtype in self.results)
        return tuple(self.bind(*arrays, results=results))

    def divide(self, mesh: Any, arrays: Any, results: Any) -> Any:
        """Return what each device does, and how results and arguments are divided."""
        specs = [[*array.sharding.spec, *[None] * len(array.shape)] for array in arrays]
        found = [spec[0] for spec, has in zip(specs, self.are_split, strict=True) if has]
        rows = next(filter(None, found), None)
        for name, array, spec, has_rows in zip(
            self.arguments, arrays, specs, self.are_split, strict=True
        ):
            if any(spec[has_rows:]) or (has_rows and spec[0] not in (None, rows)):
                got = f"an array divided by {PartitionSpec(*spec[: len(array.shape)])}"
                raise ArgumentError(self.op, name, got=got, expected=_EXPECTED)
        by_rows = NamedSharding(mesh, PartitionSpec(rows))
        everywhere = NamedSharding(mesh, PartitionSpec())
        given = tuple(by_rows if has_rows else everywhere for has_rows in self.are_split)
        return mesh, self.of_rows, tuple(by_rows for _ in self.results), given

    def rule(self, ranks: Sequence[int]) -> str:
        """Return which axes belong together, as Shardy writes it: the rows."""
        have_rows = (*self.are_split, *[True] * len(self.results))
        axes = [
            " ".join("rows" if has and not j else f"a{i}b{j}" for j in range(rank))
            for i, (has, rank) in enumerate(zip(have_rows, ranks, strict=True))
        ]
        count = len(self.arguments)
        return f"{', '.join(axes[:count])} -> {', '.join(axes[count:])}"


@functools.lru_cache(maxsize=4096)
def _are_split(op: str, arguments: tuple[str, ...], results: tuple[str, ...]) -> tuple[bool, ...]:
    rows = rows_of(op) if op in OPS else None
    tensors = {arg.name: arg for arg in OPS[op].row.tensors} if rows else {}
    if rows is None or not all(_has_rows(tensors[name], rows) for name in results):
        return ()
    return tuple(_has_rows(tensors[name], rows) for name in arguments)


def are_split(text: CallText) -> tuple[bool, ...]:
    """Return which arguments of a call have the rows by which it can be divided; none, if it
    cannot."""
    return _are_split(text.function, text.arguments, text.results)


def by_rows(sharding: Any) -> Any:
    """Return how a result is divided whose rows are those of an argument."""
    return sharding.update(spec=PartitionSpec(sharding.spec[0]))


def lowered(ctx: Any, operands: Any, text: CallText, bind: Any, results: Any) -> Any:
    """Lower a call for XLA to divide by rows; None if its rows are not independent."""
    have_rows = are_split(text)
    if not have_rows:
        return None
    call = _Call(text.function, text.arguments, have_rows, results, bind)
    divided = custom_partitioning(call.whole)
    ranks = [len(aval.shape) for aval in (*ctx.avals_in, *ctx.avals_out)]
    divided.def_partition(partition=call.divide, sharding_rule=call.rule(ranks))
    return mlir.lower_fun(divided, multiple_results=True)(ctx, *operands)
