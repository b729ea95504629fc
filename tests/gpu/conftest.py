"""GPU tests: real kernels, wherever fi_ffi finds them, on the first GPU."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cuda.bindings import driver, runtime

from fi_ffi.abi._cffi import ffi
from fi_ffi.cli.cuda import DeviceArray, check
from fi_ffi.errors import BuildError, LoaderError
from fi_ffi.loader import machine as of_loader
from fi_ffi.loader import search

from tests.attention.machines import Gpu
from tests.helpers import kernels, sampling
from tests.helpers.stress_strength import IS_SANITIZED

# Under compute-sanitizer, which lets one kernel run after another and each slowly.
_AT_ONCE = "needs kernels of several streams that run at once"
_NOT_SANITIZED = {
    "test_call_log.py::test_a_kernel_that_crashes": "reads what is not there on purpose",
    "test_threads_stress.py::test_exits_with_all_alive": "takes minutes: threads launch to the end",
    "test_threads_stress.py::test_calls_release_the_gil": _AT_ONCE,
    "test_untyped_rest.py::test_the_stream_of_bgmv_moe": _AT_ONCE,
}


def pytest_configure(config: pytest.Config) -> None:
    """Ask for a GPU once; and note which entries are called, where results are kept: for
    docs/coverage.md."""
    if sampling.ON_GPU and not config.option.collectonly and not of_loader.device_count():
        raise pytest.UsageError("FI_FFI_RUN_GPU_TESTS=1, and no GPU: `fi-ffi doctor` tells why")
    if sampling.ON_GPU and os.environ.get("OUT"):
        from tests.helpers.calling import Calls

        calls = Calls(Path(os.environ["OUT"]))
        calls.watch()
        config.pluginmanager.register(calls)


def pytest_report_header() -> str:
    return "kernels: FlashInfer {}, by {}".format(*search.decided())


@pytest.hookimpl(wrapper=True)
def _or_skip() -> Generator[None, Any, Any]:
    """Skip a test, or what sets it up, where the kernels at hand have not its module."""
    try:
        return (yield)
    except LoaderError as error:
        kernels.skip_if_missing(error)
        raise


pytest_runtest_setup = pytest_runtest_call = _or_skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items if IS_SANITIZED else ():
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
def sm87_wheel(request: pytest.FixtureRequest) -> Path:
    """Kernels for a Jetson: a wheel beside FI_FFI_KERNELS, or one that is built."""
    given = os.environ.get("FI_FFI_KERNELS")
    found = sorted(Path(given).parent.glob("*sm87*.whl")) if given else []
    if found:
        return found[0]
    try:
        return Path(request.getfixturevalue("built_wheel_sm87"))
    except BuildError as error:  # FlashInfer's sources come from the package index
        pytest.skip(f"no kernels for a Jetson can be built: {str(error).splitlines()[0]}")
