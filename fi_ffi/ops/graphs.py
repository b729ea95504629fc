"""CUDA graphs: calls recorded once and launched together, for a host cost of one launch."""

from __future__ import annotations

import functools
import os
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import Any

from fi_ffi.abi._cffi import ffi
from fi_ffi.abi.streams import PER_THREAD, check_stream, current_scope, stream_handle
from fi_ffi.abi.streams import stream as stream_scope
from fi_ffi.abi.tensor import Device, parse_device
from fi_ffi.errors import ArgumentError, ArgumentTypeError
from fi_ffi.loader import machine
from fi_ffi.ops import cuda
from fi_ffi.ops.call.memory import recording, recording_var, stream_key
from fi_ffi.ops.watch import watching

_RESULT_WORDS = 3  # of a cudaGraphExecUpdateResultInfo
_THREAD_LOCAL = 1  # cudaStreamCaptureModeThreadLocal: other threads may do as they like


class Graph:
    """What was recorded in a `fi_ffi.capture` block, to be launched any number of times.

    `nodes` counts its kernels and copies.  It holds the plans' workspaces, scratch and tables
    that its launches use; the memory that the calls were given must stay valid, and holds the
    arguments of every launch: write new inputs into it, or record the calls again with
    `fi_ffi.capture(stream, into=graph)`.
    """

    __slots__ = (
        "__weakref__", "_executable", "_finalizer", "_held", "_launch", "device", "nodes",
        "updates",
    )  # fmt: skip

    def __init__(self, device: Device) -> None:
        self.device = device
        self.nodes = 0
        # How often it was recorded again and its nodes changed in place.
        self.updates = 0
        self._executable: Any = None
        self._launch: Any = None
        self._finalizer: Any = None
        # What its launches touch: workspaces, schedules, scratch and tables.
        self._held: list[object] = []

    def launch(self, stream: object = None) -> None:
        """Queue it on `stream`, or on the open scope's.

        Raises `ArgumentError` without a stream or before anything was recorded, and
        `KernelError` with CUDA's error code.
        """
        if self._launch is None:
            expected = "a capture that has ended"
            raise ArgumentError("Graph", "self", got="a graph of nothing", expected=expected)
        if stream is None:
            scope = current_scope()
            if scope is None:
                expected = "a stream, or an open fi_ffi.stream(...) scope"
                raise ArgumentError("Graph", "stream", got=None, expected=expected)
            stream = scope.handle
        handle = stream if type(stream) is int else stream_handle(stream, "Graph")
        if machine.device_count() > 1:
            with cuda.current(self.device):
                code = self._launch(cuda.pointer(handle))
        else:
            code = self._launch(cuda.pointer(handle))
        if code:
            cuda.check(code, "cudaGraphLaunch")

    def replace(self, graph: Any, held: list[object]) -> None:
        """Take over a recorded cudaGraph_t, which is not needed any more afterwards, and what
        its launches touch."""
        count = ffi.new("size_t *")
        code = machine.load_cudart()[0].cudaGraphGetNodes(graph, ffi.NULL, count)
        cuda.check(code, "cudaGraphGetNodes")
        if self._launch is None or not self._update(graph):
            self._instantiate(graph)
        self.nodes = int(count[0])
        self._log("was recorded", None)
        self._held = held

    def _update(self, graph: Any) -> bool:
        """Change the nodes in place, where CUDA can; give the old ones back where it cannot."""
        result = ffi.new("uint64_t[]", _RESULT_WORDS)
        code = machine.load_cudart()[0].cudaGraphExecUpdate(self._executable, graph, result)
        if code == 0:
            self.updates += 1
            return True
        cuda.forget(code, "cudaGraphExecUpdate")
        # Another shape of graph: CUDA cannot change the old one into it.
        self._finalizer()
        self._launch = None
        return False

    def _instantiate(self, graph: Any) -> None:
        runtime, executable = machine.load_cudart()[0], ffi.new("void **")
        cuda.check(runtime.cudaGraphInstantiate(executable, graph, 0), "cudaGraphInstantiate")
        self._executable = executable[0]
        self._finalizer = weakref.finalize(
            self, cuda.unless_cut_off, runtime.cudaGraphExecDestroy, executable[0]
        )
        self.arm()
        _graphs.add(self)

    def arm(self) -> None:
        """Have launches logged where a call log is open, and made at once where none is."""
        if machine.is_cut_off():
            self._launch = _refused
            return
        launch = functools.partial(machine.load_cudart()[0].cudaGraphLaunch, self._executable)
        if watching.logs():
            launch = functools.partial(_launch_logged, weakref.ref(self), launch)
        self._launch = launch

    def _log(self, what: str, stream: int | None) -> None:
        for log in watching.logs():
            words = f"a graph of {self.nodes} nodes at {id(self):#x}, updated {self.updates} times"
            log.note(f"Graph {what}", words, self.device, stream)


# Those that can be launched.
_graphs: weakref.WeakSet[Graph] = weakref.WeakSet()


def _launch_logged(graph: weakref.ref[Graph], launch: Callable[[Any], int], stream: Any) -> int:
    """Log a launch, and make it."""
    launched = graph()
    if launched is not None:
        launched._log("is launched", int(ffi.cast("uintptr_t", stream)))
    return launch(stream)


def _refused(stream: Any) -> int:
    machine.refuse_after_fork()
    return 0


def rearm() -> None:
    """Arm all graphs anew: after a call log was opened or closed, and in a forked child."""
    for graph in [*_graphs]:
        graph.arm()


os.register_at_fork(after_in_child=rearm)


class capture:  # a context manager reads as a verb
    """`with fi_ffi.capture(stream) as graph:` records calls instead of making them.

    Inside the block fi_ffi's calls are on `stream` (no `stream=` is needed); other libraries'
    work on it is recorded too.  `graph.launch()` makes them all.  With `into=graph` they are
    recorded anew: where the kernels are the same and only addresses and numbers have changed,
    CUDA changes the graph in place (`graph.updates` counts), and else it is made again.

    Plans are made before the block, with `enable_cuda_graph=True` where they are to be
    replanned.  A block that ends with an exception leaves `into` as it was.

    Args:
        stream: the stream to record; not the default stream, which CUDA cannot record.
        into: a graph to change; a new one without.
        device: of a new graph's stream.

    Raises `ArgumentError`, `ArgumentTypeError`, and `KernelError` with CUDA's error code.
    """

    __slots__ = ("_handle", "_scope", "graph")

    def __init__(
        self, stream: object, *, into: Graph | None = None, device: object = "cuda:0"
    ) -> None:
        self._handle = stream_handle(stream, "capture")
        if self._handle <= PER_THREAD:
            got, expected = "a default stream", "a stream of its own: CUDA records no other"
            raise ArgumentError("capture", "stream", got=got, expected=expected)
        if into is not None and not isinstance(into, Graph):
            got, expected = type(into).__name__, "a fi_ffi Graph or None"
            raise ArgumentTypeError("capture", "into", got=got, expected=expected)
        where = parse_device(device, op="capture")
        if not where.is_cuda:
            raise ArgumentError("capture", "device", got=where, expected="cuda")
        self.graph = Graph(where) if into is None else into
        check_stream(self._handle, self.graph.device, "capture")
        self._scope: stream_scope | None = None

    def __enter__(self) -> Graph:
        with cuda.current(self.graph.device):
            stream_key(self.graph.device.index, self._handle)  # which CUDA does not tell later
            code = machine.load_cudart()[0].cudaStreamBeginCapture(
                cuda.pointer(self._handle), _THREAD_LOCAL
            )
        cuda.check(code, "cudaStreamBeginCapture")
        self._scope = stream_scope(self._handle)
        self._scope.__enter__()
        recording_var.set([])
        return self.graph

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        scope, self._scope = self._scope, None
        held = recording() or []
        if scope is None:
            raise ArgumentError("capture", "self", got="one not open", expected="an open one")
        try:
            recording_var.set(None)
            scope.__exit__(exc_type, exc, tb)
        finally:
            runtime, graph = machine.load_cudart()[0], ffi.new("void **")
            with cuda.current(self.graph.device):
                code = runtime.cudaStreamEndCapture(cuda.pointer(self._handle), graph)
        try:
            if exc_type is not None:
                cuda.forget(code, "cudaStreamEndCapture")
            else:
                cuda.check(code, "cudaStreamEndCapture")
                with cuda.current(self.graph.device):
                    self.graph.replace(graph[0], held)
        finally:
            if graph[0] != ffi.NULL:
                cuda.unless_cut_off(runtime.cudaGraphDestroy, graph[0])
