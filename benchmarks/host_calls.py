"""What the host does for a call, measured with a kernel that does nothing: no GPU is needed.

    python3 benchmarks/host_calls.py [--json] [--torch] [--fail-above 8]
        [--fail-above-repeated 1.5]

Calls take turns, --calls of each in every round.  Figures are nanoseconds of the processor a call,
medians over --rounds.  Ratios are medians of each round's: to a call of cffi alone; where
apache-tvm-ffi is installed, to its Cython call of the same entry; and of calls with another length
each time, to those that repeat a length.

Before it is timed a way of calling is checked twice: with a kernel that has results, against
float64, and by what an entry is given.  What fails is not shown.  On a GPU machine host.py
measures calls of kernels, beside the packages that are installed there.
"""

from __future__ import annotations

import argparse
import platform
import sys
from pathlib import Path
from typing import Any

from marks.noop_kernel import kernels_replaced, noop
from marks.turns import Timing, measure
from marks.ways import EMPTY, PEER, PREPARED, find_peer, own_calls, peer_calls, torch_calls

from fi_ffi import __version__
from fi_ffi.cli import output
from fi_ffi.loader import runtime, tvm_ffi

# The ratios to other calls, and which calls those are.
_RATIOS = ("of_empty", "of_tvm_ffi", "of_repeated")
_COLUMNS = ("call", "ns", *(name.replace("_", " ", 1) for name in _RATIOS))


def main(arguments: list[str] | None = None) -> int:
    """Measure and print; 1 where a check failed, or a ratio is above what was asked for."""
    parser = _parser()
    asked = parser.parse_args(arguments)
    if asked.rounds < 1 or asked.calls < 1:
        parser.error("--rounds and --calls are at least 1")
    peer = find_peer()
    runtime.ensure_tvm_ffi()
    every = own_calls() + (torch_calls() if asked.torch else [])
    every += peer_calls(peer.module) if peer.module else []
    wrong = {call.name: problem for call in every if (problem := call.problem()) is not None}
    with kernels_replaced(noop):
        right = [call for call in every if call.name not in wrong]
        timings = measure(right, asked.rounds, asked.calls)
    rows, machine = _rows(timings), _machine()
    if asked.json:
        output.print_json({
            "machine": machine, "peer": peer.told, "rounds": asked.rounds, "calls": asked.calls,
            "results": rows, "not_shown": wrong,
        })  # fmt: skip
    else:
        of = f"{machine['python']}, {machine['cpu']}, {asked.rounds} x {asked.calls} calls"
        _print(rows, of, peer.told)
    failures = [f"not shown, because a check failed: {of}: {why}" for of, why in wrong.items()]
    failures += _too_slow(rows, asked.fail_above, asked.fail_above_repeated)
    for failure in failures:
        print(f"Error: {failure}", file=sys.stderr)
    return 1 if failures else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=251)
    parser.add_argument("--calls", type=int, default=200)
    parser.add_argument(
        "--fail-above", type=float, metavar="FACTOR",
        help=f"fail if the {PREPARED}, takes more than FACTOR times the {EMPTY}",
    )  # fmt: skip
    parser.add_argument(
        "--fail-above-repeated", type=float, metavar="FACTOR",
        help="fail if calls of other lengths take more than FACTOR times those that repeat one",
    )  # fmt: skip
    parser.add_argument(
        "--torch", action="store_true", help="measure calls with torch tensors, and their floor"
    )
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    return parser


def _rows(timings: list[Timing]) -> list[dict[str, Any]]:
    found = {timing.call.name: timing for timing in timings}
    rows = []
    for name, timing in found.items():
        call, rounds = timing.call, [round(ns, 1) for ns in timing.rounds]
        others = zip(_RATIOS, (EMPTY, PEER, call.repeated), strict=True)
        ratios = {
            column: round(timing.ratio(found[other]), 3) if other in found else None
            for column, other in others
        }
        row = {"call": name, "statement": call.statement, "is_peer": call.is_peer}
        rows.append(row | {"ns": round(timing.nanoseconds, 1)} | ratios | {"rounds": rounds})
    return rows


def _machine() -> dict[str, str]:
    """What the figures are of."""
    found = runtime.ensure_tvm_ffi()
    return {
        "fi_ffi": __version__,
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "cpu": _cpu(),
        "system": f"{platform.system()} {platform.machine()}",
        "libtvm_ffi": f"{'.'.join(map(str, tvm_ffi.tvm_ffi_version()))} ({found.origin})",
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _print(rows: list[dict[str, Any]], machine: str, peer: str) -> None:
    cells = [
        (row["call"], f"{row['ns']:,.0f}", *(_times(row[ratio]) for ratio in _RATIOS))
        for row in rows
    ]
    output.print_table(f"Host time of a call: {machine}", _COLUMNS, cells, numbers=_COLUMNS[1:])
    output.console().print(f"tvm_ffi: {peer}.", style="dim")


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}"


def _too_slow(
    rows: list[dict[str, Any]], most: float | None, most_of_repeated: float | None
) -> list[str]:
    """The ratios above what was asked for; times alone fail nothing."""
    wrong = []
    for row in rows:
        limits = [("of_repeated", most_of_repeated, "the repeated length")]
        if row["call"] == PREPARED:
            limits.append(("of_empty", most, f"the {EMPTY}"))
        for column, limit, other in limits:
            ratio = row[column]
            if limit is not None and ratio is not None and ratio > limit:
                wrong.append(f"{row['call']}: {ratio:.2f} times {other}, and {limit:g} is the most")
    return wrong


if __name__ == "__main__":
    sys.exit(main())
