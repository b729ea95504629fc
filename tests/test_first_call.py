"""docs/first-call.md names what runs from `rmsnorm` to the `dlopen` of a local kernel."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "first-call.md"


@pytest.mark.skipif(sys.version_info < (3, 11), reason="this Python does not know qualified names")
def test_the_page_is_what_runs(built_wheel: Path) -> None:
    tool = [sys.executable, ROOT / "tools" / "first_call.py", built_wheel]
    done = subprocess.run(tool, stdout=subprocess.PIPE, text=True, check=True)
    assert done.stdout == PAGE.read_text(), "docs/first-call.md is stale: see tools/first_call.py"
