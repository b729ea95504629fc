"""Arrays on the host, and parts of those on a machine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

import fi_ffi

from tests.helpers.calls import padded


def random(rng: np.random.Generator, shape: Sequence[int], dtype: str, pad: int = 0) -> Any:
    """Normal numbers, with `pad` elements of poison between rows of the last axis."""
    numbers = rng.standard_normal(shape, np.float32).astype(fi_ffi.DTYPES[dtype].numpy)
    return padded(numbers, pad) if pad else numbers


def first(desc: fi_ffi.TensorDesc, rows: int) -> fi_ffi.TensorDesc:
    """The first rows of a tensor."""
    shape = (rows, *desc.shape[1:])
    return fi_ffi.TensorDesc(desc.ptr, shape, desc.dtype, strides=desc.strides, device=desc.device)


def bytes_of(array: Any) -> bytes:
    return np.ascontiguousarray(array).tobytes()
