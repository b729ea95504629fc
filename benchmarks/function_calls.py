"""How many functions calls of fi_ffi call: in Python, and in C from Python.

    python3 benchmarks/function_calls.py [--where "replan"] [--json FILE]

Needs no GPU: tensors are on the CPU, where calls have no stream.  The kernels, which are numpy's
there, are not counted, nor are calls of functions through cffi, which Python's profiler does not
see.  `--where` lists the functions in Python of the rows whose names have these words.  Counts
depend on the versions of Python and the packages, and not on the machine.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import platform
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

import fi_ffi

_REFERENCE = str(Path(fi_ffi.__file__).parent / "reference")
_HIDDEN, _ROWS = 64, 4096
_HEADS, _KV_HEADS, _DIM, _PAGE, _PAGES = 8, 2, 64, 16, 256


class Profile:
    """Counts calls while it is open, but for what kernels of the reference do.

    A kernel is a callback that libtvm_ffi makes: the frame that calls into `fi_ffi.reference`,
    other than to look a kernel up, with all that happens in it.
    """

    def __init__(self) -> None:
        self.python, self.in_c = Counter[str](), Counter[str]()
        # Of each open frame: what had been counted when it was entered.
        self._entered: list[tuple[FrameType, Counter[str], Counter[str]]] = []
        self._kernel: FrameType | None = None

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        if event == "return":
            if self._entered and self._entered[-1][0] is frame:
                self._entered.pop()
            if frame is self._kernel:
                self._kernel = None
        elif self._kernel is not None:
            return
        elif event == "c_call" and argument is not sys.setprofile:
            self.in_c[argument.__qualname__] += 1
        elif event == "call":
            caller = frame.f_back
            if caller is not None and _is_kernel(frame) and not _in_reference(caller):
                while self._entered and self._entered[-1][0] is not caller:
                    self._entered.pop()
                _, self.python, self.in_c = self._entered[-1]
                self._kernel = caller
                return
            self._entered.append((frame, self.python.copy(), self.in_c.copy()))
            code = frame.f_code
            self.python[f"{Path(code.co_filename).name}:{code.co_name}"] += 1


def _in_reference(frame: FrameType) -> bool:
    return frame.f_code.co_filename.startswith(_REFERENCE)


def _is_kernel(frame: FrameType) -> bool:
    return _in_reference(frame) and frame.f_code.co_name != "entry"


def profiled(call: Callable[[], object]) -> Profile:
    """What a call calls, itself left out."""
    profile, collects = Profile(), gc.isenabled()
    gc.disable()  # what others left is not the call's to give back
    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(None)
        if collects:
            gc.enable()
    profile.python -= Counter([f"{Path(__file__).name}:{call.__code__.co_name}"])
    return profile


def norms(
    kind: str, made: Callable[[np.ndarray], Any], length: int
) -> Iterator[tuple[str, Profile]]:
    """Typed calls with tensors that `made` makes of arrays, which is not counted.

    No length from `length` on has been called with before.
    """
    norm = fi_ffi.rmsnorm
    x, out = (np.ones((_ROWS, _HIDDEN), np.float16) for _ in range(2))
    weight = made(np.ones(_HIDDEN, np.float16))

    def at(n: int) -> Profile:
        rows = made(out[:n]), made(x[:n])
        return profiled(lambda: norm(*rows, weight, 1e-6))

    yield f"rmsnorm, {kind}: first call", at(length)
    at(length)
    yield f"rmsnorm, {kind}: repeated call", at(length)
    at(length + 1)
    yield f"rmsnorm, {kind}: call of another length", at(length + 2)


def descriptors() -> Iterator[tuple[str, Profile]]:
    """What is made of an address, and calls that are prepared."""
    x, out = (np.ones((_ROWS, _HIDDEN), np.float16) for _ in range(2))
    weight, address = fi_ffi.as_desc(np.ones(_HIDDEN, np.float16)), x.ctypes.data

    def make(length: int) -> Profile:
        return profiled(
            lambda: fi_ffi.TensorDesc(address, (length, _HIDDEN), "float16", device="cpu")
        )

    make(100)
    yield "TensorDesc made, repeated shape", make(100)
    yield "TensorDesc made, another length", make(101)
    rows = fi_ffi.as_desc(out[:8]), fi_ffi.as_desc(x[:8])
    fi_ffi.prepare(fi_ffi.rmsnorm, *rows, weight, 1e-6)
    yield "rmsnorm prepared", profiled(lambda: fi_ffi.prepare(fi_ffi.rmsnorm, *rows, weight, 1e-6))
    ready = fi_ffi.prepare(fi_ffi.rmsnorm, *rows, weight, 1e-6)
    ready()
    yield "prepared call", profiled(lambda: ready())
    yield "prepared call's update", profiled(lambda: ready.update(rows[0].ptr, rows[1].ptr))


def plans() -> Iterator[tuple[str, Profile]]:
    """Batches of other lengths, planned and run."""
    rng = np.random.default_rng(0)
    cache = [
        fi_ffi.as_desc(np.ones((_PAGES, _PAGE, _KV_HEADS, _DIM), np.float16)) for _ in range(2)
    ]
    room = [np.ones((64, _HEADS, _DIM), np.float16) for _ in range(2)]

    def tables(size: int) -> tuple[np.ndarray, ...]:
        """So many requests of 1 to 64 tokens: 1 to 4 pages."""
        lengths = rng.integers(1, 65, size)
        counts = -(-lengths // _PAGE)
        indptr = np.concatenate([[0], np.cumsum(counts)])
        pages, last = rng.permutation(_PAGES)[: indptr[-1]], lengths - (counts - 1) * _PAGE
        return tuple(table.astype(np.int32) for table in (indptr, pages, last))

    def new(size: int) -> fi_ffi.BatchDecodePlan:
        return fi_ffi.BatchDecodePlan(
            *tables(size), num_qo_heads=_HEADS, num_kv_heads=_KV_HEADS, head_dim=_DIM,
            page_size=_PAGE, device="cpu",
        )  # fmt: skip

    def run(size: int) -> Profile:
        q, out = (fi_ffi.as_desc(array[:size]) for array in room)
        return profiled(lambda: plan.run(q, *cache, out))

    def replan(size: int) -> Profile:
        made = tables(size)
        return profiled(lambda: plan.replan(*made))

    plan = new(32)
    run(32)
    yield "BatchDecodePlan made", profiled(lambda: new(32))
    replan(32)
    yield "replan, as many requests", replan(32)
    yield "first run after it", run(32)
    run(32)
    yield "later run", run(32)
    yield "replan, another number of requests", replan(33)
    yield "first run after it, of that number", run(33)
    run(33)
    yield "later run, of that number", run(33)


def rows() -> Iterator[tuple[str, Profile]]:
    """Every row; what a process does only once is done before."""
    x, weight = np.ones((2, _HIDDEN), np.float16), np.ones(_HIDDEN, np.float16)
    fi_ffi.gemma_rmsnorm(np.empty_like(x), x, weight, 1e-6)
    yield from norms("TensorDescs", fi_ffi.as_desc, 8)
    yield from norms("numpy arrays", lambda array: array, 16)
    if importlib.util.find_spec("torch") is not None:
        yield from norms("torch tensors", importlib.import_module("torch").from_numpy, 32)
    yield from descriptors()
    yield from plans()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--where", help="list what the rows call whose names have these words")
    parser.add_argument("--json", type=Path, help="the counts for programs")
    given = parser.parse_args()
    found = dict(rows())
    print(f"{platform.python_implementation()} {platform.python_version()}")
    print("| what | Python functions | C functions |\n|---|---:|---:|")
    for name, profile in found.items():
        print(f"| {name} | {profile.python.total()} | {profile.in_c.total()} |")
        if given.where and given.where in name:
            for function, count in profile.python.most_common():
                print(f"    {count:4} {function}")
    if given.json:
        counts = {
            name: {"python": profile.python.total(), "c": profile.in_c.total()}
            for name, profile in found.items()
        }
        given.json.write_text(json.dumps(counts, indent=1) + "\n")


if __name__ == "__main__":
    main()
