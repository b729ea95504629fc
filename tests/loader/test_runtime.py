"""Loading modules and attesting their functions, on kernels as they are built."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

import fi_ffi
from fi_ffi.abi.signature import Signature
from fi_ffi.errors import AbiError, ArtifactError, KernelError, KernelNotFoundError, LoaderError
from fi_ffi.loader import runtime
from fi_ffi.loader.kernels import open_source
from fi_ffi.ops.table import ROWS

RELEASE = "0.6.13"


@pytest.fixture(autouse=True)
def kernels(built_wheel):
    fi_ffi.use_kernels(built_wheel)
    yield
    runtime.use_source(None)


def modules_of(wheel):
    return open_source(wheel).modules()


def test_every_function_tells_its_signature(built_wheel):
    source = open_source(built_wheel)
    told = {name: runtime.file_signatures(source.file(name).path) for name in source.modules()}
    single_decode = next(name for name in told if name.startswith("single_decode"))
    assert {*told["norm"]} >= {"rmsnorm", "layernorm", "fused_add_rmsnorm"}
    assert {*told["page"]} == {"append_paged_kv_cache", "append_paged_mla_kv_cache"}
    assert {*told[single_decode]} == {"run"}
    for functions in told.values():
        for name, signature in functions.items():
            assert isinstance(signature, Signature), signature
            assert signature.name == name
            assert signature.params
            assert fi_ffi.parse_signature(str(signature)) == signature


OF_RELEASE = [row for row in ROWS if SpecifierSet(row.releases).contains(RELEASE)]


@pytest.mark.parametrize("row", OF_RELEASE, ids=lambda row: row.name)
def test_rows_are_attested(row, built_wheel):
    if row.module not in modules_of(built_wheel):
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
def test_a_wrong_declaration_is_refused(name):
    declared = WRONG[name]
    for _ in range(2):  # it is not kept as good
        with pytest.raises(AbiError) as caught:
            runtime.kernel_entry("norm", declared, ">=9.9,<10")
    text = str(caught.value)
    path = runtime.load("norm").file.path
    for part in (str(declared), str(RMSNORM), ">=9.9,<10", RELEASE, str(path), "norm.rmsnorm"):
        assert part in text
    # Neither is the module spoilt for a declaration that is right.
    assert runtime.kernel_entry("norm", RMSNORM, "==0.6.13").name == "norm.rmsnorm"


def test_a_symbol_that_is_not_exported():
    with pytest.raises(KernelNotFoundError, match="exports no 'no_such'; it exports:.* rmsnorm"):
        runtime.kernel_entry("norm", Signature("no_such", ()), "==0.6.13")


def test_an_unknown_module_tells_what_there_is(built_wheel):
    with pytest.raises(KernelNotFoundError) as caught:
        runtime.load("rope")
    for part in ("norm, page, single_decode", str(built_wheel), "fi-ffi build", " rope"):
        assert part in str(caught.value)


def test_a_kernels_own_error_is_decoded():
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


def test_a_module_is_loaded_once():
    assert runtime.load("norm") is runtime.load("norm")


def test_loading_from_many_threads():
    from concurrent.futures import ThreadPoolExecutor

    runtime.use_source(runtime.load("norm").source.location)
    with ThreadPoolExecutor(16) as pool:
        entries = [
            *pool.map(lambda _: runtime.kernel_entry("norm", RMSNORM, "==0.6.13"), range(64))
        ]
    assert len({id(entry) for entry in entries}) == 1


@pytest.mark.parametrize("content", [None, "text"])
def test_a_place_that_is_none(content, child, tmp_path):
    place = tmp_path / "kernels"
    if content is not None:
        place.write_text(content)
    code = """
        from fi_ffi.errors import LoaderError
        from fi_ffi.loader import runtime
        try:
            runtime.load("norm")
        except LoaderError as error:
            print(type(error).__name__, error)
    """
    said = child(code, FI_FFI_KERNELS=str(place))
    assert str(place) in said
    assert said.split()[0] in {KernelNotFoundError.__name__, ArtifactError.__name__}


def test_a_file_that_is_no_module(tmp_path):
    (tmp_path / "norm").mkdir()
    path = tmp_path / "norm" / "norm.so"
    for content in (b"", b"text", b"\x7fELF" + bytes(100)):
        path.write_bytes(content)
        runtime.use_source(tmp_path)
        with pytest.raises(LoaderError, match=re.escape(str(path))):
            runtime.load("norm")


def test_a_path_that_is_no_utf8(built_wheel, tmp_path):
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff \xfe"))
    (odd / "norm").mkdir(parents=True)
    shutil.copy(open_source(built_wheel).file("norm").path, odd / "norm" / "norm.so")
    runtime.use_source(odd)
    assert runtime.kernel_entry("norm", RMSNORM, "==0.6.13").name == "norm.rmsnorm"


def test_a_cudart_is_named_when_there_is_none(child, built_wheel, tmp_path):
    """The one library besides libtvm_ffi that kernels need."""
    code = """
        from fi_ffi.errors import LoaderError
        import cuda.pathfinder

        def missing(name):
            raise cuda.pathfinder.DynamicLibNotFoundError("not on this machine")

        cuda.pathfinder.load_nvidia_dynamic_lib = missing
        from fi_ffi.loader import runtime
        try:
            runtime.load("norm")
        except LoaderError as error:
            print(error)
    """
    said = child(code, FI_FFI_KERNELS=str(built_wheel))
    assert "libcudart.so.13 was not found" in said
    assert "pip install 'nvidia-cuda-runtime" in said
