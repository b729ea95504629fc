"""Kernel files: held open from their check to their loading, and what is known of them.

What was hashed is a file, and what its path leads to a moment later can be another.  So a
library is read and loaded through a descriptor, of a file that is as it was when it was
hashed.  The descriptors of what was loaded stay open: the dynamic linker knows a library by
the name it was loaded under, and would take another file of that name for the same one.

Facts are known by the hash of the content.  Reading an ELF takes pyelftools, and a function's
own account of its signature takes an exception with a C++ backtrace; together they cost more
than all the rest of a start.  Neither can change while the content does not, so the cache
keeps them.  FI_FFI_PARANOID=1 asks the file again.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import stat
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from fi_ffi.errors import ArchitectureError, ArtifactError, LoaderError
from fi_ffi.loader import cache, trust
from fi_ffi.loader.elf import inspect_elf
from fi_ffi.loader.fatbin import CudaCode, architectures
from fi_ffi.loader.kernels import ModuleFile

_FORMAT = 5  # of the stored facts; another one is not read

_kept: dict[tuple[int, int], tuple[int, str]] = {}  # of device and inode: descriptor, sha256


class Held:
    """An open file with a known sha256; `name` leads to it, whatever its path leads to."""

    def __init__(self, path: Path, sha256: str, fd: int) -> None:
        self.path, self.sha256, self.fd = path, sha256, fd
        self._before = os.fstat(fd)
        name = f"/proc/self/fd/{fd}"
        self.name = name if os.path.exists(name) else str(path)

    def keep(self, *, in_place: bool = False) -> None:
        """Leave it open, as it was loaded; `ArtifactError` if it was written to meanwhile, or
        replaced where it was opened by its path (`in_place`)."""
        before, after = self._before, os.fstat(self.fd)
        _kept[before.st_dev, before.st_ino] = self.fd, self.sha256
        replaced = in_place and not os.path.samestat(before, os.stat(self.path))
        # Its change time also tells of another name that it got or lost, which is no harm.
        written = cache.state_of(before) != cache.state_of(after) and _hash(self.fd) != self.sha256
        if replaced or written:
            raise changed(self.path, "while it was loaded, and nothing of it is called")


@contextlib.contextmanager
def checked(path: Path, sha256: str, state: cache.State | None = None) -> Iterator[Held]:
    """The file that was found to have this sha256.

    `state` is what it was like then (`cache.state_of`).  Without one the file is in the cache,
    whose stamp tells, or it is hashed again.  Raises `ArtifactError` for any other file.
    """
    fd = _open(path, os.O_NOFOLLOW if state is None else 0)
    try:
        status = os.fstat(fd)
        if state is None:
            trust.check_object(path, status)
            sure = not cache.is_paranoid() and cache.stamp_fits(path, sha256, status)
        else:
            sure = cache.state_of(status) == state
        if not sure and _hash(fd) != sha256:
            raise changed(path, "after it was hashed")
        known, of = _kept.get((status.st_dev, status.st_ino), (fd, sha256))
        if of != sha256:
            raise changed(path, "in place after this process had loaded it; start it again")
        yield Held(path, sha256, known)
    finally:
        if all(fd != known for known, _ in _kept.values()):
            os.close(fd)


def descriptor(sha256: str) -> int:
    """The descriptor of a library that was loaded; what its path leads to may be another file."""
    return next(fd for fd, of in _kept.values() if of == sha256)


def _open(path: Path, flags: int) -> int:
    try:
        # O_NONBLOCK: opening a pipe would otherwise wait for a writer.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | flags)
    except OSError as error:
        raise ArtifactError(f"{path} cannot be opened any more: {error.strerror}") from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise ArtifactError(f"{path} is no regular file: remove it")
    return fd


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
    """A kernel file's own account of itself.

    `signatures` holds those that were asked for so far, as the functions print them.
    """

    needed: list[str]
    functions: list[str]
    codes: list[CudaCode]
    # Where it has other libraries looked for; $ORIGIN in it is the folder that it lies in.
    runpath: str | None = None
    signatures: dict[str, str] = field(default_factory=dict)
    # Variables that are filled in as it is loaded.
    context: list[str] = field(default_factory=list)
    # What libtvm_ffi has to define.
    requires: list[str] = field(default_factory=list)

    def is_sound(self) -> bool:
        """Whether everything is of its type: they may be read from a damaged file."""
        words = [*self.needed, *self.functions, *self.signatures, *self.signatures.values()]
        words += [*self.context, *self.requires, self.runpath or ""]
        return all(isinstance(word, str) and word.isascii() for word in words) and all(
            code.kind in ("sass", "ptx") and type(code.sm) is int and code.suffix in ("", "a", "f")
            for code in self.codes
        )


def _path(sha256: str) -> Path:
    return cache.cache_root() / "facts" / sha256[:2] / f"{sha256}.json"


def facts_of(file: ModuleFile) -> Facts:
    """The facts of a file, remembered or read from it now."""
    if not cache.is_paranoid():
        with contextlib.suppress(TypeError, KeyError, AttributeError, LoaderError):
            data = cache.read_note(_path(file.sha256), _FORMAT)
            found = Facts(**data | {"codes": [CudaCode(**code) for code in data["codes"]]})
            if found.is_sound():
                return found
    # Else those of a file that is there for a moment would be remembered for this one.
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
    """Keep the facts; a cache that cannot be written is no reason to fail."""
    with contextlib.suppress(LoaderError):
        cache.write_note(_path(file.sha256), _FORMAT, asdict(facts))


def cuda_of(facts: Facts) -> int | None:
    """The major version of the CUDA that a file is of; None where it needs no runtime of it."""
    found = (re.fullmatch(r"libcudart\.so\.(\d+)[\d.]*", name) for name in facts.needed)
    return next((int(match[1]) for match in found if match), None)


def check_processor(path: Path, machine: str) -> None:
    """Refuse a file whose host code is another processor's."""
    if machine != platform.machine():
        raise ArchitectureError(
            f"{path} is for {machine} processors, and this one is {platform.machine()}: build it "
            "here, or take the wheel of this platform"
        )
