"""The C program of examples/interop, built by the lines of its own README."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.helpers import sampling

FOLDER = Path(__file__).parents[2] / "examples" / "interop" / "c_program"
FIRST, WITH_CUDA = 0, 1  # the README's blocks
_LEAST = "#include <Python.h>\nint main(void) { Py_Initialize(); return Py_FinalizeEx(); }\n"


def lines(block: int) -> str:
    """A block of the README, as a reader would paste it."""
    return re.findall(r"^```sh\n(.*?)^```$", (FOLDER / "README.md").read_text(), re.M | re.S)[block]


def environment(folder: Path) -> dict[str, str]:
    """One in which `python3` and `python3-config` are those of this interpreter."""
    tools = folder / "bin"
    tools.mkdir()
    version = sysconfig.get_python_version()
    config = Path(sysconfig.get_config_var("BINDIR"), f"python{version}-config")
    if not config.exists():
        pytest.skip(f"{config} is not there: it comes with Python's headers")
    for name, target in (("python3", sys.executable), ("python3-config", config)):
        (tools / name).write_text(f'#!/bin/sh\nexec "{target}" "$@"\n')
        (tools / name).chmod(0o755)
    given = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    return {
        **os.environ,
        "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(map(os.path.abspath, given)),
    }


def run(script: str, folder: Path, **more: str) -> subprocess.CompletedProcess[str]:
    """A script in a copy of the folder, which it may change before."""
    if not (folder / "main.c").exists():
        shutil.copytree(FOLDER, folder, dirs_exist_ok=True)
    return subprocess.run(
        ["bash", "-euc", script], cwd=folder, env={**_known(folder), **more},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def _known(folder: Path) -> dict[str, str]:
    """The environment, once it is known that an embedded Python can be built and run at all."""
    sampling.only_in_full("compiles a program")
    if shutil.which("cc") is None:
        pytest.skip("there is no C compiler")
    if not (folder / "bin").exists():
        env = environment(folder)
        (folder / "least.c").write_text(_LEAST)
        flags = "$(python3-config --includes) $(python3-config --embed --ldflags)"
        done = subprocess.run(
            ["bash", "-euc", f"cc least.c -o least {flags} && ./least"],
            cwd=folder, env=env, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        if done.returncode:
            last = (done.stderr.strip() or "no reason told").splitlines()[-1]
            pytest.skip(f"an embedded Python cannot be built here: {last}")
        _environments[folder] = env
    return _environments[folder]


_environments: dict[Path, dict[str, str]] = {}
