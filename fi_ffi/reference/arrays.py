"""Makes numpy arrays over descriptors' memory, and rounds to a tensor's dtype."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np

from fi_ffi.abi._cffi import ffi
from fi_ffi.abi.tensor import TensorDesc
from fi_ffi.errors import ArgumentError, let_through

Array: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"


def as_array(desc: TensorDesc) -> Array:
    """Make a writable array over a CPU descriptor's memory, without keeping the memory alive."""
    if desc.device.type != "cpu":
        raise ArgumentError("reference", "device", got=desc.device, expected="cpu")
    # Two values of 4 bits share a byte.
    dtype = np.dtype(np.uint8) if desc.dtype.lanes == 2 else desc.dtype.numpy
    if desc.numel == 0:
        return np.empty(desc.shape, dtype)
    buffer = ffi.buffer(ffi.cast("char *", desc.ptr), desc.span_bytes)
    strides = [stride * dtype.itemsize for stride in desc.strides]
    array: Array = np.ndarray(desc.shape, dtype, buffer, strides=strides)
    return array


@functools.cache
def every_value(dtype: np.dtype[Any]) -> Array:
    """Return what each byte is as an element of this dtype, in float64."""
    return np.arange(256, dtype=np.uint8).view(dtype).astype(np.float64)


def wide(array: Array) -> Array:
    """Return a copy in float64; that of elements of one byte is looked up, which is quicker."""
    if array.dtype.itemsize > 1 or array.dtype.kind in "iub":
        return array.astype(np.float64)
    value: Array = every_value(array.dtype)[array.view(np.uint8)]  # `take` is as slow as `astype`
    return value


def over_arrays(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `kernel` so that its descriptors become arrays."""

    @functools.wraps(kernel)
    def call(*args: object) -> Any:
        # Infinities and NaN are valid results, as on a GPU.
        with np.errstate(all="ignore"):
            try:
                return kernel(
                    *(as_array(arg) if isinstance(arg, TensorDesc) else arg for arg in args)
                )
            except Exception as error:
                let_through(error, is_replaced=True)  # numpy.linalg.norm raises its own instead
                raise

    return call


def bits(array: Array) -> Array:
    """View the elements as unsigned integers, which no copy changes."""
    return array.view(f"u{array.itemsize}")


def store(out: Array, value: Array) -> None:
    """Write values to `out`, rounded to nearest even in its dtype."""
    out[...] = value.astype(out.dtype)


def store_saturated(out: Array, value: Array) -> None:
    """Write values as `store`; fp8 saturates at its largest number, as GPUs' conversions do."""
    if out.itemsize == 1:
        limit = float(ml_dtypes.finfo(out.dtype).max)
        value = np.clip(value, -limit, limit)
    store(out, value)


def store_changed(out: Array, value: Array, before: Array) -> None:
    """Write values as `store`, only where they differ from `before`, which is `out` in the values'
    dtype. All other bits stay, even if somebody else writes them meanwhile."""
    value = np.asarray(value).astype(before.dtype)
    # Any byte but 0 is a true bool, so the byte may differ although the bool does not.
    changed = (bits(value) != bits(before)) | (out.dtype == np.bool_)
    np.copyto(bits(out), bits(value.astype(out.dtype)), where=changed)
