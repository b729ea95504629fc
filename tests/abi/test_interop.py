"""Other libraries' tensors as descriptors."""

from __future__ import annotations

import gc
import re
import weakref
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import fi_ffi
from fi_ffi.abi.interop import as_desc
from fi_ffi.abi.tensor import DTYPES, TensorDesc
from fi_ffi.errors import ArgumentError, ArgumentTypeError

from tests.helpers.ids import shown

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
    assert not as_desc(exporter(array)).readonly
    array.flags.writeable = False
    assert as_desc(exporter(array)).readonly
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
    ids=shown,
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
    ids=shown,
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


# Interfaces that once led somewhere else.


@pytest.mark.parametrize("exporter", [ArrayInterface, CudaArrayInterface])
@pytest.mark.parametrize("data", [bytes(64), bytearray(64), memoryview(bytes(64)), np.zeros(8)])
def test_data_that_is_a_buffer(exporter: type[Wrapper], data: object) -> None:
    """numpy's protocol allows it; its first bytes are no address."""
    with pytest.raises(ArgumentError, match="data is .*, not an address and a flag") as caught:
        as_desc(exporter(random_array((4,)), data=data), "rmsnorm", "x")
    assert (caught.value.op, caught.value.argument) == ("rmsnorm", "x")


@pytest.mark.parametrize("part", ["shape", "strides"])
def test_a_shape_without_an_end(part: str) -> None:
    def endless() -> Any:
        while True:
            yield 1

    class Endless:
        def __iter__(self) -> Any:
            return endless()

    with pytest.raises(ArgumentError, match="64 at most"):
        TensorDesc(64, **{"shape": (1,), part: Endless()}, dtype="int8")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="64 at most"):
        TensorDesc(64, **{"shape": (1,), part: endless()}, dtype="int8")
    if part == "shape":
        exporter = ArrayInterface(random_array((3,)), **{part: endless()})
        with pytest.raises(ArgumentError):
            as_desc(exporter, "rmsnorm", "x")


def test_an_object_that_looks_like_a_descriptor() -> None:
    """What it says of itself is not what it is."""

    class Lookalike:
        layout = TensorDesc(64, (4, 16), "float16", device="cpu").layout
        kind = TensorDesc(64, (4, 16), "float16", device="cpu").kind
        shape, strides, owner, ptr = (4, 16), (16, 1), None, -4096

    with pytest.raises(ArgumentTypeError, match="rmsnorm: argument `x`: got .*Lookalike"):
        as_desc(Lookalike(), "rmsnorm", "x")
    with pytest.raises(ArgumentTypeError, match="rmsnorm: argument `input`: got .*Lookalike"):
        fi_ffi.rmsnorm(np.zeros((4, 16), np.float16), Lookalike(), np.ones(16, np.float16))  # type: ignore[arg-type]


# numpy's arrays, by their attributes.


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.int64])
@pytest.mark.parametrize(
    "view",
    [
        lambda a: a,
        lambda a: a.T,
        lambda a: np.asfortranarray(a),
        lambda a: a[::2],
        lambda a: a[:, ::-1],
        lambda a: a[1:1],
        lambda a: a[0, 0, ...],
        lambda a: np.broadcast_to(a[0], a.shape),
        lambda a: a.reshape(-1)[:1].reshape(1, 1, 1),
    ],
)
def test_numpy_views_time_and_again(view: Callable[[Array], Array], dtype: Any) -> None:
    """The first of a dtype and rank is read from its interface, the others by attributes."""
    for _ in range(3):
        array = view(random_array((4, 6), dtype))
        desc = as_desc(array)
        assert desc.ptr == array.__array_interface__["data"][0]
        assert (desc.shape, desc.dtype.name) == (array.shape, array.dtype.name)
        for step, own, size in zip(desc.strides, array.strides, array.shape, strict=True):
            assert step * array.itemsize == own or size <= 1
        assert desc.readonly == (not array.flags.writeable)
        array = random_array(array.shape, dtype)
        if array.size:  # numpy's strides of nothing are 0
            check(as_desc(array), array)
        array.flags.writeable = False
        assert as_desc(array).readonly
        assert not as_desc(random_array(array.shape, dtype)).readonly


def test_numpy_arrays_that_are_derived() -> None:
    class Mine(np.ndarray):  # type: ignore[type-arg]
        pass

    array = random_array((3, 4)).view(Mine)
    for _ in range(2):
        check(as_desc(array), array)
        assert as_desc(array).owner is array or as_desc(array).owner[0] is array  # type: ignore[index]


def test_numpy_arrays_of_rank_0() -> None:
    for i in range(3):
        array = np.array(i, np.float32)
        desc = as_desc(array)
        assert (desc.ptr, desc.shape, desc.strides) == (array.ctypes.data, (), ())


# torch's tensors, by their attributes.


@pytest.fixture(scope="module")
def torch() -> Any:
    return pytest.importorskip("torch")


def same_as_torch(desc: TensorDesc, tensor: Any) -> None:
    assert desc.ptr == tensor.data_ptr()
    assert desc.shape == tuple(tensor.shape)
    assert desc.strides == tensor.stride()
    assert str(tensor.dtype) == f"torch.{desc.dtype.name}"
    assert {type(n) for n in (*desc.shape, *desc.strides)} <= {int}
    assert (str(desc.device), desc.readonly) == ("cpu", False)
    assert desc.owner is tensor


def test_torch_views(torch: Any) -> None:
    for _ in range(2):
        whole = torch.zeros(4, 6, 2, dtype=torch.bfloat16)
        for tensor in (
            whole, whole.mT, whole[::2, 1:], whole[0, 0, 0], whole[1:1], whole.expand(4, 6, 2),
            whole[:, :1].expand(4, 6, 2), whole.reshape(-1), torch.tensor(1.5), whole.real,
        ):  # fmt: skip
            same_as_torch(as_desc(tensor), tensor)


@pytest.mark.filterwarnings("ignore:ComplexHalf")
def test_torch_dtypes(torch: Any) -> None:
    for name in DTYPES:
        dtype = getattr(torch, name, None)
        if dtype is not None and name != "float4_e2m1fn_x2":
            tensor = torch.empty((2, 3), dtype=dtype)
            same_as_torch(as_desc(tensor), tensor)
    for dtype in (torch.complex64, torch.complex32):
        with pytest.raises(ArgumentError, match=f"`x`: got dtype {dtype}"):
            as_desc(torch.zeros(2, dtype=dtype), "rmsnorm", "x")


def test_torch_tensors_that_have_gradients(torch: Any) -> None:
    """DLPack refuses these; a kernel reads them like any other."""
    for tensor in (
        torch.nn.Parameter(torch.ones(3, 4)),
        torch.ones(3, 4, requires_grad=True),
        torch.ones(3, 4, requires_grad=True) * 2,
        torch.nn.Buffer(torch.ones(3, 4)),
    ):
        same_as_torch(as_desc(tensor), tensor)
    norm = torch.nn.RMSNorm(16, dtype=torch.float16)
    x, out = torch.ones(4, 16, dtype=torch.float16), torch.zeros(4, 16, dtype=torch.float16)
    fi_ffi.rmsnorm(out, x, norm.weight, eps=0.0)
    assert (out == 1).all()


def test_torch_tensors_are_kept_alive(torch: Any) -> None:
    tensor = torch.ones(3, 4)
    alive = weakref.ref(tensor)
    desc = as_desc(tensor)
    del tensor
    gc.collect()
    assert alive() is not None
    del desc
    gc.collect()
    assert alive() is None


def quantised(torch: Any) -> Any:
    return torch.quantize_per_tensor(torch.ones(3, 4), 0.5, 0, torch.qint8)


def fake(torch: Any) -> Any:
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        return torch.ones(3, 4)


def dispatched(torch: Any) -> Any:
    class Wrapping(torch.Tensor):  # type: ignore[misc,name-defined]
        @classmethod
        def __torch_dispatch__(cls, *_: object) -> object:
            raise AssertionError("it was asked to do something")

    return torch.Tensor._make_wrapper_subclass(Wrapping, (3, 4))


ODD: dict[str, tuple[Callable[[Any], Any], str]] = {
    "sparse": (lambda t: t.ones(3, 4).to_sparse(), "a sparse_coo tensor"),
    "sparse rows": (lambda t: t.ones(3, 4).to_sparse_csr(), "a sparse_csr tensor"),
    "quantised": (quantised, "a quantised tensor"),
    "meta": (lambda t: t.ones(3, 4, device="meta"), "a meta tensor"),
    "fake": (fake, "a torch._subclasses.fake_tensor.FakeTensor, which stands for a tensor"),
    "dispatched": (dispatched, "Wrapping, which stands for a tensor"),
    "conjugate": (lambda t: t.ones(3, 4, dtype=t.complex64).conj(), "a conjugate view"),
    "negative": (lambda t: t.ones(3, 4, dtype=t.complex64).conj().imag, "a negative view"),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", ODD)
def test_torch_tensors_that_no_kernel_can_read(name: str, torch: Any) -> None:
    """Refused by name; also when plain ones of that dtype, device and rank were met."""
    make, words = ODD[name]
    for _ in range(2):
        with pytest.raises(ArgumentError, match="rmsnorm: argument `input`: got a") as caught:
            as_desc(make(torch), "rmsnorm", "input")
        assert words in str(caught.value)
        assert type(caught.value) is ArgumentError
        assert caught.value.__cause__ is None and caught.value.__context__ is None
        with pytest.raises(ArgumentError, match=re.escape(words)):
            fi_ffi.rmsnorm(make(torch), torch.ones(3, 4), torch.ones(4))
        as_desc(torch.ones(3, 4))


def test_torch_tensors_of_plain_subclasses(torch: Any) -> None:
    class Plain(torch.Tensor):  # type: ignore[misc,name-defined]
        pass

    tensor = torch.ones(3, 4).as_subclass(Plain)
    for _ in range(2):
        same_as_torch(as_desc(tensor), tensor)
