"""Break the package in the places of tools/mutants.toml, one at a time: which faults no test sees.

    python3 tools/mutate.py [WORD...] [--jobs 2]

Runs each fault's tests in a copy of the checkout, where they must pass without it; prints a line
for each and the survivors at the end.  A WORD chooses the faults whose file, code or subject it
is in.
Ends with 1 where more than two survive, or one of memory or trust; with 2 where a line of the table
fits no code any more, or its tests fail without a fault.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "tools" / "mutants.toml"
MOST_SURVIVORS = 2
NEVER = ("memory", "trust")  # subjects of which none may survive
_LONGEST, _PATIENCE = 120, 900  # seconds, of a test and of all: a fault that hangs is seen


@dataclass(frozen=True)
class Mutant:
    """A fault: `old` in a file, which is there once, becomes `new`; `tests` should see it."""

    file: str
    old: str
    new: str
    tests: str
    about: str

    def __str__(self) -> str:
        old, new = (text.strip().replace("\n", " ") for text in (self.old, self.new))
        return f"{self.file}: {old!r} -> {new!r}"

    def applied(self, root: Path) -> str:
        """The file's text with the fault; `ValueError` unless `old` is there once."""
        text = (root / self.file).read_text()
        if text.count(self.old) != 1:
            raise ValueError(f"{self.file} has {self.old!r} {text.count(self.old)} times, not once")
        return text.replace(self.old, self.new)


def read(path: Path = TABLE) -> list[Mutant]:
    """The table."""
    return [Mutant(**entry) for entry in tomllib.loads(path.read_text())["mutant"]]


class Checkouts:
    """Copies of the checkout, each for one run of tests at a time."""

    def __init__(self, folder: Path, count: int) -> None:
        listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
        files = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout
        self._free: SimpleQueue[Path] = SimpleQueue()
        for number in range(count):
            copy = folder / str(number)
            for name in files.splitlines():
                if (ROOT / name).is_file():
                    (copy / name).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy2(ROOT / name, copy / name)
            self._free.put(copy)

    def fails(self, tests: str, mutant: Mutant | None = None) -> tuple[bool, str]:
        """Whether tests fail with a fault, and the last line of what they print."""
        root = self._free.get()
        try:
            if mutant is None:
                return _fails(root, tests)
            path = root / mutant.file
            before = path.read_text()
            path.write_text(mutant.applied(root))
            try:
                return _fails(root, tests)
            finally:
                path.write_text(before)
        finally:
            self._free.put(root)


def _fails(root: Path, tests: str) -> tuple[bool, str]:
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
    command += ["-o", f"timeout={_LONGEST}", *tests.split()]
    # Compiled code would outlive a fault that is put in and out within one second.
    names = {"PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(
            command, cwd=root, env=os.environ | names, capture_output=True, text=True,
            timeout=_PATIENCE, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return True, f"not done after {_PATIENCE} s"
    lines = done.stdout.strip().splitlines() or done.stderr.strip().splitlines() or [""]
    return done.returncode != 0, lines[-1]


def chosen(words: Iterable[str]) -> list[Mutant]:
    """The faults of the table that have one of the words."""
    found = read()
    for mutant in found:
        mutant.applied(ROOT)
    wanted = [*words]
    return [one for one in found if not wanted or any(w in f"{one} {one.about}" for w in wanted)]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("words", nargs="*")
    parser.add_argument("--jobs", type=int, default=2)
    given = parser.parse_args()
    try:
        mutants = chosen(given.words)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    survivors: list[Mutant] = []
    with (
        tempfile.TemporaryDirectory() as folder,
        ThreadPoolExecutor(given.jobs) as pool,
    ):
        checkouts = Checkouts(Path(folder), given.jobs)
        tests = {*dict.fromkeys(mutant.tests for mutant in mutants)}
        for which, (failed, told) in zip(tests, pool.map(checkouts.fails, tests), strict=True):
            if failed:
                print(f"{which} fails without any fault: {told}", file=sys.stderr)
                return 2

        def seen(mutant: Mutant) -> tuple[bool, float]:
            start = time.monotonic()
            failed, _ = checkouts.fails(mutant.tests, mutant)
            return failed, time.monotonic() - start

        for mutant, (failed, seconds) in zip(mutants, pool.map(seen, mutants), strict=True):
            print(f"{'seen    ' if failed else 'SURVIVES'} {seconds:4.0f} s  {mutant}", flush=True)
            if not failed:
                survivors.append(mutant)
    print(f"{len(mutants)} faults, {len(survivors)} survive")
    grave = [mutant for mutant in survivors if mutant.about in NEVER]
    return int(len(survivors) > MOST_SURVIVORS or bool(grave))


if __name__ == "__main__":
    sys.exit(main())
