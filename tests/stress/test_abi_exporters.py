"""Tensors of other libraries with silly fields: refused before anything is read by them."""

from __future__ import annotations

import pytest

from tests.stress.abi_abuse.lab import Results, cases_of

MODULE = "tests.stress.abi_abuse.exporters"
RESULTS = Results(MODULE)


@pytest.mark.parametrize("name", cases_of(MODULE))
def test_exporters(name: str) -> None:
    RESULTS.check(name)
