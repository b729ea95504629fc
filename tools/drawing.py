"""What the drawn pictures of docs/ share: a style for a light and a dark page, boxes, arrows."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

STYLE = """
text { font: 14px system-ui, sans-serif; fill: #1f2328; text-anchor: middle }
.left { text-anchor: start } .note { font-size: 12px; fill: #59636e }
.code { font-family: ui-monospace, monospace; font-size: 12px }
.paper { fill: #ffffff } .zone { fill: #eaf3ec; stroke: #2f7d3b }
.box { fill: #ffffff; stroke: #59636e } .core { stroke: #2f7d3b; stroke-width: 1.5 }
.full { fill: #cfe8d4; stroke: #2f7d3b } .other { fill: #fbe3c8; stroke: #b35900 }
.arrow { fill: none; stroke: #8c959f } .up { stroke: #b35900; stroke-dasharray: 5 4 }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 } .note { fill: #9198a1 } .paper { fill: #161b22 }
  .zone { fill: #12261a; stroke: #56b366 } .box { fill: #161b22; stroke: #9198a1 }
  .full { fill: #1d4428; stroke: #56b366 } .other { fill: #4a2d10; stroke: #f0883e }
  .core { stroke: #56b366 } .arrow { stroke: #6e7681 } .up { stroke: #f0883e }
}
"""
_HEAD = (
    '<marker id="head" viewBox="0 0 8 8" refX="4" refY="4" markerWidth="7" markerHeight="7" '
    'orient="auto"><path d="M0,0 L8,4 L0,8 z" fill="#8c959f"/></marker>'
)


def rect(x: float, y: float, width: float, height: float, kind: str = "box", rx: int = 5) -> str:
    size = f'width="{width:g}" height="{height:g}"'
    return f'<rect class="{kind}" x="{x:g}" y="{y:g}" {size} rx="{rx}"/>'


def words(x: float, y: float, text: object, kind: str = "") -> str:
    of = f' class="{kind}"' if kind else ""
    return f'<text{of} x="{x:g}" y="{y:g}">{escape(str(text))}</text>'


def arrow(path: str, kind: str = "arrow") -> str:
    return f'<path class="{kind}" d="{path}" marker-end="url(#head)"/>'


def picture(title: str, width: float, height: float, lines: Sequence[str]) -> str:
    """The whole file, with a background of its own."""
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" role="img">',
        f"<title>{escape(title)}</title>",
        f"<style>{STYLE}</style>",
        _HEAD,
        f'<rect class="paper" width="{width:g}" height="{height:g}"/>',
        *lines,
        "</svg>\n",
    ])  # fmt: skip
