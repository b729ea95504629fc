"""Libraries in the wheels of other distributions: of an installed one, or of one that is pinned.

A library is named by its file, without `.so`. An installed distribution is not imported. Of a
pinned one each library is fetched when it is asked for; pip, which knows the index of this machine,
says where the wheel is.
"""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePosixPath

from fi_ffi.errors import (
    ArgumentError,
    ArtifactError,
    FetchError,
    KernelNotFoundError,
    LoaderError,
    let_through,
    nearest,
)
from fi_ffi.loader import seed
from fi_ffi.loader.distributions import Distribution, canonical, hex_of, installed
from fi_ffi.loader.fetch.asking import Cooldown, check_permission
from fi_ffi.loader.fetch.index import stored_record
from fi_ffi.loader.fetch.remote import RemoteWheel
from fi_ffi.loader.fetch.urls import check_url, is_file_url
from fi_ffi.loader.fetch.wheels_lock import PinnedDistribution, the_lock, this_platform
from fi_ffi.loader.kernels import KernelSource, ModuleFile, hashed_file, libraries_of, stored
from fi_ffi.loader.search import Candidate
from fi_ffi.loader.wheel import Recorded, Wheel, WheelReader

_ASKING = 60.0  # seconds in which pip has to answer
_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?")


class InstalledLibraries:
    """The libraries of an installed distribution, each with the hash that its RECORD has."""

    trust = "record-unpinned"

    def __init__(self, found: Distribution) -> None:
        self.location, self.version = str(found.info.parent), found.version
        self.distribution = canonical(found.name)
        record = {member: (path, digest) for member, path, digest in found.record()}
        self._files = {name: record[member] for name, member in libraries_of(record).items()}

    def modules(self) -> list[str]:
        return sorted(self._files)

    def file(self, module: str) -> ModuleFile:
        path, digest = self._files[module]
        file = hashed_file(module, path)
        if file.sha256 != (recorded := hex_of(digest, str(path))):
            raise ArtifactError(
                f"{path}: sha256 is {file.sha256}, and the RECORD of the distribution has "
                f"{recorded}: reinstall it, or name the file itself to use it as it is"
            )
        return file


class PinnedLibraries:
    """The libraries of a pinned wheel; what was fetched before is found without asking a server."""

    trust = "record-pinned"

    def __init__(self, pin: PinnedDistribution) -> None:
        self.pin, self.version, self.distribution = pin, pin.version, pin.name
        self.location = f"{pin.name} {pin.version}"
        self._cooldown = Cooldown()

    @functools.cached_property
    def _record(self) -> Mapping[str, Recorded]:
        """RECORD: as it was stored, or of the wheel."""
        found = stored_record(self.pin.sha256, self.pin.record_sha256)
        return self._wheel.record if found is None else found

    @functools.cached_property
    def _wheel(self) -> WheelReader:
        pin = self.pin
        whole = seed.find(pin.sha256, pin.file)
        if whole is not None:
            return Wheel(whole[0], record_sha256=pin.record_sha256, stored=whole)
        check_permission(f"what is pinned of {pin.file}")
        with self._cooldown.asking():
            return RemoteWheel(
                pin.url or address_of(pin),
                sha256=pin.sha256,
                size=pin.size,
                record_sha256=pin.record_sha256,
            )

    @functools.cached_property
    def _members(self) -> dict[str, str]:
        return libraries_of(self._record)

    def modules(self) -> list[str]:
        return sorted(self._members)

    def sha256_of(self, module: str) -> str:
        """Return the hash of a library, by RECORD."""
        return self._record[self._members[module]].sha256

    def file(self, module: str) -> ModuleFile:
        found, sha256 = self.kept(module), self.sha256_of(module)
        return found or ModuleFile(module, self._wheel.extract(self._members[module]), sha256)

    def kept(self, module: str) -> ModuleFile | None:
        """Return a library that is already on this machine, or None."""
        return stored(PurePosixPath(self._members[module]).stem, self.sha256_of(module))


def libraries(distribution: str) -> KernelSource:
    """Return the libraries of a distribution: the installed one, or else the pinned wheel.

    Raises `KernelNotFoundError` if there is neither.
    """
    if not isinstance(distribution, str) or not _NAME.fullmatch(distribution):
        expected = "a distribution's name, such as 'tokenspeed-kernel'"
        raise ArgumentError("module", "distribution", got=repr(distribution), expected=expected)
    name = canonical(distribution)
    for found in installed(name.replace("-", "_")):
        if canonical(found.name) == name:
            return InstalledLibraries(found)
    lock = the_lock()
    pins = [pin for pin in lock.distributions if pin.name == name]
    for pin in pins:
        if pin.platform == this_platform():
            return _pinned(pin)
    known = sorted({pin.name for pin in lock.distributions})
    has = f"pinned for {', '.join(pin.platform for pin in pins)} alone" if pins else "not pinned"
    raise KernelNotFoundError(
        f"{distribution} is not installed, and {has} in {lock.path.name}, which has "
        f"{', '.join(known) or 'no distribution'}{nearest(name, known)}"
    )


@functools.cache
def _pinned(pin: PinnedDistribution) -> PinnedLibraries:
    """Return a pinned wheel's libraries; what refused to answer is not asked again at once."""
    return PinnedLibraries(pin)


def library_of(distribution: str, name: str) -> tuple[KernelSource, ModuleFile]:
    """Return a library of a distribution, fetched if need be, and where it is from.

    Raises `KernelNotFoundError` with the names that there are.
    """
    source = libraries(distribution)
    names = source.modules()
    if name not in names:
        raise KernelNotFoundError(
            f"{distribution} {source.version} has no library {name!r:.80}; it has "
            f"{', '.join(names) or 'none'}{nearest(name, names)}"
        )
    return source, source.file(name)


def places_of(distribution: str) -> Iterator[Candidate]:
    """Yield where a distribution's libraries are, or why there are none."""
    try:
        source = libraries(distribution)
    except KernelNotFoundError as error:
        yield Candidate("remote", None, str(error))
        return
    yield Candidate("remote" if isinstance(source, PinnedLibraries) else "installed", source)


def address_of(pin: PinnedDistribution) -> str:
    """Ask pip for the address of a pinned wheel; the index must tell of the pinned sha256."""
    from packaging.utils import parse_wheel_filename  # imported late: few processes fetch

    tags = sorted(parse_wheel_filename(pin.file)[3], key=str)
    interpreter = re.fullmatch(r"([a-z]+)(\d+)", tags[0].interpreter)
    if interpreter is None:
        raise LoaderError(f"{pin.file} is for {tags[0].interpreter}, which pip has no option for")
    options = ["--implementation", interpreter[1], "--python-version", interpreter[2]]
    options += ["--abi", tags[0].abi]
    for each in dict.fromkeys(tag.platform for tag in tags):
        options += ["--platform", each]
    with tempfile.TemporaryDirectory() as nowhere:
        told = _report([*options, "--target", nowhere, f"{pin.name}=={pin.version}"], pin.file)
    return located(pin, told)


def located(pin: PinnedDistribution, report: str) -> str:
    """Return the address in pip's report of an installation."""
    try:
        (found,) = (item["download_info"] for item in json.loads(report)["install"])
        url, sha256 = str(found["url"]), found["archive_info"]["hashes"]["sha256"]
    except (LookupError, TypeError, ValueError, RecursionError) as error:
        let_through(error)
        raise FetchError(f"{pin.file}: pip reports no address and sha256: {error!r}") from error
    if sha256 != pin.sha256:
        raise ArtifactError(
            f"{pin.file}: the index has one with sha256 {sha256!r:.80}, pinned is {pin.sha256}"
        )
    if not is_file_url(url):
        check_url(url)
    return url


def _report(arguments: Sequence[str], file: str) -> str:
    """Return pip's report of an installation that does not take place."""
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--no-deps"]
    command += ["--ignore-installed", "--only-binary", ":all:", "--report", "-", *arguments]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_ASKING, check=False,
            env={**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"},
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise FetchError(f"pip did not say within {_ASKING:g} s where {file} is") from error
    if done.returncode:
        lines = [
            line for line in done.stderr.splitlines() if "ERROR" in line or "No module" in line
        ]
        why = " ".join(lines[:2]) or f"exit status {done.returncode}"
        raise FetchError(
            f"pip does not say where {file} is: {why:.300}. Install the distribution, which need "
            "not be imported, or give the path of the library"
        )
    return done.stdout
