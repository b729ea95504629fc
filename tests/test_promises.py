"""The promises of the pages on safety, threads and groups: each names the tests that hold it.

A promise is a row of a table, or a bullet. Its tests stand in a comment in it (`held by: NAMES`) or
in backticks; a comment on lines of its own is for the whole block below: a table, a list or a
paragraph. What no test shows says so in its text, or in a comment with the reason (`no promise`).
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("docs/threads.md", "docs/threat-model.md", "docs/howto/several-gpus.md")
COMMENT = re.compile(r"<!-- (held by|no promise): ([^>]+?) -->")
OPENLY = re.compile(r"\b(not|never) (been )?(run|tested)\b")


class Promise(NamedTuple):
    line: int
    text: str
    above: str  # the comment for the whole block

    @property
    def tests(self) -> set[str]:
        held = [names for kind, names in COMMENT.findall(self.text + self.above) if kind[0] == "h"]
        return {*re.findall(r"\w+", " ".join(held)), *re.findall(r"`(test_\w+)`", self.text)}

    @property
    def is_told(self) -> bool:
        """Whether the reader is told that there is no test."""
        return "<!-- no promise: " in self.text + self.above or bool(OPENLY.search(self.text))


def blocks(page: str) -> Iterator[tuple[int, list[str]]]:
    """Lines without an empty one between them, and the number of the first; code left out."""
    found: list[str] = []
    is_code = False
    for number, line in enumerate([*page.splitlines(), ""], 1):
        is_code ^= line.startswith("```")
        if is_code or line.startswith("```") or not line.strip():
            if found:
                yield number - len(found), found
            found = []
        else:
            found.append(line)


def promises(page: str) -> Iterator[Promise]:
    above = ""
    for start, lines in blocks(page):
        text = " ".join(" ".join(lines).split())
        if COMMENT.fullmatch(text):
            above = text
            continue
        rows = [i for i, line in enumerate(lines) if line.startswith("|")][2:]  # without the head
        starts = rows or [i for i, line in enumerate(lines) if line.startswith("- ")]
        for first, end in itertools.pairwise([*starts, len(lines)]):
            yield Promise(start + first, " ".join(lines[first:end]), above)
        if not starts and above:
            yield Promise(start, text, above)
        above = ""


def all_tests() -> set[str]:
    files = (ROOT / "tests").rglob("*.py")
    return {
        name
        for file in files
        for name in re.findall(r"^def (test_\w+)", file.read_text(), re.MULTILINE)
    }


@pytest.mark.parametrize("page", PAGES)
def test_each_promise_names_the_tests_that_hold_it(page):
    found, there = [*promises((ROOT / page).read_text())], all_tests()
    assert len(found) > 10
    without = [f"{page}:{p.line}: {p.text[:60]}" for p in found if not (p.tests or p.is_told)]
    assert not without, "\n".join(["no test is named by", *without])
    lost = [f"{page}:{p.line}: {name}" for p in found for name in sorted(p.tests - there)]
    assert not lost, "\n".join(["there is no test", *lost])


@pytest.mark.parametrize("page", PAGES)
def test_each_comment_is_of_a_promise(page):
    """None is misspelt, or stands where no promise is."""
    text = (ROOT / page).read_text()
    words = [" ".join(each.split()) for each in re.findall(r"<!--.*?-->", text, re.DOTALL)]
    marks = [each for each in words if re.search(r"held|promise|test_", each)]
    assert all(map(COMMENT.fullmatch, marks)), marks
    inside = {mark for p in promises(text) for mark in COMMENT.findall(p.text + p.above)}
    assert {COMMENT.fullmatch(mark).groups() for mark in marks} == inside


def test_what_is_a_promise():
    page = """
# Page

Words that promise nothing.

<!-- held by: test_a,
     test_b -->

| what | how |
|---|---|
| one | two |
| three `test_c` | four <!-- held by: test_d --> |

- a bullet
  of two lines <!-- held by: test_e -->
- a bullet that has not been run
- a bullet without a test

<!-- no promise: a rule -->

- another

<!-- held by: test_f -->

A paragraph.

```sh
| no | row |
```
"""
    found = [*promises(page)]
    assert [p.tests for p in found] == [
        {"test_a", "test_b"}, {"test_a", "test_b", "test_c", "test_d"}, {"test_e"},
        set(), set(), set(), {"test_f"},
    ]  # fmt: skip
    assert [p.is_told for p in found] == [False, False, False, True, False, True, False]
    assert [p.line for p in found] == [11, 12, 14, 16, 17, 21, 25]
