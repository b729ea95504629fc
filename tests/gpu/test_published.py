"""Kernels that others published: entries of tokenspeed-kernel's libraries, by fi_ffi.module.

FI_FFI_PUBLISHED names a folder with NAME/NAME.so, as `objs` of the wheel has them. Argument orders
and meanings are those of the wheel's own Python callers. Results are judged against float64, and
exactly where numbers are copied or counted.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fi_ffi
from tools.published import CALLED, SIGNATURES

torch: Any = importlib.import_module("torch") if importlib.util.find_spec("torch") else None

FOLDER = os.environ.get("FI_FFI_PUBLISHED")


@pytest.fixture(scope="module")
def library():
    """A library by name."""
    if torch is None:
        pytest.skip("torch is not installed")
    if FOLDER is None:
        pytest.skip("FI_FFI_PUBLISHED names no folder with tokenspeed-kernel's libraries")
    return lambda name: fi_ffi.module(Path(FOLDER) / name / f"{name}.so")


@pytest.fixture(autouse=True)
def on_a_stream(library):
    """torch's."""
    with fi_ffi.stream(torch.cuda.current_stream()):
        yield


@pytest.fixture
def drawn(rng):
    """Normal numbers on the GPU."""
    generator = torch.Generator("cuda").manual_seed(int(rng.integers(2**31)))

    def draw(*shape, dtype=torch.float32, scale=1.0):
        return (torch.randn(shape, generator=generator, device="cuda") * scale).to(dtype)

    draw.generator = generator
    return draw


def poisoned(*shape, dtype=None):
    return torch.full(shape, float("nan"), device="cuda").to(dtype or torch.float32)


def off(got, expected, rtol, atol):
    """The largest difference, as a part of what it may be."""
    assert got.shape == expected.shape
    expected = expected.double()
    part = (got.double() - expected).abs() / (atol + rtol * expected.abs())
    return float(part.nan_to_num(torch.inf).max())


HALF = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 1e-5}


def half(dtype):
    """What a result may be off by, as a part of it."""
    return HALF[str(dtype).removeprefix("torch.")]


@pytest.fixture
def dtype(request):
    """torch's, by name."""
    return getattr(torch, request.param)


@pytest.mark.parametrize("name", sorted(SIGNATURES))
def test_signatures(library, name):
    """As they were recorded."""
    found = library(name).signatures()
    told = {
        symbol: f"({', '.join(each.params)}) -> {each.result}" for symbol, each in found.items()
    }
    assert told == SIGNATURES[name]


@pytest.mark.parametrize("dtype", HALF, indirect=True)
@pytest.mark.parametrize(("rows", "vocab"), [(1, 32), (5, 1000), (3, 151_936), (200, 4099)])
@pytest.mark.parametrize("temperature", ["one", "scalar", "each"])
def test_softmax(library, drawn, rows, vocab, dtype, temperature):
    logits, out = drawn(rows, vocab, dtype=dtype, scale=4), poisoned(rows, vocab)
    workspace = torch.empty(1 << 20, dtype=torch.uint8, device="cuda")
    each = drawn(rows).abs() + 0.3 if temperature == "each" else None
    scalar = {"one": 1.0, "scalar": 0.7, "each": 0.0}[temperature]
    library("flashinfer_softmax").softmax(workspace, logits, out, each, scalar, False)
    divided = logits.double() / (scalar if each is None else each.double()[:, None])
    assert off(out, torch.softmax(divided, -1), 1e-5, 1e-7) <= 1


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"], indirect=True)
@pytest.mark.parametrize(("tokens", "heads", "dim"), [(1, 1, 64), (37, 8, 128), (300, 3, 512)])
def test_merge_state(library, drawn, tokens, heads, dim, dtype):
    """Of natural logarithms."""
    v = [drawn(tokens, heads, dim, dtype=dtype) for _ in "ab"]
    s = [drawn(tokens, heads, scale=3) for _ in "ab"]
    out, lse = poisoned(tokens, heads, dim, dtype=dtype), poisoned(tokens, heads)
    scale = math.log2(math.e)
    library("merge_state").merge_state(v[0], s[0], v[1], s[1], out, lse, scale, False)
    whole = torch.logaddexp(s[0].double(), s[1].double())
    shares = [torch.exp(each.double() - whole)[..., None] for each in s]
    assert off(lse, whole, 1e-5, 1e-5) <= 1
    expected = sum(share * each.double() for share, each in zip(shares, v, strict=True))
    assert off(out, expected, half(dtype), half(dtype)) <= 1


def turned(x, positions, dim, frequencies, interleave):
    """x [tokens, heads, size] with the first `dim` numbers of each head turned."""
    x = x.double().cpu()
    angles = positions.double().cpu()[:, None, None] * frequencies.double().cpu()
    part, rest = x[..., :dim], x[..., dim:]
    low, high = (part[..., ::2], part[..., 1::2]) if interleave else part.chunk(2, -1)
    cos, sin = torch.cos(angles), torch.sin(angles)
    both = low * cos - high * sin, high * cos + low * sin
    made = torch.stack(both, -1).flatten(-2) if interleave else torch.cat(both, -1)
    return torch.cat([made, rest], -1).cuda()


def llama31(frequencies, factor, low, high, old):
    smooth = ((old * frequencies / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
    return (1 - smooth) * frequencies / factor + smooth * frequencies


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"], indirect=True)
@pytest.mark.parametrize("interleave", [False, True])
@pytest.mark.parametrize(("size", "dim"), [(64, 64), (128, 128), (128, 64), (256, 256)])
@pytest.mark.parametrize("entry", [name for name, test in CALLED.items() if test == "test_rope"])
def test_rope(library, drawn, entry, size, dim, interleave, dtype):
    lengths, offsets = [3, 1, 40], [0, 100, 7]
    tokens = sum(lengths)
    q, k = drawn(tokens, 4, size, dtype=dtype), drawn(tokens, 2, size, dtype=dtype)
    outs = poisoned(*q.shape, dtype=dtype), poisoned(*k.shape, dtype=dtype)
    positions = torch.cat([torch.arange(n) + at for n, at in zip(lengths, offsets, strict=True)])
    starts = torch.tensor([0, 3, 4, 44], dtype=torch.int32, device="cuda")
    at = torch.tensor(offsets, dtype=torch.int32, device="cuda")
    ids = positions.to("cuda", torch.int32)
    scale, theta = 2.0, 1e4
    frequencies = theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    more = (1.0, 4.0, 512.0) if "llama31" in entry else ()
    used = llama31(frequencies, scale, *more) if more else frequencies / scale
    call = getattr(library("rope"), entry)
    if "cache" in entry:
        angles = torch.arange(256, dtype=torch.float64)[:, None] * used
        cache = torch.cat([torch.cos(angles), torch.sin(angles)], -1).float().cuda()
        call(q, k, *outs, cache, ids, interleave)
    elif "pos_ids" in entry:
        call(q, k, *outs, ids, dim, interleave, scale, theta, *more)
    else:
        call(q, k, *outs, starts, at, dim, interleave, scale, theta, *more)
    for x, out in zip((q, k), outs, strict=True):
        assert (
            off(out, turned(x, positions, dim, used, interleave), half(dtype), 3 * half(dtype)) <= 1
        )


@pytest.mark.parametrize("interleave", [False, True])
def test_a_typed_op_by_their_library(library, drawn, monkeypatch, interleave):
    """A folder of theirs is a source as any: FlashInfer's ops find a module that has its name."""
    monkeypatch.setenv("FI_FFI_RELEASE", "0.6.13")
    fi_ffi.use_kernels(FOLDER)
    try:
        tokens, size, dtype = 44, 128, torch.float16
        q, k = drawn(tokens, 4, size, dtype=dtype), drawn(tokens, 2, size, dtype=dtype)
        outs = poisoned(*q.shape, dtype=dtype), poisoned(*k.shape, dtype=dtype)
        ids = torch.arange(tokens, dtype=torch.int32, device="cuda") * 5
        fi_ffi.apply_rope_pos_ids(q, k, *outs, ids, interleave=interleave, rope_theta=1e4)
        with pytest.raises(fi_ffi.KernelNotFoundError, match="norm"):
            fi_ffi.rmsnorm(outs[0].flatten(1), q.flatten(1), q[0].flatten())
    finally:
        fi_ffi.use_kernels(None)
    used = 1e4 ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    for x, out in zip((q, k), outs, strict=True):
        expected = turned(x, ids.cpu(), size, used, interleave)
        assert off(out, expected, half(dtype), 3 * half(dtype)) <= 1


@pytest.mark.parametrize("interleave", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_rope_and_cache(library, drawn, fused, interleave):
    """Keys and values may go to their places in a cache in the same launch."""
    tokens, size, dtype = 33, 128, torch.bfloat16
    q, k = drawn(tokens, 8, size, dtype=dtype), drawn(tokens, 2, size, dtype=dtype)
    v = drawn(tokens, 2, size, dtype=dtype)
    outs = poisoned(*q.shape, dtype=dtype), poisoned(*k.shape, dtype=dtype)
    caches = poisoned(100, 2, size, dtype=dtype), poisoned(100, 2, size, dtype=dtype)
    where = torch.randperm(100, generator=drawn.generator, device="cuda")[:tokens]
    positions = torch.arange(tokens) * 3
    used = 1e4 ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    angles = torch.arange(256, dtype=torch.float64)[:, None] * used
    cache = torch.cat([torch.cos(angles), torch.sin(angles)], -1).float().cuda()
    more = (v, *caches, where) if fused else (None,) * 4
    library("rope").apply_rope_pos_ids_cos_sin_cache_fused(
        q, k, *outs, cache, positions.cuda(), interleave, *more, False
    )
    expected = turned(k, positions, size, used, interleave)
    assert (
        off(outs[0], turned(q, positions, size, used, interleave), half(dtype), 3 * half(dtype))
        <= 1
    )
    if fused:
        assert off(caches[0][where], expected, half(dtype), 3 * half(dtype)) <= 1
        assert torch.equal(caches[1][where], v)
        rest = torch.ones(100, dtype=torch.bool, device="cuda")
        rest[where] = False
        assert caches[0][rest].isnan().all() and caches[1][rest].isnan().all()
    else:
        assert off(outs[1], expected, half(dtype), 3 * half(dtype)) <= 1


@pytest.mark.parametrize(
    ("entry", "experts", "top_k", "renorm"),
    [("softplus_sqrt_topk_flash", 256, 6, True), ("softplus_sqrt_topk_flash", 384, 6, True),
     ("softmax_topk_flash", 768, 12, False)],
)  # fmt: skip
def test_routing(library, drawn, entry, experts, top_k, renorm):
    """The experts with the greatest scores plus biases; weights are scores alone."""
    rows = 77
    logits, bias = drawn(rows, experts), drawn(experts, scale=0.01)
    ids = torch.full((rows, top_k), -5, dtype=torch.int32, device="cuda")
    weights = poisoned(rows, top_k)
    call, scaling = getattr(library("routing"), entry), 2.5
    if entry == "softmax_topk_flash":
        bias[512:] = -10.0  # those beyond the real ones are never the greatest
        call(logits, bias, ids, weights, 512, scaling, renorm, False)
        scores = torch.softmax(logits.double(), -1)
    else:
        call(logits, bias, ids, weights, renorm, scaling)
        scores = torch.nn.functional.softplus(logits.double()).sqrt()
    judge_routes(scores, scores + bias.double(), ids, weights, renorm, scaling)


def judge_routes(scores, ranked, ids, weights, renorm, scaling):
    top_k, order = ids.shape[1], ids.long().sort(-1)
    best = ranked.topk(top_k, -1).indices.sort(-1).indices
    found = ranked.topk(top_k, -1).indices.gather(-1, best)
    assert torch.equal(order.values, found)
    expected = scores.gather(-1, order.values)
    if renorm:
        expected = expected / expected.sum(-1, keepdim=True)
    assert off(weights.gather(-1, order.indices), scaling * expected, 1e-4, 1e-6) <= 1


def test_routing_by_a_table(library, drawn):
    """Experts are those of the token's row in a table."""
    rows, experts, top_k, vocab = 50, 256, 6, 1000
    logits, weights = drawn(rows, experts), poisoned(rows, top_k)
    each = torch.rand(vocab, experts, generator=drawn.generator, device="cuda")
    table = each.topk(top_k, -1).indices.int()
    tokens = torch.randint(vocab, (rows,), generator=drawn.generator, device="cuda")
    ids = torch.full((rows, top_k), -5, dtype=torch.int32, device="cuda")
    library("routing").hash_softplus_sqrt_topk_flash(logits, tokens, table, ids, weights, True, 2.5)
    scores = torch.nn.functional.softplus(logits.double()).sqrt()
    expected = scores.gather(-1, table[tokens].long())
    expected = expected / expected.sum(-1, keepdim=True)
    assert torch.equal(ids, table[tokens])
    assert off(weights, 2.5 * expected, 1e-4, 1e-6) <= 1


@pytest.mark.parametrize("count", [2, 5, 8])
@pytest.mark.parametrize("entry", [name for name, test in CALLED.items() if test == "test_chains"])
def test_chains(library, drawn, entry, count):
    """A chain is accepted up to the first token that the target has otherwise."""
    requests, vocab = 40, 500
    target = torch.randint(
        vocab, (requests, count), generator=drawn.generator, device="cuda", dtype=torch.int32
    )
    candidates = torch.zeros_like(target)
    candidates[:, 1:] = target[:, :-1]
    wrong = torch.rand(requests, count, generator=drawn.generator, device="cuda") < 0.25
    candidates = torch.where(wrong, (candidates + 1) % vocab, candidates).contiguous()
    predicts = torch.full((requests * count,), -7, dtype=torch.int32, device="cuda")
    accepted = torch.full((requests, count), -1, dtype=torch.int32, device="cuda")
    counts = torch.full((requests,), -7, dtype=torch.int32, device="cuda")
    call = getattr(library("sampling_chain"), entry)
    if entry == "verify_chain_greedy":
        call(predicts, accepted, counts, candidates, target.long(), requests, count, False)
    else:  # of distributions that are certain
        probs = torch.nn.functional.one_hot(target.long(), vocab).float().contiguous()
        coins = torch.rand(requests, count, generator=drawn.generator, device="cuda") * 0.98 + 0.01
        last = coins[:, 0].contiguous()
        call(predicts, accepted, counts, candidates, coins, last, probs, None, 1.0, 1.0, True,
             False, 2.0, False)  # fmt: skip
    for i in range(requests):
        length = 0
        while length + 1 < count and candidates[i, length + 1] == target[i, length]:
            length += 1
        assert counts[i] == length
        wanted = [i * count + j if j <= length else -1 for j in range(count)]
        assert accepted[i].tolist() == wanted
        mine = predicts[i * count : i * count + length + 1]
        assert torch.equal(mine, target[i, : length + 1])


def bytes_of(drawn, *shape):
    return torch.randint(
        256, shape, generator=drawn.generator, device="cuda", dtype=torch.uint8
    )  # fmt: skip


@pytest.mark.parametrize("item", [64, 256, 1152])
@pytest.mark.parametrize("entry", [n for n, test in CALLED.items() if test == "test_transfers"])
def test_transfers(library, drawn, entry, item):
    """Tokens by index, between layers apart (lf) and all layers of a token together (pf)."""
    layers, tokens, count, layer = 3, 50, 17, 1
    pick = lambda: torch.randperm(tokens, generator=drawn.generator, device="cuda")[:count]  # noqa: E731
    source, target = pick(), pick()
    sides = 1 if "mla" in entry else 2
    page_first = (tokens, layers, item)
    layer_first = (layers, tokens, item)
    from_shape = page_first if "pf_lf" in entry else layer_first
    to_shape = page_first if "lf_pf" in entry else layer_first
    sources = [bytes_of(drawn, *from_shape) for _ in range(sides)]
    targets = [bytes_of(drawn, *to_shape) for _ in range(sides)]
    before = [each.clone() for each in targets]

    def given(memory, is_layer_first):
        if "all_layer" in entry and is_layer_first:
            places = [memory[i].data_ptr() for i in range(layers)]
            return torch.tensor(places, dtype=torch.int64).view(torch.uint64).cuda()
        return memory[layer] if is_layer_first else memory

    buffers = []
    for one, other in zip(sources, targets, strict=True):
        buffers += [given(one, from_shape is layer_first), given(other, to_shape is layer_first)]
    numbers = [item]
    if "pf_lf" in entry:
        numbers = [layer, item, layers * item]
    if "lf_pf" in entry:
        numbers = [item, layers * item]
    if "all_layer" in entry:
        numbers.append(layers)
    getattr(library("kvcacheio"), entry)(*buffers, source, target, *numbers, 2, 32)
    torch.cuda.synchronize()
    some = range(layers) if "all_layer" in entry else [layer]
    for one, other, old in zip(sources, targets, before, strict=True):
        for i in some:
            read = one[source, i] if "pf_lf" in entry else one[i, source]
            if "lf_pf" in entry:
                old[target, i] = read
            else:
                old[i, target] = read
        assert torch.equal(other, old)


@pytest.mark.parametrize("entry", [n for n, t in CALLED.items() if t == "test_transfers_by_head"])
def test_transfers_by_head(library, drawn, entry):
    """On one side pages have all tokens of a head together, with all layers of each."""
    layers, pages, page, heads, part, layer, count = 3, 6, 8, 4, 128, 2, 19
    tokens, item = pages * page, heads * part
    pick = lambda: torch.randperm(tokens, generator=drawn.generator, device="cuda")[:count]  # noqa: E731
    source, target = pick(), pick()
    by_head = [bytes_of(drawn, pages, heads, page, layers, part) for _ in "kv"]
    by_layer = [bytes_of(drawn, layers, tokens, heads, part) for _ in "kv"]
    is_read = entry == "transfer_kv_per_layer_ph_lf"
    old = [each.clone() for each in (by_layer if is_read else by_head)]
    call = getattr(library("kvcacheio"), entry)
    if is_read:
        buffers = [by_head[0], by_layer[0][layer], by_head[1], by_layer[1][layer]]
        call(*buffers, source, target, layer, item, layers * item, page, heads, 2, 32)
    else:
        lists = [
            torch.tensor([each[i].data_ptr() for i in range(layers)]).view(torch.uint64).cuda()
            for each in by_layer
        ]
        call(lists[0], by_head[0], lists[1], by_head[1], source, target, item, layers * item,
             layers, page, heads, 2, 32)  # fmt: skip
    torch.cuda.synchronize()
    for one, other, expected in zip(by_head, by_layer, old, strict=True):
        if is_read:
            expected[layer, target] = one[source // page, :, source % page, layer]
            assert torch.equal(other, expected)
        else:
            for i in range(layers):
                expected[target // page, :, target % page, i] = other[i, source]
            assert torch.equal(one, expected)


def topk_topp(made, probs, top_k, side):
    """Of rows of distinct probabilities, with a bound of p between two sums: the result, and the
    tokens that it must keep."""
    (rows, vocab), out = probs.shape, poisoned(*probs.shape)
    ranked = probs.double().sort(-1, descending=True).values
    # Of a few hundred tokens: sums that p can tell apart in float32.
    top_p, counts = [], [min(k, vocab, 2100) // 3 for k in top_k]
    for row, k, at in zip(ranked, top_k, counts, strict=True):
        sums = (row[:k] / row[:k].sum()).cumsum(0)
        top_p.append(float(sums[at] - (sums[at] - (sums[at - 1] if at else 0)) / 2))
    size = made.fused_topk_topp_workspace_size(rows, vocab)
    assert size == fi_ffi.fused_topk_topp_workspace_size(rows, vocab)
    workspace = torch.empty(size, dtype=torch.uint8, device="cuda")
    numbers = torch.tensor(top_k, dtype=torch.int32, device="cuda")
    top_p = torch.tensor(top_p, dtype=torch.float32, device="cuda")
    made.fused_topk_topp_renorm(probs, numbers, top_p, out, workspace, side, False)
    torch.cuda.synchronize()
    places = torch.tensor(counts, device="cuda")[:, None]
    return out, probs >= ranked.gather(1, places)


def check_topk_topp(made, probs, top_k, side):
    out, kept = topk_topp(made, probs, top_k, side)
    expected = torch.where(kept, probs.double(), 0)
    assert off(out, expected / expected.sum(-1, keepdim=True), 1e-4, 1e-7) <= 1


@pytest.fixture(params=["no side stream", "a side stream"])
def side(request):
    """The stream on which the kernel may overlap, as its own caller makes one."""
    stream = torch.cuda.Stream() if request.param.startswith("a ") else None
    yield stream.cuda_stream if stream else 0
    torch.cuda.synchronize()


@pytest.mark.parametrize("vocab", [1000, 32_000, 129_280])
def test_topk_topp(library, drawn, vocab, side):
    """2**30 keeps all for p."""
    probs = torch.softmax(drawn(8, vocab, scale=3), -1)
    top_k = [1, 2, 50, 1 << 30, 40, 7, 127, 128]
    check_topk_topp(library("fused_topk_topp"), probs, top_k, side)


@pytest.mark.parametrize("k", [129, 256, 257, 999, 2049])
@pytest.mark.parametrize("vocab", [32_000, 129_280])
def test_topk_topp_ignores_a_larger_k(library, drawn, vocab, side, k):
    """From k = 129 on p alone counts; the caller documents any k below the vocabulary."""
    probs = torch.softmax(drawn(3, vocab, scale=3), -1)
    out, kept = topk_topp(library("fused_topk_topp"), probs, [k] * 3, side)
    assert ((out != 0).sum(-1) > kept.sum(-1)).all()


@pytest.mark.parametrize(("tokens", "hidden"), [(1, 4096), (33, 7168), (5, 1024)])
@pytest.mark.parametrize(
    ("splits", "iterations", "threads"), [(1, 1, 128), (4, 5, 256), (64, 20, 512)]
)
@pytest.mark.parametrize("is_normed", [False, True])
def test_mixing_of_streams(library, drawn, tokens, hidden, splits, iterations, threads, is_normed):
    """mhc_big_fuse: sums over splits, the mixes of four residual streams, and the layer's input."""
    eps, hc_eps, norm_eps = 1e-6, 1e-3, 1e-5
    parts, scale, base = drawn(splits, tokens, 24), drawn(3), drawn(24)
    squares = drawn(splits, tokens).abs() * 4 * hidden / splits
    residual = drawn(tokens, 4, hidden, dtype=torch.bfloat16)
    weight = drawn(hidden, dtype=torch.bfloat16)
    out = poisoned(tokens, hidden, dtype=torch.bfloat16)
    post, comb = poisoned(tokens, 4), poisoned(tokens, 16)
    library("mhc_big_fuse").mhc_big_fuse(
        parts, squares, scale, base, residual, out, post, comb, hidden, eps, hc_eps, iterations,
        splits, tokens, weight if is_normed else out.reshape(-1)[:hidden], norm_eps, is_normed,
        threads, False,
    )  # fmt: skip
    mixed = (
        parts.double().sum(0) / torch.sqrt(squares.double().sum(0) / (4 * hidden) + eps)[:, None]
    )
    each = mixed * scale.double().repeat_interleave(torch.tensor([4, 4, 16], device="cuda"))
    before, after, both = (each + base.double()).split([4, 4, 16], -1)
    assert off(post, 2 * torch.sigmoid(after), 1e-4, 1e-5) <= 1
    square = torch.softmax(both.unflatten(-1, (4, 4)), -1) + hc_eps
    square = square / (square.sum(-2, keepdim=True) + hc_eps)
    for _ in range(iterations - 1):
        square = square / (square.sum(-1, keepdim=True) + hc_eps)
        square = square / (square.sum(-2, keepdim=True) + hc_eps)
    assert off(comb, square.flatten(1), 1e-4, 1e-5) <= 1
    expected = ((torch.sigmoid(before) + hc_eps)[..., None] * residual.double()).sum(1)
    if is_normed:
        sizes = torch.sqrt(expected.square().mean(-1, keepdim=True) + norm_eps)
        expected = expected / sizes * weight.double()
    assert off(out, expected, 2.0**-6, 2.0**-6) <= 1


def check_best(logits, out, starts, ends, k):
    """The best k of each row's span, from its start, in any order; -1 where there are fewer."""
    for i, (start, end) in enumerate(zip(starts, ends, strict=True)):
        count = min(k, end - start)
        places = out[i][out[i] >= 0].long()
        assert places.numel() == places.unique().numel() == count, f"row {i}: {places.numel()}"
        assert count == 0 or int(places.max()) < end - start
        got = logits[i, start + places].sort(descending=True).values
        assert torch.equal(got, logits[i, start:end].topk(count).values), f"row {i}"


LENGTHS = (1, 511, 512, 513, 1024, 2047, 2048, 2049, 8192, 8193, 32_768, 32_769, 100_000)


@pytest.mark.parametrize("k", [512, 1024, 2048])
def test_best_of_a_step(library, drawn, k):
    """dsv4_persistent_topk."""
    logits = drawn(len(LENGTHS), max(LENGTHS))
    out = torch.full((len(LENGTHS), k), -1, dtype=torch.int32, device="cuda")
    workspace = torch.zeros(1 << 20, dtype=torch.uint8, device="cuda")
    lengths = torch.tensor(LENGTHS, dtype=torch.int32, device="cuda")
    library("dsv4_attention").dsv4_persistent_topk(
        logits, lengths, out, workspace, k, logits.shape[1], 1
    )
    check_best(logits, out, [0] * len(LENGTHS), LENGTHS, k)


@pytest.mark.parametrize("k", [512, 1024, 2048])
@pytest.mark.parametrize("start", [0, 3])
def test_best_of_a_prompt(library, drawn, k, start):
    """dsv4_indexer_topk_prefill; places count from a row's start."""
    starts, ends = [start] * len(LENGTHS), [max(start, n) for n in LENGTHS]
    logits = drawn(len(LENGTHS), max(LENGTHS))
    out = torch.full((len(LENGTHS), k), -1, dtype=torch.int32, device="cuda")
    bounds = [torch.tensor(each, dtype=torch.int32, device="cuda") for each in (starts, ends)]
    library("dsv4_attention").dsv4_indexer_topk_prefill(logits, *bounds, out, k)
    check_best(logits, out, starts, ends, k)


@pytest.mark.parametrize("page_size", [64, 256])
def test_pages_of_an_indexer(library, drawn, page_size):
    """Of each page the values of all tokens come first, 64 bytes each, then 4 bytes of scales."""
    lengths = [1, page_size, page_size + 1, 5 * page_size - 1, 0, 77]
    most, total = 5, sum(lengths)
    cache = bytes_of(drawn, 40, page_size * 68)
    order = torch.randperm(40, generator=drawn.generator, device="cuda")
    table = order[: len(lengths) * most].int().reshape(len(lengths), most)
    starts = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32, device="cuda")
    values, scales = (torch.full((total, n), 17, dtype=torch.uint8, device="cuda") for n in (64, 4))
    library("dsv4_attention").dsv4_gather_paged_indexer_mxfp4_cache(
        cache, values, scales, table, starts, page_size
    )
    at = [
        (int(table[r, i // page_size]), i % page_size)
        for r, n in enumerate(lengths)
        for i in range(n)
    ]
    pages, places = (torch.tensor(each, device="cuda") for each in zip(*at, strict=True))
    of_values = cache[:, : page_size * 64].reshape(40, page_size, 64)
    of_scales = cache[:, page_size * 64 :].reshape(40, page_size, 4)
    assert torch.equal(values, of_values[pages, places])
    assert torch.equal(scales, of_scales[pages, places])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"], indirect=True)
@pytest.mark.parametrize(("tokens", "heads"), [(1, 64), (37, 64), (9, 128)])
def test_queries_and_latents(library, drawn, tokens, heads, dtype):
    """Queries are normed and turned in place; latents are turned, and in pages: 448 of fp8, 64 as
    given, and after all tokens of a page 8 bytes of scales, of which the last is 0."""
    page_size, pages, eps, dim = 64, 5, 1e-6, 512
    q, kv = drawn(tokens, heads, dim, dtype=dtype), drawn(tokens, dim, dtype=dtype)
    whole, given = q.double(), kv.double()
    cache = torch.full((pages, page_size * 584), 17, dtype=torch.uint8, device="cuda")
    before = cache.clone()
    slots = torch.randperm(pages * page_size, generator=drawn.generator, device="cuda")[:tokens]
    if tokens > 1:
        slots[1] = -1
    positions = torch.randint(500, (tokens,), generator=drawn.generator, device="cuda")
    angles = drawn(500, 32, scale=2)
    table = torch.cat([angles.cos(), angles.sin()], -1)
    library("dsv4_attention").fused_dsv4_qnorm_rope_kv_rope_quant_insert(
        q, kv, cache, slots, positions, table, eps, page_size, False
    )
    cos, sin = table[positions].double().chunk(2, -1)

    def turn(x):
        low, high = x[..., 448::2], x[..., 449::2]
        shape = (tokens, *[1] * (x.dim() - 2), 32)
        c, s = cos.reshape(shape), sin.reshape(shape)
        pairs = torch.stack([low * c - high * s, low * s + high * c], -1)
        return torch.cat([x[..., :448], pairs.flatten(-2)], -1)

    sizes = torch.sqrt(whole.square().mean(-1, keepdim=True) + eps)
    assert off(q, turn(whole / sizes), half(dtype), half(dtype)) <= 1
    turned_kv = turn(given)
    for i, slot in enumerate(slots.tolist()):
        if slot < 0:
            continue
        page, at = divmod(slot, page_size)
        row = cache[page, at * 576 : (at + 1) * 576]
        scales = cache[page, page_size * 576 + at * 8 : page_size * 576 + (at + 1) * 8]
        blocks = turned_kv[i, :448].reshape(7, 64)
        logs = torch.log2(blocks.abs().amax(-1).clamp(min=1e-4) / 448)
        exponents = scales[:7].double() - 127
        # Of a power of two the kernel's logarithm may be a little more.
        assert (torch.ceil(logs - 1e-5) <= exponents).all()
        assert (exponents <= torch.ceil(logs + 1e-5)).all() and scales[7] == 0
        got = row[:448].view(torch.float8_e4m3fn).double().reshape(7, 64)
        unit = 2.0 ** exponents[:, None]
        assert off(got * unit, blocks, 2.0**-4 * 1.01, float(unit.max()) * 2.0**-9) <= 1
        assert off(row[448:].view(dtype), turned_kv[i, 448:], half(dtype), half(dtype)) <= 1
        before[page, at * 576 : (at + 1) * 576] = row
        start = page_size * 576 + at * 8
        before[page, start : start + 8] = scales
    assert torch.equal(cache, before)  # nothing else was written


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"], indirect=True)
@pytest.mark.parametrize("width", [256, 2048])
@pytest.mark.parametrize("by_expert", [False, True])
def test_silu_quantized(library, drawn, width, by_expert, dtype):
    """fp8, with a scale for each 128 numbers; of experts only the rows that there are."""
    experts, rows, fp8 = 3, 40, torch.float8_e4m3fn
    shape = (experts, rows) if by_expert else (rows,)
    x = drawn(*shape, 2 * width, dtype=dtype)
    out = torch.full((*shape, width), 448.0, dtype=fp8, device="cuda")
    scales = torch.zeros(*shape[:-1], width // 128, rows, device="cuda").transpose(-1, -2)
    made = library("silu_fuse_block_quant")
    counts = torch.tensor([40, 1, 17], dtype=torch.int32, device="cuda")
    if by_expert:
        made.silu_and_mul_fused_block_quant_ep(out, scales, x, False, counts, rows, experts)
    else:
        made.silu_and_mul_fused_block_quant(out, scales, x, False)
    gate, up = x.double().chunk(2, -1)
    y = (torch.nn.functional.silu(gate) * up).unflatten(-1, (-1, 128))
    got = out.float().double().unflatten(-1, (-1, 128)) * scales.double()[..., None]
    wanted = y.abs().amax(-1) / 448
    for e in range(experts if by_expert else 1):
        some = (e, slice(int(counts[e]))) if by_expert else slice(None)
        assert off(scales[some], wanted[some], 2e-2, 1e-6) <= 1
        assert off(got[some], y[some], 2.0**-3.5, float(wanted.max()) * 2.0**-8) <= 1


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"], indirect=True)
def test_finalize(library, drawn, dtype, shared):
    """A token's experts by their weights; a slot of -1 is left out."""
    tokens, top_k, width = 37, 8, 2048
    rows = tokens * top_k + 16
    outputs, weights = drawn(rows, width, dtype=torch.bfloat16), drawn(tokens, top_k, dtype=dtype)
    places = torch.randperm(rows, generator=drawn.generator, device="cuda")[: tokens * top_k].int()
    places[::11] = -1
    more = drawn(*((tokens, width) if shared else (0, 0)), dtype=torch.bfloat16)
    out = poisoned(tokens, width, dtype=torch.bfloat16)
    library("moe_finalize_fuse_shared").moe_finalize_fuse_shared(
        out, outputs, places, weights, more, top_k, False
    )
    each = outputs.double()[places.long().clamp(0)] * (places >= 0)[:, None]
    expected = (each.unflatten(0, (tokens, top_k)) * weights.double()[..., None]).sum(1)
    assert off(out, expected + (more.double() if shared else 0), 2.0**-7, 2.0**-5) <= 1


@pytest.mark.parametrize("rows", [1, 33, 400])
def test_two_norms(library, drawn, rows):
    dtype, eps = torch.bfloat16, 1e-6
    given = []
    for width in (1536, 512):
        given += [drawn(rows, width, dtype=dtype), drawn(width, dtype=dtype)]
        given += [poisoned(rows, width, dtype=dtype)]
    library("rmsnorm_fused_parallel").rmsnorm_fused_parallel(*given, eps, False)
    for x, weight, out in (given[:3], given[3:]):
        x = x.double()
        expected = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.double()
        assert off(out, expected, 2.0**-7, 2.0**-8) <= 1


@pytest.mark.parametrize("tokens", [1, 7, 8, 9, 16])
def test_logits(library, drawn, tokens):
    x = drawn(tokens, 7168, dtype=torch.bfloat16)
    weight = drawn(16_160, 7168, dtype=torch.bfloat16, scale=7168**-0.5)
    out = poisoned(tokens, 16_160, dtype=torch.bfloat16)
    library("lm_head_gemm").lm_head_gemm(out, x, weight, 8 if tokens <= 8 else 16, False)
    assert off(out, x.double() @ weight.double().T, 2.0**-7, 2.0**-9) <= 1


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"], indirect=True)
@pytest.mark.parametrize("tokens", [1, 8, 16, 32])
def test_router(library, drawn, tokens, dtype):
    x, out = drawn(tokens, 7168, dtype=torch.bfloat16), poisoned(tokens, 256)
    weight = drawn(256, 7168, dtype=dtype, scale=7168**-0.5)
    library("dsv3_gemm").dsv3_router_gemm(out, x, weight, False)
    assert off(out, x.double() @ weight.double().T, 1e-3, 1e-3) <= 1


def marlin_order(bits):
    """The places of a tile of 16 x 64 in the order in which Marlin's threads read them."""
    order = []
    for thread in range(32):
        column = thread // 4
        rows = [2 * (thread % 4) + more for more in (0, 1, 8, 9)]
        eight = [16 * row + column + 8 * block for block in (0, 1) for row in rows]
        for j in range(4):
            order += [place + 256 * j for place in eight]
    turn = [0, 2, 4, 6, 1, 3, 5, 7] if bits == 4 else [0, 2, 1, 3]
    return torch.tensor(order).reshape(-1, len(turn))[:, turn].reshape(-1)


def packed(values, bits):
    """Numbers of a last dimension side by side in int32, the first lowest."""
    each = values.unflatten(-1, (-1, 32 // bits)).long()
    shifts = bits * torch.arange(32 // bits, device=values.device)
    return (each << shifts).sum(-1).to(torch.int32)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("k", "n"), [(64, 64), (256, 192), (1024, 512)])
def test_repack(library, drawn, k, n, bits):
    values = torch.randint(2**bits, (k, n), generator=drawn.generator, device="cuda")
    given = packed(values.T, bits).T.contiguous()
    out = torch.full((k // 16, n * 16 * bits // 32), -1, dtype=torch.int32, device="cuda")
    none = torch.empty(0, dtype=torch.int32, device="cuda")
    library("marlin").gptq_marlin_repack(out, given, none, k, n, bits)
    tiles = values.reshape(k // 16, 16, n // 16, 16).transpose(1, 2).reshape(k // 16, -1)
    order = marlin_order(bits).cuda()
    assert torch.equal(
        out, packed(tiles.reshape(-1, len(order))[:, order].reshape(k // 16, -1), bits)
    )


E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]


@pytest.mark.parametrize("is_ep", [False, True])
@pytest.mark.parametrize("block", [8, 16, 64])
@pytest.mark.parametrize("tokens", [1, 33])
def test_experts_in_4_bits(library, drawn, tokens, block, is_ep):
    """MXFP4 weights and bfloat16 activations: routes in blocks of an expert, and their products."""
    experts, top_k, k, n, dtype = 5, 2, 512, 256, torch.bfloat16
    made = library("marlin_moe")
    chances = torch.rand(tokens, experts, generator=drawn.generator, device="cuda")
    ids = chances.topk(top_k, -1).indices.int()
    most = ids.numel() + (experts + 1) * (block - 1)
    if ids.numel() < experts + 1:
        most = ids.numel() * block
    routes = torch.full((most,), -9, dtype=torch.int32, device="cuda")
    blocks = torch.full((-(-most // block),), -9, dtype=torch.int32, device="cuda")
    total = torch.full((1,), -9, dtype=torch.int32, device="cuda")
    sums = torch.empty(experts + 2, dtype=torch.int32, device="cuda")
    made.moe_align_block_size(ids, experts + 1, block, routes, blocks, total, sums, True)
    flat = ids.reshape(-1)
    wanted = [int(-(-(flat == e).sum() // block)) for e in range(experts)]
    assert int(total) == block * sum(wanted)
    count = int(total) // block
    assert blocks[:count].tolist() == [e for e in range(experts) for _ in range(wanted[e])]
    for e in range(experts):
        mine = routes[: int(total)].reshape(-1, block)[blocks[:count] == e].reshape(-1)
        real = mine[mine < flat.numel()].sort().values
        assert torch.equal(real.long(), (flat == e).nonzero()[:, 0])

    codes = torch.randint(16, (experts, k, n), generator=drawn.generator, device="cuda")
    powers = torch.randint(
        118, 124, (experts, k // 32, n), generator=drawn.generator, device="cuda"
    )
    none = torch.empty(0, dtype=torch.int32, device="cuda")
    weights = torch.empty(experts, k // 16, n * 2, dtype=torch.int32, device="cuda")
    for e in range(experts):
        library("marlin").gptq_marlin_repack(
            weights[e], packed(codes[e].T, 4).T.contiguous(), none, k, n, 4
        )
    order = [i + 8 * j for i in range(8) for j in range(8)]
    scales = powers.reshape(-1, 64)[:, order].reshape(-1, 4)[:, [0, 2, 1, 3]]
    scales = scales.reshape(experts, k // 32, n).to(torch.uint8).view(torch.float8_e8m0fnu)
    x = drawn(tokens, k, dtype=dtype)
    shares = torch.rand(tokens, top_k, generator=drawn.generator, device="cuda")
    out = poisoned(tokens * top_k, n, dtype=dtype)
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    workspace = torch.zeros(processors * 4, dtype=torch.int32, device="cuda")
    room = min(n * most, processors * 4 * block * 256) * (2 if block == 8 else 1)
    sums = torch.empty(room, dtype=torch.float32, device="cuda")
    empty = torch.empty(0, dtype=dtype, device="cuda")
    call = made.moe_wna16_marlin_gemm_bf16_ep if is_ep else made.moe_wna16_marlin_gemm_bf16
    call(
        x, out, weights, empty, scales, empty, empty, none, none, workspace, routes, blocks, total,
        shares, empty, sums, block, top_k, True, is_ep, 2 | 1 << 8 | 1 << 16 | 1 << 49, tokens, n,
        k, False, False, True, False, k // 32, 32, False, True, False,
    )  # fmt: skip
    table = torch.tensor(E2M1, dtype=torch.float64, device="cuda")
    exact = table[codes] * 2.0 ** (powers.double() - 127).repeat_interleave(32, 1)
    for i, (token, e) in enumerate((t, e) for t in range(tokens) for e in ids[t].tolist()):
        expected = x[token].double() @ exact[e] * shares.reshape(-1)[i].double()
        scale = float(expected.abs().max())
        assert off(out[i], expected, 2.0**-6, scale * 2.0**-7) <= 1


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_lamport(library, dtype):
    """Memory is full of negative zeros: as many as are told, or bytes of several buffers."""
    kind, made = getattr(torch, dtype), library("trtllm_comm")
    buffers = [poisoned(1000, dtype=kind) for _ in range(4)]
    places = [each.data_ptr() for each in buffers]
    made.trtllm_lamport_initialize(places[0], 1000, dtype)
    made.trtllm_lamport_initialize_all(*places[1:], 1000 * kind.itemsize, dtype)  # bytes
    torch.cuda.synchronize()
    for each in buffers:
        assert (each == 0).all() and torch.signbit(each).all()


@pytest.mark.parametrize("entry", ["attn_res_fwd", "attn_res_fwd_out_norm", "rope_quantize"])
def test_entries_without_code_for_hopper(library, drawn, entry):
    """Two return as if all were well, and print that they need another GPU; one refuses fp8."""
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("of Hopper")
    dtype = torch.bfloat16
    if entry == "rope_quantize":
        given = [drawn(21, 16, size, dtype=dtype) for size in (64, 64, 512, 512)]
        given[1::2] = [x[:, 0].contiguous() for x in given[1::2]]
        outs = [torch.full_like(x, 448.0, dtype=torch.float8_e4m3fn) for x in given]
        cache, ids = drawn(256, 64), torch.arange(21, device="cuda", dtype=torch.int32)
        with pytest.raises(fi_ffi.KernelError, match="failed to dispatch data type"):
            library("rope").rope_quantize(*given, *outs, cache, ids, 1.0, 1.0, False, False)
        assert all((out.float() == 448).all() for out in outs)
        return
    width = 7168
    last, others = drawn(9, 1, width, dtype=dtype), drawn(5, 9, 1, width, dtype=dtype)
    weights = [drawn(width, dtype=dtype) for _ in range(3 if entry.endswith("norm") else 2)]
    out = poisoned(9, 1, width, dtype=dtype)
    getattr(library("attn_res"), entry)(last, None, others, *weights, out, 5, 1e-6, False)
    assert out.isnan().all()
