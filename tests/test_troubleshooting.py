"""docs/troubleshooting.md against messages: those raised for it, and those of the sources.

A heading's patterns are the lines of its text blocks, `…` standing for anything.
"""

from __future__ import annotations

import ast
import re
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from fi_ffi import errors
from fi_ffi.loader import runtime
from fi_ffi.ops.functions import OPS

from tests.helpers.raising import RAISED
from tests.helpers.remains import allowed

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "troubleshooting.md"
CLASSES = {
    name: value
    for name, value in vars(errors).items()
    if isinstance(value, type) and issubclass(value, errors.FiFfiError)
}
ANY = "…"


def regex(text: str) -> str:
    return ".*?".join(map(re.escape, text.replace("\n", " ").split(ANY)))


class Pattern(NamedTuple):
    heading: str
    text: str

    @property
    def words(self) -> list[str]:
        """What is literal in it, the class apart."""
        return [part for part in self.text.partition(": ")[2].split(ANY) if re.search(r"\w", part)]


def patterns(page: str) -> list[Pattern]:
    found, heading, in_block = [], "", False
    for line in page.splitlines():
        if line.startswith("```"):
            in_block = line == "```text"
        elif in_block:
            found.append(Pattern(heading, line))
        elif line.startswith("#"):
            heading = line.lstrip("# ")
    return found


PATTERNS = patterns(PAGE.read_text())


def headings(message: str) -> list[str]:
    """The page's entries that a message, with its class before it, is found in."""
    line = message.replace("\n", " ")
    return [p.heading for p in PATTERNS if p.words and re.match(regex(p.text), line)]


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    yield
    runtime.use_source(None)
    for op in OPS.values():
        op.forget()


@pytest.mark.parametrize(
    ("heading", "kind", "act"), RAISED, ids=[f"{h}-{i}" for i, (h, _, _) in enumerate(RAISED)]
)
def test_what_is_raised_is_found(
    heading: str, kind: type[errors.FiFfiError], act: Callable[..., object],
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    names = {"patch": "monkeypatch"}
    code = act.__code__
    wanted = code.co_varnames[: code.co_argcount]
    given = {name: request.getfixturevalue(names.get(name, name)) for name in wanted}
    # What is raised is prepared there too.
    with allowed(""), pytest.raises(kind) as caught:
        act(**given)
    monkeypatch.undo()
    message = f"{kind.__name__}: {caught.value}"
    assert type(caught.value) is kind, message
    assert heading in headings(message), (message, headings(message))
    # A cause may be shown before it; never an error that nobody can do anything about.
    shown = "".join(traceback.format_exception(caught.value))
    assert "During handling of the above exception" not in shown, shown


# What the sources say

PACKAGES = ("fi_ffi", "fi_ffi_build")
# Read by tools, or of values that only a library of another TVM-FFI makes.
INTERNAL = (
    "fi_ffi/cli/replay",
    "fi_ffi/abi/signature",
    "fi_ffi/watch/safetensors",
    "fi_ffi/abi/values",
    "fi_ffi/modules/packing",
    "fi_ffi/modules/types",
)


def text_of(node: ast.AST) -> str:
    """An expression's text, … for what is put in."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(map(text_of, node.values))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return text_of(node.left) + text_of(node.right)
    return ANY


def messages() -> Iterator[tuple[str, str]]:
    """Where each error is made, and its message; those of arguments are put together elsewhere."""
    for file in sorted(file for name in PACKAGES for file in (ROOT / name).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
                continue
            kind = CLASSES.get(node.func.id)
            if kind is None or issubclass(kind, errors.ArgumentError) or not node.args:
                continue
            parts = 3 if issubclass(kind, errors.KernelError) else 1
            text = ": ".join(map(text_of, node.args[:parts]))
            if re.search(r"\w", text.replace(ANY, "")):
                where = f"{file.relative_to(ROOT)}:{node.lineno}"
                yield where, f"{kind.__name__}: {text}"


def is_shown(message: str) -> bool:
    """Whether a pattern of the page is such a message, with a part of it put in."""
    return any(re.fullmatch(regex(message), pattern.text) for pattern in PATTERNS)


def test_every_class_has_a_heading() -> None:
    found = re.findall(r"^#+ (\w+)$", PAGE.read_text(), re.MULTILINE)
    assert {*CLASSES} <= {*found}
    assert len(found) == len({*found})
    for pattern in PATTERNS:
        assert pattern.text.partition(":")[0] in CLASSES, pattern


def test_every_message_of_the_sources_is_found() -> None:
    assert all((ROOT / f"{name}.py").exists() for name in INTERNAL)
    lost = [
        f"{where}: {message}"
        for where, message in messages()
        if not (where.startswith(INTERNAL) or headings(message) or is_shown(message))
    ]
    assert not lost, "\n".join(["docs/troubleshooting.md lacks:", *lost])


def test_a_message_without_an_entry_is_noticed() -> None:
    assert headings("LoaderError: the moon is in the wrong phase") == []
    assert headings("KernelNotFoundError: no kernels of module 'norm':\n  installed: none") == [
        "No kernels of a module"
    ]
