"""How a kernel may fail: with words of any kind and size, causes, or no error at all."""

from __future__ import annotations

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fi_ffi.abi._cffi import ffi
from fi_ffi.abi.failure import take_raised
from fi_ffi.abi.function import make_array
from fi_ffi.abi.signature import parse_type, signature_from_mismatch
from fi_ffi.errors import AbiError, KernelError

from tests.helpers.stress_strength import scaled
from tests.stress.abi_abuse.lab import abuse, leaves_nothing
from tests.stress.abi_abuse.returns import cell, counted

MB = 2**20


def failure(function: Any, *args: Any) -> KernelError:
    try:
        found = function(*args)
    except KernelError as error:
        # What the traceback refers to must not outlive the case.
        return error.with_traceback(None)
    except BaseException as error:  # no failure of a kernel's: what was raised, itself
        assert isinstance(error.__cause__, KernelError)
        return error.__cause__.with_traceback(None)
    raise AssertionError(f"{args} gave {found!r}")


WORDS = {
    "empty": b"",
    "nul": b"before\0after",
    "only nul": b"\0\0\0",
    "no utf-8": b"\xff\xfe\xc3 and \xed\xa0\x80",
    "1 MB": b"x" * MB,
    "1 MB of no utf-8": b"\xff" * MB,
    "1 MB of lines": b"a\n" * (MB // 2),
    "braces": b"{0} %s {error!r}",
    "escapes": b"\x1b[2J\r\n\t\x00",
    "spaces": b" \n ",
}


def case_words_of_every_kind() -> None:
    for words in WORDS.values():
        text = words.decode(errors="replace")
        error = failure(abuse.fail_with, words, words, words)
        assert (error.op, error.kind, error.message) == ("fail_with", text, text)
        # libtvm_ffi itself adds nothing to what it is told.
        assert error.backtrace == text
        assert text in str(error)
        assert take_raised("again").kind == "UnknownError"


def case_kinds_with_odd_names() -> None:
    for kind in ("KernelError", "BaseException", "__class__", "Größe", "a b\nc", "x" * 10_000):
        error = failure(abuse.fail_with, kind.encode(), b"m", b"")
        assert type(error) is KernelError and error.kind == kind


def case_any_words() -> None:
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    for _ in range(scaled(200_000, 1000)):
        parts = [rng.randbytes(rng.choice([0, 1, 7, 8, 100])) for _ in range(3)]
        error = failure(abuse.fail_with, *parts)
        told = [part.decode(errors="replace") for part in parts]
        assert [error.kind, error.message, error.backtrace] == told, seed


def case_no_error_at_all() -> None:
    for code in (-1, 1, -2, 2**31 - 1, -(2**31)):
        error = failure(abuse.fail, code)
        assert (error.op, error.kind) == ("fail", "UnknownError")
        assert "left no error behind" in error.message
    error = failure(abuse.fail_elsewhere)
    assert error.kind == "UnknownError"
    abuse.leave_error()
    assert take_raised("now").kind == "LeftError"


def case_an_object_of_another_type() -> None:
    for index in (64, 65, 66, 68, 70, 71, 73, 74, 128, 5000, 0, -1):

        def one(index: int = index) -> None:
            error = failure(abuse.fail_made, index, b"\xa5" * 128)
            assert error.kind == "UnknownError"
            assert f"type index {index}" in error.message, error

        counted(one)


def case_errors_made_elsewhere() -> None:
    """By a kernel's own code: nothing after the backtrace is known to be there."""
    words = ffi.new("char[]", b"Kind")
    address, garbage = int(ffi.cast("uintptr_t", words)), 0xA5A5A5A5A5A5A5A5

    def made(raw: bytes, kind: str, message: str, backtrace: str) -> None:
        error = failure(abuse.fail_made, 67, raw)
        assert kind in error.kind and bool(kind) == bool(error.kind), error
        assert message in error.message and (error.backtrace == backtrace), error
        assert error.__cause__ is None

    def use() -> None:
        part = (address, 4)
        made(cell(*part, *part, *part, garbage, garbage, garbage), "Kind", "Kind", "Kind")
        made(bytes(128), "", "", "")
        made(cell(0, 99, 0, 2**63, 0, 1), "", "bytes", "")
        for size in (2**27, 2**48, 2**64 - 1):
            told = f"({size} bytes, which are not read)"
            made(cell(address, size, *part, address, size), told, "Kind", told)

    counted(use)


def _depth(error: BaseException | None) -> int:
    depth = 0
    while error is not None:
        assert isinstance(error, KernelError)
        error, depth = error.__cause__, depth + 1
    return depth


def case_causes() -> None:
    extra = make_array(["a context", 1])
    before = extra.use_count
    for given in (None, extra):
        for depth in (1, 2, 5, 17, 100, 10_000):
            error = failure(abuse.fail_chain, depth, given, False)
            assert error.message == f"{depth - 1:08}"
            assert _depth(error) == min(depth, 17)
        assert extra.use_count == before


def case_causes_on_a_small_stack() -> None:
    """10,000 deep, released on a thread with 512 kB."""
    threading.stack_size(512 << 10)
    with ThreadPoolExecutor(1) as pool:
        told = pool.submit(failure, abuse.fail_chain, 10_000, None, False).result()
    threading.stack_size(0)
    assert _depth(told) == 17


def case_cyclic_causes() -> None:
    for depth in (1, 2, 3, 40):
        error = failure(abuse.fail_chain, depth, None, True)
        assert _depth(error) == 17
        str(error)


def case_time_is_linear_in_the_words() -> None:
    """8 times the text takes about 8 times as long, not 64 times."""

    def seconds(size: int) -> float:
        # As bad as a message can be for who looks for a signature in it.
        before = b"Mismatched number of arguments when calling: `"
        words = before * (size // len(before))
        started = time.process_time()
        error = failure(abuse.fail_with, b"TypeError", words, words)
        for text in (error.message, f"{error.message}`. Expected " * 2):
            try:
                signature_from_mismatch(text)
            except AbiError:
                pass
        return time.process_time() - started

    small = min(seconds(MB // 8) for _ in range(5))
    large = min(seconds(MB) for _ in range(3))
    assert large < 30 * small + 0.05, (small, large)


def case_signatures_of_a_megabyte() -> None:
    before = "Mismatched number of arguments when calling: `"
    for body in (
        "f(" + "0: int, " * (MB // 8),
        "f(0: " + "Array<" * (MB // 6),
        "f(0: " + "(" * MB,
        "f(" + ">" * MB,
        "f(0: " + "Array<" * 5000 + "int" + ">" * 5000 + ") -> void",
        "(" * MB,
    ):
        started = time.process_time()
        try:
            signature = signature_from_mismatch(
                f"{before}{body}`. Expected 1 but got 512 arguments"
            )
            parse_type(signature.params[0])
        except AbiError as error:
            assert len(str(error)) < 1000
        else:
            raise AssertionError(body[:100])
        assert time.process_time() - started < 5, body[:100]


def case_failures_leave_nothing() -> None:
    def fail() -> None:
        failure(abuse.fail_chain, 3, None, False)
        failure(abuse.fail_with, b"K" * 100, b"m" * 1000, b"b" * 1000)
        failure(abuse.fail, -1)

    leaves_nothing(fail, 100_000, 3000)
