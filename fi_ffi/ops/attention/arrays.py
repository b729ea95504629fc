"""The index arrays of a batch: host arrays that say where requests and pages are.

Each is read once, checked before any launch, and placed in the int workspace after the schedule.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Collection, Mapping, Sequence
from itertools import accumulate
from operator import lt, sub
from typing import Any

from fi_ffi.abi._cffi import ffi
from fi_ffi.abi.interop import as_desc, check_unmasked
from fi_ffi.abi.tensor import DTYPES, TensorDesc, remember
from fi_ffi.errors import ArgumentError, let_through
from fi_ffi.ops.attention.sizes import aligned
from fi_ffi.ops.call.arguments import INT32_MAX, Refusal

INT32 = DTYPES["int32"]
# Capacities are rounded up to these steps, so that a run's descriptors seldom change.
_LENGTHS_STEP, _INDEX_STEP, _KERNEL_STEP = 64, 1024, 4096
_ON_HOST = ("cpu", "cuda_host")
_ADJACENT = (4,)  # the strides of int32 elements without gaps
# By type, whether arrays export buffers, of types whose arrays have no mask.
_HAVE_BUFFERS: dict[type, bool] = {}
_MAX_TYPES = 256
# Up to so many elements a pass of Python takes less than numpy's.
FEW = 32
# The arrays of pages, by the rows' names, and what they are here.
PAGES = {
    "paged_kv_indptr": "kv_indptr",
    "paged_kv_indices": "indices",
    "paged_kv_last_page_len": "last_page_len",
}
# The arguments of plans that take the lengths of requests, by what they are here.
PAGES_OF_LENGTHS = {
    "qo_indptr": "qo_indptr",
    "kv_indptr": "kv_indptr",
    "indices": "kv_indices",
    "kv_len": "kv_len_arr",
}


def int32_array(
    op: str, argument: str, array: object, length: int | None = None, may_be_longer: bool = False
) -> memoryview:
    """View an int32 array on the host in place; check that it has `length` elements."""
    has_buffer = _HAVE_BUFFERS.get(type(array))
    if has_buffer is None:
        has_buffer = _has_buffer(array, op, argument)
    try:
        view = memoryview(array) if has_buffer else None  # type: ignore[arg-type]
    except (TypeError, ValueError, BufferError) as error:
        let_through(error)
        view = None
    if view is None or view.strides != _ADJACENT or view.format != "i":
        view = _view(as_desc(array, op, argument), op, argument)
    if length is not None and len(view) != length:
        if may_be_longer and len(view) > length:
            return view[:length]
        more = " or more" if may_be_longer else ""
        raise Refusal(op)(argument, f"{len(view)} elements", f"{length} elements{more}")
    return view


def _has_buffer(array: object, op: str, argument: str) -> bool:
    """Return whether arrays of this type, which is new, export buffers; refuse one with a mask."""
    if array is None:
        expected = "an int32 array on the host, which is required"
        raise Refusal(op).type(argument, None, expected)
    check_unmasked(array, op, argument)
    has_buffer = True
    try:
        memoryview(array)  # type: ignore[arg-type]
    except TypeError:
        has_buffer = False
    except (ValueError, BufferError) as error:  # this array's elements cannot be exported
        let_through(error)
    return remember(_HAVE_BUFFERS, type(array), has_buffer, _MAX_TYPES)


def _numpy(view: memoryview) -> Any:
    """Return numpy if a pass of it takes less than Python's over so many elements.

    Plans are never the first to import it, and run where it cannot be: in a subinterpreter.
    """
    return sys.modules.get("numpy") if len(view) > FEW else None


def _bounds(view: memoryview) -> tuple[int, int]:
    """Return the smallest and the largest value; 0 and -1 for an empty array."""
    if len(view) <= FEW or (numpy := sys.modules.get("numpy")) is None:
        values = view.tolist()
        return (min(values), max(values)) if values else (0, -1)
    # Where an extreme is takes a third of the time that numpy's `min` and `max` take.
    array = numpy.frombuffer(view, numpy.int32)
    return array.item(array.argmin()), array.item(array.argmax())


def _highest(view: memoryview) -> int:
    """Return the largest value, or more than `INT32_MAX` if one is negative; -1 for an empty
    array."""
    numpy = _numpy(view)
    if numpy is None:
        values = view.tolist()
        return max(values, default=-1) if min(values, default=0) >= 0 else 2 * INT32_MAX
    # As unsigned, negative numbers are the largest.
    array = numpy.frombuffer(view, numpy.uint32)
    return array.item(array.argmax())  # type: ignore[no-any-return]


def _differences(view: memoryview) -> memoryview:
    """Return what each position, of some that do not decrease, is more than the one before."""
    numpy = _numpy(view)
    if numpy is None:
        values = view.tolist()
        return host_ints([*map(sub, values[1:], values)])
    positions = numpy.frombuffer(view, numpy.int32)
    return (positions[1:] - positions[:-1]).data  # type: ignore[no-any-return]


def _tokens_of_pages(counts: memoryview, lasts: memoryview, page_size: int) -> memoryview:
    """Return how many tokens so many pages have, of which the last has so many; all are int32."""
    numpy = _numpy(counts)
    if numpy is None:
        pairs = zip(counts, lasts, strict=True)
        return host_ints([(n - 1) * page_size + last if n else 0 for n, last in pairs])
    pages, last = (numpy.frombuffer(view, numpy.int32) for view in (counts, lasts))
    tokens = pages * page_size
    tokens += last - page_size
    # Without pages the last has `page_size` tokens at most, and none count.
    return numpy.maximum(tokens, 0, out=tokens).data  # type: ignore[no-any-return]


def _fill(lengths: memoryview, counts: memoryview, page_size: int) -> bool:
    """Whether so many tokens are known to fill so many pages, of which the last may not be full;
    all pages have int32 tokens at most."""
    numpy = _numpy(counts)
    if numpy is None:
        return False
    # As unsigned, negative numbers are the largest.
    tokens = numpy.frombuffer(lengths, numpy.uint32)
    free = numpy.frombuffer(counts, numpy.uint32) * page_size - tokens
    is_filled: bool = free.item(free.argmax()) <= page_size
    return is_filled and tokens.item(tokens.argmax()) <= INT32_MAX


def _are_fewer(some: memoryview, others: memoryview) -> bool:
    """Whether an element is less than the other array's."""
    numpy = _numpy(some)
    if numpy is None:
        return any(map(lt, some, others))
    are_less = numpy.frombuffer(some, numpy.int32) < numpy.frombuffer(others, numpy.int32)
    return are_less.item(are_less.argmax())  # type: ignore[no-any-return]


def _view(desc: TensorDesc, op: str, argument: str) -> memoryview:
    """View a tensor that is no plain buffer; refuse all but int32 arrays on the host."""
    refuse = Refusal(op)
    if desc.device.type not in _ON_HOST:
        expected = "an array on the host: a plan never copies from the device"
        raise refuse(argument, desc.device, expected)
    if desc.dtype.name != "int32":
        raise refuse(argument, desc.dtype, "int32")
    if len(desc.shape) != 1 or not desc.is_contiguous:
        raise refuse(argument, desc.layout, "a contiguous array of rank 1")
    if not desc.shape[0]:
        return memoryview(b"").cast("i")
    if not desc.ptr or desc.ptr % 4:
        expected = "an address that is a multiple of 4 bytes, and not null"
        raise refuse(argument, hex(desc.ptr), expected)
    data = ffi.buffer(ffi.cast("char *", desc.ptr), 4 * desc.shape[0])
    return memoryview(data).cast("B").cast("i")


class Indptr:
    """The start of each of b requests in an array: b + 1 positions, of which the first is 0."""

    def __init__(
        self,
        op: str,
        argument: str,
        array: object,
        length: int | None = None,
        may_be_longer: bool = False,
    ) -> None:
        self.view = int32_array(op, argument, array, length, may_be_longer)
        values = self.view.tolist()
        # `total` is the number of elements of all requests.
        self.size, self.total = len(values) - 1, values[-1] if values else 0
        self._lengths: memoryview | None = None
        if self.size >= 1 and not values[0] and sorted(values) == values:
            return
        got, expected = f"{values[0] if values else ''} first", "0 first"
        if self.size < 1:
            got, expected = f"{len(values)} elements", "one more than there are requests: 2 or more"
        elif not values[0]:
            at = next(i for i in range(self.size) if values[i + 1] < values[i])
            got = f"{values[at + 1]} after {values[at]} (request {at})"
            expected = "positions that do not decrease"
        raise Refusal(op)(argument, got, expected)

    @property
    def lengths(self) -> memoryview:
        """Elements of each request, as int32."""
        if self._lengths is None:
            self._lengths = _differences(self.view)
        return self._lengths

    @property
    def counts(self) -> list[int]:
        """Elements of each request."""
        counts: list[int] = self.lengths.tolist()
        return counts


class Batch:
    """The places of each request's queries and keys: ragged keys, or pages of a cache.

    Args:
        names: the plan's argument names, by array: `qo_indptr` (without it, each request has one
            query), `kv_indptr`, and for a paged cache `indices` and either `last_page_len` or
            `kv_len`.
        arrays: in the order of `names`; `indices` may be None if runs pass the pages.
        may_be_longer: whether `kv_indptr` may have more than b + 1 entries, which are ignored.
    """

    def __init__(
        self,
        op: str,
        names: Mapping[str, str],
        arrays: Sequence[object],
        page_size: int = 1,
        may_be_longer: bool = False,
    ) -> None:
        self._op, self._names, self._page_size = op, names, page_size
        # The arrays that planners read and that are copied to the device, by their names here.
        views: dict[str, memoryview] = {}
        self.views = views
        by_name = dict(zip(names, arrays, strict=True))
        qo, count, of_kv = None, None, by_name["kv_indptr"]
        if "qo_indptr" in by_name:
            qo = Indptr(op, names["qo_indptr"], by_name["qo_indptr"])
            views["qo_indptr"], count = qo.view, qo.size + 1
        if qo is not None and of_kv is by_name["qo_indptr"]:
            kv = qo  # keys as many as queries: one array that is read once
        else:
            kv = Indptr(op, names["kv_indptr"], of_kv, count, may_be_longer)
        self.qo, self.kv, views["kv_indptr"] = qo, kv, kv.view
        # The numbers of requests and of queries, and the queries that runs have room for.
        self.size = kv.size
        self.rows = self.room_for_rows = kv.size if qo is None else qo.total
        # The pages listed, and the highest page number; -1 if runs pass the pages.
        self.num_indices, self.max_page = 0, -1
        if "last_page_len" in by_name:
            self._read_last(by_name["last_page_len"])
        elif "kv_len" in by_name:
            self._read_kv_len(by_name["kv_len"])
        if "indices" in by_name:
            self.num_indices = kv.total
            if by_name["indices"] is not None:
                self._read_indices(by_name["indices"])

    def _read_last(self, array: object) -> None:
        """Read the number of tokens in each request's last page."""
        kv, page_size, name = self.kv, self._page_size, self._names["last_page_len"]
        lasts = self.views["last_page_len"] = int32_array(self._op, name, array, kv.size)
        least, most = _bounds(lasts)
        # A pass or two in C if all are valid; the loop finds which one is not.
        if least < 1 or most > page_size:
            for i, (count, last) in enumerate(zip(kv.counts, lasts, strict=True)):
                if not (0 < last <= page_size or (last == 0 and not count)):
                    got = f"{last} for request {i} with {count} pages"
                    raise self._refuse("last_page_len", got, f"from 1 to {page_size}")
        if kv.total * page_size > INT32_MAX:
            pairs = zip(kv.counts, lasts, strict=True)
            tokens = [(count - 1) * page_size + last if count else 0 for count, last in pairs]
            longest = max(tokens)
            if longest > INT32_MAX:
                got = f"{longest} tokens for request {tokens.index(longest)}"
                raise self._refuse("kv_indptr", got, f"{INT32_MAX} at most")

    def _read_kv_len(self, array: object) -> None:
        """Read the number of tokens of each request."""
        page_size, name = self._page_size, self._names["kv_len"]
        lengths = self.views["kv_len"] = int32_array(self._op, name, array, self.size)
        is_int32 = self.kv.total * page_size <= INT32_MAX
        if is_int32 and _fill(lengths, self.kv.lengths, page_size):
            return
        for i, (length, pages) in enumerate(zip(lengths, self.kv.counts, strict=True)):
            if length < 0 or not (pages - 1) * page_size <= length <= pages * page_size:
                got = f"{length} for request {i} with {pages} pages of {page_size}"
                raise self._refuse("kv_len", got, "tokens that fill its pages")

    def _read_indices(self, array: object) -> None:
        """Read the pages of all requests."""
        view, count = int32_array(self._op, self._names["indices"], array), self.num_indices
        if len(view) < count:
            expected = f"{count} pages, as its indptr says"
            raise self._refuse("indices", f"{len(view)} elements", expected)
        view = self.views["indices"] = view[:count]
        self.max_page = _highest(view)
        if self.max_page > INT32_MAX:
            raise self._refuse("indices", min(view), "pages from 0 on")

    def _refuse(self, array: str, got: object, expected: str) -> ArgumentError:
        return Refusal(self._op)(self._names[array], got, expected)

    @property
    def num_pages(self) -> int:
        """The fewest pages that the cache must have."""
        return self.max_page + 1

    @property
    def has_indices(self) -> bool:
        """Whether the batch has the pages; otherwise each run passes them."""
        return "indices" in self.views

    @property
    def qo_lens(self) -> list[int]:
        """Queries of each request."""
        return [1] * self.size if self.qo is None else self.qo.counts

    @property
    def lengths(self) -> memoryview:
        """Keys of each request, as int32."""
        views = self.views
        if "kv_len" in views:
            return views["kv_len"]
        if "last_page_len" in views:
            return _tokens_of_pages(self.kv.lengths, views["last_page_len"], self._page_size)
        return self.kv.lengths

    @property
    def kv_lens(self) -> list[int]:
        """Keys of each request."""
        keys: list[int] = self.lengths.tolist()
        return keys

    def use_kv_len(self) -> None:
        """Compute the number of keys of each request for the planner, if the caller did not pass
        it."""
        self.views["kv_len"] = self.lengths

    def use_mask(self) -> None:
        """Send the start of each request's packed mask to the device, in bytes, of which each takes
        whole ones; raise if it exceeds int32."""
        pairs = zip(self.qo_lens, self.kv_lens, strict=True)
        indptr = [0, *accumulate((q * kv + 7) // 8 for q, kv in pairs)]
        if indptr[-1] > INT32_MAX:
            got, expected = f"a mask of {indptr[-1]} bytes", f"{INT32_MAX} bytes at most"
            raise Refusal(self._op)("use_custom_mask", got, expected)
        self.views["mask_indptr"] = host_ints(indptr)

    def check_keys(self, why: str) -> None:
        """Raise if a request has keys, but fewer than queries: kernels would compare positions that
        wrapped around."""
        assert self.qo is not None
        of_kv, of_qo = self.lengths, self.qo.lengths
        if of_kv is of_qo or not _are_fewer(of_kv, of_qo):
            return
        for i, (queries, keys) in enumerate(zip(self.qo_lens, self.kv_lens, strict=True)):
            if 0 < keys < queries:
                got = f"{queries} queries and {keys} keys in request {i}"
                raise self._refuse("qo_indptr", got, f"no fewer keys {why}")


class Arrays:
    """The placement of a batch's arrays behind the kernel's part of the int workspace.

    Capacities are rounded up, so that slightly larger batches fit as well.
    """

    def __init__(
        self, kernel_bytes: int, names: Collection[str] = (), size: int = 0, num_indices: int = 0
    ) -> None:
        self.kernel_bytes = self.end = aligned(max(kernel_bytes, 1), _KERNEL_STEP)
        # Each array's offset in bytes, and its capacity in int32; and its offset in int32.
        self._placed: dict[str, tuple[int, int]] = {}
        self._words: dict[str, int] = {}
        positions = aligned(size + 1, _LENGTHS_STEP)
        self._size, self._num_indices = positions - 1, INT32_MAX
        for name in names:
            room = positions
            if name == "indices":
                room = self._num_indices = aligned(max(num_indices, 1), _INDEX_STEP)
            self._placed[name], self._words[name] = (self.end, room), self.end // 4
            self.end = aligned(self.end + 4 * room)

    def where(self, name: str) -> tuple[int, int]:
        """Return an array's offset in bytes, and its capacity in int32."""
        return self._placed[name]

    def holds(self, kernel_bytes: int, batch: Batch) -> bool:
        """Whether a batch fits."""
        return (
            kernel_bytes <= self.kernel_bytes
            and batch.size <= self._size
            and batch.num_indices <= self._num_indices
            and len(batch.views) == len(self._placed)  # others only for want of pages
        )

    def write(self, stage: memoryview, views: Mapping[str, memoryview]) -> None:
        """Write the arrays of a batch that it holds to their places in host memory, both as
        int32."""
        words = self._words
        for name, view in views.items():
            word = words[name]
            stage[word : word + len(view)] = view

    def descs(self, buffer: TensorDesc, counts: Mapping[str, int]) -> dict[str, TensorDesc]:
        """Describe the arrays in the int workspace, with these lengths or their whole capacity."""
        return {
            name: TensorDesc(
                buffer.ptr + start, (counts.get(name, room),), INT32, device=buffer.device
            )
            for name, (start, room) in self._placed.items()
        }


def host_ints(values: Sequence[int]) -> memoryview:
    """Make an int32 array on the host from Python ints."""
    return memoryview(array("i", values))
