"""Which entry serves an op on a device: a kernel, or the reference on the CPU."""

from __future__ import annotations

from fi_ffi.abi.device import Device
from fi_ffi.abi.function import Entry
from fi_ffi.loader import runtime
from fi_ffi.ops.row import Row


def entry_for(row: Row, device: Device) -> Entry:
    """The entry, loaded and attested: its own signature is the row's."""
    if device.is_cuda:
        return runtime.kernel_entry(row.module, row.signature, row.releases)
    # Here, not above: numpy takes longer to import than all of fi_ffi.
    from fi_ffi import reference

    return reference.entry(row.module, row.signature)
