"""Services: what packages above the core do for it, which never imports them.

Each slot has a stand-in, for a core without the package. `fi_ffi` fills the slots; a package is
imported when its service is first needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from fi_ffi.errors import FetchError, LoaderError

if TYPE_CHECKING:
    from fi_ffi.loader.kernels import KernelSource

_Service = TypeVar("_Service")


class Slot(Generic[_Service]):
    """Where a service is put, or its stand-in."""

    def __init__(self, stand_in: _Service) -> None:
        self._service = stand_in
        self._load: Callable[[], Any] | None = None

    def fill(self, load: Callable[[], Any]) -> None:
        """Have `load` return the service when it is needed, or None without its package."""
        self._load = load

    def get(self) -> _Service:
        """Return the service, or its stand-in."""
        if self._load is not None:
            self._service = self._load() or self._service
            # Last: another thread that asks meanwhile must not get the stand-in.
            self._load = None
        return self._service


class Adviser(Protocol):
    """Knows the modules of FlashInfer's releases by name."""

    def may_have(self, release: str, module: str) -> bool:
        """Return whether a release may have a module of this name."""

    def missing_module_message(self, source: KernelSource, module: str) -> str:
        """Return the message that a source lacks a module. Fetches nothing."""

    def build_advice(self, module: str, release: str | None, arch: str | None) -> str:
        """Return a sentence that says how to get a module built."""

    def linking_advice(self, message: str) -> str:
        """Return advice about the dynamic linker's message, or ""."""


class PlainAdviser:
    """Says what was found, without the catalogue."""

    def may_have(self, release: str, module: str) -> bool:
        return True

    def missing_module_message(self, source: KernelSource, module: str) -> str:
        return f"{source.location} has no module {module}"

    def build_advice(self, module: str, release: str | None, arch: str | None) -> str:
        return ""

    def linking_advice(self, message: str) -> str:
        return ""


# `fi_ffi.catalogue.advice`.
adviser: Slot[Adviser] = Slot(PlainAdviser())


def _no_wheels(release: str | None) -> Iterator[Any]:
    raise FetchError("nothing can be fetched: there is no fi_ffi.loader.fetch")


# `fi_ffi.loader.fetch.pinned_wheels.published`: yields the pinned wheels of a release.
published: Slot[Callable[[str | None], Iterator[Any]]] = Slot(_no_wheels)

# `fi_ffi.loader.fetch.published.places_of`: yields where a distribution's libraries are.
libraries: Slot[Callable[[str], Iterator[Any]]] = Slot(_no_wheels)


class DeviceCodeServer(Protocol):
    """Answers one library's requests for device code."""

    def raising_failures(self, name: str, call: Callable[..., int]) -> Callable[..., int]:
        """Wrap a function of the library, so that it raises what a request failed by."""


def _no_server(handle: Any, path: str) -> DeviceCodeServer:
    raise LoaderError(
        f"{path} asks for its device code when it is called, and what answers is missing: it is "
        "the package fi_ffi.loader.fetch"
    )


# The exports of modules without device code of their own: they ask for it, and are given it.
CUBIN_EXPORTS = "FlashInferSetCubinCallback", "FlashInferSetCurrentCubin"
# `fi_ffi.loader.fetch.cubins.serve`.
device_code: Slot[Callable[[Any, str], DeviceCodeServer]] = Slot(_no_server)
