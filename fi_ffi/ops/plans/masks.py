"""Masks packed on the host, and ALiBi slopes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fi_ffi.errors import ArgumentError, ArgumentTypeError
from fi_ffi.ops.call.arguments import check_int
from fi_ffi.ops.on_host import host_array

if TYPE_CHECKING:
    import numpy
    import numpy.typing

    Masks = numpy.typing.ArrayLike | Sequence[numpy.typing.ArrayLike]
    Bytes = numpy.ndarray[Any, numpy.dtype[numpy.uint8]]
    Slopes = numpy.ndarray[Any, numpy.dtype[numpy.float32]]

# A grid has fewer than 2**16 heads; the limit keeps a wrong number from filling the memory.
_MAX_HEADS = 2**16 - 1
_BOOLEAN = "a boolean host array for each request"


def pack_custom_mask(masks: Masks) -> Bytes:
    """Pack boolean host arrays [qo_len, kv_len] into a `custom_mask`; True if a query sees a key.

    Pass one array for `single_prefill`, or a sequence with one for each request of a batch. Bit `i
    * kv_len + j` is for query i and key j, the lowest bit of a byte first. Each request's bits
    start at a whole byte; unused bits of its last byte are 0.

    Raises `ArgumentTypeError` for anything but boolean host arrays, and `ArgumentError` for an
    array of another rank or an empty sequence.
    """
    import numpy as np

    if isinstance(masks, (list, tuple)):
        each = [_boolean(mask, (2,), f" for request {i}") for i, mask in enumerate(masks)]
    else:
        array = _boolean(masks, (2, 3))
        each = [array] if array.ndim == 2 else list(array)
    if not each:
        raise _refused("no masks", "one for each request")
    return np.concatenate([np.packbits(mask, bitorder="little") for mask in each])


def alibi_slopes(num_heads: int) -> Slopes:
    """Return ALiBi's slope of each head, float32 (Press et al. 2021, section 3).

    For n heads, n a power of two, slope i is `2 ** (-8 * i / n)` for i = 1 to n. For other numbers,
    take the slopes of the next lower power of two, then every second slope (the first, the third,
    ...) of twice that power.
    """
    import numpy as np

    heads = check_int("alibi_slopes", "num_heads", num_heads, 1, _MAX_HEADS)
    below = 1 << (heads.bit_length() - 1)
    first = np.arange(1, below + 1) / below
    between = np.arange(1, 2 * (heads - below), 2) / (2 * below)
    return np.exp2(-8.0 * np.concatenate([first, between])).astype(np.float32)


def _boolean(value: object, ranks: tuple[int, ...], where: str = "") -> numpy.ndarray[Any, Any]:
    """Read any array that numpy reads; refuse it unless it is boolean and has a mask's rank."""
    import numpy as np

    if where and isinstance(value, (list, tuple)):
        raise _refused(f"{type(value).__name__}{where}")
    array = host_array("pack_custom_mask", "masks", value, _BOOLEAN)
    if array.dtype != np.bool_:
        raise _refused(f"{type(value).__qualname__} of {array.dtype}")
    if array.ndim not in ranks:
        flat = " of each request, which FlashInfer's mask has side by side" * (array.ndim == 1)
        raise _refused(f"bool of shape {array.shape}{where}", f"shape [qo_len, kv_len]{flat}")
    return array


def _refused(got: str, expected: str = "") -> ArgumentError:
    """Make the error for a mask that is no boolean array, or that is not as expected."""
    error = ArgumentError if expected else ArgumentTypeError
    return error("pack_custom_mask", "masks", got=got, expected=expected or _BOOLEAN)
