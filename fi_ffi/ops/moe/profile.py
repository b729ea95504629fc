"""Which tactics are the fastest for a size: each is run and timed, once."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from fi_ffi.abi.frame import Frame
from fi_ffi.abi.streams import launching
from fi_ffi.abi.tensor import Layout, TensorDesc
from fi_ffi.errors import ArgumentError, KernelError
from fi_ffi.ops import cuda
from fi_ffi.ops.moe.calls import Asked, settle
from fi_ffi.ops.moe.runner import Runner

if TYPE_CHECKING:
    from fi_ffi.ops.moe.fused import FusedMoe

_METHOD, _OCCUPANCY = "run_gemm_profile", "get_tactic_occupancy"
_DEFAULT = -1


class Profile(NamedTuple):
    """The fastest tactics, and the milliseconds of each; of those that cannot run, infinity."""

    profile_ids: tuple[int, int]
    gemm1: tuple[float, ...]
    gemm2: tuple[float, ...]


class Profiles:
    """Those found so far, by all that the kernels' profiler is told."""

    def __init__(self) -> None:
        self._found: dict[object, Profile] = {}
        self._lock = threading.Lock()  # one at a time: they would be in each other's way

    def find(
        self,
        moe: FusedMoe,
        op: str,
        descs: dict[str, TensorDesc],
        asked: Asked,
        top_k: int,
        repeats: int,
        stream: object,
    ) -> Profile:
        settled = settle(moe, op, descs, None, asked)
        weights = (desc for name, desc in descs.items() if name != "input")
        wants = (want for want in settled.wants if want.name != "input")
        for want, desc in zip(wants, weights, strict=True):
            want.check_address(op, desc)
        experts = settled.sizes.experts * asked.parallel.ep_size
        if top_k > experts:
            expected = f"at most {experts}, which are all there are"
            raise ArgumentError(op, "top_k", got=top_k, expected=expected)
        if not settled.sizes.tokens:
            raise ArgumentError(op, "input", got="no tokens", expected="1 or more")
        if not moe.device.is_cuda or not moe.mode.has_tactics:
            return Profile((_DEFAULT, _DEFAULT), (), ())
        layouts = tuple((name, desc.layout) for name, desc in descs.items())
        key = (layouts, asked, top_k)
        with self._lock:
            if key not in self._found:
                self._found[key] = _measure(moe, op, descs, asked, top_k, repeats, stream)
            return self._found[key]


def _measure(
    moe: FusedMoe,
    op: str,
    descs: dict[str, TensorDesc],
    asked: Asked,
    top_k: int,
    repeats: int,
    stream: object,
) -> Profile:
    on_stream = launching(stream, moe.device, op)
    handle = on_stream.handle
    given: dict[str, Any] = {name: desc.ptr for name, desc in descs.items()}
    given |= {**asked.given(op, moe.device), "top_k": top_k}
    layouts: dict[str, Layout | bool | None] = {name: desc.layout for name, desc in descs.items()}
    with cuda.current(moe.device), on_stream, cuda.kernel_memory().installed():
        if cuda.is_capturing(handle):
            expected = "one that records no graph: profiling waits for it"
            raise ArgumentError(op, "stream", got="a stream that does", expected=expected)
        # An object of its own: the memory that its profiler takes it keeps until it goes.
        runner = moe.make_runner()
        try:
            timer = _Timer(runner, runner.frame(_METHOD, layouts), given, handle, repeats)
            first, second = runner.counts()
            gemm1 = timer.times(1, range(first))
            gemm2 = timer.times(2, range(first, first + second))
        finally:
            runner.release()
    return Profile((_least(gemm1), _least(gemm2)), gemm1, gemm2)


def _least(times: tuple[float, ...]) -> int:
    best = min(times, default=float("inf"))
    return times.index(best) if best < float("inf") else _DEFAULT


class _Timer:
    """Runs tactics on a stream, between two events."""

    def __init__(
        self, runner: Runner, frame: Frame, given: dict[str, Any], stream: int, repeats: int
    ) -> None:
        self._runner, self._frame, self._given = runner, frame, given
        self._stream, self._repeats = stream, repeats

    def times(self, gemm: int, tactics: range) -> tuple[float, ...]:
        """The milliseconds of each of a multiplication's tactics."""
        self._run(gemm, _DEFAULT, True)
        return tuple(self._time(gemm, tactic) for tactic in tactics)

    def _run(self, gemm: int, tactic: int, do_preparation: bool) -> None:
        more = {"gemm_idx": gemm, "profile_id": tactic, "do_preparation": do_preparation}
        values = self._runner.values(_METHOD, {**self._given, **more}, 0)
        self._frame.call(self._runner.entry(_METHOD), values)

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
