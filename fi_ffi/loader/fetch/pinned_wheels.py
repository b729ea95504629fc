"""Pinned wheels: the search's last place, and the kernels that are fetched from one.

Nothing is fetched before a module is requested. What was fetched before is found in the cache, by
the hashes that the lock or the stored RECORD has, without asking a server.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from urllib.parse import unquote, urlsplit

from fi_ffi.abi import library
from fi_ffi.errors import ArgumentError, LoaderError
from fi_ffi.loader import machine, search, seed
from fi_ffi.loader.fetch.asking import Cooldown
from fi_ffi.loader.fetch.index import stored_record
from fi_ffi.loader.fetch.wheels_lock import PinnedWheel, the_lock, this_platform
from fi_ffi.loader.kernels import KernelWheel, ModuleFile, modules_of, stored
from fi_ffi.loader.machine import sass_named
from fi_ffi.loader.search import Candidate, wanted_release
from fi_ffi.loader.wheel import Wheel, WheelReader

VERIFY = "FI_FFI_VERIFY"
_WHOLE = (
    "{} is fetched whole, once, to compare it with its sha256 in wheels.lock, which does not pin "
    "its RECORD. FI_FFI_VERIFY=record fetches some megabytes of it instead, and trusts TLS alone."
)

# Finding a pin


def _gpus() -> list[tuple[int, int]]:
    return [*map(machine.capability, range(machine.device_count()))]


def published(
    release: str | None, gpus: Sequence[tuple[int, int]] | None = None
) -> Iterator[Candidate]:
    """Yield the pinned wheels for these GPUs, by default for those of this machine."""
    wanted = release or wanted_release()
    chosen = _gpus() if gpus is None else gpus
    try:
        # If wheels are built for one SM each: one for each kind of GPU.
        pins = dict.fromkeys([pinned(wanted, gpu) for gpu in chosen] or [pinned(wanted)])
    except LoaderError as error:
        yield Candidate("remote", None, str(error))
        return
    for pin in pins:
        source = PinnedKernels(pin)
        yield Candidate("remote", source, sm=pin.sm, names_of=source.names_of)


def places_for(capability: tuple[int, int] | None) -> Iterator[Candidate]:
    """Yield the places that a machine with such a GPU would search, in order."""
    is_asked = False
    for place in search.places():
        is_pinned = place.kind == "remote" and capability is not None
        if not is_pinned or capability in _gpus():
            yield place
        elif not is_asked and capability is not None:
            is_asked = True
            yield from published(search.release(), [capability])


def pinned(release: str, capability: tuple[int, int] | None = None) -> PinnedWheel:
    """Return the pinned wheel of a release for this machine; `LoaderError` lists the pins.

    The machine determines the platform, the CUDA versions that its driver supports, and the SM of
    its first GPU, unless `capability` is given. Without a driver every wheel is accepted, for
    reading only. If this process has a CUDA runtime, the wheel is for that one.
    """
    lock = the_lock()
    here = [f for f in lock.kernels if (f.release, f.platform) == (release, this_platform())]
    fitting = [f for f in here if _runs_here(f, capability)]
    if fitting:
        return max(fitting, key=lambda f: (search.cuda_version(f.cuda), search.nearness(f.sm)))
    of_release = [f for f in lock.kernels if f.release == release]
    if not of_release:
        others = sorted({f.release for f in lock.kernels})
        raise LoaderError(
            f"{lock.path.name} pins no kernels of FlashInfer {release}, so none are fetched; "
            f"it has those of {', '.join(others) or 'no release'}"
        )
    listed = here or of_release
    names = sorted({" ".join(filter(None, (f.release, f.cuda, f.platform, f.sm))) for f in listed})
    forced = f", {search.CUDA}={tag}" if (tag := os.environ.get(search.CUDA)) else ""
    able = f"compute capability {capability[0]}.{capability[1]}" if capability else _machine()
    raise LoaderError(
        f"{lock.path.name} pins no kernels of FlashInfer {release} that this machine "
        f"({this_platform()}, {able}{forced}) can run; it has {', '.join(names)}"
    )


def _runs_here(file: PinnedWheel, capability: tuple[int, int] | None) -> bool:
    forced, version = os.environ.get(search.CUDA), search.cuda_version(file.cuda)
    # Within a major version, a driver runs code compiled for a later minor version.
    fits = version == search.cuda_version(forced) if forced else version[0] in machine.majors_here()
    if not fits:
        return False
    if file.sm is None:
        return True
    if capability is None and machine.device_count():
        capability = machine.capability(0)
    if capability is None:
        return True
    return sass_named(file.sm).runs_on(capability)


def _machine() -> str:
    driver = machine.driver_version()
    here = "".join(
        f", libcudart.so.{major} in this process" for major in machine.runtimes_in_process()
    )
    if driver is None:
        return f"no CUDA driver{here}"
    sms = [f"sm_{a}{b}" for a, b in _gpus()]
    return f"CUDA {driver[0]}.{driver[1]}, {' '.join(sms) or 'no GPU'}{here}"


# The source


_locks: dict[str, threading.RLock] = {}  # by the wheel's sha256
library.renew_after_fork(globals(), "_locks", dict)


class PinnedKernels:
    """A pinned wheel as a source; nothing is fetched before a module is requested."""

    distribution = ""

    def __init__(self, pin: PinnedWheel) -> None:
        self.pin, self.location = pin, pin.url
        self.version: str | None = f"{pin.release}+{pin.cuda}"
        self._cooldown = Cooldown()
        self._opened: KernelWheel | None = None
        self._record: dict[str, str] | None = None

    def _hashes(self) -> dict[str, str] | None:
        """Return the sha256 of each module if RECORD is stored here; None otherwise."""
        pin = self.pin
        if self._record is None and (pin.record_sha256 or _verify() == "record"):
            record = stored_record(pin.sha256, pin.record_sha256)
            if record is not None:
                members = modules_of(record)
                self._record = {name: record[path].sha256 for name, path in members.items()}
        return self._record

    def _wheel(self) -> KernelWheel:
        """Open the wheel once: the whole file if it is here, or else what is fetched of it."""
        pin = self.pin
        with _locks.setdefault(pin.sha256, threading.RLock()):
            if self._opened is None:
                name = unquote(urlsplit(pin.url).path.rpartition("/")[2])
                whole, verify = seed.find(pin.sha256, name), _verify()
                wheel: WheelReader
                if whole is not None:
                    wheel = Wheel(whole[0], record_sha256=pin.record_sha256, stored=whole)
                else:
                    with self._cooldown.asking():
                        wheel = open_wheel(pin, verify)
                self._opened = KernelWheel(pin.url, wheel)
            return self._opened

    @property
    def names_of(self) -> str | None:
        """The release whose modules' names it has; None for a wheel that was built by others."""
        return None if re.match(search.BUILT, self.pin.file) else self.pin.release

    @property
    def trust(self) -> str:
        if self._hashes() is None:
            return self._wheel().trust
        return "record-pinned" if self.pin.record_sha256 else "record-unpinned"

    def modules(self) -> list[str]:
        hashes = self._hashes()
        return self._wheel().modules() if hashes is None else sorted(hashes)

    def file(self, module: str) -> ModuleFile:
        return self.kept(module) or self._wheel().file(module)

    def kept(self, module: str) -> ModuleFile | None:
        """Return a module that is already on this machine, or None."""
        hashes = self._hashes()
        return self._wheel().kept(module) if hashes is None else stored(module, hashes[module])


def _verify() -> str:
    verify = os.environ.get(VERIFY) or "full"
    if verify not in ("full", "record"):
        raise ArgumentError("sources", VERIFY, got=verify, expected="full or record")
    return verify


def open_wheel(pin: PinnedWheel, verify: str) -> WheelReader:
    """Open a pinned wheel on its server: its directory, or the whole file if RECORD is not pinned.

    With `verify="record"` a RECORD that is not pinned is accepted as it is.
    """
    from fi_ffi.loader.fetch.remote import RemoteWheel

    with contextlib.ExitStack() as stack:
        show: list[Callable[[Any], None]] = []

        def report(progress: Any) -> None:
            # imported here: importing rich takes longer than a start, and few wheels are fetched
            # whole
            if not show:
                from fi_ffi.loader.fetch.progress import reporter

                print(_WHOLE.format(pin.file), file=sys.stderr)
                show.append(stack.enter_context(reporter()) or (lambda progress: None))
            show[0](progress)

        return RemoteWheel.of(pin, verify=verify, report=report)  # type: ignore[arg-type]
