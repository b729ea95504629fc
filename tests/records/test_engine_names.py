"""What `tools/record_engine_names.py` counts as taken of FlashInfer, on files written for it."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "record_engine_names.py"
sys.path.insert(0, str(TOOL.parent))
from record_engine_names import taken  # noqa: E402


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("from flashinfer.norm import rmsnorm as r", {("flashinfer.norm", "rmsnorm")}),
        ("def f():\n    from flashinfer import page\n    page.append(1)",
         {("flashinfer", "page"), ("flashinfer.page", "append")}),
        ("import flashinfer\nflashinfer.norm.rmsnorm(x)",
         {("flashinfer.norm", "rmsnorm"), ("flashinfer", "norm")}),
        ("import flashinfer.comm as comm\ncomm.all_reduce", {("flashinfer.comm", "all_reduce")}),
        ("late('flashinfer.fused_moe', 'moe')", {("flashinfer.fused_moe", "moe")}),
        ("from flashinfer_x import y\nfrom .flashinfer import z\nimport flashinfer_x.a", set()),
        ("choices('other', 'flashinfer')\nflashinfer.norm", set()),
    ],
    ids=["from", "in a function", "by attribute", "another name", "late", "others", "texts"],
)  # fmt: skip
def test_what_a_file_takes(text: str, found: set[tuple[str, str]]) -> None:
    assert taken(ast.parse(text)) == found


def test_what_is_counted(tmp_path: Path) -> None:
    """Functions, classes and other names of them; no modules, constants or private names."""
    wheels = {
        "flashinfer_python-9.0-py3-none-any.whl": {
            "flashinfer/__init__.py": "from .norm import rmsnorm",
            "flashinfer/norm.py": "def rmsnorm(): ...\nclass A: ...\nB = A\nC = 3\ndef _d(): ...",
        },
        "vllm-1.0-x.whl": {
            "vllm/a.py": "from flashinfer import rmsnorm, norm\nfrom flashinfer.norm import B, C",
        },
        "sglang-2.0-x.whl": {
            "sglang/a.py": "from flashinfer.norm import A, rmsnorm, _d, lacks",
            "sglang/b.txt": "from flashinfer.norm import B",
        },
    }
    for name, files in wheels.items():
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            for member, text in files.items():
                archive.writestr(member, text)
    (tmp_path / "data").mkdir()
    tool = tmp_path / TOOL.name
    tool.write_text(TOOL.read_text())
    command = [sys.executable, str(tool), *(str(tmp_path / name) for name in wheels)]
    assert subprocess.run(command, capture_output=True, text=True).stdout == "3 names\n"
    assert json.loads((tmp_path / "data" / "engine-names.json").read_text()) == {
        "flashinfer": "9.0",
        "engines": {"vllm": "1.0", "sglang": "2.0"},
        "names": {
            "A": {"sglang": ["flashinfer.norm"]},
            "B": {"vllm": ["flashinfer.norm"]},
            "rmsnorm": {"sglang": ["flashinfer.norm"], "vllm": ["flashinfer"]},
        },
    }
