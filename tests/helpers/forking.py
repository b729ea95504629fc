"""Children by fork: they start at once, with everything imported."""

from __future__ import annotations

import os
import threading
import traceback
from collections.abc import Callable

# filelock, where it is imported, refuses a fork beside another thread's.
_one_at_a_time = threading.Lock()


def fork(run: Callable[[], object]) -> int:
    """The id of a child that runs it; it exits with 1 where that raises."""
    with _one_at_a_time:
        pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        run()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def wait(pid: int) -> int:
    """The child's exit status, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def in_child(run: Callable[[], object]) -> int:
    return wait(fork(run))
