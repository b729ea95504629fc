"""Kernels that have no row, called through `fi_ffi.module` and held to their own formulas."""

from __future__ import annotations

import numpy as np
import pytest

from tests.helpers.untyped_calls import (
    BF16,
    SUM,
    call,
    float64,
    judged,
    mhc_post,
    mhc_pre,
    module,
    poisoned,
    rounded,
)

EPS = {"rms": 1e-5, "pre": 3e-3, "sinkhorn": 1e-4}


@pytest.mark.parametrize("tokens", [1, 37])
@pytest.mark.parametrize("hidden", [8, 77, 1280, 4096, 7168])
def test_mhc_post(tokens, hidden, rng, to_gpu, stream):
    x = rng.standard_normal((tokens, hidden)).astype(BF16)
    residual = rng.standard_normal((tokens, 4, hidden)).astype(BF16)
    post = rng.uniform(-2, 2, (tokens, 4)).astype(np.float32)
    comb = rng.uniform(-1, 1, (tokens, 4, 4)).astype(np.float32)
    out = to_gpu(poisoned((tokens, 4, hidden), BF16))
    given = map(to_gpu, (x, residual, post, comb))
    call(module("mhc").mhc_post, out, *given, stream=stream)
    expected, magnitude = mhc_post(x, residual, post, comb)
    judged(out, expected, rounded(BF16, expected) + SUM * magnitude)


@pytest.mark.parametrize("splits", [None, 1, 4, 16], ids=lambda splits: f"splits={splits}")
@pytest.mark.parametrize("block", [0, 512])
@pytest.mark.parametrize("repeats", [1, 20])
def test_mhc_pre(splits, block, repeats, rng, to_gpu, stream):
    """Without splits the kernel adds up the squares itself."""
    tokens, hidden = 19, 1544
    residual = rng.standard_normal((tokens, 4, hidden)).astype(BF16)
    dots = (2 * rng.standard_normal((splits or 1, tokens, 24))).astype(np.float32)
    squares = rng.uniform(1, 2, (splits or 1, tokens)).astype(np.float32) * hidden
    scale = rng.uniform(0.5, 1.5, 3).astype(np.float32)
    base = rng.standard_normal(24).astype(np.float32)
    shapes = {(tokens, 4): np.float32, (tokens, 4, 4): np.float32, (tokens, hidden): BF16}
    outs = [to_gpu(poisoned(shape, dtype)) for shape, dtype in shapes.items()]
    single = splits in (None, 1)
    given = [to_gpu(array[0] if single else array) for array in (dots, squares)]
    rest = [to_gpu(array) for array in (residual, scale, base)]
    k = 4 * hidden if splits is None else 3 * hidden
    numbers = (*EPS.values(), 1.5, repeats)
    if splits is None:
        entry = module("mhc").mhc_pre_big_fuse_with_prenorm
        call(entry, *outs, given[0], *rest, *numbers, block, stream=stream)
        total = np.square(float64(residual)).sum((1, 2))
    else:
        entry = module("mhc").mhc_pre_big_fuse
        call(entry, *outs, *given, *rest, k, *numbers, splits, block, stream=stream)
        total = float64(squares).sum(0)
    post, comb, layer, magnitude, logit = mhc_pre(
        float64(dots).sum(0), total, residual, scale, base, k=k, eps=EPS, post_factor=1.5,
        repeats=repeats,
    )  # fmt: skip
    # Logits are off by some last bits of their terms, exponentials by that; the 40 divisions
    # of `comb` by some more.
    off = (2.0**-16 * (1 + logit))[:, None]
    judged(outs[0], post, off * post)
    judged(outs[1], comb, 8 * off[..., None] * comb)
    judged(outs[2], layer, rounded(BF16, layer) + off * magnitude)
