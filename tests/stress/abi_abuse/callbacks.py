"""Python functions that kernels call: whatever they raise, return or are given."""

from __future__ import annotations

import gc
import sys
import time
import traceback
import weakref
from collections.abc import Callable
from typing import Any

from fi_ffi.abi import failure as failure_gate
from fi_ffi.abi._cffi import ffi
from fi_ffi.abi.failure import take_raised
from fi_ffi.abi.function import global_function, make_array
from fi_ffi.abi.library import TypeIndex
from fi_ffi.abi.objects import Function, String
from fi_ffi.abi.tensor import TensorDesc
from fi_ffi.abi.values import make_function
from fi_ffi.errors import KernelError

from tests.stress.abi_abuse.errors import MB, failure
from tests.stress.abi_abuse.lab import abuse, leaves_nothing
from tests.stress.abi_abuse.returns import OBJECTS, WITHOUT_FORM, counted


def lent(function: Callable[..., Any]) -> Function:
    return make_function("lent", function)


def raising(error: BaseException) -> Function:
    def function(*_: object) -> None:
        raise error.with_traceback(None)  # else it has one frame more each time

    return lent(function)


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


UNTOLD = "(its message cannot be told: {})"
MUTE = [mute(error) for error in (ValueError("no words"), SystemExit(3), KeyboardInterrupt(), None)]
LONG = f"before\0after 😀 {'é' * MB}"
# The kind and the message that each must be told by.
ERRORS: list[tuple[BaseException, str, str]] = [
    (Exception("plain"), "Exception", "plain"),
    (KeyError("key"), "KeyError", "'key'"),
    (KeyboardInterrupt("stop"), "KeyboardInterrupt", "stop"),
    (SystemExit(3), "SystemExit", "3"),
    (MemoryError(), "MemoryError", ""),
    (GeneratorExit(), "GeneratorExit", ""),
    (StopIteration(1), "StopIteration", "1"),
    (RecursionError("deep"), "RecursionError", "deep"),
    (MUTE[0], "Mute", UNTOLD.format("ValueError")),
    (MUTE[1], "Mute", UNTOLD.format("SystemExit")),
    (MUTE[2], "Mute", UNTOLD.format("KeyboardInterrupt")),
    (MUTE[3], "Mute", UNTOLD.format("RecursionError")),
    (NoText(), "NoText", UNTOLD.format("TypeError")),
    (SlyWords(), "SlyWords", "sly"),
    (OfNoName("words"), "OfNoName", "words"),
    (ValueError("half \udcff"), "ValueError", "half ?"),
    (ValueError(LONG), "ValueError", LONG),
]


def case_exceptions_of_every_kind() -> None:
    for way in (abuse.call, abuse.on_thread):
        for error, kind, message in ERRORS:
            function = raising(error)
            before = function.use_count
            told = failure(way, function)
            assert (told.kind, told.message) == (kind, message), told
            assert take_raised("again").kind == "UnknownError"
            assert function.use_count == before


class Held(BaseException):
    """No Exception, and watched by a weak reference."""


def case_what_is_no_failure_of_a_kernel_comes_out_as_itself() -> None:
    """Also from another thread, whose frames it has; what it was caused by stays told."""
    for way in (abuse.call, abuse.on_thread):
        for error in (KeyboardInterrupt("stop"), SystemExit(3), GeneratorExit(), Held(1)):
            cause = ValueError("before")
            error.__cause__ = cause
            for _ in range(2):
                try:
                    way(raising(error))
                except BaseException as found:
                    assert found is error
                    names = [frame.name for frame in traceback.extract_tb(found.__traceback__)]
                    assert names[-1] == "function", names
                    told = found.__cause__
                assert isinstance(told, KernelError) and told.kind == type(error).__name__
                assert told.__cause__ is cause
            assert not failure_gate._travelling


def case_what_a_kernel_swallowed_is_gone() -> None:
    seen: list[weakref.ref[Held]] = []

    def fail() -> None:
        error = Held()
        seen.append(weakref.ref(error))
        raise error

    assert abuse.call_many(lent(fail), 100) == 100
    # The last ones stay until the next failure, which is not taken for one of them.
    assert len(failure_gate._travelling) <= 2
    told = failure(abuse.call, raising(ValueError("another")))
    assert (told.kind, told.message) == ("ValueError", "another")
    gc.collect()
    assert not failure_gate._travelling and not any(ref() for ref in seen)


def case_a_failed_callback_leaves_no_result() -> None:
    """Its caller, in C++, would release it."""
    array = make_array([1])
    for value in (array, 7, object(), "a string of the heap", {1, 2}):
        function = lent(lambda value=value: value)
        fails = value.__class__ in (object, set)
        assert abuse.left_by(function) == (TypeIndex.NONE if fails else -1), value
    assert array.use_count == 1


def case_ctrl_c_while_an_exception_is_told() -> None:
    for way in (abuse.call, abuse.on_thread):
        told = failure(way, raising(NoTrace()))
        assert (told.kind, told.message) == ("KeyboardInterrupt", "in the middle of it")


def case_what_an_exception_refers_to_is_gone() -> None:
    """Neither the frames nor the arguments of a callback that raised are kept."""

    seen: list[weakref.ref[Held]] = []

    def fail(array: Any) -> None:
        held = Held()
        seen.append(weakref.ref(held))
        raise ValueError("of its frame")

    array = make_array([1])
    function = lent(fail)
    for way in (abuse.call, abuse.on_thread):
        failure(way, function, array)
    gc.collect()
    assert [ref() for ref in seen] == [None, None]
    assert array.use_count == 1


def case_raising_while_raising() -> None:
    first, second = raising(ValueError("first")), raising(KeyError("second"))
    told = failure(abuse.fail_while_failing, first, second)
    assert (told.kind, told.message) == ("KeyError", "'second'")

    def again() -> None:
        try:
            abuse.call(first)
        except KernelError:
            abuse.call(second)

    told = failure(abuse.call, lent(again))
    assert "second" in told.message and "first" not in told.message
    assert abuse.call_many(first, 1000) == 1000


def case_an_error_on_its_way_up() -> None:
    """Through 100 callbacks: its words whole, and no more than them and 100 names."""

    def lower(depth: int) -> None:
        if depth:
            abuse.call(function, depth - 1)
        abuse.fail_with(b"Kind", b"words " * (MB // 6), b"frame\n" * (MB // 6))

    function = lent(lower)
    started = time.process_time()
    told = failure(abuse.call, function, 100)
    assert told.message.endswith("fail_with: Kind: " + "words " * (MB // 6))
    assert len(told.message) < MB + 100 * 100
    assert len(told.backtrace) <= 1 << 16
    assert time.process_time() - started < 10


def case_recursion() -> None:
    """Calls of calls, 1000 deep."""

    def lower(depth: int) -> int:
        return 1 + abuse.call(function, depth - 1) if depth else 0

    function = lent(lower)
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(20_000)
    try:
        assert abuse.call(function, 1000) == 1000
    finally:
        sys.setrecursionlimit(before)


def case_recursion_without_end() -> None:
    """Python's limit is met anywhere inside: in the function, before it, or while it is told."""

    def lower() -> None:
        abuse.call(function)

    function = lent(lower)

    def from_depth(extra: int) -> KernelError | None:
        if extra:
            return from_depth(extra - 1)
        try:
            abuse.call(function)
        except KernelError as error:
            return error.with_traceback(None)
        return None

    for extra in range(40):
        told = from_depth(extra)
        assert told is not None and len(told.message) < 100_000
        assert abuse.call(lent(lambda: 7)) == 7
    assert function.use_count == 1


def case_arguments_of_every_kind() -> None:
    """What a kernel gives a callback is refused as what it returns is."""
    seen: list[object] = []
    function = lent(seen.append)
    for index in WITHOUT_FORM:
        told = failure(abuse.call_with, function, index, 7, 0x10)
        assert told.kind == "AbiError", told
    for index in (TypeIndex.DL_TENSOR_PTR, TypeIndex.RAW_STR, TypeIndex.BYTE_ARRAY_PTR, *OBJECTS):
        told = failure(abuse.call_with, function, index, 7, 0)
        assert told.kind == "AbiError" and "null pointer" in told.message
    for size in (9, 2**32 - 1):
        assert failure(abuse.call_with, function, TypeIndex.SMALL_STR, size, 0).kind == "AbiError"
    assert not seen


def case_arguments_of_another_type_than_told() -> None:
    seen: list[object] = []
    function = lent(seen.append)
    array = make_array([1])
    address = int(ffi.cast("intptr_t", array.handle))
    for index in OBJECTS:
        if index != TypeIndex.ARRAY:
            told = failure(abuse.call_with, function, index, 7, address)
            assert told.kind == "AbiError" and "its object of 71" in told.message
    assert not seen and array.use_count == 1


def case_results_of_every_kind() -> None:
    released = make_array([1])
    released.release()
    bad: list[Any] = [object(), 2**64, "\ud800", TensorDesc(0x1000, (2,), "uint8"), released]
    bad += [{1, 2}, [object()], {1: 1j}, NoText]
    for way in (abuse.call, abuse.on_thread):
        for value in bad:
            told = failure(way, lent(lambda value=value: value))
            assert told.kind in ("ArgumentError", "ArgumentTypeError", "FiFfiError"), told
        array = way(lent(lambda: [1, {2: "three"}]))
        assert array.use_count == 1
        assert global_function("ffi.ArrayGetItem")(array, 0) == 1
        assert abuse.call(way(lent(lambda: lambda: 7))) == 7
    text = String.create("a string of the heap")
    assert text is not None
    for _ in range(100):
        assert abuse.on_thread(lent(lambda: text)) == "a string of the heap"
    assert text.use_count == 1


def case_a_function_that_is_released_while_it_runs() -> None:
    def last() -> str:
        function.release()
        gc.collect()
        return "done"

    function, result = lent(last), ffi.new("TVMFFIAny *")
    assert function.safe_call(function.handle, ffi.NULL, 0, result) == 0
    assert result.type_index == TypeIndex.SMALL_STR


def case_objects_come_back_from_other_threads() -> None:
    def use() -> None:
        array = make_array(["long enough for the heap", 1])
        for _ in range(50):
            found = abuse.on_thread(lent(lambda a: a), array)
            assert found.handle == array.handle
            found.release()
        assert array.use_count == 1

    counted(use)


def case_callbacks_leave_nothing() -> None:
    functions = [raising(ValueError("x" * 1000)), raising(NoTrace()), raising(MUTE[1])]

    def fail() -> None:
        for function in functions:
            failure(abuse.call, function)
        failure(abuse.on_thread, functions[0])

    leaves_nothing(fail, 50_000, 1000)
