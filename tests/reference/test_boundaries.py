"""Formulas that no row of an op has, beside definitions: with options, and at their thresholds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fi_ffi.cli.cases import case_of
from fi_ffi.ops.functions import OPS
from fi_ffi.reference.formula import as_inputs

from tests.helpers.definitions import DEFINITIONS, selective_state_update
from tests.helpers.gates import EDGES
from tests.helpers.state_calls import PAD, StateCall

SMALL: dict[str, Any] = {"heads": 4, "groups": 2, "dim": 16, "dstate": 32}


def check_states(call: StateCall) -> None:
    """What the formula says of a call is what the definition does, but for a step past 20."""
    floats = {name: a.astype(np.float64) for name, a in call.arrays.items() if a.dtype.kind == "f"
              or a.dtype.name == "bfloat16"}  # fmt: skip
    wanted = selective_state_update({**call.arrays, **floats, **call.options, "pad": PAD})
    for name, expected in call.case().expected.items():
        value, right = expected[0], wanted[name]
        assert (np.isnan(value) == np.isnan(right)).all(), name
        largest = np.nanmax(np.abs(right), initial=1.0)
        assert np.nanmax(np.abs(value - right), initial=0.0) <= 1e-7 * largest, name


@pytest.mark.parametrize("number", range(3))
@pytest.mark.parametrize("kind", ["one", "steps", "sequences"])
def test_states_with_random_options(kind, number, rng):
    """Read anywhere, some from nowhere; written where they were read, elsewhere, or after each."""
    steps = 1 if kind == "one" else int(rng.integers(1, 5))
    b = int(rng.integers(1, 6))
    call = StateCall(rng, kind, b, steps, slots=50, gated=bool(rng.integers(2)),
                     biased=bool(rng.integers(2)), **SMALL)  # fmt: skip
    call.options["dt_softplus"] = bool(rng.integers(2))
    call.options["disable_state_update"] = bool(rng.integers(2))
    padded = [*np.flatnonzero(rng.random(b) < 0.3)]
    width = steps if kind != "one" and rng.integers(2) else 0
    if width or rng.integers(2):
        call.read_from(*padded, width=width)
    way = ("as read", "elsewhere", "each")[number]
    if way == "elsewhere":
        call.write_to(*padded, width=steps if kind != "one" else 0)
    elif way == "each" and kind != "one":
        call.keep_each(steps if kind == "sequences" else steps + int(rng.integers(2)))
        call.options["disable_state_update"] = True
    if width:
        accepted = rng.integers(0, steps + 1, b)
        call.arrays["num_accepted_tokens"] = accepted.astype(np.int32)
    check_states(call)


@pytest.mark.parametrize("softplus", [False, True])
def test_steps_at_the_edges_of_softplus(softplus, rng):
    """Where a kernel takes a step for its softplus, and where others would."""
    call = StateCall(rng, b=len(EDGES), biased=False, **SMALL)
    call.arrays["dt"][...] = np.array(EDGES)[:, None]
    call.options["dt_softplus"] = softplus
    check_states(call)


LENGTHS = [1, 63, 64, 65, 127, 128, 129]


@pytest.mark.parametrize("every", [64, 128])
@pytest.mark.parametrize("row", [*OPS["gdn_prefill"].rows], ids=lambda row: row.releases)
def test_sequences_of_as_many_tokens_as_a_tile_has(row, every, rng):
    """And one more or less, and none where a form takes that; a state is kept every so often."""
    keeps = any(arg.name == "checkpoint_every_n_tokens" for arg in row.args)
    lengths = rng.permutation(LENGTHS + [0, 0] * bool(row.variant))
    starts, total = np.concatenate([[0], np.cumsum(lengths)]), int(lengths.sum())
    kept = lengths // every if row.variant else -(-lengths // 64) * 64 // every
    shape, count = (total, 1, 128), len(lengths)

    def unit(*sizes: int) -> np.ndarray:
        values = rng.standard_normal(sizes)
        return (values / np.linalg.norm(values, axis=-1, keepdims=True)).astype(np.float32)

    arrays = {
        "output": np.full(shape, np.nan, np.float16), "q": unit(*shape), "k": unit(*shape),
        "output_state": np.full((count, 1, 128, 128), 3, np.float32), "v": unit(*shape),
        "input_state": unit(count, 1, 128, 128), "cu_seqlens": starts.astype(np.int64),
        "alpha": rng.uniform(0.7, 1, (total, 1)).astype(np.float32),
        "beta": rng.uniform(0, 1, (total, 1)).astype(np.float32),
    }  # fmt: skip
    scalars: dict[str, Any] = {"scale": 0.0}
    if keeps:
        arrays["state_checkpoints"] = np.full((kept.sum(), 1, 128, 128), 3, np.float32)
        arrays["checkpoint_cu_starts"] = np.concatenate([[0], np.cumsum(kept)])
        scalars["checkpoint_every_n_tokens"] = every
    wanted = DEFINITIONS[row.formula](as_inputs({**arrays, **scalars}))
    expected = case_of(row, arrays, scalars).expected
    assert wanted.keys() == expected.keys()
    for name, value in wanted.items():
        found = expected[name]
        assert isinstance(found, tuple)
        np.testing.assert_allclose(found[0], value, 1e-6, 1e-6, err_msg=name)
