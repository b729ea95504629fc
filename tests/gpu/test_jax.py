"""Every op inside jax.jit on a GPU, and what XLA records of it."""

from __future__ import annotations

import numpy as np
import pytest

from fi_ffi.ops.functions import OPS

from tests.attention.cases import Result, Service
from tests.attention.tables import GRAPHS, SERVED
from tests.gpu.test_every_op import needs
from tests.helpers.cases import default_dtypes, make_case
from tests.helpers.in_jit import PADDED, PARTS, TOLD, Found, call_in_jit, given
from tests.helpers.inputs import inputs_of

NAMES = sorted(OPS.keys() - PARTS - PADDED.keys())


@pytest.fixture(autouse=True)
def jax(monkeypatch):
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    found = pytest.importorskip("jax", reason="jax is not installed")
    if not any(device.platform == "gpu" for device in found.devices()):
        pytest.skip("jax sees no GPU")
    found.config.update("jax_enable_x64", True)
    return found


@pytest.fixture
def counted(jax, monkeypatch):
    """The functions that XLA has asked for, one for each call of Python."""
    import fi_ffi.jax

    found = []
    find = fi_ffi.jax._handlers._find
    monkeypatch.setattr(
        fi_ffi.jax._handlers, "_find", lambda name: found.append(name) or find(name)
    )
    return found


@pytest.mark.parametrize("name", NAMES)
def test_every_op(name, rng):
    needs(OPS[name])
    row = OPS[name].row
    for _ in range(3):
        case = make_case(row, inputs_of(row).small, default_dtypes(row), rng)
        for result, got in call_in_jit(case, TOLD.get(name, ())).items():
            if result in case.expected:
                assert case.error(result, got)[1] <= 1, result


@pytest.mark.parametrize("index", [0, 1])
def test_steps_that_are_recorded(index, jax, counted, rng):
    """Eight norms a step: right with new arrays each time, on either GPU."""
    import fi_ffi.jax

    needs(OPS["rmsnorm"])
    if len(jax.devices()) <= index:
        pytest.skip("needs two GPUs")
    device = jax.devices()[index]
    weight = jax.device_put((1 + rng.standard_normal(512) / 10).astype(np.float16), device)

    @jax.jit
    def step(x, weight):
        for _ in range(8):
            x = fi_ffi.jax.rmsnorm(x * 1.5 + 0.25, weight, eps=1e-6)
        return x

    for _ in range(20):
        x = rng.standard_normal((37, 512)).astype(np.float16)
        wanted, of = x.astype(float), np.asarray(weight, float)
        for _ in range(8):
            wanted = (wanted * 1.5 + 0.25).astype(np.float16).astype(float)
            norm = np.sqrt((wanted**2).mean(-1, keepdims=True) + 1e-6)
            wanted = (wanted / norm * of).astype(np.float16).astype(float)
        got = step(jax.device_put(x, device), weight)
        assert np.abs(np.asarray(got, float) - wanted).max() <= 2e-2 * np.abs(wanted).max()
    print(f"20 steps of 8 norms called Python {len(counted)} times")
    assert 8 <= len(counted) <= 160


def test_shards(jax, rng):
    import fi_ffi.jax

    needs(OPS["rmsnorm"])
    if len(jax.devices()) < 2:
        pytest.skip("needs two GPUs")
    x = rng.standard_normal((40, 512)).astype(np.float16)
    weight = np.ones(512, np.float16)
    mesh = jax.make_mesh((2,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("rows")
    placed = jax.device_put(x, jax.sharding.NamedSharding(mesh, spec))
    each = jax.shard_map(
        lambda x: fi_ffi.jax.rmsnorm(x, weight), mesh=mesh, in_specs=spec, out_specs=spec,
        check_vma=False,
    )  # fmt: skip
    found = np.asarray(jax.jit(each)(placed), float)
    wanted = x / np.sqrt((x.astype(float) ** 2).mean(-1, keepdims=True) + 1e-6)
    assert np.abs(found - wanted).max() <= 4e-3 * np.abs(wanted).max()


@pytest.mark.parametrize("graph", [False, True], ids=["plain", "graph"])
@pytest.mark.parametrize("name", SERVED)
def test_plans(name, graph, jax, machine, rng):
    """Planned again between calls of one program; for graphs, XLA may have recorded the run."""
    import fi_ffi.jax

    spec = (GRAPHS if graph else SERVED)[name]
    service = Service(spec, machine, rng)
    case, batch = service.case, service.batch()
    more = {"enable_cuda_graph": True} if graph else {}
    if graph and spec.family in ("batch_attention", "batch_mla"):
        pytest.skip("has no such option")
    plan = case.plan(batch, **more)
    options = case.run_options(batch)
    run = jax.jit(lambda *tensors: fi_ffi.jax.run(plan, *tensors, lse=spec.lse, **options))
    for _ in range(4):
        tensors = [jax.numpy.asarray(array) for array in given(case, batch)]
        found = jax.block_until_ready(run(*tensors))
        o, lse = found if spec.lse else (found, None)
        case.check(batch, Result(Found(o), None if lse is None else Found(lse)))
        if graph:
            continue
        batch = service.batch()
        case.replan(plan, batch)
        machine.synchronize()
