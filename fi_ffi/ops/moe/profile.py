"""Finds the fastest tactics for a call: runs and times each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from fi_ffi.abi.function import Frame
from fi_ffi.abi.streams import stream_context
from fi_ffi.abi.tensor import Device
from fi_ffi.errors import ArgumentError, KernelError
from fi_ffi.ops.call import cuda
from fi_ffi.ops.call.compiled import CompiledRow
from fi_ffi.ops.moe.interface import Runner

METHOD, _OCCUPANCY = "run_gemm_profile", "get_tactic_occupancy"
DEFAULT = -1
# (rows, columns) of the weights of both multiplications.
Shapes = tuple[tuple[int, int], tuple[int, int]]
# The profiler's arguments that choose the tactic to run.
STEP = {"gemm_idx": 1, "profile_id": DEFAULT, "do_preparation": True}


class Profile(NamedTuple):
    """The fastest tactics, and the milliseconds of each tactic; infinity for tactics that cannot
    run."""

    profile_ids: tuple[int, int]
    gemm1: tuple[float, ...]
    gemm2: tuple[float, ...]


def measure(
    make_runner: Callable[[], Runner], compiled: CompiledRow, given: Mapping[str, Any],
    device: Device, repeats: int, stream: object, shapes: Shapes,
) -> Profile:  # fmt: skip
    """Run and time every tactic of a checked call, with weights of these shapes."""
    op = compiled.refuse.op
    on_stream = stream_context(stream, device, op)
    with cuda.current(device), on_stream, cuda.kernel_memory().installed():
        if cuda.is_capturing(on_stream.handle):
            expected = "another: profiling waits for the stream"
            raise ArgumentError(op, "stream", got="a capturing stream", expected=expected)
        # A new object, because it keeps the profiler's memory until it is destroyed.
        runner = make_runner()
        compiled.find_entry = lambda row, device: runner.entry(row.signature)
        compiled.forget()
        try:
            run = _tactic_runner(compiled, given)
            first, second = runner.counts()
            gemm1, gemm2 = (
                _times(runner, run, gemm, tactics, on_stream.handle, repeats, shape)
                for gemm, tactics, shape in zip(
                    (1, 2), (range(first), range(first, first + second)), shapes, strict=True
                )
            )
        finally:
            compiled.forget()
            compiled.find_entry = None
            runner.release()
    return Profile((_least(gemm1), _least(gemm2)), gemm1, gemm2)


def _tactic_runner(compiled: CompiledRow, given: Mapping[str, Any]) -> Callable[..., None]:
    """Return a function that runs the profiler's call with values for `STEP`."""
    frame: Frame = compiled.pack(**given)[1]
    names = [arg.name for arg in compiled.row.args]
    words = [compiled.layout.value(names.index(name)) for name in STEP]

    def run(*step: int) -> None:
        for word, value in zip(words, step, strict=True):
            frame.words[word] = value
        frame.call()

    return run


def _times(
    runner: Runner, run: Callable[..., None], gemm: int, tactics: range, stream: int,
    repeats: int, shape: tuple[int, int],
) -> tuple[float, ...]:  # fmt: skip
    """Return the milliseconds of each tactic of a multiplication."""
    serving = runner.serving(gemm, *shape)

    def time(tactic: int) -> float:
        if serving is not None and tactic not in serving:
            return float("inf")
        if runner.has(_OCCUPANCY) and runner.ask(_OCCUPANCY, tactic_id=tactic) <= 0:
            return float("inf")
        try:
            run(gemm, tactic, False)  # not timed: the first run loads the kernel
            with _elapsed(stream) as milliseconds:
                for _ in range(repeats):
                    run(gemm, tactic, False)
        except KernelError:  # not for these sizes
            return float("inf")
        return milliseconds[0] / repeats

    run(gemm, DEFAULT, True)
    return tuple(map(time, tactics))


def _least(times: tuple[float, ...]) -> int:
    best = min(times, default=float("inf"))
    return times.index(best) if best < float("inf") else DEFAULT


@contextmanager
def _elapsed(stream: int) -> Iterator[list[float]]:
    """Measure the milliseconds between the start and the end of the work queued in the block."""
    start, end, found = cuda.Event(timing=True), cuda.Event(timing=True), list[float]()
    start.record(stream)
    yield found
    end.record(stream)
    end.wait()
    found.append(end.milliseconds_since(start))
