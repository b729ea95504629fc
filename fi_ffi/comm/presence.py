"""Which ranks are there: the process of each, and whether it has ended."""

from __future__ import annotations

import functools
import os
import socket
from typing import NamedTuple

from fi_ffi.errors import ArgumentError, let_through

_FLAGS, _STARTED = 6, 19  # fields of /proc/PID/stat after the process's name
_EXITING = 4  # PF_EXITING in a process's flags: it ends, or has ended


class Process(NamedTuple):
    """A process. Its start tells it from a later process that has the same number."""

    pid: int
    started: int  # clock ticks after the machine's start; 0 without /proc


class Place(NamedTuple):
    """Where a rank is: its machine, process and GPU."""

    machine: str
    process: Process
    bus_id: str  # "" on the CPU


def _status(pid: int) -> list[str]:
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()


@functools.cache
def this_process() -> Process:
    """Return the process that calls."""
    pid = os.getpid()
    try:
        return Process(pid, int(_status(pid)[_STARTED]))
    except (OSError, IndexError) as error:
        let_through(error)
        return Process(pid, 0)


os.register_at_fork(after_in_child=this_process.cache_clear)


def check_process(op: str, what: str, owner: Process) -> None:
    """Raise `ArgumentError` in a process that does not own the object, such as a forked child.

    The child shares its parent's memory and connections, and would answer in the parent's place.
    """
    if owner != this_process():
        got = f"a {what} of process {owner.pid}"
        expected = f"one of this process, {os.getpid()}: a forked child makes its own"
        raise ArgumentError(op, "self", got=got, expected=expected)


@functools.cache
def this_machine() -> str:
    """Return an identity shared by ranks that see each other's processes; containers may differ."""
    with open("/proc/sys/kernel/random/boot_id") as file:
        boot = file.read().strip()
    return f"{socket.gethostname()} {boot} {os.stat('/proc/self/ns/pid').st_ino}"


def has_ended(place: Place) -> bool:
    """Return whether a rank's process is known to have ended, or to be ending."""
    if place.machine != this_machine():
        return False
    try:
        status = _status(place.process.pid)
        is_another = int(status[_STARTED]) != place.process.started
        return is_another or bool(int(status[_FLAGS]) & _EXITING)
    except (OSError, IndexError) as error:
        let_through(error)
        return True
