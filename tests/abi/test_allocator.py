"""Tensors that kernels allocate: as kernels ask for them, through libtvm_ffi."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from fi_ffi.abi import library, streams
from fi_ffi.abi._cffi import ffi
from fi_ffi.abi.allocator import _ALLOCATORS, HOST, Allocator, MemoryPool
from fi_ffi.abi.failure import check
from fi_ffi.abi.library import TypeIndex
from fi_ffi.abi.objects import Tensor
from fi_ffi.abi.tensor import DTYPES, Device
from fi_ffi.errors import KernelError

from tests.helpers.allocating import CUDA, alloc, desc_of
from tests.helpers.children import done

pytestmark = pytest.mark.usefixtures("heap")


class Ledger:
    """A source that writes down what is taken and given back."""

    def __init__(self) -> None:
        self.taken: list[tuple[int, Device, int]] = []
        self.given: list[tuple[int, Device, int]] = []

    @property
    def source(self) -> MemoryPool:
        return MemoryPool(self.take, self.give_back)

    def take(self, count: int, device: Device, stream: int) -> int:
        self.taken.append((count, device, stream))
        return 0x10000 * len(self.taken)

    def give_back(self, address: int, device: Device, stream: int) -> None:
        self.given.append((address, device, stream))


@pytest.fixture
def host() -> Iterator[Allocator]:
    made = Allocator({"cpu": HOST})
    yield made
    gc.collect()
    assert made.count == 0, "a tensor was not freed"
    _ALLOCATORS.remove(made)


@pytest.fixture
def ledger() -> Ledger:
    return Ledger()


def fails_outside() -> None:
    with pytest.raises(KernelError):
        alloc()


def failing(error: BaseException) -> Allocator:
    def fail(count: int, device: Device, stream: int) -> int:
        raise error

    return Allocator({"cpu": MemoryPool(fail, HOST.give_back)})


@pytest.mark.parametrize("shape", [(), (0,), (4, 0, 2), (7,), (1, 1, 1, 1, 9)])
def test_a_tensor_is_what_was_asked_for(host: Allocator, shape: tuple[int, ...]) -> None:
    for dtype in DTYPES:
        with host.installed():
            tensor = alloc(shape, dtype)
        desc = desc_of(tensor)
        assert (desc.shape, desc.dtype.name, desc.device.type) == (shape, dtype, "cpu")
        assert desc.is_contiguous
        assert desc.ptr % 256 == 0 and desc.ptr
        assert host.count == 1
        header = ffi.cast("TVMFFIObject *", tensor.handle)
        assert header.type_index == TypeIndex.TENSOR and tensor.use_count == 1
        tensor.release()


def test_memory_holds_what_is_written(host: Allocator) -> None:
    with host.installed():
        tensors = [alloc((n, 1000), "float64") for n in range(1, 20)]
    memory = [
        ffi.buffer(ffi.cast("char *", desc.ptr), desc.span_bytes) for desc in map(desc_of, tensors)
    ]
    written = [os.urandom(len(buffer)) for buffer in memory]
    for buffer, content in zip(memory, written, strict=True):
        buffer[:] = content
    assert [bytes(buffer) for buffer in memory] == written, "two tensors overlap"


def test_freed_with_the_last_reference(host: Allocator) -> None:
    with host.installed():
        first, second = alloc(), alloc()
    assert host.count == 2
    check(library.lib.TVMFFIObjectIncRef(first.handle), "IncRef")
    other = Tensor(first.handle)
    first.release()
    assert host.count == 2
    other.release()
    assert host.count == 1
    second.release()
    assert host.count == 0


def test_only_inside_the_scope_and_on_its_thread(host: Allocator) -> None:
    fails_outside()
    with host.installed(), ThreadPoolExecutor(1) as pool:
        pool.submit(fails_outside).result()
        alloc()
    fails_outside()
    with pytest.raises(ZeroDivisionError), host.installed():
        _ = 1 // 0
    fails_outside()


def test_scopes_nest(host: Allocator, ledger: Ledger) -> None:
    inner = Allocator({"cpu": ledger.source})
    with host.installed():
        with inner.installed():
            made = alloc()
            assert (host.count, inner.count) == (0, 1)
            with host.installed():
                again = alloc()
                assert (host.count, inner.count) == (1, 1)
            beneath = alloc()
            assert (host.count, inner.count) == (1, 2)
        after = alloc()
        assert (host.count, inner.count) == (2, 2)
    fails_outside()
    for tensor in (made, again, beneath, after):
        tensor.release()
    assert (host.count, inner.count) == (0, 0)
    assert len(ledger.taken) == len(ledger.given) == 2


def test_the_process_s_allocator_is_left_alone(host: Allocator, ledger: Ledger) -> None:
    """One that another library has set for every thread serves again after the scope."""
    theirs = Allocator({"cpu": ledger.source})
    swap = library.lib.TVMFFIEnvSetDLPackManagedTensorAllocator
    before = ffi.new("DLPackManagedTensorAllocator *")
    check(swap(theirs._callback, 1, before), "allocator")
    try:
        check(swap(ffi.NULL, 0, ffi.NULL), "allocator")
        with host.installed():
            alloc().release()
            assert not ledger.taken
        alloc().release()
        assert len(ledger.taken) == len(ledger.given) == 1
    finally:
        check(swap(ffi.NULL, 1, ffi.NULL), "allocator")
        check(swap(before[0], 0, ffi.NULL), "allocator")
    fails_outside()


class Mute(Exception):
    def __str__(self) -> str:
        raise ValueError


FAILURES = {
    MemoryError("no bytes of naïve memory"): "no bytes of naïve memory",
    OSError(3, "no"): "no",
    Mute(): "cannot be read",
}


@pytest.mark.parametrize("error", FAILURES, ids=repr)
def test_a_failing_source_is_told_in_its_words(host: Allocator, error: BaseException) -> None:
    made = failing(error)
    with made.installed():
        for _ in range(3):
            with pytest.raises(KernelError, match=FAILURES[error]) as caught:
                alloc((3, 5))
            assert (caught.value.op, caught.value.kind) == ("alloc_tensor", type(error).__name__)
        with host.installed():  # and the next call is fine
            alloc()
    assert made.count == 0


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3)], ids=repr)
def test_ctrl_c_in_an_allocator_is_ctrl_c(error: BaseException) -> None:
    with failing(error).installed(), pytest.raises(type(error)) as caught:
        alloc()
    assert caught.value.args == error.args
    assert isinstance(caught.value.__cause__, KernelError)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"device_type": CUDA.type_code}, "no tensor is allocated on cuda:0"),
        ({"device_type": 99}, "no tensor is allocated on device type 99"),
        ({"shape": (3, -1)}, r"a tensor of shape \(3, -1\) was asked for"),
        ({"shape": (2**40, 2**17)}, "bytes of host memory"),
        ({"shape": (2**62,)}, "."),
        ({"shape": (2**40, 2**40)}, "."),
    ],
)
def test_what_cannot_be_had_is_told(host: Allocator, asked: dict[str, Any], words: str) -> None:
    with host.installed(), pytest.raises(KernelError, match=words):
        alloc(**asked)


def test_memory_is_of_the_stream_that_is_current(ledger: Ledger) -> None:
    """Taken and given back on it, whatever is current when the tensor dies."""
    made = Allocator({"cuda": ledger.source})
    before = streams.swap(CUDA, 0x1230)
    with made.installed():
        tensor = alloc((7, 3), "float16", CUDA.type_code)
        streams.swap(CUDA, 0x4560)
        other = alloc((1,), "float16", CUDA.type_code)
    streams.swap(CUDA, before)
    assert ledger.taken == [(42, CUDA, 0x1230), (2, CUDA, 0x4560)]
    assert desc_of(tensor).ptr == 0x10000 and desc_of(tensor).device is CUDA
    other.release()
    tensor.release()
    assert ledger.given == [(0x20000, CUDA, 0x4560), (0x10000, CUDA, 0x1230)]


def test_packed_elements_take_whole_bytes(ledger: Ledger) -> None:
    made = Allocator({"cpu": ledger.source})
    with made.installed():
        alloc((3, 5), "float4_e2m1fn_x2").release()
        alloc((), "bool").release()
        alloc((0, 9), "float64").release()
    assert [count for count, *_ in ledger.taken] == [15, 1, 0]


def test_a_source_that_cannot_take_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Told where Python tells of a failing `__del__`; the caller's release succeeds."""
    told: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", told.append)

    def fail(*_: object) -> None:
        raise RuntimeError("the device is gone")

    made = Allocator({"cpu": MemoryPool(lambda *_: 0x1000, fail)})
    with made.installed():
        alloc().release()
    assert made.count == 0
    assert [str(entry.exc_value) for entry in told] == ["the device is gone"]


AT_EXIT = """
import sys
import cffi
from fi_ffi.abi import library
from fi_ffi.abi._cffi import ffi
from fi_ffi.abi.allocator import HOST, Allocator, MemoryPool
from fi_ffi.loader import runtime
from tests.helpers.allocating import alloc

def give_back(address, device, stream):
    print("given back", flush=True)

runtime.ensure_tvm_ffi()
made = Allocator({"cpu": MemoryPool(HOST.take, give_back)})
with made.installed():
    alloc((4,), "uint8").release()
    left = alloc((4,), "uint8")
handle = int(ffi.cast("uintptr_t", left.handle))
library.lib.TVMFFIObjectIncRef(left.handle)
left.release()
own = cffi.FFI()
own.cdef("int __cxa_atexit(void *function, void *argument, void *library);")
release = ffi.cast("uintptr_t", ffi.addressof(library.lib, "TVMFFIObjectDecRef"))
assert own.dlopen(None).__cxa_atexit(
    own.cast("void *", int(release)), own.cast("void *", handle), own.NULL) == 0
print("leaving", flush=True)
"""


def test_a_tensor_released_after_the_interpreter() -> None:
    """C code frees it from an exit handler: nothing of Python may run then."""
    assert done(AT_EXIT) == (0, "given back\nleaving\n", "")
