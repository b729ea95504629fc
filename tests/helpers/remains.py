"""What a refused call may not leave behind, looked at around every `pytest.raises`.

Where a test expects an error of fi_ffi, all that the process has is the same after it: open
descriptors, threads, the stream in force, scratch memory, objects that are lent to libraries,
allocations, who watches.  So is all that the test itself can see: the bytes of arrays, and the
attributes of plans, prepared calls, groups and of the test's own objects.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import zlib
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import numpy as np
import pytest

from fi_ffi.abi import allocator, objects, streams
from fi_ffi.abi.tensor import TensorDesc
from fi_ffi.errors import ArgumentError
from fi_ffi.ops.attention.bind import BoundRuns
from fi_ffi.ops.call import hooks, memory
from fi_ffi.ops.call.compiled import CompiledRow, Variant
from fi_ffi.ops.call.op import Op
from fi_ffi.ops.call.row import Ranged, Row
from fi_ffi.ops.moe.call import MoeCall
from fi_ffi.ops.moe.kernels import Kernels

_DEPTH, _MANY, _BYTES = 5, 64, 1 << 20
# What never changes, and what remembers calls, which is no state of a caller's.
_CONSTANT = (Row, Ranged, TensorDesc, np.dtype, np.random.Generator, pytest.ExceptionInfo, type)
_MEMORIES = (BoundRuns, CompiledRow, Kernels, MoeCall, Op, Variant)
_SKIPPED = (*_CONSTANT, *_MEMORIES)
_PLAIN = (int, float, str, bytes, bool, type(None), complex)


_allowed: list[str] = []


@contextlib.contextmanager
def allowed(*names: str) -> Iterator[None]:
    """Let errors inside the block change what has one of these words in its name."""
    _allowed.extend(names)
    try:
        yield
    finally:
        del _allowed[len(_allowed) - len(names) :]


def of_process() -> dict[str, Any]:
    """Return what a process has that calls may acquire."""
    return {
        "open descriptors": set(os.listdir("/proc/self/fd")) if os.path.isdir("/proc") else set(),
        "threads": {thread.ident for thread in threading.enumerate()},
        "the scope's stream": streams.scope_var.get(),
        "scratch memory": {key: {*owned} for key, owned in memory._owned.items()},
        "a recording": memory.recording(),
        "lent objects": {*objects._lent},
        "allocations": [each.count for each in allocator._ALLOCATORS],
        "who watches": (hooks.watcher, hooks.thread.plan),
    }


def of_locals(frame: FrameType) -> dict[str, Any]:
    """Return what is to be seen of a function's variables."""
    seen: dict[int, object] = {}
    return {
        f"{name}{path}": value
        for name, local in frame.f_locals.items()
        for path, value in _leaves(local, "", _DEPTH, seen)
    }


def _leaves(value: Any, path: str, depth: int, seen: dict[int, object]) -> Iterator[Any]:
    if isinstance(value, _PLAIN):
        yield path, repr(value) if isinstance(value, float) else value  # NaN is not equal to itself
        return
    if id(value) in seen or isinstance(value, _SKIPPED) or (callable(value) and not depth):
        return
    seen[id(value)] = value  # kept, so that no other gets its number
    if isinstance(value, np.ndarray):
        is_looked_at = value.nbytes <= _BYTES and not value.dtype.hasobject
        digest = zlib.crc32(np.ascontiguousarray(value).view(np.uint8)) if is_looked_at else 0
        yield path, (id(value), value.shape, value.dtype, value.strides, digest)
        return
    yield path, id(value)
    if not depth:
        return
    if isinstance(value, dict):
        parts = [(f"[{key!r:.40}]", each) for key, each in [*value.items()][:_MANY]]
        yield f"len({path})", len(value)
    elif isinstance(value, (list, tuple)):
        parts = [(f"[{at}]", each) for at, each in enumerate(value[:_MANY])]
        yield f"len({path})", len(value)
    elif type(value).__module__.split(".")[0] in ("fi_ffi", "tests"):
        parts = [(f".{name}", each) for name, each in _attributes(value)]
    else:
        return
    for name, each in parts:
        yield from _leaves(each, path + name, depth - 1, seen)


def _attributes(value: object) -> Iterator[tuple[str, object]]:
    yield from getattr(value, "__dict__", {}).items()
    for kind in type(value).__mro__:
        slots = vars(kind).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            descriptor = vars(kind).get(name)
            if descriptor is not None and hasattr(descriptor, "__get__"):
                try:
                    yield name, descriptor.__get__(value, kind)
                except AttributeError:
                    continue


class _Watched:
    """`pytest.raises`, and a look at what is there before and after."""

    def __init__(self, inner: Any, frame: FrameType) -> None:
        self.inner, self.frame = inner, frame

    def __enter__(self) -> Any:
        self.process, self.locals = of_process(), of_locals(self.frame)
        return self.inner.__enter__()

    def __exit__(self, kind: Any, error: Any, trace: Any) -> Any:
        result = self.inner.__exit__(kind, error, trace)
        if result and isinstance(error, ArgumentError):
            process, seen = of_process(), of_locals(self.frame)
            changed = [name for name, was in self.process.items() if process[name] != was]
            changed += [
                name for name, was in self.locals.items() if name in seen and seen[name] != was
            ]
            changed = [name for name in changed if not any(word in name for word in _allowed)]
            del self.process, self.locals, self.frame
            if changed:
                pytest.fail(f"a refused call changed {', '.join(changed)}", pytrace=True)
        return result


def watched(raises: Callable[..., Any]) -> Callable[..., Any]:
    """Return `pytest.raises`, which looks at what an error of fi_ffi leaves."""

    def looking(*args: Any, **kwargs: Any) -> Any:
        made = raises(*args, **kwargs)
        return _Watched(made, sys._getframe(2)) if hasattr(made, "__enter__") else made

    return looking
