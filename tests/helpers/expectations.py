"""A test that passes without an `assert` reached or an error expected fails: it checks nothing.

What is reached in modules beside the tests counts too.  It is counted by a statement before each
`assert` that pytest rewrites anyway, by `pytest.raises` and `pytest.warns`, and numpy's own
assertions.
"""

from __future__ import annotations

import ast
import functools
import sys
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from _pytest.assertion import rewrite

HELPERS = Path(__file__).resolve().parent
TESTS = HELPERS.parent
_reached = 0


def note() -> None:
    """An expectation was reached."""
    global _reached
    _reached += 1


class _Noting(rewrite.AssertionRewriter):
    """Rewrites `assert` as pytest does, with a note before it."""

    def visit_Assert(self, assert_: ast.Assert) -> list[ast.stmt]:
        (noted,) = ast.parse("NAME.note_expectation()").body
        noted.value.func.value = ast.Name("@pytest_ar", ast.Load())  # type: ignore[attr-defined]
        for node in ast.walk(noted):
            ast.copy_location(node, assert_)
        return [noted, *super().visit_Assert(assert_)]


def _noted(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def noting(*args: Any, **kwargs: Any) -> Any:
        note()
        return function(*args, **kwargs)

    return noting


def install() -> None:
    """Count from the next module on that is imported."""
    rewrite.AssertionRewriter = _Noting  # type: ignore[misc]
    rewrite.note_expectation = note  # type: ignore[attr-defined]
    # What pytest has compiled without notes is left alone.
    rewrite.PYC_TAIL = "-noted" + rewrite.PYC_TAIL
    from tests.helpers import remains

    pytest.raises, pytest.warns = _noted(remains.watched(pytest.raises)), _noted(pytest.warns)
    for name in ("assert_allclose", "assert_array_equal", "assert_equal"):
        setattr(np.testing, name, _noted(getattr(np.testing, name)))
    folders = (path for path in TESTS.iterdir() if path.is_dir() and path != HELPERS)
    names = {f"tests.{path.name}" for path in folders}
    names |= {f"{__package__}.{path.stem}" for path in HELPERS.iterdir()}
    pytest.register_assert_rewrite(*names.difference(sys.modules))


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, Any, Any]:
    """Fail a test that has returned and expected nothing."""
    before = _reached
    result = yield
    if _reached == before:
        pytest.fail("it asserts nothing and expects no error", pytrace=False)
    return result
