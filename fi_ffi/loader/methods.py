"""Entries that are methods of an object, which a function of a module makes."""

from __future__ import annotations

import threading

from fi_ffi.abi import forks
from fi_ffi.abi.function import Entry, module_function, probe
from fi_ffi.abi.objects import Module
from fi_ffi.abi.signature import Signature
from fi_ffi.errors import AbiError
from fi_ffi.loader import runtime

_lock = threading.RLock()
forks.renew(globals(), "_lock", threading.RLock)
# By module, factory and device: the factory as it was found, and the one object it made.
_objects: dict[tuple[str, str, int | None], tuple[Entry, Module]] = {}
_entries: dict[tuple[str, str, str, int | None], tuple[Module, Entry]] = {}


def made_by(module: str, factory: str, releases: str, device: int | None = None) -> Module:
    """The one object of this process that a module's function makes; it is kept."""
    declared = Signature(factory, (), "ffi.Module")
    with _lock:
        made = runtime.kernel_entry(module, declared, releases, device)
        key = (module, factory, device)
        known = _objects.get(key)
        # Of other kernels than before, it is another function.
        if known is None or known[0] is not made:
            known = _objects[key] = made, made()
        return known[1]


def method_entry(
    module: str, factory: str, declared: Signature, releases: str, device: int | None = None
) -> Entry:
    """A method of that object, attested as a module's own entries are.

    Raises `AbiError` with both signatures where they differ, and calls no method.
    """
    key = (module, factory, str(declared), device)
    with _lock:
        owner = made_by(module, factory, releases, device)
        known = _entries.get(key)
        if known is None or known[0] is not owner:
            known = _entries[key] = owner, _attested(owner, module, factory, declared, releases)
        return known[1]


def _attested(
    owner: Module, module: str, factory: str, declared: Signature, releases: str
) -> Entry:
    entry = module_function(owner, declared.name)
    entry.name = f"{module}.{factory}().{declared.name}"
    found = probe(entry)
    if not found.same_types(declared):
        raise AbiError(
            f"{entry.name}: the binary does not have the declared interface\n"
            f"  declared (FlashInfer {releases}): {declared}\n  binary: {found}"
        )
    return entry
