"""Wrong arguments of a plan's runs and of calls for one request: a typed error that names them,
and nothing written."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
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
    yield None, "got None"
    yield "q", "got str 'q'"
    yield 7, "got int 7"
    yield [1.0], "got list"
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


# What is wrong of one run: kinds and backends, options, the argument, words, and what it is given.


def longer_first(case: Any, change: int) -> dict[str, Any]:
    """Queries and outputs of another number: all agree with each other, and not with the plan."""
    names = (case.run_names[0], "o", "lse")
    first = case.memory[names[0]].shape[0] + change
    return {n: changed(case.memory[n], shape=(first, *case.memory[n].shape[1:])) for n in names}


def first_of(case: Any) -> str:
    return case.run_names[0]


def as_hnd(case: Any, *places: int) -> dict[str, np.ndarray]:
    names = (case.run_names[place] for place in places)
    return {name: case.memory[name].swapaxes(-3, -2).copy() for name in names}


def caches(case: Any, last: int) -> dict[str, np.ndarray]:
    """The caches' pages up to the last that is used, and some more or less."""
    end = int(case.indices.max()) + 1 + last
    return {n: case.memory[n][:end] for n in case.run_names if "cache" in n}


def thinner_pages(case: Any, name: str) -> dict[str, Any]:
    pages, _, *rest = case.memory[name].shape
    return {name: changed(case.memory[name], shape=(pages, PAGE - 1, *rest))}


def in_dtype(case: Any, dtype: Any, *names: str) -> dict[str, np.ndarray]:
    return {name: case.memory[name].astype(dtype) for name in names}


def inputs(case: Any) -> list[str]:
    return [name for name in case.run_names if name not in ("o", "lse")]


_PAGED = [(kind, "") for kind in PAGED]
_BOTH = [(kind, "fa2") for kind in (*PREFILL, "single_prefill")]
_WITH_HEADS = [call for call in CALLS if call[0] != "mla"]
_DECODE = [("decode", "")]
_ONE, _PREFILL_1, _DECODE_1 = ([(op, "") for op in ops] for ops in (SINGLES, *zip(SINGLES)))
_LACKS = "expected None: fa2 lacks it \\(backend='fa3' {}has it\\)"
_NONE_HAS = r"got ndarray, expected None: .*\(none of these kernels has it\)"
_EACH_Q, _EACH_K = np.ones(HEADS, np.float32), np.ones(KV_HEADS, np.float32)
_OTHER = "as planned|num_kv_heads = 2|page_size = 4|heads"
_MASK = {"use_custom_mask": True}
_ITEM, _POSITIONS = "token_pos_in_items_len", "token_pos_in_items_ptr"
_NEED = (Single.queries * Single.keys + 7) // 8
_FULL = np.full(_NEED, 255, np.uint8)
_ALIBI = {"pos_encoding_mode": "ALIBI", "alibi_slopes": SLOPES}
_FEW = {"causal": True}, {"pos_encoding_mode": "ROPE_LLAMA"}
_KV = ("paged_k_cache", "paged_v_cache")
_INDICES = {"paged": "paged_kv_indices", "decode": "indices", "mla": "kv_indices"}
WRONG: list[tuple[Any, dict[str, Any], Any, str, Any]] = [
    # Other sizes, dtypes and layouts than were planned.
    *((calls, {}, first_of, f"expected {rows}, as planned", partial(longer_first, change=change))
      for calls, rows in ((PLANNED[:-1], "nnz_qo = 9"), (_DECODE, "b = 4")) for change in (-1, 1)),
    (PLANNED, {}, first_of, "got bfloat16, expected float16",
     lambda c: in_dtype(c, ml_dtypes.bfloat16, *inputs(c))),
    *((PLANNED, {}, lambda c, i=i: inputs(c)[i], "got bfloat16, expected float16",
       lambda c, i=i: in_dtype(c, ml_dtypes.bfloat16, inputs(c)[i])) for i in (0, -1)),
    *((_WITH_HEADS, {}, None, words, lambda c, places=places: as_hnd(c, *places))
      for places, words in (((1, 2), _OTHER), ((1,), ""), ((2,), ""))),
    (_WITH_HEADS, {}, None, _OTHER, {"kv_layout": "HND"}),
    *((_WITH_HEADS, {}, "kv_layout", "expected 'NHD' or 'HND'", {"kv_layout": value})
      for value in ("nhd", "", None, 0, b"NHD", ["NHD"], np.array(["NHD", "HND"]), np.ones(2))),
    *((_PAGED, {}, lambda c, i=i: [*caches(c, 0)][i], f"page_size = {PAGE}",
       lambda c, i=i: thinner_pages(c, [*caches(c, 0)][i])) for i in (0, 1)),
    (_PAGED, {}, lambda c: next(iter(caches(c, 0))),
     r"expected num_pages of at least \d+, as planned", partial(caches, last=-1)),
    (_PAGED[:2], {}, "paged_v_cache",
     r"got strides \(1024, .* expected \(512, .* those of `paged_k_cache`",
     {"paged_v_cache": np.zeros((PAGES, 2, PAGE, KV_HEADS, DIM), np.float16)[:, 0]}),
    ([("ragged", "")], {}, "k",
     r"got float16\[22, 2, 64\] .* expected nnz_kv of at least 23, as planned",
     lambda c: {name: c.memory[name][:-1] for name in ("k", "v")}),
    ([("ragged", "")], {}, "v", "nnz_kv = 23", lambda c: {"v": c.memory["v"][:-1]}),
    *(([("paged", "")], {"kv_data_type": E4M3}, _KV[0], f"expected {E4M3}",
       lambda c, other=other: in_dtype(c, other, *_KV))
      for other in (np.float16, ml_dtypes.float8_e5m2, ml_dtypes.bfloat16)),
    # Pages that a run brings, or is to bring.
    *(([(kind, "")], options, name, words, lambda c, name=name, of=of: {name: of(c.indices)})
      for kind, name in RUN_INDICES.items() for options, words, of in (
        ({}, "got an array, expected None: the plan has them", lambda x: x),
        *(({_INDICES[kind]: None}, *wrong) for wrong in (
            ("got None, expected an array on the device", lambda x: None),
            ("expected num_indices of at least 8, as planned", lambda x: x[:-1]),
            ("got int64, expected int32", lambda x: x.astype(np.int64)),
            ("expected rank 1", lambda x: x[None]),
            ("expected a contiguous tensor", lambda x: np.repeat(x, 2)[::2]),
            ("got cuda:0, expected cpu", lambda x: changed(x, device="cuda:0")),
            ("not null", lambda x: changed(x, ptr=0)), ("got list", lambda x: [0, 1]))))),
    # Masks, items, positions and scales.
    *(([(kind, "")], _MASK, "custom_mask",
       rf"got uint8\[{size}\] .*expected {_BYTES} bytes, as the lengths say",
       {"custom_mask": np.zeros(size, np.uint8)})
      for kind in PREFILL for size in (0, _BYTES - 1, _BYTES + 1, 8 * _BYTES)),
    *(([("paged", "")], {"use_multi_item_scoring": True}, _ITEM, "int", _ITEMS | {_ITEM: value})
      for value in (-1, 2**31, True, 1.0, "5")),
    *(([("paged", "")], {"use_multi_item_scoring": True}, _POSITIONS,
       rf"got uint16\[20\] .*expected {4 * value} positions: {_ITEM} for each of 4",
       _ITEMS | {_ITEM: value}) for value in (0, 4, 6)),
    *(([("paged", "")], {"use_multi_item_scoring": True}, _POSITIONS,
       r"expected 24 positions: .*, or 23 and more: the last has 5 queries",
       _ITEMS | {_ITEM: 6, _POSITIONS: np.zeros(count, np.uint16)}) for count in (22, 25)),
    ([("paged", "")], {"use_multi_item_scoring": True, "enable_cuda_graph": True}, _POSITIONS,
     r"expected 24 positions: token_pos_in_items_len for each of 4 requests$",
     _ITEMS | {_ITEM: 6, _POSITIONS: np.zeros(23, np.uint16)}),
    *(([(kind, "") for kind in (*PREFILL, "decode", *SINGLES)], {"pos_encoding_mode": mode}, name,
       "got 1.0, expected None without pos_encoding_mode='ROPE_LLAMA'", {name: 1.0})
      for name in ("rope_scale", "rope_theta") for mode in ("NONE", "ALIBI")),
    *((_BOTH, {}, "v_scale", _LACKS.format(""), {"v_scale": value}) for value in (0.5, _EACH_K)),
    (_BOTH, {}, "q_scale", _LACKS.format("with fp8 queries "), {"q_scale": _EACH_Q}),
    ([("paged", "fa3")], {}, "k_scale", r"\(backend='fa3' with fp8 queries has it\)",
     {"k_scale": _EACH_K}),
    (_DECODE, {}, "q_scale", _NONE_HAS, {"q_scale": _EACH_Q}),
    (_DECODE, {}, "k_scale", _NONE_HAS, {"k_scale": _EACH_K}),
    # Calls for one request.
    *((_ONE, {}, "window_left", "int", {"window_left": value})
      for value in (-2, 2**31, 1.0, True, None, "1")),
    *((_ONE, {}, "pos_encoding_mode", "'NONE'", {"pos_encoding_mode": value})
      for value in ("none", "", None, 0, "ROPE")),
    (_ONE, {}, "logits_soft_cap", "ALIBI", _ALIBI | {"logits_soft_cap": 1.0}),
    *((_PREFILL_1, {}, name, "expected bool", {name: value})
      for name in ("causal", "use_fp16_qk_reduction") for value in (None, 1, "yes", np.True_)),
    # With queries of one dtype and keys of another it is no backend that has it.
    *((_ONE, {}, name if dtype == "int32" or name == "v" else None, f"{dtype}|bf16",
       lambda c, name=name, dtype=dtype: {name: changed(c.memory[name], dtype=dtype)})
      for dtype in ("int32", "bfloat16") for name in ("q", "k", "v")),
    *((_PREFILL_1, {}, "custom_mask", f"expected {_NEED} bytes: see pack_custom_mask",
       {"custom_mask": np.resize(_FULL, size)})
      for size in (0, _NEED - 1, _NEED + 1, Single.queries * Single.keys)),
    *((_PREFILL_1, {}, "custom_mask", "", {"custom_mask": wrong})
      for wrong in (_FULL[None], _FULL.astype(bool), np.repeat(_FULL, 2)[::2], 3, "mask")),
    (_PREFILL_1, {}, "causal", "False with custom_mask", {"custom_mask": _FULL, "causal": True}),
    *((_PREFILL_1, {}, "backend", words, given) for given, words in (
        ({"backend": "fa4"}, "got 'fa4', expected 'auto' or 'fa2' or 'fa3'"),
        ({"backend": None}, "got None"),
        ({"custom_mask": _FULL, "backend": "fa3"},
         "'fa3', expected 'fa2': fa3 has no custom masks"),
        ({"pos_encoding_mode": "ALIBI", "backend": "fa3"}, "'fa2': fa3 has no pos_encoding_mode"),
        ({"use_fp16_qk_reduction": True, "backend": "fa3"}, "'fa2': fa3 has no use_fp16"))),
    *((_PREFILL_1, {}, "k", "expected 5 keys or more",
       lambda c, more=more: {n: c.memory[n][: c.queries - 1] for n in "kv"} | more)
      for more in _FEW),
    (_PREFILL_1, {"dtype": FP8}, "backend",
     f"got 'fa2', expected 'fa3': fa2 has no {E4M3} queries", {"backend": "fa2"}),
    (_PREFILL_1, {"dtype": FP8}, None, "", lambda c: in_dtype(c, np.float16, "k")),
    (_DECODE_1, {"dtype": FP8}, "q", "float16 or bfloat16", {}),
    (_PREFILL_1, {"heads": 3}, None, "multiple of num_kv_heads = 2", {}),
    *((_DECODE_1, {"heads": heads}, "q",
       "expected 1, 2, 3, 4, 6, 8, 16 heads for each of k's 2; single_prefill has any", {})
      for heads in (3, 10, 14, 18)),
]  # fmt: skip


def _by_kind():
    """The rows of each kind of call and backend."""
    found = {}
    for calls, *row in WRONG:
        for call in calls:
            found.setdefault(" ".join(filter(None, call)), (call, []))[1].append(row)
    return found


@pytest.mark.parametrize(("call", "rows"), _by_kind().values(), ids=_by_kind())
def test_is_refused(call, rows):
    for options, argument, words, change in rows:
        case, plan = planned(*call, **options)
        given = change(case) if callable(change) else change
        name = argument(case) if callable(argument) else argument
        refused(case, name, words, case.run, plan, **given)


def test_what_is_next_to_it_is_fine():
    for kind, backend in _WITH_HEADS:
        case, plan = planned(kind, backend)
        case.run(plan, **as_hnd(case, 1, 2), kv_layout="HND")
        case.check()
    for kind in PAGED:
        case, plan = planned(kind)
        case.run(plan, **caches(case, 0))
        case.check()
        case, plan = planned(kind, **{_INDICES[kind]: None})
        case.run(plan, **{RUN_INDICES[kind]: case.indices})
        case.check()
        # With pages: runs bring none any more.
        case.replan(plan, **{_INDICES[kind]: case.indices})
        words, given = "got an array, expected None: the plan has them", {
            RUN_INDICES[kind]: case.indices
        }  # fmt: skip
        refused(case, RUN_INDICES[kind], words, case.run, plan, **given)
        case.run(plan)
        case.check()
    for kind in PREFILL:
        case, plan = planned(kind, use_custom_mask=True)
        case.run(plan, custom_mask=np.full(_BYTES, 255, np.uint8))
        case.check(mask=None)
    case, plan = planned("paged", "fa2")
    case.run(plan, v_scale=1)
    case.check()
    case, plan = planned("paged", kv_data_type=E4M3)
    case.run(plan, **in_dtype(case, FP8, *_KV))
    assert np.isfinite(case.memory["o"]).all()
    case = Single("single_prefill")
    case.run(**{name: case.memory[name][: case.queries - 1] for name in "kv"})
    case.run(custom_mask=_FULL)
    case.check()


@pytest.mark.parametrize("op", SINGLES)
def test_unknown_words_of_one_request(op):
    case = Single(op)
    before = case.bytes()
    with pytest.raises(TypeError, match=rf"{op}\(\) .*'page_size'"):
        case.run(page_size=1)
    with pytest.raises(TypeError, match=rf"{op}\(\) missing"):
        getattr(fi_ffi, op)()
    assert case.bytes() == before


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
