"""Libraries that modules are: found by a module's name, or at a path."""

from __future__ import annotations

import difflib
import functools
import mmap
import re
from pathlib import Path
from typing import Protocol

from fi_ffi.abi import library
from fi_ffi.abi.function import Entry
from fi_ffi.abi.signature import Signature
from fi_ffi.errors import AbiError, ArchitectureError, KernelError, KernelNotFoundError
from fi_ffi.loader import machine, runtime
from fi_ffi.loader.elf import FUNCTION_PREFIX
from fi_ffi.loader.fatbin import runs_on
from fi_ffi.loader.runtime import Loaded

# What a typed function's refusal begins with; its code has the words.
_REFUSAL = b"Mismatched number of arguments when calling"
# Its name in that refusal is a static variable, whose symbol is there unless it was stripped.
_STATIC = re.compile(rb"_ZZ(\d{1,5})(__tvm_ffi_\w+)")


class Library(Protocol):
    """Where a module's functions are."""

    name: str

    def loaded(self, device: int | None) -> Loaded:
        """The file for a GPU, or any where None is told."""

    def tells_signatures(self, symbol: str) -> bool:
        """Whether the function is known to be typed, so that asking for its signature does
        not run it."""


class Named:
    """A module of the kernels in use; FlashInfer's functions are all typed."""

    def __init__(self, name: str) -> None:
        self.name = name
        # It goes on with the kernels it was made with.
        self._loaded: dict[int | None, Loaded] = {None: runtime.load(name)}

    def loaded(self, device: int | None) -> Loaded:
        found = self._loaded.get(device)
        if found is None:
            found = self._loaded[device] = runtime.load(self.name, device)
        return found

    def tells_signatures(self, symbol: str) -> bool:
        return True


class AtPath:
    """Anybody's library; its functions may be packed ones, which asking would run."""

    def __init__(self, path: Path) -> None:
        self._loaded = runtime.load_file(path)
        self.name = self._loaded.file.module
        self._able: set[int] = set()

    def loaded(self, device: int | None) -> Loaded:
        if device is not None and device not in self._able:
            codes = self._loaded.facts.codes
            verdict = runs_on(codes, machine.capability(device)) if codes else None
            if verdict is not None and not verdict.ok:
                path = self._loaded.file.path
                raise ArchitectureError(f"{path} {verdict.reason}, on cuda:{device}")
            self._able.add(device)
        return self._loaded

    def tells_signatures(self, symbol: str) -> bool:
        if (
            library.find_symbol(self._loaded.handle, f"{FUNCTION_PREFIX}_metadata_{symbol}")
            is not None
        ):
            return True
        has_refusals, typed = self._evidence
        return has_refusals and (not typed or symbol in typed)

    @functools.cached_property
    def _evidence(self) -> tuple[bool, set[str]]:
        """Whether there are typed functions, and their names where the file has them."""
        with (
            self._loaded.file.path.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
        ):
            names = {match[2][: int(match[1])].decode() for match in _STATIC.finditer(data)}
            return data.find(_REFUSAL) >= 0, {name.removeprefix(FUNCTION_PREFIX) for name in names}


class Export:
    """An exported function of a library, on any GPU that has kernels of it."""

    def __init__(self, source: Library, symbol: str) -> None:
        self.source, self.symbol = source, symbol
        self.name = f"{source.name}.{symbol}"
        self._entries: dict[int | None, Entry] = {}
        loaded = source.loaded(None)
        functions = loaded.facts.functions
        if symbol not in functions:
            raise KernelNotFoundError(_unknown(str(loaded.file.path), symbol, functions))
        self._signature: Signature | None = None
        self._find(None)

    def entry(self, device: int | None) -> Entry:
        """The function for a GPU."""
        return self._entries.get(device) or self._find(device)

    def signature(self) -> Signature | None:
        """The function's own signature; asked for once, and None where it has none."""
        loaded, entry = self.source.loaded(None), self.entry(None)
        self._signature = runtime.signature_of(loaded, entry, self.symbol)
        return self._signature

    def doc(self) -> str:
        """What the library says of the function, if it does."""
        handle = self.source.loaded(None).handle
        address = library.find_symbol(handle, f"{FUNCTION_PREFIX}_doc_{self.symbol}")
        if address is None:
            return ""
        try:
            found = Entry(f"{self.name}'s docstring", address)()
        except (KernelError, AbiError):
            return ""
        return found if isinstance(found, str) else ""

    def _find(self, device: int | None) -> Entry:
        loaded, first = self.source.loaded(device), self.source.loaded(None)
        entry = runtime.exported(loaded.handle, loaded.file.path, self.symbol)
        entry.name = self.name
        if self._signature is not None and loaded.file.sha256 != first.file.sha256:
            found = runtime.signature_of(loaded, entry, self.symbol)
            if found is None or not found.same_types(self._signature):
                raise AbiError(
                    f"{self.name} has another signature in the file for cuda:{device}\n"
                    f"  {first.file.path}: {self._signature}\n  {loaded.file.path}: {found}"
                )
        self._entries[device] = entry
        return entry


def _unknown(path: str, symbol: str, functions: list[str]) -> str:
    near = difflib.get_close_matches(symbol, functions)
    nearest = f"; the nearest: {', '.join(near)}" if near else ""
    return f"{path} exports no {symbol!r}{nearest}; it exports: {', '.join(functions) or 'none'}"
