"""Facts are remembered by content, checked when in doubt, and never a reason to fail."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from fi_ffi.loader import held
from fi_ffi.loader.kernels import open_source
from fi_ffi.ops.functions import OPS

ATTEST = """
import sys
from fi_ffi.abi import function
from fi_ffi.loader import runtime
from fi_ffi.ops.table import ROWS
asked = []
probe = function.probe
runtime.probe = lambda entry: (asked.append(entry.name), probe(entry))[1]
for name in ("rmsnorm", "layernorm"):
    row = next(row for row in ROWS if row.name == name)
    runtime.kernel_entry(row.module, row.signature, row.releases)
print(len(asked), "elftools" in sys.modules)
"""


@pytest.fixture
def norm(built_wheel, tmp_path, monkeypatch):
    monkeypatch.setenv("FI_FFI_CACHE_DIR", str(tmp_path))
    return open_source(built_wheel).file("norm")


def attest(wheel, **variables):
    import os

    environment = os.environ | {"FI_FFI_KERNELS": str(wheel)} | variables
    command = [sys.executable, "-c", ATTEST]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_a_second_process_asks_nothing_again(built_wheel, tmp_path):
    where = {"FI_FFI_CACHE_DIR": str(tmp_path)}
    # What a new cache needs of libtvm_ffi is not what is looked at here.
    assert attest(built_wheel, **where)[0] == "2"
    assert attest(built_wheel, **where) == ["0", "False"]
    assert attest(built_wheel, FI_FFI_PARANOID="1", **where) == ["2", "True"]


def test_facts_are_the_files(norm):
    found = held.facts_of(norm)
    assert [code.name for code in found.codes] == ["sm_90a"]
    assert "libcudart.so.13" in found.needed
    norm_rows = [op.row for op in OPS.values() if op.row.module == "norm"]
    assert {row.symbol for row in norm_rows} <= set(found.functions)
    assert held.facts_of(norm) == found


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", '{"format": 0}', '{"format": 2, "data": {"codes": 7}}', "null", "\0"],
)
def test_damaged_facts_are_read_anew(norm, text):
    before = held.facts_of(norm)
    path = held._path(norm.sha256)
    path.write_text(text)
    assert held.facts_of(norm) == before
    assert json.loads(path.read_text())["data"]["functions"] == before.functions


@pytest.mark.parametrize(
    ("field", "value"),
    [("needed", [7]), ("functions", [None]), ("runpath", 5), ("signatures", {"rmsnorm": 1}),
     ("codes", [{"kind": "sass", "sm": "90", "suffix": "a"}]),
     ("codes", [{"kind": "cubin", "sm": 90, "suffix": "a"}]),
     ("codes", [{"kind": "sass", "sm": 90, "suffix": "z"}])],
    ids=str,
)  # fmt: skip
def test_facts_of_another_type_are_read_anew(norm, field, value):
    """A file that JSON reads, and that is of this format, may still be damaged."""
    before = held.facts_of(norm)
    path = held._path(norm.sha256)
    whole = json.loads(path.read_text())
    if field == "codes":  # all that a code has, but for what is wrong
        value = [whole["data"]["codes"][0] | value[0]]
    path.write_text(json.dumps(whole | {"data": whole["data"] | {field: value}}))
    assert held.facts_of(norm) == before
    assert json.loads(path.read_text()) == whole


def test_a_cache_that_cannot_be_written_does_not_matter(norm, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FI_FFI_CACHE_DIR", str(tmp_path / "file" / "below"))
    assert held.facts_of(norm).functions
