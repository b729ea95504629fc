"""Engines for the tests of examples/llm; tests/gpu/test_llm.py has the same on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.llm.serving import Serving


@pytest.fixture
def where() -> str:
    return "cpu"


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
