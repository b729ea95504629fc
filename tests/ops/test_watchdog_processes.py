"""Watchdogs in processes of their own: how one is ended, and what is written and imported."""

from __future__ import annotations

import re
import textwrap

import pytest

from fi_ffi.watch.watchdog import EXIT_STATUS

from tests.helpers import children

PROGRAM = """
import sys
import fi_ffi
before = set(sys.modules)
import threading, time
import numpy as np
from fi_ffi.ops.call.op import Op
from fi_ffi.ops.call.row import Row, Scalar, Tensor
from fi_ffi.reference import norm

ROW = Row("slow", "norm", "slow", "here", "Slow.",
          (Tensor("y", "h", "T", "result", writes=True), Scalar("seconds", float, None, "time")),
          {"T": ("float16",)}, ">=0")
norm.KERNELS["norm"]["slow"] = lambda y, seconds: time.sleep(seconds)
OP = Op(ROW)

def slow(seconds):
    OP(np.zeros(8, np.float16), seconds)
"""


def child(code: str) -> tuple[int, str, str]:
    return children.done(PROGRAM + textwrap.dedent(code), seconds=60)


def test_abort_ends_the_process_with_everybodys_tracebacks():
    status, out, err = child("""
        def main():
            with fi_ffi.watchdog(0.2, abort=True):
                slow(50.0)

        threading.Thread(target=time.sleep, args=(50.0,), daemon=True).start()
        try:
            main()
        finally:
            print("never")
    """)
    assert (status, out) == (EXIT_STATUS, "") and EXIT_STATUS == 124
    assert err.startswith("fi_ffi.watchdog(0.2): slow has not returned")
    assert "  seconds: 50.0" in err
    for function in ("main", "slow", "_report"):
        assert re.search(rf'File ".*", line \d+ in {function}\n', err)


def test_abort_takes_place_though_on_hang_fails_or_blocks():
    status, out, err = child("""
        def on_hang(report):
            print(report.splitlines()[0], flush=True)
            raise ValueError("mine")

        with fi_ffi.watchdog(0.2, on_hang=on_hang, abort=True):
            slow(50.0)
    """)
    assert status == 124 and "slow has not returned" in out
    assert "ValueError: mine" in err and "most recent call first" in err
    status, out, err = child("""
        from fi_ffi.watch import watchdog
        watchdog._LAST_PATIENCE = 0.5
        with fi_ffi.watchdog(0.2, on_hang=lambda report: time.sleep(500.0), abort=True):
            slow(500.0)
    """)
    assert status == 124


def test_a_process_may_exit_with_a_watchdog_open():
    status, _, err = child("""
        fi_ffi.watchdog(5.0).__enter__()
        slow(0.01)
    """)
    assert (status, err) == (0, "")


@pytest.mark.parametrize("stderr", ["None", "Closed()"])
def test_without_a_stderr_of_python_the_process_has_one(stderr):
    status, _, err = child(f"""
        class Closed:
            def write(self, text): raise ValueError("closed")
            def flush(self): pass

        sys.stderr = {stderr}
        with fi_ffi.watchdog(0.1):
            slow(0.3)
    """)
    assert status == 0
    assert "slow has not returned" in err


def test_importing_fi_ffi_imports_no_watchdog():
    status, out, err = child("""
        names = ("call_record", "stream_progress", "watchdog")
        late = {f"fi_ffi.watch.{name}" for name in names}
        print(*sorted(late & before))
        assert fi_ffi.watchdog is fi_ffi.watchdog
        assert "fi_ffi.watch.watchdog" in sys.modules and "watchdog" in dir(fi_ffi)
    """)
    assert (status, out.strip()) == (0, ""), err
