"""The `quantization` module in numpy.

Unlike `include/flashinfer/quantization.cuh`, it looks at the indices: on a GPU a wrong one
writes past the end.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np

from fi_ffi.reference.arrays import Array


def packbits(x: Array, bitorder: str, y: Array) -> None:
    y[...] = np.packbits(x, bitorder=bitorder)  # type: ignore[call-overload]


def segment_packbits(
    x: Array, input_indptr: Array, output_indptr: Array, bitorder: str, y: Array
) -> None:
    for i, (start, stop) in enumerate(itertools.pairwise(input_indptr)):
        first, count = int(output_indptr[i]), -(-(int(stop) - int(start)) // 8)
        if not (0 <= start <= stop <= len(x) and 0 <= first <= first + count <= len(y)):
            raise IndexError(f"segment {i} is not inside x, or its bits not inside y")
        packbits(x[start:stop], bitorder, y[first : first + count])


KERNELS: dict[str, dict[str, Callable[..., None]]] = {
    "quantization": {"packbits": packbits, "segment_packbits": segment_packbits}
}
