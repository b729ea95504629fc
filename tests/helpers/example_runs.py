"""Programs of examples/ on a GPU, as a reader runs them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.helpers import kernels

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """What Python did with these; the test is skipped where kernels are missing."""
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=500,
        env=os.environ | variables,
    )  # fmt: skip
    kernels.skip_if_missing(done.stderr)
    return done


def run_with(fault: str, example: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the `main` of an example after a statement that breaks it, of `fi_ffi` and `example`."""
    return run("-c", f"""
import sys
sys.path.insert(0, {str(example.parent)!r})
import fi_ffi
import {example.stem} as example
{fault}
example.main()
""", **variables)  # fmt: skip
