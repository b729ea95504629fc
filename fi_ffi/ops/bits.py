"""What a runtime works out on the host for segments of packed bits."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fi_ffi.ops import host

if TYPE_CHECKING:
    from typing import Any

    import numpy
    import numpy.typing

    Starts = numpy.ndarray[Any, numpy.dtype[numpy.int32]]


def packed_indptr(indptr: numpy.typing.ArrayLike) -> Starts:
    """Where each segment's bits start once they are packed, and the end: int32 on the host.

    `indptr`, a host array or a list, has where each segment starts, and the end.  It is
    `input_indptr` of `segment_packbits`, this its `output_indptr`, and the last of this the
    bytes that `y` has.

    Raises `ArgumentError` for one that does not start at 0 or decreases.
    """
    import numpy as np

    lengths = np.diff(host.indptr("packed_indptr", "indptr", indptr))
    return np.concatenate([[0], np.cumsum(-(-lengths // 8))]).astype(np.int32)
