"""Packing bits, bit for bit: on the CPU, and (tests/gpu) on a GPU."""

from __future__ import annotations

import numpy as np
import pytest

import fi_ffi
from fi_ffi.cli.cases import Case
from fi_ffi.ops.call.op import Op
from fi_ffi.ops.functions import OPS

from tests.helpers.cases import make_case
from tests.helpers.every_op import check_on, check_replayed

WHOLE, SEGMENTS = OPS["packbits"].row, OPS["segment_packbits"].row
ORDERS = ("big", "little")
# A byte and its neighbours, a block of 2048 bits, several.
COUNTS = (1, 7, 8, 9, 63, 2040, 2047, 2048, 2049, 4096, 10_001, 1 << 17)


def whole(rng, n: int, order: str) -> Case:
    return make_case(WHOLE, {"n": n}, {}, rng, bitorder=order)


def segments(rng, lengths, order: str, **more) -> Case:
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    sizes = {"n": int(starts[-1]), "b": len(lengths)}
    return make_case(SEGMENTS, sizes, {}, rng, {"input_indptr": starts} | more, bitorder=order)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("n", COUNTS)
def test_counts(n, order, machine, rng):
    assert check_on(machine, whole(rng, n, order)) == 0


@pytest.mark.parametrize("order", ORDERS)
def test_many_bits(order, machine, rng):
    n = 2**31 + 1003 if machine.is_gpu else 2**20 + 1003  # more than an int counts
    x = rng.integers(0, 2, 1009).astype(bool)
    bits = np.resize(x, n)
    packed = np.packbits(bits, bitorder=order)
    machine.need(WHOLE.module)
    there, y = machine.place(bits), machine.place(np.zeros_like(packed))
    fi_ffi.packbits(there.desc(), order, y.desc(), stream=machine.stream)
    assert (y.get() == packed).all() and y.intact()


@pytest.mark.parametrize("order", ORDERS)
def test_segments(order, machine, rng):
    """Empty ones, whole bytes, some bits, and longer than a block packs at a time."""
    for lengths in (
        [1], [0], [0, 0, 5, 0], [8, 16, 0, 3], [2048, 2049, 2047, 1, 9], [10_001, 5, 70_000],
        rng.integers(0, 300, 1000),
    ):  # fmt: skip
        assert check_on(machine, segments(rng, lengths, order)) == 0


@pytest.mark.parametrize("order", ORDERS)
def test_segments_in_any_place(order, machine, rng):
    """In another order, and with bytes between them, which stay as they are."""
    lengths = np.array([13, 0, 64, 7, 300])
    needs = -(-lengths // 8)
    places = np.array([40, 0, 100, 20, 50, 0], np.int32)
    assert len({at for p, n in zip(places, needs, strict=False) for at in range(p, p + n)}) == sum(
        needs
    )
    made = segments(rng, lengths, order, output_indptr=places)
    before, after = made.arrays["y"], made.expected["y"][0]
    assert len(after) == 111 and (after[26:40] == before[26:40]).all()
    assert check_on(machine, made) == 0


@pytest.mark.parametrize("order", ORDERS)
def test_recorded_and_replayed(order, machine, rng):
    assert check_replayed(machine, whole(rng, 5000, order)) == 0


def test_an_example_by_hand(machine):
    machine.need(WHOLE.module)
    bits = np.array([1, 0, 1, 1, 0, 0, 1, 1, 1, 0, 1], bool)

    def packed(op: Op, *args: object) -> list[int]:
        places = [machine.place(a) if isinstance(a, np.ndarray) else a for a in args]
        given = [a if isinstance(a, str) else a.desc() for a in places]
        op(*given, stream=machine.stream)
        return places[-1].get().tolist()

    two = np.full(2, 0xFF, np.uint8)
    assert packed(OPS["packbits"], bits, "big", two) == [0b10110011, 0b10100000]
    assert packed(OPS["packbits"], bits, "little", two) == [0b11001101, 0b00000101]
    starts, three = np.array([0, 4, 7, 11], np.int32), np.full(3, 0xFF, np.uint8)
    indptr = fi_ffi.packed_indptr(starts)
    assert indptr.tolist() == [0, 1, 2, 3]
    got = packed(OPS["segment_packbits"], bits, starts, indptr, "big", three)
    assert got == [0b10110000, 0b00100000, 0b11010000]
    # A mask as the attention plans take it.
    mask = np.array([[True, False, True], [True, True, False]])
    flat = np.ascontiguousarray(mask.reshape(-1))
    assert packed(OPS["packbits"], flat, "little", np.zeros(1, np.uint8)) == list(
        fi_ffi.pack_custom_mask(mask)
    )


def test_nothing(machine, rng):
    assert check_on(machine, whole(rng, 0, "big")) == 0
    none = segments(rng, [], "big")
    assert none.arrays["input_indptr"].tolist() == [0] and none.arrays["y"].size
    assert check_on(machine, none) == 0


@pytest.mark.parametrize("count", [0, 1, 3, 100])
def test_bytes_that_are_too_few_or_too_many(count):
    x, y = np.zeros(13, bool), np.zeros(count, np.uint8)
    with pytest.raises(fi_ffi.ArgumentError, match="a byte for every 8 bits begun"):
        fi_ffi.packbits(x, "big", y)


@pytest.mark.parametrize("order", ["Big", "", None, 0, True, b"big", "big ", ["big"]])
def test_orders(order):
    x, y = np.zeros(8, bool), np.full(1, 7, np.uint8)
    starts = np.array([0, 8], np.int32)
    for _ in range(2):
        with pytest.raises(fi_ffi.ArgumentError, match="`bitorder`.*'big' or 'little'"):
            fi_ffi.packbits(x, order, y)
        with pytest.raises(fi_ffi.ArgumentError, match="`bitorder`.*'big' or 'little'"):
            fi_ffi.segment_packbits(x, starts, starts // 8, order, y)
        assert y[0] == 7
        fi_ffi.packbits(x, "big", np.zeros(1, np.uint8))


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.float16])
def test_numbers_are_no_bits(dtype):
    with pytest.raises(fi_ffi.ArgumentError, match="bool"):
        fi_ffi.packbits(np.zeros(8, dtype), "big", np.zeros(1, np.uint8))


@pytest.mark.parametrize(
    ("starts", "places"),
    [([0, 9], [0, 1]), ([0, 5], [2, 3]), ([0, -1], [0, 1]), ([3, 1], [0, 1]), ([0, 5], [-1, 0])],
)
def test_segments_that_the_reference_refuses(starts, places):
    """On a GPU they would be read and written past the ends."""
    x, y = np.zeros(8, bool), np.zeros(2, np.uint8)
    with pytest.raises(fi_ffi.KernelError, match="segment 0 is not inside x"):
        fi_ffi.segment_packbits(x, *(np.array(a, np.int32) for a in (starts, places)), "big", y)


@pytest.mark.parametrize("indptr", [[], [1, 2], [0, 3, 2], [[0, 1]], None, "0", [0.0], [0, 2**31]])
def test_starts_that_are_refused(indptr):
    with pytest.raises(fi_ffi.ArgumentError, match="packed_indptr: argument `indptr`"):
        fi_ffi.packed_indptr(indptr)


def test_starts_of_bytes(rng):
    lengths = rng.integers(0, 50, 200)
    indptr = fi_ffi.packed_indptr(np.concatenate([[0], np.cumsum(lengths)]))
    assert indptr.dtype == np.int32 and indptr[0] == 0
    assert (np.diff(indptr) == (lengths + 7) // 8).all()


def test_more_than_a_grid_has():
    bits = fi_ffi.TensorDesc(16, (2**31 * 2048,), "bool", device="cpu")
    y = fi_ffi.TensorDesc(16, (2**31 * 256,), "uint8", device="cpu")
    with pytest.raises(fi_ffi.ArgumentError, match="n = 4398046511104 of at most 4398046509056"):
        fi_ffi.packbits(bits, "big", y)
