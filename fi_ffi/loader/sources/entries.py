"""What the modules of a release export, as `fi-ffi release record --modules` writes it.

The record is read from FlashInfer's bindings for every module that it builds ahead of time, and
held against binaries by `tests/gpu/test_entries.py`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fi_ffi.abi.signature import Signature
from fi_ffi.loader.listed import Box
from fi_ffi.loader.uris import parse


@dataclass(frozen=True)
class Entry:
    """A function of a module: its signature, and what its parameters are called."""

    signature: Signature
    names: tuple[str, ...]

    @classmethod
    def read(cls, name: str, data: Mapping[str, Any]) -> Entry:
        names, types = zip(*data["params"], strict=True) if data["params"] else ((), ())
        return cls(Signature(name, types, data["result"]), names)

    def write(self) -> dict[str, Any]:
        """The JSON that `read` reads."""
        pairs = zip(self.names, self.signature.params, strict=True)
        return {"params": [[*pair] for pair in pairs], "result": self.signature.result}


@dataclass(frozen=True)
class Group:
    """Modules that export the same; `objects` has methods, by class and name.

    Not `is_listed` are some of the modules that FlashInfer makes when they are asked for.
    """

    boxes: tuple[Box, ...]
    count: int
    sources: tuple[str, ...]
    entries: Mapping[str, Entry]
    objects: Mapping[str, Mapping[str, Entry]]
    is_listed: bool = True

    @property
    def families(self) -> list[str]:
        return [*dict.fromkeys(box.family for box in self.boxes)]


@dataclass(frozen=True)
class Entries:
    """All of a release."""

    release: str
    groups: tuple[Group, ...]

    def of(self, module: str) -> Group | None:
        """What a module exports; None for one that is not recorded."""
        parsed = parse(module, self.release)
        if parsed is None:
            return None
        return next((g for g in self.groups if any(box.has(parsed) for box in g.boxes)), None)

    def of_family(self, family: str) -> list[Group]:
        return [group for group in self.groups if family in group.families]

    def __iter__(self) -> Iterator[Group]:
        return iter(self.groups)


def read_entries(path: Path) -> Entries:
    """The record in a file."""
    data = json.loads(path.read_text())
    return Entries(data["release"], tuple(map(_group, data["groups"])))


def _group(data: Mapping[str, Any]) -> Group:
    return Group(
        boxes=tuple(map(Box.read, data["modules"])),
        count=data["count"],
        sources=tuple(data["sources"]),
        entries={name: Entry.read(name, entry) for name, entry in data["entries"].items()},
        objects={
            kind: {name: Entry.read(name, entry) for name, entry in methods.items()}
            for kind, methods in data.get("objects", {}).items()
        },
        is_listed=data.get("listed", True),
    )
