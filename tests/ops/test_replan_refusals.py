"""Batches that a captured launch cannot serve: refused, and the plan there was still runs right."""

from __future__ import annotations

import numpy as np
import pytest

import fi_ffi
from fi_ffi.ops.attention import sizes

from tests.helpers.plan_calls import (
    KINDS,
    KV_LENS,
    PAGE,
    PAGED,
    PAGES,
    QO_LENS,
    Case,
    changed,
    refused,
)

FIRST = {kind: next(iter(Case(kind).arrays)) for kind in KINDS}
PAGE_INDPTR = {"paged": "paged_kv_indptr", "decode": "indptr", "mla": "kv_indptr"}
INDICES = {"paged": "paged_kv_indices", "decode": "indices", "mla": "kv_indices"}
RUN_INDICES = {"paged": "paged_kv_indices", "decode": "paged_kv_indices", "mla": "kv_indices"}


def captured(kind: str, **options):
    """A plan for graphs that has run, as in a capture."""
    case = Case(kind, enable_cuda_graph=True, **options)
    plan = case.plan()
    case.run(plan)
    case.check()
    return case, plan


def not_replanned(case, plan, arrays, argument, words):
    """The batch is refused; what was captured is replayed, and is right."""
    info, needs = plan.plan_info, plan.needs
    refused(case, argument, words, plan.replan, **arrays)
    assert (plan.plan_info, plan.needs) == (info, needs)
    case.memory["o"][:] = case.memory["lse"][:] = np.nan
    case.run(plan)
    case.check()


@pytest.mark.parametrize("kind", KINDS)
def test_another_number_of_requests(kind):
    case, plan = captured(kind)
    for count in (1, 3, 5):
        other = Case(kind, (QO_LENS * 2)[:count], (1,) * count)
        words = f"got {count} requests, expected 4, the number of requests"
        not_replanned(case, plan, other.arrays, FIRST[kind], words)


@pytest.mark.parametrize("kind", ["ragged", "paged", "mla"])
def test_more_queries(kind):
    more = Case(kind, (3, 2, 0, 5), KV_LENS)
    case, plan = captured(kind)
    not_replanned(case, plan, more.arrays, "qo_indptr", "got 10 queries, expected 9 at most")
    case, plan = captured(kind, max_total_num_rows=10)
    plan.replan(**more.arrays)
    more = Case(kind, (3, 2, 1, 5), KV_LENS)
    refused(case, "qo_indptr", "11 queries, expected 10", plan.replan, **more.arrays)
    with pytest.raises(fi_ffi.ArgumentError, match="got 9 queries, expected 8 at most"):
        Case(kind, enable_cuda_graph=True, max_total_num_rows=8).plan()


@pytest.mark.parametrize("kind", PAGED)
def test_more_pages(kind):
    more = Case(kind, QO_LENS, (7, 5, 2, 13))
    name = PAGE_INDPTR[kind]
    case, plan = captured(kind)
    not_replanned(case, plan, more.arrays, name, "got 9 pages, expected 8 at most")
    case, plan = captured(kind, max_num_indices=9)
    plan.replan(**more.arrays)
    more = Case(kind, QO_LENS, (7, 5, 2, 17))
    refused(case, name, "got 10 pages, expected 9 at most", plan.replan, **more.arrays)
    with pytest.raises(fi_ffi.ArgumentError, match="got 8 pages, expected 7 at most"):
        Case(kind, enable_cuda_graph=True, max_num_indices=7).plan()


@pytest.mark.parametrize("kind", PAGED)
def test_pages_past_the_cache_that_was_run_with(kind):
    case, plan = captured(kind)
    indices = case.indices.copy()
    indices[-1] = PAGES
    arrays = case.arrays | {INDICES[kind]: indices}
    words = f"got {PAGES + 1} pages, expected at most the {PAGES} that runs were given"
    not_replanned(case, plan, arrays, INDICES[kind], words)
    # A cache that is larger in one run is no larger in the others.
    large = {n: np.concatenate([case.memory[n]] * 2) for n in case.run_names if "cache" in n}
    case.run(plan, **large)
    not_replanned(case, plan, arrays, INDICES[kind], words)
    indices[-1] = case.indices[-1]
    plan.replan(**arrays)


@pytest.mark.parametrize("kind", PAGED)
def test_a_refused_run_leaves_the_room_there_was(kind):
    case, plan = captured(kind)
    small = {n: case.memory[n][: case.indices.max() + 1] for n in case.run_names if "cache" in n}
    wrong = {"o": changed(case.memory["o"], dtype="float32")}
    refused(case, "o", "float32", case.run, plan, **small, **wrong)
    indices = case.indices.copy()
    indices[0] = PAGES - 1
    plan.replan(**case.arrays | {INDICES[kind]: indices})
    assert plan.room["pages"] == PAGES


def test_more_keys_than_were_run_with():
    case, plan = captured("ragged")
    more = Case("ragged", QO_LENS, (7, 5, 2, 10))
    words = "got 24 keys, expected at most the 23 that runs were given"
    not_replanned(case, plan, more.arrays, "kv_indptr", words)
    longer = {name: np.concatenate([case.memory[name]] * 2) for name in ("k", "v")}
    case, plan = Case("ragged", enable_cuda_graph=True), None
    plan = case.plan()
    case.run(plan, **longer)
    plan.replan(**more.arrays)


@pytest.mark.parametrize("kind", ["ragged", "paged"])
def test_a_larger_mask(kind):
    case = Case(kind, enable_cuda_graph=True, use_custom_mask=True, max_num_indices=20)
    plan = case.plan()
    mask = {"custom_mask": np.full(10, 255, np.uint8)}
    longer = {name: np.concatenate([case.memory[name]] * 2) for name in case.run_names[1:3]}
    case.run(plan, **mask, **longer)
    case.check()
    more = Case(kind, QO_LENS, (7, 5, 2, 10))
    words = "got 11 mask bytes, expected at most the 10 that runs were given"
    refused(case, "qo_indptr", words, plan.replan, **more.arrays)
    case.memory["o"][:] = np.nan
    case.run(plan, **mask)
    case.check()
    fewer = mask["custom_mask"][:-1]
    refused(case, "custom_mask", "expected 10 bytes", case.run, plan, custom_mask=fewer)
    # Larger ones leave room.
    plan = case.plan()
    case.run(plan, custom_mask=np.full(11, 255, np.uint8), **longer)
    plan.replan(**more.arrays)


@pytest.mark.parametrize("kind", PAGED)
def test_pages_from_the_run_and_from_the_plan(kind):
    case, plan = captured(kind)
    arrays = case.arrays | {INDICES[kind]: None}
    words = "expected an array or None, as in the plan that was captured"
    not_replanned(case, plan, arrays, INDICES[kind], words)
    case = Case(kind, enable_cuda_graph=True, max_num_indices=20)
    plan = case.plan(**{INDICES[kind]: None})
    case.run(plan, **{RUN_INDICES[kind]: case.indices})
    case.check()
    refused(case, INDICES[kind], words, plan.replan, **case.arrays)
    more = Case(kind, QO_LENS, (7, 5, 2, 13)).arrays | {INDICES[kind]: None}
    words = "got 9 page indices, expected at most the 8 that runs were given"
    refused(case, PAGE_INDPTR[kind], words, plan.replan, **more)
    case.memory["o"][:] = np.nan
    case.run(plan, **{RUN_INDICES[kind]: case.indices})
    case.check()


@pytest.mark.parametrize("kind", ["ragged", "paged"])
def test_pieces_of_a_fixed_size(kind):
    case, plan = captured(kind, fixed_split_size=3 if kind == "paged" else 9, max_num_indices=20)
    longer = {name: np.concatenate([case.memory[name]] * 2) for name in case.run_names[1:3]}
    plan = case.plan()
    case.run(plan, **longer)
    more = Case(kind, QO_LENS, (7, 5, 2, 13))
    words = "got requests split, expected as captured"
    not_replanned(case, plan, more.arrays, "fixed_split_size", words)


def test_blocks_of_mla_that_work_together():
    lens = (3, 1, 0, 5)
    case = Case("mla", lens, KV_LENS, enable_cuda_graph=True, max_total_num_rows=40)
    plan = case.plan()
    case.run(plan)
    case.check()
    more = Case("mla", (10, 10, 10, 10), (12, 10, 10, 12))
    assert sizes.mla_cluster(plan.geometry, more.qo_lens) == 2
    arrays = more.arrays | {"kv_indptr": case.page_indptr, "kv_indices": case.indices,
                            "kv_len_arr": np.int32(KV_LENS)}  # fmt: skip
    words = "got queries for which 2 blocks work together, expected 1"
    not_replanned(case, plan, arrays, "qo_indptr", words)


@pytest.mark.parametrize("graph", [False, True], ids=["", "graph"])
def test_more_work_than_mla_has_room_for(graph):
    lens = np.int32([0, 2**18])
    case = Case("mla", enable_cuda_graph=graph)
    arrays = {"qo_indptr": lens, "kv_indptr": np.int32([0, 1]), "kv_indices": np.int32([0]),
              "kv_len_arr": np.int32([PAGE])}  # fmt: skip
    words = r"queries for up to \d+ work items, expected 16384 at most"
    refused(case, "qo_indptr", words, case.plan, **arrays)
    plan = case.plan()
    refused(case, "qo_indptr", "work items|requests", case.replan, plan, **arrays)
    case.run(plan)
    case.check()


@pytest.mark.parametrize("kind", ["ragged", "paged", "decode"])
def test_a_workspace_too_small_for_the_next_batch(kind):
    case, more = Case(kind), Case(kind, (40,) * 400, (5,) + (0,) * 399)
    small = case.cls.workspace_size(**case.arrays, **case.options, device="cpu")
    need = case.cls.workspace_size(**more.arrays, **more.options, device="cpu")
    assert need.int_bytes > small.int_bytes
    workspace = fi_ffi.Workspace(case.memory["float"], case.memory["int"][: small.int_bytes])
    plan = case.plan(workspace=workspace)
    words = rf"got {small.int_bytes} bytes, expected {need.int_bytes} bytes"
    refused(case, "int_workspace_buffer", words, plan.replan, **more.arrays)
    case.run(plan)
    case.check()


@pytest.mark.parametrize("kind", KINDS)
def test_other_words_of_a_replan(kind):
    case = Case(kind)
    plan = case.plan()
    for word in ("page_size", "causal", "workspace"):
        with pytest.raises(TypeError, match=word):
            case.replan(plan, **{word: 1})
    with pytest.raises(TypeError, match="required"):
        plan.replan()
    case.run(plan)
    case.check()
