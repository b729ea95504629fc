"""What a runtime works out on the host for a paged KV cache: see docs/paged-kv-cache.md.

Arrays here are host arrays: numpy's, anything numpy reads, or a list of ints.
"""

from __future__ import annotations

import numbers
from typing import TYPE_CHECKING, Any

from fi_ffi.abi.interop import TensorLike, as_desc
from fi_ffi.abi.tensor import TensorDesc, make_desc, make_layout
from fi_ffi.errors import ArgumentError, ArgumentTypeError, printed
from fi_ffi.ops import host
from fi_ffi.ops.host import INT32_MAX

if TYPE_CHECKING:
    import numpy
    import numpy.typing

    from fi_ffi.ops.host import Integers

    Indices = numpy.ndarray[Any, numpy.dtype[numpy.int32]]


def batch_indices_positions(
    append_indptr: numpy.typing.ArrayLike, seq_lens: numpy.typing.ArrayLike
) -> tuple[Indices, Indices]:
    """The request of each new token, and its place in it.

    The new tokens of request i are `append_indptr[i]` to `append_indptr[i + 1]`, and the
    last ones of its `seq_lens[i]`.  Raises `ArgumentError` where an `append_indptr` does not
    start at 0 or decreases, or a request has fewer tokens than are new.
    """
    import numpy as np

    op = "batch_indices_positions"
    indptr = host.indptr(op, "append_indptr", append_indptr)
    lengths = host.integers(op, "seq_lens", seq_lens)
    new = np.diff(indptr)
    _same_requests(op, "seq_lens", lengths, new)
    host.all_at(op, "seq_lens", lengths, lengths >= new, "no fewer tokens than are appended")
    batch_indices = np.repeat(np.arange(len(new), dtype=np.int32), new)
    # The i-th token of all is the (i - indptr)-th new one of its request.
    positions = np.arange(indptr[-1]) + np.repeat(lengths - new - indptr[:-1], new)
    return batch_indices, positions.astype(np.int32)


def seq_lens(
    kv_indptr: numpy.typing.ArrayLike, kv_last_page_len: numpy.typing.ArrayLike, page_size: int
) -> Indices:
    """The tokens of each request, from its pages; 0 for one that has none.

    Raises `ArgumentError` where `kv_indptr` does not start at 0 or decreases, or a last
    page holds no token or more than `page_size`.
    """
    import numpy as np

    op = "seq_lens"
    pages = np.diff(host.indptr(op, "kv_indptr", kv_indptr))
    last = host.integers(op, "kv_last_page_len", kv_last_page_len)
    size = _page_size(op, page_size)
    _same_requests(op, "kv_last_page_len", last, pages)
    fits = (last >= (pages > 0)) & (last <= size)
    host.all_at(
        op, "kv_last_page_len", last, fits, f"1 to {size} tokens, or 0 where there is no page"
    )
    held = np.where(pages > 0, (pages - 1) * size + last, 0)
    host.all_at(
        op, "kv_indptr", held, held <= INT32_MAX, f"{INT32_MAX} tokens of a request at most"
    )
    return held.astype(np.int32)


def split_paged_kv_cache(paged_kv_cache: TensorLike) -> tuple[TensorDesc, TensorDesc]:
    """Keys and values that lie in one tensor, `(pages, 2, ...)`, without copying.

    The three axes after the 2 are in either layout.  The descriptors keep the tensor alive;
    they are of the same device, and read-only if it is.
    """
    op, argument = "split_paged_kv_cache", "paged_kv_cache"
    whole = as_desc(paged_kv_cache, op, argument)
    shape, strides = whole.shape, whole.strides
    if len(shape) != 5 or shape[1] != 2:
        expected = "rank 5, its second axis of size 2: keys and values"
        raise ArgumentError(op, argument, got=whole.layout, expected=expected)
    half = make_layout(
        (shape[0], *shape[2:]),
        whole.dtype,
        (strides[0], *strides[2:]),
        whole.device,
        whole.layout.readonly,
    )
    apart = strides[1] * whole.dtype.itemsize if half.numel else 0
    return make_desc(whole.ptr, half, whole), make_desc(whole.ptr + apart, half, whole)


def _page_size(op: str, value: object) -> int:
    expected = f"an integer from 1 to {INT32_MAX}"
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        got = f"{type(value).__name__} {printed(value)}"
        raise ArgumentTypeError(op, "page_size", got=got, expected=expected)
    size = int(value)
    if not 1 <= size <= INT32_MAX:
        raise ArgumentError(op, "page_size", got=size, expected=expected)
    return size


def _same_requests(op: str, argument: str, array: Integers, of_indptr: Integers) -> None:
    if len(array) != len(of_indptr):
        expected = f"{len(of_indptr)}, one for each request of the indptr"
        raise ArgumentError(op, argument, got=f"{len(array)} elements", expected=expected)
