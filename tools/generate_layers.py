"""Draw docs/layers.svg, the layers of the package, from its imports; `--check` only compares.

A box stands above all that it imports.  An arrow is an import; one that longer arrows imply is left
out.  A dashed arrow is one of the exceptions: it runs up, and one function makes it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from generated import write_or_check  # noqa: E402

from tools import layers  # noqa: E402
from tools.drawing import arrow, picture, rect, words  # noqa: E402

TARGET = ROOT / "docs" / "layers.svg"
BOX, HEIGHT, GAP_X, GAP_Y, MARGIN = 118, 34, 22, 46, 26  # pixels
Graph = Mapping[str, set[str]]
Places = dict[str, tuple[float, float]]


def graph() -> tuple[Graph, Graph]:
    """Return what each layer imports of those below it, and the exceptions."""
    names = [layer.name for layer in layers.LAYERS]
    below: dict[str, set[str]] = {name: set() for name in names}
    above: dict[str, set[str]] = {name: set() for name in names}
    for each in layers.every():
        source, target = layers.layer_of(each.source), layers.layer_of(each.target)
        if target < source:
            below[names[source]].add(names[target])
        elif target > source and (each.source, each.function) in layers.EXCEPTIONS:
            above[names[source]].add(names[target])
    return below, above


def reduced(of: Graph) -> Graph:
    """Leave out each arrow that a longer way implies."""

    def reached(name: str) -> set[str]:
        return of[name].union(*map(reached, of[name]))

    return {
        name: {each for each in below if not any(each in reached(other) for other in below)}
        for name, below in of.items()
    }


def levels(of: Graph) -> dict[str, int]:
    """Return the row of each layer: one above the highest that it imports."""
    found: dict[str, int] = {}
    for layer in layers.LAYERS:
        found[layer.name] = 1 + max((found[name] for name in of[layer.name]), default=-1)
    return found


def places(of: Graph) -> Places:
    """Return the middle of each box: the core's to the left, the others near what they touch."""
    row, core = levels(of), {layer.name for layer in layers.LAYERS if layer.is_core}
    near = {name: of[name] | {up for up, below in of.items() if name in below} for name in of}
    column = dict.fromkeys(of, 0.0)
    rows = [[name for name in of if row[name] == number] for number in range(max(row.values()) + 1)]
    first = max(len(core.intersection(names)) for names in rows)
    widest = max(len(set(names) - core) for names in rows)
    for _ in range(20):
        for names in rows:
            inner = [name for name in names if name in core]
            outer = sorted(
                (name for name in names if name not in core),
                key=lambda name: sum(column[each] for each in near[name]) / max(len(near[name]), 1),
            )
            column |= {name: (first - len(inner)) / 2 + at for at, name in enumerate(inner)}
            start = first + 0.3 + (widest - len(outer)) / 2
            column |= {name: start + at for at, name in enumerate(outer)}
    top = max(row.values())
    return {
        name: (
            MARGIN + BOX / 2 + column[name] * (BOX + GAP_X),
            MARGIN + HEIGHT / 2 + (top - row[name]) * (HEIGHT + GAP_Y),
        )
        for name in of
    }


def arrows(of: Graph, where: Places, kind: str) -> Iterator[str]:
    """Draw arrows, from the lower edge of a box to the upper edge of another, or up again."""
    for source, targets in of.items():
        for target in sorted(targets):
            (x0, y0), (x1, y1) = where[source], where[target]
            down = 1 if y1 > y0 else -1
            if y1 == y0:
                edge, bend = y0 - HEIGHT / 2, y0 - HEIGHT / 2 - GAP_Y / 2
                ends = f"M{x0:g},{edge:g} C{x0:g},{bend:g} {x1:g},{bend:g} {x1:g},{edge - 4:g}"
            else:
                start, end = y0 + down * HEIGHT / 2, y1 - down * (HEIGHT / 2 + 4)
                bend = (end - start) / 2
                bends = f"C{x0:g},{start + bend:g} {x1:g},{end - bend:g}"
                ends = f"M{x0:g},{start:g} {bends} {x1:g},{end:g}"
            yield arrow(ends, kind)


def drawn() -> str:
    """Return the picture."""
    below, above = graph()
    where, core = places(below), [layer.name for layer in layers.LAYERS if layer.is_core]
    width = max(x for x, _ in where.values()) + BOX / 2 + MARGIN
    height = max(y for _, y in where.values()) + HEIGHT / 2 + MARGIN
    xs, ys = zip(*(where[name] for name in core), strict=True)
    left, upper = min(xs) - BOX / 2 - 12, min(ys) - HEIGHT / 2 - 30
    zone = max(xs) - min(xs) + BOX + 24, max(ys) - min(ys) + HEIGHT + 42
    lines = [
        rect(left, upper, *zone, "zone", 8),
        words(left + zone[0] / 2, upper + 18, "the core", "note"),
        *arrows(reduced(below), where, "arrow"),
        *arrows(above, where, "arrow up"),
    ]
    for name, (x, y) in where.items():
        kind = "box core" if name in core else "box"
        lines += [rect(x - BOX / 2, y - HEIGHT / 2, BOX, HEIGHT, kind), words(x, y + 5, name)]
    return picture("The layers of the package and their imports", width, height, lines)


if __name__ == "__main__":
    raise SystemExit(write_or_check(TARGET, drawn(), __file__))
