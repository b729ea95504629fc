"""Workspaces: the memory a plan's schedule and partial results are in."""

from __future__ import annotations

import threading

from fi_ffi.abi._cffi import ffi
from fi_ffi.abi.device import Device, parse_device
from fi_ffi.abi.interop import as_desc
from fi_ffi.abi.tensor import TensorDesc, make_desc, make_layout
from fi_ffi.errors import ArgumentError
from fi_ffi.ops import cuda
from fi_ffi.ops.attention.options import integer

# What FlashInfer's documentation recommends, and its wrappers take.
FLOAT_BYTES = 128 * 2**20
INT_BYTES = 8 * 2**20
_ALIGNMENT = 16
# Stages that are allocated, and parts of a buffer that is given: each has an event.
_MOST_STAGES, _MOST_PARTS = 4, 64


class Stage:
    """Page-locked memory for one plan on its way, and when the copy from it is done."""

    __slots__ = ("desc", "done", "memory", "words")

    def __init__(self, desc: TensorDesc, memory: cuda.Memory | None, device: Device) -> None:
        self.desc, self.memory = desc, memory
        count = desc.shape[0] // 4 * 4
        # The same memory as int32.
        self.words = memoryview(ffi.buffer(cuda.pointer(desc.ptr), count) if count else b"")
        self.words = self.words.cast("B").cast("i")
        with cuda.current(device):
            self.done = cuda.Event() if device.is_cuda else None

    def is_free(self) -> bool:
        return self.done is None or self.done.is_done()


class Workspace:
    """The float and int workspaces of one plan at a time, and page-locked memory before them.

    Args:
        float_workspace_buffer: device memory for partial results; any contiguous tensor.
        int_workspace_buffer: device memory for the schedule and the index arrays.
        page_locked_int_workspace_buffer: host memory (page-locked where the device is a
            GPU) of a multiple of the int workspace's size: one part is written while the
            copies from the others may still run.  Without it, parts are allocated
            through cuda-python, as many as plans overlap, up to four.

    A plan takes its workspace over, and the plan that had it before can no longer run.
    The memory must stay valid while it is used.  Raises `ArgumentError` for memory that
    is not contiguous, misaligned (16 bytes), or not on one device.
    """

    def __init__(
        self,
        float_workspace_buffer: object,
        int_workspace_buffer: object,
        page_locked_int_workspace_buffer: object = None,
    ) -> None:
        self.float_buffer = _buffer("float_workspace_buffer", float_workspace_buffer)
        self.int_buffer = _buffer("int_workspace_buffer", int_workspace_buffer)
        self.device = self.float_buffer.device
        if self.int_buffer.device is not self.device:
            expected = f"{self.device}, the device of `float_workspace_buffer`"
            got = self.int_buffer.device
            raise ArgumentError("Workspace", "int_workspace_buffer", got=got, expected=expected)
        _check_device("float_workspace_buffer", self.device)
        _check_apart("int_workspace_buffer", self.int_buffer, self.float_buffer)
        self._memories: list[cuda.Memory] = []
        self._stages: list[Stage] = []
        self._given = page_locked_int_workspace_buffer is not None
        if self._given:
            self._divide(page_locked_int_workspace_buffer)
        self.lock = threading.RLock()
        # Counts the plans made on it: a plan that is not of the last generation is stale.
        self.generation = 0
        # Where the last plan was copied, and when each other stream that ran it was done.
        self.stream: int | None = None
        self._elsewhere: dict[int, cuda.Event] = {}

    @classmethod
    def allocate(
        cls,
        device: object = "cuda:0",
        float_bytes: int = FLOAT_BYTES,
        int_bytes: int = INT_BYTES,
    ) -> Workspace:
        """A workspace on `device` from cuda-python (from the host's memory on "cpu")."""
        where = parse_device(device, op="Workspace")
        _check_device("device", where)
        given = {"float_bytes": float_bytes, "int_bytes": int_bytes}
        counts = [integer("Workspace", name, count, 0, 63) for name, count in given.items()]
        memories = [cuda.allocate(count, where) for count in counts]
        made = cls(memories[0].desc, memories[1].desc)
        made._memories = memories
        return made

    @property
    def float_bytes(self) -> int:
        return self.float_buffer.shape[0]

    @property
    def int_bytes(self) -> int:
        return self.int_buffer.shape[0]

    def has(self, float_bytes: int, int_bytes: int) -> bool:
        """Whether there are so many bytes of each."""
        return float_bytes <= self.float_bytes and int_bytes <= self.int_bytes

    def require(self, op: str, float_bytes: int, int_bytes: int) -> None:
        """Raise `ArgumentError` with both figures where it is too small."""
        for name, have, need in (
            ("float_workspace_buffer", self.float_bytes, float_bytes),
            ("int_workspace_buffer", self.int_bytes, int_bytes),
        ):
            if have < need:
                expected = f"{need} bytes, as workspace_size tells"
                raise ArgumentError(op, name, got=f"{have} bytes", expected=expected)

    def take(self, stream: int) -> None:
        """Let `stream` wait for all that used this workspace on other streams."""
        if self.stream is not None and self.stream != stream:
            with cuda.current(self.device):
                event = cuda.Event()
            event.record(self.stream)
            event.hold(stream)
        for other, event in self._elsewhere.items():
            if other != stream:
                event.hold(stream)
        self._elsewhere.clear()
        self.stream = stream

    def join(self, stream: int) -> cuda.Event | None:
        """For a run on `stream`: let it wait for the plan; the event to record after it.

        None on the plan's own stream, and in a capture: who replays a graph orders it.
        """
        if stream == self.stream or cuda.is_capturing(stream):
            return None
        event = self._elsewhere.get(stream)
        if event is None:
            ready = self._stages[-1].done
            if ready is not None:
                ready.hold(stream)
            with cuda.current(self.device):
                event = self._elsewhere.setdefault(stream, cuda.Event())
        return event

    def stage(self) -> Stage:
        """Host memory as large as the int workspace that no copy reads any more."""
        for stage in self._stages:
            if stage.is_free():
                return stage
        if not self._given and len(self._stages) < _MOST_STAGES:
            memory = cuda.allocate_page_locked(self.int_bytes, self.device)
            self._stages.append(Stage(memory.desc, memory, self.device))
        else:
            oldest = self._stages.pop(0)
            if oldest.done is not None:
                oldest.done.wait()
            self._stages.append(oldest)
        return self._stages[-1]

    def used(self, stage: Stage, stream: int) -> None:
        """Copies from a stage were queued: it is free when the stream has done them."""
        if stage.done is not None:
            stage.done.record(stream)
            # The one used last goes last, so that the first is always the oldest.
            self._stages.remove(stage)
            self._stages.append(stage)

    def _divide(self, buffer: object) -> None:
        name = "page_locked_int_workspace_buffer"
        desc = _buffer(name, buffer, ("cpu", "cuda_host"))
        for other in (self.float_buffer, self.int_buffer):
            _check_apart(name, desc, other)
        parts = desc.shape[0] // self.int_bytes if self.int_bytes else 0
        if not parts:
            expected = f"{self.int_bytes} bytes or more, as `int_workspace_buffer` has"
            got = f"{desc.shape[0]} bytes"
            raise ArgumentError("Workspace", name, got=got, expected=expected)
        for i in range(min(parts, _MOST_PARTS)):
            start = desc.ptr + i * self.int_bytes
            part = TensorDesc(start, (self.int_bytes,), "uint8", device="cpu")
            self._stages.append(Stage(part, None, self.device))
        self._page_locked = desc  # keeps its owner


def _check_device(argument: str, device: Device) -> None:
    if device.type not in ("cpu", "cuda"):
        raise ArgumentError("Workspace", argument, got=device, expected="cpu or cuda")


def _check_apart(argument: str, buffer: TensorDesc, other: TensorDesc) -> None:
    """`ArgumentError` where two buffers share bytes."""
    start, end = buffer.ptr, buffer.ptr + buffer.shape[0]
    if start < other.ptr + other.shape[0] and other.ptr < end:
        expected = "memory that is no other workspace's"
        got = f"{buffer.shape[0]} bytes at {start:#x}, which overlap another of the buffers"
        raise ArgumentError("Workspace", argument, got=got, expected=expected)


def _buffer(argument: str, value: object, devices: tuple[str, ...] = ()) -> TensorDesc:
    """Any contiguous tensor as its bytes."""
    desc = as_desc(value, "Workspace", argument)

    def refuse(got: object, expected: str) -> ArgumentError:
        return ArgumentError("Workspace", argument, got=got, expected=expected)

    if not desc.layout.is_contiguous or desc.layout.readonly:
        raise refuse(desc.layout, "contiguous memory that can be written")
    if devices and desc.device.type not in devices:
        raise refuse(desc.device, "memory on the host")
    if desc.ptr % _ALIGNMENT or (not desc.ptr and desc.layout.numel):
        expected = f"an address that is a multiple of {_ALIGNMENT} bytes, and not null"
        raise refuse(hex(desc.ptr), expected)
    layout = make_layout((desc.layout.span_bytes,), "uint8", None, desc.device, False)
    return make_desc(desc.ptr, layout, owner=desc)
