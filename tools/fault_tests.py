"""Which tests may see a fault, from a run of a few cases of each test under coverage.py.

The run is of one commit, and is kept in build/faults/COMMIT: a part for each folder of tests.  A
part that is there is not made again.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from faults import Fault

ROOT = Path(__file__).resolve().parents[1]
CASES = 4  # of a test, at most, in the run under coverage.py
MEASURED = ("fi_ffi", "fi_ffi_build", "examples/llm")
LEFT_OUT = ("gpu", "helpers", "speed")  # folders of tests/
_FILES, _TESTS = 10, 12  # of a fault: files of tests, and tests of a file before their other cases
_LONGEST, _SETTINGS = 90, 40  # seconds of a test, which hangs then; the most files of a fixed list
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_DULL = {"tests", "test", "fi", "ffi", "py", "init", "examples", "ops"}
_SETTINGS_OF_COVERAGE = """
[run]
omit = *<*
source = {source}
parallel = true
data_file = {data}
context = ${{FAULT_CONTEXT-}}
patch = _exit
sigterm = true
disable_warnings = no-data-collected, module-not-measured, module-not-imported
"""


def commit() -> str:
    """The hash of the commit that is checked out."""
    command = ["git", "rev-parse", "HEAD"]
    return subprocess.run(
        command, cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.strip()


def parts() -> dict[str, list[str]]:
    """Folders of tests that are run together, by name."""
    tests = ROOT / "tests"
    parts = {"tests": sorted(f"tests/{path.name}" for path in tests.glob("test_*.py"))}
    for folder in sorted(tests.iterdir()):
        if folder.name not in LEFT_OUT and any(folder.rglob("test_*.py")):
            parts[folder.name] = [f"tests/{folder.name}"]
    return parts


def record(folder: Path, root: Path, jobs: int, cases: int = CASES) -> None:
    """Make the parts that are not in a folder, in a copy of the checkout at `root`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, tests in parts().items():
        if (folder / f"{name}.json").exists():
            continue
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as data:
            settings = Path(data, "settings")
            source = "".join(f"\n    {root / one}" for one in MEASURED)
            settings.write_text(_SETTINGS_OF_COVERAGE.format(source=source, data=f"{data}/data"))
            variables = {"COVERAGE_PROCESS_START": str(settings), "FAULT_CONTEXT": ""}
            more = ["-n", str(jobs), "-o", "timeout=300"]
            told = run(root, tests, {"cases": cases}, more, variables, patience=7200)
            combine(Path(data), folder / f"{name}.db")
        kept = {"root": str(root), "seconds": told.seconds, "passed": told.passed}
        (folder / f"{name}.json").write_text(json.dumps(kept))
        print(f"{name}: {len(told.passed)} tests, {time.monotonic() - start:.0f} s", flush=True)


def combine(folder: Path, target: Path) -> None:
    """Put what the processes of a run have measured into one file."""
    from coverage import CoverageData

    target.unlink(missing_ok=True)
    every = CoverageData(str(target))
    for path in sorted(folder.glob("data.*")):
        one = CoverageData(str(path))
        with contextlib.suppress(Exception):  # of a process that was killed as it wrote
            one.read()
            every.update(one)
    every.write()


@dataclass
class Told:
    """What a run of tests has told: ids of tests that failed and passed, and seconds of each."""

    status: int
    last: str
    failed: list[str]
    passed: list[str]
    seconds: dict[str, float]


def run(
    root: Path, tests: Iterable[str], wanted: dict[str, object], more: Iterable[str] = (),
    variables: dict[str, str] | None = None, patience: float = 600,
) -> Told:  # fmt: skip
    """Run tests in a checkout, as tools/fault_plugin.py is told by `wanted`."""
    with tempfile.TemporaryDirectory() as room:
        order, report = Path(room, "order"), Path(room, "report")
        order.write_text(json.dumps(wanted))
        command = [sys.executable, "-m", "pytest", "-q", "-p", "fault_plugin"]
        command += ["-p", "no:cacheprovider", *more, *tests]
        names = {
            "PYTHONPATH": f"{root}{os.pathsep}{ROOT / 'tools'}",
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        names |= {"FAULT_TESTS": str(order), "FAULT_REPORT": str(report), **(variables or {})}
        with (Path(room, "printed")).open("w+") as printed:
            child = subprocess.Popen(
                command, cwd=root, env=os.environ | names, stdin=subprocess.DEVNULL,
                stdout=printed, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
            try:
                child.wait(patience)
            except subprocess.TimeoutExpired:
                pass
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)
                child.wait()
            printed.seek(0)
            last = (printed.read().strip().splitlines() or [""])[-1]
        told = json.loads(report.read_text()) if report.exists() else {}
    fields = (told.get("failed", []), told.get("passed", []), told.get("seconds", {}))
    return Told(child.returncode, last, *fields)


@dataclass(frozen=True)
class Place:
    """Where a fault is: the lines of its statement, the function around it, and names beside it."""

    lines: range
    function: range | None
    names: frozenset[str]


def place_of(text: str, line: int) -> Place:
    """The place of a line of a source."""
    node: ast.AST = ast.parse(text)
    function, names, lines = None, set[str](), range(line, line + 1)
    outer: list[ast.AST] = []
    while True:
        inner = [one for one in _statements(node) if one.lineno <= line <= (one.end_lineno or 0)]
        if not inner:
            break
        node = inner[0]
        outer.append(node)
        lines = range(node.lineno, _header_end(node) + 1)
        if isinstance(node, _FUNCTIONS) and line not in lines:
            function = range(node.body[0].lineno, (node.end_lineno or 0) + 1)
    for one in outer:
        names |= {getattr(one, "name", "")}
    if function is None and outer:
        names |= _names_of(outer[-1], line)
    return Place(lines, function, frozenset(name for name in names if len(name) > 2))


def _statements(node: ast.AST) -> Iterator[ast.stmt]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt):
            yield child
        elif isinstance(child, (ast.ExceptHandler, ast.match_case)):
            yield from _statements(child)


def _header_end(node: ast.stmt) -> int:
    body = getattr(node, "body", None)
    return max(node.lineno, body[0].lineno - 1) if body else node.end_lineno or node.lineno


def _names_of(node: ast.AST, line: int) -> set[str]:
    """Names that a statement outside of functions gives, and strings of the call at a line."""
    targets = getattr(node, "targets", None) or [getattr(node, "target", None)]
    names = {one.id for one in targets if isinstance(one, ast.Name)}
    calls = [
        one for one in ast.walk(node)
        if isinstance(one, ast.Call) and one.lineno <= line <= (one.end_lineno or 0)
    ]  # fmt: skip
    for call in calls:
        texts = (one.value for one in call.args[:1] if isinstance(one, ast.Constant))
        names |= {text for text in texts if isinstance(text, str) and text.isidentifier()}
    return names


class Map:
    """Which tests execute which lines."""

    def __init__(self, folder: Path) -> None:
        self._parts: list[tuple[sqlite3.Connection, str]] = []
        self.seconds: dict[str, float] = {}
        self._passed: set[str] = set()
        for path in sorted(folder.glob("*.json")):
            kept = json.loads(path.read_text())
            data = sqlite3.connect(path.with_suffix(".db"), check_same_thread=False)
            self._parts.append((data, kept["root"]))
            self.seconds |= kept["seconds"]
            self._passed |= {*kept["passed"]}
        self._mapped = {test.partition("::")[0] for test in self.seconds}

    @functools.lru_cache(maxsize=8)  # noqa: B019
    def _of(self, file: str) -> list[tuple[str, frozenset[int]]]:
        """The tests that execute lines of a file, and these lines."""
        from coverage.numbits import numbits_to_nums

        query = (
            "select context, numbits from line_bits join context on context_id = context.id"
            " join file on file_id = file.id where path = ? and context != ''"
        )
        every: dict[str, set[int]] = defaultdict(set)
        for data, root in self._parts:
            for context, bits in data.execute(query, (f"{root}/{file}",)):
                every[context.rpartition("|")[2]].update(numbits_to_nums(bits))
        return [(test, frozenset(lines)) for test, lines in every.items() if test in self._passed]

    def at(self, file: str, lines: Iterable[int]) -> list[str]:
        """The tests that execute one of some lines."""
        wanted = {*lines}
        return [test for test, executed in self._of(file) if wanted & executed]

    def tests(self, root: Path, fault: Fault) -> list[str]:
        """Tests that may see a fault, the likely and short ones first: ids, or files."""
        text = (root / fault.file).read_text()
        place = place_of(text, fault.line)
        first: list[str] = []
        if place.function is not None:
            first = self.at(fault.file, place.lines)
            second = self.at(fault.file, place.function)
        else:
            for file, bodies in _mentioning(root, place.names, fault.file):
                first += self.at(file, bodies)
            second = self.at(fault.file, _bodies(text))
        unknown = [
            file for file, words in _words_of_tests(root).items()
            if file not in self._mapped and place.names & words
        ]  # fmt: skip
        if place.function is None:
            known = {file for file, words in _words_of_tests(root).items() if place.names & words}
            more = [test for test in self._passed if test.partition("::")[0] in known]
            second = second + sorted(more)
        return self._ordered(root, fault, place, [first, second]) + sorted(unknown)[:_FILES]

    def _ordered(self, root: Path, fault: Fault, place: Place, tiers: list[list[str]]) -> list[str]:
        files: dict[str, None] = {}
        chosen: list[list[str]] = []
        for tier in tiers:
            by_file: dict[str, list[str]] = defaultdict(list)
            for test in dict.fromkeys(tier):
                by_file[test.partition("::")[0]].append(test)
            rank = functools.partial(self._rank, root, fault, place, by_file)
            for file in sorted(by_file, key=rank):
                if file in files or len(files) < _FILES:
                    files[file] = None
                    chosen.append(sorted(by_file[file], key=lambda test: self.seconds[test]))
        heads = [_one_of_each(tests) for tests in chosen]
        every = [test for tests in [*heads, *chosen] for test in tests]
        return [*dict.fromkeys(every)]

    def _rank(
        self, root: Path, fault: Fault, place: Place, by_file: dict[str, list[str]], file: str
    ) -> tuple[float, float]:
        """How late tests of a file come: named alike first, then short ones."""
        alike = _words(file) & _words(fault.file)
        named = place.names & _words_of_tests(root).get(file, frozenset())
        tests = by_file[file]
        return -len(alike) - len(named), sum(self.seconds[test] for test in tests) / len(tests)


def _one_of_each(tests: list[str]) -> list[str]:
    """A case of each of a file's tests, the shortest first."""
    by_function: dict[str, str] = {}
    for test in tests:
        by_function.setdefault(test.partition("[")[0], test)
    return [*by_function.values()][:_TESTS]


def _words(path: str) -> set[str]:
    return {word.rstrip("s") for word in re.findall(r"[a-z0-9]+", path)} - _DULL


@functools.cache
def _words_of_tests(root: Path) -> dict[str, frozenset[str]]:
    """The words in each file of tests."""
    paths = [
        path for path in (root / "tests").rglob("test_*.py") if path.parent.name not in LEFT_OUT
    ]
    return {
        path.relative_to(root).as_posix(): frozenset(re.findall(r"\w+", path.read_text()))
        for path in paths
    }


def _bodies(text: str) -> set[int]:
    """The lines of the bodies of functions."""
    bodies: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, _FUNCTIONS):
            bodies.update(range(node.body[0].lineno, (node.end_lineno or 0) + 1))
    return bodies


@functools.cache
def _functions_of_words(root: Path) -> dict[str, list[tuple[str, range]]]:
    """The functions in which a word is, by word: their files and lines."""
    found: dict[str, list[tuple[str, range]]] = defaultdict(list)
    for path in (one for folder in MEASURED for one in (root / folder).rglob("*.py")):
        text = path.read_text()
        lines = text.splitlines()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, _FUNCTIONS):
                body = range(node.body[0].lineno, (node.end_lineno or 0) + 1)
                words = re.findall(r"\w+", "\n".join(lines[body.start - 1 : body.stop - 1]))
                for word in {node.name, *words}:
                    found[word].append((path.relative_to(root).as_posix(), body))
    return found


def _mentioning(root: Path, names: Iterable[str], file: str) -> Iterator[tuple[str, set[int]]]:
    """The bodies of the functions, by file, that mention names: of the same file, or of few."""
    bodies: dict[str, set[int]] = defaultdict(set)
    for name in names:
        functions = _functions_of_words(root).get(name, [])
        for where, body in functions:
            if where == file or len(functions) <= _SETTINGS:
                bodies[where].update(body)
    yield from bodies.items()


@dataclass
class Verdict:
    """Whether tests see a fault: "seen", "survives", "not run"; or its kind in EQUIVALENT."""

    fault: Fault
    kind: str
    by: str = ""
    seconds: float = 0.0

    def __str__(self) -> str:
        kind = self.kind.upper() if self.kind == "survives" else self.kind
        return f"{kind:<9} {self.seconds:4.0f} s  {self.fault}  {self.by}".rstrip()


class Judge:
    """Runs the tests of faults, and those that fail once more without the fault."""

    def __init__(self, tests: Map, seconds: float) -> None:
        self._map, self._each = tests, seconds
        self._is_sound: dict[str, bool] = {}
        self._alone = threading.Lock()

    def judged(self, root: Path, clean: Path, fault: Fault) -> Verdict:
        """Judge a fault that is in the checkout at `root` and not in the one at `clean`."""
        start = time.monotonic()
        with self._alone:
            order = self._map.tests(clean, fault)
        while order:
            told = self._ran(root, order)
            if told.status in (0, 5) or not (told.failed or told.status):
                break
            failed = told.failed[0] if told.failed else ""
            by = failed or told.last[:80]
            if not failed and told.status < 0:
                by = f"tests that did not end: {told.last[:60]}"
            if not failed or self._passes(clean, failed):
                return Verdict(fault, "seen", f"by {by}", time.monotonic() - start)
            order = [test for test in order if test != failed]
        else:
            return Verdict(fault, "not run")
        return Verdict(fault, "survives", f"{len(told.passed)} tests", time.monotonic() - start)

    def _ran(self, root: Path, order: list[str]) -> Told:
        files = dict.fromkeys(test.partition("::")[0] for test in order)
        wanted = {"order": order, "seconds": self._each}
        more = ["-x", "--tb=no", "-o", f"timeout={_LONGEST}"]
        return run(root, files, wanted, more, patience=self._each + 3 * _LONGEST)

    def _passes(self, clean: Path, test: str) -> bool:
        if test not in self._is_sound:
            self._is_sound[test] = self._ran(clean, [test]).status in (0, 5)
        return self._is_sound[test]
