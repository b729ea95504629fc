"""Attention's outputs that share memory with another tensor, or with a workspace: refused.

A block reads queries that others read too, and may write its output before they do.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest

import fi_ffi
from fi_ffi.ops.attention.rows import SEMAPHORES
from fi_ffi.reference.attention.formula import Options, exact

from tests.helpers.overlapping import Named, interleaved
from tests.helpers.plan_calls import KINDS, Case, aligned
from tests.helpers.pod_calls import Batch as PodBatch
from tests.helpers.pod_calls import Spec as PodSpec
from tests.helpers.xqa_calls import FP8
from tests.helpers.xqa_calls import Batch as XqaBatch
from tests.helpers.xqa_calls import Spec as XqaSpec

BACKENDS = [(kind, backend) for kind in KINDS if kind != "decode" for backend in ("fa2", "fa3")]
PLANNED = [*BACKENDS, ("decode", None)]
RUNS = {"ragged": "ragged_run", "paged": "paged_run"}


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def of_plan(kind: str, backend: str | None) -> tuple[Case, Named]:
    case = Case(kind, **({"backend": backend} if backend else {}))
    plan = case.plan()
    run = getattr(plan, RUNS.get(kind, "run"))
    workspaces = {f"{name}_workspace_buffer": case.memory[name] for name in ("float", "int")}
    return case, Named(
        case.op, {name: case.memory[name] for name in case.run_names}, ("o", "lse"), run,
        workspaces, partial(fi_ffi.prepare, run),
    )  # fmt: skip


@pytest.mark.parametrize(("kind", "backend"), PLANNED)
def test_plans(kind, backend, rng):
    case, call = of_plan(kind, backend)
    assert call.check(rng) > 20
    call.run(**call.arrays)
    case.check()


@pytest.mark.parametrize(("kind", "backend"), PLANNED)
def test_plans_one_after_another(kind, backend, rng):
    case, call = of_plan(kind, backend)
    for _ in range(3):
        case.memory |= call.one_after_another(rng)
        case.check()


@pytest.mark.parametrize("kind", ["ragged", "paged"])
def test_slices_of_one_buffer(kind):
    """Of fa3, which is told the output's strides: heads of q and o beside one another."""
    case, call = of_plan(kind, "fa3")
    for axis in (0, 1):
        for first, then in (("q", "o"), ("o", "q")):
            joined = interleaved(call.arrays, first, then, axis, 16)
            assert joined is not None
            outside = joined.outside()
            call.run(**joined.arrays)
            assert joined.outside() == outside
            case.memory |= joined.arrays
            case.check()


def of_single(op: str, rng: np.random.Generator) -> Named:
    rows = (5,) if op == "single_prefill" else ()
    shapes = {"q": (*rows, 4, 64), "k": (9, 2, 64), "v": (9, 2, 64)}
    arrays: dict[str, Any] = {
        name: rng.standard_normal(shape).astype(np.float16) for name, shape in shapes.items()
    }
    arrays["tmp"] = aligned(4096)
    arrays["o"] = np.full((*rows, 4, 64), np.nan, np.float16)
    arrays["lse"] = np.full((*rows, 4), np.nan, np.float32)
    run = getattr(fi_ffi, op)
    return Named(op, arrays, ("o", "lse", "tmp"), run, prepare=partial(fi_ffi.prepare, run))


@pytest.mark.parametrize("op", ["single_prefill", "single_decode"])
def test_one_request(op, rng):
    call = of_single(op, rng)
    assert call.check(rng) > 20
    for _ in range(3):
        got = call.one_after_another(rng)
        q, k, v = (call.arrays[name] for name in "qkv")
        expected = exact(q.reshape(-1, 4, 64), k, v, Options(64**-0.5)).out
        assert (np.abs(got["o"].reshape(expected.shape) - expected) <= 2.0**-8).all()


def of_pod() -> tuple[PodBatch, Named]:
    batch = PodBatch(PodSpec(qo_len=9, kv_len=20, lengths=(1, 9)), np.random.default_rng())
    scratch = {"float": aligned(1 << 20), "int": aligned(1 << 20)}
    workspaces = {f"{name}_workspace_buffer": room for name, room in scratch.items()}
    plan = batch.plan(device="cpu", workspace=fi_ffi.Workspace(*scratch.values()))
    written = ("o_p", "o_d", "lse_p", "lse_d", "tmp_p")
    workspaces = {f"{name}_d": room for name, room in workspaces.items()}
    return batch, Named("PodPlan", batch.arrays(4096), written, plan.run, workspaces)


def test_pod(rng):
    assert of_pod()[1].check(rng, 2) > 40


def test_pod_one_after_another(rng):
    batch, call = of_pod()
    for _ in range(3):
        got = call.one_after_another(rng)
        for part, (out, size, _, _) in batch.expected().items():
            assert (np.abs(got[f"o_{part}"] - out) <= size * 2.0**-9).all()


def of_xqa(**spec: Any) -> tuple[XqaBatch, Named]:
    batch = XqaBatch(XqaSpec(lengths=(1, 17), **spec), np.random.default_rng())
    scratch = {"workspace_buffer": aligned(1 << 17), "semaphores": np.zeros(SEMAPHORES, np.uint32)}
    written = ("output", *scratch)
    return batch, Named("xqa", batch.arrays | scratch, written, fi_ffi.xqa, step=128)


@pytest.mark.parametrize("spec", [{}, {"kv": FP8, "group": 8}], ids=["bf16", "fp8"])
def test_xqa(spec, rng):
    assert of_xqa(**spec)[1].check(rng, 2) > 30


def test_xqa_one_after_another(rng):
    batch, call = of_xqa()
    value, size = batch.expected()
    for _ in range(3):
        got = call.one_after_another(rng)["output"].astype(float)
        assert (np.abs(got - value) <= np.maximum(size * 2.0**-6, 2.0**-20)).all()
