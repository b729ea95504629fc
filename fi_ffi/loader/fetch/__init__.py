"""Fetching what is not on this machine: HTTP, ranges of wheels, resumed downloads, progress.

The local loader asks for two things, through `fi_ffi.loader.search.fetcher`: a pinned wheel, and
device code for a module.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fi_ffi.errors import LoaderError
from fi_ffi.loader.lock import PinnedWheel
from fi_ffi.loader.permission import Cooldown
from fi_ffi.loader.wheel import WheelReader

CUBINS, NO_CUBINS = "FLASHINFER_CUBINS_REPOSITORY", "FLASHINFER_NO_DOWNLOAD"
# FlashInfer's default, from `flashinfer/jit/cubin_loader.py`.
CUBINS_SERVER = (
    "https://edge.urm.nvidia.com/artifactory/sw-kernelinferencelibrary-public-generic-local/"
)
_WHOLE = (
    "{} is fetched whole, once, to compare it with its sha256 in wheels.lock, which does not pin "
    "its RECORD. FI_FFI_VERIFY=record fetches some megabytes of it instead, and trusts TLS alone."
)
_MAX_NAME = 200  # characters; the cache limits the length of a name

_cooldowns: dict[str, Cooldown] = {}  # of servers of device code, by address


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


def device_code(name: str, sha256: str) -> Path:
    """Return the file of device code with this path on FlashInfer's server, fetched if needed."""
    from fi_ffi.loader.fetch.download import fetch_file
    from fi_ffi.loader.fetch.http import Unreachable
    from fi_ffi.loader.fetch.urls import redact

    base = os.environ.get(CUBINS) or CUBINS_SERVER
    if os.environ.get(NO_CUBINS):
        raise LoaderError(f"{redact(base)}: {NO_CUBINS} is set, and nothing is fetched")
    cooldown = _cooldowns.setdefault(base, Cooldown())
    try:
        with cooldown.asking(Unreachable):
            # The hash identifies the file, so the end of its name is enough.
            kept = name.rpartition("/")[2][-_MAX_NAME:]
            return fetch_file(f"{base.rstrip('/')}/{name}", kept, sha256=sha256).path
    except OSError as error:
        if isinstance(error, LoaderError):
            raise
        raise LoaderError(f"{redact(base)}: {error}") from error
