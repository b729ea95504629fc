"""What the plan classes share: a schedule made on the host, kept in a workspace, run many times."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from fi_ffi.abi._cffi import ffi
from fi_ffi.abi.device import Device, parse_device
from fi_ffi.abi.function import array_values
from fi_ffi.abi.objects import Array
from fi_ffi.abi.tensor import TensorDesc, make_desc
from fi_ffi.errors import ArgumentError, ArgumentTypeError
from fi_ffi.loader import machine
from fi_ffi.ops import cuda, watching
from fi_ffi.ops.attention.again import Again
from fi_ffi.ops.attention.arrays import Arrays, placed_for
from fi_ffi.ops.attention.indices import bytes_layout
from fi_ffi.ops.attention.options import Kernel
from fi_ffi.ops.attention.ready import Ready
from fi_ffi.ops.attention.run import call
from fi_ffi.ops.attention.runs import Runs
from fi_ffi.ops.attention.sizes import Need, aligned
from fi_ffi.ops.attention.workspace import Workspace
from fi_ffi.ops.form import Form
from fi_ffi.ops.launch import launch
from fi_ffi.ops.row import Row

_FORMS: dict[tuple[object, ...], Form] = {}
# What the CPU's reference keeps of a request, which has no formula of its own.
_REFERENCE_BYTES = 64
_MOST_AGAIN = 16


class WorkspaceSize(NamedTuple):
    """Bytes that a plan needs of each workspace."""

    float_bytes: int
    int_bytes: int


class _SizeOnly:
    """Stands for a workspace where only its size is asked for."""


SIZE_ONLY = _SizeOnly()


def forget() -> None:
    """Drop what was learnt, after the source of kernels changed."""
    _FORMS.clear()


def form_of(row: Row, kernel: Kernel, backend: str, known: Mapping[str, int]) -> Form:
    """The form of a row in a kernel's module, for the dtypes it was compiled for; shared by
    all plans alike, with what it has learnt."""
    return form_in(row, kernel.module(backend), kernel.dtypes, known)


def form_in(row: Row, module: str, dtypes: Mapping[str, str], known: Mapping[str, int]) -> Form:
    """The form of a row in a module that was compiled for these dtypes."""
    key = (row, module, *known.items())
    form = _FORMS.get(key)
    if form is None:
        own = {name: (dtype,) for name, dtype in dtypes.items() if name in row.dtypes}
        compiled = replace(row, dtypes=dict[str, tuple[str, ...]](own))
        form = _FORMS.setdefault(key, Form(compiled, module, known))
    return form


def _first(desc: TensorDesc, count: int) -> TensorDesc:
    """The first bytes of a buffer."""
    return make_desc(desc.ptr, bytes_layout(count, desc.device))


class Plan(Runs):
    """A schedule for a batch; made by the classes derived from this one."""

    # Index arrays that the planner reads: its row's names, and what they are placed as.
    index_arrays: Mapping[str, str] = {}

    op: str
    options: Any
    backend: str
    backend_reason: str
    module: str

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
        # Runs that this plan has made, by what they depend on.
        self._ready: dict[tuple[object, ...], Ready] = {}
        self._captured: list[int] | None = None
        self._placed = Arrays(0)
        # How batches like those before are planned, by their size and the fewest queries.
        self.agains: dict[tuple[int, int], Again] = {}
        self._owns_workspace = workspace is None
        # Pages of the batch in all, and the last of them in the cache, where it is known.
        self._num_indices, self._max_page = 0, -1
        self._descs: dict[str, TensorDesc] = {}
        # What these are of.
        self._described: tuple[object, object] = (None, None)
        # With CUDA graphs: the least room that runs were given for what grows with lengths.
        self.room: dict[str, int] = {}

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
        self,
        form: Form,
        values: list[Any],
        arrays: Mapping[str, memoryview],
        need: Need,
        placed: Arrays,
        stream: object,
    ) -> None:
        """Have the kernel plan, and send the index arrays after.

        Nothing that another plan uses is written before the kernel's planner has agreed.
        """
        is_cuda = self.device.is_cuda
        handle = self.stream(stream)
        if is_cuda and cuda.is_capturing(handle):
            raise self.refuse("stream", "one that is capturing a graph", "plan before the capture")
        workspace = self._workspace(need.float_bytes, placed.end)
        with workspace.lock, cuda.current(self.device):
            stage = workspace.stage()
            count = placed.kernel_bytes
            if self.options.enable_cuda_graph and need.split is False:
                # Up to 0.7.0, fa2's planner leaves the indices of the blocks that only pad
                # the grid as they are; as 0, they repeat what the first block does.
                ffi.memmove(cuda.pointer(stage.desc.ptr), bytes(count), count)
            placed.write(stage.words, arrays)
            if is_cuda:
                workspace.take(handle)
            int_buffer = _first(workspace.int_buffer, count)
            values[:3] = workspace.float_buffer, int_buffer, _first(stage.desc, count)
            if watching.inboxes:
                with watching.running(self):
                    info = call(self.op, form, values, handle if is_cuda else None)
            else:
                info = call(self.op, form, values, handle if is_cuda else None)
            if self.options.enable_cuda_graph:
                # Until it is found the same, neither the old plan nor the new one holds.
                workspace.generation += 1
                self.check_launch(array_values(info), stage.desc)
            self._send(workspace, stage.desc, placed, handle)
            workspace.used(stage, handle)
            workspace.generation += 1
            self._generation, self._info = workspace.generation, info
            self._ready.clear()
        if placed is not self._described[0] or workspace is not self._described[1]:
            self._descs = placed.descs(workspace.int_buffer)
            self._described = placed, workspace
        self._descs["int_workspace_buffer"] = int_buffer
        self.needs, self._placed = need, placed

    def again_for(self, size: int, rows: int) -> Again | None:
        """How so many requests with so many queries (or pages) were planned."""
        for again in self.agains.values():
            if again.size == size and again.least <= rows <= again.limit:
                return again if again.placed is self._placed else None
        return None

    def keep_again(self, again: Again) -> None:
        """Remember how a batch was planned, unless one that has more room is remembered."""
        key = again.size, again.least
        before = self.agains.get(key)
        if before is not None and before.placed is again.placed and before.limit >= again.limit:
            return
        if len(self.agains) >= _MOST_AGAIN:
            self.agains.clear()
        self.agains[key] = again

    def plan_again(
        self, again: Again, views: Mapping[str, memoryview], rows: int, stream: object
    ) -> bool:
        """Plan a batch like the one before, whose arrays were checked; False where it is not."""
        workspace, placed = self.workspace, again.placed
        if workspace is not again.workspace or workspace is None or watching.inboxes:
            return False
        handle, is_cuda = self.stream(stream), self.device.is_cuda
        if is_cuda and cuda.is_capturing(handle):
            return False
        with workspace.lock:
            with cuda.current(self.device):
                stage = workspace.stage()
            frame, place = again.frame(stage, self.index_arrays)
            placed.write(stage.words, views)
            if is_cuda:
                workspace.take(handle)
            if again.rows_word:
                frame.ints[again.rows_word] = rows
            launch(frame, place, handle if is_cuda else None)
            info = frame.take_result()
            with cuda.current(self.device):
                self._send(workspace, stage.desc, placed, handle)
                workspace.used(stage, handle)
            workspace.generation += 1
            self._generation, self._info = workspace.generation, info
            self._ready.clear()
        return True

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
                self._ready.clear()  # which are of the one before
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
