"""Errors through the gate, in both directions."""

from __future__ import annotations

import asyncio
import functools
import gc
import resource
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from typing import Any

import cffi
import pytest

from fi_ffi.abi import failure, library, values
from fi_ffi.abi._cffi import ffi
from fi_ffi.abi.function import Entry, global_function
from fi_ffi.errors import FiFfiError, KernelError

from tests.helpers.stress_strength import scaled


def raising(error: BaseException) -> Callable[[], None]:
    def function() -> None:
        raise error

    return function


class Odd(Exception):
    pass


@pytest.mark.parametrize(
    "error",
    [
        ValueError("a plain one"),
        RuntimeError(""),
        KeyError("key"),
        OSError(2, "No such file"),
        Odd("of a class of its own"),
        RecursionError("too deep"),
        AssertionError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_exceptions_in_callbacks(error: BaseException, callback: Callable[..., Entry]) -> None:
    entry = callback(raising(error), 0)
    with pytest.raises(KernelError) as caught:
        entry()
    assert caught.value.op == entry.name
    assert caught.value.kind == type(error).__name__
    assert caught.value.message == str(error)
    assert "raise error" in caught.value.backtrace
    assert isinstance(caught.value, (FiFfiError, RuntimeError))


@pytest.mark.parametrize("words", [(), ("stop",)], ids=str)
def test_ctrl_c_in_a_callback_is_ctrl_c(words: Any, callback: Callable[..., Entry]) -> None:
    """Nobody who handles a kernel's errors handles it by mistake."""
    with pytest.raises(KeyboardInterrupt) as caught:
        callback(raising(KeyboardInterrupt(*words)), 0)()
    assert caught.value.args == words
    told = caught.value.__cause__
    assert isinstance(told, KernelError)
    assert told.kind == "KeyboardInterrupt"
    assert "raise error" in told.backtrace


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


@pytest.mark.parametrize(
    "error", [SystemExit(3), GeneratorExit(), asyncio.CancelledError("why")], ids=repr
)
def test_what_is_no_exception_comes_out_as_itself(
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

    def interrupted(_: BaseException) -> None:
        raise error

    monkeypatch.setattr(values, "set_raised", interrupted)
    with pytest.raises(BaseException) as caught:  # noqa: PT011
        callback(raising(ValueError("the function's own")), 0)()
    if isinstance(error, Exception):
        assert isinstance(caught.value, KernelError)
        assert caught.value.kind == "OSError"
    else:
        assert caught.value is error


def test_ctrl_c_while_an_exception_is_told(callback: Callable[..., Entry]) -> None:
    class Interrupted(Exception):
        @property
        def __traceback__(self) -> Any:  # type: ignore[override]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        callback(raising(Interrupted()), 0)()


MESSAGES = {
    "nul": "before\0after",
    "only nul": "\0",
    "unicode": "Größe 😀",
    "1 MB": "x" * 2**20,
    "1 MB of two bytes": "é" * 2**19,
    "quotes": "`f(0: int) -> void`",
    "lines": "one\ntwo\r\n",
}


@pytest.mark.parametrize("name", MESSAGES)
def test_messages_arrive_whole(name: str, callback: Callable[..., Entry]) -> None:
    with pytest.raises(KernelError) as caught:
        callback(raising(ValueError(MESSAGES[name])), 0)()
    assert caught.value.message == MESSAGES[name]
    assert MESSAGES[name] in str(caught.value)


def test_a_message_with_half_a_surrogate_pair(callback: Callable[..., Entry]) -> None:
    with pytest.raises(KernelError, match=r"ValueError: path \?"):
        callback(raising(ValueError("path \udcff")), 0)()


def test_an_exception_that_cannot_be_told(callback: Callable[..., Entry]) -> None:
    class Broken(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no words")

    with pytest.raises(KernelError) as caught:
        callback(raising(Broken()), 0)()
    assert caught.value.kind == "Broken"


def test_errors_of_the_library(testing_library: object) -> None:
    with pytest.raises(KernelError) as caught:
        global_function("testing.test_raise_error")("MyKind", "my message")
    error = caught.value
    assert (error.op, error.kind, error.message) == (
        "testing.test_raise_error",
        "MyKind",
        "my message",
    )
    assert "TestRaiseError" in error.backtrace
    assert str(error).startswith("testing.test_raise_error: MyKind: my message\nbacktrace")


def test_kinds_pass_through_callbacks(
    callback: Callable[..., Entry], testing_library: object
) -> None:
    """An error of C++ that a Python callback lets through is still told in its words."""
    fail = global_function("testing.test_raise_error")
    with pytest.raises(KernelError, match="my message"):
        callback(lambda: fail("MyKind", "my message"), 0)()


def raised(*parts: bytes, cause: Any = ffi.NULL) -> Any:
    """An Error object's handle; chaining is not among the functions fi_ffi itself needs."""
    declared = cffi.FFI()
    declared.cdef(
        "int TVMFFIErrorCreateWithCauseAndExtraContext(void *, void *, void *, void *, void *, "
        "void **);"
    )
    upstream = declared.dlopen(LOADED[0])
    arrays = [library.byte_array(part) for part in parts]
    pointers = [declared.cast("void *", int(ffi.cast("intptr_t", a))) for a, _ in arrays]
    out = declared.new("void **")
    chained = declared.cast("void *", int(ffi.cast("intptr_t", cause)))
    create = upstream.TVMFFIErrorCreateWithCauseAndExtraContext
    assert create(*pointers, chained, declared.NULL, out) == 0
    return ffi.cast("void *", int(declared.cast("intptr_t", out[0])))


LOADED: list[str] = []


@pytest.fixture(autouse=True)
def _path(tvm_ffi_loaded: str) -> None:
    LOADED[:] = [tvm_ffi_loaded]


def take(handle: Any) -> KernelError:
    library.lib.TVMFFIErrorSetRaised(handle)
    library.lib.TVMFFIObjectDecRef(handle)
    return failure.take_raised("plan")


def test_bytes_that_are_no_utf8() -> None:
    error = take(raised(b"Kind\xff", b"mess\0age \xfe", b"\xff"))
    assert (error.kind, error.message, error.backtrace) == (
        "Kind\ufffd",
        "mess\0age \ufffd",
        "\ufffd",
    )


def test_causes_are_chained() -> None:
    handle = raised(b"ValueError", b"cause 0", b"")
    for number in range(1, 4):
        effect = raised(b"ValueError", f"cause {number}".encode(), b"", cause=handle)
        library.lib.TVMFFIObjectDecRef(handle)
        handle = effect
    error: BaseException | None = take(handle)
    told = []
    while error is not None:
        assert isinstance(error, KernelError)
        told.append(error.message)
        error = error.__cause__
    assert told == ["cause 3", "cause 2", "cause 1", "cause 0"]


def test_an_endless_chain_of_causes_ends() -> None:
    handle = raised(b"ValueError", b"innermost", b"")
    for _ in range(1000):
        effect = raised(b"ValueError", b"outer", b"", cause=handle)
        library.lib.TVMFFIObjectDecRef(handle)
        handle = effect
    error: BaseException | None = take(handle)
    depth = 0
    while error is not None:
        error, depth = error.__cause__, depth + 1
    assert 10 < depth < 100


def test_a_failure_without_an_error() -> None:
    assert failure.take_raised("plan").kind == "UnknownError"
    with pytest.raises(KernelError, match="plan: UnknownError"):
        failure.check(-1, "plan")
    failure.check(0, "plan")


def test_an_error_is_told_once(callback: Callable[..., Entry]) -> None:
    with pytest.raises(KernelError):
        callback(raising(ValueError("once")), 0)()
    assert failure.take_raised("plan").kind == "UnknownError"


def test_errors_are_of_their_thread(callback: Callable[..., Entry]) -> None:
    from concurrent.futures import ThreadPoolExecutor

    def fail(number: int) -> str:
        with pytest.raises(KernelError) as caught:
            callback(raising(ValueError(f"of {number}")), 0)()
        return caught.value.message

    with ThreadPoolExecutor(8) as pool:
        assert [*pool.map(fail, range(200))] == [f"of {number}" for number in range(200)]


def resident() -> int:
    """Bytes of this process in memory now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


LIMIT = 8 << 20


def test_failures_leak_nothing(callback: Callable[..., Entry]) -> None:
    """Each carries a message of 1 kB: one of them kept per call would be 20 MB."""

    def raise_anew() -> None:
        raise ValueError("x" * 1000)

    entry = callback(raise_anew, 0)

    def fail(times: int) -> None:
        for _ in range(times):
            try:
                entry()
            except KernelError:
                pass

    fail(1000)
    gc.collect()
    before = resident()
    fail(scaled(100_000, 20_000))
    gc.collect()
    assert resident() - before < LIMIT


def test_nothing_is_printed_by_a_callback_that_fails() -> None:
    """Not even for what cffi itself would print on the way out of a callback."""
    code = """
        from fi_ffi.abi.function import register
        from fi_ffi.abi.signature import Signature
        from fi_ffi.loader import runtime

        runtime.ensure_tvm_ffi()

        def fail():
            raise KeyboardInterrupt

        try:
            register("fails", Signature("fails", ()), fail)()
        except KeyboardInterrupt as error:
            print(error.__cause__.kind)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "KeyboardInterrupt\n", "")
