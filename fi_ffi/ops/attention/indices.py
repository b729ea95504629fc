"""Host arrays that say where requests and pages are: read once, checked before any launch."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from operator import sub

from fi_ffi.abi._cffi import ffi
from fi_ffi.abi.interop import as_desc
from fi_ffi.abi.tensor import TensorDesc, make_desc, make_layout
from fi_ffi.errors import ArgumentError

_ON_HOST = ("cpu", "cuda_host")
INT32_MAX = 2**31 - 1


class HostArray:
    """An int32 array on the host and its values."""

    __slots__ = ("desc", "values")

    def __init__(self, op: str, argument: str, array: object, length: int | None = None) -> None:
        desc = as_desc(array, op, argument)

        def refuse(got: object, expected: str) -> ArgumentError:
            return ArgumentError(op, argument, got=got, expected=expected)

        if desc.device.type not in _ON_HOST:
            raise refuse(desc.device, "an array on the host: a plan never copies from the device")
        if desc.dtype.name != "int32":
            raise refuse(desc.dtype, "int32")
        if len(desc.shape) != 1 or not desc.layout.is_contiguous:
            raise refuse(desc.layout, "a contiguous array of rank 1")
        if length is not None and desc.shape[0] != length:
            raise refuse(f"{desc.shape[0]} elements", f"{length} elements")
        if desc.shape[0] and (not desc.ptr or desc.ptr % 4):
            raise refuse(hex(desc.ptr), "an address that is a multiple of 4 bytes, and not null")
        self.desc = _ints(desc, desc.shape[0])
        self.values = read_ints(desc)

    def keep(self, count: int) -> None:
        """Leave off all but the first elements."""
        self.desc, self.values = _ints(self.desc, count), self.values[:count]


def _ints(desc: TensorDesc, count: int) -> TensorDesc:
    """The first int32 of an array on the host, page-locked or not."""
    return make_desc(desc.ptr, make_layout((count,), "int32", None, "cpu", False), owner=desc)


def read_ints(desc: TensorDesc) -> list[int]:
    """The values of an int32 array on the host."""
    count = desc.shape[0]
    if not count:
        return []
    buffer = ffi.buffer(ffi.cast("char *", desc.ptr), 4 * count)
    return memoryview(buffer).cast("B").cast("i").tolist()


class Indptr(HostArray):
    """Where each of b requests starts in a row of things: b + 1 positions, from 0 on."""

    __slots__ = ("counts",)

    def __init__(self, op: str, argument: str, array: object, length: int | None = None) -> None:
        super().__init__(op, argument, array, length)
        values = self.values
        if len(values) < 2:
            got, expected = f"{len(values)} elements", "one more than there are requests: 2 or more"
            raise ArgumentError(op, argument, got=got, expected=expected)
        if values[0]:
            raise ArgumentError(op, argument, got=f"{values[0]} first", expected="0 first")
        self.counts = list(map(sub, values[1:], values))
        if min(self.counts) < 0:
            at = next(i for i, count in enumerate(self.counts) if count < 0)
            got = f"{values[at + 1]} after {values[at]} (request {at})"
            raise ArgumentError(op, argument, got=got, expected="positions that do not decrease")

    @property
    def total(self) -> int:
        return self.values[-1]


class PagedLengths:
    """A paged cache's requests: their pages, and how full the last of each is."""

    __slots__ = ("indices", "indptr", "kv_lens", "last_page_len", "max_page")

    def __init__(
        self,
        op: str,
        names: Sequence[str],
        arrays: Sequence[object],
        batch_size: int | None,
        page_size: int,
    ) -> None:
        length = None if batch_size is None else batch_size + 1
        self.indptr = Indptr(op, names[0], arrays[0], length)
        counts = self.indptr.counts
        self.last_page_len = HostArray(op, names[2], arrays[2], len(counts))
        for i, (count, last) in enumerate(zip(counts, self.last_page_len.values, strict=True)):
            if not (0 < last <= page_size or (last == 0 and not count)):
                got = f"{last} for request {i} with {count} pages"
                raise ArgumentError(op, names[2], got=got, expected=f"from 1 to {page_size}")
        self.kv_lens = [
            (count - 1) * page_size + last if count else 0
            for count, last in zip(counts, self.last_page_len.values, strict=True)
        ]
        longest = max(self.kv_lens)
        if longest > INT32_MAX:
            got = f"{longest} tokens for request {self.kv_lens.index(longest)}"
            raise ArgumentError(op, names[0], got=got, expected=f"{INT32_MAX} at most")
        self.indices = page_indices(op, names[1], arrays[1], self.indptr.total)
        self.max_page = max(self.indices.values, default=-1) if self.indices else -1


def page_indices(op: str, argument: str, array: object, count: int) -> HostArray | None:
    """The pages of all requests, or None where the run brings them."""
    if array is None:
        return None
    found = HostArray(op, argument, array)
    if len(found.values) < count:
        got = f"{len(found.values)} elements"
        raise ArgumentError(op, argument, got=got, expected=f"{count} pages, as its indptr says")
    found.keep(count)
    if min(found.values, default=0) < 0:
        expected = "pages from 0 on"
        raise ArgumentError(op, argument, got=min(found.values), expected=expected)
    return found


def check_keys(op: str, qo_lens: Sequence[int], kv_lens: Sequence[int], why: str) -> None:
    """`ArgumentError` where a request has keys, and fewer of them than queries: there
    kernels compare positions that have wrapped around."""
    for i, (queries, keys) in enumerate(zip(qo_lens, kv_lens, strict=True)):
        if 0 < keys < queries:
            got = f"{queries} queries and {keys} keys in request {i}"
            raise ArgumentError(op, "qo_indptr", got=got, expected=f"no fewer keys {why}")


def mask_bytes(qo_lens: Sequence[int], kv_lens: Sequence[int]) -> list[int]:
    """Where each request's packed mask starts, in bytes: each takes whole bytes."""
    sizes = ((q * kv + 7) // 8 for q, kv in zip(qo_lens, kv_lens, strict=True))
    return [0, *accumulate(sizes)]
