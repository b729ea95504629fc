"""`fi-ffi demo`: runs a language model's ops on this machine and checks them against float64."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

import click
import numpy as np

import fi_ffi
from fi_ffi.abi.tensor import Device, parse_device
from fi_ffi.cli import output
from fi_ffi.cli.demo_calls import COUNT, DemoCall, calls
from fi_ffi.errors import FiFfiError, KernelNotFoundError, LoaderError
from fi_ffi.loader import search
from fi_ffi.loader.fetch import progress
from fi_ffi.reference.arrays import Array

_TIMED_CALLS = 20


@dataclass(frozen=True)
class Result:
    """A finished call; `error_of_bound` at most 1 is correct."""

    family: str
    op: str
    provider: str
    shape: str
    dtype: str
    max_error: float
    error_of_bound: float
    microseconds: float
    # Rate of reading keys and values, for calls that spend their time on it.
    gigabytes_per_second: float | None = None

    @property
    def status(self) -> str:
        return "ok" if self.error_of_bound <= 1 else "fail"


@dataclass(frozen=True)
class NotRun:
    """A call that this machine cannot run, and why."""

    family: str
    op: str
    reason: str


@click.command()
@click.option("--kernels", help="Directory or wheel of kernels (default: FI_FFI_KERNELS).")
@click.option("--device", help="cpu, or cuda:N (default: a GPU if there are kernels for it).")
@click.option(
    "--tokens",
    default=32,
    show_default=True,
    type=click.IntRange(1, 1 << 20),
    help="Number of tokens.",
)
@click.option(
    "--hidden",
    default=4096,
    show_default=True,
    type=click.IntRange(8, 1 << 16),
    help="Hidden size.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON.")
def demo(kernels: str | None, device: str | None, tokens: int, hidden: int, as_json: bool) -> None:
    """Call the main ops on this machine and check every result.

    The calls run on a GPU if there are kernels for it, and otherwise on the CPU, with numpy
    reference kernels. Each result is compared with its definition in float64. A result is right
    if its error is at most 1.00 of what rounding allows. Exits with 1 if one is wrong.
    """
    start = time.monotonic()
    if kernels:
        fi_ffi.use_kernels(kernels)
    where, reason = (_parsed(device), "as requested") if device else _choose_device()
    if not as_json:
        output.say(f"fi_ffi {fi_ffi.__version__} on {where} ({reason})")
    outcomes_so_far = _run_all(where, tokens, hidden)
    outcomes = [*outcomes_so_far] if as_json else [*_shown(outcomes_so_far, where)]
    results = [each for each in outcomes if isinstance(each, Result)]
    not_run = [each for each in outcomes if isinstance(each, NotRun)]
    seconds = time.monotonic() - start
    wrong = [result.op for result in results if result.status != "ok"]
    if as_json:
        rows = [asdict(result) | {"status": result.status} for result in results]
        more = {"not_run": [asdict(each) for each in not_run], "seconds": round(seconds, 3)}
        output.print_json({"device": str(where), "reason": reason, "results": rows} | more)
    else:
        output.say(_summary(len(results), wrong, len(not_run), seconds))
    if wrong:
        raise FiFfiError("a result is further from float64 than its dtype allows")


def _parsed(text: str) -> Device:
    """Return the requested device; raise if it is not available."""
    try:
        place = parse_device(text, op="demo")
    except FiFfiError:
        place = None
    if place is None or not (place.is_cuda or str(place) == text == "cpu"):
        expected = "use cpu or cuda:N"
        raise click.BadParameter(f"{text!r} is not a device: {expected}", param_hint="--device")
    if place.is_cuda:
        from fi_ffi.cli import cuda

        try:
            cuda.require(place.index)
        except cuda.CudaError as error:
            raise click.BadParameter(str(error), param_hint="--device") from error
    return place


def _choose_device() -> tuple[Device, str]:
    """Return the device to run on, and why."""
    from fi_ffi.cli import cuda

    devices = cuda.gpus()
    if not devices:
        return parse_device("cpu"), "no GPU here: numpy reference kernels"
    try:
        search.find_module("norm", 0)
    except LoaderError:
        reason = f"no kernels for {devices[0].name} here: `fi-ffi doctor` says why"
        return parse_device("cpu"), reason
    return parse_device("cuda:0"), devices[0].name


def _run_all(device: Device, tokens: int, hidden: int) -> Iterator[Result | NotRun]:
    """Yield each call's result as it finishes, or why the call was not run."""
    rng = np.random.default_rng()
    is_first = True
    # On a GPU, the first call may fetch kernels.
    with progress.counter("calls", COUNT, quiet=not device.is_cuda) as count:
        for call in calls(tokens, hidden, rng, is_cuda=device.is_cuda):
            count(call.name)
            if call.family == "graphs" and not device.is_cuda:
                yield NotRun(call.family, call.name, "a graph needs a GPU")
                continue
            try:
                outcome: Result | NotRun = _run(call, device)
            except KernelNotFoundError as error:
                if is_first:
                    raise
                outcome = NotRun(call.family, call.name, str(error).partition("\n")[0].rstrip(":"))
            is_first = False
            yield outcome


def _run(call: DemoCall, device: Device) -> Result:
    with (_on_gpu if device.is_cuda else _on_cpu)(call, device) as (run, read, timed):
        run()
        errors = [judge(read(name)) for name, judge in call.judges.items()]
        seconds = timed(run)
    shape, dtype = "x".join(map(str, call.first.shape)), call.first.dtype.name
    provider = f"FlashInfer {search.release()}" if device.is_cuda else "reference"
    worst = max(errors, key=lambda error: error[1])
    rate = call.cache_bytes / seconds / 1e9 if device.is_cuda and call.cache_bytes else None
    return Result(call.family, call.name, provider, shape, dtype, *worst, seconds * 1e6, rate)


_Use: TypeAlias = (
    "tuple[Callable[[], object], Callable[[str], Array], Callable[[Callable[[], object]], float]]"
)


@contextmanager
def _on_cpu(call: DemoCall, device: Device) -> Iterator[_Use]:
    def timed(run: Callable[[], object]) -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    yield call.bind(call.arrays, device, None), call.arrays.__getitem__, timed


@contextmanager
def _on_gpu(call: DemoCall, device: Device) -> Iterator[_Use]:
    from cuda.bindings import runtime

    from fi_ffi.cli import cuda

    index = device.index
    arrays = {name: cuda.DeviceArray(a, device=index) for name, a in call.arrays.items()}
    descs = {name: array.desc() for name, array in arrays.items()}
    with cuda.on_device(index):
        stream: Any = cuda.check(runtime.cudaStreamCreate())

    def timed(run: Callable[[], object]) -> float:
        with cuda.on_device(index):
            start, end = (cuda.check(runtime.cudaEventCreate()) for _ in range(2))
            cuda.check(runtime.cudaEventRecord(start, stream))
            for _ in range(_TIMED_CALLS):
                run()
            cuda.check(runtime.cudaEventRecord(end, stream))
            cuda.check(runtime.cudaEventSynchronize(end))
        milliseconds: float = cuda.check(runtime.cudaEventElapsedTime(start, end))
        return milliseconds / 1e3 / _TIMED_CALLS

    try:
        yield call.bind(descs, device, stream), lambda name: arrays[name].get(), timed
    finally:
        cuda.check(runtime.cudaStreamDestroy(stream))
        for array in arrays.values():
            array.free()


def _shown(results: Iterator[Result | NotRun], device: Device) -> Iterator[Result | NotRun]:
    """Print each result as it comes, under its family, and yield it."""
    family = ""
    for outcome in results:
        if outcome.family != family:
            family = outcome.family
            click.echo(family)
        output.say(_line(outcome, device))
        yield outcome


def _line(outcome: Result | NotRun, device: Device) -> str:
    """Format a result for a terminal; the verdict comes first."""
    if isinstance(outcome, NotRun):
        return f"  not run: {outcome.op}: {outcome.reason}"
    is_exact = outcome.max_error == outcome.error_of_bound == 0
    fraction = format(outcome.error_of_bound, "6.2f" if outcome.error_of_bound < 1e3 else "6.0e")
    judged = " exact" if is_exact else f"{fraction} of the allowed error"
    took = f"{outcome.microseconds:8,.1f} us" if device.is_cuda else ""
    text = f"  {outcome.status:<4}{judged:<29}{outcome.op:<22}{outcome.shape:<10}{took}"
    if outcome.gigabytes_per_second is not None:
        text += f"\n{'':37}its keys and values at {outcome.gigabytes_per_second:,.0f} GB/s"
    return text.rstrip()


def _summary(count: int, wrong: list[str], not_run: int, seconds: float) -> str:
    """Return the last line of the report."""
    right = f"{count - len(wrong)} of {output.counted(count, 'result')}"
    right += " is right" if count == 1 else " are right"
    if wrong:
        right += f", wrong: {', '.join(wrong)}"
    if not_run:
        right += f"; {not_run} not run"
    return f"{right}; {seconds:.1f} s"
