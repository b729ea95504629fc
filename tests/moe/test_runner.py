"""Calls of the kernels' object: attested, packed as its methods take them, profiled.

The object is one of C++, with the methods that FlashInfer's has; what it is given is compared
with what was asked for.
"""

from __future__ import annotations

import contextlib
import gc

import numpy as np
import pytest

import fi_ffi
from fi_ffi.abi.function import make_array, probe
from fi_ffi.loader import search
from fi_ffi.ops.call import cuda, memory
from fi_ffi.ops.moe import tactics
from fi_ffi.ops.moe.interface import INTERLEAVE, SET_INCLUDE_DIRS, of_release
from fi_ffi.ops.moe.kernels import Runner

from tests.helpers.moe_layers import EVERY, F8, F16, FLAGS, I64, U8, make

VARIANTS = {"0.6.13": (), "0.6.7": ("-DBEFORE_0_6_8",), "0.6.18": ("-DABSOLUTE",)}
each_variant = pytest.mark.parametrize("release", VARIANTS)


def runner_of(recording, release: str, *more: str) -> Runner:
    module = recording(*VARIANTS[release], *more)
    interface = of_release(release)
    defaults = {"use_fused_finalize": True}
    names = interface.init.names
    made = module.entry("init")(
        *([fi_ffi.DTYPES["float16"]] * 3), *(defaults.get(name, False) for name in names[3:])
    )
    return Runner(made, interface, str(module.path))


# Activations and weights of modes, whose results are float16.
DTYPES = {"half": (F16, F16), "fp8": (F8, F8), "nvfp4": (F16, I64), "nvfp4_packed": (U8, I64),
          "mxfp8": (F8, F8)}  # fmt: skip


def moe_of(recording, release: str, mode: str = "half") -> fi_ffi.FusedMoe:
    """On the host's memory, with the recording object for its kernels."""
    moe = fi_ffi.FusedMoe(*DTYPES[mode], F16, device="cpu", **FLAGS[mode])
    moe._kernels._runner = runner_of(recording, release)
    return moe


def launched(recording, release, made, *, times=2, **asked):
    """What `run_moe` wrote down of a call: the same each time, with a new frame and a used one."""
    moe, module = moe_of(recording, release, made.layer.mode), recording(*VARIANTS[release])
    made.more = {}
    for _ in range(times):
        made.call_of(moe, **asked)
    words = {module.last() for _ in range(times)}
    assert len(words) == 1
    ((compiled, _),) = moe._call._rows.values()
    (variant,) = compiled.variants.values()
    assert len(variant.frames) == 1
    return words.pop().split()[1:]


@each_variant
def test_what_is_declared_is_what_the_methods_are(release, recording):
    runner = runner_of(recording, release)
    assert runner.counts() == (3, 5)
    module = recording(*VARIANTS[release])
    init = of_release(release).init.signature
    assert probe(module.entry("init")).same_types(init)
    for function in (INTERLEAVE, SET_INCLUDE_DIRS):
        found = probe(module.entry(function.signature.name))
        assert found.same_types(function.signature)


@pytest.mark.parametrize("other", [("0.6.13", "0.6.7"), ("0.6.13", "0.6.18"), ("0.6.7", "0.6.13")])
def test_another_interface_is_refused(other, recording, monkeypatch):
    binary, declared = other
    made = recording(*VARIANTS[binary]).entry("init")
    given = [*([fi_ffi.DTYPES["float16"]] * 3), *([False] * 4)]
    with pytest.raises((fi_ffi.AbiError, fi_ffi.LoaderError)) as caught:
        Runner(made(*given), of_release(declared), "a file")
    if isinstance(caught.value, fi_ffi.AbiError):
        assert "a file" in str(caught.value) and "declared" in str(caught.value)


def test_one_argument_more_is_refused(recording):
    with pytest.raises(fi_ffi.AbiError, match="get_gemm2_tactic_count"):
        runner_of(recording, "0.6.13", "-DWRONG")


def test_what_is_no_object_is_refused():
    with pytest.raises(fi_ffi.AbiError, match="not a module object"):
        Runner(3, of_release("0.6.13"), "a file")


def shown(array):
    address = hex(array.ctypes.data) if array.size or array.ctypes.data else "0"
    return f"t{address}[{','.join(map(str, array.shape))}]"


@each_variant
def test_all_arguments_arrive(release, recording, rng):
    made = make(rng, "half", F16, F16, biases=True, limits=("alpha", "beta", "limit"), experts=4)
    words = launched(
        recording, release, made, profile_ids=(2, 1), tp_size=3, tp_rank=1, ep_size=4, ep_rank=2,
        enable_alltoall=True, enable_pdl=True,
    )  # fmt: skip
    tensors = [made.tensors[name] for name in (
        "output", "input", "token_selected_experts", "token_final_scales", "fc1_expert_weights",
        "fc1_expert_biases", "fc2_expert_weights", "fc2_expert_biases",
    )]  # fmt: skip
    expected = [*map(shown, tensors), "none", "none"]
    expected += [shown(made.tensors[f"swiglu_{name}"]) for name in ("alpha", "beta", "limit")]
    expected += [] if release == "0.6.7" else ["yes"]
    # GEMM2's second tactic follows GEMM1's three where numbers are absolute.
    second = "4" if release == "0.6.18" else "1"
    expected += ["3", "1", "4", "2", "1", "0", "yes", "no", "(", "2", second, ")", "yes", "5"]
    expected += ["none"] if release == "0.6.18" else []
    assert words == expected


@each_variant
def test_scales_arrive_and_are_those_of_the_call(release, recording, rng):
    """The Array of a frame is made once; what is in it is each call's."""
    moe, module = moe_of(recording, release, "fp8"), recording(*VARIANTS[release])
    for per_expert in (True, False, True):
        made = make(rng, "fp8", F8, F16, per_expert_quant=per_expert, experts=3 + per_expert)
        made.call_of(moe)
        words = module.last().split()[1:]
        assert words[8:14] == ["{", *map(shown, made.scales), "}"]
        assert words[14:18] == ["none"] * 4
    assert len(moe._call._rows) == 2, "by the scales' shapes, not by sizes"


@each_variant
def test_scales_of_activations_arrive_with_their_order(release, recording, rng):
    moe, module = moe_of(recording, release, "nvfp4_packed"), recording(*VARIANTS[release])
    made = make(rng, "nvfp4_packed", U8, F16)
    made.more = {}
    for order in (True, False) if release != "0.6.7" else (True,):
        made.tensors["input_sf"] = np.zeros(128 * 8, np.uint8)
        made.call_of(moe, swizzled_input_sf=order)
        words = module.last().split()[1:]
        assert words[8:16] == ["{", *map(shown, made.scales), "}"]
        assert words[16:20] == [shown(made.tensors["input_sf"]), "none", "none", "none"]
        rest = [("yes" if order else "no"), "1", "0"] if release != "0.6.7" else ["1", "0", "1"]
        assert words[20:23] == rest
    if release == "0.6.7":
        with pytest.raises(fi_ffi.KernelNotFoundError, match="swizzled_input_sf"):
            made.call_of(moe, swizzled_input_sf=False)
    made = make(rng, "nvfp4", F16, F16)
    made.more = {}
    made.call_of(moe_of(recording, release, "nvfp4"), swizzled_input_sf=False)
    assert module.last().split()[17] == "none"


def test_calls_of_any_sizes_share_a_frame(recording, rng):
    moe, module = moe_of(recording, "0.6.13"), recording()
    for tokens, experts, hidden in ((3, 2, 64), (70, 5, 128), (1, 9, 32)):
        made = make(rng, "half", F16, F16, tokens=tokens, experts=experts, hidden=hidden)
        made.call_of(moe)
        words = module.last().split()[1:]
        assert words[0] == shown(made.tensors["output"])
        assert words[4] == shown(made.tensors["fc1_expert_weights"])
    ((compiled, _),) = moe._call._rows.values()
    (variant,) = compiled.variants.values()
    assert len(variant.frames) == 1


@each_variant
def test_what_is_not_given_is_none(release, recording, rng):
    words = launched(recording, release, make(rng, "half", F16, F16, final=False))
    assert words[3] == "none" and words[5] == "none" and words[7] == "none"
    assert words[8:13] == ["none"] * 5
    rest = words[13:] if release == "0.6.7" else words[14:]
    assert rest[:8] == ["1", "0", "1", "0", "1", "0", "no", "no"]
    assert rest[8:11] == ["none", "no", "3"]


@pytest.mark.parametrize(("ids", "expected"), [((-1, -1), "( -1 -1 )"), ((0, -1), "( 0 -1 )"),
                                               ((-1, 4), "( -1 7 )")])  # fmt: skip
def test_the_kernels_own_choice_stays(ids, expected, recording, rng):
    words = launched(recording, "0.6.18", make(rng, "half", F16, F16), profile_ids=ids)
    assert expected in " ".join(words)


def test_tactics_of_one_call_are_not_the_nexts(recording, rng):
    made, module = make(rng, "half", F16, F16), recording()
    moe = moe_of(recording, "0.6.13")
    for ids, expected in (((1, 2), "( 1 2 )"), (None, "none no 3"), ((0, 4), "( 0 4 )")):
        made.call_of(moe, profile_ids=ids)
        assert expected in module.last()


def test_call_logs_are_told(recording, rng, tmp_path):
    made = make(rng, "fp8", F8, F16, final=False)
    with fi_ffi.call_log(5, tmp_path / "log"):
        words = launched(recording, "0.6.13", made, profile_ids=(2, 1))
    told = [line.strip() for line in (tmp_path / "log").read_text().splitlines()]
    assert sum(line.startswith("entry: fused_moe_90.run_moe") for line in told) == 2
    for name in ("output", "input", "token_selected_experts", "fc1_expert_weights"):
        desc = fi_ffi.as_desc(made.tensors[name])
        assert sum(line.startswith(f"{name}: {desc.layout} at {desc.ptr:#x}") for line in told) == 2
    for i, scale in enumerate(made.scales):
        desc = fi_ffi.as_desc(scale)
        start = f"quant_scales_{i}: {desc.layout} at {desc.ptr:#x}"
        assert sum(line.startswith(start) for line in told) == 2
    assert told.count("token_final_scales: None") == 2
    assert sum(line.startswith("profile_ids: an array object") for line in told) == 2
    assert words[0] == shown(made.tensors["output"])


def test_the_workspace_is_given_back(recording, rng):
    before = cuda.kernel_memory().count
    launched(recording, "0.6.13", make(rng, "half", F16, F16))
    assert cuda.kernel_memory().count == before


def test_a_frame_whose_tensor_a_callee_keeps_serves_no_other_call(recording, rng, monkeypatch):
    made, moe = make(rng, "fp8", F8, F16), moe_of(recording, "0.6.13", "fp8")
    made.call_of(moe)
    (variant,) = next(iter(moe._call._rows.values()))[0].variants.values()
    frame, kept = variant.frames.pop(), []
    monkeypatch.setattr(memory, "keep", kept.append)
    with make_array([next(iter(frame._objects.values()))]):  # as a callee might
        frame.give_back(frame)
        assert (kept, variant.frames) == ([frame], [])
    frame.give_back(frame)
    assert (kept, variant.frames) == ([frame], [frame])


def test_frames_let_their_arrays_go(recording, rng):
    made, moe = make(rng, "fp8", F8, F16), moe_of(recording, "0.6.13", "fp8")
    made.call_of(moe)
    ((compiled, _),) = moe._call._rows.values()
    (variant,) = compiled.variants.values()
    (frame,) = variant.frames
    (array,), tensors = frame._arrays, [*frame._objects.values()]
    # Of fi_ffi's memory: one reference is its own.
    assert array.use_count == 1 and [tensor.use_count for tensor in tensors] == [3] * 4
    assert not frame.is_referred_to
    kept = make_array([tensors[0]])  # as a callee might
    assert frame.is_referred_to
    kept.release()
    assert not frame.is_referred_to
    variant.frames.clear()
    del frame, array
    gc.collect()
    assert [tensor.use_count for tensor in tensors] == [2] * 4


def test_a_workspace_size_that_the_release_tells(recording, monkeypatch):
    moe = moe_of(recording, "0.6.18")
    monkeypatch.setattr(moe, "device", fi_ffi.parse_device("cuda:0"))
    size = moe.workspace_size(10, 64, 128, 8, 2, ep_size=2, ep_rank=1, activation_type="Identity")
    assert size == 12345
    assert recording("-DABSOLUTE").last() == "size: 10 64 128 8 2 1 0 2 1 no 9 "
    moe._kernels._runner = runner_of(recording, "0.6.13")
    with pytest.raises(fi_ffi.KernelNotFoundError, match="does not report it"):
        moe.workspace_size(10, 64, 128, 8, 2)


@pytest.fixture
def timed(monkeypatch):
    """Each tactic takes a time of the test's choosing."""
    times = iter(())

    def start(values):
        nonlocal times
        times = iter(values)

    @contextlib.contextmanager
    def elapsed(stream):
        found = []
        yield found
        found.append(next(times))

    monkeypatch.setattr(tactics, "_elapsed", elapsed)
    return start


PROFILED = ("input", "fc1_expert_weights", "fc2_expert_weights")


def profiled(recording, release, made, timed, monkeypatch, times):
    moe = moe_of(recording, release)
    moe._kernels.make_runner = lambda: runner_of(recording, release)
    monkeypatch.setattr(cuda, "is_capturing", lambda stream: False)
    timed(times)
    return moe.profile(**{name: made.tensors[name] for name in PROFILED}, top_k=2, repeats=4)


@each_variant
def test_profiles_choose_the_fastest(release, recording, timed, monkeypatch, rng):
    made = make(rng, "half", F16, F16)
    module = recording(*VARIANTS[release])
    while module.last():
        pass
    gc.collect()
    alive, memory = module.alive(), cuda.kernel_memory().count
    # Tactic 1 is refused, and 4 has no room where there is a method that says so.
    gemm1, gemm2 = [8.0, 4.0], [12.0, 6.0, 2.0, 4.0]
    if release == "0.6.7":
        gemm2.insert(1, 40.0)
    found = profiled(recording, release, made, timed, monkeypatch, gemm1 + gemm2)
    assert found.gemm1 == (2.0, np.inf, 1.0)
    assert found.gemm2[0] == 3.0 and found.gemm2[2:] == (1.5, 0.5, 1.0)
    assert found.gemm2[1] == (10.0 if release == "0.6.7" else np.inf)
    assert found.profile_ids == (2, 3)
    gc.collect()
    assert module.alive() == alive, "its own object was not given back"
    assert cuda.kernel_memory().count == memory, "its memory was not given back"
    told = []
    while text := module.last():
        told.append(text.split())
    told.reverse()
    runs = [words for words in told if words[0] == "profile:"]
    assert sum(words[-3] == "yes" for words in runs) == 2  # prepared once for each
    prepared = [words for words in runs if words[-3] == "yes"]
    assert [(words[-5], words[-4]) for words in prepared] == [("1", "-1"), ("2", "-1")]
    of_gemm2 = {words[-4] for words in runs if words[-5] == "2"}
    expected = {"-1", "3", "4", "5", "6", "7"} - (set() if release == "0.6.7" else {"4"})
    assert of_gemm2 == expected, "GEMM2's tactics follow GEMM1's"


def test_profiles_are_kept(recording, monkeypatch, rng):
    made, moe, counted = make(rng, "half", F16, F16), moe_of(recording, "0.6.13"), []

    def measure(*args):
        counted.append(args)
        return tactics.Profile((1, 1), (), ())

    monkeypatch.setattr(tactics, "measure", measure)
    given = {name: made.tensors[name] for name in PROFILED}
    for _ in range(3):
        assert moe.profile(**given, top_k=2).profile_ids == (1, 1)
    moe.profile(**given, top_k=3)
    moe.profile(**{**given, "input": given["input"][:2]}, top_k=3)
    assert len(counted) == 3


def test_nothing_is_chosen_for_block_scales(rng):
    moe = fi_ffi.FusedMoe("bfloat16", "float8_e4m3fn", use_deepseek_fp8_block_scale=True)
    assert not moe.mode.has_tactics


ABLE = {
    "half": (9, 10, 11, 12), "fp8": (9, 10, 11, 12), "fp8_block_scale": (9,), "mxfp4": (9,),
    "int4": (9,), "nvfp4": (10, 11, 12), "nvfp4_packed": (10, 11, 12), "fp8_mxfp4": (10, 11, 12),
    "mxfp8_mxfp4": (10, 11, 12), "mxfp8": (10,),
}  # fmt: skip


@pytest.mark.parametrize(("mode", "act", "out"), EVERY)
def test_gpus_of_each_mode(mode, act, out, monkeypatch, rng):
    """Which module is looked for on a GPU, and what is said on another."""
    from fi_ffi.loader import machine, runtime

    weight = make(rng, mode, act, out).tensors["fc1_expert_weights"].dtype

    def look(module: str, *args: object) -> None:
        raise fi_ffi.KernelNotFoundError(module)

    monkeypatch.setattr(runtime, "kernel_entry", look)
    monkeypatch.setattr(search, "release", lambda: "0.6.13")
    for capability, module in (
        ((9, 0), "90"), ((10, 0), "100"), ((10, 3), "103"), ((11, 0), "100"), ((12, 0), "120"),
        ((12, 1), "120"), ((8, 9), ""), ((13, 0), ""),
    ):  # fmt: skip
        monkeypatch.setattr(machine, "capability", lambda index, given=capability: given)
        moe = fi_ffi.FusedMoe(act, weight, out, **FLAGS[mode])
        if module and capability[0] in ABLE[mode]:
            with pytest.raises(fi_ffi.KernelNotFoundError, match=f"^fused_moe_{module}$"):
                moe.tactics  # noqa: B018
            continue
        told = f"cuda:0 has compute capability {capability[0]}.{capability[1]}; {mode} "
        with pytest.raises(fi_ffi.ArchitectureError, match=told):
            moe.tactics  # noqa: B018
        assert not fi_ffi.FusedMoe.supports(capability, mode=mode, release="0.6.13")


@pytest.mark.parametrize(("release", "mode"), [("0.6.5", "mxfp8"), ("0.6.9", "mxfp8_mxfp4")])
def test_modes_of_later_releases(release, mode, recording, monkeypatch, rng):
    """MXFP8 is of 0.6.6, and before 0.6.10 the binding wants scales for a gate that is not there;
    its profiler runs it from 0.6.15 on."""
    from fi_ffi.loader import machine

    monkeypatch.setattr(machine, "capability", lambda index: (10, 0))
    monkeypatch.setattr(search, "release", lambda: release)
    _, act, out = next(one for one in EVERY if one[0] == mode)
    made = make(rng, mode, act, out)
    weight = made.tensors["fc1_expert_weights"].dtype
    moe = fi_ffi.FusedMoe(act, weight, out, device="cpu", **FLAGS[mode])
    if mode == "mxfp8":
        with pytest.raises(fi_ffi.KernelNotFoundError, match="mxfp8 .* laid out"):
            moe._kernels.make_runner()
    moe._kernels._runner = runner_of(recording, "0.6.13")
    moe._kernels._runner.release_in_use = "0.6.9"
    with pytest.raises(fi_ffi.KernelNotFoundError, match="has no Relu2 with MXFP"):
        moe._kernels.number_of("op", "Relu2")
    assert moe._kernels.number_of("op", "Swiglu") == 3
    if mode == "mxfp8":
        given = {name: made.tensors[name] for name in PROFILED}
        with pytest.raises(fi_ffi.KernelNotFoundError, match="the profiler of FlashInfer 0.6.9"):
            moe.profile(**given, top_k=2)


def test_tactics_whose_tiles_do_not_fit(recording, timed, monkeypatch, rng):
    """The recording object's first ones are for columns of multiples of 24."""
    made = make(rng, "half", F16, F16, hidden=48, inter=32)
    moe = moe_of(recording, "0.6.18")
    made.more = {}
    with pytest.raises(fi_ffi.ArgumentError, match="profile_ids.*divide these weights"):
        made.call_of(moe, profile_ids=(0, 0))
    made.call_of(moe, profile_ids=(0, 1))
    made.call_of(moe, profile_ids=(0, -1))
    while recording("-DABSOLUTE").last():  # what other tests have left
        pass
    times = [8.0, 4.0, 6.0, 2.0, 5.0]
    found = profiled(recording, "0.6.18", made, timed, monkeypatch, times)
    assert found.gemm1 == (2.0, np.inf, 1.0)
    assert found.gemm2 == (np.inf, np.inf, 1.5, 0.5, 1.25)
    told = []
    while text := recording("-DABSOLUTE").last():
        told.append(text)
    assert {line for line in told if line.startswith("shape")} == {
        "shape: 1 64 48 ",
        "shape: 2 48 32 ",
    }


@pytest.mark.parametrize("release", ["0.6.3", "0.6.9"])
def test_4_bit_weights_of_other_releases(release, monkeypatch):
    from fi_ffi.loader import machine

    monkeypatch.setattr(machine, "capability", lambda index: (9, 0))
    monkeypatch.setattr(search, "release", lambda: release)
    moe = fi_ffi.FusedMoe("bfloat16", "uint8", use_w4_group_scaling=True)
    with pytest.raises(fi_ffi.KernelNotFoundError, match="laid out"):
        moe.tactics  # noqa: B018


def test_a_release_that_is_not_known():
    with pytest.raises(fi_ffi.KernelNotFoundError, match="0.5.1"):
        of_release("0.5.1")
