"""Calls in files, to be made again: see docs/call-log.md for what is in them."""

from __future__ import annotations

import fnmatch
import json
import os
import re
import threading
import weakref
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from fi_ffi.abi.function import array_values
from fi_ffi.abi.objects import Array
from fi_ffi.errors import ArgumentError, LoaderError
from fi_ffi.loader import machine
from fi_ffi.ops.watch.logging_calls import container
from fi_ffi.ops.watch.logging_calls.container import Stored
from fi_ffi.ops.watch.logging_calls.memory import read
from fi_ffi.ops.watch.logging_calls.told import Argument, Opaque, Told

FORMAT = "fi_ffi call 1"
BEFORE, AFTER = ".in.safetensors", ".out.safetensors"
MOST_CALLS, MOST_BYTES = 1000, 2**33
_NOT_IN_NAMES = re.compile(r"[^\w.-]")
PLAN = "plan."  # before the names of a plan's arrays, in the file of a run

Described = dict[str, Any]


class Dump:
    """A directory that calls are written to, up to so many calls and bytes."""

    def __init__(
        self, folder: str | os.PathLike[str], ops: str = "", most_calls: int = MOST_CALLS,
        most_bytes: int = MOST_BYTES,
    ) -> None:  # fmt: skip
        self._folder = Path(folder)
        self._patterns = [pattern.strip() for pattern in ops.split(",") if pattern.strip()]
        self._most_calls, self._most_bytes = most_calls, most_bytes
        self._lock = threading.Lock()
        self._calls = self._bytes = 0
        # How each plan was last planned: what its runs are made again with.
        self._plans: weakref.WeakKeyDictionary[Any, tuple[Described, dict[str, Stored]]] = (
            weakref.WeakKeyDictionary()
        )
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            expected = f"a directory that can be made: {error}"
            raise ArgumentError("call_log", "dump", got=folder, expected=expected) from error

    def renew(self) -> None:
        """In a forked child: another thread may have had the lock."""
        self._lock = threading.Lock()

    def before(self, told: Told) -> tuple[str | None, str]:
        """Write a call that is about to be made: its file without the suffix, or None; and
        what to say of it.  Raises `OSError` and `KernelError`."""
        is_planning = told.row is not None and told.row.symbol == "plan" and told.plan is not None
        is_wanted = not self._patterns or any(
            fnmatch.fnmatchcase(told.name, pattern) for pattern in self._patterns
        )
        if not is_wanted and not is_planning:
            return None, ""
        tensors = [arg for arg in told.tensors if not arg.is_scratch]
        planned = None
        if is_planning:
            made = described(told), _stored("", tensors, told.stream)
            with self._lock:
                self._plans[told.plan] = made
        elif told.plan is not None:
            with self._lock:
                planned = self._plans.get(told.plan)
        if not is_wanted:
            return None, ""
        count = sum(_count(arg) for arg in tensors)
        why_not = self._take(count)
        if why_not:
            return None, f"not dumped: {why_not}"
        document, stored = described(told), _stored("", tensors, told.stream)
        if planned is not None:
            document["plan"] = planned[0]
            stored |= {PLAN + name: tensor for name, tensor in planned[1].items()}
        words = {"format": FORMAT, "call": json.dumps(document)}
        stem = self._folder / f"{os.getpid()}-{told.number:06}-{_NOT_IN_NAMES.sub('_', told.name)}"
        container.write(Path(f"{stem}{BEFORE}"), stored, words)
        return str(stem), f"dumped: {stem}{BEFORE}"

    def after(self, stem: str, told: Told, result: Any) -> str:
        """Write what a call has written; what to say of it.  Raises as `before`."""
        written = [arg for arg in told.tensors if arg.writes and not arg.is_scratch]
        why_not = self._take(sum(_count(arg) for arg in written), calls=0)
        if why_not:
            return f"results not dumped: {why_not}"
        words = {"format": FORMAT, "result": json.dumps(_result(result))}
        container.write(Path(f"{stem}{AFTER}"), _stored("", written, told.stream), words)
        return f"dumped: {stem}{AFTER}"

    def _take(self, count: int, calls: int = 1) -> str:
        """Take room for so many bytes; why there is none."""
        with self._lock:
            if self._calls + calls > self._most_calls:
                return f"{self._most_calls} calls were (FI_FFI_DUMP_MAX_CALLS)"
            if self._bytes + count > self._most_bytes:
                return f"{count} bytes are more than are left of FI_FFI_DUMP_MAX_BYTES"
            self._calls, self._bytes = self._calls + calls, self._bytes + count
            return ""


def _count(arg: Argument) -> int:
    assert arg.tensor is not None
    return arg.tensor.numel * arg.tensor.dtype.itemsize


def _stored(prefix: str, tensors: list[Argument], stream: int | None) -> dict[str, Stored]:
    return {
        prefix + arg.name: Stored(arg.tensor.dtype, arg.tensor.shape, read(arg.tensor, stream))
        for arg in tensors
        if arg.tensor is not None
    }


def described(told: Told) -> Described:
    """All of a call but its tensors' elements."""
    document: Described = {
        "number": told.number,
        "process": os.getpid(),
        "time": datetime.now(timezone.utc).isoformat(),
        "op": told.name,
        "entry": told.entry,
        "device": None if told.device is None else str(told.device),
        "stream": told.stream,
        "called": told.caller,
        "arguments": [_described(arg) for arg in told.arguments],
    }
    if told.row is not None:
        row = told.row
        document["row"] = {
            "name": row.name, "variant": row.variant, "releases": row.releases,
            "signature": str(row.signature),
        }  # fmt: skip
        document["module"] = told.module
        if told.device is not None and told.device.is_cuda:
            document |= _kernel(told.module, told.device.index)
    return document


def _described(arg: Argument) -> Described:
    tensor = arg.tensor
    if tensor is None:
        if isinstance(arg.value, Opaque):
            return {"name": arg.name, "opaque": arg.value.words}
        return {"name": arg.name, "value": arg.value}
    return {
        "name": arg.name, "dtype": tensor.dtype.name, "shape": list(tensor.shape),
        "strides": list(tensor.strides), "device": str(tensor.device), "address": tensor.ptr,
        "reads": arg.reads, "writes": arg.writes, "scratch": arg.is_scratch,
    }  # fmt: skip


def _kernel(module: str, device: int) -> Described:
    """What a module's code is: its release, and the hash of its file."""
    from fi_ffi.loader import runtime

    try:
        loaded = runtime.load(module, device)
    except LoaderError:  # its source is another by now
        return {}
    return {
        "release": loaded.source.version,
        "sha256": loaded.file.sha256,
        "capability": list(machine.capability(device)),
    }


def _result(result: Any) -> Any:
    """A call's result, if it is made of numbers."""
    if isinstance(result, Array):
        values = array_values(result)
        return values if all(isinstance(value, (int, float)) for value in values) else None
    return result if isinstance(result, (bool, int, float, str)) else None
