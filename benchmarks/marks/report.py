"""The table of figures and marks: printed, and as JSON, CSV and a plot."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from marks.timing import Figure


@dataclass(frozen=True)
class Mark:
    """What a ratio to the peer must be, and our own figure (`most_ns`) or memory (`most_bytes`);
    None where there is no such limit."""

    row: str
    what: str
    peer: str
    most: float | None = None
    least: float = 0.0
    most_ns: float | None = None
    most_bytes: int | None = None
    # How the limits that are no ratio are told.
    told: str = ""

    def __str__(self) -> str:
        ratio = ""
        if self.most is not None:
            ratio = f"{self.most:.2f}" if self.most >= 0.1 else f"{self.most:.3f}"
            ratio = f"{self.least:.2f} to {ratio}" if self.least else f"≤ {ratio}"
        return ", ".join(filter(None, (ratio, self.told)))

    def is_met(self, mine: float, ratio: float | None, grown_bytes: int | None) -> bool:
        """Whether every limit holds; one whose figure is missing does not."""
        limits = (ratio, self.most), (mine, self.most_ns), (grown_bytes, self.most_bytes)
        in_limits = all(
            limit is None or (value is not None and value <= limit) for value, limit in limits
        )
        return in_limits and (not self.least or (ratio is not None and self.least <= ratio))


@dataclass(frozen=True)
class Line:
    """Two figures beside each other; `key` names its mark, "" for one that has none.

    `what` is taken from the mark where there is one.  `grown_bytes` is how much the resident
    set of the process grew.
    """

    key: str
    mine: Figure
    theirs: Figure | None = None
    what: str = ""
    grown_bytes: int | None = None


@dataclass(frozen=True)
class Entry:
    """A line of the table: figures, or the reason why there are none."""

    row: str
    what: str
    peer: str = ""
    fi_ffi_ns: float | None = None
    peer_ns: float | None = None
    ratio: float | None = None
    grown_bytes: int | None = None
    mark: str = ""
    most: float | None = None
    met: bool | None = None
    status: str = "ok"
    fi_ffi_rounds: tuple[float, ...] = ()
    peer_rounds: tuple[float, ...] = ()


def entry(row: str, line: Line, marks: Mapping[str, Mark]) -> Entry:
    """A line, held against its mark."""
    mark = marks[line.key] if line.key else None
    mine, theirs = line.mine, line.theirs
    ratio = mine.median / theirs.median if theirs else None
    return Entry(
        row,
        mark.what if mark else line.what,
        theirs.name if theirs else "",
        mine.median,
        theirs.median if theirs else None,
        ratio,
        line.grown_bytes,
        str(mark or ""),
        mark.most if mark else None,
        mark.is_met(mine.median, ratio, line.grown_bytes) if mark else None,
        fi_ffi_rounds=mine.rounds,
        peer_rounds=theirs.rounds if theirs else (),
    )


def without_figures(mark: Mark, status: str) -> Entry:
    """A mark's line, where nothing was measured."""
    return Entry(mark.row, mark.what, mark.peer, mark=str(mark), most=mark.most, status=status)


HEADER = (
    "| what | fi_ffi ns | peer | peer ns | ratio | mark | met |\n|---|---:|---|---:|---:|---|---|"
)


def shown(entry: Entry) -> str:
    """A line of the table in Markdown."""

    def number(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    met = {None: "", True: "yes", False: "NO"}[entry.met]
    if entry.grown_bytes is not None:
        met += f" ({entry.grown_bytes / 1e6:.1f} MB)"
    cells = (
        entry.what, number(entry.fi_ffi_ns, ",.0f"), entry.peer, number(entry.peer_ns, ",.0f"),
        number(entry.ratio, ".3f"), entry.mark, met if entry.status == "ok" else entry.status,
    )  # fmt: skip
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def write(folder: Path, about: Mapping[str, Any], entries: Iterable[Entry]) -> list[Path]:
    """JSON (with every round), CSV, the table and, with matplotlib, a plot; what was written."""
    listed = list(entries)
    table, values, lines = (folder / f"host.{kind}" for kind in ("md", "json", "csv"))
    text = "\n".join([_told(about), "", HEADER, *map(shown, listed)])
    table.write_text(text + "\n")
    document = {"about": about, "entries": [asdict(one) for one in listed]}
    values.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")
    names = [name for name in Entry.__dataclass_fields__ if not name.endswith("_rounds")]
    with lines.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        writer.writerows([getattr(one, name) for name in names] for one in listed)
    plot = _plot(folder / "host.png", about, listed)
    return [table, values, lines, *([plot] if plot else [])]


def _told(about: Mapping[str, Any]) -> str:
    return "\n".join(f"- {name}: {value}" for name, value in about.items())


def _plot(path: Path, about: Mapping[str, Any], entries: list[Entry]) -> Path | None:
    """Ratios as bars, marks as ticks across them; None without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawn = [one for one in reversed(entries) if one.ratio is not None]
    if not drawn:
        return None
    figure, axes = pyplot.subplots(figsize=(10, 1 + 0.42 * len(drawn)), layout="constrained")
    colours = {None: "tab:gray", True: "tab:green", False: "tab:red"}
    axes.barh(range(len(drawn)), [one.ratio for one in drawn],
              color=[colours[one.met] for one in drawn])  # fmt: skip
    for at, one in enumerate(drawn):
        axes.text(one.ratio, at, f" {one.ratio:.3f}", va="center", fontsize=7)
        if one.most is not None:
            axes.plot([one.most] * 2, [at - 0.45, at + 0.45], color="black", linewidth=2)
    axes.axvline(1.0, color="black", linewidth=0.5, linestyle=":")
    names = [f"{one.what}\n/ {one.peer}" for one in drawn]
    axes.set_yticks(range(len(drawn)), names, fontsize=6)
    axes.set_xscale("log")
    axes.set_xlim(right=2 * max(one.ratio for one in drawn))
    axes.set_xlabel("time, fi_ffi / peer (black: the mark; grey: no mark)")
    axes.set_title(str(about.get("gpu", "")), fontsize=9)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return path
