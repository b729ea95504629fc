"""Kernels that fail in any way at all: a `KernelError`, in time linear in its words."""

from __future__ import annotations

import pytest

from tests.stress.abi_abuse.lab import Results, cases_of

MODULE = "tests.stress.abi_abuse.errors"
RESULTS = Results(MODULE)


@pytest.mark.parametrize("name", cases_of(MODULE))
def test_errors(name: str) -> None:
    RESULTS.check(name)
