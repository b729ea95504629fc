"""fi_ffi with other libraries in one process, in every order that matters; without a GPU."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import pytest

from fi_ffi.loader.kernels import open_source

from tests.helpers import coexistence
from tests.helpers.stress_strength import scaled

NAMES = ("fi_ffi", "numpy", "torch", "tvm_ffi", "flashinfer", "jax")
MISSING = coexistence.missing(NAMES)
HERE = [name for name in NAMES if name not in MISSING]
# All of them with every library there, some 7 s each; CI has room for a few.
ORDERS = coexistence.orders(HERE, scaled(40, 1)) if len(HERE) > 2 else ["fi_ffi numpy"]
TAKEN = ORDERS if scaled(1, 0) else [ORDERS[0], ORDERS[-1]]


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, str]:
    return {
        "FLASHINFER_WORKSPACE_BASE": str(tmp_path_factory.mktemp("flashinfer")),
        "FLASHINFER_DISABLE_VERSION_CHECK": "1",
        "TVM_FFI_DISABLE_TORCH_C_DLPACK": "1",  # which would be compiled
        "JAX_PLATFORMS": "cpu",
    }


@pytest.fixture(scope="module")
def norm() -> Path | None:
    """A kernel file whose own errors are provoked, where one that loads here is named."""
    given = os.environ.get("FI_FFI_TEST_KERNELS")
    return open_source(given).file("norm").path if given else None


@pytest.mark.parametrize("order", TAKEN, ids=map(str, range(len(TAKEN))))
def test_in_order(order: str, environment: Mapping[str, str], norm: Path | None) -> None:
    assert coexistence.check(order, "cpu", norm, environment) == [*order.split(), "all"]


@pytest.mark.parametrize("name", NAMES)
def test_who_is_here(name: str) -> None:
    """What is not says so."""
    if name in MISSING:
        pytest.skip(MISSING[name])
    assert any(name in order.split() for order in ORDERS)
