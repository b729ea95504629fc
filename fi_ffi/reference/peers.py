"""Memory that several ranks see, and waiting for other ranks' writes.

Ranks are threads of a process, or processes over shared memory. A pointer to a peer's memory is an
address in the caller's own process.
"""

from __future__ import annotations

import contextlib
import contextvars
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from fi_ffi.abi import library
from fi_ffi.abi._cffi import ffi
from fi_ffi.reference.arrays import Array

_Patience = tuple[float, Callable[[Iterable[int]], bool], float]
_PATIENCE: contextvars.ContextVar[_Patience] = contextvars.ContextVar(
    "_PATIENCE", default=(60.0, lambda ranks: False, 0.0)
)
_SHORTEST_S, _LONGEST_S = 20e-6, 2e-3
_LOOKING_S = 0.2  # between looks at whether a peer has ended
_fence_lock = threading.Lock()
library.renew_after_fork(globals(), "_fence_lock", threading.Lock)


@contextlib.contextmanager
def waiting_at_most(
    seconds: float,
    have_ended: Callable[[Iterable[int]], bool] = lambda ranks: False,
    ended_s: float = 0.0,
) -> Iterator[None]:
    """Let calls of this thread wait for their peers for at most this long, by default a minute, and
    for `ended_s` if any of the missing ones `have_ended`."""
    token = _PATIENCE.set((seconds, have_ended, ended_s))
    try:
        yield
    finally:
        _PATIENCE.reset(token)


def at(address: int, dtype: Any, *shape: int) -> Array:
    """Make an array over memory that somebody else keeps alive."""
    dtype = np.dtype(dtype)
    count = int(np.prod(shape))
    if not count:
        return np.empty(shape, dtype)
    buffer = ffi.buffer(ffi.cast("char *", address), count * dtype.itemsize)
    array: Array = np.ndarray(shape, dtype, buffer)
    return array


def address_of(array: Array) -> int:
    return int(array.__array_interface__["data"][0])


def fence() -> None:
    """Make peers see all earlier writes before any later write."""
    for _ in range(2):  # a release, then an acquire
        with _fence_lock:
            pass


def wait(call: str, rank: int, missing: Callable[[], Iterable[int]]) -> None:
    """Sleep until no peer is `missing`.

    If that takes longer than `waiting_at_most` allows, raises `TimeoutError` with the call and the
    missing ranks.
    """
    seconds, have_ended, ended_s = _PATIENCE.get()
    pause, begun, look = _SHORTEST_S, time.monotonic(), ended_s
    while lacking := sorted(missing()):
        waited = time.monotonic() - begun
        is_over = waited >= seconds
        if waited >= look and not is_over:
            is_over, look = have_ended(lacking), waited + _LOOKING_S
        if is_over:
            waited = min(round(waited, 1), seconds)
            who = f"rank{'s' * (len(lacking) > 1)} {', '.join(map(str, lacking))}"
            raise TimeoutError(f"{call}: rank {rank} waited {waited:g} s for {who}")
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_S)
    fence()
