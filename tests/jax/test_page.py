"""The programs of docs/howto/jax.md, one after the other."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "docs" / "howto" / "jax.md"


def test_the_page_runs(capsys):
    names: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL):
        exec(block, names)
    assert capsys.readouterr().out.split("\n") == ["(4, 512)", "(2, 4, 64)", ""]
