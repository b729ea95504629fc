"""tools/mutate.py: faults are drawn alike for a seed, compile, and are seen by tests that may."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))
import fault_tests  # noqa: E402
import faults  # noqa: E402
import mutate  # noqa: E402
from faults import Fault, Source  # noqa: E402

SAMPLE = '''\
"""Draws `nothing` here."""
from __future__ import annotations
import threading
from typing import TYPE_CHECKING, overload

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["ceiling", "first"]
KINDS = {"gpu": 1, "cpu": 2}


def ceiling(count: int, size: int = 16) -> int:
    """Of a division: 1 or more."""
    if count <= 0 and not size:
        raise ValueError(f"count is {count}, and not 1")
    return -(-count // size)


def first(values: list[int], kind: str = "gpu", known: dict[str, int] | None = None) -> int | None:
    lock, known = threading.Lock(), known or {"é": 5}
    for value in values[: len(values) + 1]:
        if value == max(3, 4):
            break
        known["é"] = KINDS.get("cpu", value) // 2
    try:
        with lock:
            print(kind, "an upper bound of values", sep="-", end=" ")
    except OSError:
        return KINDS[kind]
    finally:
        values.clear()
    return None
'''
# The lines of SAMPLE that have nothing that a fault could be in.
LEFT_OUT = (1, 2, 3, 4, 6, 7, 9, 14, 16)
# A checkout of its own: a package, tests in this process and in a child.
DEMO = """\
def pages(count, size=16):
    return -(-count // size)


def unused(count):
    return count + 1


def shown(count):
    print(count + 2)
    return count < 7
"""
DEMO_TESTS = """\
import subprocess, sys
import pytest
from demo.sizes import pages, shown

@pytest.mark.parametrize("size", [1, 2, 4, 8, 16, 32])
def test_pages(size):
    assert pages(33, size) == (33 + size - 1) // size

def test_fails_anyway():
    assert pages(33) == 4

def test_shown():
    assert shown(3)

def test_in_a_child():
    program = "from demo.sizes import shown; shown(1)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "3"
"""


def every_fault(text: str) -> list[Fault]:
    source = Source(text)
    made = (
        source.fault("sample.py", operator, edits)
        for operators in faults.ways(source).values()
        for operator, every in operators.items()
        for edits in every
    )
    return [fault for fault in made if fault is not None]


@pytest.fixture
def sample(tmp_path: Path) -> Path:
    (tmp_path / "sample.py").write_text(SAMPLE)
    return tmp_path


@pytest.mark.parametrize("operator", faults.OPERATORS)
def test_an_operator_makes_programs(operator: str, sample: Path) -> None:
    drawn = [fault for fault in every_fault(SAMPLE) if fault.operator == operator]
    assert drawn
    for fault in drawn:
        changed = fault.applied(sample)
        assert changed != SAMPLE
        compile(changed, "sample.py", "exec")
        others = SAMPLE.count("\n") - fault.old.count("\n")
        assert changed.count("\n") - fault.new.count("\n") == others


@pytest.mark.parametrize(
    ("operator", "old", "new"),
    [
        ("comparison", "count <= 0", "count < 0"),
        ("off by one", ": len(values) + 1]", ": (len(values) + 1) - 1]"),
        ("off by one", "size: int = 16", "size: int = 17"),
        ("rounding", "-(-count // size)", "((count) // (size))"),
        ("swapped arguments", 'sep="-", end=" "', 'sep=" ", end="-"'),
        ("another function", "max(3, 4)", "min(3, 4)"),
        ("dropped call", "values.clear()", "pass"),
        ("dropped finally", "values.clear()", "pass"),
        ("condition", "value == max(3, 4):", "False:"),
        ("and, or", "0 and not size", "0 or not size"),
        ("wrong key", '"cpu", value', '"gpu", value'),
        ("wrong constant", 'known["é"]', 'known["cpu"]'),
        ("dropped except", "OSError", "()"),
        ("default", "None) -> int", "True) -> int"),
        ("break, continue", "break", "continue"),
    ],
)
def test_what_an_operator_changes(operator: str, old: str, new: str) -> None:
    changed = {(one.old.replace(old, new), one.new) for one in every_fault(SAMPLE)}
    assert any(wanted == made for wanted, made in changed), (operator, old)


def test_nothing_is_drawn_in_texts_types_and_what_is_raised() -> None:
    lines = {fault.line for fault in every_fault(SAMPLE)}
    assert not lines & {*LEFT_OUT}
    assert lines >= {10, 13, 15, 17, 20, 21, 22, 23, 24, 25, 27, 28, 29, 30, 32}
    sentence = "an upper bound of values"
    texts = [one for one in every_fault(SAMPLE) if one.operator == "wrong constant"]
    assert texts and all(one.new.count(sentence) == one.old.count(sentence) for one in texts)


def test_the_draw_is_of_the_seed(sample: Path) -> None:
    files = faults.files_of(sample, ["."])
    assert files == ["sample.py"]
    twelve = [*faults.drawn(sample, files, 12, "a")]
    assert len({fault.line for fault in twelve}) == 12
    assert [*faults.drawn(sample, files, 12, "a")] == twelve
    assert [*faults.drawn(sample, files, 5, "a")] == twelve[:5]
    assert [*faults.drawn(sample, files, 12, "b")] != twelve


def test_a_fault_is_found_where_its_lines_have_moved_to(tmp_path: Path) -> None:
    fault = Fault("one.py", 4, "off by one", "x = 1\n", "x = 2\n")
    (tmp_path / "one.py").write_text("x = 1\ny = 3\n\n\n\nx = 1\ny = 4\n")
    assert fault.applied(tmp_path) == "x = 1\ny = 3\n\n\n\nx = 2\ny = 4\n"
    (tmp_path / "one.py").write_text("x = 3\n")
    with pytest.raises(ValueError, match=r"no longer has 'x = 1'"):
        fault.applied(tmp_path)


def test_faults_that_are_explained_are_drawn_from_this_code() -> None:
    entries = mutate.tomllib.loads(mutate.EQUIVALENT.read_text()).get("fault", [])
    for entry in entries:
        assert entry.keys() == {"file", "old", "new", "kind", "why"}
        assert entry["kind"] in ("equivalent", "needs a GPU") and len(entry["why"].split()) > 4
        assert entry["old"] in (ROOT / entry["file"]).read_text()
    assert len(mutate.explained()) == len(entries)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, fault_tests.Map]:
    """A checkout, and what its tests execute."""
    root = tmp_path_factory.mktemp("demo")
    (root / "demo").mkdir()
    (root / "tests").mkdir()
    (root / "demo" / "sizes.py").write_text(DEMO)
    (root / "tests" / "test_sizes.py").write_text(DEMO_TESTS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fault_tests, "MEASURED", ("demo",))
        fault_tests.record(root / "map", root, jobs=1)
    return root, fault_tests.Map(root / "map", root)


def fault_of(old: str, new: str) -> Fault:
    lines = DEMO.splitlines(True)
    line = next(i for i, text in enumerate(lines) if old in text)
    return Fault("demo/sizes.py", line + 1, "by hand", lines[line], lines[line].replace(old, new))


def test_tests_by_line(demo: tuple[Path, fault_tests.Map]) -> None:
    _, tests = demo
    cases = {f"tests/test_sizes.py::test_pages[{size}]" for size in (1, 2, 8, 16)}
    assert {*tests.at("demo/sizes.py", [2])} == cases
    shown = {f"tests/test_sizes.py::test_{name}" for name in ("shown", "in_a_child")}
    assert {*tests.at("demo/sizes.py", [10])} == shown
    assert not tests.at("demo/sizes.py", [6])


@pytest.mark.parametrize(
    ("old", "new", "kind", "by"),
    [
        ("-(-count // size)", "count // size", "seen", "by tests/test_sizes.py::test_pages"),
        ("count + 2", "count + 3", "seen", "by tests/test_sizes.py::test_in_a_child"),
        ("count < 7", "count <= 7", "survives", "8 tests"),
        ("count + 1", "count - 1", "not run", ""),
        ("size=16", "size=17", "survives", "8 tests"),
        ("def shown", "def show", "seen", "by tests/test_sizes.py"),
    ],
)
def test_verdicts(
    demo: tuple[Path, fault_tests.Map], tmp_path: Path, old: str, new: str, kind: str, by: str
) -> None:
    """One test fails without a fault, and so sees none."""
    root, tests = demo
    fault = fault_of(old, new)
    for path in ("demo/sizes.py", "tests/test_sizes.py"):
        (tmp_path / path).parent.mkdir()
        (tmp_path / path).write_text((root / path).read_text())
    (tmp_path / fault.file).write_text(fault.applied(root))
    verdict = fault_tests.Judge(tests, 60).judged(tmp_path, root, fault)
    assert (verdict.kind, verdict.by.startswith(by)) == (kind, True), verdict


def test_the_table_by_package() -> None:
    fault = fault_of("count + 1", "count - 1")
    kinds = ["seen", "seen", "survives", "equivalent"]
    lines = mutate.table(fault_tests.Verdict(fault, kind) for kind in kinds).splitlines()
    assert lines[1].split() == ["demo", "4", "2", "1", "0", "1", "0", "50%"]
    assert lines[2].split()[0] == "all" and len(lines) == 3


def test_survivors_are_tried_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = "tools/mutate.py"
    line = next(line for line in (ROOT / file).read_text().splitlines(True) if "DRAWN = " in line)
    one = {"file": file, "line": 1, "operator": "by hand", "old": line, "new": "DRAWN = ()\n"}
    path = tmp_path / "survivors.json"
    path.write_text(json.dumps([one, one | {"old": "no such line\n"}]))
    given = mutate.arguments(["--again", str(path)])
    assert mutate.wanted(given) == [Fault(**one)]
    assert "no longer has 'no such line'" in capsys.readouterr().out


def test_the_bytecode_of_a_fault_does_not_outlive_it(tmp_path):
    """Nor that of the code before it: both are of one length, within one second."""
    module, root = tmp_path / "copy" / "number.py", tmp_path / "copy"
    root.mkdir()
    for text in ("one", "two", "one", "two"):
        mutate._write_anew(module, f"print('{text}')")
        command = [sys.executable, "-c", "import number"]
        names = os.environ | fault_tests.variables(root)
        done = subprocess.run(command, env=names, capture_output=True, text=True, check=True)
        assert done.stdout == f"{text}\n"
    assert [*tmp_path.rglob("*.pyc")]  # it is kept
