"""What the generators share: write a file, or (`--check`) only compare it."""

from __future__ import annotations

import sys
from pathlib import Path


def write_or_check(target: Path, text: str, generator: str) -> int:
    """The exit status: 1 where `--check` finds the file stale."""
    if "--check" not in sys.argv[1:]:
        target.write_text(text)
    elif not target.exists() or target.read_text() != text:
        print(f"{target.name} is stale: run python3 tools/{Path(generator).name}")
        return 1
    return 0
