"""A row that says its kernel allocates: memory is there in its calls, and only in them."""

from __future__ import annotations

from dataclasses import replace
from itertools import count

import numpy as np
import pytest

import fi_ffi
from fi_ffi.abi._cffi import ffi
from fi_ffi.abi.allocator import MemoryPool
from fi_ffi.abi.function import register
from fi_ffi.loader.runtime import ensure_tvm_ffi
from fi_ffi.ops.call import compiled, cuda
from fi_ffi.ops.call.op import Op
from fi_ffi.ops.functions import OPS

from tests.helpers.allocating import alloc, desc_of

ROW = replace(OPS["rmsnorm"].row, allocates=True)
_numbers = count()


@pytest.fixture
def kernel(monkeypatch):
    """Makes `rmsnorm` an entry that needs scratch memory of its input's shape."""
    ensure_tvm_ffi()
    kept = []

    def run(out, x, weight, eps, enable_pdl):
        scratch = alloc(x.shape)
        desc = desc_of(scratch)
        memory = ffi.buffer(ffi.cast("char *", desc.ptr), desc.span_bytes)
        np.frombuffer(memory, np.float32)[:] = 2.5
        target = ffi.buffer(ffi.cast("char *", out.ptr), desc.span_bytes)
        target[:] = memory[:]
        del memory
        kept.append(scratch)

    name = f"fi_ffi.tests.allocating.{next(_numbers)}"
    entry = register(name, ROW.signature, run)
    monkeypatch.setattr(compiled, "entry_for", lambda *_: entry)
    return kept


def call(row):
    x = np.ones((3, 8), np.float32)
    out = np.full_like(x, np.nan)
    # float32 is none of the kernel's dtypes, and this is none of its kernels.
    op = Op(replace(row, dtypes={"T": ("float32",)}))
    op(out, x, np.ones(8, np.float32))
    return out


def test_a_row_that_allocates(kernel):
    before = cuda.kernel_memory().count
    assert (call(ROW) == 2.5).all()
    assert cuda.kernel_memory().count == before + 1
    kernel.pop().release()
    assert cuda.kernel_memory().count == before


def test_a_row_that_does_not(kernel):
    with pytest.raises(fi_ffi.KernelError):
        call(replace(ROW, allocates=False))
    assert not kernel


def test_nothing_is_left_installed(kernel):
    call(ROW)
    with pytest.raises(fi_ffi.KernelError):
        alloc((2, 2))
    kernel.pop().release()


def test_a_source_that_fails_is_told_by_the_op(kernel, monkeypatch):
    def fail(count, device, stream):
        raise MemoryError(f"{count} bytes is too much")

    sources = cuda.kernel_memory()._sources
    monkeypatch.setitem(sources, "cpu", MemoryPool(fail, sources["cpu"].give_back))
    with pytest.raises(fi_ffi.KernelError, match="96 bytes is too much"):
        call(ROW)
    assert not kernel


def test_no_row_for_a_gpu_that_was_tried_allocates():
    """One that does is a new kind of call, to be tried on a GPU: tests/gpu/test_allocator.py."""
    from fi_ffi.ops.plans.rows import ROWS as ATTENTION
    from fi_ffi.ops.table import ROWS

    rows = [row for row in (*ROWS, *ATTENTION) if not row.capabilities or 9 in row.capabilities]
    assert rows and not [row.name for row in rows if row.allocates]
