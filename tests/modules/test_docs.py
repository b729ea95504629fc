"""The example of docs/modules.md that needs no GPU, and what it says it prints."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import fi_ffi

DOCS = Path(fi_ffi.__file__).parents[1] / "docs" / "modules.md"


def test_the_example_prints_what_it_says(testing_library, tmp_path):
    blocks = re.findall(r"```(python)?\n(.*?)```", DOCS.read_text(), re.DOTALL)
    (language, code), (_, printed) = blocks[:2]
    assert language == "python" and "libtvm_ffi_testing" in code
    shutil.copy(testing_library, tmp_path)
    search = {"PYTHONPATH": str(DOCS.parents[1]), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=search | {"FI_FFI_CACHE_DIR": str(tmp_path / "cache"), "HOME": str(Path.home())},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == printed


def test_every_type_in_the_table_is_taken(every):
    """What the table of types says is there has a packer."""
    from fi_ffi.abi.packing import packer_of

    table = DOCS.read_text().partition("| type | takes | gives |")[2].partition("\n\n")[0]
    spelled = re.findall(r"`([^`]+)`", "\n".join(r.split(" | ")[0] for r in table.splitlines()))
    assert len(spelled) > 20
    for text in spelled:
        text = text.replace("<T>", "<int>").replace("<K, V>", "<str, int>").replace("...", "int")
        assert callable(packer_of(text))
