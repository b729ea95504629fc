"""What the module's run-time compiler needs, and what it does to a process as it is loaded."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest

import fi_ffi
from fi_ffi.loader import runtime
from fi_ffi.ops.moe import deepgemm


@pytest.fixture
def headers(tmp_path) -> Path:
    folder = tmp_path / "include" / "deep_gemm"
    folder.mkdir(parents=True)
    (folder / "fp8_gemm_impl.cuh").touch()
    return folder.parent


@pytest.fixture
def nvcc(tmp_path, monkeypatch) -> Path:
    path = tmp_path / "nvcc"
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    monkeypatch.setenv("TRTLLM_DG_NVCC_COMPILER", str(path))
    return path


def test_where_the_module_makes_its_folders(monkeypatch, tmp_path):
    monkeypatch.setenv("TRTLLM_DG_CACHE_DIR", str(tmp_path / "a"))
    assert runtime.deepgemm_folder() == tmp_path / "a"
    monkeypatch.delenv("TRTLLM_DG_CACHE_DIR")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert runtime.deepgemm_folder() == tmp_path / "home" / ".tensorrt_llm"
    runtime.check_deepgemm_folder()
    assert {path.name for path in runtime.deepgemm_folder().iterdir()} == {"tmp", "cache"}
    monkeypatch.delenv("HOME")
    assert runtime.deepgemm_folder().name == "tensorrt_llm"


def test_a_home_that_cannot_be_written(monkeypatch, tmp_path):
    file = tmp_path / "file"
    file.touch()
    monkeypatch.delenv("TRTLLM_DG_CACHE_DIR", raising=False)
    monkeypatch.setenv("HOME", str(file))
    with pytest.raises(fi_ffi.LoaderError, match="TRTLLM_DG_CACHE_DIR"):
        runtime.check_deepgemm_folder()
    monkeypatch.setenv("TRTLLM_DG_CACHE_DIR", "")
    with pytest.raises(fi_ffi.LoaderError, match="empty"):
        runtime.check_deepgemm_folder()


def test_which_compiler(monkeypatch, tmp_path, nvcc):
    assert deepgemm.compiler() == str(nvcc)
    monkeypatch.delenv("TRTLLM_DG_NVCC_COMPILER")
    (tmp_path / "bin").mkdir()
    os.link(nvcc, tmp_path / "bin" / "nvcc")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert deepgemm.compiler() == str(tmp_path / "bin" / "nvcc")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "none"))
    assert deepgemm.compiler() is None
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert deepgemm.compiler() == str(tmp_path / "bin" / "nvcc")


@pytest.mark.parametrize("value", ["/a", b"/a", Path("/a"), 3, None])
def test_include_dirs_are_a_list(value):
    with pytest.raises(fi_ffi.ArgumentTypeError, match="include_dirs"):
        fi_ffi.set_deepgemm_jit_include_dirs(value)


def test_include_dirs_have_the_headers(tmp_path, nvcc):
    with pytest.raises(fi_ffi.ArgumentError, match="deep_gemm/fp8_gemm_impl.cuh"):
        fi_ffi.set_deepgemm_jit_include_dirs([tmp_path])


@pytest.mark.parametrize("name", ["with space", "a;b", "$HOME", "quo'te", "ümlaut"])
def test_include_dirs_that_a_shell_would_read_otherwise(name, tmp_path):
    with pytest.raises(fi_ffi.ArgumentError, match="a shell|letters"):
        fi_ffi.set_deepgemm_jit_include_dirs([tmp_path / name])


def test_a_cache_that_a_shell_would_read_otherwise(headers, nvcc, monkeypatch, tmp_path):
    monkeypatch.setenv("TRTLLM_DG_CACHE_DIR", str(tmp_path / "a b"))
    with pytest.raises(fi_ffi.LoaderError, match="TRTLLM_DG_CACHE_DIR"):
        fi_ffi.set_deepgemm_jit_include_dirs([headers])


def test_without_a_compiler(headers, monkeypatch, tmp_path):
    monkeypatch.setenv("TRTLLM_DG_NVCC_COMPILER", str(tmp_path / "none"))
    monkeypatch.setenv("TRTLLM_DG_CACHE_DIR", str(tmp_path))
    with pytest.raises(fi_ffi.LoaderError, match="nvcc"):
        fi_ffi.set_deepgemm_jit_include_dirs([headers])


def test_the_cpu_has_none(headers, nvcc, monkeypatch, tmp_path):
    monkeypatch.setenv("TRTLLM_DG_CACHE_DIR", str(tmp_path))
    with pytest.raises(fi_ffi.ArgumentError, match="device"):
        fi_ffi.set_deepgemm_jit_include_dirs([headers], "cpu")
    with pytest.raises(fi_ffi.ArgumentTypeError, match="device"):
        fi_ffi.set_deepgemm_jit_include_dirs([headers], "gpu")


def test_the_module_is_told(headers, nvcc, monkeypatch, tmp_path, recording):
    from fi_ffi.loader import runtime

    module = recording()
    monkeypatch.setenv("TRTLLM_DG_CACHE_DIR", str(tmp_path))
    asked = []

    def entry(name, signature, releases, device):
        asked.append((name, device))
        return module.entry(signature.name)

    monkeypatch.setattr(runtime, "kernel_entry", entry)
    monkeypatch.setattr("fi_ffi.ops.call.cuda.current", lambda device: contextlib.nullcontext())
    fi_ffi.set_deepgemm_jit_include_dirs([headers], "cuda:1")
    assert module.last() == f"dirs: {headers}"
    fi_ffi.set_deepgemm_jit_include_dirs([])
    assert module.last() == "dirs:"
    assert asked == [("fused_moe_90", 1), ("fused_moe_90", 0)]
