"""The record of what the modules of a release export: `data/entries-RELEASE.json`."""

from __future__ import annotations

import functools
from pathlib import Path

from tools.release.entries import Entries, Entry, Group, read_entries

__all__ = ["Entries", "Entry", "Group", "entries_of"]
_DATA = Path(__file__).with_name("data")


@functools.cache
def entries_of(release: str) -> Entries | None:
    """The record of a release; None where there is none."""
    path = _DATA / f"entries-{release}.json"
    return read_entries(path) if path.exists() else None
