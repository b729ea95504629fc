"""What a call of a C function costs by each way that cffi has, by versions of cffi.

    python3 benchmarks/cffi_calls.py [FOLDER...] [--processes 15]

A FOLDER has a cffi (`pip install --no-deps --target FOLDER cffi==2.0.0`); without one, it is the
cffi that is installed.  Processes of the folders take turns.  Each prints nanoseconds a call, the
least of several passes; shown are the median of the processes, and their quartiles.

The function does nothing and takes four arguments, as kernels' entries do.  cffi releases the GIL
around each call: what this takes is the difference of ctypes' `CDLL` and `PyDLL`, the latter of
which keeps it.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import json
import os
import statistics
import subprocess
import sys
import timeit

_CALLS, _PASSES = 20_000, 25
_TYPE = "int(*)(void *, void *, int, void *)"
_GIL = "releasing the GIL, in ctypes"


def measure() -> dict[str, float]:
    """Nanoseconds of each way, in this process; the loop around the call is taken off."""
    import cffi  # of the folder that is first on the path

    ffi = cffi.FFI()
    ffi.cdef("int abs(int);")
    library, memory = ffi.dlopen(None), ffi.new("int64_t[8]")
    # With the first argument null it returns 0, and reads no other.
    pointer = ffi.cast(_TYPE, ffi.cast("void *", library.abs))
    arguments = ffi.NULL, ffi.cast("void *", memory), 3, ffi.cast("void *", memory)
    kept, released = (make(None).abs for make in (ctypes.PyDLL, ctypes.CDLL))
    names = {
        "partial": functools.partial(pointer, *arguments), "pointer": pointer, "library": library,
        "function": library.abs, "a": arguments, "kept": kept, "released": released,
    }  # fmt: skip
    ways = {
        "nothing": "pass",
        "functools.partial of a pointer": "partial()",
        "a pointer made by ffi.cast, 4 arguments": "pointer(a[0], a[1], a[2], a[3])",
        "a function of a library, 1 argument": "function(0)",
        "the same, looked up in each call": "library.abs(0)",
        "PyDLL": "kept(0)",
        "CDLL": "released(0)",
    }
    assert names["partial"]() == names["function"](0) == 0
    timers = {way: timeit.Timer(code, globals=names) for way, code in ways.items()}
    least = dict.fromkeys(ways, float("inf"))
    for _ in range(_PASSES):
        for way, timer in timers.items():
            least[way] = min(least[way], timer.timeit(_CALLS) / _CALLS * 1e9)
    nothing = least.pop("nothing")
    found = {way: ns - nothing for way, ns in least.items()}
    found[_GIL] = found.pop("CDLL") - found.pop("PyDLL")
    return {**found, "version": cffi.__version__}


def measured(folder: str) -> dict[str, float]:
    """The figures of another process, with this folder's cffi."""
    environment = dict(os.environ)
    if folder:
        environment["PYTHONPATH"] = folder
    command = [sys.executable, __file__, "--one"]
    out = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return json.loads(out.stdout)  # type: ignore[no-any-return]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="*", metavar="FOLDER", default=[""])
    parser.add_argument("--processes", type=int, default=15, help="of each folder")
    parser.add_argument("--one", action="store_true", help="measure in this process, print JSON")
    given = parser.parse_args()
    if given.one:
        print(json.dumps(measure()))
        return
    runs = [[measured(folder) for folder in given.folders] for _ in range(given.processes)]
    columns = [[run[i] for run in runs] for i in range(len(given.folders))]
    titles = [f"cffi {column[0]['version']}" for column in columns]
    print(f"| ns | {' | '.join(titles)} |\n|---|{'---:|' * len(titles)}")
    for way in [*columns[0][0]][:-1]:
        cells = []
        for column in columns:
            low, middle, high = statistics.quantiles([run[way] for run in column], n=4)
            cells.append(f"{middle:.0f} ({low:.0f} to {high:.0f})")
        print(f"| {way} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
