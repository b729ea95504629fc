"""Errors through the gate, in both directions; tests/stress/abi_abuse has those that are odd."""

from __future__ import annotations

import asyncio
import functools
import signal
from collections.abc import Callable
from typing import Any

import pytest

from fi_ffi.abi import values
from fi_ffi.abi.function import Entry, global_function
from fi_ffi.errors import FiFfiError, KernelError


def raising(error: BaseException) -> Callable[..., None]:
    def function(*_: object) -> None:
        raise error

    return function


@pytest.mark.parametrize("error", [OSError(2, "No such file"), RuntimeError(""), KeyError("k")])
def test_exceptions_in_callbacks(error: BaseException, callback: Callable[..., Entry]) -> None:
    entry = callback(raising(error), 0)
    with pytest.raises(KernelError) as caught:
        entry()
    assert (caught.value.op, caught.value.kind) == (entry.name, type(error).__name__)
    assert caught.value.message == str(error)
    assert "raise error" in caught.value.backtrace
    assert isinstance(caught.value, (FiFfiError, RuntimeError))


def timed_out(*_: object) -> None:
    raise TimeoutError("of a signal handler")


class Handler:
    def __call__(self, *_: object) -> None:
        timed_out()

    def method(self, *_: object) -> None:
        timed_out()


HANDLERS = [timed_out, Handler(), Handler().method, functools.partial(timed_out, 1)]


@pytest.mark.parametrize("handler", HANDLERS, ids=lambda handler: type(handler).__name__)
def test_a_signal_s_exception_comes_out_as_itself(
    handler: Any, callback: Callable[..., Entry]
) -> None:
    """It is nothing that the function did: whoever waits for it must see it."""
    entry = callback(lambda: signal.raise_signal(signal.SIGUSR1), 0)
    before = signal.signal(signal.SIGUSR1, handler)
    try:
        with pytest.raises(TimeoutError, match="of a signal handler") as caught:
            entry()
        # The same, raised by the function itself, is its failure.
        with pytest.raises(KernelError, match="TimeoutError"):
            callback(raising(TimeoutError("of the function")), 0)()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert isinstance(caught.value.__cause__, KernelError)
    assert caught.traceback[-1].name == "timed_out"


NO_FAILURES = [KeyboardInterrupt(), KeyboardInterrupt("stop"), SystemExit(3), GeneratorExit()]


@pytest.mark.parametrize("error", [*NO_FAILURES, asyncio.CancelledError("why")], ids=repr)
def test_what_is_no_failure_comes_out_as_itself(
    error: BaseException, callback: Callable[..., Entry], testing_library: object
) -> None:
    """Through a function of Python, and through one of C++ that calls it."""
    fail = callback(raising(error), 0)
    apply = global_function("testing.apply")
    for call in (fail, lambda: apply(fail.owner), lambda: callback(fail, 0)()):
        with pytest.raises(type(error)) as caught:
            call()
        assert caught.value is error
        told = error.__cause__
        assert isinstance(told, KernelError)
        assert (told.kind, told.message) == (type(error).__name__, str(error))
        assert told.__cause__ is None
        assert "raise error" in told.backtrace
        error.with_traceback(None)


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), OSError("told")], ids=repr)
def test_what_escapes_a_callback(
    error: BaseException, callback: Callable[..., Entry], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal comes at any place, also after the function, where an error is told."""
    monkeypatch.setattr(values, "set_raised", raising(error))
    with pytest.raises(BaseException) as caught:  # noqa: PT011
        callback(raising(ValueError("the function's own")), 0)()
    if isinstance(error, Exception):
        assert isinstance(caught.value, KernelError) and caught.value.kind == "OSError"
    else:
        assert caught.value is error


def test_errors_of_the_library(callback: Callable[..., Entry], testing_library: object) -> None:
    """In its words; a Python callback lets them through."""
    fail = global_function("testing.test_raise_error")
    with pytest.raises(KernelError) as caught:
        fail("MyKind", "my message")
    error = caught.value
    assert (error.op, error.kind, error.message) == (fail.name, "MyKind", "my message")
    assert "TestRaiseError" in error.backtrace
    assert str(error).startswith("testing.test_raise_error: MyKind: my message\nbacktrace")
    with pytest.raises(KernelError, match="MyKind: my message"):
        callback(lambda: fail("MyKind", "my message"), 0)()
