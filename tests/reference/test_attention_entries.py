"""The attention entries on the CPU, called through libtvm_ffi: planned, then run."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from fi_ffi.ops.attention import rows
from fi_ffi.reference.attention.formula import Options, exact_batch, from_pages

from tests.helpers.attention_batches import (
    DIM,
    DTYPES,
    HEADS,
    KV_HEADS,
    KV_LENS,
    LAYOUTS,
    PAGE,
    QO_LENS,
    SCALE,
    Batch,
    call,
    drawn,
    poisoned,
    starts,
)
from tests.reference.test_attention import sees_item

# What a kernel writes as the logarithm of a row that sees no key.
NO_KEY = -5e4
ROPE = (1 / 2, 1e-4)


# Positions and windows in the module's name, what they make of the call, and of the result.
SLOPES = np.linspace(0.1, 0.5, HEADS, dtype=np.float32)
CUDA_CORES = {
    "plain": ((), {}, {}),
    "rope": (
        (("pos_encoding_mode", 1),),
        {"rope_rcp_scale": ROPE[0], "rope_rcp_theta": ROPE[1]},
        {"rope": (2.0, 1e4)},
    ),
    "alibi": (
        (("pos_encoding_mode", 2),),
        {"maybe_alibi_slopes": SLOPES},
        {"alibi_slopes": SLOPES},
    ),
    "window": ((("use_sliding_window", True),), {"window_left": 3}, {"window_left": 3}),
    "cap": ((("use_logits_soft_cap", True),), {"logits_soft_cap": 2.0}, {"logits_soft_cap": 2.0}),
    # What a module was not compiled for it does not look at.
    "cap ignored": ((), {"logits_soft_cap": 2.0, "maybe_alibi_slopes": SLOPES}, {}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtypes", [("f16", "f16"), ("bf16", "bf16"), ("f16", "e4m3")], ids=str)
@pytest.mark.parametrize("case", CUDA_CORES.values(), ids=CUDA_CORES)
def test_single_decode(case, dtypes, layout, rng, error):
    compiled, given, options = case
    batch = Batch(rng, *dtypes, [1], [33])
    k, v = batch.keys(0)
    stored = [x.swapaxes(0, 1).copy() if layout == "HND" else x for x in (k, v)]
    o, lse = poisoned((HEADS, DIM), DTYPES[dtypes[0]]), poisoned((HEADS,), np.float32)
    call(
        rows.SINGLE_DECODE, compiled, q=batch.q[0], k=stored[0], v=stored[1],
        tmp=np.empty(0, np.uint8), o=o, maybe_lse=lse, kv_layout=LAYOUTS.index(layout),
        sm_scale=SCALE, **given,
    )  # fmt: skip
    assert error(batch.expected(Options(SCALE, **options)), o[None], lse[None]) <= 1


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kv", DTYPES)
@pytest.mark.parametrize("case", CUDA_CORES.values(), ids=CUDA_CORES)
def test_batch_decode(case, kv, layout, rng, error):
    compiled, given, options = case
    batch = Batch(rng, "f16", kv, [1] * 5)
    empty = np.empty(0, np.uint8)
    info = call(
        rows.BATCH_DECODE_PLAN, compiled, **batch.workspaces, indptr=batch.page_indptr,
        batch_size=5, num_qo_heads=HEADS, num_kv_heads=KV_HEADS, page_size=PAGE,
        empty_q_data=empty, empty_kv_data=empty,
    )  # fmt: skip
    batch.run(rows.BATCH_DECODE_RUN, info, layout, compiled, sm_scale=SCALE, **given)
    expected = batch.expected(Options(SCALE, **options))
    assert error(expected, batch.o, batch.lse, no_key=NO_KEY) <= 1
    assert (batch.lse[1] == NO_KEY).all() and (batch.o[1] == 0).all()


def test_a_window_that_was_not_compiled_in(rng, error):
    """Decode and single prefill look at window_left in modules with sliding windows only."""
    batch = Batch(rng, "f16", "f16", [1], [33])
    k, v = batch.keys(0)
    given = {"k": k, "v": v, "tmp": np.empty(0, np.uint8), "sm_scale": SCALE, "window_left": 3}
    call(rows.SINGLE_DECODE, q=batch.q[0], o=batch.o[0], **given)
    assert error(batch.expected(Options(SCALE)), batch.o) <= 1
    batch.o[...] = np.nan
    call(rows.SINGLE_PREFILL["fa2"], q=batch.q, o=batch.o, **given)
    assert error(batch.expected(Options(SCALE)), batch.o) <= 1


V_SCALES = np.array([0.5, 3.0], np.float32)
FP8 = {
    "maybe_scale_q": np.linspace(0.2, 0.9, HEADS, dtype=np.float32),
    "maybe_scale_k": np.array([0.7, 0.3], np.float32),
    "scale_v_scalar": 0.25,
}
FP8_SCALE = SCALE * FP8["maybe_scale_q"] * np.repeat(FP8["maybe_scale_k"], 4)
# backend, dtype, module, arguments, result; causal where it can be
PREFILL = {
    **{
        f"fa2 {name}": ("fa2", "f16", compiled, given, options)
        for name, (compiled, given, options) in CUDA_CORES.items()
    },
    "fa3": ("fa3", "bf16", (), {"scale_v_scalar": 2.0}, {"v_scale": 2.0}),
    "fa3 window cap": (
        "fa3",
        "f16",
        (("use_sliding_window", True), ("use_logits_soft_cap", True)),
        {"window_left": 2, "logits_soft_cap": 2.0, "maybe_scale_v": V_SCALES},
        {"window_left": 2, "logits_soft_cap": 2.0, "v_scale": np.repeat(V_SCALES, 4)},
    ),
    "fa3 fp8": ("fa3_fp8", "e4m3", (), FP8, {"sm_scale": FP8_SCALE, "v_scale": 0.25}),
    "fa3 fp8 numbers": (
        "fa3_fp8",
        "e5m2",
        (),
        {"scale_q_scalar": 0.5, "scale_k_scalar": 3.0, "maybe_scale_v": V_SCALES},
        {"sm_scale": SCALE * 1.5, "v_scale": np.repeat(V_SCALES, 4)},
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("case", PREFILL.values(), ids=PREFILL)
def test_single_prefill(case, causal, layout, rng, error):
    backend, dtype, compiled, given, options = case
    batch = Batch(rng, dtype, dtype, [12], [33])
    k, v = batch.keys(0)
    stored = [x.swapaxes(0, 1).copy() if layout == "HND" else x for x in (k, v)]
    call(
        rows.SINGLE_PREFILL[backend], compiled, q=batch.q, k=stored[0], v=stored[1],
        tmp=np.empty(0, np.uint8), o=batch.o, maybe_lse=batch.lse, mask_mode_code=int(causal),
        kv_layout=LAYOUTS.index(layout), sm_scale=SCALE, **given,
    )  # fmt: skip
    expected = batch.expected(Options(**{"sm_scale": SCALE, "causal": causal} | options))
    assert error(expected, batch.o, batch.lse) <= 1


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("which", [1, 2], ids=["ragged", "paged"])
@pytest.mark.parametrize("case", PREFILL.values(), ids=PREFILL)
def test_batch_prefill(case, which, causal, layout, rng, error):
    backend, dtype, compiled, given, options = case
    batch = Batch(rng, dtype, dtype)
    plan, run = rows.BATCH_PREFILL[backend][0], rows.BATCH_PREFILL[backend][which]
    window = given.get("window_left", -1)
    info = batch.plan(plan, which == 2, causal=causal, window_left=window)
    batch.run(run, info, layout, compiled, sm_scale=SCALE, mask_mode_code=int(causal), **given)
    expected = batch.expected(Options(**{"sm_scale": SCALE, "causal": causal} | options))
    assert error(expected, batch.o, batch.lse, no_key=NO_KEY) <= 1
    assert (batch.lse[3:5] == NO_KEY).all() and (batch.o[3:5] == 0).all()


@pytest.mark.parametrize("which", [1, 2], ids=["ragged", "paged"])
def test_custom_masks(which, rng, error):
    batch = Batch(rng)
    seen = [rng.random((m, n)) < 0.4 for m, n in zip(QO_LENS, KV_LENS, strict=True)]
    packed = [np.packbits(mask, bitorder="little") for mask in seen]
    plan, run = rows.BATCH_PREFILL["fa2"][0], rows.BATCH_PREFILL["fa2"][which]
    batch.run(
        run, batch.plan(plan, which == 2), "NHD", mask_mode_code=2, sm_scale=SCALE,
        maybe_custom_mask=np.concatenate(packed), maybe_mask_indptr=starts([*map(len, packed)]),
    )  # fmt: skip
    expected = batch.expected(lambda request: Options(SCALE, mask=seen[request]))
    assert error(expected, batch.o, batch.lse, no_key=NO_KEY) <= 1
    single = Batch(rng, "f16", "f16", [7], [9])
    k, v = single.keys(0)
    mask = rng.random((7, 9)) < 0.5
    call(
        rows.SINGLE_PREFILL["fa2"], q=single.q, k=k, v=v, tmp=np.empty(0, np.uint8), o=single.o,
        mask_mode_code=2, maybe_custom_mask=np.packbits(mask, bitorder="little"), sm_scale=SCALE,
    )  # fmt: skip
    assert error(single.expected(Options(SCALE, mask=mask)), single.o) <= 1


@pytest.mark.parametrize("backend", ["fa2", "fa3"])
def test_multi_item_scoring(backend, rng, error):
    batch = Batch(rng, "f16", "f16", [9, 2, 20], [9, 15, 31])
    prefix = np.array([3, 10, 11], np.uint32)
    positions = np.zeros((3, 24), np.uint16)
    for b, counts in enumerate(([0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 0], [*range(12), *range(8)])):
        positions[b, : len(counts)] = counts
    plan, _, run = rows.BATCH_PREFILL[backend]
    batch.run(
        run, batch.plan(plan, True, causal=True), "NHD", mask_mode_code=3, sm_scale=SCALE,
        maybe_prefix_len_ptr=prefix, maybe_token_pos_in_items_ptr=positions.ravel(),
        maybe_max_item_len_ptr=np.array([2, 3, 11], np.uint16), token_pos_in_items_len=24,
    )  # fmt: skip

    def seen(b: int) -> Options:
        qo_len, kv_len = np.diff(batch.qo_indptr)[b], batch.kv_lens[b]
        places = range(kv_len - qo_len, kv_len)
        items = int(prefix[b]), positions[b]
        mask = [[sees_item(place, j, *items) for j in range(kv_len)] for place in places]
        return Options(SCALE, mask=np.array(mask))

    assert error(batch.expected(seen), batch.o, batch.lse) <= 1


@pytest.mark.parametrize("window", [-1, 2])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("which", [1, 2], ids=["ragged", "paged"])
@pytest.mark.parametrize("backend", ["fa2", "fa3"])
def test_attention_sinks(backend, which, causal, window, rng, error):
    """They join the sum, and the logarithm; fa3 forgets them where there are no keys."""
    batch = Batch(rng, "bf16", "bf16")
    sink = rng.normal(0, 2, HEADS).astype(np.float32)
    family = rows.BATCH_PREFILL_SINK[backend]
    info = batch.plan(family[0], which == 2, window_left=window)
    batch.run(
        family[which], info, "NHD", (("use_sliding_window", window >= 0),), sink=sink,
        sm_scale=SCALE, mask_mode_code=int(causal), window_left=window,
    )  # fmt: skip
    options = Options(SCALE, causal=causal, window_left=window, sink=sink)
    expected = batch.expected(options)
    if backend == "fa3":
        assert (batch.lse[3:5] == NO_KEY).all()
        batch.lse[3:5] = sink * np.log2(np.e)
    assert error(expected, batch.o, batch.lse) <= 1


@pytest.mark.parametrize("base_e", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("backend", ["fa2", "fa3"])
def test_mla(backend, causal, base_e, rng, error):
    batch = Batch(rng)
    pages = len(batch.indices)
    ckv, kpe = drawn(rng, (pages, PAGE, 512), "bf16"), drawn(rng, (pages, PAGE, 64), "bf16")
    q = drawn(rng, (sum(QO_LENS), HEADS, 576), "bf16")
    q_nope, q_pe = q[..., :512], q[..., 512:]
    o, lse = poisoned(q_nope.shape, ml_dtypes.bfloat16), batch.lse
    plan, run = rows.BATCH_MLA[backend]
    info = call(
        plan, **batch.workspaces, qo_indptr=batch.qo_indptr, kv_indptr=batch.page_indptr,
        kv_len=batch.kv_lens, num_heads=HEADS, head_dim_o=512, causal=causal,
    )  # fmt: skip
    batch.workspaces.pop("page_locked_int_workspace_buffer")
    call(
        run, **batch.workspaces, plan_info_vec=info, q_nope=q_nope, q_pe=q_pe, ckv_cache=ckv,
        kpe_cache=kpe, kv_indices=batch.indices, o=o, maybe_lse=lse, mask_mode_code=int(causal),
        num_heads=HEADS, page_size=PAGE, sm_scale=0.05, return_lse_base_on_e=base_e,
    )  # fmt: skip

    def keys(request: int) -> tuple[np.ndarray, np.ndarray]:
        where = batch.page_indptr, batch.indices, batch.last, request
        values = from_pages(ckv, *where)
        return np.concatenate((values, from_pages(kpe, *where)), axis=-1), values

    expected = exact_batch(q, batch.qo_indptr, keys, Options(0.05, causal=causal))
    assert error(expected, o, lse / np.float32(np.log(2)) if base_e else lse) <= 1
    assert (lse[3:5] == -np.inf).all()


def test_rows_of_no_request_stay(rng):
    batch = Batch(rng)
    batch.q = np.concatenate((batch.q, batch.q))
    batch.o, batch.lse = poisoned(batch.q.shape), poisoned(batch.q.shape[:2], np.float32)
    plan, _, run = rows.BATCH_PREFILL["fa2"]
    batch.run(run, batch.plan(plan, True), "NHD", sm_scale=SCALE)
    for written in batch.o, batch.lse:
        finite = np.isfinite(written.astype(np.float32))
        assert finite[: sum(QO_LENS)].all() and not finite[sum(QO_LENS) :].any()


def test_a_plan_is_in_both_workspaces_and_nothing_else(rng):
    batch = Batch(rng)
    info = batch.plan(rows.BATCH_PREFILL["fa3"][0], True)
    device, staging = (batch.workspaces[f"{x}int_workspace_buffer"] for x in ("", "page_locked_"))
    used = 12 * len(QO_LENS) + 8
    assert (device[:used] == staging[:used]).all() and (device[used:] == 0xFF).all()
    assert (batch.workspaces["float_workspace_buffer"] == 0xFF).all()
    # fa3 reads its lengths there and not from the run's arguments.
    batch.qo_indptr = np.zeros_like(batch.qo_indptr)
    batch.last = np.zeros_like(batch.last)
    batch.run(rows.BATCH_PREFILL["fa3"][2], info, "NHD", sm_scale=SCALE)
    assert np.isfinite(batch.lse).all()
