"""What a signal handler raises comes out as itself where fi_ffi catches errors of its class.

The exception is a `TimeoutError`, so an `OSError`, as of a deadline.  It comes before each line of
a function.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import signal
import sys
from collections.abc import Callable, Iterator
from multiprocessing import Pipe
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import numpy as np
import pytest

import fi_ffi
from fi_ffi.abi import interop, library, streams, tensor
from fi_ffi.comm import fusion, nccl, presence, ranks
from fi_ffi.errors import let_through
from fi_ffi.loader import cache, kernels, machine, search, seed
from fi_ffi.loader.fetch import download, http
from fi_ffi.modules import files
from fi_ffi.ops import on_host
from fi_ffi.watch.writer import Writer

from tests.loader.server import QUICK, File, Server


class Deadline(TimeoutError):
    """What the handler raises."""


@pytest.fixture(autouse=True)
def handler() -> Iterator[None]:
    def late(number: int, frame: object) -> None:
        raise Deadline("the caller's")

    before = signal.signal(signal.SIGUSR1, late)
    yield
    signal.signal(signal.SIGUSR1, before)


def interrupted(call: Callable[[], object], code: CodeType, line: int) -> bool:
    """Call, with a signal before a line of a function, counted by its steps; whether it came."""
    steps = 0

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal steps
        if frame.f_code is not code:
            return None if event == "call" else trace
        # Python does not forget an exception while whose handling a trace function raises.
        if event == "line" and sys.exc_info()[1] is None:
            steps += 1
            if steps == line:
                sys.settrace(None)
                signal.raise_signal(signal.SIGUSR1)
        return trace

    sys.settrace(trace)
    try:
        call()
    except Deadline:
        return True
    finally:
        sys.settrace(None)
    assert sys.exc_info()[1] is None
    assert steps < line, f"lost before step {line} of {code.co_name}"
    return False


class Asked:
    """An array, a stream and an address, whose methods are asked for them."""

    def __init__(self) -> None:
        self.array = np.ones(3, np.float32)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.array.__dlpack_device__()

    def __dlpack__(self, **how: Any) -> object:
        return self.array.__dlpack__(**how)

    def __array__(self, *how: Any, **more: Any) -> np.ndarray:
        return self.array

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, 0x51

    def __index__(self) -> int:
        return 1


def fetched(root: Path) -> None:
    with Server({"/file": File(b"x" * 2000)}) as web:
        client = http.Client(QUICK)
        with client.open(web.url("/file")) as answer:
            assert b"".join(client.chunks(answer)) == b"x" * 2000


def in_cache(root: Path) -> None:
    sha256 = hashlib.sha256(b"content").hexdigest()
    path = cache.store([b"content"], sha256, "name", "here")
    os.utime(cache.stamp_path(path), (0, 0))
    assert cache.find(sha256, "name") is not None


def received(root: Path) -> None:
    here, there = Pipe()
    there.send(("a", 1))
    assert ranks._received(here) == ("a", 1)


def folder_of_modules(root: Path) -> None:
    (root / "norm").mkdir(parents=True, exist_ok=True)
    (root / "norm" / "norm.so").touch()
    assert kernels._modules_in(root) == ["norm"]


def process(root: Path) -> None:
    presence.this_process.cache_clear()
    place = presence.Place(presence.this_machine(), presence.this_process(), "")
    assert not presence.has_ended(place)


def driver(root: Path) -> None:
    machine.load_driver.cache_clear()
    machine.load_driver()


def cuda_library(root: Path) -> None:
    with contextlib.suppress(fi_ffi.LoaderError):
        machine.load_library.__wrapped__("libcudart.so.12")


def written(root: Path) -> None:
    writer = Writer(str(root / "calls.log"))
    writer.open()
    writer.write("a line\n")
    writer.close()


def part(root: Path) -> None:
    with download._place("a-key") as place:
        assert download._size(place) == 0


def nccl_if_it_is_there(root: Path) -> None:
    with contextlib.suppress(fi_ffi.LoaderError):
        nccl.imported()


def folder_as_a_file(root: Path) -> None:
    with pytest.raises(fi_ffi.LoaderError, match="is no file"):
        files.load_file(root)


# What to do in a new folder, and the functions that may meet the signal, by their names.
WAYS: dict[str, tuple[Callable[[Path], object], list[Any]]] = {
    "maps": (lambda _: library.mapped("libc[.]"), [library.mapped]),
    "driver": (driver, [machine.load_driver.__wrapped__]),
    "library": (cuda_library, [machine.load_library.__wrapped__]),
    "modules": (folder_of_modules, [kernels._modules_in]),
    "cache": (in_cache, [cache.find, cache._is_good, cache.stamp_fits]),
    "seed": (lambda root: seed._is_safe(root, root / "x"), [seed._is_safe]),
    "places": (lambda _: [*search.candidates()], [search.candidates, search._jit, search._local]),
    "major": (lambda _: search.cuda_of_kernels(), [search.cuda_of_kernels, search.sources]),
    "process": (process, [presence.this_process.__wrapped__, presence.has_ended, presence._status]),
    "pipe": (received, [ranks._received]),
    "fetch": (
        fetched,
        [http.Client.open.__wrapped__, http.Client._follow, http.Client._send, http.Client.chunks,
         http._DeadlineSocket.readinto, http._DeadlineResponse.begin],
    ),
    "part": (part, [download._place.__wrapped__, download._lock, download._size]),
    "log": (written, [Writer.open, Writer.write]),
    "module file": (folder_as_a_file, [files.load_file]),
    "array": (lambda _: fi_ffi.as_desc(Asked()),
              [interop.as_desc, interop._export, Asked.__dlpack__, Asked.__dlpack_device__]),
    "host array": (lambda _: on_host.host_array("op", "x", Asked(), "numbers"),
                   [on_host.host_array, Asked.__array__]),
    "stream": (lambda _: streams.stream_handle(Asked(), "op"),
               [streams.stream_handle, Asked.__cuda_stream__]),
    "rows": (lambda _: fi_ffi.as_desc(np.ones((3, 2), np.float32)).rows(Asked(), 2),
             [fi_ffi.TensorDesc.rows, tensor.index_of, Asked.__index__]),
    "shape": (lambda _: fi_ffi.TensorDesc(256, [Asked()], "float32"),
              [tensor._integers, Asked.__index__]),
    "pattern": (lambda _: fusion.pattern_of("op", "kAllReduce"), [fusion.pattern_of]),
    "nccl": (nccl_if_it_is_there, [nccl.imported]),
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_before_each_line(way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FI_FFI_CACHE_DIR", str(tmp_path / "cache"))
    do, functions = WAYS[way]
    folders = (tmp_path / str(i) for i in itertools.count())

    def call() -> None:
        folder = next(folders)
        folder.mkdir()
        do(folder)

    call()
    for function in functions:
        steps = 1
        while interrupted(call, function.__code__, steps):
            steps += 1
        assert steps > 1, f"{function} was not called"


def test_one_that_the_caller_has_caught_is_the_callers() -> None:
    """It is not raised again in the place of later errors."""
    for call in (lambda: fi_ffi.as_desc(3), lambda: fi_ffi.rmsnorm(1, 2, 3)):
        try:
            signal.raise_signal(signal.SIGUSR1)
        except Deadline as caught:
            with pytest.raises(fi_ffi.ArgumentTypeError) as raised:
                call()
            assert raised.value.__context__ is caught
    try:
        signal.raise_signal(signal.SIGUSR1)
    except Deadline:
        try:
            raise ValueError
        except ValueError as error:
            let_through(error, is_replaced=True)


def test_one_that_a_library_has_replaced_is_let_through() -> None:
    def replaced() -> None:
        try:
            signal.raise_signal(signal.SIGUSR1)
        except Deadline:
            raise ValueError from None

    try:
        replaced()
    except ValueError as error:
        let_through(error)
        with pytest.raises(Deadline):
            let_through(error, is_replaced=True)
