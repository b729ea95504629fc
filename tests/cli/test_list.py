"""`fi-ffi list`."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from fi_ffi.cli import main
from fi_ffi.loader import search
from fi_ffi.loader.search import Candidate
from fi_ffi.module_names import uri

DECODE = uri("batch_decode", release="0.6.13", dtype_q="bf16", dtype_kv="e4m3", head_dim_qk=192,
             head_dim_vo=128, use_sliding_window=True)  # fmt: skip
FA3 = uri("batch_prefill", release="0.6.13", dtype_q="f16", head_dim_qk=128, backend="fa3")


@pytest.fixture
def kernels(tmp_path):
    folder = tmp_path / "flashinfer_jit_cache" / "jit_cache"
    for module in ("norm", "mine", DECODE, FA3):
        (folder / module).mkdir(parents=True)
        (folder / module / f"{module}.so").write_bytes(b"no library")
    (folder.parent / "_build_meta.py").write_text('__version__ = "0.6.13+cu130"\n')
    return str(tmp_path)


def run(*arguments: str):
    return CliRunner().invoke(main, ["list", *arguments])


def test_lines(kernels):
    result = run("--kernels", kernels)
    assert result.exit_code == 0, result.output
    head, *lines = result.output.splitlines()
    assert head == f"4 modules of {kernels}, FlashInfer 0.6.13+cu130"
    assert lines[0] == "batch_decode: 1"
    # Whole names, however long: they are there to be copied.
    assert lines[1].split() == [
        "q=bf16,kv=e4m3,o=bf16", "192x128", "use_sliding_window=True", "10", DECODE,
    ]  # fmt: skip
    assert lines[2:4] == ["batch_prefill: 1", f"  f16  128  fa3           10  {FA3}"]
    assert lines[4:6] == ["mine: 1", "           10  mine"]
    assert lines[6].startswith("norm: 1; ops: rmsnorm, ")


def test_json(kernels):
    document = json.loads(run("--kernels", kernels, "--json", "--family", "batch_prefill").output)
    assert document["version"] == "0.6.13+cu130"
    dtypes = dict.fromkeys(("dtype_q", "dtype_kv", "dtype_o"), "f16") | {"dtype_idx": "i32"}
    assert document["modules"] == [{
        "module": FA3, "kernels": kernels, "family": "batch_prefill", "dtypes": dtypes,
        "head_dims": [128, 128], "backend": "fa3", "options": {}, "ops": [], "size": 10,
    }]  # fmt: skip
    norm = json.loads(run("--kernels", kernels, "--json", "--family", "norm").output)
    assert "rmsnorm" in norm["modules"][0]["ops"]


def test_an_unknown_family_names_the_known_ones(kernels):
    result = run("--kernels", kernels, "--family", "prefill")
    assert result.exit_code == 1
    assert "no modules of prefill; it has batch_decode, batch_prefill, mine, norm" in result.output


def test_a_broken_module_hides_no_other(kernels):
    result = run("--kernels", kernels, "--entries")
    assert result.exit_code == 0
    assert result.output.count("unreadable: ") == 4


def test_entries_of_a_real_wheel(built_wheel):
    result = run("--kernels", str(built_wheel), "--entries", "--json")
    assert result.exit_code == 0, result.output
    modules = {entry["family"]: entry for entry in json.loads(result.output)["modules"]}
    assert "append_paged_kv_cache" in modules["page"]["entries"]
    assert modules["page"]["architectures"] == ["sm_90a"]
    assert modules["single_decode"]["entries"] == ["run"]


def test_the_first_place_with_modules_is_listed(monkeypatch, kernels):
    """And without any it says where they come from."""
    monkeypatch.setenv("FI_FFI_KERNELS", kernels)
    search.use_source(None)
    assert "4 modules of" in run().output
    places = [Candidate("installed", None, "nothing is installed"), Candidate("jit", None)]
    monkeypatch.setattr(search, "places", lambda: iter(places))
    result = run()
    assert result.exit_code == 1
    for text in (
        "installed: nothing is installed",
        "FI_FFI_KERNELS",
        "fi-ffi build --release 0.6.13 norm",
    ):
        assert text in result.output
    monkeypatch.undo()
    search.use_source(None)


def test_the_matrix_of_a_release():
    result = run("--matrix", "--release", "0.6.13")
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert lines[0].strip() == "FlashInfer 0.6.13, the cu130 wheels"
    assert lines[1].split()[:4] == ["op", "SM75", "SM80", "SM87"]
    rows = {line.split()[0]: line.split()[1:] for line in lines[2:] if "  " in line}
    assert rows["rmsnorm"][0] == "built"
    assert rows["gdn_prefill"][lines[1].split().index("SM100") - 1] == "-"
    assert "--family OP shows the reasons" in lines[-1]


def test_the_matrix_of_an_op_has_its_reasons(kernels):
    result = run("--matrix", "--release", "0.6.13", "--family", "gdn_prefill")
    assert "it is written for GPUs of compute capability 9.x" in result.output
    assert "gdn_prefill_sm90 is in FlashInfer 0.6.13's cu130 wheels" in result.output
    result = run("--matrix", "--release", "0.6.13", "--family", "rmsnrm")
    assert result.exit_code == 1
    assert "no op or family 'rmsnrm'; the nearest: rmsnorm, " in result.output
    assert run("--kernels", kernels, "--release", "0.6.13").exit_code == 2


def test_the_matrix_of_kernels_as_json(built_wheel):
    result = run("--matrix", "--kernels", str(built_wheel), "--json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.output)
    assert document["kernels"] == str(built_wheel)
    ops = document["ops"]
    assert ops["rmsnorm"]["90"]["works"]
    assert not ops["rmsnorm"]["100"]["works"]
    assert ops["rmsnorm"]["100"]["build"].endswith("--arch 10.0a norm")
    assert ops["single_decode"]["90"]["works"]
    case = document["cases"]["mxfp4-moe"]
    assert case["cause"]
    assert case["answers"]["90"][0]["status"] == "missing"
