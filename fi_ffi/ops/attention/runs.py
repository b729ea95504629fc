"""What the runs of a plan share: they are given its workspace, and launched in order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fi_ffi.abi._cffi import ffi
from fi_ffi.abi.device import Device
from fi_ffi.abi.function import array_values
from fi_ffi.abi.interop import as_desc
from fi_ffi.abi.objects import Array
from fi_ffi.abi.streams import launching
from fi_ffi.abi.tensor import TensorDesc
from fi_ffi.errors import ArgumentError
from fi_ffi.ops import watching
from fi_ffi.ops.attention.ready import PreparedRun, Ready, can_repeat
from fi_ffi.ops.attention.run import Values, as_called, call
from fi_ffi.ops.attention.supporting import Supporting
from fi_ffi.ops.attention.workspace import Workspace
from fi_ffi.ops.form import Form
from fi_ffi.ops.launch import Preparing
from fi_ffi.ops.prepared import Prepared

# Runs that a plan remembers.
_MOST_READY = 256


class Runs(Supporting):
    """The part of a plan that runs it; the other part makes it (`Plan`)."""

    op: str
    options: Any
    device: Device
    workspace: Workspace | None
    room: dict[str, int]
    _generation: int
    _info: Array | None
    _ready: dict[tuple[object, ...], Ready]
    _descs: dict[str, TensorDesc]
    _num_indices: int
    _max_page: int

    def stream(self, stream: object) -> int:
        """The handle of the stream to work on; 0 on the CPU."""
        if type(stream) is int and self.device.is_cuda and 0 <= stream < 2**64:
            return stream
        return launching(stream, self.device, self.op).handle if self.device.is_cuda else 0

    def refuse(self, argument: str, got: object, expected: object) -> ArgumentError:
        return ArgumentError(self.op, argument, got=got, expected=expected)

    def put_pages(self, values: Values, indices: Any, cache: str, layout: str) -> None:
        """Set the pages of a paged run, and check what was planned against the cache."""
        desc = as_desc(values.get(cache), self.op, cache)
        page_size, least = self.options.page_size, self._max_page + 1
        axis = 2 if layout == "HND" else 1
        if len(desc.shape) > axis and desc.shape[axis] != page_size:
            expected = f"page_size = {page_size} at axis {axis} ({layout}), as planned"
            raise self.refuse(cache, desc.layout, expected)
        if desc.shape and desc.shape[0] < least:
            expected = f"{least} pages or more: the plan has page {self._max_page}"
            raise self.refuse(cache, desc.layout, expected)
        values.room["pages"] = desc.shape[0] if desc.shape else 0
        pages = self._descs.get("indices")
        name = "paged_kv_indices" if values.has("paged_kv_indices") else "kv_indices"
        if (indices is None) == (pages is None):
            expected = "an array on the device" if pages is None else "None: the plan has them"
            got = "None" if indices is None else "an array"
            raise self.refuse(name, got, expected)
        if pages is None:
            pages = as_desc(indices, self.op, name)
            have = values.room["page indices"] = pages.shape[0] if len(pages.shape) == 1 else 0
            if have < self._num_indices:
                expected = f"the pages of all requests, {self._num_indices} as planned, or more"
                raise self.refuse(name, pages.layout, expected)
        values.put(
            kv_indices=pages,
            paged_kv_indices=pages,
            paged_kv_indptr=self._descs.get("kv_indptr"),
            paged_kv_last_page_len=self._descs.get("last_page_len"),
        )

    def put_workspace(self, values: Values) -> None:
        """Set what every run is given first; raise where it no longer holds this plan."""
        values.put(
            float_workspace_buffer=self.check_current().float_buffer,
            int_workspace_buffer=self._descs["int_workspace_buffer"],
            plan_info_vec=self.info_address,
        )

    @property
    def plan_info(self) -> list[int]:
        """What the kernel's planner returned, in the order of its `ToVector`."""
        self.check_current()
        return array_values(self._info) if self._info is not None else []

    @property
    def info_address(self) -> int:
        assert self._info is not None
        return int(ffi.cast("uintptr_t", self._info.handle))

    def check_current(self) -> Workspace:
        """Raise unless the workspace still holds this plan."""
        workspace = self.workspace
        if workspace is None or workspace.generation != self._generation:
            got = "a stale plan: its workspace holds another, or a replan failed"
            raise self.refuse("self", got, "replan(...) first, or a workspace for each plan")
        return workspace

    def repeat(self, options: tuple[object, ...], tensors: Sequence[Any], stream: object) -> bool:
        """Make a run like one that this plan has made before; False where there was none."""
        try:
            layouts = [None if tensor is None else tensor.layout for tensor in tensors]
            ready = self._ready[options, tuple(layouts)]
        except (AttributeError, KeyError, TypeError):
            return False
        return ready.run(tensors, stream)

    def launch(
        self, form: Form, values: Values, stream: object, names: Sequence[str],
        options: tuple[object, ...], tensors: Sequence[Any],
    ) -> Any:  # fmt: skip
        """Run, ordered after the plan, and before the next one made in this workspace.

        `names` are what the row calls the run's own `tensors`; all else but these and the
        `options` is the plan's.
        """
        workspace = self.check_current()
        if type(stream) is Preparing:
            made = call(self.op, form, values.values, stream)
            self._keep_room(values)
            return PreparedRun(self, made, names)
        handle = self.stream(stream)
        with as_called(self.op):
            settled, _ = form.check(values.values, handle)
        if not settled.is_empty:
            event = workspace.join(handle) if self.device.is_cuda else None
            with watching.running(self):
                form.launch(settled, values.values, handle if self.device.is_cuda else None)
            if event is not None:
                event.record(handle)
            if can_repeat(options, tensors):
                layouts = [None if tensor is None else tensor.layout for tensor in tensors]
                ready = Ready(workspace, form.row, settled, values.values, names)
                if len(self._ready) >= _MOST_READY:
                    self._ready.clear()
                self._ready[options, tuple(layouts)] = ready
        self._keep_room(values)
        return None

    def _keep_room(self, values: Values) -> None:
        """Note how much a run was given, which a graph that it is captured in stays with."""
        for of, have in values.room.items():
            self.room[of] = min(self.room.get(of, have), have)

    def launch_prepared(self, made: Prepared) -> None:
        """Launch a prepared run, ordered as any other."""
        workspace, event = self.check_current(), None
        if self.device.is_cuda:
            handle = self.stream(made.stream)
            event = None if handle == workspace.stream else workspace.join(handle)
        if watching.inboxes:
            with watching.running(self):
                made()
        else:
            made()
        if event is not None:
            event.record(handle)
