"""docs/troubleshooting.md against messages: those raised for it, and those of the sources.

A heading's patterns are the lines of its text blocks, `…` standing for anything.
"""

from __future__ import annotations

import ast
import functools
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

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "troubleshooting.md"
CLASSES = {
    name: value
    for name, value in vars(errors).items()
    if isinstance(value, type) and issubclass(value, errors.FiFfiError)
}
ANY = "…"


class Pattern(NamedTuple):
    heading: str
    text: str

    @property
    def regex(self) -> str:
        return ".*?".join(map(re.escape, self.text.split(ANY)))

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
    return [p.heading for p in PATTERNS if p.words and re.match(p.regex, line)]


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
    with pytest.raises(kind) as caught:
        act(**given)
    monkeypatch.undo()
    message = f"{kind.__name__}: {caught.value}"
    assert type(caught.value) is kind, message
    assert heading in headings(message), (message, headings(message))
    # A cause may be shown before it; never an error that nobody can do anything about.
    shown = "".join(traceback.format_exception(caught.value))
    assert "During handling of the above exception" not in shown, shown


# What the sources say


FRAME = re.compile(r"\w+: …: argument `[^`]*`: got |, expected |: argument `|`: got ")
# Read by tools, or of values that only a library of another TVM-FFI makes.
INTERNAL = ("cli/replaying", "abi/signature",
            "watch/safetensors", "loader/lockfile", "loader/lockedit", "abi/values")  # fmt: skip


def text_of(node: ast.AST) -> str:
    """An expression's text, … for what is put in."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(map(text_of, node.values))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return text_of(node.left) + text_of(node.right)
    return ANY


@functools.cache
def trees() -> dict[str, ast.Module]:
    files = sorted((ROOT / "fi_ffi").rglob("*.py"))
    return {str(f.relative_to(ROOT / "fi_ffi")): ast.parse(f.read_text()) for f in files}


def messages() -> Iterator[tuple[str, str]]:
    """Where each error is made, and its message; those of arguments are put together elsewhere."""
    for name, tree in trees().items():
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
                continue
            kind = CLASSES.get(node.func.id)
            if kind is None or issubclass(kind, errors.ArgumentError) or not node.args:
                continue
            parts = 3 if issubclass(kind, errors.KernelError) else 1
            text = ": ".join(map(text_of, node.args[:parts]))
            if re.search(r"\w", text.replace(ANY, "")):
                yield f"{name}:{node.lineno}", f"{kind.__name__}: {text}"


@functools.cache
def strings() -> list[str]:
    """The literal text of each file."""
    return [
        "\n".join(
            text_of(n).replace("\n", " ")
            for n in ast.walk(tree)
            if isinstance(n, (ast.Constant, ast.JoinedStr))
        )
        for tree in trees().values()
    ]


def is_shown(message: str) -> bool:
    """Whether a pattern of the page is such a message, with a part of it put in."""
    regex = ".*?".join(map(re.escape, message.replace("\n", " ").split(ANY)))
    return any(re.fullmatch(regex, pattern.text) for pattern in PATTERNS)


# Messages put together of several files' words; each is raised above.
ASSEMBLED = {"Kernels for another GPU", "libcudart is missing", "cuBLAS or NVRTC is missing",
             "KernelError", "DeviceError", "HangError"}  # fmt: skip


def is_in_a_source(pattern: Pattern) -> bool:
    frame = ("CUDA error ", "RuntimeError: ")  # put together of several arguments
    if pattern.text.startswith(("Argument", "Kernel", "Device")):
        words = [w for part in pattern.text.split(ANY) for w in FRAME.split(part)]
        words = [w.strip(": ,`") for w in words if re.search(r"\w{3}", w)]
        words = [w for w in words if w not in CLASSES and not w.startswith(frame)]
        words = [w.partition("Error: ")[2] or w for w in words]
    else:
        words = pattern.words
    return any(all(word in text for word in words) for text in strings())


def test_every_class_has_a_heading() -> None:
    found = re.findall(r"^#+ (\w+)$", PAGE.read_text(), re.MULTILINE)
    assert {*CLASSES} <= {*found}
    assert len(found) == len({*found})
    for pattern in PATTERNS:
        assert pattern.text.partition(":")[0] in CLASSES, pattern


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda p: p.text[:60])
def test_every_pattern_is_a_message(pattern: Pattern) -> None:
    assert is_in_a_source(pattern) or pattern.heading in ASSEMBLED, pattern
    assert {heading for heading, _, _ in RAISED} > ASSEMBLED


def test_every_message_of_the_sources_is_found() -> None:
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
    assert not is_in_a_source(Pattern("", "LoaderError: the … is in the wrong phase"))


def test_the_commands_are_there() -> None:
    """Links lead to pages; what is quoted of the command line exists (tests/test_blocks.py)."""
    for target in re.findall(r"\]\(([\w/.-]+\.md)", PAGE.read_text()):
        assert (PAGE.parent / target).is_file(), target
