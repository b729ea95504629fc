"""Index arrays and sizes that a runtime computes on the host.

They serve paged KV caches (docs/paged-kv-cache.md), ragged sequences (docs/gdn.md) and packed bits.
Arrays are numpy arrays, anything that numpy reads, or lists of ints.
"""

from __future__ import annotations

import numbers
from typing import TYPE_CHECKING, Any

from fi_ffi.abi.interop import TensorLike, as_desc, check_unmasked
from fi_ffi.abi.tensor import TensorDesc, frozen, parse_device, tensor_kind
from fi_ffi.errors import ArgumentError, ArgumentTypeError
from fi_ffi.ops.call.arguments import (
    INT32_MAX,
    INT64_MAX,
    check_flag,
    check_int,
    shown,
)
from fi_ffi.ops.call.memory import scratch_bytes
from fi_ffi.ops.table import gdn, renorm, tokenspeed

if TYPE_CHECKING:
    import numpy
    import numpy.typing

    Integers = numpy.ndarray[Any, numpy.dtype[numpy.int64]]
    Indices = numpy.ndarray[Any, numpy.dtype[numpy.int32]]

# Tokens of one step of `gdn_prefill`.
_TILE = 64


def batch_indices_positions(
    append_indptr: numpy.typing.ArrayLike, seq_lens: numpy.typing.ArrayLike
) -> tuple[Indices, Indices]:
    """Return the request of each new token, and its position in the request.

    Request i has the new tokens `append_indptr[i]` to `append_indptr[i + 1]`, which are the last of
    its `seq_lens[i]` tokens.  Raises `ArgumentError` if `append_indptr` does not start at 0 or
    decreases, or if a request has fewer tokens than new ones.
    """
    import numpy as np

    op = "batch_indices_positions"
    indptr = check_indptr(op, "append_indptr", append_indptr)
    lengths = check_int_array(op, "seq_lens", seq_lens)
    new = np.diff(indptr)
    _same_requests(op, "seq_lens", lengths, new)
    check_each(op, "seq_lens", lengths, lengths >= new, "no fewer tokens than are appended")
    batch_indices = np.repeat(np.arange(len(new), dtype=np.int32), new)
    # Token i of the batch is new token `i - indptr[request]` of its request.
    positions = np.arange(indptr[-1]) + np.repeat(lengths - new - indptr[:-1], new)
    return batch_indices, positions.astype(np.int32)


def seq_lens(
    kv_indptr: numpy.typing.ArrayLike, kv_last_page_len: numpy.typing.ArrayLike, page_size: int
) -> Indices:
    """Count the tokens of each request from its pages; 0 for a request without pages.

    Raises `ArgumentError` if `kv_indptr` does not start at 0 or decreases, or if a last page has no
    token or more than `page_size`.
    """
    import numpy as np

    op = "seq_lens"
    pages = np.diff(check_indptr(op, "kv_indptr", kv_indptr))
    last = check_int_array(op, "kv_last_page_len", kv_last_page_len)
    size = check_int(op, "page_size", page_size, 1)
    _same_requests(op, "kv_last_page_len", last, pages)
    fits = (last >= (pages > 0)) & (last <= size)
    check_each(
        op, "kv_last_page_len", last, fits, f"1 to {size} tokens, or 0 where there is no page"
    )
    held = np.where(pages > 0, (pages - 1) * size + last, 0)
    check_each(op, "kv_indptr", held, held <= INT32_MAX, f"{INT32_MAX} tokens of a request at most")
    return held.astype(np.int32)


def split_paged_kv_cache(paged_kv_cache: TensorLike) -> tuple[TensorDesc, TensorDesc]:
    """Split a tensor `(pages, 2, ...)` into keys and values, without copying.

    The three axes after the 2 are in either layout.  The descriptors keep the tensor alive; they
    have its device, and are read-only if it is.
    """
    op, argument = "split_paged_kv_cache", "paged_kv_cache"
    whole = as_desc(paged_kv_cache, op, argument)
    shape, strides = whole.shape, whole.strides
    if len(shape) != 5 or shape[1] != 2:
        expected = "rank 5, its second axis of size 2: keys and values"
        raise ArgumentError(op, argument, got=whole.layout, expected=expected)
    kind = tensor_kind(whole.dtype, whole.device, 4, whole.readonly)
    sizes, steps = (shape[0], *shape[2:]), (strides[0], *strides[2:])
    second = whole.ptr + (strides[1] * kind.itemsize if whole.numel else 0)
    first, other = (frozen(ptr, sizes, steps, kind, whole) for ptr in (whole.ptr, second))
    return first, other


def _same_requests(op: str, argument: str, array: Integers, of_indptr: Integers) -> None:
    if len(array) != len(of_indptr):
        expected = f"{len(of_indptr)}, one for each request of the indptr"
        raise ArgumentError(op, argument, got=f"{len(array)} elements", expected=expected)


def cu_seqlens(seq_lens: numpy.typing.ArrayLike) -> Integers:
    """Return the start of each sequence, and the end, in int64, as `gdn_prefill` takes them.

    Raises `ArgumentError` for a sequence without tokens, on which the kernel would never end.
    """
    import numpy as np

    op = "cu_seqlens"
    lengths = check_int_array(op, "seq_lens", seq_lens)
    check_each(op, "seq_lens", lengths, lengths > 0, "one token of each sequence at least")
    ends = np.cumsum(lengths)
    check_each(op, "seq_lens", ends, ends <= INT32_MAX, f"{INT32_MAX} tokens in all")
    return np.concatenate([np.zeros(1, np.int64), ends])


def checkpoint_cu_starts(
    cu_seqlens: numpy.typing.ArrayLike, checkpoint_every_n_tokens: int
) -> Integers:
    """Return the start of each sequence's checkpoints, and their number, in int64.

    The kernel takes 64 tokens at a time and keeps a checkpoint whenever it has begun a multiple of
    `checkpoint_every_n_tokens / 64` of these steps.  A sequence that ends within its last step
    therefore has one checkpoint more than `len // checkpoint_every_n_tokens`, which is the count in
    FlashInfer's documentation.
    """
    import numpy as np

    op = "checkpoint_cu_starts"
    lengths = np.diff(check_indptr(op, "cu_seqlens", cu_seqlens))
    check_each(op, "cu_seqlens", lengths, lengths > 0, "one token of each sequence at least", 1)
    name = "checkpoint_every_n_tokens"
    every = check_int(op, name, checkpoint_every_n_tokens, _TILE, INT64_MAX)
    if every % _TILE:
        raise ArgumentError(op, name, got=every, expected=f"a multiple of {_TILE}")
    counts = -(-lengths // _TILE) // min(every // _TILE, INT32_MAX)
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])


def gdn_prefill_workspace_size(device: object = "cuda:0") -> int:
    """Size in bytes of `workspace_buffer` for `gdn_prefill` on a device."""
    (arg,) = (arg for arg in gdn.ROWS[0].tensors if arg.bytes_per_multiprocessor)
    return scratch_bytes(arg, parse_device(device, op="gdn_prefill_workspace_size"))


def top_p_renorm_workspace_size(
    batch_size: int, vocab_size: int, is_deterministic: bool = True
) -> int:
    """Size in bytes of `workspace` for `top_p_renorm_probs` with these rows and tokens."""
    op = "top_p_renorm_workspace_size"
    sizes = {
        "n": check_int(op, "batch_size", batch_size, 0),
        "h": check_int(op, "vocab_size", vocab_size, 0),
        "is_deterministic": check_flag(op, "is_deterministic", is_deterministic),
    }
    return renorm.top_p_renorm_bytes(sizes)


def fused_topk_topp_workspace_size(batch_size: int, vocab_size: int) -> int:
    """Size in bytes of `workspace` for `fused_topk_topp_renorm` with these rows and tokens."""
    op = "fused_topk_topp_workspace_size"
    n, h = check_int(op, "batch_size", batch_size, 0), check_int(op, "vocab_size", vocab_size, 0)
    return tokenspeed.topk_topp_bytes({"n": n, "h": h})


def packed_indptr(indptr: numpy.typing.ArrayLike) -> Indices:
    """Return the start of each segment's packed bits, and the end, in int32 on the host.

    `indptr`, a host array or a list, has the start of each segment, and the end.  Pass it to
    `segment_packbits` as `input_indptr`, and the result as `output_indptr`.  The result's last
    number is the size of `y` in bytes.

    Raises `ArgumentError` if `indptr` does not start at 0 or decreases.
    """
    import numpy as np

    lengths = np.diff(check_indptr("packed_indptr", "indptr", indptr))
    return np.concatenate([[0], np.cumsum(-(-lengths // 8))]).astype(np.int32)


def host_array(
    op: str, argument: str, value: object, expected: str
) -> numpy.ndarray[Any, numpy.dtype[Any]]:
    """Read any array that numpy reads; refuse anything else, and arrays with a mask."""
    import numpy as np

    check_unmasked(value, op, argument)
    try:
        array: numpy.ndarray[Any, numpy.dtype[Any]] = np.asarray(value)
    except Exception as error:  # any error of the exporter, such as a GPU array's
        got = f"a {type(value).__qualname__} that refused: {error}"
        raise ArgumentTypeError(op, argument, got=got, expected=expected) from error
    return array


def check_int_array(op: str, argument: str, value: object) -> Integers:
    """Return a one-dimensional array of integers from 0 to the largest int32."""
    import numpy as np

    expected = "a one-dimensional host array of integers"
    if isinstance(value, (list, tuple)):
        wrong = [v for v in value if not isinstance(v, numbers.Integral) or isinstance(v, bool)]
        if wrong:
            raise ArgumentTypeError(op, argument, got=shown(wrong[0]), expected=expected)
        # dtype object: numpy would turn an empty list, and large ints, into floats.
        array = np.array([int(v) for v in value], dtype=object)
    else:
        array = host_array(op, argument, value, expected)
        if array.dtype.kind not in "iu":
            got = f"{type(value).__qualname__} of {array.dtype}"
            raise ArgumentTypeError(op, argument, got=got, expected=expected)
    if array.ndim != 1:
        raise ArgumentError(op, argument, got=f"shape {array.shape}", expected=expected)
    fits = (array >= 0) & (array <= INT32_MAX)
    check_each(op, argument, array, fits.astype(bool), f"0 to {INT32_MAX}")
    return array.astype(np.int64)


def check_indptr(op: str, argument: str, value: object) -> Integers:
    """Return where each request starts, and the end; refuse arrays that do not start at 0 or
    decrease."""
    starts = check_int_array(op, argument, value)
    if not starts.size or starts[0] != 0:
        got = f"a first element of {starts[0]}" if starts.size else "no element"
        raise ArgumentError(op, argument, got=got, expected="0 and an end for each request")
    rising = starts[1:] >= starts[:-1]
    check_each(op, argument, starts[1:], rising, "elements that do not decrease", 1)
    return starts


def check_each(
    op: str, argument: str, array: Any, right: Any, expected: str, offset: int = 0
) -> None:
    """Raise for the first element that is not `right`."""
    if not right.all():
        at = int(right.argmin())
        got = f"{array[at]} at {at + offset}"
        raise ArgumentError(op, argument, got=got, expected=expected)
