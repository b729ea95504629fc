"""Errors through the gate, in both directions: kernels that fail in any way at all, callbacks that
raise anything."""

from __future__ import annotations

import asyncio
import functools
import gc
import signal
import sys
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from fi_ffi.abi import failure as failure_gate
from fi_ffi.abi import values
from fi_ffi.abi._cffi import ffi
from fi_ffi.abi.failure import take_raised
from fi_ffi.abi.function import Entry, global_function, make_array
from fi_ffi.abi.library import TypeIndex
from fi_ffi.abi.objects import Function
from fi_ffi.abi.values import make_function
from fi_ffi.errors import KernelError

from tests.abi.conftest import Abuse, cell
from tests.stress.gauges import leaves_nothing


def raising(error: BaseException) -> Callable[..., None]:
    def function(*_: object) -> None:
        raise error

    return function


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


def failure(function: Any, *args: Any) -> KernelError:
    """A call's `KernelError`, or that behind what comes out as itself."""
    with pytest.raises(BaseException) as caught:  # noqa: PT011
        function(*args)
    error = caught.value if isinstance(caught.value, KernelError) else caught.value.__cause__
    assert isinstance(error, KernelError)
    # What the traceback refers to must not outlive the test.
    return error.with_traceback(None)


def lent(function: Callable[..., Any]) -> Function:
    return make_function("lent", function)


def fails_with(error: BaseException) -> Function:
    def function(*_: object) -> None:
        raise error.with_traceback(None)  # else it has one frame more each time

    return lent(function)


# Words of every kind and size, of kernels that fail (abuse.c).

MB = 2**20
WORDS = {
    "empty": b"", "nul": b"before\0after", "only nul": b"\0\0\0", "spaces": b" \n ",
    "no utf-8": b"\xff\xfe\xc3 and \xed\xa0\x80", "1 MB": b"x" * MB,
    "1 MB of no utf-8": b"\xff" * MB, "1 MB of lines": b"a\n" * (MB // 2),
    "braces": b"{0} %s {error!r}", "escapes": b"\x1b[2J\r\n\t\x00", "a name": b"BaseException",
}  # fmt: skip


@pytest.mark.parametrize("name", WORDS)
def test_words_of_every_kind(name: str, abuse: Abuse) -> None:
    words = WORDS[name]
    text = words.decode(errors="replace")
    error = failure(abuse.fail_with, words, words, words)
    assert type(error) is KernelError
    assert (error.op, error.kind, error.message, error.backtrace) == ("fail_with", *[text] * 3)
    assert text in str(error)
    assert take_raised("again").kind == "UnknownError"


def test_no_error_at_all(abuse: Abuse) -> None:
    for code in (-1, 1, -2, 2**31 - 1, -(2**31)):
        error = failure(abuse.fail, code)
        assert (error.op, error.kind) == ("fail", "UnknownError")
        assert "left no error behind" in error.message
    assert failure(abuse.fail_elsewhere).kind == "UnknownError"
    abuse.leave_error()
    assert take_raised("now").kind == "LeftError"


@pytest.mark.parametrize("index", [64, 65, 66, 68, 70, 71, 73, 74, 128, 5000, 0, -1])
def test_an_object_of_another_type(index: int, abuse: Abuse) -> None:
    with abuse.balanced():
        error = failure(abuse.fail_made, index, b"\xa5" * 128)
    assert error.kind == "UnknownError" and f"type index {index}" in error.message


def test_errors_made_elsewhere(abuse: Abuse) -> None:
    """By a kernel's own code: nothing after the backtrace is known to be there."""
    words = ffi.new("char[]", b"Kind")
    address, garbage = int(ffi.cast("uintptr_t", words)), 0xA5A5A5A5A5A5A5A5
    part = (address, 4)
    expected = {
        cell(*part, *part, *part, garbage, garbage, garbage): ("Kind", "Kind", "Kind"),
        bytes(128): ("", "", ""),
        cell(0, 99, 0, 2**40, 0, 1): ("", f"({2**40} bytes, which are not read)", ""),
    }
    for size in (2**27, 2**48, 2**64 - 1):
        told = f"({size} bytes, which are not read)"
        expected[cell(address, size, *part, address, size)] = (told, "Kind", told)
    with abuse.balanced():
        for raw, told_of in expected.items():
            error = failure(abuse.fail_made, 67, raw)
            assert (error.kind, error.message, error.backtrace) == told_of
            assert error.__cause__ is None


def depth(error: BaseException | None) -> int:
    return 0 if error is None else 1 + depth(error.__cause__)


def test_causes(abuse: Abuse) -> None:
    extra = make_array(["a context", 1])
    before = extra.use_count
    for given in (None, extra):
        for count in (1, 2, 5, 17, 100, 10_000):
            error = failure(abuse.fail_chain, count, given, False)
            assert error.message == f"{count - 1:08}"
            assert depth(error) == min(count, 17)
        assert extra.use_count == before
    for count in (1, 2, 3, 40):  # in a ring
        error = failure(abuse.fail_chain, count, None, True)
        assert depth(error) == 17 and str(error)
    threading.stack_size(512 << 10)  # and released on a small stack
    with ThreadPoolExecutor(1) as pool:
        told = pool.submit(failure, abuse.fail_chain, 10_000, None, False).result()
    threading.stack_size(0)
    assert depth(told) == 17


# Python functions that kernels call, whatever they raise or are given.


def mute(error: BaseException | None) -> Exception:
    """An exception whose own words cannot be had."""

    class Mute(Exception):
        def __str__(self) -> str:
            if error is None:
                return str(self)
            raise error

    return Mute()


class NoText(Exception):
    def __str__(self) -> str:
        return 7  # type: ignore[return-value]


class Sly(str):
    def encode(self, *_: object, **__: object) -> bytes:
        raise OSError("not to be encoded")


class SlyWords(Exception):
    def __str__(self) -> str:
        return Sly("sly")


class Nameless(type):
    @property
    def __name__(cls) -> str:  # type: ignore[override]
        raise AttributeError("no name")


class OfNoName(Exception, metaclass=Nameless):
    pass


class NoTrace(Exception):
    @property
    def __traceback__(self) -> Any:  # type: ignore[override]
        raise KeyboardInterrupt("in the middle of it")


class Held(BaseException):
    """No Exception, and watched by a weak reference."""


UNTOLD = "(its message cannot be read: {})"
LONG = f"before\0after 😀 {'é' * MB}"
# The kind and the message that each must be told by.
ERRORS: dict[BaseException, tuple[str, str]] = {
    Exception("plain"): ("Exception", "plain"),
    MemoryError(): ("MemoryError", ""),
    StopIteration(1): ("StopIteration", "1"),
    RecursionError("deep"): ("RecursionError", "deep"),
    mute(ValueError("no words")): ("Mute", UNTOLD.format("ValueError")),
    mute(SystemExit(3)): ("Mute", UNTOLD.format("SystemExit")),
    mute(KeyboardInterrupt()): ("Mute", UNTOLD.format("KeyboardInterrupt")),
    mute(None): ("Mute", UNTOLD.format("RecursionError")),
    NoText(): ("NoText", UNTOLD.format("TypeError")),
    SlyWords(): ("SlyWords", "sly"),
    OfNoName("words"): ("OfNoName", "words"),
    ValueError("half \udcff"): ("ValueError", "half ?"),
    ValueError(LONG): ("ValueError", LONG),
    NoTrace(): ("KeyboardInterrupt", "in the middle of it"),  # Ctrl-C while it is told
}


@pytest.mark.parametrize("way", ["call", "on_thread"])
def test_exceptions_of_every_kind(way: str, abuse: Abuse, silent: None) -> None:
    for error, (kind, message) in ERRORS.items():
        function = fails_with(error)
        before = function.use_count
        told = failure(getattr(abuse, way), function)
        assert (told.op, told.kind, told.message) == (way, kind, message), told
        assert "raise error" in told.backtrace or kind == "KeyboardInterrupt"
        assert take_raised("again").kind == "UnknownError"
        assert function.use_count == before


@pytest.mark.parametrize("way", ["call", "on_thread"])
def test_what_an_exception_refers_to(way: str, abuse: Abuse) -> None:
    """What is no failure has its frames and its cause; nothing else is kept of a callback."""
    for error in (KeyboardInterrupt("stop"), SystemExit(3), GeneratorExit(), Held(1)):
        error.__cause__ = cause = ValueError("before")
        for _ in range(2):
            with pytest.raises(type(error)) as caught:
                getattr(abuse, way)(fails_with(error))
            assert caught.value is error and caught.traceback[-1].name == "function"
            told = error.__cause__
            assert isinstance(told, KernelError) and told.__cause__ is cause
        assert not failure_gate._travelling
    seen: list[weakref.ref[Held]] = []

    def fail(array: Any) -> None:
        held = Held()
        seen.append(weakref.ref(held))
        raise ValueError("of its frame")

    array = make_array([1])
    failure(getattr(abuse, way), lent(fail), array)
    gc.collect()
    assert seen[0]() is None and array.use_count == 1


def test_what_a_kernel_swallowed_is_gone(abuse: Abuse) -> None:
    seen: list[weakref.ref[Held]] = []

    def fail() -> None:
        error = Held()
        seen.append(weakref.ref(error))
        raise error

    assert abuse.call_many(lent(fail), 100) == 100
    # The last ones stay until the next failure, which is not taken for one of them.
    assert len(failure_gate._travelling) <= 2
    told = failure(abuse.call, fails_with(ValueError("another")))
    assert (told.kind, told.message) == ("ValueError", "another")
    gc.collect()
    assert not failure_gate._travelling and not any(ref() for ref in seen)


def test_a_failed_callback_leaves_no_result(abuse: Abuse) -> None:
    """Its caller, in C++, would release it."""
    array, released = make_array([1]), make_array([1])
    released.release()
    for value in (array, 7, object(), "a string of the heap", {1, 2}, released):
        fails = value.__class__ in (object, set) or value is released
        found = abuse.left_by(lent(lambda value=value: value))
        assert found == (TypeIndex.NONE if fails else -1), value
    assert array.use_count == 1


def test_raising_while_raising(abuse: Abuse) -> None:
    first, second = fails_with(ValueError("first")), fails_with(KeyError("second"))
    told = failure(abuse.fail_while_failing, first, second)
    assert (told.kind, told.message) == ("KeyError", "'second'")

    def again() -> None:
        with pytest.raises(KernelError, match="first"):
            abuse.call(first)
        abuse.call(second)

    told = failure(abuse.call, lent(again))
    assert "second" in told.message and "first" not in told.message


def test_an_error_on_its_way_up(abuse: Abuse) -> None:
    """Through 100 callbacks: its words whole, and no more than them and 100 names."""

    def lower(depth: int) -> None:
        if depth:
            abuse.call(function, depth - 1)
        abuse.fail_with(b"Kind", b"words " * (MB // 6), b"frame\n" * (MB // 6))

    function = lent(lower)
    told = failure(abuse.call, function, 100)
    assert told.message.endswith("fail_with: Kind: " + "words " * (MB // 6))
    assert len(told.message) < MB + 100 * 100 and len(told.backtrace) <= 1 << 16


def test_recursion(abuse: Abuse, silent: None) -> None:
    """Calls of calls: 1000 deep where Python lets them, which 3.12 does not for calls through C;
    else its limit is met anywhere inside, in the function, before it, or while it is told."""

    def lower(depth: int) -> int:
        return 1 + abuse.call(function, depth - 1) if depth else 0

    function, before = lent(lower), sys.getrecursionlimit()
    sys.setrecursionlimit(20_000)
    try:
        deep = 100 if sys.version_info[:2] == (3, 12) else 1000
        assert abuse.call(function, deep) == deep
    finally:
        sys.setrecursionlimit(before)

    def from_depth(extra: int) -> KernelError:
        return from_depth(extra - 1) if extra else failure(abuse.call, function, 10**6)

    for extra in range(12):
        assert len(from_depth(extra).message) < 100_000
        assert abuse.call(lent(lambda: 7)) == 7
    assert function.use_count == 2  # its own, and that of `objects._lent`


def test_arguments_that_are_none(abuse: Abuse) -> None:
    """What a kernel gives a callback is refused as what it returns is."""
    seen: list[object] = []
    function, array = lent(seen.append), make_array([1])
    address = int(ffi.cast("intptr_t", array.handle))
    for index, padding, payload, words in (
        (10, 7, 0x10, "no Python form"),
        (TypeIndex.STR, 7, 0, "null pointer"),
        (TypeIndex.SMALL_STR, 9, 0, "9 bytes"),
        (TypeIndex.STR, 7, address, "its object of 71"),
    ):
        told = failure(abuse.call_with, function, index, padding, payload)
        assert told.kind == "AbiError" and words in told.message
    assert not seen and array.use_count == 1


def test_a_function_that_is_released_while_it_runs() -> None:
    def last() -> str:
        function.release()
        gc.collect()
        return "done"

    function, result = lent(last), ffi.new("TVMFFIAny *")
    assert function.safe_call(function.handle, ffi.NULL, 0, result) == 0
    assert result.type_index == TypeIndex.SMALL_STR


def test_failures_leave_nothing(abuse: Abuse, silent: None) -> None:
    functions = [fails_with(error) for error in (ValueError("x" * 1000), NoTrace())]

    def fail() -> None:
        for function in functions:
            failure(abuse.call, function)
        failure(abuse.on_thread, functions[0])
        failure(abuse.fail_chain, 3, None, False)
        failure(abuse.fail_with, b"K" * 100, b"m" * 1000, b"b" * 1000)
        failure(abuse.fail, -1)

    leaves_nothing(fail, 1500)
