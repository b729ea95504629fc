"""libtvm_ffi: one copy in the process, whoever brought it.

Two copies would each have their own table of types and functions, or abort.  So
the order is: the copy already in the process; that of an installed
apache-tvm-ffi in the accepted range (which a later `import tvm_ffi` then shares);
the pinned one, from the cache or the package index.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from fi_ffi.errors import LoaderError
from fi_ffi.loader.lock import tvm_ffi_pin

_SONAME = "libtvm_ffi.so"
_MAPPED = re.compile(r"\s(/\S.*/libtvm_ffi\.so)( \(deleted\))?$", re.MULTILINE)


@dataclass(frozen=True)
class Found:
    """A libtvm_ffi: where it is, and why that one."""

    path: str
    origin: str


def find() -> Found:
    """The copy to use; fetches the pinned one where there is no other."""
    found = in_process() or installed()
    if found:
        return found
    # Only here: fetching brings HTTP with it, and most processes fetch nothing.
    from fi_ffi.loader.fetch import fetch_member

    pin = tvm_ffi_pin().file_for_this_machine()
    return Found(str(fetch_member(pin)), f"pinned {pin.project} {pin.version}")


def in_process() -> Found | None:
    """The copy mapped into this process; `LoaderError` where there are two."""
    try:
        maps = Path("/proc/self/maps").read_text(errors="replace")
    except OSError:
        return None
    mapped = sorted(set(_MAPPED.findall(maps)))
    if len(mapped) > 1:
        raise LoaderError(
            f"two copies of libtvm_ffi are in this process: {' and '.join(map(''.join, mapped))}. "
            "Their objects cannot be mixed: import the one that came second in a process of its own"
        )
    for path, deleted in mapped:
        # Of a file that was replaced since, only the soname leads to the copy in use.
        return Found(_SONAME if deleted else path, "already in this process")
    return None


def installed() -> Found | None:
    """The installed distribution's copy, located through its metadata alone."""
    # Only here: it brings the email package with it, and a copy may be here already.
    import importlib.metadata

    pin = tvm_ffi_pin()
    try:
        distribution = importlib.metadata.distribution("apache-tvm-ffi")
    except importlib.metadata.PackageNotFoundError:
        return None
    from packaging.specifiers import SpecifierSet

    if not SpecifierSet(pin.accepted).contains(distribution.version):
        return None
    path = Path(str(distribution.locate_file(pin.member)))
    return Found(str(path), f"installed {distribution.version}") if path.is_file() else None
