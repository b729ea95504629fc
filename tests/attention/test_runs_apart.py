"""Runs of one plan: what one is given is nothing to the next, and nothing keeps it."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import fi_ffi

from tests.helpers import batch_pod_calls, instructions, pod_calls
from tests.helpers.plan_calls import DIM, HEADS, KINDS, KV_HEADS, PAGE, PAGES, RUN_INDICES, Case

Run = tuple[Callable[..., None], dict[str, np.ndarray]]


def of_plan(kind: str, has_pages: bool = False) -> Run:
    case = Case(kind)
    arrays, given = {name: case.memory[name] for name in case.run_names}, {}
    if has_pages:
        arrays[RUN_INDICES[kind]] = case.indices
        given["indices" if kind == "decode" else RUN_INDICES[kind]] = None
    return case.run_of(case.plan(**given)), arrays


def of_pod() -> Run:
    batch = pod_calls.Batch(pod_calls.Spec(), np.random.default_rng())
    return batch.plan(device="cpu").run, batch.arrays(1 << 20)


def of_batch_pod() -> Run:
    batch = batch_pod_calls.Batch(batch_pod_calls.Spec(), np.random.default_rng())
    return batch.plan(device="cpu").run, batch.arrays()


def of_batch_attention() -> Run:
    lengths = {"qo_indptr": [0, 3, 4], "kv_indptr": [0, 2, 3], "kv_indices": [5, 0, 2],
               "kv_len_arr": [7, 4]}  # fmt: skip
    plan = fi_ffi.BatchAttentionPlan(
        **{name: np.int32(values) for name, values in lengths.items()}, num_qo_heads=HEADS,
        num_kv_heads=KV_HEADS, head_dim_qk=DIM, page_size=PAGE, q_data_type="float16", device="cpu",
    )  # fmt: skip
    draw = np.random.default_rng().standard_normal
    shapes = {
        "q": (4, HEADS, DIM),
        **dict.fromkeys(("k_cache", "v_cache"), (PAGES, PAGE, KV_HEADS, DIM)),
    }
    arrays = {name: draw(shape).astype(np.float16) for name, shape in shapes.items()}
    arrays |= {"o": np.empty((4, HEADS, DIM), np.float16), "lse": np.empty((4, HEADS), np.float32)}
    return plan.run, arrays


# What makes a plan and a right run of it, and options of another run.
RUNS: dict[str, tuple[Callable[[], Run], dict[str, Any]]] = {
    **{kind: (lambda kind=kind: of_plan(kind), {"sm_scale": 0.7, "k_scale": 2.0})
       for kind in KINDS if kind != "mla"},
    "mla": (lambda: of_plan("mla"), {"sm_scale": 0.7, "return_lse_base_on_e": True}),
    **{f"{kind}, and its pages": (lambda kind=kind: of_plan(kind, True), {"sm_scale": 0.7})
       for kind in RUN_INDICES},
    "batch attention": (of_batch_attention, {"sm_scale": 0.7, "k_scale": 2.0, "v_scale": 3.0}),
    "pod": (of_pod, {"sm_scale_p": 0.7, "sm_scale_d": 0.9, "window_left_p": 3, "causal_p": True}),
    "batch pod": (of_batch_pod, {"sm_scale_p": 0.7, "sm_scale_d": 0.9}),
}  # fmt: skip
OUTPUTS = ("o", "lse", "o_p", "o_d", "lse_p", "lse_d")


def results(run: Callable[..., None], arrays: dict[str, np.ndarray], **options: Any) -> list[bytes]:
    """Poisoned before; with copies of the arrays, of which nothing may be left."""
    given = {name: array.copy() for name, array in arrays.items()}
    outs = [given[name] for name in OUTPUTS if name in given]
    for out in outs:
        out.fill(np.nan)
    run(**given, **options)
    assert not any(np.isnan(out).all() for out in outs)
    found, left = [out.tobytes() for out in outs], [*map(weakref.ref, given.values())]
    outs.clear(), given.clear()
    del out
    gc.collect()
    assert not [ref for ref in left if ref() is not None], "an array of the run is kept"
    return found


@pytest.mark.parametrize("name", RUNS)
def test_options_and_arrays_are_of_one_run(name):
    make, options = RUNS[name]
    run, arrays = make()
    plain = results(run, arrays)
    for option, value in options.items():
        other = results(run, arrays, **{option: value})
        assert other != plain, f"{option} is nothing to it"
        assert results(run, arrays) == plain, f"{option} is still there"


def many() -> Case:
    """More requests than the placement of a few has room for, with pages in common."""
    case = Case("decode", kv_lens=[1 + i % PAGE for i in range(70)])
    case.indices = case.rng.integers(0, PAGES, 70).astype(np.int32)
    return case


@pytest.mark.parametrize(("batch", "is_own", "stride"), [("few", False, 7), ("many", True, 40)])
def test_ctrl_c_at_any_moment_of_a_replan(batch, is_own, stride):
    """The plan holds one of the two batches or is refused, and the next replan is right."""
    before, after = Case("decode"), Case("decode", kv_lens=(5, 9, 1))
    between = many() if batch == "many" else Case("decode", kv_lens=(12, 3))

    def interrupted(number: int) -> bool:
        left, plan = [number], before.plan(**{"workspace": None} if is_own else {})

        def tell(code, line):
            left[0] -= 1
            if left[0] == -1:
                raise KeyboardInterrupt

        before.run(plan)  # its frame is there to be taken again
        stop = instructions.start(lambda code: "/ops/attention/" in code.co_filename, tell)
        try:
            between.replan(plan)
        except KeyboardInterrupt:
            pass
        finally:
            stop()
        for case in (before, between):
            case.memory["o"].fill(np.nan)
            try:
                case.run(plan)
            except fi_ffi.ArgumentError:
                continue
            case.check()
        after.memory["o"].fill(np.nan)
        after.replan(plan)
        after.run(plan)
        after.check()
        return left[0] < 0

    moments = int(np.random.default_rng().integers(stride))
    while interrupted(moments):
        moments += stride
    assert moments > 200
