"""Multi-head latent attention: all heads share one key, whose first part is the value too."""

from __future__ import annotations

import numpy as np

from fi_ffi.abi.objects import Array as Object
from fi_ffi.reference.arrays import Array, store
from fi_ffi.reference.attention import caches, masks, plan
from fi_ffi.reference.attention.formula import Options, exact
from fi_ffi.reference.attention.variant import Call, Compiled


def run(
    float_workspace: Array, int_workspace: Array, plan_info: Object, q_nope: Array, q_pe: Array,
    ckv_cache: Array, kpe_cache: Array, indices: Array, o: Array, lse: Array | None,
    mask_mode: int, num_heads: int, page_size: int, sm_scale: float, return_lse_base_on_e: bool,
    *, compiled: Compiled,
) -> None:  # fmt: skip
    """batch_mla's `run`.

    A row that sees no key has a logarithm of minus infinity, unlike other entries'; the
    kernel writes -5e4 where it has split the request.
    """
    call = Call(compiled, mask_mode, -1, num_heads, 1)
    call.only(masks.NONE, masks.CAUSAL)
    if page_size != ckv_cache.shape[1]:
        raise ValueError(f"page_size is {page_size}; ckv_cache has pages of {ckv_cache.shape[1]}")
    planned = plan.load(plan.MLA, int_workspace, plan_info)
    if planned.causal and not call.causal:
        raise ValueError("planned for causal attention, which leaves out keys: plan again without")
    if planned.qo_indptr[-1] > len(q_nope):
        raise ValueError(f"q_nope has {len(q_nope)} rows; planned for {planned.qo_indptr[-1]}")
    for request, length in enumerate(planned.kv_len):
        rows = slice(planned.qo_indptr[request], planned.qo_indptr[request + 1])
        where = indices, int(planned.kv_indptr[request]), int(length)
        ckv, kpe = (caches.gathered(cache, *where) for cache in (ckv_cache, kpe_cache))
        q = np.concatenate((q_nope[rows], q_pe[rows]), axis=-1)
        k = np.concatenate((ckv, kpe), axis=-1)
        found = exact(q, k[:, None], ckv[:, None], Options(sm_scale, call.causal))
        store(o[rows], found.out)
        if lse is not None:
            store(lse[rows], found.lse2 * (np.log(2) if return_lse_base_on_e else 1.0))
