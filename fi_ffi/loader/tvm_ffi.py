"""libtvm_ffi: a single copy in the process.

Two copies would each have their own tables of types and functions, or abort. So a copy that is
already loaded is used first, then that of the installed apache-tvm-ffi, which a later `import
tvm_ffi` shares.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from fi_ffi.abi import library
from fi_ffi.errors import ArtifactError, LoaderError
from fi_ffi.loader import distributions, held
from fi_ffi.loader.cache import State
from fi_ffi.loader.kernels import KernelFile
from fi_ffi.loader.wheel import hex_of

if TYPE_CHECKING:
    from fi_ffi.loader.distributions import Distribution

PROJECT = "apache-tvm-ffi"
MEMBER = "tvm_ffi/lib/libtvm_ffi.so"
# The C interface only grows within the series, so kernels compiled with older headers work with a
# newer library. vLLM and SGLang require exactly the first of these releases, and TileLang none
# later. In those left out, all of them withdrawn, `Optional<Function>` and with it the C++ of
# `Module` differs from the releases before and after.
ACCEPTED = ">=0.1.11,<0.2,!=0.1.13,!=0.1.13.post0,!=0.1.13.post1"

_Loaded = TypeVar("_Loaded")
_SONAME = "libtvm_ffi.so"
_INSTALL = f"`pip install '{PROJECT}{ACCEPTED}'`"


@dataclass(frozen=True)
class Found:
    """A shared library: its path, and a text that says why it was chosen."""

    path: str
    origin: str
    # The sha256 that RECORD confirms; None without one, as for a copy already loaded.
    sha256: str | None = None
    # The file's state when it was hashed.
    state: State | None = None

    def load(self, attach: Callable[..., _Loaded]) -> _Loaded:
        """Load it: by its path, or by the name of the very file that was hashed."""
        if self.sha256 is None:
            return attach(self.path)
        with held.checked(Path(self.path), self.sha256, self.state) as opened:
            try:
                return attach(self.path, opened.name)
            finally:
                # A refused library may stay loaded under this name.
                opened.keep()


def find() -> Found:
    """Return the copy to use; `LoaderError` if there is none, `ArtifactError` if it is damaged."""
    return in_process() or installed()


def in_process(soname: str = _SONAME) -> Found | None:
    """Return the copy mapped into this process, or None; `LoaderError` if there are two."""
    mapped = sorted(set(library.mapped(re.escape(soname))))
    if len(mapped) > 1:
        name, copies = soname.removesuffix(".so"), " and ".join(map("".join, mapped))
        raise LoaderError(
            f"two copies of {name} are in this process: {copies}. "
            "Their objects cannot be mixed: import the one that came second in a process of its own"
        )
    for path, deleted in mapped:
        # If the file was replaced since, only the soname leads to the loaded copy.
        return Found(soname if deleted else path, "already in this process")
    return None


def release_of(found: Found) -> str | None:
    """Return the release of apache-tvm-ffi that a copy belongs to, by the metadata beside it.

    The library's own version is no substitute: three releases report 0.1.16.
    """
    if not found.path.endswith(f"/{MEMBER}"):
        return None
    packages = Path(found.path.removesuffix(MEMBER))
    beside = [*packages.glob(f"{PROJECT.replace('-', '_')}-*.dist-info")]
    return beside[0].name.split("-")[1].removesuffix(".dist") if len(beside) == 1 else None


def installed() -> Found:
    """Find the installed distribution's copy through its metadata alone."""
    missing = f"{PROJECT} is not installed, which has libtvm_ffi"
    return of_distribution({PROJECT: MEMBER}, ACCEPTED, missing, _INSTALL)


def of_distribution(
    members: Mapping[str, str], accepted: str, missing: str, install: str, prereleases: bool = False
) -> Found:
    """Find a library of an installed distribution, and check it against RECORD.

    `members` has the library's path by the names of the distributions that may have it, the best
    first. `missing` and `install` are what the `LoaderError` says if none does.
    """
    # Imported late: not needed if a copy is loaded.
    from packaging.specifiers import SpecifierSet

    for name, member in members.items():
        found = distributions.installed(f"{name.replace('-', '_')}-")
        if not found:
            continue
        path, version = found[0].file(member), found[0].version
        if not SpecifierSet(accepted).contains(version, prereleases=prereleases or None):
            missing = f"{name} {version} is installed, and fi_ffi works with {accepted}"
        elif not path.is_file():
            missing = f"{name} {version} is installed without {path}, reinstall it"
            install = install.replace("install", "install --force-reinstall", 1)
        else:
            return recorded(found[0], member, f"installed {version}")
    raise LoaderError(f"{missing}: {install}")


def recorded(distribution: Distribution, member: str, origin: str) -> Found:
    """Return a library of an installed distribution, after checking it against RECORD."""
    path = distribution.file(member)
    digest = dict(distribution.record()).get(member)
    if not digest:
        return Found(str(path), origin)
    wanted, found = hex_of(digest, str(path)), KernelFile(path).file()
    if found.sha256 != wanted:
        raise ArtifactError(
            f"{path}: sha256 is {found.sha256}, and the RECORD of {distribution.name} has "
            f"{wanted}: reinstall it"
        )
    return Found(str(path), origin, found.sha256, found.state)
