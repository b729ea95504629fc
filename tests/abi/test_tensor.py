"""`TensorDesc` and the layouts it shares."""

from __future__ import annotations

import copy
import decimal
import fractions
import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fi_ffi.abi import tensor
from fi_ffi.abi.dtypes import DTYPES
from fi_ffi.abi.interop import as_desc
from fi_ffi.abi.tensor import TensorDesc, c_strides
from fi_ffi.errors import ArgumentError, ArgumentTypeError

INT64 = 2**63 - 1


def desc(ptr: Any = 64, shape: Any = (2, 3), dtype: Any = "float16", **kwargs: Any) -> TensorDesc:
    return TensorDesc(ptr, shape, dtype, **kwargs)


def test_fields() -> None:
    made = desc(4096, (2, 3, 4), "bfloat16", device="cuda:1")
    assert made.ptr == 4096
    assert made.shape == (2, 3, 4)
    assert made.strides == (12, 4, 1)  # elements, not bytes
    assert made.dtype is DTYPES["bfloat16"]
    assert str(made.device) == "cuda:1"
    assert made.layout.numel == 24
    assert made.layout.span_bytes == 48
    assert made.layout.is_contiguous
    assert repr(made) == "TensorDesc(0x1000, bfloat16[2, 3, 4] on cuda:1)"


def test_repr_tells_strides_that_are_not_row_major() -> None:
    assert repr(desc(strides=(1, 2))) == (
        "TensorDesc(0x40, float16[2, 3], strides=(1, 2) on cuda:0)"
    )


@pytest.mark.parametrize("name", ["ptr", "layout", "owner", "shape", "new"])
def test_immutable(name: str) -> None:
    made = desc()
    with pytest.raises(AttributeError, match=name):
        setattr(made, name, 0)
    with pytest.raises(AttributeError, match=name):
        delattr(made, name)


def test_an_address_does_not_travel() -> None:
    with pytest.raises(TypeError, match="pickled"):
        pickle.dumps(desc())
    with pytest.raises(TypeError):
        copy.deepcopy(desc())


def test_the_same_arguments_share_a_layout() -> None:
    made = desc()
    others = [
        desc(128),
        desc(shape=[2, 3]),
        desc(shape=np.array([2, 3])),
        desc(shape=iter((2, 3))),
        desc(dtype=np.float16),
        desc(device="cuda"),
        desc(strides=(3, 1)),
        desc(strides=[np.int64(3), np.uint8(1)]),
    ]
    for other in others:
        assert other.layout is made.layout
    for other in (desc(shape=(3, 2)), desc(dtype="bfloat16"), desc(device="cpu")):
        assert other.layout is not made.layout


def test_the_cache_of_layouts_is_bounded() -> None:
    for size in range(tensor._CACHE_LIMIT + 500):
        desc(shape=(size,))
    assert len(tensor._LAYOUTS) <= tensor._CACHE_LIMIT + 2


def test_the_cache_of_layouts_is_bounded_for_arrays() -> None:
    memory = np.zeros(tensor._CACHE_LIMIT + 500, np.uint8)
    for size in range(len(memory)):
        as_desc(memory[:size])
    assert len(tensor._LAYOUTS) <= tensor._CACHE_LIMIT + 2


def test_rank_0() -> None:
    made = desc(shape=())
    assert (made.shape, made.strides, made.layout.numel) == ((), (), 1)
    assert made.layout.span_bytes == 2


def test_no_elements_need_no_address() -> None:
    made = desc(0, (0, 128))
    assert (made.layout.numel, made.layout.span_bytes, made.strides) == (0, 0, (128, 1))


@pytest.mark.parametrize("argument", ["shape", "strides"])
def test_rank_limit(argument: str) -> None:
    assert desc(shape=(1,) * 64, strides=(1,) * 64).layout.numel == 1
    with pytest.raises(ArgumentError, match="64 at most"):
        desc(**{"shape": (1,) * 64, argument: (1,) * 65})


def test_strides_of_another_rank() -> None:
    with pytest.raises(ArgumentError, match="2 strides"):
        desc(strides=(1,))


@pytest.mark.parametrize(
    "value", [True, False, 1.0, 2.5, np.float32(1), np.True_, "1", None, 1j, b"1"]
)
@pytest.mark.parametrize("argument", ["shape", "strides"])
def test_sizes_and_strides_are_integers(argument: str, value: object) -> None:
    desc(shape=(2, 1), strides=(1, 1))  # so that a quick key that equals the wrong one is there
    with pytest.raises(ArgumentTypeError, match=argument):
        desc(**{"shape": (2, 1), "strides": (1, 1), argument: (1, value)})


@pytest.mark.parametrize("shape", [5, None, 1.0, "12", b"12"])
def test_a_shape_is_a_sequence(shape: object) -> None:
    with pytest.raises(ArgumentTypeError, match="shape"):
        desc(shape=shape)


@pytest.mark.parametrize("size", [-1, -INT64, INT64 + 1, 10**30, pytest.param(10**5000, id="huge")])
def test_sizes_out_of_range(size: int) -> None:
    with pytest.raises(ArgumentError) as caught:
        desc(shape=(2, size))
    assert caught.value.argument == "shape"


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


def test_the_largest_that_fits() -> None:
    assert desc(0, (2**62 - 1,), "float16").layout.numel == 2**62 - 1
    assert desc(2**64 - 13, (2, 3), "float16").ptr == 2**64 - 13


@pytest.mark.parametrize("ptr", [-1, 2**64, 2**64 - 12, pytest.param(10**5000, id="huge")])
def test_address_out_of_range(ptr: int) -> None:
    with pytest.raises(ArgumentError) as caught:
        desc(ptr)
    assert caught.value.argument == "ptr"


@pytest.mark.parametrize(
    "ptr",
    [True, np.True_, 1.0, np.float32(64), np.float64(64), "64", b"64", bytearray(b"64"), None, 1j]
    + [decimal.Decimal(64), fractions.Fraction(64), [], object()],
)
def test_an_address_is_an_integer(ptr: object) -> None:
    with pytest.raises(ArgumentTypeError) as caught:
        desc(ptr)
    assert caught.value.argument == "ptr"


def test_addresses_of_other_types() -> None:
    from cuda.bindings import driver

    for ptr in (np.int64(4096), np.uint64(4096), np.array(4096), driver.CUdeviceptr(4096)):
        assert desc(ptr).ptr == 4096
        assert type(desc(ptr).ptr) is int


@pytest.mark.parametrize("argument", ["dtype", "device"])
def test_unhashable(argument: str) -> None:
    with pytest.raises(ArgumentTypeError, match=argument):
        desc(**{argument: []})


SHAPES = st.lists(st.integers(0, 5), max_size=6).map(tuple)


@given(SHAPES, st.sampled_from([name for name in DTYPES if name != "float4_e2m1fn_x2"]))
def test_row_major_like_numpy(shape: tuple[int, ...], dtype: str) -> None:
    made = desc(0, shape, dtype, device="cpu")
    if 0 not in shape:  # where there are no elements, strides mean nothing and numpy's differ
        array = np.empty(shape, DTYPES[dtype].numpy)
        assert tuple(s * made.dtype.itemsize for s in made.strides) == array.strides
        assert made.layout.span_bytes == array.nbytes
    assert made.layout.is_contiguous
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
    assert made.layout.is_contiguous == array.flags.c_contiguous
    reach = [abs(step) * (size - 1) for step, size in zip(array.strides, array.shape, strict=True)]
    assert made.layout.span_bytes == sum(reach) + array.itemsize


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
    assert 0 <= made.ptr <= made.ptr + made.layout.span_bytes < 2**64
    assert all(0 <= size <= INT64 for size in made.shape)
