"""Which tests may see a fault, from a run of a few cases of each test under coverage.py.

The run is of one commit, and is kept in build/faults/COMMIT: a part for each folder of tests.  A
part that is there is not made again.
"""

from __future__ import annotations

import ast
import contextlib
import difflib
import functools
import hashlib
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
ROWS = "fi_ffi/ops/table/"
# They go through all rows, and name none.
EVERY_ROW = ("tests/ops/test_every_op.py", "tests/ops/test_results.py", "tests/ops/test_rows.py")
LEFT_OUT = ("gpu", "helpers", "speed")  # folders of tests/
_FILES, _FIRST = 16, 4  # of a fault: files of tests, and those that are run before the others
_TESTS = 12  # of a file, before their other cases
_LONGEST, _HANGS = 90, 200  # seconds of a test, which hangs then; and under coverage.py
_FEW = 30  # tests of a line, or those that name its function and class are run as well
_USERS = 40  # functions that use a name, at most, or all of them are no help
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


def parts(root: Path) -> dict[str, list[str]]:
    """Folders of tests that are run together, by name."""
    tests = root / "tests"
    parts = {"tests": sorted(f"tests/{path.name}" for path in tests.glob("test_*.py"))}
    for folder in sorted(tests.iterdir()):
        if folder.name not in LEFT_OUT and any(folder.rglob("test_*.py")):
            parts[folder.name] = [f"tests/{folder.name}"]
    return parts


def record(folder: Path, root: Path, jobs: int, cases: int = CASES) -> None:
    """Make the parts that are not in a folder, in a copy of the checkout at `root`."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [path for one in MEASURED for path in (root / one).rglob("*.py")]
    sources = {path.relative_to(root).as_posix(): path.read_text() for path in paths}
    (folder / "sources.json").write_text(json.dumps(sources))
    files = {file: _hash(text) for file, text in _tests(root).items()}
    for name, tests in parts(root).items():
        if (folder / f"{name}.json").exists():
            continue
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as data:
            settings = Path(data, "settings")
            source = "".join(f"\n    {root / one}" for one in MEASURED)
            settings.write_text(_SETTINGS_OF_COVERAGE.format(source=source, data=f"{data}/data"))
            measuring = {"COVERAGE_PROCESS_START": str(settings), "FAULT_CONTEXT": ""}
            more = ["-n", str(jobs), "-o", f"timeout={_HANGS - 20}"]
            wanted: dict[str, object] = {"cases": cases, "hangs": _HANGS}
            told = run(root, tests, wanted, more, measuring, patience=7200)
            combine(Path(data), folder / f"{name}.db")
        kept = {"root": str(root), "seconds": told.seconds, "passed": told.passed}
        kept["files"] = {file: files[file] for file in {_file_of(test) for test in told.seconds}}
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


def variables(root: Path, *more: Path) -> dict[str, str]:
    """What has Python import a checkout, and keep its bytecode beside it."""
    return {
        "PYTHONPATH": os.pathsep.join(map(str, (root, *more))),
        "PYTHONPYCACHEPREFIX": str(root.with_name(f"{root.name}-bytecode")),
        "PYTHONDONTWRITEBYTECODE": "",
    }


def run(
    root: Path, tests: Iterable[str], wanted: dict[str, object], more: Iterable[str] = (),
    more_variables: dict[str, str] | None = None, patience: float = 600,
) -> Told:  # fmt: skip
    """Run tests in a checkout, as tools/fault_plugin.py is told by `wanted`."""
    with tempfile.TemporaryDirectory() as room:
        order, report = Path(room, "order"), Path(room, "report")
        order.write_text(json.dumps(wanted))
        command = [sys.executable, "-m", "pytest", "-q", "-p", "fault_plugin"]
        command += ["-p", "no:cacheprovider", *more, *tests]
        names = variables(root, ROOT / "tools")
        names |= {"FAULT_TESTS": str(order), "FAULT_REPORT": str(report), **(more_variables or {})}
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
    return Place(
        lines, function, frozenset(name for name in names if len(name) > 2 and name[:2] != "__")
    )


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
    """Which tests execute which lines of the checkout at `root`.

    The map may be of another commit: lines have moved, and files of tests that are not as they were
    are run whole.
    """

    def __init__(self, folder: Path, root: Path) -> None:
        self._root = root
        self._parts: list[tuple[sqlite3.Connection, str]] = []
        self._passed: dict[str, float] = {}  # seconds of each test
        self._sources = json.loads((folder / "sources.json").read_text())
        known: dict[str, str] = {}
        for path in sorted(folder.glob("*.json")):
            if path.name == "sources.json":
                continue
            kept = json.loads(path.read_text())
            data = sqlite3.connect(path.with_suffix(".db"), check_same_thread=False)
            self._parts.append((data, kept["root"]))
            self._passed |= {test: kept["seconds"][test] for test in kept["passed"]}
            known |= kept["files"]
        self._new = {file for file, text in _tests(root).items() if known.get(file) != _hash(text)}
        self._words = {file: {*re.findall(r"\w+", text)} for file, text in _tests(root).items()}

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

    @functools.lru_cache(maxsize=64)  # noqa: B019
    def _moved(self, file: str) -> dict[int, int]:
        """The line of the map for each line of a file; that before it, if it is new."""
        now = (self._root / file).read_text().splitlines()
        before = self._sources.get(file, "").splitlines()
        moved: dict[int, int] = {}
        matcher = difflib.SequenceMatcher(None, before, now, autojunk=False)
        for old, new, count in matcher.get_matching_blocks():
            moved |= {new + i + 1: old + i + 1 for i in range(count)}
        for line in range(1, len(now) + 1):
            moved.setdefault(line, moved.get(line - 1, 1))
        return moved

    def at(self, file: str, lines: Iterable[int]) -> list[str]:
        """The tests that execute one of some lines."""
        moved = self._moved(file)
        wanted = {moved[line] for line in lines if line in moved}
        return [test for test, executed in self._of(file) if wanted & executed]

    def tests(self, fault: Fault) -> list[str]:
        """Tests that may see a fault, the likely and short ones first: ids, or files."""
        text = (self._root / fault.file).read_text()
        place = place_of(text, fault.line)
        names = place.names
        if place.function is None:
            lost = {*re.findall(r"\w{3,}", fault.old)} - {*re.findall(r"\w+", fault.new)}
            names |= {word for word in lost if word.isidentifier()}
        naming = {file for file, words in self._words.items() if names & words}
        if place.function is None or fault.file.startswith(ROWS):  # run as it is imported
            naming |= {*EVERY_ROW} & self._words.keys()
        alike = {*_words(fault.file), *(part for name in names for part in _words(name.lower()))}
        if place.function is not None:
            near = self.at(fault.file, place.lines)
            around = self.at(fault.file, place.function)
        else:
            bodies = _mentioning(self._root, names, fault.file)
            near = [test for file, lines in bodies for test in self.at(file, lines)]
            around = self.at(fault.file, _bodies(text))
        if len(near) < _FEW or fault.file.startswith(ROWS):  # of a test's other cases, some may
            around += [test for test in self._passed if _file_of(test) in naming]

        def rank(file: str) -> tuple[int, bool, float]:
            """Files that are named alike come first, and then those of short tests."""
            likely = len(_words(file) & alike) + (file in naming) + 2 * (file in EVERY_ROW)
            return -likely, file not in self._new, mean(file)

        def mean(file: str) -> float:
            every = [self._passed[test] for test in by_file.get(file, ())]
            return sum(every) / max(len(every), 1)

        heads: list[str] = []
        others: list[str] = []
        for tests in (near, around):
            by_file = _by_file(tests, self._passed)
            whole = {file for file in self._new & naming if file not in by_file}
            left = _FILES - len({_file_of(test) for test in heads})
            for file in sorted(by_file.keys() | whole, key=rank)[: max(left, 0)]:
                heads += _one_of_each(by_file.get(file, []))
                others += [*by_file.get(file, []), *([file] if file in self._new else [])]
        return [*dict.fromkeys([*heads, *others])]


def _by_file(tests: Iterable[str], seconds: dict[str, float]) -> dict[str, list[str]]:
    """Tests by their file, the short ones first."""
    by_file: dict[str, list[str]] = defaultdict(list)
    for test in sorted({*tests}, key=lambda test: (seconds[test], test)):
        by_file[_file_of(test)].append(test)
    return dict(by_file)


def _tests(root: Path) -> dict[str, str]:
    """The texts of files of tests."""
    every = sorted((root / "tests").rglob("test_*.py"))
    return {
        path.relative_to(root).as_posix(): path.read_text()
        for path in every
        if path.parent.name not in LEFT_OUT
    }


def _hash(text: str) -> str:
    return hashlib.sha1(text.encode()).hexdigest()


def _file_of(test: str) -> str:
    """The file of a test's id."""
    return test.partition("::")[0]


def _one_of_each(tests: list[str]) -> list[str]:
    """A case of each of a file's tests, the shortest first."""
    by_function: dict[str, str] = {}
    for test in tests:
        by_function.setdefault(test.partition("[")[0], test)
    return [*by_function.values()][:_TESTS]


def _words(path: str) -> set[str]:
    return {word.rstrip("s") for word in re.findall(r"[a-z0-9]+", path)} - _DULL


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
                for word in {node.name, path.stem, *words}:
                    found[word].append((path.relative_to(root).as_posix(), body))
    return found


def _mentioning(root: Path, names: Iterable[str], file: str) -> Iterator[tuple[str, set[int]]]:
    """The bodies of the functions, by file, that mention names: of the same file, or of few."""
    bodies: dict[str, set[int]] = defaultdict(set)
    for name in names:
        functions = _functions_of_words(root).get(name, [])
        for where, body in functions:
            if where == file or len(functions) <= _USERS:
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
        self._tests_run = False
        self._alone = threading.Lock()

    def judged(self, root: Path, clean: Path, fault: Fault) -> Verdict:
        """Judge a fault that is in the checkout at `root` and not in the one at `clean`."""
        start = time.monotonic()
        with self._alone:
            order = self._map.tests(fault)
        files = [*dict.fromkeys(map(_file_of, order))]
        passed = 0
        for part, seconds in ((files[:_FIRST], self._each / 2), (files[_FIRST:], self._each)):
            left = seconds - (time.monotonic() - start)
            tests = [test for test in order if _file_of(test) in part]
            by, count = self._seen(root, clean, tests, left) if tests and left > 0 else ("", 0)
            passed += count
            if by:
                return Verdict(fault, "seen", f"by {by}", time.monotonic() - start)
        kind, by = ("survives", f"{passed} tests") if passed else ("not run", "")
        return Verdict(fault, kind, by, time.monotonic() - start)

    def _seen(self, root: Path, clean: Path, order: list[str], seconds: float) -> tuple[str, int]:
        """The first of some tests that fails for a fault, or "", and how many pass."""
        end = time.monotonic() + seconds
        unsound: list[str] = []  # they fail without a fault
        while (left := end - time.monotonic()) > 0:
            told = self._ran(root, order, left, unsound)
            if told.status in (0, 5):
                return "", len(told.passed)
            if not told.failed:  # pytest did not begin, or not end
                self._check_that_tests_run(clean, order)
                return told.last[:80] or f"status {told.status}", 0
            if told.failed[0] in unsound:  # of a file, which was not asked for
                return "", 0
            if self._passes(clean, told.failed[0]):
                return told.failed[0], 0
            unsound.append(told.failed[0])
        return "", 0

    def _check_that_tests_run(self, clean: Path, order: list[str]) -> None:
        """End the program where pytest does not even begin without a fault."""
        if not self._tests_run:
            told = self._ran(clean, order[:1], self._each)
            if told.status not in (0, 5) and not told.failed:
                raise RuntimeError(f"no tests run on this machine: {told.last}")
            self._tests_run = True

    def _ran(
        self, root: Path, order: list[str], seconds: float, unsound: Iterable[str] = ()
    ) -> Told:
        files = dict.fromkeys(_file_of(test) for test in order)
        wanted = {"order": order, "without": [*unsound], "seconds": seconds}
        more = ["-x", "--tb=no", "-o", f"timeout={_LONGEST}"]
        tests = [file for file in files if file not in unsound]
        if not tests:
            return Told(5, "", [], [], {})
        return run(root, tests, wanted, more, patience=seconds + 3 * _LONGEST)

    def _passes(self, clean: Path, test: str) -> bool:
        """Whether a test passes without a fault; of a file, whether it can be imported."""
        if test not in self._is_sound:
            if "::" in test:
                told = self._ran(clean, [test], self._each)
            else:
                told = run(clean, [test], {"order": [], "without": []})
            self._is_sound[test] = told.status in (0, 5)
        return self._is_sound[test]
