"""Options of runs that the plan was not made for, or that the kernels lack."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

import fi_ffi

from tests.helpers.plan_calls import DIM, HEADS, KV_HEADS, Case, changed, refused

E4M3 = "float8_e4m3fn"
SLOPES = np.ones(HEADS, np.float32)
BYTES = sum((q * kv + 7) // 8 for q, kv in ((3, 7), (1, 5), (0, 2), (5, 9)))
PREFILL = ("ragged", "paged")


def wrong_arrays(array: np.ndarray, dtype: str) -> list[tuple[object, str]]:
    """What is wrong about an array of so many elements, by itself."""
    return [
        (array[:-1], ""),
        (np.append(array, array[-1:]), ""),
        (array[None], ""),
        (array.astype(np.float64), f"got float64, expected {dtype}"),
        (np.repeat(array, 2)[::2], "contiguous"),
        (changed(array, device="cuda:0"), "got cuda:0, expected cpu"),
        (changed(array, ptr=0), "not null"),
        (changed(array, ptr=fi_ffi.as_desc(array).ptr + 1), "multiple of"),
        ("array", "builtins.str"),
        (3, "builtins.int"),
    ]


def check_arrays(case: Case, given: dict, name: str, dtype: str) -> None:
    plan = case.plan(**given)
    array = case.extra[name]
    for value, words in wrong_arrays(array, dtype):
        if "multiple of" in words and dtype == "uint8":
            continue
        others = {**case.extra, name: value}
        refused(case, name, words, case.run, plan, **others)
    without = {key: value for key, value in case.extra.items() if key != name}
    option = next(iter(given))
    refused(case, name, f"got None.*{option}", case.run, plan, **without)
    case.run(plan, **case.extra)
    plain = case.plan()
    refused(case, name, f"None.*{option}", case.run, plain, **{name: array})


@pytest.mark.parametrize("kind", PREFILL)
def test_custom_masks(kind):
    case = Case(kind)
    case.extra = {"custom_mask": np.full(BYTES, 255, np.uint8)}
    given = {"use_custom_mask": True}
    check_arrays(case, given, "custom_mask", "uint8")
    case.check(mask=None)
    plan = case.plan(**given)
    for size in (0, BYTES - 1, BYTES + 1, 8 * BYTES):
        mask = {"custom_mask": np.zeros(size, np.uint8)}
        words = rf"got uint8\[{size}\] .*expected {BYTES} bytes, as the lengths say"
        refused(case, "custom_mask", words, case.run, plan, **mask)


@pytest.mark.parametrize("kind", ["ragged", "paged", "decode"])
def test_slopes(kind):
    case = Case(kind)
    case.extra = {"alibi_slopes": SLOPES.copy()}
    check_arrays(case, {"pos_encoding_mode": "ALIBI"}, "alibi_slopes", "float32")


@pytest.mark.parametrize("backend", ["fa2", "fa3"])
@pytest.mark.parametrize("kind", PREFILL)
def test_sinks(kind, backend):
    case = Case(kind, backend=backend)
    case.extra = {"sink": SLOPES.copy()}
    check_arrays(case, {"use_attention_sink": True}, "sink", "float32")


@pytest.mark.parametrize("backend", ["fa2", "fa3"])
def test_items(backend):
    case = Case("paged", kv_lens=(7, 5, 2, 9), backend=backend)
    case.extra = {
        "prefix_len_ptr": np.uint32([4, 4, 2, 4]),
        "token_pos_in_items_ptr": np.zeros(4 * 5, np.uint16),
        "token_pos_in_items_len": 5,
        "max_item_len_ptr": np.uint16([1, 1, 1, 1]),
    }
    given = {"use_multi_item_scoring": True}
    for name, dtype in (("prefix_len_ptr", "uint32"), ("token_pos_in_items_ptr", "uint16"),
                        ("max_item_len_ptr", "uint16")):  # fmt: skip
        check_arrays(case, given, name, dtype)
    plan, name = case.plan(**given), "token_pos_in_items_len"
    for value in (-1, 2**31, True, 1.0, "5"):
        others = case.extra | {name: value}
        refused(case, name, "int", case.run, plan, **others)
    for value in (0, 4, 6):
        others = case.extra | {name: value}
        words = rf"got uint16\[20\] .*expected {4 * value} positions: {name} for each of 4"
        refused(case, "token_pos_in_items_ptr", words, case.run, plan, **others)
    plain = case.plan()
    refused(case, name, "use_multi_item_scoring=False", case.run, plain, **{name: 5})


@pytest.mark.parametrize("kind", ["ragged", "paged", "decode"])
@pytest.mark.parametrize("name", ["rope_scale", "rope_theta"])
def test_rope_that_was_not_planned(kind, name):
    for mode in ("NONE", "ALIBI"):
        case = Case(kind, pos_encoding_mode=mode)
        plan = case.plan()
        words = "got 1.0, expected None without pos_encoding_mode='ROPE_LLAMA'"
        refused(case, name, words, case.run, plan, **{name: 1.0})


@pytest.mark.parametrize("kind", PREFILL)
def test_scales_that_fa2_lacks(kind):
    case = Case(kind, backend="fa2")
    plan = case.plan()
    words = r"got float 0.5, expected None: fa2 lacks it \(backend='fa3' has it\)"
    refused(case, "v_scale", words, case.run, plan, v_scale=0.5)
    scales = np.ones(KV_HEADS, np.float32)
    words = r"expected None: fa2 lacks it \(backend='fa3' has it\)"
    refused(case, "v_scale", words, case.run, plan, v_scale=scales)
    case.run(plan, v_scale=1)
    case.check()


@pytest.mark.parametrize(("kind", "backend"), [("ragged", "fa2"), ("paged", "fa3"), ("decode", "")])
@pytest.mark.parametrize("name", ["q_scale", "k_scale"])
def test_scales_of_each_head_without_fp8_queries(kind, backend, name):
    case = Case(kind, **({"backend": backend} if backend else {}))
    plan = case.plan()
    scales = np.ones(HEADS if name == "q_scale" else KV_HEADS, np.float32)
    who = "backend='fa3' with fp8 queries has it" if backend else "none of these kernels has it"
    words = rf"got ndarray, expected None: .*\({who}\)"
    refused(case, name, words, case.run, plan, **{name: scales})


@pytest.mark.parametrize("kind", PREFILL)
def test_scales_of_fp8(kind):
    case = Case(kind, q_data_type=E4M3, head_dim_qk=128)
    rows = len(case.memory["q"])
    for name in case.run_names:
        if name not in ("o", "lse"):
            shape = (*case.memory[name].shape[:-1], 128)
            case.memory[name] = case.rng.standard_normal(shape).astype(ml_dtypes.float8_e4m3fn)
    case.memory["o"] = np.full((rows, HEADS, 128), np.nan, np.float16)
    plan = case.plan()
    assert plan.backend == "fa3"
    for name, heads in (("q_scale", HEADS), ("k_scale", KV_HEADS), ("v_scale", KV_HEADS)):
        scales = np.ones(heads, np.float32)
        for value, words in wrong_arrays(scales, "float32"):
            if isinstance(value, int):
                continue
            words = "got str" if isinstance(value, str) else words
            refused(case, name, words, case.run, plan, **{name: value})
        for value in (True, float("nan"), 10**400, *((0, -1.0) if name != "v_scale" else ())):
            refused(case, name, "number", case.run, plan, **{name: value})
        case.run(plan, **{name: scales})
        assert np.isfinite(case.memory["o"]).all()
    for name in ("q", *case.run_names[1:3]):
        other = case.memory[name].astype(np.float16)
        words = f"got float16, expected {E4M3}"
        refused(case, name, words, case.run, plan, **{name: other})
    for dtype in ("bfloat16", E4M3):
        other = changed(case.memory["o"], dtype=dtype)
        refused(case, "o", f"got {dtype}, expected float16", case.run, plan, o=other)


def test_keys_of_other_dtypes():
    case = Case("paged", kv_data_type=E4M3)
    plan = case.plan()
    name = "paged_k_cache"
    refused(case, name, f"got float16, expected {E4M3}", case.run, plan)
    names = ("paged_k_cache", "paged_v_cache")
    for other in (ml_dtypes.float8_e5m2, ml_dtypes.bfloat16):
        caches = {n: case.memory[n].astype(other) for n in names}
        refused(case, name, f"expected {E4M3}", case.run, plan, **caches)
    right = {n: case.memory[n].astype(ml_dtypes.float8_e4m3fn) for n in names}
    case.run(plan, **right)
    assert np.isfinite(case.memory["o"]).all() and case.memory["o"].shape[-1] == DIM
