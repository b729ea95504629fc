"""declarations.h against the headers of the pinned apache-tvm-ffi wheel."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import cffi
import pytest

from fi_ffi.abi import library
from fi_ffi.abi._cffi import ffi
from fi_ffi.abi.library import TypeIndex
from fi_ffi.abi.tensor import DEVICE_TYPES, DTYPES

from tests.helpers import compiler, cuda_runtimes

ROOT = Path(__file__).resolve().parents[2]
HEADERS = ("dlpack/dlpack.h", "tvm/ffi/c_api.h", "tvm/ffi/extra/c_env_api.h")
# Of declarations.h but not of these headers: our own pairs, libc's, Python's and CUDA's.
OWN_STRUCTS = re.compile("FiFfi|cudaIpc|cudaMem")
FUNCTIONS = sorted(name for name in dir(ffi.dlopen(None)) if name.startswith("TVMFFI"))
CUDA_FUNCTIONS = sorted(name for name in dir(ffi.dlopen(None)) if name.startswith("cuda"))


def as_c(header: str) -> str:
    """A header as a C compiler would see it: no comments, directives or C++ branches."""
    text = re.sub(r"/\*.*?\*/|//[^\n]*", "", header, flags=re.DOTALL).replace("\\\n", " ")
    lines: list[str] = []
    branches: list[bool] = []
    for line in text.splitlines():
        directive = line.strip()
        if directive.startswith("#if"):
            branches.append(directive != "#ifdef __cplusplus")
        elif directive.startswith("#else"):
            branches[-1] = not branches[-1]
        elif directive.startswith("#endif"):
            branches.pop()
        elif not directive.startswith("#") and all(branches):
            lines.append(line)
    return re.sub(r"\b(TVM_FFI_DLL|TVM_FFI_ATTRIBUTE_PURE)\b", "", "\n".join(lines))


@pytest.fixture(scope="module")
def header_text(pinned_wheel: Path) -> str:
    with zipfile.ZipFile(pinned_wheel) as archive:
        parts = [as_c(archive.read(f"tvm_ffi/include/{name}").decode()) for name in HEADERS]
    return "\n".join(parts)


@pytest.fixture(scope="module")
def theirs(header_text: str) -> cffi.FFI:
    parsed = cffi.FFI()
    parsed.cdef(header_text)
    return parsed


def unqualified(kind: Any) -> str:
    """A type's name; one parser says `struct X` where the other says `X`."""
    return str(kind.cname).replace("struct ", "")


def describe(kind: Any) -> Any:
    """A C type in words that do not depend on who declared it; enums are their integers."""
    if kind.kind == "enum":
        return ("primitive", 4)
    if kind.kind == "primitive":
        return ("primitive", ffi.sizeof(kind.cname)) if "int" in kind.cname else kind.cname
    if kind.kind in ("struct", "union"):
        return {name: (field.offset, describe(field.type)) for name, field in kind.fields}
    if kind.kind == "array":
        return (describe(kind.item), kind.length)
    return unqualified(kind)


STRUCTS = [name for name in ffi.list_types()[0] if not OWN_STRUCTS.match(name)]
STRUCTS = [name for name in STRUCTS if ffi.typeof(name).kind == "struct"]


def test_every_upstream_struct_is_declared() -> None:
    assert {"TVMFFIAny", "TVMFFIObject", "DLTensor", "DLManagedTensorVersioned"} <= {*STRUCTS}


@pytest.mark.parametrize("name", STRUCTS)
def test_struct(name: str, theirs: cffi.FFI) -> None:
    assert ffi.sizeof(name) == theirs.sizeof(name)
    assert ffi.alignof(name) == theirs.alignof(name)
    fields = [field for field, _ in ffi.typeof(name).fields if field]
    for field in fields:
        assert ffi.offsetof(name, field) == theirs.offsetof(name, field), field
    assert describe(ffi.typeof(name)) == describe(theirs.typeof(name))


def test_object_pairs_put_the_cell_right_after_the_header() -> None:
    pairs = [name for name in ffi.list_types()[0] if re.fullmatch("FiFfi.*Object", name)]
    assert len(pairs) == 5
    for name in pairs:
        assert ffi.offsetof(name, "cell") == ffi.sizeof("TVMFFIObject"), name


@pytest.mark.parametrize("name", FUNCTIONS)
def test_function(name: str, theirs: cffi.FFI, tvm_ffi_loaded: str) -> None:
    ours = getattr(library.lib, name)  # fails unless the library exports it
    upstream = getattr(theirs.dlopen(tvm_ffi_loaded), name)
    assert unqualified(ffi.typeof(ours)) == unqualified(theirs.typeof(upstream))


# Of CUDA 12 and 13 the same; a runtime of 12 from the index.
CUDA_HEADERS = {12: "nvidia/cuda_runtime/include", 13: "nvidia/cu13/include"}


@pytest.mark.parametrize("major", CUDA_HEADERS)
@pytest.mark.parametrize("name", CUDA_FUNCTIONS)
def test_cuda_function(name: str, major: int) -> None:
    """By text: those headers are C++ that cffi does not read."""
    header = cuda_runtimes.folder(major) / CUDA_HEADERS[major] / "cuda_runtime_api.h"
    text = header.read_text().replace(" __dv(0)", "")
    upstream = re.search(rf"(cudaError_t|const char\*) +CUDARTAPI {name}\(([^)]*)\);", text)
    assert upstream is not None
    result, arguments = upstream[1], "" if upstream[2] == "void" else upstream[2]
    # Handles are pointers, to what is not said.
    told = re.sub(
        r"\bcuda(Stream|Event|Graph|GraphExec|GraphNode|MemPool)_t\b", "void *", arguments
    )
    # A result that is not looked into is just memory.
    told = told.replace("cudaGraphExecUpdateResultInfo *", "void *")
    enums = r"\b(enum \w+|cudaError_t)"
    parameters = [re.sub(enums, "int", part) for part in told.split(",") if part]
    # cffi tells no `const`.
    named = [re.sub(r"\b(const|struct) ", "", part).strip() for part in parameters]
    types = [re.sub(r"\w+$", "", part).replace(" ", "") for part in named]
    declared = ffi.typeof(getattr(ffi.dlopen(str(cuda_runtimes.library(major))), name))
    assert [arg.cname.replace(" ", "") for arg in declared.args] == types
    assert declared.result.cname == ("char *" if result == "const char*" else "int")  # an enum


MARKS_OF_NVCC = """
#define __device_builtin__
#define __device_builtin_texture_type__
#define __device_builtin_surface_type__
#define __cudart_builtin__
#define __builtin_align__(n) __attribute__((aligned(n)))
#define __align__(n) __attribute__((aligned(n)))
#define __host__
#define __device__
#define CUDARTAPI
#define CUDART_CB
"""
CUDA_STRUCTS = [
    name for name in ffi.list_types()[0] if name.startswith("cuda") and not name.endswith("_t")
]


@pytest.mark.parametrize("major", CUDA_HEADERS)
def test_cuda_structs(major: int, tmp_path: Path) -> None:
    """Sizes and offsets, as a compiler finds them in CUDA's headers."""
    lines = ["#include <cstddef>", "#include <driver_types.h>"]
    assert len(CUDA_STRUCTS) == 3
    for name in CUDA_STRUCTS:
        lines.append(f'static_assert(sizeof({name}) == {ffi.sizeof(name)}, "{name}");')
        for field, told in ffi.typeof(name).fields:
            offset = f"offsetof({name}, {field}) == {told.offset}"
            lines.append(f'static_assert({offset}, "{name}.{field}");')
    source = tmp_path / "structs.cc"
    source.write_text("\n".join(lines) + "\n")
    # What is for nvcc: the one header that the runtime's package lacks.
    (tmp_path / "crt").mkdir()
    (tmp_path / "crt" / "host_defines.h").write_text(MARKS_OF_NVCC)
    theirs = cuda_runtimes.folder(major) / CUDA_HEADERS[major]
    compiler.library(source, tmp_path / "structs.so", f"-I{theirs}", f"-I{tmp_path}")


# A number of CUDA's in a source: `_NAME = 3  # cudaName`; of several, each has its own.
CONSTANT = re.compile(
    r"^\w+(?:, \w+)* = ([\d, |()]+)  # ((?:cuda|CU(?:DA)?_)\w+(?:(?:,| \|) \w+)*)"
)


def cuda_constants() -> dict[str, int]:
    found: dict[str, int] = {}
    for path in sorted((ROOT / "fi_ffi").rglob("*.py")):
        for numbers, names in (m.groups() for m in map(CONSTANT.match, path.open()) if m):
            values = map(int, re.findall(r"\d+", numbers))
            for name, value in zip(re.findall(r"\w+", names), values, strict=True):
                assert found.setdefault(name, value) == value, f"{path}: {name}"
    return found


@pytest.mark.parametrize("major", CUDA_HEADERS)
def test_cuda_constants(major: int) -> None:
    folder = cuda_runtimes.folder(major) / CUDA_HEADERS[major]
    files = [folder / name for name in ("driver_types.h", "cuda.h")]
    text = "\n".join(path.read_text() for path in files if path.exists())
    constants = cuda_constants()
    assert len(constants) > 20
    for name, value in constants.items():
        if name.startswith("CU") and not files[1].exists():
            continue
        number = rf"\b{name}\b\s*(?:=|\(\(cudaStream_t\)|)\s*(0x[0-9a-f]+|\d+)"
        upstream = {int(one, 0) for one in re.findall(number, text, re.IGNORECASE)}
        assert upstream == {value}, name


def enum_values(theirs: cffi.FFI, name: str, prefix: str) -> dict[str, int]:
    pairs = theirs.typeof(name).relements
    return {key.removeprefix(prefix).lower(): value for key, value in pairs.items()}


def test_type_indices(theirs: cffi.FFI) -> None:
    upstream = enum_values(theirs, "TVMFFITypeIndex", "kTVMFFI")
    upstream["object_begin"] = upstream.pop("staticobjectbegin")
    ours = {name: value for name, value in vars(TypeIndex).items() if name.isupper()}
    assert len(ours) > 20
    for name, value in ours.items():
        key = name.lower() if name == "OBJECT_BEGIN" else name.lower().replace("_", "")
        assert value == upstream[key], name


def test_dtype_codes(theirs: cffi.FFI) -> None:
    codes = enum_values(theirs, "DLDataTypeCode", "kDL")
    for name, dtype in DTYPES.items():
        # float8 and float4 have a code for each format, the others one for each kind.
        kind = name.removesuffix("_x2")
        assert dtype.code == codes[kind if kind in codes else kind.rstrip("0123456789")], name


def test_device_codes(theirs: cffi.FFI) -> None:
    codes = enum_values(theirs, "DLDeviceType", "kDL")
    assert {name.replace("_", ""): code for name, code in DEVICE_TYPES.items()}.items() <= (
        codes.items()
    )


def test_dlpack_constants(pinned_wheel: Path) -> None:
    from fi_ffi.abi import dlpack

    with zipfile.ZipFile(pinned_wheel) as archive:
        header = archive.read("tvm_ffi/include/dlpack/dlpack.h").decode()
    assert re.search(r"#define DLPACK_FLAG_BITMASK_READ_ONLY \(1UL << 0UL\)", header)
    assert dlpack._READ_ONLY == 1 << 0
    assert re.search(r"#define DLPACK_FLAG_BITMASK_IS_SUBBYTE_TYPE_PADDED \(1UL << 2UL\)", header)
    assert dlpack._PADDED == 1 << 2
    assert re.search(r"#define DLPACK_MAJOR_VERSION 1\b", header)


def test_dlopen_flags() -> None:
    import os

    assert library.RTLD_NOW == os.RTLD_NOW
    assert library.RTLD_LOCAL == os.RTLD_LOCAL
    assert library.RTLD_GLOBAL == os.RTLD_GLOBAL


def test_generated_module_is_fresh(tmp_path: Path) -> None:
    tool = ROOT / "tools" / "generate_cffi.py"
    for folder in (ROOT, tmp_path):  # wherever it is run from
        done = subprocess.run(
            [sys.executable, str(tool), "--check"], cwd=folder, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
