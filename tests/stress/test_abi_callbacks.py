"""Python functions that kernels call: what they raise is told, on any thread; nothing escapes."""

from __future__ import annotations

import pytest

from tests.stress.abi_abuse.lab import Results, cases_of

MODULE = "tests.stress.abi_abuse.callbacks"
RESULTS = Results(MODULE)


@pytest.mark.parametrize("name", cases_of(MODULE))
def test_callbacks(name: str) -> None:
    RESULTS.check(name)
