"""The words for a module that no place has, and the slot of whoever knows more.

`fi_ffi` puts `fi_ffi.catalogue.advice` there when a module is missing. Nothing below imports it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from fi_ffi.loader.kernels import KernelSource


class Adviser(Protocol):
    """Knows the modules of FlashInfer's releases by name."""

    def may_have(self, release: str, module: str) -> bool:
        """Return whether a release may have a module of this name."""

    def missing_module_message(self, source: KernelSource, module: str) -> str:
        """Return the message that a source lacks a module. Fetches nothing."""

    def build_advice(self, module: str, release: str | None, arch: str | None) -> str:
        """Return a sentence that says how to get a module built."""


class PlainAdviser:
    """Says what was found, without the catalogue."""

    def may_have(self, release: str, module: str) -> bool:
        return True

    def missing_module_message(self, source: KernelSource, module: str) -> str:
        return f"{source.location} has no module {module}"

    def build_advice(self, module: str, release: str | None, arch: str | None) -> str:
        return ""


adviser: Callable[[], Adviser] = PlainAdviser
