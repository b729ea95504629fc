"""Fixtures of tests/stress/test_gdn.py: on the CPU reference always, in small; on a GPU in full."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator

import pytest

import fi_ffi

from tests.gdn_stress.machines import Cpu, Gpu
from tests.gdn_stress.session import (  # noqa: F401  the hooks are pytest's
    counts,
    pytest_runtest_makereport,
    pytest_terminal_summary,
    pytest_unconfigure,
)

ON_GPU = os.environ.get("FI_FFI_RUN_GPU_TESTS") == "1"
NEEDS_GPU = "needs a GPU: set FI_FFI_RUN_GPU_TESTS=1 and FI_FFI_KERNELS"
MACHINES = ["gpu"] if ON_GPU else ["cpu", pytest.param("gpu", marks=pytest.mark.skip(NEEDS_GPU))]


@pytest.fixture(scope="session")
def kernels() -> None:
    """The op takes the form of the kernels' release, before a case is made for it."""
    if ON_GPU:
        fi_ffi.use_kernels(os.environ["FI_FFI_KERNELS"])


@pytest.fixture(params=MACHINES)
def machine(
    request: pytest.FixtureRequest, kernels: None, record_property: Callable[[str, object], None]
) -> Iterator[Cpu]:
    made = Gpu() if request.param == "gpu" else Cpu()
    made.report = record_property
    start = time.monotonic()
    yield made
    made.close()
    record_property("launches", made.launches)
    did = 1, made.launches, time.monotonic() - start
    counts[request.param] = [sum(both) for both in zip(counts[request.param], did, strict=True)]
