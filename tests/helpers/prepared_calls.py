"""Ways of making the same call: in full, the quick way, prepared, and updated."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import fi_ffi
from fi_ffi.cli.cases import Case
from fi_ffi.ops.call.compiled import CompiledRow
from fi_ffi.ops.call.op import Op
from fi_ffi.ops.call.row import KvLayout, Row, Scalar, Tensor
from fi_ffi.ops.functions import OPS

from tests.helpers import kernels
from tests.helpers.calls import EVERY_CALL
from tests.helpers.cases import default_dtypes, make_arguments, make_case
from tests.helpers.inputs import inputs_of

_ALIGNMENT = 256  # of a scratch argument


def _variants(row: Row) -> Iterator[tuple[str, dict[str, Any]]]:
    """Names, and what `make_case` is told, of the shapes that a row's calls come in."""
    yield "", {}
    if any(isinstance(arg, KvLayout) for arg in row.args):
        yield "HND", {"kv_layout": "HND"}
    yield from (inputs_of(row).variants or {}).items()


# Every op, in every combination of dtypes, and in every shape of a call.
EVERY_WAY = [
    pytest.param(*call.values, more, id=f"{call.id} {name}".strip())
    for call in EVERY_CALL
    for name, more in _variants(call.values[0].row)
]
EVERY_OP = [
    pytest.param(op, default_dtypes(op.row), more, id=f"{name} {variant}".strip())
    for name, op in OPS.items()
    for variant, more in _variants(op.row)
]


class Placed:
    """A call's arrays in memory of their own, poison around each.

    Two placed from one case have the same layouts and the same bits.
    """

    def __init__(self, case: Case, in_place: bool = False) -> None:
        self.row, self.scalars = case.row, dict(case.scalars)
        self.room = {name: room_for(array) for name, array in case.arrays.items()}
        if in_place:
            for one, other in case.row.in_place:
                self.room[one] = self.room[other]
        self.arrays = {name: array for name, (_, array) in self.room.items()}

    @property
    def descs(self) -> dict[str, fi_ffi.TensorDesc]:
        return {name: fi_ffi.as_desc(array) for name, array in self.arrays.items()}

    @property
    def values(self) -> dict[str, Any]:
        """All arguments; an optional tensor that is not there is left out."""
        return self.descs | self.scalars

    @property
    def addresses(self) -> dict[str, int]:
        return {name: array.ctypes.data for name, array in self.arrays.items()}

    def bytes(self) -> dict[str, bytes]:
        """Everything that the call could have written, and what is around it."""
        return {name: whole.tobytes() for name, (whole, _) in self.room.items()}

    def differs(self, other: Placed) -> list[str]:
        """The names of those whose bytes, or the bytes around them, differ."""
        assert self.room.keys() == other.room.keys()
        pairs = ((name, whole, other.room[name][0]) for name, (whole, _) in self.room.items())
        return [name for name, ours, theirs in pairs if not np.array_equal(ours, theirs)]


def placed(case: Case, more: dict[str, Any], count: int) -> list[Placed]:
    """The case in so many memories."""
    return [Placed(case, more.get("in place", False)) for _ in range(count)]


def room_for(array: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A copy at an aligned address, of the same strides, and the whole memory that it lies in."""
    steps = zip(array.shape, array.strides, strict=True)
    reach = array.itemsize + sum((n - 1) * step for n, step in steps) if array.size else 0
    memory = np.full(reach + 3 * _ALIGNMENT, 0xA5, np.uint8)
    whole = memory[-memory.ctypes.data % _ALIGNMENT :][: reach + 2 * _ALIGNMENT]
    strides = array.strides if array.size else None
    part = np.ndarray(array.shape, array.dtype, whole.data, _ALIGNMENT, strides)
    part[...] = array
    return whole, part


def draw(row: Row, dtypes: dict[str, str], more: dict[str, Any], **scalars: Any) -> Case:
    """Fresh arguments, outputs NaN; numbers that may be anything are drawn too."""
    rng = np.random.default_rng()
    more = {name: value for name, value in more.items() if name != "in place"}
    for arg in row.args:
        if isinstance(arg, Scalar) and arg.type is float:
            scalars.setdefault(arg.name, float(np.exp(rng.uniform(-4, 0))))
    drawn = make_arguments(row, inputs_of(row).small, dtypes, rng, **more | scalars)
    return Case(row, *drawn, {})


_compiled = functools.cache(CompiledRow)


def _unused(row: Row) -> CompiledRow:
    """The row, compiled, which remembers no call before."""
    compiled = _compiled(row)
    compiled.forget()
    return compiled


def full(row: Row, placed: Placed) -> None:
    """The call by a row that remembers none before."""
    _unused(row).call(None, **placed.values)


def refusal_of(row: Row, values: dict[str, Any]) -> fi_ffi.ArgumentError | None:
    """What a compiled row that remembers no call says of one; None where it is fine."""
    try:
        _unused(row).pack(**values)
    except fi_ffi.ArgumentError as error:
        return error
    return None


def same_error(one: BaseException, other: BaseException) -> bool:
    """Whether two errors are the same, in the same words."""
    return type(one) is type(other) and str(one) == str(other)


def frame_of(call: Any) -> tuple[bytes, dict[str, Any], list[int]]:
    """All that a prepared call's launch depends on, and what it keeps alive."""
    frame = call.take()
    words = frame.words.tobytes()
    call.give(frame)
    return words, dict(call.arguments), [id(owner) for owner in call.owners]


def tensors(row: Row) -> list[Tensor]:
    return [arg for arg in row.args if isinstance(arg, Tensor)]


class Mine:
    """An op of every kind of argument, whose kernel does `work` first, and its arguments.

    The result is `x * factor`, plus w where there is one.
    """

    row = Row(
        "mine_too", "norm", "mine_too", "here", "Mine.",
        (
            Tensor("y", "n h", "T", "result", writes=True, reads=False),
            Tensor("x", "n h", "T", "argument"),
            Tensor("w", "h", "T", "added to it", optional=True),
            Scalar("factor", float, 1.5, "factor"),
            Scalar("count", int, 0, "no matter", low=-8, multiple_of=4),
            Scalar("flag", bool, False, "no matter"),
            KvLayout(strided=False),
        ),
        {"T": ("float16",)}, ">=0",
    )  # fmt: skip

    def __init__(self) -> None:
        self.work: Callable[[], object] = lambda: None
        self.op = Op(self.row)
        # What each call of the kernel was given beside the tensors.
        self.given: list[tuple[object, ...]] = []
        rng = np.random.default_rng()
        self.x = rng.standard_normal((4, 16)).astype(np.float16)
        self.w = rng.standard_normal(16).astype(np.float16)
        self.y = np.full((4, 16), np.nan, np.float16)
        self.descs = [fi_ffi.as_desc(array) for array in (self.y, self.x)]

    def kernel(self, y: Any, x: Any, w: Any, *others: object) -> None:
        self.given.append(others)
        self.work()
        factor: Any = others[0]
        y[...] = x * np.float16(factor) + (0 if w is None else w)

    def is_done(self, factor: float, w: Any = 0) -> bool:
        """Whether the last call was this one; the result is poison again after."""
        right = bool((self.y == self.x * np.float16(factor) + w).all())
        self.y[...] = np.nan
        return right


class Calls:
    """One call three ways, its kernel `mine`."""

    def __init__(self, mine, device="cuda:0"):
        self.mine = mine
        y, x = (fi_ffi.TensorDesc(d.ptr, d.shape, d.dtype, device=device) for d in mine.descs)
        self.descs = (y, x)
        self.call = mine.op.prepare(y, x, factor=2.0)

    def typed(self, stream):
        self.mine.op(*self.descs, factor=2.0, stream=stream)

    def in_full(self, stream):
        CompiledRow(self.mine.row).call(None, *self.descs, None, 2.0, stream=stream)

    def prepared(self, stream):
        if stream is None:
            self.call()
        else:
            self.mine.op.prepare(*self.descs, factor=2.0, stream=stream)()

    @property
    def ways(self):
        return self.typed, self.in_full, self.prepared


# On a GPU.


def or_skip(call: Callable[..., Any], *given: Any, **named: Any) -> Any:
    """What a call gives; the test is skipped where the kernels in use have no module for it."""
    try:
        return call(*given, **named)
    except fi_ffi.LoaderError as error:
        kernels.skip_if_missing(error)
        raise


def settle(stream: int) -> None:
    """Wait for a stream, and for no other."""
    from cuda.bindings import runtime

    from fi_ffi.cli.cuda import check

    check(runtime.cudaStreamSynchronize(stream))


def poison(*arrays: Any) -> None:
    """Make every byte of arrays poison; waits for the device."""
    from cuda.bindings import runtime

    from fi_ffi.cli.cuda import POISON, check

    for array in arrays:
        check(runtime.cudaMemset(array.ptr, POISON, array.nbytes))
    check(runtime.cudaDeviceSynchronize())


class OnGpu:
    """A case on the GPU: its arrays, and what they must become."""

    def __init__(self, case: Case, to_gpu: Callable[..., Any]) -> None:
        from cuda.bindings import runtime

        from fi_ffi.cli.cuda import check

        self.case = case
        self.arrays = {name: to_gpu(array) for name, array in case.arrays.items()}
        # Copies may still run, and streams here wait for no other.
        check(runtime.cudaDeviceSynchronize())

    @property
    def descs(self) -> dict[str, fi_ffi.TensorDesc]:
        return {name: array.desc() for name, array in self.arrays.items()}

    @property
    def addresses(self) -> dict[str, int]:
        return {name: array.ptr for name, array in self.arrays.items()}

    def is_right(self) -> bool:
        """Waits for the device."""
        assert self.case.expected
        return all(
            self.case.error(name, self.arrays[name].get())[1] <= 1 for name in self.case.expected
        ) and all(array.intact() for array in self.arrays.values())

    def is_untouched(self) -> bool:
        """Waits for the device."""
        return all(
            array.get().tobytes() == self.case.arrays[name].tobytes()
            for name, array in self.arrays.items()
        )


def norm_sets(rng: np.random.Generator, to_gpu: Callable[..., Any]) -> Callable[..., list[OnGpu]]:
    """Makes sets of rmsnorm of one layout; its kernel is loaded."""
    op = OPS["rmsnorm"]

    def make(count: int, rows: int = 96, hidden: int = 4096) -> list[OnGpu]:
        sizes, dtypes = {"n": rows, "h": hidden}, {"T": "bfloat16"}
        return [OnGpu(make_case(op.row, sizes, dtypes, rng), to_gpu) for _ in range(count)]

    first = make(1)[0]
    op(**first.descs, stream=0)
    assert first.is_right()
    return make
