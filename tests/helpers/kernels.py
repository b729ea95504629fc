"""The kernels that tests on a GPU run: those that a user's own calls would find there.

Nothing has to be named: kernels are in FI_FFI_KERNELS, an installed flashinfer-jit-cache or any
other place that fi_ffi searches.  A test without its module is skipped, and says which it is and
how to get it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from fi_ffi.errors import LoaderError
from fi_ffi.loader import machine, search
from fi_ffi.loader.kernels import KernelSource
from fi_ffi.ops.call.releases import fits, release_in_force
from fi_ffi.ops.call.row import Row
from fi_ffi.ops.functions import OPS

# What `search.find_module` raises, in a traceback or by itself; its last line is the advice.
_MISSING = re.compile(r"no kernels of module '([^']+)'.*:\n(?:  .*\n)*(.*)")
_OF_ANOTHER_RELEASE = re.compile(r"\w+ is in FlashInfer .*; the kernels in use are of .*")


def why_missing(text: object) -> str:
    """The module that an error says no place has, and how to get it, or what the release in use
    does not have; "" for any other error.

    A file of this machine that cannot be read is a fault, and no reason to skip.
    """
    if found := _OF_ANOTHER_RELEASE.search(str(text)):
        return found[0]
    found = _MISSING.search(str(text))
    if found is None:
        return ""
    here = (place for place in search.places_of(found[1]) if place.kind != "remote")
    said = {search.ask(place, found[1]).status for place in here}
    return "" if search.FAILS in said else f"no kernels of module {found[1]!r}: {found[2]}"


def skip_if_missing(text: object) -> None:
    if why := why_missing(text):
        pytest.skip(why)


def why_not(module: str, device: int = 0) -> str:
    """Why a GPU has no kernels of a module, or ""."""
    try:
        search.find_module(module, device)
    except LoaderError as error:
        if not (why := why_missing(error)):
            raise
        return why
    return ""


def need(module: str | Row, device: int = 0) -> None:
    """Skip the test where the kernels at hand have no such module for a GPU, or no such op."""
    if isinstance(module, Row):
        release = release_in_force()
        if not any(fits(row, release) for row in OPS[module.name].rows):
            pytest.skip(f"{module.name} is not in FlashInfer {release}")
        module = module.module_on(machine.capability(device))
    if why := why_not(module, device):
        pytest.skip(why)


def first_here() -> KernelSource | None:
    """The first place on this machine that has kernels."""
    return next((place.source for place in _here() if place.source), None)


def _here() -> Iterator[search.Candidate]:
    return (place for place in search.places() if place.kind != "remote")
