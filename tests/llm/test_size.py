"""How large the example is: what it is given to do more has to make room for itself."""

from __future__ import annotations

from pathlib import Path

ENGINE = Path(__file__).parents[2] / "examples" / "llm"
MOST = 6500  # lines; only ever lowered


def test_lines():
    """Without the maker of tiny checkpoints."""
    files = [file for file in ENGINE.rglob("*.py") if file.name != "tiny.py"]
    assert sum(len(file.read_text().splitlines()) for file in files) <= MOST
