"""What a runtime works out on the host for a paged KV cache: see docs/paged-kv-cache.md.

Arrays here are host arrays: numpy's, anything numpy reads, or a list of ints.
"""

from __future__ import annotations

import numbers
from typing import TYPE_CHECKING, Any

from fi_ffi.abi.interop import TensorLike, as_desc
from fi_ffi.abi.tensor import TensorDesc, make_desc, make_layout
from fi_ffi.errors import ArgumentError, ArgumentTypeError

if TYPE_CHECKING:
    import numpy
    import numpy.typing

    Integers = numpy.ndarray[Any, numpy.dtype[numpy.int64]]
    Indices = numpy.ndarray[Any, numpy.dtype[numpy.int32]]

_INT32_MAX = 2**31 - 1


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
    indptr = _indptr(op, "append_indptr", append_indptr)
    lengths = _integers(op, "seq_lens", seq_lens)
    new = np.diff(indptr)
    _same_requests(op, "seq_lens", lengths, new)
    _all_at(op, "seq_lens", lengths, lengths >= new, "no fewer tokens than are appended")
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
    pages = np.diff(_indptr(op, "kv_indptr", kv_indptr))
    last = _integers(op, "kv_last_page_len", kv_last_page_len)
    size = _page_size(op, page_size)
    _same_requests(op, "kv_last_page_len", last, pages)
    fits = (last >= (pages > 0)) & (last <= size)
    _all_at(op, "kv_last_page_len", last, fits, f"1 to {size} tokens, or 0 where there is no page")
    held = np.where(pages > 0, (pages - 1) * size + last, 0)
    _all_at(op, "kv_indptr", held, held <= _INT32_MAX, f"{_INT32_MAX} tokens of a request at most")
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


def _integers(op: str, argument: str, value: object) -> Integers:
    """A one-dimensional array of integers from 0 to what int32 holds."""
    import numpy as np

    expected = "a one-dimensional host array of integers"
    if isinstance(value, (list, tuple)):
        wrong = [v for v in value if not isinstance(v, numbers.Integral) or isinstance(v, bool)]
        if wrong:
            got = f"{type(wrong[0]).__name__} {wrong[0]!r:.60}"
            raise ArgumentTypeError(op, argument, got=got, expected=expected)
        # Of Python's own integers: numpy makes floats of an empty list, and of large ones.
        array = np.array([int(v) for v in value], dtype=object)
    else:
        try:
            array = np.asarray(value)
        except Exception as error:  # the exporter's own: a GPU's array, for one
            got = f"a {type(value).__qualname__} that refused: {error}"
            raise ArgumentTypeError(op, argument, got=got, expected=expected) from error
        if array.dtype.kind not in "iu":
            got = f"{type(value).__qualname__} of {array.dtype}"
            raise ArgumentTypeError(op, argument, got=got, expected=expected)
    if array.ndim != 1:
        raise ArgumentError(op, argument, got=f"shape {array.shape}", expected=expected)
    fits = (array >= 0) & (array <= _INT32_MAX)
    _all_at(op, argument, array, fits.astype(bool), f"0 to {_INT32_MAX}")
    return array.astype(np.int64)


def _indptr(op: str, argument: str, value: object) -> Integers:
    indptr = _integers(op, argument, value)
    if not indptr.size or indptr[0] != 0:
        got = f"a first element of {indptr[0]}" if indptr.size else "no element"
        raise ArgumentError(op, argument, got=got, expected="0 and an end for each request")
    _all_at(op, argument, indptr[1:], indptr[1:] >= indptr[:-1], "elements that do not decrease", 1)
    return indptr


def _page_size(op: str, value: object) -> int:
    expected = f"an integer from 1 to {_INT32_MAX}"
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        got = f"{type(value).__name__} {value!r:.60}"
        raise ArgumentTypeError(op, "page_size", got=got, expected=expected)
    size = int(value)
    if not 1 <= size <= _INT32_MAX:
        raise ArgumentError(op, "page_size", got=size, expected=expected)
    return size


def _same_requests(op: str, argument: str, array: Integers, of_indptr: Integers) -> None:
    if len(array) != len(of_indptr):
        expected = f"{len(of_indptr)}, one for each request of the indptr"
        raise ArgumentError(op, argument, got=f"{len(array)} elements", expected=expected)


def _all_at(op: str, argument: str, array: Any, right: Any, expected: str, offset: int = 0) -> None:
    """Raise for the first element that is not `right`."""
    if not right.all():
        at = int(right.argmin())
        got = f"{array[at]} at {at + offset}"
        raise ArgumentError(op, argument, got=got, expected=expected)
