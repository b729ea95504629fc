"""Attention's formula against loops over queries and keys."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from fi_ffi.reference.attention import formula, masks
from fi_ffi.reference.attention.formula import Options, exact, exact_batch, from_pages

# queries, keys, heads, key heads, and the sizes of a head of q and k, and of v
SHAPES = [
    (1, 77, 8, 8, 64, 64),
    (33, 33, 8, 2, 32, 32),
    (5, 90, 8, 1, 256, 256),
    (17, 40, 4, 4, 192, 128),
    (40, 70, 4, 2, 64, 64),
    (1, 1, 1, 1, 64, 64),
    (3, 0, 4, 2, 64, 64),
    (0, 7, 4, 1, 64, 64),
    (40, 7, 8, 2, 64, 64),
]
OPTIONS = [
    "plain", "causal", "window", "cap", "mask", "alibi", "rope", "sink", "scales", "items",
    "causal window cap", "mask window alibi", "alibi cap", "causal rope window cap",
    "causal window sink", "causal scales sink", "mask rope",
]  # fmt: skip


def turned(head: np.ndarray, position: int, scale: float, theta: float) -> list[float]:
    """RoPE as Llama has it: element i of a head's first half turns with i of its second."""
    half = len(head) // 2
    found = [0.0] * len(head)
    for i in range(half):
        angle = position * theta ** (-2 * i / len(head)) / scale
        cos, sin = math.cos(angle), math.sin(angle)
        found[i] = head[i] * cos - head[half + i] * sin
        found[half + i] = head[half + i] * cos + head[i] * sin
    return found


def is_seen(i: int, j: int, place: int, o: dict[str, Any]) -> bool:
    """Whether query i, at `place` of its request, sees key j."""
    if o.get("causal") and j > place:
        return False
    if o.get("window_left", -1) >= 0 and j < place - o["window_left"]:
        return False
    if o.get("items") is not None and not sees_item(place, j, *o["items"]):
        return False
    return o.get("mask") is None or bool(o["mask"][i, j])


def sees_item(place: int, j: int, prefix: int, counts: np.ndarray) -> bool:
    """After a prefix a token sees that, and so many of its own item: itself the last."""
    own = int(counts[place - prefix]) if place >= prefix else place + 1
    return j <= place and (j < prefix or place - j < own)


def logit(q, k, i: int, j: int, head: int, o: dict[str, Any]) -> float:
    scale = float(np.ravel(o["sm_scale"])[head if np.ndim(o["sm_scale"]) else 0])
    x = float(np.dot(q, k)) * scale
    cap = o.get("logits_soft_cap", 0.0)
    if o.get("alibi_slopes") is not None:
        x += float(o["alibi_slopes"][head]) * (j - i)
        x *= scale if cap else 1.0  # FlashInfer scales twice
    return cap * math.tanh(x / cap) if cap else x


def attend(q, k, v, **o: Any) -> tuple[np.ndarray, np.ndarray]:
    """One query and one key after another: the output, and log2 of the sums of exponentials."""
    (qo_len, heads, _), (kv_len, kv_heads, _) = q.shape, v.shape
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    first = kv_len - qo_len
    if o.get("rope") is not None:
        for x, start in ((q, first), (k, 0)):
            for i, h in np.ndindex(x.shape[:2]):
                x[i, h] = turned(x[i, h].copy(), start + i, *o["rope"])
    out = np.zeros((qo_len, heads, v.shape[2]), np.float32)
    lse = np.full((qo_len, heads), -np.inf, np.float32)
    for i, h in np.ndindex(qo_len, heads):
        of = h * kv_heads // heads
        seen = [j for j in range(kv_len) if is_seen(i, j, first + i, o)]
        logits = [logit(q[i, h], k[j, of], i, j, h, o) for j in seen]
        sink = [] if o.get("sink") is None else [float(o["sink"][h])]
        if not logits and not sink:
            continue
        most = max(logits + sink)
        powers = [math.exp(x - most) for x in logits]
        total = math.fsum(powers) + sum(math.exp(x - most) for x in sink)
        out[i, h] = sum(power / total * v[j, of] for power, j in zip(powers, seen, strict=True))
        lse[i, h] = (most + math.log(total)) / math.log(2)
    return out, lse


def inputs(shape: tuple[int, ...], rng: np.random.Generator, scale: float = 1.0) -> list[Any]:
    qo_len, kv_len, heads, kv_heads, dim_qk, dim_vo = shape
    sizes = (qo_len, heads, dim_qk), (kv_len, kv_heads, dim_qk), (kv_len, kv_heads, dim_vo)
    return [(rng.standard_normal(size) * scale).astype(np.float32) for size in sizes]


def options(
    names: str, shape: tuple[int, ...], rng: np.random.Generator
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same options for `attend` and for `Options`."""
    qo_len, kv_len, heads, _, dim, _ = shape
    ours: dict[str, Any] = {"sm_scale": dim**-0.5}
    theirs: dict[str, Any] = {"sm_scale": dim**-0.5}
    for name in names.replace("plain", "").split():
        if name == "scales":
            ours["sm_scale"] = theirs["sm_scale"] = rng.uniform(0.05, 0.3, heads)
        elif name == "rope":
            ours["rope"] = theirs["rope"] = 2.0, 1e4
        elif name == "items":
            prefix, last = int(rng.integers(0, max(kv_len - qo_len, 0) + 1)), 0
            counts = [last := 0 if rng.random() < 0.2 else last + 1 for _ in range(kv_len - prefix)]
            positions = np.array([*counts, 0], np.uint16)
            ours["items"] = prefix, positions
            theirs["mask"] = masks.multi_item(qo_len, kv_len, prefix, positions, 65535)
        else:
            value: Any = {
                "causal": True,
                "window": int(rng.choice([0, 1, 11])),
                "cap": 2.5,
                "mask": rng.random((qo_len, kv_len)) < 0.3,
                "alibi": rng.uniform(0.01, 0.5, heads).astype(np.float32),
                "sink": rng.normal(0, 2, heads).astype(np.float32),
            }[name]
            names_of = {"window": "window_left", "cap": "logits_soft_cap", "alibi": "alibi_slopes"}
            ours[names_of.get(name, name)] = theirs[names_of.get(name, name)] = value
    return ours, theirs


@pytest.mark.parametrize("names", OPTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(shape, names, rng, error):
    arrays = inputs(shape, rng)
    ours, theirs = options(names, shape, rng)
    out, lse = attend(*arrays, **ours)
    expected = exact(*arrays, Options(**theirs))
    assert out.dtype == lse.dtype == np.float32
    assert out.shape == expected.out.shape and lse.shape == expected.lse2.shape
    assert error(expected, out, lse) <= 1
    blind = expected.lse2 == -np.inf
    assert (lse[blind] == -np.inf).all() and (out[blind] == 0).all()
    assert not expected.out[blind].any() and not expected.magnitude[blind].any()


@pytest.mark.parametrize("what", ["out", "lse"])
def test_small_errors_are_seen(what, rng, error):
    arrays = inputs((20, 50, 4, 2, 128, 128), rng)
    expected = exact(*arrays, Options(0.1))
    out, lse = attend(*arrays, sm_scale=0.1)
    (out if what == "out" else lse)[7, 2] *= 1 + 2.0**-8
    assert error(expected, out, lse) > 1
    (out if what == "out" else lse)[7, 2] = np.nan
    assert not error(expected, out, lse) <= 1


def test_large_logits(rng, error):
    arrays = inputs((9, 60, 4, 4, 64, 64), rng, scale=30)
    out, lse = attend(*arrays, sm_scale=1.0)
    assert np.abs(lse).max() > 1e3
    assert error(exact(*arrays, Options(1.0)), out, lse) <= 1


def test_packed_masks(rng):
    """Bit i * kv_len + j, the lowest of a byte first, after the request's start."""
    mask = rng.random((5, 13)) < 0.5
    packed = np.zeros(3 + 9, np.uint8)
    for i in range(5):
        for j in range(13):
            packed[3 + (i * 13 + j) // 8] |= int(mask[i, j]) << ((i * 13 + j) % 8)
    assert (masks.custom(packed, 3, 5, 13) == mask).all()
    with pytest.raises(ValueError, match=r"12 bytes; .* 5 x 13 bits is at bytes 4 to 13"):
        masks.custom(packed, 4, 5, 13)


def test_multi_item_by_hand():
    """A prefix of 2, then two items of a delimiter and two tokens each."""
    positions = np.array([0, 1, 2, 0, 1, 2], np.uint16)
    seen = masks.multi_item(8, 8, 2, positions, 2)
    assert ["".join(".x"[bit] for bit in row.astype(int)) for row in seen] == [
        "x.......",
        "xx......",
        "xx......",
        "xx.x....",
        "xx.xx...",
        "xx......",
        "xx....x.",
        "xx....xx",
    ]
    assert (masks.multi_item(3, 8, 2, positions, 2) == seen[5:]).all()
    with pytest.raises(ValueError, match="2 into its item, of 1 at most"):
        masks.multi_item(8, 8, 2, positions, 1)
    with pytest.raises(ValueError, match="token_pos_in_items_len is 5"):
        masks.multi_item(8, 8, 2, positions[:5], 2)


@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_pages(layout, rng):
    cache = rng.standard_normal((9, 4, 3, 8))
    order = rng.permutation(9).astype(np.int32)
    indptr, last = np.array([0, 3, 3, 9]), np.array([1, 0, 4])
    stored = cache.swapaxes(1, 2).copy() if layout == "HND" else cache
    view = formula.tokens_first(stored, ["NHD", "HND"].index(layout))
    lengths = formula.lengths(indptr, last, 4)
    assert lengths.tolist() == [9, 0, 24]
    for request in range(3):
        ours = formula.gathered(view, order, indptr[request], lengths[request])
        theirs = from_pages(stored, indptr, order, last, request, layout)
        by_hand = [cache[order[indptr[request] + n // 4], n % 4] for n in range(lengths[request])]
        assert (ours == np.reshape(by_hand, ours.shape)).all() and (theirs == ours).all()


def test_a_batch_is_its_requests(rng):
    q, k, v = inputs((9, 20, 4, 2, 64, 64), rng)
    parts = [(k[:12], v[:12]), (k[:0], v[:0]), (k[12:], v[12:])]
    both = exact_batch(q, [0, 4, 5, 9], parts.__getitem__, lambda b: Options(0.1 + b))
    alone = [
        exact(q[a:b], *parts[n], Options(0.1 + n))
        for n, (a, b) in enumerate([(0, 4), (4, 5), (5, 9)])
    ]
    for name, array in both._asdict().items():
        assert (array == np.concatenate([getattr(one, name) for one in alone])).all()
