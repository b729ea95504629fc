"""Nothing remains of a refused call: a look before and after, around every `pytest.raises`.

If the block ends with a refusal (`REFUSALS`), all that `of_process` lists is as before, and so is
every object to which the tests' functions on the stack refer, over attributes, items and closures:
the bytes of an array, the attributes of a plan, the words of a prepared call's frame, a list of
launches. After a kernel's error (`LATE`) the process only is looked at, but for what any launch may
change (`_BY_LAUNCHES`). Errors of loading are not looked after: what was found stays known.

Memories of calls are no state, because a later call reads them only with the same arguments: kinds
and adapters by type (`fi_ffi.abi`), the variants of a row with their layouts and entries, the keys
of streams, `functools.cache` and `cached_property`. A variant's pool may gain a free frame; a frame
that it lacks is lost. Objects lent to callees are not counted, because one that is released inside
the block may be of an earlier call.

A test that comes to one `pytest.raises` many times is looked at the first times, and then now and
then: a look takes as long as ten refusals.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import os
import random
import signal
import sys
import threading
import time
import types
from collections import Counter
from collections.abc import Callable, Iterator
from operator import is_
from typing import Any, NamedTuple

import numpy as np

from fi_ffi import errors
from fi_ffi.abi import allocator, failure, library, streams
from fi_ffi.abi.tensor import DType, TensorDesc, TensorKind, parse_device
from fi_ffi.loader import cache, generation, search
from fi_ffi.ops.attention.bind import BoundRow
from fi_ffi.ops.call import hooks, memory
from fi_ffi.ops.call.compiled import CompiledRow, Variant
from fi_ffi.ops.call.op import Op
from fi_ffi.ops.call.prepared import PackedCall
from fi_ffi.ops.call.row import Ranged, Row
from fi_ffi.ops.moe.call import MoeCall
from fi_ffi.ops.moe.kernels import Kernels
from fi_ffi.watch import watching

REFUSALS, LATE = errors.ArgumentError, errors.KernelError

_MOST_OBJECTS, _MOST_ITEMS, _MOST_BYTES = 2000, 64, 1 << 18
_PLAIN = frozenset((int, float, complex, str, bytes, bool, type(None)))
# Attributes of plans, modules and the tests' own cases that may have more items: memories, and
# scratch memory made for each call.
_GROWING = frozenset(
    ("bound", "current", "_entries", "signatures", "_placed", "_extra", "_rows", "scratch", "made")
)
# Attributes that are made when they are first asked for, and a group's count of its calls, in which
# ranks count what all refuse.
_REMEMBERED = frozenset(("_lengths", "_most", "_counts", "_members", "_calls"))
_CONSTANT = (Row, Ranged, TensorDesc, TensorKind, DType)
_MEMORIES = (CompiledRow, Kernels, MoeCall, Op, Variant)
_DEVICES = [parse_device(name) for name in ("cpu", "cuda:0", "cuda:1")]
_PATIENCE_S = 0.2
_FIRST, _LATER = 6, 1 / 8  # how many times are looked at, and which part of those after
_BY_LAUNCHES = (
    "open descriptors",  # of a file of kernels, loaded at the first call
    "open scopes",
    "current streams",
    "scratch memory",
    "objects kept for good",
)

_allowed: list[str] = []


@contextlib.contextmanager
def allowed(*words: str) -> Iterator[None]:
    """Let refusals inside the block change what has one of these words in its name."""
    _allowed.extend(words)
    try:
        yield
    finally:
        del _allowed[len(_allowed) - len(words) :]


def watched(raises: Callable[..., Any]) -> Callable[..., Any]:
    """Return `pytest.raises`, which also fails if something remains of what it expects."""

    @functools.wraps(raises)
    def looking(*args: Any, **kwargs: Any) -> Any:
        made = raises(*args, **kwargs)
        return _Watched(made) if hasattr(made, "__enter__") else made

    return looking


def _is_looked_at(frame: types.FrameType) -> bool:
    """Whether this time is looked at, at this place of this test."""
    global _test
    if _test != (_test := os.environ.get("PYTEST_CURRENT_TEST", "")):
        _times.clear()
    place = frame.f_code, frame.f_lineno
    _times[place] += 1
    return _times[place] <= _FIRST or random.random() < _LATER


_test, _times = "", Counter[tuple[types.CodeType, int]]()


class _Watched:
    """A context of `pytest.raises`, with a look at what is there before and after."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __enter__(self) -> Any:
        frame = sys._getframe(1)
        self._looked = (of_process(), Objects(frame)) if _is_looked_at(frame) else None
        return self._inner.__enter__()

    def __exit__(self, kind: Any, error: Any, trace: Any) -> Any:
        is_expected = self._inner.__exit__(kind, error, trace)
        looked = self._looked
        del self._looked
        if looked is None or not is_expected or not isinstance(error, (REFUSALS, LATE)):
            return is_expected
        process, seen = looked
        changed = changes(process)
        if isinstance(error, REFUSALS):
            changed += seen.changes()
        else:
            changed = [name for name in changed if not name.startswith(_BY_LAUNCHES)]
        changed = [name for name in changed if not any(word in name for word in _allowed)]
        assert not changed, f"remains of a {type(error).__name__}: {'; '.join(changed)}"
        return is_expected


# The process


def of_process() -> dict[str, Any]:
    """Return what a process has that calls may acquire or change.

    Sets may lose members, and numbers may decrease, as by a collection of garbage.
    """
    thread = streams.thread
    return {
        "open descriptors": _lowest_descriptor(),
        "threads": {each.ident for each in threading.enumerate()},
        "held locks": _held_locks(),
        "folders to remove at exit": {*cache.removed_at_exit},
        "objects kept for good": {*memory._kept},
        "exceptions on their way": {*failure._travelling},
        "scratch memory": {
            (*key, name, id(one))
            for key, owned in memory._owned.items()
            for name, one in owned.items()
        },
        "allocations": sum([each.count for each in allocator._ALLOCATORS]),
        "free frames": _free_frames(),
        "the context": {var.name: id(value) for var, value in contextvars.copy_context().items()},
        "open scopes": [{**thread.scopes}, {**thread.replaced}],
        "current streams": _current_streams(),
        "who watches": [hooks.watcher, hooks.thread.plan, watching.inboxes, watching.logs],
        "kernels in force": [generation.number, search._location, id(search._places[0])],
        # A report has no values of it.
        "the environment": [hash(frozenset(os.environ._data.items()))],
        "hooks": [
            sys.excepthook,
            sys.unraisablehook,
            threading.excepthook,
            signal.getsignal(signal.SIGINT),
            signal.getsignal(signal.SIGTERM),
        ],
    }


def _lowest_descriptor() -> int:
    """Return the lowest free number of a descriptor, which a descriptor left open takes."""
    if isinstance(library.lib, library._Unattached):
        return sys.maxsize  # the file of libtvm_ffi stays open
    lowest = os.open(os.devnull, os.O_RDONLY)
    os.close(lowest)
    return lowest


def _current_streams() -> list[int]:
    if isinstance(library.lib, library._Unattached):
        return [0] * len(_DEVICES)
    return [*map(streams.current_handle, _DEVICES)]


def changes(before: dict[str, Any]) -> list[str]:
    """Return what has changed of a process, in words."""
    found = _changes(before)
    if found:
        time.sleep(_PATIENCE_S)  # another thread may have had it
        found = _changes(before)
    return found


def _changes(before: dict[str, Any]) -> list[str]:
    found = []
    for name, now in of_process().items():
        was = before[name]
        if isinstance(was, set):
            if not now <= was:
                found.append(f"{name} ({', '.join(map(str, now - was))})")
        elif isinstance(was, int):
            if now > was:
                found.append(f"{name} ({was} before, now {now})")
        elif isinstance(was, _Pools):
            if any(len(pool) < count for pool, count in zip(was.pools, was.counts, strict=True)):
                found.append(f"{name} (one is lost)")
        elif was != now:
            found.append(f"{name} ({was} before, now {now})")
    return found


class _Pools(NamedTuple):
    """The free frames of all variants, and how many there are in each pool."""

    pools: list[list[Any]]
    counts: list[int]


def _free_frames() -> _Pools:
    rows: list[Any] = []
    for each in filter(None, [follower() for follower in generation._followers.copy()]):
        rows += each._compiled if isinstance(each, Op) else [each]
    compiled = [row for row in rows if isinstance(row, CompiledRow)]
    pools = [variant.frames for row in compiled for variant in [*row.variants.values()]]
    return _Pools(pools, [*map(len, pools)])


_locks: tuple[int, dict[str, Any]] = 0, {}


def _held_locks() -> set[str]:
    """Return the locks of the package's modules that are held; a reentrant one, by this thread."""
    global _locks
    if _locks[0] != len(sys.modules):
        kinds = type(threading.Lock()), type(threading.RLock())
        _locks = (
            len(sys.modules),
            {
                f"{name}.{attribute}": value
                for name, module in [*sys.modules.items()]
                if name.startswith("fi_ffi.")
                for attribute, value in vars(module).items()
                if isinstance(value, kinds)
            },
        )
    return {
        name
        for name, lock in _locks[1].items()
        if (lock.locked() if hasattr(lock, "locked") else lock._is_owned())
    }


# Objects


class _Look(NamedTuple):
    """An object, its parts as they were, and where it was found: at `key` of an earlier one."""

    value: Any
    read: Callable[[Any], dict[Any, Any]]
    before: dict[Any, Any]
    parent: int
    key: Any


class Objects:
    """What the variables of the tests' functions refer to, from a frame outwards."""

    def __init__(self, frame: types.FrameType | None) -> None:
        self._looks: list[_Look] = []
        found: list[tuple[Any, int, Any]] = []
        while frame is not None and not frame.f_globals.get("__name__", "").startswith("_pytest"):
            if _is_of_tests(frame):
                variables = frame.f_locals
                found += [(value, -1, name) for name, value in variables.items()]
                if type(variables) is dict:  # before Python 3.13 it would keep the values alive
                    variables.clear()
            frame = frame.f_back
        seen = {id(_allowed)}
        for value, parent, key in found:  # which grows
            kind = type(value)
            if id(value) in seen or kind in _PLAIN:
                continue
            if kind is tuple and _PLAIN.issuperset(map(type, value)):
                continue
            read = reader(kind)
            if read is None:
                continue
            seen.add(id(value))
            parts, number = read(value), len(self._looks)
            found += [
                (part, number, name) for name, part in parts.items() if type(part) not in _PLAIN
            ]
            self._looks.append(_Look(value, read, parts, parent, key))
            if len(self._looks) == _MOST_OBJECTS:
                break

    def changes(self) -> list[str]:
        """Return what has changed, by the names by which it was found."""
        changed = []
        for number, (value, read, before, _, looked_at) in enumerate(self._looks):
            if type(value) is tuple:
                continue
            now = read(value)
            if len(now) == len(before) and all(map(is_, now.values(), before.values())):
                continue
            for key in {**before, **now}:
                one, other = before.get(key, _NONE), now.get(key, _NONE)
                is_new = one is _NONE or key == "length"
                is_kept = is_new and _may_gain(value, looked_at, key)
                if not is_kept and not _is_same(one, other):
                    text = f" ({one!r:.60} before, now {other!r:.60})"
                    changed.append(self._name(number) + _step(value, key) + text)
        return changed

    def _name(self, number: int) -> str:
        look = self._looks[number]
        if look.parent < 0:
            return str(look.key)
        return self._name(look.parent) + _step(self._looks[look.parent].value, look.key)


class _None:
    """Stands for a part that there is not."""

    def __repr__(self) -> str:
        return "nothing"


_NONE = _None()


def _may_gain(value: Any, name: Any, key: Any) -> bool:
    """Whether an object may have a part more: a memory's entry, or a `cached_property`."""
    if isinstance(value, (dict, list)):
        return name in _GROWING
    return isinstance(getattr(type(value), str(key), None), functools.cached_property)


class _Pool(int):
    """How many free frames there are; one more is none that is lost."""


def _is_of_tests(frame: types.FrameType) -> bool:
    is_function = frame.f_code.co_flags & 1  # inspect.CO_OPTIMIZED: its variables are its own
    return bool(is_function) and frame.f_globals.get("__name__", "").startswith("tests.")


def _is_same(one: Any, other: Any) -> bool:
    if one is other:
        return True
    kind = type(one)
    if kind is not type(other):
        return False
    if kind is _Pool:
        return bool(one <= other)
    return kind in _PLAIN and (one == other or one != one)


def _step(value: Any, key: Any) -> str:
    return f"[{key!r:.40}]" if isinstance(value, (dict, list, tuple)) else f".{key}"


@functools.cache
def reader(kind: type) -> Callable[[Any], dict[Any, Any]] | None:
    """Return a function that returns the parts of a kind's objects; None if they have none."""
    if issubclass(kind, (type, _Watched, *_CONSTANT, *_MEMORIES)):
        return None
    if issubclass(kind, np.ndarray):
        return _array
    if issubclass(kind, PackedCall):
        return _packed_call
    if issubclass(kind, BoundRow):
        return _bound_row
    if kind in (dict, list, tuple, set):
        return {dict: _dict, list: _items, tuple: _items, set: _set}[kind]
    if kind is types.FunctionType:
        return _function
    if kind is types.MethodType:
        return lambda method: {"__self__": method.__self__}
    if kind is functools.partial:
        return lambda call: {"func": call.func, "args": call.args, "keywords": call.keywords}
    if kind.__module__.split(".")[0] in ("fi_ffi", "tests"):
        return _attributes_of(kind)
    return None


def _array(array: np.ndarray) -> dict[str, Any]:
    """Return a view's base, and an owner's bytes: a view may reach beyond its memory."""
    if array.base is not None:
        return {"base": array.base, "flags.writeable": array.flags.writeable}
    if array.dtype.hasobject:
        return {}
    if array.nbytes > _MOST_BYTES:  # an owner's elements are dense: those at its ends
        flat = array.reshape(-1, order="A")
        parts = [
            flat[: _MOST_BYTES // 2 // array.itemsize],
            flat[-_MOST_BYTES // 2 // array.itemsize :],
        ]
        content = b"".join(part.tobytes() for part in parts)
    else:
        content = array.tobytes()
    return {"bytes": content, "flags.writeable": array.flags.writeable}


def _dict(value: dict[Any, Any]) -> dict[Any, Any]:
    if len(value) <= _MOST_ITEMS:
        return value.copy()
    return dict([*value.items()][:_MOST_ITEMS]) | _length(value)


def _length(value: Any) -> dict[str, int]:
    return {"length": len(value)} if len(value) > _MOST_ITEMS else {}


def _items(value: list[Any] | tuple[Any, ...]) -> dict[Any, Any]:
    return dict(enumerate(value[:_MOST_ITEMS])) | _length(value)


def _set(value: set[Any]) -> dict[Any, Any]:
    return {"length": len(value)}


def _function(function: types.FunctionType) -> dict[str, Any]:
    parts = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):  # it has no value yet
            parts[name] = cell.cell_contents
    return parts | dict(enumerate(function.__defaults__ or ())) | (function.__kwdefaults__ or {})


def _attributes_of(kind: type) -> Callable[[Any], dict[str, Any]]:
    slots = []
    for each in kind.__mro__:
        names = vars(each).get("__slots__", ())
        for name in (names,) if isinstance(names, str) else names:
            member = vars(each).get(name)
            if isinstance(member, types.MemberDescriptorType):
                slots.append((name, member.__get__))

    def read(value: Any) -> dict[str, Any]:
        parts: dict[str, Any] = getattr(value, "__dict__", {}).copy()
        for name, get in slots:
            with contextlib.suppress(AttributeError):
                parts[name] = get(value)
        for name in parts.keys() & _REMEMBERED:
            del parts[name]
        return parts

    return read


def _packed_call(call: PackedCall) -> dict[str, Any]:
    """Return the attributes without the frame, whose references tell whether it is in use."""
    parts = _attributes_of(type(call))(call)
    frame, take = parts.pop("frame", None), parts.pop("take", None)
    parts.pop("give", None)
    if frame is not None:
        words = memoryview(bytearray(frame.words)).cast("q")
        words[frame.device_word] = 0  # where CUDA writes the current device
        parts |= {"frame": id(frame), "frame.words": bytes(words)}
    return parts | {"is free": take is not None and bool(take.__self__)}


def _bound_row(row: BoundRow) -> dict[str, Any]:
    free = _Pool(sum(map(len, row._free.values())))
    parts = {**vars(row), "_free": free, "words": repr(row.words), "version": id(row.version)}
    del parts["memo"]  # as a variant's
    return parts | {"state": id(row.state)}
