"""Break the package, one place at a time: which faults no test sees.

    python3 tools/mutate.py [WORD...] [--jobs 2]
    python3 tools/mutate.py --draw 200 [FOLDER...] [--seed SEED] [--budget SECONDS] [--jobs 2]
    python3 tools/mutate.py --again FILE

The first puts in the faults of tools/mutants.toml whose file, code or subject has a WORD, and runs
each fault's tests in a copy of the checkout, where they must pass without it.  It ends with 1 where
more than two survive, or one of memory or trust; with 2 where a line of the table fits no code any
more, or its tests fail without a fault.

The second draws faults (tools/faults.py) in the folders' lines of code: in fi_ffi and examples/llm,
with the commit's hash as the seed, unless told otherwise.  It runs the tests that execute the line
(tools/fault_tests.py); the first run for a commit finds out which.  Survivors are kept in a file,
whose faults the third tries once more.  It ends with 1 where more than 20 % survive, those among
them that no test runs, or that tools/equivalent.toml explains.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

import fault_tests
import faults
from fault_tests import Verdict
from faults import Fault

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "tools" / "mutants.toml"
EQUIVALENT = ROOT / "tools" / "equivalent.toml"
KEPT = ROOT / "build" / "faults"
DRAWN = ("fi_ffi", "examples/llm")
MOST_OF_DRAWN = 0.2  # may survive
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

    @contextlib.contextmanager
    def one(self, fault: Mutant | Fault | None = None) -> Iterator[Path]:
        """A copy that no one else has, with a fault."""
        root = self._free.get()
        try:
            if fault is None:
                yield root
                return
            path = root / fault.file
            before = path.read_text()
            _write_anew(path, fault.applied(root))
            try:
                yield root
            finally:
                _write_anew(path, before)
        finally:
            self._free.put(root)

    def fails(self, tests: str, mutant: Mutant | None = None) -> tuple[bool, str]:
        """Whether tests fail with a fault, and the last line of what they print."""
        with self.one(mutant) as root:
            return _fails(root, tests)


_times = itertools.count(1)


def _write_anew(path: Path, text: str) -> None:
    """Write a source at a time of its own, or the bytecode of a fault would outlive it."""
    path.write_text(text)
    time_s = next(_times)
    os.utime(path, (time_s, time_s))


def _fails(root: Path, tests: str) -> tuple[bool, str]:
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
    command += ["-o", f"timeout={_LONGEST}", *tests.split()]
    names = fault_tests.variables(root)
    try:
        done = subprocess.run(
            command, cwd=root, env=os.environ | names, capture_output=True, text=True,
            timeout=_PATIENCE, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return True, f"not done after {_PATIENCE} s"
    lines = done.stdout.strip().splitlines() or done.stderr.strip().splitlines() or [""]
    return done.returncode != 0, lines[-1]


def of_table(words: Iterable[str]) -> list[Mutant]:
    """The faults of the table that have one of the words."""
    found = read()
    for mutant in found:
        mutant.applied(ROOT)
    wanted = [*words]
    return [one for one in found if not wanted or any(w in f"{one} {one.about}" for w in wanted)]


def explained(path: Path = EQUIVALENT) -> dict[tuple[str, str, str], str]:
    """Drawn faults that no test on a CPU can see, and which kind: "equivalent", "needs a GPU"."""
    entries = tomllib.loads(path.read_text()).get("fault", [])
    return {(one["file"], one["old"].strip(), one["new"].strip()): one["kind"] for one in entries}


def _write(path: Path, survivors: Iterable[Fault]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([dataclasses.asdict(fault) for fault in survivors], indent=1))


def wanted(given: argparse.Namespace) -> list[Fault]:
    """The faults to try: those of a file that still fit the code, or drawn ones."""
    if not given.again:
        files = faults.files_of(ROOT, given.words or DRAWN)
        return [*faults.drawn(ROOT, files, given.draw, given.seed or fault_tests.commit())]
    fitting = []
    for entry in json.loads(given.again.read_text()):
        try:
            Fault(**entry).applied(ROOT)
        except (ValueError, FileNotFoundError) as error:
            print(error)
        else:
            fitting.append(Fault(**entry))
    return fitting


def draw(given: argparse.Namespace) -> int:
    """Try drawn faults."""
    chosen, known = wanted(given), explained()
    end = time.monotonic() + given.budget
    maps = KEPT / (given.map or fault_tests.commit())
    survivors = given.survivors or KEPT / "survivors.json"
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(given.jobs) as pool:
        copies = Checkouts(Path(folder, "broken"), given.jobs)
        with Checkouts(Path(folder, "clean"), 1).one() as clean:
            if not given.map:
                fault_tests.record(maps, clean, given.jobs)
            judge = fault_tests.Judge(fault_tests.Map(maps, clean), given.each)

            def judged(fault: Fault) -> Verdict | None:
                if fault.key in known:
                    return Verdict(fault, known[fault.key])
                if time.monotonic() > end:
                    return None
                with copies.one(fault) as root:
                    return judge.judged(root, clean, fault)

            verdicts: list[Verdict] = []
            for done in as_completed([pool.submit(judged, fault) for fault in chosen]):
                if (verdict := done.result()) is None:
                    continue
                print(verdict, flush=True)
                verdicts.append(verdict)
                lost = [one.fault for one in verdicts if one.kind in ("survives", "not run")]
                _write(survivors, lost)
    print(f"\n{table(verdicts)}\n")
    if len(verdicts) < len(chosen):
        print(f"{len(chosen) - len(verdicts)} of {len(chosen)} were not tried in {given.budget} s")
    print(f"{survivors}: what survives, for --again")
    unseen = sum(verdict.kind != "seen" for verdict in verdicts)
    return int(unseen > MOST_OF_DRAWN * len(verdicts))


def table(verdicts: Iterable[Verdict]) -> str:
    """The counts of each kind, by package."""
    kinds = ("seen", "survives", "not run", "equivalent", "needs a GPU")
    counts: dict[str, Counter[str]] = {}
    for verdict in sorted(verdicts, key=lambda one: one.fault.file):
        for package in (str(Path(verdict.fault.file).parent), "all"):
            counts.setdefault(package, Counter())[verdict.kind] += 1
    counts["all"] = counts.pop("all", Counter())
    lines = [("package", "faults", *kinds, "unseen")]
    for package, count in counts.items():
        unseen = 1 - count["seen"] / count.total() if count else 0
        shown = (count.total(), *(count[kind] for kind in kinds), f"{unseen:.0%}")
        lines.append((package, *map(str, shown)))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])])
        for line in lines
    )


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("words", nargs="*", metavar="WORD or FOLDER")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--draw", type=int, metavar="COUNT", help="draw faults")
    parser.add_argument("--seed", help="of the draw: the commit's hash")
    parser.add_argument("--budget", type=float, default=7200, metavar="SECONDS", help="for all")
    parser.add_argument("--each", type=float, default=60, metavar="SECONDS", help="for a fault")
    parser.add_argument("--survivors", type=Path, metavar="FILE", help="where to write them")
    parser.add_argument("--again", type=Path, metavar="FILE", help="try its faults once more")
    parser.add_argument("--map", metavar="COMMIT", help="take what tests of that commit execute")
    given = parser.parse_args(words)
    if given.map and not (KEPT / given.map / "sources.json").exists():
        parser.error(f"{KEPT} has no map of {given.map}")
    return given


def main() -> int:
    given = arguments()
    return draw(given) if given.draw or given.again else try_table(given.words, given.jobs)


def try_table(words: Iterable[str], jobs: int) -> int:
    """Try the faults of the table."""
    try:
        mutants = of_table(words)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    survivors: list[Mutant] = []
    with (
        tempfile.TemporaryDirectory() as folder,
        ThreadPoolExecutor(jobs) as pool,
    ):
        checkouts = Checkouts(Path(folder), jobs)
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
