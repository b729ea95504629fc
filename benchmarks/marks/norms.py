"""rmsnorm of a few rows: prepared, with new pointers, and typed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

import fi_ffi
from fi_ffi import TensorDesc
from fi_ffi.cli.cases import Case, case_of
from marks import Missing, Wrong, native
from marks.bench import Bench
from marks.gpu import Gpu
from marks.peers import kernels
from marks.report import Line
from marks.timing import Side, repeated, with_turns

# Small, so that the GPU is done with one before the host has launched the next.
ROWS, HIDDEN = 4, 1024
_TURNS = 8


def random_case(rows: int, hidden: int) -> Case:
    """A call of rmsnorm in float16, and what it must give."""
    rng = np.random.default_rng()
    x, weight = (rng.standard_normal(of).astype(np.float16) for of in ((rows, hidden), hidden))
    arrays = {"out": np.full_like(x, np.nan), "input": x, "weight": weight}
    return case_of(fi_ffi.rmsnorm.row, arrays, {"eps": 1e-6, "enable_pdl": False})


class Norm:
    """One call of rmsnorm: its tensors on the GPU, and what it must give."""

    def __init__(self, gpu: Gpu, rows: int = ROWS, hidden: int = HIDDEN) -> None:
        self.case = random_case(rows, hidden)
        self.gpu, self.eps = gpu, float(self.case.scalars["eps"])
        self.out, self.input, self.weight = (
            gpu.put(self.case.arrays[name]) for name in ("out", "input", "weight")
        )

    @property
    def descs(self) -> tuple[TensorDesc, TensorDesc, TensorDesc]:
        return self.out.desc(), self.input.desc(), self.weight.desc()

    @property
    def pointers(self) -> tuple[int, int, int]:
        return self.out.ptr, self.input.ptr, self.weight.ptr

    @property
    def tensors(self) -> tuple[Any, Any, Any]:
        """As torch tensors: out, input, weight."""
        out, x, weight = map(self.gpu.tensor, (self.out, self.input, self.weight))
        return out, x, weight

    def check(self) -> None:
        worst = self.case.error("out", self.out.get())[1]
        if not worst <= 1:
            raise Wrong(f"rmsnorm is off by {worst:.3g} of what rounding explains")


def checked(norms: Sequence[Norm], call: Callable[[], object]) -> Callable[[], None]:
    """That a call gives the results of all these, from NaN."""

    def check() -> None:
        for norm in norms:
            norm.gpu.poison(norm.out)
        call()
        for norm in norms:
            norm.check()

    return check


def prepared(bench: Bench) -> Iterator[Line]:
    """Beside the same entry called from C++."""
    gpu, norm = bench.gpu, Norm(bench.gpu)
    in_scope = fi_ffi.prepare(fi_ffi.rmsnorm, *norm.descs, norm.eps, False)
    on_stream = fi_ffi.prepare(fi_ffi.rmsnorm, *norm.descs, norm.eps, False, stream=gpu.stream)
    values = *norm.descs, norm.eps, False
    loop = native.entry_loop(kernels(fi_ffi.rmsnorm.row.module), "rmsnorm", values, gpu.stream)
    scoped = bench.in_scope(in_scope)
    sides = [
        Side("prepared", scoped, checked([norm], lambda: scoped(0))),
        Side("the entry from C++", loop, checked([norm], lambda: loop(1))),
        Side("own stream", repeated(on_stream), checked([norm], on_stream)),
    ]
    try:
        sides.append(Side("empty kernel from C++", native.empty_launches(gpu.stream), _nothing))
    except Missing as missing:
        print(f"no empty kernel: {missing}")
    found = bench.measure(sides)
    peer = found["the entry from C++"]
    yield Line("prepared", found["prepared"], peer)
    yield Line("", found["own stream"], peer, "prepared call with a stream of its own")
    if "empty kernel from C++" in found:
        what = "prepared call in a scope"
        yield Line("", found["prepared"], found["empty kernel from C++"], what)


def _nothing() -> None:
    """An empty kernel has no result."""


def pointers(bench: Bench) -> Iterator[Line]:
    """Prepared, with other pointers each time, beside tvm_ffi's Cython call."""
    norms = [Norm(bench.gpu) for _ in range(_TURNS)]
    entry = bench.peers.module(fi_ffi.rmsnorm.row.module).rmsnorm
    eps = norms[0].eps
    call = fi_ffi.prepare(fi_ffi.rmsnorm, *norms[0].descs, eps, False)

    def update(turns: list[Any]) -> None:
        change = call.update
        for out, x, weight in turns:
            change(out, x, weight)
            call()

    def cython(turns: list[Any]) -> None:
        for out, x, weight in turns:
            entry(out, x, weight, eps, False)

    run = bench.in_scope(call, with_turns(update, [norm.pointers for norm in norms]))
    tensors = with_turns(cython, [norm.tensors for norm in norms])
    mine, peer = bench.measure([
        Side("prepared", run, checked(norms, lambda: run(_TURNS))),
        Side(
            "tvm_ffi's Cython call, torch tensors", tensors, checked(norms, lambda: tensors(_TURNS))
        ),
    ]).values()  # fmt: skip
    yield Line("pointers", mine, peer)


def typed(bench: Bench) -> Iterator[Line]:
    """All checks on, beside flashinfer-python's."""
    norm, stream = Norm(bench.gpu), bench.gpu.stream
    rmsnorm, eps, shape, row = fi_ffi.rmsnorm, norm.eps, (ROWS, HIDDEN), (HIDDEN,)
    theirs = bench.peers.flashinfer(rmsnorm.row.module).rmsnorm

    def described(turns: list[Any]) -> None:
        for out, x, weight in turns:
            rmsnorm(out, x, weight, eps, False, stream=stream)

    def addresses(turns: list[Any]) -> None:
        for out, x, weight in turns:
            rmsnorm(
                TensorDesc(out, shape, "float16"), TensorDesc(x, shape, "float16"),
                TensorDesc(weight, row, "float16"), eps, False, stream=stream,
            )  # fmt: skip

    def tensors(turns: list[Any]) -> None:
        for out, x, weight in turns:
            theirs(x, weight, eps, out, False)

    sides = [
        Side(name, run, checked([norm], functools.partial(run, 1)))
        for name, run in (
            ("described", with_turns(described, [norm.descs])),
            ("addresses", with_turns(addresses, [norm.pointers])),
            ("flashinfer.rmsnorm(out=)", with_turns(tensors, [norm.tensors])),
        )
    ]
    described_, addresses_, peer = bench.measure(sides).values()
    yield Line("typed", described_, peer)
    yield Line("", addresses_, peer, "typed call, three TensorDescs made for each")
