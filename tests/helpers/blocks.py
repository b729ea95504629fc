"""The code blocks of a page, and the marks before them that say what becomes of each.

A mark is an HTML comment directly before a fence; docs/testing.md has them all.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

from tests.helpers.children import ROOT

PAGES = sorted([ROOT / "README.md", ROOT / "SECURITY.md", *(ROOT / "docs").rglob("*.md")])

RUN = ("python", "sh")
PARSED = ("json", "toml")
SHOWN = ("console", "text")
DIRECTIVES = ("{toctree}", "{include}", "{eval-rst}")  # of the site; they hold no code
NEEDS = ("gpu", "long")
# What a mark's value has to be, and the languages that it can stand before; None: any.
_MARKS: dict[str, tuple[str, tuple[str, ...] | None]] = {
    "needs": (rf"({'|'.join(NEEDS)})(, .+)?", RUN),
    "not run": (r"\S+( \S+){2,}", None),
    "run by": (r"\S+", RUN),
    "raises": (r"[A-Za-z_.]+", ("python",)),
    "exits": (r"\d+", ("sh",)),
    "signature": (r"", ("python",)),
    "output": (r"", SHOWN),
}
_COMMENT = re.compile(r"<!--(.*?)-->", re.DOTALL)
_MARK = re.compile(rf"\s*({'|'.join(_MARKS)})(?::\s*(.*))?\s*", re.DOTALL)
_SETUP = re.compile(r"[ \t]*setup[ \t]*\n")


class PageError(Exception):
    """A page's fence or mark cannot be, or does not do what the page says."""


@dataclass
class Block:
    page: Path
    line: int  # of the first line of code
    language: str
    code: str
    marks: dict[str, str] = field(default_factory=dict)
    setup: str = ""
    setup_line: int = 0

    @property
    def place(self) -> str:
        return f"{shown(self.page)}:{self.line}"

    @property
    def needs(self) -> str:
        """`gpu`, `long`, or nothing."""
        return self.marks.get("needs", "").partition(",")[0]

    @property
    def is_left_out(self) -> bool:
        """It is run elsewhere or nowhere, as its mark says."""
        return "not run" in self.marks or "run by" in self.marks


def shown(page: Path) -> str:
    return str(page.relative_to(ROOT)) if page.is_relative_to(ROOT) else page.name


def parsed(text: str) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse(text)


def blocks_of(page: Path) -> list[Block]:
    """The page's fences in order; raises `PageError` for one that nothing is said of."""
    found: list[Block] = []
    before: list[tuple[int, str]] = []  # the comments since the last other thing
    for token in parsed(page.read_text()):
        if token.type == "html_block":
            before += _comments(token)
            continue
        line = token.map[0] + 2 if token.map else 0
        if token.type == "code_block":
            raise PageError(f"{shown(page)}:{line - 1}: an indented block has no language: use ```")
        if token.type == "fence":
            block = Block(page, line, token.info.strip(), token.content)
            _mark(block, before)
            found.append(block)
        elif inline := _inline_mark(token):
            raise PageError(f"{shown(page)}:{line - 1}: the mark `{inline}` is not before a block")
        else:
            _refuse_marks(page, before)
        before = []
    _refuse_marks(page, before)
    return found


def _comments(token: Token) -> list[tuple[int, str]]:
    start = token.map[0] + 1 if token.map else 0
    return [
        (start + token.content[: match.start()].count("\n"), match[1])
        for match in _COMMENT.finditer(token.content)
    ]


def _inline_mark(token: Token) -> str:
    inside = [child.content for child in token.children or () if child.type == "html_inline"]
    marks = [match[1] for text in inside for match in _COMMENT.finditer(text)]
    return next((mark.strip() for mark in marks if _is_mark(mark)), "")


def _is_mark(comment: str) -> bool:
    return bool(_MARK.fullmatch(comment) or _SETUP.match(comment))


def _refuse_marks(page: Path, comments: list[tuple[int, str]]) -> None:
    for line, comment in comments:
        if _is_mark(comment):
            mark = comment.strip().partition("\n")[0]
            raise PageError(f"{shown(page)}:{line}: the mark `{mark}` is not before a block")


def _mark(block: Block, comments: list[tuple[int, str]]) -> None:
    for line, comment in comments:
        start = _SETUP.match(comment)
        if start is not None and block.language in RUN and not block.setup:
            block.setup, block.setup_line = comment[start.end() :], line + 1
            continue
        match = _MARK.fullmatch(comment)
        name, value = (match[1], " ".join((match[2] or "").split())) if match else ("", "")
        wanted, languages = _MARKS.get(name, ("", ()))
        fits = name and re.fullmatch(wanted, value)
        if not fits or (languages is not None and block.language not in languages):
            what = " ".join(comment.split())
            raise PageError(f"{shown(block.page)}:{line}: unknown mark `{what}` of a block")
        block.marks[name] = value
    if block.language.split(" ")[0] not in (*RUN, *PARSED, *SHOWN, *DIRECTIVES):
        if not block.language:
            raise PageError(f"{block.place}: a block without a language")
        if "not run" not in block.marks:
            raise PageError(f"{block.place}: {block.language} is not run, and no mark says why")
    if "run by" in block.marks:
        _check_runner(block)


def _check_runner(block: Block) -> None:
    runner = ROOT / block.marks["run by"]
    if not runner.is_file() or block.page.name not in runner.read_text():
        raise PageError(f"{block.place}: {block.marks['run by']} does not name {block.page.name}")
