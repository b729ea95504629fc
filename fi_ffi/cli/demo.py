"""`fi-ffi demo`: every op once, on what this machine has, checked against float64."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import click
import numpy as np

import fi_ffi
from fi_ffi.cli import output
from fi_ffi.cli.cases import Case, default_dtypes, make_case
from fi_ffi.cli.inputs import inputs_of
from fi_ffi.errors import FiFfiError, KernelNotFoundError, LoaderError
from fi_ffi.loader import search
from fi_ffi.ops.call.op import Op
from fi_ffi.ops.functions import OPS
from fi_ffi.ops.notation import round_up
from fi_ffi.reference.arrays import Array

_TIMED_CALLS = 20


@dataclass(frozen=True)
class Result:
    """One op's run; `error_of_bound` at most 1 means right."""

    op: str
    provider: str
    shape: str
    dtype: str
    max_error: float
    error_of_bound: float
    microseconds: float

    @property
    def status(self) -> str:
        return "ok" if self.error_of_bound <= 1 else "fail"


@click.command()
@click.option("--kernels", help="Directory or wheel of kernels (default: FI_FFI_KERNELS).")
@click.option("--device", help="cpu, or cuda:N (default: a GPU if kernels for it are here).")
@click.option("--tokens", default=32, show_default=True, type=click.IntRange(1, 1 << 20))
@click.option("--hidden", default=4096, show_default=True, type=click.IntRange(8, 1 << 16))
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON.")
def demo(kernels: str | None, device: str | None, tokens: int, hidden: int, as_json: bool) -> None:
    """Run every op on what this machine has and check it against float64.

    On a machine with a GPU and kernels these run; on any other, the numpy reference
    kernels do, through the same calls.
    """
    if kernels:
        fi_ffi.use_kernels(kernels)
    where, reason = (device, "as asked") if device else _choose_device()
    sizes = {"n": tokens, "nnz": tokens, "h": hidden}
    sizes |= {"total_seq_len": tokens, "num_seqs": min(tokens, 4)}
    results, missing = _run_all(where, sizes)
    if as_json:
        rows = [asdict(result) | {"status": result.status} for result in results]
        document = {"device": where, "reason": reason, "results": rows, "missing": missing}
        output.print_json(document)
    else:
        _print(results, missing, where, reason)
    if any(result.status != "ok" for result in results):
        raise FiFfiError("a result is further from float64 than its dtype allows")


def _choose_device() -> tuple[str, str]:
    """The device to run on, and why."""
    from fi_ffi.cli import cuda

    found = cuda.gpus()
    if not found:
        return "cpu", "no GPU here: numpy reference kernels"
    try:
        search.find_module("norm", 0)
    except LoaderError:
        return "cpu", f"no kernels for {found[0].name} here: `fi-ffi doctor` tells why"
    return "cuda:0", found[0].name


def _run_all(device: str, sizes: dict[str, int]) -> tuple[list[Result], list[str]]:
    """Every op's run, and the ops that the kernels here lack."""
    results, missing = [], []
    for name, op in OPS.items():
        try:
            results.append(_run(op, device, sizes))
        except KernelNotFoundError:
            if not results:
                raise
            missing.append(name)
    return results, missing


def _run(op: Op, device: str, sizes: dict[str, int]) -> Result:
    sizes = {**inputs_of(op.row).usual, **sizes}
    for axis, (most,) in op.row.limits("<=").items():
        if axis in sizes:
            sizes[axis] = min(sizes[axis], most)
    for axis, (step,) in op.row.limits("%").items():
        sizes[axis] = round_up(sizes[axis], step)
    if len(op.row.tensors[0].axis_names) == 3:  # tokens, heads, head_dim
        sizes |= {"h": 128}
    dtypes = default_dtypes(op.row)
    case = make_case(op.row, sizes, dtypes, np.random.default_rng())
    on = _on_gpu if device.startswith("cuda") else _on_cpu
    with on(case, device) as (call, read, timed):
        call(op)
        errors = [case.error(name, read(name)) for name in case.expected]
        seconds = timed(op)
    first = next(arg for arg in op.row.tensors if not arg.is_scratch)
    shape = "x".join(str(n) for n in case.arrays[first.name].shape)
    provider = f"FlashInfer {search.release()}" if on is _on_gpu else "reference"
    worst = max(errors, key=lambda error: error[1])
    return Result(op.row.name, provider, shape, "/".join(dtypes.values()), *worst, seconds * 1e6)


_Use = tuple[Callable[[Op], None], Callable[[str], Array], Callable[[Op], float]]


@contextmanager
def _on_cpu(case: Case, device: str) -> Iterator[_Use]:
    def call(op: Op) -> None:
        op(**case.arrays, **case.scalars)

    def timed(op: Op) -> float:
        seconds = []
        for _ in range(_TIMED_CALLS):
            start = time.perf_counter()
            call(op)
            seconds.append(time.perf_counter() - start)
        return median(seconds)

    yield call, case.arrays.__getitem__, timed


@contextmanager
def _on_gpu(case: Case, device: str) -> Iterator[_Use]:
    from cuda.bindings import runtime

    from fi_ffi.cli import cuda

    index = fi_ffi.parse_device(device).index
    arrays = {name: cuda.DeviceArray(a, device=index) for name, a in case.arrays.items()}
    descs = {name: array.desc() for name, array in arrays.items()}
    with cuda.on_device(index):
        stream: Any = cuda.check(runtime.cudaStreamCreate())

    def call(op: Op) -> None:
        op(**descs, **case.scalars, stream=stream)

    def timed(op: Op) -> float:
        with cuda.on_device(index):
            start, end = (cuda.check(runtime.cudaEventCreate()) for _ in range(2))
            cuda.check(runtime.cudaEventRecord(start, stream))
            for _ in range(_TIMED_CALLS):
                call(op)
            cuda.check(runtime.cudaEventRecord(end, stream))
            cuda.check(runtime.cudaEventSynchronize(end))
        milliseconds: float = cuda.check(runtime.cudaEventElapsedTime(start, end))
        return milliseconds / 1e3 / _TIMED_CALLS

    try:
        yield call, lambda name: arrays[name].get(), timed
    finally:
        cuda.check(runtime.cudaStreamDestroy(stream))
        for array in arrays.values():
            array.free()


def _print(results: list[Result], missing: list[str], device: str, reason: str) -> None:
    rows = [
        (
            result.op,
            result.provider,
            result.shape,
            result.dtype,
            f"{result.max_error:.2e}",
            f"{result.error_of_bound:.2f}",
            f"{result.microseconds:,.1f}",
            result.status,
        )
        for result in results
    ]
    columns = ("op", "provider", "shape", "dtype", "max error", "of bound", "us a call", "")
    output.print_table(f"fi_ffi on {device} ({reason})", columns, rows, numbers=columns[4:7])
    output.console().print(
        "max error: against float64. of bound: 1 is half a step of the dtype (2^-16 of the\n"
        "magnitude added for float32 arithmetic), 0 the same bits; above 1 fails.",
        style="dim",
    )
    if missing:
        output.console().print(f"Not in the kernels here: {', '.join(missing)}.")
