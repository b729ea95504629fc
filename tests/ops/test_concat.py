"""Concatenating MLA's keys, bit for bit: on the CPU, and (tests/gpu) on a GPU."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import fi_ffi
from fi_ffi.cli.cases import Case
from fi_ffi.ops.functions import OPS
from fi_ffi.ops.releases import fits

from tests.helpers.calls import padded
from tests.helpers.cases import make_case
from tests.helpers.every_op import check_on, check_replayed

OP = OPS["concat_mla_k"]
DTYPES = OP.rows[0].dtypes["T"]
HEADS = {"num_heads": 128, "nope_dim": 128, "rope_dim": 64}


def case(rng, n: int, dtype: str) -> Case:
    """All of it random bits: NaN and their payloads too."""
    if dtype not in OP.row.dtypes["T"]:
        pytest.skip("the kernels in use are of a release that has no float8 here")
    return make_case(OP.row, {"n": n, **HEADS}, {"T": dtype}, rng)


@pytest.mark.parametrize("n", [1, 3, 4, 5, 257])
@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens(dtype, n, machine, rng):
    assert check_on(machine, case(rng, n, dtype)) == 0


def test_an_example_by_hand():
    k = np.zeros((2, 128, 192), np.float16)
    nope = np.arange(2 * 128 * 128, dtype=np.float32).reshape(2, 128, 128).astype(np.float16)
    rope = -np.arange(128, dtype=np.float16).reshape(2, 1, 64)
    fi_ffi.concat_mla_k(k, nope, rope)
    for token in range(2):
        for head in range(128):
            assert (k[token, head, :128] == nope[token, head]).all()
            assert (k[token, head, 128:] == rope[token, 0]).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_heads_and_tokens_apart(dtype, machine, rng):
    """Own parts inside of what a projection gives for keys and values, the shared one at the end
    of a compressed row, and room between the keys."""
    made = case(rng, 19, dtype)
    arrays = {
        "k": padded(made.arrays["k"], 24),
        "k_nope": padded(made.arrays["k_nope"], 128),
        "k_rope": padded(made.arrays["k_rope"], 512),
    }
    assert check_on(machine, replace(made, arrays=arrays)) == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_heads_before_tokens(dtype, machine, rng):
    """Any strides: heads outermost in memory."""
    made = case(rng, 6, dtype)
    arrays = {
        name: np.ascontiguousarray(array.transpose(1, 0, 2)).transpose(1, 0, 2)
        for name, array in made.arrays.items()
    }
    assert check_on(machine, replace(made, arrays=arrays)) == 0


def test_one_part_for_all_heads(machine, rng):
    """A stride of 0: every head's own part is the same memory."""
    made = case(rng, 5, "bfloat16")
    machine.need(OP.row.module)
    placed = {name: machine.place(array) for name, array in made.arrays.items()}
    descs = {name: array.desc() for name, array in placed.items()}
    shape, token = made.arrays["k_nope"].shape, 128 * 128
    descs["k_nope"] = fi_ffi.TensorDesc(
        descs["k_nope"].ptr, shape, "bfloat16", strides=(token, 0, 1), device=descs["k"].device
    )
    OP(**descs, stream=machine.stream)
    got = placed["k"].get().view(np.uint16)
    own = made.arrays["k_nope"].view(np.uint16)[:, :1]
    assert (got[..., :128] == own).all()
    assert (got[..., 128:] == made.arrays["k_rope"].view(np.uint16)).all()


def test_recorded_and_replayed(machine, rng):
    assert check_replayed(machine, case(rng, 40, "float16")) == 0


def test_no_tokens(machine, rng):
    assert check_on(machine, case(rng, 0, "float16")) == 0


@pytest.mark.parametrize("axis", HEADS)
@pytest.mark.parametrize("factor", [0.5, 2])
def test_sizes_that_the_kernel_does_not_have(axis, factor):
    sizes = HEADS | {axis: int(HEADS[axis] * factor)}
    heads, nope, rope = sizes.values()
    arrays = [np.zeros(s, np.float16) for s in ((3, heads, nope + rope), (3, heads, nope))]
    with pytest.raises(fi_ffi.ArgumentError, match=f"{axis} of {HEADS[axis]}"):
        fi_ffi.concat_mla_k(*arrays, np.zeros((3, 1, rope), np.float16))


def test_a_part_for_each_head_is_refused():
    k, nope = np.zeros((3, 128, 192), np.float16), np.zeros((3, 128, 128), np.float16)
    with pytest.raises(fi_ffi.ArgumentError, match="1 = 1"):
        fi_ffi.concat_mla_k(k, nope, np.zeros((3, 128, 64), np.float16))


def test_more_than_the_kernel_counts():
    def desc(*shape: int, **more: object) -> fi_ffi.TensorDesc:
        return fi_ffi.TensorDesc(16, shape, "float16", device="cpu", **more)

    n = 2**24 + 1
    with pytest.raises(fi_ffi.ArgumentError, match="n = 16777217 of at most 16777216"):
        fi_ffi.concat_mla_k(desc(n, 128, 192), desc(n, 128, 128), desc(n, 1, 64))
    far = 2**31 // 112 // 16 * 16
    strided = desc(3, 128, 128, strides=(128, far, 1))
    with pytest.raises(fi_ffi.ArgumentError, match=f"strides below {far}"):
        fi_ffi.concat_mla_k(desc(3, 128, 192), strided, desc(3, 1, 64))


def test_releases_before_float8():
    for row in OP.rows:
        assert ("float8_e4m3fn" in row.dtypes["T"]) == fits(row, "0.6.11")
        assert fits(row, "0.6.10") != fits(row, "0.6.11")
