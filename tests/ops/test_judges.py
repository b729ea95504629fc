"""What results are held against sees what is wrong: other numbers, tables, elements, halves."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import fi_ffi
from fi_ffi.cli.cases import Case
from fi_ffi.ops.functions import OPS
from fi_ffi.reference.gemm import fp8_products

from tests.helpers.cases import default_dtypes, make_case
from tests.helpers.inputs import inputs_of
from tests.helpers.rope_calls import ANGLES, APPLY, COS_SIN, F16, QUANTISE, a_case
from tests.ops.test_norm import case as video
from tests.ops.test_results import DIT, TOP_KS

BF16 = ml_dtypes.bfloat16
REQUESTS = {"indptr": np.array([0, 4, 4, 9])}  # the first and the last have tokens


def worst(case: Case, got: Mapping[str, np.ndarray]) -> float:
    return max(case.error(out, got[out])[1] for out in case.expected)


def of(name: str, rng: np.random.Generator) -> Case:
    row = OPS[name].row
    return make_case(row, inputs_of(row).small, default_dtypes(row), rng)


def next_one(table: str, at: int = 0) -> Callable[[dict[str, Any]], None]:
    """The table's element one further on."""

    def change(given: dict[str, Any]) -> None:
        given[table][at] += -1 if given[table][at] else 1

    return change


def exchange(one: str, other: str) -> Callable[[dict[str, Any]], None]:
    def change(given: dict[str, Any]) -> None:
        given[one], given[other] = given[other], given[one]

    return change


def turned(given: dict[str, Any]) -> None:
    given["qkv_in"] = np.roll(given["qkv_in"], 1, axis=0)


def biased(given: dict[str, Any]) -> None:
    given["gate_bias"] += np.float32(0.1)


Change = Mapping[str, Any] | Callable[[dict[str, Any]], None]
# Ops, a case, and what a call is given otherwise.
CALLED: list[tuple[Any, Callable[[str, np.random.Generator], Case], list[Change]]] = [
    (APPLY, lambda name, rng: a_case(name, F16, rng, REQUESTS), [{"interleave": True}]),
    (ANGLES, lambda name, rng: a_case(name, F16, rng, REQUESTS),
     [{"rope_theta": 1.05e4}, {"rope_scale": 1.05}, {"rotary_dim": 64}]),
    (ANGLES[:2], lambda name, rng: a_case(name, F16, rng, REQUESTS), [next_one("offsets")]),
    ((*ANGLES[2:], COS_SIN), lambda name, rng: a_case(name, F16, rng), [next_one("pos_ids", 3)]),
    (QUANTISE, of, [{"interleave": True}, {"quant_scale_q": 1.1}, {"quant_scale_kv": 1.1},
                    next_one("pos_ids", 3)]),
    (QUANTISE[1:], of, [next_one("positions", 3)]),
    (["fused_qk_rmsnorm_rope"], lambda name, rng: video(rng),
     [{"interleave": False}, {"pph": 7, "ppw": 4}, {"base": 9000.0}, turned,
      {"factor": 1.5, "attention_factor": 1.0}]),
    (DIT[2:], of, [exchange("scale", "shift"), exchange("gate", "scale"), biased]),
    (["gelu_and_mul"], of, []),
]  # fmt: skip


def _params() -> Iterator[Any]:
    for names, make, changes in CALLED:
        for name in names:
            yield pytest.param(name, make, changes, id=name)


@pytest.mark.parametrize(("name", "make", "changes"), list(_params()))
def test_a_call_of_something_else(name, make, changes, rng):
    case = make(name, rng)

    def called(change: Change) -> float:
        kept = name in DIT  # parts of tables, and aligned
        given = {n: a if kept else a.copy() for n, a in case.arrays.items()} | case.scalars
        outs = {out: given[out] for out in case.expected}
        given |= change if isinstance(change, Mapping) else {}
        if callable(change):
            change(given)
        OPS[name](**given)
        return worst(case, outs)

    assert called({}) <= 1
    for change in changes:
        assert called(change) > 1, change


# Factors of what floats become, in the dtype's own numbers.
OFF = {
    "rmsnorm": 1.02, "layernorm": 1.02, "gelu_and_mul": 1.02, "silu_and_mul": 1.02, "bmm_fp8": 1.05,
    "apply_rope": 1.02, "fused_qk_rmsnorm_rope": 1.02, "tinygemm2": 1.02, "softmax": 1.02,
    "gdn_prefill": 1.02, "merge_state": 1.02, "nvfp4_kv_dequant": 1.02,
}  # fmt: skip


@pytest.mark.parametrize(("name", "factor"), OFF.items())
def test_all_a_little_larger(name, factor, rng):
    case = of(name, rng)
    OPS[name](**case.arrays, **case.scalars)
    outs = {out: case.arrays[out] for out in case.expected}
    assert worst(case, outs) <= 1
    larger = {out: (a.astype(np.float32) * factor).astype(a.dtype) for out, a in outs.items()}
    assert worst(case, larger) > 1
    for out in outs.values():
        if out.dtype.kind in "fV":
            out[(0,) * out.ndim] = np.nan
    assert worst(case, outs) > 1


def test_another_activation(rng):
    """The bound tells GELU from its approximation, in float16."""
    row = OPS["gelu_and_mul"].row
    case = make_case(row, {"n": 64, "d": 256}, {"T": "float16"}, rng)
    fi_ffi.gelu_tanh_and_mul(**case.arrays)
    assert worst(case, case.arrays) > 1


def test_the_judge_sees_what_is_wrong(rng):
    """A scale 5 % off, 64 of 4096 terms left out, a row in another's place, one element."""
    a, b = rng.standard_normal((12, 4096)), rng.standard_normal((4096, 40))
    value = a @ b
    judge = fp8_products(value, abs(a) @ abs(b), 4096)
    assert judge(value.astype(BF16))[1] <= 1
    assert judge((1.05 * value).astype(BF16))[1] > 1
    assert judge((a[:, 64:] @ b[64:]).astype(BF16))[1] > 1
    assert judge(value[::-1].astype(BF16))[1] > 1
    wrong = value.copy()
    wrong[3, 4] += abs(value).max()
    assert judge(wrong.astype(BF16))[1] > 1
    # One element alone, by more than 14 bits of an accumulator leave out, and by as much.
    for part, is_wrong in ((2.0**-8, True), (2.0**-11, False)):
        wrong = value.copy()
        wrong[3, 4] += part * (abs(a[3]) @ abs(b[:, 4]))
        assert (judge(wrong.astype(np.float32).astype(BF16))[1] > 1) == is_wrong


# Ops whose results are numbers to be told one by one, and what a row of each must not become.
WHOLE = (*TOP_KS, "chain_speculative_sampling", "mxfp8_quantize", "fp4_quantize")


@pytest.mark.parametrize("name", WHOLE)
def test_one_row_of_another_call(name, rng):
    row = OPS[name].row
    tables = {}
    if name in TOP_KS:  # with no ties, and a row of fewer than are chosen
        tables = {"input": rng.permutation(96).reshape(4, 24), "lengths": np.array([24, 15, 3, 9])}
    case = make_case(row, inputs_of(row).small, default_dtypes(row), rng, {
        key: table for key, table in tables.items() if key in {arg.name for arg in row.args}
    } or None, without=("maybe_row_starts",))  # fmt: skip
    OPS[name](**case.arrays, **case.scalars)
    for out in case.expected:
        right = case.arrays[out]
        assert case.error(out, right)[1] <= 1
        codes = right.view(f"u{right.itemsize}")
        for i in range(len(right) if right.ndim > 1 or "num" in out else 1):
            wrong = codes.copy()
            wrong[i] ^= 2  # of float8 not the neighbour, which a tie may be rounded to
            assert case.error(out, wrong.view(right.dtype))[1] > 1, (out, i)
            if name in TOP_KS:
                wrong = right.copy()
                wrong[i, 0] = wrong[i, 1]
                assert case.error(out, wrong)[1] > 1, (out, i)
