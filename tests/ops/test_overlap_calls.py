"""Outputs that share memory with another tensor, or with a workspace, of calls that no row is the
whole of: products by other names, attention, experts.  Refused, or else right."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import fi_ffi
from fi_ffi.ops.functions import OPS
from fi_ffi.reference.attention.formula import Options, exact

from tests.helpers import cases, moe_layers, pod_calls, xqa_calls, xqa_mla_calls
from tests.helpers.cases import default_dtypes, make_case
from tests.helpers.overlapping import Joined, Named, interleaved
from tests.helpers.plan_calls import KINDS, Case, aligned

BF16, E4M3 = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn
Arrays = dict[str, np.ndarray]
# A call, and what says that its arrays are right after it; None: they are as in memory apart.
Made = tuple[Named, Callable[[Arrays], object] | None]


# Products.


def blocks(rng: np.random.Generator, input_fp8: bool, weight_fp8: bool) -> Named:
    """A product with as many rows as columns, so that every matrix is as large as the output."""
    of = (E4M3 if fp8 else BF16 for fp8 in (input_fp8, weight_fp8))
    x, w = (rng.standard_normal((128, 128)).astype(dtype) for dtype in of)
    arrays = {"input": x, "weight": w}
    if input_fp8:
        arrays["input_scale"] = np.ones((1, 128), np.float32)
    if weight_fp8:
        arrays["weight_scale"] = np.ones((1, 1), np.float32)
    arrays["out"] = np.full((128, 128), np.nan, BF16)
    name = "fp8_blockscale_gemm_sm90"
    return Named(name, arrays, ("out",), fi_ffi.fp8_blockscale_gemm_sm90)


def groupwise(rng: np.random.Generator) -> Named:
    a, b = (rng.standard_normal((128, 128)).astype(E4M3) for _ in range(2))
    arrays = {
        "a": a, "b": b, "a_scale": np.ones((1, 128), np.float32),
        "b_scale": np.ones((1, 1), np.float32), "out": np.full((128, 128), np.nan, BF16),
        "workspace_buffer": np.zeros(216 << 10, np.uint8),
    }  # fmt: skip
    run = functools.partial(fi_ffi.gemm_fp8_nt_groupwise, scale_major_mode="MN")
    return Named("gemm_fp8_nt_groupwise", arrays, ("out", "workspace_buffer"), run, step=64)


def in_groups(rng: np.random.Generator) -> Named:
    arrays = {
        "a": rng.standard_normal((128, 128)).astype(E4M3),
        "b": rng.standard_normal((2, 128, 128)).astype(E4M3),
        "a_scale": np.ones((1, 128), np.float32), "b_scale": np.ones((2, 1, 1), np.float32),
        "m_indptr": np.array([0, 64, 128], np.int32), "out": np.full((128, 128), np.nan, BF16),
    }  # fmt: skip
    name = "group_gemm_fp8_nt_groupwise"
    return Named(name, arrays, ("out",), fi_ffi.group_gemm_fp8_nt_groupwise)


def segments(rng: np.random.Generator) -> Named:
    arrays = {
        "x": rng.standard_normal((6, 16)).astype(np.float16),
        "weights": rng.standard_normal((3, 16, 16)).astype(np.float16),
        "out": np.full((6, 16), np.nan, np.float16),
    }
    options = {"batch_size": 3, "weight_column_major": True, "seg_lens": [1, 3, 2]}
    return Named(
        "segment_gemm", arrays, ("out",), functools.partial(fi_ffi.segment_gemm, **options)
    )


def tiny(rng: np.random.Generator, bias: bool) -> Named:
    arrays = {name: rng.standard_normal((64, 64)).astype(BF16) for name in ("input", "weight")}
    if bias:
        arrays["bias"] = rng.standard_normal(64).astype(BF16)
    arrays["out"] = np.full((64, 64), np.nan, BF16)
    name = "tinygemm2" if bias else "tinygemm2_nobias"
    return Named(name, arrays, ("out",), fi_ffi.tinygemm_bf16, known_as={"out": "output"})


def algorithms(rng: np.random.Generator, name: str) -> Named:
    row = OPS["bmm_fp8"].row
    sizes = {"b": 2, "m": 16, "n": 16, "k": 32, "workspace_size": 216 << 10}
    arrays = dict(make_case(row, sizes, default_dtypes(row), rng).arrays)
    arrays["algo_buffer"] = np.zeros(256, np.uint8)
    fi_ffi.bmm_fp8_get_algos(**arrays)
    if name == "bmm_fp8_get_algos":
        written = ("algo_buffer", "D", "workspace_buffer")
        return Named(name, arrays, written, fi_ffi.bmm_fp8_get_algos, step=256)
    run = functools.partial(fi_ffi.bmm_fp8_run_with_algo, algo_idx=0)
    return Named(name, arrays, ("D", "workspace_buffer"), run, step=256)


# Attention.  A block reads queries that others read too, and may write its output before they do.


def of_plan(kind: str, backend: str | None) -> tuple[Case, Named]:
    case = Case(kind, **({"backend": backend} if backend else {}))
    plan = case.plan()
    run = getattr(plan, {"ragged": "ragged_run", "paged": "paged_run"}.get(kind, "run"))
    workspaces = {f"{name}_workspace_buffer": case.memory[name] for name in ("float", "int")}
    return case, Named(
        case.op, {name: case.memory[name] for name in case.run_names}, ("o", "lse"), run,
        workspaces, functools.partial(fi_ffi.prepare, run),
    )  # fmt: skip


def planned(rng: np.random.Generator, kind: str, backend: str | None) -> Made:
    case, call = of_plan(kind, backend)

    def judge(arrays: Arrays) -> None:
        case.memory |= arrays
        case.check()

    return call, judge


def single(rng: np.random.Generator, op: str) -> Made:
    rows = (5,) if op == "single_prefill" else ()
    shapes = {"q": (*rows, 4, 64), "k": (9, 2, 64), "v": (9, 2, 64)}
    arrays: Arrays = {
        name: rng.standard_normal(shape).astype(np.float16) for name, shape in shapes.items()
    }
    arrays["tmp"] = aligned(4096)
    arrays["o"] = np.full((*rows, 4, 64), np.nan, np.float16)
    arrays["lse"] = np.full((*rows, 4), np.nan, np.float32)
    expected = exact(arrays["q"].reshape(-1, 4, 64), *(arrays[n] for n in "kv"), Options(1 / 8)).out
    run, prepare = getattr(fi_ffi, op), functools.partial(fi_ffi.prepare, getattr(fi_ffi, op))

    def judge(got: Arrays) -> None:
        assert (np.abs(got["o"].reshape(expected.shape) - expected) <= 2.0**-8).all()

    return Named(op, arrays, ("o", "lse", "tmp"), run, prepare=prepare), judge


def pod(rng: np.random.Generator) -> Made:
    batch = pod_calls.Batch(pod_calls.Spec(qo_len=9, kv_len=20, lengths=(1, 9)), rng)
    scratch = {"float": aligned(1 << 20), "int": aligned(1 << 20)}
    plan = batch.plan(device="cpu", workspace=fi_ffi.Workspace(*scratch.values()))
    workspaces = {f"{name}_workspace_buffer_d": room for name, room in scratch.items()}
    written = ("o_p", "o_d", "lse_p", "lse_d", "tmp_p")

    def judge(got: Arrays) -> None:
        for part, (out, size, _, _) in batch.expected().items():
            assert (np.abs(got[f"o_{part}"] - out) <= size * 2.0**-9).all()

    return Named("PodPlan", batch.arrays(4096), written, plan.run, workspaces), judge


def xqa(rng: np.random.Generator, **spec: Any) -> Made:
    batch = xqa_calls.Batch(xqa_calls.Spec(lengths=(1, 17), **spec), rng)
    scratch = {"workspace_buffer": aligned(1 << 17), "semaphores": np.zeros(4, np.uint32)}
    written = ("output", *scratch)
    return Named("xqa", batch.arrays | scratch, written, fi_ffi.xqa, step=128), None


def xqa_mla(rng: np.random.Generator) -> Made:
    spec = xqa_mla_calls.Spec(lengths=(1, 17), apart=True, options={"q_scale": 0.07})
    batch = xqa_mla_calls.Batch(spec, rng)
    scratch = {
        "workspace_buffer": cases.aligned(1 << 16, 128),
        "semaphores": np.zeros(4, np.uint32),
    }
    run = functools.partial(fi_ffi.xqa_mla, **spec.options)
    return Named("xqa_mla", batch.arrays | scratch, ("output", *scratch), run, step=128), None


# Experts.


def experts(rng: np.random.Generator, mode: str, **more: Any) -> Made:
    made = moe_layers.a(mode, **more)
    arrays = made.tensors | {
        f"quant_scales[{i}]": scale for i, scale in enumerate(made.scales) if scale.size
    }

    def run(**given: Any) -> None:
        scales = [given.pop(f"quant_scales[{i}]", scale) for i, scale in enumerate(made.scales)]
        fi_ffi.cutlass_fused_moe(**given, quant_scales=scales, **made.more)

    def judge(got: Arrays) -> None:
        assert made.worst(got["output"]) <= 1

    return Named("cutlass_fused_moe", arrays, ("output",), run, step=128), judge


WITH_ALL = {"biases": True, "limits": ("alpha", "beta", "limit")}
# How each is made, and how many overlaps are tried at least.
CALLS: dict[str, tuple[Callable[[np.random.Generator], Any], int]] = {
    "blocks bf16": (lambda rng: blocks(rng, False, False), 4),
    "blocks fp8 weight": (lambda rng: blocks(rng, False, True), 4),
    "blocks fp8": (lambda rng: blocks(rng, True, True), 4),
    "groupwise": (groupwise, 4),
    "in groups": (in_groups, 4),
    "segments": (segments, 4),
    "tiny": (lambda rng: tiny(rng, False), 4),
    "tiny with a bias": (lambda rng: tiny(rng, True), 4),
    "an algorithm": (lambda rng: algorithms(rng, "bmm_fp8_run_with_algo"), 4),
    "algorithms": (lambda rng: algorithms(rng, "bmm_fp8_get_algos"), 4),
    **{f"{kind} {backend}": (functools.partial(planned, kind=kind, backend=backend), 20)
       for kind in KINDS for backend in (("fa2", "fa3") if kind != "decode" else (None,))},
    **{op: (functools.partial(single, op=op), 20) for op in ("single_prefill", "single_decode")},
    "pod": (pod, 40),
    "xqa": (xqa, 30),
    "xqa fp8": (functools.partial(xqa, kv=xqa_calls.FP8, group=8), 30),
    "xqa_mla": (xqa_mla, 20),
    "experts": (functools.partial(experts, mode="half", **WITH_ALL), 10),
    **{f"experts {mode}": (functools.partial(experts, mode=mode), 5)
       for mode in ("fp8", "fp8_block_scale", "mxfp4", "int4")},
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_memory_is_apart(name):
    """Overlaps are refused; tensors that lie one right after another are fine."""
    rng = np.random.default_rng(0)
    make, least = CALLS[name]
    made = make(rng)
    call, judge = made if isinstance(made, tuple) else (made, None)
    assert call.check(rng, 2) >= least
    apart = Joined(call.arrays)
    call.run(**apart.arrays)
    for got in (apart.arrays, *(call.one_after_another(rng) for _ in range(3))):
        if judge is not None:
            judge(got)
            continue
        for one, array in got.items():
            assert array.tobytes() == apart.arrays[one].tobytes(), one


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
