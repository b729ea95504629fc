"""Which GPU architectures a library's device code was compiled for.

Reads the headers in the `.nv_fatbin` section and never a payload, so neither a
GPU nor a decompressor is needed; docs/fatbin.md has the layout and how each
part of it was established.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, cast

from fi_ffi.errors import ArtifactError
from fi_ffi.loader.elf import Source, Window, malformed, open_section

SECTION = ".nv_fatbin"
MAGIC = 0xBA55ED50

_CONTAINER = struct.Struct("<IHHQ")  # magic, version, header size, size of all entries
_ENTRY = struct.Struct("<HHIQIIHHIIIQ")  # as far as the flags; the rest varies by kind
_VERSION = 1
# Of Tegra: machine code of another minor is not promised to run there, nor theirs elsewhere.
_JETSONS = ((7, 2), (8, 7))
Suffix = Literal["", "a", "f"]
_KINDS: dict[int, Literal["ptx", "sass"]] = {1: "ptx", 2: "sass"}
_ARCH_SPECIFIC = 1 << 20
_FAMILY_SPECIFIC = 1 << 21
# No architecture has a number outside these; one that does is a damaged header.
_SM_RANGE = range(10, 10_000)
# Containers are aligned to 8; more room than a page is not padding.
_MAX_PADDING = 4096


@dataclass(frozen=True)
class CudaCode:
    """One architecture that device code was compiled for."""

    kind: Literal["sass", "ptx"]
    """"sass" is machine code, "ptx" is compiled by the driver when it is loaded."""
    sm: int
    """Ten times the compute capability: 90 for 9.0."""
    suffix: Suffix = ""
    """"a": for this architecture only; "f": for its family; "": for later ones too."""

    @property
    def name(self) -> str:
        """As nvcc's `-gencode ...,code=` spells it: "sm_90a", "compute_90a"."""
        return f"{'sm' if self.kind == 'sass' else 'compute'}_{self.sm}{self.suffix}"

    def runs_on(self, capability: tuple[int, int]) -> bool:
        """Whether a device of this (major, minor) compute capability can run it."""
        made_for = divmod(self.sm, 10)
        is_sass = self.kind == "sass"
        is_exact = is_sass and (capability in _JETSONS or made_for in _JETSONS)
        if self.suffix == "a" or is_exact:
            return capability == made_for
        if self.suffix == "f" or is_sass:
            return capability[0] == made_for[0] and capability[1] >= made_for[1]
        return capability >= made_for


def sass_named(name: str) -> CudaCode:
    """The machine code that a name such as "sm90a" (or "sm_90a") stands for."""
    match = re.fullmatch(r"sm_?(\d{2,3})([af]?)", name)
    if match is None:
        raise ArtifactError(f"{name!r} names no architecture; one looks like sm90a")
    return CudaCode("sass", int(match[1]), cast(Suffix, match[2]))


@dataclass(frozen=True)
class Verdict:
    """Whether a device can run a library's code, and why."""

    ok: bool
    reason: str


def architectures(source: Source) -> tuple[CudaCode, ...]:
    """What the device code in `source` was compiled for, sorted, each once.

    `source` is the path of a library, its bytes, or the bytes of a fatbin alone
    (what `nvcc -fatbin` writes).  Empty where there is no device code that the
    driver would load.  ArtifactError where it is malformed.
    """
    with _open_fatbin(source) as window:
        found = set() if window is None else set(_codes(window))
    return tuple(sorted(found, key=lambda code: (code.sm, code.suffix, code.kind != "sass")))


def runs_on(codes: Iterable[CudaCode], capability: tuple[int, int]) -> Verdict:
    """Whether a device of compute capability (major, minor) can run any of `codes`."""
    codes = tuple(codes)
    device = "the device is sm_{}{}".format(*capability)
    usable = [code for code in codes if code.runs_on(capability)]
    # The driver prefers machine code, and of that the code nearest to the device.
    best = max(usable, key=lambda code: (code.kind == "sass", code.sm, code.suffix), default=None)
    if best is not None:
        how = "runs as it is" if best.kind == "sass" else "is compiled by the driver when loaded"
        return Verdict(True, f"has {best.name}, which {how}; {device}")
    if not codes:
        return Verdict(False, f"has no device code; {device}")
    return Verdict(False, f"has {', '.join(code.name for code in codes)} only; {device}")


@contextmanager
def _open_fatbin(source: Source) -> Iterator[Window | None]:
    if isinstance(source, bytes) and source[:4] != b"\x7fELF":
        with malformed(source):
            yield Window(lambda offset, count: source[offset : offset + count], 0, len(source))
    else:
        with open_section(source, SECTION) as window:
            yield window


def _codes(window: Window) -> Iterator[CudaCode]:
    """The code of every container; the linker puts one after another, one per object file."""
    offset = 0
    while True:
        ahead = window.at(offset, _MAX_PADDING)
        offset += len(ahead) - len(ahead.lstrip(b"\0"))
        if offset >= window.size:
            return
        magic, version, header_size, size = _unpack(_CONTAINER, window, offset)
        if magic != MAGIC or version != _VERSION or header_size < _CONTAINER.size:
            raise ValueError(
                f"no fatbin container at offset {offset} of {SECTION}: "
                f"magic {magic:#x}, version {version}, header of {header_size} bytes"
            )
        yield from _entries(window.part(offset + header_size, size))
        offset += header_size + size


def _entries(container: Window) -> Iterator[CudaCode]:
    offset = 0
    while offset < container.size:
        fields = _unpack(_ENTRY, container, offset)
        kind, header_size, payload_size, sm, flags = (fields[i] for i in (0, 2, 3, 8, 11))
        if header_size < _ENTRY.size or header_size + payload_size > container.size - offset:
            raise ValueError(
                f"a fatbin entry claims {header_size} + {payload_size} bytes "
                f"where its container has {container.size - offset}"
            )
        # Other kinds (link-time IR, for one) hold nothing that the driver loads by itself.
        if kind in _KINDS:
            if sm not in _SM_RANGE:
                raise ValueError(f"a fatbin entry is for architecture {sm}")
            if flags & _ARCH_SPECIFIC and flags & _FAMILY_SPECIFIC:
                raise ValueError(f"a fatbin entry has contradictory flags {flags:#x}")
            narrow: Suffix = "f" if flags & _FAMILY_SPECIFIC else ""
            yield CudaCode(_KINDS[kind], sm, "a" if flags & _ARCH_SPECIFIC else narrow)
        offset += header_size + payload_size


def _unpack(layout: struct.Struct, window: Window, offset: int) -> tuple[int, ...]:
    data = window.at(offset, layout.size)
    if len(data) < layout.size:
        raise ValueError(f"a fatbin header at offset {offset} is cut off after {len(data)} bytes")
    return layout.unpack(data)
