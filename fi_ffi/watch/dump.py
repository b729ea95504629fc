"""Dumps calls into files, to repeat them; docs/call-log.md has the format."""

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
from fi_ffi.watch import safetensors
from fi_ffi.watch.call_record import Argument, CallRecord, Opaque
from fi_ffi.watch.safetensors import StoredTensor
from fi_ffi.watch.tensor_bytes import read

FORMAT = "fi_ffi call 1"
BEFORE, AFTER = ".in.safetensors", ".out.safetensors"
MAX_CALLS, MAX_BYTES = 1000, 2**33
_NOT_IN_NAMES = re.compile(r"[^\w.-]", re.ASCII)
_LONGEST_NAME = 100  # characters of a call's name in file names
PLAN = "plan."  # prefix of the names of a plan's arrays in the file of a run

Described = dict[str, Any]


class Dump:
    """A directory of dumped calls, with limits on calls and bytes."""

    def __init__(
        self,
        folder: str | os.PathLike[str],
        ops: str = "",
        max_calls: int = MAX_CALLS,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        self._folder = Path(folder)
        self._patterns = [one.strip() for one in ops.split(",") if one.strip()] or ["*"]
        self._max_calls, self._max_bytes = max_calls, max_bytes
        self._lock = threading.Lock()
        self._calls = self._bytes = 0
        # The last planning of each plan, which is needed to repeat its runs.
        self._plans: dict[weakref.ref[Any], tuple[Described, dict[str, StoredTensor]]] = {}
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            expected = f"a directory that can be made: {error}"
            raise ArgumentError("call_log", "dump", got=folder, expected=expected) from error

    def renew(self) -> None:
        """Replace the lock in a forked child: another thread may have held it."""
        self._lock = threading.Lock()

    def before(self, number: int, record: CallRecord) -> tuple[str | None, str]:
        """Write a call that is about to be made.

        Return its file without the suffix, or None, and a remark for the log. Raises `OSError` and
        `KernelError`.
        """
        name, plan = record.qualname, record.plan
        is_planning = record.row is not None and record.row.symbol == "plan" and plan is not None
        is_wanted = any(fnmatch.fnmatchcase(name, pattern) for pattern in self._patterns)
        described = None
        if is_planning:
            described = _described(number, record), _stored(record)
            with self._lock:
                self._plans[weakref.ref(plan, self._plans.__delitem__)] = described
        if not is_wanted:
            return None, ""
        why_not = self._reserve(record)
        if why_not:
            return None, f"not dumped: {why_not}"
        call, stored = described or (_described(number, record), _stored(record))
        if plan is not None and not is_planning:
            with self._lock:
                planned = self._plans.get(weakref.ref(plan))
            if planned is not None:
                call["plan"] = planned[0]
                stored |= {PLAN + name: tensor for name, tensor in planned[1].items()}
        plain = _NOT_IN_NAMES.sub("_", name)[:_LONGEST_NAME]
        stem = str(self._folder / f"{os.getpid()}-{number:06}-{plain}")
        words = {"format": FORMAT, "call": json.dumps(call)}
        safetensors.write(Path(stem + BEFORE), stored, words)
        return stem, f"dumped: {stem}{BEFORE}"

    def after(self, stem: str, record: CallRecord, result: Any) -> str:
        """Write what a call has written; return a remark for the log. Raises as `before`."""
        why_not = self._reserve(record, "writes")
        if why_not:
            return f"results not dumped: {why_not}"
        words = {"format": FORMAT, "result": json.dumps(_result(result))}
        safetensors.write(Path(stem + AFTER), _stored(record, "writes"), words)
        return f"dumped: {stem}{AFTER}"

    def _reserve(self, record: CallRecord, *of: str) -> str:
        """Reserve space for these of a call's tensors; return the reason if there is none."""
        tensors, calls = record.tensors(*of).values(), not of
        count = sum(tensor.dtype.bytes_of(tensor.numel) for tensor in tensors)
        with self._lock:
            if self._calls + calls > self._max_calls:
                return f"{self._max_calls} calls were (FI_FFI_DUMP_MAX_CALLS)"
            if self._bytes + count > self._max_bytes:
                return f"{count} bytes are more than are left of FI_FFI_DUMP_MAX_BYTES"
            self._calls, self._bytes = self._calls + calls, self._bytes + count
            return ""


def _stored(record: CallRecord, *of: str) -> dict[str, StoredTensor]:
    return {
        name: StoredTensor(tensor.dtype, tensor.shape, read(tensor, record.stream))
        for name, tensor in record.tensors(*of).items()
    }


def _described(number: int, record: CallRecord) -> Described:
    """Describe a call without its tensors' elements."""
    device, row = record.device, record.row
    document: Described = {
        "number": number,
        "process": os.getpid(),
        "time": datetime.now(timezone.utc).isoformat(),
        "op": record.qualname,
        "entry": record.entry,
        "device": None if device is None else str(device),
        "stream": record.stream,
        "called": record.caller,
        "arguments": [_described_argument(arg) for arg in record.arguments],
    }
    if row is not None:
        document["row"] = {
            "name": row.name,
            "variant": row.variant,
            "releases": row.releases,
            "signature": str(row.signature),
        }
        document["module"] = record.module
        if device is not None and device.is_cuda:
            document |= _kernel(record.module, device.index)
    return document


def _described_argument(arg: Argument) -> Described:
    tensor = arg.tensor
    if tensor is None:
        if isinstance(arg.value, Opaque):
            return {"name": arg.name, "opaque": arg.value.description}
        return {"name": arg.name, "value": arg.value}
    return {
        "name": arg.name,
        "dtype": tensor.dtype.name,
        "shape": list(tensor.shape),
        "strides": list(tensor.strides),
        "device": str(tensor.device),
        "address": tensor.ptr,
        "reads": arg.reads,
        "writes": arg.writes,
        "scratch": arg.is_scratch,
    }


def _kernel(module: str, device: int) -> Described:
    """Describe a module's code: its release, and the hash of its file."""
    from fi_ffi.loader import runtime

    try:
        loaded = runtime.load(module, device)
    except LoaderError:  # the source of kernels has changed since
        return {}
    return {
        "release": loaded.source.version,
        "sha256": loaded.file.sha256,
        "capability": list(machine.capability(device)),
    }


def _result(result: Any) -> Any:
    """Return a call's result if it is made of numbers."""
    if isinstance(result, Array):
        values = array_values(result)
        return values if all(isinstance(value, (int, float)) for value in values) else None
    return result if isinstance(result, (bool, int, float, str)) else None
