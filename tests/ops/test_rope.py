"""Rotary embeddings against float64: the same tests on the CPU, and (tests/gpu) on a GPU."""

from __future__ import annotations

import functools
from dataclasses import replace

import numpy as np
import pytest

from fi_ffi.ops.functions import OPS

from tests.helpers.calls import bits, padded
from tests.helpers.every_op import check_on, check_replayed
from tests.helpers.rope_calls import (
    APPLY,
    CALLS_APPLY,
    COS_SIN,
    F16,
    SIZES,
    a_case,
    check_fused,
    check_in_place,
    judged,
)

both = pytest.mark.parametrize("interleave", [False, True], ids=["halves", "interleaved"])


@both
@pytest.mark.parametrize("head_dim", [64, 128, 256, 512])
@pytest.mark.parametrize(("op", "dtypes"), CALLS_APPLY)
def test_heads(op, dtypes, head_dim, interleave, machine, rng):
    for q_heads, kv_heads in ((1, 1), (4, 1), (3, 5), (32, 8), (2, 0)):
        case = a_case(op.row.name, dtypes, rng, head_dim=head_dim, num_qo_heads=q_heads,
                      num_kv_heads=kv_heads, interleave=interleave)  # fmt: skip
        assert check_on(machine, case) <= 1


@both
@pytest.mark.parametrize("name", APPLY)
def test_a_part_of_a_head(name, interleave, machine, rng):
    """What is not rotated is copied, bit for bit."""
    parts = {64: (16, 32, 48), 128: (16, 64, 96), 256: (64, 240), 512: (32, 64, 480)}
    if interleave:
        parts = {64: (8, 24, 40), 128: (8, 32, 120), 256: (8,), 512: (16, 80)}
    for head_dim, sizes in parts.items():
        for rotary_dim in sizes:
            case = a_case(name, F16, rng, head_dim=head_dim, rotary_dim=rotary_dim,
                          interleave=interleave)  # fmt: skip

            def judge(got, out, case=case, rotary_dim=rotary_dim):
                rest = case.arrays[out.removesuffix("_rope")][..., rotary_dim:]
                same = bits(got[..., rotary_dim:]).tobytes() == bits(rest).tobytes()
                return case.error(out, got) if same else (np.inf, np.inf)

            judges = {out: functools.partial(judge, out=out) for out in case.expected}
            assert check_on(machine, replace(case, expected=judges)) <= 1


@both
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(
    ("head_dim", "rotary_dim"),
    [(96, 96), (96, 32), (80, 64), (192, 64), (192, 128), (576, 64), (40, 32), (1024, 1024),
     (112, 96), (136, 32)],
)  # fmt: skip
def test_heads_that_the_quantising_kernel_has(
    head_dim, rotary_dim, dtype, interleave, machine, rng
):
    for nnz in (1, 40):
        case = a_case(COS_SIN, F16 | {"T": dtype}, rng, head_dim=head_dim, rotary_dim=rotary_dim,
                      interleave=interleave, nnz=nnz)  # fmt: skip
        assert check_on(machine, case) <= 1


@both
@pytest.mark.parametrize(("op", "dtypes"), CALLS_APPLY)
def test_tokens(op, dtypes, interleave, machine, rng):
    """On a GPU many of them have a thread block's loop over heads, and few a block each."""
    for nnz in (1, 130, 20_000 if machine.is_gpu else 300):
        case = a_case(op.row.name, dtypes, rng, nnz=nnz, interleave=interleave)
        assert check_on(machine, case) <= 1


@both
@pytest.mark.parametrize("name", APPLY)
def test_in_place(name, interleave, machine, rng):
    for head_dim in (64, 128, 256, 512):
        for nnz in (3, 5000 if machine.is_gpu else 40):
            case = a_case(name, F16, rng, head_dim=head_dim, interleave=interleave, nnz=nnz)
            assert check_in_place(machine, case) <= 1


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


@both
@pytest.mark.parametrize(("op", "dtypes"), CALLS_APPLY)
def test_heads_apart_and_tokens_inside_heads(op, dtypes, interleave, machine, rng):
    case = a_case(op.row.name, dtypes, rng, interleave=interleave)
    apart = {name: padded(a, 16) if a.ndim == 3 else a for name, a in case.arrays.items()}
    assert check_on(machine, replace(case, arrays=apart)) <= 1
    turned = {
        name: np.ascontiguousarray(a.swapaxes(0, 1)).swapaxes(0, 1) if a.ndim == 3 else a
        for name, a in case.arrays.items()
    }
    assert check_on(machine, replace(case, arrays=turned)) <= 1


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


@pytest.mark.parametrize("name", APPLY)
def test_recorded_and_replayed(name, machine, rng):
    assert check_replayed(machine, a_case(name, F16, rng, nnz=50)) <= 1


@pytest.mark.parametrize("name", APPLY)
def test_prepared_in_place_and_updated(name, machine, rng):
    machine.need("rope")
    cases = [a_case(name, F16, rng, {"indptr": np.array([0, 4, 4, 9])}) for _ in range(3)]
    sets = []
    for case in cases:
        placed = {n: machine.place(a) for n, a in case.arrays.items() if not n.endswith("_rope")}
        sets.append(placed | {f"{n}_rope": placed[n] for n in ("q", "k")})
    call = OPS[name].prepare(**{n: a.desc() for n, a in sets[0].items()}, stream=machine.stream)
    call()
    for placed in sets[1:]:
        call.update(**{n: a.desc().ptr for n, a in placed.items()})
        call()
    for case, placed in zip(cases, sets, strict=True):
        assert judged(case, {n: a.get() for n, a in placed.items()}) <= 1


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


@both
def test_the_last_row_of_the_table(interleave, machine, rng):
    """With interleave it is read past its end, and what is there has no effect."""
    for head_dim, rotary_dim in ((128, 128), (512, 512), (128, 64), (96, 96), (192, 64)):
        case = a_case(COS_SIN, F16, rng, {"pos_ids": np.full(9, 69)}, head_dim=head_dim,
                      rotary_dim=rotary_dim, interleave=interleave)  # fmt: skip
        assert check_on(machine, case) <= 1


@pytest.mark.parametrize("name", APPLY)
def test_what_is_wrong_is_seen(name, machine, rng):
    """Another way of pairing, one position on, a theta 5 % off, no rotation, k as q."""
    # The first request and the last have tokens: where they have none, nothing moves.
    case = a_case(name, F16, rng, {"indptr": np.array([0, 4, 4, 9])})
    # A pair whose angle is small hides a mistake: not all of them do.
    wrong = [{"interleave": True}]
    wrong += [] if name == COS_SIN else [{"rope_theta": 1.05e4}, {"rope_scale": 1.05}]
    wrong += [{"rotary_dim": 64}] if name != COS_SIN else []
    for other in wrong:
        got = {n: a.copy() for n, a in case.arrays.items()}
        OPS[name](**got, **case.scalars | other)
        assert judged(case, got) > 1, other
    for table in ("pos_ids", "offsets"):
        if table in case.arrays:
            got = {n: a.copy() for n, a in case.arrays.items()}
            got[table][0] = (got[table][0] + 1) % SIZES["max_seq_len"]
            got[table][-1] = (got[table][-1] + 1) % SIZES["max_seq_len"]
            OPS[name](**got, **case.scalars)
            assert judged(case, got) > 1
    assert judged(case, case.arrays | {"q_rope": case.arrays["q"]}) > 1
