"""Random paged caches: their index tensors, and the sizes that follow from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from fi_ffi.reference.arrays import Array

from tests.helpers.inputs.family import Call, Inputs

# Pages of a cache that no request has.
SPARE_PAGES = 3


def make(call: Call) -> None:
    """The given tables, or random ones."""
    sizes = call.sizes
    if not call.tables:
        call.tables = random_tables(sizes["nnz"], sizes["b"], sizes["page_size"], call.rng)
    call.sizes = {**_sizes_of(call.tables), **sizes}


def random_tables(
    nnz: int, requests: int, page_size: int, rng: np.random.Generator
) -> dict[str, Array]:
    """`page_tables` of `nnz` new tokens dealt out to requests that have some already."""
    new = np.bincount(rng.integers(0, requests, nnz), minlength=requests)
    return page_tables(new, rng.integers(0, 2 * page_size + 1, requests), page_size, rng)


def page_tables(
    new: Sequence[int] | Array, before: Sequence[int] | Array, page_size: int,
    rng: np.random.Generator,
) -> dict[str, Array]:  # fmt: skip
    """The index tensors for `new` tokens of each request after those it had `before`.

    Pages lie in no order, and neither do the tokens.
    """
    before, length = np.asarray(before), np.asarray(before) + np.asarray(new)
    indptr = np.concatenate([[0], np.cumsum(-(-length // page_size))])
    positions = np.concatenate([np.arange(*ends) for ends in zip(before, length, strict=True)])
    order = rng.permutation(len(positions))
    tables = {
        "batch_indices": np.repeat(np.arange(len(length)), length - before)[order],
        "positions": positions[order],
        "kv_indices": rng.permutation(indptr[-1] + SPARE_PAGES)[: indptr[-1]],
        "kv_indptr": indptr,
        "kv_last_page_len": np.where(length > 0, (length - 1) % page_size + 1, 0),
    }
    return {name: table.astype(np.int32) for name, table in tables.items()}


def _sizes_of(tables: Mapping[str, Array]) -> dict[str, int]:
    indices = len(tables["kv_indices"])
    return {
        "nnz": len(tables["positions"]),
        "b": len(tables["kv_last_page_len"]),
        "num_indices": indices,
        "num_pages": indices + SPARE_PAGES,
    }


_FIXED = {"head_dim_ckv": 512, "head_dim_kpe": 64}
_OWN = Inputs(
    small={"nnz": 6, "b": 3, "page_size": 4, "num_kv_heads": 2, "head_dim": 64, **_FIXED},
    usual={"nnz": 32, "b": 4, "page_size": 16, "num_kv_heads": 8, "head_dim": 128, **_FIXED},
    make=make,
)


def make_slots(call: Call) -> None:
    """Slots of any order, each once; some of the tokens have none, or one beyond the cache."""
    sizes, rng, nnz = call.sizes, call.rng, call.sizes["nnz"]
    sizes.setdefault("rows", nnz + 2)
    room = sizes["num_pages"] * sizes["page_size"]
    slots = rng.permutation(max(room, nnz))[:nnz]
    slots[rng.permutation(nnz)[: nnz // 4]] = rng.choice([-1, -7, room, room + 3], nnz // 4)
    call.default(
        slot_mapping=np.where(slots < room + 4, slots, -1),
        k_scale=np.exp(rng.uniform(-7, -4, 1)),
        v_scale=np.exp(rng.uniform(-7, -4, 1)),
    )


_SLOTS = Inputs(
    small={"nnz": 6, "num_pages": 3, "page_size": 4, "num_kv_heads": 2, "head_dim": 64},
    usual={"nnz": 64, "num_pages": 9, "page_size": 16, "num_kv_heads": 8, "head_dim": 128},
    make=make_slots,
)
# By module, or by op.
INPUTS = {"page": _OWN, "nvfp4_quantize_append_paged_kv_cache_with_slot_mapping": _SLOTS}
