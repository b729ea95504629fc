"""The GPU architectures that a library's device code was compiled for.

Only the headers in the `.nv_fatbin` section are read, so neither a GPU nor a decompressor is
needed. A library made by CuTe DSL has no such section: its cubins, which are ELF files, are in its
read-only data. docs/fatbin.md describes the layout and how it was established.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, cast

from fi_ffi.loader.elf import Source, Window, malformed, open_image, open_sections
from fi_ffi.loader.machine import CudaCode, Suffix

SECTION = ".nv_fatbin"
MAGIC = 0xBA55ED50
# Sections for constants, near to and far from the code.
_READ_ONLY = (".rodata", ".lrodata")
# A cubin's ELF header: 64 bits, little-endian, CUDA's newest ABI.
_CUBIN = re.compile(rb"\x7fELF\x02\x01\x01\x41\x08.{9}\xbe\0", re.DOTALL)
_NOTE = ".note.nv.tkinfo"
_ARCH_OPTION = re.compile(rb"-arch sm_(\d{2,3})([af]?)\b")
_MAX_NOTE = 1 << 16
_PIECE = 1 << 20

_CONTAINER = struct.Struct("<IHHQ")  # magic, version, header size, size of all entries
_ENTRY = struct.Struct("<HHIQIIHHIIIQ")  # up to the flags; the rest depends on the kind
_VERSION = 1
_KINDS: dict[int, Literal["ptx", "sass"]] = {1: "ptx", 2: "sass"}
_ARCH_SPECIFIC = 1 << 20
_FAMILY_SPECIFIC = 1 << 21
# Every real architecture's number is in this range; another one means a damaged header.
_SM_RANGE = range(10, 10_000)
# Containers are aligned to 8 bytes; a larger gap than a page is not padding.
_MAX_PADDING = 4096


def architectures(source: Source) -> tuple[CudaCode, ...]:
    """Return the architectures of the device code in `source`, sorted, without duplicates.

    `source` is the path of a library, its bytes, or the bytes of a fatbin (as `nvcc -fatbin` writes
    it). The result is empty if there is no device code that the driver would load. Raises
    ArtifactError if the data is malformed.
    """
    with _open_fatbin(source) as windows:
        fatbin = windows.pop(SECTION, None)
        if fatbin is not None:
            found = set(_codes(fatbin))
        else:
            found = {code for window in windows.values() for code in _cubins(window)}
    return tuple(sorted(found, key=lambda code: (code.sm, code.suffix, code.kind != "sass")))


@contextmanager
def _open_fatbin(source: Source) -> Iterator[dict[str, Window]]:
    if isinstance(source, bytes) and source[:4] != b"\x7fELF":
        with malformed(source):
            window = Window(lambda offset, count: source[offset : offset + count], 0, len(source))
            yield {SECTION: window}
    else:
        with open_sections(source, (SECTION, *_READ_ONLY)) as windows:
            yield windows


def _cubins(window: Window) -> Iterator[CudaCode]:
    """Yield the code of every cubin embedded in `window`."""
    for start in _found(_CUBIN, window):
        cubin = open_image(window.part(start, window.size - start))
        sm = cubin["e_flags"] >> 8 & 0xFF
        # The header does not contain the suffix; the compiler options in this note do.
        note = cubin.get_section_by_name(_NOTE)
        text = b"" if note is None or note["sh_size"] > _MAX_NOTE else note.data()
        option = _ARCH_OPTION.search(text)
        if sm not in _SM_RANGE or (option and int(option[1]) != sm):
            raise ValueError(
                f"a cubin for architecture {sm}, compiled with "
                + (option[0].decode() if option else "-")
            )
        yield CudaCode("sass", sm, cast(Suffix, option[2].decode() if option else "a"))


def _codes(window: Window) -> Iterator[CudaCode]:
    """Yield the code of every container; the linker concatenates one for each object file."""
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


def _found(pattern: re.Pattern[bytes], window: Window) -> Iterator[int]:
    """Yield the positions of a short pattern in `window`, which may be large."""
    for start in range(0, window.size, _PIECE):
        piece = window.at(start, _PIECE + _MAX_PADDING)
        yield from (start + at for m in pattern.finditer(piece) if (at := m.start()) < _PIECE)


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
        # Other kinds (such as link-time IR) contain nothing that the driver loads directly.
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
