"""Blocks that a watchdog is to end, and waiting for what it does."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

import fi_ffi


class Hangs:
    """The block of a watchdog whose end is to raise `HangError`."""

    def __init__(self, seconds: float, **options: object) -> None:
        self.dog = fi_ffi.watchdog(seconds, **options)

    def __enter__(self) -> Hangs:
        self.dog.__enter__()
        return self

    def __exit__(self, *raised: object) -> None:
        if raised[0] is not None:
            self.dog.__exit__(*raised)
            return
        with pytest.raises(fi_ffi.HangError) as caught:
            self.dog.__exit__(None, None, None)
        self.error = caught.value


def silent(report: str) -> None:
    """An `on_hang` that leaves the test's output alone."""


def until(condition: Callable[[], object], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.002)
