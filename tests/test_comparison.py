"""docs/comparison.md: its numbers are as the benchmarks print them, and of what there is."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

from fi_ffi.ops.functions import OPS

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "comparison.md").read_text()


def footprint():
    spec = importlib.util.spec_from_file_location("footprint", ROOT / "benchmarks/footprint.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


def test_the_table_is_as_the_benchmark_prints_it():
    module = footprint()
    row = module.Footprint("fi-ffi", "0.1.0", 23, 32_398_827, 114_255_862, 59.1, 50.7, 75.1)
    for line in module.table([row], 11.7).splitlines():
        assert line in PAGE.splitlines(), line
    for side in module.sides("torch"):
        assert f"\n| {side.name} " in PAGE


def test_imports_are_timed_and_sizes_counted(tmp_path):
    module = footprint()
    python = Path(sys.executable)
    alone = min(module.imported(python, "") for _ in range(3))
    slow = min(module.imported(python, "import time; time.sleep(0.2)") for _ in range(3))
    assert slow - alone > 150
    times, bare = module.timed({"a": (python, ""), "b": (python, "")}, 2)
    assert [*map(len, times.values())] == [2, 2] and len(bare) == 2
    site = tmp_path / "lib" / "python3.11" / "site-packages"
    for name, size in (
        ("one/a.py", 10),
        ("one/a.pyc", 5),
        ("pip/b.py", 7),
        ("one-1.dist-info/R", 1),
    ):
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).write_bytes(b"x" * size)
    fake = tmp_path / "bin" / "python"
    fake.parent.mkdir()
    fake.write_text(
        '#!/bin/sh\necho \'[{"name": "One", "version": "1"}, {"name": "pip", "version": "2"}]\''
    )
    fake.chmod(0o755)
    assert module.installed(fake, "One") == ("1", 1, 11)


def test_a_failed_install_is_told():
    code = "from footprint import run; run(['false'])"
    command = [sys.executable, "-c", code]
    folder = ROOT / "benchmarks"
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode and "false" in done.stderr


def test_counts_are_those_of_the_table():
    assert int(re.search(r"\| (\d+), and \d plans", PAGE)[1]) == len(OPS)


def test_call_figures_stand_in_performance():
    """A fact stands once: what is quoted is there."""
    performance = (ROOT / "docs" / "performance.md").read_text()
    table = PAGE.partition("## A call")[2]
    for number in re.findall(r"\b\d+,\d{3}\b|\b154\b|\b633\b", table):
        assert number in performance, number
