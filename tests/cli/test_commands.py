"""The commands, as a user runs them."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from fi_ffi.cli import main
from fi_ffi.loader import runtime
from fi_ffi.loader.kernels import open_source
from fi_ffi.loader.wheel import Wheel
from fi_ffi.ops.call.releases import fits
from fi_ffi.ops.functions import OPS

from tests.helpers import compiler
from tests.helpers.children import done


def run(*arguments: object, code: int = 0) -> str:
    """The command's standard output; the environment names no kernels."""
    result = CliRunner().invoke(main, [str(a) for a in arguments], env={"FI_FFI_KERNELS": None})
    assert result.exit_code == code, result.output
    return result.output


def module_of(wheel: Path, name: str) -> Path:
    return Wheel(wheel).extract(f"flashinfer_jit_cache/jit_cache/{name}/{name}.so")


@pytest.fixture
def findings_of():
    def doctor(*arguments: object, code: int = 0) -> dict[str, dict[str, str]]:
        found = json.loads(run("doctor", "--json", *arguments, code=code))
        assert all(f["status"] in ("ok", "warn", "fail", "none") for f in found)
        assert all(f["advice"] for f in found if f["status"] == "fail")
        return {finding["check"]: finding for finding in found}

    return doctor


@pytest.mark.parametrize(
    ("argument", "code", "words"),
    [("--version", 0, ["fi-ffi, version "]), ("docter", 2, ["Usage: fi-ffi ", "doctor"])],
)
def test_the_package_runs_as_the_command(argument, code, words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["fi_ffi", argument])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("fi_ffi", run_name="__main__")
    assert ended.value.code == code
    printed = capsys.readouterr()
    assert all(word in (printed.err if code else printed.out) for word in words)


@pytest.mark.parametrize("gpu", ["87", "8.7", "sm87", "sm_87"])
@pytest.mark.parametrize("option", ["--sm", "--arch"])
def test_doctor_takes_any_name_of_a_gpu(option, gpu):
    text = run("doctor", "rmsnorm", option, gpu, "--json", code=1)
    (answer,) = json.loads(text)
    assert answer["sm"] == 87 and "--arch 8.7" in answer["build"]


def test_doctor_without_kernels(findings_of, monkeypatch, tmp_path):
    monkeypatch.setenv("FI_FFI_SOURCES", "local")
    monkeypatch.setenv("FI_FFI_WHEELS", str(tmp_path))
    runtime.use_source(None)
    found = findings_of()
    assert found["python"]["status"] == "ok"
    assert "libcudart.so.1" in found["cudart"]["found"]
    assert "libtvm_ffi.so" in found["libtvm_ffi"]["found"]
    assert found["kernels: local"]["status"] == "none"
    assert str(tmp_path) in found["kernels: local"]["found"]
    assert found["kernels"]["status"] == "warn"
    assert "fi-ffi build" in found["kernels"]["advice"]
    text = run("doctor")
    assert "libtvm_ffi" in text and "what to do" in text


def test_doctor_attests_kernels(findings_of, built_wheel):
    found = findings_of("--kernels", built_wheel)
    assert "0.6.13" in found["kernels: explicit"]["found"]
    assert found["norm"]["found"].startswith("sm_90a, 0.6.13")
    assert found["norm entries"]["status"] == "ok"
    here = open_source(built_wheel).modules()
    for row in (op.row for op in OPS.values()):
        if row.module in here and fits(row, "0.6.13"):
            assert row.name in found[f"{row.module} entries"]["found"]
    assert "norm" in here and "page" in here


def test_doctor_fails_on_a_broken_wheel(findings_of, built_wheel, tmp_path):
    broken = tmp_path / built_wheel.name
    broken.write_bytes(built_wheel.read_bytes()[:-100])
    result = CliRunner().invoke(main, ["doctor", "--json", "--kernels", str(broken)])
    assert result.exit_code == 1
    found = {finding["check"]: finding for finding in json.loads(result.output)}
    assert found["kernels"]["status"] == "fail"
    assert str(broken) in found["kernels"]["found"]


def test_inspect_tells_signatures_and_architectures(built_wheel):
    file = module_of(built_wheel, "norm")
    document = json.loads(run("inspect", file, "--json"))
    assert document["architectures"] == ["sm_90a"]
    assert any(name.startswith("libcudart.so.1") for name in document["needed"])
    assert "libtvm_ffi.so" not in document["needed"]
    assert document["functions"]["rmsnorm"] == (
        "(DLTensor*, DLTensor*, DLTensor*, float, bool) -> void"
    )
    assert all(document["functions"].values())
    for row in (op.row for op in OPS.values() if op.row.module == "norm"):
        types = ", ".join(row.signature.params)
        assert document["functions"][row.symbol] == f"({types}) -> void"
    text = run("inspect", file)
    assert "sm_90a" in text
    assert "fused_add_rmsnorm_quant" in text


def test_inspect_of_what_is_no_library(built_wheel, tmp_path):
    """Of a wheel it shows the libraries."""
    text = tmp_path / "text.so"
    text.write_text("not a library")
    assert "Error:" in run("inspect", text, code=1)
    lines = run("inspect", built_wheel).splitlines()
    assert [line.split()[0] for line in lines if line.endswith(" yes")] == open_source(
        built_wheel
    ).modules()


def test_inspect_without_loading(built_wheel):
    program = (
        "import sys; from click.testing import CliRunner; from fi_ffi.cli import main\n"
        "result = CliRunner().invoke(main, sys.argv[1:]); print(result.output)\n"
        "assert 'norm.so' not in open('/proc/self/maps').read()\n"
        "sys.exit(result.exit_code)"
    )
    file = module_of(built_wheel, "norm")
    status, out, err = done(program, "inspect", "--no-load", "--json", str(file))
    assert status == 0, err
    document = json.loads(out)
    assert set(document["functions"].values()) == {None}
    assert document["signatures_missing_because"] == "not loaded"


HOSTILE = "\x1b]0;owned\x07\x1b[2J"
ESCAPED = r"\x1b]0;owned\x07\x1b[2J"


def test_names_of_symbols_reach_no_terminal(tmp_path):
    source, library = tmp_path / "named.c", tmp_path / f"{HOSTILE}.so"
    hostile = HOSTILE.encode()
    source.write_text("void __tvm_ffi_" + "x" * len(hostile) + "(void) {}\n")
    compiler.library(source, library)
    image = library.read_bytes()
    assert b"x" * len(hostile) in image
    library.write_bytes(image.replace(b"x" * len(hostile), hostile))
    assert HOSTILE in json.loads(run("inspect", library, "--no-load", "--json"))["functions"]
    text = run("inspect", library, "--no-load")
    assert text.replace("\n", "").count(ESCAPED) > 1  # of the file and of its function
    assert not [c for c in text if not c.isprintable() and c != "\n"]


def test_names_of_files_reach_no_terminal(tmp_path):
    path = tmp_path / HOSTILE
    for text in (run("replay", path, code=2), run("doctor", "--kernels", path, code=1)):
        assert ESCAPED in text.replace("\n", "")
        assert not [c for c in text if not c.isprintable() and c != "\n"]
