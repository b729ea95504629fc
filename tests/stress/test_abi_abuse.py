"""Kernels, callbacks and exporters that do anything at all: decoded, told or refused; no leaks.

The cases are in abi_abuse, by what they are of; a process of its own has those of each file.
"""

from __future__ import annotations

import pytest

from tests.stress.abi_abuse.lab import cases_of, results

OF = {
    "callbacks": "Python functions that kernels call, whatever they raise, return or are given",
    "errors": "kernels that fail in any way at all, in time linear in their words",
    "exporters": "tensors of other libraries with silly fields, before anything is read by them",
    "returns": "kernels that return anything at all",
}
CASES = [(of, name) for of in OF for name in cases_of(f"tests.stress.abi_abuse.{of}")]


@pytest.mark.parametrize(("of", "name"), CASES)
def test_abuse(of: str, name: str) -> None:
    problem = results(f"tests.stress.abi_abuse.{of}")[name]
    assert problem is None, problem
