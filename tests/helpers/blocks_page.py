"""One page's blocks in a process of their own: shared by the tests of both kinds of machines."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.helpers.blocks import ROOT

LIMIT = 1800  # seconds, for a page with long blocks
_LINKED = ("examples", "tools")
_COMMAND = """#!/bin/sh
exec {python} -c 'from fi_ffi.cli import main; main()' "$@"
"""


def run_page(page: Path, folder: Path, *options: str, **environment: str) -> str:
    """What became of each block; fails where one is wrong."""
    work = folder / "work"
    work.mkdir()
    for name in _LINKED:
        (work / name).symlink_to(ROOT / name)
    done = subprocess.run(
        [sys.executable, "-m", "tests.helpers.blocks_run", str(page), *options],
        cwd=work, env=_environment(folder) | environment, text=True, check=False,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=LIMIT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    return done.stdout


def _environment(folder: Path) -> dict[str, str]:
    """This process's, without fi_ffi's variables, and with this Python's commands first."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("FI_FFI_")}
    commands = folder / "bin"
    commands.mkdir()
    here = Path(sys.executable).parent
    if not (here / "fi-ffi").exists():
        (commands / "fi-ffi").write_text(_COMMAND.format(python=sys.executable))
        (commands / "fi-ffi").chmod(0o755)
    for name in ("python", "python3"):
        if shutil.which(name, path=str(here)) is None:
            (commands / name).symlink_to(sys.executable)
    first = f"{here}{os.pathsep}{commands}{os.pathsep}"
    source = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return kept | {"PATH": first + os.environ["PATH"], "PYTHONPATH": source}
