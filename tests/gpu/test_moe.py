"""`cutlass_fused_moe` on a GPU against float64: every mode that it has kernels for, every tactic
and kind of routing.
"""

from __future__ import annotations

import importlib.util
from collections import deque
from pathlib import Path

import numpy as np
import pytest
from cuda.bindings import runtime

import fi_ffi
from fi_ffi.cli.cuda import check as checked
from fi_ffi.loader import machine
from fi_ffi.ops.call import cuda
from fi_ffi.ops.moe import deepgemm, rows
from fi_ffi.ops.moe.interface import MODULE, MODULES
from fi_ffi.ops.moe.modes import MODES
from fi_ffi.reference import moe_weights
from fi_ffi.watch import watching
from fi_ffi.watch.call_record import CallRecord

from tests.helpers import kernels, moe_layers
from tests.helpers.moe_bounds import ON_HOPPER, moe
from tests.helpers.moe_layers import (
    BF16,
    EVERY,
    F8,
    F16,
    GATED,
    PLAIN,
    Made,
    is_folded,
    make,
    of_ranks,
    of_tensor_ranks,
    part,
)
from tests.helpers.prepared_calls import poison


def _capability() -> tuple[int, int]:
    """The GPU's; Hopper's, where there is none."""
    try:
        return machine.capability(0) if machine.device_count() else (9, 0)
    except fi_ffi.FiFfiError:
        return 9, 0


_ABLE = {mode.name for mode in MODES if _capability()[0] in mode.capabilities}
HERE = [one for one in EVERY if one[0] in _ABLE] or EVERY[:1]
IDS = [f"{mode}-{act.name}-{out.name}" for mode, act, out in HERE]
each_mode = pytest.mark.parametrize(("mode", "act", "out"), HERE, ids=IDS)
# One of each: what does not depend on the dtypes.
each_kind = pytest.mark.parametrize(("mode", "act", "out"), HERE[1::2], ids=IDS[1::2])
on_hopper = pytest.mark.skipif(_capability()[0] != 9, reason="these kernels are Hopper's")
SMALL = {"hidden": 256, "inter": 128}


@pytest.fixture(scope="module", autouse=True)
def _module() -> None:
    kernels.need(MODULES.get(_capability(), MODULE))


class Judge:
    """A layer's results and bounds, worked out once."""

    def __init__(self, made: Made) -> None:
        self.expected, self.allowed = moe(made.layer, ON_HOPPER.get(made.layer.mode, 0.0))

    def __call__(self, got: np.ndarray) -> float:
        error = np.abs(got.astype(np.float64) - self.expected) / np.maximum(self.allowed, 1e-300)
        return float(np.where(np.isnan(error), np.inf, error).max(initial=0.0))


class OnGpu:
    """A call's memory on the GPU, poison around all of it."""

    def __init__(self, made: Made, to_gpu) -> None:
        self.made, self.placed, self.outputs = made, [], set()
        self.to_gpu = to_gpu

    def __call__(self, array: np.ndarray):
        if not array.size:
            return fi_ffi.TensorDesc(0, array.shape, array.dtype)
        placed = self.to_gpu(array)
        self.placed.append((array, placed))
        if array is self.made.tensors["output"]:
            self.outputs.add(placed.ptr)
        return placed

    def check(self, output) -> np.ndarray:
        """The output, after a look at everything else."""
        got = output.get()
        for host, array in self.placed:
            assert array.intact(), "bytes outside a tensor were written"
            if array.ptr not in self.outputs:
                assert array.get().tobytes() == host.tobytes(), "an input was changed"
        return got


def run(made: Made, to_gpu, stream, function=fi_ffi.cutlass_fused_moe, **more) -> np.ndarray:
    place = OnGpu(made, to_gpu)
    return place.check(made.call_of(function, place, stream=stream, **more))


def check(made: Made, to_gpu, stream, record_property, **more) -> None:
    fraction = Judge(made)(run(made, to_gpu, stream, **more))
    record_property("error_of_bound", fraction)
    assert fraction <= 1


OF_EACH_MODE = {
    # Up to 256 tokens are sorted in one block, more in several.
    **{f"{n} tokens": {**SMALL, "tokens": n} for n in (1, 2, 17, 64, 256, 257, 1000)},
    **{name: {**SMALL, "activation": name, "biases": True, "tokens": 40}
       for name in (*GATED, *PLAIN)},
    **{f"{n} experts of a token": {**SMALL, "top_k": n, "experts": 11, "tokens": 33}
       for n in range(1, 9)},
    **{f"{h} by {i}": {"hidden": h, "inter": i, "tokens": 70}
       for h, i in ((128, 128), (384, 256), (256, 640), (512, 1024), (1024, 512))},
    "no final scales": {**SMALL, "tokens": 20, "final": False},
    "alpha, beta and limit": {**SMALL, "tokens": 20, "limits": ("alpha", "beta", "limit")},
    "a limit": {**SMALL, "tokens": 20, "limits": ("limit",)},
    "a single expert": {**SMALL, "tokens": 20, "experts": 1, "top_k": 1},
}  # fmt: skip
OF_EACH_KIND = {
    "a large layer": {"hidden": 2048, "inter": 1024, "experts": 16, "top_k": 4, "tokens": 300},
    "many experts": {"experts": 256, "top_k": 8, "tokens": 9, "hidden": 128, "inter": 128},
}
OF_ONE = [
    *(("half", F16, F16, {"hidden": h, "inter": i, "tokens": 50})
      for h, i in ((8, 8), (24, 40), (1032, 8), (72, 136))),
    *(("fp8", F8, BF16, {"hidden": h, "inter": i, "tokens": 50})
      for h, i in ((16, 16), (48, 80), (1040, 16))),
    ("half", F16, F16, {"activation": "SwigluStep", "limits": ("limit",)}),
    ("fp8", F8, BF16, {"per_expert_quant": False}),
]  # fmt: skip


@each_mode
@pytest.mark.parametrize("call", OF_EACH_MODE)
def test_of_each_mode(mode, act, out, call, rng, to_gpu, stream, record_property):
    check(make(rng, mode, act, out, **OF_EACH_MODE[call]), to_gpu, stream, record_property)


@each_kind
@pytest.mark.parametrize("call", OF_EACH_KIND)
def test_of_each_kind(mode, act, out, call, rng, to_gpu, stream, record_property):
    check(make(rng, mode, act, out, **OF_EACH_KIND[call]), to_gpu, stream, record_property)


@pytest.mark.parametrize(("mode", "act", "out", "given"), OF_ONE, ids=lambda value: str(value))
def test_of_one(mode, act, out, given, rng, to_gpu, stream, record_property):
    check(make(rng, mode, act, out, **given), to_gpu, stream, record_property)


@pytest.fixture
def one_step(monkeypatch):
    """Calls of few tokens may have 4-bit rows of one step."""
    monkeypatch.setattr(moe_layers, "TOO_SMALL", {})
    monkeypatch.setattr(rows, "ONE_STEP_OF_FEW_TOKENS", True)
    rows.row_of.cache_clear()
    yield
    rows.row_of.cache_clear()


# Sizes of which one is of one step, or both; and tokens, experts of each and of all. The rows are
# at most 4 tiles of 64, so 132 multiprocessors have room for 16 tiles of tokens and experts.
FEW = [(hidden, inter, tokens, top_k, experts)
       for hidden, inter in ((128, 128), (128, 256), (256, 128))
       for tokens, top_k, experts in ((1, 1, 1), (1, 2, 2), (4, 2, 8), (8, 2, 4), (64, 1, 1))
       if 2 * rows._most_tiles(experts, tokens, top_k, inter, hidden) <= 132]  # fmt: skip


@on_hopper
@pytest.mark.parametrize(("hidden", "inter", "tokens", "top_k", "experts"), FEW)
@pytest.mark.parametrize("biases", [False, True])
def test_one_step_of_few_tokens(hidden, inter, tokens, top_k, experts, biases, one_step, rng,
                                to_gpu, stream, record_property):  # fmt: skip
    """Of MXFP4, by every tactic, several times: results that vary are wrong."""
    made = make(rng, "mxfp4", BF16, BF16, hidden=hidden, inter=inter, tokens=tokens, top_k=top_k,
                experts=experts, biases=biases)  # fmt: skip
    layer = moe_of("mxfp4", BF16, BF16, made)
    counts, judge, worst, ran = layer.tactics, Judge(made), 0.0, 0
    place = OnGpu(made, to_gpu)
    placed = {name: place(array) for name, array in made.tensors.items()}
    scales = [place(scale) for scale in made.scales]
    given = [scale if isinstance(scale, fi_ffi.TensorDesc) else scale.desc() for scale in scales]
    descs = {name: array.desc() for name, array in placed.items()}
    pairs = [(i, -1) for i in range(counts.gemm1)] + [(-1, i) for i in range(counts.gemm2)]
    for ids in [(-1, -1), *pairs]:
        for _ in range(3):
            poison(placed["output"])
            try:
                layer(**descs, quant_scales=given, **made.more, profile_ids=ids, stream=stream)
            except (fi_ffi.KernelError, fi_ffi.ArgumentError) as error:
                assert getattr(error, "argument", "profile_ids") == "profile_ids"
                break
            worst, ran = max(worst, judge(placed["output"].get())), ran + 1
            assert worst <= 1, f"tactic {ids}"
    place.check(placed["output"])
    record_property("error_of_bound", worst)
    assert ran


@each_mode
def test_launched_before_the_one_before_has_ended(mode, act, out, rng, to_gpu, stream,
                                                  record_property):  # fmt: skip
    made = make(rng, mode, act, out, **SMALL)
    check(made, to_gpu, stream, record_property, enable_pdl=True)


@each_kind
@pytest.mark.parametrize("tokens", [40, 400])
def test_routings(mode, act, out, tokens, rng, to_gpu, stream, record_property):
    """All tokens to one expert; and some to experts that nobody has, or of other ranks."""
    one = np.full((tokens, 1), 3, np.int32)
    made = make(rng, mode, act, out, tokens=tokens, top_k=1, chosen=one, **SMALL)
    check(made, to_gpu, stream, record_property)
    away = rng.choice(np.array([-1, 5, 1000, 2**31 - 1], np.int32), (tokens, 2))
    away[::3, 0], away[1::3, 1] = 2, 4
    made = make(rng, mode, act, out, tokens=tokens, chosen=away, **SMALL)
    got = run(made, to_gpu, stream)
    assert Judge(made)(got) <= 1
    assert not got[2::3].any()


@each_kind
@pytest.mark.parametrize("tokens", [33, 300])
def test_ranks_of_experts(mode, act, out, tokens, rng, to_gpu, stream):
    made = make(rng, mode, act, out, experts=8, top_k=3, tokens=tokens, **SMALL)
    total = 0
    for rank in of_ranks(made, 4):
        got = run(rank, to_gpu, stream)
        assert Judge(rank)(got) <= 1
        assert not got[~(made.layer.experts // 2 == rank.more["ep_rank"]).any(axis=1)].any()
        total = total + got.astype(np.float64)
    assert Judge(made)(total) <= 1.5  # each rank rounds once more


def test_all_to_all_leaves_other_tokens_alone(rng, to_gpu, stream):
    """Those that have no expert of this rank: written as zeros, or not written."""
    made = make(rng, "half", F16, F16, experts=8, top_k=2, tokens=50, **SMALL)
    for rank in of_ranks(made, 4):
        own = (made.layer.experts // 2 == rank.more["ep_rank"]).any(axis=1)
        got = run(rank, to_gpu, stream, enable_alltoall=True)
        judge = Judge(rank)
        judge.expected, judge.allowed = judge.expected[own], judge.allowed[own]
        assert judge(got[own]) <= 1
        bits = got[~own].view(np.uint16)
        assert np.isin(bits, (0, 0xFFFF)).all()


def test_ranks_of_tensors(rng, to_gpu, stream):
    made = make(rng, "half", BF16, BF16, hidden=256, inter=256, biases=True, tokens=30)
    total = 0
    for one in of_tensor_ranks(made, 2):
        got = run(one, to_gpu, stream)
        assert Judge(one)(got) <= 1
        total = total + got.astype(np.float64)
    assert Judge(made)(total) <= 1.5


def moe_of(mode, act, out, made: Made) -> fi_ffi.FusedMoe:
    flags = {name: made.more.pop(name) for name in [*made.more] if name.startswith("use_")}
    weight = made.tensors["fc1_expert_weights"].dtype
    return fi_ffi.FusedMoe(act, weight, out, device="cuda:0", **flags)


@each_mode
def test_every_tactic(mode, act, out, rng, to_gpu, stream, record_property):
    """Each gives the same within the bounds, or says that it is not for these sizes."""
    # Tiles are up to 512 columns deep where scales are folded.
    is_deep = is_folded() and mode in ("mxfp4", "int4")
    sizes = {"hidden": 1024, "inter": 1024} if is_deep else SMALL
    made = make(rng, mode, act, out, tokens=45, biases=True, **sizes)
    layer = moe_of(mode, act, out, made)
    counts = layer.tactics
    assert min(counts) > 0
    judge, worst, refused = Judge(made), 0.0, []
    pairs = [(i, -1) for i in range(counts.gemm1)] + [(-1, i) for i in range(counts.gemm2)]
    place = OnGpu(made, to_gpu)
    placed = {name: place(array) for name, array in made.tensors.items()}
    scales = [place(scale) for scale in made.scales]
    descs = {name: array.desc() for name, array in placed.items()}
    given = [scale if isinstance(scale, fi_ffi.TensorDesc) else scale.desc() for scale in scales]
    for ids in pairs if layer.mode.has_tactics else pairs[:3]:
        poison(placed["output"])
        try:
            layer(**descs, quant_scales=given or None, **made.more, profile_ids=ids, stream=stream)
        except (fi_ffi.KernelError, fi_ffi.ArgumentError) as error:
            assert getattr(error, "argument", "profile_ids") == "profile_ids"
            refused.append((ids, str(error).partition("\n")[0]))
            continue
        worst = max(worst, judge(placed["output"].get()))
        assert worst <= 1, f"tactic {ids}"
    place.check(placed["output"])
    record_property("error_of_bound", worst)
    record_property("tactics", f"{counts}, {len(refused)} refused: {refused[:3]}")
    assert len(refused) * 2 < len(pairs), refused


@pytest.mark.parametrize("ids", [(10**6, 0), (0, 10**6)])
def test_tactics_that_there_are_not(ids, rng, to_gpu, stream):
    made = make(rng, "half", F16, F16, **SMALL)
    with pytest.raises(fi_ffi.ArgumentError, match="profile_ids"):
        made.call(OnGpu(made, to_gpu), stream=stream, profile_ids=ids)


@each_kind
def test_profiles(mode, act, out, rng, to_gpu, stream, record_property):
    made = make(rng, mode, act, out, tokens=64, experts=8, **SMALL)
    layer = moe_of(mode, act, out, made)
    weights = {
        name: to_gpu(made.tensors[name]).desc()
        for name in ("input", "fc1_expert_weights", "fc2_expert_weights")
    }  # fmt: skip
    before = cuda.kernel_memory().count
    found = layer.profile(**weights, top_k=2, stream=stream)
    assert cuda.kernel_memory().count == before, "the profiler's memory was not given back"
    assert layer.profile(**weights, top_k=2, stream=stream) is found or not layer.mode.has_tactics
    record_property("profile", str(found.profile_ids))
    if layer.mode.has_tactics:
        for times, count, best in zip(found[1:], layer.tactics, found.profile_ids, strict=True):
            assert len(times) == count and times[best] == min(times) > 0
    else:
        assert found.profile_ids == (-1, -1)
    got = run(made, to_gpu, stream, layer, profile_ids=found.profile_ids)
    assert Judge(made)(got) <= 1


def test_profiles_refuse_while_a_graph_is_recorded(rng, to_gpu, stream):
    made = make(rng, "half", F16, F16, **SMALL)
    layer = fi_ffi.FusedMoe(F16)
    names = ("input", "fc1_expert_weights", "fc2_expert_weights")
    weights = {name: to_gpu(made.tensors[name]).desc() for name in names}
    with fi_ffi.capture(stream), pytest.raises(fi_ffi.ArgumentError, match="stream"):
        layer.profile(**weights, top_k=2, stream=stream)


@each_kind
def test_calls_one_after_another_share_the_pool(mode, act, out, rng, to_gpu, stream):
    """Of different sizes on one stream: each gives its workspace to the next."""
    before = cuda.kernel_memory().count
    mades = [make(rng, mode, act, out, tokens=tokens, **SMALL) for tokens in (200, 3, 60)]
    places = [OnGpu(made, to_gpu) for made in mades]
    outputs = [m.call(p, stream=stream) for m, p in zip(mades, places, strict=True)]
    for made, place, output in zip(mades, places, outputs, strict=True):
        assert Judge(made)(place.check(output)) <= 1
    assert cuda.kernel_memory().count == before


@each_kind
def test_two_streams(mode, act, out, rng, to_gpu, streams):
    mades = [make(rng, mode, act, out, tokens=tokens, **SMALL) for tokens in (90, 70)]
    places = [OnGpu(made, to_gpu) for made in mades]
    for _ in range(5):
        outputs = [
            made.call(place, stream=on)
            for made, place, on in zip(mades, places, streams, strict=True)
        ]
    for made, place, output in zip(mades, places, outputs, strict=True):
        assert Judge(made)(place.check(output)) <= 1


@each_kind
def test_in_a_graph(mode, act, out, rng, to_gpu, stream):
    """Recorded once, launched on other tokens and another routing in the same memory."""
    made = make(rng, mode, act, out, tokens=50, **SMALL)
    place = OnGpu(made, to_gpu)
    made.call(place, stream=stream)  # kernels are loaded before they are recorded
    memory = [array for _, array in place.placed]
    placed = iter(memory)
    with fi_ffi.capture(stream) as graph:
        output = made.call(lambda array: next(placed) if array.size else place(array))
    by_name = dict(zip(made.tensors, memory, strict=False))
    kind = runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
    for _ in range(3):
        again = make(rng, mode, act, out, tokens=50, **SMALL)
        names = ("input", "token_selected_experts", "token_final_scales")
        for name in names:
            host = again.tensors[name]
            checked(runtime.cudaMemcpy(by_name[name].ptr, host.ctypes.data, host.nbytes, kind))
        poison(output)
        graph.launch(stream)
        checked(runtime.cudaStreamSynchronize(stream))
        layer = {"x": again.layer.x, "experts": again.layer.experts, "final": again.layer.final}
        assert Judge(part(made, layer=layer))(output.get()) <= 1


def test_the_stream_of_a_scope(rng, to_gpu, stream):
    made = make(rng, "half", BF16, BF16, **SMALL)
    place = OnGpu(made, to_gpu)
    with fi_ffi.stream(stream):
        output = made.call(place)
    assert Judge(made)(place.check(output)) <= 1


def test_a_call_that_is_logged_and_watched(rng, to_gpu, stream, tmp_path):
    made = make(rng, "fp8", F8, F16, **SMALL)
    inbox = deque[CallRecord]()
    with fi_ffi.call_log(3, str(tmp_path / "log")), fi_ffi.watchdog(60) as dog:
        watching.add(inbox)
        try:
            got = run(made, to_gpu, stream)
        finally:
            watching.remove(inbox)
    assert dog.reports == []
    watched = next(call for call in inbox if call.entry.endswith("run_moe"))
    assert watched.mark is not None and watched.is_over, "it was marked on its stream"
    assert Judge(made)(got) <= 1
    assert "run_moe" in (tmp_path / "log").read_text()


def test_no_tokens(stream):
    """Nothing is launched: the addresses are not even memory."""
    made = make(np.random.default_rng(), "half", F16, F16, tokens=0)

    def nowhere(array):
        return fi_ffi.TensorDesc(4096 if array.size else 0, array.shape, array.dtype)

    assert made.call(nowhere, stream=stream).shape[0] == 0


@on_hopper
@pytest.mark.parametrize("quant_type", ["fp4", "int4"])
def test_the_order_of_4_bit_weights(quant_type, rng, to_gpu, stream):
    weight = rng.integers(0, 256, (3, 208, 160), dtype=np.uint8)
    source, target = to_gpu(weight), to_gpu(np.full_like(weight, 0xFF))
    fi_ffi.interleave_moe_weights_for_sm90_mixed_gemm(
        source.desc(), target.desc(), quant_type, stream=stream
    )
    got = target.get()
    assert target.intact() and source.get().tobytes() == weight.tobytes()
    assert (got == moe_weights.interleave(weight, quant_type, is_folded())).all()


def test_the_workspace_size(rng, to_gpu, stream):
    layer = fi_ffi.FusedMoe(F16)
    if not layer.runner.has("get_workspace_size"):
        with pytest.raises(fi_ffi.KernelNotFoundError):
            layer.workspace_size(10, 256, 128, 8, 2)
        return
    small, large = (layer.workspace_size(tokens, 256, 128, 8, 2) for tokens in (10, 1000))
    assert 0 < small < large


@pytest.fixture
def deepgemm_headers():
    """DeepGEMM's headers, of an installed flashinfer-python, and an nvcc."""
    spec = importlib.util.find_spec("flashinfer")
    if spec is None or spec.origin is None or deepgemm.compiler() is None:
        pytest.skip("needs flashinfer-python's headers and nvcc")
    return Path(spec.origin).parent / "data" / "csrc" / "nv_internal" / "tensorrt_llm"


@on_hopper
@pytest.mark.parametrize("tokens", [5, 100])
def test_deepgemm(tokens, deepgemm_headers, rng, to_gpu, stream, record_property):
    """The kernels that are compiled in the call; others for few tokens."""
    fi_ffi.set_deepgemm_jit_include_dirs([deepgemm_headers])
    try:
        made = make(rng, "fp8_block_scale", BF16, BF16, tokens=tokens, **SMALL)
        check(made, to_gpu, stream, record_property)
    finally:
        fi_ffi.set_deepgemm_jit_include_dirs([])
