"""The record of a release's exports, written by `python3 -m tools.release record --modules`.

It is read from FlashInfer's bindings, for every module built ahead of time, and compared with
binaries by `tests/gpu/test_entries.py`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fi_ffi.abi.signature import Signature
from fi_ffi.catalogue.ahead_of_time import ParameterGrid
from fi_ffi.module_names import parse


@dataclass(frozen=True)
class Entry:
    """A function of a module: its signature and its parameters' names."""

    signature: Signature
    names: tuple[str, ...]

    @classmethod
    def read(cls, name: str, data: Mapping[str, Any]) -> Entry:
        names, types = zip(*data["params"], strict=True) if data["params"] else ((), ())
        return cls(Signature(name, types, data["result"]), names)

    def write(self) -> dict[str, Any]:
        """Return the JSON that `read` reads."""
        pairs = zip(self.names, self.signature.params, strict=True)
        return {"params": [[*pair] for pair in pairs], "result": self.signature.result}


@dataclass(frozen=True)
class Group:
    """Modules with the same exports; `objects` has methods, by class and name.

    If not `is_listed`, FlashInfer makes the modules only on request, and these are examples.
    """

    grids: tuple[ParameterGrid, ...]
    count: int
    sources: tuple[str, ...]
    entries: Mapping[str, Entry]
    objects: Mapping[str, Mapping[str, Entry]]
    is_listed: bool = True

    @property
    def families(self) -> list[str]:
        return [*dict.fromkeys(grid.family for grid in self.grids)]


@dataclass(frozen=True)
class Entries:
    """The exports of all modules of a release."""

    release: str
    groups: tuple[Group, ...]

    def of(self, module: str) -> Group | None:
        """Return a module's exports; None if they are not recorded."""
        parsed = parse(module, self.release)
        if parsed is None:
            return None
        return next((g for g in self.groups if any(grid.has(parsed) for grid in g.grids)), None)

    def of_family(self, family: str) -> list[Group]:
        return [group for group in self.groups if family in group.families]

    def __iter__(self) -> Iterator[Group]:
        return iter(self.groups)


def read_entries(path: Path) -> Entries:
    """Read a record from a file."""
    data = json.loads(path.read_text())
    return Entries(data["release"], tuple(map(_group, data["groups"])))


def _group(data: Mapping[str, Any]) -> Group:
    return Group(
        grids=tuple(map(ParameterGrid.read, data["modules"])),
        count=data["count"],
        sources=tuple(data["sources"]),
        entries={name: Entry.read(name, entry) for name, entry in data["entries"].items()},
        objects={
            kind: {name: Entry.read(name, entry) for name, entry in methods.items()}
            for kind, methods in data.get("objects", {}).items()
        },
        is_listed=data.get("listed", True),
    )
