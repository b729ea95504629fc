"""Verifying drafted tokens, row by row: on the CPU, and (tests/gpu) on a GPU."""

from __future__ import annotations

import numpy as np
import pytest

import fi_ffi
from fi_ffi.ops.functions import OPS

from tests.helpers.cases import make_case
from tests.helpers.every_op import check_on
from tests.helpers.inputs.sampling import probabilities
from tests.helpers.sampling_calls import run

NAME = "chain_speculative_sampling"


def case_of(rng, n=6, s=3, h=64, tables=None, **more):
    return make_case(OPS[NAME].row, {"n": n, "s": s, "h": h}, {"S": "int64"}, rng, tables, **more)


@pytest.mark.parametrize("s", [1, 2, 3, 7, 20])
def test_sizes(s, machine, rng):
    for h in (1, 2, 5, 64, 1000, 4099) + (32000, 128256) * machine.is_gpu:
        for n in (1, 9):
            assert check_on(machine, case_of(rng, n, s, h)) <= 1, (n, h)


@pytest.mark.parametrize("deterministic", [True, False])
def test_many_rows(deterministic, machine, rng):
    for seeds in ((), ("maybe_seed_arr", "maybe_offset_arr")):
        case = case_of(rng, 200, 4, 50, deterministic=deterministic, without=seeds)
        assert check_on(machine, case) <= 1


def test_drafts_that_are_the_target(machine, rng):
    """All are taken."""
    target = probabilities(rng, 50, 5, 40)
    ids = rng.integers(0, 40, (50, 4))
    tables = {"target_probs": target, "draft_probs": target[:, :4], "draft_token_ids": ids}
    case = case_of(rng, 50, 4, 40, tables)
    got = run(machine, NAME, case.arrays, **case.scalars)
    assert all(case.error(name, got[name])[1] <= 1 for name in case.expected)
    assert (got["output_token_ids"][:, :4] == ids).all()
    name = "output_emitted_draft_token_num"
    assert (got[name] == case.arrays[name] + 4).all()


def test_drafts_that_the_target_never_has(machine, rng):
    """None is taken, and the first token is the target's."""
    n, s, h = 50, 3, 40
    target, draft = np.zeros((n, s + 1, h), np.float32), np.zeros((n, s, h), np.float32)
    target[:, :, : h // 2] = probabilities(rng, n, s + 1, h // 2)
    draft[:, :, h // 2 :] = probabilities(rng, n, s, h // 2)
    ids = rng.integers(h // 2, h, (n, s))
    tables = {"target_probs": target, "draft_probs": draft, "draft_token_ids": ids}
    case = case_of(rng, n, s, h, tables)
    got = run(machine, NAME, case.arrays, **case.scalars)
    assert all(case.error(name, got[name])[1] <= 1 for name in case.expected)
    tokens = got["output_token_ids"]
    assert (tokens[:, 0] < h // 2).all() and (tokens[:, 0] >= 0).all()
    assert (tokens[:, 1:] == -1).all()
    for name in ("output_accepted_token_num", "output_emitted_draft_token_num"):
        assert (got[name] == case.arrays[name]).all()


def test_certain_targets(machine, rng):
    """One token at each position: taken where it was drafted, and given where it was not."""
    n, s, h = 30, 4, 16
    wanted = rng.integers(0, h, (n, s + 1))
    target = np.eye(h, dtype=np.float32)[wanted]
    ids = wanted[:, :s].copy()
    wrong_from = rng.integers(0, s + 1, n)
    for row, first in zip(ids, wrong_from, strict=True):
        row[first:] = (row[first:] + 1) % h
    tables = {"target_probs": target, "draft_probs": np.full((n, s, h), 1 / h),
              "draft_token_ids": ids}  # fmt: skip
    case = case_of(rng, n, s, h, tables)
    got = run(machine, NAME, case.arrays, **case.scalars)
    assert all(case.error(name, got[name])[1] <= 1 for name in case.expected)
    for i, first in enumerate(wrong_from):
        expected = [*wanted[i, : first + 1], *[-1] * (s - first)]
        assert got["output_token_ids"][i].tolist() == expected
    name = "output_emitted_draft_token_num"
    assert (got[name] - case.arrays[name] == wrong_from).all()


def test_counts_are_added_to(machine, rng):
    case = case_of(rng, 20, 3, 30)
    arrays, before = dict(case.arrays), None
    names = ("output_accepted_token_num", "output_emitted_draft_token_num")
    for _ in range(3):
        got = run(machine, NAME, arrays, **case.scalars)
        grown = [got[name] - arrays[name] for name in names]
        assert before is None or all((a == b).all() for a, b in zip(grown, before, strict=True))
        before, arrays = grown, arrays | {name: got[name] for name in names}


def test_what_does_not_fit_is_refused(rng):
    case = case_of(rng)
    for name, wrong in (
        ("target_probs", case.arrays["target_probs"][:, :-1].copy()),
        ("draft_token_ids", case.arrays["draft_token_ids"].astype(np.int64)),
        ("output_accepted_token_num", np.zeros(5, np.int32)),
        ("output_token_ids", np.zeros((6, 3), np.int32)),
    ):
        with pytest.raises(fi_ffi.ArgumentError):
            fi_ffi.chain_speculative_sampling(**case.arrays | {name: wrong}, **case.scalars)


def test_wrong_results_are_refused(rng):
    case = case_of(rng, 6, 3, 64)
    fi_ffi.chain_speculative_sampling(**case.arrays, **case.scalars)
    for name in case.expected:
        right = case.arrays[name]
        assert case.error(name, right)[1] <= 1
        for i in range(6):
            wrong = right.copy()
            wrong[i] += 1
            assert case.error(name, wrong)[1] > 1
