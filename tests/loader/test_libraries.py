"""What modules need beside libtvm_ffi and the CUDA runtime: found, loaded, or refused."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import cuda.pathfinder
import pytest

from fi_ffi.errors import LoaderError
from fi_ffi.loader import libraries
from fi_ffi.loader.building.environment import find_cxx
from fi_ffi.ops.cuda import own_handle

from fi_ffi import parse_device  # isort: skip


@pytest.fixture(autouse=True)
def _forget():
    libraries.load.cache_clear()
    yield
    libraries.load.cache_clear()


def test_other_libraries_are_left_to_the_linker(monkeypatch):
    loaded: list[str] = []
    monkeypatch.setattr(libraries, "load", loaded.append)
    libraries.prepare([], ["libcudart.so.13", "libcuda.so.1", "libc.so.6", "libcublas_own.so.13"])
    assert loaded == []


@pytest.mark.parametrize(
    ("file", "package"),
    [
        ("libcublas.so.13", "nvidia-cublas"),
        ("libcublasLt.so.13", "nvidia-cublas"),
        ("libnvrtc.so.13", "nvidia-cuda-nvrtc"),
    ],
)
def test_one_that_is_nowhere_names_its_package(file, package, monkeypatch):
    def absent(name):
        raise cuda.pathfinder.DynamicLibNotFoundError(f"no {name}\nlisting: ...")

    monkeypatch.setattr(cuda.pathfinder, "load_nvidia_dynamic_lib", absent)
    monkeypatch.setattr(libraries, "_in_process", lambda name: None)
    with pytest.raises(LoaderError) as caught:
        libraries.prepare([], ["libc.so.6", file])
    told = str(caught.value)
    assert file in told and f"pip install '{package}>=13,<14'" in told and "CUDA_HOME" in told
    assert "listing" not in told


def test_another_major_version_will_not_do(monkeypatch):
    found = cuda.pathfinder.LoadedDL("/x/libcublas.so.12", False, 1, "elsewhere")
    monkeypatch.setattr(cuda.pathfinder, "load_nvidia_dynamic_lib", lambda name: found)
    monkeypatch.setattr(libraries, "_in_process", lambda name: None)
    with pytest.raises(LoaderError, match=r"libcublas\.so\.13 .*found /x/libcublas\.so\.12"):
        libraries.load("libcublas.so.13")


def test_nothing_of_the_name_in_the_process():
    assert libraries._in_process("libcublas.so.99") is None
    assert libraries._in_process("libc.so.6") is not None


LOADS = """
import sys
from fi_ffi.abi import library
from fi_ffi.loader import libraries, runtime

for file in sys.argv[2:]:
    print(libraries.load(file)[1])
libraries.prepare([], sys.argv[2:])
runtime.ensure_tvm_ffi()
handle = library.open_module(sys.argv[1])
print(library.find_symbol(handle, "user") is not None)
"""


def _library(folder: Path, name: str, text: str, *flags: str) -> Path:
    source, made = folder / f"{name}.cpp", folder / name
    source.write_text(f'extern "C" {{ {text} }}\n')
    command = [*find_cxx().split(), "-shared", "-fPIC", "-o", str(made), str(source)]
    subprocess.run([*command, f"-Wl,-soname,{name}", *flags], check=True, timeout=60)
    return made


def test_a_module_finds_what_it_needs(tmp_path):
    """A module that calls cuBLAS, and a cuBLAS where only this package's search looks."""
    home = tmp_path / "cuda" / "lib64"
    home.mkdir(parents=True)
    light = _library(home, "libcublasLt.so.13", "int cublasLtThing() { return 2; }")
    heavy = _library(home, "libcublas.so.13", "int cublasThing() { return 1; }", str(light))
    module = _library(
        tmp_path, "module.so", "int cublasThing(); int user() { return cublasThing(); }",
        "-Wl,--no-as-needed", str(heavy), str(light),
    )  # fmt: skip
    command = [sys.executable, "-c", LOADS, str(module), "libcublas.so.13", "libcublasLt.so.13"]
    outside = {"CUDA_HOME": str(home.parent), "CUDA_PATH": str(home.parent)}
    root = str(Path(libraries.__file__).parents[2])
    environment = {**os.environ, **outside, "PYTHONPATH": root}
    environment.pop("LD_LIBRARY_PATH", None)
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    found = done.stdout.split()
    assert found[-1] == "True"
    # cuda-pathfinder prefers installed packages to CUDA_HOME; the second came with the first.
    assert "libcublas" in found[0] and found[0].startswith("/")


def test_what_a_module_makes_while_it_is_loaded(tmp_path, monkeypatch):
    """A folder that cannot be made would end the process."""
    functions = ["init", "set_deepgemm_jit_include_dirs"]
    monkeypatch.setenv("TRTLLM_DG_CACHE_DIR", str(tmp_path / "own"))
    libraries.prepare(functions, [])
    assert (tmp_path / "own" / "cache").is_dir()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TRTLLM_DG_CACHE_DIR", str(tmp_path / "file" / "x"))
    libraries.prepare(["init"], [])
    with pytest.raises(LoaderError, match="TRTLLM_DG_CACHE_DIR may name another"):
        libraries.prepare(functions, [])
    monkeypatch.delenv("TRTLLM_DG_CACHE_DIR")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    libraries.prepare(functions, [])
    assert (tmp_path / "home" / ".tensorrt_llm" / "tmp").is_dir()
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(libraries.tempfile, "gettempdir", lambda: str(tmp_path))
    libraries.prepare(functions, [])
    assert (tmp_path / "tensorrt_llm" / "tmp").is_dir()


def test_there_is_no_handle_on_the_cpu():
    assert own_handle("cublasLt", parse_device("cpu")) == 0
