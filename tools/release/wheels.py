"""The wheels of flashinfer-python: found through pip's settings, cached, and read.

Nothing of a wheel is run or installed. The declarations in its sources are parsed once and cached.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from packaging.utils import InvalidWheelFilename, parse_wheel_filename

from fi_ffi.catalogue.ahead_of_time import sha256_of
from fi_ffi.errors import ArgumentError, ArtifactError, BuildError
from fi_ffi.loader import cache
from fi_ffi.loader.fetch.asking import check_permission
from fi_ffi.loader.fetch.urls import redact
from fi_ffi.loader.search import parse_release
from fi_ffi.loader.wheel import BROKEN
from tools.release.interface import Interface, interface_of

PROJECT = "flashinfer-python"
_FILE = "flashinfer_python-{}-py3-none-any.whl"
_FORMAT = 1  # version of the notes' format
_READERS = ("conditions", "cpp", "exports", "generators", "interface", "types")
_READ = ("flashinfer/data/csrc/", "flashinfer/data/include/")
_MAX_TEXT = 64 << 20  # bytes of one file
_MAX_TEXTS = 1 << 30  # bytes of all files that are read
_CHUNK = 1 << 20
# Where FlashInfer's list of what is built ahead of time asks whether a GPU is among the targets.
_TARGET = re.compile(r"""\bhas_sm\(\s*["']compute_(\d{1,4})["']""")


@dataclass(frozen=True)
class SourceWheel:
    """A wheel of flashinfer-python on this machine.

    Files are named as in rows: `csrc/norm.cu`, `include/flashinfer/norm.cuh`, `jit/activation.py`.
    """

    release: str
    path: Path
    sha256: str

    @functools.cached_property
    def _archive(self) -> zipfile.ZipFile:
        try:
            return zipfile.ZipFile(self.path)
        except BROKEN as error:
            raise ArtifactError(f"{self.path} is not a readable wheel: {error}") from error

    @functools.cached_property
    def members(self) -> dict[str, str]:
        """The members that are sources, by the name used here."""
        found = {}
        for member in self._archive.namelist():
            if member.startswith(_READ):
                found[member.removeprefix("flashinfer/data/")] = member
            elif member.startswith("flashinfer/") and "/data/" not in member:
                found[member.removeprefix("flashinfer/")] = member
        return found

    def text(self, name: str) -> str:
        """Return a file's text; KeyError if the release does not have the file."""
        info = self._archive.getinfo(self.members[name])
        if info.file_size > _MAX_TEXT:
            raise ArtifactError(f"{self.path}: {info.filename} has {info.file_size} bytes")
        try:
            return self._archive.read(info).decode(errors="replace")
        except BROKEN as error:
            raise ArtifactError(f"{self.path}: {info.filename} cannot be read: {error}") from error

    def gpus(self) -> list[int]:
        """Return the GPUs from SM90 on that its list of modules has cases for, as in 107.

        Raises `BuildError` if the list cannot be read.
        """
        text = self.text("aot.py") if "aot.py" in self.members else ""
        found = sorted({int(number) for number in _TARGET.findall(text)})
        if not found:
            raise BuildError(f"{self.path}: aot.py asks for no GPU, so its list cannot be read")
        return found

    def interface(self) -> Interface:
        """Return all declarations of the sources, from the cache if the wheel was read before."""
        note = f"sources/{self.sha256}.json"
        kept = cache.read_note(note, _FORMAT)
        if isinstance(kept, dict) and kept.get("reader") == _reader():
            return Interface.from_json(kept["interface"])
        if (
            size := sum(self._archive.getinfo(name).file_size for name in self.members.values())
        ) > _MAX_TEXTS:
            raise ArtifactError(f"{self.path}: its sources have {size} bytes")
        try:
            found = interface_of(self.release, sorted(self.members), self.text)
        except BuildError as error:
            raise BuildError(f"{self.path}: {error}") from error
        cache.write_note(note, _FORMAT, {"reader": _reader(), "interface": found.as_json()})
        return found


@functools.cache
def _reader() -> str:
    """Return a hash of this package's code, to recognise notes written by another version."""
    files = [Path(__file__).with_name(f"{name}.py") for name in _READERS]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def open_release(release: str) -> SourceWheel:
    """Open the wheel of a release such as "0.6.13", or a wheel at a path.

    A release that is not in the cache is fetched with pip and its settings. Raises `BuildError` if
    pip fails, `ArtifactError` for a damaged or changed file, and `ArgumentError` if `release` is
    neither a release nor a wheel.
    """
    if release.endswith(".whl"):
        return _local(Path(release))
    release = parse_release(release)
    note = f"sources/release-{release}.json"
    kept = cache.read_note(note, _FORMAT)
    sha256 = sha256_of(release) or (kept["sha256"] if isinstance(kept, dict) else None)
    found = cache.find(sha256, _FILE.format(release)) if sha256 else None
    if sha256 and found is not None:
        return SourceWheel(release, found, sha256)
    wheel = _fetch(release)
    cache.write_note(note, _FORMAT, {"sha256": wheel.sha256})
    return wheel


def _local(path: Path) -> SourceWheel:
    try:
        name, version, _, _ = parse_wheel_filename(path.name)
        if name != PROJECT:
            raise InvalidWheelFilename(path.name)
        sha256, _ = cache.hashed(path)
    except (InvalidWheelFilename, OSError) as error:
        expected = f"a release such as 0.6.13, or the path of a wheel of {PROJECT}"
        raise ArgumentError("release", "RELEASE", got=str(path), expected=expected) from error
    return SourceWheel(str(version), path, sha256)


def published() -> tuple[str, ...]:
    """Return the releases of flashinfer-python that pip finds, the oldest first.

    Yanked releases, and those without a wheel for any machine, are left out.
    """
    output = _pip("listing the releases", "index", "versions", "--only-binary=:all:", PROJECT)
    line = re.search(r"^Available versions: (.+)$", output, re.MULTILINE)
    if line is None:
        raise BuildError(f"pip names no releases of {PROJECT}: {output.strip()[-200:]}")
    return tuple(reversed(line[1].split(", ")))


def _fetch(release: str) -> SourceWheel:
    what, wanted = f"{PROJECT} {release}", f"{PROJECT}=={release}"
    check_permission(what)
    report = _pip(
        f"looking for {what}", "install", "--dry-run", "--ignore-installed", "--no-deps",
        "--only-binary=:all:", "--quiet", "--report", "-", wanted,
    )  # fmt: skip
    (found,) = json.loads(report)["install"]
    address, name = found["download_info"]["url"], _FILE.format(release)
    about = found["download_info"]["archive_info"]
    sha256 = about["hashes"]["sha256"] if "hashes" in about else about["hash"].partition("=")[2]
    recorded = sha256_of(release)
    if recorded not in (None, sha256):
        raise ArtifactError(f"{redact(address)}: sha256 is {sha256}, recorded is {recorded}")
    path = cache.find(sha256, name)
    if path is None:
        with tempfile.TemporaryDirectory() as folder:
            _pip(
                f"fetching {what}", "download", "--no-deps", "--only-binary=:all:", "--quiet",
                "--dest", folder, wanted,
            )  # fmt: skip
            (file,) = Path(folder).iterdir()
            with file.open("rb") as content:
                chunks = iter(lambda: content.read(_CHUNK), b"")
                path = cache.store(chunks, sha256, name, redact(address))
    return SourceWheel(release, path, sha256)


def _pip(what: str, command: str, *arguments: str) -> str:
    """Run pip and return its output; in an environment of uv without pip, run uv's pip."""
    uv = shutil.which("uv")
    if importlib.util.find_spec("pip") is not None:
        python: Sequence[str] = [sys.executable]
    elif uv is not None:
        python = [uv, "run", "--quiet", "--no-project", "--with", "pip", "python"]
    else:
        raise BuildError(f"{what} failed: this Python has no pip, and there is no uv on PATH")
    done = subprocess.run(
        [*python, "-m", "pip", "--disable-pip-version-check", command, *arguments],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise BuildError(f"{what} failed:\n" + "\n".join(lines or done.stderr.splitlines()[-3:]))
    return done.stdout
