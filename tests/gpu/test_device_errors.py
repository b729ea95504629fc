"""A GPU that is lost is told as that, in processes of their own; what fails otherwise is forgotten.

Kernels are made to read address 0x100000, where nothing is: what a caller's wrong pointer does.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
from cuda.bindings import runtime

import fi_ffi
from fi_ffi.cli.cuda import CudaError, DeviceArray, check
from fi_ffi.loader import machine as of_loader
from fi_ffi.ops.call import cuda
from fi_ffi.ops.functions import OPS

from tests.helpers import children, kernels
from tests.helpers.cases import make_case
from tests.helpers.untyped_calls import BF16, mhc_post, module, poisoned, rounded, worst
from tests.ops.test_norm import case as video_case

PREPARED = """
import json, os
import numpy as np
from cuda.bindings import runtime
import fi_ffi
from fi_ffi.abi.tensor import parse_device
from fi_ffi.cli.cuda import DeviceArray, check
from fi_ffi.loader import machine
from fi_ffi.ops.call import cuda

x = DeviceArray(np.ones((8, 512), np.float16))
out = DeviceArray(np.full((8, 512), np.nan, np.float16))
weight = DeviceArray(np.ones(512, np.float16))
stream = int(check(runtime.cudaStreamCreateWithFlags(runtime.cudaStreamNonBlocking)))
bad = fi_ffi.TensorDesc(1 << 20, (8, 512), "float16")
good = (out.desc(), x.desc(), weight.desc())
entry = fi_ffi.module("norm").rmsnorm
prepared = fi_ffi.rmsnorm.prepare(*good, stream=stream)
event = cuda.Event()
with fi_ffi.capture(stream) as graph:
    fi_ffi.rmsnorm(*good)
prepared()
fi_ffi.rmsnorm(*good, stream=stream)
check(runtime.cudaStreamSynchronize(stream))
assert np.abs(out.get() - 1).max() < 1e-3

def told(action):
    try:
        action()
    except Exception as error:
        found = {"type": type(error).__name__, "is_value": isinstance(error, ValueError),
                 "text": str(error)}
        for name in ("op", "kind", "code"):
            found[name] = getattr(error, name, None)
        return found
    return {"type": None}

def plan():
    indptr, last = np.array([0, 1], np.int32), np.array([3], np.int32)
    fi_ffi.BatchDecodePlan(
        indptr, np.zeros(1, np.int32), last, num_qo_heads=8, num_kv_heads=8, head_dim=128,
        page_size=16, q_data_type="float16", stream=stream,
    )

def recorded():
    with fi_ffi.capture(stream) as made:
        fi_ffi.rmsnorm(*good)
    made.launch(stream)

def sync():
    event.record(stream)
    event.wait()

HOW = {
    "typed": lambda: fi_ffi.rmsnorm(*good, stream=stream),
    "prepared": prepared,
    "entry": lambda: entry(*good, 1e-6, False, stream=stream),
    "graph": lambda: graph.launch(stream),
    "capture": recorded,
    "event": sync,
    "memory": lambda: cuda.allocate(64, parse_device("cuda:0")),
    "plan": plan,
    "array": x.get,
}
try:
    plan()
except fi_ffi.KernelNotFoundError:
    del HOW["plan"]
"""
FAULT = "fi_ffi.rmsnorm(out.desc(), bad, weight.desc(), stream=stream)\n"


@pytest.fixture(scope="module", autouse=True)
def norm_kernels() -> None:
    kernels.need("norm")


def child(program: str, **environment: str) -> tuple[list[dict], str]:
    """What a process prints, each line as JSON, and what it has to say besides."""
    status, out, err = children.done(program, seconds=300, **environment)
    assert status == 0, out + err
    return [json.loads(line) for line in out.splitlines()], err


def check_told(found: dict) -> None:
    assert found["type"] == "DeviceError", found
    assert found["code"] in (700, 719), found
    assert found["kind"] in ("cudaErrorIllegalAddress", "cudaErrorLaunchFailure")
    assert not found["is_value"]
    for part in ("lost its CUDA context", "only a new process", "CUDA_LAUNCH_BLOCKING=1",
                 "compute-sanitizer", "fi_ffi.call_log"):  # fmt: skip
        assert part in found["text"]


@pytest.mark.parametrize("first", ["typed", "prepared", "entry", "graph", "capture", "event",
                                   "memory", "plan", "array"])  # fmt: skip
def test_a_lost_gpu_is_told_by_whatever_comes_next(first):
    """By the first call of each kind, and by all kinds after it; the process ends in order."""
    program = f"""
runtime.cudaStreamSynchronize(stream)  # what it returns is thrown away, as callers may
first = {first!r}
if first in HOW:
    for name in (first, *(other for other in HOW if other != first)):
        print(json.dumps(told(HOW[name])), flush=True)
"""
    found, said = child(PREPARED + FAULT + program)
    if not found:
        pytest.skip(f"the kernels have no module for {first!r}")
    assert len(found) >= 8
    for one in found:
        check_told(one)
    assert "Traceback" not in said and "Exception ignored" not in said, said


def test_a_fault_in_flight_is_noticed_by_ours_alone():
    """Nobody else synchronises; and a wrong argument is an argument's error even then."""
    program = """
print(json.dumps(told(sync)), flush=True)
print(json.dumps(told(lambda: fi_ffi.rmsnorm(*good, eps=-1.0, stream=stream))), flush=True)
print(json.dumps(told(HOW["typed"])), flush=True)
"""
    (noticed, argument, later), _ = child(PREPARED + FAULT + program)
    check_told(noticed)
    assert noticed["op"] in ("cudaEventSynchronize", "event")
    assert (argument["type"], argument["op"]) == ("ArgumentError", "rmsnorm")
    check_told(later)


def test_launch_blocking_names_the_call_at_fault():
    """What the message advises does help: the call itself fails."""
    program = f"print(json.dumps(told(lambda: {FAULT.strip()})), flush=True)\n"
    ((found,), _) = child(PREPARED + program, CUDA_LAUNCH_BLOCKING="1")
    check_told(found)
    assert found["op"] == "norm.rmsnorm"


# ------------------------------------------------- errors that are not sticky, in this process


def left() -> int:
    return int(of_loader.load_cudart()[0].cudaGetLastError())


def test_a_gpu_that_is_not_there_leaves_nothing(rng, to_gpu, stream):
    """Calls for cuda:99, ours and the tests' own: the next kernel is not blamed for them."""
    left()
    there = fi_ffi.TensorDesc(1 << 20, (8, 512), "float16", device="cuda:99")
    weight = fi_ffi.TensorDesc(1 << 21, (512,), "float16", device="cuda:99")
    for action in (
        lambda: of_loader.make_current(99),
        lambda: of_loader.capability(99),
        lambda: fi_ffi.rmsnorm(there, there, weight, stream=stream),
        lambda: cuda.allocate(64, fi_ffi.parse_device("cuda:99")),
    ):
        # Of several GPUs it is known that the stream is another's.
        refusals = (fi_ffi.LoaderError, fi_ffi.KernelError, fi_ffi.ArgumentError)
        with pytest.raises(refusals) as caught:
            action()
        assert not isinstance(caught.value, fi_ffi.DeviceError)
        assert left() == 0
    with pytest.raises(CudaError, match="cudaErrorInvalidDevice"):
        DeviceArray(np.zeros(4, np.float32), device=99)
    assert left() == 0 and int(runtime.cudaGetLastError()[0]) == 0
    assert int(runtime.cudaGetDevice()[1]) == 0
    works(rng, to_gpu, stream)


def works(rng, to_gpu, stream) -> None:
    case = make_case(OPS["rmsnorm"].row, {"n": 9, "h": 512}, {"T": "float16"}, rng)
    arrays = {name: to_gpu(array) for name, array in case.arrays.items()}
    fi_ffi.rmsnorm(**{name: array.desc() for name, array in arrays.items()}, stream=stream)
    assert case.error("out", arrays["out"].get())[1] <= 1


def test_somebody_else_s_leftover_is_named(rng, to_gpu, stream):
    """mhc_post asks for the last error after its launch; it ran, and the next call is fine."""
    entry = module("mhc").mhc_post
    tokens, hidden = 5, 1280
    x = rng.standard_normal((tokens, hidden)).astype(BF16)
    residual = rng.standard_normal((tokens, 4, hidden)).astype(BF16)
    post = rng.uniform(-2, 2, (tokens, 4)).astype(np.float32)
    comb = rng.uniform(-1, 1, (tokens, 4, 4)).astype(np.float32)
    out = to_gpu(poisoned((tokens, 4, hidden), BF16))
    args = [array.desc() for array in (out, *map(to_gpu, (x, residual, post, comb)))]
    entry(*args, stream=stream)
    assert of_loader.load_cudart()[0].cudaSetDevice(99) == 101  # somebody, and nobody asked
    with pytest.raises(fi_ffi.KernelError, match="cudaErrorInvalidDevice is not an error") as found:
        entry(*args, stream=stream)
    assert type(found.value) is fi_ffi.KernelError
    assert "another CUDA call of this thread failed before" in str(found.value)
    assert left() == 0
    entry(*args, stream=stream)
    expected, magnitude = mhc_post(x, residual, post, comb)
    got = out.get()
    bound = rounded(BF16, expected) + 2.0**-16 * magnitude
    assert worst(got, expected, bound) <= 1


def test_a_launcher_that_would_end_the_process(machine, rng):
    """Over somebody else's leftover: it is not called, and the next call is right."""
    case = video_case(rng)
    placed = {name: machine.place(array) for name, array in case.arrays.items()}
    descs = {name: array.desc() for name, array in placed.items()}
    op = OPS["fused_qk_rmsnorm_rope"]
    machine.need("norm")
    assert of_loader.load_cudart()[0].cudaSetDevice(99) == 101
    with pytest.raises(fi_ffi.KernelError, match="CUDA error 101 was left .* was not called"):
        op(**descs, **case.scalars, stream=machine.stream)
    for name in case.expected:
        assert placed[name].get().tobytes() == case.arrays[name].tobytes()
    op(**descs, **case.scalars, stream=machine.stream)
    assert max(case.error(name, placed[name].get())[1] for name in case.expected) <= 1


def test_an_event_that_is_not_done_leaves_nothing(to_gpu, stream):
    size = 1 << 30
    big = [check(runtime.cudaMalloc(size)) for _ in range(2)]
    kind = runtime.cudaMemcpyKind.cudaMemcpyDeviceToDevice
    for _ in range(50):  # about 30 ms
        check(runtime.cudaMemcpyAsync(big[0], big[1], size, kind, stream))
    event = cuda.Event()
    event.record(stream)
    assert not event.is_done()
    assert left() == 0
    event.wait()
    assert event.is_done()
    for pointer in big:
        check(runtime.cudaFree(pointer))


def test_a_graph_that_cannot_be_changed_leaves_nothing(rng, to_gpu, stream):
    case = make_case(OPS["rmsnorm"].row, {"n": 9, "h": 512}, {"T": "float16"}, rng)
    descs = {name: to_gpu(array).desc() for name, array in case.arrays.items()}
    with fi_ffi.capture(stream) as graph:
        fi_ffi.rmsnorm(**descs)
    with fi_ffi.capture(stream, into=graph):
        fi_ffi.rmsnorm(**descs)
        fi_ffi.rmsnorm(**descs)
    assert graph.updates == 0
    assert left() == 0


def test_a_kernel_s_own_error_leaves_nothing(rng, to_gpu, stream):
    op = OPS["fused_add_rmsnorm"]
    case = make_case(op.row, {"n": 2, "h": 65536}, {"T": "float16"}, rng)
    descs = [to_gpu(array).desc() for array in case.arrays.values()]
    with pytest.raises(fi_ffi.KernelError, match="FusedAddRMSNorm failed") as caught:
        op(*descs, stream=stream)
    assert type(caught.value) is fi_ffi.KernelError
    assert left() == 0
    works(rng, to_gpu, stream)


def test_memory_that_is_not_there_leaves_nothing(rng, to_gpu, stream):
    with pytest.raises(fi_ffi.KernelError, match="CUDA error 2 .out of memory.") as caught:
        cuda.allocate(1 << 46, fi_ffi.parse_device("cuda:0"))
    assert type(caught.value) is fi_ffi.KernelError
    assert left() == 0
    works(rng, to_gpu, stream)
