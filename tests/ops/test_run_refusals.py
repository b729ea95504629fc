"""Wrong arguments of a plan's runs: a typed error that names them, and nothing written."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

import fi_ffi

from tests.helpers.plan_calls import KINDS, KV_HEADS, PAGE, PAGED, PAGES, Case, changed, refused

CACHED = ("paged", "decode")
BACKENDS = [(kind, backend) for kind in ("ragged", "paged", "mla") for backend in ("fa2", "fa3")]
PLANNED = [*BACKENDS, ("decode", None)]
TENSORS = [(kind, backend, name) for kind, backend in PLANNED for name in Case(kind).run_names]


def planned(kind: str, backend: str | None = None, **options):
    case = Case(kind, **options | ({"backend": backend} if backend else {}))
    return case, case.plan()


def _times(desc, factor, axis):
    strides = list(desc.strides)
    strides[axis] *= factor
    return changed(desc, strides=strides)


def _longer(desc, axis):
    shape = list(desc.shape)
    shape[axis] += 1
    return changed(desc, shape=shape)


WRONG = {
    "rank": (lambda d: changed(d, shape=(*d.shape, 1)), ""),
    "rank 0": (lambda d: changed(d, shape=()), ""),
    "dtype": (lambda d: changed(d, dtype="float64"), "got float64, expected float"),
    "device": (lambda d: changed(d, device="cuda:0"), "got cuda:0, expected cpu"),
    "managed": (lambda d: changed(d, device="cuda_managed:0"), "cuda_managed:0"),
    "null": (lambda d: changed(d, ptr=0), "got 0x0 .*not null"),
    "misaligned": (lambda d: changed(d, ptr=d.ptr + 1), "multiple of .* bytes"),
    "last axis": (lambda d: _longer(d, -1), "expected (head_dim|num_)"),
    "second axis": (lambda d: _longer(d, 1), "expected (num_(qo_|kv_)?heads|page_size) = "),
    "last stride": (lambda d: _times(d, 2, -1), "strides"),
    "None": (lambda d: None, "got builtins.NoneType"),
    "text": (lambda d: "q", "got builtins.str 'q'"),
    "number": (lambda d: 7, "got builtins.int 7"),
    "list": (lambda d: [1.0], "got builtins.list"),
}


@pytest.mark.parametrize(
    ("kind", "backend", "name", "wrong"),
    # Without an lse, none is written.
    [(*of, wrong) for of in TENSORS for wrong in WRONG if (of[-1], wrong) != ("lse", "None")],
)
def test_each_tensor(kind, backend, name, wrong):
    change, words = WRONG[wrong]
    case, plan = planned(kind, backend)
    given = {name: change(fi_ffi.as_desc(case.memory[name]))}
    refused(case, name, words, case.run, plan, **given)
    case.run(plan)
    case.check()


@pytest.mark.parametrize(("kind", "backend"), PLANNED)
def test_outputs(kind, backend):
    case, plan = planned(kind, backend)
    for name in ("o", "lse"):
        desc = fi_ffi.as_desc(case.memory[name])
        of_all = "contiguous|overlap|strides"
        for strides in ((0, *desc.strides[1:]), (1, *desc.strides[1:]), (-8, *desc.strides[1:])):
            given = {name: changed(desc, strides=strides)}
            refused(case, name, of_all, case.run, plan, **given)
        for fewer in (changed(desc, shape=(desc.shape[0] - 1, *desc.shape[1:])), _longer(desc, 0)):
            given = {name: fewer}
            refused(case, name, "nnz_qo|b = ", case.run, plan, **given)
        case.memory[name].flags.writeable = False
        refused(case, name, "got read-only memory, expected writable", case.run, plan)
        case.memory[name].flags.writeable = True
    for dtype in ("float16", "int32", "bfloat16"):
        given = {"lse": changed(case.memory["lse"], dtype=dtype)}
        words = f"got {dtype}, expected float32"
        refused(case, "lse", words, case.run, plan, **given)


@pytest.mark.parametrize(("kind", "backend"), PLANNED)
def test_another_number_of_rows(kind, backend):
    case, plan = planned(kind, backend)
    name = case.run_names[0]
    for desc in (_longer(fi_ffi.as_desc(case.memory[name]), 0), case.memory[name][:-1]):
        # The outputs too: all agree with each other, and not with the plan.
        outputs = {n: changed(case.memory[n], shape=(desc.shape[0], *case.memory[n].shape[1:]))
                   for n in ("o", "lse")}  # fmt: skip
        given = {name: desc} | outputs
        rows = "b = 4" if kind == "decode" else "nnz_qo = 9"
        refused(case, name, f"expected {rows}, as planned", case.run, plan, **given)


@pytest.mark.parametrize(("kind", "backend"), PLANNED)
def test_dtypes_that_differ(kind, backend):
    case, plan = planned(kind, backend)
    inputs = [name for name in case.run_names if name != "lse"]
    for name in inputs:
        given = {name: case.memory[name].astype(ml_dtypes.bfloat16)}
        words = "got bfloat16, expected float16"
        refused(case, name, words, case.run, plan, **given)
    # All agree with each other, and not with the plan.
    every = {name: case.memory[name].astype(ml_dtypes.bfloat16) for name in inputs}
    refused(case, inputs[0], "got bfloat16, expected float16", case.run, plan, **every)


def other_layout(array: np.ndarray) -> np.ndarray:
    return array.swapaxes(-3, -2).copy()


@pytest.mark.parametrize(("kind", "backend"), [p for p in PLANNED if p[0] != "mla"])
def test_layouts(kind, backend):
    case, plan = planned(kind, backend)
    names = case.run_names[1:3]
    hnd = {name: other_layout(case.memory[name]) for name in names}
    words = "as planned|num_kv_heads = 2|page_size = 4"
    refused(case, None, words, case.run, plan, **hnd)
    refused(case, None, words, case.run, plan, kv_layout="HND")
    for name in names:
        refused(case, None, "", case.run, plan, **{name: hnd[name]})
    for value in ("nhd", "", None, 0, b"NHD", ["NHD"], np.array(["NHD", "HND"]), np.ones(2)):
        expected = "expected 'NHD' or 'HND'"
        refused(case, "kv_layout", expected, case.run, plan, kv_layout=value)
    case.run(plan, **hnd, kv_layout="HND")
    case.check()


@pytest.mark.parametrize("kind", CACHED)
def test_keys_and_values_apart(kind):
    case, plan = planned(kind)
    wide = np.zeros((PAGES, 2, PAGE, KV_HEADS, 64), np.float16)
    words = r"got strides \(1024, .* expected \(512, .* those of `paged_k_cache`"
    refused(case, "paged_v_cache", words, case.run, plan, paged_v_cache=wide[:, 0])


@pytest.mark.parametrize("kind", PAGED)
def test_caches_of_another_page_size(kind):
    case, plan = planned(kind)
    for name in case.run_names[1:]:
        if "cache" in name:
            desc = fi_ffi.as_desc(case.memory[name])
            shape = (desc.shape[0], PAGE - 1, *desc.shape[2:])
            given = {name: changed(desc, shape=shape)}
            refused(case, name, f"page_size = {PAGE}", case.run, plan, **given)


@pytest.mark.parametrize("kind", PAGED)
def test_pages_past_the_cache(kind):
    case, plan = planned(kind)
    top = int(case.indices.max())
    caches = {n: case.memory[n] for n in case.run_names if "cache" in n}
    few = {name: cache[:top] for name, cache in caches.items()}
    name = next(iter(caches))
    words = f"expected num_pages of at least {top + 1}, as planned"
    refused(case, name, words, case.run, plan, **few)
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
    case = Case(kind)
    name = "kv_indices" if kind == "mla" else "paged_kv_indices"
    with_pages = case.plan()
    words = "got an array, expected None: the plan has them"
    refused(case, name, words, case.run, with_pages, **{name: case.indices})
    plan = case.plan(**{next(n for n in case.arrays if n.endswith("indices")): None})
    refused(case, name, "got None, expected an array on the device", case.run, plan)
    for wrong, words in (
        (case.indices[:-1], "expected num_indices of at least 8, as planned"),
        (case.indices.astype(np.int64), "got int64, expected int32"),
        (case.indices[None], "expected rank 1"),
        (np.repeat(case.indices, 2)[::2], "expected a contiguous tensor"),
        (changed(case.indices, device="cuda:0"), "got cuda:0, expected cpu"),
        (changed(case.indices, ptr=0), "not null"),
        ([0, 1], "builtins.list"),
    ):
        given = {name: wrong}
        refused(case, name, words, case.run, plan, **given)
    case.run(plan, **{name: case.indices})
    case.check()


NUMBERS = {
    "sm_scale": (0, -0.1), "q_scale": (0, -1.0), "k_scale": (0.0, -1), "v_scale": (),
    "rope_scale": (0, -1.0, 1e-40), "rope_theta": (0, -1.0, 1e-320),
}  # fmt: skip
NOT_NUMBERS = (True, "1", b"1", [1.0], 1j, object())
NOT_FINITE = (float("nan"), float("inf"), 10**400)


def has_number(kind: str, backend: str | None, name: str) -> bool:
    """Whether a plan's runs have this number."""
    if kind == "mla":
        return name == "sm_scale"
    if kind == "decode":
        return name != "v_scale"
    return not (name.startswith("rope") and backend == "fa3")


NUMBERED = [(*p, name) for p in PLANNED for name in NUMBERS if has_number(*p, name)]


@pytest.mark.parametrize(("kind", "backend", "name"), NUMBERED)
def test_numbers(kind, backend, name):
    options = {"pos_encoding_mode": "ROPE_LLAMA"} if name.startswith("rope") else {}
    case, plan = planned(kind, backend, **options)
    for value in (*NOT_NUMBERS, *NOT_FINITE, *NUMBERS[name]):
        error = refused(case, name, "number", case.run, plan, **{name: value})
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
    plan, paged_plan = ragged.plan(), paged.plan()
    tensors = [paged.memory[name] for name in paged.run_names]
    refused(ragged, "self", "got paged_run, expected ragged_run", plan.paged_run, *tensors)
    tensors = [ragged.memory[name] for name in ragged.run_names]
    words = "got ragged_run, expected paged_run"
    refused(paged, "self", words, paged_plan.ragged_run, *tensors)


@pytest.mark.parametrize("first", KINDS)
@pytest.mark.parametrize("second", KINDS)
def test_a_stale_plan(first, second):
    case, other = Case(first), Case(second)
    workspace = case.workspace()
    plan = case.plan(workspace=workspace)
    case.run(plan)
    newer = other.plan(workspace=workspace)
    case.memory["o"][:] = np.nan
    refused(case, "self", "stale plan: its workspace holds another", case.run, plan)
    refused(case, "self", "stale plan", lambda: plan.plan_info)
    other.run(newer)
    other.check()
    case.replan(plan)
    case.run(plan)
    case.check()
    refused(other, "self", "stale plan", other.run, newer)
