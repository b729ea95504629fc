"""docs/comparison.md: its numbers are as the benchmark prints them, which counts what there is."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "comparison.md").read_text()


@pytest.fixture(scope="module")
def footprint():
    spec = importlib.util.spec_from_file_location("footprint", ROOT / "benchmarks/footprint.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


def test_the_table_is_as_the_benchmark_prints_it(footprint):
    row = footprint.Footprint("fi-ffi", "0.1.0", 23, 32_398_827, 114_255_862, 59.1, 50.7, 75.1)
    for line in footprint.table([row], 11.7).splitlines():
        assert line in PAGE.splitlines(), line
    for side in footprint.sides("torch"):
        assert f"\n| {side.name} " in PAGE


def test_imports_are_timed_and_sizes_counted(footprint, tmp_path):
    python = Path(sys.executable)
    alone = min(footprint.imported(python, "") for _ in range(3))
    slow = min(footprint.imported(python, "import time; time.sleep(0.2)") for _ in range(3))
    assert slow - alone > 150
    times, bare = footprint.timed({"a": (python, ""), "b": (python, "")}, 2)
    assert [*map(len, times.values())] == [2, 2] and len(bare) == 2
    sizes = {"one/a.py": 10, "one/a.pyc": 5, "pip/b.py": 7, "one-1.dist-info/R": 1}
    for name, size in sizes.items():
        file = tmp_path / "lib" / "python3.11" / "site-packages" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"x" * size)
    fake = tmp_path / "bin" / "python"
    fake.parent.mkdir()
    found = '[{"name": "One", "version": "1"}, {"name": "pip", "version": "2"}]'
    fake.write_text(f"#!/bin/sh\necho '{found}'")
    fake.chmod(0o755)
    assert footprint.installed(fake, "One") == ("1", 1, 11)


def test_a_failed_install_is_told(footprint):
    with pytest.raises(SystemExit, match="false"):
        footprint.run(["false"])
