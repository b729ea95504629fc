"""An op whose kernel does what a test says."""

from __future__ import annotations

import numpy as np
import pytest

from fi_ffi import reference
from fi_ffi.abi.streams import current_scope
from fi_ffi.loader import machine as of_loader
from fi_ffi.ops.call.op import Op
from fi_ffi.ops.functions import OPS
from fi_ffi.reference import norm

from tests.attention.machines import Cpu
from tests.attention.pretend import Pretend, current_stream
from tests.helpers.calls import EVERY_CALL
from tests.helpers.prepared_calls import Mine
from tests.helpers.recording import recorded  # noqa: F401


@pytest.fixture
def machine() -> Cpu:
    """Where a test runs; of the same name on a GPU, where many of these tests run as well."""
    return Cpu()


@pytest.fixture
def dtypes(op: Op, rng: np.random.Generator) -> dict[str, str]:
    """One combination of an op's dtypes, another one each time."""
    of_it = [call.values[1] for call in EVERY_CALL if call.values[0] is op]
    chosen: dict[str, str] = of_it[rng.integers(len(of_it))]
    print(f"dtypes {chosen}")  # shown with a failure
    return chosen


@pytest.fixture
def mine(monkeypatch):
    made = Mine()
    name = made.row.name
    monkeypatch.setitem(norm.KERNELS["norm"], name, made.kernel)
    # What was registered for another test's kernel is not this one's.
    for key in [key for key in reference._entries if key[1] == name]:
        del reference._entries[key]
    return made


@pytest.fixture(params=["unsettled", "settled"])
def settled(request):
    """Whether it is known which row of each op is in force: calls start differently."""
    for op in OPS.values():
        op.forget()
        if request.param == "settled":
            op.select_release("0.6.13")
    yield
    for op in OPS.values():
        op.forget()


@pytest.fixture
def gpu(monkeypatch):
    made = Pretend(monkeypatch)
    yield made
    monkeypatch.undo()
    made.forget()
    of_loader.thread.bound.clear()
    assert current_scope() is None
    assert current_stream(0) == current_stream(1) == 0, "a stream was not put back"
