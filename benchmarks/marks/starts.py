"""Fresh processes: how long an import takes, and how long it is to a first result."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

import fi_ffi
from fi_ffi.cli.cases import Case
from marks import Missing, Wrong
from marks.bench import Bench
from marks.gpu import need_gpu
from marks.norms import HIDDEN, ROWS, random_case
from marks.report import Line
from marks.timing import Run, Side, measure

_CORES = 2
_PROCESSES = 5

_IMPORT = """
import sys, time
before = time.perf_counter_ns()
import {module}
print(time.perf_counter_ns() - before)
assert {module}.rmsnorm
"""
# What the first results have in common: inputs from files, the time when the output is there.
_RESULT = """
import json, sys, time
import numpy as np
folder, eps = json.loads(sys.argv[1])
x, weight = (np.load(folder + "/" + name + ".npy") for name in ("input", "weight"))
out = np.full_like(x, np.nan)
{body}
print(time.monotonic_ns())
np.save(folder + "/out.npy", out)
"""
_FI_FFI = """
import fi_ffi
from cuda.bindings import runtime

def check(result):
    error, *values = result
    assert int(error) == 0, error
    return values[0] if values else None

def put(array):
    pointer = check(runtime.cudaMalloc(array.nbytes))
    kind = runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
    check(runtime.cudaMemcpy(pointer, array.ctypes.data, array.nbytes, kind))
    return fi_ffi.TensorDesc(pointer, array.shape, array.dtype)

result, stream = put(out), check(runtime.cudaStreamCreate())
fi_ffi.rmsnorm(result, put(x), put(weight), eps, stream=stream)
check(runtime.cudaStreamSynchronize(stream))
kind = runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
check(runtime.cudaMemcpy(out.ctypes.data, result.ptr, out.nbytes, kind))
"""
_FLASHINFER = """
import torch
import flashinfer

result = torch.from_numpy(out).cuda()
given = (torch.from_numpy(array).cuda() for array in (x, weight))
flashinfer.rmsnorm(*given, eps, result, False)
out = result.cpu().numpy()
"""


def _output(program: str, *arguments: str) -> str:
    """What a fresh Python prints; it may write bytecode, which what pip installs has."""
    command = [sys.executable, "-c", program, *arguments]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"a fresh process failed: {done.stderr.strip()[-600:]}")
    return done.stdout


def _has_flashinfer() -> None:
    if importlib.util.find_spec("flashinfer") is None:
        raise Missing("flashinfer-python")


def _compared(bench: Bench, key: str, mine: Run, theirs: Run, name: str) -> Line:
    """A process of one, then of the other; the first of each, which fills caches, is dropped."""
    effort = replace(bench.effort, rounds=min(_PROCESSES, bench.effort.rounds), calls=1, chunk=1)

    def checked_in_run() -> None:
        """Each process is seen to have given the right result."""

    sides = [Side("fi_ffi", mine, checked_in_run), Side(name, theirs, checked_in_run)]
    found, peer = measure(sides, effort, lambda: None).values()
    return Line(key, found, peer)


def imports(bench: Bench) -> Iterator[Line]:
    """`import` alone, in processes that have two cores."""
    _has_flashinfer()

    def importing(module: str) -> Run:
        return lambda _: float(_output(_IMPORT.format(module=module)).split()[-1])

    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[:_CORES])
    try:
        yield _compared(
            bench, "import", importing("fi_ffi"), importing("flashinfer"), "import flashinfer"
        )
    finally:
        os.sched_setaffinity(0, before)


def first_results(bench: Bench) -> Iterator[Line]:
    """From the start of a process to an rmsnorm on the host, with kernels that are in place."""
    need_gpu()
    _has_flashinfer()
    bench.peers.flashinfer(fi_ffi.rmsnorm.row.module)
    case = random_case(ROWS, HIDDEN)
    with tempfile.TemporaryDirectory() as folder:
        for name in ("input", "weight"):
            np.save(Path(folder) / f"{name}.npy", case.arrays[name])
        yield _compared(
            bench, "first", _result(case, folder, _FI_FFI), _result(case, folder, _FLASHINFER),
            "a process with flashinfer-python",
        )  # fmt: skip


def _result(case: Case, folder: str, body: str) -> Callable[[int], float]:
    program = _RESULT.format(body=body)
    given = json.dumps([folder, float(case.scalars["eps"])])

    def run(_: int) -> float:
        path = Path(folder) / "out.npy"
        path.unlink(missing_ok=True)
        start = time.monotonic_ns()
        taken = float(_output(program, given).split()[-1]) - start
        worst = case.error("out", np.load(path))[1]
        if not worst <= 1:
            raise Wrong(f"a first rmsnorm is off by {worst:.3g} of what rounding explains")
        return taken

    return run
