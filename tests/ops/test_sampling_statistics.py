"""What samplers draw, many times over: their distributions, and that nothing else is drawn."""

from __future__ import annotations

import numpy as np
import pytest

from tests.helpers.inputs.sampling import probabilities
from tests.helpers.sampling_calls import draws, filtered, run, surprise

FILTERS = [
    ("sampling_from_probs", {}),
    ("top_k_sampling_from_probs", {"top_k_val": 1}),
    ("top_k_sampling_from_probs", {"top_k_val": 5}),
    ("top_k_sampling_from_probs", {"top_k_val": 1000}),
    ("top_p_sampling_from_probs", {"top_p_val": 0.1}),
    ("top_p_sampling_from_probs", {"top_p_val": 0.6}),
    ("top_p_sampling_from_probs", {"top_p_val": 0.95}),
    ("min_p_sampling_from_probs", {"min_p_val": 0.1}),
    ("min_p_sampling_from_probs", {"min_p_val": 0.7}),
    ("top_k_top_p_sampling_from_probs", {"top_k_val": 6.0, "top_p_val": 0.7}),
    ("top_k_top_p_sampling_from_probs", {"top_k_val": 2.0, "top_p_val": 0.99}),
    ("sampling_from_logits", {}),
]
IDS = ["-".join([name, *map(str, more.values())]) for name, more in FILTERS]


def count_of(machine) -> int:
    return 400_000 if machine.is_gpu else 4000


def source_of(name, rng, h):
    if name == "sampling_from_logits":
        return rng.standard_normal(h).astype(np.float32)
    return probabilities(rng, h, spread=1.0)


def seeds(rng):
    return {"seed_val": int(rng.integers(2**63)), "offset_val": int(rng.integers(2**40))}


def is_narrow(p, top_p):
    """Whether rounding could decide about a token: then both distributions are right."""
    sums = np.cumsum(np.sort(p.astype(np.float64))[::-1])
    return bool((np.abs(sums - top_p) < 1e-4).any())


@pytest.mark.parametrize(("name", "more"), FILTERS, ids=IDS)
def test_distributions(name, more, machine, rng, record_property):
    for h in (20, 64):
        source = source_of(name, rng, h)
        if "top_p_val" in more and is_narrow(source, more["top_p_val"]):
            continue
        tokens = draws(machine, name, source, count_of(machine), **more, **seeds(rng))
        counts = np.bincount(tokens, minlength=h)
        expected = filtered(name, source, **more)
        record_property("surprise", surprise(counts, expected))
        assert surprise(counts, expected) <= 1


def test_wrong_distributions_are_refused(machine, rng):
    """What the test above would say of a sampler that is off."""
    h, count = 20, count_of(machine)
    source = source_of("sampling_from_probs", rng, h)
    tokens = draws(machine, "sampling_from_probs", source, count, **seeds(rng))
    counts = np.bincount(tokens, minlength=h)
    assert surprise(counts, filtered("sampling_from_probs", source)) <= 1
    warmer = source ** (1.02 if machine.is_gpu else 1.3)
    assert surprise(counts, warmer / warmer.sum()) > 1
    five = filtered("top_k_sampling_from_probs", source, top_k_val=5)
    for k in (4, 6):
        other = filtered("top_k_sampling_from_probs", source, top_k_val=k)
        assert surprise(rng.multinomial(count, other), five) > 1


def test_outputs_and_offsets_are_independent(machine, rng):
    """Pairs of tokens of neighbouring outputs, and of an output at offsets one apart."""
    h, count = 6, count_of(machine)
    p = probabilities(rng, h, spread=0.7)
    pairs = filtered("sampling_from_probs", p)
    pairs = np.outer(pairs, pairs).ravel()
    given = seeds(rng)
    tokens = draws(machine, "sampling_from_probs", p, count, **given)
    neighbours = tokens[0::2] * h + tokens[1::2]
    assert surprise(np.bincount(neighbours, minlength=h * h), pairs) <= 1
    given["offset_val"] += 1
    later = draws(machine, "sampling_from_probs", p, count, **given)
    assert surprise(np.bincount(tokens * h + later, minlength=h * h), pairs) <= 1
    # As a token and itself are not.
    assert surprise(np.bincount(tokens * h + tokens, minlength=h * h), pairs) > 1


def chain(machine, rng, n, s, h, draft, target):
    """Drafts of every position's distribution, verified."""
    ids = np.stack([rng.choice(h, n, p=of / of.sum()) for of in draft.astype(np.float64)], axis=1)
    arrays = {
        "draft_probs": np.broadcast_to(draft, (n, s, h)).copy(),
        "draft_token_ids": ids.astype(np.int32),
        "target_probs": np.broadcast_to(target, (n, s + 1, h)).copy(),
        "output_token_ids": np.full((n, s + 1), 255, np.int32),
        "output_accepted_token_num": np.zeros(n, np.int32),
        "output_emitted_draft_token_num": np.zeros(n, np.int32),
    }
    return ids, run(machine, "chain_speculative_sampling", arrays, **seeds(rng))


def test_a_verified_chain_is_the_targets(machine, rng):
    """At each position that is reached the token is of the target's distribution, whatever the
    draft's is; and a draft's token is taken as often as the two have mass in common."""
    n, s, h = count_of(machine) // (4 if machine.is_gpu else 1), 3, 12
    draft, target = probabilities(rng, s, h, spread=0.8), probabilities(rng, s + 1, h, spread=0.8)
    ids, got = chain(machine, rng, n, s, h, draft, target)
    tokens, emitted = got["output_token_ids"], got["output_emitted_draft_token_num"]
    for i in range(s + 1):
        reached = emitted >= i
        counts = np.bincount(tokens[reached, i], minlength=h)
        expected = target[i].astype(np.float64)
        assert surprise(counts, expected / expected.sum()) <= 1, i
        assert (tokens[~reached, i] == -1).all()
        if i < s:
            common = np.minimum(draft[i], target[i]).sum()
            taken = (emitted > i).sum()
            spread = (reached.sum() * common * (1 - common)) ** 0.5
            assert abs(taken - reached.sum() * common) < 6 * spread
            assert (tokens[emitted > i, i] == ids[emitted > i, i]).all()
            # As one that always took the draft's would not be.
            wrong = np.bincount(ids[reached, i], minlength=h)
            assert surprise(wrong, expected / expected.sum()) > 1
    # A refused one is tried once more, and so counts a little more often than it is taken.
    accepted, common = got["output_accepted_token_num"], np.minimum(draft, target[:s]).sum(axis=1)
    assert (accepted >= emitted).all() and (accepted <= s).all()
    assert s * n * common.min() - 6 * (s * n) ** 0.5 < accepted.sum()
