"""The sdist and the wheel, and environments that have nothing else."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
MINORS = (10, 11, 12, 13)
_BUILD = """
import sys, hatchling.build as hook
print(getattr(hook, "build_" + sys.argv[1])(sys.argv[2]))
"""


def run(*command: object, cwd: Path | None = None, **environment: str) -> str:
    """What a command prints; with what it said where it fails."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("FI_FFI_", "PYTHON"))}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env={**clean, **environment},
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout.strip()


def build(kind: str, source: Path, folder: Path, backend: Path) -> Path:
    """As a build frontend does it, in a process of its own: "sdist" or "wheel"."""
    name = run(sys.executable, "-c", _BUILD, kind, folder, cwd=source, PYTHONPATH=str(backend))
    return folder / name.splitlines()[-1]


def source_tree(folder: Path) -> Path:
    """What a checkout has, without what others leave in it."""
    kept = ["fi_ffi", "tests", "examples", "docs", "tools"]
    for name in kept:
        ignore = shutil.ignore_patterns("__pycache__", ".*")
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE", "SECURITY.md", "wheels.lock"):
        shutil.copy(ROOT / name, folder)
    return folder


def pythons() -> dict[int, Path]:
    """An interpreter for each minor version that this machine has one for."""
    found = {sys.version_info.minor: Path(sys.executable)}
    for minor in MINORS:
        places = [shutil.which(f"python3.{minor}")]
        places += sorted(Path.home().glob(f".pyenv/versions/3.{minor}.*/bin/python"))
        for place in filter(None, places):
            done = subprocess.run(
                [place, "-c", "import sys, venv, ensurepip; print(sys.version_info.minor)"],
                capture_output=True, text=True,
            )  # fmt: skip
            if done.stdout.strip() == str(minor):
                found.setdefault(minor, Path(place))
    return {minor: found[minor] for minor in MINORS if minor in found}


def megabytes(size: int) -> float:
    return round(size / 1e6, 1)


@dataclass(frozen=True)
class Bare:
    """A virtual environment with pip in it, and a home of its own."""

    root: Path

    @property
    def python(self) -> Path:
        return self.root / "venv" / "bin" / "python"

    @property
    def site(self) -> Path:
        return next((self.root / "venv").glob("lib/python3.*/site-packages"))

    @property
    def command(self) -> Path:
        return self.python.with_name("fi-ffi")

    @property
    def environment(self) -> dict[str, str]:
        return {"HOME": str(self.root / "home"), "XDG_CACHE_HOME": str(self.root / "cache")}

    @classmethod
    def make(cls, root: Path, python: Path) -> Bare:
        # Not of a virtual environment: the new one would have its packages' parent.
        base = run(python, "-c", "import sys; print(sys._base_executable)")
        run(base, "-m", "venv", root / "venv")
        (root / "home").mkdir()
        return cls(root)

    def __call__(self, *arguments: object) -> str:
        """Run this environment's Python."""
        return run(self.python, *arguments, cwd=self.root / "home", **self.environment)

    def install(self, wheel: Path) -> dict[str, float]:
        """Megabytes downloaded for each package; it is installed from these files alone."""
        files = self.root / "files"
        self("-m", "pip", "download", "-q", "--dest", files, wheel)
        offline = ("--no-index", "--find-links", files, "--no-compile")
        self("-m", "pip", "install", "-q", *offline, wheel)
        sizes = {path.name.partition("-")[0]: path.stat().st_size for path in files.iterdir()}
        shutil.rmtree(files)
        return {name: megabytes(sizes[name]) for name in sorted(sizes, key=lambda n: -sizes[n])}

    def files(self) -> set[str]:
        """Every file of the environment, without bytecode."""
        return {
            str(path.relative_to(self.root))
            for path in self.root.rglob("*")
            if path.is_file() and "__pycache__" not in path.parts
        }

    def sizes(self) -> dict[str, float]:
        """Megabytes that each installed distribution takes, without bytecode."""
        program = (
            "import importlib.metadata as m\n"
            "for d in m.distributions():\n"
            "    files = [d.locate_file(f) for f in d.files or () if f.suffix != '.pyc']\n"
            "    print(d.name, sum(f.stat().st_size for f in files if f.is_file()))\n"
        )
        pairs = [line.split() for line in self("-c", program).splitlines()]
        return {
            name: megabytes(int(size)) for name, size in sorted(pairs, key=lambda p: -int(p[1]))
        }


def members(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}
