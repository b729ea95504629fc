"""`gdn_prefill` by the kernels in CuTe DSL, of FlashInfer 0.6.14 and later."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

import fi_ffi
from fi_ffi.abi.tensor import DTYPES
from fi_ffi.cli.cases import case_of
from fi_ffi.ops.functions import OPS

from tests.helpers.calls import called

OP = OPS["gdn_prefill"]
NEWEST = "0.7.2.post1"
WRITTEN = ("output", "output_state", "state_checkpoints")


@pytest.fixture
def form(machine) -> Iterator[None]:
    """The form of the kernels in use, or on the CPU the newest."""
    if machine.is_gpu:
        if not OP.row.variant:
            pytest.skip("the kernels in use have the compiled prefill")
        yield
        return
    OP.select_release(NEWEST)
    yield
    OP.forget()


def draw(rng, starts, every=0, dtype="bfloat16", h=2, hv=4):
    def unit(*shape):
        values = rng.standard_normal(shape)
        return values / np.linalg.norm(values, axis=-1, keepdims=True)

    half, n, count = DTYPES[dtype].numpy, starts[-1], len(starts) - 1
    arrays = {
        "output": np.full((n, hv, 128), np.nan, half),
        "output_state": np.full((count, hv, 128, 128), 3, np.float32),
        "q": unit(n, h, 128).astype(half),
        "k": unit(n, h, 128).astype(half),
        "v": rng.standard_normal((n, hv, 128)).astype(half),
        "cu_seqlens": np.array(starts, np.int64),
        "input_state": unit(count, hv, 128, 128).astype(np.float32),
        "alpha": rng.uniform(0.7, 1, (n, hv)).astype(np.float32),
        "beta": rng.uniform(0, 1, (n, hv)).astype(np.float32),
    }
    if every:
        whole = np.diff(starts) // every
        arrays["checkpoint_cu_starts"] = np.concatenate([[0], np.cumsum(whole)])
        arrays["state_checkpoints"] = np.full((whole.sum(), hv, 128, 128), 3, np.float32)
    return arrays


def worst(machine, arrays, **scalars):
    """The worst error as a fraction of its bound; what is not written stays as it was."""
    if machine.is_gpu:
        dtypes = {name: fi_ffi.as_desc(array).dtype.name for name, array in arrays.items()}
        machine.need(OP.row.compiled_for(OP.row, dtypes).module)
    case = case_of(OP.row, arrays, {"scale": 0.0, "checkpoint_every_n_tokens": 0, **scalars})
    written = [name for name in WRITTEN if name in arrays]
    got = called(OP, arrays, machine.place, written, **scalars, stream=machine.stream)
    for name, (_, size) in case.expected.items():
        kept = size == 0 if name != "output" else np.zeros(size.shape, bool)
        assert (got[name][kept] == arrays[name][kept]).all(), name
    return max(case.error(name, got[name])[1] for name in case.expected), got


def test_sequences(form, machine, rng):
    error, _ = worst(machine, draw(rng, [0, 70, 135, 136]))
    assert error <= 1


def test_checkpoints_are_of_whole_pieces(form, machine, rng):
    arrays = draw(rng, [0, 70, 198, 230], every=64)
    error, _ = worst(machine, arrays, checkpoint_every_n_tokens=64)
    assert error <= 1 and len(arrays["state_checkpoints"]) == 3


def test_sequences_without_tokens(form, machine, rng):
    """Their states are left alone: the compiled kernel never ends on one."""
    error, got = worst(machine, draw(rng, [0, 0, 70, 70, 99]))
    assert error <= 1 and (got["output_state"][[0, 2]] == 3).all()


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])
def test_states_in_pools(state_dtype, form, machine, rng):
    """Read and written where they are, among others' states."""
    arrays = draw(rng, [0, 70, 99])
    pool = rng.standard_normal((7, 4, 128, 128)) * 0.1
    pool = pool.astype(DTYPES[state_dtype].numpy)
    arrays |= {
        "input_state": pool, "output_state": pool.copy(),
        "state_indices": np.array([5, 2], np.int32),
    }  # fmt: skip
    error, got = worst(machine, arrays)
    assert error <= 1
    others = [0, 1, 3, 4, 6]
    assert got["output_state"][others].tobytes() == pool[others].tobytes()


def test_a_pool_in_place(form, machine, rng):
    arrays = draw(rng, [0, 70, 99])
    arrays |= {"state_indices": np.array([1, 0], np.int32)}
    if machine.is_gpu:
        dtypes = {name: fi_ffi.as_desc(array).dtype.name for name, array in arrays.items()}
        machine.need(OP.row.compiled_for(OP.row, dtypes).module)
    apart = called(OP, arrays, machine.place, WRITTEN, stream=machine.stream)
    placed = {name: machine.place(array) for name, array in arrays.items()}
    descs = {name: array.desc() for name, array in placed.items()}
    OP(**descs | {"output_state": descs["input_state"]}, stream=machine.stream)
    assert placed["output"].get().tobytes() == apart["output"].tobytes()
    assert placed["input_state"].get().tobytes() == apart["output_state"].tobytes()


def test_forms_give_the_same(rng):
    """On the CPU, where both are one formula: but for checkpoints that are not whole."""
    arrays = draw(rng, [0, 70, 99], dtype="float16")
    found = []
    for release in ("0.6.13", "0.6.18", NEWEST):
        OP.select_release(release)
        copy = {name: array.copy() for name, array in arrays.items()}
        OP(**copy)
        found.append(copy)
    OP.forget()
    for name in ("output", "output_state"):
        assert all((copy[name] == found[0][name]).all() for copy in found)


@pytest.mark.parametrize(
    ("argument", "change"),
    [
        ("output_state", {"output_state": np.zeros((3, 4, 128, 128), np.float32)}),
        ("state_indices", {"state_indices": np.zeros(3, np.int32)}),
        ("state_indices", {"state_indices": np.zeros(2, np.int16)}),
        ("alpha", {"alpha": np.zeros((99, 4), np.float16)}),
        ("q", {"q": np.zeros((99, 2, 128), np.float32)}),
    ],
)
def test_refusals(argument, change, form, rng):
    arrays = draw(rng, [0, 70, 99]) | change
    pools = {"input_state": np.zeros_like(arrays["output_state"])}
    with pytest.raises((fi_ffi.ArgumentError, fi_ffi.ArgumentTypeError)) as raised:
        OP(**arrays | pools)
    assert raised.value.argument == argument
    assert np.isnan(arrays["output"].astype(np.float32)).all()


def test_a_module_is_compiled_for_what_is_there():
    row = next(row for row in OP.rows if row.releases == ">=0.7.0")
    given = {"q": "float16", "output_state": "bfloat16", "cu_seqlens": "int32", "beta": "float32"}
    one = row.compiled_for(row, given)
    end = "float16_noalpha_beta_noinit_bfloat16_nocheckpoints_noindices_int32"
    assert one.module.endswith(f"_sm90a_cute_dsl_fully_fused_delta_rule_sm90_{end}")
    assert one.symbol == one.module.replace("_sm90a_cute_dsl", "")
    params = dict(zip([arg.name for arg in one.args], one.signature.params, strict=True))
    assert params["alpha"] == params["input_state"] == params["state_indices"] == "None"
    assert params["beta"] == params["workspace_buffer"] == "DLTensor*"
