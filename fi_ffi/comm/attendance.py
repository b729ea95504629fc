"""Which ranks of a group can still come: those whose process lives and which have not given up.

A rank gives up when it has waited for too long, or if an exception leaves its `with` block. It
never comes back, so no other rank may succeed in the call that it gave up, nor in a later one.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence

from fi_ffi.comm.memory import File, make_file, map_file
from fi_ffi.comm.presence import Place, has_ended
from fi_ffi.errors import LoaderError

_ITEM = 8  # bytes


class Attendance:
    """For each rank the number of the first call that it does not make; 0 while it is there.

    The ranks of a machine share these numbers: each offers a `file`, and that of the first is used.
    """

    def __init__(self, rank: int, size: int) -> None:
        self._rank, self._count = rank, size * _ITEM
        self._places: Sequence[Place] = ()
        self._calls = memoryview(bytearray(self._count)).cast("Q")
        self.file = make_file("fi_ffi.comm.attendance", self._count)

    def share(self, places: Sequence[Place], files: Sequence[File]) -> None:
        """Use the file that all ranks of this machine use."""
        self._places = places
        first = [place.machine for place in places].index(places[self._rank].machine)
        # If the first rank has given up already, the ranks' next meeting says so. Where processes
        # may not open each other's files, each learns from its own timeout.
        with contextlib.suppress(LoaderError):
            mapped = map_file(places[first].process, files[first], self._count)
            self._calls = memoryview(mapped).cast("Q")

    def close_file(self) -> None:
        """Close the offered file, once every rank of the machine has opened the one in use."""
        os.close(self.file.descriptor)

    def close(self) -> None:
        """Let go of the shared memory, and keep what is known."""
        self._calls = memoryview(bytearray(self._calls)).cast("Q")

    def leave(self, call: int) -> None:
        """Record that this rank gives up: it does not make a call, nor later ones."""
        self._calls[self._rank] = self._calls[self._rank] or call

    def given_up(self, call: int | None = None) -> set[int]:
        """Return the other ranks that have given up: any call, or one up to this number."""
        others = ((rank, first) for rank, first in enumerate(self._calls) if rank != self._rank)
        return {rank for rank, first in others if first and (call is None or first <= call)}

    def ended(self) -> set[int]:
        """Return the ranks whose processes have ended."""
        return {rank for rank, place in enumerate(self._places) if has_ended(place)}

    def missing(self) -> set[int]:
        """Return the ranks that cannot come any more."""
        return self.ended() | self.given_up()
