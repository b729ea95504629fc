"""GPU tests: real kernels, named by FI_FFI_KERNELS, on the first GPU."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from cuda.bindings import driver, runtime

import fi_ffi
from fi_ffi.abi._cffi import ffi
from fi_ffi.cli.cuda import DeviceArray, check

from tests.attention.machines import Gpu
from tests.helpers.stress_strength import IS_SANITIZED

HERE = Path(__file__).parent

# Under compute-sanitizer, which lets one kernel run after another and each slowly.
_AT_ONCE = "needs kernels of several streams that run at once"
_NOT_SANITIZED = {
    "test_call_log.py::test_a_kernel_that_crashes": "reads what is not there on purpose",
    "test_threads_stress.py::test_exits_with_all_alive": "takes minutes: threads launch to the end",
    "test_threads_stress.py::test_calls_release_the_gil": _AT_ONCE,
    "test_untyped_rest.py::test_bgmv_moe_is_on_the_default_stream": _AT_ONCE,
}


def pytest_configure(config: pytest.Config) -> None:
    """Every op takes the form of the kernels' release, before a case is made for it; and which
    entries are called is noted, where results are kept: for docs/coverage.md."""
    if os.environ.get("FI_FFI_RUN_GPU_TESTS") == "1":
        fi_ffi.use_kernels(os.environ["FI_FFI_KERNELS"])
    if os.environ.get("FI_FFI_RUN_GPU_TESTS") == "1" and os.environ.get("OUT"):
        from tests.helpers.calling import Calls

        calls = Calls(Path(os.environ["OUT"]))
        calls.watch()
        config.pluginmanager.register(calls)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.environ.get("FI_FFI_RUN_GPU_TESTS") == "1":
        if IS_SANITIZED:
            _leave_out(items)
        return
    skip = pytest.mark.skip(reason="needs a GPU: set FI_FFI_RUN_GPU_TESTS=1 and FI_FFI_KERNELS")
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(skip)


def _leave_out(items: list[pytest.Item]) -> None:
    for item in items:
        reasons = [reason for name, reason in _NOT_SANITIZED.items() if name in item.nodeid]
        if "gate" in getattr(item, "fixturenames", ()):
            reasons.append(_AT_ONCE)
        for reason in reasons:
            item.add_marker(pytest.mark.skip(reason=f"under compute-sanitizer: {reason}"))


@pytest.fixture
def to_gpu() -> Iterator[Callable]:
    """Copies host arrays to the GPU, freed after the test."""
    made = []

    def copy(host: np.ndarray, **options: int) -> DeviceArray:
        made.append(DeviceArray(host, **options))
        return made[-1]

    yield copy
    for array in made:
        array.free()


@pytest.fixture
def stream() -> Iterator[int]:
    """A stream that does not wait for the default one."""
    flags = runtime.cudaStreamNonBlocking
    made = check(runtime.cudaStreamCreateWithFlags(flags))
    yield int(made)
    check(runtime.cudaStreamSynchronize(made))
    check(runtime.cudaStreamDestroy(made))


@pytest.fixture
def streams(stream: int) -> Iterator[tuple[int, int]]:
    """Two streams that wait for no other."""
    other = check(runtime.cudaStreamCreateWithFlags(runtime.cudaStreamNonBlocking))
    yield stream, int(other)
    check(runtime.cudaStreamSynchronize(other))
    check(runtime.cudaStreamDestroy(other))


class Gate:
    """A word of host memory; a stream that waits for a number there is stuck until it has it.

    While one is, nothing may be called that waits for the device, or that loads a kernel.
    """

    def __init__(self) -> None:
        flags = runtime.cudaHostAllocPortable | runtime.cudaHostAllocMapped
        self.address = int(check(runtime.cudaHostAlloc(4096, flags)))
        memory = ffi.buffer(ffi.cast("char *", self.address), 4)
        self.word = memoryview(memory).cast("B").cast("I")
        self.word[0] = 0

    def hold(self, stream: int, number: int = 1) -> None:
        """Let a stream wait until the word is so much or more."""
        check(driver.cuStreamWaitValue32(stream, self.address, number, 0))

    def open(self, number: int = 2**30) -> None:
        self.word[0] = number


@pytest.fixture
def gate(to_gpu, stream) -> Iterator[Gate]:
    """Opened before the other fixtures synchronise with anything."""
    made = Gate()
    yield made
    made.open()
    check(runtime.cudaDeviceSynchronize())
    check(runtime.cudaFreeHost(made.address))


@pytest.fixture
def machine(to_gpu, stream) -> Iterator[Gpu]:
    made = Gpu(to_gpu, stream)
    yield made
    made.close()


@pytest.fixture
def sm87_wheel() -> Path:
    """Kernels for a Jetson: what `fi-ffi build --arch 8.7 page` makes."""
    found = sorted(Path(os.environ["FI_FFI_KERNELS"]).parent.glob("*sm87*.whl"))
    if not found:
        pytest.skip("no *sm87*.whl beside FI_FFI_KERNELS: fi-ffi build --arch 8.7 page makes one")
    return found[0]
