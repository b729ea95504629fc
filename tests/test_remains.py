"""What a refused call leaves behind fails the test that expects it, whatever it is."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import fi_ffi
from fi_ffi.abi import failure, streams
from fi_ffi.abi.tensor import parse_device
from fi_ffi.errors import ArgumentError, ArgumentTypeError, KernelError, KernelNotFoundError
from fi_ffi.loader import cache, generation, search
from fi_ffi.ops.call import hooks, memory
from fi_ffi.ops.functions import OPS
from fi_ffi.watch import watching

from tests.helpers import remains
from tests.helpers.plan_calls import Case

Undo = contextlib.ExitStack


@pytest.fixture
def undo():
    with Undo() as stack:
        yield stack


def setting(target: object, name: str, value: object) -> Callable[[Undo], None]:
    """Set an attribute until the end of the test."""

    def leak(undo: Undo) -> None:
        undo.callback(setattr, target, name, getattr(target, name))
        setattr(target, name, value)

    return leak


def descriptor(undo: Undo) -> None:
    undo.callback(os.close, os.open(os.devnull, os.O_RDONLY))


def thread(undo: Undo) -> None:
    done = threading.Event()
    started = threading.Thread(target=done.wait)
    started.start()
    undo.callback(started.join)
    undo.callback(done.set)


def lock(undo: Undo) -> None:
    memory._lock.acquire()
    undo.callback(memory._lock.release)


def folder(undo: Undo) -> None:
    cache.removed_at_exit.add("a folder")  # type: ignore[arg-type]
    undo.callback(cache.removed_at_exit.discard, "a folder")


def kept(undo: Undo) -> None:
    memory.keep(undo)
    undo.callback(memory._kept.pop, id(undo))


def travelling(undo: Undo) -> None:
    failure._travelling[-1] = None, ValueError()
    undo.callback(failure._travelling.pop, -1)


def scratch(undo: Undo) -> None:
    memory.owned(memory.HOST)["a test"] = object()
    undo.callback(memory.owned(memory.HOST).pop, "a test")


def frame(undo: Undo) -> None:
    frames = next(iter(OPS["rmsnorm"].compiled.variants.values())).frames
    undo.callback(frames.append, frames.pop())


def scope(undo: Undo) -> None:
    undo.enter_context(fi_ffi.stream(0x51))


def stream(undo: Undo) -> None:
    device = parse_device("cuda:0")
    undo.callback(streams.swap, device, streams.swap(device, 0x51))


def variable(undo: Undo) -> None:
    os.environ["LEFT_BY_A_REFUSAL"] = "1"
    undo.callback(os.environ.pop, "LEFT_BY_A_REFUSAL")


OF_PROCESS: dict[str, tuple[str, Callable[[Undo], Any]]] = {
    "descriptor": ("open descriptors", descriptor),
    "thread": ("threads", thread),
    "lock": ("held locks", lock),
    "folder": ("folders to remove at exit", folder),
    "kept": ("objects kept for good", kept),
    "travelling": ("exceptions on their way", travelling),
    "scratch": ("scratch memory", scratch),
    "frame": ("free frames", frame),
    "scope": ("the context", scope),
    "stream": ("current streams", stream),
    "watcher": ("who watches", setting(hooks, "watcher", watching)),
    "plan": ("who watches", setting(hooks.thread, "plan", "a plan")),
    "inbox": ("who watches", setting(watching, "inboxes", (1,))),
    "generation": ("kernels in force", setting(generation, "number", -1)),
    "source": ("kernels in force", setting(search, "_location", "/elsewhere")),
    "variable": ("the environment", variable),
    "hook": ("hooks", setting(sys, "unraisablehook", print)),
}


def call() -> None:
    x = np.ones((2, 64), np.float16)
    fi_ffi.rmsnorm(np.empty_like(x), x, np.ones(64, np.float16))


@pytest.fixture
def called() -> None:
    """A call first, whose libraries and frames are there then."""
    call()


REFUSAL = ArgumentError("an_op", "x", got=1, expected=2)


def remaining(error: Exception, call: Callable[[], object], *words: str) -> list[str]:
    """What the mechanism tells of a call that ends with this error, where these words are
    allowed."""

    def failing() -> None:
        call()
        raise error

    try:
        with remains.allowed(*words), pytest.raises(type(error)):
            failing()
    except AssertionError as told:
        start, _, changed = str(told).partition(": ")
        assert start == f"remains of a {type(error).__name__}"
        return [name.partition(" (")[0] for name in changed.split("; ")]
    return []


@pytest.mark.parametrize("name", OF_PROCESS)
def test_what_is_left_in_the_process(name, undo, called):
    told, leak = OF_PROCESS[name]
    error = ArgumentTypeError("an_op", "x", got=1, expected=2)
    assert told in remaining(error, lambda: leak(undo))
    assert not remaining(REFUSAL, lambda: None)


def test_a_frame_of_a_variant_that_replaces_another(undo, called):
    assert not remaining(REFUSAL, lambda: None)
    OPS["rmsnorm"].forget()
    call()
    assert "free frames" in remaining(REFUSAL, lambda: frame(undo))


def test_what_a_kernels_error_leaves(undo, called):
    array = np.zeros(4)

    def launch() -> None:
        array[0] = 1
        scratch(undo)
        thread(undo)

    error = KernelError("an_op", "ValueError", "")
    assert remaining(error, launch) == ["threads"]


def prepared() -> Any:
    x = np.ones((2, 64), np.float16)
    return OPS["rmsnorm"].prepare(np.empty_like(x), x, np.ones(64, np.float16))


def closure() -> Callable[[], None]:
    hidden = np.zeros(2)

    def change() -> None:
        hidden[0] = 1

    return change


# What a test sees, how a call changes it, and the name of the change.
OBJECTS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any], str]] = {
    "array": (lambda: np.zeros(3), lambda array: array.fill(1), "seen.bytes"),
    "NaN": (lambda: np.full(3, np.nan), lambda array: array.fill(-np.nan), "seen.bytes"),
    "view": (lambda: np.zeros((2, 3))[:, ::2], lambda view: view.fill(1), "seen.base.bytes"),
    "flag": (
        lambda: np.zeros(3),
        lambda array: array.setflags(write=False),
        "seen.flags.writeable",
    ),
    "large": (
        lambda: np.zeros(remains._MOST_BYTES + 1, np.uint8),
        lambda array: array.__setitem__(-1, 1),
        "seen.bytes",
    ),
    "list": (lambda: [1, {"key": [2]}], lambda seen: seen[1]["key"].append(3), "seen[1]['key'][1]"),
    "long list": (lambda: [0] * 1000, lambda seen: seen.append(0), "seen['length']"),
    "dict": (lambda: {"key": 1}, lambda seen: seen.pop("key"), "seen['key']"),
    "plan": (Case("decode").plan, lambda plan: setattr(plan, "_own", 1), "seen._own"),
    "workspace": (
        Case("decode").plan,
        lambda plan: setattr(plan.workspace, "_generation", 7),
        "seen.workspace._generation",
    ),
    "words": (prepared, lambda call: call.frame.words.__setitem__(0, -7), "seen.frame.words"),
    "in use": (prepared, lambda call: call.take(), "seen.is free"),
    "closure": (closure, lambda change: change(), "seen.hidden.bytes"),
    "partial": (
        lambda: functools.partial(print, np.zeros(3)),
        lambda call: call.args[0].fill(1),
        "seen.args[0].bytes",
    ),
}


@pytest.mark.parametrize("name", OBJECTS)
def test_what_is_changed(name):
    make, change, told = OBJECTS[name]
    seen = make()
    # Functions further out than the one that expects the error are looked at as well.
    assert told in remaining(REFUSAL, lambda: change(seen))
    assert not remaining(REFUSAL, lambda: None)


def test_what_may_change():
    array, listed = np.zeros(3), [1]

    def change() -> None:
        array[0] += 1
        listed.append(1)

    assert remaining(REFUSAL, change, "array.bytes") == [f"listed[{len(listed) - 1}]"]
    assert remaining(REFUSAL, change) == ["array.bytes", f"listed[{len(listed) - 1}]"]
    assert not remaining(REFUSAL, change, "array.bytes", "listed[")
    assert not remaining(KernelNotFoundError(), change), "which is no refusal"


def test_what_is_remembered():
    call, plan = prepared(), Case("decode").plan()

    def remember() -> None:
        call.variant.frames.append(prepared().frame)
        plan._runs.bound["a kind"] = plan._runs.current["a kind"] = object()
        plan._most[7] = 7

    assert not remaining(REFUSAL, remember)
    assert remaining(REFUSAL, lambda: plan._runs.bound.pop("a kind")) == [
        "plan._runs.bound['a kind']"
    ]
    plan._runs.current.clear()
    assert call.take() is call.frame
