"""What other libraries read of descriptors: interfaces, numpy's view, DLPack; owners stay alive."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import fi_ffi
from fi_ffi import export
from fi_ffi.abi.dlpack import open_capsule
from fi_ffi.abi.interop import as_desc
from fi_ffi.abi.tensor import DTYPES, TensorDesc, make_desc, parse_device
from fi_ffi.errors import ArgumentError, ArgumentTypeError

from tests.helpers.numpys import versioned_dlpack
from tests.stress.gauges import leaves_nothing

PACKED = {name for name, dtype in DTYPES.items() if dtype.lanes > 1 or dtype.shares_bytes}
WHOLE = sorted({*DTYPES} - PACKED)


class Array(np.ndarray):  # type: ignore[type-arg]
    """One that can be referred to weakly."""


def random_array(name: str, shape: tuple[int, ...] = (4, 6)) -> np.ndarray[Any, Any]:
    dtype = DTYPES[name].numpy
    if name == "bool":
        return np.random.default_rng().integers(0, 2, shape).astype(bool)
    size = int(np.prod(shape)) * dtype.itemsize
    return np.frombuffer(np.random.default_rng().bytes(size), dtype).reshape(shape).copy()


VIEWS = {
    "whole": lambda array: array,
    "reversed": lambda array: array[::-1, ::-2],
    "transposed": lambda array: array.T,
    "broadcast": lambda array: np.broadcast_to(array[:1], (3, *array.shape[1:])),
    "of rank 0": lambda array: array[1, 1, ...],
    "empty": lambda array: array[:0],
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("name", WHOLE)
def test_numpy_reads_what_is_there(name: str, view: str) -> None:
    array = VIEWS[view](random_array(name))
    desc = as_desc(array)
    found = np.asarray(desc)
    assert (found.shape, found.dtype) == (array.shape, array.dtype)
    assert found.tobytes() == array.tobytes()
    assert found.flags.writeable == array.flags.writeable == (not desc.readonly)
    if array.size:
        assert np.shares_memory(found, array)
        assert fi_ffi.as_desc(found).ptr == desc.ptr
    if found.flags.writeable and array.size:
        found[...] = np.zeros((), array.dtype)
        assert not np.asarray(array).view(f"u{array.itemsize}").any()
    copied = np.array(desc)
    assert not array.size or not np.shares_memory(copied, array)
    assert copied.tobytes() == array.tobytes()


def test_numpy_converts_where_it_is_asked_to() -> None:
    array = np.arange(4).astype(ml_dtypes.bfloat16)
    desc = as_desc(array)
    assert np.asarray(desc, np.float64).tolist() == [0, 1, 2, 3]
    assert desc.__array__(np.dtype(ml_dtypes.bfloat16), copy=False).dtype == array.dtype
    assert not np.shares_memory(desc.__array__(copy=True), array)
    with pytest.raises(ValueError, match="takes a copy"):
        desc.__array__(np.float32, copy=False)


@pytest.mark.parametrize("name", sorted(PACKED))
def test_what_numpy_has_no_elements_for(name: str) -> None:
    """Never an array of one object, which goes on until something computes with it."""
    memory = np.zeros(64, np.uint8)
    desc = TensorDesc(memory.ctypes.data, (4, 4), name, device="cpu")
    with pytest.raises(ArgumentTypeError, match=rf"got {name}\[4, 4\] on cpu, expected a dtype"):
        np.asarray(desc)
    assert not hasattr(desc, "__array_interface__")
    managed, _ = open_capsule(desc.__dlpack__())
    dtype = DTYPES[name]
    assert (managed.dtype.code, managed.dtype.bits, managed.dtype.lanes) == (
        dtype.code, dtype.bits, dtype.lanes,
    )  # fmt: skip


@pytest.mark.parametrize("device", ["cuda:0", "cuda:1", "cuda_managed:0", "cuda_host", "cpu"])
def test_interfaces_are_of_the_memory_s_kind(device: str) -> None:
    array = random_array("float16")
    desc = TensorDesc(array.ctypes.data, (4, 3), "float16", strides=(6, 2), device=device)
    assert hasattr(desc, "__array_interface__") == (not device.startswith("cuda:"))
    assert hasattr(desc, "__cuda_array_interface__") == device.startswith(("cuda:", "cuda_m"))
    if device.startswith("cuda:"):
        with pytest.raises(ArgumentTypeError, match="expected memory of the host"):
            np.asarray(desc)
    else:
        assert np.asarray(desc).tobytes() == array[:, ::2].tobytes()
    if hasattr(desc, "__cuda_array_interface__"):
        assert desc.__cuda_array_interface__ == {
            "version": 3, "shape": (4, 3), "typestr": "<f2", "data": (array.ctypes.data, False),
            "strides": (12, 4), "stream": None,
        }  # fmt: skip
    assert desc.__dlpack_device__() == (desc.device.type_code, desc.device.index)


def test_the_stream_of_a_scope() -> None:
    """0 would mean none: the protocol calls the legacy default stream 1."""
    desc = TensorDesc(4096, (4,), "float16", device="cuda:0")
    for handle, told in ((0, 1), (2, 2), (4096, 4096)):
        with fi_ffi.stream(handle):
            assert desc.__cuda_array_interface__["stream"] == told
    with fi_ffi.stream(4096) as scope:
        scope.device = parse_device("cuda:1")  # in use there
        assert desc.__cuda_array_interface__["stream"] is None
        scope.device = None
    assert TensorDesc(0, (0, 4), "int8").__cuda_array_interface__["data"] == (0, False)
    readonly = make_desc(4096, (4,), "int8", None, "cuda:0", readonly=True)
    assert readonly.__cuda_array_interface__["data"] == (4096, True)
    for name in ("bfloat16", "float8_e8m0fnu", "int4"):
        assert not hasattr(TensorDesc(64, (4,), name), "__cuda_array_interface__")


@pytest.mark.parametrize("version", [None, (0, 8), (1, 0), (1, 3)])
@pytest.mark.parametrize("device", ["cpu", "cuda:3", "cuda_managed:1", "cuda_host"])
@pytest.mark.parametrize("name", DTYPES)
def test_capsules(name: str, device: str, version: tuple[int, int] | None) -> None:
    """Read back as DLPack's consumers read them."""
    strides = (3, 1) if DTYPES[name].shares_bytes else (-8, 2)
    desc = TensorDesc(2**40, (2, 3), name, strides=strides, device=device)
    capsule = desc.__dlpack__(max_version=version, dl_device=desc.__dlpack_device__(), copy=False)
    tensor, readonly = open_capsule(capsule)
    assert (tensor.device.device_type, tensor.device.device_id) == desc.__dlpack_device__()
    dtype = desc.dtype
    assert (tensor.dtype.code, tensor.dtype.bits, tensor.dtype.lanes) == (
        dtype.code, dtype.bits, dtype.lanes,
    )  # fmt: skip
    shape, steps = tuple(tensor.shape[0:2]), tuple(tensor.strides[0:2])
    assert (tensor.ndim, shape, steps, readonly) == (2, (2, 3), strides, False)
    assert int(export.ffi.cast("uintptr_t", tensor.data)) + tensor.byte_offset == 2**40


@pytest.mark.parametrize("view", sorted({*VIEWS} - {"empty"}))
@pytest.mark.parametrize("name", WHOLE)
def test_torch_takes_capsules(name: str, view: str) -> None:
    torch = pytest.importorskip("torch")
    array = VIEWS[view](random_array(name))
    if not array.flags.writeable or min(array.strides, default=0) < 0:
        array = array.copy()  # torch has no such tensors
    if not hasattr(torch, name):
        pytest.skip(f"torch has no {name}")
    found = torch.from_dlpack(as_desc(array))
    assert (found.dtype, tuple(found.shape)) == (getattr(torch, name), array.shape)
    assert found.data_ptr() == as_desc(array).ptr
    plain = found.contiguous().reshape(-1).view(torch.uint8).numpy()
    assert plain.tobytes() == array.tobytes()


@versioned_dlpack
def test_read_only_memory() -> None:
    array = np.arange(4)
    array.flags.writeable = False
    desc = as_desc(array)
    assert not np.from_dlpack(desc).flags.writeable
    with pytest.raises(BufferError):  # which the older form cannot tell
        desc.__dlpack__()


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"copy": True}, "argument `copy`: got True"),
        ({"dl_device": (2, 0)}, r"argument `dl_device`: got \(2, 0\), expected \(1, 0\)"),
        ({"stream": "s"}, "argument `stream`: got 's'"),
        ({"stream": -2}, "argument `stream`: got -2"),
        ({"stream": True}, "argument `stream`: got True"),
    ],
    ids=["copy", "device", "text", "below", "bool"],
)
def test_what_dlpack_refuses(asked: dict[str, Any], words: str) -> None:
    with pytest.raises(ArgumentError, match=words) as caught:
        as_desc(np.zeros(3)).__dlpack__(**asked)
    assert caught.value.op == "TensorDesc.__dlpack__"
    assert isinstance(caught.value, BufferError) == ("stream" not in asked)


ORDERS = [
    # The stream that is asked for, that of the scope, and what waits for what.
    (None, 4096, (4096, 1)), (1, 4096, (4096, 1)), (8192, 4096, (4096, 8192)), (2, 0, (1, 2)),
    (4096, 4096, None), (1, 0, None), (0, 0, None), (-1, 4096, None), (8192, None, None),
]  # fmt: skip


@pytest.mark.parametrize(("asked", "scope", "expected"), ORDERS)
def test_a_consumer_waits_for_the_scope(
    asked: int | None, scope: int | None, expected: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is queued is shown on a GPU (tests/gpu/test_export.py); here, what is asked for."""
    seen: list[object] = []
    monkeypatch.setattr(export, "order", lambda device, *of: seen.append((str(device), *of)))
    desc = TensorDesc(4096, (4,), "float16", device="cuda:0")
    if scope is None:
        desc.__dlpack__(stream=asked)
    else:
        with fi_ffi.stream(scope):
            desc.__dlpack__(stream=asked)
            TensorDesc(4096, (4,), "float16", device="cpu").__dlpack__(stream=asked)
    assert seen == ([("cuda:0", *expected)] if isinstance(expected, tuple) else [])


def exported_by(way: str, desc: TensorDesc) -> Any:
    if way == "torch":
        return pytest.importorskip("torch").from_dlpack(desc)
    ways = {"asarray": np.asarray, "from_dlpack": np.from_dlpack, "capsule": TensorDesc.__dlpack__}
    return ways[way](desc)


# numpy's own reader knows no bfloat16.
WAYS = [("float32", "from_dlpack")]
WAYS += [(name, way) for name in ("float32", "bfloat16") for way in ("asarray", "capsule", "torch")]


@pytest.mark.parametrize(("name", "way"), WAYS)
def test_owners_stay(name: str, way: str) -> None:
    array = random_array(name, (1000,)).view(Array)
    gone = weakref.ref(array)
    made = exported_by(way, as_desc(array))
    del array
    gc.collect()
    assert gone() is not None
    del made
    gc.collect()
    assert gone() is None


def test_exports_leave_nothing() -> None:
    arrays = [random_array(name, (1000,)) for name in ("float32", "bfloat16")]

    def calls() -> None:
        for array in arrays:
            desc = as_desc(array)
            np.asarray(desc), desc.__dlpack__(), desc.__dlpack__(max_version=(1, 0))
            assert hasattr(desc, "__array_interface__") == (array.dtype == np.float32)
        np.from_dlpack(as_desc(arrays[0]))

    leaves_nothing(calls, 1000)
