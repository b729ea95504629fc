"""Plans that cannot be made, or made anew: a typed error that names why, and nothing written."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, get_type_hints

import numpy as np
import pytest

import fi_ffi
from fi_ffi.abi._cffi import ffi
from fi_ffi.abi.function import make_array
from fi_ffi.abi.library import address_of
from fi_ffi.loader import machine
from fi_ffi.ops.attention import sizes
from fi_ffi.ops.attention.schedule import Planner

from tests.helpers.plan_calls import (
    KEYWORDS,
    KINDS,
    KV_HEADS,
    KV_LENS,
    OPTIONS,
    PAGE,
    PAGED,
    PAGES,
    QO_LENS,
    RUN_INDICES,
    Case,
    aligned,
    changed,
    refused,
)
from tests.helpers.remains import allowed

E4M3, E5M2 = "float8_e4m3fn", "float8_e5m2"
PREFILL = ("ragged", "paged")
ARRAYS = [(kind, name) for kind in KINDS for name in Case(kind).arrays]
FIRST = {kind: next(iter(Case(kind).arrays)) for kind in KINDS}
PAGE_INDPTR = {"paged": "paged_kv_indptr", "decode": "indptr", "mla": "kv_indptr"}
INDICES = {"paged": "paged_kv_indices", "decode": "indices", "mla": "kv_indices"}
Wrong = Iterator[tuple[Any, str]]


@pytest.mark.parametrize("kind", KINDS)
def test_batches_of_other_numbers_of_requests(kind):
    case = Case(kind)
    plan = case.plan()
    case.run(plan)
    for qo_lens, kv_lens in (((2, 4), (4, 9)), ((1,) * 9, (3,) * 9), (QO_LENS, KV_LENS)):
        other = Case(kind, qo_lens, kv_lens)
        other.replan(plan)
        other.run(plan)
        other.check()


# Index arrays.


def wrong_arrays(array: np.ndarray) -> Wrong:
    """No int32 on the host side by side; and what is said of it."""
    apart = np.repeat(array, 2)[::2]
    yield array.astype(np.int64), "got int64, expected int32"
    yield array.astype(np.uint32), "got uint32, expected int32"
    yield array.astype(np.float32), "got float32, expected int32"
    yield array.astype(">i4"), "got dtype >i4"
    yield array[None], "contiguous array of rank 1"
    yield array[0:1].reshape(()), "contiguous array of rank 1"
    yield apart, r"strides=\(2,\).*contiguous array of rank 1"
    yield array[::-1], r"strides=\(-1,\).*contiguous array of rank 1"
    yield changed(array, device="cuda:0"), "got cuda:0, .* an array on the host"
    yield changed(array, device="cuda_managed:0"), "expected an array on the host"
    yield changed(array, ptr=0), "got 0x0, .* not null"
    yield changed(array, ptr=fi_ffi.as_desc(array).ptr + 2), "multiple of 4 bytes"
    yield array.tolist(), "got list"
    yield 3, "got int 3"
    yield "0123", "got str '0123'"
    yield np.zeros(0, np.int32), "got 0 elements"


def at(array: np.ndarray, place: int, value: int) -> np.ndarray:
    copy = array.copy()
    copy[place] = value
    return copy


def wrong_values(name: str, array: np.ndarray, is_first: bool) -> Wrong:
    """Right arrays of what cannot be."""
    if name.endswith("indices"):
        yield array[:-1].copy(), "got 7 elements, expected 8 pages"
        yield at(array, 3, -1), "got -1, expected pages from 0 on"
        return
    yield None, "None"
    if name.endswith("indptr"):
        yield array + 1, "got 1 first, expected 0 first"
        yield array - 1, "got -1 first, expected 0 first"
        yield at(array, 2, 0), r"got 0 after \d \(request 1\), .* do not decrease"
        yield at(array, 4, -1), r"got -1 after \d+ \(request 3\)"
        yield array[:1].copy(), "2 or more" if is_first else "5 elements"
    elif name.endswith("last_page_len"):
        for tokens in (0, -1, PAGE + 1, 2**31 - 1):
            words = f"got {tokens} for request 1 with 2 pages, expected from 1 to {PAGE}"
            yield at(array, 1, tokens), words
    else:
        for tokens in (-1, PAGE - 1, 2 * PAGE + 1, 2**31 - 1):
            yield at(array, 1, tokens), f"got {tokens} for request 1 with 2 pages of {PAGE}"


@pytest.mark.parametrize(("kind", "name"), ARRAYS)
def test_arrays(kind, name):
    case = Case(kind)
    plan, array, is_first = case.plan(), case.arrays[name], name == FIRST[kind]
    for value, words in [*wrong_arrays(array), *wrong_values(name, array, is_first)]:
        for call in (case.plan, partial(case.replan, plan)):
            refused(case, name, words, call, **{name: value})
    given = case.arrays | case.options | {name: array.astype(np.int64)}
    refused(case, name, "int64", case.cls.workspace_size, **given, device="cpu")
    if not name.endswith("indices"):
        more = [] if (kind, name) == ("mla", "kv_indptr") else [np.append(array, array[-1:])]
        for other in (array[:-1].copy(), *more):
            # The first array says how many there are; then it is the next that does not fit.
            argument = None if is_first else name
            refused(case, argument, "elements", case.plan, **{name: other})
    case.run(plan)
    case.check()


@pytest.mark.parametrize("kind", PAGED)
def test_pages_after_the_last_requests_are_not_looked_at(kind):
    case = Case(kind)
    more = np.concatenate([case.indices, np.full(5000, -1, np.int32)])
    case.run(case.plan(**{INDICES[kind]: more}))
    case.check()


def test_starts_after_the_last_requests_are_not_looked_at():
    """Of MLA, as FlashInfer calls it; they may decrease."""
    case = Case("mla")
    more = {"kv_indptr": np.append(case.page_indptr, np.int32([0, -1]))}
    plan = case.plan(**more)
    case.run(plan)
    case.check()
    other, longer = Case("paged"), {"paged_kv_indptr": more["kv_indptr"]}
    refused(other, "paged_kv_indptr", "got 7 elements, expected 5", other.plan, **longer)
    other = Case("mla", kv_lens=(5, 7, 9, 12))
    plan.replan(**other.arrays | {"kv_indptr": np.append(other.page_indptr, np.int32([1]))})
    other.run(plan)
    other.check()


def test_numbers_that_int32_does_not_hold():
    for kind in ("paged", "decode"):
        case = Case(kind)
        words = "2147483649 .* 2147483647 at most"
        refused(case, PAGE_INDPTR[kind], words, case.plan, page_size=2**30)
    case = Case("ragged")
    lens = {"qo_indptr": np.int32([0, 2**17]), "kv_indptr": np.int32([0, 2**18])}
    words = "4294967296 bytes"
    refused(case, "use_custom_mask", words, case.plan, **lens, use_custom_mask=True)


def test_arrays_of_the_other_kind_of_cache():
    ragged, paged = Case("ragged"), Case("paged")
    for name in list(paged.arrays)[1:]:
        array = {name: paged.arrays[name]}
        refused(ragged, name, "None without page_size", ragged.plan, **array)
    array = ragged.arrays["kv_indptr"]
    refused(paged, "kv_indptr", "None with page_size", paged.plan, kv_indptr=array)


@pytest.mark.parametrize("kind", KINDS)
def test_arrays_in_other_memory(kind):
    """Page-locked memory is the host's, and memory may be read-only."""
    case = Case(kind)
    for array in (case.page_indptr, case.indices, case.last):
        array.flags.writeable = False
    case.run(case.plan())
    case.check()
    given = case.arrays  # kept: descriptors by address own nothing
    case.run(case.plan(**{n: changed(a, device="cuda_host") for n, a in given.items()}))
    case.check()


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [(kind, "causal", True) for kind in ("ragged", "paged", "mla")]
    + [(kind, "pos_encoding_mode", "ROPE_LLAMA") for kind in PREFILL]
    + [("paged", "use_multi_item_scoring", True)],
)
def test_fewer_keys_than_queries_where_places_count(kind, name, value):
    case = Case(kind, qo_lens=(3, 1, 3, 5))
    words = f"3 queries and 2 keys in request 2, expected no fewer keys with {name}"
    refused(case, "qo_indptr", words, case.plan, **{name: value})
    case.run(case.plan())
    case.check()


# Options.

TYPES = {
    int: [1.5, 1.0, True, np.True_, "1", b"1", [1], 1j, np.ones(1, int)],
    float: [True, np.True_, "1", None, [1.0], 1j, np.ones(2)],
    bool: [0, 1, None, "yes", np.True_, 1.0, np.ones(1, bool)],
    str: [None, 1, b"fa2", ["fa2"], np.ones(1)],
}
VALUES = {
    int: [-2, -(2**63), 2**31, 2**63, 10**400],
    float: [float("nan"), float("inf"), -float("inf"), -1.0, 10**400, -(10**400)],
    bool: [],
    str: ["", "FA2", "none", "é"],
}


@pytest.mark.parametrize("kind", KINDS)
def test_options_of_wrong_types_and_values(kind):
    case = Case(kind)
    for name, hint in get_type_hints(KEYWORDS[kind]).items():
        type_ = int if hint == int | None else hint
        if type_ not in TYPES:
            continue
        for value in TYPES[type_]:
            error = refused(case, name, "", case.plan, **{name: value})
            assert isinstance(error, fi_ffi.ArgumentTypeError)
        low = [-1, 0] if type_ is int and name != "window_left" else []
        low = low[: 1 if name in ("num_colocated_ctas", "uniform_q_len") else None]
        for value in [*VALUES[type_], *low, *([None] if hint is type_ else [])]:
            refused(case, name, "", case.plan, **{name: value})


@pytest.mark.parametrize("kind", KINDS)
def test_dtypes(kind):
    case = Case(kind)
    for name in OPTIONS[kind].table.keys() & {"q_data_type", "kv_data_type", "o_data_type"}:
        for value in ("half", 1, "", False, 0, object(), ["float16"], np.zeros(2)):
            error = refused(case, name, "'float16'", case.plan, **{name: value})
            assert isinstance(error, fi_ffi.ArgumentTypeError)
        for value in ("float32", np.int32, fi_ffi.DTYPES["int8"]):
            refused(case, name, "expected .*float16", case.plan, **{name: value})
    refused(case, "q_data_type", "got None", case.plan, q_data_type=None)


@pytest.mark.parametrize("kind", KINDS)
def test_unknown_and_missing_keywords(kind):
    case = Case(kind)
    plan = case.plan()
    with pytest.raises(TypeError, match=rf"{case.op}\(\) .*'temperature'"):
        case.plan(temperature=1)
    for name in OPTIONS[kind].required:
        del case.options[name]
        with pytest.raises(TypeError, match=rf"{case.op}\(\) missing .*{name}"):
            case.plan()
    with pytest.raises(TypeError):
        case.cls(**case.options)
    with pytest.raises(TypeError, match="workspace"):
        case.cls.workspace_size(**case.arrays, **Case(kind).options, workspace=case.workspace())
    for word in ("page_size", "causal", "workspace"):
        with pytest.raises(TypeError, match=word):
            case.replan(plan, **{word: 1})
    with pytest.raises(TypeError, match="required"):
        plan.replan()
    case.run(plan)
    case.check()


@pytest.mark.parametrize("kind", KINDS)
def test_a_size_by_its_other_name(kind):
    """FlashInfer's decode says `head_dim`, its prefill `head_dim_qk`; a plan takes one of them."""
    case = Case(kind)
    own = [name for name in ("head_dim", "head_dim_qk") if name in case.options]
    for name in own:
        value, other = case.options.pop(name), {"head_dim", "head_dim_qk"}.difference(own).pop()
        plan = case.plan(**{other: value})
        assert getattr(plan.options, name) == value
        case.run(plan)
        case.check()
        with pytest.raises(TypeError, match=other):
            case.plan(**{name: value, other: value})
    assert own or kind == "mla"


@pytest.mark.parametrize("kind", KINDS)
def test_a_plan_is_prepared_by_its_run(kind):
    plan = Case(kind).plan()
    assert not hasattr(plan, "prepare")
    with pytest.raises(AttributeError, match=r"fi_ffi\.prepare\(plan\.\w*run, \.\.\.\)"):
        plan.prepare  # noqa: B018


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_of_numpy_are_numbers(kind):
    case = Case(kind)
    numbers = {name: np.int64(value) for name, value in case.options.items() if type(value) is int}
    if kind != "mla":
        numbers["logits_soft_cap"] = np.float32(30)
    case.run(case.plan(**numbers))
    assert np.isfinite(case.memory["o"]).all()


_SINK = {"use_attention_sink": True}
_MASKS = ("causal", "use_custom_mask", "use_multi_item_scoring")
_WITH_HEADS = ("ragged", "paged", "decode")
_FP8 = {"q_data_type": E4M3, "head_dim_qk": 128}
# What fa3 lacks and fa2 has; and what neither has.
FA3_LACKS = [
    ({"use_custom_mask": True}, "custom masks"),
    ({"pos_encoding_mode": "ALIBI"}, "pos_encoding_mode 'ALIBI'"),
    ({"pos_encoding_mode": "ROPE_LLAMA"}, "pos_encoding_mode 'ROPE_LLAMA'"),
    ({"use_fp16_qk_reduction": True}, "use_fp16_qk_reduction"),
    ({"kv_data_type": E4M3}, "keys of that dtype only"),
    ({"head_dim_qk": 96}, "64/64, .* not 96/96"),
    ({"head_dim_vo": 128}, "64/64, .* not 64/128"),
]
NOBODY_HAS = [
    _FP8 | {"logits_soft_cap": 1.0},
    {"q_data_type": E5M2, "head_dim_qk": 96},
    _FP8 | {"kv_data_type": E5M2},
    _FP8 | {"kv_data_type": "float16"},
    {"kv_data_type": "bfloat16"},
    {"q_data_type": "bfloat16", "use_fp16_qk_reduction": True},
    {"kv_data_type": E4M3, "pos_encoding_mode": "ROPE_LLAMA"},
]
# Kinds of plans, options that do not go together, the one that is refused, and why.
TOGETHER: list[tuple[tuple[str, ...], dict[str, Any], str, str]] = [
    *((_WITH_HEADS, {"num_qo_heads": qo, "num_kv_heads": kv}, "num_qo_heads",
       f"got {qo}, expected a multiple of num_kv_heads = {kv}")
      for qo, kv in ((4, 3), (2, 4), (5, 2), (1, 2))),
    *((("decode",), {"num_qo_heads": group * KV_HEADS}, "num_qo_heads",
       f"got {group} for each of num_kv_heads, expected 1, 2, 3, 4, 6, 8, 16 .*BatchPrefillPlan")
      for group in (5, 7, 9, 12, 15, 64)),
    *((("paged",), {a: True, b: True}, b, f"False with {a}")
      for a, b in (_MASKS[:2], _MASKS[1:])),
    (("paged",), {"fixed_split_size": 1, "disable_split_kv": True}, "disable_split_kv",
     "False with fixed_split_size"),
    *((("paged",), {"fixed_split_size": 1, "window_left": window}, "fixed_split_size",
       "None with a window and a mask that is not causal") for window in (0, 3)),
    (("ragged",), {"use_multi_item_scoring": True}, "use_multi_item_scoring", "without page_size"),
    (("paged",), _FP8 | {"use_multi_item_scoring": True}, "use_multi_item_scoring",
     "fp8 queries lack it"),
    *((("paged",), _SINK | {name: value}, name, "attention sinks have nothing else")
      for name, value in (("pos_encoding_mode", "ALIBI"), ("logits_soft_cap", 30.0),
                          ("use_fp16_qk_reduction", True), ("use_custom_mask", True),
                          ("use_multi_item_scoring", True), ("kv_data_type", E4M3))),
    (_WITH_HEADS, {"pos_encoding_mode": "ALIBI", "logits_soft_cap": 1.0}, "logits_soft_cap",
     "ALIBI"),
    (("decode",), {"q_data_type": E4M3}, "q_data_type", "BatchPrefillPlan"),
    (_WITH_HEADS, {"q_data_type": "bfloat16", "o_data_type": "float16"}, "o_data_type", "bfloat16"),
    *((("mla",), {"kv_data_type": dtype}, "kv_data_type", "float16")
      for dtype in ("bfloat16", E4M3)),
    (("mla",), {"q_data_type": E4M3}, "q_data_type", "float16 or bfloat16"),
    (("mla",), {"head_dim_ckv": 256}, "head_dim_ckv", "got 256, expected 512"),
    (("mla",), {"head_dim_kpe": 128}, "head_dim_kpe", "got 128, expected 64"),
    *((PREFILL, given | {"backend": "fa3"}, "backend", f"got 'fa3', expected 'fa2': fa3 .*{words}")
      for given, words in FA3_LACKS),
    (PREFILL, _FP8 | {"backend": "fa2"}, "backend",
     f"got 'fa2', expected 'fa3': fa2 has no {E4M3} queries"),
    # Nobody is sent from one to the other: both reasons are given.
    *((PREFILL, given | {"backend": asked}, "backend",
       f"got '{asked}', expected what a backend has: fa2 .*; fa3 ")
      for given in NOBODY_HAS for asked in ("auto", "fa2", "fa3")),
    *((PREFILL, {name: value, "backend": "fa3"}, name,
       f"got {value}, .*backend='fa2': fa3 never splits")
      for name, value in (("fixed_split_size", 1), ("disable_split_kv", True),
                          ("num_colocated_ctas", 1))),
    (PREFILL, {"uniform_q_len": 1}, "uniform_q_len", "got 1, expected 0 without enable_cuda_graph"),
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_options_that_do_not_go_together(kind):
    case = Case(kind)
    for kinds, given, argument, words in TOGETHER:
        if kind in kinds:
            refused(case, argument, words, case.plan, **given)


@pytest.mark.parametrize("kind", PREFILL)
def test_what_the_other_backend_has(kind):
    case = Case(kind)
    for given, _ in FA3_LACKS:
        assert case.plan(**given).backend == "fa2"
    assert case.plan(**_FP8).backend == "fa3"
    for given in ({"fixed_split_size": 1}, {"disable_split_kv": True}):
        case.run(case.plan(**given))
        case.check()


@pytest.mark.parametrize("kind", ["ragged", "paged", "mla"])
def test_fa3_on_other_gpus(kind, monkeypatch):
    case = Case(kind)
    given = {"backend": "fa3", "device": "cuda:1", "workspace": None}
    for capability in ((8, 0), (9, 2), (10, 0), (12, 0)):
        monkeypatch.setattr(machine, "capability", lambda index, found=capability: found)
        words = "expected 'fa2': fa3 is for SM90, and cuda:1 is SM{}{}".format(*capability)
        refused(case, "backend", words, case.plan, **given)


# Workspaces.


def workspace_of(case: Case, **buffers: object) -> fi_ffi.Workspace:
    given = case.memory | buffers
    return fi_ffi.Workspace(given["float"], given["int"], given["staging"])


@pytest.mark.parametrize("kind", KINDS)
def test_workspaces_and_devices(kind):
    case = Case(kind)
    wrong = {"tpu": "'tpu'", "cuda:-1": "cuda:-1", 0: "got 0", "cuda_host": "cpu or cuda",
             "cuda_managed": "cpu or cuda"}  # fmt: skip
    for device, words in wrong.items():
        refused(case, "device", words, case.plan, device=device, workspace=None)
    for value in (case.memory["int"], 2**20, "cpu", fi_ffi.Workspace, [1]):
        error = refused(case, "workspace", "a Workspace", case.plan, workspace=value)
        assert isinstance(error, fi_ffi.ArgumentTypeError)
    there = {n: changed(case.memory[n], device="cuda:1") for n in ("float", "int")}
    elsewhere = workspace_of(case, **there, staging=None)
    words = "got one on cuda:1, expected one on cpu"
    refused(case, "workspace", words, case.plan, workspace=elsewhere)
    refused(case, "workspace", "cuda:0", case.plan, device="cuda:0", workspace=elsewhere)
    here = case.workspace()
    refused(case, "workspace", "one on cpu", case.plan, device="cuda:0", workspace=here)


@pytest.mark.parametrize("kind", ["ragged", "paged", "decode"])
def test_a_workspace_too_small_for_the_next_batch(kind):
    case, more = Case(kind), Case(kind, (40,) * 400, (5,) + (0,) * 399)
    small, need = (
        one.cls.workspace_size(**one.arrays, **one.options, device="cpu") for one in (case, more)
    )
    assert need.int_bytes > small.int_bytes
    workspace = fi_ffi.Workspace(case.memory["float"], case.memory["int"][: small.int_bytes])
    plan = case.plan(workspace=workspace)
    words = rf"got {small.int_bytes} bytes, expected {need.int_bytes} bytes"
    refused(case, "int_workspace_buffer", words, plan.replan, **more.arrays)
    case.run(plan)
    case.check()


@pytest.mark.parametrize("kind", KINDS)
def test_a_workspace_that_no_machine_has(kind):
    case = Case(kind, enable_cuda_graph=True)
    if kind == "mla":
        given = {"num_heads": 2**31 - 1, "max_total_num_rows": 2**31 - 1}
        refused(case, "qo_indptr", "work items", case.plan, workspace=None, **given)
        return
    given = {"head_dim": 2**28, "num_qo_heads": 16}
    if kind != "decode":
        given = dict.fromkeys(("num_qo_heads", "num_kv_heads", "head_dim_qk"), 2**20)
        given["max_total_num_rows"] = 2**31 - 1
    words = r"got None, expected \d+ and \d+ bytes, which could not be allocated"
    refused(case, "workspace", words, case.plan, workspace=None, **given)


def wrong_buffers() -> Wrong:
    read_only = aligned(2**12)
    read_only.flags.writeable = False
    yield "buffer", "got str"
    yield None, "got None"
    yield aligned(2**12)[::2], r"strides=\(2,\).*contiguous memory"
    yield read_only, "that can be written"
    yield aligned(2**12)[8:], "multiple of 16 bytes"
    yield fi_ffi.TensorDesc(0, (2**12,), "uint8", device="cpu"), "not null"


def test_buffers_of_a_workspace():
    case = Case("decode")
    case.op = "Workspace"
    memory, locked = case.memory, "page_locked_int_workspace_buffer"

    def wrong(argument: str, words: str, **buffers: object) -> None:
        refused(case, argument, words, workspace_of, case, **buffers)

    for buffer, words in wrong_buffers():
        wrong("float_workspace_buffer", words, float=buffer)
        wrong("int_workspace_buffer", words, int=buffer)
        if buffer is not None:  # its stages are allocated then
            wrong(locked, words, staging=buffer)
    assert workspace_of(case, staging=None).int_bytes
    there = {n: changed(memory[n], device="cuda:0") for n in ("float", "int", "staging")}
    wrong("int_workspace_buffer", "got cuda:0, expected cpu", int=there["int"])
    wrong("int_workspace_buffer", "got cpu, expected cuda:0", float=there["float"])
    wrong(locked, "got cuda:0, expected memory on the host", **there)
    wrong(locked, "got 16 bytes, expected 1048576 bytes or more", staging=memory["staging"][:16])
    wrong(locked, "expected 0 bytes or more", int=memory["int"][:0])
    managed = {n: changed(memory[n], device="cuda_managed:0") for n in ("float", "int")}
    wrong("float_workspace_buffer", "cuda_managed:0, expected cpu or cuda", **managed)
    both = memory["float"]
    wrong("int_workspace_buffer", "overlap", int=both[2**20 :])
    wrong("int_workspace_buffer", "overlap", int=both[:16], float=both)
    wrong(locked, "overlap", staging=memory["int"])
    wrong(locked, "overlap", staging=both)
    workspace_of(case, int=both[2**20 :], float=both[: 2**20])


def test_a_workspace_to_allocate():
    case = Case("decode")
    case.op = "Workspace"
    for name in ("float_bytes", "int_bytes"):
        for value in (-1, 1.5, "1", None, True, 2**63, 10**400):
            given = {"device": "cpu", "float_bytes": 16, "int_bytes": 16} | {name: value}
            refused(case, name, "int", fi_ffi.Workspace.allocate, **given)
    for device in ("cuda_host", "cuda_managed:0", "tpu", 3, None):
        refused(case, "device", "", fi_ffi.Workspace.allocate, device)


# Batches that a captured launch cannot serve: what was captured is replayed, and is right.


def captured(kind: str, **options: Any) -> tuple[Case, Any]:
    """A plan for graphs that has run, as in a capture."""
    case = Case(kind, enable_cuda_graph=True, **options)
    plan = case.plan()
    case.run(plan)
    case.check()
    return case, plan


def not_replanned(
    case: Case, plan: Any, arrays: Any, argument: str, words: str, **run: Any
) -> None:
    """The batch is refused, and the plan is as it was."""
    info, needs = plan.plan_info, plan._needs
    refused(case, argument, words, plan.replan, **arrays)
    assert (plan.plan_info, plan._needs) == (info, needs)
    case.memory["o"][:] = case.memory["lse"][:] = np.nan
    case.run(plan, **run)
    case.check()


def longer(case: Case) -> dict[str, np.ndarray]:
    """Keys and values with room for more."""
    return {name: np.concatenate([case.memory[name]] * 2) for name in case.run_names[1:3]}


@pytest.mark.parametrize("kind", KINDS)
def test_another_number_of_requests(kind):
    case, plan = captured(kind)
    for count in (1, 3, 5):
        other = Case(kind, (QO_LENS * 2)[:count], (1,) * count)
        words = f"got {count} requests, expected 4, the number of requests"
        not_replanned(case, plan, other.arrays, FIRST[kind], words)


@pytest.mark.parametrize("kind", KINDS)
def test_a_launch_that_is_not_the_captured_one(kind):
    """As the planner says, which has written by then: neither plan holds."""
    case, plan = captured(kind)
    plan._captured.launch = [-1]
    words = r"got launch \[.* expected the captured \[-1\]"
    with allowed("workspace._generation"), pytest.raises(fi_ffi.ArgumentError, match=words):
        case.replan(plan)
    refused(case, "self", "stale plan", case.run, plan)


# What grows, an option that makes room for one more, and batches with one and with two more.
MORE = {
    "queries": (("ragged", "paged", "mla"), "max_total_num_rows", 9,
                ((3, 2, 0, 5), KV_LENS), ((3, 2, 1, 5), KV_LENS)),
    "pages": (PAGED, "max_num_indices", 8, (QO_LENS, (7, 5, 2, 13)), (QO_LENS, (7, 5, 2, 17))),
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "what"), [(kind, what) for what in MORE for kind in MORE[what][0]]
)
def test_more_than_there_is_room_for(kind, what):
    _, option, have, one_more, two_more = MORE[what]
    name = "qo_indptr" if what == "queries" else PAGE_INDPTR[kind]
    one, two = Case(kind, *one_more).arrays, Case(kind, *two_more).arrays
    case, plan = captured(kind)
    not_replanned(case, plan, one, name, f"got {have + 1} {what}, expected {have} at most")
    case, plan = captured(kind, **{option: have + 1})
    plan.replan(**one)
    refused(case, name, f"got {have + 2} {what}, expected {have + 1} at most", plan.replan, **two)
    few = Case(kind, enable_cuda_graph=True, **{option: have - 1})
    refused(few, name, f"got {have} {what}, expected {have - 1} at most", few.plan)


@pytest.mark.parametrize("kind", PAGED)
def test_pages_past_the_cache_that_was_run_with(kind):
    case, plan = captured(kind)
    arrays = case.arrays | {INDICES[kind]: at(case.indices, -1, PAGES)}
    words = f"got {PAGES + 1} pages, expected at most {PAGES}, the size that captured"
    not_replanned(case, plan, arrays, INDICES[kind], words)
    # A cache that is larger in one run is no larger in the others.
    caches = {n: case.memory[n] for n in case.run_names if "cache" in n}
    case.run(plan, **{n: np.concatenate([cache] * 2) for n, cache in caches.items()})
    not_replanned(case, plan, arrays, INDICES[kind], words)
    # Nor is one that a refused run was given any smaller.
    small = {n: cache[: case.indices.max() + 1] for n, cache in caches.items()}
    wrong = {"o": changed(case.memory["o"], dtype="float32")}
    refused(case, "o", "float32", case.run, plan, **small, **wrong)
    plan.replan(**case.arrays | {INDICES[kind]: at(case.indices, 0, PAGES - 1)})
    assert plan._captured.room["pages"] == PAGES


def test_more_keys_than_were_run_with():
    case, plan = captured("ragged")
    more = Case("ragged", QO_LENS, (7, 5, 2, 10)).arrays
    words = "got 24 keys, expected at most 23, the size that captured"
    not_replanned(case, plan, more, "kv_indptr", words)
    plan = case.plan()
    case.run(plan, **longer(case))
    plan.replan(**more)


@pytest.mark.parametrize("kind", PREFILL)
def test_a_larger_mask(kind):
    case = Case(kind, enable_cuda_graph=True, use_custom_mask=True, max_num_indices=20)
    more = Case(kind, QO_LENS, (7, 5, 2, 10)).arrays
    plan, mask = case.plan(), np.full(10, 255, np.uint8)
    case.run(plan, custom_mask=mask, **longer(case))
    case.check()
    words = "got 11 mask bytes, expected at most 10, the size that captured"
    not_replanned(case, plan, more, "qo_indptr", words, custom_mask=mask)
    fewer = mask[:-1]
    refused(case, "custom_mask", "expected 10 bytes", case.run, plan, custom_mask=fewer)
    # Larger ones leave room.
    plan = case.plan()
    case.run(plan, custom_mask=np.full(11, 255, np.uint8), **longer(case))
    plan.replan(**more)


@pytest.mark.parametrize("kind", PAGED)
def test_pages_from_the_run_and_from_the_plan(kind):
    case, plan = captured(kind)
    words = "got None, expected an array, as in the captured plan"
    not_replanned(case, plan, case.arrays | {INDICES[kind]: None}, INDICES[kind], words)
    case = Case(kind, enable_cuda_graph=True, max_num_indices=20)
    plan, given = case.plan(**{INDICES[kind]: None}), {RUN_INDICES[kind]: case.indices}
    case.run(plan, **given)
    case.check()
    words = "got an array, expected None, as in the captured plan"
    not_replanned(case, plan, case.arrays, INDICES[kind], words, **given)
    more = Case(kind, QO_LENS, (7, 5, 2, 13)).arrays | {INDICES[kind]: None}
    words = "got 9 page indices, expected at most 8, the size that captured"
    not_replanned(case, plan, more, PAGE_INDPTR[kind], words, **given)


@pytest.mark.parametrize("kind", PREFILL)
def test_pieces_of_a_fixed_size(kind):
    size = 3 if kind == "paged" else 9
    case, plan = captured(kind, fixed_split_size=size, max_num_indices=20)
    plan = case.plan()
    case.run(plan, **longer(case))
    more = Case(kind, QO_LENS, (7, 5, 2, 13)).arrays
    words = "got requests split, expected as captured"
    not_replanned(case, plan, more, "fixed_split_size", words)


def test_blocks_of_mla_that_work_together():
    case, plan = captured("mla", max_total_num_rows=40)
    more = Case("mla", (10, 10, 10, 10), (12, 10, 10, 12))
    assert sizes.mla_cluster(plan._geometry, len(more.qo_lens), sum(more.qo_lens)) == 2
    arrays = case.arrays | {"qo_indptr": more.qo_indptr}
    words = "got queries for which 2 blocks work together, expected 1"
    not_replanned(case, plan, arrays, "qo_indptr", words)


@pytest.mark.parametrize("graph", [False, True], ids=["", "graph"])
def test_more_work_than_mla_has_room_for(graph):
    case = Case("mla", enable_cuda_graph=graph)
    arrays = {"qo_indptr": np.int32([0, 2**18]), "kv_indptr": np.int32([0, 1]),
              "kv_indices": np.int32([0]), "kv_len_arr": np.int32([PAGE])}  # fmt: skip
    words = r"queries for up to \d+ work items, expected 16384 at most"
    refused(case, "qo_indptr", words, case.plan, **arrays)
    not_replanned(case, case.plan(), arrays, "qo_indptr", "work items|requests")


@pytest.mark.parametrize("more", [0, 1])
@pytest.mark.parametrize("chunk", [16, 32, 48])
@pytest.mark.parametrize("lengths", [(40, 0, 0), (0, 48), (1, 16, 17, 0, 33), (0, 0)])
def test_more_pieces_than_a_decodes_grid_has_blocks(lengths, chunk, more, gpu, monkeypatch):
    """With CUDA graphs: a request without pages has a piece as well, which the planner forgets."""
    pieces = sum(max(len(range(0, n, chunk)), 1) for n in lengths)
    real = Planner.plan

    def plan(self, workspace, stage, *others):
        real(self, workspace, stage, *others)
        ffi.cast("int32_t *", stage.ptr)[0] = chunk
        # `DecodePlanInfo`: the blocks of the grid come first, and where the size of a piece is last
        # but two.
        made = make_array((pieces - 1 + more, *[0] * 9))
        return made, address_of(made.handle)

    monkeypatch.setattr(Planner, "plan", plan)
    pages = [-(-n // 16) for n in lengths]
    given = {
        "indptr": np.cumsum([0, *pages]).astype(np.int32),
        "indices": np.arange(sum(pages), dtype=np.int32),
        "last_page_len": np.int32([(n - 1) % 16 + 1 if n else 0 for n in lengths]),
        "num_qo_heads": 4, "num_kv_heads": 2, "head_dim": 64, "page_size": 16,
        "device": "cuda:0", "stream": 0x51, "enable_cuda_graph": True,
    }  # fmt: skip
    if more:
        assert fi_ffi.BatchDecodePlan(**given).plan_info[0] == pieces
    else:
        words = f"{pieces} pieces of {chunk} keys.*{pieces - 1} at most"
        # Its planner was called.
        refused = pytest.raises(fi_ffi.ArgumentError, match=words)
        with allowed("gpu.seen", "gpu.runtime.work"), refused as caught:
            fi_ffi.BatchDecodePlan(**given)
        assert caught.value.argument == "indptr"


@pytest.mark.parametrize("num_heads", [1, 3, 16, 24, 40, 48, 64, 80, 96, 128])
def test_causal_mla_where_a_tile_ends_inside_a_query(num_heads):
    """Four requests: of one tile of 64 rows together, of one each, or of more, when two blocks work
    together on 128."""
    for lens in ([1] * 4, [2] * 4, [4] * 4, [1, 1, 1, 3], [5, 4, 4, 3], [0, 0, 0, 6]):
        tile = 128 if sum(lens) * num_heads // 4 > 64 else 64
        ends = [end for n in lens for end in range(tile, n * num_heads, tile)]
        case = Case("mla", lens, (9, 9, 9, 9), num_heads=num_heads, causal=True)
        if any(end % num_heads for end in ends):
            words = "heads that divide" if max(lens) > 1 else "causal=False"
            refused(case, "qo_indptr", words, case.plan)
        else:
            case.run(case.plan())
            case.check(causal=True)
