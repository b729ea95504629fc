"""Draw docs/decode-step.svg from tools/data/decode-step.toml: `python3 tools/plot_decode_step.py`.

Another target, `/tmp/decode-step.png` say, is drawn where it is named.  An SVG has a background of
its own, and colours for a light and for a dark one.
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
DATA = ROOT / "tools" / "data" / "decode-step.toml"
TARGET = ROOT / "docs" / "decode-step.svg"
PAPER, INK, OURS, THEIRS = "#ffffff", "#1f2328", "#2f7d3b", "#8c959f"
DARK = """
@media (prefers-color-scheme: dark) {
  #paper path { fill: #161b22 !important }
  text { fill: #e6edf3 !important }
  [id^="ours"] path { fill: #56b366 !important }
  [id^="theirs"] path { fill: #6e7681 !important }
}
"""


def data() -> dict[str, Any]:
    return tomllib.loads(DATA.read_text())


def figure(drawn: dict[str, Any]) -> Any:
    """Two bars a group; each group has a scale of its own, from zero."""
    from matplotlib.figure import Figure

    page = Figure(figsize=(7.6, 2.7), facecolor=PAPER)
    page.patch.set_gid("paper")
    page.text(0.03, 0.91, drawn["title"], color=INK, size=11, weight="bold")
    for place, group in enumerate(drawn["groups"]):
        axes = page.add_axes((0.03, 0.5 - 0.38 * place, 0.94, 0.27))
        axes.set_axis_off()
        axes.set_xlim(0, 1.9 * group["theirs"]["us"])
        axes.set_ylim(1.55, -0.55)
        page.text(0.03, 0.785 - 0.38 * place, group["title"], color=INK, size=9.5)
        for row, (side, colour) in enumerate((("ours", OURS), ("theirs", THEIRS))):
            bar = group[side]
            (patch,) = axes.barh(row, bar["us"], height=0.78, color=colour)
            patch.set_gid(f"{side}-{place}")
            words = f"{bar['us']:.1f}  {bar['label']}"
            weight = "bold" if side == "ours" else "normal"
            axes.annotate(
                words, (bar["us"], row), (5, 0), textcoords="offset points",
                color=INK, size=9, va="center", weight=weight,
            )  # fmt: skip
    foot = f"{drawn['machine']}\n{drawn['versions']}; {drawn['date']}"
    page.text(0.03, 0.02, foot, color=INK, size=7)
    return page


def alt(drawn: dict[str, Any]) -> str:
    """The picture in words."""
    groups = [
        f"{group['title']}: {group['ours']['us']} ({group['ours']['label']}), "
        f"{group['theirs']['us']} ({group['theirs']['label']})"
        for group in drawn["groups"]
    ]
    return f"{drawn['title']}. {'. '.join(groups)}."


def svg(drawn: dict[str, Any]) -> str:
    """The same text each time: no date, and names that are hashes of what they name."""
    out = io.StringIO()
    plain = {"svg.hashsalt": "decode-step", "svg.fonttype": "none", "font.family": "sans-serif"}
    with matplotlib.rc_context(plain):
        figure(drawn).savefig(out, format="svg", metadata={"Date": None, "Title": drawn["title"]})
    text = out.getvalue().replace("</style>", f"{DARK}</style>", 1)
    text = text.replace("<svg ", f'<svg role="img" aria-label="{alt(drawn)}" ', 1)
    return "\n".join(line.rstrip() for line in text.splitlines()) + "\n"


def main() -> None:
    target = Path(sys.argv[1]) if sys.argv[1:] else TARGET
    if target.suffix == ".svg":
        target.write_text(svg(data()))
    else:
        figure(data()).savefig(target, dpi=150)


if __name__ == "__main__":
    main()
