"""Calls that the CPU and the GPU tests both make."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import pytest

import fi_ffi
from fi_ffi.cli.cases import Case
from fi_ffi.ops.call.row import Row
from fi_ffi.ops.functions import OPS
from fi_ffi.ops.table import norm, page
from fi_ffi.reference import MOVES
from fi_ffi.reference.arrays import wide

# From one vector of 8 to the largest in use; 24, 127 and 1001 are not powers of two.
HIDDEN = (8, 24, 64, 127, 128, 1001, 2048, 4096, 7168, 16384)


def lacks(row: Row, dtypes: dict[str, str]) -> bool:
    """Whether the row says that these dtypes do not go together."""
    return any(lacking.items() <= dtypes.items() for lacking in row.lacks)


# Every op, in every combination of its dtypes.
EVERY_CALL = [
    pytest.param(op, dict(zip(op.row.dtypes, dtypes, strict=True)), id=f"{name}-{'-'.join(dtypes)}")
    for name, op in OPS.items()
    for dtypes in itertools.product(*op.row.dtypes.values())
    if not lacks(op.row, dict(zip(op.row.dtypes, dtypes, strict=True)))
]
# Those of the norm family, and those of the page family that only move bytes.
CALLS, CALLS_PAGE = (
    [call for call in EVERY_CALL if call.values[0].row in rows]
    for rows in (norm.ROWS, [row for row in page.ROWS if row.name in MOVES])
)


def having(has: Callable[[Row], object] = bool) -> pytest.MarkDecorator:
    """A test for each op whose row has a property; with `dtypes`, one combination of them."""
    ops = {name: op for name, op in OPS.items() if has(op.row)}
    assert ops, "no row has it"
    return pytest.mark.parametrize("op", ops.values(), ids=list(ops))


def padded(array: np.ndarray, pad: int) -> np.ndarray:
    """The same values, with `pad` elements of NaN (or all bits) between rows of the last axis."""
    poison = np.iinfo(array.dtype).max if array.dtype.kind in "iu" else np.nan
    wide = np.full((*array.shape[:-1], array.shape[-1] + pad), poison, array.dtype)
    wide[..., : array.shape[-1]] = array
    return wide[..., : array.shape[-1]]


class HostArray:
    """What `fi_ffi.cli.cuda.DeviceArray` is on a GPU, on the host: poison around the elements."""

    POISON = 0xFF

    def __init__(self, host: np.ndarray, *, guard: int = 256) -> None:
        reach = sum((n - 1) * s for n, s in zip(host.shape, host.strides, strict=True))
        room = np.full(3 * guard + reach + host.itemsize, self.POISON, np.uint8)
        self.whole = room[-room.ctypes.data % guard :]  # as device memory starts
        self.array = self._view(host.shape, host.dtype, host.strides, guard)
        self.array[...] = host
        self.guard = guard

    def _view(self, shape, dtype, strides, offset) -> np.ndarray:
        return np.ndarray(shape, dtype, self.whole.data, offset, strides)

    def desc(self) -> fi_ffi.TensorDesc:
        return fi_ffi.as_desc(self.array)

    def get(self) -> np.ndarray:
        return self.array.copy()

    def intact(self) -> bool:
        outside = np.ones(len(self.whole), bool)
        shape, strides = (*self.array.shape, self.array.itemsize), (*self.array.strides, 1)
        np.ndarray(shape, bool, outside.data, self.guard, strides)[...] = False
        return bool((self.whole[outside] == self.POISON).all())


def called(
    function: Callable[..., object], arrays: Mapping[str, np.ndarray],
    place: Callable[[np.ndarray], Any], written: Collection[str] = (), **options: Any,
) -> dict[str, np.ndarray]:  # fmt: skip
    """What a call makes of these arrays where `place` puts them: all of them after it.

    What is not written stays as it was, and so does the memory around all of it.
    """
    placed = {name: place(array) for name, array in arrays.items()}
    function(**{name: array.desc() for name, array in placed.items()}, **options)
    got = {name: array.get() for name, array in placed.items()}
    for name, array in placed.items():
        assert array.intact(), f"{name}: bytes outside it were written"
        if name not in written:
            same = bits(got[name]).tobytes() == bits(arrays[name]).tobytes()
            assert same, f"{name} was changed"
    return got


def refused(
    function: Callable[..., object], arrays: Mapping[str, Any], argument: str, words: str = "",
    *, op: str = "", **given: Any,
) -> fi_ffi.ArgumentError:  # fmt: skip
    """The error of a call of these arrays with what is given in their place: of this argument ("":
    of any), in these words, and nothing was written."""
    with pytest.raises(fi_ffi.ArgumentError) as caught:
        function(**{**arrays, **given})
    error = caught.value
    assert error.op == (op or function.__name__) and argument in ("", error.argument), error
    assert words in str(error), error
    return error


def of_bound(found: np.ndarray, value: np.ndarray, allowed: np.ndarray) -> float:
    """The largest error as a fraction of its bound, of which a twentieth of the values is more."""
    if not value.size:
        return 0.0
    assert (np.abs(0.05 * value) / allowed).max() > 1, "a scale 5 % off is seen"
    error = np.abs(wide(found) - value) / allowed
    return float(np.where(np.isfinite(error), error, np.inf).max())


CACHES = ("paged_k_cache", "paged_v_cache")


def check_append(case: Case, place: Callable, stream: object, together: bool = False) -> None:
    """An append on memory that `place` makes of host arrays: every byte is what it must be.

    With `together`, keys and values lie in one tensor.
    """
    after = case.arrays | {name: value for name, (value, _) in case.expected.items()}
    inputs = dict(case.arrays)
    if together:
        for tensors in (inputs, after):
            tensors["both"] = np.stack([tensors.pop(name) for name in CACHES], axis=1)
    placed = {name: place(array) for name, array in inputs.items()}
    descs = {name: array.desc() for name, array in placed.items()}
    if together:
        descs |= zip(CACHES, fi_ffi.split_paged_kv_cache(descs.pop("both")), strict=True)
    OPS[case.row.name](**descs, **case.scalars, stream=stream)
    for name, array in placed.items():
        got = array.get()
        assert array.intact(), f"{name}: bytes outside it were written"
        wrong = np.argwhere(bits(got) != bits(after[name]))
        assert not len(wrong), f"{name}: {len(wrong)} elements are wrong, the first at {wrong[0]}"


def bits(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).view(f"u{array.itemsize}")


def edges(page_size: int) -> tuple[Sequence[int], Sequence[int]]:
    """New tokens of each request, and those it has: none, none new, a last page that becomes
    full or gets its first token, more pages than one."""
    p = page_size
    requests = ((0, 0), (0, p + 1), (p, 0), (1, p - 1), (1, 0), (1, p), (p + 1, p), (2 * p, 3 * p))
    new, before = zip(*requests, strict=True)
    return new, before


def at_the_end_of_uint32() -> dict[str, np.ndarray]:
    """Tables with as many tokens as the kernel counts in pages of 1023, the first, the last
    and the last that a position reaches in their pages 0, 1 and 2."""
    count = 2**32 // 1023
    indices = np.zeros(count, np.int32)
    indices[(2**31 - 1) // 1023], indices[-1] = 2, 1
    return {
        "batch_indices": np.array([0, 1, 0], np.int32),
        "positions": np.array([0, 1022, 2**31 - 1], np.int32),
        "kv_indices": indices,
        "kv_indptr": np.array([0, count - 1, count], np.int32),
        "kv_last_page_len": np.array([1023, 1023], np.int32),
    }


# The most heads that a thread block of the kernel has room for.
MOST_HEADS = [
    ("float16", 64, 128), ("float16", 128, 64), ("bfloat16", 256, 32), ("float16", 512, 32),
    ("float8_e4m3fn", 64, 256), ("float8_e5m2", 128, 128), ("float8_e4m3fn", 256, 64),
    ("float8_e5m2", 512, 32),
]  # fmt: skip
