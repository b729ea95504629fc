"""Workspaces: the memory for a plan's schedule and partial results."""

from __future__ import annotations

import threading
import weakref
from typing import Any, NoReturn

from fi_ffi.abi.interop import as_desc
from fi_ffi.abi.streams import PER_THREAD
from fi_ffi.abi.tensor import Device, TensorDesc, make_desc, parse_device
from fi_ffi.ops.call import cuda
from fi_ffi.ops.call.arguments import INT64_MAX, Refusal, check_int
from fi_ffi.ops.call.memory import StreamKey, stream_key
from fi_ffi.ops.call.refuse import DEVICE_TYPES, may_overlap
from fi_ffi.ops.call.staging import StagePool

# The sizes that FlashInfer's documentation recommends and its wrappers use.
FLOAT_BYTES = 128 * 2**20
INT_BYTES = 8 * 2**20
_ALIGNMENT = 16
_MAX_PARTS = 64  # parts of a caller's page-locked buffer; each costs an event
_refuse = Refusal("Workspace")


class Workspace:
    """The float and int workspaces of one plan at a time, and page-locked memory to fill them from.

    A plan takes over its workspace; the plan that had it before can no longer run.

    Args:
        float_workspace_buffer: device memory for partial results; any contiguous tensor.
        int_workspace_buffer: device memory for the schedule and the index arrays.
        page_locked_int_workspace_buffer: host memory (page-locked if the device is a GPU) of a
            multiple of the int workspace's size. fi_ffi writes one part while copies from the other
            parts may still run. By default fi_ffi allocates parts from CUDA, one for each
            overlapping plan, at most four.

    The memory must stay valid while it is used. Raises `ArgumentError` for memory that is not
    contiguous, not aligned to 16 bytes, or not on one device.
    """

    def __init__(
        self,
        float_workspace_buffer: object,
        int_workspace_buffer: object,
        page_locked_int_workspace_buffer: object = None,
    ) -> None:
        self.float_buffer = _buffer("float_workspace_buffer", float_workspace_buffer)
        self.int_buffer = _buffer("int_workspace_buffer", int_workspace_buffer)
        self._float_bytes, self._int_bytes = self.float_buffer.shape[0], self.int_buffer.shape[0]
        self.device = self.float_buffer.device
        if self.int_buffer.device is not self.device:
            expected = f"{self.device}, the device of `float_workspace_buffer`"
            raise _refuse("int_workspace_buffer", self.int_buffer.device, expected)
        _check_device("float_workspace_buffer", self.device)
        _check_apart("int_workspace_buffer", self.int_buffer, self.float_buffer)
        self._memories: list[cuda.Memory] = []
        self._page_locked: TensorDesc | None = None  # which keeps its owner
        pieces: list[TensorDesc] = []
        if page_locked_int_workspace_buffer is not None:
            pieces = self._divide(page_locked_int_workspace_buffer)
        self._stages = StagePool(self.device, pieces=pieces)
        self._lock = threading.RLock()
        # The number of plans made so far; a plan of an earlier generation is stale.
        self._generation = 0
        # The stream of the last plan's copies, and events after the runs on each other stream.
        # The same handle may later, or on another thread, mean another stream: hence the keys.
        self._copied_on: tuple[int, StreamKey] | None = None
        self._elsewhere: dict[StreamKey, cuda.Event] = {}
        # The handle of the plan's stream, if it means the same stream on all threads: runs on it
        # come after the plan's copies as they are, and skip the lookup.
        self._stream: int | None = None
        self._replayed: weakref.ref[Any] | None = None

    def __repr__(self) -> str:
        sizes = f"float_bytes={self.float_bytes}, int_bytes={self.int_bytes}"
        return f"<Workspace on {self.device}: {sizes}>"

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        # A copy would not know whose plan the memory holds.
        raise TypeError("a Workspace is memory in this process and cannot be copied or pickled")

    @classmethod
    def allocate(
        cls,
        device: object = "cuda:0",
        float_bytes: int = FLOAT_BYTES,
        int_bytes: int = INT_BYTES,
    ) -> Workspace:
        """Allocate a workspace on `device`, from CUDA or from host memory on "cpu"."""
        where = parse_device(device, op="Workspace")
        _check_device("device", where)
        for name, count in (("float_bytes", float_bytes), ("int_bytes", int_bytes)):
            check_int(_refuse.op, name, count, 0, INT64_MAX // 2)
        memories = [cuda.allocate(count, where) for count in (float_bytes, int_bytes)]
        workspace = cls(memories[0].desc, memories[1].desc)
        workspace._memories = memories
        return workspace

    @property
    def float_bytes(self) -> int:
        return self._float_bytes

    @property
    def int_bytes(self) -> int:
        return self._int_bytes

    def set_replayed(self, plan: Any) -> None:
        """Say that another library replays a plan's runs in this workspace.

        It tells nobody on which stream and when. So a plan waits for the device before its copies
        and after them, and no other plan takes the workspace as long as this one lives.
        """
        self._replayed = weakref.ref(plan)

    def _has(self, float_bytes: int, int_bytes: int) -> bool:
        """Whether both workspaces are at least this large."""
        return float_bytes <= self._float_bytes and int_bytes <= self._int_bytes

    def _require(self, op: str, float_bytes: int, int_bytes: int) -> None:
        """Raise `ArgumentError` with both sizes if a workspace is too small."""
        for name, have, need in (
            ("float_workspace_buffer", self.float_bytes, float_bytes),
            ("int_workspace_buffer", self.int_bytes, int_bytes),
        ):
            if have < need:
                expected = f"{need} bytes, as workspace_size tells"
                raise Refusal(op)(name, f"{have} bytes", expected)

    def _take(self, queue: cuda.Queue) -> None:
        """Make a stream wait for all work that used this workspace on other streams."""
        if self._replayed is not None:
            cuda.synchronize(self.device)
        stream, number = queue.handle, queue.number()
        if self._copied_on == (stream, (self.device.index, number)) and not self._elsewhere:
            return
        key = stream_key(self.device.index, stream)
        if self._copied_on is not None and self._copied_on[1] != key:
            before, _ = self._copied_on
            if before == stream:
                # The old stream was destroyed and its handle reused, or the handle means another
                # thread's own stream. No event can be recorded on the old one.
                cuda.synchronize(self.device)
            else:
                with cuda.current(self.device):
                    event = cuda.Event()
                event.record(before)
                event.make_wait(stream)
        for other, event in self._elsewhere.items():
            if other != key:
                event.make_wait(stream)
        self._elsewhere.clear()
        self._copied_on, self._stream = (stream, key), None if stream == PER_THREAD else stream

    def _join(self, stream: int) -> cuda.Event | None:
        """Make a run's `stream` wait for the plan; return the event to record after the run.

        Return None on the plan's own stream. Return None in a capture too: whoever launches the
        graph orders it.
        """
        if cuda.is_capturing(stream):
            return None
        with cuda.current(self.device):
            key = stream_key(self.device.index, stream)
        if self._copied_on is not None and self._copied_on[1] == key:
            return None
        event = self._elsewhere.get(key)
        if event is None:
            ready = self._stages.last.done
            if ready is not None:
                ready.make_wait(stream)
            with cuda.current(self.device):
                event = self._elsewhere.setdefault(key, cuda.Event())
        return event

    def _divide(self, buffer: object) -> list[TensorDesc]:
        """Split page-locked memory into parts of the int workspace's size."""
        name = "page_locked_int_workspace_buffer"
        desc = _buffer(name, buffer, ("cpu", "cuda_host"))
        for other in (self.float_buffer, self.int_buffer):
            _check_apart(name, desc, other)
        parts = desc.shape[0] // self.int_bytes if self.int_bytes else 0
        if not parts:
            expected = f"{self.int_bytes} bytes or more, as `int_workspace_buffer` has"
            raise _refuse(name, f"{desc.shape[0]} bytes", expected)
        self._page_locked, size = desc, self.int_bytes
        return [
            TensorDesc(desc.ptr + i * size, (size,), "uint8", device="cpu")
            for i in range(min(parts, _MAX_PARTS))
        ]


def _check_device(argument: str, device: Device) -> None:
    if device.type not in DEVICE_TYPES:
        raise _refuse(argument, device, "cpu or cuda")


def _check_apart(argument: str, buffer: TensorDesc, other: TensorDesc) -> None:
    """Raise `ArgumentError` if two buffers overlap."""
    if may_overlap(buffer, other):
        got = f"{buffer.shape[0]} bytes at {buffer.ptr:#x}, which overlaps another buffer"
        raise _refuse(argument, got, "memory apart from the other buffers")


def _buffer(argument: str, value: object, devices: tuple[str, ...] = ()) -> TensorDesc:
    """Describe any contiguous tensor as bytes."""
    desc = as_desc(value, _refuse.op, argument)
    if not desc.is_contiguous or desc.readonly:
        raise _refuse(argument, desc.layout, "contiguous memory that can be written")
    if devices and desc.device.type not in devices:
        raise _refuse(argument, desc.device, "memory on the host")
    if desc.ptr % _ALIGNMENT or (not desc.ptr and desc.numel):
        expected = f"an address that is a multiple of {_ALIGNMENT} bytes, and not null"
        raise _refuse(argument, hex(desc.ptr), expected)
    return make_desc(desc.ptr, (desc.span_bytes,), "uint8", None, desc.device, owner=desc)
