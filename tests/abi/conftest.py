"""Everything in this folder runs against the real libtvm_ffi."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import Any

import pytest
from hypothesis import settings

from fi_ffi.abi.function import Entry, register
from fi_ffi.abi.signature import Signature

from tests.helpers.pinned import pinned_wheel, testing_library, tvm_ffi_loaded

__all__ = ["callback", "echo", "pinned_wheel", "testing_library", "tvm_ffi_loaded"]

_numbers = count()
settings.register_profile("no deadline", deadline=None)  # other work may have the processors
settings.load_profile("no deadline")


@pytest.fixture(autouse=True)
def _loaded(tvm_ffi_loaded: str) -> None:
    pass


@pytest.fixture
def callback() -> Callable[..., Entry]:
    """Registers a Python function of some number of parameters under a fresh name."""

    def make(function: Callable[..., Any], parameters: int = 1) -> Entry:
        signature = Signature("callback", ("Any",) * parameters, "Any")
        return register(f"fi_ffi.tests.{next(_numbers)}", signature, function)

    return make


@pytest.fixture(scope="session")
def echo(testing_library: object) -> Entry:
    """libtvm_ffi_testing's own C++ function that returns its argument."""
    from fi_ffi.abi.function import global_function

    return global_function("testing.echo")
