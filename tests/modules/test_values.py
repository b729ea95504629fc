"""Every kind of argument reaches a compiled function, and every kind of result comes back."""

from __future__ import annotations

import enum
import itertools
import math

import ml_dtypes
import numpy as np
import pytest

import fi_ffi
from fi_ffi.modules import ArrayObject, MapObject, TensorObject


def owned(value: object) -> object:
    """What a call returned, as Python values all the way down."""
    if isinstance(value, ArrayObject):
        return [owned(element) for element in value]
    if isinstance(value, MapObject):
        return {key: owned(element) for key, element in value.items()}
    return value


class Level(enum.IntEnum):
    HIGH = 1


SAME = {
    "int": [0, 1, -1, 2**63 - 1, -(2**63)],
    "float": [0.0, -1.5, 1e308, math.inf, -math.inf],
    "bool": [True, False],
    "str": ["", "short", "longer than seven bytes", "naïve ✓", "with a \0 inside of it"],
    "std_string": ["", "NHD", "with a \0 inside of it", "x" * 100_000],
    "bytes": [b"", b"\0\xff", bytes(range(256))],
    "dtype": [fi_ffi.DTYPES[name] for name in fi_ffi.DTYPES],
    "device": [fi_ffi.parse_device(name) for name in ("cpu", "cuda:0", "cuda:7", "cuda_host")],
    "colour": [0, 1],
    "optional": [None, 5],
    "numbers": [[], [1], [2**63 - 1, -(2**63), 0]],
    "nested": [None, [], [1, None, 3], [None]],
    "list": [[], [1, 2, 3]],
    "pair": [[7, "text"]],
    "named": [{}, {"a": [1, 2], "b": []}, {str(i): [i] for i in range(50)}],
    "dict": [{}, {"a": 1, "": -1}],
    "either": [3, 2.5, "text", [1, 2]],
    "array": [[], [None, True, 1, 2.5, "text", b"bytes", [1, [2]], {"k": [3]}]],
    "any": [None, True, 1, 2.5, "text", b"bytes", [1, [2]], {"k": [3], 4: None}],
    "pointer": [0, 4096, 2**64 - 1],
    "shape": [(), (1, 2, 3)],
}


@pytest.mark.parametrize("kind", SAME)
def test_a_value_comes_back_as_it_was(every, kind):
    for value in SAME[kind]:
        found = owned(every.entry(f"same_{kind}")(value))
        if kind == "pointer" and value == 0:
            assert found in (0, None)
            continue
        assert found == value
        assert type(found) is type(value)


CONVERTED = [
    ("int", np.int32(-3), -3),
    ("int", np.uint64(2**62), 2**62),
    ("int", Level.HIGH, 1),
    ("colour", Level.HIGH, 1),
    ("float", 2, 2.0),
    ("float", np.float32(0.5), 0.5),
    ("float", np.int64(3), 3.0),
    ("bool", np.True_, True),
    ("str", np.str_("text"), "text"),
    ("bytes", bytearray(b"ab"), b"ab"),
    ("bytes", memoryview(b"ab"), b"ab"),
    ("dtype", "bfloat16", fi_ffi.DTYPES["bfloat16"]),
    ("dtype", np.dtype(np.float16), fi_ffi.DTYPES["float16"]),
    ("dtype", ml_dtypes.float8_e4m3fn, fi_ffi.DTYPES["float8_e4m3fn"]),
    ("device", "cuda:3", fi_ffi.parse_device("cuda:3")),
    ("numbers", (1, 2), [1, 2]),
    ("numbers", range(4), [0, 1, 2, 3]),
    ("nested", (np.int8(1), None), [1, None]),
    ("pair", (1, "a"), [1, "a"]),
    ("shape", [4, 5], (4, 5)),
    ("any", np.float64(1.5), 1.5),
    ("any", np.int16(4), 4),
    ("any", np.False_, False),
    ("any", (1, 2), [1, 2]),
    ("any", fi_ffi.DTYPES["int8"], fi_ffi.DTYPES["int8"]),
    ("any", fi_ffi.parse_device("cuda:1"), fi_ffi.parse_device("cuda:1")),
]


def test_values_of_other_types_of_the_same_meaning(every):
    for kind, value, expected in CONVERTED:
        found = owned(every.entry(f"same_{kind}")(value))
        assert found == expected, (kind, value)
        assert type(found) is type(expected), (kind, value)


def test_what_has_no_equal(every):
    assert math.isnan(every.same_float(math.nan))
    assert every.c_text_length("naïve") == 6
    assert every.c_text_length("") == 0
    assert every.nothing() == 7
    assert every.no_result(1) is None


LAYOUTS = {
    "contiguous": lambda x: x,
    "rows apart": lambda x: x[:, :5],
    "every other": lambda x: x[::2],
    "turned": lambda x: x.T,
    "offset": lambda x: x[1:, 2:],
    "scalar": lambda x: x[0, 0, ...],
    "empty": lambda x: x[:0],
    "one": lambda x: x[:1, :1],
}


@pytest.mark.parametrize("way", ["told_view", "told_tensor", "told_pointer", "told_optional"])
def test_a_tensor_is_what_was_given(every, way):
    for dtype, layout in itertools.product(("bfloat16", "float32", "bool"), LAYOUTS):
        array = LAYOUTS[layout](np.zeros((6, 8), fi_ffi.DTYPES[dtype].numpy))
        address, shape, strides, kind, device = every.entry(way)(array)
        assert address == array.__array_interface__["data"][0]
        assert tuple(shape) == array.shape
        for size, step, there in zip(array.shape, strides, array.strides, strict=True):
            # Nobody uses the others: numpy itself tells any.
            assert size < 2 or not array.size or step * array.itemsize == there
        assert (kind.name, device) == (dtype, fi_ffi.parse_device("cpu"))
    desc = fi_ffi.TensorDesc(4096, (2, 3), "float8_e4m3fn", strides=(16, 1), device="cpu")
    address, shape, strides, kind, _ = every.entry(way)(desc)
    assert (address, [*shape], [*strides]) == (4096, [2, 3], [16, 1])
    assert kind.name == "float8_e4m3fn"


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("count", "kind"), [(0, list), (1, tuple), (7, list), (7, tuple)])
def test_arrays_of_tensors(every, rng, count, weighted, kind):
    tensors = kind(rng.standard_normal(33).astype(np.float32) for _ in range(count))
    weights = [int(w) for w in rng.integers(-9, 9, count)] if weighted else None
    out = np.full(33, np.nan, np.float32)
    every.add_all(out, tensors, weights)
    expected = np.zeros(33)
    for tensor, weight in zip(tensors, weights or [1] * count, strict=True):
        expected += weight * tensor.astype(np.float64)
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-4)


def test_many_parameters_keep_their_order(every, rng):
    x = rng.standard_normal(4).astype(np.float32)
    assert every.many(5, 2.5, True, x, None, [x, x, x], "NHD", -1, [1, 2], False) == (
        "5;2.500000;1;1;0;3;NHD;-1;2;0"
    )
    assert every.many(-1, 0, False, None, x, None, "", 2, None, True) == (
        "-1;0.000000;0;0;1;0;;2;0;1"
    )


def test_a_tensor_that_a_function_makes(every):
    for name in ("float32", "bfloat16", "uint8"):
        tensor = every.make_tensor((3, 5), name, "cpu")
        assert isinstance(tensor, TensorObject)
        assert (tensor.shape, tensor.dtype.name, str(tensor.device)) == ((3, 5), name, "cpu")
        assert tensor.desc.ptr % 256 == 0
        assert len(tensor.tobytes()) == 15 * tensor.dtype.itemsize
        # It is a tensor wherever one is taken, and so is its descriptor.
        for given in (tensor, tensor.desc):
            assert every.told_view(given)[0] == tensor.desc.ptr
            assert every.told_tensor(given)[0] == tensor.desc.ptr
        tensor.release()
    tensor = every.make_tensor((33,), "float32", "cpu")
    given = np.arange(33, dtype=np.float32)
    for tensors, expected in (([given], given), (None, 0 * given)):
        every.add_all(tensor, tensors, None)
        assert (np.frombuffer(tensor.tobytes(), np.float32) == expected).all()


def test_mappings_read_like_dicts(every):
    found = every.same_named({"a": [1, 2], "b": []})
    assert isinstance(found, MapObject)
    assert len(found) == 2
    assert set(found) == {"a", "b"}
    assert list(found["a"]) == [1, 2]
    assert not [key for key in ("c", 1, object()) if key in found]
    assert found.get("c") is None
    with pytest.raises(KeyError):
        found["c"]
    assert every.same_named(found)["a"][1] == 2  # as an argument again


def test_arrays_read_like_lists(every):
    found = every.same_numbers([5, 6, 7, 8])
    assert (len(found), found[0], found[-1]) == (4, 5, 8)
    assert found[1:3] == [6, 7]
    assert found[::-1] == [8, 7, 6, 5]
    assert 6 in found
    assert found.index(7) == 2
    assert repr(found) == "[5, 6, 7, 8]"
    for index in (4, -5):
        with pytest.raises(IndexError):
            found[index]
    with pytest.raises(TypeError):
        found["0"]
    assert list(every.same_numbers(found)) == [5, 6, 7, 8]
    assert list(every.same_list(every.same_list([1, 2]))) == [1, 2]
