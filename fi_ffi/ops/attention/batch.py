"""A batch of requests: its index arrays, read and checked."""

from __future__ import annotations

from fi_ffi.errors import ArgumentError
from fi_ffi.ops.attention.indices import INT32_MAX, Indptr, PagedLengths, mask_bytes

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
            for name, array in zip(_PAGED, paged, strict=True):
                if array is not None:
                    raise ArgumentError(op, name, got="an array", expected="None without page_size")
            self.kv = Indptr(op, "kv_indptr", kv_indptr, count + 1)
        else:
            if kv_indptr is not None:
                raise ArgumentError(op, "kv_indptr", got="an array", expected="None with page_size")
            for name, array in zip(_PAGED[::2], paged[::2], strict=True):
                if array is None:
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
