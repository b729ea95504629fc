"""Installed distributions, by the names of their folders.

`importlib.metadata` imports the email package, which is a good part of a first call.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_SUFFIX = ".dist-info"


@dataclass(frozen=True)
class Distribution:
    """An installed distribution: the folder of its metadata, beside its packages."""

    info: Path

    @property
    def name(self) -> str:
        return self.info.name.partition("-")[0].replace("_", "-")

    @property
    def version(self) -> str:
        return self.info.name.removesuffix(_SUFFIX).partition("-")[2]

    def file(self, member: str) -> Path:
        """Return the path of a file that RECORD calls `member`."""
        return self.info.parent / member

    def record(self) -> Iterator[tuple[str, str]]:
        """Yield RECORD's members and their hashes; "" for one without a hash."""
        import csv  # imported late: a copy of libtvm_ffi that is loaded is not looked up

        text = ""
        with contextlib.suppress(OSError, UnicodeDecodeError):
            text = (self.info / "RECORD").read_text("utf-8")
        for row in csv.reader(text.splitlines()):
            if row:
                yield row[0], row[1] if len(row) == 3 else ""


def installed(name: str) -> list[Distribution]:
    """Return the distributions whose names start with `name`, as `sys.path` has them."""
    # By file name: asking every distribution for its name would read all their metadata.
    folders = dict.fromkeys(sys.path)
    return [
        Distribution(path)
        for folder in folders
        for path in sorted(Path(folder or ".").glob(f"{name}*{_SUFFIX}"))
    ]
