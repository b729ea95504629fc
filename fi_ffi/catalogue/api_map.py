"""Where FlashInfer's names and vLLM's operators are: `data/flashinfer-api.toml`, read.

docs/flashinfer-api.md is made from it, and the error for a name that `fi_ffi` lacks.
"""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from fi_ffi.errors import nearest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found,unused-ignore]

TABLE = Path(__file__).with_name("data") / "flashinfer-api.toml"
_VLLM = "vLLM: "
_ALIKE = 0.75  # how similar a name is that is worth a hint
_PART = re.compile(r"(?:^| )(fi_ffi|entry): ([\w.]+(?:, [\w.]+)*)(?= (?:fi_ffi|entry):|$)")


@dataclass(frozen=True)
class ApiName:
    """A name of `section` (a module of FlashInfer's, a group of vLLM's, or one of what engines take
    of a later release), and what serves it."""

    section: str
    name: str
    # Public names of fi_ffi, and functions of modules as "module.function".
    ops: tuple[str, ...]
    entries: tuple[str, ...]
    # Why there is neither.
    reason: str
    remark: str

    @classmethod
    def read(cls, section: str, name: str, text: str) -> ApiName:
        """`ValueError` for what is not written as the table's head says."""
        served, _, remark = (part.strip() for part in text.partition(" | "))
        if served.startswith("none: "):
            return cls(section, name, (), (), served.removeprefix("none: "), remark)
        parts = {kind: tuple(names.split(", ")) for kind, names in _PART.findall(served)}
        if _PART.sub("", served).strip() or not parts:
            raise ValueError(
                f"{section}, {name}: {text!r} is none of the forms of the table's head"
            )
        return cls(section, name, parts.get("fi_ffi", ()), parts.get("entry", ()), "", remark)


@functools.cache
def release() -> str:
    """The release of FlashInfer that the table is of."""
    return str(tomllib.loads(TABLE.read_text())["release"])


@functools.cache
def rows() -> tuple[ApiName, ...]:
    """All rows, in the table's order."""
    document = tomllib.loads(TABLE.read_text())
    return tuple(
        ApiName.read(section, name, text)
        for section, texts in document.items()
        if isinstance(texts, dict)
        for name, text in texts.items()
    )


def hint(name: str, public: Collection[str]) -> str:
    """Return what to use instead of a name that is not `public`: "" if nothing is like it.

    The name may be FlashInfer's, or either's with other underscores, capitals or order of words.
    """
    by_name = {row.name: row for row in rows() if not row.section.startswith(_VLLM)}
    if name in by_name:
        return f"; {_told(by_name[name])}"
    # fi_ffi's own name wins over the same name of FlashInfer's.
    for key in (_squeezed, _sorted):
        alike = {key(one): one for one in (*by_name, *public)}
        if (other := alike.get(key(name))) is not None:
            return f"; {_told(by_name[other])}" if other not in public else f"; use fi_ffi.{other}"
    return nearest(name, [*by_name, *public], _ALIKE)


def _squeezed(name: str) -> str:
    return name.replace("_", "").lower()


def _sorted(name: str) -> str:
    return "_".join(sorted(name.lower().split("_")))


def _told(row: ApiName) -> str:
    """Return a sentence about a name of FlashInfer's."""
    if row.reason:
        told = f"FlashInfer's {row.name} has no counterpart: {row.reason}"
    else:
        entries = (entry.rpartition(".") for entry in row.entries)
        calls = [f'fi_ffi.module("{module}").entry("{entry}")' for module, _, entry in entries]
        names = [f"fi_ffi.{op}" for op in row.ops]
        told = f"FlashInfer's {row.name} is {' or '.join([*names, *calls])} here"
    return f"{told} ({row.remark})" if row.remark else told
