"""Every op inside jax.jit on a GPU, and what XLA records of it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cuda.bindings import runtime

from fi_ffi.cli.cuda import check
from fi_ffi.ops.functions import OPS

from tests.attention.cases import Result, Service, graph_options
from tests.attention.tables import GRAPHS, SERVED
from tests.gpu.test_every_op import needs
from tests.helpers import kernels
from tests.helpers.cases import default_dtypes, make_case
from tests.helpers.in_jit import (
    PADDED,
    PARTS,
    TOLD,
    Found,
    call_in_jit,
    check_in_jit,
    check_lengths_as_arrays,
    given,
    in_jit,
)
from tests.helpers.inputs import inputs_of

EXAMPLE = Path(__file__).parents[2] / "examples" / "interop" / "jax_in_jit.py"
NAMES = sorted(OPS.keys() - PARTS - PADDED.keys())


@pytest.fixture(autouse=True)
def jax(monkeypatch):
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    found = pytest.importorskip("jax", reason="jax is not installed")
    if not any(device.platform == "gpu" for device in found.devices()):
        pytest.skip("jax sees no GPU")
    found.config.update("jax_enable_x64", True)
    check(runtime.cudaSetDevice(0))
    yield found
    check(runtime.cudaSetDevice(0))  # XLA leaves that of its last call


@pytest.fixture
def counted(jax, monkeypatch):
    """The functions that XLA has asked for, one for each call of Python."""
    import fi_ffi.jax

    found = []
    find = fi_ffi.jax.primitive.handlers._find
    monkeypatch.setattr(
        fi_ffi.jax.primitive.handlers, "_find", lambda name: found.append(name) or find(name)
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


@pytest.mark.parametrize("by", ["shard_map", "XLA"])
def test_shards(by, jax, counted, rng):
    """Each GPU has its rows: in shard_map, and where XLA divides the program."""
    import fi_ffi.jax

    needs(OPS["rmsnorm"])
    if len(jax.devices()) < 2:
        pytest.skip("needs two GPUs")
    weight = np.ones(512, np.float16)
    mesh = jax.make_mesh((2,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("rows")

    def norms(x):
        for _ in range(8):
            x = fi_ffi.jax.rmsnorm(x * 1.5 + 0.25, weight)
        return x

    each = norms
    if by == "shard_map":
        each = jax.shard_map(norms, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    step = jax.jit(each)
    for _ in range(10):
        x = rng.standard_normal((40, 512)).astype(np.float16)
        placed = jax.device_put(x, jax.sharding.NamedSharding(mesh, spec))
        found = step(placed)
        assert [shard.data.shape for shard in found.addressable_shards] == [(20, 512)] * 2
        wanted = x.astype(float)
        for _ in range(8):
            wanted = (wanted * 1.5 + 0.25).astype(np.float16).astype(float)
            wanted /= np.sqrt((wanted**2).mean(-1, keepdims=True) + 1e-6)
            wanted = wanted.astype(np.float16).astype(float)
        error = np.abs(np.asarray(found, float) - wanted).max()
        assert error <= 2e-2 * np.abs(wanted).max()
    text = step.lower(placed).compile().as_text()
    assert "all-gather" not in text and "all-to-all" not in text
    print(f"10 steps of 8 norms on two GPUs called Python {len(counted)} times")


def test_the_current_device_is_what_xla_leaves(jax):
    """A call on another GPU leaves it as XLA's own work there does."""
    import fi_ffi.jax

    needs(OPS["rmsnorm"])
    if len(jax.devices()) < 2:
        pytest.skip("needs two GPUs")
    x = jax.device_put(np.ones((4, 512), np.float16), jax.devices()[1])
    weight = jax.device_put(np.ones(512, np.float16), jax.devices()[1])
    left = []
    for step in (lambda x, weight: x * weight, fi_ffi.jax.rmsnorm):
        compiled = jax.jit(step).lower(x, weight).compile()
        for _ in range(3):
            check(runtime.cudaSetDevice(0))
            jax.block_until_ready(compiled(x, weight))
            left.append(int(check(runtime.cudaGetDevice())))
    assert len({*left}) == 1, left


@pytest.fixture(params=[0, 1])
def place(request, jax, machine):
    """The machine on either GPU, and jax's device."""
    if len(jax.devices()) <= request.param:
        pytest.skip("needs two GPUs")
    if request.param:
        check(runtime.cudaSetDevice(request.param))
        flags = runtime.cudaStreamNonBlocking
        machine.stream = int(check(runtime.cudaStreamCreateWithFlags(flags)))
        machine.device = f"cuda:{request.param}"
    return machine, jax.devices()[request.param]


@pytest.mark.parametrize("name", SERVED)
def test_plans(name, place, jax, rng):
    """Planned again between calls of one program."""
    machine, device = place
    service = Service(SERVED[name], machine, rng)
    batch = service.batch()
    plan = service.case.plan(batch)
    run = in_jit(plan, service.case, batch)
    for _ in range(4):
        check_in_jit(run, service.case, batch, device=device)
        batch = service.batch()
        service.case.replan(plan, batch)


RUNS = 6  # XLA records five and more


@pytest.mark.parametrize("name", GRAPHS)
def test_plans_that_are_recorded(name, place, jax, counted, rng):
    """Six runs a step, each with queries of its own, planned again for other lengths between steps,
    with fresh arrays and with the same: then XLA replays, and Python is not called."""
    import fi_ffi.jax

    machine, device = place
    service = Service(GRAPHS[name], machine, rng)
    case, batch = service.case, service.batch()
    plan = case.plan(batch, **graph_options(service))
    lse, options = case.spec.lse, case.run_options(batch)

    @jax.jit
    def step(queries, *rest):
        return [fi_ffi.jax.run(plan, *each, *rest, lse=lse, **options) for each in queries]

    count = len([name for name in case.tensors if name.startswith("q")])
    calls, kept = [], None
    for number in range(10):
        if number < 5:  # then the arrays repeat, and the results' memory, which nobody has
            arrays = given(case, batch, case.rows)
            parts = [rng.permutation(case.rows) for _ in range(RUNS)]
            queries = [[array[part] for array in arrays[:count]] for part in parts]
            kept = jax.device_put((queries, *arrays[count:]), device)
        before = len(counted)
        found = [[np.array(part) for part in (each if lse else (each,))] for each in step(*kept)]
        calls.append(len(counted) - before)
        whole = {name: case.tensors[name] for name in case.tensors if name.startswith("q")}
        for one, results in zip(queries, found, strict=True):
            case.tensors |= dict(zip(whole, one, strict=True))
            for result in results:
                result[batch.rows :] = np.nan  # rows of no request are as they were
            case.check(batch, Result(*map(Found, results), *[None] * (not lse)))
        case.tensors |= whole
        batch = service.batch()
        case.replan(plan, batch)
    print(f"steps of {RUNS} runs called Python {calls} times")
    assert calls[0] == RUNS and min(calls[5:]) == 0
    assert step._cache_size() == 1
    with pytest.raises(
        fi_ffi.ArgumentError, match="`workspace`: got one whose plan runs in a comp"
    ):
        case.plan(batch, workspace=plan.workspace, **graph_options(service))


def test_lengths_that_are_arrays(place, counted, rng):
    machine, device = place
    check_lengths_as_arrays(Service(GRAPHS["decode"], machine, rng), device, RUNS)
    print(f"5 steps of {RUNS} runs called Python {len(counted)} times")
    assert RUNS <= len(counted) <= 5 * RUNS


def test_the_example(jax):
    """As a reader would run it."""
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    command = [sys.executable, str(EXAMPLE), "--steps", "60"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    kernels.skip_if_missing(done.stderr)
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)
    decided = re.search(r"(\d+) of 180 tokens are decided", done.stdout)
    assert decided is not None and int(decided[1]) > 100, done.stdout
