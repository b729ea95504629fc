"""Scheduling: the kernel's planner, the workspace it fills, and what CUDA graphs hold fixed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fi_ffi.abi.function import Frame, array_values
from fi_ffi.abi.interop import as_desc
from fi_ffi.abi.library import address_of
from fi_ffi.abi.objects import Array
from fi_ffi.abi.tensor import Device, TensorDesc, TensorKind, make_desc
from fi_ffi.errors import ArgumentError
from fi_ffi.ops.attention.arrays import Arrays, Batch
from fi_ffi.ops.attention.bind import GROWING_AXES, Binder, BoundRow
from fi_ffi.ops.attention.rows import WITH_COPY
from fi_ffi.ops.attention.sizes import Need, aligned
from fi_ffi.ops.attention.workspace import Workspace
from fi_ffi.ops.call import cuda
from fi_ffi.ops.call.arguments import Refusal
from fi_ffi.ops.call.launch import launch
from fi_ffi.ops.call.row import Row
from fi_ffi.ops.call.staging import Stage

# Bytes that the CPU's reference stores for each request.
_REFERENCE_BYTES = 64
# Planner arguments that are arrays of the batch, by the array's name in `Batch.views`.
_PLANNED_ARRAYS = {
    "qo_indptr": "qo_indptr",
    "kv_indptr": "kv_indptr",
    "indptr": "kv_indptr",
    "kv_len_arr": "kv_len",
    "kv_len": "kv_len",
}
_STAGING = "page_locked_int_workspace_buffer"


class Planner:
    """A kernel's planner with all arguments bound; each frame gets the batch's arrays and sizes."""

    def __init__(self, binder: Binder, row: Row) -> None:
        self._device = device = binder.device
        names = [arg.name for arg in row.tensors if arg.name in _PLANNED_ARRAYS]
        self._arrays = {name: _PLANNED_ARRAYS[name] for name in names}
        self.needs_kv_len = "kv_len" in self._arrays.values()
        self._has_sent = row.result != WITH_COPY
        kinds: dict[str, TensorKind | None] = {arg.name: None for arg in row.given}
        for arg in row.tensors:
            where = "cpu" if arg.host else device
            kinds[arg.name] = make_desc(0, (0,), arg.dtype, None, where).kind
        self._bound = binder.bind(row, binder.module, kinds, {})
        for name in ("batch_size", "total_num_rows"):
            self._bound.put(name, 0)
        # The frame of all calls, and the stage whose addresses it has.
        self._frame: Any = None
        self._ptr = 0
        # The workspace and the placement that it is bound to.
        self._workspace: Workspace | None = None
        self._placed: Arrays | None = None

    # Copies to the int workspace, on a stream, what the planner has not copied; returns CUDA's
    # error code.
    send: Callable[[Any], int]

    def plan(
        self, workspace: Workspace, stage: Stage, placed: Arrays, batch: Batch, stream: object
    ) -> tuple[Array, int]:
        """Call the planner on the arrays in the stage. Return the plan's info, and where it is."""
        if self._placed is not placed or self._workspace is not workspace:
            self._placed, self._ptr = None, 0  # until all is bound: an interrupt may end this
            self._bind_places(workspace, stage.desc, placed, batch)
            self._placed, self._workspace = placed, workspace
        frame, ptr, size = self._frame, stage.ptr, batch.size
        words = frame.addresses
        if ptr != self._ptr:
            for word, more in self._of_stage:
                words[word] = ptr + more
            start = placed.kernel_bytes if self._has_sent else 0
            target, count = workspace.int_buffer.ptr + start, placed.end - start
            self.send = cuda.copying(target, ptr + start, count, self._device.is_cuda)
            self._ptr = ptr
        for word, more in self._of_size:
            words[word] = size + more
        for word in self._of_rows:
            words[word] = batch.room_for_rows
        launch(frame, stream)
        address = words[frame.layout.result + 1]
        info = frame.take_result()
        if not self._has_sent:
            first = array_values(info)[0]
            if isinstance(first, Array):  # the CPU's reference returns the info alone
                info, address = first, address_of(first.handle)
        return info, address

    def _bind_places(
        self, workspace: Workspace, stage: TensorDesc, placed: Arrays, batch: Batch
    ) -> None:
        """Bind the planner to a workspace and a placement. List the frame words that change with
        the stage and with the number of requests, with an offset, and those that have the number of
        queries."""
        bound, count = self._bound, placed.kernel_bytes
        bound.put("float_workspace_buffer", workspace.float_buffer)
        bound.put("int_workspace_buffer", workspace.int_buffer.rows(0, count))
        bound.put(_STAGING, stage.rows(0, count))
        words = bound.words
        self._of_stage = [(words[_STAGING][0][0], 0)] if _STAGING in words else []
        self._of_size = [(words["batch_size"][0][0], 0)] if "batch_size" in words else []
        self._of_rows = [words["total_num_rows"][0][0]] if "total_num_rows" in words else []
        descs = placed.descs(stage, {name: len(view) for name, view in batch.views.items()})
        for argument, name in self._arrays.items():
            bound.put(argument, descs[name])
            (address, _), (length, _), *_ = words[argument]
            self._of_stage.append((address, placed.where(name)[0]))
            self._of_size.append((length, len(batch.views[name]) - batch.size))
        if self._frame is None:
            self._frame = bound.pack(bound)
        bound.write(self._frame)


class Captured:
    """What captured runs of a plan hold fixed: the launch, and the sizes of the runs' tensors."""

    def __init__(self, refuse: Refusal, names: Mapping[str, str]) -> None:
        self._refuse, self._names = refuse, names
        self.launch: list[int] | None = None
        # The smallest sizes of growing axes that runs were given.
        self.room: dict[str, int] = {}

    def check_batch(self, batch: Batch, before: Batch) -> None:
        """Refuse a batch that needs another launch, or larger tensors than runs were given."""
        names, refuse = self._names, self._refuse
        first, pages = next(iter(names.values())), names.get("indices")
        if batch.size != before.size:
            expected = f"{before.size}, the number of requests that the launch is for"
            raise refuse(first, f"{batch.size} requests", expected)
        needs = [("keys", names["kv_indptr"], batch.kv.total)]
        if pages is not None:
            needs = [
                ("pages", pages, batch.num_pages),
                ("page indices", names["kv_indptr"], batch.num_indices),
            ]
        if "mask_indptr" in batch.views:
            needs.append(("mask bytes", first, batch.views["mask_indptr"][-1]))
        for of, argument, need in needs:
            have = self.room.get(of)
            if have is not None and need > have:
                expected = f"at most {have}, the size that captured runs were given"
                raise refuse(argument, f"{need} {of}", expected)
        if pages is not None and batch.has_indices != before.has_indices:
            # The captured launch has the address of the pages: of the plan's array or of the run's.
            got, expected = ("an array", "None") if batch.has_indices else ("None", "an array")
            raise refuse(pages, got, f"{expected}, as in the captured plan")

    def check_launch(self, launch: list[int]) -> None:
        """Raise if the planner's result would launch a run otherwise than before."""
        if self.launch is not None and launch != self.launch:
            raise self._refuse("self", f"launch {launch}", f"the captured {self.launch}")
        self.launch = launch

    def recording(self, pack: Callable[..., Frame | None]) -> Callable[..., Frame | None]:
        """Return a `pack` that records the sizes of a run, which a captured run cannot exceed."""

        def packed(bound: BoundRow, *values: Any) -> Frame | None:
            frame = pack(bound, *values)
            self._record_sizes(bound, values)
            return frame

        return packed

    def _record_sizes(self, bound: BoundRow, values: Sequence[Any]) -> None:
        """Record the sizes of a run's growing tensors; values left out are no tensors."""
        arguments = dict(zip(bound.template.index, values, strict=False))
        for arg in bound.compiled.tensors:
            value = arguments.get(arg.name)
            if value is None:
                continue
            shape = as_desc(value, self._refuse.op, arg.name).shape
            axes = arg.axes_in(arguments.get("kv_layout", "NHD"))
            for axis, have in zip(axes, shape, strict=True):
                if axis in GROWING_AXES:
                    of, *_ = GROWING_AXES[axis]
                    self.room[of] = min(self.room.get(of, have), have)


def place(before: Arrays, need: Need, batch: Batch, num_indices: int, device: Device) -> Arrays:
    """Place a batch's arrays after the kernel's part of the int workspace, where the last batch's
    were (`before`) if they fit."""
    least = 0 if device.is_cuda else _REFERENCE_BYTES * (batch.size + 4)
    count = max(need.int_bytes, least)
    if before.holds(count, batch):
        return before
    return Arrays(count, batch.views, batch.size, num_indices)


def allocate(refuse: Refusal, device: Device, *sizes: int) -> Workspace:
    """Allocate a workspace of these sizes and a quarter more, so that a slightly larger batch needs
    no new allocation."""
    try:
        return Workspace.allocate(device, *(aligned(size + size // 4, 2**16) for size in sizes))
    except (ArgumentError, MemoryError) as error:
        expected = f"{sizes[0]} and {sizes[1]} bytes, which could not be allocated"
        raise refuse("workspace", None, expected) from error
