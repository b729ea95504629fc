"""The entry of the `xqa` modules: one query of each request, over a paged cache."""

from __future__ import annotations

from typing import Any

from fi_ffi.reference.arrays import Array, store_saturated
from fi_ffi.reference.attention import caches
from fi_ffi.reference.attention.formula import Options, exact
from fi_ffi.reference.attention.variant import Compiled


def _scale(scale: float, tensor: Array | None) -> float:
    return scale if tensor is None else float(tensor[0])


def xqa_wrapper(
    run_sm90_fp8_mha: bool, sm_count: int, num_kv_heads: int, window: int, q_scale: float,
    q_scale_tensor: Array | None, output: Array, rcp_out_scale: float, q: Array,
    sinks: Array | None, k_cache: Array, v_cache: Array, k_sf: Array | None, v_sf: Array | None,
    page_table: Array, max_seq_len: int, seq_lens: Array, batch_size: int, kv_scale: float,
    kv_scale_tensor: Array | None, q_seq_len: int, mask: Array | None, semaphores: Array,
    scratch: Array, enable_pdl: bool, *, compiled: Compiled,
) -> None:  # fmt: skip
    """Keys of fp8 have a scale, others have not, whatever is given."""
    if k_sf is not None or v_sf is not None:
        raise ValueError("keys of 4 bits need a GPU")
    if q_seq_len != 1 or mask is not None:
        raise ValueError("one query of each request, and no mask")
    if semaphores.any():
        raise ValueError("the semaphores are not zero")
    of_kv = _scale(kv_scale, kv_scale_tensor) if k_cache.itemsize == 1 else 1.0
    sm_scale = _scale(q_scale, q_scale_tensor) * of_kv / q.shape[-1] ** 0.5
    flat = None if sinks is None else sinks.reshape(-1)
    for request in range(batch_size):
        length = int(seq_lens[request, 0])
        where: tuple[Any, ...] = page_table[request], 0, length
        keys, values = caches.gathered(k_cache, *where), caches.gathered(v_cache, *where)
        if compiled.use_sliding_window:
            keys, values = keys[max(length - window, 0) :], values[max(length - window, 0) :]
        scale = of_kv * (rcp_out_scale if output.itemsize == 1 else 1.0)
        found = exact(q[request], keys, values, Options(sm_scale, sink=flat, v_scale=scale))
        store_saturated(output[request], found.out)
