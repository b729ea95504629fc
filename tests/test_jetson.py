"""docs/howto/jetson.md without a Jetson: kernels built for 8.7, found, asked and refused."""

from __future__ import annotations

import json
import os
import platform
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import fi_ffi
from fi_ffi.cli import build as build_command
from fi_ffi.cli import main
from fi_ffi.errors import ArgumentError, BuildError
from fi_ffi.loader import cache, machine, runtime, search
from fi_ffi.loader.kernels import open_source
from fi_ffi.modules import files
from fi_ffi_build import environment
from fi_ffi_build.build import build
from fi_ffi_build.environment import open_workshop

OTHER = "aarch64" if platform.machine() == "x86_64" else "x86_64"
OP = "append_paged_kv_cache"


@pytest.fixture
def jetson(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, built_wheel_sm87: Path) -> Path:
    """A cache with the wheel where `fi-ffi build` puts it, and no variable that names kernels."""
    for name in (search.KERNELS, search.SOURCES, search.WHEELS, search.RELEASE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("FLASHINFER_WORKSPACE_BASE", str(tmp_path / "nobody"))
    libtvm_ffi = runtime.ensure_tvm_ffi()
    assert libtvm_ffi.path
    root = tmp_path / "cache"
    monkeypatch.setenv(cache.ENVIRONMENT, str(root))
    (root / "wheels").mkdir(parents=True)
    shutil.copy(built_wheel_sm87, root / "wheels")
    runtime.use_source(None)
    yield root
    monkeypatch.undo()
    runtime.use_source(None)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments, catch_exceptions=False)


def asked(*arguments: str, code: int) -> dict[str, Any]:
    result = run("doctor", *arguments, "--json")
    assert result.exit_code == code, result.output
    (answer,) = json.loads(result.stdout)
    assert answer["works"] == (code == 0)
    return answer


def test_it_is_found_without_a_variable(jetson: Path) -> None:
    source, file, facts = search.find_module("page")
    assert Path(source.location).parent == jetson / "wheels"
    assert [code.name for code in facts.codes] == ["sm_87"]
    assert search.release() == "0.6.13"
    found = json.loads(run("inspect", str(file.path), "--json").stdout)
    assert (found["architectures"], found["machine"]) == (["sm_87"], platform.machine())
    assert found["functions"][OP].startswith("(DLTensor")  # asked of the function, without a GPU


@pytest.mark.parametrize(
    ("sm", "op", "reasons", "arch"),
    [
        ("87", OP, ["compiled for sm_87", "entry attested"], None),
        ("90", OP, ["nothing is here yet", "pinned wheel"], None),
        ("87", "rmsnorm", ["has no module norm"], "8.7 norm"),
        ("87", "gdn_prefill", ["9.x"], None),
        ("87", "gemm_fp8_nt_groupwise", ["10.x or 12.x"], None),
    ],
)
def test_yes_or_no_with_the_reason(
    jetson: Path, sm: str, op: str, reasons: list[str], arch: str | None
) -> None:
    works = "compiled for" in reasons[0] or "nothing is here yet" in reasons[0]
    answer = asked(op, "--sm", sm, code=0 if works else 1)
    assert answer["sm"] == int(sm) and all(reason in answer["reason"] for reason in reasons)
    assert answer["build"] == (arch and f"fi-ffi build --release 0.6.13 --arch {arch}")
    text = run("doctor", op, "--sm", f"{sm[0]}.{sm[1]}").stdout
    assert f" {'yes' if works else 'no'} " in text
    assert (f"`{answer['build']}` builds it where fi_ffi finds it" in text) == bool(arch)


def test_no_where_it_is_the_only_place(jetson: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(search.SOURCES, "local")
    runtime.use_source(None)
    answer = asked(OP, "--sm", "90", code=1)
    assert "sm_87 only" in answer["reason"]
    assert answer["build"] == "fi-ffi build --release 0.6.13 --arch 9.0a page"


def test_a_familys_entry_is_not_said_to_be_attested(built_wheel: Path) -> None:
    answer = asked("single_decode", "--sm", "90", "--kernels", str(built_wheel), code=0)
    runtime.use_source(None)
    assert "compiled for sm_90a" in answer["reason"] and "attested" not in answer["reason"]


def test_no_where_the_entry_is_another(jetson: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise fi_ffi.AbiError("the binary does not have the declared interface")

    monkeypatch.setattr(runtime, "kernel_entry", refuse)
    answer = asked(OP, "--sm", "87", code=1)
    assert "declared interface" in answer["reason"]


def test_no_where_the_driver_is_old(jetson: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """JetPack 6: an Orin, and a driver of CUDA 12.6."""
    from fi_ffi.cli import cuda

    monkeypatch.setattr(cuda, "driver_version", lambda: (12, 6))
    monkeypatch.setattr(machine, "device_count", lambda: 1)
    monkeypatch.setattr(machine, "capability", lambda device: (8, 7))
    answer = asked(OP, code=1)
    assert "driver: CUDA 12.6" in answer["reason"] and "13.0 or later" in answer["reason"]


def test_what_cannot_be_told_is_no_answer(jetson: Path) -> None:
    wrong = [("no_such_op", "--sm", "87"), ("--sm", "87")]
    if not machine.device_count():
        wrong.append((OP,))  # no GPU, and none named
    assert [run("doctor", *arguments).exit_code for arguments in wrong] == [2] * len(wrong)


def test_another_gpu_is_refused_by_name(jetson: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the file is opened: neither dlopen nor a kernel sees it."""
    monkeypatch.setattr(machine, "capability", lambda device: (9, 0))
    monkeypatch.setattr(machine, "device_count", lambda: 1)
    monkeypatch.setattr(runtime, "_opened", lambda *_: pytest.fail("it was opened"))
    monkeypatch.setenv(search.SOURCES, "local")
    runtime.use_source(None)
    with pytest.raises(fi_ffi.ArchitectureError) as caught:
        runtime.load("page", 0)
    assert "page has sm_87 only; the device is sm_90" in str(caught.value)
    assert "fi-ffi build --release 0.6.13 --arch 9.0a page" in str(caught.value)


def test_the_published_wheels_are_not_for_it(jetson: Path) -> None:
    shutil.rmtree(jetson / "wheels")
    runtime.use_source(None)
    answer = fi_ffi.rmsnorm.supports(sm=87, release="0.6.13")
    assert not answer and answer.status == "missing"
    assert answer.build == "fi-ffi build --release 0.6.13 --arch 8.7 norm"


def test_build_puts_it_where_it_is_found(jetson: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []

    def built(names: list[str], **settings: Any) -> Path:
        seen.append(settings)
        return Path(settings["output"]) / "a.whl"

    monkeypatch.setattr(build_command, "build_wheel", built)
    result = run("build", "page", "--arch", "8.7")
    assert result.stdout == f"{jetson / 'wheels' / 'a.whl'}\n"
    assert "fi_ffi finds it there" in result.stderr
    assert "finds it there" not in run("build", "page", "--output", str(jetson)).stderr
    # Another processor's is of no use here.
    result = run("build", "page", "--arch", "8.7", "--cpu", OTHER)
    assert result.stdout == "a.whl\n" and "finds it there" not in result.stderr
    assert [s["cpu"] for s in seen] == [None, None, OTHER]


def test_a_wheel_for_another_processor_is_passed_over(jetson: Path) -> None:
    (wheel,) = (jetson / "wheels").iterdir()
    other = wheel.with_name(wheel.name.replace(platform.machine(), OTHER))
    wheel.rename(other)
    runtime.use_source(None)
    (place,) = [place for place in search.places() if place.kind == "local"]
    assert place.source is None and place.note == f"{other} is not for {platform.machine()}"
    assert open_source(other).modules() == ["page"]  # to be looked at


def test_the_compiler_for_another_processor(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BuildError, match=f"{OTHER}-linux-gnu-g\\+\\+ cannot be found"):
        environment.find_cxx(OTHER)
    compiler = tmp_path / f"{OTHER}-linux-gnu-g++"
    compiler.write_text("")
    compiler.chmod(0o755)
    assert environment.find_cxx(OTHER) == compiler.name
    with (
        pytest.raises(ArgumentError, match="riscv"),
        open_workshop("0.6.13", ("8.7",), tmp_path, None, None, "riscv"),
    ):
        pass


@pytest.mark.skipif(
    shutil.which(f"{OTHER}-linux-gnu-g++") is None or not os.environ.get("FI_FFI_STRESS"),
    reason="needs a C++ compiler for another processor, and FI_FFI_STRESS",
)
def test_a_cross_build(tmp_path: Path) -> None:
    wheel = build(["page"], arch="8.7", output=tmp_path, cpu=OTHER)
    assert wheel.name.endswith(f"linux_{OTHER}.whl")
    file = open_source(wheel).file("page").path
    found = json.loads(run("inspect", str(file), "--json").stdout)
    assert (found["machine"], found["architectures"]) == (OTHER, ["sm_87"])
    assert f"is for {OTHER} processors" in found["signatures_missing_because"]
    result = run("doctor", OP, "--sm", "87", "--kernels", str(wheel))
    runtime.use_source(None)
    assert result.exit_code == 1
    with pytest.raises(fi_ffi.ArchitectureError, match=f"is for {OTHER} processors"):
        files.load_file(file)
