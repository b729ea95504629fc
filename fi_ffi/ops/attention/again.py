"""Planning a batch like the one before: as many requests, that fit where those were placed.

Then the planner's call is packed already: it reads the index arrays from the page-locked
memory that they are copied from, where they are written for the GPU anyway.  Whatever is
new or wrong is left to the full way, which has the words for it.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from fi_ffi.abi.frame import Frame, word_of
from fi_ffi.abi.tensor import make_desc
from fi_ffi.ops.attention.arrays import Arrays
from fi_ffi.ops.attention.indices import CPU, INT32_MAX, bytes_layout, ints_layout
from fi_ffi.ops.attention.workspace import Stage, Workspace
from fi_ffi.ops.form import Form
from fi_ffi.ops.launch import Place


def ints(array: object) -> memoryview | None:
    """An array of int32 that the buffer protocol tells; None for any other."""
    try:
        view = memoryview(array)  # type: ignore[arg-type]
    except (TypeError, ValueError, BufferError):
        return None
    is_plain = view.format == "i" and view.ndim == 1 and view.c_contiguous
    return view if is_plain else None


def positions(view: memoryview | None) -> list[int] | None:
    """Where requests start, if they are in order from 0 on."""
    if view is None or len(view) < 2:
        return None
    values: list[int] = view.tolist()
    return None if values[0] or sorted(values) != values else values


def pages(view: memoryview | None, count: int) -> tuple[memoryview, int] | None:
    """The first `count` pages and the last of them in the cache, if all are of a cache."""
    numpy = sys.modules.get("numpy")
    if view is None or numpy is None or not 0 < count <= len(view):
        return None
    view = view[:count]
    array = numpy.frombuffer(view, numpy.int32)
    return None if array.min() < 0 else (view, int(array.max()))


def are_last_page_lens(view: memoryview | None, count: int, page_size: int) -> bool:
    """Whether they are `count`, each of a page that has tokens."""
    if view is None or len(view) != count:
        return False
    values = view.tolist()
    return min(values) > 0 and max(values) <= page_size


class Again:
    """The planner's call, packed for batches of `size` requests."""

    __slots__ = (
        "_form", "_frames", "_values", "least", "lens", "limit", "placed", "rows_word", "size",
        "workspace",
    )  # fmt: skip

    def __init__(
        self, form: Form, values: list[Any], placed: Arrays, workspace: Workspace, size: int,
        least: int, limit: int,
    ) -> None:  # fmt: skip
        self._form, self._values = form, values
        self.placed, self.workspace, self.size = placed, workspace, size
        # Of what grows with lengths (queries, pages), how few and how many it is for.
        self.least, self.limit = least, min(limit, INT32_MAX)
        # Keys of each request, where the planner reads them.
        self.lens: memoryview | None = None
        names = [arg.name for arg in form.row.args]
        rows = "total_num_rows"
        self.rows_word = word_of(names.index(rows), False) if rows in names else 0
        self._frames: dict[Stage, tuple[Frame, Place]] = {}

    def frame(self, stage: Stage, arrays: Mapping[str, str]) -> tuple[Frame, Place]:
        """The call with index arrays (`arrays`: the row's names, and what they are placed as)
        read from a stage."""
        found = self._frames.get(stage)
        if found is None:
            values, count = self._values.copy(), self.placed.kernel_bytes
            values[:3] = (
                self.workspace.float_buffer,
                make_desc(
                    self.workspace.int_buffer.ptr, bytes_layout(count, self.workspace.device)
                ),
                make_desc(stage.desc.ptr, bytes_layout(count, CPU)),
            )
            for i, arg in enumerate(self._form.row.args):
                if arg.name in arrays:
                    start, room = self.placed.where(arrays[arg.name])
                    values[i] = make_desc(stage.desc.ptr + start, ints_layout(room))
            settled, _ = self._form.check(values, None)
            self._form.start(settled)
            frame, place = settled.frame(), settled.place
            assert place is not None
            frame.write(values)
            found = self._frames[stage] = frame, place
        return found
