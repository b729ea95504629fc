"""Looking for a module: place by place, until one has it and the device can run it."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

from fi_ffi.abi import library
from fi_ffi.errors import ArchitectureError, KernelNotFoundError, LoaderError
from fi_ffi.loader import machine
from fi_ffi.loader.facts import Facts, facts_of
from fi_ffi.loader.fatbin import runs_on
from fi_ffi.loader.kernels import KernelSource, ModuleFile, release_of
from fi_ffi.loader.sources import Candidate, candidates

_lock = threading.RLock()
library.renew_after_fork(globals(), "_lock", threading.RLock)


class _Places:
    """Those looked at so far, in order, and those that come next."""

    def __init__(self, found: list[Candidate], following: Iterator[Candidate]) -> None:
        self.found, self.following = found, following


_places = _Places([], candidates())


def use_source(location: str | os.PathLike[str] | None) -> None:
    """Take kernels from `location` alone from now on, or (None) look for them again."""
    global _places
    if location is None:
        _places = _Places([], candidates())
    else:
        _places = _Places(list(candidates(os.fspath(location))), iter(()))


def places() -> Iterator[Candidate]:
    """Every place that is asked for kernels, in order; each is looked at once."""
    # Of one choice from the first to the last, whatever another thread chooses meanwhile.
    places, done = _places, 0
    while True:
        with _lock:
            if done == len(places.found):
                following = next(places.following, None)
                if following is None:
                    return
                places.found.append(following)
            place = places.found[done]
        done += 1
        yield place


def sources() -> Iterator[KernelSource]:
    """The places that have kernels."""
    return (place.source for place in places() if place.source is not None)


def release() -> str | None:
    """FlashInfer's release of the kernels in use, or None where nothing tells."""
    first = next(sources(), None)
    return None if first is None else release_of(first)


def find_module(module: str, device: int | None = None) -> tuple[KernelSource, ModuleFile, Facts]:
    """The first source's file of a module that the device, if one is given, can run.

    Raises `ArchitectureError` where only the device code was wrong, and otherwise
    `KernelNotFoundError` with what every place had to say.
    """
    said, wrong_code = [], False
    for place in places():
        if place.source is None:
            said.append(f"{place.kind}: {place.note}")
            continue
        try:
            if module not in place.source.modules():
                said.append(f"{place.kind}: {_lack(place.source, module)}")
                continue
            file = place.source.file(module)
        except LoaderError as error:
            said.append(f"{place.kind}: {error}")
            continue
        facts = facts_of(file)
        verdict = runs_on(facts.codes, machine.capability(device)) if device is not None else None
        if verdict is None or verdict.ok:
            return place.source, file, facts
        wrong_code = True
        said.append(f"{place.kind}: {place.source.location}: {module} {verdict.reason}")
    kind = ArchitectureError if wrong_code else KernelNotFoundError
    where = "" if device is None else f" for cuda:{device}"
    text = "\n".join(f"  {line}" for line in said)
    raise kind(f"no kernels of module {module!r}{where}:\n{text}\n{_advice(module, device)}")


def _lack(source: KernelSource, module: str) -> str:
    # Only here: a start that finds its modules needs no catalogue.
    from fi_ffi.loader.catalogue import without

    return without(source, module)


def _advice(module: str, device: int | None) -> str:
    from fi_ffi.loader.catalogue import build_advice

    arch = None
    if device is not None:
        major, minor = machine.capability(device)
        # From SM90 on FlashInfer's kernels use what only the very architecture has.
        arch = f"{major}.{minor}" + ("a" if major >= 9 else "")
    return f"{build_advice(module, release(), arch)} FI_FFI_KERNELS names a wheel."
