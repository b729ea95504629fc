"""Other libraries' tensors as descriptors, and what lies about itself."""

from __future__ import annotations

import ctypes
import datetime
import gc
import itertools
import re
import sys
import weakref
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import fi_ffi
from fi_ffi.abi._cffi import ffi
from fi_ffi.abi.interop import as_desc
from fi_ffi.abi.library import c_library
from fi_ffi.abi.tensor import DTYPES, TensorDesc
from fi_ffi.errors import ArgumentError, ArgumentTypeError

from tests.helpers.numpys import versioned_dlpack
from tests.stress.bad_input.odd import INTERFACES, Interface

Array = np.ndarray[Any, Any]


class Wrapper:
    """Holds an array and shows it through one protocol only."""

    def __init__(self, array: Array, **changes: object) -> None:
        self.array, self.changes = array, changes


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


def itself(array: Array) -> Array:
    return array


VERSIONED = pytest.param(Versioned, marks=versioned_dlpack)
CPU_EXPORTERS = [VERSIONED, Legacy, ArrayInterface]
ANY_EXPORTER = pytest.mark.parametrize("exporter", [itself, *CPU_EXPORTERS])
Exporter = Callable[[Array], Any]


def random_array(shape: tuple[int, ...], dtype: Any = np.float32) -> Array:
    return np.random.default_rng().integers(0, 100, shape).astype(dtype)


def check(desc: TensorDesc, array: Array) -> None:
    assert desc.ptr == array.__array_interface__["data"][0]
    assert (desc.shape, desc.dtype.name, str(desc.device)) == (array.shape, array.dtype.name, "cpu")
    assert desc.readonly == (not array.flags.writeable)
    for step, own, size in zip(desc.strides, array.strides, array.shape, strict=True):
        # numpy's strides of nothing are 0.
        assert step * array.itemsize == own or (size <= 1 and not array.size)


def refused(value: object, match: str = "") -> ArgumentError:
    with pytest.raises(ArgumentError, match=f"rmsnorm: argument `x`: got .*{match}") as caught:
        as_desc(value, "rmsnorm", "x")
    return caught.value


VIEWS: dict[str, Callable[[Array], Array]] = {
    "itself": lambda a: a,
    "transposed": lambda a: a.T,
    "apart": lambda a: a[::2, 1:],
    "backwards": lambda a: a[:, ::-1],
    "rank 0": lambda a: a[0, 0, ...],
    "empty": lambda a: a[1:1],
    "rank 4": lambda a: a.reshape(2, 1, 2, 6),
    "by columns": lambda a: np.asfortranarray(a),
    "one element": lambda a: a.reshape(-1)[:1].reshape(1, 1, 1),
    "a copy of rank 0": lambda a: np.array(a[0, 0]),
}


@ANY_EXPORTER
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_views(exporter: Exporter, view: Callable[[Array], Array]) -> None:
    """The first of numpy's dtypes and ranks is read from its interface, others by attributes."""
    for dtype in (np.float16, np.int64):
        for _ in range(3):
            array = view(random_array((4, 6), dtype))
            check(as_desc(exporter(array)), array)
            if exporter is not Legacy:
                array.flags.writeable = False
                check(as_desc(exporter(array)), array)


def test_numpy_dtypes() -> None:
    for name in DTYPES:
        if DTYPES[name].lanes == 1 and not DTYPES[name].shares_bytes:
            array = np.zeros((2, 3), DTYPES[name].numpy)
            for _ in range(2):
                check(as_desc(array), array)


@pytest.mark.parametrize("order", [(True, False), (False, True)])
@pytest.mark.parametrize("exporter", [itself, VERSIONED, ArrayInterface])
def test_memory_that_becomes_read_only(exporter: Exporter, order: tuple[bool, ...]) -> None:
    """No kind that one array had is taken for another, of a type that was not seen before."""

    class Mine(np.ndarray):  # type: ignore[type-arg]
        pass

    for dtype, shape in itertools.product((np.float16, np.int32), ((4,), (2, 3), (3, 1, 2))):
        array = random_array(shape, dtype).view(Mine)
        views = {False: array, True: array.view()}
        views[True].flags.writeable = False
        for readonly in order * 2:
            found = as_desc(exporter(views[readonly]))
            check(found, views[readonly])
            assert found.readonly is readonly


def test_what_numpy_derives_and_broadcasts() -> None:
    class Mine(np.ndarray):  # type: ignore[type-arg]
        pass

    for array in (random_array((3, 4)).view(Mine), np.broadcast_to(random_array((4,)), (3, 4))):
        for _ in range(2):
            desc = as_desc(array)
            check(desc, array)
            assert desc.owner is array or desc.owner[0] is array  # type: ignore[index]


@pytest.mark.parametrize("exporter", CPU_EXPORTERS)
def test_ml_dtypes_where_the_protocol_has_them(exporter: type[Wrapper]) -> None:
    array = np.zeros((2, 3), ml_dtypes.bfloat16)
    refused(exporter(array))  # numpy exports none of them, nor names them
    exporting = exporter(array)
    exporting.dtype = array.dtype  # type: ignore[attr-defined]
    if exporter is ArrayInterface:
        check(as_desc(exporting), array)


NOT_IN_THE_TABLE = [">f4", ">i2", "c8", "g", "O", "S4", "U4", "M8[s]", [("a", "f4"), ("b", "f4")]]
NOT_IN_THE_TABLE += [ml_dtypes.float8_e4m3fnuz, ml_dtypes.float8_e4m3, ml_dtypes.int4]


@ANY_EXPORTER
@pytest.mark.parametrize("dtype", NOT_IN_THE_TABLE, ids=str)
def test_dtypes_that_are_not_in_the_table(dtype: Any, exporter: Exporter) -> None:
    refused(exporter(np.zeros(3, dtype)))


def test_a_field_of_records_has_no_strides_in_elements() -> None:
    records = np.zeros(4, [("a", "<f4"), ("b", "<i2")])
    refused(records["a"], "strides of .6,. bytes, expected multiples")


class Holed(np.ndarray):  # type: ignore[type-arg]
    """An array of another library, with a mask of its own (as astropy's)."""

    mask = property(lambda self: np.isnan(self))


class Mask(ArrayInterface):
    """An exporter whose interface names a mask."""

    @property
    def __array_interface__(self) -> dict[str, Any]:
        return super().__array_interface__ | {"mask": np.zeros(self.array.shape, bool)}


def masked(array: Array) -> Array:
    return np.ma.array(array, mask=array > 50)  # type: ignore[no-any-return,no-untyped-call]


MASKED: dict[str, Callable[[Array], Any]] = {
    "masked": masked,
    "nothing masked": np.ma.array,
    "a part of one": lambda a: masked(a)[1:, ::2],
    "a subclass of it": lambda a: masked(a).view(type("Own", (np.ma.MaskedArray,), {})),
    "hard": lambda a: np.ma.array(a, mask=True, hard_mask=True),
    "its constant": lambda a: np.ma.masked,
    "another library's": lambda a: a.view(Holed),
    "an interface": Mask,
}


@pytest.mark.parametrize("make", MASKED.values(), ids=MASKED)
def test_an_array_with_a_mask_is_refused(make: Callable[[Array], Any]) -> None:
    """Kernels know no mask: they would read and write what it hides."""
    value = make(random_array((4, 16), np.float16))
    error = refused(value, "of which a mask hides elements, expected an array without a mask: ")
    assert "x.filled(value), or x.data for all" in str(error)


def test_what_a_masked_array_has_without_its_mask() -> None:
    array = random_array((4, 16))
    check(as_desc(masked(array).data), array)
    filled = masked(array).filled(7)  # type: ignore[attr-defined]
    check(as_desc(filled), filled)


# What reads arrays on the host, and what else it takes.
HOST_READERS: dict[str, Callable[[Any], Any]] = {
    "seq_lens `kv_indptr`": lambda x: fi_ffi.seq_lens(x(np.array([0, 1])), [3], 16),
    "seq_lens `kv_last_page_len`": lambda x: fi_ffi.seq_lens([0, 1], x(np.array([3])), 16),
    "pack_custom_mask `masks`": lambda x: fi_ffi.pack_custom_mask(x(np.ones((2, 3), bool))),
    "pack_custom_mask `masks` of one": lambda x: fi_ffi.pack_custom_mask([x(np.eye(3) > 0)]),
    "pack_block_mask `mask`": lambda x: fi_ffi.pack_block_mask(
        x(np.ones((1, 2, 3), bool)), np.array([0, 1], np.int32), 2
    ),
    "pack_block_mask `indptr`": lambda x: fi_ffi.pack_block_mask(
        np.ones((1, 2, 3), bool), x(np.array([0, 1], np.int32)), 2
    ),
    "VariableBlockSparseAttentionPlan `block_mask_map`": lambda x: _variable_plan(x),
    "BatchDecodePlan `indptr`": lambda x: fi_ffi.BatchDecodePlan(
        x(np.array([0, 1], np.int32)), np.zeros(1, np.int32), np.ones(1, np.int32), page_size=16,
        num_qo_heads=4, num_kv_heads=4, head_dim=64, q_data_type="float16", device="cpu",
    ),
}  # fmt: skip


def _variable_plan(x: Callable[[Array], Any]) -> object:
    block = {"num_qo_heads": 1, "num_kv_heads": 1, "head_dim": 64, "q_data_type": "float16"}
    sizes = np.full((1, 1), 16, np.int32)
    return fi_ffi.VariableBlockSparseAttentionPlan(
        x(np.ones((1, 1, 1), bool)), sizes, sizes, **block, device="cpu"
    )


@pytest.mark.parametrize("reader", HOST_READERS)
def test_a_mask_is_not_dropped_on_the_host(reader: str) -> None:
    op, argument = reader.split()[:2]
    HOST_READERS[reader](itself)
    for make in (np.ma.array, lambda array: array.view(Holed)):
        with pytest.raises(
            ArgumentError, match=f"{op}.*: argument {argument}: got .* a mask hides"
        ):
            HOST_READERS[reader](make)


SUBCLASSES: dict[str, Callable[[Array], Array]] = {
    "matrix": np.asmatrix,
    "recarray": lambda a: a.view(np.recarray),
    "a class of its own": lambda a: a.view(type("Own", (np.ndarray,), {})),
}


@pytest.mark.filterwarnings("ignore:the matrix subclass")
@pytest.mark.parametrize("make", SUBCLASSES.values(), ids=SUBCLASSES)
def test_a_subclass_whose_data_is_all(make: Callable[[Array], Array]) -> None:
    array = random_array((4, 16))
    desc = as_desc(make(array))
    assert desc.ptr == array.ctypes.data and desc.shape == (4, 16) and desc.dtype.name == "float32"


class Sparse:
    """What numpy only converts, as sparse and nullable arrays of other libraries."""

    dtype, shape, mask = np.dtype(np.float32), (4, 16), None

    def __array__(self, *_: object, **__: object) -> Array:
        return np.zeros((4, 16), np.float32)


def test_what_numpy_would_have_to_convert_is_no_tensor() -> None:
    with pytest.raises(ArgumentTypeError, match="rmsnorm: argument `x`: got .*Sparse"):
        as_desc(Sparse(), "rmsnorm", "x")


class Lookalike:
    """What it says of itself is not what it is."""

    layout = TensorDesc(64, (4, 16), "float16", device="cpu").layout
    kind = TensorDesc(64, (4, 16), "float16", device="cpu").kind
    shape, strides, owner, ptr = (4, 16), (16, 1), None, -4096


def of_an_instance() -> object:
    """Protocols are looked up on the type."""
    plain = Lookalike()
    plain.__array_interface__ = np.zeros(1).__array_interface__  # type: ignore[attr-defined]
    return plain


NO_TENSORS = [None, 1, 1.5, "x", b"x", [1.0], (1,), {}, object(), memoryview(b"x"), Array]


@pytest.mark.parametrize(
    "value", [*NO_TENSORS, Lookalike(), of_an_instance()], ids=lambda value: type(value).__name__
)
def test_no_tensor(value: object) -> None:
    with pytest.raises(ArgumentTypeError, match="rmsnorm: argument `x`"):
        as_desc(value, "rmsnorm", "x")
    with pytest.raises(ArgumentTypeError, match="rmsnorm: argument `input`: got "):
        fi_ffi.rmsnorm(np.zeros((4, 16), np.float16), value, np.ones(16, np.float16))  # type: ignore[arg-type]


def test_a_scalar_is_a_tensor_of_rank_0() -> None:
    """numpy makes an array for it on the spot, that only the interface keeps alive."""
    descs = [as_desc(np.float64(i)) for i in range(1000)]
    assert len({desc.ptr for desc in descs}) == 1000
    assert descs[0].shape == ()


def test_cuda_array_interface_without_elements() -> None:
    """No driver is asked about an address of 0."""
    exporter = CudaArrayInterface(np.zeros((0, 4), np.float16), data=(0, False), version=3)
    desc = as_desc(exporter)
    assert (desc.ptr, desc.shape, desc.dtype.name) == (0, (0, 4), "float16")
    assert str(desc.device) == "cuda:0"


def test_cuda_array_interface_of_unknown_memory() -> None:
    """Without a driver or with one, host memory is no CUDA tensor."""
    assert refused(CudaArrayInterface(random_array((3, 4)))).__cause__ is not None


@ANY_EXPORTER
def test_the_exporter_lives_as_long_as_the_descriptor(exporter: Exporter) -> None:
    exported = exporter(random_array((3,)))
    alive = weakref.ref(exported)
    desc = as_desc(exported)
    pointer = desc.ptr
    del exported
    gc.collect()
    there: Any = alive()
    assert getattr(there, "array", there).ctypes.data == pointer
    del desc, there
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("exporter", [VERSIONED, Legacy])
def test_every_export_is_given_back(exporter: type[Wrapper]) -> None:
    """numpy holds a reference to the array in each capsule until that is destroyed."""
    array = random_array((3,))
    before = sys.getrefcount(array)
    descs = [as_desc(exporter(array)) for _ in range(100)]
    assert sys.getrefcount(array) >= before + 200  # the wrapper's and the capsule's
    descs.clear()
    assert sys.getrefcount(array) == before


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


def test_torch_tensors_that_change(torch: Any, rng: np.random.Generator) -> None:
    """The same object, and another with the same identity; also where tensors have no version."""
    identities = set[int]()
    with torch.inference_mode():
        tensor = torch.zeros(4096)
        for _ in range(40):
            rank = int(rng.integers(0, 4))
            shape, steps = (tuple(rng.integers(1, 6, rank).tolist()) for _ in range(2))
            tensor.as_strided_(shape, steps, int(rng.integers(0, 64)))
            same_as_torch(as_desc(tensor), tensor)
            tensor.set_(torch.zeros(4096)) if rank % 2 else tensor.resize_(4096)
            same_as_torch(as_desc(tensor), tensor)
            with pytest.raises(RuntimeError, match="version"):
                tensor._version  # noqa: B018
            other = torch.zeros(shape, dtype=torch.bfloat16)
            identities.add(id(other))
            same_as_torch(as_desc(other), other)
            del other
    assert len(identities) < 40, "no identity was used again"


@pytest.mark.filterwarnings("ignore:ComplexHalf")
def test_torch_dtypes(torch: Any) -> None:
    for name in DTYPES:
        dtype = getattr(torch, name, None)
        if dtype is None or name == "float4_e2m1fn_x2":
            continue
        tensor = torch.empty((2, 3), dtype=dtype)
        if DTYPES[name].shares_bytes:  # torch has no more than the name
            refused(tensor, f"dtype {dtype}")
        else:
            same_as_torch(as_desc(tensor), tensor)
    for dtype in (torch.complex64, torch.complex32):
        refused(torch.zeros(2, dtype=dtype), f"dtype {dtype}")


def test_torch_tensors_that_derive_or_have_gradients(torch: Any) -> None:
    """DLPack refuses most of these; a kernel reads them like any other."""

    class Plain(torch.Tensor):  # type: ignore[misc,name-defined]
        pass

    for tensor in (
        torch.ones(3, 4).as_subclass(Plain),
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
        found = refused(make(torch), re.escape(words))
        assert type(found) is ArgumentError
        assert found.__cause__ is None and found.__context__ is None
        with pytest.raises(ArgumentError, match=re.escape(words)):
            fi_ffi.rmsnorm(make(torch), torch.ones(3, 4), torch.ones(4))
        as_desc(torch.ones(3, 4))


# Tensors of others with silly fields, which are refused before anything is read by them.

_new = ctypes.pythonapi.PyCapsule_New
_new.restype = ctypes.py_object
_new.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
_names: list[bytes | None] = []


class Capsule:
    """One DLPack capsule, made by hand."""

    def __init__(
        self, *, name: bytes | None = b"dltensor", device: Any = (1, 0), **fields: Any
    ) -> None:
        self.kept: list[Any] = []
        self.device = device
        versioned = name == b"dltensor_versioned"
        kind = "DLManagedTensorVersioned *" if versioned else "DLManagedTensor *"
        self.managed = ffi.new(kind)
        if versioned:
            self.managed.version.major = fields.pop("major", 1)
            self.managed.version.minor = fields.pop("minor", 0)
            self.managed.flags = fields.pop("flags", 0)
        tensor = self.managed.dl_tensor
        tensor.data, tensor.ndim = ffi.cast("void *", 0x1000), fields.pop("ndim", 2)
        told = fields.pop("told", device)
        tensor.device.device_type, tensor.device.device_id = told
        code, bits, lanes = fields.pop("dtype", (2, 32, 1))
        tensor.dtype.code, tensor.dtype.bits, tensor.dtype.lanes = code, bits, lanes
        tensor.byte_offset = fields.pop("byte_offset", 0)
        for key, usual in (("shape", (2, 3)), ("strides", None)):
            dims = fields.pop(key, usual)
            if dims is not None:
                self.kept.append(ffi.new("int64_t[]", dims))
                setattr(tensor, key, self.kept[-1])
        assert not fields, fields
        _names.append(name)  # a capsule keeps the pointer
        self.capsule: Any = _new(int(ffi.cast("intptr_t", self.managed)), _names[-1], None)

    def __dlpack__(self, **_: Any) -> Any:
        return self.capsule

    def __dlpack_device__(self) -> Any:
        return self.device


NEW = b"dltensor_versioned"
SILLY: dict[str, tuple[dict[str, Any], str]] = {
    "negative ndim": ({"ndim": -1}, "-1 dimensions"),
    "least ndim": ({"ndim": -(2**31)}, "dimensions"),
    "65 dimensions": ({"ndim": 65, "shape": (1,) * 65}, "65 dimensions"),
    "most dimensions": ({"ndim": 2**31 - 1}, "2147483647 dimensions"),
    "no shape": ({"shape": None}, "without a shape"),
    "negative size": ({"shape": (2, -3)}, "(2, -3)"),
    "past int64": ({"shape": (2**62, 2**62)}, "within int64"),
    "strides past int64": ({"strides": (2**62, 2**62)}, "within int64"),
    "least stride": ({"strides": (-(2**63), 1)}, "strides"),
    "an offset past the end": ({"byte_offset": 2**64 - 0x1001}, "room for"),
    "no lanes": ({"dtype": (2, 32, 0)}, "dtype 2:32:0"),
    "of no dtype": ({"dtype": (255, 255, 65535)}, "dtype 255:255:65535"),
    "complex": ({"dtype": (5, 64, 1)}, "dtype 5:64:1"),
    "version 0": ({"name": NEW, "major": 0}, "DLPack version 0"),
    "version 2": ({"name": NEW, "major": 2}, "DLPack version 2"),
    "a version of the future": ({"name": NEW, "major": 2**32 - 1}, "DLPack version 4294967295"),
    "consumed": ({"name": b"used_dltensor"}, "not a fresh DLPack capsule"),
    "consumed, new": ({"name": b"used_dltensor_versioned"}, "not a fresh DLPack capsule"),
    "another's capsule": ({"name": b"arrow_array"}, "not a fresh DLPack capsule"),
    "nameless": ({"name": None}, "not a fresh DLPack capsule"),
    "a name with quotes": ({"name": b'dltensor" "dltensor'}, "not a fresh DLPack capsule"),
    "an empty name": ({"name": b""}, "not a fresh DLPack capsule"),
    "no utf-8": ({"name": b"dl\xff\xfe"}, "argument"),
    "another device": ({"device": (1, 0), "told": (2, 0)}, "device 2:0"),
    "another GPU": ({"device": (2, 1), "told": (2, 0)}, "device 2:0"),
    "another GPU's managed": ({"device": (2, 1), "told": (13, 0)}, "device 13:0"),
    "a host tensor of a GPU": ({"device": (2, 0), "told": (1, 0)}, "device 1:0"),
    "no such device": ({"device": (1, 0), "told": (77, -3)}, "device 77:-3"),
    "GPU -1": ({"device": (2, -1)}, "device 2:-1"),
    "device type 0": ({"device": (0, 0)}, "device 0:0"),
    "a large device": ({"device": (2**80, 2**80), "told": (1, 0)}, "device"),
    "a device that is text": ({"device": ("cpu", "0"), "told": (1, 0)}, "refused"),
    "no device": ({"device": None, "told": (1, 0)}, "refused"),
    "a device of three": ({"device": (1, 0, 0), "told": (1, 0)}, "refused"),
}


@pytest.mark.parametrize("name", SILLY)
def test_a_capsule_with_silly_fields(name: str) -> None:
    fields, words = SILLY[name]
    made = Capsule(**fields)
    before = sys.getrefcount(made.capsule)
    with pytest.raises(ArgumentError, match=re.escape(words)):
        as_desc(made)
    gc.collect()
    after = sys.getrefcount(made.capsule)  # in the `assert` it would have one more
    assert after == before


@pytest.mark.parametrize("device", [(1, 0), (2, 1)])
def test_what_an_exporter_is_asked(device: tuple[int, int]) -> None:
    """The newest version that is read, and on a GPU no order; of one that refuses, the default."""
    asked: list[dict[str, Any]] = []
    order = {"stream": -1} if device[0] == 2 else {}

    class Asked(Capsule):
        refuses = False

        def __dlpack__(self, **kwargs: Any) -> Any:
            asked.append(kwargs)
            if self.refuses and kwargs:
                raise TypeError
            return super().__dlpack__()

    as_desc(Asked(device=device))
    assert asked == [{"max_version": (1, 0), **order}]
    Asked.refuses = True
    as_desc(Asked(device=device))
    assert asked[1:] == [{"max_version": (1, 0), **order}, {}]


def test_a_half_of_a_protocol_is_none() -> None:
    """An object that exports no capsule, or does not say of which device, is read otherwise."""
    array = random_array((2, 3))
    for half in ("__dlpack__", "__dlpack_device__"):
        kind = type("Half", (ArrayInterface,), {half: lambda self: 1 / 0})
        check(as_desc(kind(array)), array)
        refused(type("Half", (), {half: lambda self: 1 / 0})(), "expected a TensorDesc")


def test_capsules_that_are_fine() -> None:
    assert as_desc(Capsule()).shape == (2, 3)
    assert as_desc(Capsule(byte_offset=24)).ptr == 0x1018
    assert as_desc(Capsule(name=NEW, minor=99, flags=1)).readonly
    assert as_desc(Capsule(strides=(0, 0))).strides == (0, 0)
    for far in (2**31 - 1, 2**31, 2**32, 2**40):
        assert as_desc(Capsule(byte_offset=far)).ptr == 0x1000 + far
        large = as_desc(Capsule(shape=(far, 3), strides=(1, -far)))
        assert (large.shape, large.strides) == ((far, 3), (1, -far))
    assert as_desc(Capsule(ndim=0, shape=None)).shape == ()
    assert as_desc(Capsule(ndim=64, shape=(1,) * 64)).shape == (1,) * 64
    assert as_desc(Capsule(device=(3, 0), told=(1, 0))).device.type == "cuda_host"
    assert as_desc(Capsule(device=(2, 1), told=(13, 1))).device.type == "cuda"


class PyCapsule:
    """Not Python's; its repr says otherwise."""

    def __repr__(self) -> str:
        return '<capsule object "dltensor" at 0x1000>'


class Mute(Exception):
    def __str__(self) -> str:
        raise SystemExit(3)


class Broken:
    """Raises where it is told to."""

    def __init__(self, error: BaseException, where: str) -> None:
        self.error, self.where = error, where

    def __repr__(self) -> str:
        raise self.error

    def __dlpack_device__(self) -> tuple[int, int]:
        if self.where == "device":
            raise self.error
        return (1, 0)

    def __dlpack__(self, **_: Any) -> object:
        raise self.error


def test_what_is_no_capsule() -> None:
    looks = PyCapsule(), type("PyCapsule", (), {})()
    for value in (None, 7, "dltensor", datetime.datetime_CAPI, *looks, ctypes.c_void_p()):
        made = Capsule()
        made.capsule = value
        refused(made, "not a fresh DLPack capsule")


def test_exporters_that_raise() -> None:
    class Sly(np.ndarray):  # type: ignore[type-arg]
        @property
        def __array_interface__(self) -> Any:  # type: ignore[override]
            raise RuntimeError("sly")

    refused(np.zeros(3).view(Sly), "sly")
    array = random_array((3,))
    array.flags.writeable = False  # a legacy capsule has no flag for it
    refused(Legacy(array), "Legacy that refused: .*readonly")
    for where in ("device", "export"):
        for error in (ValueError("no"), BufferError(), RecursionError(), OSError(2, "no file")):
            assert refused(Broken(error, where), re.escape(f"refused: {error}")).__cause__ is error
        refused(Broken(Mute(), where), "refused")
    for final in (KeyboardInterrupt(), SystemExit(3), MemoryError()):
        with pytest.raises(type(final)) as caught:
            as_desc(Broken(final, "export"))
        assert caught.value is final  # it is the caller's, and stays so


@pytest.mark.parametrize("name", ["__array_interface__", "__cuda_array_interface__"])
def test_interfaces_with_silly_fields(name: str) -> None:
    good = as_desc(Interface())
    assert (good.ptr, good.shape, good.dtype.name) == (4096, (2, 2), "float16")
    wrong = [Interface(**changes).__array_interface__ for changes in INTERFACES]
    for told in (None, [], {}, *wrong):
        theirs = type("Theirs", (), {name: property(lambda _, told=told: told)})
        with pytest.raises(ArgumentError, match="argument `"):
            as_desc(theirs())


@versioned_dlpack
def test_elements_that_are_padded_to_bytes() -> None:
    """DLPack has them packed where it does not say otherwise."""
    array = np.zeros(4, np.uint8)

    class Exporter:
        def __dlpack_device__(self) -> tuple[int, int]:
            return (1, 0)

        def __dlpack__(self, **asked: Any) -> object:
            capsule = array.__dlpack__(max_version=(1, 0))
            name = b"dltensor_versioned"
            pointer = c_library.PyCapsule_GetPointer(ffi.cast("void *", id(capsule)), name)
            managed = ffi.cast("DLManagedTensorVersioned *", pointer)
            managed.flags |= flags
            managed.dl_tensor.dtype.bits = 4
            return capsule

    flags = 0
    assert as_desc(Exporter()).layout == "uint4[4] on cpu"
    flags = 1 << 2
    with pytest.raises(ArgumentError, match="a byte for each, not packed"):
        as_desc(Exporter())
