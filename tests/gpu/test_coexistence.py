"""fi_ffi with torch, cupy, jax, tvm_ffi and flashinfer in one process, each calling kernels."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from fi_ffi.loader import search

from tests.helpers import coexistence, kernels, sampling
from tests.helpers.stress_strength import scaled

NAMES = ("fi_ffi", "torch", "cupy", "jax", "tvm_ffi", "flashinfer")
MISSING = coexistence.missing(NAMES)
if "flashinfer" not in MISSING and sampling.ON_GPU:
    # It asks for many packages; one that is not there is its own matter.
    done = subprocess.run(
        [sys.executable, "-c", "import flashinfer"], capture_output=True, text=True
    )
    if done.returncode:
        MISSING["flashinfer"] = f"flashinfer is not importable: {done.stderr.splitlines()[-1]}"
ORDERS = coexistence.orders([name for name in NAMES if name not in MISSING], scaled(60, 2))
AT_A_TIME = 4

# What FlashInfer asks where its compiled kernels are: the very file that fi_ffi uses.
PACKAGE = """
__version__ = "0.6.13"


def get_jit_cache_dir():
    return {folder!r}
"""


@pytest.fixture(scope="module")
def norm() -> Path:
    kernels.need("norm")
    return search.find_module("norm", 0)[1].path


@pytest.fixture(scope="module")
def environment(norm: Path, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, str]:
    folder = tmp_path_factory.mktemp("coexistence")
    (folder / "jit" / "norm").mkdir(parents=True)
    (folder / "jit" / "norm" / "norm.so").symlink_to(norm)
    package = folder / "site" / "flashinfer_jit_cache"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(PACKAGE.format(folder=str(folder / "jit")))
    return {
        "PYTHONPATH": str(folder / "site"),
        "FLASHINFER_WORKSPACE_BASE": str(folder),
        "FLASHINFER_DISABLE_VERSION_CHECK": "1",
        "FLASHINFER_USE_CUDA_NORM": "1",  # and not the one in CuTe's language
        "TVM_FFI_DISABLE_TORCH_C_DLPACK": "1",  # which would be compiled
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    }


@pytest.fixture(scope="module")
def running(norm: Path, environment: Mapping[str, str]) -> Iterator[dict[str, Future[list[str]]]]:
    """All orders, some at a time: most of it is imports."""
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        yield {
            order: pool.submit(coexistence.check, order, "gpu", norm, environment)
            for order in ORDERS
        }


@pytest.mark.parametrize("order", ORDERS)
def test_in_order(order: str, running: dict[str, Future[list[str]]]) -> None:
    assert running[order].result(timeout=570) == [*order.split(), "all"]


@pytest.mark.parametrize("name", NAMES)
def test_who_is_here(name: str) -> None:
    """What is not says so."""
    if name in MISSING:
        pytest.skip(MISSING[name])
    assert any(name in order.split() for order in ORDERS)
