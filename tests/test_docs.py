"""The generated pages are those that the tables give now, and notice when they are not."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from fi_ffi.loader.lock import the_lock
from fi_ffi.ops.capability.known_issues import KNOWN_ISSUES
from fi_ffi.ops.functions import OPS
from tools.entries import entries_of

ROOT = Path(__file__).resolve().parent.parent
GENERATORS = sorted(path.name for path in (ROOT / "tools").glob("generate_*.py"))
PAGES = {
    "generate_coverage.py": "coverage.md",
    "generate_entries_docs.py": "entries.md",
    "generate_matrix.py": "matrix.md",
    "generate_ops_docs.py": "ops.md",
}


def check(root: Path, generator: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(root / "tools" / generator), "--check"]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def tool(name: str) -> ModuleType:
    """A module of tools/, which is no package."""
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(ROOT / "tools"))
    return module


@pytest.mark.parametrize("generator", GENERATORS)
def test_what_is_generated_is_fresh(generator):
    done = check(ROOT, generator)
    assert done.returncode == 0, done.stdout + done.stderr


def test_ci_checks_all_of_them():
    assert {*PAGES} < {*GENERATORS}
    assert "for generator in tools/generate_*.py" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize("generator", PAGES)
def test_a_stale_page_is_noticed(generator, tmp_path):
    for name in ("fi_ffi", "tools"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "wheels.lock", tmp_path)
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs" / PAGES[generator]
    page.write_text((ROOT / "docs" / PAGES[generator]).read_text() + "\n")
    done = check(tmp_path, generator)
    assert done.returncode == 1
    assert f"{PAGES[generator]} is stale: run python3 tools/{generator}" in done.stdout


def test_every_op_has_a_block():
    page = (ROOT / "docs" / "ops.md").read_text()
    for name, op in OPS.items():
        block = page.partition(f"\n### `{name}`\n")[2].partition("\n### ")[0]
        assert f"fi_ffi.{name}(" in block, name
        for arg in op.row.given:
            assert f"| `{arg.name}` | " in block, (name, arg.name)
        for names in op.row.dtypes.values():
            assert all(dtype in block for dtype in names), name
        assert f"entry `{op.row.symbol}` of module `{op.row.module}`" in block
        assert f"](#{name.lower()})" in page


def test_the_matrix_page_has_every_op_and_case():
    page = (ROOT / "docs" / "matrix.md").read_text()
    for name in OPS:
        assert page.count(f"\n| {name} | ") == 2, name
    for case in KNOWN_ISSUES:
        assert case.cause in page
        assert case.advice in page


RUN = {
    "device": "a GPU", "capability": [9, 0], "release": "0.6.13", "entries": {"norm": ["rmsnorm"]},
}  # fmt: skip


def test_what_was_called_is_merged():
    record = tool("record_called")
    first = record.merged({"runs": []}, RUN)
    more = {**RUN, "entries": {"norm": ["layernorm"], "page": ["append_paged_kv_cache"]}}
    second = record.merged(first, more)
    (run,) = second["runs"]
    assert run["entries"] == {
        "norm": ["layernorm", "rmsnorm"], "page": ["append_paged_kv_cache"],
    }  # fmt: skip
    other = record.merged(second, {**RUN, "release": "0.6.3"})
    assert [run["release"] for run in other["runs"]] == ["0.6.13", "0.6.3"]
    assert json.loads(record.text(other)) == other


def test_coverage_counts_what_is_built_typed_and_called():
    coverage = tool("generate_coverage")
    made = coverage.built(entries_of(the_lock().default_release))
    assert made["norm"] >= {"rmsnorm", "fused_qk_rmsnorm_rope"}
    assert "run_moe" in made["fused_moe"]
    typed = coverage.typed()
    assert {("norm", "rmsnorm"), ("batch_prefill:fa3", "paged_run"), ("single_decode", "run")} <= (
        typed
    )
    line = coverage._row("norm", {"a", "b"}, {("norm", "a")}, {("norm", "b")})
    assert line == "| norm | 2 | 1 | 1 | `a` |"
