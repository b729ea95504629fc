"""`TensorDesc`: its fields, what it refuses, the quick ways of making one; dtypes and devices."""

from __future__ import annotations

import contextlib
import copy
import decimal
import fractions
import itertools
import pickle
import re
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from cuda.bindings import driver
from hypothesis import given
from hypothesis import strategies as st

from fi_ffi.abi import tensor
from fi_ffi.abi.interop import as_desc
from fi_ffi.abi.tensor import (
    DEVICE_TYPES,
    DTYPES,
    Device,
    DType,
    TensorDesc,
    as_vector,
    c_strides,
    device_from_code,
    dtype_of,
    make_desc,
    parse_device,
    parse_dtype,
    viewed,
)
from fi_ffi.errors import ArgumentError, ArgumentTypeError

from tests.helpers.ids import shown

INT64 = 2**63 - 1
_unseen = itertools.count(10**6)  # indices of GPUs that no other test names
# Around where an int32, a uint32 and a float64 end.
FAR = [2**31 - 1, 2**31, 2**31 + 1, 2**32 - 1, 2**32, 2**32 + 1, 2**53 + 1]


def desc(ptr: Any = 64, shape: Any = (2, 3), dtype: Any = "float16", **kwargs: Any) -> TensorDesc:
    return TensorDesc(ptr, shape, dtype, **kwargs)


def test_fields() -> None:
    made = desc(4096, (2, 3, 4), "bfloat16", device="cuda:1")
    assert (made.ptr, made.shape, made.strides) == (4096, (2, 3, 4), (12, 4, 1))  # in elements
    assert made.dtype is DTYPES["bfloat16"] and str(made.device) == "cuda:1"
    assert (made.numel, made.span_bytes, made.is_contiguous) == (24, 48, True)
    assert repr(made) == "TensorDesc(0x1000, bfloat16[2, 3, 4] on cuda:1)"
    assert repr(desc(strides=(1, 2))) == (
        "TensorDesc(0x40, float16[2, 3], strides=(1, 2) on cuda:0)"
    )
    made = desc(shape=())
    assert (made.shape, made.strides, made.numel, made.span_bytes) == ((), (), 1, 2)
    made = desc(0, (0, 128))
    assert (made.numel, made.span_bytes, made.strides) == (0, 0, (128, 1))
    assert desc(0, (2**62 - 1,), "float16").numel == 2**62 - 1  # the largest that fits
    assert desc(2**64 - 13, (2, 3), "float16").ptr == 2**64 - 13


@pytest.mark.parametrize("name", ["ptr", "layout", "owner", "shape", "new"])
def test_immutable(name: str) -> None:
    made = desc()
    with pytest.raises(AttributeError, match=name):
        setattr(made, name, 0)
    with pytest.raises(AttributeError, match=name):
        delattr(made, name)


def test_an_address_does_not_travel() -> None:
    for way in (pickle.dumps, copy.deepcopy):
        with pytest.raises(TypeError, match="pickled"):
            way(desc())


def fields(made: TensorDesc) -> tuple[object, ...]:
    """What a descriptor is, but for what it keeps alive; kinds are compared as objects."""
    assert type(made) is TensorDesc
    numbers = (made.ptr, *made.shape, *made.strides)
    assert {type(number) for number in numbers} == {int}
    return made.ptr, made.shape, made.strides, id(made.kind)


def test_the_same_arguments_by_other_types() -> None:
    class Derived(TensorDesc):  # the quick ways are `TensorDesc`'s own
        __slots__ = ()

    made = desc()
    others = [
        desc(shape=[2, 3]),
        desc(shape=np.array([2, 3])),
        desc(shape=iter((2, 3))),
        desc(dtype=np.float16),
        desc(device="cuda"),
        desc(strides=(3, 1)),
        desc(strides=[np.int64(3), np.uint8(1)]),
        *map(desc, (np.int64(64), np.uint64(64), np.array(64), driver.CUdeviceptr(64))),
        as_desc(Derived(64, (2, 3), "float16")),
        made.at(np.uint64(64)),
    ]
    for other in others:
        assert fields(other) == fields(made)
        assert other.layout == made.layout
    for other in (desc(shape=(3, 2)), desc(dtype="bfloat16"), desc(device="cpu"), desc(128)):
        assert fields(other) != fields(made)


def test_kinds_are_one_object() -> None:
    kinds = {id(desc(shape=(n, 3)).kind) for n in range(100)}
    assert kinds == {id(desc(strides=(1, 2)).kind)}
    others = [desc(shape=(6,)), desc(dtype="bfloat16"), desc(device="cpu")]
    others.append(make_desc(64, (2, 3), "float16", None, "cuda:0", readonly=True))
    assert len({id(made.kind) for made in others} | kinds) == 5


@pytest.mark.parametrize("shape", [(6,), (2, 3), (1, 2, 3)])
@pytest.mark.parametrize("order", [(True, False, True), (False, True, False)])
def test_no_kind_is_remembered_for_other_memory(
    order: tuple[bool, ...], shape: tuple[int, ...]
) -> None:
    """Memory that is read-only is described by names that were never seen before, or that were."""
    device = f"cuda:{next(_unseen)}"
    for readonly in order:
        made = make_desc(64, shape, "float16", None, device, readonly=readonly)
        quickly = desc(shape=shape, device=device)
        assert (made.readonly, quickly.readonly) == (readonly, False)
        for view in (made.at(128), made.rows(0, 1), as_vector(made), viewed(made, (3,), (2,))):
            assert (view.readonly, view.device) == (readonly, made.device)


@pytest.mark.parametrize(
    ("shape", "strides", "expected"),
    [
        ((), (), ((1,), (1,))), ((1,), (7,), ((1,), (7,))), ((5,), (3,), ((5,), (3,))),
        ((5, 1), (3, 9), ((5,), (3,))), ((5, 1, 1), (3, 9, 4), ((5,), (3,))),
        ((1, 1), (3, 9), ((1,), (3,))), ((1, 5), (3, 9), ((1, 5), (3, 9))),
        ((5, 2), (3, 9), ((5, 2), (3, 9))), ((5, 2, 1), (3, 9, 1), ((5, 2), (3, 9))),
        ((0, 1), (3, 9), ((0,), (3,))),
    ],
)  # fmt: skip
def test_a_tensor_as_a_vector(shape: Any, strides: Any, expected: Any) -> None:
    """Without trailing axes of one element; the first axis stays."""
    made = desc(shape=shape, strides=strides)
    vector = as_vector(made)
    assert ((vector.shape, vector.strides), vector.ptr) == (expected, made.ptr)
    assert vector.kind.rank == len(expected[0]) and vector.owner is made


def test_what_names_are_remembered_is_bounded() -> None:
    """A name that was parsed is kept; a caller may make new ones without end."""

    class Name(str):
        """Of its own hash: another key each time."""

        __hash__ = object.__hash__

        def __eq__(self, other: object) -> bool:
            return self is other

    for _ in range(tensor._MAX_NAMES + 500):
        desc(device=Name("cuda:0"))
    assert 0 < len(tensor._NAMED) <= tensor._MAX_NAMES


@pytest.mark.parametrize("argument", ["shape", "strides"])
def test_rank_limit(argument: str) -> None:
    assert desc(shape=(1,) * 64, strides=(1,) * 64).numel == 1

    class Endless:
        def __iter__(self) -> Any:
            return itertools.repeat(1)

    with pytest.raises(ArgumentError, match="2 strides"):
        desc(strides=(1,))
    for value in ((1,) * 65, itertools.repeat(1), Endless()):
        with pytest.raises(ArgumentError, match="64 at most"):
            desc(**{"shape": (1,) * 64, argument: value})


NO_INTEGERS = [True, np.True_, 1.0, np.float32(1), np.float64(64), "1", b"1", None, 1j, []]
NO_INTEGERS += [decimal.Decimal(64), fractions.Fraction(64), bytearray(b"64"), object()]


@pytest.mark.parametrize("value", NO_INTEGERS, ids=shown)
@pytest.mark.parametrize("argument", ["shape", "strides", "ptr"])
def test_sizes_strides_and_addresses_are_integers(argument: str, value: object) -> None:
    desc(shape=(2, 1), strides=(1, 1))  # so that a quick key that equals the wrong one is there
    given = {argument: value if argument == "ptr" else (1, value)}
    with pytest.raises(ArgumentTypeError) as caught:
        desc(**{"shape": (2, 1), "strides": (1, 1), **given})
    assert caught.value.argument == argument
    if argument == "ptr":
        with pytest.raises(ArgumentTypeError):
            desc().at(value)  # type: ignore[arg-type]
    if argument == "shape":
        for bounds in ((0, value), (value, 2)):
            with pytest.raises(ArgumentTypeError, match="two ints") as caught:
                desc().rows(*bounds)  # type: ignore[arg-type]
            assert caught.value.argument == "rows"


@pytest.mark.parametrize("shape", [5, None, 1.0, "12", b"12"])
def test_a_shape_is_a_sequence(shape: object) -> None:
    with pytest.raises(ArgumentTypeError, match="shape"):
        desc(shape=shape)


HUGE_NUMBER = pytest.param(10**5000, id="huge")


@pytest.mark.parametrize("size", [-1, -INT64, INT64 + 1, 10**30, HUGE_NUMBER])
def test_sizes_out_of_range(size: int) -> None:
    with pytest.raises(ArgumentError) as caught:
        desc(shape=(2, size))
    assert caught.value.argument == "shape"


@pytest.mark.parametrize("ptr", [-1, 2**64, 2**64 - 12, HUGE_NUMBER])
def test_address_out_of_range(ptr: int) -> None:
    for way in (desc, desc().at):
        with pytest.raises(ArgumentError) as caught:
            way(ptr)
        assert caught.value.argument == "ptr"


@pytest.mark.parametrize(
    ("shape", "strides"),
    [
        ((2**32, 2**32), None),
        ((2**62,), None),  # elements fit, bytes do not
        ((2**21,) * 3, None),
        ((0, 2**62, 2**62), None),  # no elements, and row-major strides past int64
        ((2, 2), (2**62, 1)),
        ((2,), (-(2**62),)),
        ((2**32, 2), (2**31, 1)),
        ((1,), (INT64,)),
        ((2**31, 2**33), (0, 0)),  # the span is one element, the count is past int64
    ],
)
def test_overflow(shape: tuple[int, ...], strides: tuple[int, ...] | None) -> None:
    with pytest.raises(ArgumentError, match="int64"):
        desc(0, shape, strides=strides)


SHAPES = st.lists(st.integers(0, 5), max_size=6).map(tuple)


# Of which numpy's elements are not the same bytes.
PACKED = {name for name, dtype in DTYPES.items() if dtype.lanes > 1 or dtype.shares_bytes}


@given(SHAPES, st.sampled_from(sorted({*DTYPES} - PACKED)))
def test_row_major_like_numpy(shape: tuple[int, ...], dtype: str) -> None:
    made = desc(0, shape, dtype, device="cpu")
    if 0 not in shape:  # where there are no elements, strides mean nothing and numpy's differ
        array = np.empty(shape, DTYPES[dtype].numpy)
        assert tuple(s * made.dtype.itemsize for s in made.strides) == array.strides
        assert made.span_bytes == array.nbytes
    assert made.is_contiguous
    assert made.strides == c_strides(shape)


@st.composite
def views(draw: st.DrawFn) -> np.ndarray[Any, Any]:
    """Transposed, sliced, reversed and broadcast views of an array."""
    array = np.zeros(draw(st.lists(st.integers(1, 6), min_size=1, max_size=4)), np.int16)
    array = array.transpose(draw(st.permutations(range(array.ndim))))
    steps = st.sampled_from([-3, -2, -1, 1, 2, 3])
    array = array[tuple(slice(None, None, draw(steps)) for _ in array.shape)]
    if draw(st.booleans()):
        array = np.broadcast_to(array, (3, *array.shape))
    return array


@given(views())
def test_views_like_numpy(array: np.ndarray[Any, Any]) -> None:
    made = as_desc(array)
    assert made.ptr == array.__array_interface__["data"][0]
    assert made.shape == array.shape
    for stride, step, size in zip(made.strides, array.strides, array.shape, strict=True):
        assert stride * 2 == step or size == 1  # numpy tells no stride that is never used
    assert made.is_contiguous == array.flags.c_contiguous
    reach = [abs(step) * (size - 1) for step, size in zip(array.strides, array.shape, strict=True)]
    assert made.span_bytes == sum(reach) + array.itemsize


@given(
    st.lists(st.one_of(st.integers(), st.booleans(), st.floats(), st.none()), max_size=4),
    st.one_of(st.none(), st.lists(st.integers(), max_size=4)),
    st.integers(-1, 2**65),
)
def test_anything_is_described_or_refused(shape: Any, strides: Any, ptr: int) -> None:
    try:
        made = desc(ptr, shape, strides=strides)
    except ArgumentError:
        return
    assert 0 <= made.ptr <= made.ptr + made.span_bytes < 2**64
    assert all(0 <= size <= INT64 for size in made.shape)


# The quick ways, against `make_desc`, which checks everything.


class Index:
    """An integer by its `__index__` only."""

    def __init__(self, value: int) -> None:
        self.value = value

    def __index__(self) -> int:
        return self.value


def made_or_refused(make: Any, *args: Any, **kwargs: Any) -> object:
    try:
        return fields(make(*args, **kwargs))
    except ArgumentError as error:
        return type(error), str(error)


ODD_SIZES = [
    2**31,
    2**32,
    2**61,
    2**62,
    2**63 - 1,
    2**63,
    2**64,
    -1,
    True,
    np.True_,
    1.0,
    None,
    "1",
]
ODD_SIZES += [np.float32(1), np.int64(3), np.uint8(2), Index(2)]
PLACES = [(64, "int8", "cpu"), (0, "float16", "cuda:7"), (2**64 - 9, "float64", "cpu")]
PLACES += [(2**63 + 9, np.float32, "cuda"), (-1, "int8", "cpu"), (np.uint64(9), "half", "cpu")]
PLACES += [(True, "float16", "gpu"), ("64", "float4_e2m1fn_x2", "cpu")]


@pytest.mark.parametrize("size", ODD_SIZES, ids=shown)
def test_the_quick_way_makes_the_same(size: Any) -> None:
    """And refuses the same, in the same words; also of tensors without elements, whose strides
    are written as int64 all the same."""
    for rank, (ptr, dtype, device) in itertools.product((1, 2, 3), PLACES):
        with contextlib.suppress(ArgumentError):  # names are known where they are right
            make_desc(0, (1,) * rank, dtype, None, device)
        for others in itertools.product((0, 1, 5), repeat=rank - 1):
            for at in range(rank):
                shape = (*others[:at], size, *others[at:])
                slowly = made_or_refused(make_desc, ptr, shape, dtype, None, device)
                quickly = made_or_refused(TensorDesc, ptr, shape, dtype, device=device)
                assert quickly == slowly


@given(st.integers(1, 6), st.integers(-3, 9), st.integers(-3, 9))
def test_rows_like_numpy(size: int, start: int, stop: int) -> None:
    array = np.zeros((size, 4), np.float16)[:, ::-2]
    made = as_desc(array)
    if not 0 <= start <= stop <= size:
        with pytest.raises(ArgumentError, match=f"rows within 0 to {size}"):
            made.rows(start, stop)
        with pytest.raises(ArgumentError, match="rank 1 or more"):
            desc(shape=()).rows(0, 0)
        return
    part = made.rows(start, stop)
    assert (part.shape, part.strides) == ((stop - start, 2), made.strides)
    if stop > start:  # numpy's address of nothing is the array's own
        assert part.ptr == as_desc(array[start:stop]).ptr
    assert part.kind is made.kind
    assert part.owner is array or part.owner is made.owner
    assert fields(made.rows(Index(start), np.int64(stop))) == fields(part)  # type: ignore[arg-type]
    moved = made.at(64)
    assert moved.owner is None and made.at(64, "mine").owner == "mine"


@pytest.mark.parametrize("far", FAR)
def test_rows_far_away(far: int) -> None:
    """Bytes, elements and rows are counted past what 32 bits hold; nothing is read there."""
    for name in ("float4_e2m1fn", "int8", "float16", "float64"):
        bits = DTYPES[name].bits
        rows = desc(4096, (far + 2, 4), name)
        columns = desc(4096, (3, far + far % 2), name)
        for made, start, elements in ((rows, far, 4 * far), (columns, 2, 2 * (far + far % 2))):
            part = made.rows(start, start + 1)
            assert part.ptr == 4096 + elements * bits // 8 and type(part.ptr) is int
            assert (part.shape, part.strides) == ((1, *made.shape[1:]), made.strides)
        assert rows.numel == 4 * (far + 2)
        assert rows.span_bytes == rows.numel * bits // 8
        assert rows.at(far * 8).ptr == far * 8
    turned = desc(2**60, (3, 2), "float16", strides=(-far, 1))
    assert turned.rows(2, 3).ptr == 2**60 - 4 * far
    assert turned.span_bytes == 2 * (2 * far + 2)


# Dtypes and devices.


@pytest.mark.parametrize("name", DTYPES)
def test_every_spelling_of_a_dtype(name: str) -> None:
    dtype = DTYPES[name]
    spelled: list[object] = [name, dtype, f"torch.{name}"]  # what str() of a torch dtype says
    spelled.append(copy.deepcopy(dtype))  # dtypes are compared by identity
    if name in PACKED:
        assert (dtype.bits, dtype.lanes) == (4, 2 if name.endswith("_x2") else 1)
        assert (dtype.numpy, dtype.itemsize) == (np.uint8, 1)
        spelled += [getattr(ml_dtypes, name)] if hasattr(ml_dtypes, name) else []
    else:
        assert dtype.numpy.name == name
        spelled += [dtype.numpy, dtype.numpy.type]
    assert all(parse_dtype(one) is dtype for one in spelled)
    assert dtype_of(dtype) is dtype
    assert repr(dtype) == name
    assert dtype.numpy.itemsize == dtype.itemsize


@pytest.mark.parametrize("name", ["int4", "uint4", "float4_e2m1fn"])
def test_elements_that_share_bytes(name: str) -> None:
    made = TensorDesc(64, (3, 5), name, device="cpu")
    assert (made.numel, made.span_bytes, made.dtype.bytes_of(15)) == (15, 8, 8)
    assert made.rows(2, 3).ptr == 64 + 5 and made.rows(1, 1).shape == (0, 5)
    with pytest.raises(ArgumentError, match="holds two"):
        made.rows(1, 2)
    assert TensorDesc(64, (3, 4), name, device="cpu").rows(1, 3).ptr == 66
    assert TensorDesc(2**64 - 9, (3, 5), name, device="cpu").ptr == 2**64 - 9
    with pytest.raises(ArgumentError, match="an address with room"):
        TensorDesc(2**64 - 8, (3, 5), name, device="cpu")
    with pytest.raises(ArgumentError, match="row-major strides"):
        TensorDesc(64, (4, 4), name, strides=(8, 1), device="cpu")
    # ml_dtypes has a byte for each: by its dtype the memory would be read as twice as many.
    for dtype in (getattr(ml_dtypes, name), np.dtype(getattr(ml_dtypes, name))):
        with pytest.raises(ArgumentTypeError, match="a byte for each element"):
            TensorDesc(64, (3, 5), dtype, device="cpu")
        with pytest.raises(ArgumentError, match=f"dtype {name}"):
            as_desc(np.zeros((3, 5), dtype))


NO_DTYPES = [None, 2, 2.0, int, float, "half", "float8_e4m3", "", "complex64", np.complex64, []]


@pytest.mark.parametrize("dtype", [*NO_DTYPES, object(), *map(np.dtype, (">f4", ">i8"))], ids=shown)
def test_unknown_dtype(dtype: object) -> None:
    with pytest.raises(ArgumentTypeError, match="float8_e4m3fn") as caught:
        parse_dtype(dtype, op="rmsnorm", argument="out")
    assert (caught.value.op, caught.value.argument) == ("rmsnorm", "out")


def test_unknown_codes() -> None:
    assert dtype_of(DType("complex64", 5, 64)) is None
    assert dtype_of(DType("float16x2", 2, 16, 2)) is None
    assert device_from_code(10, 0) is None  # ROCm


SPELLINGS = {
    "cpu": ("cpu", 0), "cpu:0": ("cpu", 0), "cuda": ("cuda", 0), "cuda:7": ("cuda", 7),
    "cuda_host": ("cuda_host", 0), "cuda_managed:1": ("cuda_managed", 1),
    f"cuda:{2**31 - 1}": ("cuda", 2**31 - 1),
}  # fmt: skip


@pytest.mark.parametrize("text", SPELLINGS)
def test_every_spelling_of_a_device(text: str) -> None:
    device = parse_device(text)
    assert (device.type, device.index) == SPELLINGS[text]
    assert device.type_code == DEVICE_TYPES[device.type]
    assert device.is_cuda == (device.type == "cuda")
    # Checks compare devices by identity, however the caller came by them.
    same = (str(device), device, Device(device.type, device.index), copy.deepcopy(device))
    assert all(parse_device(one) is device for one in same)
    assert device_from_code(device.type_code, device.index) is device


NO_DEVICES = ["", "gpu", "cuda:", "cuda:-1", "cuda:+1", "cuda: 1", "cuda:1:2", "cuda:x", "CUDA:0"]
NO_DEVICES += [f"cuda:{2**31}", "cuda:" + "9" * 5000, "cuda:٣"]
NO_DEVICES += [Device("tpu", 0), Device("cuda", -1), Device("cuda", 2**31)]  # made by hand


@pytest.mark.parametrize("device", [*NO_DEVICES, None, 0, True, b"cuda", []], ids=shown)
def test_no_device(device: object) -> None:
    with pytest.raises(ArgumentTypeError) as caught:
        parse_device(device, op="rmsnorm", argument="input")
    assert (caught.value.op, caught.value.argument) == ("rmsnorm", "input")


@given(st.text() | st.from_regex(r"(cpu|cuda|cuda_host|gpu)(:[0-9]{1,3})?\n?", fullmatch=True))
def test_any_text_is_a_device_or_refused(text: str) -> None:
    found = re.fullmatch("(cpu|cuda|cuda_host|cuda_managed)(?::([0-9]{1,9}))?", text)
    if found:
        device = parse_device(text)
        assert (device.type, device.index) == (found[1], int(found[2] or 0))
    else:
        with pytest.raises(ArgumentTypeError):
            parse_device(text)
