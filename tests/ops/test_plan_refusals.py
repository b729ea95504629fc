"""Wrong arguments of plans: a typed error that names them, and nothing written."""

from __future__ import annotations

from typing import get_type_hints

import numpy as np
import pytest

import fi_ffi

from tests.helpers.plan_calls import (
    KEYWORDS,
    KINDS,
    OPTIONS,
    PAGE,
    PAGED,
    Case,
    changed,
    indptr,
    refused,
)

FP8 = "float8_e4m3fn"
ARRAYS = [(kind, name) for kind in KINDS for name in Case(kind).arrays]
INDPTRS = [(kind, name) for kind, name in ARRAYS if name.endswith("indptr")]
INDICES = [(kind, name) for kind, name in ARRAYS if name.endswith("indices")]


@pytest.mark.parametrize("graph", [False, True], ids=["", "graph"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_right_ones_are_right(kind, graph):
    case = Case(kind, enable_cuda_graph=graph)
    plan = case.plan()
    for _ in range(2):
        case.run(plan)
        case.check()
        case.replan(plan)


def _strided(array):
    apart = np.zeros((len(array), 2), np.int32)
    apart[:, 0] = array
    return apart[:, 0]


WRONG_ARRAYS = {
    "int64": (lambda a: a.astype(np.int64), "got int64, expected int32"),
    "uint32": (lambda a: a.astype(np.uint32), "got uint32, expected int32"),
    "float32": (lambda a: a.astype(np.float32), "got float32, expected int32"),
    "big-endian": (lambda a: a.astype(">i4"), "got dtype >i4"),
    "rank 2": (lambda a: a[None], r"contiguous array of rank 1"),
    "rank 0": (lambda a: a[0:1].reshape(()), r"contiguous array of rank 1"),
    "strided": (_strided, r"strides=\(2,\).*contiguous array of rank 1"),
    "backwards": (lambda a: a[::-1], r"strides=\(-1,\).*contiguous array of rank 1"),
    "on a GPU": (lambda a: changed(a, device="cuda:0"), "got cuda:0, .* an array on the host"),
    "managed": (lambda a: changed(a, device="cuda_managed:0"), "expected an array on the host"),
    "null": (lambda a: changed(a, ptr=0), "got 0x0, .* not null"),
    "misaligned": (lambda a: changed(a, ptr=fi_ffi.as_desc(a).ptr + 2), "multiple of 4 bytes"),
    "a list": (lambda a: a.tolist(), "got builtins.list"),
    "a number": (lambda a: 3, "got builtins.int 3"),
    "text": (lambda a: "0123", "got builtins.str '0123'"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG_ARRAYS)
@pytest.mark.parametrize(("kind", "name"), ARRAYS)
def test_arrays(kind, name, wrong):
    change, words = WRONG_ARRAYS[wrong]
    case = Case(kind)
    arrays = {name: change(case.arrays[name])}
    refused(case, name, words, case.plan, **arrays)
    given = case.arrays | case.options | arrays
    refused(case, name, words, case.cls.workspace_size, **given, device="cpu")
    plan = case.plan()
    refused(case, name, words, case.replan, plan, **arrays)
    case.run(plan)
    case.check()


@pytest.mark.parametrize(("kind", "name"), [pair for pair in ARRAYS if pair not in INDICES])
def test_arrays_of_another_number_of_requests(kind, name):
    case = Case(kind)
    array = case.arrays[name]
    first = next(iter(case.arrays))
    for other in (array[:-1].copy(), np.append(array, array[-1:])):
        # The first array says how many there are; then it is the next that does not fit.
        argument = None if name == first else name
        refused(case, argument, "elements", case.plan, **{name: other})


@pytest.mark.parametrize(("kind", "name"), ARRAYS)
def test_empty_arrays(kind, name):
    case = Case(kind)
    refused(case, name, "got 0 elements", case.plan, **{name: np.zeros(0, np.int32)})


@pytest.mark.parametrize(("kind", "name"), INDPTRS)
def test_indptr_values(kind, name):
    case = Case(kind)
    array = case.arrays[name]
    steps = np.arange(len(array), dtype=np.int32)
    first = next(iter(case.arrays))
    none = "2 or more" if name == first else "5 elements"
    for wrong, words in (
        (array + 1, "got 1 first, expected 0 first"),
        (array - 1, "got -1 first, expected 0 first"),
        (np.where(steps == 2, 0, array), r"got 0 after \d \(request 1\), .* do not decrease"),
        (np.where(steps == 4, -1, array), r"got -1 after \d+ \(request 3\)"),
        (array[:1], none),
    ):
        values = wrong.astype(np.int32)
        refused(case, name, words, case.plan, **{name: values})


@pytest.mark.parametrize(("kind", "name"), INDICES)
def test_pages(kind, name):
    case = Case(kind)
    few = case.indices[:-1].copy()
    refused(case, name, "got 7 elements, expected 8 pages", case.plan, **{name: few})
    below = case.indices.copy()
    below[3] = -1
    refused(case, name, "got -1, expected pages from 0 on", case.plan, **{name: below})
    # What is behind the last request's pages is not looked at, and not copied.
    more = np.concatenate([case.indices, np.full(5000, -1, np.int32)])
    plan = case.plan(**{name: more})
    case.run(plan)
    case.check()


@pytest.mark.parametrize("kind", ["paged", "decode"])
@pytest.mark.parametrize("tokens", [0, -1, PAGE + 1, 2**31 - 1])
def test_last_page_len(kind, tokens):
    case = Case(kind)
    name = list(case.arrays)[-1]
    last = case.last.copy()
    last[1] = tokens
    words = f"got {tokens} for request 1 with 2 pages, expected from 1 to {PAGE}"
    refused(case, name, words, case.plan, **{name: last})


@pytest.mark.parametrize("tokens", [-1, PAGE - 1, 2 * PAGE + 1, 2**31 - 1])
def test_kv_len_arr(tokens):
    case = Case("mla")
    lens = np.int32(case.kv_lens)
    lens[1] = tokens
    words = f"got {tokens} for request 1 with 2 pages of {PAGE}"
    refused(case, "kv_len_arr", words, case.plan, kv_len_arr=lens)


@pytest.mark.parametrize("kind", ["paged", "decode"])
def test_more_tokens_than_int32_holds(kind):
    case = Case(kind)
    name = list(case.arrays)[-3]
    refused(case, name, "2147483649 .* 2147483647 at most", case.plan, page_size=2**30)


def test_a_mask_larger_than_its_indptr_counts():
    case = Case("ragged")
    lens = np.int32([0, 2**17]), np.int32([0, 2**18])
    given = {"qo_indptr": lens[0], "kv_indptr": lens[1], "use_custom_mask": True}
    refused(case, "use_custom_mask", "4294967296 bytes", case.plan, **given)


@pytest.mark.parametrize(("kind", "name"), [pair for pair in ARRAYS if pair not in INDICES])
def test_arrays_that_are_missing(kind, name):
    case = Case(kind)
    refused(case, name, "None", case.plan, **{name: None})


def test_arrays_of_the_other_kind_of_cache():
    ragged, paged = Case("ragged"), Case("paged")
    for name in list(paged.arrays)[1:]:
        array = {name: paged.arrays[name]}
        refused(ragged, name, "None without page_size", ragged.plan, **array)
    array = ragged.arrays["kv_indptr"]
    refused(paged, "kv_indptr", "None with page_size", paged.plan, kv_indptr=array)


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [(kind, "causal", True) for kind in ("ragged", "paged", "mla")]
    + [(kind, "pos_encoding_mode", "ROPE_LLAMA") for kind in ("ragged", "paged")]
    + [("paged", "use_multi_item_scoring", True)],
)
def test_fewer_keys_than_queries_where_places_count(kind, name, value):
    case = Case(kind, qo_lens=(3, 1, 3, 5))
    words = f"3 queries and 2 keys in request 2, expected no fewer keys with {name}"
    refused(case, "qo_indptr", words, case.plan, **{name: value})
    plan = case.plan()
    case.run(plan)
    case.check()


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
_KIND_OF = {int: int, int | None: int, bool: bool, float: float, str: str}
FIELDS = [
    (kind, name, _KIND_OF[type_], type_ == int | None)
    for kind in KINDS
    for name, type_ in get_type_hints(KEYWORDS[kind]).items()
    if type_ in _KIND_OF
]


@pytest.mark.parametrize(("kind", "name", "type_", "may_be_none"), FIELDS)
def test_options_of_wrong_types_and_values(kind, name, type_, may_be_none):
    case = Case(kind)
    for value in TYPES[type_]:
        given = {name: value}
        error = refused(case, name, "", case.plan, **given)
        assert isinstance(error, fi_ffi.ArgumentTypeError)
    low = [0, -1] if type_ is int and name != "window_left" else []
    for value in [*VALUES[type_], *low]:
        given = {name: value}
        refused(case, name, "", case.plan, **given)
    if not may_be_none:
        refused(case, name, "", case.plan, **{name: None})


@pytest.mark.parametrize("kind", KINDS)
def test_dtypes(kind):
    case = Case(kind)
    for name in ("q_data_type", "kv_data_type", "o_data_type"):
        if name not in OPTIONS[kind].table:
            continue
        for value in ("half", 1, "", False, 0, object(), ["float16"], np.zeros(2)):
            given = {name: value}
            error = refused(case, name, "'float16'", case.plan, **given)
            assert isinstance(error, fi_ffi.ArgumentTypeError)
        for value in ("float32", np.int32, fi_ffi.DTYPES["uint8"]):
            given = {name: value}
            refused(case, name, "expected .*float16", case.plan, **given)
    refused(case, "q_data_type", "got None", case.plan, q_data_type=None)


@pytest.mark.parametrize("kind", KINDS)
def test_unknown_and_missing_keywords(kind):
    case = Case(kind)
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


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_of_numpy_are_numbers(kind):
    case = Case(kind)
    numbers = {name: np.int64(value) for name, value in case.options.items() if type(value) is int}
    if kind != "mla":
        numbers["logits_soft_cap"] = np.float32(30)
    case.run(case.plan(**numbers))
    assert np.isfinite(case.memory["o"]).all()


@pytest.mark.parametrize("kind", KINDS)
def test_devices(kind):
    case = Case(kind)
    wrong = {"tpu": "'tpu'", "cuda:-1": "cuda:-1", 0: "got 0", "cuda_host": "cpu or cuda",
             "cuda_managed": "cpu or cuda"}  # fmt: skip
    for device, words in wrong.items():
        refused(case, "device", words, case.plan, device=device, workspace=None)


def test_page_locked_arrays_are_host_arrays():
    for kind in KINDS:
        case = Case(kind)
        given = case.arrays  # kept: descriptors by address own nothing
        arrays = {n: changed(a, device="cuda_host") for n, a in given.items()}
        case.run(case.plan(**arrays))
        case.check()


@pytest.mark.parametrize("kind", PAGED)
def test_an_array_that_is_read_only_will_do(kind):
    case = Case(kind)
    for array in (case.page_indptr, case.indices, case.last):
        array.flags.writeable = False
    case.run(case.plan())
    case.check()
    assert indptr(case.kv_lens).flags.writeable
