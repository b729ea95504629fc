"""Kernels that return anything at all: decoded, or refused with `AbiError`; nothing leaks."""

from __future__ import annotations

import pytest

from tests.stress.abi_abuse.lab import Results, cases_of

MODULE = "tests.stress.abi_abuse.returns"
RESULTS = Results(MODULE)


@pytest.mark.parametrize("name", cases_of(MODULE))
def test_returns(name: str) -> None:
    RESULTS.check(name)
