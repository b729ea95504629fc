"""So many wrong calls of a family; also as a program, for a run that may crash.

python -m tests.stress.bad_input.run FAMILY COUNT SEED JOURNAL
"""

from __future__ import annotations

import collections
import functools
import os
import random
import resource
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

from fi_ffi.families import FAMILIES

from . import known
from .functions import Functions
from .guard import guarded
from .plans import Plans
from .rows import Call, one_call, one_signature, rows_of

_MOST_MEMORY = 12 * 2**30

# A subject makes one wrong call and returns what became of it; before, it tells of the call.
Subject = Callable[[random.Random, Callable[[str], None]], str]


class Journal:
    """What is done now, in a file that is there after a crash."""

    def __init__(self, path: Path | None) -> None:
        self._file = None if path is None else os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        self.now = ""

    def __call__(self, text: str) -> None:
        self.now = text
        if self._file is not None:
            line = f"{text}\n".encode(errors="replace")
            os.pwrite(self._file, line, 0)
            os.ftruncate(self._file, len(line))


class Family:
    """Wrong calls of a family's rows; a right call of each serves many times."""

    def __init__(self, family: str, number: int, first_only: bool) -> None:
        self.rows, self.number = rows_of(family, first_only), number
        # Right calls of each row, of other dtypes and variants.
        self.kinds = 1 if first_only else 6
        self._calls: dict[tuple[int, int], Call] = {}

    def __call__(self, rng: random.Random, tell: Callable[[str], None]) -> str:
        at = rng.randrange(len(self.rows)), rng.randrange(self.kinds)
        if at not in self._calls:
            self._calls[at] = Call(self.rows[at[0]], random.Random(f"{self.number} {at}"))
        # Taken out while it is used: after a failure there may be anything in its room.
        call = self._calls.pop(at)
        outcome = (one_signature if rng.random() < 0.04 else one_call)(call, rng, tell)
        self._calls[at] = call
        return outcome


def subjects(number: int = 0, first_only: bool = False) -> dict[str, Callable[[], Subject]]:
    """What there is to call, by name."""
    others = {"matmul": known.MATMUL, "moe": known.MOE, "single": known.SINGLE, "host": known.HOST}
    return {
        **{name: functools.partial(Family, name, number, first_only) for name in FAMILIES},
        **{name: functools.partial(Functions, calls) for name, calls in others.items()},
        "plans": functools.partial(Plans, number),
    }


def run(
    name: str, count: int, number: int, *, first_only: bool = False, journal: Path | None = None
) -> collections.Counter[str]:
    """So many calls, of a seed; how many came to what.  Raises for the first that is wrong."""
    told = Journal(journal)
    outcomes: collections.Counter[str] = collections.Counter()
    subject = subjects(number, first_only)[name]()
    numbers = random.Random(number)
    with guarded():
        for draw in (numbers.getrandbits(64) for _ in range(count)):
            try:
                outcomes[subject(random.Random(draw), told)] += 1
            except Exception as error:
                raise AssertionError(f"{told.now}\n{type(error).__name__}: {error}") from error
    return outcomes


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # numpy's, of values that are no numbers
    # What asks for all memory gets a MemoryError, and the machine stays usable.
    resource.setrlimit(resource.RLIMIT_AS, (_MOST_MEMORY, _MOST_MEMORY))
    family, count, number, path = sys.argv[1:]
    found = run(family, int(count), int(number), journal=Path(path))
    print(f"{family}: {sum(found.values())} calls of seed {number}: {dict(found.most_common())}")
