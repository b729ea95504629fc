"""The judges of tokens: what rounding may lead to is right, and nothing else is."""

from __future__ import annotations

from itertools import repeat

import numpy as np
import pytest

from fi_ffi.ops.functions import OPS
from fi_ffi.reference.reachable import NONE, Filter, around, rejected, slack
from fi_ffi.reference.renorm import top_p_error, top_p_slack

from tests.helpers.cases import make_case
from tests.helpers.inputs.sampling import probabilities

P = np.array([0.5, 0.25, 0.125, 0.125])
ALL = np.ones(4, bool)


def near(p, chosen, at):
    return sorted(token for _, token in around(p, chosen, at, slack(p)))


@pytest.mark.parametrize(
    ("at", "expected"),
    [(0.1, [0]), (0.49, [0]), (0.51, [1]), (0.6, [1]), (0.76, [2]), (0.99, [3]), (1.0, [3])],
)
def test_the_token_that_a_number_is_in(at, expected):
    assert near(P, ALL, at) == expected


def test_both_at_an_edge_and_the_last_past_the_end():
    off = slack(P) / 2
    for at in (0.5 - off, 0.5, 0.5 + off):
        assert near(P, ALL, at) == [0, 1]
    assert around(P, ALL, 0.5 + off, slack(P))[0] == (0.0, 1)  # the nearest first
    assert near(0.9 * P, ALL, 0.95) == [3]
    assert near(P, P > 0.2, 0.9) == [1]
    assert near(P, P > 1, 0.5) == []


def test_a_search_of_all_may_take_their_sum_for_1():
    """In a short row whose sum is less than is asked for; both quotients are right, no other is."""
    p = 0.9 * P
    within = top_p_slack(len(p), True)
    for divisor, is_right in ((1.0, True), (p.sum(), True), (0.95, False)):
        error, of_bound = top_p_error(p, p / divisor, 0.95, within)
        assert (error < 1e-12) == is_right == (of_bound < 1), divisor
    assert top_p_error(P, P / 0.9, 0.95, within)[0] > 0.01


def test_slack_is_small_beside_what_is_drawn():
    assert slack(np.full(32, 1 / 32)) < 1e-5
    assert slack(np.full(2**17, 2.0**-17)) < 2e-5


def tokens(kept: Filter, *drawn: float) -> set[int]:
    return {*rejected(P, kept, iter([*drawn, *repeat(0.5, 100)]))}


def test_rounds_of_a_filter():
    # Above 0.125 there are two, and they are 0.75: 2 is refused with k = 2, and then 0 or 1 drawn.
    assert tokens(Filter(P, 2, np.inf), 0.3) == {0}
    assert tokens(Filter(P, 2, np.inf), 0.8, 0.5) == {0}
    assert tokens(Filter(P, 2, np.inf), 0.8, 0.9) == {1}
    assert tokens(Filter(P, 3, np.inf), 0.8) == {2}
    assert tokens(Filter(P, np.inf, 0.7), 0.8, 0.9) == {1}
    assert tokens(Filter(P, np.inf, 0.8), 0.8) == {2}
    # Narrowly: both.
    assert tokens(Filter(P, np.inf, 0.75), 0.8, 0.9) == {1, 2}
    assert tokens(Filter(P, 2, 0.4), 0.7, 0.1) == {0}


def test_both_bounds_of_a_round_are_kept():
    """0 is refused, and 0.51 is enough; 1 is refused, and halfway from it to 0.51 is not: 2, which
    is below that, is not drawn."""
    p = np.array([0.02, 0.1, 0.2, 0.38, 0.42])
    assert {*rejected(p, Filter(p, 2, np.inf), iter([0.01, 0.05, 0.1]))} == {3}


def test_no_token():
    zero = np.zeros(4)
    assert {*rejected(zero, Filter(zero, 1, np.inf), repeat(0.5))} == {NONE}
    # Nothing is above a pivot that every round raises.
    assert NONE in tokens(Filter(P, np.inf, 0.0), 0.3)


@pytest.mark.parametrize(
    "name", [name for name, op in OPS.items() if op.row.module == "sampling" and "from" in name]
)
def test_a_wrong_token_is_refused(name):
    rng = np.random.default_rng()
    op = OPS[name]
    case = make_case(op.row, {"n": 8, "r": 8, "h": 40}, {"I": "int32", "S": "int64"}, rng)
    op(**case.arrays, **case.scalars)
    right = case.arrays["output"].copy()
    assert case.error("output", right) == (0.0, 0.0)
    for i in range(len(right)):
        for wrong in (right[i] + 1, right[i] - 1, -1, 40, 255):
            changed = right.copy()
            changed[i] = wrong
            # Of 40 tokens, next to none has two that are right.
            assert case.error("output", changed)[1] > 1
    if "valid" in case.expected:
        assert case.error("valid", ~case.arrays["valid"])[1] > 1


def draws(op, tables, *without, **scalars):
    """64 tokens, each of 64 that are as probable."""
    sizes, dtypes = {"n": 64, "r": 64, "h": 64}, {"I": "int32", "S": "int64"}
    tables = {"probs": np.full((64, 64), 1 / 64)} | tables
    rng, without = np.random.default_rng(), ("maybe_indices", *without)
    return make_case(op.row, sizes, dtypes, rng, tables, without, **scalars)


def test_other_numbers_are_refused():
    """Of another seed, another offset or another row, hardly any token is right."""
    op = OPS["sampling_from_probs"]
    case = draws(op, {}, "maybe_seed_arr", "maybe_offset_arr", seed_val=1, offset_val=5)
    for wrong in ({"seed_val": 2}, {"offset_val": 6}, {"seed_val": 2**32 + 1}):
        op(**case.arrays, **case.scalars | wrong)
        assert case.error("output", case.arrays["output"])[1] > 1
    op(**case.arrays, **case.scalars)
    assert case.error("output", case.arrays["output"])[1] <= 1
    assert case.error("output", np.roll(case.arrays["output"], 1))[1] > 1


def test_a_seed_and_an_offset_of_any_rank():
    op = OPS["sampling_from_probs"]
    of_any = {"maybe_seed_arr": np.array([[7]]), "maybe_offset_arr": np.array(5)}
    case = draws(op, of_any)
    assert [case.arrays[name].ndim for name in of_any] == [2, 0]
    op(**case.arrays, **case.scalars)
    assert case.error("output", case.arrays["output"])[1] <= 1
    assert case.error("output", np.roll(case.arrays["output"], 1))[1] > 1


@pytest.mark.parametrize("size", [100, 4096])
def test_the_judge_of_what_top_p_keeps(size):
    rng = np.random.default_rng()
    p = probabilities(rng, size).astype(np.float64)
    order = np.sort(p)[::-1]
    within = top_p_slack(size, True)
    for top_p in (0.1, 0.5, 0.9, 0.99):
        count = int(np.argmax(np.cumsum(order) >= top_p * p.sum())) + 1
        for more, is_right in ((0, True), (-1, False), (1, False)):
            # Unless the sum is as near to `top_p` as that.
            if abs(order[: count + min(more, 0)].sum() - top_p) < 2 * within:
                continue
            kept = p >= order[count - 1 + more]
            got = np.where(kept, p, 0) / p[kept].sum()
            assert (top_p_error(p, got, top_p, within)[1] <= 1) == is_right
        got = np.where(p >= order[count - 1], p, 0)
        assert top_p_error(p, got / got.sum() * 1.001, top_p, within)[1] > 1
        got[np.argmax(p)] = 0
        assert top_p_error(p, got / max(got.sum(), 1e-9), top_p, within)[1] > 1
