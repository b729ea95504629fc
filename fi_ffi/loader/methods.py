"""Entries that are methods of an object, which a function of a module makes."""

from __future__ import annotations

import threading

from fi_ffi.abi import library
from fi_ffi.abi.function import Entry, module_function, probe
from fi_ffi.abi.objects import Module
from fi_ffi.abi.signature import Signature
from fi_ffi.errors import AbiError
from fi_ffi.loader import runtime

_lock = threading.RLock()
library.renew_after_fork(globals(), "_lock", threading.RLock)


class ModuleObject:
    """An object that a module's function made, and the entries of its methods.

    `name` is what errors and logs call it, `where` the file it is of.
    """

    def __init__(self, made: object, name: str, releases: str, where: str) -> None:
        if not isinstance(made, Module):
            kind = type(made).__name__
            raise AbiError(f"{where}: {name} is of type {kind}, not a module object")
        self._made, self._name, self._releases, self._where = made, name, releases, where
        self._entries: dict[str, Entry] = {}

    def entry(self, declared: Signature) -> Entry:
        """A method, attested as a module's own entries are.

        Raises `AbiError` with both signatures where they differ, and calls no method.
        """
        key = str(declared)
        found = self._entries.get(key)
        return found or self._entries.setdefault(key, self._attested(declared))

    def _attested(self, declared: Signature) -> Entry:
        entry = module_function(self._made, declared.name)
        entry.name = f"{self._name}.{declared.name}"
        found = probe(entry)
        if not found.same_types(declared):
            raise AbiError(
                f"{entry.name}: the binary does not have the declared interface\n"
                f"  declared (FlashInfer {self._releases}): {declared}\n"
                f"  binary: {found}\n"
                f"  file: {self._where}"
            )
        return entry

    def release(self) -> None:
        """Give the object back, and what memory it holds."""
        self._made.release()


# By module, factory and device: the factory as it was found, and the one object it made.
_objects: dict[tuple[str, str, int | None], tuple[Entry, ModuleObject]] = {}


def made_by(module: str, factory: str, releases: str, device: int | None = None) -> ModuleObject:
    """The one object of this process that a module's function makes; it is kept."""
    declared = Signature(factory, (), "ffi.Module")
    # Under no lock of ours: the module may have to be fetched.
    made = runtime.kernel_entry(module, declared, releases, device)
    where = str(runtime.load(module, device).file.path)
    with _lock:
        key = (module, factory, device)
        known = _objects.get(key)
        # Of other kernels than before, it is another function.
        if known is None or known[0] is not made:
            found = ModuleObject(made(), f"{module}.{factory}()", releases, where)
            known = _objects[key] = made, found
        return known[1]


def method_entry(
    module: str, factory: str, declared: Signature, releases: str, device: int | None = None
) -> Entry:
    """A method of that object, attested."""
    made = made_by(module, factory, releases, device)
    with _lock:
        return made.entry(declared)
