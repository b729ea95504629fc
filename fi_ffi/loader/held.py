"""Kernel files: kept open from verification to loading, and facts about them.

After a file was hashed, its path may lead to another file. Therefore a library is read and loaded
through a descriptor of the hashed file. Descriptors of loaded files stay open: the dynamic linker
identifies a library by the name it was loaded under, and would take another file of the same name
for it.

Facts are stored by the hash of the content. Reading an ELF needs pyelftools, and asking a function
for its signature raises an exception with a C++ backtrace; together these cost more than the rest
of a start. The facts cannot change while the content does not, so the cache keeps them.
FI_FFI_PARANOID=1 reads them from the file again.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from fi_ffi.errors import ArchitectureError, ArtifactError, LoaderError
from fi_ffi.loader import cache, trust
from fi_ffi.loader.elf import inspect_elf
from fi_ffi.loader.fatbin import architectures
from fi_ffi.loader.kernels import ModuleFile
from fi_ffi.loader.machine import CudaCode

_FORMAT = 5  # version of the stored facts' format

open_libraries: dict[
    tuple[int, int], tuple[int, str]
] = {}  # (device, inode) -> (descriptor, sha256)


class VerifiedFile:
    """An open file with a known sha256; `name` refers to this file even if its path changes."""

    def __init__(self, path: Path, sha256: str, fd: int) -> None:
        self.path, self.sha256, self.fd, self.is_kept = path, sha256, fd, False
        self._before = os.fstat(fd)
        name = f"/proc/self/fd/{fd}"
        self.name = name if os.path.exists(name) else str(path)

    def keep(self, *, in_place: bool = False) -> None:
        """Keep the file open because it was loaded.

        Raises `ArtifactError` if it was modified meanwhile, or, if it was opened by its path
        (`in_place`), replaced.
        """
        before, after = self._before, os.fstat(self.fd)
        open_libraries[before.st_dev, before.st_ino] = self.fd, self.sha256
        self.is_kept = True
        replaced = in_place and not os.path.samestat(before, os.stat(self.path))
        # The change time also changes when the file gets or loses another name, which is harmless.
        written = cache.state_of(before) != cache.state_of(after) and _hash(self.fd) != self.sha256
        if replaced or written:
            raise changed(self.path, "while it was loaded, and nothing of it is called")


@contextlib.contextmanager
def checked(path: Path, sha256: str, state: cache.State | None = None) -> Iterator[VerifiedFile]:
    """Open the file and check that it is the one found to have this sha256.

    `state` is its state at that time (`cache.state_of`). Without one the file is in the cache: its
    stamp is checked, or it is hashed again. Raises `ArtifactError` for any other file.
    """
    try:
        fd = trust.open_regular(path, follow=state is not None)
    except OSError as error:
        raise ArtifactError(f"{path} cannot be opened any more: {error.strerror}") from error
    opened = None
    try:
        status = os.fstat(fd)
        if state is None:
            trust.check_object(path, status)
            sure = not cache.is_paranoid() and cache.stamp_fits(path, sha256, status)
        else:
            sure = cache.state_of(status) == state
        if not sure and _hash(fd) != sha256:
            raise changed(path, "after it was hashed")
        known, of = open_libraries.get((status.st_dev, status.st_ino), (fd, sha256))
        if of != sha256:
            raise changed(path, "in place after this process had loaded it; start it again")
        opened = VerifiedFile(path, sha256, known)
        yield opened
    finally:
        if opened is None or not opened.is_kept or opened.fd != fd:
            os.close(fd)


def descriptor(sha256: str) -> int:
    """Return the descriptor of a loaded library, whose path may lead to another file now."""
    # Of a copy: other threads load libraries meanwhile.
    return next(fd for fd, of in open_libraries.copy().values() if of == sha256)


def _hash(fd: int) -> str:
    os.lseek(fd, 0, os.SEEK_SET)
    with open(fd, "rb", closefd=False) as file:
        return cache.hash_of(file)


def changed(path: Path, when: str) -> ArtifactError:
    return ArtifactError(
        f"{path} was replaced or written to {when}. It is not used: if that was an update, "
        "try again"
    )


@dataclass
class Facts:
    """Facts that a kernel file states about itself.

    `signatures` holds those asked for so far, as the functions print them.
    """

    needed: list[str]
    functions: list[str]
    codes: list[CudaCode]
    # Search path for other libraries; $ORIGIN stands for the file's folder.
    runpath: str | None = None
    signatures: dict[str, str] = field(default_factory=dict)
    # Variables that must be filled in while it is loaded.
    context: list[str] = field(default_factory=list)
    # Symbols that libtvm_ffi must define.
    requires: list[str] = field(default_factory=list)

    def is_sound(self) -> bool:
        """Return whether all values have valid types; they may come from a damaged file."""
        words = [*self.needed, *self.functions, *self.signatures, *self.signatures.values()]
        words += [*self.context, *self.requires, self.runpath or ""]
        return all(isinstance(word, str) and word.isascii() for word in words) and all(
            code.kind in ("sass", "ptx") and type(code.sm) is int and code.suffix in ("", "a", "f")
            for code in self.codes
        )


def _path(sha256: str) -> Path:
    return cache.cache_root() / "facts" / sha256[:2] / f"{sha256}.json"


def facts_of(file: ModuleFile) -> Facts:
    """Return a file's facts, from the cache or read now."""
    if not cache.is_paranoid():
        with contextlib.suppress(TypeError, KeyError, AttributeError, LoaderError):
            data = cache.read_note(_path(file.sha256), _FORMAT)
            found = Facts(**data | {"codes": [CudaCode(**code) for code in data["codes"]]})
            if found.is_sound():
                return found
    # Checked, or the facts of a temporary replacement would be stored for this file.
    with checked(file.path, file.sha256, file.state) as opened:
        try:
            info, codes = inspect_elf(opened.name), architectures(opened.name)
        except ArtifactError as error:
            raise ArtifactError(str(error).replace(opened.name, str(file.path))) from error
    found = Facts(list(info.needed), list(info.functions), list(codes), info.runpath)
    found.context += info.context
    found.requires += info.requires
    remember(file, found)
    return found


def remember(file: ModuleFile, facts: Facts) -> None:
    """Store the facts; failures to write are ignored."""
    with contextlib.suppress(LoaderError):
        cache.write_note(_path(file.sha256), _FORMAT, asdict(facts))


def cuda_of(facts: Facts) -> int | None:
    """Return the CUDA major version of the runtime that a file needs; None if it needs none."""
    found = (re.fullmatch(r"libcudart\.so\.(\d+)[\d.]*", name) for name in facts.needed)
    return next((int(match[1]) for match in found if match), None)


def check_processor(path: Path, machine: str) -> None:
    """Raise `ArchitectureError` for a file whose host code is for another processor."""
    if machine != platform.machine():
        raise ArchitectureError(
            f"{path} is for {machine} processors, and this one is {platform.machine()}: build it "
            "here, or take the wheel of this platform"
        )
