"""Kernels that compute nothing: what they write is told from all that they were given.

Tests of how calls are made compare bits of two ways of calling.  These kernels show any difference
between what two calls passed, at the cost of reading it once.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from fi_ffi import reference
from fi_ffi.ops.call.row import Row, Tensor
from fi_ffi.ops.functions import OPS
from fi_ffi.reference.arrays import bits


def recorder(row: Row) -> Callable[..., None]:
    """Return a kernel of a row that writes bytes drawn from its arguments to what it writes."""
    tensors = {arg.name: arg for arg in row.args if isinstance(arg, Tensor)}

    def kernel(*args: object) -> None:
        seen, outs = 0, []
        for arg, value in zip(row.args, args, strict=True):
            tensor = tensors.get(arg.name)
            if tensor is not None and tensor.is_scratch:
                continue  # whose memory, and whether there is any, may differ
            if not isinstance(value, np.ndarray):
                assert tensor is None or value is None, f"{arg.name} came as {value!r}"
                seen = zlib.crc32(f"{arg.name}={value!r}".encode(), seen)
                continue
            seen = zlib.crc32(f"{arg.name} {value.shape} {value.dtype}".encode(), seen)
            if tensor is not None and tensor.writes:
                outs.append(value)
            if tensor is None or tensor.reads:
                seen = zlib.crc32(value.tobytes(), seen)
        rng = np.random.default_rng(seen)
        for out in outs:
            drawn = np.frombuffer(rng.bytes(out.nbytes), bits(out).dtype)
            bits(out)[...] = drawn.reshape(out.shape)

    return kernel


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Have the CPU's kernels of all ops record what they are given, instead of computing."""

    def function(
        module: str, kernel: str, compiled: object, formula: str, names: Sequence[str]
    ) -> Callable[..., None]:
        for op in OPS.values():
            row = op.row
            if (row.module, row.reference, row.formula_names) == (module, kernel, (*names,)):
                return recorder(row)
        raise LookupError(f"{module}.{kernel}{names}")

    monkeypatch.setattr(reference, "_function", function)
    # Those of before have the names of entries too.
    monkeypatch.setattr(reference, "_entries", _entries)
    for op in OPS.values():
        op.forget()
    yield
    monkeypatch.undo()
    for op in OPS.values():
        op.forget()


_entries: dict[Any, Any] = {}
