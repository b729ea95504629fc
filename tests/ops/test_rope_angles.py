"""The angles of rotary embeddings: the same tests on the CPU, and (tests/gpu) on a GPU."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fi_ffi.ops.functions import OPS

from tests.helpers.every_op import check_on
from tests.helpers.rope_calls import ANGLES, F16, LLAMA_31, a_case

both = pytest.mark.parametrize("interleave", [False, True], ids=["halves", "interleaved"])


@pytest.mark.parametrize("most", [1, 2**10, 2**17, 2**20])
@pytest.mark.parametrize("name", ANGLES)
def test_far_positions(name, most, machine, rng):
    """Bounds grow with the position: see docs/rope.md."""
    tables = {"pos_ids": rng.integers(most // 2, most, 9), "offsets": rng.integers(0, most, 3)}
    for dtype in ("float16", "bfloat16"):
        for index in ("int32", "int64"):
            case = a_case(name, {"T": dtype, "I": index}, rng, tables)
            assert check_on(machine, case) <= 1


@pytest.mark.parametrize("theta", [100.0, 1e4, 5e5, 1e7])
@pytest.mark.parametrize("scale", [0.25, 1.0, 32.0])
@pytest.mark.parametrize("name", ANGLES)
def test_angles(name, scale, theta, machine, rng):
    case = a_case(name, F16, rng, rope_scale=scale, rope_theta=theta)
    assert check_on(machine, case) <= 1


@pytest.mark.parametrize(
    ("low", "high", "context"),
    [(1.0, 4.0, 8192.0), (1.0, 32.0, 4096.0), (0.0, 1.0, 512.0), (2.0, 2.5, 8192.0),
     (1.0, 4.0, 0.0), (1.0, 4.0, 1e9)],
)  # fmt: skip
@pytest.mark.parametrize("name", LLAMA_31)
def test_llama_31(name, low, high, context, machine, rng):
    for scale in (1.0, 8.0, 32.0):
        case = a_case(name, F16, rng, rope_scale=scale, low_freq_factor=low,
                      high_freq_factor=high, old_context_length=context)  # fmt: skip
        assert check_on(machine, case) <= 1


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
