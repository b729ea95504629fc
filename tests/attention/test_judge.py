"""The checks of these tests can fail: with the GPU's bounds, for what is a little wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import fi_ffi
from fi_ffi.reference.attention.formula import Exact, Options, exact

from tests.attention import judge
from tests.attention.batches import random
from tests.attention.cases import make
from tests.attention.tables import Spec

# family, backend, dtype of q, k and v, dtype of o
KERNELS = [
    ("batch_prefill", "fa2", "float16", "float16"),
    ("batch_prefill", "fa2", "bfloat16", "bfloat16"),
    ("batch_prefill", "fa3", "float16", "float16"),
    ("batch_prefill", "fa3", "bfloat16", "bfloat16"),
    ("batch_prefill", "fa3", "float8_e4m3fn", "float16"),
    ("single_prefill", "fa2", "bfloat16", "bfloat16"),
    ("batch_decode", "", "float16", "float16"),
    ("batch_mla", "fa2", "bfloat16", "bfloat16"),
    ("batch_mla", "fa3", "bfloat16", "bfloat16"),
]
QUERIES, HEADS, KV_HEADS, DIM = 17, 4, 2, 128
RIGHT = Options(DIM**-0.5, causal=True)


def fraction(kernel: Any, right: Exact, got: Exact, keys: int, with_lse: bool = True) -> float:
    """How far `got` is from what is right, as such a kernel would write it."""
    family, backend, dtype, o = kernel
    how = judge.rounding(family, backend, dtype, dtype, o)
    out = got.out.astype(fi_ffi.DTYPES[o].numpy)
    return judge.worst(right, out, got.lse2.astype(np.float32) if with_lse else None, how, keys)


def without(keys: int, key: int) -> Options:
    seen = np.ones((QUERIES, keys), bool)
    seen[:, key] = False
    return replace(RIGHT, mask=seen)


def causal(keys: int, shift: int) -> Options:
    """Each row sees so many keys more than it is to."""
    places = keys - QUERIES + shift + np.arange(QUERIES)
    return Options(DIM**-0.5, mask=np.arange(keys) <= places[:, None])


WINDOW = replace(RIGHT, window_left=9)
# What is right, and what must not be taken for it.
WRONG: dict[str, tuple[Options, Callable[[int, np.random.Generator], Options]]] = {
    "a smaller scale": (RIGHT, lambda *_: replace(RIGHT, sm_scale=0.95 * DIM**-0.5)),
    "a larger scale": (RIGHT, lambda *_: replace(RIGHT, sm_scale=1.05 * DIM**-0.5)),
    "without the first key": (RIGHT, lambda keys, _: without(keys, 0)),
    "without the last key of all": (RIGHT, lambda keys, _: without(keys, keys - QUERIES)),
    "without a key": (RIGHT, lambda keys, rng: without(keys, int(rng.integers(keys)))),
    "a key less": (RIGHT, lambda keys, _: causal(keys, -1)),
    "a key more": (RIGHT, lambda keys, _: causal(keys, 1)),
    "a wider window": (WINDOW, lambda *_: replace(WINDOW, window_left=10)),
}


@pytest.fixture(params=[20, 60, 300])
def keys(request) -> int:
    return request.param


@pytest.fixture(params=KERNELS, ids=" ".join)
def kernel(request) -> Any:
    return request.param


@pytest.fixture
def tensors(kernel, keys, rng) -> list[Any]:
    shapes = ((QUERIES, HEADS), (keys, KV_HEADS), (keys, KV_HEADS))
    return [random(rng, (*shape, DIM), kernel[2]).astype(np.float64) for shape in shapes]


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong(what, kernel, keys, tensors, rng):
    options, wrong = WRONG[what]
    right = exact(*tensors, options)
    assert fraction(kernel, right, right, keys) <= 1
    assert fraction(kernel, right, exact(*tensors, wrong(keys, rng)), keys) > 1


def test_wrong_numbers(kernel, keys, tensors):
    """Values of another head, NaN, and what rows that see no key may say."""
    (q, k, v), right = tensors, exact(*tensors, RIGHT)
    assert fraction(kernel, right, exact(q, k, v[:, ::-1], RIGHT), keys, with_lse=False) > 1
    for name in ("out", "lse2"):
        wrong = getattr(right, name).copy()
        wrong[3, 1] = np.nan
        assert fraction(kernel, right, right._replace(**{name: wrong}), keys) == np.inf
    seen = np.ones((QUERIES, keys), bool)
    seen[5] = False
    right = exact(*tensors, replace(RIGHT, mask=seen))
    written = right.lse2.copy()
    for value, is_right in ((-np.inf, True), (-5e4, True), (0, False)):
        written[5] = value
        found = fraction(kernel, right, right._replace(lse2=written), keys)
        assert found <= 1 if is_right else found == np.inf


PAGED = Spec(page_size=16, causal=True, keys=60)


@pytest.mark.parametrize("spec", [PAGED, replace(PAGED, page_size=0)], ids=["paged", "ragged"])
def test_a_run_with_another_scale(spec, machine, rng):
    case, batch = make(spec, machine, rng)
    plan = case.plan(batch)
    case.check(batch, case.run(plan, batch))
    with pytest.raises(AssertionError, match="of its bound"):
        case.check(batch, case.run(plan, batch, sm_scale=1.05 * spec.dim**-0.5))


def test_a_plan_for_another_length(machine, rng):
    case, batch = make(replace(PAGED, lengths=((3, 40), (2, 17))), machine, rng)
    assert batch.last_page_len is not None
    last = batch.last_page_len.copy()
    last[0] += 1
    other = replace(batch, last_page_len=last)
    with pytest.raises(AssertionError, match="request 0"):
        case.check(batch, case.run(case.plan(other), other))


def test_a_page_of_nobody(machine, rng):
    case, batch = make(replace(PAGED, lengths=((3, 40), (2, 17))), machine, rng)
    assert batch.indices is not None
    wrong = batch.indices.copy()
    wrong[1] = 0
    other = replace(batch, indices=wrong)
    with pytest.raises(AssertionError, match="row 0 of 5 is NaN"):
        case.check(batch, case.run(case.plan(other), other))


def test_rows_not_written_and_bytes_beside(machine, rng):
    case, batch = make(PAGED, machine, rng)
    plan = case.plan(batch)
    out = case.run(plan, batch)
    out.o.array[2] = np.nan
    with pytest.raises(AssertionError, match="row 2 of"):
        case.check(batch, out)
    for array in ("o", "lse"):
        out = case.run(plan, batch)
        getattr(out, array).whole[-1] = 0
        with pytest.raises(AssertionError, match="bytes beside"):
            case.check(batch, out)
    case.placed("q").array[0, 0, 0] += 1
    with pytest.raises(AssertionError, match="q was written to"):
        case.check_inputs()


def test_rows_past_the_last_query(machine, rng):
    """With CUDA graphs there are more rows than queries: they stay as they are."""
    case, batch = make(PAGED, machine, rng)
    case.rows += 2
    out = case.outputs()
    out.o.array[: batch.rows] = out.lse.array[: batch.rows] = 0
    out.o.array[-1] = 0
    with pytest.raises(AssertionError, match=r"row \d+ of \d+ is written"):
        case.check(batch, out)
