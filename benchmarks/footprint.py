"""What installing and importing fi_ffi takes, beside the packages of docs/comparison.md.

    python3 benchmarks/footprint.py FOLDER [--json FILE] [--rounds 15] [--torch torch==2.13.0]

Each side gets a virtual environment of its own in FOLDER, made anew, from wheels that are
fetched (or, for fi_ffi, made) first: their bytes are the download.  Then each side's import
runs in fresh processes that take turns, after one that is not counted and writes bytecode.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
import venv
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_INSTALLERS = ("pip", "setuptools")  # in a new environment already


@dataclass(frozen=True)
class Side:
    """A package: what pip installs for it, and the statement that is timed."""

    name: str
    requirements: tuple[str, ...]
    statement: str


@dataclass(frozen=True)
class Footprint:
    """What was measured of a side; bytes and milliseconds."""

    name: str
    version: str
    packages: int
    download: int
    installed: int
    import_ms: float
    import_low: float
    import_high: float


def sides(torch: str) -> list[Side]:
    """The sides, with the releases that docs/comparison.md speaks of."""
    return [
        Side("fi-ffi", (str(ROOT),), "import fi_ffi"),
        Side("flashinfer-python", ("flashinfer-python==0.6.13", torch), "import flashinfer"),
        Side("apache-tvm-ffi", ("apache-tvm-ffi",), "import tvm_ffi"),
        Side("jax-tvm-ffi", ("jax-tvm-ffi",), "import jax_tvm_ffi"),
    ]


def run(command: list[str]) -> str:
    """A command's output; its last words where it fails."""
    done = subprocess.run(
        command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
    )
    if done.returncode:
        sys.exit(f"{' '.join(command)}:\n{done.stdout[-2000:]}")
    return done.stdout


def install(side: Side, folder: Path) -> tuple[Path, int]:
    """A new environment with the side in it, and the bytes of its wheels."""
    wheels, environment = folder / f"wheels-{side.name}", folder / f"env-{side.name}"
    shutil.rmtree(wheels, ignore_errors=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    run([*pip, "wheel", "-q", "-w", str(wheels), *side.requirements])
    venv.create(environment, clear=True, with_pip=True)
    python = environment / "bin" / "python"
    files = sorted(wheels.glob("*.whl"))
    run([str(python), "-m", "pip", "install", "-q", "--no-deps", "--no-index", *map(str, files)])
    return python, sum(file.stat().st_size for file in files)


def installed(python: Path, name: str) -> tuple[str, int, int]:
    """Its version, the packages in the environment, and their bytes on disk without bytecode."""
    (site,) = python.parent.parent.glob("lib/python3*/site-packages")
    listed = json.loads(run([str(python), "-m", "pip", "list", "--format", "json"]))
    versions = {p["name"].replace("_", "-"): p["version"] for p in listed}
    found = [file for file in site.rglob("*") if file.suffix != ".pyc" and not file.is_symlink()]
    ours = [f for f in found if f.relative_to(site).parts[0].split("-")[0] not in _INSTALLERS]
    size = sum(file.stat().st_size for file in ours if file.is_file())
    return versions[name], len(versions.keys() - {*_INSTALLERS}), size


def imported(python: Path, statement: str) -> float:
    """Wall milliseconds of a process that runs the statement, or nothing."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    begun = time.perf_counter()
    subprocess.run(
        [str(python), "-c", statement], check=True, env=environment, cwd="/",
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    return (time.perf_counter() - begun) * 1000


def timed(
    pythons: dict[str, tuple[Path, str]], rounds: int
) -> tuple[dict[str, list[float]], list[float]]:
    """Each side's processes, taking turns; and those of an interpreter alone."""
    found: dict[str, list[float]] = {name: [] for name in pythons}
    alone = []
    for turn in range(rounds + 1):
        bare = imported(next(iter(pythons.values()))[0], "")
        for name, (python, statement) in pythons.items():
            took = imported(python, statement)
            if turn:
                found[name].append(took)
        if turn:
            alone.append(bare)
    return found, alone


def table(rows: list[Footprint], bare: float) -> str:
    """The figures as docs/comparison.md has them."""
    lines = [
        "| | packages | download | on disk | import, whole process |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        mb = [f"{size / 1e6:,.1f} MB" for size in (row.download, row.installed)]
        lines.append(
            f"| {row.name} {row.version} | {row.packages} | {mb[0]} | {mb[1]} "
            f"| {row.import_ms:,.0f} ms ({row.import_low:,.0f} to {row.import_high:,.0f}) |"
        )
    return "\n".join([*lines, f"| the interpreter alone | | | | {bare:,.0f} ms |"])


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--json", type=Path, help="the figures for programs")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--torch", default="torch==2.13.0", help="for flashinfer-python")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    pythons, sizes = {}, {}
    for side in sides(given.torch):
        print(f"installing {side.name}", file=sys.stderr)
        python, download = install(side, given.folder.resolve())
        pythons[side.name] = (python, side.statement)
        sizes[side.name] = (download, installed(python, side.name))
    times, alone = timed(pythons, given.rounds)
    rows = []
    for name, (download, (version, packages, size)) in sizes.items():
        took = times[name]
        middle = statistics.median(took)
        rows.append(
            Footprint(name, version, packages, download, size, middle, min(took), max(took))
        )
    bare = statistics.median(alone)
    print(f"Python {platform.python_version()}, {os.cpu_count()} cores, {given.rounds} rounds")
    print(table(rows, bare))
    if given.json:
        document = {"interpreter_ms": bare, "sides": [asdict(row) for row in rows]}
        given.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
