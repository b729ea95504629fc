"""What a runtime works out on the host for ragged sequences: see docs/gdn.md.

Arrays here are host arrays: numpy's, anything numpy reads, or a list of ints.
"""

from __future__ import annotations

import numbers
from typing import TYPE_CHECKING

from fi_ffi.abi.device import parse_device
from fi_ffi.errors import ArgumentError, ArgumentTypeError, printed
from fi_ffi.ops import gdn, host
from fi_ffi.ops.memory import scratch_bytes

if TYPE_CHECKING:
    import numpy.typing

    from fi_ffi.ops.host import Integers

# Tokens that the kernel takes at a time.
_TILE = 64


def cu_seqlens(seq_lens: numpy.typing.ArrayLike) -> Integers:
    """Where each sequence starts, and the end: int64, as `gdn_prefill` takes it.

    Raises `ArgumentError` for a sequence without tokens: the kernel would never end.
    """
    import numpy as np

    op = "cu_seqlens"
    lengths = host.integers(op, "seq_lens", seq_lens)
    host.all_at(op, "seq_lens", lengths, lengths > 0, "one token of each sequence at least")
    ends = np.cumsum(lengths)
    host.all_at(op, "seq_lens", ends, ends <= host.INT32_MAX, f"{host.INT32_MAX} tokens in all")
    return np.concatenate([np.zeros(1, np.int64), ends])


def checkpoint_cu_starts(
    cu_seqlens: numpy.typing.ArrayLike, checkpoint_every_n_tokens: int
) -> Integers:
    """Where each sequence's checkpoints start, and their number: int64.

    The kernel takes 64 tokens at a time and keeps a checkpoint wherever it has begun a
    multiple of `checkpoint_every_n_tokens / 64` of those: a sequence that ends within the
    last of them has one more than `len // checkpoint_every_n_tokens`, of its last state.
    FlashInfer's documentation counts without it, and then the next sequence's first
    checkpoint is written twice, and the last one past the end.
    """
    import numpy as np

    op = "checkpoint_cu_starts"
    lengths = np.diff(host.indptr(op, "cu_seqlens", cu_seqlens))
    host.all_at(op, "cu_seqlens", lengths, lengths > 0, "one token of each sequence at least", 1)
    every, name = checkpoint_every_n_tokens, "checkpoint_every_n_tokens"
    expected = f"a multiple of {_TILE}, {_TILE} or more"
    if not isinstance(every, numbers.Integral) or isinstance(every, bool):
        got = f"{type(every).__name__} {printed(every)}"
        raise ArgumentTypeError(op, name, got=got, expected=expected)
    if every < _TILE or every % _TILE:
        raise ArgumentError(op, name, got=every, expected=expected)
    counts = -(-lengths // _TILE) // min(int(every) // _TILE, host.INT32_MAX)
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])


def gdn_prefill_workspace_size(device: object = "cuda:0") -> int:
    """Bytes that `workspace_buffer` of `gdn_prefill` needs on a device."""
    (arg,) = (arg for arg in gdn.ROWS[0].tensors if arg.bytes_per_multiprocessor)
    return scratch_bytes(arg, parse_device(device, op="gdn_prefill_workspace_size"))
