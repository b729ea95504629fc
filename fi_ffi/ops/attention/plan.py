"""The base of the plans: schedules made on the host, kept in a workspace, run many times.

A plan compiles its entries with its own arguments bound: they are written into a frame once per
schedule, and each run writes the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
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
from fi_ffi.ops.attention.arrays import Arrays, Batch
from fi_ffi.ops.attention.backends import Target, multiprocessors, release_for
from fi_ffi.ops.attention.options import Options, SignatureWithOptions
from fi_ffi.ops.attention.rows import FORMS, WITH_COPY
from fi_ffi.ops.attention.run import BoundRow, Values, compiled_row
from fi_ffi.ops.attention.sizes import Need, aligned
from fi_ffi.ops.attention.workspace import Workspace
from fi_ffi.ops.call import cuda, hooks, memory
from fi_ffi.ops.call.arguments import Refusal
from fi_ffi.ops.call.forms import in_force
from fi_ffi.ops.call.launch import launch
from fi_ffi.ops.call.notation import parse_axis
from fi_ffi.ops.call.prepared import PackedCall, tensor_like
from fi_ffi.ops.call.row import PlanInfo, Row
from fi_ffi.ops.call.support import Support, supports

# Bytes that the CPU's reference stores for each request.
_REFERENCE_BYTES = 64
# Axes of runs' tensors that grow with the requests' lengths, and the noun for errors.
_GROWING_AXES = {
    "nnz_kv": "keys", "num_pages": "pages", "num_indices": "page indices",
    "mask_bytes": "mask bytes",
}  # fmt: skip


class WorkspaceSize(NamedTuple):
    """The bytes of the float and of the int workspace that a plan needs."""

    float_bytes: int
    int_bytes: int


# Passed as a workspace by `workspace_size`, which computes sizes and schedules nothing.
_SIZE_ONLY: Any = object()

# Planner arguments that are arrays of the batch, by the array's name in `Batch.views`.
_PLANNED_ARRAYS = {
    "qo_indptr": "qo_indptr", "kv_indptr": "kv_indptr", "indptr": "kv_indptr",
    "kv_len_arr": "kv_len", "kv_len": "kv_len",
}  # fmt: skip
_STAGING = "page_locked_int_workspace_buffer"
# Axes whose size changes with each batch, by the attribute of `Batch` that has the size; and the
# lower bounds of axes that callers choose.
_BATCH_AXES = {
    "nnz_qo": "room_for_rows", "b": "size", "planned_keys": "kv.total",
    "planned_pages": "num_pages", "planned_indices": "num_indices",
}  # fmt: skip
_LOWER_BOUNDS = {
    "nnz_kv": "planned_keys", "num_pages": "planned_pages", "num_indices": "planned_indices"
}  # fmt: skip


class Plan:
    """A schedule for a batch; the base of the plan classes."""

    op: str
    _options_class: type[Options]
    options: Any
    backend: str
    backend_reason: str
    module: str
    # The planner, and the rows of runs; a run's kind is the index of its row.
    _planner: BoundRow
    _planner_needs_kv_len: bool
    _run_rows: Sequence[Row]
    # The batch in force, and the queries and pages that a replan may need with CUDA graphs.
    _batch: Batch
    _max_rows: int
    _max_indices: int
    # The plan's argument names for the batch's arrays; errors about the number of requests name
    # the first.
    _names: Mapping[str, str]
    # Whether `kv_indptr` may have more than b + 1 entries.
    _kv_indptr_may_be_longer: ClassVar[bool] = False
    # The methods that `fi_ffi.prepare` accepts.
    _run_methods: Sequence[str] = ("run",)
    # Names in runs' rows: of the first arguments, the plan's arrays, the schedule, the workspaces.
    _run_given: Sequence[str] = ()
    _run_arrays: Mapping[str, str] = {}
    _run_info: ClassVar[str] = "plan_info_vec"
    _run_workspaces: ClassVar[Sequence[str]] = ("float_workspace_buffer", "int_workspace_buffer")

    __signature__ = SignatureWithOptions()

    def __init_subclass__(cls) -> None:
        cls.__doc__ = cls._options_class.documented(cls.__doc__)

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
        # Lengths of the index arrays from which kernels take the number of requests.
        self._counts: dict[str, int] = {}
        # `_descs` and `_counts` were made for this placement, workspace and number of requests.
        self._described: tuple[object, object, int] = (None, None, 0)
        # The planner is bound to this workspace and placement.
        self._planned_in: tuple[object, object] = (None, None)
        self._runs: dict[tuple[int, bool, str], BoundRow] = {}
        # Those of `_runs` that are bound to the schedule in force, by kind and `has_indices`.
        self._bound_runs: dict[tuple[int, bool], BoundRow] = {}
        # With CUDA graphs: the smallest sizes of growing axes that runs were given.
        self._room: dict[str, int] = {}
        self.options = self._options_class(**options)
        rows = self._choose_rows()
        self._geometry = self.options.geometry(*self._machine, release_for(self.device))
        self.module = self.options.kernel.module(self.backend)
        planner, *self._run_rows = (in_force(FORMS[row], self.device) for row in rows)
        self._bind_planner(planner)
        batch = self._read(arrays)
        self._max_rows = getattr(self.options, "max_total_num_rows", None) or batch.rows
        self._max_indices = self.options.max_num_indices or batch.num_indices
        if workspace is _SIZE_ONLY:
            self._needs, self._placed = self._need(batch, is_exact=True)
        else:
            self._schedule(batch, stream)

    def __copy__(self) -> NoReturn:
        raise TypeError(f"a {type(self).__name__} has a schedule of its own and cannot be copied")

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError(f"a {type(self).__name__} is of this process and cannot be pickled")

    def __repr__(self) -> str:
        batch = getattr(self, "_batch", None)
        if batch is None:
            return f"<{self.op} that has planned nothing>"
        workspace = self.workspace
        is_stale = workspace is None or workspace._generation != self._generation
        return (
            f"<{self.op} of {batch.size} request{'s' * (batch.size != 1)} on {self.device}, "
            f"{self.backend}{', stale' * is_stale}: {self.options}>"
        )

    @classmethod
    def supports(cls, sm: Any = None, **asked: Any) -> Support:
        """Ask whether the plan can be made for a GPU (`sm=90`), with kernels of a `release` and a
        `cuda` tag, and these options: see `Op.supports`."""
        return supports(cls.__name__, sm=sm, **asked)

    @classmethod
    def workspace_size(cls, *arrays: Any, **arguments: Any) -> WorkspaceSize:
        """Compute the bytes of both workspaces for a plan with these arguments."""
        made: Any = cls
        size: WorkspaceSize = made(*arrays, workspace=_SIZE_ONLY, **arguments).size
        return size

    @property
    def size(self) -> WorkspaceSize:
        """The bytes of both workspaces that the batch in force needs."""
        return WorkspaceSize(self._needs.float_bytes, self._placed.end)

    # Hooks for plan classes.

    def _choose_rows(self) -> Sequence[Row]:
        """Choose the backend; return the planner's row and the rows of runs."""
        choice = self.options.choose(Target.of(self.op, self.device))
        self.backend, self.backend_reason, rows = choice
        return rows  # type: ignore[no-any-return]

    def _facts(self) -> dict[str, Any]:
        """Return the bound arguments and the sizes of axes that no batch changes, by the rows'
        names."""
        return {**vars(self.options), **vars(self._geometry)}

    def _read(self, arrays: Sequence[object]) -> Batch:
        """Read and check a batch's arrays."""
        batch = Batch(
            self.op, self._names, arrays, self.options.page_size or 1, self._kv_indptr_may_be_longer
        )
        if self._planner_needs_kv_len:
            batch.use_kv_len()
        return batch

    def _need_at_most(self, batch: Batch) -> Need | None:
        """Return the most that any batch of this size needs; None if unknown."""
        return None

    def _exact_need(self, batch: Batch) -> Need:
        """Return what this batch needs of the workspaces."""
        raise NotImplementedError

    def _check_same_launch(self, batch: Batch) -> None:
        """Refuse a batch that needs a launch other than the captured one (CUDA graphs only)."""

    def _other_rows(self, kind: int) -> Mapping[str, Row]:
        """Return the rows of other backends, which may have an option that this one lacks."""
        return {}

    def _fill_defaults(self, values: Values) -> None:
        """Set the arguments of a run without options."""
        raise NotImplementedError

    # Planning.

    def _bind_planner(self, row: Row) -> None:
        """Compile the planner with all arguments bound; each frame gets the batch's arrays and
        sizes."""
        bound = {arg.name: None for arg in row.given} | {
            arg.name: make_desc(0, (0,), arg.dtype, None, "cpu" if arg.host else self.device).kind
            for arg in row.tensors
        }
        dtypes = self.options.kernel.dtypes
        compiled = compiled_row(row, self.module, dtypes, self.op, self.device, bound=bound)
        self._planner = BoundRow(compiled, Values(self.op, compiled, self.backend, {}))
        self._planner_needs_kv_len = any(
            _PLANNED_ARRAYS.get(arg.name) == "kv_len" for arg in row.tensors
        )
        facts = {"batch_size": 0, "total_num_rows": 0} | self._facts()
        for name, value in facts.items():
            self._planner.put(name, value)

    @property
    def _machine(self) -> tuple[int, int]:
        """Multiprocessors and major compute capability. The CPU's reference uses neither."""
        major = machine.capability(self.device.index)[0] if self.device.is_cuda else 9
        return multiprocessors(self.device), major

    def _need(self, batch: Batch, is_exact: bool = False) -> tuple[Need, Arrays]:
        """Return the workspace need of a batch, and the placement of its arrays. If there is room,
        the need is that of any batch of this size, so that the next replan keeps the placement."""
        num_indices = batch.num_indices
        if self.options.enable_cuda_graph:
            if batch.rows > self._max_rows:
                got, expected = f"{batch.rows} queries", f"{self._max_rows} at most"
                raise self._refuse(self._names["qo_indptr"], got, expected)
            if num_indices > self._max_indices:
                got, expected = f"{num_indices} pages", f"{self._max_indices} at most"
                raise self._refuse(self._names["kv_indptr"], got, expected)
            batch.room_for_rows, num_indices = self._max_rows, self._max_indices
        elif not is_exact:
            need = self._need_at_most(batch)
            if need is not None:
                placed = self._place(need, batch, num_indices)
                have = self.workspace
                if self._owns_workspace or have is None or have._has(need.float_bytes, placed.end):
                    return need, placed
        need = self._exact_need(batch)
        return need, self._place(need, batch, num_indices)

    def _place(self, need: Need, batch: Batch, num_indices: int) -> Arrays:
        """Place the arrays after the kernel's part of the int workspace, where the last batch's
        were if they fit."""
        least = 0 if self.device.is_cuda else _REFERENCE_BYTES * (batch.size + 4)
        count, before = max(need.int_bytes, least), self._placed
        if before.holds(count, batch):
            return before
        return Arrays(count, batch.views, batch.size, num_indices)

    def _replan_batch(self, arrays: Sequence[object], stream: object) -> None:
        """Plan another batch with the same options, in the same workspace."""
        batch = self._read(arrays)
        if self.options.enable_cuda_graph:
            self._check_replan(batch)
        self._schedule(batch, stream)

    def _schedule(self, batch: Batch, stream: object) -> None:
        """Have the kernel plan a batch, then copy the index arrays to the device.

        Nothing that another plan uses is written before the kernel's planner has succeeded.
        """
        need, placed = self._need(batch)
        handle, is_cuda = self._stream_handle(stream), self.device.is_cuda
        if is_cuda and cuda.is_capturing(handle):
            raise self._refuse("stream", "one that is capturing a graph", "plan before the capture")
        workspace = self._workspace(need.float_bytes, placed.end)
        with workspace._lock, cuda.current(self.device):
            stage = workspace._stages.take(workspace.int_bytes)
            count = placed.kernel_bytes
            if self.options.enable_cuda_graph and need.split is False:
                # Up to 0.7.0, fa2's planner does not write the indices of blocks that only pad
                # the grid. Zeroed, such a block repeats the work of the first block.
                ffi.memmove(cuda.pointer(stage.desc.ptr), bytes(count), count)
            placed.write(stage.words, batch.views)
            if is_cuda:
                workspace._take(handle)
            info, start = self._plan(workspace, stage.desc, placed, batch, handle)
            if self.options.enable_cuda_graph:
                # If `_check_launch` raises, neither the old plan nor the new one is valid.
                workspace._generation += 1
                self._check_launch(array_values(info), stage.desc, batch)
            self._send(workspace, stage.desc, start, placed.end, handle)
            workspace._stages.record(stage, handle)
            workspace._generation += 1
            self._generation, self._info = workspace._generation, info
        described, self._described = self._described, (placed, workspace, batch.size)
        changed: Mapping[str, int] = {}
        if self._described != described:
            views = batch.views.items()
            changed = self._counts = {name: len(view) for name, view in views if name != "indices"}
        if self._described[:2] != described[:2]:
            self._descs = placed.descs(workspace.int_buffer, changed)
            self._descs["int_workspace_buffer"] = workspace.int_buffer.rows(0, count)
            self._bound_runs.clear()  # pages may come from the plan now, and from runs before
            for bound in self._runs.values():
                self._bind_workspace(bound, workspace)
        self._needs, self._placed, self._batch = need, placed, batch
        for bound in self._runs.values():
            self._bind_schedule(bound, changed)

    def _plan(
        self, workspace: Workspace, stage: TensorDesc, placed: Arrays, batch: Batch, handle: int
    ) -> tuple[Array, int]:
        """Call the planner on the arrays in the stage. Return the plan's info, and the offset in
        the stage from which it has copied nothing to the device."""
        planner = self._planner
        if self._planned_in != (workspace, placed):
            self._bind_places(workspace, stage, placed, batch)
            self._planned_in = workspace, placed
        _, frame = planner.compiled.pack(planner)
        try:
            words, given = frame.addresses, (stage.ptr, batch.size, batch.room_for_rows)
            for word, of, more in self._changing:
                words[word] = given[of] + more
            with hooks.running(self):
                launch(frame, handle if self.device.is_cuda else None)
            result, has_sent = frame.take_result(), planner.compiled.row.result != WITH_COPY
            return (result, placed.kernel_bytes) if has_sent else (array_values(result)[0], 0)
        finally:
            planner.give_back(frame)

    def _bind_places(
        self, workspace: Workspace, stage: TensorDesc, placed: Arrays, batch: Batch
    ) -> None:
        """Bind the planner to a workspace and a placement. List the frame words that change with
        each batch: the word, its source (the stage's address 0, requests 1, queries 2), and an
        offset."""
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
            # A quarter more, so that a slightly larger batch needs no new allocation.
            sizes = [aligned(count + count // 4, 2**16) for count in (float_bytes, int_bytes)]
            try:
                workspace = self.workspace = Workspace.allocate(self.device, *sizes)
            except (ArgumentError, MemoryError) as error:
                expected = f"{float_bytes} and {int_bytes} bytes, which could not be allocated"
                raise self._refuse("workspace", None, expected) from error
        workspace._require(self.op, float_bytes, int_bytes)
        return workspace

    def _send(self, to: Workspace, stage: TensorDesc, start: int, end: int, handle: int) -> None:
        """Copy bytes `start` to `end` of the stage to the int workspace."""
        count = end - start
        target, source = to.int_buffer.ptr + start, stage.ptr + start
        if not count:
            return
        if self.device.is_cuda:
            cuda.copy_to_device(target, source, count, handle)
        else:
            ffi.memmove(cuda.pointer(target), cuda.pointer(source), count)

    # With CUDA graphs: checks of what a replan must keep.

    def _check_replan(self, batch: Batch) -> None:
        """Refuse a batch that needs another launch, or larger tensors than runs were given."""
        names, before = self._names, self._batch.size
        first, pages = next(iter(names.values())), names.get("indices")
        if batch.size != before:
            expected = f"{before}, the number of requests that the launch is for"
            raise self._refuse(first, f"{batch.size} requests", expected)
        if pages is None:
            self._check_captured_size("keys", names["kv_indptr"], batch.kv.total)
        else:
            self._check_captured_size("pages", pages, batch.num_pages)
            self._check_captured_size("page indices", names["kv_indptr"], batch.num_indices)
        if "mask_indptr" in batch.views:
            self._check_captured_size("mask bytes", first, batch.mask_indptr[-1])
        if pages is not None and batch.has_indices != ("indices" in self._descs):
            # The captured launch has the address of the pages: of the plan's array or of the run's.
            got, captured = ("an array", "None") if batch.has_indices else ("None", "an array")
            raise self._refuse(pages, got, f"{captured}, as in the captured plan")
        self._check_same_launch(batch)

    def _check_captured_size(self, of: str, argument: str, need: int) -> None:
        have = self._room.get(of)
        if have is not None and need > have:
            expected = f"at most {have}, the size that captured runs were given"
            raise self._refuse(argument, f"{need} {of}", expected)

    def _check_launch(self, launch: list[int], stage: TensorDesc, batch: Batch) -> None:
        """Raise if a run would be launched otherwise than before: compare with the planner's result
        (`launch`) and what it wrote (`stage`). Subclasses refuse earlier what they can predict."""
        if self._captured is not None and launch != self._captured:
            raise self._refuse("self", f"launch {launch}", f"the captured {self._captured}")
        self._captured = launch

    def _record_sizes(self, bound: BoundRow, values: Sequence[Any]) -> None:
        """Record the sizes of a run's growing tensors, which a captured run cannot exceed."""
        given = dict(zip(bound.template.index, values, strict=True))
        for arg in bound.compiled.tensors:
            value = given[arg.name]
            if value is None:
                continue
            shape = as_desc(value, self.op, arg.name).shape
            for axis, have in zip(arg.axes_in(given.get("kv_layout", "NHD")), shape, strict=True):
                if axis in _GROWING_AXES:
                    of = _GROWING_AXES[axis]
                    self._room[of] = min(self._room.get(of, have), have)

    # Running.

    def _stream_handle(self, stream: object) -> int:
        """Return the handle of the stream to work on; 0 on the CPU."""
        return handle_for(stream, self.device, self.op)

    def _refuse(self, argument: str, got: object, expected: object) -> ArgumentError:
        return ArgumentError(self.op, argument, got=got, expected=expected)

    @property
    def plan_info(self) -> list[int]:
        """The ints that the kernel's planner returned, in the order of its `ToVector`."""
        self._check_current()
        return array_values(self._info) if self._info is not None else []

    def _check_current(self) -> Workspace:
        """Raise unless the workspace still holds this plan."""
        workspace = self.workspace
        if workspace is None or workspace._generation != self._generation:
            got = "a stale plan: its workspace holds another, or a replan failed"
            raise self._refuse("self", got, "replan(...) first, or a workspace for each plan")
        return workspace

    def _bound_run(self, kind: int, has_indices: bool, module: str = "") -> BoundRow:
        """Return a run's row with the plan's arguments bound to the schedule in force."""
        self._check_current()
        key = kind, has_indices, module or self.module
        found = self._runs.get(key)
        if found is None:
            found = self._runs[key] = self._bind_run(*key)
        self._bound_runs[kind, has_indices] = found
        return found

    def _bind_schedule(self, bound: BoundRow, counts: Mapping[str, int]) -> None:
        """Bind what changes with each schedule: the plan's info and the arrays' lengths."""
        assert self._info is not None
        info = int(ffi.cast("uintptr_t", self._info.handle))
        changed = bound.changed(self._run_info, 0, info)
        if counts:
            for name, array in self._run_arrays.items():
                if array in counts:
                    changed += bound.changed(name, 1, counts[array])
        bound.change(changed)
        bound.sizes = (*bound.batch_sizes(self._batch), *bound.own_sizes)

    def _bind_run(self, kind: int, has_indices: bool, module: str) -> BoundRow:
        row, workspace, facts = self._run_rows[kind], self._check_current(), self._facts()
        buffers = workspace.float_buffer, self._descs["int_workspace_buffer"]
        values = facts | dict(zip(self._run_workspaces, buffers, strict=True))
        for name, array in self._run_arrays.items():
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
        not_less = tuple((axis, least) for axis, least in _LOWER_BOUNDS.items() if axis in axes)
        axes |= {least for _, least in not_less}
        of_batch = [axis for axis in _BATCH_AXES if axis in axes]
        own = [axis for axis in facts if axis in axes]
        compiled = compiled_row(
            row,
            module,
            self.options.kernel.dtypes,
            self.op,
            self.device,
            bound=bound,
            known=(*of_batch, *own),
            not_less=not_less,
            first=tuple(self._run_given),
        )
        made = BoundRow(compiled, Values(self.op, compiled, self.backend, self._other_rows(kind)))
        made.batch_sizes = attrgetter(*(_BATCH_AXES[axis] for axis in of_batch))
        made.own_sizes = tuple(facts[axis] for axis in own)
        for name, value in values.items():
            made.put(name, value)
        made.put(self._run_info, 0)
        self._bind_workspace(made, workspace)
        self._bind_schedule(made, self._counts)
        self._fill_defaults(made.template)
        # The arguments after `_run_given`, for a run without options.
        made.rest = tuple(made.template.values[len(self._run_given) :])
        return made

    def _bind_workspace(self, bound: BoundRow, workspace: Workspace) -> None:
        """Bind the workspace's buffers and arrays at their current addresses."""
        buffers = workspace.float_buffer, self._descs["int_workspace_buffer"]
        for name, buffer in zip(self._run_workspaces, buffers, strict=True):
            bound.put(name, buffer)
        for name, array in self._run_arrays.items():
            bound.put(name, self._descs.get(array))
        memory = tuple(
            address
            for buffer in (workspace.float_buffer, workspace.int_buffer)
            for address in (buffer.ptr, buffer.ptr + buffer.shape[0])
        )
        bound.memory = *memory, min(memory), max(memory)

    def _pack(self, bound: BoundRow, values: Sequence[Any]) -> Frame | None:
        """Pack a run; None if there is nothing to launch."""
        _, frame = bound.compiled.pack(bound, *values)
        if self.options.enable_cuda_graph:
            self._record_sizes(bound, values)
        return frame  # type: ignore[no-any-return]

    def _run_packed(self, bound: BoundRow, values: Sequence[Any], stream: object) -> None:
        """Launch a run after the plan's copies and before the next plan in the workspace; for a
        `Packing` as stream, record the arguments and launch nothing."""
        if type(stream) is Packing:
            stream.bound, stream.values = bound, values
            return
        frame = self._pack(bound, values)
        if frame is None:
            return
        try:
            self._launch_frame(frame, stream)
        finally:
            bound.give_back(frame)

    def _launch_frame(self, frame: Frame, stream: object) -> None:
        """Launch a packed run, ordered against the copies and runs on other streams."""
        workspace, event = self._check_current(), None
        if self.device.is_cuda and (type(stream) is not int or stream != workspace._stream):
            scope = current_scope() if stream is None else None
            if scope is not None and scope.device is self.device:
                handle = scope.handle
            else:
                handle = self._stream_handle(stream)
                stream = stream if stream is None else handle
            if handle != workspace._stream:
                event = workspace._join(handle)
        if frame.has_objects:
            frame.place_objects()
        if memory.recording() is not None:
            memory.keep_for_graph(workspace, self._info)
        if hooks.watcher is None:
            launch(frame, stream)
        else:
            with hooks.running(self):
                launch(frame, stream)
        if event is not None:
            event.record(handle)

    def _check_indices(self, name: str, indices: object) -> bool:
        """Whether the plan has the pages; raise unless exactly one of plan and run has them."""
        has_indices = "indices" in self._descs
        if (indices is None) != has_indices:
            expected = "None: the plan has them" if has_indices else "an array on the device"
            got = "None" if indices is None else "an array"
            raise self._refuse(name, got, expected)
        return has_indices


class Packing:
    """Passed as the stream of a run that is to be packed and not launched."""

    bound: BoundRow
    values: Sequence[Any]


class PreparedRun(PackedCall):
    """A packed run of a plan: `call()` launches it, `call.update(...)` changes tensors.

    Made by `fi_ffi.prepare`. After a `replan`, the next call packs it anew. Otherwise as
    `fi_ffi.ops.call.prepared.Prepared`.
    """

    __slots__ = ("_given", "_plan", "_run", "_stream", "_tensors", "_version")

    def __init__(
        self, plan: Plan, run: Callable[..., None], given: dict[str, Any], stream: object
    ) -> None:
        self._plan, self._given, self._stream = plan, given, stream
        self._run = run
        if stream is not None:  # refuse what is no stream now, not at the first call
            handle_for(stream, plan.device, plan.op)
        self._version: object = None
        self.own_frame(self._packed(given))

    @property
    def op(self) -> str:
        return self._plan.op

    def _packed(self, given: Mapping[str, Any]) -> Frame | None:
        self._plan._check_current()
        packing = Packing()
        self._run(**given, stream=packing)
        compiled = packing.bound.compiled
        frame = self._plan._pack(packing.bound, packing.values)
        self._version = self._plan._info
        # Tensors that `update` accepts, by the run's names.
        self._tensors = [compiled.refuse.name(arg.name) for arg in compiled.tensors]
        return frame

    def __call__(self) -> None:
        """Launch the run. Raises as `Prepared` does, and as the run itself if it is packed anew."""
        try:
            frame = self.take()
        except IndexError:
            frame = self.reclaim()
        try:
            if self._plan._info is not self._version:
                frame = self._packed(self._given)
            if frame is not None:
                self._plan._launch_frame(frame, self._stream)
        finally:
            self.frame = frame
            self.give(frame)

    def update(self, **tensors: Any) -> None:
        """Change tensors by the run's names, to addresses or to tensors of the same layout.

        Raises `ArgumentError` and `ArgumentTypeError`; the call is unchanged then.
        """
        plan, given = self._plan, dict(self._given)
        for name, value in tensors.items():
            known = [name for name in self._tensors if name in given]
            if name not in known or not isinstance(given[name], (TensorDesc, NoneType)):
                expected = f"one of {', '.join(known)}; prepare another call for other options"
                raise plan._refuse("update", name, expected)
            given[name] = tensor_like(Refusal(plan.op), name, given[name], value)
        self.renew(lambda: self._packed(given))
        self._given = given

    def __repr__(self) -> str:
        given = ", ".join(
            f"{name}={value.ptr:#x}" if isinstance(value, TensorDesc) else f"{name}={value!r}"
            for name, value in self._given.items()
            if value is not None
        )
        return f"<prepared run of {type(self._plan).__name__}({given}) on {self._plan.device}>"
