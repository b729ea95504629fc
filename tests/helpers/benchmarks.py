"""Modules of benchmarks/ that tests use.

The folder is not left on the path: names in it (`attention`, `llm`) are those of folders of tests.
"""

from __future__ import annotations

import sys
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"

sys.path.insert(0, str(BENCHMARKS))
try:
    import host_calls
    from marks import replans, ways
    from marks.noop_kernel import kernels_replaced, noop
    from marks.turns import Call, Timing, measure
finally:
    sys.path.remove(str(BENCHMARKS))

__all__ = [
    "BENCHMARKS", "Call", "Timing", "host_calls", "kernels_replaced", "measure", "noop", "replans",
    "ways",
]  # fmt: skip
