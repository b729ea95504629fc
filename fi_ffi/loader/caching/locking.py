"""One process at a time makes an object; nobody waits who only wants to use one.

The locks save work and nothing hangs on them: without them, or with locks that do
not work, several processes make the same file and the first to finish wins.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from fi_ffi.loader.caching import temporaries

PATIENCE = 300.0  # seconds; a holder that is stopped, or lost, holds nobody up for longer
_POLL = 0.02

_held = threading.local()


@contextlib.contextmanager
def turn(root: Path, key: str, done: Callable[[], bool]) -> Iterator[bool]:
    """Wait for the lock of `key`, or until `done()`; whether it is this caller's turn.

    It is also the caller's turn where there can be no locks, or patience ran out.
    A thread that has the turn already gets it again.
    """
    keys: set[tuple[Path, str]] = _held.__dict__.setdefault("keys", set())
    if (root, key) in keys:
        yield True
        return
    with contextlib.ExitStack() as stack:
        mine = _wait(root, key, done, stack)
        if mine:
            keys.add((root, key))
            stack.callback(keys.discard, (root, key))
        yield mine


def _wait(root: Path, key: str, done: Callable[[], bool], stack: contextlib.ExitStack) -> bool:
    from filelock import FileLock, Timeout  # takes longer to import than a warm load

    try:
        temporaries.make_root(root)
        temporaries.make_folder(root / "locks")
        path = root / "locks" / f"{key}.lock"
        lock = FileLock(path)
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            temporaries.removed_at_exit.add(path)
            try:
                stack.enter_context(lock.acquire(timeout=0))
                # Before it is released.  One who has it open gets a lock that excludes
                # nobody, and finds the file made.
                stack.callback(_remove, path)
                return True
            except Timeout:
                temporaries.removed_at_exit.discard(path)  # another process's
                if done():
                    return False
                time.sleep(_POLL)
    # No directory to put them in, or a file system that has none.
    except (OSError, NotImplementedError):
        pass
    return True


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()
    temporaries.removed_at_exit.discard(path)
