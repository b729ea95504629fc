"""The pictures of the docs are what their script makes of their data."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="drawn by matplotlib: '.[docs]'"
)
# The page that shows each.
PAGES = {"decode-step": "README.md", "serve-load": "docs/performance.md"}
by_name = pytest.mark.parametrize("name", PAGES)


def test_every_picture_is_on_a_page() -> None:
    import plot

    assert {*plot.NAMES} == {*PAGES}


@by_name
def test_the_committed_picture_is_drawn_from_the_data(name) -> None:
    import matplotlib
    import plot

    committed = plot.target(name).read_text()
    if f"Matplotlib v{matplotlib.__version__}," not in committed:
        pytest.skip(f"matplotlib {matplotlib.__version__} did not draw the committed picture")
    assert plot.svg(plot.data(name)) == committed


@by_name
def test_the_picture_has_every_figure_and_its_page_the_words(name) -> None:
    import plot

    drawn, committed = plot.data(name), plot.target(name).read_text()
    for group in drawn["groups"]:
        for bar in group["bars"]:
            assert f">{plot.told(bar['value'])}  {bar['label']}</text>" in committed
    assert drawn["date"] in committed
    page = ROOT / PAGES[name]
    path = plot.target(name).relative_to(page.parent).as_posix()
    assert f"![{plot.alt(drawn)}]({path})" in page.read_text()


@by_name
def test_another_figure_is_another_picture(name) -> None:
    import plot

    drawn = plot.data(name)
    drawn["groups"][0]["bars"][0]["value"] += 1
    assert plot.svg(drawn) != plot.svg(plot.data(name))
