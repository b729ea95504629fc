"""docs/first-call.md names what runs from `rmsnorm` to the `dlopen` of a local kernel."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "first-call.md"


@pytest.mark.skipif(sys.version_info < (3, 11), reason="this Python does not know qualified names")
def test_the_page_is_what_runs(tmp_path: Path, built_wheel: Path) -> None:
    with zipfile.ZipFile(built_wheel) as archive:
        archive.extractall(tmp_path)
    folder = tmp_path / "flashinfer_jit_cache" / "jit_cache"
    tool = [sys.executable, ROOT / "tools" / "first_call.py", folder]
    done = subprocess.run(tool, stdout=subprocess.PIPE, text=True, check=True)
    assert done.stdout == PAGE.read_text(), "docs/first-call.md is stale: see tools/first_call.py"
