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

from fi_ffi.errors import ArtifactError, LoaderError
from fi_ffi.loader.cache import State
from fi_ffi.loader.lock import tvm_ffi_pin

_SONAME = "libtvm_ffi.so"
_MAPPED = re.compile(r"\s(/\S.*/libtvm_ffi\.so)( \(deleted\))?$", re.MULTILINE)


@dataclass(frozen=True)
class Found:
    """A libtvm_ffi: where it is, and why that one."""

    path: str
    origin: str
    # What vouches for its content; None where nothing does, as for a copy that is loaded.
    sha256: str | None = None
    # What it was like as it was hashed; None of one in the cache, whose stamp tells.
    state: State | None = None


def find() -> Found:
    """The copy to use; fetches the pinned one where there is no other."""
    found = in_process() or installed()
    if found:
        return found
    # Only here: fetching brings HTTP with it, and most processes fetch nothing.
    from fi_ffi.loader.fetch import fetch_member

    pin = tvm_ffi_pin().file_for_this_machine()
    origin = f"pinned {pin.project} {pin.version}"
    return Found(str(fetch_member(pin)), origin, pin.member_sha256)


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
    if not path.is_file():
        return None
    origin = f"installed {distribution.version}"
    sha256, state = _recorded(distribution.read_text("RECORD") or "", pin.member, path)
    return Found(str(path), origin, sha256, state)


def _recorded(record: str, member: str, path: Path) -> tuple[str, State] | tuple[None, None]:
    """The sha256 that RECORD has for a file, which has it; None where RECORD has none."""
    line = next((line for line in record.splitlines() if line.startswith(f"{member},")), None)
    if line is None or line.count(",") != 2 or not line.split(",")[1]:
        return None, None
    from fi_ffi.loader.kernels import KernelFile
    from fi_ffi.loader.record import parse_record

    recorded, found = parse_record(line.encode(), str(path))[member], KernelFile(path).file()
    if found.sha256 != recorded.sha256:
        raise ArtifactError(
            f"{path}: sha256 is {found.sha256}, and the RECORD of apache-tvm-ffi has "
            f"{recorded.sha256}: reinstall it, or uninstall it and the pinned one is used"
        )
    assert found.state is not None
    return found.sha256, found.state
