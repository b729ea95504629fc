"""Where FlashInfer's public names and vLLM's operators are: `data/flashinfer-api.toml`, read."""

from __future__ import annotations

import functools
import re
import sys
from dataclasses import dataclass
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

TABLE = Path(__file__).with_name("data") / "flashinfer-api.toml"
_PART = re.compile(r"(?:^| )(fi_ffi|entry): ([\w.]+(?:, [\w.]+)*)(?= (?:fi_ffi|entry):|$)")


@dataclass(frozen=True)
class Row:
    """A name of `section` (a module of FlashInfer's, or a group of vLLM's), and what serves it."""

    section: str
    name: str
    # Public names of fi_ffi, and functions of modules as "module.function".
    ops: tuple[str, ...]
    entries: tuple[str, ...]
    # Why there is neither.
    reason: str
    remark: str

    @classmethod
    def read(cls, section: str, name: str, text: str) -> Row:
        """`ValueError` for what is not written as the table's head says."""
        given, _, remark = (part.strip() for part in text.partition(" | "))
        if given.startswith("none: "):
            return cls(section, name, (), (), given.removeprefix("none: "), remark)
        found = {kind: tuple(names.split(", ")) for kind, names in _PART.findall(given)}
        if _PART.sub("", given).strip() or not found:
            raise ValueError(
                f"{section}, {name}: {text!r} is none of the forms of the table's head"
            )
        return cls(section, name, found.get("fi_ffi", ()), found.get("entry", ()), "", remark)


@functools.cache
def release() -> str:
    """The release of FlashInfer that the table is of."""
    return str(tomllib.loads(TABLE.read_text())["release"])


@functools.cache
def rows() -> tuple[Row, ...]:
    """All rows, in the table's order."""
    document = tomllib.loads(TABLE.read_text())
    return tuple(
        Row.read(section, name, text)
        for section, texts in document.items()
        if isinstance(texts, dict)
        for name, text in texts.items()
    )
