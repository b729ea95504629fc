"""Time on the GPU of the same kernel launched by both; attention.py has more of it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np

import fi_ffi
from marks.bench import Bench
from marks.decoding import BATCH, Decode
from marks.gpu import Cupti, event_time
from marks.norms import Norm, checked
from marks.report import Line
from marks.timing import Run, Side

ROWS, HIDDEN, TOKENS = 4096, 4096, 1024
_cupti = functools.cache(Cupti)


def _timer(bench: Bench) -> tuple[str, Callable[[Callable[[], object]], Run]]:
    """CUPTI where it can be used, and events otherwise."""
    try:
        return "CUPTI", _cupti().time
    except Exception as error:
        print(f"GPU time by events: no CUPTI ({type(error).__name__}: {error})")
    return "events", functools.partial(event_time, bench.peers.need("torch"))


def _line(
    bench: Bench, key: str, name: str, mine: Callable[[], object], theirs: Callable[[], object],
    check: Callable[[Callable[[], object]], Callable[[], object]],
) -> Line:  # fmt: skip
    """Both, queued 20 at a time; `check(call)` is the check of a side that calls it."""
    how, timer = _timer(bench)
    rounds = max(2 * bench.effort.rounds + 1, 3)
    effort = replace(bench.effort, rounds=rounds, calls=20, chunk=20)
    sides = [
        Side(told, timer(call), check(call))
        for told, call in (("fi_ffi", mine), (f"{name}, GPU time by {how}", theirs))
    ]
    figure, peer = bench.measure(sides, effort).values()
    return Line(key, figure, peer)


def rmsnorm(bench: Bench) -> Iterator[Line]:
    norm, stream = Norm(bench.gpu, ROWS, HIDDEN), bench.gpu.stream
    flashinfer = bench.peers.flashinfer(fi_ffi.rmsnorm.row.module)
    (out, x, weight), eps = norm.tensors, norm.eps
    mine = functools.partial(fi_ffi.rmsnorm, *norm.descs, eps, False, stream=stream)
    theirs = functools.partial(flashinfer.rmsnorm, x, weight, eps, out, False)
    check = functools.partial(checked, [norm])
    yield _line(bench, "kernel rmsnorm", "flashinfer.rmsnorm", mine, theirs, check)


def decode(bench: Bench) -> Iterator[Line]:
    decode = Decode(bench, np.full(BATCH, TOKENS))
    mine = functools.partial(decode.plan_run, decode.plan)
    assert decode.wrapper  # made and planned before anything is timed
    yield _line(
        bench, "kernel decode", "the wrapper's run", mine, decode.wrapper_run,
        lambda call: functools.partial(decode.check, call),
    )  # fmt: skip
