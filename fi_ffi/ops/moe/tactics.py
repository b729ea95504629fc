"""The tactics of a layer's two multiplications: chosen by number, or timed to find the fastest."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

from fi_ffi.abi._cffi import ffi
from fi_ffi.abi.function import Frame, make_array
from fi_ffi.abi.interop import as_desc
from fi_ffi.abi.objects import Array
from fi_ffi.errors import KernelError, KernelNotFoundError
from fi_ffi.loader.distributions import is_in
from fi_ffi.ops.call import cuda
from fi_ffi.ops.call.arguments import Refusal, check_int
from fi_ffi.ops.call.compiled import CompiledRow
from fi_ffi.ops.call.row import Scalar
from fi_ffi.ops.moe.activations import GATED, activation_name
from fi_ffi.ops.moe.kernels import Kernels, Runner
from fi_ffi.ops.steps.stream import stream_context

_METHOD, _OCCUPANCY = "run_gemm_profile", "get_tactic_occupancy"
_DEFAULT = -1  # the kernels' own choice
# (rows, columns) of the weights of both multiplications.
_Shapes = tuple[tuple[int, int], tuple[int, int]]
# The profiler's arguments that choose the tactic to run.
_STEP = {"gemm_idx": 1, "profile_id": _DEFAULT, "do_preparation": True}


def array_of(kernels: Kernels, refuse: Refusal, arguments: Mapping[str, Any]) -> int:
    """Return the address of an Array of a call's two tactics, numbered as the release does.

    Each of `profile_ids` counts from 0; -1 is the kernels' own choice. GEMM2's tactics are numbered
    after GEMM1's. Before 0.6.15, a GEMM2 number that is within its own count is taken as counted
    from 0.
    """
    name, counts, ids = "profile_ids", kernels.tactics, arguments["profile_ids"]
    if not isinstance(ids, (tuple, list)):
        raise refuse.type(name, ids, "two ints, or None")
    if len(ids) != 2:
        raise refuse(name, f"{len(ids)} of them", "two ints")
    first, second = (check_int(refuse.op, name, one, _DEFAULT) for one in ids)
    if first >= counts.gemm1 or second >= counts.gemm2:
        expected = f"from -1 to {counts.gemm1 - 1} and from -1 to {counts.gemm2 - 1}"
        raise refuse(name, (first, second), expected)
    last = second + counts.gemm1 if second >= 0 else second
    if kernels.are_used:
        for gemm, tactic in ((1, first), (2, last)):
            weight = arguments[f"fc{gemm}_expert_weights"]
            if tactic < 0 or weight.kind.rank != 3:
                continue
            rows, columns = weight.shape[1], weight.shape[2] * kernels.mode.pack
            if not kernels.runner.serves(gemm, tactic, rows, columns):
                expected = "tactics whose tiles divide these weights, as `profile` finds them"
                raise refuse(name, (first, second), expected)
    return _pair(first, last if kernels.interface.absolute_ids else second)[1]


@functools.cache
def _pair(first: int, second: int) -> tuple[Array, int]:
    """Return an Array of two ints, and its address."""
    array = make_array([first, second])
    return array, int(ffi.cast("uintptr_t", array.handle))


class Profile(NamedTuple):
    """The fastest tactics, and the milliseconds of each tactic; infinity for tactics that cannot
    run."""

    profile_ids: tuple[int, int]
    gemm1: tuple[float, ...]
    gemm2: tuple[float, ...]


class Profiler:
    """Times the tactics of a layer's kernels, once for each size of call."""

    def __init__(self, kernels: Kernels) -> None:
        self._kernels, self._refuse = kernels, Refusal("FusedMoe.profile")
        # By whether the activation is gated, and by all arguments that matter.
        self._rows: dict[bool, CompiledRow] = {}
        self._profiles: dict[object, Profile] = {}
        self._lock = threading.Lock()  # concurrent profiles would disturb each other

    def profile(self, arguments: Mapping[str, Any]) -> Profile:
        """Return the times of a call with the arguments of `FusedMoe.profile`."""
        kernels, refuse = self._kernels, self._refuse
        activation = activation_name(refuse, arguments["activation_type"])
        x = as_desc(arguments["input"], refuse.op, "input")
        if x.device is not kernels.device:
            raise refuse("input", x.device, kernels.device)
        repeats = check_int(refuse.op, "repeats", arguments["repeats"], 1)
        is_gated = activation in GATED
        row = kernels.row(_METHOD, is_gated)
        compiled = self._rows.get(is_gated)
        if compiled is None:
            compiled = self._rows.setdefault(is_gated, CompiledRow(row, op=refuse.op))
        number = kernels.number_of(refuse.op, activation)
        step = {**_STEP, "input": x, "activation_type": number}
        values = {arg.name: step.get(arg.name, arguments.get(arg.name)) for arg in row.given}
        descs, sizes = compiled.check(**values)
        if not kernels.are_used or not kernels.mode.has_tactics:
            return Profile((_DEFAULT, _DEFAULT), (), ())
        self._check_release()
        numbers = (values[arg.name] for arg in row.given if isinstance(arg, Scalar))
        key = (*sizes.values(), *numbers, descs["fc1_expert_biases"] is not None)
        with self._lock:
            if key not in self._profiles:
                hidden, inter = sizes["hidden_size"], sizes["inter_size"]
                shapes = ((2 * inter if is_gated else inter, hidden), (hidden, inter))
                call = ProfiledCall(kernels, compiled, values, shapes)
                self._profiles[key] = measure(call, repeats, arguments["stream"])
            return self._profiles[key]

    def _check_release(self) -> None:
        """Raise if the profiler of the release in use does not run the mode."""
        mode, release = self._kernels.mode, self._kernels.runner.release_in_use
        if release is not None and not is_in(release, mode.profiled):
            raise KernelNotFoundError(
                f"{self._refuse.op}: the profiler of FlashInfer {release} does not run "
                f"{mode.about}: those of {mode.profiled} do"
            )


@dataclass(frozen=True)
class ProfiledCall:
    """A checked call of the profiler."""

    kernels: Kernels
    compiled: CompiledRow
    values: Mapping[str, Any]
    shapes: _Shapes

    def runs(self) -> Callable[..., None]:
        """Pack the call; return a function that runs it with values for `_STEP`."""
        frame: Frame = self.compiled.pack(**self.values)[1]
        names = [arg.name for arg in self.compiled.row.args]
        words = [self.compiled.layout.value(names.index(name)) for name in _STEP]

        def run(*step: int) -> None:
            for word, value in zip(words, step, strict=True):
                frame.words[word] = value
            frame.call()

        return run


def measure(call: ProfiledCall, repeats: int, stream: object) -> Profile:
    """Run and time every tactic of a call."""
    compiled, device = call.compiled, call.kernels.device
    on_stream = stream_context(stream, device, compiled.refuse.op)
    with cuda.current(device):
        is_recorded = cuda.is_capturing(on_stream.handle)
    if is_recorded:
        expected = "another: profiling waits for the stream"
        raise Refusal(compiled.refuse.op)("stream", "a capturing stream", expected)
    with cuda.current(device), on_stream, cuda.kernel_memory().installed():
        # A new object, because it keeps the profiler's memory until it is destroyed.
        runner = call.kernels.make_runner()
        compiled.find_entry = lambda row, device: runner.entry(row.signature)
        compiled.forget()
        try:
            timer = _Timer(runner, call.runs(), on_stream.handle, repeats)
            first, second = runner.counts()
            gemm1 = timer.times(1, range(first), call.shapes[0])
            gemm2 = timer.times(2, range(first, first + second), call.shapes[1])
        finally:
            compiled.forget()
            compiled.find_entry = None
            runner.release()
    return Profile((_least(gemm1), _least(gemm2)), gemm1, gemm2)


@dataclass(frozen=True)
class _Timer:
    """Times tactics of a packed call on a stream."""

    runner: Runner
    run: Callable[..., None]
    stream: int
    repeats: int

    def times(self, gemm: int, tactics: range, shape: tuple[int, int]) -> tuple[float, ...]:
        """Return the milliseconds of each tactic of a multiplication with weights of this shape."""
        self.run(gemm, _DEFAULT, True)
        return tuple(self._time(gemm, tactic, shape) for tactic in tactics)

    def _time(self, gemm: int, tactic: int, shape: tuple[int, int]) -> float:
        if not self.runner.serves(gemm, tactic, *shape):
            return float("inf")
        if self.runner.has(_OCCUPANCY) and self.runner.ask(_OCCUPANCY, tactic_id=tactic) <= 0:
            return float("inf")
        try:
            self.run(gemm, tactic, False)  # not timed: the first run loads the kernel
            with _elapsed(self.stream) as milliseconds:
                for _ in range(self.repeats):
                    self.run(gemm, tactic, False)
        except KernelError:  # not for these sizes
            return float("inf")
        return milliseconds[0] / self.repeats


def _least(times: tuple[float, ...]) -> int:
    best = min(times, default=float("inf"))
    return times.index(best) if best < float("inf") else _DEFAULT


@contextmanager
def _elapsed(stream: int) -> Iterator[list[float]]:
    """Measure the milliseconds between the start and the end of the work queued in the block."""
    start, end, milliseconds = cuda.Event(timing=True), cuda.Event(timing=True), list[float]()
    start.record(stream)
    yield milliseconds
    end.record(stream)
    end.wait()
    milliseconds.append(end.milliseconds_since(start))
