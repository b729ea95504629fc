"""Which entries this project has called on which GPUs: `data/called.json` of the loader.

The GPU tests write what they called, and tools/record_called.py merges it into the file.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path

from fi_ffi import loader
from fi_ffi.loader.uris import parse

DATA = Path(loader.__file__).with_name("data") / "called.json"


@dataclass(frozen=True)
class Run:
    """The entries that were called on one kind of GPU, as (family, entry)."""

    device: str
    capability: tuple[int, int]
    # Of FlashInfer, whose kernels they were.
    release: str
    entries: frozenset[tuple[str, str]]


@functools.cache
def runs() -> tuple[Run, ...]:
    """What was called, by device."""
    data = json.loads(DATA.read_text()) if DATA.exists() else {"runs": []}
    return tuple(
        Run(
            run["device"], (run["capability"][0], run["capability"][1]), run["release"],
            frozenset((family, e) for family, names in run["entries"].items() for e in names),
        )
        for run in data["runs"]
    )  # fmt: skip


def key_of(module: str, symbol: str) -> tuple[str, str]:
    """The family of a module (with its backend, where it has one) and an entry of it."""
    parsed = parse(module)
    if parsed is None:
        return module, symbol
    return f"{parsed.family}:{parsed.backend}" if parsed.backend else parsed.family, symbol


def devices_that_called(
    module: str, symbol: str, capability: tuple[int, int] | None, release: str
) -> list[str]:
    """The devices of a compute capability on which a release's entry was called."""
    family, symbol = key_of(module, symbol)
    return [
        run.device
        for run in runs()
        if (run.capability, run.release) == (capability, release)
        and any(symbol == entry and family in _names(known) for known, entry in run.entries)
    ]


def _names(known: str) -> tuple[str, str]:
    """A family by itself stands for any backend of it."""
    return known, known.partition(":")[0]
