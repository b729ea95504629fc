"""Keys and values of 4 bits: the same runs over their values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np

from fi_ffi.reference.arrays import Array
from fi_ffi.reference.attention import plan, runs
from fi_ffi.reference.attention.variant import fa2, fa2_single
from fi_ffi.reference.moe_weights import fp4

_BLOCK = 16
# The index of the keys' scales among the arguments that modules.py adds; the values' are next.
_OF_BATCH, _OF_ONE = 6, 2


def dequantised(packed: Array, scales: Array | None) -> Array:
    """Return the values of bytes [..., d / 2], the lower half first, times their block's scale
    [..., d / 16] in e4m3: exact in float16 and bfloat16."""
    if scales is None:
        raise ValueError("keys and values of 4 bits need maybe_k_cache_sf and maybe_v_cache_sf")
    of_each = scales.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    made: Array = fp4(packed) * np.repeat(of_each, _BLOCK, -1)
    return made


def _decoded(args: Sequence[Any], k: int, scales: int) -> list[Any]:
    """Return an entry's arguments with decoded keys and values, which stand at `k` and after it; so
    do their scales at `scales`."""
    decoded = list(args)
    for i in range(2):
        decoded[k + i] = dequantised(args[k + i], args[scales + i])
    return decoded


def single_prefill(*args: Any, compiled: Any) -> runs.Writes:
    """single_prefill's `run`."""
    return runs.single_prefill(fa2_single, *_decoded(args, 1, 9 + _OF_ONE), compiled=compiled)


def ragged_run(*args: Any, compiled: Any) -> runs.Writes:
    """`ragged_run`."""
    return runs.ragged_run(plan.FA2, fa2, *_decoded(args, 4, 14 + _OF_BATCH), compiled=compiled)


def paged_run(*args: Any, compiled: Any) -> runs.Writes:
    """`paged_run`."""
    return runs.paged_run(plan.FA2, fa2, *_decoded(args, 4, 16 + _OF_BATCH), compiled=compiled)


def attention_run(*args: Any, compiled: Any) -> runs.Writes:
    """batch_attention's `run`; the last arguments are the scales."""
    decoded = [*_decoded(args, 4, -2)[:-2], None, None]
    return runs.attention_run(*decoded, compiled=compiled)
