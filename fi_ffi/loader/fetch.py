"""Fetching a pinned file from the package index, as the user's pip would.

pip (or uv, where an environment has no pip) resolves the pin, so that whatever
index, mirror, proxy and credentials it is set up with are used.  The member is then
read from the file's address, by ranges; where that does not work (credentials that
only pip knows, a mirror without TLS) pip fetches the whole wheel itself.
"""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from fi_ffi.errors import ArtifactError, FetchError
from fi_ffi.loader import cache
from fi_ffi.loader.lock import IndexFile

if TYPE_CHECKING:  # and where they are used: a warm start needs none of these
    from fi_ffi.loader.http import Client
    from fi_ffi.loader.wheel import WheelReader

_log = logging.getLogger(__name__)


def fetch_member(pin: IndexFile, *, client: Client | None = None) -> Path:
    """The pinned member's file in the cache, fetched if it is not there.

    Raises `FetchError` with the installer's own words, `ArtifactError` where the
    bytes are not the pinned ones.  `client` counts what the ranges took.
    """
    name = pin.member.rpartition("/")[2]
    found = cache.find(pin.member_sha256, name)
    if found is not None:
        return found
    from fi_ffi.loader.urls import refuse_offline

    refuse_offline(
        f"{pin.member} of {pin.file} (`pip install {pin.project}=={pin.version}` brings it too)"
    )
    with cache.filling(pin.member_sha256, name) as found:
        if found is not None:
            return found
        try:
            return _by_ranges(pin, client)
        except FetchError as error:
            _log.info("%s is left to the installer: %s", pin.file, error)
            return _by_installer(pin, name, error)


def _by_ranges(pin: IndexFile, client: Client | None) -> Path:
    from fi_ffi.loader.index import resolve
    from fi_ffi.loader.remote import RemoteWheel

    wheel = RemoteWheel(
        resolve(pin),
        sha256=pin.sha256,
        size=pin.size,
        record_sha256=pin.record_sha256,
        verify="full",
        client=client,
    )
    _check_member(wheel, pin)
    return wheel.extract(pin.member)


def _check_member(wheel: WheelReader, pin: IndexFile) -> None:
    recorded = wheel.record.get(pin.member)
    if recorded is None or recorded.sha256 != pin.member_sha256:
        has = recorded.sha256 if recorded else "nothing"
        raise ArtifactError(
            f"{pin.file}: RECORD has {has} for {pin.member}, pinned is {pin.member_sha256}"
        )


def _by_installer(pin: IndexFile, name: str, before: FetchError) -> Path:
    from fi_ffi.loader.wheel import Wheel

    with tempfile.TemporaryDirectory() as folder:
        try:
            downloaded = _download(pin, Path(folder))
        except FetchError as error:
            raise FetchError(f"{error}\nBefore that, by ranges: {before}") from None
        if downloaded.suffix != ".whl":  # uv unpacks what it fetches
            origin = f"{pin.file}: {pin.member}"
            return cache.store([downloaded.read_bytes()], pin.member_sha256, name, origin)
        wheel = Wheel(downloaded, sha256=pin.sha256, record_sha256=pin.record_sha256)
        _check_member(wheel, pin)
        return wheel.extract(pin.member)


def _download(pin: IndexFile, folder: Path) -> Path:
    """Run the installer; returns the wheel, or the member where it unpacks."""
    from fi_ffi.loader.index import installer, pip_tags, uv_tags

    requirement = folder / "requirement.txt"
    requirement.write_text(f"{pin.project}=={pin.version} --hash=sha256:{pin.sha256}\n")
    target = folder / "got"
    program = installer(pin)
    if program.kind == "pip":
        arguments, got = ["download", "--dest", str(target), *pip_tags(pin)], target / pin.file
    else:
        arguments = ["pip", "install", "--target", str(target), *uv_tags(pin)]
        got = target / pin.member
    arguments += ["--quiet", "--no-deps", "--require-hashes", "--requirement", str(requirement)]
    said = program.run(arguments, pin.file)
    if not got.is_file():
        raise FetchError(f"{pin.file}: {program.kind} did not bring it: {said[-2000:]}")
    return got
