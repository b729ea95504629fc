"""Streams by any name, and which one this thread launches on.

libtvm_ffi's own table says what is current: no GPU is needed to read it.
"""

from __future__ import annotations

import asyncio
import contextvars
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from cuda.bindings import driver, runtime

from fi_ffi.abi import library, streams
from fi_ffi.abi._cffi import ffi
from fi_ffi.abi.streams import current_scope, stream, stream_handle
from fi_ffi.abi.tensor import Device, parse_device
from fi_ffi.errors import ArgumentError, ArgumentTypeError
from fi_ffi.ops.steps.stream import stream_context

from tests.helpers.children import done
from tests.helpers.remains import allowed

CUDA0, CUDA1 = parse_device("cuda:0"), parse_device("cuda:1")


def current(device: Device = CUDA0) -> int:
    handle = library.lib.TVMFFIEnvGetStream(device.type_code, device.index)
    return int(ffi.cast("uintptr_t", handle))


@pytest.fixture(autouse=True)
def _left_as_found() -> Iterator[None]:
    before = current(CUDA0), current(CUDA1)
    yield
    assert (current(CUDA0), current(CUDA1)) == before
    assert current_scope() is None


class Protocol:
    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def __cuda_stream__(self) -> Any:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


class ProtocolProperty:
    """An early form of the protocol, as some libraries still have it."""

    __cuda_stream__ = property(lambda self: lambda: (0, 5))


class LikeTorch:
    cuda_stream = property(lambda self: 5)


class LikeCupy:
    ptr = 5


HANDLES = {
    "int": 5,
    "numpy int": np.int64(5),
    "numpy unsigned": np.uint64(5),
    "__cuda_stream__": Protocol((0, 5)),
    "__cuda_stream__ property": ProtocolProperty(),
    "torch": LikeTorch(),
    "cupy": LikeCupy(),
    "driver": driver.CUstream(5),
    "runtime": runtime.cudaStream_t(5),
}


@pytest.mark.parametrize("name", HANDLES)
def test_handle(name: str) -> None:
    handle = stream_handle(HANDLES[name])
    assert type(handle) is int
    assert handle == 5
    for special in (0, 2, 2**64 - 1):  # 2: cudaStreamPerThread
        assert stream_handle(special) == special


NO_STREAMS = [
    None,
    True,
    np.True_,
    1.0,
    np.float32(1),
    "5",
    b"5",
    (0, 5),
    object(),
    [],
    np.zeros(2),
]
NO_STREAMS += [driver.CUdevice, LikeTorch, type("NoneInIt", (), {"cuda_stream": None})()]
NO_STREAMS += [Protocol(x) for x in (None, 5, (0,), (0, 5, 6), (0, "5"), (0, True), [0, 5])]
OUT_OF_RANGE = [-1, 2**64, 2**70, np.int8(-1), Protocol((0, -1))]


@pytest.mark.parametrize(
    ("kind", "values"), [(ArgumentTypeError, NO_STREAMS), (ArgumentError, OUT_OF_RANGE)]
)
def test_no_stream(kind: type[ArgumentError], values: list[object]) -> None:
    for value in values:
        with pytest.raises(ArgumentError) as caught:
            stream_handle(value, "rmsnorm")
        assert type(caught.value) is kind, value
        assert (caught.value.op, caught.value.argument) == ("rmsnorm", "stream")


def test_a_protocol_that_raises() -> None:
    with pytest.raises(ArgumentError, match="argument `stream`: .*destroyed"):
        stream_handle(Protocol(RuntimeError("the stream was destroyed")), "rmsnorm")


def launched_on(stream: object = None) -> int:
    """What a call finds current."""
    with stream_context(stream, CUDA0, "a"):
        return current()


def test_a_scope_is_current_from_its_first_use() -> None:
    with stream(0x10) as scope:
        assert current_scope() is scope
        assert current() == 0
        assert launched_on() == 0x10
        assert current() == 0x10  # until the scope closes: setting it again would cost
    assert current() == 0
    stream_context(0x10, CUDA0, "never entered")
    assert current() == 0


@pytest.mark.parametrize("is_used_first", [True, False])
def test_scopes_nest(is_used_first: bool) -> None:
    with stream_context(0x99, CUDA0, "outside"):
        with stream(0x10):
            if is_used_first:
                assert launched_on() == 0x10
            with stream(0x20):
                assert launched_on() == 0x20
                assert launched_on(0x30) == 0x30
                assert current() == 0x20
            assert current() == (0x10 if is_used_first else 0x99)
            assert launched_on() == 0x10
        assert current() == 0x99


def test_a_scope_belongs_to_one_device() -> None:
    inner = stream(0x20)
    with stream(0x10), stream_context(None, CUDA0, "a"), inner, stream_context(None, CUDA1, "b"):
        assert (current(CUDA0), current(CUDA1)) == (0x10, 0x20)
    with stream(0x10):
        with stream_context(None, CUDA0, "a"):
            pass
        with pytest.raises(ArgumentError, match=r"rmsnorm: .*cuda:0.*cuda:1"):
            stream_context(None, CUDA1, "rmsnorm")
        with stream_context(0x20, CUDA1, "an explicit stream is not the scope's"):
            assert (current(CUDA0), current(CUDA1)) == (0x10, 0x20)


def test_a_scope_is_open_once_at_a_time() -> None:
    scope = stream(0x10)
    for device in (CUDA0, CUDA1):
        with scope, stream_context(None, device, "a"):
            assert current(device) == 0x10
            with pytest.raises(ArgumentError, match="already open"), scope:
                pass
        assert current(device) == 0


def test_scopes_close_in_order() -> None:
    outer, inner = stream(0x10), stream(0x20)
    outer.__enter__()
    inner.__enter__()
    launched_on()
    with pytest.raises(ArgumentError, match="innermost"):
        outer.__exit__(None, None, None)
    assert current() == 0x20  # the refusal changed nothing
    inner.__exit__(None, None, None)
    outer.__exit__(None, None, None)
    with pytest.raises(ArgumentError, match="innermost"):
        outer.__exit__(None, None, None)


def on_a_thread(function: Any, *args: Any) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function, *args).result()


def test_an_open_scope_is_of_its_thread() -> None:
    """Opened on a second thread it would seem in use there, and set nothing."""
    with stream(0x10) as scope, stream_context(None, CUDA0, "a"):
        with pytest.raises(ArgumentError, match="already open"):
            on_a_thread(scope.__enter__)
        with pytest.raises(ArgumentError, match="innermost"):
            on_a_thread(lambda: scope.__exit__(None, None, None))
        assert current() == 0x10

    def again() -> int:
        with scope, stream_context(None, CUDA0, "b"):
            return current()

    assert on_a_thread(again) == 0x10  # closed, it may go to another thread


@pytest.mark.parametrize("is_used_first", [True, False])
def test_a_scope_of_a_copied_context(is_used_first: bool) -> None:
    """A thread that is given this one's context launches on the scope's stream, call by call:
    nothing stays set there, as nobody would put it back."""

    def other() -> tuple[Any, ...]:
        inside, after = launched_on(), current()
        with stream(0x30):
            own = launched_on()
        return current_scope(), inside, after, own, current()

    with stream(0x10) as scope:
        if is_used_first:
            launched_on()
        context = contextvars.copy_context()
        assert on_a_thread(context.run, other) == (scope, 0x10, 0, 0x30, 0)
        assert current() == (0x10 if is_used_first else 0)
        assert launched_on() == 0x10
    assert current() == 0
    # That is over, and the context still has it: nothing is left.
    assert on_a_thread(context.run, lambda: (launched_on(), current())) == (0x10, 0)


def test_asyncio_tasks_have_their_own() -> None:
    """They take turns on one thread, at any place inside of a scope."""

    async def work(handle: int) -> None:
        for _ in range(5):
            with stream(handle) as scope:
                await asyncio.sleep(0)
                assert launched_on() == handle
                await asyncio.sleep(0)
                assert launched_on() == handle and current_scope() is scope
                with stream(handle + 1):
                    await asyncio.sleep(0)
                    assert launched_on() == handle + 1
                    assert launched_on(7) == 7
                    await asyncio.sleep(0)
                    assert launched_on() == handle + 1
                await asyncio.sleep(0)
                assert launched_on() == handle
            await asyncio.sleep(0)
            with pytest.raises(ArgumentError, match="got None.* an open fi_ffi.stream"):
                launched_on()

    async def main() -> None:
        await asyncio.gather(*map(work, range(0x100, 0x150, 0x10)))

    asyncio.run(main())
    assert current() == 0


LIMITED = """
    import resource
    resource.setrlimit(resource.RLIMIT_AS, (1 << 33, 1 << 33))
    from fi_ffi.abi.tensor import parse_device
    from fi_ffi.abi.streams import current_scope, stream, swap
    from fi_ffi.ops.steps.stream import stream_context
    from fi_ffi.errors import KernelError
    from fi_ffi.loader.runtime import ensure_tvm_ffi

    ensure_tvm_ffi()
    device, told = parse_device(f"cuda:{2**31 - 1}"), []

    def scope():
        with stream(0x10), stream_context(None, device, "a"):
            told.append("a call was made")

    for name, way in {
        "swap": lambda: swap(device, 0x10),
        "stream": lambda: stream_context(0x10, device, "a").__enter__(),
        "scope": scope,
    }.items():
        try:
            way()
        except KernelError as error:
            told.append(name)
    print(told, current_scope())
"""


def test_the_code_of_setting_is_looked_at() -> None:
    """libtvm_ffi has no room for the streams of so many devices, and says so."""
    assert done(LIMITED) == (0, "['swap', 'stream', 'scope'] None\n", "")


@pytest.mark.parametrize("when", ["entering", "leaving", "inside"])
def test_interrupts_of_a_scope(when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception from setting a stream: what was before is back, and the scope is closed."""
    before = streams._set

    def interrupted(*given: object) -> None:
        before(*given)
        raise KeyboardInterrupt

    with stream(0x40):
        assert launched_on() == 0x40
        scope = stream(0x10)

        def work() -> None:
            with scope:
                if when == "entering":
                    monkeypatch.setattr(streams, "_set", interrupted)
                launched_on()
                if when == "leaving":
                    monkeypatch.setattr(streams, "_set", interrupted)
                else:
                    raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            work()
        monkeypatch.setattr(streams, "_set", before)
        assert current_scope() is not scope
        assert launched_on() == 0x40
        with scope:  # it is closed, and may be opened again
            assert launched_on() == 0x10
        assert launched_on() == 0x40
    assert current() == 0


def test_a_scope_keeps_its_stream_object_alive() -> None:
    source = LikeTorch()
    alive = weakref.ref(source)
    scope = stream(source)
    del source
    with scope:
        assert alive() is not None


@pytest.fixture
def two_gpus(monkeypatch) -> Iterator[list[int]]:
    """Streams below 100 are of cuda:0, others of cuda:1; who asked, in order."""
    asked: list[int] = []

    def device_of(handle: int) -> int | None:
        asked.append(handle)
        return None if handle == 99 else int(handle >= 100)

    monkeypatch.setattr(streams, "device_of", device_of)
    streams.thread.checked.clear()
    yield asked
    streams.thread.checked.clear()


def test_a_stream_of_another_gpu_is_refused(two_gpus):
    for handle, device in ((50, CUDA1), (150, CUDA0)):
        with allowed("two_gpus"), pytest.raises(ArgumentError) as caught:
            stream_context(handle, device, "an_op")
        wrong = f"a stream of cuda:{1 - device.index}, expected a stream of {device}"
        assert f"an_op: argument `stream`: got {wrong}" in str(caught.value)
        refused = pytest.raises(ArgumentError, match=f"got {wrong}")
        with allowed("two_gpus"), stream(handle), refused:
            streams.open_scope(device, "an_op")
    assert len(two_gpus) == 4, "what is wrong is asked for each time"


def test_a_stream_is_asked_for_its_gpu_once(two_gpus):
    for _ in range(3):
        with stream_context(50, CUDA0, "an_op"):
            assert current() == 50
        with stream_context(150, CUDA1, "an_op"), stream(50):
            streams.open_scope(CUDA0, "an_op")
    assert two_gpus == [50, 150]
    for handle in range(200, 200 + streams._MAX_CHECKED):
        stream_context(handle, CUDA1, "an_op")
    assert len(streams.thread.checked) <= streams._MAX_CHECKED


def test_streams_of_no_gpu_of_their_own_are_not_asked(two_gpus):
    """The default streams are of the current device, and CUDA may not tell of others."""
    for handle in (0, 1, 2, 99):
        for device in (CUDA0, CUDA1):
            stream_context(handle, device, "an_op")
    stream_context(150, parse_device("cpu"), "an_op")
    assert two_gpus == [99, 99]  # and what is not told is not remembered


def test_a_signal_while_a_scope_opens_leaves_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its exception arrives when the scope is current, before the block is entered."""
    real, signals = streams.scope_var, [KeyboardInterrupt]

    class Interrupted:
        get = real.get

        def set(self, value: Any) -> None:
            real.set(value)
            if signals:
                raise signals.pop()

    scope = stream(0x30)
    with stream(0x20) as outer:
        with monkeypatch.context() as patch:
            patch.setattr(streams, "scope_var", Interrupted())
            with pytest.raises(KeyboardInterrupt):
                scope.__enter__()
        found = current_scope()
        real.set(outer)
        assert found is outer
        with scope:
            assert current_scope() is scope
