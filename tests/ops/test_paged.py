"""What the host works out for a paged cache, against its definition in plain Python."""

from __future__ import annotations

import gc
import weakref
from array import array

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fi_ffi
from fi_ffi.reference.arrays import as_array

MOST = 2**31 - 1
COUNTS = st.lists(st.integers(0, 7), max_size=6)


def indptr_of(counts: list[int]) -> list[int]:
    return [sum(counts[:i]) for i in range(len(counts) + 1)]


class ArrayInterface:
    """An array of another library's."""

    def __init__(self, values: object) -> None:
        self._array = np.asarray(values)
        self.__array_interface__ = self._array.__array_interface__


AS = {
    "list": list,
    "tuple": tuple,
    "int32": lambda values: np.array(values, np.int32),
    "int64": lambda values: np.array(values, np.int64),
    "uint8": lambda values: np.array(values, np.uint8),
    "uint64": lambda values: np.array(values, np.uint64),
    "big endian": lambda values: np.array(values, ">i4"),
    "every other": lambda values: np.repeat(np.array(values, np.int32), 2)[::2],
    "array interface": lambda values: ArrayInterface(np.array(values, np.int32)),
    "buffer": lambda values: array("i", values),
    "numpy integers": lambda values: [np.int32(value) for value in values],
}


@settings(max_examples=100, deadline=None)
@given(new=COUNTS, data=st.data(), form=st.sampled_from(list(AS)))
def test_batch_indices_positions(new, data, form):
    lengths = [n + data.draw(st.integers(0, 30)) for n in new]
    got = fi_ffi.batch_indices_positions(AS[form](indptr_of(new)), AS[form](lengths))
    expected = [
        (request, length - n + j)
        for request, (n, length) in enumerate(zip(new, lengths, strict=True))
        for j in range(n)
    ]
    assert list(zip(*(part.tolist() for part in got), strict=True)) == expected
    assert all(part.dtype == np.int32 and part.flags.c_contiguous for part in got)


@settings(max_examples=100, deadline=None)
@given(pages=COUNTS, page_size=st.integers(1, 9), data=st.data(), form=st.sampled_from(list(AS)))
def test_seq_lens(pages, page_size, data, form):
    last = [data.draw(st.integers(min(n, 1), page_size)) for n in pages]
    got = fi_ffi.seq_lens(AS[form](indptr_of(pages)), AS[form](last), page_size)
    expected = [(n - 1) * page_size + end if n else 0 for n, end in zip(pages, last, strict=True)]
    assert got.tolist() == expected
    assert got.dtype == np.int32


def test_the_largest_numbers():
    assert fi_ffi.seq_lens([0, 1], [MOST], np.int64(MOST)).tolist() == [MOST]
    assert fi_ffi.seq_lens([0, 2**15], [2**16 - 1], 2**16).tolist() == [MOST]
    requests, positions = fi_ffi.batch_indices_positions([0, 2], [MOST])
    assert (requests.tolist(), positions.tolist()) == ([0, 0], [MOST - 2, MOST - 1])


VALUE, TYPE = fi_ffi.ArgumentError, fi_ffi.ArgumentTypeError
NO_ARRAYS = [None, 1.5, "0", b"0", [0.0], [0, True], [0, None], [[0]], np.array([0.5]),
             np.array([False]), np.array(["0"]), np.array([None]), object(), {0: 0},
             fi_ffi.TensorDesc(4096, (2,), "int32")]  # fmt: skip
NO_INDPTR = [3, [], np.zeros((1, 1), int), np.array(0), [1], [1, 2], [0, 2, 1], [0, -1], [-1, 0],
             [0, 2**31], [0, 2**70], np.array([0, 2**63], np.uint64)]  # fmt: skip
REFUSED = [
    ("batch_indices_positions", "append_indptr", (value, [5]), TYPE) for value in NO_ARRAYS
] + [
    ("batch_indices_positions", "append_indptr", (value, [5]), VALUE) for value in NO_INDPTR
] + [
    ("batch_indices_positions", "seq_lens", ([0, 1], value), TYPE) for value in NO_ARRAYS
] + [
    ("batch_indices_positions", "seq_lens", ([0, 3], value), VALUE)
    for value in ([2], [-1], [], [3, 3], [2**31], np.array([[3]]), 3)
] + [
    ("seq_lens", "kv_indptr", (value, [1], 4), TYPE) for value in NO_ARRAYS
] + [
    ("seq_lens", "kv_indptr", (value, [1], 4), VALUE) for value in NO_INDPTR
] + [
    ("seq_lens", "kv_indptr", ([0, 2**15], [2**16], 2**16), VALUE),
    ("seq_lens", "kv_indptr", ([0, MOST], [MOST], MOST), VALUE),
] + [
    ("seq_lens", "kv_last_page_len", ([0, 1], value, 4), TYPE) for value in NO_ARRAYS
] + [
    ("seq_lens", "kv_last_page_len", ([0, 1, 1], value, 4), VALUE)
    for value in ([0, 0], [5, 0], [1, 5], [-1, 0], [1, -1], [1], [1, 0, 0])
] + [
    ("seq_lens", "page_size", ([0, 1], [1], value), TYPE)
    for value in (None, "4", 4.0, True, [4], np.array([4]))
] + [
    ("seq_lens", "page_size", ([0, 1], [1], value), VALUE) for value in (0, -1, 2**31, 2**70)
]  # fmt: skip


@pytest.mark.parametrize(("op", "argument", "values", "error"), REFUSED)
def test_refusals(op, argument, values, error):
    with pytest.raises(fi_ffi.ArgumentError) as caught:
        getattr(fi_ffi, op)(*values)
    assert type(caught.value) is error
    assert (caught.value.op, caught.value.argument) == (op, argument)
    assert str(caught.value.got) and str(caught.value.expected)


def test_refusals_say_where():
    with pytest.raises(fi_ffi.ArgumentError, match="got 1 at 2, expected elements that do not"):
        fi_ffi.batch_indices_positions([0, 2, 1], [5, 5])
    with pytest.raises(fi_ffi.ArgumentError, match="got 2 at 1, expected no fewer tokens"):
        fi_ffi.batch_indices_positions([0, 1, 4], [5, 2])
    with pytest.raises(fi_ffi.ArgumentError, match="got 0 at 0, expected 1 to 4 tokens, or 0"):
        fi_ffi.seq_lens([0, 1], [0], 4)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float8_e4m3fn"])
def test_split(dtype):
    """Strided, too: pages apart, and a cache that is a part of a larger one."""
    numpy_dtype = fi_ffi.DTYPES[dtype].numpy
    bits = np.random.default_rng().integers(0, 256, 6 * 2 * 3 * 4 * 16 * 4, np.uint8)
    whole = bits[: 6 * 2 * 3 * 4 * 16 * numpy_dtype.itemsize].view(numpy_dtype)
    whole = whole.reshape(6, 2, 3, 4, 16)
    for cache in (whole, whole[::2], whole[1:4, :, :2], whole[:1], whole.transpose(0, 1, 3, 2, 4)):
        for half, desc in enumerate(fi_ffi.split_paged_kv_cache(cache)):
            part, seen = cache[:, half], as_array(desc)
            assert (desc.ptr, desc.shape, seen.dtype) == (part.ctypes.data, part.shape, part.dtype)
            assert seen.tobytes() == part.tobytes()


def test_split_of_a_descriptor_on_a_gpu():
    """Nothing is looked at but the descriptor."""
    for shape in ((8, 2, 16, 4, 128), (8, 2, 4, 16, 128)):
        k, v = fi_ffi.split_paged_kv_cache(fi_ffi.TensorDesc(4096, shape, "bfloat16"))
        page = 16 * 4 * 128
        assert (k.ptr, v.ptr) == (4096, 4096 + 2 * page)
        assert k.layout == v.layout and k.kind is v.kind
        assert (k.shape, k.strides[0]) == ((8, *shape[2:]), 2 * page)
        assert str(k.device) == "cuda:0"
    empty = fi_ffi.TensorDesc(0, (0, 2, 16, 4, 128), "bfloat16", device="cuda:1")
    k, v = fi_ffi.split_paged_kv_cache(empty)
    assert (k.ptr, v.ptr, k.shape) == (0, 0, (0, 16, 4, 128))


def test_split_keeps_what_it_is_of():
    class Owner(np.ndarray):
        pass

    cache = np.ones((2, 2, 3, 1, 64), ml_dtypes.bfloat16).view(Owner)
    cache.flags.writeable = False
    gone = weakref.ref(cache)
    k, v = fi_ffi.split_paged_kv_cache(cache)
    assert k.readonly and v.readonly
    del cache, k
    gc.collect()
    assert gone() is not None
    del v
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize(
    "value", [np.zeros((2, 3, 4, 1, 64)), np.zeros((2, 2, 4, 64)), np.zeros((1, 2, 2, 4, 1, 64))]
)
def test_split_refuses_other_shapes(value):
    with pytest.raises(fi_ffi.ArgumentError, match="rank 5, its second axis of size 2") as caught:
        fi_ffi.split_paged_kv_cache(value)
    assert (caught.value.op, caught.value.argument) == ("split_paged_kv_cache", "paged_kv_cache")


@pytest.mark.parametrize("value", [None, [1.0], "cache", 3])
def test_split_refuses_what_is_no_tensor(value):
    with pytest.raises(fi_ffi.ArgumentTypeError) as caught:
        fi_ffi.split_paged_kv_cache(value)
    assert (caught.value.op, caught.value.argument) == ("split_paged_kv_cache", "paged_kv_cache")
