"""`fi_ffi.module`: calls the functions of any TVM-FFI library that fi_ffi has no row for."""

from __future__ import annotations

import functools
import mmap
import os
import re
from pathlib import Path

from fi_ffi.abi import library
from fi_ffi.abi.function import Entry, library_function
from fi_ffi.abi.objects import Function, Unique
from fi_ffi.abi.signature import Signature
from fi_ffi.errors import (
    AbiError,
    ArchitectureError,
    ArgumentError,
    ArgumentTypeError,
    KernelError,
    KernelNotFoundError,
    with_type,
)
from fi_ffi.loader import cute_runtime, kernels, machine, runtime
from fi_ffi.loader.elf import FUNCTION_PREFIX
from fi_ffi.loader.runtime import Loaded
from fi_ffi.modules.entry import HandleGuard, ModuleEntry, Origin, unknown
from fi_ffi.modules.files import load_file, load_member

# The start of a typed function's refusal, a string in its binary.
_REFUSAL = b"Mismatched number of arguments when calling"
# The function's name in that refusal is a static variable; its symbol exists unless stripped.
_STATIC = re.compile(rb"_ZZ(\d{1,5})(__tvm_ffi_\w+)")


class Named(Unique):
    """A module of the kernels in use, found by its name."""

    def __init__(self, name: str) -> None:
        self.name = name
        # The object keeps the kernels it was made with.
        self._loaded: dict[int | None, Loaded] = {None: runtime.load(name)}

    def loaded(self, device: int | None) -> Loaded:
        """Return the file for a GPU, or any file for None."""
        library = self._loaded.get(device)
        if library is None:
            library = self._loaded[device] = runtime.load(self.name, device)
        return library

    def tells_signatures(self, symbol: str) -> bool:
        """Whether a function reports its signature: FlashInfer's functions are all typed."""
        return True


class AtPath(Unique):
    """A library at a path."""

    def __init__(self, loaded: Loaded) -> None:
        self._loaded = loaded
        self.name = loaded.file.module
        self._able: set[int] = set()

    def loaded(self, device: int | None) -> Loaded:
        """Return the file; raise if it has no code for the GPU."""
        if device is not None and device not in self._able:
            codes = self._loaded.facts.codes
            reason = machine.unfit(codes, machine.capability(device)) if codes else ""
            if reason:
                path = self._loaded.file.path
                raise ArchitectureError(f"{path} {reason}, on cuda:{device}")
            self._able.add(device)
        return self._loaded

    def tells_signatures(self, symbol: str) -> bool:
        """Whether a function is known to be typed: the question for a signature runs an untyped
        one."""
        if (
            library.find_symbol(self._loaded.handle, f"{FUNCTION_PREFIX}_metadata_{symbol}")
            is not None
        ):
            return True
        if cute_runtime.FILE in self._loaded.facts.needed:  # CuTe DSL makes only typed functions
            return True
        has_refusals, typed = self._evidence
        return has_refusals and (not typed or symbol in typed)

    @functools.cached_property
    def _evidence(self) -> tuple[bool, set[str]]:
        """Return whether the file has typed functions, and their names if it has those."""
        # Not closed explicitly: if Ctrl-C interrupts the search, the search still holds the map,
        # and closing it would raise another error.
        data = mmap.mmap(kernels.descriptor(self._loaded.file.sha256), 0, access=mmap.ACCESS_READ)
        names = {match[2][: int(match[1])].decode() for match in _STATIC.finditer(data)}
        return data.find(_REFUSAL) >= 0, {name.removeprefix(FUNCTION_PREFIX) for name in names}


class Export(Unique):
    """An exported function of a library, on any GPU that the library has code for."""

    def __init__(self, source: Named | AtPath, symbol: str) -> None:
        self.source, self.symbol = source, symbol
        self.name = f"{source.name}.{symbol}"
        self._entries: dict[int | None, Entry] = {}
        loaded = source.loaded(None)
        functions = loaded.facts.functions
        if symbol not in functions:
            raise KernelNotFoundError(unexported(str(loaded.file.path), symbol, functions))
        self._signature: Signature | None = None
        self._find(None)

    def entry(self, device: int | None) -> Entry:
        """Return the function for a GPU."""
        return self._entries.get(device) or self._find(device)

    def signature(self) -> Signature | None:
        """Ask for the function's own signature, once; None if it has none."""
        loaded, entry = self.source.loaded(None), self.entry(None)
        self._signature = runtime.signature_of(loaded, entry, self.symbol)
        return self._signature

    def doc(self) -> str:
        """Return the library's documentation of the function, or ""."""
        handle = self.source.loaded(None).handle
        address = library.find_symbol(handle, f"{FUNCTION_PREFIX}_doc_{self.symbol}")
        if address is None:
            return ""
        try:
            text = Entry(f"{self.name}'s docstring", address)()
        except (KernelError, AbiError):
            return ""
        return text if isinstance(text, str) else ""

    def _find(self, device: int | None) -> Entry:
        loaded, first = self.source.loaded(device), self.source.loaded(None)
        entry = runtime.exported(loaded, self.symbol)
        entry.name = self.name
        if self._signature is not None and loaded.file.sha256 != first.file.sha256:
            signature = runtime.signature_of(loaded, entry, self.symbol)
            if signature is None or not signature.same_types(self._signature):
                raise AbiError(
                    f"{self.name} has another signature in the file for cuda:{device}\n"
                    f"  {first.file.path}: {self._signature}\n  {loaded.file.path}: {signature}"
                )
        self._entries[device] = entry
        return entry


def unexported(path: str, symbol: str, functions: list[str]) -> str:
    """Say that a library lacks a function, with the nearest names it exports."""
    what = unknown(f"{path} exports no {symbol!r}", symbol, functions)
    return f"{what}; it exports: {', '.join(functions) or 'none'}"


class Module(Unique):
    """The exported functions of a library, made by `fi_ffi.module`.

        norm = fi_ffi.module("norm")
        norm.entry("rmsnorm")(out, x, weight, 1e-6, False, stream=stream)
        norm.rmsnorm(out, x, weight, 1e-6, False, stream=stream)  # the same

    `entry` also reaches a function whose name is an attribute of this class.
    """

    def __init__(self, source: Named | AtPath) -> None:
        self._source = source
        self._entries: dict[tuple[str, bool | None], ModuleEntry] = {}
        # On the instance, for `help`.
        self.__doc__ = f"{self!r}\n\n" + "\n".join(self.entries())

    @property
    def name(self) -> str:
        return self._source.name

    @property
    def path(self) -> Path:
        """The file that is used where no GPU is named."""
        return self._source.loaded(None).file.path

    @property
    def version(self) -> str | None:
        """The version of the kernels, or None if it is unknown."""
        return self._source.loaded(None).source.version

    def entries(self) -> tuple[str, ...]:
        """The names of the exported functions; reading them calls none."""
        return tuple(self._source.loaded(None).facts.functions)

    def entry(self, name: str, *, checked: bool | None = None) -> ModuleEntry:
        """Return a function by name, with arguments checked against the signature that it reports.

        A typed function reports its signature when it refuses a call with 512 arguments. A function
        that accepts any number of arguments would run. So the question is asked only if the library
        is known to have typed functions, or with `checked=True`. Otherwise, and with
        `checked=False`, the function is called unchecked.

        Raises `KernelNotFoundError` for an unknown name, with the nearest names. With
        `checked=True`, raises `AbiError` for a function without a signature.
        """
        entry = self._entries.get((name, checked))
        if entry is None:
            entry = self._entries[name, checked] = self._make(name, checked)
        return entry

    def _make(self, name: str, checked: bool | None) -> ModuleEntry:
        if not isinstance(name, str):
            got = with_type(name)
            raise ArgumentTypeError(f"{self.name}.entry", "name", got=got, expected="a str")
        inside = self._inside(name)
        if inside is not None:
            if checked:
                inside.probe()
            return inside
        export = Export(self._source, name)
        asks = self._source.tells_signatures(name)
        signature = None
        if checked or (checked is None and asks):
            signature = export.signature()
        if checked and signature is None:
            raise AbiError(f"{export.name} takes any arguments: it has no signature of its own")
        return ModuleEntry(export.name, export.entry, signature, asks=asks, doc=export.doc())

    def _inside(self, name: str) -> ModuleEntry | None:
        """Return a function of a nested module that the library does not export itself, or None."""
        loaded = self._source.loaded(None)
        if loaded.root is None or name in loaded.facts.functions:
            return None
        function = library_function("ffi.ModuleGetFunction")(loaded.root, name, True)
        if not isinstance(function, Function):
            return None
        origin = Origin(self.name, None, asks=False)
        return origin.entry_of(
            function, f"{self.name}.{name}", HandleGuard(function.handle), function
        )

    def signatures(self) -> dict[str, Signature | None]:
        """Return the signature of every function; None for functions that are called unchecked."""
        return {name: self.entry(name).signature for name in self.entries()}

    def __getattr__(self, name: str) -> ModuleEntry:
        if name.startswith("__"):
            raise AttributeError(name)
        try:
            return self.entry(name)
        except KernelNotFoundError as error:
            raise AttributeError(str(error)) from None

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *self.entries()})

    def __repr__(self) -> str:
        return f"<module {self.name}, {len(self.entries())} functions, of {self.path}>"

    def __str__(self) -> str:
        return "\n".join([repr(self), *(f"  {self.entry(name)!r}" for name in self.entries())])


def module(name: str | os.PathLike[str], distribution: str | None = None) -> Module:
    """Return a module of the kernels in use by name, or any TVM-FFI library by path.

    A path is a `Path`, or a string with a `/` in it or `.so` at its end.  The library stays loaded.

    Args:
        name: the module, the path, or with a `distribution` the name of a library's file without
            `.so`.
        distribution: a package that is installed, which is not imported, or a wheel that
            wheels.lock pins, of which the library is fetched if need be.

    Raises `KernelNotFoundError` with the nearest names and the command that builds the module,
    `LoaderError` or `ArtifactError` for a file that is not such a library, and `FetchError` if it
    cannot be fetched.
    """
    if distribution is not None:
        if not isinstance(name, str):
            got, expected = with_type(name), "a library's name"
            raise ArgumentTypeError("module", "name", got=got, expected=expected)
        # imported late: few programs fetch
        from fi_ffi.loader.fetch.published import library_of

        return Module(AtPath(load_member(*library_of(distribution, name))))
    if isinstance(name, os.PathLike):
        return Module(AtPath(load_file(Path(name))))
    if not isinstance(name, str):
        got = with_type(name)
        raise ArgumentTypeError("module", "name", got=got, expected="a module's name, or a path")
    if not name:
        raise ArgumentError("module", "name", got="''", expected="a module's name, or a path")
    is_path = "/" in name or name.endswith(".so")
    return Module(AtPath(load_file(Path(name))) if is_path else Named(name))
