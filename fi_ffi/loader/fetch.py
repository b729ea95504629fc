"""Fetching a pinned file from the package index, as the user's pip would.

No index is named here.  pip (or uv, where an environment has no pip) resolves
the pin through whatever index, mirror, proxy and credentials it is set up with,
and checks the sha256 that the requirement carries; it is checked again here.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from fi_ffi.errors import FetchError
from fi_ffi.loader import cache
from fi_ffi.loader.lock import IndexFile
from fi_ffi.loader.wheel import Wheel

_TIMEOUT = 600  # seconds, for a file of a few MB


def fetch_member(pin: IndexFile) -> Path:
    """The pinned member's file in the cache, fetching its wheel if it is not there.

    Raises `FetchError` with the installer's own words, `ArtifactError` where the
    bytes are not the pinned ones.
    """
    name = pin.member.rpartition("/")[2]
    found = cache.find(pin.member_sha256, name)
    if found is not None:
        return found
    if os.environ.get("FI_FFI_OFFLINE") == "1":
        raise FetchError(
            f"FI_FFI_OFFLINE=1, and {pin.file} is not in the cache at {cache.cache_root()}; "
            f"`pip install {pin.project}=={pin.version}` where there is a network serves as well"
        )
    with tempfile.TemporaryDirectory() as folder:
        return _store(pin, _download(pin, Path(folder)), name)


def _store(pin: IndexFile, downloaded: Path, name: str) -> Path:
    origin = f"{pin.file}: {pin.member}"
    if downloaded.suffix != ".whl":  # uv unpacks what it fetches
        return cache.store([downloaded.read_bytes()], pin.member_sha256, name, origin)
    with downloaded.open("rb") as file:
        digest = cache.hash_of(file)
    if digest != pin.sha256:
        raise FetchError(f"{pin.file}: sha256 is {digest}, pinned is {pin.sha256}")
    extracted = Wheel(downloaded).extract(pin.member)
    with extracted.open("rb") as file:
        if cache.hash_of(file) != pin.member_sha256:
            raise FetchError(f"{origin} is not the pinned one")
    return extracted


def _download(pin: IndexFile, folder: Path) -> Path:
    """Run the installer; returns the wheel, or the member where it unpacks."""
    requirement = folder / "requirement.txt"
    requirement.write_text(f"{pin.project}=={pin.version} --hash=sha256:{pin.sha256}\n")
    target = folder / "got"
    pip = _pip()
    if pip:
        command = [*pip, *_pip_arguments(pin, target)]
    elif uv := shutil.which("uv"):
        command = [uv, *_uv_arguments(pin, target)]
    else:
        raise FetchError(
            f"neither pip nor uv is here to fetch {pin.project}=={pin.version}: install that "
            f"package into this environment, or copy a cache that has it to {cache.cache_root()}"
        )
    command += ["--quiet", "--no-deps", "--require-hashes", "--requirement", str(requirement)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT)
    except subprocess.TimeoutExpired:
        raise FetchError(f"fetching {pin.file} took longer than {_TIMEOUT} s") from None
    got = target / (pin.file if pip else pin.member)
    if done.returncode or not got.is_file():
        words = done.stderr.strip()[-2000:] or done.stdout.strip()[-2000:] or "no reason given"
        raise FetchError(f"{pin.file} could not be fetched:\n{words}")
    return got


def _pip() -> list[str] | None:
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    program = shutil.which("pip3") or shutil.which("pip")
    return [program, "--disable-pip-version-check"] if program else None


def _tags(pin: IndexFile) -> tuple[str, list[str]]:
    """The Python version ("3.11") and platform tags of the pinned file's name."""
    _, _, python, _, platforms = pin.file.removesuffix(".whl").split("-")
    return f"{python[2]}.{python[3:]}", platforms.split(".")


def _pip_arguments(pin: IndexFile, target: Path) -> list[str]:
    # The wheel is of one Python version and the library inside serves any, so the
    # pin's own tags are asked for, whatever this interpreter is.
    version, platforms = _tags(pin)
    arguments = ["download", "--only-binary=:all:", "--dest", str(target)]
    arguments += ["--implementation", "cp", "--python-version", version]
    for platform in platforms:
        arguments += ["--platform", platform]
    return arguments


def _uv_arguments(pin: IndexFile, target: Path) -> list[str]:
    version, platforms = _tags(pin)
    # manylinux_2_28_x86_64 is x86_64-manylinux_2_28 to uv.
    family, major, minor, machine = platforms[-1].split("_", 3)
    platform = f"{machine}-{family}_{major}_{minor}"
    arguments = ["pip", "install", "--only-binary", ":all:", "--target", str(target)]
    return [*arguments, "--python-version", version, "--python-platform", platform]
