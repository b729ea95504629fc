"""The generated pages are those that the tables give now, and notice when they are not."""

from __future__ import annotations

import inspect
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fi_ffi
from fi_ffi.capability.known_issues import KNOWN_ISSUES
from fi_ffi.loader import search
from fi_ffi.loader.fetch.wheels_lock import the_lock
from fi_ffi.ops.functions import OPS
from tools.entries import entries_of

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import generate_coverage as coverage  # noqa: E402
import record_called as record  # noqa: E402

GENERATORS = sorted(path.name for path in (ROOT / "tools").glob("generate_*.py"))


def check(root: Path, generator: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(root / "tools" / generator), "--check"]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.parametrize("generator", GENERATORS)
def test_what_is_generated_is_fresh(generator):
    done = check(ROOT, generator)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_stale_page_is_noticed(tmp_path):
    for name in ("fi_ffi", "tools"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "wheels.lock", tmp_path)
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs" / "coverage.md"
    page.write_text((ROOT / "docs" / "coverage.md").read_text() + "\n")
    done = check(tmp_path, "generate_coverage.py")
    assert done.returncode == 1
    assert "coverage.md is stale: run python3 tools/generate_coverage.py" in done.stdout


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
    assert all(page.count(f"\n| {name} | ") == 2 for name in OPS)
    assert all(issue.cause in page and issue.advice in page for issue in KNOWN_ISSUES)


def test_what_was_called_is_merged():
    run = {"device": "a GPU", "capability": [9, 0], "release": "0.6.13"}
    first = record.merged({"runs": []}, run | {"entries": {"norm": ["rmsnorm"]}})
    more = {"norm": ["layernorm"], "page": ["append_paged_kv_cache"]}
    second = record.merged(first, run | {"entries": more})
    assert [one["entries"] for one in second["runs"]] == [more | {"norm": ["layernorm", "rmsnorm"]}]
    other = record.merged(second, run | {"release": "0.6.3", "entries": more})
    assert [one["release"] for one in other["runs"]] == ["0.6.13", "0.6.3"]
    assert json.loads(record.text(other)) == other


def test_coverage_counts_what_is_built_typed_and_called():
    made = coverage.built(entries_of(the_lock().default_release))
    assert made["norm"] >= {"rmsnorm", "fused_qk_rmsnorm_rope"} and "run_moe" in made["fused_moe"]
    typed = {("norm", "rmsnorm"), ("batch_prefill:fa3", "paged_run"), ("single_decode", "run")}
    assert typed <= coverage.typed()
    line = coverage._row("norm", {"a", "b"}, {("norm", "a")}, {("norm", "b")})
    assert line == "| norm | 2 | 1 | 1 | `a` |"


def test_pages_are_short():
    """Of the words that are written by hand; 25,000 is the aim."""
    import words

    counts = [
        words.words(page.read_text()) for page in words.pages() if not words.is_generated(page)
    ]
    assert sum(counts) <= 25_000


def test_which_release_has_what():
    """The README's table says what `supports` does."""
    lines = (ROOT / "README.md").read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("| | 0.6.13"))
    rows = [re.split(r" ?\| ?", line)[1:-1] for line in lines[start : start + 6]]
    releases = [cell.partition(",")[0] for cell in rows[0][1:]]
    for names, *cells in rows[2:]:
        asked = {"stateIndex_dtype": "int64"} if "indices of int64" in names else {}
        for name in re.findall("`([^`]+)`", names):
            for release, cell in zip(releases, cells, strict=True):
                answer = getattr(fi_ffi, name).supports(90, release=release, **asked)
                told = "fetched" if answer else "`fi-ffi build`" if answer.build else "not in it"
                if answer and "pins none" in answer.reason:
                    told = "install its wheel"
                assert cell == told, (name, release, answer)


def test_options_of_wrappers_are_there():
    """What the table sends a reader to is an option of the plan, or an argument of its run.

    tests/releases/test_wrappers.py holds each row for each of FlashInfer's wrappers.
    """
    page = (ROOT / "docs" / "howto" / "from-flashinfer.md").read_text()
    rows = re.search(r"^## Options of wrappers$.*?(?=^## )", page, re.M | re.S)[0].splitlines()
    own = {*inspect.signature(fi_ffi.BatchPrefillPlan).parameters, "rope_scale", "sink"}
    own |= {*inspect.signature(fi_ffi.BatchPrefillPlan.paged_run).parameters, "custom_mask"}
    own |= {*inspect.signature(fi_ffi.BatchMlaPlan).parameters}
    own |= {*inspect.signature(fi_ffi.BatchMlaPlan.run).parameters}
    for row in rows:
        theirs, _, here = (row.split(" | ") + [""] * 3)[:3]
        named = re.findall(r"`(\w+)=", here)
        if here.startswith("the same"):
            named += set(re.findall(r"`(\w+)`", theirs)) - {"head_dim", "q_scale", "k_scale"}
        assert own.issuperset(set(named) - {"v_scale", "enable_pdl"}), row


def test_the_search_order_is_the_codes():
    """The places of loading.md's table, which `doctor` prints and the picture draws."""
    import generate_pictures as pictures

    page = (ROOT / "docs" / "loading.md").read_text()
    rows = re.findall(r"^\| (\w+) \| ([^|]+\|[^|]+)", page.partition("## Which CUDA")[0], re.M)
    assert [kind for kind, _ in rows] == ["explicit", *search.kinds_asked()]
    drawn = (ROOT / "docs" / "search.svg").read_text()
    for kind, told in rows:
        named = {*re.findall(r"FI_FFI_\w+|FLASHINFER_\w+", told)}
        assert named <= {*re.findall(r"\w+", pictures.SETTINGS[kind])}, kind
        assert f">{kind}<" in drawn and all(name in drawn for name in named)
