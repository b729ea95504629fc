"""Calls of `fi_ffi.module`'s functions in a call log and inside a watchdog."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest

import fi_ffi
from fi_ffi.cli.replay import load
from fi_ffi.watch.dump import BEFORE

LIMIT, LONG = 0.25, 30.0
THE_LINE = "every.apply_typed(waits, 7)"


def test_one_that_blocks_is_reported(every):
    gate = threading.Event()

    def waits(value):
        assert gate.wait(20)
        return value + 1

    with fi_ffi.watchdog(LIMIT, on_hang=lambda report: gate.set()) as dog:
        assert every.apply_typed(waits, 7) == 8
    (report,) = dog.reports
    lines = report.splitlines()
    assert lines[0].startswith(
        f"fi_ffi.watchdog(0.25): {every.name}.apply_typed has not returned for 0."
    )
    source = Path(__file__).read_text().splitlines()
    number = next(i for i, line in enumerate(source, 1) if THE_LINE in line and "assert" in line)
    assert f"  called: {__file__}:{number} in test_one_that_blocks_is_reported" in lines[1]
    assert lines[2] == f"  entry: {every.name}.apply_typed, on the host"
    assert lines[4].startswith("  0: function <function ") and lines[5] == "  1: 7"


def test_calls_are_told_before_and_after(every, tmp_path):
    out = np.zeros(6, np.float32)
    tensors = [np.full(6, i, np.float32) for i in (1, 2)]
    path, folder = tmp_path / "log", tmp_path / "dumps"
    with fi_ffi.call_log(5, path, dump=folder):
        every.add_all(out, tensors, [3, 5])
    every.add_all(out, tensors, [3, 5])
    text = path.read_text()
    assert text.count(f" {every.name}.add_all\n") == 2, "once as a name, and once as the entry"
    assert f"  called: {__file__}:" in text
    assert f"  0: float32[6] on cpu at {out.ctypes.data:#x}\n" in text
    for i, tensor in enumerate(tensors):
        assert f"  {f'1.{i}' if i else 1}: float32[6] on cpu at {tensor.ctypes.data:#x}" in text
    assert "  2: list [3, 5]\n" in text
    before, after = text.split(" after:\n")
    assert "  0: min 0, max 0, mean 0, 0 NaN, 0 Inf\n" in before
    assert "  0: min 13, max 13, mean 13, 0 NaN, 0 Inf\n" in after
    (file,) = folder.glob(f"*{BEFORE}")
    recorded = load(file)
    assert recorded.after is not None
    assert recorded.after["0"].tolist() == [13] * 6
    assert recorded.tensors["1.1"].elements.tolist() == [2] * 6


def test_a_call_that_fails(every, tmp_path):
    path = tmp_path / "log"
    with fi_ffi.call_log(3, path), pytest.raises(fi_ffi.KernelError):
        every.fail("ValueError", "as it was told to")
    text = path.read_text()
    assert "  0: 'ValueError'\n  1: 'as it was told to'\n" in text
    assert " raised KernelError: " in text
