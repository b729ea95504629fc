"""Files of kernel modules: the places that have them, the very file until it is loaded, its facts.

A source is a directory or a wheel in FlashInfer's layout: `<module>/<module>.so`, below
`flashinfer_jit_cache/jit_cache/` in a wheel or its installation.

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
import functools
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Protocol

from fi_ffi.errors import ArtifactError, KernelNotFoundError, LoaderError, let_through
from fi_ffi.loader import cache, seed, trust
from fi_ffi.loader.distributions import canonical
from fi_ffi.loader.machine import CudaCode

if TYPE_CHECKING:
    from fi_ffi.loader.wheel import WheelReader

LAYOUT = "flashinfer_jit_cache/jit_cache"
_VERSION = r"""^__version__\s*=\s*["']([^"']+)["']"""
_MEMBER = r"(?:.*/)?jit_cache/([^/]+)/\1\.so"
_FACTS = "facts/{0:.2}/{0}.json"  # the note of a file, by its sha256
_FORMAT = 5  # version of the stored facts' format

# (device, inode) -> (descriptor, sha256)
open_libraries: dict[tuple[int, int], tuple[int, str]] = {}


@dataclass(frozen=True)
class ModuleFile:
    """A module's .so on disk, and the hash of its content."""

    module: str
    path: Path
    sha256: str
    # The file's state when it was hashed; None for a file in the cache, which has a stamp.
    state: cache.State | None = None


class KernelSource(Protocol):
    """A place that provides modules.

    `version` is the artifact's full version ("0.6.13+cu130"), or None if unknown. `distribution`
    has the libraries, if they are not FlashInfer's modules.
    """

    @property
    def location(self) -> str: ...

    @property
    def distribution(self) -> str: ...

    @property
    def version(self) -> str | None: ...

    @property
    def trust(self) -> str:
        """What vouches for its files: docs/wheels-lock.md."""

    def modules(self) -> list[str]:
        """Return the names of its modules, sorted."""

    def file(self, module: str) -> ModuleFile:
        """Return the file of a module that the source has, verified as far as it allows."""


def release_of(source: KernelSource) -> str | None:
    """Return FlashInfer's release: the version without the local part that names CUDA and SMs."""
    if source.distribution or not source.version:
        return None
    return source.version.partition("+")[0]


class KernelDirectory:
    """Modules in a directory: the jit_cache itself, or the folder it is installed in.

    `hashes` are those in the RECORD of the distribution that installed them.
    """

    distribution = ""

    def __init__(
        self, location: Path, version: str | None = None, hashes: Mapping[Path, str] | None = None
    ) -> None:
        self.location, self._hashes = str(location), hashes
        self.trust = "record-unpinned" if hashes else "unverified"
        candidates = (location, location / "jit_cache", location / LAYOUT)
        self.root = next((root for root in candidates if _modules_in(root)), location)
        self.version = version or self._written_version()

    def modules(self) -> list[str]:
        return _modules_in(self.root)

    def file(self, module: str) -> ModuleFile:
        found = hashed_file(module, self.root / module / f"{module}.so")
        recorded = self._hashes.get(found.path) if self._hashes else found.sha256
        if recorded != found.sha256:
            raise ArtifactError(
                f"{found.path}: sha256 is {found.sha256}, and the RECORD of the distribution "
                f"has {recorded or 'none'}: reinstall it, or name {self.root} in FI_FFI_KERNELS "
                "to use it as it is"
            )
        return found

    def _written_version(self) -> str | None:
        for name in ("_build_meta.py", "__init__.py"):
            with contextlib.suppress(OSError):
                text = (self.root.parent / name).read_text(errors="replace")
                if written := re.search(_VERSION, text, re.MULTILINE):
                    return written[1]
        return None


def _modules_in(root: Path) -> list[str]:
    try:
        names = sorted(os.listdir(root))
    except OSError as error:
        let_through(error)
        return []
    return [name for name in names if (root / name / f"{name}.so").is_file()]


class KernelWheel:
    """A `flashinfer_jit_cache` wheel, or the libraries of another distribution's.

    Members are extracted to the cache, checked by RECORD.
    """

    def __init__(self, location: str, wheel: WheelReader) -> None:
        self.location = location
        self._wheel = wheel
        name = canonical(wheel.dist_info.partition("-")[0])
        is_flashinfers = any("jit_cache/" in member for member in wheel.members)
        is_flashinfers |= name.startswith("flashinfer-jit-cache")
        self.distribution = "" if is_flashinfers else name

    @property
    def version(self) -> str | None:
        return self._wheel.version

    @property
    def trust(self) -> str:
        return self._wheel.trust

    @functools.cached_property
    def _members(self) -> dict[str, str]:
        find = libraries_of if self.distribution else modules_of
        return find(self._wheel.members)

    def modules(self) -> list[str]:
        return sorted(self._members)

    def file(self, module: str) -> ModuleFile:
        found = self.kept(module)
        if found is None:
            member = self._members[module]
            path = self._wheel.extract(member)
            found = ModuleFile(module, path, self._wheel.record[member].sha256)
        return found

    def kept(self, module: str) -> ModuleFile | None:
        """Return a module's file from the cache or the seed cache, or None."""
        recorded = self._wheel.record.get(self._members[module])
        # extracting reports that it is missing
        return None if recorded is None else stored(module, recorded.sha256)


def modules_of(members: Iterable[str]) -> dict[str, str]:
    """Return a wheel's members that are modules, by module name."""
    matches = ((re.fullmatch(_MEMBER, member), member) for member in members)
    return {match[1]: member for match, member in matches if match}


def libraries_of(paths: Iterable[str]) -> dict[str, str]:
    """Return those of a distribution's files that are libraries, by name.

    Files of one name are told apart by as many of the folders above them as that takes.
    """
    every = [PurePosixPath(path) for path in paths if path.endswith(".so")]
    found: dict[str, str] = {}
    for path in every:
        own = path.with_suffix("").parts
        others = [other.with_suffix("").parts for other in every if other != path]
        count = next(
            n for n in range(1, len(own) + 1) if not any(o[-n:] == own[-n:] for o in others)
        )
        found["/".join(own[-count:])] = str(path)
    return found


def stored(module: str, sha256: str) -> ModuleFile | None:
    """Return a wheel's module from the cache or the seed cache, or None."""
    file = seed.find(sha256, f"{module}.so")
    return None if file is None else ModuleFile(module, file[0], sha256, file[1])


def hashed_file(module: str, path: Path) -> ModuleFile:
    """Hash a file that no other user can change."""
    try:
        trust.check_user_path(path)
        return ModuleFile(module, path, *cache.hashed(path))
    except OSError as error:  # a file of /proc can be opened but not read
        raise ArtifactError(f"{path} cannot be read: {error.strerror}") from error


def open_source(location: str | os.PathLike[str]) -> KernelSource:
    """Return the source at a path; `KernelNotFoundError` if nothing is there."""
    path = cache.expanded(location, "the source of kernels")
    if os.path.isdir(path):
        return KernelDirectory(path)
    if os.path.isfile(path) and path.suffix == ".whl":
        from fi_ffi.loader.wheel import Wheel  # imported late: many processes read no wheel

        trust.check_user_path(path)
        return KernelWheel(str(path), Wheel(path))
    if os.path.exists(path):
        raise ArtifactError(f"{path} is neither a directory nor a .whl file")
    raise KernelNotFoundError(f"{path}: there is no such file or directory")


@dataclass
class VerifiedFile:
    """An open file with a known sha256; `name` refers to this file even if its path changes."""

    path: Path
    sha256: str
    fd: int
    name: str
    before: os.stat_result
    is_kept: bool = False

    def keep(self, *, in_place: bool = False) -> None:
        """Keep the file open because it was loaded.

        Raises `ArtifactError` if it was modified meanwhile, or, if it was opened by its path
        (`in_place`), replaced.
        """
        before, after = self.before, os.fstat(self.fd)
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
        name = f"/proc/self/fd/{known}"
        name = name if os.path.exists(name) else str(path)
        opened = VerifiedFile(path, sha256, known, name, os.fstat(known))
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


def facts_of(file: ModuleFile) -> Facts:
    """Return a file's facts, from the cache or read now."""
    if not cache.is_paranoid():
        with contextlib.suppress(TypeError, KeyError, AttributeError, LoaderError):
            data = cache.read_note(_FACTS.format(file.sha256), _FORMAT)
            found = Facts(**data | {"codes": [CudaCode(**code) for code in data["codes"]]})
            if found.is_sound():
                return found
    # Imported late: most files were read before.
    from fi_ffi.loader.elf import inspect_elf
    from fi_ffi.loader.fatbin import architectures

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
        cache.write_note(_FACTS.format(file.sha256), _FORMAT, asdict(facts))


def cuda_of(facts: Facts) -> int | None:
    """Return the CUDA major version of the runtime that a file needs; None if it needs none."""
    found = (re.fullmatch(r"libcudart\.so\.(\d+)[\d.]*", name) for name in facts.needed)
    return next((int(match[1]) for match in found if match), None)
