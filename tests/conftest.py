"""Fixtures that more than one room's tests use."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

# Set before numpy is imported.  The tests' products are small: threads of OpenBLAS that wait for
# each other made tests of examples/llm 2.5 times as slow.
os.environ["OPENBLAS_NUM_THREADS"] = "1"

import cffi
import numpy as np
import pytest

from tests.helpers import budgets, expectations, sampling, settled

expectations.install()  # before any module is imported that has an `assert`

from fi_ffi.loader import search  # noqa: E402
from fi_ffi_build.build import build  # noqa: E402

from tests.helpers.compiler import why_not_build  # noqa: E402
from tests.helpers.remains import allowed  # noqa: E402


def keep_freed_memory() -> None:
    """Have glibc keep what is freed: tests with arrays of megabytes took up to five times as long,
    most of it for pages that the system gave anew.
    """
    ffi = cffi.FFI()
    ffi.cdef("int mallopt(int which, int value);")
    with contextlib.suppress(AttributeError):  # another C library
        for which in (-3, -1):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
            ffi.dlopen(None).mallopt(which, 1 << 30)


keep_freed_memory()
pytest_addoption = sampling.add_options
# Commands in a pipe have no width; pytest-xdist gives its processes one.
os.environ.pop("COLUMNS", None)
# A wheel that has at least the modules of `built_wheel`, used instead of building one.
KERNELS = "FI_FFI_TEST_KERNELS"


def pytest_configure(config: pytest.Config) -> None:
    for plugin in (budgets, expectations, sampling, settled):
        config.pluginmanager.register(plugin)


@pytest.fixture
def rng() -> np.random.Generator:
    seed = int.from_bytes(os.urandom(8), "little")
    print(f"seed {seed}")  # shown with a failure
    return np.random.default_rng(seed)


@pytest.fixture
def other_threads() -> Iterator[None]:
    """What is there after a thread's refusal may be of calls that other threads made meanwhile."""
    with allowed(""):
        yield


@pytest.fixture(params=[1, 4, 1000])
def short_writes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """`os.write` takes so many bytes at a time, as the write of a pipe or of a disk may."""
    write, most = os.write, request.param
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, bytes(memoryview(data)[:most])))
    return int(most)


@pytest.fixture
def put_release(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Put a release of FlashInfer in force, as a user does."""

    def put(release: str) -> None:
        monkeypatch.setenv("FI_FFI_RELEASE", release)
        search.decided()

    yield put
    monkeypatch.undo()
    search.decided()


def _build(folder: Path, arch: str, *modules: str) -> Path:
    reason = why_not_build()
    if reason is not None:
        pytest.skip(f"{reason}, so no kernels can be built; {KERNELS} may name a wheel of them")
    # In the usual build folder, where an earlier run has left what it compiled.
    return build(modules, arch=arch, output=folder)


@pytest.fixture(scope="session")
def built_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel with norm, page and the f16, head_dim 128 single_decode, for sm_90a."""
    given = os.environ.get(KERNELS)
    if given:
        return Path(given)
    folder = tmp_path_factory.mktemp("sm90a")
    return _build(folder, "9.0a", "norm", "page", "single_decode")


@pytest.fixture(scope="session")
def built_wheel_sm87(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel with page, for sm_87."""
    return _build(tmp_path_factory.mktemp("sm87"), "8.7", "page")


# Tests that wait most of their time, for processes of Ray: others run beside them.
_FIRST = ("test_ray.py", "test_ranks.py")
_modules = 0


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in _FIRST)


def pytest_collection_finish() -> None:
    """Leave the tests themselves out of collections: with tens of thousands of them, one that a
    test asks for takes a second."""
    global _modules
    gc.collect()
    gc.freeze()
    _modules = len(sys.modules)


def pytest_runtest_setup() -> None:
    """Leave out a large package as well (torch, Ray), which the test before has imported."""
    if len(sys.modules) > _modules + 100:
        pytest_collection_finish()
