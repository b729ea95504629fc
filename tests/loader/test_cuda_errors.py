"""Failed CUDA calls: nothing is left for others to find, and a lost GPU is told as what it is.

The real runtime serves as far as it goes: without a GPU its calls fail, and leave an error.
What a GPU would answer is pretended.
"""

from __future__ import annotations

import functools
from typing import ClassVar

import pytest

import fi_ffi
from fi_ffi import graphs
from fi_ffi.abi import failure
from fi_ffi.abi._cffi import ffi
from fi_ffi.loader import cuda_errors, machine
from fi_ffi.ops.call import cuda
from fi_ffi.ops.functions import OPS

INVALID_DEVICE, NOT_READY, ILLEGAL, UPDATE_FAILED = 101, 600, 700, 910
WORDS = {
    INVALID_DEVICE: b"invalid device ordinal",
    NOT_READY: b"device not ready",
    ILLEGAL: b"an illegal memory access was encountered",
}


class Watched:
    """The real runtime, and whether a failed call has left an error that nobody asked for.

    Without a driver the runtime gives the same error for ever, asked for or not.
    """

    def __init__(self, runtime):
        self._runtime, self.is_left, self.failures = runtime, False, 0

    def __getattr__(self, name):
        function = getattr(self._runtime, name)

        def call(*args):
            code = function(*args)
            if name == "cudaGetLastError":
                self.is_left = False
            elif name != "cudaGetErrorString" and code:
                self.is_left, self.failures = True, self.failures + 1
            return code

        return call


@pytest.fixture
def real(monkeypatch):
    """The CUDA runtime, on a machine where all it has to say is that there is no GPU."""
    try:
        runtime, path = machine.load_cudart()
    except fi_ffi.LoaderError as error:
        pytest.skip(str(error))
    if runtime.cudaSetDevice(0) == 0:
        pytest.skip("there is a GPU: see tests/gpu/test_device_errors.py")
    watched = Watched(runtime)
    monkeypatch.setattr(machine, "load_cudart", lambda: (watched, path))
    return watched


FAILING = {
    "make_current": lambda: machine.make_current(0),
    "event": cuda.Event,
    "copy": lambda: cuda.copy_to_device(64, 64, 4, 0),
    "is_capturing": lambda: cuda.is_capturing(0),
    "allocate": lambda: cuda.allocate(64, fi_ffi.parse_device("cuda:0")),
    "page-locked": lambda: cuda.allocate_page_locked(64, fi_ffi.parse_device("cuda:0")),
    "capture": lambda: graphs.capture(16).__enter__(),
}


@pytest.fixture
def asked(monkeypatch):
    """How often cuda-python's runtime, which has a last error too, was asked for it."""
    from cuda.bindings import runtime

    found: list[int] = []
    monkeypatch.setattr(runtime, "cudaGetLastError", lambda: found.append(1))
    return found


@pytest.mark.parametrize("name", FAILING)
def test_nothing_is_left_of_a_failed_call(name, real, asked):
    with pytest.raises(fi_ffi.LoaderError, match="there is no cuda:0: this process sees 0 GPUs"):
        FAILING[name]()
    assert real.failures == 1 and not real.is_left and asked


def test_nothing_is_left_of_a_mode_that_cannot_be_set(real, asked):
    """The calls in it say what fails."""
    with cuda.relaxed():
        assert real.failures == 1 and not real.is_left and asked
    assert not real.is_left


def test_nothing_is_left_of_a_failed_call_of_cuda_python(real, asked):
    import numpy as np

    from fi_ffi.cli.cuda import CudaError, DeviceArray

    with pytest.raises(CudaError, match=r"^cudaError_t\.cudaError(InsufficientDriver|NoDevice)$"):
        DeviceArray(np.zeros(4, np.float32))
    assert asked and not real.failures


def test_a_failed_call_says_what_cuda_says(real):
    """A machine without a GPU is told as such, whatever failed."""
    code = 1  # cudaErrorInvalidValue
    with pytest.raises(fi_ffi.KernelError) as caught:
        cuda.check(code, "cudaSetDevice")
    words = ffi.string(real.cudaGetErrorString(code)).decode()
    assert str(caught.value) == f"cudaSetDevice: RuntimeError: CUDA error {code} ({words})"
    assert not isinstance(caught.value, fi_ffi.DeviceError)
    with pytest.raises(fi_ffi.LoaderError, match="there is no cuda:0: this process sees 0 GPUs"):
        cuda.check(real.cudaSetDevice(0), "cudaSetDevice")


class Runtime:
    """A runtime whose calls end in one code, with the last error of a thread."""

    def __init__(self, code, left=0):
        self.code, self.left = code, left
        self.queries, self.mode, self.error = 0, 0, None

    def __getattr__(self, name):
        if not name.startswith("cuda"):
            raise AttributeError(name)
        return self._fail

    def _fail(self, *_):
        self.left = self.code or self.left
        return self.code

    def cudaGetLastError(self):
        code, self.left = self.left, 0
        return code

    def cudaGetErrorString(self, code):
        self._text = ffi.new("char[]", WORDS.get(code, b"something else"))
        return self._text

    def cudaThreadExchangeStreamCaptureMode(self, mode):
        mode[0], self.mode = self.mode, mode[0]
        return 0

    def cudaStreamQuery(self, stream):
        assert int(ffi.cast("uintptr_t", stream)) == 2, "no stream that may be recording"
        assert self.mode == 2, "asked where that may end a recording"
        self.queries += 1
        if self.error is not None:
            raise self.error
        return self._fail()

    def cudaStreamIsCapturing(self, stream, status):
        status[0] = 0
        # Of a stream that is asked about by a caller; of the own, it is not known to tell.
        return 0 if int(ffi.cast("uintptr_t", stream)) == 2 else self._fail()


@pytest.fixture
def pretended(monkeypatch):
    """Puts a pretended runtime in place."""

    installed = []

    def install(code, left=0, has_context=True):
        runtime = Runtime(code, left)
        installed.append(runtime)
        monkeypatch.setattr(machine, "load_cudart", lambda: (runtime, "a pretended one"))
        monkeypatch.setattr(machine, "thread", machine._Thread())
        monkeypatch.setattr(failure, "examine", machine.root_cause)
        if has_context:
            machine.thread.bound.add(0)
        return runtime

    yield install
    assert all(runtime.mode == 0 for runtime in installed), "the thread's capture mode is left"


def is_told(error, op):
    assert (error.op, error.kind, error.code) == (op, "cudaErrorIllegalAddress", ILLEGAL)
    assert isinstance(error, fi_ffi.KernelError)
    assert not isinstance(error, ValueError), "no argument of this call is at fault"
    for part in ("new process", "compute-sanitizer", "CUDA_LAUNCH_BLOCKING=1", "fi_ffi.call_log"):
        assert part in str(error)


CALLS = {
    "cudaEventQuery": lambda: made_event().is_done(),
    "event": lambda: made_event().record(0),
    "cudaEventSynchronize": lambda: made_event().wait(),
    "cudaStreamWaitEvent": lambda: made_event().make_wait(0),
    "cudaMemcpyAsync": lambda: cuda.copy_to_device(64, 64, 4, 0),
    "stream": lambda: cuda.is_capturing(0),
    "cudaSetDevice": lambda: machine.make_current(1),
    "cudaStreamBeginCapture": lambda: graphs.capture(16).__enter__(),
}


def made_event():
    event = object.__new__(cuda.Event)
    event._runtime = machine.load_cudart()[0]
    event._handle = ffi.NULL
    return event


@pytest.mark.parametrize("op", CALLS)
def test_a_lost_gpu_is_noticed_by_every_call(op, pretended, monkeypatch):
    runtime = pretended(ILLEGAL)
    monkeypatch.setattr(machine, "device_count", lambda: 2)
    if op == "cudaStreamBeginCapture":  # as `cuda.current` asks first
        runtime.cudaGetDevice = lambda index: index.__setitem__(0, 0) or 0
        runtime.cudaStreamGetId = lambda _, number: number.__setitem__(0, 1) or 0
    with pytest.raises(fi_ffi.DeviceError) as caught:
        CALLS[op]()
    is_told(caught.value, op)
    assert runtime.left == 0


def test_an_event_that_is_not_done_leaves_nothing(pretended):
    runtime = pretended(NOT_READY)
    assert not made_event().is_done()
    assert runtime.left == 0, "the next kernel's launcher would take it for its own"


def test_what_is_given_back_leaves_nothing(pretended):
    runtime = pretended(ILLEGAL)
    cuda.at_end_of(runtime, functools.partial(runtime.cudaEventDestroy, ffi.NULL))()
    assert runtime.left == 0


class OfStream(Runtime):
    """Tells a stream's device, and that it is capturing."""

    def __init__(self, code, is_capturing):
        super().__init__(code)
        self.is_capturing, self.asked = is_capturing, []

    def cudaStreamIsCapturing(self, stream, status):
        assert int(ffi.cast("uintptr_t", stream)) == 0x51
        status[0] = self.is_capturing
        return self._fail()

    def cudaStreamGetDevice(self, stream, device):
        self.asked.append(int(ffi.cast("uintptr_t", stream)))
        device[0] = 3
        return 0


@pytest.mark.parametrize(
    ("code", "is_capturing", "device"),
    [(0, 0, 3), (0, 1, None), (INVALID_DEVICE, 0, None), (ILLEGAL, 0, None)],
)
def test_the_device_of_a_stream(code, is_capturing, device, monkeypatch):
    """It is asked for where that does no harm."""
    runtime = OfStream(code, is_capturing)
    monkeypatch.setattr(machine, "load_cudart", lambda: (runtime, "a pretended one"))
    if code == ILLEGAL:
        with pytest.raises(fi_ffi.DeviceError) as caught:
            machine.device_of_stream(0x51)
        is_told(caught.value, "the device of a stream")
    else:
        assert machine.device_of_stream(0x51) == device
    assert runtime.asked == [0x51] * (device is not None) and runtime.left == 0


def test_the_device_of_a_stream_of_an_old_runtime(monkeypatch):
    """Before CUDA 12.8 nothing is asked."""
    monkeypatch.setattr(machine, "load_cudart", lambda: (object(), "an old one"))
    assert machine.device_of_stream(0x51) is None


def kernel_error(message):
    return fi_ffi.KernelError("mhc.mhc_post", "RuntimeError", message, "frames")


def test_a_stale_error_is_named_and_forgotten(pretended):
    runtime = pretended(0, left=INVALID_DEVICE)
    blamed = kernel_error("mhc_post kernel launch failed with error code invalid device ordinal")
    found = machine.root_cause(blamed)
    assert type(found) is fi_ffi.KernelError and found.message.startswith(blamed.message)
    assert "cudaErrorInvalidDevice is not an error of a launch" in found.message
    assert (found.op, found.kind, found.backtrace) == (blamed.op, blamed.kind, "frames")
    assert runtime.left == 0


def test_a_kernel_s_own_error_stays_itself(pretended):
    """What its launch left behind is forgotten: the next launcher may ask for it."""
    runtime = pretended(0, left=1)
    own = kernel_error("FusedAddRMSNorm failed with error invalid argument")
    assert machine.root_cause(own) is own
    assert (runtime.left, runtime.queries) == (0, 1)


@pytest.mark.parametrize("left", [ILLEGAL, 0], ids=["left", "asked for"])
def test_a_lost_gpu_behind_a_kernel_s_error(left, pretended):
    runtime = pretended(ILLEGAL, left=left)
    own = kernel_error("run failed")
    found = machine.root_cause(own)
    assert isinstance(found, fi_ffi.DeviceError)
    is_told(found, "mhc.mhc_post")
    assert found.__cause__ is own, "the kernel's words are kept"
    assert runtime.queries == (0 if left else 1) and runtime.left == 0
    assert machine.root_cause(found) is found


def test_an_interrupt_of_the_question_leaves_the_capture_mode(pretended):
    runtime = pretended(0)
    runtime.error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        machine.root_cause(kernel_error("run failed"))
    assert (runtime.mode, runtime.queries) == (0, 1)


def test_a_thread_without_a_context_gets_none_by_asking(pretended):
    runtime = pretended(ILLEGAL, has_context=False)
    own = kernel_error("run failed")
    assert machine.root_cause(own) is own
    assert runtime.queries == 0


def test_a_device_that_is_not_there(pretended, monkeypatch):
    """What began it: cuda:1 on a machine with one GPU."""
    runtime = pretended(INVALID_DEVICE)
    monkeypatch.setattr(machine, "_device_count", 1)
    machine._attribute.cache_clear()
    with pytest.raises(fi_ffi.LoaderError, match="there is no cuda:1: this process sees 1 GPU"):
        machine.capability(1)
    assert runtime.left == 0
    with pytest.raises(fi_ffi.LoaderError, match="there is no cuda:1: this process sees 1 GPU"):
        machine.make_current(1)
    assert runtime.left == 0


class Exporter:
    """A tensor whose owner's own CUDA call fails."""

    __cuda_array_interface__: ClassVar = {"data": (64, False), "shape": (2,), "typestr": "<f4"}


def test_no_argument_is_blamed_for_a_lost_gpu(monkeypatch):
    driver = pytest.importorskip("cuda.bindings.driver", reason="cuda-python is not installed")
    error = driver.CUresult.CUDA_ERROR_ILLEGAL_ADDRESS
    monkeypatch.setattr(driver, "cuInit", lambda flags: (0,))
    monkeypatch.setattr(driver, "cuPointerGetAttribute", lambda *_: (error, 0))
    with pytest.raises(fi_ffi.DeviceError):
        fi_ffi.as_desc(Exporter(), "rmsnorm", "input")


def test_a_kernel_that_fails_is_examined(monkeypatch):
    """Typed calls, repeated ones, prepared ones and entries: on a GPU, and not on the CPU."""
    import numpy as np

    seen: list[str] = []

    def examine(error):
        seen.append(error.op)
        return failure.lost(error.op, ILLEGAL)

    monkeypatch.setattr(failure, "examine", examine)
    x, weight = np.ones((4, 64), np.float16), np.ones(64, np.float16)
    call = OPS["rmsnorm"].prepare(np.empty_like(x), x, weight)
    frame = call.take()
    call.give(frame)
    frame.invoke = lambda: -1
    with pytest.raises(fi_ffi.KernelError) as caught:
        call()
    assert type(caught.value) is fi_ffi.KernelError and not seen, "the CPU asks no GPU"
    with pytest.raises(fi_ffi.DeviceError):
        failure.check_kernel(-1, "norm.rmsnorm")
    assert seen == ["norm.rmsnorm"]


def test_a_launcher_that_would_end_the_process_is_not_called():
    called, runtime = [], Runtime(0, left=INVALID_DEVICE)

    def call(*args):
        called.append(args)
        return 0

    assert cuda_errors.guard_abort("rmsnorm", call, lambda: runtime) is call
    guarded = cuda_errors.guard_abort("fused_qk_rmsnorm_rope", call, lambda: runtime)
    assert guarded(None, None, 512, None) == 0 and len(called) == 1, "a probe is no launch"
    with pytest.raises(fi_ffi.KernelError, match=r"CUDA error 101 was left .* was not called"):
        failure.check(guarded(None, None, 27, None), "fused_qk_rmsnorm_rope")
    assert len(called) == 1
    assert guarded(None, None, 27, None) == 0 and len(called) == 2, "it is forgotten"
