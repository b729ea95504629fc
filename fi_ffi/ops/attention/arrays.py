"""Index arrays of a batch: host arrays that say where requests and pages are.

They are read once, checked before any launch, and placed in the int workspace after the schedule.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Mapping, Sequence
from itertools import accumulate
from operator import ge, sub

from fi_ffi.abi._cffi import ffi
from fi_ffi.abi.interop import as_desc
from fi_ffi.abi.tensor import DTYPES, TensorDesc, frozen, parse_device, tensor_kind
from fi_ffi.errors import ArgumentError
from fi_ffi.ops.attention.sizes import aligned

CPU, INT32 = parse_device("cpu"), DTYPES["int32"]
_INTS = tensor_kind(INT32, CPU, 1)
# Room comes in steps, so that a run's descriptors seldom change.
_LENGTHS_STEP, _INDEX_STEP, _KERNEL_STEP = 64, 1024, 4096
_ON_HOST = ("cpu", "cuda_host")
INT32_MAX = 2**31 - 1


class HostArray:
    """An int32 array on the host and its values."""

    __slots__ = ("_desc", "view")

    def __init__(self, op: str, argument: str, given: object, length: int | None = None) -> None:
        view = _view(given)
        self._desc: TensorDesc | None = None
        if view is None:
            desc = self._desc = _described(op, argument, given)
            if desc.shape[0] and (not desc.ptr or desc.ptr % 4):
                expected = "an address that is a multiple of 4 bytes, and not null"
                raise ArgumentError(op, argument, got=hex(desc.ptr), expected=expected)
            view = _memory(desc)
        self.view = view
        if length is not None and len(view) != length:
            got, expected = f"{len(view)} elements", f"{length} elements"
            raise ArgumentError(op, argument, got=got, expected=expected)

    @property
    def desc(self) -> TensorDesc:
        """The array as planners take it."""
        if self._desc is None:
            self._desc = described_ints(self.view)
        return self._desc

    def bounds(self) -> tuple[int, int]:
        """The least and the greatest value; 0 and -1 where there is none."""
        if not len(self.view):
            return 0, -1
        numpy = sys.modules.get("numpy")
        if numpy is not None:
            # Taken for unsigned, a negative value is the greatest: one pass over the array.
            most = int(numpy.maximum.reduce(numpy.frombuffer(self.view, numpy.uint32)))
            if most <= INT32_MAX:
                return 0, most
        values = self.view.tolist()
        return min(values), max(values)

    def keep(self, count: int) -> None:
        """Leave off all but the first elements."""
        if count < len(self.view):
            self.view = self.view[:count]
            if self._desc is not None:
                self._desc = self._desc.rows(0, count)


def _view(given: object) -> memoryview | None:
    """An array that the buffer protocol tells to be plain int32, or None."""
    try:
        view = memoryview(given)  # type: ignore[arg-type]
    except (TypeError, ValueError, BufferError):
        return None
    is_plain = view.format == "i" and view.ndim == 1 and view.c_contiguous
    return view if is_plain else None


def _described(op: str, argument: str, given: object) -> TensorDesc:
    """Any other tensor, if it is an int32 array on the host."""
    desc = as_desc(given, op, argument)

    def refuse(got: object, expected: str) -> ArgumentError:
        return ArgumentError(op, argument, got=got, expected=expected)

    if desc.device.type not in _ON_HOST:
        raise refuse(desc.device, "an array on the host: a plan never copies from the device")
    if desc.dtype.name != "int32":
        raise refuse(desc.dtype, "int32")
    if len(desc.shape) != 1 or not desc.is_contiguous:
        raise refuse(desc.layout, "a contiguous array of rank 1")
    return TensorDesc(0, desc.shape, INT32, device=CPU).at(desc.ptr, desc)


def described_ints(view: memoryview) -> TensorDesc:
    """A view of int32 as a tensor on the host."""
    address = int(ffi.cast("uintptr_t", ffi.from_buffer(view)))
    return frozen(address, (len(view),), (1,), _INTS, view)


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

    def __init__(self, op: str, argument: str, given: object, length: int | None = None) -> None:
        super().__init__(op, argument, given, length)
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


def page_indices(op: str, argument: str, given: object, count: int) -> tuple[HostArray | None, int]:
    """The pages of all requests (None where the run brings them), and the last in the cache."""
    if given is None:
        return None, -1
    found = HostArray(op, argument, given)
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


_PAGED = ("paged_kv_indptr", "paged_kv_indices", "paged_kv_last_page_len")


class Batch:
    """Where each request's queries and keys are: ragged keys, or pages of a cache."""

    __slots__ = ("_mask_indptr", "kv", "pages", "qo")

    def __init__(
        self,
        op: str,
        page_size: int | None,
        qo_indptr: object,
        kv_indptr: object,
        paged: tuple[object, ...],
    ) -> None:
        self.qo = Indptr(op, "qo_indptr", qo_indptr)
        count = self.qo.size
        self.pages: PagedLengths | None = None
        if page_size is None:
            if kv_indptr is None:
                expected = "an array; a paged cache comes with page_size"
                raise ArgumentError(op, "kv_indptr", got=None, expected=expected)
            for name, given in zip(_PAGED, paged, strict=True):
                if given is not None:
                    raise ArgumentError(op, name, got="an array", expected="None without page_size")
            self.kv = Indptr(op, "kv_indptr", kv_indptr, count + 1)
        else:
            if kv_indptr is not None:
                raise ArgumentError(op, "kv_indptr", got="an array", expected="None with page_size")
            for name, given in zip(_PAGED[::2], paged[::2], strict=True):
                if given is None:
                    raise ArgumentError(op, name, got=None, expected="an array with page_size")
            self.pages = PagedLengths(op, _PAGED, paged, count, page_size)
            self.kv = self.pages.indptr
        self._mask_indptr: list[int] | None = None

    @property
    def kv_lens(self) -> list[int]:
        """Keys of each request."""
        return self.kv.counts if self.pages is None else self.pages.kv_lens

    @property
    def mask_indptr(self) -> list[int]:
        """Where each request's mask would start, in bytes."""
        if self._mask_indptr is None:
            self._mask_indptr = mask_bytes(self.qo.counts, self.kv_lens)
        return self._mask_indptr

    def check_mask(self, op: str) -> None:
        """Raise where a mask would be too large for its indptr."""
        if self.mask_indptr[-1] > INT32_MAX:
            got, expected = f"a mask of {self.mask_indptr[-1]} bytes", f"{INT32_MAX} bytes at most"
            raise ArgumentError(op, "use_custom_mask", got=got, expected=expected)

    @property
    def size(self) -> int:
        return self.qo.size

    @property
    def rows(self) -> int:
        """Queries in all."""
        return self.qo.total

    @property
    def num_indices(self) -> int:
        """Pages in all; 0 for ragged keys."""
        return self.pages.indptr.total if self.pages else 0

    @property
    def page_indices(self) -> memoryview | None:
        """The pages, where they are given."""
        return self.pages.indices.view if self.pages and self.pages.indices else None


class Arrays:
    """Where index arrays lie behind the kernel's part of the int workspace."""

    def __init__(self, kernel_bytes: int, rooms: Mapping[str, int]) -> None:
        self.kernel_bytes = self.end = aligned(max(kernel_bytes, 1), _KERNEL_STEP)
        # Where each array starts, in bytes, and its room in int32.
        self._placed: dict[str, tuple[int, int]] = {}
        for name, count in rooms.items():
            room = aligned(max(count, 1), _INDEX_STEP if name == "indices" else _LENGTHS_STEP)
            self._placed[name] = self.end, room
            self.end = aligned(self.end + 4 * room)

    def where(self, name: str) -> tuple[int, int]:
        """Where an array starts, in bytes, and its room in int32."""
        return self._placed[name]

    def holds(self, kernel_bytes: int, rooms: Mapping[str, int]) -> bool:
        """Whether there is room for such a batch."""
        placed = self._placed
        return (
            kernel_bytes <= self.kernel_bytes
            and rooms.keys() == placed.keys()
            and all(count <= placed[name][1] for name, count in rooms.items())
        )

    def write(self, stage: memoryview, values: Mapping[str, memoryview]) -> None:
        """Write index arrays to their places in host memory, both as int32."""
        for name, view in values.items():
            start, room = self._placed[name]
            count = len(view)
            assert count <= room, f"{name}: {count} int32 in room for {room}"
            word = start // 4
            stage[word : word + count] = view

    def descs(
        self, buffer: TensorDesc, counts: Mapping[str, int] | None = None
    ) -> dict[str, TensorDesc]:
        """The arrays in the int workspace: of so many int32, or of all that there is room for."""
        counts = counts or {}
        return {
            name: TensorDesc(
                buffer.ptr + start, (counts.get(name, room),), INT32, device=buffer.device
            )
            for name, (start, room) in self._placed.items()
        }


def placed_for(kernel_bytes: int, rooms: Mapping[str, int], before: Arrays) -> Arrays:
    """Places for index arrays of so many int32: those of the batch before, if they hold them."""
    return before if before.holds(kernel_bytes, rooms) else Arrays(kernel_bytes, rooms)


def host_ints(values: Sequence[int]) -> memoryview:
    """An int32 array on the host, from Python's integers."""
    return memoryview(array("i", values))
