"""Locks in forked children: the thread that had one is not there to give it back."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any


def renew(names: dict[str, Any], name: str, make: Callable[[], Any]) -> None:
    """Let a forked child have a new lock in place of the one that a module calls `name`."""
    os.register_at_fork(after_in_child=lambda: names.update({name: make()}))
