"""What the plan classes share: a schedule made on the host, kept in a workspace, run many times.

A plan's entries are compiled with the plan's own arguments bound: these are written into a frame
once a schedule, and each run writes what it is given.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from types import NoneType
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, NoReturn

from fi_ffi.abi._cffi import ffi
from fi_ffi.abi.function import Frame, array_values
from fi_ffi.abi.interop import as_desc
from fi_ffi.abi.objects import Array
from fi_ffi.abi.streams import current_scope, handle_for
from fi_ffi.abi.tensor import Device, TensorDesc, TensorKind, make_desc, parse_device
from fi_ffi.errors import ArgumentError, ArgumentTypeError
from fi_ffi.loader import machine
from fi_ffi.ops import cuda
from fi_ffi.ops.attention.arrays import Arrays, Batch
from fi_ffi.ops.attention.backends import geometry_on, in_use, multiprocessors
from fi_ffi.ops.attention.options import Options
from fi_ffi.ops.attention.rows import WITH_COPY
from fi_ffi.ops.attention.run import BoundRow, Values, asked_of, compiled_row
from fi_ffi.ops.attention.sizes import Need, aligned
from fi_ffi.ops.attention.workspace import Workspace
from fi_ffi.ops.call import memory
from fi_ffi.ops.call.launch import launch
from fi_ffi.ops.call.prepared import PackedCall, tensor_like
from fi_ffi.ops.notation import parse_axis
from fi_ffi.ops.row import PlanInfo, Row
from fi_ffi.ops.watch import watching

if TYPE_CHECKING:
    from fi_ffi.ops.capability.judgement import Support

# What the CPU's reference keeps of a request, which has no formula of its own.
_REFERENCE_BYTES = 64
# Axes of runs' tensors that grow with lengths, and what they count.
_GROWING = {
    "nnz_kv": "keys", "num_pages": "pages", "num_indices": "page indices",
    "mask_bytes": "mask bytes",
}  # fmt: skip


class WorkspaceSize(NamedTuple):
    """Bytes that a plan needs of each workspace."""

    float_bytes: int
    int_bytes: int


# Stands for a workspace where only its size is asked for.
_SIZE_ONLY: Any = object()

# Arguments of the planners that are a batch's arrays, and which.
_PLANNED_ARRAYS = {
    "qo_indptr": "qo_indptr", "kv_indptr": "kv_indptr", "indptr": "kv_indptr",
    "kv_len_arr": "kv_len", "kv_len": "kv_len",
}  # fmt: skip
_STAGING = "page_locked_int_workspace_buffer"
# Axes of runs' tensors that each batch has others of, and what they are of a `Batch`; and what
# sizes are not less than.
_BATCH_AXES = {
    "nnz_qo": "room_for_rows", "b": "size", "planned_keys": "kv.total",
    "planned_pages": "num_pages", "planned_indices": "num_indices",
}  # fmt: skip
_NOT_LESS = {
    "nnz_kv": "planned_keys", "num_pages": "planned_pages", "num_indices": "planned_indices"
}  # fmt: skip


class Plan:
    """A schedule for a batch; made by the classes derived from this one."""

    op: str
    options_class: type[Options]
    options: Any
    backend: str
    backend_reason: str
    module: str
    # The planner, and the rows of runs by their kind: their place after the planner's.
    _planner: BoundRow
    _planner_needs_kv_len: bool
    _run_rows: Sequence[Row]
    # The batch that is planned, and the most queries and pages there may be with CUDA graphs.
    _batch: Batch
    _max_rows: int
    _max_indices: int
    # What callers know the batch's arrays as, by what they are; the first counts requests.
    names: Mapping[str, str]
    # Whether `kv_indptr` may have entries that are of no request.
    kv_indptr_may_be_longer: ClassVar[bool] = False
    # The methods that run it.
    runs: Sequence[str] = ("run",)
    # What every run of a class is given, by the row's names.
    run_given: Sequence[str] = ()
    # What arrays of the plan are called in runs' rows, and the float and int workspaces.
    run_arrays: Mapping[str, str] = {}
    # What the schedule is called in runs' rows.
    run_info: ClassVar[str] = "plan_info_vec"
    run_workspaces: ClassVar[Sequence[str]] = ("float_workspace_buffer", "int_workspace_buffer")

    def __init_subclass__(cls) -> None:
        cls.__doc__ = cls.options_class.documented(cls.__doc__)

    def __init__(
        self, arrays: Sequence[object], device: object, workspace: object, stream: object,
        options: Mapping[str, Any],
    ) -> None:  # fmt: skip
        if not (workspace is None or workspace is _SIZE_ONLY or isinstance(workspace, Workspace)):
            got = type(workspace).__name__
            raise ArgumentTypeError(self.op, "workspace", got=got, expected="a Workspace or None")
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
        self._placed = Arrays(0)
        self._owns_workspace = workspace is None
        self._descs: dict[str, TensorDesc] = {}
        # How many int32 index arrays have that the kernels take the batch's size from.
        self._counts: dict[str, int] = {}
        # What these are of: where arrays are placed, the workspace, and the number of requests.
        self._described: tuple[object, object, int] = (None, None, 0)
        # What the planner's frames are of.
        self._planned_in: tuple[object, object] = (None, None)
        self._runs: dict[tuple[int, bool, str], BoundRow] = {}
        # Of these, what has been bound to the schedule as it is now.
        self._bound_runs: dict[tuple[int, bool], BoundRow] = {}
        # With CUDA graphs: the least room that runs were given for what grows with lengths.
        self.room: dict[str, int] = {}
        self.options = self.options_class(**options)
        rows = self.choose_rows()
        self.geometry = geometry_on(self.device, self.options.geometry(self.machine))
        self.module = self.options.kernel.module(self.backend_of_module)
        planner, *self._run_rows = in_use(rows, self.device)
        self._bind_planner(planner)
        batch = self.read(arrays)
        self._max_rows = getattr(self.options, "max_total_num_rows", None) or batch.rows
        self._max_indices = self.options.max_num_indices or batch.num_indices
        if workspace is _SIZE_ONLY:
            self.needs, self._placed = self._need(batch, is_exact=True)
        else:
            self.schedule(batch, stream)

    def __copy__(self) -> NoReturn:
        raise TypeError(f"a {type(self).__name__} has a schedule of its own and cannot be copied")

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError(f"a {type(self).__name__} is of this process and cannot be pickled")

    @classmethod
    def supports(cls, sm: Any = None, **asked: Any) -> Support:
        """Whether it can be made for a GPU (`sm=90`), with kernels of a `release` and a `cuda`
        tag, with these of the plan's options: see `Op.supports`."""
        return asked_of(cls.__name__, sm, **asked)

    @classmethod
    def workspace_size(cls, *arrays: Any, **arguments: Any) -> WorkspaceSize:
        """Bytes of the float and int workspaces that a plan of these arguments needs."""
        made: Any = cls
        size: WorkspaceSize = made(*arrays, workspace=_SIZE_ONLY, **arguments).size
        return size

    @property
    def size(self) -> WorkspaceSize:
        """Bytes of both workspaces."""
        return WorkspaceSize(self.needs.float_bytes, self._placed.end)

    # What classes of plans have of their own.

    def choose_rows(self) -> Sequence[Row]:
        """Choose the backend: the planner's row, and those of runs."""
        raise NotImplementedError

    def facts(self) -> dict[str, Any]:
        """What no batch changes, by the rows' names: arguments of the planner and of runs that
        are bound, and sizes of axes."""
        return {**vars(self.options), **vars(self.geometry)}

    def read(self, arrays: Sequence[object]) -> Batch:
        """Read and check a batch's arrays."""
        batch = Batch(
            self.op, self.names, arrays, self.options.page_size or 1, self.kv_indptr_may_be_longer
        )
        if self._planner_needs_kv_len:
            batch.use_kv_len()
        return batch

    def most_need(self, batch: Batch) -> Need | None:
        """What any batch of so many requests and queries takes; None where that is not told."""
        return None

    def exact_need(self, batch: Batch) -> Need:
        """What a batch takes of the workspaces."""
        raise NotImplementedError

    def check_same_launch(self, batch: Batch) -> None:
        """With CUDA graphs: refuse lengths that another launch is for."""

    def other_rows(self, kind: int) -> Mapping[str, Row]:
        """The rows of other backends, which may have an option that this one lacks."""
        return {}

    def fill_defaults(self, values: Values) -> None:
        """Set what a run without options is given."""
        raise NotImplementedError

    # Planning.

    def _bind_planner(self, row: Row) -> None:
        """Compile the planner with all bound; what says how long requests are is written into
        each frame."""
        bound = {arg.name: None for arg in row.given} | {
            arg.name: make_desc(0, (0,), arg.dtype, None, "cpu" if arg.host else self.device).kind
            for arg in row.tensors
        }
        dtypes = self.options.kernel.dtypes
        compiled = compiled_row(row, self.module, dtypes, self.op, self.device, bound)
        self._planner = BoundRow(compiled, Values(self.op, compiled, self.backend, {}))
        self._planner_needs_kv_len = any(
            _PLANNED_ARRAYS.get(arg.name) == "kv_len" for arg in row.tensors
        )
        facts = {"batch_size": 0, "total_num_rows": 0} | self.facts()
        for name, value in facts.items():
            self._planner.put(name, value)

    @property
    def backend_of_module(self) -> str:
        """The backend, for what modules are called after it."""
        return self.backend

    @property
    def machine(self) -> tuple[int, int]:
        """Multiprocessors and compute capability (major); the CPU's reference has no need."""
        major = machine.capability(self.device.index)[0] if self.device.is_cuda else 9
        return multiprocessors(self.device), major

    def _need(self, batch: Batch, is_exact: bool = False) -> tuple[Need, Arrays]:
        """What a batch takes of the workspaces, and places for its arrays behind it: as much as
        any batch like it, if there is room; then the next is placed where this one is."""
        num_indices = batch.num_indices
        if self.options.enable_cuda_graph:
            if batch.rows > self._max_rows:
                got, expected = f"{batch.rows} queries", f"{self._max_rows} at most"
                raise self.refuse(self.names["qo_indptr"], got, expected)
            if num_indices > self._max_indices:
                got, expected = f"{num_indices} pages", f"{self._max_indices} at most"
                raise self.refuse(self.names["kv_indptr"], got, expected)
            batch.room_for_rows, num_indices = self._max_rows, self._max_indices
        elif not is_exact:
            need = self.most_need(batch)
            if need is not None:
                placed = self._place(need, batch, num_indices)
                have = self.workspace
                if self._owns_workspace or have is None or have.has(need.float_bytes, placed.end):
                    return need, placed
        need = self.exact_need(batch)
        return need, self._place(need, batch, num_indices)

    def _place(self, need: Need, batch: Batch, num_indices: int) -> Arrays:
        """Places for a batch's arrays after what the kernel needs of the int workspace: those of
        the batch before, if they hold them."""
        least = 0 if self.device.is_cuda else _REFERENCE_BYTES * (batch.size + 4)
        count, before = max(need.int_bytes, least), self._placed
        if before.holds(count, batch):
            return before
        return Arrays(count, batch.views, batch.size, num_indices)

    def replan_batch(self, arrays: Sequence[object], stream: object) -> None:
        """Plan another batch with the same options, in the same workspace."""
        batch = self.read(arrays)
        if self.options.enable_cuda_graph:
            self._check_replan(batch)
        self.schedule(batch, stream)

    def schedule(self, batch: Batch, stream: object) -> None:
        """Have the kernel plan a batch, and send the index arrays after.

        Nothing that another plan uses is written before the kernel's planner has agreed.
        """
        need, placed = self._need(batch)
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
            placed.write(stage.words, batch.views)
            if is_cuda:
                workspace.take(handle)
            info, start = self._plan(workspace, stage.desc, placed, batch, handle)
            if self.options.enable_cuda_graph:
                # Until it is found the same, neither the old plan nor the new one holds.
                workspace.generation += 1
                self.check_launch(array_values(info), stage.desc, batch)
            self._send(workspace, stage.desc, start, placed.end, handle)
            workspace.stages.record(stage, handle)
            workspace.generation += 1
            self._generation, self._info = workspace.generation, info
        described, self._described = self._described, (placed, workspace, batch.size)
        changed: Mapping[str, int] = {}
        if self._described != described:
            views = batch.views.items()
            changed = self._counts = {name: len(view) for name, view in views if name != "indices"}
        if self._described[:2] != described[:2]:
            self._descs = placed.descs(workspace.int_buffer, changed)
            self._descs["int_workspace_buffer"] = workspace.int_buffer.rows(0, count)
            self._bound_runs.clear()  # the plan may have the pages, where runs had them before
            for bound in self._runs.values():
                self._bind_workspace(bound, workspace)
        self.needs, self._placed, self._batch = need, placed, batch
        for bound in self._runs.values():
            self._bind_schedule(bound, changed)

    def _plan(
        self, workspace: Workspace, stage: TensorDesc, placed: Arrays, batch: Batch, handle: int
    ) -> tuple[Array, int]:
        """Call the planner, which reads the arrays in the stage: it returns the plan's info.  Then
        where in the stage that starts which it has not copied itself."""
        planner = self._planner
        if self._planned_in != (workspace, placed):
            self._bind_places(workspace, stage, placed, batch)
            self._planned_in = workspace, placed
        _, frame = planner.compiled.pack(planner)
        try:
            words, given = frame.addresses, (stage.ptr, batch.size, batch.room_for_rows)
            for word, of, more in self._changing:
                words[word] = given[of] + more
            with watching.running(self):
                launch(frame, handle if self.device.is_cuda else None)
            result, has_sent = frame.take_result(), planner.compiled.row.result != WITH_COPY
            return (result, placed.kernel_bytes) if has_sent else (array_values(result)[0], 0)
        finally:
            planner.give_back(frame)

    def _bind_places(
        self, workspace: Workspace, stage: TensorDesc, placed: Arrays, batch: Batch
    ) -> None:
        """Bind the planner to a workspace and to where arrays are in a stage; find the words of
        its frames that each batch has others of: how much more they are than the stage's address
        (0), the number of requests (1) or of queries (2)."""
        planner, count = self._planner, placed.kernel_bytes
        planner.put("float_workspace_buffer", workspace.float_buffer)
        planner.put("int_workspace_buffer", workspace.int_buffer.rows(0, count))
        planner.put(_STAGING, stage.rows(0, count))
        words = ((_STAGING, 0), ("batch_size", 1), ("total_num_rows", 2))
        self._changing = [(planner.word(name), of, 0) for name, of in words if planner.has(name)]
        descs = placed.descs(stage, {name: len(view) for name, view in batch.views.items()})
        for arg in planner.compiled.row.tensors:
            name = _PLANNED_ARRAYS.get(arg.name)
            if name is not None:
                planner.put(arg.name, descs[name])
                self._changing += [
                    (planner.word(arg.name), 0, placed.where(name)[0]),
                    (planner.word(arg.name, 1), 1, len(batch.views[name]) - batch.size),
                ]

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

    def _send(self, to: Workspace, stage: TensorDesc, start: int, end: int, handle: int) -> None:
        """Copy a part of the stage to the int workspace."""
        count = end - start
        target, source = to.int_buffer.ptr + start, stage.ptr + start
        if not count:
            return
        if self.device.is_cuda:
            cuda.copy_to_device(target, source, count, handle)
        else:
            ffi.memmove(cuda.pointer(target), cuda.pointer(source), count)

    # With CUDA graphs: what a replan may not change.

    def _check_replan(self, batch: Batch) -> None:
        """Refuse a batch that needs another launch, or more than captured runs were given."""
        names, before = self.names, self._batch.size
        first, pages = next(iter(names.values())), names.get("indices")
        if batch.size != before:
            expected = f"{before}, the number of requests that the launch is for"
            raise self.refuse(first, f"{batch.size} requests", expected)
        if pages is None:
            self._check_room("keys", names["kv_indptr"], batch.kv.total)
        else:
            self._check_room("pages", pages, batch.num_pages)
            self._check_room("page indices", names["kv_indptr"], batch.num_indices)
        if "mask_indptr" in batch.views:
            self._check_room("mask bytes", first, batch.mask_indptr[-1])
        if pages is not None and batch.has_indices != ("indices" in self._descs):
            # Who brings the pages, plan or run, is part of what was captured.
            expected = "an array or None, as in the plan that was captured"
            raise self.refuse(pages, "the other", expected)
        self.check_same_launch(batch)

    def _check_room(self, of: str, argument: str, need: int) -> None:
        have = self.room.get(of)
        if have is not None and need > have:
            expected = f"at most the {have} that runs were given, and captured with"
            raise self.refuse(argument, f"{need} {of}", expected)

    def check_launch(self, launch: list[int], stage: TensorDesc, batch: Batch) -> None:
        """Raise where a run would be launched otherwise than before.

        A plan class that could know earlier has refused already; this holds what it knows
        against what the planner says (`launch`) and has written (`stage`).
        """
        if self._captured is not None and launch != self._captured:
            raise self.refuse("self", f"launch {launch}", f"the captured {self._captured}")
        self._captured = launch

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

    def _bind_schedule(self, bound: BoundRow, counts: Mapping[str, int]) -> None:
        """Bind what changes with each schedule: its info, and how long arrays are."""
        assert self._info is not None
        info = int(ffi.cast("uintptr_t", self._info.handle))
        changed = bound.changed(self.run_info, 0, info)
        if counts:
            for name, array in self.run_arrays.items():
                if array in counts:
                    changed += bound.changed(name, 1, counts[array])
        bound.change(changed)
        bound.sizes = (*bound.batch_sizes(self._batch), *bound.own_sizes)

    def _bind_run(self, kind: int, has_indices: bool, module: str) -> BoundRow:
        row, workspace, facts = self._run_rows[kind], self.check_current(), self.facts()
        buffers = workspace.float_buffer, self._descs["int_workspace_buffer"]
        values = facts | dict(zip(self.run_workspaces, buffers, strict=True))
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
        axes = {
            name
            for arg in row.tensors
            for text in arg.axis_names
            for name in parse_axis(text).names
        }
        not_less = tuple((axis, least) for axis, least in _NOT_LESS.items() if axis in axes)
        axes |= {least for _, least in not_less}
        of_batch = [axis for axis in _BATCH_AXES if axis in axes]
        own = [axis for axis in facts if axis in axes]
        compiled = compiled_row(
            row, module, self.options.kernel.dtypes, self.op, self.device, bound,
            (*of_batch, *own), not_less, tuple(self.run_given),
        )  # fmt: skip
        made = BoundRow(compiled, Values(self.op, compiled, self.backend, self.other_rows(kind)))
        made.batch_sizes = attrgetter(*(_BATCH_AXES[axis] for axis in of_batch))
        made.own_sizes = tuple(facts[axis] for axis in own)
        for name, value in values.items():
            made.put(name, value)
        made.put(self.run_info, 0)
        self._bind_workspace(made, workspace)
        self._bind_schedule(made, self._counts)
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

    def pack(self, bound: BoundRow, values: Sequence[Any]) -> Frame | None:
        """Pack a run; no frame: there is nothing to do."""
        _, frame = bound.compiled.pack(bound, *values)
        if self.options.enable_cuda_graph:
            self._keep_room(bound, values)
        return frame  # type: ignore[no-any-return]

    def run_packed(self, bound: BoundRow, values: Sequence[Any], stream: object) -> None:
        """Run, ordered after the plan, and before the next one made in this workspace; for
        `Packing` in place of a stream, only note what was to be run."""
        if type(stream) is Packing:
            stream.bound, stream.values = bound, values
            return
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


class NotOf:
    """A run of the class derived from that a plan has not: asking for it is an `AttributeError`."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._words = f"{owner.__name__!r} has no {name!r}"

    def __get__(self, instance: object, owner: type | None = None) -> NoReturn:
        raise AttributeError(self._words)


class Packing:
    """Stands for the stream of a run that is packed and not launched."""

    bound: BoundRow
    values: Sequence[Any]


class PreparedRun(PackedCall):
    """A run of a plan that is packed: `call()` launches it, `call.update(...)` changes tensors.

    Made by `fi_ffi.prepare`.  After a `replan` the first call packs it anew, as the plan is
    then.  Otherwise as `fi_ffi.ops.call.prepared.Prepared`.
    """

    __slots__ = ("_given", "_plan", "_run", "_stream", "_tensors", "_version")

    def __init__(
        self, plan: Plan, run: Callable[..., None], given: dict[str, Any], stream: object
    ) -> None:
        self._plan, self._given, self._stream = plan, given, stream
        self._run = run
        if stream is not None:  # raises for what is no stream
            handle_for(stream, plan.device, plan.op)
        self._version: object = None
        self.hold(self._packed(given))

    @property
    def op(self) -> str:
        return self._plan.op

    def _packed(self, given: Mapping[str, Any]) -> Frame | None:
        self._plan.check_current()
        packing = Packing()
        self._run(**given, stream=packing)
        compiled = packing.bound.compiled
        frame = self._plan.pack(packing.bound, packing.values)
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
