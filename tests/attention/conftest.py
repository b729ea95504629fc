"""Fixtures of the attention tests on the CPU; those of tests/gpu make a `Gpu` instead."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.attention.machines import Cpu
from tests.attention.prepared import on_each


@pytest.fixture
def machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cpu]:
    yield from on_each(getattr(request, "param", "cpu"), monkeypatch)
