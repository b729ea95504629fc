"""Every public call that launches kernels is prepared and asked about: on the CPU, and on a GPU."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import fi_ffi
from fi_ffi.loader.fetch.wheels_lock import the_lock
from fi_ffi.ops.attention.plan import Plan
from fi_ffi.ops.functions import OPS

from tests.helpers.cases import make_case
from tests.helpers.moe_layers import BF16, F16, MODES, desc_of, make
from tests.ops.test_block_scale_gemm import COMBINATIONS, RIGHT, Blocks
from tests.ops.test_segment_gemm import Segments, need

RELEASE = the_lock().default_release
# Public names that launch no kernels: types, scopes, sizes and tables.  Every other one does.
LAUNCH_NOTHING = {
    "DTYPES", "DType", "Device", "Graph", "Philox", "Signature", "TensorDesc", "Workspace",
    "WorkspaceSize", "alibi_slopes", "as_desc", "batch_indices_positions", "call_log",
    "capture", "checkpoint_cu_starts", "cu_seqlens", "file_signatures",
    "fp8_blockscale_gemm_workspace_size", "function", "functions",
    "fused_topk_topp_workspace_size", "gdn_prefill_workspace_size",
    "interleave_moe_scales_for_sm90_mixed_gemm", "module", "object_type", "object_types",
    "pack_block_mask", "pack_custom_mask", "packed_indptr", "parse_device", "parse_signature",
    "prepare", "seq_lens", "set_deepgemm_jit_include_dirs", "single_decode_workspace_size",
    "single_prefill_workspace_size", "split_paged_kv_cache", "stream",
    "top_p_renorm_workspace_size", "use_kernels", "watchdog",
}  # fmt: skip
SEVERAL_CALLS = {"MultiLevelCascadePlan", "SharedPrefixPlan"}  # a run is, so it is not prepared


def test_every_call_tells_where_it_works_and_is_prepared():
    """One that has neither gets them from `ops.steps.keyword_call`, and a line in the matrix."""
    assert {*fi_ffi.__all__} >= LAUNCH_NOTHING
    assert not [name for name in LAUNCH_NOTHING if hasattr(getattr(fi_ffi, name), "supports")]
    errors = {name for name in fi_ffi.__all__ if name.endswith("Error")}
    for name in {*fi_ffi.__all__}.difference(LAUNCH_NOTHING, errors):
        value = getattr(fi_ffi, name)
        assert hasattr(value, "supports"), f"fi_ffi.{name} has no supports()"
        answer = value.supports(sm=90, release=RELEASE)
        assert answer.op == name and answer.reason
        if name in SEVERAL_CALLS:
            continue
        if isinstance(value, type) and issubclass(value, Plan):  # `fi_ffi.prepare(plan.run, ...)`
            assert value._run_methods and all(hasattr(value, run) for run in value._run_methods), (
                name
            )
        else:
            assert callable(getattr(value, "prepare", None)), f"fi_ffi.{name} has no prepare()"


class Pair:
    """Two calls alike on memory of their own, and what each gives when it is simply called."""

    def __init__(self, machine: Any, function: Any, calls: list[dict[str, Any]], out: str) -> None:
        self.machine, self.function, self.out = machine, function, out
        self.placed = [
            {k: machine.place(v) if isinstance(v, np.ndarray) else v for k, v in call.items()}
            for call in calls
        ]
        self.given = [{k: desc_of(v) for k, v in placed.items()} for placed in self.placed]
        self.expected = []
        for i, given in enumerate(self.given):
            function(**given, stream=machine.stream)
            machine.synchronize()
            self.expected.append(self.got(i))
            self.poison(i)

    def got(self, i: int) -> bytes:
        return bytes(self.placed[i][self.out].get().tobytes())

    def poison(self, i: int) -> None:
        self.machine.poison(self.placed[i][self.out], self.machine.stream)
        self.machine.synchronize()

    def check(self, *update: str, prepare: Any = None) -> Any:
        """Prepare the first, launch it twice, update it to the second's tensors, and launch."""
        machine, first, other = self.machine, *self.given
        function = self.function if prepare is None else prepare
        call = fi_ffi.prepare(function, **first, stream=machine.stream)
        machine.synchronize()
        assert self.got(0) != self.expected[0], "preparing launched it"
        for _ in range(2):
            call()
            machine.synchronize()
            assert self.got(0) == self.expected[0]
            self.poison(0)
        call.update(**{name: other[name] for name in update})
        call()
        machine.synchronize()
        assert self.got(1) == self.expected[1] and self.got(0) != self.expected[0]
        # By addresses; and what is wrong changes nothing.
        call.update(**{name: first[name].ptr for name in update})
        with pytest.raises((fi_ffi.ArgumentError, TypeError), match="no_such_argument"):
            call.update(no_such_argument=1)
        inputs = {name: other[name] for name in update if name != self.out}
        # Of another layout; and where an input is, which the call's own checks see, not the update.
        for wrong in (np.zeros((1, 1, 1, 1), np.float32), other[next(iter(inputs))].ptr):
            text = repr(call)
            with pytest.raises(fi_ffi.ArgumentError):
                call.update(**inputs | {self.out: wrong})
            assert repr(call) == text, "an update that is refused changed the call"
            call.update(**{self.out: first[self.out].ptr})
        call()
        machine.synchronize()
        assert self.got(0) == self.expected[0]
        for copied in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(TypeError):
                copied(call)
        assert self.function.__name__ in repr(call) or "tinygemm" in repr(call)
        return call


@pytest.mark.parametrize("with_bias", [False, True])
def test_few_rows_prepared(with_bias, machine, rng):
    machine.need("tinygemm2")

    def one() -> dict[str, Any]:
        made: dict[str, Any] = {
            "input": rng.standard_normal((5, 128)).astype(BF16),
            "weight": rng.standard_normal((32, 128)).astype(BF16),
            "out": np.full((5, 32), np.nan, BF16),
        }
        return made | ({"bias": rng.standard_normal(32).astype(BF16)} if with_bias else {})

    calls = [one(), one()]
    Pair(machine, fi_ffi.tinygemm_bf16, calls, "out").check(*calls[0])


def test_algorithms_prepared(machine, rng):
    machine.need("gemm")
    dtypes = {"TA": "float8_e4m3fn", "TB": "float8_e5m2", "T": "float16"}
    sizes = {"b": 2, "m": 20, "n": 64, "k": 128}
    cases = [make_case(OPS["bmm_fp8"].row, sizes, dtypes, rng) for _ in range(2)]
    algos = np.full(64 * 3, 0xFF, np.uint8)
    given = {name: machine.place(array).desc() for name, array in cases[0].arrays.items()}
    ask = fi_ffi.prepare(
        fi_ffi.bmm_fp8_get_algos, **given, algo_buffer=algos, stream=machine.stream
    )
    count = fi_ffi.bmm_fp8_get_algos(**given, algo_buffer=algos.copy(), stream=machine.stream)
    assert ask() == count >= 1 and (algos != 0xFF).any()

    def with_the_first(**given: Any) -> None:
        fi_ffi.bmm_fp8_run_with_algo(**given, algo_buffer=algos, algo_idx=0)

    with_the_first.__name__ = "bmm_fp8_run_with_algo"
    pair = Pair(machine, with_the_first, [case.arrays for case in cases], "D")
    pair.given = [given | {"algo_buffer": algos, "algo_idx": 0} for given in pair.given]
    pair.check("A", "B", "D", "A_scale", "B_scale", prepare=fi_ffi.bmm_fp8_run_with_algo)


@pytest.mark.parametrize("backend", ["sm80", "sm90"])
def test_segments_prepared(backend, machine, rng):
    need(machine, backend)
    lengths = [4, 0, 9, 2]
    made = [Segments(machine, rng, lengths, F16, F16, True, weights=3) for _ in range(2)]
    indices = made[0].indices
    calls = [
        {"x": m.x, "weights": m.weights, "out": m.placed[2].get().copy(), "seg_lens": [*lengths],
         "batch_size": 4, "weight_column_major": True, "weight_indices": [*indices],
         "backend": backend}
        for m in made
    ]  # fmt: skip
    call = Pair(machine, fi_ffi.segment_gemm, calls, "out").check("x", "weights", "out")
    with pytest.raises(fi_ffi.ArgumentError, match="seg_lens"):
        call.update(seg_lens=[1])


@pytest.mark.parametrize(("input_fp8", "weight_fp8"), COMBINATIONS)
def test_block_scales_prepared(input_fp8, weight_fp8, machine, rng):
    machine.need("fp8_blockscale_gemm_90")
    calls = [Blocks(machine, rng, 6, 128, 256, input_fp8, weight_fp8).arrays for _ in range(2)]
    for call in calls:
        call["out"] = np.full((6, 128), np.nan, BF16)
    pair = Pair(machine, fi_ffi.fp8_blockscale_gemm_sm90, calls, "out")
    pair.check(*calls[0])
    # More rows than before: the kernels lay their memory out anew.
    launch = fi_ffi.prepare(pair.function, **pair.given[0], stream=machine.stream)
    Blocks(machine, rng, 700, 128, 256, input_fp8, weight_fp8).call()
    pair.poison(0)
    launch()
    machine.synchronize()
    assert pair.got(0) == pair.expected[0]


@pytest.mark.parametrize("mode", ["MN", "K"])
def test_groupwise_prepared(mode, machine, rng):
    if machine.is_gpu:
        pytest.skip("its kernels are for Blackwell GPUs")
    e4m3 = ml_dtypes.float8_e4m3fn

    def one(groups: int) -> dict[str, Any]:
        of_b, shape = ((groups,), (groups, 128, 256)) if groups else ((), (128, 256))
        sizes = ((8, 2), (*of_b, 1, 2)) if mode == "K" else ((2, 8), (*of_b, 2, 1))
        scales = [np.exp(rng.uniform(-3, 1, size)).astype(np.float32) for size in sizes]
        made = {
            "a": rng.standard_normal((8, 256)).astype(e4m3), "b": rng.standard_normal(shape)
            .astype(e4m3), "a_scale": scales[0], "b_scale": scales[1], "scale_major_mode": mode,
            "out": np.full((8, 128), np.nan, F16),
        }  # fmt: skip
        starts = {"m_indptr": np.array([0, 4, 8], np.int32)}
        return made | (starts if groups else {})

    tensors = ("a", "b", "a_scale", "b_scale", "out")
    Pair(machine, fi_ffi.gemm_fp8_nt_groupwise, [one(0), one(0)], "out").check(*tensors)
    grouped = fi_ffi.group_gemm_fp8_nt_groupwise
    Pair(machine, grouped, [one(2), one(2)], "out").check(*tensors, "m_indptr")


@pytest.mark.parametrize("quant_type", ["fp4", "int4"])
def test_interleaving_prepared(quant_type, machine, rng):
    machine.need("fused_moe_90")
    calls = [
        {"weight": rng.integers(0, 256, (2, 32, 64), np.uint8), "quant_type": quant_type,
         "weight_interleaved": np.zeros((2, 32, 64), np.uint8)}
        for _ in range(2)
    ]  # fmt: skip
    function = fi_ffi.interleave_moe_weights_for_sm90_mixed_gemm
    pair = Pair(machine, function, calls, "weight_interleaved")
    pair.check("weight", "weight_interleaved")
    with pytest.raises(fi_ffi.ArgumentError, match="quant_type"):
        function.prepare(**pair.given[0] | {"quant_type": "int5"})


@pytest.mark.parametrize(
    ("mode", "act", "out"), MODES, ids=lambda value: getattr(value, "name", value)
)
def test_experts_prepared(mode, act, out, machine, rng):
    """The function, and a `FusedMoe` of its own."""
    machine.need("fused_moe_90")
    made = [make(rng, mode, act, out, hidden=256, inter=128, tokens=5) for _ in range(2)]
    chosen = {**made[0].more}
    activation = {"activation_type": chosen.pop("activation_type")}
    scales = [machine.place(scale) for scale in made[0].scales]
    given = [desc_of(scale) for scale in scales] or None

    def experts(**tensors: Any) -> None:
        fi_ffi.cutlass_fused_moe(**tensors, quant_scales=given, **made[0].more)

    experts.__name__ = "moe"
    pair = Pair(machine, experts, [one.tensors for one in made], "output")
    tensors = pair.given
    pair.given = [one | {"quant_scales": given, **made[0].more} for one in tensors]
    names = ("input", "output", "token_selected_experts", "fc1_expert_weights")
    # What the second call gives with the first one's other tensors.
    experts(**tensors[0] | {name: tensors[1][name] for name in names}, stream=machine.stream)
    machine.synchronize()
    pair.expected[1] = pair.got(1)
    dtypes = (tensors[0][name].dtype.name if hasattr(tensors[0][name], "dtype") else ""
              for name in ("input", "fc1_expert_weights", "output"))  # fmt: skip
    moe = fi_ffi.FusedMoe(*dtypes, device=machine.device, **chosen)
    for function in (fi_ffi.cutlass_fused_moe, moe):
        pair.poison(0)
        pair.poison(1)
        more = made[0].more if function is fi_ffi.cutlass_fused_moe else activation
        pair.given = [one | {"quant_scales": given, **more} for one in tensors]
        pair.check(*names, prepare=function)


def test_what_is_wrong_is_refused_when_it_is_prepared(rng):
    for name, (right, _) in RIGHT.items():
        function = getattr(fi_ffi, name)
        with pytest.raises(fi_ffi.ArgumentError, match="out"):
            function.prepare(**right | {"out": None})
        with pytest.raises(TypeError, match=rf"{name}\.prepare\(\)"):
            function.prepare(**right, no_such_argument=1)
    made = make(rng, "half", F16, F16)
    with pytest.raises(fi_ffi.ArgumentError, match="output_dtype"):
        fi_ffi.cutlass_fused_moe.prepare(
            **made.tensors, **made.more, output_dtype="bfloat16", quant_scales=None
        )


def test_which_backend_of_segments_is_asked_about():
    ask = fi_ffi.segment_gemm.supports
    assert ask(sm=90, release=RELEASE).module == "gemm_sm90"
    assert ask(sm=80, release=RELEASE).module == "gemm"
    assert ask(sm=90, release=RELEASE, backend="sm80").module == "gemm"
    refused = ask(sm=80, release=RELEASE, dtypes="float8_e4m3fn")
    assert refused.module == "gemm_sm90" and refused.status == "refused"
    with pytest.raises(fi_ffi.ArgumentError, match="backend"):
        ask(sm=90, backend="sm100")
    assert not fi_ffi.FusedMoe.supports(sm=80, release=RELEASE)
