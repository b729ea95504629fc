"""`fi-ffi bench`: what the host does for a call, measured with a kernel that does nothing."""

from __future__ import annotations

import csv
import importlib
import platform
from pathlib import Path
from types import ModuleType
from typing import Any

import click

from fi_ffi import __version__
from fi_ffi.cli import output
from fi_ffi.cli.benching.calls import EMPTY, PEER, PREPARED, find_peer, own_calls, peer_calls
from fi_ffi.cli.benching.noop_kernel import kernels_replaced, noop
from fi_ffi.cli.benching.timing import Timing, measure
from fi_ffi.errors import FiFfiError
from fi_ffi.loader import runtime

# The ratios to other calls, and which calls those are.
_RATIOS = ("of_empty", "of_tvm_ffi", "of_repeated")
_COLUMNS = ("call", "ns", *(name.replace("_", " ", 1) for name in _RATIOS))
_GPU = (
    "give --cpu: the host's part of a call, on any machine. On a GPU machine "
    "benchmarks/host.py measures calls of kernels, beside the packages that are installed there"
)
_File = click.Path(dir_okay=False, writable=True, path_type=Path)


@click.command()
@click.option("--cpu", "is_cpu", is_flag=True, help="Measure the host's part; needs no GPU.")
@click.option("--rounds", default=251, show_default=True, type=click.IntRange(1, 10_000))
@click.option("--calls", default=200, show_default=True, type=click.IntRange(1, 1_000_000))
@click.option(
    "--fail-above",
    type=click.FloatRange(1),
    metavar="FACTOR",
    help=f"Fail if the {PREPARED}, takes more than FACTOR times the {EMPTY}.",
)
@click.option(
    "--fail-above-repeated",
    type=click.FloatRange(1),
    metavar="FACTOR",
    help="Fail if calls of other lengths take more than FACTOR times those that repeat a length.",
)
@click.option("--csv", "csv_file", type=_File, help="Write the table as CSV.")
@click.option("--plot", "plot_file", type=_File, help="Draw it (.png, .svg, .pdf); matplotlib.")
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON.")
def bench(
    is_cpu: bool, rounds: int, calls: int, fail_above: float | None,
    fail_above_repeated: float | None, csv_file: Path | None, plot_file: Path | None,
    as_json: bool,
) -> None:  # fmt: skip
    """Measure what fi_ffi's calls take of the host, with a kernel entry that does nothing.

    Calls take turns, --calls of each in every round. Figures are nanoseconds of the processor
    a call, medians over --rounds. Ratios are medians of each round's: to a call of cffi alone;
    where apache-tvm-ffi is installed, to its Cython call of the same entry; and of calls with
    another length each time, to those that repeat a length.

    Before it is timed a way of calling is checked twice: with a kernel that has results, against
    float64, and by what an entry is given. What fails is not shown.
    """
    if not is_cpu:
        raise click.UsageError(_GPU)
    pyplot = None if plot_file is None else _pyplot()
    peer = find_peer()
    runtime.ensure_tvm_ffi()
    every = own_calls() + (peer_calls(peer.module) if peer.module else [])
    wrong = {call.name: problem for call in every if (problem := call.problem()) is not None}
    with kernels_replaced(noop):
        timings = measure([call for call in every if call.name not in wrong], rounds, calls)
    rows = _rows(timings)
    machine = _machine()
    document = {
        "machine": machine, "peer": peer.told, "rounds": rounds, "calls": calls,
        "results": rows, "not_shown": wrong,
    }  # fmt: skip
    if as_json:
        output.print_json(document)
    else:
        _print(rows, f"{machine['python']}, {machine['cpu']}, {rounds} x {calls} calls", peer.told)
    if csv_file is not None:
        _write_csv(csv_file, rows)
    if plot_file is not None and pyplot is not None:
        _draw(pyplot, plot_file, rows, machine["cpu"])
    if wrong:
        told = "\n".join(f"  {name}: {problem}" for name, problem in wrong.items())
        raise FiFfiError(f"not shown, because a check failed:\n{told}")
    _check_ratios(rows, fail_above, fail_above_repeated)


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
        "libtvm_ffi": f"{'.'.join(map(str, runtime.tvm_ffi_version()))} ({found.origin})",
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


def _check_ratios(
    rows: list[dict[str, Any]], most: float | None, most_of_repeated: float | None
) -> None:
    """Raise where a ratio is above what was asked for; times alone fail nothing."""
    wrong = []
    for row in rows:
        limits = [("of_repeated", most_of_repeated, "the repeated length")]
        if row["call"] == PREPARED:
            limits.append(("of_empty", most, f"the {EMPTY}"))
        for column, limit, other in limits:
            ratio = row[column]
            if limit is not None and ratio is not None and ratio > limit:
                wrong.append(f"{row['call']}: {ratio:.2f} times {other}, and {limit:g} is the most")
    if wrong:
        raise FiFfiError("\n".join(wrong))


def _write_csv(file: Path, rows: list[dict[str, Any]]) -> None:
    names = ("call", "ns", *_RATIOS)
    with file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, names, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _pyplot() -> ModuleType:
    """matplotlib, asked for before anything is measured."""
    try:
        matplotlib = importlib.import_module("matplotlib")
        matplotlib.use("agg")
        return importlib.import_module("matplotlib.pyplot")
    except ImportError as error:
        raise FiFfiError(
            f"--plot needs matplotlib: pip install 'fi-ffi[bench]' ({error})"
        ) from error


def _draw(pyplot: Any, file: Path, rows: list[dict[str, Any]], cpu: str) -> None:
    figure, axes = pyplot.subplots(figsize=(9, 0.4 * len(rows) + 1.2), layout="constrained")
    colours = ["tab:gray" if row["is_peer"] else "tab:blue" for row in rows]
    bars = axes.barh([row["call"] for row in rows], [row["ns"] for row in rows], color=colours)
    axes.bar_label(bars, fmt="{:,.0f}", padding=3)
    axes.margins(x=0.1)  # room for the figures
    axes.invert_yaxis()
    axes.set(xlabel="ns a call", title=f"Host time of a call: {cpu}")
    try:
        figure.savefig(file)
    except ValueError as error:  # a format that is not drawn
        raise FiFfiError(f"{file}: {error}") from error
