"""Rotary embeddings: angles by hand, fused buffers, caches, and what stays as it was."""

from __future__ import annotations

import math
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

import fi_ffi
from fi_ffi.ops.functions import OPS

from tests.helpers.calls import bits
from tests.helpers.cases import default_dtypes, make_case
from tests.helpers.every_op import check_on
from tests.helpers.inputs import inputs_of
from tests.helpers.rope_calls import (
    ANGLES,
    APPLY,
    F16,
    LLAMA_31,
    QUANTISE,
    a_case,
    check_fused,
    judged,
    part,
)

KV = QUANTISE[1]
both = pytest.mark.parametrize("interleave", [False, True], ids=["halves", "interleaved"])


def quantising(name, rng, tables=None, **more):
    row = OPS[name].row
    sizes = {**inputs_of(row).small, "nnz": 23, "max_seq_len": 70, "rope_dim": 64}
    return make_case(row, sizes, default_dtypes(row) | {"T": "bfloat16"}, rng, tables, **more)


def placed(machine, case):
    machine.need("rope")
    return {name: machine.place(array) for name, array in case.arrays.items()}


def call(machine, case, tensors):
    descs = {name: tensor.desc() for name, tensor in tensors.items()}
    OPS[case.row.name](**descs, **case.scalars, stream=machine.stream)
    return {name: tensor.get() for name, tensor in tensors.items()}


@both
@pytest.mark.parametrize("name", APPLY)
def test_a_part_of_a_head(name, interleave, machine, rng):
    """What is not rotated is copied, bit for bit."""
    for head_dim, rotary_dim in ((64, 48 - 8 * interleave), (128, 96), (256, 64), (512, 480)):
        case = a_case(name, F16, rng, head_dim=head_dim, rotary_dim=rotary_dim,
                      interleave=interleave)  # fmt: skip
        got = call(machine, case, placed(machine, case))
        assert judged(case, got) <= 1
        for x in ("q", "k"):
            rest, after = case.arrays[x][..., rotary_dim:], got[f"{x}_rope"][..., rotary_dim:]
            assert (bits(after) == bits(rest)).all()


@both
@pytest.mark.parametrize("name", APPLY)
def test_inside_a_fused_buffer(name, interleave, machine, rng):
    """(tokens, heads of q, k and v, head_dim), and each head's q, k and v side by side."""
    case = a_case(name, F16, rng, num_qo_heads=4, num_kv_heads=2, interleave=interleave)
    whole = rng.standard_normal((9, 8, 128)).astype(np.float16)
    views = {"q": lambda a: a[:, :4], "k": lambda a: a[:, 4:6]}
    assert check_fused(machine, case, whole, views) <= 1
    case = a_case(name, F16, rng, num_qo_heads=3, num_kv_heads=3, interleave=interleave)
    whole = rng.standard_normal((9, 3, 3, 128)).astype(np.float16)
    views = {"q": lambda a: a[:, :, 0], "k": lambda a: a[:, :, 1]}
    assert check_fused(machine, case, whole, views) <= 1


@pytest.mark.parametrize("name", ["apply_rope", "apply_llama31_rope"])
def test_requests_of_any_length(name, machine, rng):
    """None, one token, and more than a thread block has; tokens of no request stay as they were."""
    lengths = [0, 1, 0, 40, 7, 0]
    indptr, nnz = np.cumsum([0, *lengths]), sum(lengths) + 3
    offsets = np.array([5, 0, 9, 1000, 31, 2])
    case = a_case(name, F16, rng, {"indptr": indptr, "offsets": offsets}, nnz=nnz)
    end = sum(lengths)

    def judge(out):
        value, magnitude = (part[:end] for part in case.expected[out])
        cut = replace(case, expected={out: (value, magnitude)})

        def judge_one(got):
            left = bits(got[end:]).tobytes() == bits(case.arrays[out][end:]).tobytes()
            return cut.error(out, got[:end]) if left else (np.inf, np.inf)

        return judge_one

    expected = {out: judge(out) for out in case.expected}
    assert check_on(machine, replace(case, expected=expected)) <= 1
    positions = np.concatenate([np.arange(n) + o for n, o in zip(lengths, offsets, strict=True)])
    same = a_case(name + "_pos_ids", F16, rng, {"pos_ids": positions}, nnz=end)
    for x in ("q", "k"):
        same.arrays[x][...] = case.arrays[x][:end]
    OPS[name](**case.arrays)
    OPS[name + "_pos_ids"](**same.arrays)
    assert (bits(case.arrays["q_rope"][:end]) == bits(same.arrays["q_rope"])).all()


@both
def test_nan_and_infinity_stay_in_their_pairs(interleave, machine, rng):
    for name in APPLY:
        case = a_case(name, F16, rng, interleave=interleave)
        x = case.arrays["q"]
        x[1, 2, 6], x[4, 0, 70] = np.nan, np.inf
        partner = (7, 71) if interleave else (70, 6)
        expected = np.ones(x.shape, bool)
        expected[1, 2, [6, partner[0]]] = expected[4, 0, [70, partner[1]]] = False
        placed = {n: machine.place(a) for n, a in case.arrays.items()}
        descs = {n: a.desc() for n, a in placed.items()}
        machine.need("rope")
        OPS[name](**descs, **case.scalars, stream=machine.stream)
        assert (np.isfinite(placed["q_rope"].get().astype(np.float32)) == expected).all()


def wave(i: int, size: int, theta: float, scale: float, smooth: tuple[float, ...]) -> float:
    """Radians that pair i turns at each position, as Llama 3.1's authors have it."""
    own = 1 / theta ** (2 * i / size)
    if not smooth:
        return own / scale
    low, high, context = smooth
    length = 2 * math.pi / own
    if length < context / high:
        return own
    if length > context / low:
        return own / scale
    kept = (context / length - low) / (high - low)
    return (1 - kept) * own / scale + kept * own


@both
@pytest.mark.parametrize("name", ANGLES)
def test_an_example_by_hand(name, interleave, machine):
    """Pairs of (1, 0) become (cos, sin), and of (0, 1) become (-sin, cos)."""
    machine.need("rope")
    halves = np.arange(128) % 2 == 0 if interleave else np.arange(128) < 64
    q = np.zeros((3, 1, 128), np.float16)
    k = q.copy()
    q[..., halves], k[..., ~halves] = 1, 1
    arrays = {"q": q, "k": k, "q_rope": q.copy(), "k_rope": k.copy()}
    positions = [3, 4, 5]
    if "pos_ids" in name:
        arrays["pos_ids"] = np.array(positions)
    else:
        arrays |= {"indptr": np.array([0, 3]), "offsets": np.array([3])}
    placed = {n: machine.place(array) for n, array in arrays.items()}
    OPS[name](
        **{n: a.desc() for n, a in placed.items()}, interleave=interleave, stream=machine.stream
    )
    options = (5e5, 8.0, (1.0, 4.0, 8192.0)) if name in LLAMA_31 else (1e4, 1.0, ())
    for token, position in enumerate(positions):
        angle = np.array([position * wave(i, 128, *options) for i in range(64)])
        turned_q, turned_k = placed["q_rope"].get()[token, 0], placed["k_rope"].get()[token, 0]
        for got, expected in (
            (turned_q[halves], np.cos(angle)), (turned_q[~halves], np.sin(angle)),
            (turned_k[halves], -np.sin(angle)), (turned_k[~halves], np.cos(angle)),
        ):  # fmt: skip
            assert np.abs(got - expected).max() < 2.0**-11 + 2.0**-16


def random_bytes(array, rng):
    array.view(np.uint8)[...] = rng.integers(0, 256, array.shape, np.uint8)


def touched(case, cache):
    """Which elements of a cache the call writes."""
    marked = np.zeros(cache.shape, bool)
    tokens = marked.swapaxes(1, 2) if case.scalars.get("kv_layout") == "HND" else marked
    size = tokens.shape[1]
    a = case.arrays
    for request, position in zip(a["batch_indices"], a["positions"], strict=True):
        if request >= 0:
            tokens[a["kv_indices"][a["kv_indptr"][request] + position // size], position % size] = 1
    return marked


@pytest.mark.parametrize("name", QUANTISE[1:])
def test_what_is_in_the_cache_stays(name, machine, rng):
    """Every bit of other entries, NaN among them; tokens of no request are left out whole."""
    for more in [{}, {"kv_layout": "HND"}][: 1 + (name == KV)]:
        case = quantising(name, rng, **more)
        caches = [n for n in case.arrays if n.endswith("_cache") and n != "cos_sin_cache"]
        for cache in caches:
            random_bytes(case.arrays[cache], rng)
        left_out = rng.permutation(23)[:5]
        case.arrays["batch_indices"][left_out] = -1
        for out in ("q_rope_out", "q_nope_out"):
            random_bytes(case.arrays[out], rng)
        got = call(machine, case, placed(machine, case))
        for cache in caches:
            where = touched(case, case.arrays[cache])
            assert 0 < where.sum() < where.size
            now, before = bits(got[cache]), bits(case.arrays[cache])
            assert (now[~where] == before[~where]).all()
            assert (now[where] != before[where]).mean() > 0.5
        for out in ("q_rope_out", "q_nope_out"):
            now, before = bits(got[out]), bits(case.arrays[out])
            assert (now[left_out] == before[left_out]).all()
            value, magnitude = case.expected[out]
            kept = np.setdiff1d(np.arange(23), left_out)
            cut = replace(case, expected={out: (value[kept], magnitude[kept])})
            assert cut.error(out, got[out][kept])[1] <= 1


@both
def test_parts_of_one_buffer(interleave, machine, rng):
    """Heads whose rotated part comes first, of inputs and of outputs."""
    machine.need("rope")
    case = quantising("rope_quantize", rng, interleave=interleave)
    descs, wholes = {}, {}
    for x in ("q", "k"):
        for end in ("in", "out"):
            pair = [case.arrays[f"{x}_{which}_{end}"] for which in ("rope", "nope")]
            whole = np.concatenate(pair, axis=-1)
            buffer = wholes[x, end] = machine.place(whole)
            for which, view in (("rope", whole[..., :64]), ("nope", whole[..., 64:])):
                descs[f"{x}_{which}_{end}"] = part(machine, buffer, whole, view)
    tables = {n: machine.place(case.arrays[n]) for n in ("cos_sin_cache", "pos_ids")}
    descs |= {n: tensor.desc() for n, tensor in tables.items()}
    fi_ffi.rope_quantize(**descs, **case.scalars, stream=machine.stream)
    got = {}
    for x in ("q", "k"):
        after = wholes[x, "out"].get()
        got |= {f"{x}_rope_out": after[..., :64], f"{x}_nope_out": after[..., 64:]}
    assert judged(case, got) <= 1
    assert all(whole.intact() for whole in wholes.values())


@pytest.mark.parametrize("kv_layout", ["NHD", "HND"])
def test_keys_and_values_in_one_tensor(kv_layout, machine, rng):
    machine.need("rope")
    case = quantising(KV, rng, kv_layout=kv_layout)
    names = ("k_cache", "v_cache")
    whole = machine.place(np.stack([case.arrays[name] for name in names], axis=1))
    tensors = placed(machine, replace(case, arrays={
        n: a for n, a in case.arrays.items() if n not in names}))  # fmt: skip
    descs = {n: tensor.desc() for n, tensor in tensors.items()}
    descs |= zip(names, fi_ffi.split_paged_kv_cache(whole.desc()), strict=True)
    OPS[KV](**descs, **case.scalars, stream=machine.stream)
    after = whole.get()
    got = {n: tensor.get() for n, tensor in tensors.items()}
    assert judged(case, got | {name: after[:, i] for i, name in enumerate(names)}) <= 1
    assert whole.intact()


@pytest.mark.parametrize("name", QUANTISE)
def test_beyond_the_range(name, machine, rng):
    """The largest number that there is, also for infinity; NaN stays."""
    case = quantising(name, rng, quant_scale_q=1e4, quant_scale_kv=0.0)
    x = case.arrays["q_nope_in"]
    x[0, 0, :4] = np.inf, -np.inf, np.nan, 1e4
    largest = float(ml_dtypes.finfo(ml_dtypes.float8_e4m3fn).max)
    got = call(machine, case, placed(machine, case))
    q = got["q_nope_out"].astype(np.float64)
    assert q[0, 0, [0, 1, 3]].tolist() == [largest, -largest, largest] and np.isnan(q[0, 0, 2])
    keys = got.get("k_nope_out", got.get("ckv_cache", got.get("k_cache")))
    if name == "rope_quantize":
        assert not keys.astype(np.float64).any()
    assert np.abs(got["q_rope_out"].astype(np.float64)).max() == largest
