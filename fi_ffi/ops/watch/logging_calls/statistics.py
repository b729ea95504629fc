"""What a tensor's elements are like, in a line.  numpy is imported when the first is asked for."""

from __future__ import annotations

from typing import Any

from fi_ffi.abi.tensor import DType
from fi_ffi.ops.watch.logging_calls.memory import read
from fi_ffi.ops.watch.logging_calls.told import Argument

MOST_BYTES = 2**28  # of a tensor that is read back
_OF_NUMPY = {"float16", "float32", "float64", "bool"}
_INTEGERS = ("int", "uint")


def statistics(arg: Argument, stream: int | None) -> str:
    """min, max and mean of the finite elements, and how many are NaN and infinite; or why
    there are none.  Raises `KernelError` where the tensor cannot be read."""
    tensor = arg.tensor
    assert tensor is not None
    if not tensor.numel:
        return "no elements"
    if tensor.dtype.lanes > 1:
        return f"no statistics of {tensor.dtype}: elements share bytes"
    if tensor.span_bytes > MOST_BYTES:
        return f"no statistics: {tensor.span_bytes} bytes, more than {MOST_BYTES}"
    dtype = _numpy(tensor.dtype)
    if dtype is None:
        return f"no statistics of {tensor.dtype}: ml_dtypes is not installed"
    return _of(read(tensor, stream), dtype)


def _numpy(dtype: DType) -> Any:
    """The dtype as numpy has it; None where that needs what is not installed."""
    import numpy

    if dtype.name in _OF_NUMPY or dtype.name.startswith(_INTEGERS):
        return numpy.dtype(dtype.name)
    try:
        return dtype.numpy
    except ImportError:
        return None


def _of(data: bytes, dtype: Any) -> str:
    import numpy as np

    values = np.frombuffer(data, dtype)
    if dtype.kind in "iub":
        return f"min {int(values.min())}, max {int(values.max())}, mean {_mean(values)}"
    wide = values if dtype.itemsize > 2 else values.astype(np.float32)
    nan, infinite = np.isnan(wide), np.isinf(wide)
    counts = f"{int(nan.sum())} NaN, {int(infinite.sum())} Inf"
    finite = wide[~(nan | infinite)]
    if not finite.size:
        return f"no finite element, {counts}"
    return f"min {finite.min():.6g}, max {finite.max():.6g}, mean {_mean(finite)}, {counts}"


def _mean(values: Any) -> str:
    return f"{values.mean(dtype='float64'):.6g}"
