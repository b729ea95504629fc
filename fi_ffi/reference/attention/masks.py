"""Masks beyond lengths: custom masks and multi-item scoring."""

from __future__ import annotations

import numpy as np

from fi_ffi.reference.arrays import Array

# `MaskMode` in attention/mask.cuh
NONE, CAUSAL, CUSTOM, MULTI_ITEM = range(4)
NAMES = ("none", "causal", "custom", "multi-item scoring")


def custom(packed: Array, start: int, qo_len: int, kv_len: int) -> Array:
    """Unpack a request's mask: a bit for each query and key, the lowest bit of a byte first."""
    bits, stop = qo_len * kv_len, start + -(-qo_len * kv_len // 8)
    if not 0 <= start <= stop <= len(packed):
        raise ValueError(
            f"maybe_custom_mask has {len(packed)} bytes; a request's mask of "
            f"{qo_len} x {kv_len} bits is at bytes {start} to {stop}"
        )
    flat = np.unpackbits(packed[start:stop], count=bits, bitorder="little")
    return flat.reshape(qo_len, kv_len).astype(bool)


def multi_item(
    qo_len: int, kv_len: int, prefix_len: int, token_positions: Array, max_item_len: int
) -> Array:
    """Return the mask of a common prefix, and items that see the prefix and themselves.

    `token_positions` has the position in its item of each token after the prefix. Beside the
    prefix, a token sees as many tokens as its position says, itself the last of them. A delimiter
    has position 0, and sees none.
    """
    position = np.arange(kv_len - qo_len, kv_len)[:, None]
    key = np.arange(kv_len)[None, :]
    in_prefix = position < prefix_len
    if kv_len - prefix_len > len(token_positions):
        raise ValueError(
            f"token_pos_in_items_len is {len(token_positions)}; a request has "
            f"{kv_len - prefix_len} tokens after its prefix"
        )
    wide = np.zeros(max(kv_len, 1), np.int64)
    wide[prefix_len:kv_len] = token_positions[: max(kv_len - prefix_len, 0)]
    # The kernels skip keys further back than this from all of a tile's queries.
    if wide.max(initial=0) > max_item_len:
        raise ValueError(f"a token is {wide.max()} into its item, of {max_item_len} at most")
    own_item = key > position - wide[np.maximum(position, 0)]
    visible: Array = (key <= position) & (in_prefix | (key < prefix_len) | own_item)
    return visible
