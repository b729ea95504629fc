"""Wrong arguments of a plan's runs and of calls for one request: a typed error that names them,
and nothing written."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import fi_ffi
from fi_ffi.loader import machine

from tests.helpers.plan_calls import (
    DIM,
    HEADS,
    KINDS,
    KV_HEADS,
    PAGE,
    PAGED,
    PAGES,
    RUN_INDICES,
    SINGLES,
    Case,
    Single,
    changed,
    refused,
)

E4M3 = "float8_e4m3fn"
FP8 = ml_dtypes.float8_e4m3fn
PREFILL = ("ragged", "paged")
PLANNED = [(kind, backend) for kind in ("ragged", "paged", "mla") for backend in ("fa2", "fa3")]
PLANNED += [("decode", "")]
CALLS = [*PLANNED, ("single_prefill", "fa2"), ("single_prefill", "fa3"), ("single_decode", "")]
EVERY_PLAN = pytest.mark.parametrize(("kind", "backend"), PLANNED)
EVERY_CALL = pytest.mark.parametrize(("kind", "backend"), CALLS)
SLOPES = np.ones(HEADS, np.float32)
Wrong = Iterator[tuple[Any, str]]


def planned(kind: str, backend: str = "", **options: Any) -> tuple[Any, Any]:
    options |= {"backend": backend} if backend else {}
    case = (Single if kind in SINGLES else Case)(kind, **options)
    return case, case.plan()


def _times(desc, factor, axis):
    strides = list(desc.strides)
    strides[axis] *= factor
    return changed(desc, strides=strides)


def _longer(desc, axis):
    shape = list(desc.shape)
    shape[axis] += 1
    return changed(desc, shape=shape)


def wrong_tensors(desc: fi_ffi.TensorDesc, is_single: bool) -> Wrong:
    """What is wrong about a tensor, and what is said of it."""
    yield changed(desc, shape=(*desc.shape, 1)), ""
    yield changed(desc, shape=()), ""
    yield changed(desc, dtype="float64"), "float64"
    yield changed(desc, dtype="int32"), "int32"
    yield changed(desc, device="cuda:0"), "got cuda:0, expected cpu|got cpu, expected cuda:0"
    yield changed(desc, device="cuda_managed:0"), "cuda_managed:0"
    yield changed(desc, ptr=0), "got 0x0 .*not null"
    yield changed(desc, ptr=desc.ptr + 1), "multiple of .* bytes"
    yield _times(desc, 2, -1), "strides"
    yield None, "got builtins.NoneType"
    yield "q", "got builtins.str 'q'"
    yield 7, "got builtins.int 7"
    yield [1.0], "got builtins.list"
    if not is_single:
        yield _longer(desc, -1), "expected (head_dim|num_)"
        yield _longer(desc, 1), "expected (num_(qo_|kv_)?heads|page_size) = "


@pytest.mark.parametrize("has_run", [False, True], ids=["first", "later"])
@EVERY_CALL
def test_each_tensor(kind, backend, has_run):
    case, plan = planned(kind, backend)
    is_single = kind in SINGLES
    if has_run:  # what is alike is not looked at again
        case.run(plan)
    for name in [*case.run_names, *(["tmp"] if is_single else [])]:
        desc = fi_ffi.as_desc(case.memory[name])
        for value, words in wrong_tensors(desc, is_single):
            if (value is None and name == "lse") or (name == "tmp" and "multiple" in words):
                continue  # without an lse, none is written; bytes may lie anywhere
            # Of one request, the first tensor says which device: then it is the second's.
            argument = "k" if is_single and name == "q" and "cuda" in words else name
            refused(case, argument, words, case.run, plan, **{name: value})
        for axis in range(len(desc.shape)) if is_single and name != "tmp" else ():
            # One more of what only q and k say is told of the next tensor.
            refused(case, None, "", case.run, plan, **{name: _longer(desc, axis)})
    case.run(plan)
    case.check()
    case.run(plan, lse=None)


@EVERY_CALL
def test_outputs(kind, backend):
    case, plan = planned(kind, backend)
    for name in ("o", "lse", *(("tmp",) if kind in SINGLES else ())):
        case.memory[name].flags.writeable = False
        refused(case, name, "got read-only memory, expected writable", case.run, plan)
        case.memory[name].flags.writeable = True
        if name == "tmp":
            continue
        desc = fi_ffi.as_desc(case.memory[name])
        for first in (0, 1, -8) if len(desc.shape) > 1 else (0, 2, -1):
            strided = changed(desc, strides=(first, *desc.strides[1:]))
            refused(case, name, "contiguous|overlap|strides", case.run, plan, **{name: strided})
        for other in (changed(desc, shape=(desc.shape[0] - 1, *desc.shape[1:])), _longer(desc, 0)):
            refused(case, name, "nnz_qo|b = |heads", case.run, plan, **{name: other})
    for dtype in ("float16", "int32", "bfloat16"):
        given = {"lse": changed(case.memory["lse"], dtype=dtype)}
        refused(case, "lse", f"got {dtype}, expected float32", case.run, plan, **given)


@EVERY_PLAN
def test_what_differs_from_the_plan(kind, backend):
    case, plan = planned(kind, backend)
    inputs = [name for name in case.run_names if name != "lse"]
    first, words = inputs[0], "got bfloat16, expected float16"
    for desc in (_longer(fi_ffi.as_desc(case.memory[first]), 0), case.memory[first][:-1]):
        # The outputs too: all agree with each other, and not with the plan.
        outputs = {n: changed(case.memory[n], shape=(desc.shape[0], *case.memory[n].shape[1:]))
                   for n in ("o", "lse")}  # fmt: skip
        rows = "b = 4" if kind == "decode" else "nnz_qo = 9"
        given = {first: desc} | outputs
        refused(case, first, f"expected {rows}, as planned", case.run, plan, **given)
    every = {name: case.memory[name].astype(ml_dtypes.bfloat16) for name in inputs}
    for name, array in every.items():
        refused(case, name, words, case.run, plan, **{name: array})
    refused(case, first, words, case.run, plan, **every)


@pytest.mark.parametrize(("kind", "backend"), [call for call in CALLS if call[0] != "mla"])
def test_layouts(kind, backend):
    case, plan = planned(kind, backend)
    names = case.run_names[1:3]
    hnd = {name: case.memory[name].swapaxes(-3, -2).copy() for name in names}
    words = "as planned|num_kv_heads = 2|page_size = 4|heads"
    refused(case, None, words, case.run, plan, **hnd)
    refused(case, None, words, case.run, plan, kv_layout="HND")
    for name in names:
        refused(case, None, "", case.run, plan, **{name: hnd[name]})
    for value in ("nhd", "", None, 0, b"NHD", ["NHD"], np.array(["NHD", "HND"]), np.ones(2)):
        refused(case, "kv_layout", "expected 'NHD' or 'HND'", case.run, plan, kv_layout=value)
    case.run(plan, **hnd, kv_layout="HND")
    case.check()


@pytest.mark.parametrize("kind", PAGED)
def test_caches(kind):
    case, plan = planned(kind)
    top = int(case.indices.max())
    caches = {n: case.memory[n] for n in case.run_names if "cache" in n}
    for name, cache in caches.items():
        other = changed(cache, shape=(len(cache), PAGE - 1, *cache.shape[2:]))
        refused(case, name, f"page_size = {PAGE}", case.run, plan, **{name: other})
    few = {name: cache[:top] for name, cache in caches.items()}
    words = f"expected num_pages of at least {top + 1}, as planned"
    refused(case, next(iter(caches)), words, case.run, plan, **few)
    if kind != "mla":
        wide = np.zeros((PAGES, 2, PAGE, KV_HEADS, DIM), np.float16)[:, 0]
        words = r"got strides \(1024, .* expected \(512, .* those of `paged_k_cache`"
        refused(case, "paged_v_cache", words, case.run, plan, paged_v_cache=wide)
    case.run(plan, **{name: cache[: top + 1] for name, cache in caches.items()})
    case.check()


def test_fewer_keys_than_planned():
    case, plan = planned("ragged")
    few = {name: case.memory[name][:-1] for name in ("k", "v")}
    words = r"got float16\[22, 2, 64\] .* expected nnz_kv of at least 23, as planned"
    refused(case, "k", words, case.run, plan, **few)
    refused(case, "v", "nnz_kv = 23", case.run, plan, v=few["v"])


@pytest.mark.parametrize("kind", PAGED)
def test_pages_that_a_run_brings(kind):
    case, name = Case(kind), RUN_INDICES[kind]
    words = "got an array, expected None: the plan has them"
    refused(case, name, words, case.run, case.plan(), **{name: case.indices})
    plan = case.plan(**{next(n for n in case.arrays if n.endswith("indices")): None})
    for wrong, words in (
        (None, "got None, expected an array on the device"),
        (case.indices[:-1], "expected num_indices of at least 8, as planned"),
        (case.indices.astype(np.int64), "got int64, expected int32"),
        (case.indices[None], "expected rank 1"),
        (np.repeat(case.indices, 2)[::2], "expected a contiguous tensor"),
        (changed(case.indices, device="cuda:0"), "got cuda:0, expected cpu"),
        (changed(case.indices, ptr=0), "not null"),
        ([0, 1], "builtins.list"),
    ):
        refused(case, name, words, case.run, plan, **{name: wrong})
    case.run(plan, **{name: case.indices})
    case.check()
    case.replan(plan)  # with pages: runs bring none any more
    words = "got an array, expected None: the plan has them"
    refused(case, name, words, case.run, plan, **{name: case.indices})
    case.run(plan)
    case.check()


NOT_NUMBERS = (True, "1", b"1", [1.0], 1j, object())
NUMBERS = {
    "sm_scale": (0, -0.1), "q_scale": (0, -1.0), "k_scale": (0.0, -1), "v_scale": (),
    "rope_scale": (0, -1.0, 1e-40), "rope_theta": (0, -1.0, 1e-320), "logits_soft_cap": (-1.0,),
}  # fmt: skip


def numbers_of(kind: str, backend: str) -> set[str]:
    """The numbers that a call has."""
    rope = {"rope_scale", "rope_theta"} if backend != "fa3" else set()
    if kind == "mla":
        return {"sm_scale"}
    lacking = {"v_scale"} if kind.endswith("decode") else set()
    lacking |= set() if kind in SINGLES else {"logits_soft_cap"}
    return {"sm_scale", "q_scale", "k_scale", "v_scale", "logits_soft_cap", *rope} - lacking


@EVERY_CALL
def test_numbers(kind, backend):
    for name in sorted(numbers_of(kind, backend)):
        options = {"pos_encoding_mode": "ROPE_LLAMA"} if name.startswith("rope") else {}
        case, plan = planned(kind, backend, **options)
        words = "" if kind in SINGLES else "number"
        for value in (*NOT_NUMBERS, float("nan"), float("inf"), 10**400, *NUMBERS[name]):
            error = refused(case, name, words, case.run, plan, **{name: value})
            assert isinstance(error, fi_ffi.ArgumentTypeError) == (value in NOT_NUMBERS)


@pytest.mark.parametrize("kind", KINDS)
def test_flags_and_unknown_words(kind):
    case, plan = planned(kind)
    name = "return_lse_base_on_e" if kind == "mla" else "enable_pdl"
    for value in (None, 1, "yes", np.True_):
        refused(case, name, "expected bool", case.run, plan, **{name: value})
    before = case.bytes()
    for word in ("temperature", "window_left", "maybe_lse"):
        with pytest.raises(TypeError, match=f"{case.op}.*'{word}'"):
            case.run(plan, **{word: 1})
    with pytest.raises(TypeError):
        (plan.run if kind in ("decode", "mla") else plan.ragged_run)()
    assert case.bytes() == before


def test_the_other_kind_of_run():
    ragged, paged = Case("ragged"), Case("paged")
    tensors = [paged.memory[name] for name in paged.run_names]
    words = "got paged_run, expected ragged_run"
    refused(ragged, "self", words, ragged.plan().paged_run, *tensors)
    tensors = [ragged.memory[name] for name in ragged.run_names]
    words = "got ragged_run, expected paged_run"
    refused(paged, "self", words, paged.plan().ragged_run, *tensors)
    paged = Case("paged", page_size=1, use_multi_item_scoring=True)
    paged.indices, paged.page_indptr = np.arange(23, dtype=np.int32), np.int32([0, 7, 12, 14, 23])
    paged.last[:] = 1
    words = "paged_run: only that has multi-item scoring"
    refused(paged, "self", words, paged.plan().ragged_run, *tensors)


@pytest.mark.parametrize("kind", KINDS)
def test_memory_of_a_gpu(kind, gpu):
    case = Case(kind)
    there = {name: changed(array, device="cuda:0") for name, array in case.memory.items()}

    def planned_there(**more: Any) -> Any:
        workspace = fi_ffi.Workspace(there["float"], there["int"], case.memory["staging"])
        return case.plan(workspace=workspace, device=None, stream=gpu.stream, **more)

    plan, tensors = planned_there(), {name: there[name] for name in case.run_names}
    tensors["stream"] = gpu.stream
    assert str(plan.device) == "cuda:0"
    for name in case.run_names:
        for device in ("cpu", "cuda:1"):
            wrong = tensors | {name: changed(case.memory[name], device=device)}
            refused(case, name, f"got {device}, expected cuda:0", case.run, plan, **wrong)
    case.run(plan, **tensors)
    case.check()
    if kind in PAGED:
        plan = planned_there(**{n: None for n in case.arrays if n.endswith("indices")})
        given, words = {RUN_INDICES[kind]: case.indices}, "got cpu, expected cuda:0"
        refused(case, RUN_INDICES[kind], words, case.run, plan, **tensors, **given)


# Options of runs that the plan was not made for, or that the kernels lack.


def wrong_arrays(array: np.ndarray) -> Wrong:
    """What is wrong about an array of so many elements, by itself."""
    yield array[:-1], ""
    yield np.append(array, array[-1:]), ""
    yield array[None], ""
    yield array.astype(np.float64), f"got float64, expected {array.dtype}"
    yield np.repeat(array, 2)[::2], "contiguous"
    yield changed(array, device="cuda:0"), "got cuda:0, expected cpu"
    yield changed(array, ptr=0), "not null"
    if array.itemsize > 1:
        yield changed(array, ptr=fi_ffi.as_desc(array).ptr + 1), "multiple of"
    yield "array", "str"


_BYTES = sum((q * kv + 7) // 8 for q, kv in ((3, 7), (1, 5), (0, 2), (5, 9)))
_ITEMS = {
    "prefix_len_ptr": np.uint32([4, 4, 2, 4]), "token_pos_in_items_ptr": np.zeros(20, np.uint16),
    "token_pos_in_items_len": 5, "max_item_len_ptr": np.uint16([1, 1, 1, 1]),
}  # fmt: skip
# Kinds and backends, the options of a plan, and what its runs bring for them.
BROUGHT = [
    *((kind, "fa2", {"use_custom_mask": True}, {"custom_mask": np.full(_BYTES, 255, np.uint8)})
      for kind in PREFILL),
    *((kind, "", {"pos_encoding_mode": "ALIBI"}, {"alibi_slopes": SLOPES})
      for kind in (*PREFILL, "decode", *SINGLES)),
    *((kind, backend, {"use_attention_sink": True}, {"sink": SLOPES})
      for kind in PREFILL for backend in ("fa2", "fa3")),
    *(("paged", backend, {"use_multi_item_scoring": True}, _ITEMS) for backend in ("fa2", "fa3")),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "backend", "options", "brought"), BROUGHT, ids=str)
def test_what_runs_bring(kind, backend, options, brought):
    case, plain = planned(kind, backend)
    plan, (option,) = case.plan(**options), options
    for name, array in brought.items():
        for value, words in wrong_arrays(array) if isinstance(array, np.ndarray) else ():
            refused(case, name, words, case.run, plan, **brought | {name: value})
        number = 3.0 if isinstance(array, int) else 3
        refused(case, name, "int", case.run, plan, **brought | {name: number})
        without = {key: value for key, value in brought.items() if key != name}
        refused(case, name, f"got None.*{option}", case.run, plan, **without)
        refused(case, name, f"None.*{option}", case.run, plain, **{name: array})
    case.run(plan, **brought)


def test_lengths_of_what_runs_bring():
    for kind in PREFILL:
        case = Case(kind)
        plan = case.plan(use_custom_mask=True)
        for size in (0, _BYTES - 1, _BYTES + 1, 8 * _BYTES):
            words = rf"got uint8\[{size}\] .*expected {_BYTES} bytes, as the lengths say"
            mask = np.zeros(size, np.uint8)
            refused(case, "custom_mask", words, case.run, plan, custom_mask=mask)
        case.run(plan, custom_mask=np.full(_BYTES, 255, np.uint8))
        case.check(mask=None)
    case, name = Case("paged"), "token_pos_in_items_len"
    plan = case.plan(use_multi_item_scoring=True)
    for value in (-1, 2**31, True, 1.0, "5"):
        refused(case, name, "int", case.run, plan, **_ITEMS | {name: value})
    for value in (0, 4, 6):
        words = rf"got uint16\[20\] .*expected {4 * value} positions: {name} for each of 4"
        given = _ITEMS | {name: value}
        refused(case, "token_pos_in_items_ptr", words, case.run, plan, **given)


@pytest.mark.parametrize("kind", [*PREFILL, "decode", *SINGLES])
def test_rope_that_was_not_planned(kind):
    for name in ("rope_scale", "rope_theta"):
        for mode in ("NONE", "ALIBI"):
            case, plan = planned(kind, pos_encoding_mode=mode)
            words = "got 1.0, expected None without pos_encoding_mode='ROPE_LLAMA'"
            refused(case, name, words, case.run, plan, **{name: 1.0})


_LACKS = "expected None: fa2 lacks it \\(backend='fa3' {}has it\\)"
_NONE_HAS = r"got ndarray, expected None: .*\(none of these kernels has it\)"
_EACH_Q, _EACH_K = np.ones(HEADS, np.float32), np.ones(KV_HEADS, np.float32)
# Kinds, backends, scales that these lack, and who has them.
SCALES = [
    *((kind, "fa2", "v_scale", value, _LACKS.format("")) for value in (0.5, _EACH_K)
      for kind in (*PREFILL, "single_prefill")),
    *((kind, "fa2", "q_scale", _EACH_Q, _LACKS.format("with fp8 queries "))
      for kind in (*PREFILL, "single_prefill")),
    ("paged", "fa3", "k_scale", _EACH_K, r"\(backend='fa3' with fp8 queries has it\)"),
    ("decode", "", "q_scale", _EACH_Q, _NONE_HAS),
    ("decode", "", "k_scale", _EACH_K, _NONE_HAS),
]  # fmt: skip


def test_scales_that_kernels_lack():
    for kind, backend, name, value, words in SCALES:
        case, plan = planned(kind, backend)
        refused(case, name, words, case.run, plan, **{name: value})
    case, plan = planned("paged", "fa2")
    case.run(plan, v_scale=1)
    case.check()


@pytest.mark.parametrize("kind", PREFILL)
def test_scales_of_fp8(kind):
    case = Case(kind, q_data_type=E4M3, head_dim_qk=128)
    for name in set(case.run_names) - {"o", "lse"}:
        shape = (*case.memory[name].shape[:-1], 128)
        case.memory[name] = case.rng.standard_normal(shape).astype(FP8)
    case.memory["o"] = np.full(case.memory["q"].shape, np.nan, np.float16)
    plan = case.plan()
    assert plan.backend == "fa3"
    for name, scales in (("q_scale", _EACH_Q), ("k_scale", _EACH_K), ("v_scale", _EACH_K)):
        for value, words in wrong_arrays(scales):
            refused(case, name, words, case.run, plan, **{name: value})
        for value in (True, float("nan"), 10**400, *((0, -1.0) if name != "v_scale" else ())):
            refused(case, name, "number", case.run, plan, **{name: value})
        case.run(plan, **{name: scales})
        assert np.isfinite(case.memory["o"]).all()
    for name in ("q", *case.run_names[1:3]):
        other = case.memory[name].astype(np.float16)
        refused(case, name, f"got float16, expected {E4M3}", case.run, plan, **{name: other})
    for dtype in ("bfloat16", E4M3):
        other = changed(case.memory["o"], dtype=dtype)
        refused(case, "o", f"got {dtype}, expected float16", case.run, plan, o=other)


def test_keys_of_other_dtypes():
    case, plan = planned("paged", kv_data_type=E4M3)
    names = ("paged_k_cache", "paged_v_cache")
    for other in (np.float16, ml_dtypes.float8_e5m2, ml_dtypes.bfloat16):
        caches = {n: case.memory[n].astype(other) for n in names}
        refused(case, names[0], f"expected {E4M3}", case.run, plan, **caches)
    case.run(plan, **{n: case.memory[n].astype(FP8) for n in names})
    assert np.isfinite(case.memory["o"]).all() and case.memory["o"].shape[-1] == DIM


# Calls for one request.


@pytest.mark.parametrize("op", SINGLES)
def test_options_of_one_request(op):
    case = Single(op)
    for value in (-2, 2**31, 1.0, True, None, "1"):
        refused(case, "window_left", "int", case.run, window_left=value)
    for value in ("none", "", None, 0, "ROPE"):
        refused(case, "pos_encoding_mode", "'NONE'", case.run, pos_encoding_mode=value)
    both = {"pos_encoding_mode": "ALIBI", "alibi_slopes": SLOPES, "logits_soft_cap": 1.0}
    refused(case, "logits_soft_cap", "ALIBI", case.run, **both)
    for name in ("causal", "use_fp16_qk_reduction") if op == "single_prefill" else ():
        for value in (None, 1, "yes", np.True_):
            refused(case, name, "expected bool", case.run, **{name: value})
    before = case.bytes()
    with pytest.raises(TypeError, match=rf"{op}\(\) .*'page_size'"):
        case.run(page_size=1)
    with pytest.raises(TypeError, match=rf"{op}\(\) missing"):
        getattr(fi_ffi, op)()
    assert case.bytes() == before
    for dtype in ("int32", "bfloat16"):
        for name in ("q", "k", "v"):
            # With queries of one dtype and keys of another it is no backend that has it.
            argument = name if dtype == "int32" or name == "v" else None
            other = changed(case.memory[name], dtype=dtype)
            refused(case, argument, f"{dtype}|bf16", case.run, **{name: other})


def test_masks_and_backends_of_one_request():
    case = Single("single_prefill")
    need = (case.queries * case.keys + 7) // 8
    mask = np.full(need, 255, np.uint8)
    for size in (0, need - 1, need + 1, case.queries * case.keys):
        words = f"expected {need} bytes: see pack_custom_mask"
        refused(case, "custom_mask", words, case.run, custom_mask=np.resize(mask, size))
    for wrong in (mask[None], mask.astype(bool), np.repeat(mask, 2)[::2], 3, "mask"):
        refused(case, "custom_mask", "", case.run, custom_mask=wrong)
    refused(case, "causal", "False with custom_mask", case.run, custom_mask=mask, causal=True)
    for given, words in (
        ({"backend": "fa4"}, "got 'fa4', expected 'auto' or 'fa2' or 'fa3'"),
        ({"backend": None}, "got None"),
        ({"custom_mask": mask, "backend": "fa3"}, "'fa3', expected 'fa2': fa3 has no custom masks"),
        ({"pos_encoding_mode": "ALIBI", "backend": "fa3"}, "'fa2': fa3 has no pos_encoding_mode"),
        ({"use_fp16_qk_reduction": True, "backend": "fa3"}, "'fa2': fa3 has no use_fp16"),
    ):
        refused(case, "backend", words, case.run, **given)
    few = {name: case.memory[name][: case.queries - 1] for name in "kv"}
    for given in ({"causal": True}, {"pos_encoding_mode": "ROPE_LLAMA"}):
        refused(case, "k", "expected 5 keys or more", case.run, **few, **given)
    case.run(**few)
    case.run(custom_mask=mask)
    case.check()


def test_dtypes_and_heads_of_one_request():
    case = Single("single_prefill", FP8)
    words = f"got 'fa2', expected what a backend has: fa2 has no {E4M3} queries; fa3 has head"
    refused(case, "backend", words, case.run, backend="fa2")
    mixed = case.memory["k"].astype(np.float16)
    refused(case, None, "", case.run, k=mixed)
    case = Single("single_decode", FP8)
    refused(case, "q", "float16 or bfloat16", case.run)
    case = Single("single_prefill", heads=3)
    refused(case, None, "multiple of num_kv_heads = 2", case.run)
    for heads in (3, 10, 12, 14, 32):
        case = Single("single_decode", heads=heads)
        words = "expected 1, 2, 3, 4, 8 heads for each of k's 2; single_prefill has any"
        refused(case, "q", words, case.run)


@pytest.mark.parametrize("op", SINGLES)
def test_room_for_partial_results(op, monkeypatch):
    case, name = Single(op), f"{op}_workspace_size"
    function, keys = getattr(fi_ffi, name), 70 * case.keys
    for key in "kv":
        case.memory[key] = np.tile(case.memory[key], (70, 1, 1))
    sizes = {"kv_len": keys, "num_qo_heads": HEADS, "num_kv_heads": KV_HEADS, "device": 0}
    sizes |= {"head_dim": DIM} if op == "single_decode" else {"qo_len": 5, "head_dim_vo": DIM}
    monkeypatch.setattr(machine, "multiprocessors", lambda index: 1)
    need = function(**sizes)
    assert need > 64
    for have in (64, need - 1):
        words = f"got {have} bytes, expected {need} bytes or more, as {name} tells"
        refused(case, "tmp", words, case.run, tmp=np.zeros(have, np.uint8))
    case.run(tmp=np.zeros(need, np.uint8))
    case.check()
    case.op = name
    for argument in sizes:
        for value in (-1, 1.5, "1", None, True, 2**31, *((0,) if "heads" in argument else ())):
            refused(case, argument, "int", function, **sizes | {argument: value})
    refused(case, "num_qo_heads", "multiple", function, **sizes | {"num_qo_heads": 3})
