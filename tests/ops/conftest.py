"""An op whose kernel does what a test says."""

from __future__ import annotations

import pytest

from fi_ffi import reference
from fi_ffi.reference import norm

from prepared_calls import Mine


@pytest.fixture
def mine(monkeypatch):
    made = Mine()
    name = made.row.name
    monkeypatch.setitem(norm.KERNELS, name, made.kernel)
    # What was registered for another test's kernel is not this one's.
    for key in [key for key in reference._entries if key[1] == name]:
        del reference._entries[key]
    return made
