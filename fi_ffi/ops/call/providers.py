"""Finds the entry that serves a row on a device: a kernel, or the reference on the CPU."""

from __future__ import annotations

from typing import Any

from fi_ffi.abi.function import Entry
from fi_ffi.abi.tensor import Device
from fi_ffi.errors import ArchitectureError, KernelNotFoundError, LoaderError
from fi_ffi.loader import machine
from fi_ffi.ops.call.releases import FIRST, fits
from fi_ffi.ops.call.row import Absent, Row


def release_in_force() -> str:
    """Return the release whose arguments ops have: see `fi_ffi.loader.search.release_in_force`.

    Without a lock that can be read it is the release whose forms come first.
    """
    from fi_ffi.loader import search  # imported late: it takes as long as all the rest

    try:
        return search.release_in_force()
    except LoaderError:
        return FIRST


def entry_for(row: Row, device: Device, module: str | None = None) -> Entry:
    """Return the row's entry, loaded and attested: its own signature is the row's.

    `module` is a module of the row's family, by default the row's own. Raises `KernelNotFoundError`
    for an op that the release in use lacks, and `ArchitectureError` on a GPU that the kernel was
    not written for.
    """
    if device.is_cuda:
        from fi_ffi.loader import runtime

        check_available(row, device)
        name = module or row.module
        if row.modules and name == row.module:
            name = row.module_on(machine.capability(device.index))
        if row.factory:
            from fi_ffi.loader.methods import method_entry

            return method_entry(name, row.factory, row.signature, row.releases, device.index)
        return runtime.kernel_entry(name, row.signature, row.releases, device.index)
    names = ["" if isinstance(arg, Absent) else arg.name for arg in row.args]
    kernels: Any = reference()
    # Of most families there is one module, named as they are.
    compiled = () if module in (None, row.module) else kernels.compiled_for(module)
    entry: Entry = kernels.entry(
        row.module, row.signature, row.reference, compiled, row.formula, names
    )
    return entry


def reference() -> Any:
    """Return the package of numpy kernels, which the CPU device alone needs."""
    # Imported late: numpy takes longer than all of fi_ffi.
    from fi_ffi import reference

    return reference


def check_available(row: Row, device: Device) -> None:
    """Raise if the row's kernel was not written for a GPU, or is not in the release in use."""
    from fi_ffi.loader import search

    if row.capabilities:
        capability = machine.capability(device.index)
        others = row.other_gpus(capability)
        if others:
            major, minor = capability
            raise ArchitectureError(
                f"{row.name} is written for {others}; {device} has {major}.{minor}"
            )
    release = search.release()
    if release is not None and not fits(row, release):
        raise KernelNotFoundError(
            f"{row.name} is in FlashInfer {row.releases}; the kernels in use are of {release}"
        )
