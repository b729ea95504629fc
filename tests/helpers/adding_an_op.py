"""What docs/adding-an-op.md says, done in a copy of the repository."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from tests.helpers.children import ROOT

PAGE = ROOT / "docs" / "adding-an-op.md"
NAME = "mhc"
_FILE = re.compile(r"`(fi_ffi/[\w/]+\.py)`:\n\n<!-- [^>]* -->\n```python\n(.*?)```", re.DOTALL)
_KEPT = ("fi_ffi", "fi_ffi_build", "tests", "tools", "docs")
_KEPT += ("wheels.lock", "pyproject.toml", "README.md")


def files() -> dict[str, str]:
    """The files that the page shows, by their paths."""
    return dict(_FILE.findall(PAGE.read_text()))


def follow(folder: Path) -> Path:
    """A copy of the repository with what the page adds."""
    copy = folder / "copy"
    copy.mkdir()
    for name in _KEPT:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__", ".*")
            shutil.copytree(ROOT / name, copy / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, copy / name)
    for path, text in files().items():
        assert not (copy / path).exists(), f"{path} is there already"
        (copy / path).write_text(text)
    families = copy / "fi_ffi" / "families.py"
    text = families.read_text()
    families.write_text(text.replace("FAMILIES = (", f'FAMILIES = (\n    "{NAME}",', 1))
    assert families.read_text() != text
    run(copy, "tools/generate_stubs.py")
    for generator in sorted((copy / "tools").glob("generate_*.py")):
        run(copy, generator)
    return copy


def run(copy: Path, *arguments: str | Path) -> str:
    """Run Python in the copy; what it printed."""
    path = os.pathsep.join(filter(None, (str(copy), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": path}
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(
        command, cwd=copy, env=environment, text=True, check=False,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout
