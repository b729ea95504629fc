"""Programs in processes of their own: what they print, how they end, what they leave."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def environment(**more: str) -> dict[str, str]:
    """This process's, with the repository on the path."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), **more}


def start(program: str, *arguments: str, python: str = sys.executable, **more: str):
    """A program's text as a process; what it prints comes through pipes."""
    return subprocess.Popen(
        [python, "-c", textwrap.dedent(program), *arguments],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=environment(**more),
    )  # fmt: skip


def done(
    program: str, *arguments: str, python: str = sys.executable, seconds: float = 120, **more: str
) -> tuple[int, str, str]:
    """Its exit status, stdout and stderr."""
    child = start(program, *arguments, python=python, **more)
    try:
        out, err = child.communicate(timeout=seconds)
    finally:
        child.kill()
        child.wait()
    return child.returncode, out, err
