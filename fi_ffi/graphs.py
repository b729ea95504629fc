"""CUDA graphs: calls recorded once and launched together, at the host cost of one launch."""

from __future__ import annotations

import functools
import os
import weakref
from types import TracebackType
from typing import Any

from fi_ffi.abi import streams
from fi_ffi.abi._cffi import ffi
from fi_ffi.abi.streams import PER_THREAD, check_stream, handle_for, stream_handle
from fi_ffi.abi.streams import stream as stream_scope
from fi_ffi.abi.tensor import Device, parse_device
from fi_ffi.errors import ArgumentError, ArgumentTypeError
from fi_ffi.loader import machine
from fi_ffi.ops.call import cuda, hooks
from fi_ffi.ops.call.memory import recording, recording_var, stream_key

_RESULT_WORDS = 3  # 64-bit words of a cudaGraphExecUpdateResultInfo
_THREAD_LOCAL = 1  # cudaStreamCaptureModeThreadLocal: other threads may make unsafe calls


class Graph:
    """The calls of a `fi_ffi.capture` block, which you can launch any number of times.

    `nodes` counts kernels and copies.  The graph keeps the workspaces, scratch and tables that its
    launches use.  The memory that you passed to the calls must stay valid: write new inputs into
    it, or record the calls again with `fi_ffi.capture(stream, into=graph)`.
    """

    __slots__ = (
        "__weakref__",
        "_destroy",
        "_executable",
        "_held",
        "_launch",
        "device",
        "nodes",
        "updates",
    )

    def __init__(self, device: Device) -> None:
        self.device = device
        self.nodes = 0
        # How many times recording again changed the nodes in place.
        self.updates = 0
        self._executable: Any = None
        self._launch: Any = None
        self._destroy: Any = None
        # Workspaces, schedules, scratch and tables that the launches use.
        self._held: list[object] = []

    def __repr__(self) -> str:
        nodes = f"{self.nodes} node{'s' * (self.nodes != 1)}"
        return f"<Graph of {nodes} on {self.device}, updated {self.updates} times>"

    def launch(self, stream: object = None) -> None:
        """Queue the calls on `stream`, or on the stream of the open scope.

        Raises `ArgumentError` without a stream or before anything was recorded, and `KernelError`
        with CUDA's error code.
        """
        if self._launch is None:
            expected = "a graph with a finished capture"
            raise ArgumentError("Graph", "self", got="an empty graph", expected=expected)
        handle = handle_for(stream, self.device, "Graph")
        if hooks.watcher is not None:
            self._log("is launched", handle)
        # A default stream is the current device's; any other knows its own.
        if handle > PER_THREAD or machine.is_current(self.device.index):
            code = self._launch(cuda.pointer(handle))
        else:
            with cuda.current(self.device):
                code = self._launch(cuda.pointer(handle))
        if code:
            cuda.check(code, "cudaGraphLaunch")

    def _replace(self, graph: Any, held: list[object]) -> None:
        """Take over the contents of a recorded cudaGraph_t, and the objects that its launches use.
        The caller may destroy the cudaGraph_t afterwards."""
        count = ffi.new("size_t *")
        code = machine.load_cudart()[0].cudaGraphGetNodes(graph, ffi.NULL, count)
        cuda.check(code, "cudaGraphGetNodes")
        if self._launch is None or not self._update(graph):
            self._instantiate(graph)
        self.nodes = int(count[0])
        self._log("was recorded", None)
        self._held = held

    def _update(self, graph: Any) -> bool:
        """Change the nodes in place if CUDA can; otherwise destroy the executable graph."""
        result = ffi.new("uint64_t[]", _RESULT_WORDS)
        code = machine.load_cudart()[0].cudaGraphExecUpdate(self._executable, graph, result)
        if code == 0:
            self.updates += 1
            return True
        cuda.forget(code, "cudaGraphExecUpdate")
        # The new graph has another topology, which CUDA cannot update in place.
        self._destroy()
        self._launch = None
        return False

    def _instantiate(self, graph: Any) -> None:
        runtime, executable = machine.load_cudart()[0], ffi.new("void **")
        cuda.check(runtime.cudaGraphInstantiate(executable, graph, 0), "cudaGraphInstantiate")
        self._executable = executable[0]
        destroy = functools.partial(runtime.cudaGraphExecDestroy, executable[0])
        self._destroy = cuda.at_end_of(self, destroy)
        self._launch = functools.partial(runtime.cudaGraphLaunch, executable[0])
        _graphs.add(weakref.ref(self, _graphs.discard))

    def _log(self, what: str, stream: int | None) -> None:
        watcher = hooks.watcher
        if watcher is not None:
            words = f"a graph of {self.nodes} nodes at {id(self):#x}, updated {self.updates} times"
            watcher.noted(f"Graph {what}", words, self.device, stream)


# Graphs that have been recorded.
_graphs: set[weakref.ref[Graph]] = set()


def _refuse_launch(stream: Any) -> int:
    machine.refuse_after_fork()
    return 0


def _refuse_after_fork() -> None:
    """Have the graphs of a parent that has used a GPU refuse to be launched in its child."""
    if machine.forked_after_cuda():
        for graph in [each() for each in _graphs.copy()]:
            if graph is not None:
                graph._launch = _refuse_launch


os.register_at_fork(after_in_child=_refuse_after_fork)


class capture:  # a context manager reads as a verb
    """`with fi_ffi.capture(stream) as graph:` records calls into a CUDA graph.

    Inside the block nothing runs.  fi_ffi's calls go to `stream` without `stream=`; work of other
    libraries on it is recorded too.  `graph.launch()` makes all calls.  `into=graph` records them
    again.  If only addresses and numbers differ, CUDA updates the graph in place (`graph.updates`
    counts); otherwise it makes the graph anew.

    Make plans before the block, with `enable_cuda_graph=True` if you replan them.  A block that
    ends with an exception leaves `into` unchanged.

    Args:
        stream: the stream to record; CUDA cannot record the default stream.
        into: the graph to change; by default a new one.
        device: the device of a new graph's stream; by default what CUDA says of it, and cuda:0 for
            runtimes before 12.8.

    Raises `ArgumentError`, `ArgumentTypeError`, and `KernelError` with CUDA's error code.
    """

    __slots__ = ("_handle", "_scope", "graph")

    def __init__(self, stream: object, *, into: Graph | None = None, device: object = None) -> None:
        self._handle = stream_handle(stream, "capture")
        if self._handle <= PER_THREAD:
            got, expected = "a default stream", "a stream of its own: CUDA records no other"
            raise ArgumentError("capture", "stream", got=got, expected=expected)
        if into is not None and not isinstance(into, Graph):
            got, expected = type(into).__name__, "a fi_ffi Graph or None"
            raise ArgumentTypeError("capture", "into", got=got, expected=expected)
        if device is None:
            device = f"cuda:{streams.known_device(self._handle) or 0}"
        where = parse_device(device, op="capture")
        if not where.is_cuda:
            raise ArgumentError("capture", "device", got=where, expected="cuda")
        self.graph = Graph(where) if into is None else into
        check_stream(self._handle, self.graph.device, "capture")
        self._scope: stream_scope | None = None

    def __enter__(self) -> Graph:
        with cuda.current(self.graph.device):
            stream_key(self.graph.device.index, self._handle)  # unavailable during the capture
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
            raise ArgumentError("capture", "self", got="a closed capture", expected="an open one")
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
                    self.graph._replace(graph[0], held)
        finally:
            if graph[0] != ffi.NULL:
                cuda.at_end_of(graph, functools.partial(runtime.cudaGraphDestroy, graph[0]))()
