"""Appending to a paged cache, bit for bit: on the CPU, and where a test takes a `machine`, on a
GPU as well (tests/gpu/test_page.py).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import fi_ffi
from fi_ffi.ops.functions import OPS

from tests.helpers.calls import (
    CALLS_PAGE,
    HostArray,
    at_the_end_of_uint32,
    check_append,
    edges,
)
from tests.helpers.cases import make_case
from tests.helpers.inputs.page import page_tables

KV, MLA = OPS["append_paged_kv_cache"].row, OPS["append_paged_mla_kv_cache"].row
SIZES = {
    "nnz": 23, "b": 4, "page_size": 5, "num_kv_heads": 2, "head_dim": 64,
    "head_dim_ckv": 512, "head_dim_kpe": 64,
}  # fmt: skip


@pytest.mark.parametrize("together", [False, True], ids=["apart", "together"])
@pytest.mark.parametrize("page_size", [1, 3, 16, 64])
@pytest.mark.parametrize("kv_layout", ["NHD", "HND"])
def test_empty_requests_and_last_pages(kv_layout, page_size, together, machine, rng):
    new, before = edges(page_size)
    tables = page_tables(new, before, page_size, rng)
    lengths = fi_ffi.seq_lens(tables["kv_indptr"], tables["kv_last_page_len"], page_size)
    assert lengths.tolist() == [n + b for n, b in zip(new, before, strict=True)]
    assert {1, page_size} <= {*tables["kv_last_page_len"].tolist()}
    # Counts of tokens and requests are those of the tables.
    sizes = {name: size for name, size in SIZES.items() if name not in ("nnz", "b")}
    sizes |= {"page_size": page_size, "num_kv_heads": 4, "head_dim": 128}
    for row, more in ((KV, {"kv_layout": kv_layout}), (MLA, {})):
        case = make_case(row, sizes, {"T": "bfloat16"}, rng, tables, **more)
        check_append(case, machine.place, machine.stream, together and row is KV)


@pytest.mark.parametrize(("op", "dtypes"), CALLS_PAGE)
def test_as_many_tokens_as_the_kernel_counts(op, dtypes, machine, rng):
    sizes = {"num_pages": 3, "page_size": 1023, "num_kv_heads": 1, "head_dim": 64}
    case = make_case(op.row, SIZES | sizes | {"nnz": 3, "b": 2}, dtypes, rng,
                     at_the_end_of_uint32())  # fmt: skip
    check_append(case, machine.place, machine.stream)


def test_the_checks_can_fail(rng):
    """A wrong bit anywhere in a cache, and one beside it, are seen."""
    case = make_case(KV, SIZES, {"T": "float16"}, rng)
    for together in (False, True):
        for name in case.expected:
            value = case.expected[name][0].copy()
            value.view(np.uint16)[tuple(rng.integers(0, value.shape))] ^= 1 << rng.integers(0, 16)
            assert case.error(name, case.expected[name][0]) == (0.0, 0.0)
            assert case.error(name, value)[1] > 1
            wrong = replace(case, expected=case.expected | {name: (value, None)})
            with pytest.raises(AssertionError, match="1 elements are wrong"):
                check_append(wrong, HostArray, None, together)


WRONG_INDICES = {
    "no such request": ("batch_indices", 4, "less than b = 4"),
    "before the first request": ("batch_indices", -1, "0 or more"),
    "before the first token": ("positions", -1, "0 or more"),
    "past the request's pages": ("positions", 10**6, "less than .* page_size = "),
    "no such page": ("kv_indices", 10**6, "less than num_pages = "),
    "a page before the first": ("kv_indices", -1, "0 or more"),
}


@pytest.mark.parametrize("wrong", WRONG_INDICES)
@pytest.mark.parametrize("row", [KV, MLA], ids=lambda row: row.name)
def test_the_reference_refuses_wrong_indices(row, wrong, rng):
    """The kernels do not: they would write where the index says."""
    name, value, words = WRONG_INDICES[wrong]
    case = make_case(row, SIZES, {"T": "float16"}, rng)
    case.arrays[name][...] = value
    before = {n: a.tobytes() for n, a in case.arrays.items()}
    with pytest.raises(fi_ffi.ArgumentError, match=words) as caught:
        OPS[row.name](**case.arrays)
    assert (caught.value.op, caught.value.argument) == (row.name, name)
    assert {n: a.tobytes() for n, a in case.arrays.items()} == before


SLOTS = OPS["nvfp4_quantize_append_paged_kv_cache_with_slot_mapping"].row


def test_the_check_of_slots_can_fail(rng):
    """A token of no slot is written nowhere; each element and each scale that is off is seen."""
    case = make_case(SLOTS, {"nnz": 9, "num_pages": 4, "page_size": 3, "num_kv_heads": 2,
                             "head_dim": 64}, {"H": "float16", "I": "int64"}, rng)  # fmt: skip
    assert ((case.arrays["slot_mapping"] < 0) | (case.arrays["slot_mapping"] >= 12)).any()
    called = OPS[SLOTS.name]
    placed = {name: HostArray(array) for name, array in case.arrays.items()}
    called(**{name: array.desc() for name, array in placed.items()})
    kept = [slot for slot in case.arrays["slot_mapping"].tolist() if 0 <= slot < 12]
    for name in case.expected:
        got = placed[name].get()
        assert case.error(name, got)[1] == 0
        changed = (got.view(np.uint8) != case.arrays[name].view(np.uint8)).any(axis=(2, 3))
        assert {*np.flatnonzero(changed).tolist()} == {*kept}
        for slot in range(12):
            wrong = got.copy()
            # A power of two more, or another sign: a neighbour could be as near.
            wrong.view(np.uint8)[divmod(slot, 3)][rng.integers(2), rng.integers(4)] ^= 0x28
            assert case.error(name, wrong)[1] > 1


@pytest.mark.parametrize(
    ("argument", "shape"),
    [("append_key", (8, 2, 64)), ("append_key", (9, 3, 64)), ("append_key", (9, 2, 32)),
     ("append_value", (10, 2, 64)), ("append_value", (9, 2, 64, 1)),
     ("k_scale_cache", (4, 3, 2, 8)), ("v_scale_cache", (4, 2, 3, 4)),
     ("paged_v_cache", (4, 3, 2, 64)), ("v_scale", (2,))],
)  # fmt: skip
def test_shapes_that_do_not_go_together_are_refused(argument, shape, rng):
    case = make_case(SLOTS, {"nnz": 9, "rows": 9, "num_pages": 4, "page_size": 3,
                             "num_kv_heads": 2, "head_dim": 64},
                     {"H": "float16", "I": "int32"}, rng)  # fmt: skip
    dtype = case.arrays[argument].dtype
    given = {argument: np.zeros(shape, dtype)}
    if argument == "append_key":
        given["append_value"] = given[argument]
    arrays = {name: array.copy() for name, array in case.arrays.items()} | given
    with pytest.raises(fi_ffi.ArgumentError) as caught:
        OPS[SLOTS.name](**arrays)
    assert caught.value.op == SLOTS.name
    for name in {*case.expected} - {*given}:
        assert arrays[name].tobytes() == case.arrays[name].tobytes()
