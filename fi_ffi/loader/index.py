"""Where a pinned file of the package index is, as the user's pip or uv would find it.

No index is named here: whatever index, mirror, proxy and credentials those are set
up with answer.  The file's address comes out; the bytes are fetched elsewhere.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

from fi_ffi.errors import ArtifactError, FetchError
from fi_ffi.loader.lock import IndexFile
from fi_ffi.loader.urls import refuse_offline

TIMEOUT = 600.0  # seconds, for an installer that may have to fetch a file of a few MB


@dataclass(frozen=True)
class Installer:
    """A pip or a uv, and the words that start it."""

    kind: Literal["pip", "uv"]
    command: tuple[str, ...]

    def run(self, arguments: list[str], what: str) -> str:
        """Its standard output; `FetchError`, with its own words, if it fails."""
        try:
            done = subprocess.run(
                [*self.command, *arguments],
                capture_output=True,
                text=True,
                errors="replace",
                timeout=TIMEOUT,
            )
        except subprocess.TimeoutExpired:
            raise FetchError(f"{what}: {self.kind} took longer than {TIMEOUT:.0f} s") from None
        except OSError as error:
            raise FetchError(f"{what}: {self.kind} cannot be run: {error}") from None
        if done.returncode:
            words = _once(done.stderr) or _once(done.stdout) or "it gives no reason"
            raise FetchError(f"{what}: {self.kind} could not find or fetch it:\n{words[-2000:]}")
        return done.stdout


def _once(text: str) -> str:
    """The lines, without those that differ from one before in numbers alone (of tries, say)."""
    lines = {re.sub(r"0x[0-9a-f]+|\d+", "", line): line for line in text.strip().splitlines()}
    return "\n".join(lines.values())


def installer(pin: IndexFile) -> Installer:
    """pip, of this environment or on PATH, or uv where there is none."""
    if importlib.util.find_spec("pip") is not None:
        return Installer("pip", (sys.executable, "-m", "pip", "--disable-pip-version-check"))
    for program in ("pip3", "pip"):
        if found := shutil.which(program):
            return Installer("pip", (found, "--disable-pip-version-check"))
    if found := shutil.which("uv"):
        return Installer("uv", (found,))
    from fi_ffi.loader.cache import cache_root

    raise FetchError(
        f"neither pip nor uv is here to find {pin.project}=={pin.version}: install that package "
        f"into this environment, or copy a cache that has it to {cache_root()}"
    )


def resolve(pin: IndexFile) -> str:
    """The address of a pinned file.

    Raises `FetchError` where it cannot be found, `ArtifactError` where the index says
    that the file has another sha256 than the pinned one.
    """
    refuse_offline(pin.file)
    program = installer(pin)
    find = _from_pip if program.kind == "pip" else _from_uv
    try:
        found = find(program, pin)
        return next(url for url in found if _is_pinned(url, found[url], pin))
    except StopIteration:
        names = ", ".join(_file_name(url) for url in found) or "nothing"
        raise FetchError(f"{pin.file}: {program.kind} found {names} instead") from None
    except (ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
        if isinstance(error, ArtifactError):
            raise
        raise FetchError(
            f"{pin.file}: {program.kind}'s answer is not understood: {error!r}"
        ) from None


def _is_pinned(url: str, sha256: str | None, pin: IndexFile) -> bool:
    if _file_name(url) != pin.file:
        return False
    if sha256 not in (None, pin.sha256):
        raise ArtifactError(f"{pin.file}: the index has it with sha256 {sha256}, not {pin.sha256}")
    return True


def _file_name(url: str) -> str:
    return unquote(urlsplit(url).path.rpartition("/")[2])


def _from_pip(program: Installer, pin: IndexFile) -> dict[str, str | None]:
    """Addresses and sha256s that pip would install."""
    with tempfile.TemporaryDirectory() as folder:  # for pip to look at, nothing goes there
        arguments = ["install", "--dry-run", "--ignore-installed", "--no-deps", "--quiet"]
        arguments += ["--target", folder, "--report", "-", *pip_tags(pin)]
        text = program.run([*arguments, f"{pin.project}=={pin.version}"], pin.file)
    found: dict[str, str | None] = {}
    for item in json.loads(text)["install"]:
        info = item["download_info"]
        found[info["url"]] = info.get("archive_info", {}).get("hashes", {}).get("sha256")
    return found


def _from_uv(program: Installer, pin: IndexFile) -> dict[str, str | None]:
    """Addresses and sha256s that uv would write into a lock file."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib  # type: ignore[import-not-found,unused-ignore]
    with tempfile.TemporaryDirectory() as folder:
        wanted = Path(folder) / "wanted.in"
        wanted.write_text(f"{pin.project}=={pin.version}\n")
        arguments = ["pip", "compile", "--quiet", "--no-deps", "--format", "pylock.toml"]
        text = program.run([*arguments, *uv_tags(pin), str(wanted)], pin.file)
    found: dict[str, str | None] = {}
    packages: list[dict[str, Any]] = tomllib.loads(text)["packages"]
    for package in packages:
        for wheel in package.get("wheels", []):
            url = wheel.get("url") or Path(wheel["path"]).resolve().as_uri()
            found[url] = wheel.get("hashes", {}).get("sha256")
    return found


def _tags(pin: IndexFile) -> tuple[str, list[str]]:
    """The Python version ("3.11") and platform tags of the pinned file's name."""
    _, _, python, _, platforms = pin.file.removesuffix(".whl").split("-")
    return f"{python[2]}.{python[3:]}", platforms.split(".")


def pip_tags(pin: IndexFile) -> list[str]:
    """pip's options for the pin's own tags."""
    # The wheel is of one Python version and the library inside serves any, so the
    # pin's tags are asked for, whatever this interpreter is.
    version, platforms = _tags(pin)
    arguments = ["--only-binary=:all:", "--implementation", "cp", "--python-version", version]
    for platform in platforms:
        arguments += ["--platform", platform]
    return arguments


def uv_tags(pin: IndexFile) -> list[str]:
    """uv's options for the pin's own tags."""
    version, platforms = _tags(pin)
    # manylinux_2_28_x86_64 is x86_64-manylinux_2_28 to uv.
    family, major, minor, machine = platforms[-1].split("_", 3)
    platform = f"{machine}-{family}_{major}_{minor}"
    # Without an interpreter named, uv looks for one on PATH, or fetches one.
    arguments = ["--python", sys.executable, "--only-binary", ":all:"]
    return [*arguments, "--python-version", version, "--python-platform", platform]
