"""What the attention entries' references refuse: what the kernels would do wrong unasked.

And what they leave alone.  Their results, through the plans and functions: tests/attention.
"""

from __future__ import annotations

import numpy as np
import pytest

from fi_ffi.errors import ArgumentError, KernelError
from fi_ffi.ops.attention import rows
from fi_ffi.ops.plans import rows as other_rows
from fi_ffi.reference.attention import reference_kernel
from fi_ffi.reference.attention.formula import Options, gathered

from tests.helpers.attention_batches import (
    DIM,
    HEADS,
    KV_HEADS,
    PAGE,
    QO_LENS,
    SCALE,
    Batch,
    call,
    poisoned,
)

FA2, FA3, FP8 = (rows.BATCH_PREFILL[name] for name in ("fa2", "fa3", "fa3_fp8"))
WINDOW = (("use_sliding_window", True),)
ALIBI, ROPE = ((("pos_encoding_mode", mode),) for mode in (2, 1))
EMPTY = np.empty(0, np.uint8)


def plan_decode(batch, **given):
    return call(
        rows.BATCH_DECODE_PLAN, **batch.workspaces, indptr=batch.page_indptr,
        batch_size=len(batch.kv_lens), num_qo_heads=HEADS, num_kv_heads=KV_HEADS, page_size=PAGE,
        empty_q_data=EMPTY, empty_kv_data=EMPTY, **given,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["int_workspace_buffer", "page_locked_int_workspace_buffer"])
def test_a_small_workspace(name, rng):
    batch = Batch(rng)
    needed = 12 * len(QO_LENS) + 8
    for size in (needed, needed - 1, 0):
        batch.workspaces[name] = np.full(size, 0xFF, np.uint8)
        for plan in (lambda: batch.plan(FA2[0], True), lambda: plan_decode(batch)):
            if size == needed:
                plan()
                continue
            with pytest.raises(KernelError, match=rf": {name} has {size} bytes; .* {needed}"):
                plan()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"num_kv_heads": 3}, "num_qo_heads 8 should be divisible by num_kv_heads 3"),
        ({"total_num_rows": 12}, "total_num_rows is 12; qo_indptr ends at 13"),
        ({"batch_size": 6}, "qo_indptr has 6 elements for 6 requests"),
        (
            {"qo_indptr": np.array([0, 3, 2, 5, 6, 13], np.int32)},
            r"`qo_indptr`: got steps\(qo_indptr\) = -1 in element 1, expected 0 or more",
        ),
        (
            {"kv_indptr": np.array([-1, 3, 3, 5, 6, 13], np.int32)},
            "`kv_indptr`: got -1 in element 0",
        ),
        ({"kv_len_arr": np.array([1, 1, -1, 1, 1], np.int32)}, "`kv_len_arr`: got -1 in element 2"),
    ],
)
@pytest.mark.parametrize("row", [FA2[0], FA3[0]], ids=["fa2", "fa3"])
def test_plans(row, given, words, rng):
    with pytest.raises((KernelError, ArgumentError), match=words):
        Batch(rng).plan(row, True, **given)


def test_a_plan_of_another_kind(rng):
    batch = Batch(rng)
    for info, of in ((plan_decode(batch), "decode"), (batch.plan(FA3[0], True), "fa3 prefill")):
        with pytest.raises(KernelError, match=f"of {of}, not a plan of fa2 prefill"):
            batch.run(FA2[2], info, sm_scale=SCALE)


@pytest.mark.parametrize("which", [1, 2], ids=["ragged", "paged"])
@pytest.mark.parametrize("name", ["qo_indptr", "kv_indptr"])
def test_other_lengths_than_planned(which, name, rng):
    batch = Batch(rng)
    info = batch.plan(FA2[0], which == 2)
    name = "paged_kv_indptr" if name == "kv_indptr" and which == 2 else name
    array = {"paged_kv_indptr": batch.page_indptr}.get(name, getattr(batch, name, None)).copy()
    room = np.append(array, [0, 0]).astype(np.int32)
    batch.run(FA2[which], info, sm_scale=SCALE, **{name: room})
    array[4] += 1
    with pytest.raises(KernelError, match=f"{name} is not what was planned"):
        batch.run(FA2[which], info, sm_scale=SCALE, **{name: array})


@pytest.mark.parametrize(
    ("row", "compiled", "given", "words"),
    [
        (FA2[2], (), {"mask_mode_code": 2}, "needs maybe_custom_mask"),
        (FA2[2], (), {"mask_mode_code": 3}, "needs maybe_prefix_len_ptr"),
        (FA2[1], (), {"mask_mode_code": 3}, r"3 \(multi-item scoring\) is not one this entry has"),
        (FA2[2], (), {"mask_mode_code": 4}, "mask_mode_code 4 is not one this entry has"),
        (FA3[2], (), {"mask_mode_code": 2}, r"mask_mode_code 2 \(custom\)"),
        (FP8[2], (), {"mask_mode_code": 3}, r"mask_mode_code 3 \(multi-item scoring\)"),
        (FA2[2], (), {"window_left": 3}, "window_left 3 of a module without sliding windows"),
        (FA2[2], WINDOW, {"window_left": 4}, "window_left is 4; planned for 3"),
        (FA3[2], WINDOW, {"window_left": -1}, "window_left -1 of an fa3 module with sliding"),
        (FP8[2], WINDOW, {"window_left": -1}, "window_left -1 of an fa3 module with sliding"),
        (FA2[2], ALIBI, {}, "compiled for ALiBi needs maybe_alibi_slopes"),
        (FA2[2], (), {"kv_layout": 2}, "layout 2 is neither 0"),
        (
            FA2[2],
            (),
            {"paged_kv_indices": np.zeros(4, np.int32)},
            "`paged_kv_indptr`: got 5 in element 4, expected num_indices = 4 or less",
        ),
        (FA3[2], (), {"paged_kv_indices": np.full(20, 99, np.int32)}, "got 99 in element 0"),
        (FA3[2], (), {"q": np.zeros((12, HEADS, DIM), np.float16)}, "q has 12 rows; .* has 13"),
        (FA2[1], (), {"k": np.zeros((45, KV_HEADS, DIM), np.float16)}, "k has 45 rows; .* has 46"),
    ],
)
def test_runs(row, compiled, given, words, rng):
    batch = Batch(rng)
    plan = next(family[0] for family in (FA2, FA3, FP8) if row in family)
    window = 3 if "window_left" in given else -1
    info = batch.plan(plan, row.symbol == "paged_run", window_left=window)
    with pytest.raises((KernelError, ArgumentError), match=words):
        batch.run(row, info, compiled, **{"sm_scale": SCALE} | given)
    assert np.isnan(batch.lse).all()


def test_more_queries_than_keys(rng):
    """By its definition causal attention of them is 0; single prefill has always refused it."""
    batch = Batch(rng, qo_lens=[9], kv_lens=[4])
    batch.run(FA2[2], batch.plan(FA2[0], True), sm_scale=SCALE, mask_mode_code=1)
    assert (batch.o[:5] == 0).all() and (batch.lse[:5] == -5e4).all()
    k, v = batch.keys(0)
    given = {"q": batch.q, "k": k, "v": v, "tmp": EMPTY, "o": batch.o, "sm_scale": SCALE}
    with pytest.raises(KernelError, match="kv_len 4 to be qo_len 9 or more"):
        call(other_rows.SINGLE_PREFILL["fa2"], **given, mask_mode_code=1)
    call(other_rows.SINGLE_PREFILL["fa3"], **given, mask_mode_code=1)
    with pytest.raises(KernelError, match="RoPE of 9 queries, and 4 keys"):
        call(other_rows.SINGLE_PREFILL["fa2"], ROPE, **given)


def test_mla(rng):
    batch = Batch(rng)
    q = np.zeros((13, HEADS, 576), np.float16)
    cache = np.zeros((len(batch.indices), PAGE, 576), np.float16)
    plan, run = rows.BATCH_MLA["fa2"]
    info = call(
        plan, **batch.workspaces, qo_indptr=batch.qo_indptr, kv_indptr=batch.page_indptr,
        kv_len=batch.kv_lens, num_heads=HEADS, head_dim_o=512, causal=True,
    )  # fmt: skip
    batch.workspaces.pop("page_locked_int_workspace_buffer")
    given = {
        "plan_info_vec": info, "q_nope": q[..., :512], "q_pe": q[..., 512:], "sm_scale": 1.0,
        "ckv_cache": cache[..., :512], "kpe_cache": cache[..., 512:], "o": q[..., :512].copy(),
        "kv_indices": batch.indices, "num_heads": HEADS, "page_size": PAGE, "mask_mode_code": 1,
    }  # fmt: skip
    call(run, **batch.workspaces, **given)
    for wrong, words in (
        ({"mask_mode_code": 0}, "planned for causal attention"),
        ({"mask_mode_code": 2}, r"mask_mode_code 2 \(custom\)"),
        ({"page_size": 4}, "page_size is 4; ckv_cache has pages of 5"),
        ({"q_nope": q[:12, :, :512]}, "q_nope has 12 rows; planned for 13"),
    ):
        with pytest.raises(KernelError, match=words):
            call(run, **batch.workspaces, **given | wrong)


def test_words_of_a_module_name():
    with pytest.raises(TypeError, match="use_sliding_windows"):
        reference_kernel("batch_decode", "run", use_sliding_windows=True)


IGNORED = {
    "window_left": 3, "logits_soft_cap": 2.0,
    "maybe_alibi_slopes": np.linspace(0.1, 0.5, HEADS, dtype=np.float32),
}  # fmt: skip


@pytest.mark.parametrize("name", IGNORED)
def test_what_was_not_compiled_in(name, rng, error):
    """Decode and single prefill do not look at it."""
    batch = Batch(rng, [1], [33])
    k, v = batch.keys(0)
    given = {"k": k, "v": v, "tmp": EMPTY, "sm_scale": SCALE, name: IGNORED[name]}
    call(other_rows.SINGLE_DECODE, q=batch.q[0], o=batch.o[0], **given)
    assert error(batch.expected(Options(SCALE)), batch.o) <= 1
    batch.o[...] = np.nan
    call(other_rows.SINGLE_PREFILL["fa2"], q=batch.q, o=batch.o, **given)
    assert error(batch.expected(Options(SCALE)), batch.o) <= 1
    if name == "logits_soft_cap":
        batch.o[...] = np.nan
        info = batch.plan(FA3[0], True)
        batch.run(FA3[2], info, sm_scale=SCALE, **{name: IGNORED[name]})
        assert error(batch.expected(Options(SCALE)), batch.o) <= 1


def test_pages_before_the_first(rng):
    """Python would count them from the end."""
    cache, indices = rng.standard_normal((5, 4, 2, 8)), np.array([3, 0, 4, 1], np.int32)
    assert (gathered(cache, indices, 1, 6) == cache[[0, 4]].reshape(8, 2, 8)[:6]).all()
    for start, length in ((-1, 4), (-3, 6), (1, -2), (0, 17)):
        with pytest.raises(ValueError, match=f"{length} tokens"):
            gathered(cache, indices, start, length)


@pytest.mark.parametrize("backend", ["fa2", "fa3"])
def test_requests_without_keys(backend, rng):
    """Theirs is the kernels' minus infinity; fa3 forgets their sinks, and fa2 does not."""
    batch = Batch(rng)
    plan, _, run = rows.BATCH_PREFILL[backend]
    batch.run(run, batch.plan(plan, True), sm_scale=SCALE)
    assert (batch.lse[3:5] == -5e4).all() and (batch.o[3:5] == 0).all()
    plan, _, run = rows.BATCH_PREFILL_SINK[backend]
    sink = rng.normal(0, 2, HEADS).astype(np.float32)
    batch.run(run, batch.plan(plan, True), sink=sink, sm_scale=SCALE)
    expected = -5e4 if backend == "fa3" else sink * np.log2(np.e)
    assert np.allclose(batch.lse[3:5], expected, rtol=1e-6)


@pytest.mark.parametrize("which", [1, 2], ids=["ragged", "paged"])
def test_runs_of_fa2_are_given_their_lengths_again(which, rng, error):
    batch = Batch(rng)
    info = batch.plan(FA2[0], which == 2, kv_len_arr=np.zeros(len(batch.kv_lens), np.int32))
    batch.run(FA2[which], info, sm_scale=SCALE)
    assert error(batch.expected(Options(SCALE)), batch.o) <= 1


def test_rows_of_no_request_stay(rng):
    batch = Batch(rng)
    batch.q = np.concatenate((batch.q, batch.q))
    batch.o, batch.lse = poisoned(batch.q.shape), poisoned(batch.q.shape[:2], np.float32)
    batch.run(FA2[2], batch.plan(FA2[0], True), sm_scale=SCALE)
    for written in batch.o, batch.lse:
        finite = np.isfinite(written.astype(np.float32))
        assert finite[: sum(QO_LENS)].all() and not finite[sum(QO_LENS) :].any()


def test_a_plan_is_in_both_workspaces_and_nothing_else(rng):
    batch = Batch(rng)
    info = batch.plan(FA3[0], True)
    device, staging = (batch.workspaces[f"{x}int_workspace_buffer"] for x in ("", "page_locked_"))
    used = 12 * len(QO_LENS) + 8
    assert (device[:used] == staging[:used]).all() and (device[used:] == 0xFF).all()
    assert (batch.workspaces["float_workspace_buffer"] == 0xFF).all()
    # fa3 reads its lengths there and not from the run's arguments.
    batch.qo_indptr = np.zeros_like(batch.qo_indptr)
    batch.last = np.ones_like(batch.last)
    batch.run(FA3[2], info, sm_scale=SCALE)
    assert np.isfinite(batch.lse).all()
