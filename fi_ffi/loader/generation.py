"""The generation of kernels: a number that grows when other kernels are chosen.

Entries, releases and module names hold for one generation. What a function returns of them is
cached by `cached`, which compares the number. Ops and compiled rows, which a call reaches without
comparing anything, follow it.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable
from typing import Any, Protocol, TypeVar, cast

from fi_ffi.abi.library import renew_after_fork

_Function = TypeVar("_Function", bound=Callable[..., Any])
_MAX_KEPT = 4096  # results of one function

number = 0
_lock = threading.Lock()
renew_after_fork(globals(), "_lock", threading.Lock)


class Follower(Protocol):
    """Something that learns of kernels in its calls."""

    def forget(self) -> None:
        """Drop what was learnt."""


# Unlike a WeakSet it runs no Python when a follower ends: an exception of a signal handler would be
# lost there.
_followers: set[weakref.ref[Any]] = set()


def follow(follower: Follower) -> None:
    """Have a follower forget in every new generation, as long as it lives."""
    with _lock:
        _followers.add(weakref.ref(follower, _followers.discard))


def advance() -> None:
    """Begin a generation; the choice of kernels has been made before."""
    global number
    with _lock:
        number += 1
        followers = [each() for each in _followers.copy()]
    for follower in filter(None, followers):
        follower.forget()


def cached(function: _Function) -> _Function:
    """Cache a function's results for the present generation."""

    @functools.lru_cache(_MAX_KEPT)
    def of_generation(_: int, *args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    @functools.wraps(function)
    def of_present(*args: Any, **kwargs: Any) -> Any:
        return of_generation(number, *args, **kwargs)

    return cast(_Function, of_present)
