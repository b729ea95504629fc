"""How long the stress tests go on: short in CI, at full length with FI_FFI_STRESS=long; and
whether it is under compute-sanitizer."""

from __future__ import annotations

import os

IS_SANITIZED = os.environ.get("FI_FFI_SANITIZER") == "1"
LONG = bool(os.environ.get("FI_FFI_STRESS"))


def scaled(full: int, short: int) -> int:
    """How many times: `full` is what docs/testing.md states, `short` is CI's."""
    return full if LONG else short
