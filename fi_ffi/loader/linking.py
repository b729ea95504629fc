"""Undefined symbols of a library: checks that they are defined, and explains the linker's errors.

The dynamic linker names one missing symbol and not the library that should define it. Therefore,
before a library is loaded, libtvm_ffi is checked for all symbols required from it: kernels compiled
with a later apache-tvm-ffi may need symbols that an earlier one lacks. A C++ symbol may also be
there and mean something else, since a mangled name leaves out what a function returns: a library
that was certainly compiled for the other meaning is refused. The linker checks the others (the C++
runtime, CUDA, the driver) before it runs any code of the library; its message gets the library
concerned and advice.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fi_ffi.abi import library
from fi_ffi.abi._cffi import ffi
from fi_ffi.errors import LoaderError
from fi_ffi.loader import held, services, tvm_ffi
from fi_ffi.loader.elf import RUNTIME, Source, open_section, undefined

# Written by tools/record_symbols.py: how releases of apache-tvm-ffi differ for what links it.
RECORD = Path(__file__).with_name("data") / "tvm_ffi.json"

# The linker's message about a symbol.
SYMBOL = re.compile(r"undefined symbol: (?P<symbol>\w+)(, version (?P<version>\S+))?")
_FLASHINFER = re.compile(r"_Z\w*10flashinfer")
_AGAIN = "and start this process again"
_MAX_NAMES = 16 << 20  # bytes of a library's names of symbols that are looked through


@functools.cache
def recorded() -> Any:
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


def exporting(symbol: str) -> str:
    """Return which apache-tvm-ffi exports a symbol: "all", "none", or a version specifier."""
    found = recorded()["symbols"].get(symbol)
    return "none" if found is None else found or "all"


def compiled_for(file: Source, requires: Sequence[str]) -> list[str]:
    """Return the releases with whose headers the library may have been compiled, oldest first.

    They export all symbols that it requires, and their headers have the namespaces that its own
    symbols name. An empty list means that no recorded release fits.
    """
    from packaging.specifiers import SpecifierSet

    record = recorded()
    with open_section(file, ".dynstr") as window:
        names = window.at(0, _MAX_NAMES) if window else b""
    fits = [record["symbols"].get(symbol, "<0") for symbol in requires]
    fits += [of for text, of in record["headers"].items() if text.encode() in names]
    versions = SpecifierSet(",".join(filter(None, fits)))
    return [release for release in record["releases"] if versions.contains(release)]


def check(
    path: Path, requires: Sequence[str], needed: Sequence[str], found: tvm_ffi.Found, file: Source
) -> None:
    """Raise `LoaderError` if libtvm_ffi is not the one that the library at `path` requires.

    Either it lacks symbols, or it means something else by them. A library that this one needs may
    define them; one that is not loaded yet is left to the linker, which knows where to find it.
    `file` is the library's open file.
    """
    _check_symbols(path, requires, needed, found)
    for changed in recorded()["changed"]:
        uses = [symbol for symbol in changed["symbols"] if symbol in requires]
        if uses:
            _check_meaning(path, uses[0], changed["meanings"], found, compiled_for(file, requires))


def _check_meaning(
    path: Path,
    symbol: str,
    meanings: dict[str, list[str]],
    found: tvm_ffi.Found,
    compiled: Sequence[str],
) -> None:
    """Raise `LoaderError` if `symbol` certainly means something else in libtvm_ffi."""
    here = tvm_ffi.release_of(found)
    means = next((text for text, of in meanings.items() if here in of), None)
    wants = {text: of for text, of in meanings.items() if not {*of}.isdisjoint(compiled)}
    if means is None or not wants or means in wants:
        return
    every, theirs = recorded()["releases"], " or ".join(wants)
    fits = [release for release in compiled if any(release in of for of in wants.values())]
    raise LoaderError(
        f"{path} needs {symbol} as apache-tvm-ffi{span(fits, every)} has it ({theirs}), and in the "
        f"libtvm_ffi of this process, {here}, {means} ({found.path}, {found.origin}): it would "
        f"read and write memory that is not its own. {_install(span(fits, every))}"
    )


def _check_symbols(
    path: Path, requires: Sequence[str], needed: Sequence[str], found: tvm_ffi.Found
) -> None:
    missing = [name for name in requires if library.find_symbol(ffi.NULL, name) is None]
    for file in needed if missing else ():
        handle = library.in_process(file)
        if handle is None:
            return
        missing = [name for name in missing if library.find_symbol(handle, name) is None]
    if missing:
        raise _lacking(path, missing, found)


def _lacking(path: Path, missing: Sequence[str], found: tvm_ffi.Found) -> LoaderError:
    return LoaderError(
        f"{path} needs {', '.join(missing)}, which the libtvm_ffi of this process lacks "
        f"({found.path}, {found.origin}): {_who_has(missing)}"
    )


def _who_has(symbols: Sequence[str]) -> str:
    """Return which apache-tvm-ffi exports the symbols, and how to install it."""
    record = recorded()
    unknown = [symbol for symbol in symbols if symbol not in record["symbols"]]
    if unknown:
        oldest, *_, newest = record["releases"]
        return (
            f"no {tvm_ffi.PROJECT} from {oldest} to {newest} has {', '.join(unknown)}. "
            f"If it was compiled with a later one: `pip install -U {tvm_ffi.PROJECT}`, {_AGAIN}"
        )
    versions = ",".join(sorted({record["symbols"][symbol] for symbol in symbols} - {""}))
    return f"{tvm_ffi.PROJECT}{versions} has it: {_install(versions)}"


def _install(versions: str) -> str:
    wanted = ",".join(filter(None, (versions, "<0.2")))
    return f"`pip install '{tvm_ffi.PROJECT}{wanted}'`, {_AGAIN}"


def open_module(path: Path, through: str | None, opened: held.VerifiedFile) -> Any:
    """Load the library at `path` by the name `through`; `opened` is its open file.

    From 0.7 on, FlashInfer's dispatchers name template instances that no planner chooses and that
    are not compiled; FlashInfer's own loader binds lazily. So undefined functions of FlashInfer are
    accepted, and all others refused.
    """
    try:
        return library.open_module(str(path), through)
    except LoaderError as error:
        left_out = SYMBOL.search(str(error))
        if left_out is None or not _FLASHINFER.match(left_out["symbol"]):
            raise
    handle = library.open_module(str(path), through, lazily=True)
    missing = [
        name
        for name in undefined(opened.name)
        if not _FLASHINFER.match(name)
        and library.find_symbol(ffi.NULL, name) is None
        and library.find_symbol(handle, name) is None
    ]
    if missing:
        opened.keep()  # it stays loaded under this name
        raise LoaderError(f"{path} does not load: undefined symbol: {missing[0]}")
    return handle


def explained(error: LoaderError, path: Path, found: tvm_ffi.Found) -> LoaderError:
    """Return the dynamic linker's error about the library at `path`, extended with advice."""
    symbol = SYMBOL.search(str(error))
    if symbol and RUNTIME.match(symbol["symbol"]):
        return _lacking(path, [symbol["symbol"]], found)
    advice = services.adviser.get().linking_advice(str(error))
    return LoaderError(f"{error}. {advice}") if advice else error
