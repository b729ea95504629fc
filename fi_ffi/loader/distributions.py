"""Installed distributions, by the names of their folders, and their versions.

`importlib.metadata` imports the email package, which is a good part of a first call.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from fi_ffi.errors import ArtifactError


class Distribution(NamedTuple):
    """An installed distribution; the folder of its metadata is beside its packages."""

    info: Path
    name: str
    version: str

    def record(self) -> Iterator[tuple[str, Path, str]]:
        """Yield the members that RECORD lists: name, path, and hash or "" for one without."""
        import csv  # imported late: a copy of libtvm_ffi that is loaded is not looked up

        text = ""
        with contextlib.suppress(OSError, UnicodeDecodeError):
            text = (self.info / "RECORD").read_text("utf-8")
        for row in csv.reader(text.splitlines()):
            if row:
                yield row[0], self.info.parent / row[0], row[1] if len(row) == 3 else ""


def installed(name: str) -> list[Distribution]:
    """Return the distributions whose names start with `name`, as `sys.path` has them."""
    found = []
    for folder in dict.fromkeys(sys.path):
        # By file name: asking every distribution for its name would read all their metadata.
        for info in sorted(Path(folder or ".").glob(f"{name}*.dist-info")):
            project, _, version = info.name.removesuffix(".dist-info").partition("-")
            found.append(Distribution(info, project.replace("_", "-"), version))
    return found


def canonical(name: str) -> str:
    """Return a distribution's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def split(module: str) -> tuple[str, str]:
    """Return the distribution that has a module, "" for FlashInfer's, and its name there.

    "tokenspeed-kernel/routing" is the library `routing` of tokenspeed-kernel.
    """
    distribution, _, name = module.partition("/") if "/" in module else ("", "", module)
    return distribution, name


def hex_of(digest: str, origin: str, name: str = "it") -> str:
    """Return the sha256 in a field of RECORD, as hex."""
    algorithm, _, value = digest.partition("=")
    try:
        raw = base64.b64decode(value + "=" * (-len(value) % 4), altchars=b"-_", validate=True)
    except ValueError:
        raw = b""
    if algorithm != "sha256" or len(raw) != 32:
        raise ArtifactError(f"{origin}: RECORD has no sha256 for {name}: {digest!r:.80}")
    return raw.hex()


NUMBER = r"\d+(?:\.\d+)*(?:\.post\d+)?"  # a version that is no prerelease


@functools.cache
def is_in(version: str, specifier: str, prereleases: bool | None = True) -> bool:
    """Whether a version specifier includes a version; `prereleases` is as packaging has it."""
    bounds = [re.fullmatch(f"(>=|<|!=)({NUMBER})", part) for part in specifier.split(",")]
    if not re.fullmatch(r"\d+\.\d+\.\d+(\.post\d+)?", version) or not all(bounds):
        # Imported late: it is a good part of a first call's time.
        from packaging.specifiers import SpecifierSet

        return SpecifierSet(specifier).contains(version, prereleases=prereleases)
    own = version_key(version)
    of = {">=": own.__ge__, "<": own.__lt__, "!=": own.__ne__}
    return all(of[bound[1]](version_key(bound[2])) for bound in bounds if bound)


@functools.cache
def version_key(version: str) -> tuple[int, ...]:
    """Return a sort key of a version: a post release comes after it and before the next one."""
    return tuple(int(part.removeprefix("post")) for part in version.split("."))
