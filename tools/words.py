"""Count the words of the pages as a reader sees them: those written by hand, and generated ones.

    python3 tools/words.py

Code, comments, link targets and the marks of tables are no words.
"""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_UNSEEN = (
    re.compile(r"```.*?```", re.DOTALL),
    re.compile(r"<!--.*?-->", re.DOTALL),
    re.compile(r"\]\([^)]*\)"),
    re.compile(r"https?://\S+"),
)


def pages() -> list[Path]:
    """All pages but the log of changes."""
    found = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]
    return sorted(page for page in found if page.name != "CHANGELOG.md")


def is_generated(page: Path) -> bool:
    """Whether a generator writes it."""
    written = re.compile(
        rf'^TARGET = .*"{re.escape(page.name)}"|write_or_check\(.*"{re.escape(page.name)}"', re.M
    )
    makers = ROOT.glob("tools/generate_*.py")
    of_first_call = page.name == "first-call.md"  # tools/first_call.py prints it
    return of_first_call or any(written.search(maker.read_text()) for maker in makers)


def words(text: str) -> int:
    for unseen in _UNSEEN:
        text = unseen.sub(" ", text)
    return sum(any(letter.isalnum() for letter in word) for word in text.split())


def main() -> None:
    totals = {False: 0, True: 0}
    for page in pages():
        count, generated = words(page.read_text()), is_generated(page)
        totals[generated] += count
        print(f"{count:6} {page.relative_to(ROOT)}{' (generated)' * generated}")
    print(f"{totals[False]} words by hand, {totals[True]} generated")


if __name__ == "__main__":
    main()
