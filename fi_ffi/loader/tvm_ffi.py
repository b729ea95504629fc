"""libtvm_ffi: a single copy in the process, which has what the libraries need that are loaded.

Two copies would each have their own tables of types and functions, or abort. So a copy that is
already loaded is used first, then that of the installed apache-tvm-ffi, which a later `import
tvm_ffi` shares.

The dynamic linker names one missing symbol and not the library that should define it. Therefore,
before a library is loaded, libtvm_ffi is checked for all symbols required from it: kernels compiled
with a later apache-tvm-ffi may need symbols that an earlier one lacks. A C++ symbol may also be
there and mean something else, since a mangled name leaves out what a function returns: a library
that was certainly compiled for the other meaning is refused. The linker checks the others (the C++
runtime, CUDA, the driver) before it runs any code of the library.
"""

from __future__ import annotations

import functools
import json
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from fi_ffi.abi import library
from fi_ffi.abi._cffi import ffi
from fi_ffi.errors import ArtifactError, LoaderError
from fi_ffi.loader import distributions, kernels
from fi_ffi.loader.cache import State
from fi_ffi.loader.distributions import hex_of, is_in

if TYPE_CHECKING:
    from fi_ffi.loader.elf import Source

PROJECT = "apache-tvm-ffi"
MEMBER = "tvm_ffi/lib/libtvm_ffi.so"
# The C interface only grows within the series, so kernels compiled with older headers work with a
# newer library. vLLM and SGLang require exactly the first of these releases, and TileLang none
# later. In those left out, all of them withdrawn, `Optional<Function>` and with it the C++ of
# `Module` differs from the releases before and after.
ACCEPTED = ">=0.1.11,<0.2,!=0.1.13,!=0.1.13.post0,!=0.1.13.post1"

_Loaded = TypeVar("_Loaded")
_SONAME = "libtvm_ffi.so"
# Written by tools/record_symbols.py: how releases of apache-tvm-ffi differ for what links it.
RECORD = Path(__file__).with_name("data") / "tvm_ffi.json"
_AGAIN = "and start this process again"
_MAX_NAMES = 16 << 20  # bytes of a library's names of symbols that are looked through

# Guards dlopen (together with its own lock) and libtvm_ffi.
linking = threading.RLock()
library.renew_after_fork(globals(), "linking", threading.RLock)


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
        with kernels.checked(Path(self.path), self.sha256, self.state) as opened:
            try:
                return attach(self.path, opened.name)
            finally:
                # A refused library may stay loaded under this name.
                opened.keep()


_loaded: Found | None = None
_version: tuple[int, int, int] = (0, 0, 0)


def ensure_tvm_ffi() -> Found:
    """Load libtvm_ffi globally, once."""
    global _loaded, _version
    if _loaded is None:
        with linking:
            if _loaded is None:
                found = in_process() or installed()
                _version = found.load(library.attach)
                _loaded = found
    return _loaded


def tvm_ffi_version() -> tuple[int, int, int]:
    """Return libtvm_ffi's version, as its headers state it; it may be ahead of the package's."""
    ensure_tvm_ffi()
    return _version


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
    install = f"`pip install '{PROJECT}{ACCEPTED}'`"
    return of_distribution({PROJECT: MEMBER}, ACCEPTED, missing, install)


def of_distribution(
    members: Mapping[str, str],
    accepted: str,
    missing: str,
    install: str,
    prereleases: bool | None = None,
) -> Found:
    """Find a library of an installed distribution, and check it against RECORD.

    `members` has the library's path by the names of the distributions that may have it, the best
    first. `missing` and `install` are what the `LoaderError` says if none does.
    """
    for name, member in members.items():
        found = distributions.installed(f"{name.replace('-', '_')}-")
        if not found:
            continue
        path, version = found[0].info.parent / member, found[0].version
        if not is_in(version, accepted, prereleases):
            missing = f"{name} {version} is installed, and fi_ffi works with {accepted}"
        elif not path.is_file():
            missing = f"{name} {version} is installed without {path}, reinstall it"
            install = install.replace("install", "install --force-reinstall", 1)
        else:
            break
    else:
        raise LoaderError(f"{missing}: {install}")
    origin = f"installed {version}"
    digest = next((digest for each, _, digest in found[0].record() if each == member), "")
    if not digest:
        return Found(str(path), origin)
    wanted, file = hex_of(digest, str(path)), kernels.hashed_file(path.stem, path)
    if file.sha256 != wanted:
        raise ArtifactError(
            f"{path}: sha256 is {file.sha256}, and the RECORD of {name} has {wanted}: reinstall it"
        )
    return Found(str(path), origin, file.sha256, file.state)


@functools.cache
def releases_record() -> Any:
    """Return the record of apache-tvm-ffi's releases.

    `releases` are all, oldest first. `symbols` has the version specifier of the releases that
    export a symbol. `headers` has those whose headers put a text into names of symbols. `changed`
    has symbols with several meanings, and the releases of each meaning.
    """
    return json.loads(RECORD.read_text())


def span(of: Sequence[str], every: Sequence[str]) -> str:
    """Return the version specifier of some of `every` release (oldest first); "" for all."""
    first, last = every.index(of[0]), every.index(of[-1])
    bounds = [f">={of[0]}"] if first else []
    bounds += [f"<={of[-1]}"] if last < len(every) - 1 else []
    return ",".join(bounds + [f"!={hole}" for hole in every[first:last] if hole not in of])


def compiled_for(file: Source, requires: Sequence[str]) -> list[str]:
    """Return the releases with whose headers the library may have been compiled, oldest first.

    They export all symbols that it requires, and their headers have the namespaces that its own
    symbols name. An empty list means that no recorded release fits.
    """
    from packaging.specifiers import SpecifierSet

    from fi_ffi.loader.elf import open_section

    record = releases_record()
    with open_section(file, ".dynstr") as window:
        names = window.at(0, _MAX_NAMES) if window else b""
    fits = [record["symbols"].get(symbol, "<0") for symbol in requires]
    fits += [of for text, of in record["headers"].items() if text.encode() in names]
    versions = SpecifierSet(",".join(filter(None, fits)))
    return [release for release in record["releases"] if versions.contains(release)]


def check(
    path: Path, requires: Sequence[str], needed: Sequence[str], found: Found, file: Source
) -> None:
    """Raise `LoaderError` if libtvm_ffi is not the one that the library at `path` requires.

    Either it lacks symbols, or it means something else by them. A library that this one needs may
    define them; one that is not loaded yet is left to the linker, which knows where to find it.
    `file` is the library's open file.
    """
    absent = [name for name in requires if library.find_symbol(ffi.NULL, name) is None]
    if absent and (missing := _missing_in(needed, absent)):
        raise lacking(path, missing, found)
    for changed in releases_record()["changed"]:
        uses = [symbol for symbol in changed["symbols"] if symbol in requires]
        if uses:
            _check_meaning(path, uses[0], changed["meanings"], found, compiled_for(file, requires))


def _check_meaning(
    path: Path,
    symbol: str,
    meanings: dict[str, list[str]],
    found: Found,
    compiled: Sequence[str],
) -> None:
    """Raise `LoaderError` if `symbol` certainly means something else in this process's
    libtvm_ffi."""
    here = release_of(found)
    means = next((text for text, of in meanings.items() if here in of), None)
    wants = {text: of for text, of in meanings.items() if not {*of}.isdisjoint(compiled)}
    if means is None or not wants or means in wants:
        return
    every, theirs = releases_record()["releases"], " or ".join(wants)
    fits = [release for release in compiled if any(release in of for of in wants.values())]
    raise LoaderError(
        f"{path} needs {symbol} as apache-tvm-ffi{span(fits, every)} has it ({theirs}), and in the "
        f"libtvm_ffi of this process, {here}, {means} ({found.path}, {found.origin}): it would "
        f"read and write memory that is not its own. {_install(span(fits, every))}"
    )


def _missing_in(needed: Sequence[str], missing: Sequence[str]) -> Sequence[str]:
    """Return the symbols that none of the needed libraries has; none if one is not loaded yet."""
    for file in needed:
        handle = library.in_process(file)
        if handle is None:
            return ()
        missing = [name for name in missing if library.find_symbol(handle, name) is None]
    return missing


def lacking(path: Path, missing: Sequence[str], found: Found) -> LoaderError:
    return LoaderError(
        f"{path} needs {', '.join(missing)}, which the libtvm_ffi of this process lacks "
        f"({found.path}, {found.origin}): {_who_has(missing)}"
    )


def _who_has(symbols: Sequence[str]) -> str:
    """Return which apache-tvm-ffi exports the symbols, and how to install it."""
    record = releases_record()
    unknown = [symbol for symbol in symbols if symbol not in record["symbols"]]
    if unknown:
        oldest, *_, newest = record["releases"]
        return (
            f"no {PROJECT} from {oldest} to {newest} has {', '.join(unknown)}. "
            f"If it was compiled with a later one: `pip install -U {PROJECT}`, {_AGAIN}"
        )
    versions = ",".join(sorted({record["symbols"][symbol] for symbol in symbols} - {""}))
    return f"{PROJECT}{versions} has it: {_install(versions)}"


def _install(versions: str) -> str:
    wanted = ",".join(filter(None, (versions, "<0.2")))
    return f"`pip install '{PROJECT}{wanted}'`, {_AGAIN}"
