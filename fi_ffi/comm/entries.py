"""Entries of FlashInfer's communication modules, which `fi_ffi.comm.Group` calls.

Each is called on every rank at once, with addresses of memory
that all ranks see.  What is called for every message is an op (`OPS`), checked and prepared like
any other; what makes a rank ready takes Python values (`setup`).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

from fi_ffi.abi.function import Entry
from fi_ffi.abi.interop import TensorLike, as_desc
from fi_ffi.abi.tensor import Device
from fi_ffi.errors import ArgumentError
from fi_ffi.loader import machine, runtime, tvm_ffi
from fi_ffi.modules.entry import ModuleEntry
from fi_ffi.ops.call.arguments import check_int
from fi_ffi.ops.call.op import Op
from fi_ffi.ops.call.support import MISSING, REFUSED
from fi_ffi.ops.table import comm as table

OPS: dict[str, Op] = {
    name: Op(*rows) for name, rows in itertools.groupby(table.OPS, lambda row: row.name)
}
globals().update(OPS)
__all__ = ["init_custom_ar", "setup", *OPS]
_OF_MODULES = ("all_reduce", "trtllm_allreduce_fusion")  # an op of each module
_RANKS = (2, 4, 6, 8)
_ROW, _ALIGNED = 64, 128  # bytes of a registered buffer's pointers; alignment of signals


def missing_kernels(device: Device) -> dict[str, str]:
    """Return the modules that the kernels in use lack for a device, each with the reason."""
    if not device.is_cuda:
        return {}
    ops = (OPS[name] for name in _OF_MODULES)
    found = ((op, op.supports(machine.capability(device.index))) for op in ops)
    return {
        op.rows[0].module: str(support)
        for op, support in found
        if support.status in (MISSING, REFUSED)
    }


@functools.cache
def setup(name: str) -> ModuleEntry:
    """Return a setup entry by name, to call with Python values in the entry's order.

        setup("register_buffer")(fa, pointers, device="cuda:0")

    Without a `device` and without a tensor on a GPU, the CPU's reference is called.
    """
    one = next(each for each in table.SETUP if each.signature.name == name)

    def find(index: int | None) -> Entry:
        if index is not None:
            return runtime.kernel_entry(one.module, one.signature, one.releases, index)
        from fi_ffi import reference  # imported late: numpy takes longer than all of fi_ffi

        return reference.entry(one.module, one.signature, name)

    tvm_ffi.ensure_tvm_ffi()  # needed to make Arrays
    return ModuleEntry(name, find, one.signature)


def init_custom_ar(
    pointers: Sequence[int],
    rank_data: TensorLike,
    rank: int,
    full_nvlink: bool,
    *,
    device: object = None,
) -> int:
    """Make a rank of `vllm_comm` and return its handle, which `setup("dispose")` frees.

    Args:
        pointers: the address of every rank's memory as this rank sees it: `meta_size()` bytes,
            zeroed, and room for the largest message.
        rank_data: uint8, 64 bytes for each buffer that is registered.
        rank: this rank's number.
        full_nvlink: whether all GPUs are connected by NVLink.

    Raises `ArgumentError` if upstream would launch nothing (`full_nvlink=False` with more than two
    ranks) or read past `rank_data`, whose dtype upstream ignores.
    """
    op, size = "init_custom_ar", len(pointers)
    if size not in _RANKS:
        expected = f"{', '.join(map(str, _RANKS[:-1]))} or {_RANKS[-1]} ranks"
        raise ArgumentError(op, "pointers", got=f"{size} of them", expected=expected)
    for pointer in pointers:
        if pointer <= 0 or pointer % _ALIGNED:
            expected = f"addresses that are multiples of {_ALIGNED}"
            raise ArgumentError(op, "pointers", got=f"{pointer:#x}", expected=expected)
    check_int(op, "rank", rank, 0, size - 1)
    if size > 2 and not full_nvlink:
        expected = "True for more than two ranks: otherwise the kernels launch nothing"
        raise ArgumentError(op, "full_nvlink", got=full_nvlink, expected=expected)
    table_of = as_desc(rank_data, op, "rank_data")
    is_table = table_of.dtype.name == "uint8" and table_of.is_contiguous
    if not is_table or table_of.numel < _ROW or table_of.ptr % 16:
        expected = f"contiguous bytes (uint8), {_ROW} of each buffer, at a multiple of 16"
        raise ArgumentError(op, "rank_data", got=table_of.layout, expected=expected)
    return int(setup(op)([*pointers], table_of, rank, bool(full_nvlink), device=device))
