"""The README's picture is what its script makes of its data."""

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


def test_the_committed_picture_is_drawn_from_the_data() -> None:
    import matplotlib
    import plot_decode_step as plot

    committed = plot.TARGET.read_text()
    if f"Matplotlib v{matplotlib.__version__}," not in committed:
        pytest.skip(f"matplotlib {matplotlib.__version__} did not draw the committed picture")
    assert plot.svg(plot.data()) == committed


def test_the_picture_has_every_figure_and_the_readme_its_words() -> None:
    import plot_decode_step as plot

    drawn, committed = plot.data(), plot.TARGET.read_text()
    for group in drawn["groups"]:
        for bar in (group["ours"], group["theirs"]):
            assert f">{bar['us']:.1f}  {bar['label']}</text>" in committed
    assert drawn["date"] in committed
    assert f"![{plot.alt(drawn)}](docs/decode-step.svg)" in (ROOT / "README.md").read_text()


def test_another_figure_is_another_picture() -> None:
    import plot_decode_step as plot

    drawn = plot.data()
    drawn["groups"][0]["ours"]["us"] += 1
    assert plot.svg(drawn) != plot.svg(plot.data())
