"""Reference-counted objects: every reference released exactly once."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fi_ffi.abi import library
from fi_ffi.abi._cffi import ffi
from fi_ffi.abi.function import (
    Entry,
    Frame,
    FrameLayout,
    array_values,
    global_function,
    make_array,
    module_function,
)
from fi_ffi.abi.interop import as_desc
from fi_ffi.abi.objects import (
    Array,
    Error,
    Module,
    Object,
    String,
    Tensor,
    find_global,
    lent_count,
)
from fi_ffi.abi.tensor import TensorDesc
from fi_ffi.errors import ArgumentError, FiFfiError, KernelError, LoaderError

from tests.abi.conftest import Heap
from tests.helpers.frames import write_tensor
from tests.helpers.heap_text import heap_string
from tests.helpers.remains import allowed
from tests.ops.test_threads import at_once

pytestmark = pytest.mark.usefixtures("heap")


def make_error() -> Error:
    parts = [library.byte_array(part) for part in (b"IndexError", b"past the end", b"")]
    slot = ffi.new("TVMFFIObjectHandle *")
    assert library.lib.TVMFFIErrorCreate(*(array for array, _ in parts), slot) == 0
    return Error(slot[0])


def make_string() -> String:
    return heap_string()


def make_tensor() -> Tensor:
    return Tensor.from_desc(TensorDesc(0x1000, (2, 3), "float16"))


MAKERS: dict[str, Callable[[], Object]] = {
    "array": lambda: make_array([1, "two"]),
    "error": make_error,
    "string": make_string,
    "function": lambda: find_global("ffi.ArraySize"),
    "tensor": make_tensor,
    "map": lambda: global_function("ffi.Map")("a", 1, "b", make_array([1])),
}


@pytest.fixture(params=MAKERS)
def owned(request: pytest.FixtureRequest) -> Iterator[Object]:
    made = MAKERS[request.param]()
    yield made
    made.release()


def test_release_is_once(owned: Object) -> None:
    # A second reference, of which this test is the owner, so that the count stays readable.
    handle = ffi.cast("TVMFFIObjectHandle", owned.handle)
    assert library.lib.TVMFFIObjectIncRef(handle) == 0
    other = Object(handle)
    before, lent, is_lent = other.use_count, lent_count(), isinstance(owned, Tensor)
    for _ in range(2):
        owned.release()
        # The memory of a tensor is ours to keep while others refer to it.
        assert (other.use_count, lent_count()) == (before - 1, lent)
    del owned
    gc.collect()
    assert other.use_count == before - 1
    other.release()
    assert lent_count() == lent - is_lent


@pytest.mark.parametrize("is_released", [True, False])
def test_a_tensor_lets_go_of_its_owner(is_released: bool, heap: Heap) -> None:
    """When it is released, or after it died; and of its memory."""
    array = np.zeros((2, 3), np.float16)
    alive, before = weakref.ref(array), lent_count()
    tensor = Tensor.from_desc(as_desc(array))
    del array
    assert alive() is not None and len(heap.blocks) == 1
    if is_released:
        tensor.release()
    del tensor
    if is_released:
        assert alive() is None and not heap.blocks
    assert lent_count() == before and alive() is None and not heap.blocks


def test_release_on_two_threads() -> None:
    """Of two that release one object, one does; its memory is freed once."""
    before = lent_count()
    for _ in range(200):
        owned = [make_tensor() for _ in range(20)]
        at_once(lambda _, owned=owned: [tensor.release() for tensor in owned], 2)
    assert lent_count() == before


def test_use_after_release(owned: Object, echo: Entry) -> None:
    name = type(owned).__name__
    with owned as same:
        assert same is owned and owned.use_count >= 1
    for use in (lambda: owned.handle, lambda: owned.use_count, lambda: echo(owned)):
        with pytest.raises(FiFfiError, match=f"{name} (that )?was released"):
            use()


def test_counts_come_back(owned: Object, echo: Entry, callback: Callable[..., Entry]) -> None:
    """On every path: result kept, result dropped, callback, failure before and in the call."""
    before = owned.use_count
    assert global_function("testing.object_use_count")(owned) == before
    kept = echo(owned)
    if isinstance(owned, String):
        assert kept == str(owned)  # strings are values, copied out
    else:
        assert type(kept) is type(owned) and kept.handle == owned.handle
    if isinstance(kept, Error):
        assert (kept.exception("plan").op, kept.exception("plan").kind) == ("plan", "IndexError")
    assert owned.use_count == before + (not isinstance(owned, String))
    del kept
    assert owned.use_count == before

    callback(lambda value: None)(owned)
    assert owned.use_count == before
    if not isinstance(owned, Tensor):  # a callback sees a tensor as a view
        assert type(callback(lambda value: value)(owned)) in (type(owned), str)
    assert owned.use_count == before

    def fail(value: object) -> None:
        raise ValueError(value)

    with pytest.raises(KernelError):
        callback(fail)(owned)
    gc.collect()  # the traceback held the argument
    assert owned.use_count == before

    with pytest.raises(ArgumentError):
        echo(owned, 2**64)
    with pytest.raises(KernelError, match="Mismatched number"):
        callback(lambda value: None)(owned, owned)
    with make_array([owned, owned]) as array:
        assert owned.use_count == before + 2
        elements = array_values(array)
        assert owned.use_count == before + 2 + 2 * (not isinstance(owned, String))
        del elements
    assert owned.use_count == before


def test_a_callback_may_keep_its_argument(callback: Callable[..., Entry]) -> None:
    kept: list[Array] = []
    array = make_array([1, 2])
    callback(kept.append)(array)
    assert array.use_count == 2
    array.release()
    assert array_values(kept[0]) == [1, 2]


def test_modules(testing_library: Path) -> None:
    load = global_function("ffi.ModuleLoadFromFile")
    with load(str(testing_library)) as module:
        assert isinstance(module, Module)
        before = module.use_count
        add = module_function(module, "testing_dll_test_add_with_docstring")
        assert add(2, 3) == 5
        assert module_function(module, "testing_dll_schema_id_int")(7) == 7
        for find in (lambda name: module_function(module, name), global_function):
            with pytest.raises(LoaderError, match="no_such"):
                find("no_such")
        assert module.use_count > before
    assert add(20, 3) == 23  # it keeps its module
    with pytest.raises(KernelError, match="no-such.so"):
        load("no-such.so")


def read_back(array: Array, callback: Callable[..., Entry]) -> TensorDesc:
    seen: list[Any] = []
    callback(seen.append)(array_values(array)[0])
    return seen[0]


def test_a_tensor_kept_by_a_callee(testing_library: object, callback: Callable[..., Entry]) -> None:
    """C++ keeps the object past our release: its shape and strides must still be there."""
    keep = global_function("testing.make_array_with_tensor")
    kept = []
    for size in range(100):
        desc = TensorDesc(0x1000 + size, (size, 3), "bfloat16", strides=(5, 1))
        with Tensor.from_desc(desc) as tensor:
            kept.append((keep(tensor), desc))
    gc.collect()
    for array, desc in kept:
        found = read_back(array, callback)
        assert repr(found) == repr(desc)


@pytest.mark.parametrize("error", [MemoryError("no room"), KeyboardInterrupt(), None], ids=repr)
def test_a_tensor_that_is_not_made_leaves_nothing(
    error: BaseException | None, heap: Heap, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where libtvm_ffi refuses, or a signal's exception comes in between."""

    class Failing:
        def __getattr__(self, name: str) -> Any:
            return getattr(lib, name)

        def TVMFFITensorFromDLPack(self, *_: object) -> int:
            taken.append(len(heap.blocks))
            if error is not None:
                raise error
            return -1

    lib, taken = library.lib, list[int]()
    desc = TensorDesc(0x1000, (1,) * 64, "float16")
    monkeypatch.setattr(library, "lib", Failing())
    for make in (lambda: Tensor.from_desc(desc), lambda: make_array([7, desc, desc])):
        with pytest.raises(type(error) if error is not None else FiFfiError):
            make()
        assert taken.pop() == 1 and not heap.blocks
    monkeypatch.setattr(library, "lib", lib)
    with make_array([desc]):
        assert len(heap.blocks) == 1


def test_an_error_that_is_kept_keeps_no_temporaries(
    heap: Heap, echo: Entry, callback: Callable[..., Entry]
) -> None:
    """What was made of the arguments goes with the call, though the traceback has its frames."""

    def fail(value: object) -> None:
        raise ValueError

    desc, other = TensorDesc(0x1000, (2, 3), "float16"), make_string()
    calls: list[Callable[[], object]] = [
        lambda: callback(fail)(desc),
        lambda: callback(fail, 2)(desc),
        lambda: echo(desc, 2**64),
        lambda: make_array([other, desc, object()]),
    ]
    for call in calls:
        # The heap knows what was freed.
        with allowed("heap._freed"), pytest.raises(FiFfiError) as caught:
            call()
        assert not heap.blocks and other.use_count == 1, caught.value


def test_a_tensor_of_a_frame_kept_by_a_callee(
    testing_library: object, callback: Callable[..., Entry]
) -> None:
    entry = global_function("testing.make_array_with_tensor")
    desc = TensorDesc(0, (4, 3), "float32", device="cpu")
    kept, frames = [], []
    for ptr in (0x1000, 0x2000, 0x3000):
        frame = Frame(FrameLayout([2]), [(desc.kind, True)], entry)
        write_tensor(frame, 0, desc.at(ptr))
        frame.place_objects()
        assert not frame.is_referred_to
        kept.append((frame.call(), ptr))
        assert frame.is_referred_to
        frames.append(frame)  # whoever has such a frame keeps it: `Frame.give_back`
    gc.collect()
    for array, ptr in kept:
        assert repr(read_back(array, callback)) == repr(desc.at(ptr))
