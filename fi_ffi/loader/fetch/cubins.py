"""Device code that modules load at run time, found by name and sha256.

FlashInfer's modules over NVIDIA's own kernels (`fmha_gen`, `fmha_cudnn_gen`, `trtllm_gemm`,
`fused_moe_trtllm_sm100` and similar) contain no kernels. Such a module exports
`FlashInferSetCubinCallback`, and calls back with the path and the sha256 of the file that it needs
(`include/flashinfer/cubin_loader.h` of a release). The file is looked for in FLASHINFER_CUBIN_DIR,
and then in those of these places that FI_FFI_SOURCES includes:

  installed   a flashinfer-cubin distribution
  jit         files that FlashInfer itself has fetched
  remote      FLASHINFER_CUBINS_REPOSITORY: the cache if fetched before, else HTTP

Only the content counts: a file with another sha256 is skipped.

C++ may call from any thread, and no exception may pass through it. A failure is stored for the call
it belongs to, which raises it after C++ has returned.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import logging
import os
import re
import stat
import threading
from _thread import interrupt_main
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from fi_ffi.abi import failure, library
from fi_ffi.abi._cffi import ffi
from fi_ffi.abi.function import PROBE_ARGUMENTS
from fi_ffi.errors import (
    ArtifactError,
    DeviceError,
    KernelError,
    KernelNotFoundError,
    LoaderError,
)
from fi_ffi.loader import distributions, search
from fi_ffi.loader.fetch.asking import Cooldown
from fi_ffi.loader.services import CUBIN_EXPORTS

FOLDER = "FLASHINFER_CUBIN_DIR"
CUBINS, NO_CUBINS = "FLASHINFER_CUBINS_REPOSITORY", "FLASHINFER_NO_DOWNLOAD"
# FlashInfer's default, from `flashinfer/jit/cubin_loader.py`.
CUBINS_SERVER = (
    "https://edge.urm.nvidia.com/artifactory/sw-kernelinferencelibrary-public-generic-local/"
)

_DISTRIBUTION, _LAYOUT = "flashinfer_cubin", "flashinfer_cubin/cubins"
_SHA256 = re.compile("[0-9a-fA-F]{64}")
_PART = re.compile(r"(?!\.\.?$)[A-Za-z0-9_.+-]{1,255}")
_MAX_SIZE = 2**31 - 1  # bytes; the module takes the size as an int
_MAX_NAME = 200  # characters; the cache limits the length of a name

_cooldowns: dict[str, Cooldown] = {}  # of servers of device code, by address

_log = logging.getLogger(__name__)


# Finding a file


def find(name: str, sha256: str) -> bytes:
    """Return the content of the file with this path and sha256.

    Raises `ArtifactError` if the path or the hash is invalid, and `KernelNotFoundError` with every
    place's reason if none has the file.
    """
    # Modules may send a doubled slash, because the folder's name ends with one.
    parts = [part for part in name.split("/") if part]
    if not parts or name.startswith("/") or not all(map(_PART.fullmatch, parts)):
        raise ArtifactError(f"a module asks for the device code {name!r:.300}, which is no path")
    if not _SHA256.fullmatch(sha256):
        raise ArtifactError(
            f"a module asks for the device code {name} by {sha256!r:.80}, which is no sha256"
        )
    name, reasons = "/".join(parts), []
    kinds = search.kinds_asked()
    for place in _folders(kinds):
        try:
            return _read(place, name, sha256.lower())
        except LoaderError as error:
            reasons.append(str(error))
    if "remote" in kinds:
        try:
            return _fetched(name, sha256.lower())
        except LoaderError as error:
            reasons.append(str(error))
    text = "\n".join(f"  {line}" for line in reasons or ["no place is asked"])
    raise KernelNotFoundError(
        f"no device code {name} with sha256 {sha256}:\n{text}\n"
        f"`pip install flashinfer-cubin` of the module's release brings all but cuDNN's; {FOLDER} "
        "names a folder with others"
    )


def _folders(kinds: list[str]) -> Iterator[Path]:
    if named := os.environ.get(FOLDER):
        yield Path(named)
    if "installed" in kinds:
        yield from (each.info.parent / _LAYOUT for each in distributions.installed(_DISTRIBUTION))
    if "jit" in kinds:
        with contextlib.suppress(LoaderError):  # a user without a home directory
            yield search.flashinfer_folder() / "cubins"


def _read(folder: Path, name: str, sha256: str) -> bytes:
    """Read a file of a folder, hashed as it was read, so that its owner does not matter."""
    try:
        path, root = (folder / name).resolve(strict=True), folder.resolve()
        if not path.is_relative_to(root):
            raise ArtifactError(f"{folder / name} leads out of {folder}, to {path}: it is not read")
        with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode) or status.st_size > _MAX_SIZE:
                raise ArtifactError(f"{path} is no file of at most 2 GiB")
            content = file.read(_MAX_SIZE)
    # up to Python 3.12, a loop of links raises RuntimeError
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise KernelNotFoundError(f"{folder / name}: {reason}") from error
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise ArtifactError(f"{path}: sha256 is {found}, and the module asks for {sha256}")
    return content


def _fetched(name: str, sha256: str) -> bytes:
    """Return a file of FlashInfer's server, from the cache if it was fetched before."""
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
            path = fetch_file(f"{base.rstrip('/')}/{name}", kept, sha256=sha256).path
    except OSError as error:
        if isinstance(error, LoaderError):
            raise
        raise LoaderError(f"{redact(base)}: {error}") from error
    return _read(path.parent, path.name, sha256)


# Serving a module


class Server:
    """Answers one library's requests for device code, for the life of the process."""

    def __init__(self, path: str, take: Any, set_callback: Any) -> None:
        self._path = path
        self._take = ffi.cast("void (*)(char *, int)", take)
        self._set = ffi.cast("void (*)(void *)", set_callback)
        # Failures in the current call of each thread, and on threads without a call.
        self._calls: dict[int, list[BaseException]] = {}
        self._elsewhere: list[BaseException] = []
        # Text of the last failure. A library may remember that it got nothing, and fail again.
        self._last = ""
        self._callback = ffi.callback("void(char *, char *)", self._answer, onerror=self._escaped)
        self._set(self._callback)

    def close(self) -> None:
        """Stop calling Python; the library then raises an error of its own."""
        self._set(ffi.NULL)

    def _answer(self, name: Any, sha256: Any) -> None:
        # Clear the thread's previous file, which the library would take for the answer.
        self._take(b"", 0)
        try:
            words = (b"" if word == ffi.NULL else ffi.string(word) for word in (name, sha256))
            content = find(*(word.decode("utf-8", "backslashreplace") for word in words))
            self._take(content, len(content))
        except BaseException as error:  # no exception may reach the calling C++
            self._keep(error)

    def _escaped(
        self, kind: type[BaseException], error: BaseException, frames: TracebackType | None
    ) -> None:
        """Store a Ctrl-C that came before or after `_answer`."""
        self._take(b"", 0)
        self._keep(error)

    def _keep(self, error: BaseException) -> None:
        self._last = failure.message_of(error) or type(error).__name__
        call = self._calls.get(threading.get_ident())
        if call is not None:
            call.append(error)
            return
        if isinstance(error, KeyboardInterrupt):
            interrupt_main()  # raised again after C++ has returned
            return
        # On a thread of the library, or in a call not made through fi_ffi.
        if self._calls:
            self._elsewhere.append(error)
        _log.error("%s got no device code: %s", self._path, failure.message_of(error))

    def raising_failures(self, name: str, call: Callable[..., int]) -> Callable[..., int]:
        """Wrap a function of the library, so that it raises the stored failures."""

        def call_and_raise(handle: Any, args: Any, count: int, result: Any) -> int:
            thread = threading.get_ident()
            before = self._calls.get(thread)  # set if this call is nested in another
            failures: list[BaseException] = []
            self._calls[thread] = failures
            try:
                code = call(handle, args, count, result)
            finally:
                if before is None:
                    del self._calls[thread]
                else:
                    self._calls[thread] = before
                elsewhere = self._elsewhere[:]
                if not self._calls:
                    self._elsewhere.clear()
            if failures or elsewhere:
                self._raise(name, code, failures, elsewhere)
            elif code and self._last and count < PROBE_ARGUMENTS:
                self._raise_again(name)
            return code

        return call_and_raise

    def _raise(
        self, name: str, code: int, own: list[BaseException], elsewhere: list[BaseException]
    ) -> None:
        # An interrupt is raised even if the library managed without the file.
        found = next((error for error in own if not isinstance(error, Exception)), None)
        if code and found is None:
            found = next(iter([*own, *elsewhere]), None)
        if found is None:
            for error in own:
                _log.warning("%s goes without device code: %s", name, failure.message_of(error))
            return
        if code:
            behind = failure.take_kernel_error(name)
            if isinstance(behind, DeviceError) or not isinstance(behind, Exception):
                raise behind
            raise found from behind
        raise found

    def _raise_again(self, name: str) -> None:
        behind = failure.take_kernel_error(name)
        if isinstance(behind, KernelError) and "cubin" in behind.message:
            raise KernelNotFoundError(
                f"{self._last}\nThe module remembers this failure of an earlier call: start the "
                "process again"
            ) from behind
        raise behind


_servers: dict[int, Server] = {}  # by dlopen handle


def serve(handle: Any, path: str) -> Server:
    """Answer a library's requests for device code from now on."""
    address = library.address_of(handle)
    if address not in _servers:
        set_callback, take = (library.find_symbol(handle, name) for name in CUBIN_EXPORTS)
        _servers[address] = Server(path, take, set_callback)
    return _servers[address]


@atexit.register
def _close() -> None:
    for server in _servers.values():
        server.close()
