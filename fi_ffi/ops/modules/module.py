"""`fi_ffi.module`: the functions of any TVM-FFI library, with no row of ours for them."""

from __future__ import annotations

import os
from pathlib import Path

from fi_ffi.abi.signature import Signature
from fi_ffi.errors import AbiError, ArgumentError, ArgumentTypeError, KernelNotFoundError, printed
from fi_ffi.ops.modules.entry import ModuleEntry
from fi_ffi.ops.modules.libraries import AtPath, Export, Library, Named


class Module:
    """The exported functions of a library: `fi_ffi.module` makes it.

    norm = fi_ffi.module("norm")
    norm.entry("rmsnorm")(out, x, weight, 1e-6, False, stream=stream)
    norm.rmsnorm(out, x, weight, 1e-6, False, stream=stream)  # the same
    """

    def __init__(self, source: Library) -> None:
        self._source = source
        self._entries: dict[tuple[str, bool | None], ModuleEntry] = {}
        # Of the instance: `help` prints it.
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
        """The version of the kernels it is of, where something tells it."""
        return self._source.loaded(None).source.version

    def entries(self) -> tuple[str, ...]:
        """The names of the exported functions; nothing is asked of them."""
        return tuple(self._source.loaded(None).facts.functions)

    def entry(self, name: str, *, checked: bool | None = None) -> ModuleEntry:
        """A function by name, its arguments checked against the signature that it tells.

        A function tells it by refusing a call with 512 arguments.  One that takes any number
        of them is run by that, so it is done only where the library is known to have typed
        functions, or for `checked=True`; otherwise, and for `checked=False`, the function is
        called unchecked.

        Raises `KernelNotFoundError` for an unknown name, with those there are, and for
        `checked=True` `AbiError` where the function has no signature.
        """
        found = self._entries.get((name, checked))
        if found is None:
            found = self._entries[name, checked] = self._make(name, checked)
        return found

    def _make(self, name: str, checked: bool | None) -> ModuleEntry:
        if not isinstance(name, str):
            got = f"{type(name).__name__} {printed(name)}"
            raise ArgumentTypeError(f"{self.name}.entry", "name", got=got, expected="a str")
        export = Export(self._source, name)
        asks = self._source.tells_signatures(name)
        signature = None
        if checked or (checked is None and asks):
            signature = export.signature()
        if checked and signature is None:
            raise AbiError(f"{export.name} takes any arguments: it has no signature of its own")
        return ModuleEntry(export.name, export.entry, signature, asks=asks, doc=export.doc())

    def signatures(self) -> dict[str, Signature | None]:
        """The signature of every function, None of those that are called unchecked."""
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


def module(name: str | os.PathLike[str]) -> Module:
    """A module of the kernels in use by its name, or any TVM-FFI library by its path.

    A path is a `Path`, or text with a `/` in it or `.so` at its end.  The library stays
    loaded.

    Raises `KernelNotFoundError` where there is none, with the nearest names there are and
    the line that would build it, and `LoaderError` or `ArtifactError` for a file that is no
    such library.
    """
    if isinstance(name, os.PathLike):
        return Module(AtPath(Path(name)))
    if not isinstance(name, str):
        got = f"{type(name).__name__} {printed(name)}"
        raise ArgumentTypeError("module", "name", got=got, expected="a module's name, or a path")
    if not name:
        raise ArgumentError("module", "name", got="''", expected="a module's name, or a path")
    return Module(AtPath(Path(name)) if "/" in name or name.endswith(".so") else Named(name))
