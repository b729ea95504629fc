"""rmsnorm of another number of tokens in each call, as continuous batching has it."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from time import perf_counter_ns
from typing import Any

import numpy as np

import fi_ffi
from fi_ffi import TensorDesc
from fi_ffi.cli.cases import bound
from fi_ffi.cli.cuda import POISON
from marks import Wrong
from marks.batches import random
from marks.bench import Bench
from marks.gpu import Gpu
from marks.norms import Norm, checked
from marks.report import Line
from marks.timing import Figure, Side, with_drawn, with_turns

MOST, HIDDEN, EPS = 4096, 1024, 1e-6
SOME = 8  # lengths that repeat themselves
_CHECKED = (1, 2, 7, 333, 2048, MOST)
_FLOOR = "data_ptr(), shape, stride(), dtype, get_device()"

# Of the row about memory: lengths from 1 on, and multiples of _STEP elements a row.
SHAPES, _STEP, _CHUNK = 1000, 8, 200
_WARM = 2000  # shapes before the resident set is first looked at

Loop = Callable[[list[Any]], object]


class Room:
    """Room for out and input of any shape up to a size, and a weight."""

    def __init__(self, gpu: Gpu, rows: int, hidden: int) -> None:
        rng = np.random.default_rng()
        self.gpu = gpu
        self.x = gpu.put(random(rng, rows * hidden))
        self.weight = gpu.put(random(rng, hidden))
        self.out = gpu.nothing((rows * hidden,))

    def check(self, call: Callable[[], object], rows: int, hidden: int) -> None:
        """Raise `Wrong` unless a call leaves the norm of so many rows, and the rest poisoned."""
        self.gpu.poison(self.out)
        call()
        got, count = self.out.get(), rows * hidden
        x = self.x.host[:count].reshape(rows, hidden).astype(np.float64)
        exact = x / np.sqrt((x**2).mean(-1, keepdims=True) + EPS)
        exact *= self.weight.host[:hidden].astype(np.float64)
        error = np.abs(got[:count].reshape(rows, hidden).astype(np.float64) - exact)
        worst = (error / bound(exact, np.abs(exact), got.dtype)).max()
        shape = f"rmsnorm of {rows} x {hidden}"
        if not worst <= 1:  # which NaN is not either
            raise Wrong(f"{shape} is off by {worst:.3g} of what rounding explains")
        if not (got[count:].view(np.uint8) == POISON).all():
            raise Wrong(f"{shape} wrote past its rows")


def rmsnorm(bench: Bench, key: str, with_torch: bool) -> Iterator[Line]:
    """Lengths drawn for each call beside flashinfer-python's, and beside a few that repeat.

    In a stream scope, as a serving loop is; the peer's stream is torch's current one.
    """
    room, stream, hidden = Room(bench.gpu, MOST, HIDDEN), bench.gpu.stream, HIDDEN
    norm = fi_ffi.rmsnorm
    theirs = bench.peers.flashinfer(norm.row.module).rmsnorm
    out, x, weight = room.out.ptr, room.x.ptr, room.weight.desc()
    tensor_out, tensor_x = (bench.gpu.tensor(a).view(MOST, HIDDEN) for a in (room.out, room.x))
    tensor_weight = bench.gpu.tensor(room.weight)

    def described(lengths: list[int]) -> None:
        with fi_ffi.stream(stream):
            for n in lengths:
                norm(
                    TensorDesc(out, (n, hidden), "float16"), TensorDesc(x, (n, hidden), "float16"),
                    weight, EPS, False,
                )  # fmt: skip

    def sliced(lengths: list[int]) -> None:
        with fi_ffi.stream(stream):
            for n in lengths:
                norm(tensor_out[:n], tensor_x[:n], tensor_weight, EPS, False)

    def slices(lengths: list[int]) -> None:
        for n in lengths:
            tensor_out[:n], tensor_x[:n]

    def reads(lengths: list[int]) -> None:
        for n in lengths:
            for t in (tensor_out[:n], tensor_x[:n], tensor_weight):
                t.data_ptr(), t.shape, t.stride(), t.dtype, t.get_device()

    def peer(lengths: list[int]) -> None:
        for n in lengths:
            theirs(tensor_x[:n], tensor_weight, EPS, tensor_out[:n], False)

    def check(loop: Loop) -> None:
        for n in _CHECKED:
            room.check(functools.partial(loop, [n]), n, HIDDEN)

    ours = sliced if with_torch else described
    few = (1 + np.random.default_rng().choice(MOST, SOME, replace=False)).tolist()
    found = bench.measure([
        Side(name, run, functools.partial(check, loop))
        for name, loop, run in (
            ("other lengths", ours, with_drawn(ours, draw())),
            ("flashinfer.rmsnorm(x[:n], out=out[:n])", peer, with_drawn(peer, draw())),
            (f"itself with {SOME} lengths", ours, with_turns(ours, few)),
        )
    ]).values()  # fmt: skip
    mine, theirs_, again = found
    yield Line(key, mine, theirs_)
    yield Line(f"{key} again", mine, again)
    if with_torch:  # the floor of what torch tensors cost beyond descriptors
        floors = {"two torch slices": slices, f"{_FLOOR} of three tensors, two sliced": reads}
        sides = [Side(of, with_drawn(loop, draw()), lambda: None) for of, loop in floors.items()]
        for of, figure in bench.measure(sides).items():
            yield Line("", figure, mine, of)


def draw() -> Callable[[int], list[int]]:
    """So many lengths from 1 to `MOST`, drawn anew each time."""
    rng = np.random.default_rng()
    return lambda count: rng.integers(1, MOST + 1, count).tolist()


def tensor_desc(bench: Bench) -> Iterator[Line]:
    """Making a `TensorDesc` beside a whole call of flashinfer-python's."""
    norm, ptr, hidden = Norm(bench.gpu), 2**20, HIDDEN
    rmsnorm, eps = bench.peers.flashinfer(fi_ffi.rmsnorm.row.module).rmsnorm, norm.eps

    def made(lengths: list[int]) -> None:
        for n in lengths:
            TensorDesc(ptr, (n, hidden), "float16")

    def peer(turns: list[Any]) -> None:
        for out, x, weight in turns:
            rmsnorm(x, weight, eps, out, False)

    def check() -> None:
        for n in _CHECKED:
            desc = TensorDesc(ptr, (n, hidden), "float16")
            got = desc.ptr, desc.shape, desc.strides, str(desc.dtype)
            if got != (ptr, (n, hidden), (hidden, 1), "float16"):
                raise Wrong(f"a TensorDesc of {n} rows is {got}")

    theirs = with_turns(peer, [norm.tensors])
    found = bench.measure([
        Side("other lengths", with_drawn(made, draw()), check),
        Side("a repeated length", with_turns(made, [MOST]), check),
        Side("flashinfer.rmsnorm(out=)", theirs, checked([norm], functools.partial(theirs, 1))),
    ])  # fmt: skip
    fresh, again, whole = found.values()
    yield Line("tensordesc", fresh, whole)
    yield Line("", again, whole, "a TensorDesc of a repeated shape made")


def memory(bench: Bench) -> Iterator[Line]:
    """Call shapes that are all different, and watch the resident set of the process."""
    room, stream, norm = Room(bench.gpu, SHAPES, SHAPES * _STEP), bench.gpu.stream, fi_ffi.rmsnorm
    out, x, weight = room.out.ptr, room.x.ptr, room.weight.ptr

    def calls(shapes: list[Any]) -> None:
        for n, hidden in shapes:
            norm(
                TensorDesc(out, (n, hidden), "float16"), TensorDesc(x, (n, hidden), "float16"),
                TensorDesc(weight, (hidden,), "float16"), EPS, False, stream=stream,
            )  # fmt: skip

    def check() -> None:
        for rows, steps in ((1, 1), (3, 5), (SHAPES // 3, SHAPES // 2), (SHAPES, SHAPES)):
            shape = rows, _STEP * steps
            room.check(functools.partial(calls, [shape]), *shape)

    check()
    order = np.random.default_rng().permutation(SHAPES**2)
    resident, taken = list[int](), 0
    for start in range(0, len(order), _CHUNK):
        numbers = order[start : start + _CHUNK]
        columns = 1 + numbers // SHAPES, _STEP * (1 + numbers % SHAPES)
        shapes = list(zip(*(column.tolist() for column in columns), strict=True))
        begun = perf_counter_ns()
        calls(shapes)
        taken += perf_counter_ns() - begun
        bench.gpu.settle()
        if start + len(shapes) >= _WARM:
            resident.append(_resident())
    check()
    figure = Figure("fi_ffi", (taken / len(order),))
    yield Line("lengths memory", figure, grown_bytes=max(resident) - resident[0])


def _resident() -> int:
    """Bytes of this process that are in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
