"""The base of the plans: schedules made on the host, kept in a workspace, run many times.

A plan compiles its entries with its own arguments bound: they are written into a frame once per
schedule, and each run writes the rest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, NoReturn

from fi_ffi.abi._cffi import ffi
from fi_ffi.abi.function import Frame, array_values
from fi_ffi.abi.objects import Array
from fi_ffi.abi.streams import current_scope, handle_for
from fi_ffi.abi.tensor import Device, TensorDesc, parse_device
from fi_ffi.errors import ArgumentError, ArgumentTypeError, KernelError, LoaderError
from fi_ffi.loader import machine
from fi_ffi.ops.attention.arrays import Arrays, Batch
from fi_ffi.ops.attention.backends import Target, multiprocessors, release_for
from fi_ffi.ops.attention.bind import Binder, BoundRow, BoundRuns, RunNames
from fi_ffi.ops.attention.options import (
    Options,
    SignatureWithOptions,
    by_own_names,
    check_keywords,
    parameters_of,
    take_any_name,
)
from fi_ffi.ops.attention.rows import FORMS
from fi_ffi.ops.attention.run import Packing
from fi_ffi.ops.attention.schedule import Captured, Planner, allocate, place
from fi_ffi.ops.attention.sizes import Need
from fi_ffi.ops.attention.values import Values, without_options
from fi_ffi.ops.attention.workspace import Workspace
from fi_ffi.ops.call import cuda, hooks, memory
from fi_ffi.ops.call.arguments import Refusal
from fi_ffi.ops.call.forms import in_force
from fi_ffi.ops.call.launch import launch
from fi_ffi.ops.call.row import Row
from fi_ffi.ops.call.support import Support, supports


class WorkspaceSize(NamedTuple):
    """The bytes of the float and of the int workspace that a plan needs."""

    float_bytes: int
    int_bytes: int


# Passed as a workspace by `workspace_size`, which computes sizes and schedules nothing.
_SIZE_ONLY: Any = object()


class Plan:
    """A schedule for a batch; the base of the plan classes."""

    op: str
    _options_class: type[Options]
    options: Any
    backend: str
    backend_reason: str
    _refuse: ClassVar[Refusal]
    # The plan's argument names for the batch's arrays; errors about the number of requests name
    # the first.
    _names: Mapping[str, str]
    # Whether `kv_indptr` may have more than b + 1 entries.
    _kv_indptr_may_be_longer: ClassVar[bool] = False
    # The parameters of `replan`; the arrays come first.
    _replan_names: Sequence[str] = ()
    # The methods that `fi_ffi.prepare` accepts.
    _run_methods: Sequence[str] = ("run",)
    # The plan's own arguments, by their names in runs' rows.
    _run_names: RunNames

    __signature__ = SignatureWithOptions()

    def __init_subclass__(cls) -> None:
        cls._refuse = Refusal(cls.op)
        if "replan" in vars(cls):
            cls._replan_names = parameters_of(vars(cls)["replan"])
        take_any_name(cls)

    def __init__(
        self,
        arrays: Sequence[object],
        device: object,
        workspace: object,
        stream: object,
        options: Mapping[str, Any],
    ) -> None:
        self._place_on(device, workspace)
        self._generation = -1
        self._queue: cuda.Queue | None = None
        self._info: Array | None = None
        self._placed = Arrays(0)
        self._needs = Need(0, 0)
        # What `_need_at_most` keeps for the next replan.
        self._most: dict[int, Any] = {}
        self.options = self._options_class(**options)
        rows = self._choose_rows()
        self._geometry = self.options.geometry(*self._machine, release_for(self.device))
        kernel = self.options.kernel
        self.module = kernel.module(self.backend)
        self._captured = Captured(self._refuse, self._names)
        facts = self._facts()
        binder = Binder(self.op, self.device, self.backend, self.module, kernel.dtypes, facts)
        planner, *run_rows = (in_force(FORMS[row], self.device) for row in rows)
        self._planner = Planner(binder, planner)
        self._runs = BoundRuns(binder, run_rows, self._run_names)
        batch = self._read(arrays)
        # The queries and pages that a replan may need with CUDA graphs.
        self._max_rows = getattr(self.options, "max_total_num_rows", None) or batch.rows
        self._max_indices = self.options.max_num_indices or batch.num_indices
        if workspace is _SIZE_ONLY:
            self._needs, self._placed = self._need(batch, is_exact=True)
        else:
            self._schedule(batch, stream)

    def _place_on(self, device: object, workspace: object) -> None:
        """Set the workspace and the device; refuse those that do not fit."""
        is_own = self._owns_workspace = workspace is None
        if not (is_own or workspace is _SIZE_ONLY or isinstance(workspace, Workspace)):
            got = type(workspace).__name__
            raise ArgumentTypeError(self.op, "workspace", got=got, expected="a Workspace or None")
        self.workspace = workspace if isinstance(workspace, Workspace) else None
        if self.workspace is not None and device is None:
            device = self.workspace.device
        self.device: Device = parse_device("cuda:0" if device is None else device, op=self.op)
        if self.device.type not in ("cpu", "cuda"):
            raise self._refuse("device", self.device, "cpu or cuda")
        if self.workspace is not None and self.workspace.device is not self.device:
            got, expected = f"one on {self.workspace.device}", f"one on {self.device}"
            raise self._refuse("workspace", got, expected)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError(f"a {type(self).__name__} is of this process, not to be copied or pickled")

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
        return cls(*arrays, workspace=_SIZE_ONLY, **arguments).size  # type: ignore[misc]

    @property
    def size(self) -> WorkspaceSize:
        """The bytes of both workspaces that the batch in force needs, or needs at most."""
        return WorkspaceSize(self._needs.float_bytes, self._placed.end)

    if not TYPE_CHECKING:  # it would have a type checker accept any name

        def __getattr__(self, name: str) -> NoReturn:
            told, runs = f"{type(self).__name__!r} has no {name!r}", self._run_methods
            if name == "prepare":
                told += f": prepare a run, fi_ffi.prepare(plan.{runs[0]}, ...)"
            elif name == "plan":
                told += ": the constructor plans, and replan(...) takes the next batch"
            elif name == "run":
                told += f", but {' and '.join(runs)}"
            raise AttributeError(told)

    # Hooks for plan classes.

    def _choose_rows(self) -> Sequence[Row]:
        """Choose the backend; return the planner's row and the rows of runs."""
        choice = self.options.choose(Target.of(self.op, self.device))
        self.backend, self.backend_reason, rows = choice
        return rows  # type: ignore[no-any-return]

    def _facts(self) -> dict[str, Any]:
        """Return the bound arguments and the sizes of axes that no batch changes, by the rows'
        names."""
        chosen = self.options
        return {**without_options(chosen), **vars(chosen), **vars(self._geometry)}

    def _read(self, arrays: Sequence[object]) -> Batch:
        """Read and check a batch's arrays."""
        may_be_longer, page_size = self._kv_indptr_may_be_longer, self.options.page_size or 1
        batch = Batch(self.op, self._names, arrays, page_size, may_be_longer)
        if self._planner.needs_kv_len:
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

    def _check_launch(self, launch: list[int], stage: TensorDesc, batch: Batch) -> None:
        """Raise if a captured run would be wrong for the planner's result (`launch`) and what it
        wrote (`stage`). Other hooks refuse earlier what they can predict."""

    def _other_rows(self, kind: int) -> Mapping[str, Row]:
        """Return the rows of other backends, which may have an option that this one lacks."""
        return {}

    def _fill_defaults(self, values: Values) -> None:
        """Set the arguments of a run without options."""
        raise NotImplementedError

    # Planning.

    @property
    def _machine(self) -> tuple[int, int]:
        """Multiprocessors and major compute capability. The CPU's reference uses neither."""
        major = machine.capability(self.device.index)[0] if self.device.is_cuda else 9
        return multiprocessors(self.device), major

    def _need(self, batch: Batch, is_exact: bool = False) -> tuple[Need, Arrays]:
        """Return the workspace need of a batch, and the placement of its arrays. If there is room,
        the need is that of any batch of this size, or of a larger one before, so that the next
        replan keeps the placement."""
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
                placed, have = self._placed, self.workspace
                if not self._queue or not placed.holds(need.int_bytes, batch):
                    placed = place(placed, need, batch, num_indices, self.device)
                elif need is self._needs:
                    return need, placed
                if self._owns_workspace or have is None or have._has(need.float_bytes, placed.end):
                    return need, placed
                self._most.clear()  # this may be what larger batches needed
        need = self._exact_need(batch)
        return need, place(self._placed, need, batch, num_indices, self.device)

    def _replan_batch(
        self, arrays: Sequence[object], stream: object, others: Mapping[str, object]
    ) -> None:
        """Plan another batch with the same options, in the same workspace; `others` are arrays by
        FlashInfer's other names."""
        if others:
            names = self._replan_names[: len(arrays)]
            given = zip(names, arrays, strict=True)
            found = by_own_names(
                self.op, names, {**others, **{n: v for n, v in given if v is not None}}
            )
            check_keywords(f"{self.op}.replan", names, found)
            arrays = [found.get(name) for name in names]
        batch = self._read(arrays)
        if self.options.enable_cuda_graph:
            self._check_captured(batch)
        self._schedule(batch, stream)

    def _check_captured(self, batch: Batch) -> None:
        """Refuse a batch that a captured run cannot serve."""
        self._captured.check_batch(batch, self._batch)
        self._check_same_launch(batch)

    def _check_replan(self, arrays: Sequence[object]) -> None:
        """Refuse a batch that a replan would refuse, for plans that change together."""
        batch = self._read(arrays)
        if self.options.enable_cuda_graph:
            self._check_captured(batch)
        need, placed = self._need(batch)
        if not self._owns_workspace:
            self._workspace(need.float_bytes, placed.end)

    def _schedule(self, batch: Batch, stream: object) -> None:
        """Have the kernel plan a batch, then copy the index arrays to the device.

        Nothing that another plan uses is written before the kernel's planner has succeeded.
        """
        need, placed = self._need(batch)
        device, queue = self.device, self._queue
        if queue is None or type(stream) is not int or stream != queue.handle:
            handle = handle_for(stream, device, self.op)
            if device.is_cuda and (queue is None or queue.handle != handle):
                queue = cuda.Queue(handle)
            stream = stream if stream is None else handle
        if queue is not None and queue.is_capturing():
            raise self._refuse("stream", "one that is capturing a graph", "plan before the capture")
        workspace, self._queue = self._workspace(need.float_bytes, placed.end), queue
        with workspace._lock:
            if hooks.watcher is None and (queue is None or machine.is_current(device.index)):
                self._fill(workspace, need, placed, batch, stream)
            else:
                with cuda.current(device), hooks.running(self):
                    self._fill(workspace, need, placed, batch, stream)

    def _fill(
        self, workspace: Workspace, need: Need, placed: Arrays, batch: Batch, stream: object
    ) -> None:
        """Fill a workspace that is locked, on a device that is current."""
        queue, replayed = self._queue, workspace._replayed and workspace._replayed()
        if replayed is not None and replayed is not self:
            got = "one whose plan runs in a compiled program, which does not ask for it again"
            raise self._refuse("workspace", got, "a workspace for each plan")
        stages, has_graphs = workspace._stages, self.options.enable_cuda_graph
        stage = stages.take(workspace._int_bytes)
        if has_graphs and need.split is False:
            # Up to 0.7.0, fa2's planner does not write the indices of blocks that only pad
            # the grid. Zeroed, such a block repeats the work of the first block.
            count = placed.kernel_bytes
            ffi.memmove(cuda.pointer(stage.ptr), bytes(count), count)
        placed.write(stage.words, batch.views)
        if queue is not None:
            workspace._take(queue)
        # Whatever raises from here on, an interrupt too: neither the old plan nor the new is valid,
        # unless the planner fails, which writes nothing then.
        workspace._generation += 1
        try:
            info, address = self._planner.plan(workspace, stage, placed, batch, stream)
        except (KernelError, LoaderError):
            workspace._generation -= 1
            raise
        if has_graphs:
            launch = array_values(info)
            self._captured.check_launch(launch)
            self._check_launch(launch, stage.desc, batch)
        code = self._planner.send(queue and queue.pointer)
        if code:
            cuda.check(code, "cudaMemcpyAsync")
        stages.record(stage, queue and queue.pointer)
        if queue is not None and replayed is not None:
            cuda.synchronize(self.device)
        self._runs.follow(workspace, placed, batch, address)
        self._needs, self._placed, self._batch, self._info = need, placed, batch, info
        self._generation = workspace._generation

    def _workspace(self, float_bytes: int, int_bytes: int) -> Workspace:
        """Return the workspace; replace the plan's own if it is too small and not captured."""
        workspace = self.workspace
        if workspace is None or not workspace._has(float_bytes, int_bytes):
            if workspace is None or (self._owns_workspace and not self._captured.launch):
                workspace = allocate(self._refuse, self.device, float_bytes, int_bytes)
                self.workspace, self._generation = workspace, -1
            workspace._require(self.op, float_bytes, int_bytes)
        return workspace

    # Running.

    @property
    def plan_info(self) -> list[int]:
        """The ints that the kernel's planner returned, in the order of its `ToVector`."""
        self._check_current()
        return array_values(self._info) if self._info is not None else []

    def _check_current(self) -> Workspace:
        """Raise unless the workspace still holds this plan."""
        workspace = self.workspace
        if workspace is None or workspace._generation != self._generation:
            raise self._stale()
        return workspace

    def _stale(self) -> ArgumentError:
        got = "a stale plan: its workspace holds another, or a replan failed"
        return self._refuse("self", got, "replan(...) first, or a workspace for each plan")

    def _bound_run(self, kind: int, has_indices: bool, module: str = "") -> BoundRow:
        """Return a run's row with the plan's arguments bound to the schedule in force. A run's kind
        is the index of its row."""
        self._check_current()
        runs, key = self._runs, (kind, has_indices, module or self.module)
        bound = runs.bound.get(key)
        if bound is None:
            bound = runs.bind(key, self._other_rows(kind), self._batch)
            self._fill_defaults(bound.template)
            bound.set_defaults(self._run_names.first)
            if self.options.enable_cuda_graph:
                bound.pack = self._captured.recording(bound.pack)
            runs.bound[key] = bound
        runs.current[kind, has_indices] = bound
        return bound

    def _run_packed(self, bound: BoundRow, frame: Frame | None, stream: object) -> None:
        """Launch a packed run, unless there is nothing to launch; for a `Packing` as stream, pass
        it the frame."""
        if stream is not None and type(stream) is Packing:
            stream.bound, stream.frame = bound, frame
        elif frame is not None:
            try:
                self._launch_frame(frame, stream)
            finally:
                frame.give_back(frame)

    def _launch_frame(self, frame: Frame, stream: object) -> None:
        """Launch a packed run after the plan's copies and before the next plan in the workspace, on
        whichever streams these are."""
        workspace, device = self.workspace, self.device
        event = None
        if workspace is None or workspace._generation != self._generation:
            raise self._stale()
        if device.is_cuda and (type(stream) is not int or stream != workspace._stream):
            scope = current_scope() if stream is None else None
            if scope is not None and scope.device is device:
                handle = scope.handle
            else:
                handle = handle_for(stream, device, self.op)
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
        has_indices = "indices" in self._batch.views
        if (indices is None) != has_indices:
            expected = "None: the plan has them" if has_indices else "an array on the device"
            got = "None" if indices is None else "an array"
            raise self._refuse(name, got, expected)
        return has_indices
