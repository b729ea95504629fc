"""The small kernels of examples/llm: numpy's against plain loops, and CUDA's compiled."""

from __future__ import annotations

import subprocess
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from cuda.pathfinder import DynamicLibNotFoundError
from engine import glue

from tests.helpers import compiler
from tests.helpers.compiler import why_not_build

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
    on.run("take", [out, table, index, np.int64(3), 3])
    assert (out == np.stack([table[i] for i in index])).all()
    expected, values = table.copy(), rng.standard_normal((3, 6)).astype(table.dtype)
    places = rng.permutation(9)[:3].astype(np.int32)
    for i, place in enumerate(places):
        expected[place] = values[i]
    on.run("give", [table, values, places, np.int64(3), 3])
    assert (table == expected).all()


def test_tokens_of_slots(rng, on):
    latest = rng.integers(0, 1000, 7).astype(np.int32)
    tokens = np.array([5, -1, 0, -7, -3, 12], np.int32)
    on.run("resolve", [tokens, latest, len(tokens)])
    assert tokens.tolist() == [5, latest[0], 0, latest[6], latest[2], 12]


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
@pytest.mark.parametrize("is_silu", [0, 1])
def test_gates(dtype, is_silu, rng, on):
    x = rng.standard_normal((9, 520)).astype(FLOATS[dtype])
    wide = (rng.standard_normal((9, 600)) * 3).astype(x.dtype)
    gate, before = wide[:, 40:560], x.astype(np.float64)
    on.run("gated", [x, gate, np.int64(600), 520, is_silu])
    g = gate.astype(np.float64)
    close(x, before / (1 + np.exp(-g)) * (g if is_silu else 1), dtype)


@pytest.mark.parametrize("vocab", [1, 2, 257, 1024, 5000, 151_936])
def test_draw(vocab, rng, on):
    """The first token whose sum passes the number; few probabilities, so that sums are exact."""
    rows = 12
    counts = rng.integers(0, 3, (rows, vocab)) * (rng.random((rows, vocab)) < 50 / vocab)
    counts[:, rng.integers(0, vocab)] = 4
    probs = (counts / 1024).astype(np.float32)
    uniform = rng.random(rows).astype(np.float32)
    uniform[0], uniform[1], uniform[2] = 0, 1 - 2**-24, -1
    min_p = rng.choice([0, 0.3, 0.6], rows).astype(np.float32)
    tokens = np.full(rows, -1, np.int32)
    on.run("draw", [tokens, probs, uniform, min_p, vocab])
    for row, u, least, token in zip(counts, uniform, min_p, tokens, strict=True):
        if u < 0:
            assert token == row.argmax()
            continue
        left = np.where(row >= least * row.max(), row, 0)
        sums, chosen = np.cumsum(left), 0
        while sums[chosen] <= float(u) * sums[-1]:
            chosen += 1
        assert token == chosen


def test_nvcc_compiles_the_kernels(tmp_path):
    """NVRTC is what runs them; where only nvcc is, it says whether they are CUDA."""
    reason = why_not_build()
    if reason is not None:
        pytest.skip(reason)

    source = tmp_path / "glue.cu"
    source.write_text(glue.SOURCE)
    nvcc = compiler.nvcc()
    for dtype in FLOATS:
        flags = ["-DFLOAT16"] if dtype == "float16" else []
        command = [nvcc, "-cubin", "-arch=sm_90", *flags, "-o", str(tmp_path / "o"), str(source)]
        subprocess.run(command, check=True, timeout=120)
        code = (tmp_path / "o").read_bytes()
        assert all(name.encode() in code for name in glue.KERNELS)


def test_nvrtc_compiles_the_kernels():
    try:
        for dtype in FLOATS:
            assert glue.cubin(dtype, (9, 0))[:4] == b"\x7fELF"
    except DynamicLibNotFoundError:
        pytest.skip("NVRTC is not installed: fi-ffi[llm-gpu]")
