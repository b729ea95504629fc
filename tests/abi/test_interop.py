"""Other libraries' tensors as descriptors."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from fi_ffi.abi.dtypes import DTYPES
from fi_ffi.abi.interop import as_desc
from fi_ffi.abi.tensor import TensorDesc
from fi_ffi.errors import ArgumentError, ArgumentTypeError

Array = np.ndarray[Any, Any]


class Wrapper:
    """Holds an array and shows it through one protocol only."""

    def __init__(self, array: Array, **changes: object) -> None:
        self.array = array
        self.changes = changes


class Versioned(Wrapper):
    def __dlpack__(self, **kwargs: Any) -> object:
        return self.array.__dlpack__(**kwargs)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.array.__dlpack_device__()


class Legacy(Versioned):
    def __dlpack__(self, stream: object = None) -> object:  # type: ignore[override]
        return self.array.__dlpack__()


class ArrayInterface(Wrapper):
    @property
    def __array_interface__(self) -> dict[str, Any]:
        return self.array.__array_interface__ | self.changes


class CudaArrayInterface(Wrapper):
    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return self.array.__array_interface__ | self.changes


CPU_EXPORTERS = [Versioned, Legacy, ArrayInterface]


def random_array(shape: tuple[int, ...], dtype: Any = np.float32) -> Array:
    return np.random.default_rng().integers(0, 100, shape).astype(dtype)


def check(desc: TensorDesc, array: Array) -> None:
    assert desc.ptr == array.ctypes.data
    assert desc.shape == array.shape
    assert desc.dtype.name == array.dtype.name
    assert tuple(s * array.itemsize for s in desc.strides) == array.strides
    assert str(desc.device) == "cpu"


def test_a_descriptor_is_itself() -> None:
    desc = TensorDesc(64, (2,), "int8")
    assert as_desc(desc) is desc


NUMPY_DTYPES = [d.numpy for name, d in DTYPES.items() if name != "float4_e2m1fn_x2"]


@pytest.mark.parametrize("dtype", NUMPY_DTYPES, ids=str)
def test_numpy_dtypes(dtype: np.dtype[Any]) -> None:
    array = np.zeros((2, 3), dtype)
    check(as_desc(array), array)


@pytest.mark.parametrize("exporter", [lambda array: array, *CPU_EXPORTERS])
@pytest.mark.parametrize(
    "view",
    [
        lambda a: a,
        lambda a: a.T,
        lambda a: a[::2, 1:],
        lambda a: a[:, ::-1],
        lambda a: a[0, 0],
        lambda a: a[1:1],
        lambda a: a.reshape(2, 1, 2, 6),
    ],
)
def test_views(exporter: Callable[[Array], Any], view: Callable[[Array], Array]) -> None:
    array = view(random_array((4, 6)))
    array = np.asarray(array)
    check(as_desc(exporter(array)), array)


@pytest.mark.parametrize("exporter", [lambda array: array, Versioned, ArrayInterface])
def test_read_only_memory_is_marked(exporter: Callable[[Array], Any]) -> None:
    array = random_array((3,))
    assert not as_desc(exporter(array)).layout.readonly
    array.flags.writeable = False
    assert as_desc(exporter(array)).layout.readonly
    assert as_desc(exporter(array)).layout is not as_desc(exporter(random_array((3,)))).layout


def test_read_only_memory_that_cannot_say_so() -> None:
    """A legacy capsule has no flag for it, and numpy then refuses to export."""
    array = random_array((3,))
    array.flags.writeable = False
    with pytest.raises(ArgumentError, match=r"`x`: got .*Legacy that refused: .*readonly"):
        as_desc(Legacy(array), "rmsnorm", "x")


@pytest.mark.parametrize("exporter", CPU_EXPORTERS)
def test_ml_dtypes_where_the_protocol_has_them(exporter: type[Wrapper]) -> None:
    array = np.zeros((2, 3), ml_dtypes.bfloat16)
    with pytest.raises(ArgumentError, match="`x`"):  # numpy exports none of them, nor names them
        as_desc(exporter(array), "rmsnorm", "x")
    exporting = exporter(array)
    exporting.dtype = array.dtype  # type: ignore[attr-defined]
    if exporter is ArrayInterface:
        check(as_desc(exporting), array)


@pytest.mark.parametrize(
    "array",
    [
        np.zeros(3, ">f4"),
        np.zeros(3, ">i2"),
        np.zeros(3, np.complex64),
        np.zeros(3, np.longdouble),
        np.zeros(3, object),
        np.zeros(3, "S4"),
        np.zeros(3, "U4"),
        np.zeros(3, "M8[s]"),
        np.zeros(3, [("a", "f4"), ("b", "f4")]),
        np.zeros(3, ml_dtypes.float8_e4m3fnuz),
        np.zeros(3, ml_dtypes.float8_e4m3),
        np.zeros(3, ml_dtypes.int4),
    ],
    ids=lambda array: str(array.dtype),
)
@pytest.mark.parametrize("exporter", [lambda array: array, *CPU_EXPORTERS])
def test_dtypes_that_are_not_in_the_table(array: Array, exporter: Callable[[Array], Any]) -> None:
    with pytest.raises(ArgumentError) as caught:
        as_desc(exporter(array), "rmsnorm", "weight")
    assert (caught.value.op, caught.value.argument) == ("rmsnorm", "weight")


def test_a_field_of_records_has_no_strides_in_elements() -> None:
    records = np.zeros(4, [("a", "<f4"), ("b", "<i2")])
    with pytest.raises(ArgumentError, match="strides of .6,. bytes, expected multiples"):
        as_desc(records["a"], "rmsnorm", "x")


@pytest.mark.parametrize(
    "value", [None, 1, 1.5, "x", b"x", [1.0], (1,), {}, object(), memoryview(b"x"), Array]
)
def test_no_tensor(value: object) -> None:
    with pytest.raises(ArgumentTypeError, match="rmsnorm: argument `x`"):
        as_desc(value, "rmsnorm", "x")


def test_protocols_are_looked_up_on_the_type() -> None:
    class Plain:
        pass

    plain = Plain()
    plain.__array_interface__ = np.zeros(1).__array_interface__  # type: ignore[attr-defined]
    with pytest.raises(ArgumentTypeError):
        as_desc(plain)


def test_a_scalar_is_a_tensor_of_rank_0() -> None:
    """numpy makes an array for it on the spot, that only the interface keeps alive."""
    descs = [as_desc(np.float64(i)) for i in range(1000)]
    addresses = {desc.ptr for desc in descs}
    assert len(addresses) == 1000
    assert descs[0].shape == ()


class Returning(Wrapper):
    """Its `__dlpack__` gives whatever it was told to."""

    def __dlpack__(self, **kwargs: Any) -> object:
        result = self.changes["result"]
        if isinstance(result, BaseException):
            raise result
        return result

    def __dlpack_device__(self) -> Any:
        return self.changes.get("device", (1, 0))


def used_capsule() -> object:
    class Once:
        def __init__(self) -> None:
            self.capsule = np.zeros(3).__dlpack__()

        def __dlpack__(self, **_: object) -> object:
            return self.capsule

        def __dlpack_device__(self) -> tuple[int, int]:
            return (1, 0)

    once = Once()
    np.from_dlpack(once)
    assert "used" in repr(once.capsule)
    return once.capsule


def foreign_capsule() -> object:
    import datetime

    return datetime.datetime_CAPI  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "result",
    [
        None,
        1,
        "dltensor",
        '<capsule object "dltensor" at 0x0>',
        object(),
        used_capsule(),
        foreign_capsule(),
        ValueError("no memory of mine"),
        TypeError("not with these"),
        BufferError("it is in use"),
        RuntimeError(),
    ],
    ids=repr,
)
def test_dlpack_gone_wrong(result: object) -> None:
    exporter = Returning(np.zeros(1), result=result)
    with pytest.raises(ArgumentError) as caught:
        as_desc(exporter, "rmsnorm", "weight")
    assert (caught.value.op, caught.value.argument) == ("rmsnorm", "weight")
    assert caught.value.__cause__ is not None
    if isinstance(result, BaseException):
        assert caught.value.__cause__ is result
        assert str(result) in str(caught.value)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, MemoryError])
def test_what_is_not_the_exporters_to_refuse_passes(error: type[BaseException]) -> None:
    with pytest.raises(error):
        as_desc(Returning(np.zeros(1), result=error()))


@pytest.mark.parametrize("device", [(10, 0), (7, 1), (0, 0), (-1, 0), None, (1,), ("cpu", 0)])
def test_devices_that_are_not_ours(device: object) -> None:
    exporter = Returning(np.zeros(1), result=None, device=device)
    with pytest.raises(ArgumentError, match="rmsnorm: argument `weight`"):
        as_desc(exporter, "rmsnorm", "weight")


@pytest.mark.parametrize("missing", ["data", "shape", "typestr"])
@pytest.mark.parametrize("exporter", [ArrayInterface, CudaArrayInterface])
def test_interfaces_without_a_part(exporter: type[Wrapper], missing: str) -> None:
    class Without(exporter):  # type: ignore[misc,valid-type]
        pass

    def read(self: Wrapper) -> dict[str, Any]:
        interface = dict(self.array.__array_interface__, data=(0, False))
        del interface[missing]
        return interface

    name = f"__{'cuda_' if exporter is CudaArrayInterface else ''}array_interface__"
    setattr(Without, name, property(read))
    with pytest.raises(ArgumentError, match="rmsnorm: argument `x`"):
        as_desc(Without(np.zeros((0, 2))), "rmsnorm", "x")


@pytest.mark.parametrize(
    "changes",
    [
        {"data": None},
        {"data": 0},
        {"data": (-1, False)},
        {"data": ("0x40", False)},
        {"shape": (-1,)},
        {"shape": 3},
        {"shape": (2.0,)},
        {"typestr": ""},
        {"typestr": "f"},
        {"typestr": "<f"},
        {"typestr": "<fx"},
        {"typestr": None},
        {"strides": (4, 4)},
        {"strides": (2,)},
        {"strides": ("4",)},
    ],
    ids=repr,
)
def test_interfaces_with_a_wrong_part(changes: dict[str, object]) -> None:
    with pytest.raises(ArgumentError):
        as_desc(ArrayInterface(random_array((3,)), **changes), "rmsnorm", "x")


def test_cuda_array_interface_without_elements() -> None:
    """No driver is asked about an address of 0."""
    exporter = CudaArrayInterface(np.zeros((0, 4), np.float16), data=(0, False), version=3)
    desc = as_desc(exporter)
    assert (desc.ptr, desc.shape, desc.dtype.name) == (0, (0, 4), "float16")
    assert str(desc.device) == "cuda:0"


def test_cuda_array_interface_of_unknown_memory() -> None:
    """Without a driver or with one, host memory is no CUDA tensor."""
    exporter = CudaArrayInterface(random_array((3, 4)))
    with pytest.raises(ArgumentError, match="rmsnorm: argument `input`") as caught:
        as_desc(exporter, "rmsnorm", "input")
    assert caught.value.__cause__ is not None


@pytest.mark.parametrize("exporter", CPU_EXPORTERS)
def test_the_exporter_lives_as_long_as_the_descriptor(exporter: type[Wrapper]) -> None:
    exported = exporter(random_array((3,)))
    alive = weakref.ref(exported)
    desc = as_desc(exported)
    pointer = desc.ptr
    del exported
    gc.collect()
    assert alive() is not None
    assert alive().array.ctypes.data == pointer
    del desc
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("exporter", [Versioned, Legacy])
def test_every_export_is_given_back(exporter: type[Wrapper]) -> None:
    """numpy holds a reference to the array in each capsule until that is destroyed."""
    import sys

    array = random_array((3,))
    before = sys.getrefcount(array)
    descs = [as_desc(exporter(array)) for _ in range(100)]
    assert sys.getrefcount(array) >= before + 200  # the wrapper's and the capsule's
    descs.clear()
    assert sys.getrefcount(array) == before
