"""Undefined symbols of a library: checks that they are defined, and explains the linker's errors.

The dynamic linker names one missing symbol and not the library that should define it. Therefore,
before a library is loaded, libtvm_ffi is checked for all symbols required from it: kernels compiled
with a later apache-tvm-ffi may need symbols that an earlier one lacks. The linker checks the others
(the C++ runtime, CUDA, the driver) before it runs any code of the library; its message gets the
library concerned and advice.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fi_ffi.abi import library
from fi_ffi.abi._cffi import ffi
from fi_ffi.errors import LoaderError
from fi_ffi.loader import held, libraries, machine, tvm_ffi
from fi_ffi.loader.elf import RUNTIME, defined_versions, undefined

# Written by tools/record_symbols.py: symbols that only some apache-tvm-ffi releases export, and the
# releases.
SYMBOLS = Path(__file__).with_name("data") / "tvm_ffi.json"

_VERSION = re.compile(r"(?P<library>/\S+): version `(?P<family>\w+?)_[\d.]+' not found")
_SYMBOL = re.compile(r"undefined symbol: (?P<symbol>\w+)(, version (?P<version>\S+))?")
_FLASHINFER = re.compile(r"_Z\w*10flashinfer")
_BUILD = "`fi-ffi build` makes it on this one"


def check(path: Path, requires: Sequence[str], needed: Sequence[str], found: tvm_ffi.Found) -> None:
    """Raise `LoaderError` if libtvm_ffi lacks symbols that the library at `path` requires.

    A library that it needs may define them. One that is not loaded yet is left to the linker, which
    knows where to find it.
    """
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
    known = json.loads(SYMBOLS.read_text())
    unknown = [symbol for symbol in symbols if symbol not in known["symbols"]]
    again = "and start this process again"
    if unknown:
        return (
            f"no {tvm_ffi.PROJECT} from {known['oldest']} to {known['newest']} has "
            f"{', '.join(unknown)}. If it was compiled with a later one: "
            f"`pip install -U {tvm_ffi.PROJECT}`, {again}"
        )
    has = tvm_ffi.PROJECT + ",".join(sorted({known["symbols"][symbol] for symbol in symbols}))
    return f"{has} has it: `pip install '{has},<0.2'`, {again}"


def open_module(path: Path, through: str | None, opened: held.Held) -> Any:
    """Load the library at `path` by the name `through`; `opened` is its open file.

    From 0.7 on, FlashInfer's dispatchers name template instances that no planner chooses and that
    are not compiled; FlashInfer's own loader binds lazily. So undefined functions of FlashInfer are
    accepted, and all others refused.
    """
    try:
        return library.open_module(str(path), through)
    except LoaderError as error:
        left_out = _SYMBOL.search(str(error))
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
    message, advice = str(error), ""
    if match := _VERSION.search(message):
        advice = _about_runtime(match["library"], match["family"])
    elif match := _SYMBOL.search(message):
        if RUNTIME.match(match["symbol"]):
            return _lacking(path, [match["symbol"]], found)
        advice = _about_cuda(match["symbol"], match["version"] or "")
    return LoaderError(f"{message}. {advice}") if advice else error


def _about_runtime(path: str, family: str) -> str:
    """Return advice about a C or C++ library that lacks a symbol version."""
    numbers: list[tuple[int, ...]] = []
    with contextlib.suppress(LoaderError):
        for name in defined_versions(path):
            if match := re.fullmatch(rf"{family}_([\d.]+)", name):
                numbers.append(tuple(map(int, match[1].split("."))))
    newest = ".".join(map(str, max(numbers, default=())))
    has = f"{path} has {family} up to {newest}" if newest else f"{path} has no {family}"
    newer = _BUILD
    if family != "GLIBC":  # GLIBC comes only with the system
        newer = f"take a newer one, as conda's libstdcxx-ng is, or {_BUILD}"
    return f"{has}: it was compiled on a newer system; {newer}"


def _about_cuda(symbol: str, version: str) -> str:
    """Return advice about a function that CUDA's runtime or the driver lacks."""
    if match := re.fullmatch(r"libcudart\.so\.(\d+)", version):
        wanted = libraries.requirement("cudart", int(match[1]))
        return (
            f"{machine.load_cudart()[1]} lacks it: it was compiled with a later CUDA {match[1]}; "
            f"`pip install -U '{wanted}'`"
        )
    if re.match(r"cu[A-Z]", symbol) and not version:
        driver = machine.driver_version()
        has = f"driver is of CUDA {driver[0]}.{driver[1]}" if driver else "machine has no driver"
        return (
            f"It is a function of the NVIDIA driver's libcuda, and this {has}: install a newer one"
        )
    return ""
