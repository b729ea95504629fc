"""The contents of an ELF file, read without loading it.

pyelftools parses the structures. It trusts the lengths and counts that it reads, so it gets a
stream that ends with the file and that raises after more reads than a well-formed file needs. The
symbol table is parsed here, because pyelftools creates a Python object for each symbol and would
take most of the time.
"""

from __future__ import annotations

import io
import os
import re
import struct
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from fi_ffi.errors import ArtifactError, LoaderError
from fi_ffi.loader import trust

Source = str | os.PathLike[str] | bytes
"""A path, or the bytes of the file itself."""

FUNCTION_PREFIX = "__tvm_ffi_"
"""Prefix of an exported TVM-FFI function's symbol, before the function's name."""

RUNTIME = r"TVMFFI|_Z\w*3tvm3ffi"
"""Matches symbols of libtvm_ffi: its C interface, and the C++ of its namespace."""

# Companions that tvm-ffi exports under the same prefix. They return descriptions of a function and
# are not operations of the module.
_COMPANIONS = ("_metadata_", "_doc_")

# Variables that must be filled in while a library is loaded, if TVM's compiler made it or if it
# embeds modules: see `loader/imports.py`.
_CONTEXT_PREFIX, _CONTEXT = "__TVM", ("__tvm_ffi__library_ctx", "__tvm_ffi__library_bin")

# e_machine -> the name used by wheels and `uname -m`.
_MACHINES = {"EM_X86_64": "x86_64", "EM_AARCH64": "aarch64"}

_TEXT_TAGS = {"DT_NEEDED", "DT_RUNPATH", "DT_RPATH"}

SYMBOL = struct.Struct("<IBBHQQ")  # Elf64_Sym: name, info, other, shndx, value, size
_STB_GLOBAL, _STB_WEAK = 1, 2
_BINDINGS = {_STB_GLOBAL, _STB_WEAK}  # bindings that dlsym finds
_STT_OBJECT, _STT_FUNC = 1, 2
_VISIBLE = {0, 3}  # STV_DEFAULT, STV_PROTECTED

# A kernel module needs about 900 reads, and tables of about 20 kB.
_MAX_READS = 50_000
_MAX_READ = 1 << 20
_MAX_TABLE = 16 << 20
_MAX_NAME = 1024


@dataclass(frozen=True)
class ElfInfo:
    """A shared library's interface to the rest of the process."""

    machine: str
    """"x86_64" or "aarch64"."""
    needed: tuple[str, ...]
    """DT_NEEDED, in the order in which they are loaded."""
    runpath: str | None
    """DT_RUNPATH, or DT_RPATH without it."""
    functions: tuple[str, ...]
    """Exported TVM-FFI functions, without `FUNCTION_PREFIX`, sorted."""
    requires: tuple[str, ...]
    """libtvm_ffi symbols that must be defined before loading, sorted, without weak ones."""
    context: tuple[str, ...] = ()
    """Exported variables that must be filled in while it is loaded, sorted."""


class Window:
    """A range of a file, read piecewise and never past its end.

    It is also a file object for pyelftools, which raises after too many reads.
    """

    def __init__(self, read: Callable[[int, int], bytes], start: int, size: int) -> None:
        self._read, self.start, self.size = read, start, size
        self._position, self._reads_left = 0, _MAX_READS

    def at(self, offset: int, count: int) -> bytes:
        """Return up to `count` bytes from `offset`; fewer at the end."""
        count = min(count, self.size - offset)
        return self._read(self.start + offset, count) if offset >= 0 < count else b""

    def part(self, offset: int, size: int) -> Window:
        """Return the range of `size` bytes from `offset`; ValueError if it is not inside."""
        if not 0 <= offset <= offset + size <= self.size:
            raise ValueError(f"{size} bytes at offset {offset} of {self.size}")
        return Window(self._read, self.start + offset, size)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size}
        self._position = base[whence] + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def read(self, count: int = _MAX_READ) -> bytes:
        self._reads_left -= 1
        if self._reads_left < 0:
            raise ValueError("its tables refer to one another without end")
        data = self.at(self._position, min(count, _MAX_READ))
        self._position += len(data)
        return data


def inspect_elf(path: Source) -> ElfInfo:
    """Read the interface of the shared library at `path`.

    Raises ArtifactError if the file is not a well-formed 64-bit little-endian shared library for a
    known machine, and LoaderError if it cannot be opened.
    """
    with open_elf(path) as (elf, window):
        machine = _MACHINES.get(elf["e_machine"])
        if machine is None:
            raise ValueError(
                f"made for machine {elf['e_machine']}, not for {' or '.join(_MACHINES.values())}"
            )
        tags = _dynamic_tags(elf)
        functions, requires, context = _symbols(elf, window)
        return ElfInfo(
            machine=machine,
            needed=tuple(tags.get("DT_NEEDED", ())),
            runpath=next(iter(tags.get("DT_RUNPATH") or tags.get("DT_RPATH") or ()), None),
            functions=functions,
            requires=requires,
            context=context,
        )


def undefined(path: Source) -> tuple[str, ...]:
    """Return the symbols that a library leaves undefined, sorted, without weak ones."""
    with open_elf(path) as (elf, _):
        table = elf.get_section_by_name(".dynsym")
        return tuple(
            sorted(
                symbol.name
                for symbol in (table.iter_symbols() if table is not None else ())
                if symbol["st_shndx"] == "SHN_UNDEF"
                and symbol["st_info"]["bind"] == "STB_GLOBAL"
                and symbol.name
            )
        )


@contextmanager
def open_sections(source: Source, names: Iterable[str]) -> Iterator[dict[str, Window]]:
    """Open those of the sections `names` that exist.

    A ValueError raised inside the `with` block becomes an ArtifactError that names `source`.
    """
    with open_elf(source) as (elf, window):
        sections = {name: elf.get_section_by_name(name) for name in names}
        yield {
            name: window.part(section["sh_offset"], section["sh_size"])
            for name, section in sections.items()
            if section is not None and section["sh_type"] != "SHT_NOBITS"
        }


@contextmanager
def open_section(source: Source, name: str) -> Iterator[Window | None]:
    """Open one section, or yield None if it does not exist; see `open_sections`."""
    with open_sections(source, [name]) as found:
        yield found.get(name)


def open_image(window: Window) -> Any:
    """Open an ELF file embedded in another; ValueError if it is none."""
    from elftools.common.exceptions import ELFError
    from elftools.elf.elffile import ELFFile

    try:
        return ELFFile(window)
    except ELFError as error:
        raise ValueError(f"no ELF file: {error}") from error


def describe(source: Source) -> str:
    """Return the name of `source` for error messages."""
    return f"<{len(source)} bytes>" if isinstance(source, bytes) else os.fspath(source)


@contextmanager
def malformed(source: Source) -> Iterator[None]:
    """Convert any exception of a parser to an ArtifactError about `source`.

    A parser of corrupt data may raise anything (KeyError, struct.error, AssertionError, ...).
    """
    try:
        yield
    except LoaderError:
        raise
    except (Exception, MemoryError) as error:
        reason = str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
        raise ArtifactError(f"{describe(source)}: malformed: {reason}") from error


@contextmanager
def open_elf(source: Source) -> Iterator[tuple[Any, Window]]:
    with _opened(source) as window, malformed(source):
        ident = window.at(0, 6)
        if ident[:4] != b"\x7fELF":
            begins = f"begins with bytes {ident[:4].hex(' ')}" if ident else "it is empty"
            raise ArtifactError(f"{describe(source)}: not an ELF file: {begins}")
        if ident[4:] != b"\x02\x01":
            raise ValueError("not 64-bit little-endian ELF")
        # Imported here: the import costs more than reading a file.
        from elftools.elf.elffile import ELFFile

        yield ELFFile(window), window


@contextmanager
def _opened(source: Source) -> Iterator[Window]:
    if isinstance(source, bytes):
        yield Window(lambda offset, count: source[offset : offset + count], 0, len(source))
        return
    try:
        fd = trust.open_regular(source)
    except (OSError, ValueError) as error:
        raise LoaderError(f"{describe(source)}: cannot be opened: {error}") from error
    try:
        size = os.fstat(fd).st_size
        yield Window(lambda offset, count: os.pread(fd, count, offset), 0, size)
    finally:
        os.close(fd)


def _table(section: Any, window: Window) -> bytes:
    content = window.part(section["sh_offset"], section["sh_size"])
    if content.size > _MAX_TABLE:
        raise ValueError(f"section {section.name} has {content.size} bytes")
    return content.at(0, content.size)


def _dynamic_tags(elf: Any) -> dict[str, list[str]]:
    dynamic = elf.get_section_by_name(".dynamic")
    if elf["e_type"] != "ET_DYN" or dynamic is None:
        raise ValueError(f"not a shared library (type {elf['e_type']})")
    tags: dict[str, list[str]] = {}
    for tag in dynamic.iter_tags():
        kind = tag.entry.d_tag
        if kind in _TEXT_TAGS:
            # pyelftools resolves the text into an attribute named after the tag.
            tags.setdefault(kind, []).append(getattr(tag, kind.removeprefix("DT_").lower()))
    return tags


def _symbols(elf: Any, window: Window) -> tuple[tuple[str, ...], ...]:
    """Return defined TVM-FFI functions, undefined libtvm_ffi symbols, and variables to fill in."""
    section = elf.get_section_by_name(".dynsym")
    if section is None:
        raise ValueError("it has no dynamic symbol table")
    names = _table(section.stringtable, window)
    # Only names with a prefix are examined. Linkers merge tails, so a name may start in the middle
    # of another; therefore every occurrence counts.
    wanted = {
        match.start()
        for match in re.finditer(f"{FUNCTION_PREFIX}|{_CONTEXT_PREFIX}".encode(), names)
    }
    functions: set[str] = set()
    requires: set[str] = set()
    context: set[str] = set()
    table = _table(section, window)
    if len(table) % SYMBOL.size:
        raise ValueError(f"the dynamic symbol table has {len(table)} bytes")
    for at, info, other, section_index, _value, _size in SYMBOL.iter_unpack(table):
        is_undefined = not section_index and info >> 4 == _STB_GLOBAL
        if at not in wanted and not is_undefined:
            continue
        end = names.find(b"\0", at, at + _MAX_NAME)
        # an undefined symbol with a huge name, such as a C++ template's
        if end < 0 and at not in wanted:
            continue
        if end < 0:
            raise ValueError(f"a symbol name of more than {_MAX_NAME} bytes")
        name = names[at:end].decode("ascii", "backslashreplace")
        is_found = info >> 4 in _BINDINGS and other & 3 in _VISIBLE
        is_callable = is_found and info & 0xF == _STT_FUNC
        if is_undefined and re.match(RUNTIME, name):
            requires.add(name)
        elif section_index and name.startswith(FUNCTION_PREFIX) and is_callable:
            functions.add(name.removeprefix(FUNCTION_PREFIX))
        elif not name.startswith(_CONTEXT_PREFIX) and name not in _CONTEXT:
            continue
        elif section_index and is_found and info & 0xF == _STT_OBJECT:
            context.add(name)
    operations = sorted(name for name in functions if not name.startswith(_COMPANIONS))
    return tuple(operations), tuple(sorted(requires)), tuple(sorted(context))
