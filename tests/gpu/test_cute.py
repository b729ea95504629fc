"""Modules of CuTe DSL, called as any other: of FlashInfer 0.7.2.post1, and of other packages.

`fi-ffi build --release 0.7.2.post1 rmsnorm_cute qk_rmsnorm_cute` makes the first; those of
`gdn_decode` and `kda_decode` are called by the tests of tests/ops. FI_FFI_CUTE names a folder with
what `fi-ffi build --cute` makes of the functions of examples/cute_kernels.py: quack's RMSNorm and
FlashAttention 4's forward. None of these has torch in its way.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

import fi_ffi

from tests.helpers.untyped_calls import (
    BF16,
    HALF,
    SUM,
    call,
    float64,
    judged,
    module,
    poisoned,
)

RMSNORM = "rmsnorm_sm90a_cute_dsl_rmsnorm_kernel_bfloat16_4096_bias0"
QK_RMSNORM = "qk_rmsnorm_sm90a_cute_dsl_qkrmsnorm_kernel_bfloat16_d128_bias0"


def only(name):
    """The one function of a module, or the test is skipped."""
    found = module(name)
    (symbol,) = found.entries()
    return found.entry(symbol)


@pytest.mark.parametrize("rows", [1, 33, 4096])
def test_rmsnorm(rows, rng, to_gpu, stream):
    entry = only(RMSNORM)
    x, weight = (rng.standard_normal(shape).astype(BF16) for shape in ((rows, 4096), (4096,)))
    expected = float64(x) * float64(weight)
    expected /= np.sqrt((float64(x) ** 2).mean(1, keepdims=True) + 1e-6)
    out = to_gpu(poisoned((rows, 4096), BF16))
    call(entry, to_gpu(x), to_gpu(weight), out, rows, 1e-6, stream=stream)
    judged(out, expected, (HALF[BF16] + SUM) * np.abs(expected) + 1e-30)


@pytest.mark.parametrize(("tokens", "heads"), [(1, 1), (33, 8), (512, 40)])
def test_qk_rmsnorm(tokens, heads, rng, to_gpu, stream):
    """Heads of a wider tensor, in place of what `qk_rmsnorm` of FlashInfer's `norm` computes."""
    entry = only(QK_RMSNORM)
    wide, weight = (rng.standard_normal(n).astype(BF16) for n in ((tokens, heads + 3, 128), 128))
    x = wide[:, 2 : 2 + heads]
    expected = float64(x) * float64(weight)
    expected /= np.sqrt((float64(x) ** 2).mean(-1, keepdims=True) + 1e-6)
    placed, out = to_gpu(wide), to_gpu(poisoned(x.shape, BF16))
    view = fi_ffi.TensorDesc(
        placed.desc().ptr + 2 * 2 * 128, x.shape, "bfloat16",
        strides=((heads + 3) * 128, 128, 1),
    )  # fmt: skip
    call(entry, view, to_gpu(weight), out, tokens, heads, 1e-6, stream=stream)
    judged(out, expected, (HALF[BF16] + SUM) * np.abs(expected) + 1e-30)


def test_a_wrong_call_is_refused(to_gpu, stream):
    entry = only(RMSNORM)
    x = to_gpu(np.zeros((2, 4096), BF16))
    out, weight = to_gpu(poisoned((2, 4096), BF16)), to_gpu(np.zeros(4095, BF16))
    with pytest.raises(fi_ffi.ArgumentTypeError, match=r"Tensor\(\[n0, 4096\], bfloat16\)"):
        call(entry, x, weight, out, 2, stream=stream)
    with pytest.raises(fi_ffi.KernelError, match="Mismatched"):
        call(entry, x, weight, out, 2, 1e-6, stream=stream)
    assert (out.get().view(np.uint16) == 0xFFFF).all()


# Kernels of other packages


def made_of(function):
    """The one function of a library that `fi-ffi build --cute` made, or the test is skipped."""
    folder = os.environ.get("FI_FFI_CUTE")
    found = sorted(Path(folder).glob(f"{function}_sm*.so")) if folder else []
    if not found:
        pytest.skip(f"FI_FFI_CUTE names no folder with a kernel of {function}")
    module = fi_ffi.module(found[0])
    (symbol,) = module.entries()
    return module.entry(symbol)


@pytest.mark.parametrize("rows", [1, 33, 4096])
@pytest.mark.parametrize("residual", [False, True])
def test_quack_rmsnorm(rows, residual, rng, to_gpu, stream):
    entry = made_of("rmsnorm_residual" if residual else "rmsnorm")
    x, before = (rng.standard_normal((rows, 4096)).astype(BF16) for _ in range(2))
    weight = rng.standard_normal(4096).astype(BF16)
    total = float64(x) + float64(before) * residual
    expected = total * float64(weight) / np.sqrt((total**2).mean(1, keepdims=True) + 1e-6)
    out, summed = (to_gpu(poisoned((rows, 4096), BF16)) for _ in range(2))
    more = (to_gpu(before), out, summed) if residual else (None, out, None)
    call(entry, to_gpu(x), to_gpu(weight), None, *more, None, None, 1e-6, stream=stream)
    judged(out, expected, (HALF[BF16] + SUM) * np.abs(expected) + 1e-30)
    if residual:
        judged(summed, total, (HALF[BF16] + SUM) * np.abs(total) + 1e-30)


def attended(q, k, v, scale):
    """Causal attention of one request in float64, the last query sees all keys: output, lse, and
    the sum of what is added up for the output."""
    q, k, v = map(float64, (q, k, v))
    k, v = (np.repeat(x, q.shape[1] // k.shape[1], axis=1) for x in (k, v))
    scores = np.einsum("qhd,khd->hqk", q, k) * scale
    hidden = np.triu(np.ones(scores.shape[1:], bool), 1 + len(k) - len(q))
    scores[:, hidden] = -np.inf
    top = scores.max(-1, keepdims=True)
    weights = np.exp(scores - top)
    sums = weights.sum(-1, keepdims=True)
    out, sizes = (np.einsum("hqk,khd->qhd", weights / sums, x) for x in (v, np.abs(v)))
    return out, (top + np.log(sums))[..., 0], sizes


def judged_attention(out, lse, parts):
    """The weights are rounded to bfloat16 before they meet the values."""
    expected, lses, sizes = map(np.stack, zip(*parts, strict=True))
    judged(out, expected, HALF[BF16] * (np.abs(expected) + 1.01 * sizes) + 1e-30)
    judged(lse, lses, 2.0**-16 * (np.abs(lses) + 1))


@pytest.mark.parametrize(
    ("batch", "queries", "keys"), [(1, 1, 1), (2, 1, 300), (3, 64, 64), (2, 300, 1000)]
)
def test_flash_attention_4(batch, queries, keys, rng, to_gpu, stream):
    entry = made_of("attention")
    drawn = lambda *shape: rng.standard_normal(shape).astype(BF16)  # noqa: E731
    q, k, v = drawn(batch, queries, 32, 128), drawn(batch, keys, 8, 128), drawn(batch, keys, 8, 128)
    out = to_gpu(poisoned(q.shape, BF16))
    lse = to_gpu(poisoned((batch, 32, queries), np.float32))
    scale = float(rng.uniform(0.05, 0.15))
    later = (None, None, None, None, (None, None), None, None)
    call(entry, to_gpu(q), to_gpu(k), to_gpu(v), out, lse, scale, *[None] * 5, *later,
         stream=stream)  # fmt: skip
    parts = [attended(q[i], k[i], v[i], np.float32(scale)) for i in range(batch)]
    judged_attention(out, lse, parts)


@pytest.mark.parametrize("queries", [1, 128, 200])
def test_flash_attention_4_over_pages(queries, rng, to_gpu, stream):
    """Pages in any order, of a cache that is not a number elsewhere."""
    entry = made_of("attention_paged")
    lengths = rng.integers(queries, 1000, 3).astype(np.int32)
    used, pages = -(-lengths // 128), 40
    table = np.zeros((3, 8), np.int32)
    free = rng.permutation(pages)
    caches = [poisoned((pages, 128, 8, 128), BF16) for _ in range(2)]
    tokens = []
    for row, (length, count) in enumerate(zip(lengths, used, strict=True)):
        table[row, :count], free = free[:count], free[count:]
        kv = [rng.standard_normal((length, 8, 128)).astype(BF16) for _ in range(2)]
        for cache, new in zip(caches, kv, strict=True):
            for page, start in zip(table[row], range(0, length, 128), strict=False):
                part = new[start : start + 128]
                cache[page, : len(part)] = part
                cache[page, len(part) :] = 0
        tokens.append(kv)
    q = rng.standard_normal((3, queries, 32, 128)).astype(BF16)
    out = to_gpu(poisoned(q.shape, BF16))
    lse = to_gpu(poisoned((3, 32, queries), np.float32))
    later = (None, None, None, None, (None, None), None, None)
    call(entry, to_gpu(q), *map(to_gpu, caches), out, lse, 0.09, None, None, None,
         to_gpu(lengths), to_gpu(table), *later, stream=stream)  # fmt: skip
    parts = [attended(one, *kv, np.float32(0.09)) for one, kv in zip(q, tokens, strict=True)]
    judged_attention(out, lse, parts)


def test_calls_that_the_signature_excludes(to_gpu, stream):
    entry = made_of("rmsnorm")
    x, out = to_gpu(np.zeros((2, 4096), BF16)), to_gpu(poisoned((2, 4096), BF16))
    weight = to_gpu(np.zeros(4095, BF16))
    with pytest.raises(fi_ffi.ArgumentTypeError, match="mB: None`: got .*, expected None"):
        call(entry, x, x, x, None, out, None, None, None, 1e-6, stream=stream)
    with pytest.raises(fi_ffi.KernelError, match="Mismatched"):
        call(entry, x, weight, None, None, out, None, None, None, 1e-6, stream=stream)
    assert (out.get().view(np.uint16) == 0xFFFF).all()
