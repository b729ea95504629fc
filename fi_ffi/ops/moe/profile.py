"""Which tactics are the fastest for a size: each is run and timed, once."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from fi_ffi.abi.function import Frame
from fi_ffi.abi.streams import stream_context
from fi_ffi.errors import ArgumentError, KernelError
from fi_ffi.ops import cuda
from fi_ffi.ops.call.compiled import CompiledRow
from fi_ffi.ops.moe.interface import GATED, Runner
from fi_ffi.ops.moe.modes import row_of
from fi_ffi.ops.row import Row

if TYPE_CHECKING:
    from fi_ffi.ops.moe.fused import FusedMoe

_METHOD, _OCCUPANCY = "run_gemm_profile", "get_tactic_occupancy"
_DEFAULT = -1
_STEP = {"gemm_idx": 1, "profile_id": _DEFAULT, "do_preparation": True}


class Profile(NamedTuple):
    """The fastest tactics, and the milliseconds of each; of those that cannot run, infinity."""

    profile_ids: tuple[int, int]
    gemm1: tuple[float, ...]
    gemm2: tuple[float, ...]


class Profiles:
    """Those found so far, by all that the kernels' profiler is told."""

    def __init__(self) -> None:
        self._found: dict[object, Profile] = {}
        self._compiled: dict[Row, CompiledRow] = {}
        self._lock = threading.Lock()  # one at a time: they would be in each other's way

    def find(
        self,
        moe: FusedMoe,
        op: str,
        tensors: Mapping[str, Any],
        numbers: dict[str, Any],
        activation: str,
        repeats: int,
        stream: object,
    ) -> Profile:
        row = row_of(moe.interface, _METHOD, moe.mode, moe.dtypes, activation in GATED)
        number = moe.number_of(op, activation)
        given = {**tensors, **numbers, **_STEP, "activation_type": number}
        compiled = self._compiled.get(row)
        if compiled is None:
            compiled = self._compiled[row] = CompiledRow(row, op=op)
        descs, sizes = compiled.check(**given)
        if not moe.has_kernels or not moe.mode.has_tactics:
            return Profile((_DEFAULT, _DEFAULT), (), ())
        has_biases = descs["fc1_expert_biases"] is not None
        key = (*sizes.values(), *numbers.values(), activation, has_biases)
        with self._lock:
            if key not in self._found:
                self._found[key] = measure(moe, compiled, given, repeats, stream)
            return self._found[key]


def measure(
    moe: FusedMoe, compiled: CompiledRow, given: Mapping[str, Any], repeats: int, stream: object
) -> Profile:
    """Run and time every tactic of a call that was checked."""
    op = compiled.refuse.op
    on_stream = stream_context(stream, moe.device, op)
    with cuda.current(moe.device), on_stream, cuda.kernel_memory().installed():
        if cuda.is_capturing(on_stream.handle):
            expected = "one that records no graph: profiling waits for it"
            raise ArgumentError(op, "stream", got="a stream that does", expected=expected)
        # An object of its own: the memory that its profiler takes it keeps until it goes.
        runner = moe.make_runner()
        compiled.find_entry = lambda row, device: runner.entry(row.signature)
        compiled.forget()
        try:
            timer = _Timer(runner, compiled, given, on_stream.handle, repeats)
            first, second = runner.counts()
            gemm1 = timer.times(1, range(first))
            gemm2 = timer.times(2, range(first, first + second))
        finally:
            compiled.forget()
            compiled.find_entry = None
            runner.release()
    return Profile((_least(gemm1), _least(gemm2)), gemm1, gemm2)


def _least(times: tuple[float, ...]) -> int:
    best = min(times, default=float("inf"))
    return times.index(best) if best < float("inf") else _DEFAULT


class _Timer:
    """Runs tactics on a stream, between two events."""

    def __init__(
        self, runner: Runner, compiled: CompiledRow, given: Mapping[str, Any], stream: int,
        repeats: int,
    ) -> None:  # fmt: skip
        self._runner, self._stream, self._repeats = runner, stream, repeats
        self._frame: Frame = compiled.pack(**given)[1]
        names = [arg.name for arg in compiled.row.args]
        self._words = [compiled.layout.value(names.index(name)) for name in _STEP]

    def times(self, gemm: int, tactics: range) -> tuple[float, ...]:
        """The milliseconds of each of a multiplication's tactics."""
        self._run(gemm, _DEFAULT, True)
        return tuple(self._time(gemm, tactic) for tactic in tactics)

    def _run(self, *step: int) -> None:
        for word, value in zip(self._words, step, strict=True):
            self._frame.words[word] = value
        self._frame.call()

    def _time(self, gemm: int, tactic: int) -> float:
        ask = self._runner.ask
        if self._runner.has(_OCCUPANCY) and ask(_OCCUPANCY, tactic_id=tactic) <= 0:
            return float("inf")
        try:
            self._run(gemm, tactic, False)  # the first time it is loaded
            with _elapsed(self._stream) as milliseconds:
                for _ in range(self._repeats):
                    self._run(gemm, tactic, False)
        except KernelError:  # not for these sizes
            return float("inf")
        return milliseconds[0] / self._repeats


@contextmanager
def _elapsed(stream: int) -> Iterator[list[float]]:
    """The milliseconds between the beginning and the end of what is queued in the block."""
    from cuda.bindings import runtime

    found: list[float] = []
    events = []
    try:
        for _ in range(2):
            error, event = runtime.cudaEventCreate()
            cuda.check(int(error), "cudaEventCreate")
            events.append(event)
        cuda.check(int(runtime.cudaEventRecord(events[0], stream)[0]), "cudaEventRecord")
        yield found
        cuda.check(int(runtime.cudaEventRecord(events[1], stream)[0]), "cudaEventRecord")
        cuda.check(int(runtime.cudaEventSynchronize(events[1])[0]), "cudaEventSynchronize")
        error, milliseconds = runtime.cudaEventElapsedTime(*events)
        cuda.check(int(error), "cudaEventElapsedTime")
        found.append(float(milliseconds))
    finally:
        for event in events:
            runtime.cudaEventDestroy(event)
