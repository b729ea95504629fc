"""Advice about what the dynamic linker refuses: a system, a CUDA or a driver that is too old."""

from __future__ import annotations

import contextlib
import re

from fi_ffi.errors import LoaderError
from fi_ffi.loader import machine
from fi_ffi.loader.elf import Source, open_elf
from fi_ffi.loader.runtime import SYMBOL

_VERSION = re.compile(r"(?P<library>/\S+): version `(?P<family>\w+?)_[\d.]+' not found")
_BUILD = "`fi-ffi build` makes it on this one"


def linking_advice(message: str) -> str:
    """Return advice about the linker's message, or ""."""
    if match := _VERSION.search(message):
        return _about_runtime(match["library"], match["family"])
    if match := re.search(SYMBOL, message):
        return _about_cuda(match["symbol"], match["version"] or "")
    return ""


def _about_runtime(path: str, family: str) -> str:
    """Return advice about a C or C++ library that lacks a symbol version."""
    numbers: list[tuple[int, ...]] = []
    with contextlib.suppress(LoaderError):
        for name in _defined_versions(path):
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
        wanted = machine.requirement("cudart", int(match[1]))
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


def _defined_versions(path: Source) -> tuple[str, ...]:
    """Return the symbol versions that a library defines, such as `GLIBCXX_3.4.30`, in order."""
    with open_elf(path) as (elf, _):
        section = elf.get_section_by_name(".gnu.version_d")
        # The first name is the version; the others are its predecessors.
        found = section.iter_versions() if section is not None else ()
        return tuple(next(names).name for _, names in found)
