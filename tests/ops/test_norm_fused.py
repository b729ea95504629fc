"""Fused kernels of diffusion transformers against float64: on the CPU, and on a GPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import fi_ffi
from fi_ffi.cli.cases import Case
from fi_ffi.ops.functions import OPS
from fi_ffi.ops.releases import fits

from tests.helpers.cases import make_case
from tests.helpers.every_op import check_on, check_replayed

OP = OPS["fused_qk_rmsnorm_rope"]
OUTPUTS = ("bfloat16", "float8_e4m3fn")
VIDEO = {"ppf": 3, "pph": 4, "ppw": 7}
YARN = {"factor": 4.0, "low": 3.0, "high": 9.5, "attention_factor": 1.2}


def case(rng, n=100, heads=(4, 3, 2), head_dim=128, output="bfloat16", **numbers: Any) -> Case:
    axes = ("num_heads_q", "num_heads_k", "num_heads_v")
    sizes = {"n": n, "head_dim": head_dim, **dict(zip(axes, heads, strict=True))}
    numbers = VIDEO | numbers
    if output == "float8_e4m3fn":
        numbers = {"output_quant_scale": 3.5, "v_quant_scale": 0.7} | numbers
    return make_case(OP.row, sizes, {"T": "bfloat16", "O": output}, rng, **numbers)


@pytest.mark.parametrize("interleave", [True, False])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("output", OUTPUTS)
def test_heads(output, head_dim, interleave, machine, rng):
    for heads in ((1, 1, 1), (24, 24, 24), (32, 8, 8), (2, 5, 32)):
        made = case(rng, 90, heads, head_dim, output, interleave=interleave)
        assert check_on(machine, made) <= 1


@pytest.mark.parametrize("yarn", [{}, YARN, YARN | {"high": 3.0}], ids=["", "yarn", "at once"])
@pytest.mark.parametrize("is_qk_norm", [True, False])
@pytest.mark.parametrize("interleave", [True, False])
@pytest.mark.parametrize("output", OUTPUTS)
def test_options(output, interleave, is_qk_norm, yarn, machine, rng):
    for eps, base in ((1e-6, 10000.0), (0.5, 100.0)):
        numbers = {"interleave": interleave, "is_qk_norm": is_qk_norm, "eps": eps, "base": base}
        assert check_on(machine, case(rng, output=output, **numbers, **yarn)) <= 1


@pytest.mark.parametrize(
    "channels", [(128, 0, 0), (0, 128, 0), (0, 0, 128), (44, 42, 42), (2, 6, 120)]
)
def test_channels(channels, machine, rng):
    """All of a head for one direction, as even as can be, and as uneven."""
    names = ("num_frame_channels", "num_height_channels", "num_width_channels")
    for interleave in (True, False):
        numbers = dict(zip(names, channels, strict=True)) | {"interleave": interleave}
        assert check_on(machine, case(rng, **numbers)) <= 1


@pytest.mark.parametrize("video", [(1, 1, 1), (21, 1, 1), (1, 30, 1), (1, 1, 100), (2, 15, 26)])
def test_videos(video, machine, rng):
    """One patch, rows and columns of them; several in a batch, the last of them cut off."""
    numbers = dict(zip(VIDEO, video, strict=True))
    for n in (1, 7, 800):
        assert check_on(machine, case(rng, n, (2, 2, 2), 64, **numbers)) <= 1


def test_no_tokens_and_no_heads(machine, rng):
    assert check_on(machine, case(rng, 0)) == 0
    assert check_on(machine, case(rng, 5, (0, 0, 0))) == 0
    for heads in ((2, 0, 0), (0, 3, 0), (0, 0, 2), (3, 2, 0)):
        assert check_on(machine, case(rng, 50, heads)) <= 1


@pytest.mark.parametrize("output", OUTPUTS)
def test_values_are_copied(output, machine, rng):
    """Bit for bit to bfloat16; and clamped to float8."""
    made = case(rng, 40, output=output, v_quant_scale=1.0)
    made.arrays["qkv_in"][0, -1, :4] = [1e4, -1e4, 0.0, -0.0]
    machine.need("norm")
    placed = {name: machine.place(array) for name, array in made.arrays.items()}
    descs = {name: array.desc() for name, array in placed.items()}
    OP(**descs, **made.scalars, stream=machine.stream)
    values, got = made.arrays["qkv_in"][:, -2:], placed["v_out"].get()
    if output == "float8_e4m3fn":
        values = np.clip(values.astype(np.float32), -448, 448).astype(got.dtype)
    assert got.tobytes() == np.ascontiguousarray(values).tobytes()


def test_recorded_and_replayed(machine, rng):
    """After a call with the same numbers: docs/norm_fused.md."""
    assert check_replayed(machine, case(rng)) <= 1


def test_numbers_that_change_from_call_to_call(machine, rng):
    """The kernel keeps the frequencies of the last call on a device."""
    for _ in range(3):
        for numbers in ({}, {"base": 500.0}, YARN, {"num_frame_channels": 44, "num_height_channels":
                        42, "num_width_channels": 42}):  # fmt: skip
            assert check_on(machine, case(rng, **numbers)) <= 1


WRONG = [
    ({"seq_len": 83}, "seq_len", r"seq_len = ppf \* pph \* ppw"),
    ({"pph": 5, "seq_len": 84}, "seq_len", "seq_len = 84, ppf = 3, pph = 5, ppw = 7"),
    ({"num_frame_channels": 46}, "num_frame_channels", "num_width_channels = head_dim"),
    ({"num_width_channels": 43}, "num_width_channels", "a multiple of 2"),
    ({"attention_factor": 1.1}, "attention_factor", "1.0, or a factor that is not"),
    ({"attention_factor": 1.1, "factor": 1 + 1e-9}, "attention_factor", "or a factor that is not"),
    ({"output_fp8": True}, "output_fp8", "only there"),
    ({"num_tokens": 99}, "num_tokens", "100, the size of n"),
    ({"num_heads_k": 4}, "num_heads_k", "3, the size of num_heads_k"),
    ({"head_dim": 64}, "head_dim", "128, the size of head_dim"),
    ({"ppw": 0}, "ppw", "1 or more"),
    ({"ppf": 2**31}, "ppf", "2147483647 or less"),
]  # fmt: skip


@pytest.mark.parametrize(("wrong", "argument", "expected"), WRONG)
def test_numbers_that_do_not_fit(wrong, argument, expected, rng):
    """FlashInfer ends the process for most of them."""
    made = case(rng)
    with pytest.raises(fi_ffi.ArgumentError, match=expected) as caught:
        OP(**made.arrays, **(made.scalars | wrong))
    assert caught.value.argument == argument
    assert np.isnan(made.arrays["q_out"].astype(float)).all()


def test_float8_that_is_not_said(rng):
    made = case(rng, output="float8_e4m3fn")
    with pytest.raises(fi_ffi.ArgumentError, match="O = float8_e4m3fn"):
        OP(**made.arrays, **(made.scalars | {"output_fp8": False}))


@pytest.mark.parametrize("heads", [(33, 1, 1), (1, 33, 1), (1, 1, 33)])
def test_more_heads_than_a_block_has_warps(heads, rng):
    made = case(rng, 5, heads)
    with pytest.raises(fi_ffi.ArgumentError, match="= 33 of at most 32"):
        OP(**made.arrays, **made.scalars)


def test_a_wrong_turn_is_seen(rng):
    """A token's patch one further on, halves for neighbours, and a scale 2 % off."""
    made = case(rng)

    def fraction(**other: Any) -> float:
        arrays = {name: array.copy() for name, array in made.arrays.items()}
        OP(**arrays, **(made.scalars | other))
        return made.error("q_out", arrays["q_out"])[1]

    assert fraction() <= 1
    assert fraction(interleave=False) > 1
    assert fraction(pph=7, ppw=4) > 1
    assert fraction(base=9000.0) > 1
    assert fraction(factor=1.5, attention_factor=1.0) > 1
    shifted = np.roll(made.arrays["qkv_in"], 1, axis=0)
    arrays = {name: array.copy() for name, array in made.arrays.items()} | {"qkv_in": shifted}
    OP(**arrays, **made.scalars)
    assert made.error("q_out", np.roll(arrays["q_out"], -1, axis=0))[1] > 1
    OP(**made.arrays, **made.scalars)
    scaled = (made.arrays["q_out"].astype(np.float32) * 1.02).astype(made.arrays["q_out"].dtype)
    assert made.error("q_out", scaled)[1] > 1


def test_releases():
    (row,) = OP.rows
    assert fits(row, "0.6.12") and not fits(row, "0.6.11")
