"""`fi_ffi_build`: what it refuses, how it explains a failure, and a real build."""

from __future__ import annotations

import json
import os
import platform
import re
import signal
import stat
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fi_ffi.catalogue.families import DEFAULT_RELEASE, FAMILIES
from fi_ffi.catalogue.requests import parse_arch, parse_request, parse_requests, with_options
from fi_ffi.errors import ArgumentError, BuildError
from fi_ffi.loader import machine
from fi_ffi.loader.cache import cache_root
from fi_ffi.loader.kernels import cuda_of, facts_of, open_source
from fi_ffi.loader.search import parse_release
from fi_ffi_build import environment as building
from fi_ffi_build.build import (
    _compile,
    _package,
    available,
    build,
    left_out,
    run_ninja,
    write_index,
)
from fi_ffi_build.environment import Missing, Progress, Toolkit, Workshop, missing_part
from fi_ffi_build.questions import question_of
from fi_ffi_build.wheel_writer import WheelContents, write_wheel

from tests.helpers import remains, sampling


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("9.0a", ("9.0a",)),
        ("9.0", ("9.0a",)),
        (["10.0a", "8.7,9.0a", "8.7", "12.0f"], ("8.7", "9.0a", "10.0a", "12.0f")),
        (["87", "sm_87", "sm87", "8.7"], ("8.7",)),
        (["90", "90a", "SM_90a", "120f sm_103a"], ("9.0a", "10.3a", "12.0f")),
    ],
)
def test_architectures(given: str | list[str], expected: tuple[str, ...]) -> None:
    assert parse_arch(given) == expected


def test_what_is_refused_before_anything_is_done() -> None:
    for given in ("", "sm_9", "sm-90", "9.0b", "70", "7.0", "9", "987", "9.0a;rm", []):
        with pytest.raises(ArgumentError, match="argument `arch`"):
            parse_arch(given)
    assert parse_release("0.7.2.post1") == "0.7.2.post1"
    for text in ("", "latest", "0.6.13+cu130", "../0.6.13", "0"):
        with pytest.raises(ArgumentError, match="argument `release`"):
            parse_release(text)
    for names in ([], "norm"):
        with pytest.raises(ArgumentError, match="a sequence of at least one name"):
            parse_requests(names, ("9.0a",))
    with pytest.raises(ArgumentError, match="argument `jobs`: got 0"):
        build(["norm"], jobs=0)


def test_exact_names_are_left_to_flashinfer() -> None:
    assert question_of(parse_request("norm"), DEFAULT_RELEASE) == {"text": "norm", "exact": True}


def test_an_exact_name_tells_its_backend_and_takes_no_options() -> None:
    name = (
        "single_prefill_with_kv_cache_dtype_q_bf16_dtype_kv_bf16_dtype_o_bf16_head_dim_qk_192_"
        "head_dim_vo_128_posenc_0_use_swa_True_use_logits_cap_False_f16qk_False_sm90"
    )
    assert parse_request(name).exact
    with pytest.raises(ArgumentError, match=r"expected 9\.0a, which 'single_prefill"):
        parse_requests([name], ("8.7",))
    arguments = question_of(parse_request(name), DEFAULT_RELEASE)["arguments"]
    assert arguments.items() >= {
        "dtype_q": "torch.bfloat16", "head_dim_qk": 192, "head_dim_vo": 128,
        "use_sliding_window": True, "use_logits_soft_cap": False, "backend": "fa3",
    }.items()  # fmt: skip
    assert with_options([name, "batch_mla"], {"dtype": ["bf16"]}) == [name, "batch_mla:dtype=bf16"]


def test_family_defaults_and_options() -> None:
    plain = question_of(parse_request("single_decode"), DEFAULT_RELEASE)["arguments"]
    assert isinstance(plain, dict)
    assert (plain["dtype_q"], plain["dtype_kv"], plain["head_dim_vo"]) == (
        "torch.float16", "torch.float16", 128,
    )  # fmt: skip
    text = "batch_prefill:dtype=bf16,kv_dtype=e4m3,head_dim=192x128,use_sliding_window=1"
    chosen = question_of(parse_request(text), DEFAULT_RELEASE)["arguments"]
    assert isinstance(chosen, dict)
    assert (chosen["dtype_q"], chosen["dtype_kv"]) == ("torch.bfloat16", "torch.float8_e4m3fn")
    assert (chosen["head_dim_qk"], chosen["head_dim_vo"]) == (192, 128)
    assert chosen["use_sliding_window"] is True


@pytest.mark.parametrize(
    "text",
    [
        "single_decode:backend=fa2",
        "single_decode:dtype=f32",
        "single_decode:head_dim=0",
        "single_decode:head_dim",
        "single_decode:dtype=f16,dtype=bf16",
        "norm:dtype=f16",
        "../norm",
        "",
    ],
)
def test_names_refused(text: str) -> None:
    with pytest.raises(ArgumentError, match="argument `modules"):
        parse_request(text)


def test_unknown_family_option_names_the_known_ones() -> None:
    with pytest.raises(ArgumentError, match=r"dtype=…, kv_dtype=…, head_dim=…"):
        parse_request("batch_decode:dtyp=f16")


def test_fa3_needs_its_architecture() -> None:
    assert len(parse_requests(["batch_prefill:backend=fa3"], ("8.0", "9.0a"))) == 1
    with pytest.raises(ArgumentError, match=r"9\.0a, which 'batch_prefill:backend=fa3' needs"):
        parse_requests(["batch_prefill:backend=fa3"], ("8.7",))


def test_options_are_spread_over_the_families_that_take_them() -> None:
    names = ["norm", "single_decode", "batch_prefill:dtype=f16"]
    spread = with_options(names, {"dtype": ["f16", "bf16"], "backend": ["fa2", "fa3"]})
    assert spread == [
        "norm",
        "single_decode:dtype=f16",
        "single_decode:dtype=bf16",
        "batch_prefill:dtype=f16,backend=fa2",
        "batch_prefill:dtype=f16,backend=fa3",
    ]
    assert with_options(["norm", "page"], {"dtype": []}) == ["norm", "page"]
    with pytest.raises(ArgumentError, match="argument `backend`"):
        with_options(["norm"], {"backend": ["fa2"]})


def test_no_compiler_is_said_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(BuildError, match=r"no C\+\+ compiler: c\+\+ or g\+\+"):
        building.find_cxx()
    monkeypatch.setenv("CXX", "icpx -std=c++17")
    with pytest.raises(BuildError, match="icpx"):
        building.find_cxx()


def _script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def _fake_nvcc(home: Path, release: str) -> Path:
    return _script(
        home / "bin" / "nvcc",
        'case "$1" in\n'
        f'--version) echo "Cuda compilation tools, release {release}, V{release}.1";;\n'
        f'-dryrun) echo "#$ TOP={home}/bin/.." >&2;;\n'
        "--list-gpu-arch) echo compute_87; echo compute_90;;\n"
        "esac",
    )


def test_toolkits_are_found_behind_scripts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = _fake_nvcc(tmp_path / "real", "13.0")
    _script(tmp_path / "bin" / "nvcc", f'exec {real} "$@"')
    _fake_nvcc(tmp_path / "old", "12.6")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "old"))
    monkeypatch.setenv("CUDA_PATH", str(tmp_path / "absent"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    found = building.find_toolkits()
    assert found[:2] == [Toolkit(tmp_path / "old", "12.6"), Toolkit(tmp_path / "real", "13.0")]
    assert found[0].major == 12


def test_an_architecture_that_nvcc_does_not_know(tmp_path: Path) -> None:
    _fake_nvcc(tmp_path, "13.0")
    toolkit = Toolkit(tmp_path, "13.0")
    building.check_architectures(toolkit, ["8.7", "9.0a"])
    with pytest.raises(ArgumentError, match=r"one of 8\.7, 9\.0 \(CUDA 13\.0"):
        building.check_architectures(toolkit, ["12.0f"])


def test_nvcc_of_cuda_12_knows_no_families(tmp_path: Path) -> None:
    _fake_nvcc(tmp_path, "12.8")
    with pytest.raises(ArgumentError, match=r"9\.0f.*9\.0a: nvcc of CUDA 12\.8 knows no families"):
        building.check_architectures(Toolkit(tmp_path, "12.8"), ["8.7", "9.0f"])
    building.check_architectures(Toolkit(tmp_path, "12.9"), ["9.0f"])


def test_what_an_older_nvcc_leaves_out() -> None:
    names = ["norm", "fused_moe_90", "fp4_quantization_90"]
    assert left_out("12.8", [*names, "fp8_blockscale_gemm_90"]) == left_out("13.0", names) == []
    of_moe, of_fp4 = left_out("12.6", names)
    assert of_moe.startswith("fused_moe_90: nvcc of CUDA 12.6 leaves out the modes fp8_block_scale")
    assert of_fp4.startswith("fp4_quantization_90: ") and of_fp4.endswith("which 12.8 has")
    assert left_out("12.4", ["norm", "page"]) == []
    with pytest.raises(ArgumentError, match="cuda.*got 12.6.*12.8 or later for fp8_blockscale_"):
        left_out("12.6", ["norm", "fp8_blockscale_gemm_90"])


@pytest.mark.parametrize("release", ["0.6.13", "0.7.2.post1"])
def test_what_flashinfer_leaves_out_of_older_builds(release: str) -> None:
    """The switches of its generators, and no other."""
    root = cache_root() / "build" / f"env-{release}"
    found = sorted(root.glob("lib/python3.*/site-packages/flashinfer/jit/**/*.py"))
    if not found:
        pytest.skip(f"no environment of FlashInfer {release} was made on this machine")
    texts = {path.name: path.read_text() for path in found}
    switched = {
        name
        for name, text in texts.items()
        if re.search(r'"-DENABLE_\w+"[,)\s]*if is_cuda_version_at_least\("12.8"\)', text)
    }
    assert switched == {"fp8_blockscale.py", "fused_moe.py", "fp4_quantization.py"}


@pytest.mark.parametrize("given", ["12.8", "13.0", "12", "13"])
def test_a_cuda_to_build_with(given: str) -> None:
    assert building.parse_cuda(given) == given


@pytest.mark.parametrize("given", ["cu128", "11.8", "12.x", "", "14", "12.8.1"])
def test_a_cuda_that_is_none(given: str) -> None:
    with pytest.raises(ArgumentError, match=r"argument `cuda`.*such as 12\.8"):
        build(["page"], cuda=given)


@pytest.mark.parametrize(
    ("driver", "major"), [(None, "13"), ((13, 0), "13"), ((12, 6), "12"), ((11, 8), "12")]
)
def test_without_one_it_is_what_the_driver_runs(
    driver: tuple[int, int] | None, major: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "_runtime", None)
    monkeypatch.setattr(machine, "runtimes_in_process", dict)
    monkeypatch.setattr(machine, "driver_version", lambda: driver)
    assert building.parse_cuda(None) == major


def test_the_toolkit_of_that_cuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several on a machine the one that is asked for; the index has none before 13."""
    homes = {release: tmp_path / release for release in ("13.0", "12.6", "12.8")}
    kits = {release: Toolkit(home, release) for release, home in homes.items()}
    environment, said = building.Environment(tmp_path / "env"), list[str]()
    monkeypatch.setattr(building, "find_toolkits", lambda: list(kits.values()))
    for cuda, release in (("12.8", "12.8"), ("12", "12.6"), ("13", "13.0")):
        assert building.choose_toolkit(environment, cuda, said.append) == kits[release]
    assert said == []
    with pytest.raises(BuildError) as caught:
        building.choose_toolkit(environment, "12.9", said.append)
    text = str(caught.value)
    for part in ("no nvcc of CUDA 12.9", "(there is: 13.0, 12.6, 12.8)", "CUDA_HOME", "JetPack"):
        assert part in text
    assert len(said) == 3 and "not of CUDA 12.9: not used" in said[0]
    assert kits["12.8"].tag == "cu128"


def test_the_indexs_packages_of_either_cuda(tmp_path: Path) -> None:
    """Those of CUDA 13 share a folder, each of CUDA 12 has its own."""
    for major, folders in ((12, ("cublas", "cuda_nvrtc")), (13, ("cu13",))):
        root = tmp_path / str(major)
        for name in folders:
            (root / "nvidia" / name / "include").mkdir(parents=True)
            (root / "nvidia" / name / "lib").mkdir()
        (root / "nvidia" / folders[-1] / "lib" / f"libnvrtc.so.{major}").touch()
        assert [found.name for found in building._cuda_roots(root)] == sorted(folders)
        found = building._find_in(root, "libnvrtc.so.")
        assert found is not None and found.parent.parent.name == folders[-1]
        assert building._find_in(root, "libcurand.so.") is None


def test_a_wheel_of_cuda_12(tmp_path: Path) -> None:
    """`page` by this machine's nvcc of CUDA 12, which the index does not have."""
    sampling.only_in_full("compiles kernels")
    toolkit = next((kit for kit in building.find_toolkits() if kit.major == 12), None)
    if toolkit is None:
        pytest.skip("no nvcc of CUDA 12 on this machine")
    wheel = build(["page"], arch="9.0a", output=tmp_path, cuda=toolkit.release)
    assert f"+{toolkit.tag}.sm90a-" in wheel.name
    file = open_source(wheel).file("page")
    facts = facts_of(file)
    assert cuda_of(facts) == 12 and [code.name for code in facts.codes] == ["sm_90a"]


@pytest.mark.parametrize(
    ("line", "missing"),
    [
        ("a.h:25:10: fatal error: cublasLt.h: No such file or directory", ("cublas", "")),
        ("a.h:25:10: fatal error: nvtx3/nvToolsExt.h: No such file or directory", ("nvtx", "")),
        ("a.h:25:10: fatal error: my.h: No such file or directory", None),
        ("/usr/bin/ld: cannot find -lnvrtc: No such file or directory", ("nvrtc", "nvrtc")),
        ("/usr/bin/ld.gold: error: cannot find -lcublasLt", ("cublas", "cublasLt")),
        ("ld.lld: error: unable to find library -lcublas", ("cublas", "cublas")),
        ("mold: fatal: library not found: curand", ("curand", "curand")),
        ("/usr/bin/ld: cannot find -lmine", None),
        ("error: expected ;", None),
    ],
)
def test_missing_parts_of_cuda_are_recognised(line: str, missing: Missing | None) -> None:
    assert missing_part(f"x\n{line}\ny") == missing


def test_a_library_is_linked_by_a_name_without_a_version(tmp_path: Path) -> None:
    library = tmp_path / "home" / "lib" / "libnvrtc.so.13"
    library.parent.mkdir(parents=True)
    library.write_text("")
    (library.parent / "libnvrtc-builtins.so.13.0").write_text("")
    assert building.find_library(tmp_path / "home", "libnvrtc.so.") == library
    assert building.find_library(tmp_path / "home", "libcublas.so.") is None
    for _ in range(2):  # a link that is there already is replaced
        building.add_link(tmp_path, "nvrtc", library)
    assert (tmp_path / "libnvrtc.so").resolve() == library


def _workshop(tmp_path: Path, ninja_says: str, said: list[str]) -> Any:
    """As much of a workshop as compiling takes, with a ninja of its own."""
    script = _script(tmp_path / "ninja", ninja_says)
    links = tmp_path / "link"
    links.mkdir()
    workshop = SimpleNamespace(
        environment=SimpleNamespace(ninja=lambda: str(script)), toolkit="the toolkit",
        link_folder=links, log=tmp_path / "log", variables=dict, say=said.append,
        report=lambda progress: None,
    )  # fmt: skip
    workshop.fetch = lambda missing: Workshop.fetch(workshop, missing)
    return workshop


def test_libraries_are_fetched_as_they_are_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A linker that wants two, one after the other; each is fetched once."""
    wanted = ("cublas", "nvrtc")
    tests = "\n".join(
        f"[ -e link/lib{name}.so ] || {{ echo 'ld: cannot find -l{name}'; exit 1; }}"
        for name in wanted
    )
    workshop, fetched = _workshop(tmp_path, f"cd {tmp_path}\n{tests}", []), []

    def fetch(environment: object, name: str, toolkit: object, say: object) -> Path:
        fetched.append(name)
        assert (environment, toolkit) == (workshop.environment, "the toolkit")
        return _script(tmp_path / "index" / f"lib{name}.so.13", "")

    monkeypatch.setattr(building, "install_library", fetch)
    answer = {"folder": str(tmp_path), "modules": []}
    _compile(workshop, answer, 1)
    assert fetched == [*wanted]
    for name in wanted:
        assert (tmp_path / "link" / f"lib{name}.so").resolve().name == f"lib{name}.so.13"


def test_progress_goes_forward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ninja counts anew what is left, once a library was fetched: 2 of 3, then 0 of 2."""
    said: list[Progress] = []
    script = (
        f"cd {tmp_path}\n[ -e link/libnvrtc.so ] || "
        "{ echo '[1/3] a'; echo '[2/3] b'; echo 'ld: cannot find -lnvrtc'; exit 1; }\n"
        "echo '[0/2] b'; echo '[1/2] b'; echo '[2/2] c'"
    )
    workshop = _workshop(tmp_path, script, [])
    workshop.report = said.append
    made = lambda *_: _script(tmp_path / "index" / "libnvrtc.so.13", "")  # noqa: E731
    monkeypatch.setattr(building, "install_library", made)
    _compile(workshop, {"folder": str(tmp_path), "modules": []}, 1)
    steps = [(each.done, each.total) for each in said if each.stage == "compile"]
    assert steps == [(1, 3), (2, 3), (2, 3), (2, 3), (3, 3)]


def test_a_library_that_is_missed_again_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workshop = _workshop(tmp_path, "echo 'ld: cannot find -lcublas'; exit 1", [])
    monkeypatch.setattr(building, "install_library", lambda *_: _script(tmp_path / "lib", ""))
    with pytest.raises(BuildError, match=r"libcublas\.so is missing"):
        _compile(workshop, {"folder": str(tmp_path), "modules": []}, 1)


def _ninja(tmp_path: Path, text: str, log: Path) -> list[tuple[int, int]]:
    steps: list[tuple[int, int]] = []
    script = _script(tmp_path / "ninja", text)
    run_ninja([str(script)], tmp_path, {}, log, lambda *step: steps.append(step))
    return steps


def test_ninja_progress(tmp_path: Path) -> None:
    log = tmp_path / "log"
    steps = _ninja(tmp_path, "echo '[1/2] nvcc a.cu'; echo noise; echo '[2/2] c++ a.o'", log)
    assert steps == [(1, 2), (2, 2)]
    assert "noise" in log.read_text()


def test_a_failure_shows_the_compilers_words(tmp_path: Path) -> None:
    log = tmp_path / "log"
    text = (
        "echo '[1/2] nvcc --error-limit good.cu'\n"
        "echo 'FAILED: [code=2] /x/bad.cuda.o '\n"
        "echo 'a.cu(3): error: identifier \"foo\" is undefined'\n"
        "echo 'ninja: build stopped: subcommand failed.'; exit 1"
    )
    with pytest.raises(BuildError) as caught:
        _ninja(tmp_path, text, log)
    assert caught.value.log == str(log)
    assert 'compiling bad.cuda.o failed:\na.cu(3): error: identifier "foo"' in str(caught.value)
    assert "good.cu" not in str(caught.value)
    assert "good.cu" in log.read_text()


def test_memory_running_out_is_named(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="use fewer --jobs"):
        _ninja(tmp_path, "echo 'FAILED: a.o'; echo Killed; exit 1", tmp_path / "log")


def test_an_interruption_ends_ninja(tmp_path: Path) -> None:
    script = _script(tmp_path / "ninja", f"echo $$ > {tmp_path}/pid; echo '[1/2] a'; exec sleep 60")

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    # A process that was started in the background ignores it, and so do its children.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        begun = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            run_ninja([str(script)], tmp_path, {}, tmp_path / "log", interrupt)
        assert time.monotonic() - begun < 10
    finally:
        signal.signal(signal.SIGINT, before)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_the_index_keeps_all_modules(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "build.ninja").write_text("")
    index = write_index(tmp_path, [tmp_path / "b" / "build.ninja"])
    assert index.read_text().count("subninja") == 2
    stamp = index.stat().st_mtime_ns
    write_index(tmp_path, [])
    assert index.stat().st_mtime_ns == stamp


def test_a_real_wheel(built_wheel: Path) -> None:
    with zipfile.ZipFile(built_wheel) as archive:
        names = archive.namelist()
        for module in ("norm", "page"):
            member = f"flashinfer_jit_cache/jit_cache/{module}/{module}.so"
            assert archive.read(member)[:4] == b"\x7fELF"
        assert any("single_decode" in name for name in names)


def test_names_that_are_none_suggest_known_ones(built_wheel_sm87: Path, tmp_path: Path) -> None:
    """Also one that only looks like a family's."""
    name = "batch_mla_attention_dtype_q_f16_dtype_kv_f16_dtype_o_f16_dtype_idx_i64"
    said: list[Progress] = []
    told = pytest.raises(ArgumentError, match="got 'norn'.*; did you mean norm")
    with remains.allowed("said"), told:  # what it reports is kept
        build(["norn", name, "page"], arch="8.7", output=tmp_path, report=said.append)
    # Before anything is installed.
    assert said[0].message == "no module 'norn' is known; the nearest: norm"
    answer = cache_root() / "build" / f"{DEFAULT_RELEASE}-8.7" / "answer.json"
    assert json.loads(answer.read_text())["failed"] == dict.fromkeys(["norn", name], "unknown")


def test_what_is_available(built_wheel_sm87: Path) -> None:
    entries = {entry.name: entry for entry in available(arch="8.7")}
    assert (entries["page"].kind, entries["page"].sources) == ("module", 2)
    assert {name for name, entry in entries.items() if entry.kind == "family"} == set(FAMILIES)


def test_a_second_build_compiles_nothing(built_wheel_sm87: Path, tmp_path: Path) -> None:
    seen: list[Progress] = []
    again = build(["page"], arch="8.7", output=tmp_path, report=seen.append)
    assert again.read_bytes() == built_wheel_sm87.read_bytes()
    assert [progress.stage for progress in seen if progress.stage == "compile"] == []


@pytest.mark.parametrize("keep", [True, False])
def test_a_build_adds_to_the_wheel_that_is_there(tmp_path: Path, keep: bool) -> None:
    """With what was there bit for bit, and without `keep` in its place."""
    files = {name: tmp_path / f"{name}.so" for name in ("older", "page", "both")}
    for name, file in files.items():
        file.write_bytes(name.encode())
    tags = (DEFAULT_RELEASE, "13.0", ("sm87",), f"linux_{platform.machine()}")
    there = write_wheel(
        WheelContents(*tags, dict.fromkeys(("older", "both"), files["older"])), tmp_path
    )
    workshop = SimpleNamespace(
        cpu=None, toolkit=Toolkit(tmp_path, "13.0"), environment=SimpleNamespace(licenses=dict),
        report=(seen := []).append,
    )  # fmt: skip
    made = [{"name": name, "library": str(files[name])} for name in ("page", "both")]
    answer = {"release": tags[0], "architectures": tags[2], "git_version": "", "modules": made}
    assert _package(workshop, answer, tmp_path, keep) == there
    with zipfile.ZipFile(there) as archive:
        names = [name for name in archive.namelist() if name.endswith(".so")]
        got = {Path(name).stem: archive.read(name).decode() for name in names}
    assert got == {"page": "page", "both": "both"} | ({"older": "older"} if keep else {})
    (progress,) = seen
    assert progress.message.startswith("adding to" if keep else "replacing")
