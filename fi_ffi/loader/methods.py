"""Entries that are methods of an object returned by a module's function."""

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


class AttestedObject:
    """An object returned by a module's function, and the entries of its methods.

    `name` is its name in errors and logs, `where` the module's file.
    """

    def __init__(self, made: object, name: str, releases: str, where: str) -> None:
        if not isinstance(made, Module):
            kind = type(made).__name__
            raise AbiError(f"{where}: {name} is of type {kind}, not a module object")
        self._made, self._name, self._releases, self._where = made, name, releases, where
        self._entries: dict[Signature, Entry] = {}

    def entry(self, declared: Signature) -> Entry:
        """Return a method, attested like a module's own entries.

        Raises `AbiError` with both signatures if they differ; the method is not called.
        """
        found = self._entries.get(declared)
        return found or self._entries.setdefault(declared, self._attested(declared))

    def _attested(self, declared: Signature) -> Entry:
        entry = module_function(self._made, declared.name)
        entry.name = f"{self._name}.{declared.name}"
        return runtime.attest(entry, probe(entry), declared, self._releases, "binary", self._where)

    def release(self) -> None:
        """Release the object and its memory."""
        self._made.release()


# By module, factory and device: the factory's entry, and the one object it returned.
_objects: dict[tuple[str, str, int | None], tuple[Entry, AttestedObject]] = {}


def made_by(module: str, factory: str, releases: str, device: int | None = None) -> AttestedObject:
    """Return the process's one object from a module's function; it is kept."""
    declared = Signature(factory, (), "ffi.Module")
    # Outside the lock: the module may have to be fetched.
    made = runtime.kernel_entry(module, declared, releases, device)
    where = str(runtime.load(module, device).file.path)
    with _lock:
        key = (module, factory, device)
        known = _objects.get(key)
        # If other kernels were chosen meanwhile, the factory is another function.
        if known is None or known[0] is not made:
            found = AttestedObject(made(), f"{module}.{factory}()", releases, where)
            known = _objects[key] = made, found
        return known[1]


def method_entry(
    module: str, factory: str, declared: Signature, releases: str, device: int | None = None
) -> Entry:
    """Return an attested method of that object."""
    made = made_by(module, factory, releases, device)
    with _lock:
        return made.entry(declared)
