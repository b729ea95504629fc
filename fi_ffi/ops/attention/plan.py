"""What the plan classes share: a schedule made on the host, kept in a workspace, run many times.

A plan's entries are compiled with the plan's own arguments bound: these are written into a frame
once a schedule, and each run writes what it is given.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import NoneType
from typing import Any, ClassVar, NamedTuple, NoReturn

from fi_ffi.abi._cffi import ffi
from fi_ffi.abi.function import Frame, array_values
from fi_ffi.abi.interop import as_desc
from fi_ffi.abi.objects import Array
from fi_ffi.abi.streams import current_scope, handle_for
from fi_ffi.abi.tensor import Device, TensorDesc, TensorKind, make_desc, parse_device
from fi_ffi.errors import ArgumentError, ArgumentTypeError
from fi_ffi.loader import machine
from fi_ffi.ops import cuda
from fi_ffi.ops.attention.arrays import Arrays, placed_for
from fi_ffi.ops.attention.options import Kernel
from fi_ffi.ops.attention.run import CALLER_NAMES, Values
from fi_ffi.ops.attention.sizes import Need, aligned
from fi_ffi.ops.attention.supporting import Supporting
from fi_ffi.ops.attention.workspace import Workspace
from fi_ffi.ops.call import memory
from fi_ffi.ops.call.compiled import CompiledRow, Variant
from fi_ffi.ops.call.launch import launch
from fi_ffi.ops.call.prepared import PackedCall, tensor_like
from fi_ffi.ops.row import PlanInfo, Row, Scalar, Tensor
from fi_ffi.ops.watch import watching

_compiled_rows: dict[tuple[object, ...], CompiledRow] = {}
# What the CPU's reference keeps of a request, which has no formula of its own.
_REFERENCE_BYTES = 64
_MASK = 2**64 - 1
# Axes of runs' tensors that grow with lengths, and what they count.
_GROWING = {
    "nnz_kv": "keys", "num_pages": "pages", "num_indices": "page indices",
    "mask_bytes": "mask bytes",
}  # fmt: skip


class WorkspaceSize(NamedTuple):
    """Bytes that a plan needs of each workspace."""

    float_bytes: int
    int_bytes: int


class _SizeOnly:
    """Stands for a workspace where only its size is asked for."""


SIZE_ONLY: Any = _SizeOnly()


def forget() -> None:
    """Drop what was learnt, after the source of kernels changed."""
    _compiled_rows.clear()


def compiled_row(
    row: Row, module: str, dtypes: Mapping[str, str], op: str, device: Device | None = None,
    bound: Mapping[str, TensorKind | None] | None = None, known: tuple[str, ...] = (),
    not_less: tuple[tuple[str, str], ...] = (), first: tuple[str, ...] = (),
) -> CompiledRow:  # fmt: skip
    """A row compiled for a module of these dtypes; shared by all plans alike."""
    key = (row, module, op, device, tuple((bound or {}).items()), known, not_less, first)
    found = _compiled_rows.get(key)
    if found is None:
        own = {name: (dtype,) for name, dtype in dtypes.items() if name in row.dtypes}
        pairs = (f"{more} >= {less}" for more, less in not_less)
        form = replace(
            row, dtypes=dict[str, tuple[str, ...]](own), requires=(*row.requires, *pairs)
        )
        made = CompiledRow(
            form,
            module,
            op=op,
            names=CALLER_NAMES,
            known=known,
            bound=bound,
            device=device,
            first=first,
        )
        found = _compiled_rows.setdefault(key, made)
    return found


class BoundRow:
    """A plan's entry with the plan's own arguments bound.

    `sizes` are those of the compiled row's known axes, and `memory` where the two workspaces
    that the plan works in start and end, and the first and the last of these.
    """

    def __init__(self, compiled: CompiledRow, template: Values) -> None:
        self.compiled, self.template = compiled, template
        self.sizes: Sequence[int] = ()
        self.memory: Sequence[int] = (0, 0, 0, 0, 0, 0)
        self._places = {arg.name: (i, arg) for i, arg in enumerate(compiled.row.args)}
        # What each bound argument is in a frame: words, and what is in them.
        self._words: dict[str, list[tuple[int, int]]] = {}
        # Changes with them: a frame that was written before is written again.
        self.version = object()
        self.rest: tuple[Any, ...] = ()
        self._free: dict[Variant, list[Frame]] = {}

    def put(self, name: str, value: Any) -> None:
        """Bind an argument, by the binding's name; one that the row lacks is left out."""
        found = self._places.get(name)
        if found is None or name not in self.compiled.form.bound:
            return
        i, arg = found
        layout = self.compiled.layout
        if isinstance(arg, Tensor):
            words = []
            if value is not None:
                dims = enumerate((*value.shape, *value.strides), layout.dims[i])
                words = [(layout.tensors[i], value.ptr), *dims]
        elif isinstance(arg, Scalar) and arg.type is float:
            words = [(layout.value(i), struct.unpack("Q", struct.pack("d", value))[0])]
        else:
            words = [(layout.value(i), int(value) & _MASK)]
        self._words[name] = words
        self.version = object()

    def changed(self, name: str, number: int, value: int) -> list[tuple[int, int]]:
        """One of a bound argument's words (of a tensor: its address, then its sizes), changed;
        nothing where it is the same, or the row lacks the argument."""
        words = self._words.get(name)
        if not words or words[number][1] == value:
            return []
        words[number] = words[number][0], value
        return [words[number]]

    def change(self, changed: Sequence[tuple[int, int]]) -> None:
        """Write changed words into the frames that no call has."""
        if not changed:
            return
        before, self.version = self.version, object()
        for free in self._free.values():
            for frame in free:
                if frame.version is before:
                    for word, value in changed:
                        frame.addresses[word] = value
                    frame.version = self.version

    def frame(self, variant: Variant) -> Frame:
        """A frame of a call's own, with what is bound written into it."""
        try:
            frame = self._free[variant].pop()
        except (KeyError, IndexError):
            frame = variant.new_frame()
        if frame.version is not self.version:
            addresses = frame.addresses
            for words in self._words.values():
                for word, value in words:
                    addresses[word] = value
            frame.version = self.version
        return frame

    def give_back(self, frame: Frame) -> None:
        """Let another call have a frame."""
        variant: Variant = frame.variant
        if frame.is_referred_to:
            variant.give_back(frame)
        else:
            self._free.setdefault(variant, []).append(frame)


class Plan(Supporting):
    """A schedule for a batch; made by the classes derived from this one."""

    op: str
    options: Any
    backend: str
    backend_reason: str
    module: str
    # The planner, and each kind of run by whether the plan has the pages' indices.
    _planner: BoundRow
    _run_rows: Sequence[Row]
    # What the planner is given for each batch; all else is bound.
    planner_given: frozenset[str] = frozenset(
        {"qo_indptr", "kv_indptr", "kv_len_arr", "kv_len", "indptr", "batch_size",
         "total_num_rows"}
    )  # fmt: skip
    # Of the batch that is planned: requests, and rows of the queries.
    _batch_size: int
    _rows_now: int

    def __init__(self, device: object, workspace: object) -> None:
        if not (workspace is None or isinstance(workspace, (Workspace, _SizeOnly))):
            got = type(workspace).__name__
            raise ArgumentTypeError(self.op, "workspace", got=got, expected="a Workspace or None")
        self.is_size_only = isinstance(workspace, _SizeOnly)
        self.workspace = workspace if isinstance(workspace, Workspace) else None
        if self.workspace is not None and device is None:
            device = self.workspace.device
        self.device: Device = parse_device("cuda:0" if device is None else device, op=self.op)
        if self.device.type not in ("cpu", "cuda"):
            raise ArgumentError(self.op, "device", got=self.device, expected="cpu or cuda")
        if self.workspace is not None and self.workspace.device is not self.device:
            got, expected = f"one on {self.workspace.device}", f"one on {self.device}"
            raise ArgumentError(self.op, "workspace", got=got, expected=expected)
        self._generation = -1
        self._info: Array | None = None
        self._captured: list[int] | None = None
        self._placed = Arrays(0, {})
        self._owns_workspace = workspace is None
        # Pages of the batch in all, and the last of them in the cache, where it is known.
        self._num_indices, self._max_page = 0, -1
        self._descs: dict[str, TensorDesc] = {}
        # What these are of.
        self._described: tuple[object, object] = (None, None)
        self._planned_in: tuple[object, int] = (None, 0)
        # How many int32 index arrays have that the kernels take the batch's size from.
        self._counts: dict[str, int] = {}
        self._runs: dict[tuple[int, bool, str], BoundRow] = {}
        # Of these, what has been bound to the schedule as it is now.
        self._bound_runs: dict[tuple[int, bool], BoundRow] = {}
        # With CUDA graphs: the least room that runs were given for what grows with lengths.
        self.room: dict[str, int] = {}

    def __copy__(self) -> NoReturn:
        raise TypeError(f"a {type(self).__name__} has a schedule of its own and cannot be copied")

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError(f"a {type(self).__name__} is of this process and cannot be pickled")

    # Planning.

    def bind_planner(self, row: Row, kernel: Kernel) -> None:
        """Compile the planner with all bound but what says how long requests are."""
        kinds = {
            arg.name: make_desc(0, (0,), arg.dtype, None, "cpu" if arg.host else self.device).kind
            for arg in row.tensors
        }
        bound = {
            arg.name: kinds.get(arg.name) for arg in row.given if arg.name not in self.planner_given
        }
        compiled = compiled_row(
            row, kernel.module(self.backend_of_module), kernel.dtypes, self.op, self.device, bound
        )
        self._planner = BoundRow(compiled, Values(self.op, compiled, self.backend, {}))

    @property
    def backend_of_module(self) -> str:
        """The backend, for what modules are called after it."""
        return self.backend

    def place(self, need: Need, batch_size: int, rooms: Mapping[str, int]) -> Arrays:
        """Places for index arrays after what the kernel needs of the int workspace."""
        least = 0 if self.device.is_cuda else _REFERENCE_BYTES * (batch_size + 4)
        return placed_for(max(need.int_bytes, least), rooms, self._placed)

    def is_room_for(self, need: Need, placed: Arrays) -> bool:
        """Whether the workspace has room for what a batch takes at most: it need not be exact."""
        have = self.workspace
        if self._owns_workspace or have is None:
            return True
        return have.has(need.float_bytes, placed.end)

    @property
    def machine(self) -> tuple[int, int]:
        """Multiprocessors and compute capability (major); the CPU's reference has no need."""
        if not self.device.is_cuda:
            return 1, 9
        index = self.device.index
        return machine.multiprocessors(index), machine.capability(index)[0]

    def schedule(
        self, given: Mapping[str, Any], arrays: Mapping[str, memoryview], need: Need,
        placed: Arrays, stream: object,
    ) -> None:  # fmt: skip
        """Have the kernel plan, and send the index arrays after.

        Nothing that another plan uses is written before the kernel's planner has agreed.
        """
        handle, is_cuda = self.stream(stream), self.device.is_cuda
        if is_cuda and cuda.is_capturing(handle):
            raise self.refuse("stream", "one that is capturing a graph", "plan before the capture")
        workspace = self._workspace(need.float_bytes, placed.end)
        with workspace.lock, cuda.current(self.device):
            stage = workspace.stages.take(workspace.int_bytes)
            count = placed.kernel_bytes
            if self.options.enable_cuda_graph and need.split is False:
                # Up to 0.7.0, fa2's planner leaves the indices of the blocks that only pad
                # the grid as they are; as 0, they repeat what the first block does.
                ffi.memmove(cuda.pointer(stage.desc.ptr), bytes(count), count)
            placed.write(stage.words, arrays)
            if is_cuda:
                workspace.take(handle)
            info = self._plan(workspace, stage, count, given, handle)
            if self.options.enable_cuda_graph:
                # Until it is found the same, neither the old plan nor the new one holds.
                workspace.generation += 1
                self.check_launch(array_values(info), stage.desc)
            self._send(workspace, stage.desc, placed, handle)
            workspace.stages.record(stage, handle)
            workspace.generation += 1
            self._generation, self._info = workspace.generation, info
        self._counts = {name: len(view) for name, view in arrays.items() if name != "indices"}
        if placed is not self._described[0] or workspace is not self._described[1]:
            self._described = placed, workspace
            self._descs = placed.descs(workspace.int_buffer, self._counts)
            self._descs["int_workspace_buffer"] = workspace.int_buffer.rows(0, count)
            self._bound_runs.clear()  # the plan may have the pages, where runs had them before
            for bound in self._runs.values():
                self._bind_workspace(bound, workspace)
        self.needs, self._placed = need, placed
        self._batch_now()
        for bound in self._runs.values():
            self._bind_schedule(bound)

    def _batch_now(self) -> None:
        """Note what of the batch its runs are held against; of each class its own."""

    def _plan(
        self, workspace: Workspace, stage: Any, count: int, given: Mapping[str, Any], handle: int
    ) -> Array:
        """Call the planner: what it returns is the plan's info."""
        planner, staging = self._planner, "page_locked_int_workspace_buffer"
        if self._planned_in != (workspace, count):
            planner.put("float_workspace_buffer", workspace.float_buffer)
            planner.put("int_workspace_buffer", workspace.int_buffer.rows(0, count))
            planner.put(staging, stage.desc.rows(0, count))
            self._planned_in = workspace, count
        planner.change(planner.changed(staging, 0, stage.desc.ptr))
        index, values = planner.template.index, planner.template.values.copy()
        for name, value in given.items():
            if name in index:
                values[index[name]] = value
        _, frame = planner.compiled.pack(planner, *values)
        try:
            with watching.running(self):
                launch(frame, handle if self.device.is_cuda else None)
            return frame.take_result()  # type: ignore[no-any-return]
        finally:
            planner.give_back(frame)

    def _workspace(self, float_bytes: int, int_bytes: int) -> Workspace:
        workspace = self.workspace
        if workspace is None or (
            self._owns_workspace
            and not self._captured
            and (workspace.float_bytes < float_bytes or workspace.int_bytes < int_bytes)
        ):
            # Room to grow: the next batch is seldom of exactly this size.
            sizes = [aligned(count + count // 4, 2**16) for count in (float_bytes, int_bytes)]
            try:
                workspace = self.workspace = Workspace.allocate(self.device, *sizes)
            except (ArgumentError, MemoryError) as error:
                expected = f"{float_bytes} and {int_bytes} bytes, which could not be allocated"
                raise self.refuse("workspace", None, expected) from error
        workspace.require(self.op, float_bytes, int_bytes)
        return workspace

    def _send(self, workspace: Workspace, stage: TensorDesc, placed: Arrays, handle: int) -> None:
        start, count = placed.kernel_bytes, placed.end - placed.kernel_bytes
        target, source = workspace.int_buffer.ptr + start, stage.ptr + start
        if not count:
            return
        if self.device.is_cuda:
            cuda.copy_to_device(target, source, count, handle)
        else:
            ffi.memmove(cuda.pointer(target), cuda.pointer(source), count)

    # With CUDA graphs: what a replan may not change.

    def check_launch(self, launch: list[int], stage: TensorDesc) -> None:
        """With CUDA graphs: raise where a run would be launched otherwise than before.

        A plan class that could know earlier has refused already; this holds what it knows
        against what the planner says (`launch`) and has written (`stage`).
        """
        if self._captured is not None and launch != self._captured:
            raise self.refuse("self", f"launch {launch}", f"the captured {self._captured}")
        self._captured = launch

    def check_room(self, of: str, argument: str, need: int) -> None:
        """With CUDA graphs: refuse a batch that needs more than a captured run was given."""
        have = self.room.get(of)
        if have is not None and need > have:
            expected = f"at most the {have} that runs were given, and captured with"
            raise self.refuse(argument, f"{need} {of}", expected)

    def check_batch_size(self, argument: str, batch_size: int, before: int) -> None:
        """With CUDA graphs: the number of requests is part of the launch."""
        if batch_size != before:
            expected = f"{before}, the number of requests that the launch is for"
            raise self.refuse(argument, f"{batch_size} requests", expected)

    def check_has_indices(self, argument: str, has_indices: bool) -> None:
        """With CUDA graphs: who brings the pages, plan or run, is part of what was captured."""
        if has_indices != ("indices" in self._descs):
            expected = "an array or None, as in the plan that was captured"
            raise self.refuse(argument, "the other", expected)

    def _keep_room(self, bound: BoundRow, values: Sequence[Any]) -> None:
        """Note how much a run is given, which a graph that it is captured in stays with."""
        given = dict(zip(bound.template.index, values, strict=True))
        for arg in bound.compiled.tensors:
            value = given[arg.name]
            if value is None:
                continue
            shape = as_desc(value, self.op, arg.name).shape
            for axis, have in zip(arg.axes_in(given.get("kv_layout", "NHD")), shape, strict=True):
                if axis in _GROWING:
                    of = _GROWING[axis]
                    self.room[of] = min(self.room.get(of, have), have)

    # Running.

    def stream(self, stream: object) -> int:
        """The handle of the stream to work on; 0 on the CPU."""
        return handle_for(stream, self.device, self.op)

    def refuse(self, argument: str, got: object, expected: object) -> ArgumentError:
        return ArgumentError(self.op, argument, got=got, expected=expected)

    @property
    def plan_info(self) -> list[int]:
        """What the kernel's planner returned, in the order of its `ToVector`."""
        self.check_current()
        return array_values(self._info) if self._info is not None else []

    def check_current(self) -> Workspace:
        """Raise unless the workspace still holds this plan."""
        workspace = self.workspace
        if workspace is None or workspace.generation != self._generation:
            got = "a stale plan: its workspace holds another, or a replan failed"
            raise self.refuse("self", got, "replan(...) first, or a workspace for each plan")
        return workspace

    def bound_run(self, kind: int, has_indices: bool, module: str = "") -> BoundRow:
        """A run's row with all bound that is the plan's, as it is now."""
        self.check_current()
        key = kind, has_indices, module or self.module
        found = self._runs.get(key)
        if found is None:
            found = self._runs[key] = self._bind_run(*key)
        self._bound_runs[kind, has_indices] = found
        return found

    def _bind_schedule(self, bound: BoundRow) -> None:
        """Bind what changes with each schedule: its info, and how long its arrays are."""
        assert self._info is not None
        info = int(ffi.cast("uintptr_t", self._info.handle))
        changed = bound.changed("plan_info_vec", 0, info)
        for name, array in self.run_arrays.items():
            if array in self._counts:
                changed += bound.changed(name, 1, self._counts[array])
        bound.change(changed)
        bound.sizes = self.run_sizes()

    # What runs of a class have bound besides: by the row's names, values that no batch changes.
    def run_constants(self) -> dict[str, Any]:
        raise NotImplementedError

    def run_known(self) -> tuple[str, ...]:
        """The axes whose sizes are known to runs."""
        raise NotImplementedError

    def run_sizes(self) -> Sequence[int]:
        """The sizes of these axes, of the batch that is planned."""
        raise NotImplementedError

    # Sizes of a run's tensors that are not less than the batch demands, as pairs of axes.
    run_not_less: ClassVar[Mapping[int, tuple[tuple[str, str], ...]]] = {}
    # What every run of a class is given, by the row's names.
    run_given: Sequence[str] = ()
    # What arrays of the plan are called in runs' rows.
    run_arrays: Mapping[str, str] = {}

    # What runs' rows call the float and int workspaces.
    run_workspaces: ClassVar[Sequence[str]] = ("float_workspace_buffer", "int_workspace_buffer")

    def _bind_run(self, kind: int, has_indices: bool, module: str) -> BoundRow:
        row, workspace = self._run_rows[kind], self.check_current()
        buffers = workspace.float_buffer, self._descs["int_workspace_buffer"]
        values = dict(zip(self.run_workspaces, buffers, strict=True)) | self.run_constants()
        for name, array in self.run_arrays.items():
            if array != "indices" or has_indices:
                values[name] = self._descs.get(array)
        bound: dict[str, TensorKind | None] = {}
        for arg in row.given:
            if isinstance(arg, PlanInfo):
                bound[arg.name] = None
            elif arg.name in values:
                value = values[arg.name]
                bound[arg.name] = value.kind if isinstance(value, TensorDesc) else None
        kernel: Kernel = self.options.kernel
        compiled = compiled_row(
            row, module, kernel.dtypes, self.op, self.device, bound,
            self.run_known(), self.run_not_less.get(kind, ()), tuple(self.run_given),
        )  # fmt: skip
        made = BoundRow(compiled, Values(self.op, compiled, self.backend, self.other_rows(kind)))
        for name, value in values.items():
            made.put(name, value)
        made.put("plan_info_vec", 0)
        self._bind_workspace(made, workspace)
        self._bind_schedule(made)
        self.fill_defaults(made.template)
        # What a run is given after what every run is: without options.
        made.rest = tuple(made.template.values[len(self.run_given) :])
        return made

    def _bind_workspace(self, bound: BoundRow, workspace: Workspace) -> None:
        """Bind what is in the workspace, where it is now."""
        buffers = workspace.float_buffer, self._descs["int_workspace_buffer"]
        for name, buffer in zip(self.run_workspaces, buffers, strict=True):
            bound.put(name, buffer)
        for name, array in self.run_arrays.items():
            bound.put(name, self._descs.get(array))
        memory = tuple(
            address
            for buffer in (workspace.float_buffer, workspace.int_buffer)
            for address in (buffer.ptr, buffer.ptr + buffer.shape[0])
        )
        bound.memory = *memory, min(memory), max(memory)

    def other_rows(self, kind: int) -> Mapping[str, Row]:
        """The rows of other backends, which may have an option that this one lacks."""
        return {}

    def fill_defaults(self, values: Values) -> None:
        """Set what a run without options is given."""
        raise NotImplementedError

    def pack(self, bound: BoundRow, values: Sequence[Any]) -> Frame | None:
        """Pack a run; no frame: there is nothing to do."""
        _, frame = bound.compiled.pack(bound, *values)
        if self.options.enable_cuda_graph:
            self._keep_room(bound, values)
        return frame  # type: ignore[no-any-return]

    def run_packed(self, bound: BoundRow, values: Sequence[Any], stream: object) -> None:
        """Run, ordered after the plan, and before the next one made in this workspace."""
        frame = self.pack(bound, values)
        if frame is None:
            return
        try:
            self.launch_frame(frame, stream)
        finally:
            bound.give_back(frame)

    def launch_frame(self, frame: Frame, stream: object) -> None:
        """Launch a packed run in its order."""
        workspace, event = self.check_current(), None
        if self.device.is_cuda and (type(stream) is not int or stream != workspace.stream):
            scope = current_scope() if stream is None else None
            if scope is not None and scope.device is self.device:
                handle = scope.handle
            else:
                handle = self.stream(stream)
                stream = stream if stream is None else handle
            if handle != workspace.stream:
                event = workspace.join(handle)
        if frame.has_objects:
            frame.place_objects()
        if memory.recording() is not None:
            memory.hold(workspace, self._info)
        if watching.hooks:
            with watching.running(self):
                launch(frame, stream)
        else:
            launch(frame, stream)
        if event is not None:
            event.record(handle)

    def check_indices(self, name: str, indices: object) -> bool:
        """Whether the plan has the pages; raises unless the run has them otherwise."""
        has_indices = "indices" in self._descs
        if (indices is None) != has_indices:
            expected = "None: the plan has them" if has_indices else "an array on the device"
            got = "None" if indices is None else "an array"
            raise self.refuse(name, got, expected)
        return has_indices


class PreparedRun(PackedCall):
    """A run of a plan that is packed: `call()` launches it, `call.update(...)` changes tensors.

    Made by `fi_ffi.prepare`.  After a `replan` the first call packs it anew, as the plan is
    then.  Otherwise as `fi_ffi.ops.call.prepared.Prepared`.
    """

    __slots__ = ("_given", "_pack", "_plan", "_stream", "_tensors", "_version")

    def __init__(
        self, plan: Plan, pack: Callable[..., tuple[BoundRow, Sequence[Any]]],
        given: dict[str, Any], stream: object,
    ) -> None:  # fmt: skip
        self._plan, self._given, self._stream = plan, given, stream
        # The run's arguments for its row, of what it is given by name.
        self._pack = pack
        if stream is not None:  # raises for what is no stream
            handle_for(stream, plan.device, plan.op)
        self._version: object = None
        self.hold(self._packed(given))

    @property
    def op(self) -> str:
        return self._plan.op

    def _packed(self, given: Mapping[str, Any]) -> Frame | None:
        self._plan.check_current()
        bound, values = self._pack(**given)
        compiled = bound.compiled
        frame = self._plan.pack(bound, values)
        self._version = self._plan._info
        # The run's names for what can be updated.
        self._tensors = [compiled.refuse.name(arg.name) for arg in compiled.tensors]
        return frame

    def __call__(self) -> None:
        """Launch it.  Raises as `Prepared` does, and as the run where it is packed anew."""
        try:
            frame = self.take()
        except IndexError:
            frame = self.reclaim()
        try:
            if self._plan._info is not self._version:
                frame = self._packed(self._given)
            if frame is not None:
                self._plan.launch_frame(frame, self._stream)
        finally:
            self.frame = frame
            self.give(frame)

    def update(self, **tensors: Any) -> None:
        """Change tensors, by the run's names for them: addresses, or tensors of their layout.

        Raises `ArgumentError` and `ArgumentTypeError`, and changes nothing then.
        """
        plan, given = self._plan, dict(self._given)
        for name, value in tensors.items():
            known = [name for name in self._tensors if name in given]
            if name not in known or not isinstance(given[name], (TensorDesc, NoneType)):
                expected = f"one of {', '.join(known)}; prepare another call for other options"
                raise plan.refuse("update", name, expected)
            given[name] = tensor_like(plan.refuse, plan.op, name, given[name], value)
        self.renew(lambda: self._packed(given))
        self._given = given

    def __repr__(self) -> str:
        given = ", ".join(
            f"{name}={value.ptr:#x}" if isinstance(value, TensorDesc) else f"{name}={value!r}"
            for name, value in self._given.items()
            if value is not None
        )
        return f"<prepared run of {type(self._plan).__name__}({given}) on {self._plan.device}>"
