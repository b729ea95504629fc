"""The small kernels of examples/llm: numpy's against plain loops."""

from __future__ import annotations

from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from engine import glue
from engine.sampling import PARTS

FLOATS = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
TEXT = pytest.mark.parametrize("dtype", FLOATS)


@pytest.fixture
def on():
    """The device that the kernels run on: arrays in, what they wrote out."""
    return SimpleNamespace(run=lambda name, args: glue.ON_CPU[name](*args), half=None)


def close(got, expected, dtype):
    step = 2.0**-10 if dtype == "float16" else 2.0**-7
    got, expected = got.astype(np.float64), expected.astype(np.float64)
    assert np.isfinite(got).all()
    assert (np.abs(got - expected) <= step * np.abs(expected) + 1e-5).all()


@TEXT
def test_rows_by_index(dtype, rng, on):
    table = rng.standard_normal((9, 6)).astype(FLOATS[dtype])
    index = rng.integers(0, 9, 5).astype(np.int32)
    out = np.full((5, 6), np.nan, table.dtype)
    on.run("take", [out, table, index, np.uint64(0), np.int64(3), 3, 0, 9])
    assert (out == np.stack([table[i] for i in index])).all()
    expected, values = table.copy(), rng.standard_normal((3, 6)).astype(table.dtype)
    places = rng.permutation(9)[:3].astype(np.int32)
    for i, place in enumerate(places):
        expected[place] = values[i]
    on.run("give", [table, values, places, np.int64(3), 3])
    assert (table == expected).all()


@TEXT
def test_rows_that_a_rank_has(dtype, rng, on):
    table = rng.standard_normal((9, 6)).astype(FLOATS[dtype])
    index = np.array([20, 28, 19, 29, 24, 0], np.int32)
    out = np.full((6, 6), np.nan, table.dtype)
    on.run("take", [out, table, index, np.uint64(0), np.int64(3), 3, 20, 9])
    assert (out == np.stack([table[0], table[8], *np.zeros((2, 6)), table[4], np.zeros(6)])).all()


def test_parts_of_a_row_side_by_side(rng, on):
    """Of three ranks, the last one's with two columns too many."""
    parts = rng.standard_normal((3, 5, 300)).astype(np.float32)
    out = np.full((5, 898), np.nan, np.float32)
    on.run("joined", [out, parts, 300, 898])
    for row in range(5):
        assert (out[row] == [*parts[0, row], *parts[1, row], *parts[2, row, :298]]).all()


@TEXT
def test_rows_of_the_last_tokens(dtype, rng, on):
    """By a token, or by that of a slot; of a rank's part of the table."""
    table = rng.standard_normal((9, 6)).astype(FLOATS[dtype])
    latest = np.array([20, 28, 3, 24, 29, 0, 21], np.int32)
    index = np.array([22, -1, -2, 19, -3, -7, 0], np.int32)
    out = np.full((7, 6), np.nan, table.dtype)
    on.run("take", [out, table, index, latest, np.int64(3), 3, 20, 9])
    none = np.zeros(6)
    assert (out == np.stack([table[2], table[0], table[8], none, none, table[1], none])).all()


@TEXT
def test_convolution(dtype, rng, on):
    """Two requests in slots 3 and 1: with what went before, token by token."""
    kind, channels, lengths, slots = FLOATS[dtype], 300, [5, 1], [3, 1]
    x = rng.standard_normal((6, channels + 8)).astype(kind)
    weight = rng.standard_normal((channels, 4)).astype(np.float32)
    state = rng.standard_normal((5, channels, 3)).astype(kind)
    before, out = state.copy(), np.full((6, channels), np.nan, kind)
    starts = np.array([0, 5, 6], np.int64)
    view = x[:, :channels]
    on.run("convolve", [out, view, weight, state, np.array(slots, np.int32), starts,
                        np.int64(x.shape[1]), np.int64(channels * 3), channels])  # fmt: skip
    at = 0
    for slot, length in zip(slots, lengths, strict=True):
        seen = [*before[slot].T.astype(np.float64)]
        for t in range(at, at + length):
            seen.append(view[t].astype(np.float64))
            y = sum(weight[:, i] * seen[len(seen) - 4 + i] for i in range(4))
            close(out[t], y / (1 + np.exp(-y)), dtype)
        assert (state[slot] == np.stack(seen[-3:], 1).astype(kind)).all()
        at += length
    untouched = [0, 2, 4]
    assert (state[untouched] == before[untouched]).all()


@TEXT
def test_decays(dtype, rng, on):
    n, heads = 70, 6
    ba = (rng.standard_normal((n, 2 * heads)) * 8).astype(FLOATS[dtype])
    a_log = rng.uniform(0, 2, heads).astype(np.float32)
    dt_bias = rng.uniform(-4, 0, heads).astype(np.float32)
    alpha, beta = (np.full((n, heads), np.nan, np.float32) for _ in "ab")
    on.run("decays", [alpha, beta, ba, a_log, dt_bias, n, heads])
    b, a = ba[:, :heads].astype(float), ba[:, heads:].astype(float) + dt_bias
    softplus = np.where(a > 0, a, 0) + np.log1p(np.exp(-np.abs(a)))
    assert np.abs(alpha - np.exp(-np.exp(a_log.astype(float)) * softplus)).max() < 1e-5
    assert np.abs(beta - 1 / (1 + np.exp(-b))).max() < 1e-5


@TEXT
@pytest.mark.parametrize("how", [glue.SIGMOID, glue.SILU])
def test_gates(dtype, how, rng, on):
    x = rng.standard_normal((9, 520)).astype(FLOATS[dtype])
    wide = (rng.standard_normal((9, 600)) * 3).astype(x.dtype)
    gate, before = wide[:, 40:560], x.astype(np.float64)
    on.run("combined", [x, gate, np.int64(600), 520, how])
    g = gate.astype(np.float64)
    close(x, before / (1 + np.exp(-g)) * (g if how == glue.SILU else 1), dtype)


@TEXT
def test_biases(dtype, rng, on):
    x = rng.standard_normal((9, 520)).astype(FLOATS[dtype])
    bias, before = rng.standard_normal(520).astype(x.dtype), x.astype(np.float64)
    on.run("combined", [x, bias, np.int64(0), 520, glue.PLUS])
    close(x, before + bias.astype(np.float64), dtype)


@TEXT
def test_scales(dtype, rng, on):
    """By numbers as sqrt(hidden), which is rounded first, is of embeddings."""
    x = rng.standard_normal((9, 520)).astype(FLOATS[dtype])
    factors, before = rng.uniform(1, 90, 520).astype(x.dtype), x.astype(np.float64)
    on.run("combined", [x, factors, np.int64(0), 520, glue.TIMES])
    close(x, before * factors.astype(np.float64), dtype)


@TEXT
@pytest.mark.parametrize("is_normed", [0, 1])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "rotary"),
    [(4, 2, 64, 64), (5, 1, 256, 64), (16, 8, 128, 128), (7, 1, 96, 40)],
)
def test_heads_and_their_pages(dtype, is_normed, heads, kv_heads, dim, rotary, rng, on):
    """Two requests over pages of 4 tokens, the second from its 5th token on."""
    kind, positions = FLOATS[dtype], np.array([0, 1, 2, 3, 4, 5, 6], np.int32)
    requests = np.array([0, 0, 0, 0, 1, 1, 1], np.int32)
    indptr, indices = np.array([0, 1, 3], np.int32), np.array([5, 0, 2], np.int32)
    width = (heads + 2 * kv_heads) * dim
    qkv = (rng.standard_normal((7, width + 24)) * 3).astype(kind)
    before = qkv.astype(np.float64)
    norms = [(1 + rng.standard_normal(dim) * 0.1).astype(kind) for _ in "qk"]
    cos_sin = rng.standard_normal((9, rotary)).astype(np.float32)
    caches = [np.full((6, 4, kv_heads, dim), 7, kind) for _ in "kv"]
    q = np.full((7, heads, dim), 7, kind)
    on.run("place", [q, *caches, qkv[:, :width], *norms, cos_sin, positions, requests, indptr,
                     indices, np.uint64(0), np.int64(width + 24), np.int64(4 * kv_heads * dim), 0,
                     heads, kv_heads, dim, rotary, 4, np.float32(1e-5), is_normed])  # fmt: skip
    used = np.zeros((6, 4), bool)
    for t, position in enumerate(positions):
        row = before[t, :width].reshape(-1, dim)
        page = indices[indptr[requests[t]] + position // 4]
        used[page, position % 4] = True
        place = caches[0][page, position % 4], caches[1][page, position % 4]
        for h in range(heads + kv_heads):
            x = row[h]
            if is_normed:
                x = x / np.sqrt((x * x).mean() + 1e-5) * norms[h >= heads].astype(np.float64)
            turned = x.copy()
            for i in range(rotary // 2):
                j, (cos, sin) = i + rotary // 2, cos_sin[position, [i, i + rotary // 2]]
                turned[i], turned[j] = x[i] * cos - x[j] * sin, x[j] * cos + x[i] * sin
            got = q[t, h] if h < heads else place[0][h - heads]
            size = np.abs(x).max() * 4
            step = 2.0**-10 if dtype == "float16" else 2.0**-7
            assert (
                np.abs(got.astype(np.float64) - turned) <= step * np.abs(turned) + 1e-5 * size
            ).all()
        assert (place[1].astype(np.float64) == row[heads + kv_heads :]).all()
    for cache in caches:
        assert (cache[~used] == 7).all()
    assert (qkv.astype(np.float64) == before).all()


@TEXT
def test_queries_of_pieces(dtype, rng, on):
    """Of two requests, in three and in one of five pieces; the others' memory stays."""
    kind, heads, dim = FLOATS[dtype], 3, 128
    qkv = rng.standard_normal((2, 5 * dim)).astype(kind)
    q, caches = np.full((10, heads, dim), 7, kind), [np.full((4, 2, 1, dim), 7, kind) for _ in "kv"]
    starts = np.array([0, 1, 2, 3, 3, 3, 4, 4, 4, 4, 4], np.int32)
    positions, norm = np.array([5, 0], np.int32), np.ones(dim, kind)
    cos_sin = np.tile(np.repeat([1, 0], dim // 2).astype(np.float32), (6, 1))
    requests, indptr = np.array([0, 1], np.int32), np.array([0, 3, 4], np.int32)
    indices = np.array([2, 1, 3, 0], np.int32)
    on.run("place", [q, *caches, qkv, norm, norm, cos_sin, positions, requests, indptr, indices,
                     starts, np.int64(5 * dim), np.int64(2 * dim), 5, heads, 1, dim, dim, 2,
                     np.float32(1e-5), 0])  # fmt: skip
    expected = np.full_like(q, 7)
    expected[:3], expected[5] = qkv[:, : heads * dim].reshape(2, heads, dim)
    assert (q == expected).all()
    for cache, first in zip(caches, (heads * dim, (heads + 1) * dim), strict=True):
        assert (cache[3, 1, 0] == qkv[0, first : first + dim]).all()
        assert (cache[0, 0, 0] == qkv[1, first : first + dim]).all()


@TEXT
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("pieces", [1, 16, 32])
def test_attention_of_pieces(dtype, dim, pieces, rng, on):
    """Merged as by float64; pieces without pages hold NaN."""
    kind, heads, n = FLOATS[dtype], 5, 3
    counts = np.array([pieces, 1, rng.integers(1, pieces + 1)])
    is_some = np.arange(pieces) < counts[:, None]
    starts = np.concatenate([[0], np.cumsum(is_some * rng.integers(1, 4, is_some.shape))])
    parts = rng.standard_normal((n, pieces, heads, dim)).astype(kind)
    lse = (rng.standard_normal((n, pieces, heads)) * 3 + 5).astype(np.float32)
    parts[~is_some], lse[~is_some] = np.nan, np.nan
    out = np.full((n, heads, dim), np.nan, kind)
    flat = parts.reshape(-1, heads, dim), lse.reshape(-1, heads), starts.astype(np.int32)
    on.run("merged", [out, *flat, pieces, dim])
    shares = np.where(is_some[..., None], 2 ** lse.astype(np.float64), 0)
    shares = (shares / shares.sum(1, keepdims=True))[..., None]
    expected = np.where(is_some[..., None, None], parts.astype(np.float64) * shares, 0).sum(1)
    step = 2.0**-11 if dtype == "float16" else 2.0**-8
    assert (np.abs(out - expected) <= step * np.abs(expected) + 1e-5).all()


@pytest.mark.parametrize(("is_normed", "shared"), [(0, 0), (1, 0), (1, 1)])
@pytest.mark.parametrize(("count", "top_k"), [(1, 1), (8, 3), (60, 60), (128, 8), (1024, 5)])
def test_routes(count, top_k, is_normed, shared, rng, on):
    """Of few different logits, so that some are equal; of those the first come first.  The expert
    of all tokens comes last.
    """
    logits = (rng.integers(-20, 20, (7, count + shared)) / 4).astype(np.float32)
    bias = (rng.integers(-4, 4, count) / 4).astype(np.float32)
    shape = 7, top_k + shared
    experts, shares = np.full(shape, -1, np.int32), np.full(shape, np.nan, np.float32)
    on.run("route", [experts, shares, logits, bias, count, top_k, is_normed, shared])
    if shared:
        assert (experts[:, top_k] == count).all()
        assert np.abs(shares[:, top_k] - 1 / (1 + np.exp(-logits[:, count]))).max() < 1e-5
    experts, shares = experts[:, :top_k], shares[:, :top_k]
    for i, row in enumerate((logits[:, :count] + bias).astype(np.float64)):
        best = sorted(range(count), key=lambda e, row=row: (-row[e], e))[:top_k]
        assert experts[i].tolist() == best
        whole = np.exp(row[best] if is_normed else row).sum()
        assert np.abs(shares[i] - np.exp(row[best]) / whole).max() < 1e-5


def parts(rows):
    return np.zeros((rows, PARTS), np.int32)


@pytest.mark.parametrize("of", ["logits", "top_k", "top_p", "both"])
@pytest.mark.parametrize("vocab", [1, 2, 257, 1024, 5000, 151_936])
def test_draw(vocab, of, rng, on):
    """The first token whose sum passes the number; few probabilities, so that sums are exact."""
    rows, kept = 12, np.arange(12) % 2 == (of == "both")
    counts = rng.integers(0, 3, (rows, vocab)) * (rng.random((rows, vocab)) < 50 / vocab)
    counts[:, rng.integers(0, vocab)] = 4
    probs = (counts / 1024).astype(np.float32)
    temperature = rng.uniform(0.2, 3, rows).astype(np.float32)
    with np.errstate(divide="ignore"):
        logits = ((np.log(counts) + 5) * temperature[:, None]).astype(np.float32)
    uniform = rng.random(rows).astype(np.float32)
    uniform[0], uniform[1], uniform[2] = 0, 1 - 2**-24, -1
    min_p = rng.choice([0, 0.3, 0.6], rows).astype(np.float32)
    top_k = np.full(rows, vocab, np.int32)
    top_p = np.full(rows, 4, np.float32)
    if of == "top_k":
        top_k[:] = vocab - 1
    elif of != "logits":
        top_p[kept] = 0.9
    is_whole = (top_k == vocab) & (top_p > 1)
    logits[~is_whole], probs[is_whole] = np.nan, np.nan  # not looked at
    logits[~is_whole, 0] = 0
    tokens = np.full(rows, -1, np.int32)
    on.run("draw", [tokens, parts(rows), logits, probs, temperature, top_k, top_p, uniform, min_p,
                    vocab])  # fmt: skip
    for row, u, least, token, by_logits in zip(
        counts, uniform, min_p, tokens, is_whole, strict=True
    ):
        if u < 0:
            assert token == row.argmax()
            continue
        left = np.where(row >= least * row.max(), row, 0)
        sums = np.cumsum(left)
        near = 1e-5 * sums[-1] if by_logits else 0
        assert left[token] > 0
        assert sums[token] - left[token] <= float(u) * sums[-1] + near
        assert float(u) * sums[-1] < sums[token] + near


def test_draws_leave_room_for_the_next(rng, on):
    """What is kept of a row, which the last block clears."""
    kept = parts(5)
    for _ in range(3):
        logits = rng.standard_normal((5, 3000)).astype(np.float32)
        temperature, tokens = np.ones(5, np.float32), np.full(5, -1, np.int32)
        on.run("draw", [tokens, kept, logits, logits, temperature, np.full(5, 3000, np.int32),
                        4 * temperature, -temperature, 0 * temperature, 3000])  # fmt: skip
        assert tokens.tolist() == logits.argmax(1).tolist()


@pytest.mark.parametrize("top_p", [0.5, 4])
def test_a_draw_of_what_is_no_probability(top_p, rng, on):
    """NaN, infinity, nothing at all: a token of the vocabulary in any case."""
    vocab = 300
    wrong = [np.nan, np.inf, 0, -1, -np.inf]
    rows = np.array([np.full(vocab, x) for x in wrong for _ in range(4)], np.float32)
    rows[::4, 7] = 0.5
    uniform = np.tile(np.float32([-1, 0, 0.5, 1 - 2**-24]), len(wrong))
    min_p = rng.choice([0, 0.3], len(rows)).astype(np.float32)
    tokens, ones = np.full(len(rows), -1, np.int32), np.ones(len(rows), np.float32)
    with np.errstate(invalid="ignore"):
        on.run("draw", [tokens, parts(len(rows)), rows, rows, ones,
                        np.full(len(rows), vocab, np.int32), top_p * ones, uniform, min_p,
                        vocab])  # fmt: skip
    assert ((tokens >= 0) & (tokens < vocab)).all()


def test_penalties(rng, on):
    rows, slots, vocab = 5, 7, 333
    logits = (rng.standard_normal((rows, vocab)) * 4).astype(np.float32)
    counts = rng.choice([0, 0, 1, 2, 3, 6, 9], (slots, vocab)).astype(np.int32)
    which = rng.permutation(slots)[:rows].astype(np.int32)
    presence, frequency = (rng.uniform(-2, 2, rows).astype(np.float32) for _ in "ab")
    repetition = rng.uniform(0.5, 2, rows).astype(np.float32)
    exact = logits.astype(np.float64)
    for i in range(rows):
        for v in range(vocab):
            seen, times = counts[which[i], v] > 0, counts[which[i], v] // 2
            if seen:
                exact[i, v] *= repetition[i] if exact[i, v] < 0 else 1 / float(repetition[i])
            exact[i, v] -= frequency[i] * float(times) + presence[i] * float(times > 0)
    on.run("penalise", [logits, counts, which, presence, frequency, repetition, vocab])
    assert np.abs(logits - exact).max() < 1e-4
    before, tokens = counts.copy(), rng.integers(0, vocab, rows).astype(np.int32)
    on.run("count", [counts, tokens, which, rows, vocab])
    before[which, tokens] += 2
    assert (counts == before).all()


def test_biases_and_masks(rng, on):
    rows, vocab = 4, 333
    logits = rng.standard_normal((rows, vocab)).astype(np.float32)
    exact = logits.astype(np.float64)
    places = rng.permutation(rows * vocab)[:700].astype(np.int32)
    values = rng.standard_normal(700).astype(np.float32)
    values[::9] = -np.inf
    exact.reshape(-1)[places] += values
    on.run("add", [logits, places, values, 700])
    assert np.allclose(logits, exact, atol=1e-6)
    bits = rng.integers(-(2**31), 2**31, (2, -(-vocab // 32)), np.int64).astype(np.int32)
    before = logits.copy()
    on.run("allow", [logits, bits, np.array([3, 1], np.int32), vocab])
    for row, line in ((3, bits[0]), (1, bits[1])):
        for v in range(vocab):
            if not int(line[v // 32]) >> v % 32 & 1:
                before[row, v] = -np.inf
    assert (logits == before).all()


@pytest.mark.parametrize("vocab", [20, 257, 5000, 151_936])
@pytest.mark.parametrize("top", [0, 3, 20])
def test_log_probabilities(vocab, top, rng, on):
    rows = 3
    logits = (rng.standard_normal((rows, vocab)) * 5).astype(np.float32)
    logits[1] = np.round(logits[1])  # many are equal: the first ones count
    tokens = rng.integers(0, vocab, rows).astype(np.int32)
    values, ids = np.full((rows, 21), np.nan, np.float32), np.full((rows, 20), -1, np.int32)
    on.run("logprobs", [values, ids, logits, tokens, vocab, top])
    exact = logits.astype(np.float64)
    exact -= exact.max(1, keepdims=True)
    exact -= np.log(np.exp(exact).sum(1, keepdims=True))
    for row, told, those, token in zip(exact, values, ids, tokens, strict=True):
        order = sorted(range(vocab), key=lambda v: (-row[v], v))[:top]
        assert those[:top].tolist() == order
        assert np.abs(told[: top + 1] - row[[token, *order]]).max() < 2e-4
    assert np.isnan(values[:, top + 1 :]).all()
