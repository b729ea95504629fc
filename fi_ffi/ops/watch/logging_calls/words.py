"""A call in words, at each level."""

from __future__ import annotations

import os
from collections.abc import Iterator
from datetime import datetime

from fi_ffi.ops.watch.logging_calls.told import Told

NAMES, ARGUMENTS, STATISTICS = 1, 3, 5
LEVELS = (0, NAMES, ARGUMENTS, STATISTICS)


def head(told: Told, what: str) -> str:
    """The first of the lines that are written together."""
    now = datetime.now().isoformat(" ", "microseconds")
    return f"[{now} {os.getpid()}] #{told.number} {what}"


def lines(told: Told, level: int) -> Iterator[str]:
    """What is told before a call is made."""
    yield head(told, told.name)
    if level < ARGUMENTS:
        return
    if told.caller:
        yield f"  called: {told.caller}"
    place = "" if told.device is None else f", on {told.device}"
    if told.stream is not None:
        place += f", stream {told.stream:#x}"
    yield f"  entry: {told.entry}{place}"
    for arg in told.arguments:
        yield f"  {arg.name}: {arg}"
    if told.plan_words:
        yield f"  plan: {told.plan_words}"
