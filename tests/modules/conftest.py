"""Libraries compiled by the tests against the pinned TVM-FFI's headers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import fi_ffi
from fi_ffi.modules import Module

from tests.helpers import compiler
from tests.helpers.pinned import (
    pinned_wheel,
    testing_library,
    tvm_ffi_loaded,
)

__all__ = ["pinned_wheel", "testing_library", "tvm_ffi_loaded"]

HERE = Path(__file__).parent


def compiled(source: str, *options: str) -> Path:
    """A library of a source beside this file."""
    return compiler.compiled(HERE / source, *options)


@pytest.fixture(scope="session")
def compile_library() -> Callable[..., Path]:
    return compiled


@pytest.fixture(scope="session")
def every() -> Module:
    """every_kind.cc: a function for every kind of parameter and result."""
    return fi_ffi.module(compiled("every_kind.cc"))


@pytest.fixture
def by_hand() -> Module:
    """by_hand.c: functions that tell no signature, and would crash if they were asked."""
    return fi_ffi.module(compiled("by_hand.c"))
