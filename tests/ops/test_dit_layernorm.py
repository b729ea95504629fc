"""Layer norms of diffusion transformers against float64: on the CPU, and on a GPU."""

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

LAYERNORMS = (
    "fused_dit_gate_residual_layernorm_gamma_beta",
    "fused_dit_residual_layernorm_scale_shift",
    "fused_dit_gate_residual_layernorm_scale_shift",
)


def layernorm(rng, name: str, n: int = 2, num_rows: int = 5, **more: Any) -> Case:
    row = OPS[name].row
    return make_case(row, {"n": n, "num_rows": num_rows}, {"T": "bfloat16"}, rng, **more)


@pytest.mark.parametrize("name", LAYERNORMS)
def test_layernorms(name, machine, rng):
    many = 3000 if machine.is_gpu else 40
    for n, num_rows in ((1, 1), (3, 2), (1, many), (many, 1)):
        assert check_on(machine, layernorm(rng, name, n, num_rows)) <= 1


@pytest.mark.parametrize("epsilon", [0.0, 1e-5, 0.7])
@pytest.mark.parametrize("name", LAYERNORMS)
def test_options_of_layernorms(name, epsilon, machine, rng):
    absent = ["input_sf_scale"] + ["residual"] * (name == LAYERNORMS[1])
    for without in ((), *((one,) for one in absent), absent):
        made = layernorm(rng, name, without=without, epsilon=epsilon)
        assert check_on(machine, made) <= 1
    far = {"input": rng.standard_normal((2, 5, 3072)) + 8}
    assert check_on(machine, layernorm(rng, name, tables=far, epsilon=epsilon)) <= 1


@pytest.mark.parametrize("name", LAYERNORMS)
def test_no_rows(name, machine, rng):
    for n, num_rows in ((0, 4), (4, 0)):
        assert check_on(machine, layernorm(rng, name, n, num_rows)) == 0


@pytest.mark.parametrize("name", LAYERNORMS)
def test_layernorms_recorded_and_replayed(name, machine, rng):
    assert check_replayed(machine, layernorm(rng, name)) <= 1


def test_parts_of_one_table(machine, rng):
    """Gate, scale and shift where a model has them: three of the six parts of one tensor."""
    name = LAYERNORMS[2]
    table = rng.standard_normal((2, 5, 6, 3072))
    parts = {"gate": 2, "scale": 4, "shift": 5}
    made = layernorm(rng, name, tables={n: table[:, :, i] for n, i in parts.items()})
    machine.need("norm")
    whole = machine.place(table.astype(made.arrays["gate"].dtype))
    placed = {n: machine.place(array) for n, array in made.arrays.items() if n not in parts}
    descs = {n: array.desc() for n, array in placed.items()}
    strides = (5 * 6 * 3072, 6 * 3072, 1)
    for part, i in parts.items():
        address = whole.desc().ptr + i * 3072 * 2
        descs[part] = fi_ffi.TensorDesc(
            address, (2, 5, 3072), "bfloat16", strides=strides, device=whole.desc().device
        )
    OPS[name](**descs, stream=machine.stream)
    for out in ("residual_out", "norm_out"):
        assert made.error(out, placed[out].get())[1] <= 1


@pytest.mark.parametrize("name", LAYERNORMS)
def test_tables_of_another_shape(name, rng):
    """The kernel would read past the end of a tensor of its own."""
    made = layernorm(rng, name)
    for part in ("gate", "scale", "shift"):
        if part in made.arrays:
            own = np.ascontiguousarray(made.arrays[part])
            with pytest.raises(fi_ffi.ArgumentError, match="one of 6 parts"):
                OPS[name](**(made.arrays | {part: own}))


@pytest.mark.parametrize("name", LAYERNORMS)
def test_what_the_layernorms_need(name, rng):
    made = layernorm(rng, name)
    narrow = made.arrays["input"][..., :2048].copy()
    with pytest.raises(fi_ffi.ArgumentError, match="3072 = 3072"):
        OPS[name](**(made.arrays | {"input": narrow}))
    biases = [name for name in made.arrays if name.endswith("bias")]
    assert biases
    for bias in biases:
        with pytest.raises(fi_ffi.ArgumentTypeError, match=bias):
            OPS[name](**(made.arrays | {bias: None}))


def test_a_wrong_norm_is_seen(rng):
    made = layernorm(rng, LAYERNORMS[2])
    arrays = made.arrays
    OPS[LAYERNORMS[2]](**arrays)
    assert max(made.error(out, arrays[out])[1] for out in made.expected) <= 1
    exchanged = arrays | {"scale": arrays["shift"], "shift": arrays["scale"]}
    OPS[LAYERNORMS[2]](**exchanged)
    assert made.error("norm_out", arrays["norm_out"])[1] > 1
    assert made.error("residual_out", arrays["residual_out"])[1] <= 1
    arrays["gate_bias"] += np.float32(0.1)
    OPS[LAYERNORMS[2]](**arrays)
    assert made.error("residual_out", arrays["residual_out"])[1] > 1


def test_releases():
    for name in LAYERNORMS:
        (row,) = OPS[name].rows
        assert fits(row, "0.6.11") and not fits(row, "0.6.10")
