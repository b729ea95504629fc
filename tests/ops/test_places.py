"""Indices of rows outside the op table: each condition that a row states refuses what is beyond it.

Right calls are made and their arguments kept as the reference gets them; then the row judges them
once more, each index with values that name no place. Rows and arguments are found, not listed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest

import fi_ffi
from fi_ffi.ops.call.row import Row, Tensor
from fi_ffi.ops.table import ROWS, comm
from fi_ffi.reference import indices

from tests.attention.cases import make
from tests.attention.machines import Cpu
from tests.attention.tables import Spec
from tests.helpers import batch_pod_calls, pod_calls, xqa_calls, xqa_mla_calls
from tests.helpers.calls import HostArray
from tests.helpers.decode_calls import DecodeCall
from tests.helpers.state_calls import StateCall
from tests.ops import test_bgmv_moe, test_block_scale_gemm, test_kda
from tests.ops.test_indices import OTHERS

JUDGE = indices.judge


class Judged(NamedTuple):
    """What a row judged of a right call."""

    row: Row
    given: dict[str, Any]
    facts: indices.Facts | None
    sizes: dict[str, int]

    def again(self, **changes: Any) -> fi_ffi.ArgumentError | None:
        """Judge the call with other arguments; return the refusal."""
        try:
            JUDGE(self.row, self.given | changes, self.facts, **self.sizes)
        except fi_ffi.ArgumentError as error:
            return error
        return None


_LENGTHS = {"lengths": ((3, 40), (0, 0), (5, 17)), "page_size": 16, "heads": 4, "kv_heads": 2}
_RAGGED = {**_LENGTHS, "page_size": 0}
_OF_MLA = {"family": "batch_mla", "dtype": "bfloat16", "dim": 512, "heads": 16, "page_size": 16,
           "lengths": ((3, 40), (1, 7))}  # fmt: skip
_ITEMS = {**_LENGTHS, "items": True, "lengths": ((20, 40), (9, 9))}
_IN_4_BITS = {"kv_dtype": "uint8"}
_IN_FP8 = {"backend": "fa3", "dtype": "float8_e4m3fn"}
RUNS = {
    "decode": Spec(family="batch_decode", **_LENGTHS | {"lengths": ((1, 40), (1, 16), (1, 17))}),
    "attention": Spec(family="batch_attention", **_LENGTHS),
    "attention, 4 bits": Spec(family="batch_attention", **_LENGTHS, **_IN_4_BITS),
    **{f"mla {backend}": Spec(**_OF_MLA, backend=backend) for backend in ("fa2", "fa3")},
    **{f"mla of fp8 {backend}": Spec(**_OF_MLA, backend=backend, kv_dtype="float8_e4m3fn")
       for backend in ("fa2", "fa3")},
    **{f"{kind} {backend}{' sink' * sink}": Spec(**lengths, backend=backend, sink=sink)
       for kind, lengths in (("paged", _LENGTHS), ("ragged", _RAGGED))
       for backend in ("fa2", "fa3") for sink in (False, True)},
    **{f"{kind} {what}": Spec(**lengths, **more)
       for kind, lengths in (("paged", _LENGTHS), ("ragged", _RAGGED))
       for what, more in (("4 bits", _IN_4_BITS), ("fp8", _IN_FP8), ("masks", {"mask": True}))},
    **{f"items {backend}": Spec(**_ITEMS, backend=backend) for backend in ("fa2", "fa3")},
}  # fmt: skip


def run(spec: Spec, rng: np.random.Generator) -> None:
    case, batch = make(spec, Cpu(), rng)
    case.run(case.plan(batch), batch)


def groups(rng: np.random.Generator) -> None:
    test_block_scale_gemm.test_groupwise_in_groups("K", rng)


def adapters(rng: np.random.Generator) -> None:
    test_bgmv_moe.Layer(rng).worst(Cpu())


def of_kda(t: int, form: str, rng: np.random.Generator) -> None:
    call = test_kda.Call(rng, t=t, form=form)
    fi_ffi.recurrent_kda(**call.arrays, **call.options)


CALLS: dict[str, Callable[[np.random.Generator], Any]] = {
    **{name: functools.partial(run, spec) for name, spec in RUNS.items()},
    "xqa": lambda rng: xqa_calls.Batch(xqa_calls.Spec(), rng).check(HostArray),
    "xqa of drafts": lambda rng: xqa_calls.Batch(
        xqa_calls.Spec(queries=4, lengths=(4, 17, 300)), rng).check(HostArray),
    "xqa_mla": lambda rng: xqa_mla_calls.Batch(xqa_mla_calls.Spec(), rng).check(HostArray),
    "pod": lambda rng: (batch := pod_calls.Batch(pod_calls.Spec(), rng)).run(
        batch.plan(device="cpu"), HostArray, None, 1 << 20),
    "batch pod": lambda rng: (batch := batch_pod_calls.Batch(batch_pod_calls.Spec(), rng)).run(
        batch.plan(device="cpu"), HostArray, None),
    **{f"gdn {dtype} {t}": lambda rng, t=t, dtype=dtype: DecodeCall(
        rng, t=t, state_dtype=dtype).worst(Cpu())
       for t in (1, 3) for dtype in ("bfloat16", "float32")},
    **{f"kda {form} {t}": functools.partial(of_kda, t, form)
       for t in (1, 3) for form in ("slots", "starts")},
    "mamba": lambda rng: StateCall(rng, "sequences", 3, 3).worst(Cpu()),
    "groups": groups,
    "adapters": adapters,
}  # fmt: skip


@pytest.fixture
def judged(monkeypatch):
    """The calls that are judged."""
    found: list[Judged] = []

    def judge(row: Row, given: Any, facts: Any = None, **sizes: int) -> None:
        kept = {name: value.copy() if isinstance(value, np.ndarray) else value
                for name, value in given.items()}  # fmt: skip
        found.append(Judged(row, kept, facts, sizes))
        JUDGE(row, given, facts, **sizes)

    monkeypatch.setattr(indices, "judge", judge)
    monkeypatch.setattr(fi_ffi.reference, "judge", judge)
    return found


def extremes(array: np.ndarray) -> dict[str, np.ndarray]:
    """The argument with every element below, or above, any place."""
    limits = np.iinfo(array.dtype)
    return {"low": np.full_like(array, limits.min), "high": np.full_like(array, limits.max)}


def conditions(call: Judged) -> list[tuple[Tensor, indices.Places]]:
    return [
        (arg, indices.Places.of(arg.name, text))
        for arg in call.row.tensors
        if isinstance(call.given.get(arg.name), np.ndarray) and call.given[arg.name].size
        for text in arg.index
    ]


def holds(call: Judged, arg: Tensor, wrong: np.ndarray) -> bool:
    """Whether the row takes the argument; it names what it refuses."""
    error = call.again(**{arg.name: wrong})
    if error is None:
        return True
    # Other arguments' conditions are relative to this one.
    related = [arg.name, *(other.name for other in call.row.tensors
                           if any(arg.name in text for text in other.index))]  # fmt: skip
    assert error.argument in related and error.is_of_kernel, error
    assert " in element " in error.got
    return False


@pytest.mark.parametrize("name", CALLS)
def test_each_bound_of_a_call_refuses(name, judged, rng):
    CALLS[name](rng)
    found = 0
    for call in judged:
        assert call.again() is None
        for arg, places in conditions(call):
            array = call.given[arg.name]
            wrong = extremes(array)
            for bound in places.bounds:
                if "steps(" in places.places:  # starts that decrease, or are far apart
                    starts = np.sort(array)[:: -1 if bound.is_low else 1].copy()
                    starts[0 if bound.is_low else -1] = starts.max() + 10**6
                    assert not holds(call, arg, starts), places.text
                elif array.dtype.kind == "u" and bound.is_low:
                    continue  # nothing is below
                elif f"- {arg.name}" in places.places:  # the more, the less is left
                    left = {"token_pos_in_items_len": 0, arg.name: np.zeros_like(array)}
                    assert call.again(**left).argument == arg.name
                else:
                    assert not holds(call, arg, wrong["low" if bound.is_low else "high"]), places
                found += 1
    assert found


PLANNED = [name for name in CALLS if name in RUNS or "pod" in name]


@pytest.mark.parametrize("name", PLANNED)
def test_what_no_request_has_may_be_anything(name, judged, rng):
    """Pages after the last request's, and arrays with room for more requests than the plan has.
    Each page that a request has is one of the cache's."""
    CALLS[name](rng)
    used = sum(-(-keys // 16) for _, keys in RUNS[name].lengths) if name in RUNS else 1
    for call in judged:
        for arg in {arg.name: arg for arg, _ in conditions(call)}.values():
            array, of_each = call.given[arg.name], arg.axes.partition("_p")[0] in ("b", "b+1")
            if of_each or arg.axes.startswith("num_indices"):
                more = np.array([2**31 - 1, 7, 0]).astype(array.dtype)
                assert call.again(**{arg.name: np.concatenate([array, more])}) is None
            if any("listed(" in text for text in arg.index):
                caches = (value for name, value in call.given.items() if name in CACHES)
                count, wrong = len(next(caches)), array.copy()
                at = int(rng.integers(used))
                for page, is_page in ((0, True), (count - 1, True), (count, False), (-1, False)):
                    wrong[at] = page
                    error = call.again(**{arg.name: wrong})
                    assert (error is None) is is_page
                    assert is_page or error.got == f"{page} in element {at}"  # type: ignore[union-attr]


# The caches of every run but a prefill's half, which has as many pages.
CACHES = ("paged_k_cache", "k_cache", "ckv_cache", "paged_k_cache_d")


@pytest.mark.parametrize("name", ["paged masks", "ragged masks"])
def test_each_request_s_mask_is_in_the_mask(name, judged, rng):
    CALLS[name](rng)
    mask, call = judged[-1].given["maybe_custom_mask"], judged[-1]
    assert len(mask) == sum(-(-qo * kv // 8) for qo, kv in RUNS[name].lengths)
    error = call.again(maybe_custom_mask=mask[:-1])
    assert error is not None and error.argument == "maybe_mask_indptr"


@pytest.mark.parametrize("name", ["items fa2", "items fa3"])
def test_each_token_after_a_prefix_has_a_position(name, judged, rng):
    CALLS[name](rng)
    call = judged[-1]
    prefixes = call.given["maybe_prefix_len_ptr"].tolist()
    lengths = [keys for _, keys in RUNS[name].lengths]
    most = max(length - prefix for length, prefix in zip(lengths, prefixes, strict=True))
    assert call.again(token_pos_in_items_len=most) is None
    error = call.again(token_pos_in_items_len=most - 1)
    assert error is not None and error.argument == "maybe_prefix_len_ptr"


def test_every_row_with_indices_is_called(judged, rng):
    """By name and variant: forms of other releases have the same conditions."""
    for call in CALLS.values():
        call(rng)
    called = {(call.row.name, call.row.variant) for call in judged}
    of_table = {row.name for row in ROWS}  # tests/ops/test_indices.py
    stated = {
        (row.name, row.variant)
        for row in OTHERS
        if row.name not in of_table and any(arg.index for arg in row.tensors)
    }
    of_ranks = {(row.name, row.variant) for row in FINALIZE}
    assert len(of_ranks) == 2 and sorted(stated - called - of_ranks) == []


# It needs two ranks, of which one would wait for the other's refusal.
FINALIZE = [row for row in comm.OPS if row.name == "trtllm_moe_finalize_allreduce_fusion"]


@pytest.mark.parametrize("row", FINALIZE, ids=lambda row: row.releases)
def test_rows_of_experts_that_there_are_not(row, rng):
    """-1 is no row, and no other number below 0 is."""
    given: dict[str, Any] = {arg.name: None for arg in row.args}
    rows = rng.integers(-1, 7, (5, 3)).astype(np.int32)
    given |= {"allreduce_in": np.zeros((7, 64), np.float16), "expanded_idx_to_permuted_idx": rows}
    call = Judged(row, given, None, {})
    assert call.again() is None
    for value in (-2, 7, 2**31 - 1):
        wrong = rows.copy()
        wrong[4, 1] = value
        error = call.again(expanded_idx_to_permuted_idx=wrong)
        assert error is not None and error.got == f"{value} in element 4, 1"
