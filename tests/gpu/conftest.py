"""GPU tests: real kernels, named by FI_FFI_KERNELS, on the first GPU."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import fi_ffi

from attention.machines import Gpu

HERE = Path(__file__).parent


def pytest_configure(config: pytest.Config) -> None:
    """Note which entries are called, where results are kept: for docs/coverage.md."""
    if os.environ.get("FI_FFI_RUN_GPU_TESTS") == "1" and os.environ.get("OUT"):
        from calling import Calls

        calls = Calls(Path(os.environ["OUT"]) / "entries-called.json")
        calls.watch()
        config.pluginmanager.register(calls)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.environ.get("FI_FFI_RUN_GPU_TESTS") == "1":
        return
    skip = pytest.mark.skip(reason="needs a GPU: set FI_FFI_RUN_GPU_TESTS=1 and FI_FFI_KERNELS")
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(skip)


@pytest.fixture(scope="session", autouse=True)
def kernels() -> None:
    """Every op takes the form of the kernels' release, before a case is made for it."""
    if os.environ.get("FI_FFI_RUN_GPU_TESTS") == "1":
        fi_ffi.use_kernels(os.environ["FI_FFI_KERNELS"])


@pytest.fixture
def rng() -> np.random.Generator:
    seed = int.from_bytes(os.urandom(8), "little")
    print(f"seed {seed}")  # shown with a failure
    return np.random.default_rng(seed)


@pytest.fixture
def to_gpu() -> Iterator[Callable]:
    """Copies host arrays to the GPU, freed after the test."""
    from fi_ffi.cli.cuda import DeviceArray

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
    from cuda.bindings import runtime

    from fi_ffi.cli.cuda import check

    flags = runtime.cudaStreamNonBlocking
    made = check(runtime.cudaStreamCreateWithFlags(flags))
    yield int(made)
    check(runtime.cudaStreamSynchronize(made))
    check(runtime.cudaStreamDestroy(made))


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
