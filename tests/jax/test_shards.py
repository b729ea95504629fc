"""Programs that XLA divides among devices: each has its rows, or the call is refused."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import fi_ffi.jax
from fi_ffi.jax.shards import rows_of
from fi_ffi.ops.functions import OPS

from tests.attention.cases import make
from tests.attention.machines import Cpu
from tests.attention.tables import SERVED
from tests.helpers.cases import default_dtypes, make_case
from tests.helpers.in_jit import PARTS, TOLD, as_jitted, given, results_of
from tests.helpers.inputs import inputs_of

MESH = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,))
ROWS, COLUMNS, WHOLE = (
    NamedSharding(MESH, PartitionSpec(*spec)) for spec in (["x"], [None, "x"], [])
)
DIVIDED = [name for name in sorted(OPS.keys() - PARTS) if rows_of(name)]
MOVES = ("all-gather", "all-to-all", "collective-permute", "all-reduce")
# Of what device memory an op's rows are, besides its own row.
DEPENDENT = {
    "another's rows": ("append_paged_kv_cache", "rope_quantize_append_paged_kv_cache",
                       "transfer_kv_per_layer"),
    "starts of requests": ("apply_rope", "gdn_prefill", "segment_packbits"),
    "a row's number": ("sampling_from_probs", "chain_speculative_sampling", "packbits",
                       "fused_qk_rmsnorm_rope", "radix_topk_page_table_transform"),
    "how many rows there are": ("mxfp8_gemm", "fp4_gemm", "fp4_quantize", "bmm_mxfp8"),
}  # fmt: skip


@pytest.fixture
def rows(rng):
    x = rng.standard_normal((36, 64)).astype(np.float16)
    return x, (1 + rng.standard_normal(64) / 10).astype(np.float16)


def test_which_ops_have_independent_rows():
    dependent = {name for names in DEPENDENT.values() for name in names}
    assert dependent <= OPS.keys() and not dependent & {*DIVIDED}
    assert {
        "rmsnorm", "fused_add_rmsnorm", "silu_and_mul", "apply_rope_pos_ids", "merge_state",
        "softmax", "top_k_renorm_probs", "bf16_gemm", "rope_quantize",
    } <= {*DIVIDED}  # fmt: skip


@pytest.mark.parametrize("name", DIVIDED)
def test_each_device_has_its_rows(name, rng):
    """The results are right, divided as the arguments were, and nothing moves between devices."""
    row, axis = OPS[name].row, rows_of(name)
    sizes = inputs_of(row).small | {axis: 6}
    without = [arg.name for arg in row.tensors if arg.optional and arg.axis_names[0] != axis]
    case = make_case(row, sizes, default_dtypes(row), rng, without=without)
    run, arrays = as_jitted(case, TOLD.get(name, ()))
    axes = {arg.name: arg.axis_names[0] for arg in row.tensors}
    placed = {
        name: jax.device_put(array, ROWS if axes[name] == axis else WHOLE)
        for name, array in arrays.items()
    }
    found = run(placed)
    found = dict(
        zip(results_of(case), found if isinstance(found, tuple) else (found,), strict=True)
    )
    assert found.keys() >= case.expected.keys()
    for result, got in found.items():
        assert got.sharding.is_equivalent_to(ROWS, got.ndim), result
        if result in case.expected:
            assert case.error(result, np.asarray(got))[1] <= 1, result
    text = run.lower(placed).compile().as_text()
    assert not [move for move in MOVES if move in text]


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_types_say_how_rows_are_divided(kind, rows):
    x, weight = rows
    mesh = jax.make_mesh((2,), ("x",), axis_types=(kind,))
    types = []

    @jax.jit
    def step(x, weight):
        found = fi_ffi.jax.rmsnorm(x * 2, weight)
        types.append(str(jax.typeof(found)))
        return found + x

    placed = jax.device_put(x, NamedSharding(mesh, PartitionSpec("x")))
    found = step(placed, jax.device_put(weight, NamedSharding(mesh, PartitionSpec())))
    assert types == ["float16[36@x,64]" if kind is AxisType.Explicit else "float16[36,64]"]
    assert [shard.data.shape for shard in found.addressable_shards] == [(18, 64)] * 2
    assert (np.asarray(found) == np.asarray(jax.jit(fi_ffi.jax.rmsnorm)(x * 2, weight)) + x).all()


def test_an_argument_that_every_device_has(rows):
    """It is not moved either, where another is divided by rows."""
    x, weight = rows
    add = jax.jit(fi_ffi.jax.fused_add_rmsnorm)
    found = add(jax.device_put(x, ROWS), jax.device_put(x, WHOLE), weight)
    for got, wanted in zip(found, add(x, x, weight), strict=True):
        assert got.sharding.is_equivalent_to(ROWS, 2)
        assert (np.asarray(got) == np.asarray(wanted)).all()


DIVISIONS = {
    "columns": ((COLUMNS, WHOLE), r"`input`: got an array divided by P.*\(None, 'x'\), exp"),
    "a weight": (
        (ROWS, ROWS),
        r"`weight`: got an array divided by P.*\('x',\), expected rows alone",
    ),
}


@pytest.mark.parametrize("what", DIVISIONS)
def test_what_would_have_to_move_is_refused(what, rows):
    placements, words = DIVISIONS[what]
    placed = [jax.device_put(array, at) for array, at in zip(rows, placements, strict=True)]
    with pytest.raises(
        jax.errors.JaxRuntimeError, match=f"ArgumentError: rmsnorm: argument {words}"
    ):
        jax.jit(fi_ffi.jax.rmsnorm)(*placed)


def test_ops_whose_rows_depend_on_each_other_are_refused(rng):
    bits = jax.device_put(rng.random(64) < 0.5, ROWS)
    words = "packbits: argument `sharding`: got arrays of 2 devices.*jax.shard_map"
    with pytest.raises(fi_ffi.ArgumentError, match=words):
        jax.jit(fi_ffi.jax.packbits)(bits)


def test_plans_are_refused(rng):
    case, batch = make(SERVED["decode"], Cpu(), rng)
    plan = case.plan(batch)
    arrays = [jax.device_put(array, WHOLE) for array in given(case, batch)]
    words = "BatchDecodePlan.run: argument `sharding`: got arrays of 2 devices.*jax.shard_map"
    with pytest.raises(fi_ffi.ArgumentError, match=words):
        jax.jit(lambda *arrays: fi_ffi.jax.run(plan, *arrays))(*arrays)


def test_shard_map(rows):
    """Each device has its part, as the caller says."""
    x, weight = rows
    each = jax.shard_map(
        lambda x: fi_ffi.jax.rmsnorm(x, weight), mesh=MESH, in_specs=ROWS.spec, out_specs=ROWS.spec,
        check_vma=False,
    )  # fmt: skip
    norm = jax.jit(fi_ffi.jax.rmsnorm)
    found, wanted = jax.jit(each)(jax.device_put(x, ROWS)), np.asarray(norm(x, weight))
    assert len(found.addressable_shards) == 2 and (np.asarray(found) == wanted).all()
    second = jax.device_put(jnp.asarray(x), jax.devices()[1])
    assert (np.asarray(norm(second, weight)) == wanted).all()
