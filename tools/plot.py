"""Draw the pictures of the docs, docs/NAME.svg from tools/data/NAME.toml: `python3 tools/plot.py`.

With a NAME and a file, `serve-load /tmp/serve-load.png` say, that picture is drawn there.  An SVG
has a background of its own, and colours for a light and for a dark one.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import matplotlib

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("decode-step", "serve-load")
PAPER, INK, OURS, THEIRS = "#ffffff", "#1f2328", "#2f7d3b", "#8c959f"
DARK = """
@media (prefers-color-scheme: dark) {
  #paper path { fill: #161b22 !important }
  text { fill: #e6edf3 !important }
  [id^="ours"] path { fill: #56b366 !important }
  [id^="theirs"] path { fill: #6e7681 !important }
}
"""
WIDTH, MARGIN, BAR = 5.8, 0.23, 0.31  # inches
TITLE, HEADING, FOOT = 0.48, 0.29, 0.42  # of the page, of a group, and the machine's


def data(name: str) -> dict[str, Any]:
    return tomllib.loads((ROOT / "tools" / "data" / f"{name}.toml").read_text())


def target(name: str) -> Path:
    return ROOT / "docs" / f"{name}.svg"


def told(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def figure(drawn: dict[str, Any]) -> Any:
    """A group below another, a bar for each of its values; the first bar is ours.

    Each group has a scale of its own, from zero.
    """
    from matplotlib.figure import Figure

    counts = [len(group["bars"]) for group in drawn["groups"]]
    height = TITLE + sum(HEADING + BAR * count + MARGIN for count in counts) + FOOT
    page = Figure(figsize=(WIDTH, height), facecolor=PAPER)
    page.patch.set_gid("paper")
    page.text(0.03, 1 - 0.27 / height, drawn["title"], color=INK, size=11, weight="bold")
    top = height - TITLE
    for place, group in enumerate(drawn["groups"]):
        bars = group["bars"]
        page.text(0.03, (top - 0.2) / height, group["title"], color=INK, size=9.5)
        bottom = top - HEADING - BAR * len(bars)
        axes = page.add_axes((0.03, bottom / height, 0.94, BAR * len(bars) / height))
        axes.set_axis_off()
        axes.set_xlim(0, 2.3 * max(bar["value"] for bar in bars))
        axes.set_ylim(len(bars) - 0.5, -0.5)
        for row, bar in enumerate(bars):
            side, colour = ("theirs", THEIRS) if row else ("ours", OURS)
            (patch,) = axes.barh(row, bar["value"], height=0.78, color=colour)
            patch.set_gid(f"{side}-{place}-{row}")
            axes.annotate(
                f"{told(bar['value'])}  {bar['label']}", (bar["value"], row), (5, 0),
                textcoords="offset points", color=INK, size=9, va="center",
                weight="normal" if row else "bold",
            )  # fmt: skip
        top = bottom - MARGIN
    foot = f"{drawn['machine']}\n{drawn['versions']}; {drawn['date']}"
    page.text(0.03, 0.05 / height, foot, color=INK, size=7)
    return page


def alt(drawn: dict[str, Any]) -> str:
    """Return a sentence with the picture's figures, for the page that shows it."""
    groups = []
    for group in drawn["groups"]:
        values = " / ".join(told(bar["value"]) for bar in group["bars"])
        groups.append(f"{group['alt']} {values}")
    return f"{drawn['alt']}: {', '.join(groups)}."


def label(drawn: dict[str, Any]) -> str:
    """Return the picture in words."""
    groups = []
    for group in drawn["groups"]:
        bars = [f"{told(bar['value'])} ({bar['label']})" for bar in group["bars"]]
        groups.append(f"{group['title']}: {', '.join(bars)}")
    return f"{drawn['title']}. {'. '.join(groups)}."


def svg(drawn: dict[str, Any]) -> str:
    """The same text each time: no date, and names that are hashes of what they name."""
    out = io.StringIO()
    plain = {"svg.hashsalt": "picture", "svg.fonttype": "none", "font.family": "sans-serif"}
    with matplotlib.rc_context(plain):
        figure(drawn).savefig(out, format="svg", metadata={"Date": None, "Title": drawn["title"]})
    text = out.getvalue().replace("</style>", f"{DARK}</style>", 1)
    text = text.replace("<svg ", f'<svg role="img" aria-label="{label(drawn)}" ', 1)
    return "\n".join(line.rstrip() for line in text.splitlines()) + "\n"


def main() -> None:
    if sys.argv[1:]:
        name, file = sys.argv[1:]
        figure(data(name)).savefig(file, dpi=150)
        return
    for name in NAMES:
        target(name).write_text(svg(data(name)))


if __name__ == "__main__":
    main()
