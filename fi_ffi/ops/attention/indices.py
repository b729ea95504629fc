"""Host arrays that say where requests and pages are: read once, checked before any launch."""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from itertools import accumulate
from operator import ge, sub

from fi_ffi.abi._cffi import ffi
from fi_ffi.abi.device import Device, parse_device
from fi_ffi.abi.interop import as_desc
from fi_ffi.abi.tensor import Layout, TensorDesc, make_desc, make_layout
from fi_ffi.errors import ArgumentError

CPU = parse_device("cpu")
_ON_HOST = ("cpu", "cuda_host")
INT32_MAX = 2**31 - 1


class HostArray:
    """An int32 array on the host and its values."""

    __slots__ = ("desc", "view")

    def __init__(self, op: str, argument: str, array: object, length: int | None = None) -> None:
        view = _view(array)
        self.desc = _described(op, argument, array) if view is None else described_ints(view)
        self.view = _memory(self.desc) if view is None else view
        count = self.desc.layout.shape[0]
        if length is not None and count != length:
            got, expected = f"{count} elements", f"{length} elements"
            raise ArgumentError(op, argument, got=got, expected=expected)
        if count and (not self.desc.ptr or self.desc.ptr % 4):
            expected = "an address that is a multiple of 4 bytes, and not null"
            raise ArgumentError(op, argument, got=hex(self.desc.ptr), expected=expected)

    def bounds(self) -> tuple[int, int]:
        """The least and the greatest value; 0 and -1 where there is none."""
        if not len(self.view):
            return 0, -1
        numpy = sys.modules.get("numpy")
        if numpy is None:
            values = self.view.tolist()
            return min(values), max(values)
        array = numpy.frombuffer(self.view, numpy.int32)
        return int(array.min()), int(array.max())

    def keep(self, count: int) -> None:
        """Leave off all but the first elements."""
        if count < len(self.view):
            self.view = self.view[:count]
            self.desc = make_desc(self.desc.ptr, ints_layout(count), self.desc)


def _view(array: object) -> memoryview | None:
    """An array that the buffer protocol tells to be plain int32, or None."""
    try:
        view = memoryview(array)  # type: ignore[arg-type]
    except (TypeError, ValueError, BufferError):
        return None
    is_plain = view.format == "i" and view.ndim == 1 and view.c_contiguous
    return view if is_plain else None


def _described(op: str, argument: str, array: object) -> TensorDesc:
    """Any other tensor, if it is an int32 array on the host."""
    desc = as_desc(array, op, argument)

    def refuse(got: object, expected: str) -> ArgumentError:
        return ArgumentError(op, argument, got=got, expected=expected)

    if desc.device.type not in _ON_HOST:
        raise refuse(desc.device, "an array on the host: a plan never copies from the device")
    if desc.dtype.name != "int32":
        raise refuse(desc.dtype, "int32")
    if len(desc.shape) != 1 or not desc.layout.is_contiguous:
        raise refuse(desc.layout, "a contiguous array of rank 1")
    return make_desc(desc.ptr, ints_layout(desc.shape[0]), owner=desc)


def described_ints(view: memoryview) -> TensorDesc:
    """A view of int32 as a tensor on the host."""
    address = int(ffi.cast("uintptr_t", ffi.from_buffer(view)))
    return make_desc(address, ints_layout(len(view)), owner=view)


@functools.lru_cache(maxsize=4096)
def ints_layout(count: int, device: Device = CPU) -> Layout:
    """So many int32: on the host, page-locked or not, or on a GPU."""
    return make_layout((count,), "int32", None, device, False)


@functools.lru_cache(maxsize=1024)
def bytes_layout(count: int, device: Device) -> Layout:
    """So many bytes."""
    return make_layout((count,), "uint8", None, device, False)


def _memory(desc: TensorDesc) -> memoryview:
    """The int32 of an array on the host."""
    count = desc.shape[0]
    if not count or not desc.ptr:
        return memoryview(b"").cast("i")
    return memoryview(ffi.buffer(ffi.cast("char *", desc.ptr), 4 * count)).cast("B").cast("i")


def read_ints(desc: TensorDesc) -> list[int]:
    """The values of an int32 array on the host."""
    return _memory(desc).tolist()


class Indptr(HostArray):
    """Where each of b requests starts in a row of things: b + 1 positions, from 0 on."""

    __slots__ = ("_counts", "_values", "size", "total")

    def __init__(self, op: str, argument: str, array: object, length: int | None = None) -> None:
        super().__init__(op, argument, array, length)
        values = self._values = self.view.tolist()
        if len(values) < 2:
            got, expected = f"{len(values)} elements", "one more than there are requests: 2 or more"
            raise ArgumentError(op, argument, got=got, expected=expected)
        if values[0]:
            raise ArgumentError(op, argument, got=f"{values[0]} first", expected="0 first")
        if sorted(values) != values:
            at = next(i for i, count in enumerate(self.counts) if count < 0)
            got = f"{values[at + 1]} after {values[at]} (request {at})"
            raise ArgumentError(op, argument, got=got, expected="positions that do not decrease")
        # Requests, and things of all of them.
        self.size, self.total = len(values) - 1, values[-1]

    @property
    def counts(self) -> list[int]:
        """Things of each request."""
        try:
            return self._counts
        except AttributeError:
            self._counts: list[int] = list(map(sub, self._values[1:], self._values))
            return self._counts


class PagedLengths:
    """A paged cache's requests: their pages, and how full the last of each is."""

    __slots__ = ("_page_size", "indices", "indptr", "last_page_len", "max_page")

    def __init__(
        self,
        op: str,
        names: Sequence[str],
        arrays: Sequence[object],
        batch_size: int | None,
        page_size: int,
    ) -> None:
        length = None if batch_size is None else batch_size + 1
        self._page_size = page_size
        self.indptr = Indptr(op, names[0], arrays[0], length)
        self.last_page_len = HostArray(op, names[2], arrays[2], self.indptr.size)
        lasts = self.last_page_len.view.tolist()
        # At a glance where all is usual, and else one by one.
        if min(lasts) < 1 or max(lasts) > page_size:
            for i, (count, last) in enumerate(zip(self.indptr.counts, lasts, strict=True)):
                if not (0 < last <= page_size or (last == 0 and not count)):
                    got = f"{last} for request {i} with {count} pages"
                    raise ArgumentError(op, names[2], got=got, expected=f"from 1 to {page_size}")
        if self.indptr.total * page_size > INT32_MAX:
            longest = max(self.kv_lens)
            if longest > INT32_MAX:
                got = f"{longest} tokens for request {self.kv_lens.index(longest)}"
                raise ArgumentError(op, names[0], got=got, expected=f"{INT32_MAX} at most")
        self.indices, self.max_page = page_indices(op, names[1], arrays[1], self.indptr.total)

    @property
    def kv_lens(self) -> list[int]:
        """Tokens of each request."""
        size, lasts = self._page_size, self.last_page_len.view.tolist()
        pairs = zip(self.indptr.counts, lasts, strict=True)
        return [(count - 1) * size + last if count else 0 for count, last in pairs]


def page_indices(op: str, argument: str, array: object, count: int) -> tuple[HostArray | None, int]:
    """The pages of all requests (None where the run brings them), and the last in the cache."""
    if array is None:
        return None, -1
    found = HostArray(op, argument, array)
    if len(found.view) < count:
        got = f"{len(found.view)} elements"
        raise ArgumentError(op, argument, got=got, expected=f"{count} pages, as its indptr says")
    found.keep(count)
    least, most = found.bounds()
    if least < 0:
        raise ArgumentError(op, argument, got=least, expected="pages from 0 on")
    return found, most


def check_keys(op: str, qo_lens: Sequence[int], kv_lens: Sequence[int], why: str) -> None:
    """`ArgumentError` where a request has keys, and fewer of them than queries: there
    kernels compare positions that have wrapped around."""
    if all(map(ge, kv_lens, qo_lens)):
        return
    for i, (queries, keys) in enumerate(zip(qo_lens, kv_lens, strict=True)):
        if 0 < keys < queries:
            got = f"{queries} queries and {keys} keys in request {i}"
            raise ArgumentError(op, "qo_indptr", got=got, expected=f"no fewer keys {why}")


def mask_bytes(qo_lens: Sequence[int], kv_lens: Sequence[int]) -> list[int]:
    """Where each request's packed mask starts, in bytes: each takes whole bytes."""
    sizes = ((q * kv + 7) // 8 for q, kv in zip(qo_lens, kv_lens, strict=True))
    return [0, *accumulate(sizes)]
