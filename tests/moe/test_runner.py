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
from fi_ffi.abi.function import probe
from fi_ffi.ops import cuda
from fi_ffi.ops.moe import calls, profile
from fi_ffi.ops.moe.arrays import TensorArrays
from fi_ffi.ops.moe.interface import INTERLEAVE, SET_INCLUDE_DIRS, of_release
from fi_ffi.ops.moe.runner import Runner

from moe_layers import F16, make

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


@pytest.fixture
def on_cpu(monkeypatch):
    """Lets calls that are made for a GPU work on the host's memory."""
    monkeypatch.setattr(calls, "release_of", lambda device: None)
    monkeypatch.setattr(cuda, "is_capturing", lambda stream: False)


def launched(recording, release, made, *, profile_ids=None, scales=(), **asked):
    """What `run_moe` wrote down of a call, and the module."""
    moe = fi_ffi.FusedMoe(F16, device="cpu")
    moe._runner = runner_of(recording, release)
    moe._tactics = moe._runner.counts()
    descs = calls.described("op", made.tensors)
    more = {"parallel": {}, "alltoall": False, "activation": "Swiglu", "pdl": False, **asked}
    limits = tuple(name for name in calls.SWIGLU if name in descs)
    wanted = calls.Asked.checked("op", *more.values(), limits)
    settled = calls.settle(moe, "op", descs, None, wanted)
    tactics = profile_ids
    for _ in range(2):  # with a new frame, and with a used one
        calls._launch(moe, "op", settled, descs, list(scales), wanted, tactics, 0)
    assert sum(map(len, settled.frames)) == 1
    module = recording(*VARIANTS[release])
    first, second = module.last(), module.last()
    assert first == second
    return first.split()[1:], moe


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


@each_variant
def test_all_arguments_arrive(release, recording, on_cpu, rng):
    made = make(rng, "half", F16, F16, biases=True, limits=("alpha", "beta", "limit"), experts=4)
    scales = [np.ones(4, np.float32), np.array(2, np.float32), np.zeros(0, F16)]
    words, _ = launched(
        recording, release, made, profile_ids=(2, 1),
        scales=[fi_ffi.as_desc(one) for one in scales],
        parallel={"tp_size": 3, "tp_rank": 1, "ep_size": 4, "ep_rank": 2}, alltoall=True, pdl=True,
    )  # fmt: skip

    def shown(array):
        address = hex(array.ctypes.data) if array.size or array.ctypes.data else "0"
        return f"t{address}[{','.join(map(str, array.shape))}]"

    tensors = [made.tensors[name] for name in (
        "output", "input", "token_selected_experts", "token_final_scales", "fc1_expert_weights",
        "fc1_expert_biases", "fc2_expert_weights", "fc2_expert_biases",
    )]  # fmt: skip
    expected = [shown(array) for array in tensors]
    expected += ["{", *map(shown, scales), "}", "none"]
    expected += [shown(made.tensors[f"swiglu_{name}"]) for name in ("alpha", "beta", "limit")]
    expected += [] if release == "0.6.7" else ["yes"]
    # GEMM2's second tactic follows GEMM1's three where numbers are absolute.
    second = "4" if release == "0.6.18" else "1"
    expected += ["3", "1", "4", "2", "1", "0", "yes", "no", "(", "2", second, ")", "yes", "5"]
    expected += ["none"] if release == "0.6.18" else []
    assert words == expected


@each_variant
def test_what_is_not_given_is_none(release, recording, on_cpu, rng):
    made = make(rng, "half", F16, F16, final=False)
    words, _ = launched(recording, release, made)
    assert words[3] == "none" and words[5] == "none" and words[7] == "none"
    assert words[8:13] == ["none"] * 5
    rest = words[13:] if release == "0.6.7" else words[14:]
    assert rest[:8] == ["1", "0", "1", "0", "1", "0", "no", "no"]
    assert rest[8:11] == ["none", "no", "3"]


@pytest.mark.parametrize(("ids", "expected"), [((-1, -1), "( -1 -1 )"), ((0, -1), "( 0 -1 )"),
                                               ((-1, 4), "( -1 7 )")])  # fmt: skip
def test_the_kernels_own_choice_stays(ids, expected, recording, on_cpu, rng):
    words, _ = launched(recording, "0.6.18", make(rng, "half", F16, F16), profile_ids=ids)
    assert expected in " ".join(words)


def test_call_logs_are_told(recording, on_cpu, rng, tmp_path):
    made = make(rng, "half", F16, F16, final=False)
    arrays = [np.full(n, n, np.float32) for n in (3, 5)]
    scales = [fi_ffi.as_desc(array) for array in arrays]
    with fi_ffi.call_log(5, tmp_path / "log"):
        words, _ = launched(recording, "0.6.13", made, profile_ids=(2, 1), scales=scales)
    told = [line.strip() for line in (tmp_path / "log").read_text().splitlines()]
    assert sum(line.endswith("fused_moe_90.run_moe") for line in told) == 2
    names = "output", "input", "token_selected_experts", None, "fc1_expert_weights", None
    for i, name in enumerate((*names, "fc2_expert_weights", None)):
        desc = name and fi_ffi.as_desc(made.tensors[name])
        shown = f"{desc.layout} at {desc.ptr:#x}" if desc else "None"
        assert told.count(f"{i}: {shown}") == 2
    assert told.count(f"8: float32[3] on cpu at {scales[0].ptr:#x}") == 2
    assert told.count(f"8.1: float32[5] on cpu at {scales[1].ptr:#x}") == 2
    assert told.count("22: tuple (2, 1)") == 2 and told.count("13: True") == 2
    assert words[0] == f"t{made.tensors['output'].ctypes.data:#x}[7,48]"


def test_the_workspace_is_given_back(recording, on_cpu, rng):
    before = cuda.kernel_memory().count
    launched(recording, "0.6.13", make(rng, "half", F16, F16))
    assert cuda.kernel_memory().count == before


def test_arrays_of_scales_are_made_once_and_let_go():
    arrays, scales = TensorArrays(), [fi_ffi.as_desc(np.ones(3, np.float32)) for _ in range(2)]
    made = arrays.of(scales)
    assert arrays.of(list(scales)) is made and arrays.of(scales[:1]) is not made
    assert made.array.use_count == 1
    tensors = made._tensors
    assert [tensor.use_count for tensor in tensors] == [2, 2]
    del made, arrays
    gc.collect()
    with pytest.raises(fi_ffi.FiFfiError, match="released"):
        tensors[0].handle  # noqa: B018


def test_a_workspace_size_that_the_release_tells(recording, monkeypatch):
    moe = fi_ffi.FusedMoe(F16, device="cpu")
    moe._runner = runner_of(recording, "0.6.18")
    monkeypatch.setattr(moe, "device", fi_ffi.parse_device("cuda:0"))
    monkeypatch.setattr("fi_ffi.ops.moe.fused.release_of", lambda device: "0.6.18")
    size = moe.workspace_size(10, 64, 128, 8, 2, ep_size=2, ep_rank=1, activation_type="Identity")
    assert size == 12345
    assert recording("-DABSOLUTE").last() == "size: 10 64 128 8 2 1 0 2 1 no 9 "
    moe._runner = runner_of(recording, "0.6.13")
    with pytest.raises(fi_ffi.KernelNotFoundError, match="does not tell"):
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

    monkeypatch.setattr(profile, "_elapsed", elapsed)
    return start


def profiled(recording, release, made, timed, monkeypatch, times, **more):
    moe = fi_ffi.FusedMoe(F16, device="cpu")
    monkeypatch.setattr(moe, "make_runner", lambda: runner_of(recording, release))
    descs = calls.described("op", {
        name: made.tensors[name]
        for name in ("input", "fc1_expert_weights", "fc2_expert_weights")
    })  # fmt: skip
    asked = calls.Asked.checked("op", {}, False, "Swiglu", False)
    timed(times)
    return profile._measure(moe, "op", descs, asked, 2, 4, 0, **more)


@each_variant
def test_profiles_choose_the_fastest(release, recording, timed, monkeypatch, on_cpu, rng):
    made = make(rng, "half", F16, F16)
    module = recording(*VARIANTS[release])
    while module.last():
        pass
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


def test_profiles_are_kept(recording, timed, monkeypatch, on_cpu, rng):
    made = make(rng, "half", F16, F16)
    moe = fi_ffi.FusedMoe(F16, device="cpu")
    counted = []

    def measure(*args):
        counted.append(args)
        return profile.Profile((1, 1), (), ())

    monkeypatch.setattr(profile, "_measure", measure)
    monkeypatch.setattr(calls, "check_device", lambda *args: None)
    monkeypatch.setattr(moe, "device", fi_ffi.parse_device("cuda:0"))
    given = {
        name: made.tensors[name]
        for name in ("input", "fc1_expert_weights", "fc2_expert_weights")
    }  # fmt: skip
    for _ in range(3):
        assert moe.profile(**given, top_k=2).profile_ids == (1, 1)
    moe.profile(**given, top_k=3)
    moe.profile(**{**given, "input": given["input"][:2]}, top_k=3)
    assert len(counted) == 3


def test_nothing_is_chosen_for_block_scales(rng):
    moe = fi_ffi.FusedMoe("bfloat16", "float8_e4m3fn", use_deepseek_fp8_block_scale=True)
    assert not moe.mode.has_tactics


def test_a_gpu_that_is_not_hopper(monkeypatch):
    from fi_ffi.loader import machine

    monkeypatch.setattr(machine, "capability", lambda index: (8, 9))
    with pytest.raises(fi_ffi.ArchitectureError, match="compute capability 9.0; cuda:0 has 8.9"):
        fi_ffi.FusedMoe("float16").tactics  # noqa: B018


@pytest.mark.parametrize("release", ["0.6.3", "0.6.9", "0.6.16", "0.6.18", "0.7.2.post1"])
def test_4_bit_weights_of_other_releases(release, monkeypatch):
    from fi_ffi.loader import machine, search

    monkeypatch.setattr(machine, "capability", lambda index: (9, 0))
    monkeypatch.setattr(search, "release", lambda: release)
    moe = fi_ffi.FusedMoe("bfloat16", "uint8", use_w4_group_scaling=True)
    with pytest.raises(fi_ffi.KernelNotFoundError, match="laid out"):
        moe.tactics  # noqa: B018


def test_a_release_that_is_not_known():
    with pytest.raises(fi_ffi.KernelNotFoundError, match="0.5.1"):
        of_release("0.5.1")
