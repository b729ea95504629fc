"""Engines for the tests of examples/llm; tests/gpu/test_llm.py has the same on a GPU."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.llm.process import ServerProcess
from tests.llm.serving import Serving


@pytest.fixture
def where() -> str:
    return "cpu"


@pytest.fixture(scope="module")
def servers() -> Iterator[Any]:
    """`servers(name, where, start)` is one server for all tests, started by the first."""
    made: dict[tuple[str, str], ServerProcess] = {}

    def one(name: str, where: str, start: Callable[[], ServerProcess]) -> ServerProcess:
        if (name, where) not in made:
            made[name, where] = start()
        return made[name, where]

    yield one
    for server in made.values():
        assert server.end(signal.SIGTERM) in (0, -signal.SIGTERM)


@pytest.fixture
def serve(where: str, tmp_path: Path, rng: Any) -> Iterator[Any]:
    """`serve(kind)` makes a checkpoint."""
    made = []

    def make(kind: str, **changes: Any) -> Serving:
        made.append(Serving(where, tmp_path / f"{kind}{len(made)}", kind, rng, **changes))
        return made[-1]

    yield make
    for serving in made:
        for engine in serving.engines:
            engine.close()
