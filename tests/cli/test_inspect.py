"""`fi-ffi inspect`: what a library needs of libtvm_ffi."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from fi_ffi.cli import main
from fi_ffi.loader import tvm_ffi

from tests.helpers import compiler

SOURCE = Path(__file__).parents[1] / "loader" / "own_module.cc"
UNKNOWN = "TVMFFIOfNoRelease"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("inspected")
    return compiler.library(SOURCE, folder / "own_module.so")


def run(*arguments: object) -> str:
    result = CliRunner().invoke(main, ["inspect", *map(str, arguments)], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    return result.output


def test_a_module_of_the_kernels_in_use(made, tmp_path, monkeypatch):
    (tmp_path / "norm").mkdir()
    shutil.copy(made, file := tmp_path / "norm" / "norm.so")
    monkeypatch.setenv("FI_FFI_KERNELS", str(tmp_path))
    document = json.loads(run("norm", "--json"))
    assert document["file"] == str(file)
    assert document["functions"] == json.loads(run(file, "--json"))["functions"] != {}
    result = CliRunner().invoke(main, ["inspect", "page"])
    assert result.exit_code == 1 and f"{tmp_path} has no module page" in result.output


def test_what_it_needs_and_since_when(made):
    document = json.loads(run(made, "--json"))
    needs, releases = document["tvm_ffi"], tvm_ffi.releases_record()["releases"]
    installed = importlib.metadata.version(tvm_ffi.PROJECT)
    assert installed in needs["compiled_for"] and len(needs["compiled_for"]) < len(releases)
    assert [*needs["exported_by"]] == document["requires"]
    assert needs["exported_by"]["TVMFFIErrorSetRaised"] == "all"
    assert needs["exported_by"]["_ZTIN3tvm3ffi9ModuleObjE"] == "all"
    text = run(made)
    span = tvm_ffi.span(needs["compiled_for"], releases)
    assert f"compiled with {span}, by its symbols" in text
    assert f"{len(document['requires'])} symbols of libtvm_ffi" in text
    assert "_ZTIN3tvm3ffi9ModuleObjE" in text


def test_a_symbol_that_no_release_has(made, tmp_path):
    source = tmp_path / "needing.c"
    source.write_text(f"int {UNKNOWN}(void); int needing(void) {{ return {UNKNOWN}(); }}")
    path = compiler.library(source, tmp_path / "needing.so")
    document = json.loads(run(path, "--json"))
    assert document["tvm_ffi"] == {"compiled_for": [], "exported_by": {UNKNOWN: "none"}}
    assert UNKNOWN in document["signatures_missing_because"]
    releases = tvm_ffi.releases_record()["releases"]
    assert f"none from {releases[0]} to {releases[-1]} fits its symbols" in run(path)
