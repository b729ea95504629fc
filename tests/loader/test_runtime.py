"""Loading modules, attesting their functions, and what they need beside libtvm_ffi."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

import fi_ffi
from fi_ffi.abi.signature import Signature
from fi_ffi.errors import AbiError, KernelError, KernelNotFoundError, LoaderError
from fi_ffi.loader import machine, runtime
from fi_ffi.loader.kernels import open_source
from fi_ffi.ops.call.cuda import own_handle
from fi_ffi.ops.table import ROWS

from tests.helpers import compiler
from tests.helpers.children import done

RELEASE = "0.6.13"


@pytest.fixture
def kernels(built_wheel):
    fi_ffi.use_kernels(built_wheel)
    yield open_source(built_wheel)
    runtime.use_source(None)


OF_RELEASE = [row for row in ROWS if SpecifierSet(row.releases).contains(RELEASE)]


@pytest.mark.parametrize("row", OF_RELEASE, ids=lambda row: row.name)
def test_rows_are_attested(row, kernels):
    if row.module not in kernels.modules():
        pytest.skip(f"the built wheel has no {row.module}: it holds what builds in a minute")
    entry = runtime.kernel_entry(row.module, row.signature, row.releases)
    assert entry.name == f"{row.module}.{row.symbol}"
    assert runtime.kernel_entry(row.module, row.signature, row.releases) is entry


RMSNORM = Signature("rmsnorm", ("DLTensor*", "DLTensor*", "DLTensor*", "float", "bool"))
WRONG = {
    "a parameter too many": Signature("rmsnorm", (*RMSNORM.params, "int")),
    "a parameter too few": Signature("rmsnorm", RMSNORM.params[:-1]),
    "another order": Signature("rmsnorm", RMSNORM.params[::-1]),
    "another type": Signature("rmsnorm", ("ffi.Tensor", *RMSNORM.params[1:])),
    "another result": Signature("rmsnorm", RMSNORM.params, "int"),
    "none at all": Signature("rmsnorm", ()),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_declaration_is_refused(name, kernels):
    declared = WRONG[name]
    for _ in range(2):  # it is not kept as good
        with pytest.raises(AbiError) as caught:
            runtime.kernel_entry("norm", declared, ">=9.9,<10")
    path = runtime.load("norm").file.path
    for part in (str(declared), str(RMSNORM), ">=9.9,<10", RELEASE, str(path), "norm.rmsnorm"):
        assert part in str(caught.value)
    # Neither is the module spoilt for a declaration that is right.
    assert runtime.kernel_entry("norm", RMSNORM, "==0.6.13").name == "norm.rmsnorm"


def test_what_is_not_there(kernels):
    with pytest.raises(KernelNotFoundError, match="exports no 'no_such'; it exports:.* rmsnorm"):
        runtime.kernel_entry("norm", Signature("no_such", ()), "==0.6.13")
    with pytest.raises(KernelNotFoundError) as caught:
        runtime.load("rope")
    for part in ("norm, page, single_decode", str(kernels.location), "fi-ffi build", " rope"):
        assert part in str(caught.value)


def test_a_kernels_own_error_is_decoded(kernels):
    """Host memory where the kernel wants a CUDA tensor: refused before any CUDA work."""
    entry = runtime.kernel_entry("norm", RMSNORM, "==0.6.13")
    desc = fi_ffi.TensorDesc(0x1000, (2, 64), "float16", device="cpu")
    weight = fi_ffi.TensorDesc(0x1000, (64,), "float16", device="cpu")
    with pytest.raises(KernelError, match="must be a CUDA tensor") as caught:
        entry(desc, desc, weight, 1e-6, False)
    assert caught.value.op == "norm.rmsnorm"
    assert caught.value.kind
    assert "norm" in caught.value.backtrace
    with pytest.raises(KernelError, match="Mismatched type on argument #0"):
        entry(None, desc, weight, 1e-6, False)
    with pytest.raises(KernelError, match="Expected 5 but got 1"):
        entry(desc)


def test_loading_from_many_threads(kernels):
    runtime.use_source(kernels.location)

    def load(_):
        return runtime.load("norm"), runtime.kernel_entry("norm", RMSNORM, "==0.6.13")

    with ThreadPoolExecutor(16) as pool:
        found = [*pool.map(load, range(64))]
    assert len({tuple(map(id, each)) for each in found}) == 1


def test_a_file_that_is_no_module(tmp_path):
    path = tmp_path / "norm" / "norm.so"
    path.parent.mkdir()
    for content in (b"", b"text", b"\x7fELF" + bytes(100)):
        path.write_bytes(content)
        runtime.use_source(tmp_path)
        with pytest.raises(LoaderError, match=re.escape(str(path))):
            runtime.load("norm")
    runtime.use_source(None)


def test_a_path_that_is_no_utf8(kernels, tmp_path):
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff \xfe"))
    (odd / "norm").mkdir(parents=True)
    shutil.copy(kernels.file("norm").path, odd / "norm" / "norm.so")
    runtime.use_source(odd)
    assert runtime.kernel_entry("norm", RMSNORM, "==0.6.13").name == "norm.rmsnorm"


NO_CUDART = """
from fi_ffi.errors import LoaderError
from fi_ffi.loader import machine, runtime

machine.library.in_process = lambda file: None
machine._library_places = lambda file: [f"/nowhere/{file}"]
try:
    runtime.load("norm")
except LoaderError as error:
    print(error)
"""


def test_a_cudart_is_named_when_there_is_none(built_wheel, root):
    """The one library besides libtvm_ffi that kernels need."""
    said = done(NO_CUDART, FI_FFI_KERNELS=str(built_wheel))[1]
    assert re.search(r"libcudart\.so\.1[23] was not found", said)
    assert "pip install 'nvidia-cuda-runtime" in said


# CUDA's other libraries.


@pytest.fixture
def forgotten():
    machine.load_library.cache_clear()
    yield
    machine.load_library.cache_clear()


@pytest.fixture
def nowhere(monkeypatch, forgotten):
    """No library is in this process; what is looked for is told as the test says."""
    monkeypatch.setattr(machine.library, "in_process", lambda name: None)
    return lambda find: monkeypatch.setattr(machine, "_library_places", find)


def test_other_libraries_are_left_to_the_linker(monkeypatch):
    loaded = []
    monkeypatch.setattr(machine, "load_library", loaded.append)
    machine.load_needed(["libcudart.so.13", "libcuda.so.1", "libc.so.6", "libcublas_own.so.13"])
    assert loaded == []


@pytest.mark.parametrize(
    ("file", "package"),
    [
        ("libcublas.so.13", "nvidia-cublas"),
        ("libcublasLt.so.13", "nvidia-cublas"),
        ("libnvrtc.so.13", "nvidia-cuda-nvrtc"),
    ],
)
def test_one_that_is_nowhere_names_its_package(file, package, nowhere):
    nowhere(lambda name: [f"/nowhere/{name}"])
    with pytest.raises(LoaderError) as caught:
        machine.load_needed(["libc.so.6", file])
    told = str(caught.value)
    assert file in told and f"pip install '{package}>=13,<14'" in told and "CUDA_HOME" in told
    assert "/nowhere/lib" in told, "the linker's own words"


def test_nothing_of_the_name_in_the_process():
    assert machine.library.in_process("libcublas.so.99") is None
    assert machine.library.in_process("libc.so.6") is not None


LOADS = """
import sys
from fi_ffi.abi import library
from fi_ffi.loader import machine, runtime

for file in sys.argv[2:]:
    print(machine.load_library(file)[1])
machine.load_needed(sys.argv[2:])
runtime.ensure_tvm_ffi()
handle = library.open_module(sys.argv[1])
print(library.find_symbol(handle, "user") is not None)
"""


def _library(folder, name, text, *flags):
    source, made = folder / f"{name}.cpp", folder / name
    source.write_text(f'extern "C" {{ {text} }}\n')
    return compiler.library(source, made, f"-Wl,-soname,{name}", *flags)


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
    outside = {"CUDA_HOME": str(home.parent), "CUDA_PATH": str(home.parent), "LD_LIBRARY_PATH": ""}
    code, out, err = done(LOADS, str(module), "libcublas.so.13", "libcublasLt.so.13", **outside)
    assert code == 0, err
    found = out.split()
    assert found[-1] == "True"
    # Installed packages are preferred to CUDA_HOME; the second came with the first.
    assert "libcublas" in found[0] and found[0].startswith("/")


def test_what_a_module_makes_while_it_is_loaded(tmp_path, monkeypatch):
    """A folder that cannot be made would end the process."""
    monkeypatch.setenv("TRTLLM_DG_CACHE_DIR", str(tmp_path / "own"))
    runtime.check_deepgemm_folder()
    assert (tmp_path / "own" / "cache").is_dir()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TRTLLM_DG_CACHE_DIR", str(tmp_path / "file" / "x"))
    with pytest.raises(LoaderError, match="TRTLLM_DG_CACHE_DIR may name another"):
        runtime.check_deepgemm_folder()
    monkeypatch.delenv("TRTLLM_DG_CACHE_DIR")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    runtime.check_deepgemm_folder()
    assert (tmp_path / "home" / ".tensorrt_llm" / "tmp").is_dir()
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    runtime.check_deepgemm_folder()
    assert (tmp_path / "tensorrt_llm" / "tmp").is_dir()


def test_there_is_no_handle_on_the_cpu():
    assert own_handle("cublasLt", fi_ffi.parse_device("cpu")) == 0
