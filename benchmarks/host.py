"""What calls, plans, imports and starts cost the host, beside every peer that is installed.

    python3 benchmarks/host.py [--rows decode,import] [--quick] [--output .out]
    python3 benchmarks/host.py --rows lengths-memory     # takes long: by its name alone

Needs a GPU and, for what it is compared with, torch, apache-tvm-ffi, a C++ compiler, and
flashinfer-python of the kernels' release with the kernel wheel installed, so that both load
the same files; tools/gpu_bench.sh sets that up.  A peer that is missing is named.

All GPUs are visible unless CUDA_VISIBLE_DEVICES says otherwise, and their number is told with the
figures: a program with several pays for asking which one is current (benchmarks/visible.py).

Host nanoseconds of one process: sides take turns, medians of 7 rounds of 2000 calls (500 for
plans and graphs), the GPU awaited outside the timed part after every 200 (50 for plans, 1 for
graphs and decode steps), no garbage collection.  Every side's result is held against numpy
before and after; where one is wrong there is no figure, and the exit status is 1.  FlashInfer is
called as it is quickest: with `enable_pdl=False`, and plans with host tensors, page-locked or not.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

from marks import (
    Missing,
    Wrong,
    decoding,
    graphs,
    kernels,
    lengths,
    norms,
    ragged,
    report,
    starts,
    steps,
)
from marks.about import about
from marks.bench import Bench
from marks.report import Entry, Line, Mark
from marks.timing import Effort

from fi_ffi.cli.cuda import CudaError

_LONGEST = 200  # characters of a reason in the table; a traceback has the rest
_WRAPPER = "BatchDecodeWithPagedKVCacheWrapper"

_OTHER_LENGTHS = f"typed rmsnorm, another length of 1 to {lengths.MOST} each time"

# What is asked of each ratio, and of our own figure or memory where that says more.
MARKS = {
    "prepared": Mark("prepared", "prepared call in a scope", "the entry from C++", 1.25),
    "pointers": Mark("pointers", "prepared call, new pointers each time, in a scope",
                     "tvm_ffi's Cython call, torch tensors", 1.15),
    "typed": Mark("typed", "typed call, descriptors, explicit stream",
                  "flashinfer.rmsnorm(out=)", 1.15),
    "tensordesc": Mark("tensordesc", "a TensorDesc made, another length each time",
                       "flashinfer.rmsnorm(out=)", 0.055),
    "lengths": Mark("lengths", f"{_OTHER_LENGTHS}, two TensorDescs made",
                    "flashinfer.rmsnorm(x[:n], out=out[:n])", 1.00),
    "lengths again": Mark("lengths", f"{_OTHER_LENGTHS}, two TensorDescs made",
                          f"itself with {lengths.SOME} lengths", 1.10),
    "lengths torch": Mark("lengths-torch", f"{_OTHER_LENGTHS}, torch slices",
                          "flashinfer.rmsnorm(x[:n], out=out[:n])", 1.40),
    "lengths torch again": Mark("lengths-torch", f"{_OTHER_LENGTHS}, torch slices",
                                f"itself with {lengths.SOME} lengths", 1.10),
    "lengths memory": Mark("lengths-memory", f"{lengths.SHAPES**2:,} shapes: growth in memory", "",
                           most_bytes=8_000_000, told="≤ 8 MB"),
    "decode prepared": Mark("decode", "batch decode run, prepared, in a scope",
                            f"{_WRAPPER}.run(out=)", 0.50),
    "decode typed": Mark("decode", "batch decode run, typed", f"{_WRAPPER}.run(out=)", 0.70),
    "decode step": Mark("decode-step", f"decode step of {steps.LEAST} to {steps.MOST} requests: "
                        f"a replan and {steps.RUNS} typed runs",
                        f"{_WRAPPER}.plan, {steps.RUNS} run(out=)", 0.60),
    "decode step streamed": Mark("decode-step", "decode step, stream= and descriptors for each run",
                                 f"{_WRAPPER}.plan, {steps.RUNS} run(out=)", 0.75),
    "first run": Mark("decode-step", "decode step: the first run", steps.PARTS[-1], 1.50),
    "decode plan": Mark("decode-plan", "batch decode replan", "the wrapper's plan", 0.60),
    "ragged fa2": Mark("ragged-fa2", "ragged prefill replan, fa2", "the fa2 wrapper's plan", 1.00),
    "ragged fa3": Mark("ragged-fa3", "ragged prefill replan, fa3", "the fa3 wrapper's plan", 1.05),
    "kernel rmsnorm": Mark("kernel-rmsnorm",
                           f"kernel time, rmsnorm {kernels.ROWS} x {kernels.HIDDEN}",
                           "flashinfer.rmsnorm", 1.01, least=0.99),
    "kernel decode": Mark("kernel-decode",
                          f"kernel time, batch decode {decoding.BATCH} of {kernels.TOKENS}",
                          "the wrapper's run", 1.01, least=0.99),
    "graph": Mark("graph", f"replay of a graph of {graphs.CALLS} rmsnorm calls",
                  "torch.cuda.CUDAGraph.replay", 1.05,
                  most_ns=50.0 * graphs.CALLS, told="≤ 50 ns a kernel"),
    "import": Mark("import", "import fi_ffi, on 2 cores", "import flashinfer",
                   most_ns=80e6, told="≤ 80 ms"),
    "first": Mark("first", "first rmsnorm of a fresh process, kernels cached",
                  "a process with flashinfer-python", 0.15),
}  # fmt: skip

ROWS: dict[str, Callable[[Bench], Iterator[Line]]] = {
    "prepared": norms.prepared,
    "pointers": norms.pointers,
    "typed": norms.typed,
    "tensordesc": lengths.tensor_desc,
    "lengths": functools.partial(lengths.rmsnorm, key="lengths", with_torch=False),
    "lengths-torch": functools.partial(lengths.rmsnorm, key="lengths torch", with_torch=True),
    "lengths-memory": lengths.memory,
    "decode": decoding.run,
    "decode-plan": decoding.plan,
    "decode-step": steps.step,
    "ragged-fa2": functools.partial(ragged.plan, backend="fa2", key="ragged fa2"),
    "ragged-fa3": functools.partial(ragged.plan, backend="fa3", key="ragged fa3"),
    "kernel-rmsnorm": kernels.rmsnorm,
    "kernel-decode": kernels.decode,
    "graph": graphs.replay,
    "import": starts.imports,
    "first": starts.first_results,
}
# What is measured only where its whole name is given: it takes long.
LONG = {"lengths-memory"}


def entries(name: str, bench: Bench) -> Iterator[Entry]:
    """A row's lines; where it could not be measured, its marks with the reason."""
    open_marks = {key: mark for key, mark in MARKS.items() if mark.row == name}
    status = "FAILED: the row has no line for it"
    try:
        for line in ROWS[name](bench):
            open_marks.pop(line.key, None)
            yield report.entry(name, line, MARKS)
    except Missing as missing:
        status = f"missing: {missing}"
    except Wrong as wrong:
        status = f"FAILED: {wrong}"
    except Exception as error:  # a row that breaks leaves the others standing
        traceback.print_exc()
        status = f"FAILED: {type(error).__name__}: {error}"
    for mark in open_marks.values():
        yield report.without_figures(mark, textwrap.shorten(status, _LONGEST))


def chosen(text: str) -> list[str]:
    """Rows by name, or by what their names begin with; long ones by name alone."""
    asked = [part.strip() for part in text.split(",")]
    found = [
        row for row in ROWS for name in asked
        if row == name or (row.startswith(name) and row not in LONG)
    ]  # fmt: skip
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(ROWS)}")
    return list(dict.fromkeys(found))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=chosen, default=chosen(""), help=f"of {', '.join(ROWS)}")
    parser.add_argument("--quick", action="store_true", help="3 rounds of 400 calls")
    parser.add_argument("--chunk", type=int, help="calls between two waits for the GPU (200)")
    parser.add_argument("--output", type=Path, default=os.environ.get("OUT", ".out"))
    arguments = parser.parse_args()
    effort = Effort(3, 400) if arguments.quick else Effort()
    if arguments.chunk:
        effort = Effort(effort.rounds, effort.calls, arguments.chunk)
    bench, found = Bench(effort), list[Entry]()
    print(report.HEADER)
    for name in arguments.rows:
        for entry in entries(name, bench):
            found.append(entry)
            print(report.shown(entry), flush=True)
        with contextlib.suppress(CudaError):  # of what broke the device, its row has told
            bench.free()
    told = about() | {name: str(value) for name, value in asdict(effort).items()}
    arguments.output.mkdir(parents=True, exist_ok=True)
    for path in report.write(arguments.output, told, found):
        print(f"wrote {path}")
    return int(any(entry.status.startswith("FAILED") for entry in found))


if __name__ == "__main__":
    sys.exit(main())
