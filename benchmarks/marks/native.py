"""The loops in C++ and CUDA, compiled when they are asked for, called through cffi."""

from __future__ import annotations

import ctypes
import functools
import importlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cffi

import fi_ffi
from marks import Missing
from marks.timing import Run

_HERE = Path(__file__).parent
_FLAGS = ("-O2", "-std=c++17", "-shared")
ffi = cffi.FFI()
# tvm/ffi/c_api.h and dlpack.h, as far as arguments need them.
ffi.cdef("""
typedef struct {
  void *data; int32_t device_type, device_id, ndim; uint8_t code, bits; uint16_t lanes;
  int64_t *shape, *strides; uint64_t byte_offset;
} DLTensor;
typedef struct {
  int32_t type_index; uint32_t zero_padding;
  union { int64_t v_int64; double v_float64; void *v_ptr; };
} TVMFFIAny;
int64_t fi_ffi_loop(void *entry, void *handle, const void *args, int32_t count, void *result,
                    void *set_stream, void *stream, int64_t calls, int *code);
int64_t fi_ffi_launch(void *stream, int64_t calls, int *code);
""")


def _compiled(source: str, *command: str) -> Any:
    """The shared library of a source file, in this process."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / f"{source}.so"
        done = subprocess.run(
            [*command, *_FLAGS, str(_HERE / source), "-o", str(output)],
            capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode:
            raise Missing(f"a compiler for {source} ({command[0]}: {done.stderr.strip()[-300:]})")
        return ffi.dlopen(str(output))


def _nvcc() -> str | None:
    homes = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    folders = [str(Path(home) / "bin") for home in homes if home]
    return shutil.which("nvcc") or shutil.which("nvcc", path=os.pathsep.join(folders))


@functools.cache
def _loop() -> Any:
    for name in (os.environ.get("CXX"), "g++", "c++", "clang++"):
        if name and shutil.which(name):
            return _compiled("loop.cpp", name, "-fPIC")
    nvcc = _nvcc()
    if nvcc is None:
        raise Missing("a C++ compiler")
    return _compiled("loop.cpp", nvcc, "-Xcompiler=-fPIC")


_NONE, _INT, _BOOL, _FLOAT, _DL_TENSOR, _ARRAY = 0, 1, 2, 3, 7, 71  # TVMFFITypeIndex


def _symbol(file: Path | None, name: str) -> Any:
    """The address of a function in a library, or in all that this process has loaded."""
    function = getattr(ctypes.CDLL(None if file is None else str(file)), name)
    return ffi.cast("void *", ctypes.cast(function, ctypes.c_void_p).value)


def _packed(values: Sequence[Any]) -> tuple[Any, list[object]]:
    """Arguments as an entry takes them, and what must live as long as they do."""
    args, keep = ffi.new("TVMFFIAny[]", len(values)), list[object]([values])
    for arg, value in zip(args, values, strict=True):
        if isinstance(value, list | tuple):
            value = importlib.import_module("tvm_ffi").convert(value)
            keep.append(value)
        if value is None:
            arg.type_index = _NONE
        elif isinstance(value, bool | int):
            arg.type_index, arg.v_int64 = _BOOL if isinstance(value, bool) else _INT, value
        elif isinstance(value, float):
            arg.type_index, arg.v_float64 = _FLOAT, value
        elif hasattr(value, "__chandle__"):  # of tvm_ffi; plans are arrays
            arg.type_index, arg.v_ptr = _ARRAY, ffi.cast("void *", value.__chandle__())
        else:
            arg.type_index, arg.v_ptr = _DL_TENSOR, _dl_tensor(fi_ffi.as_desc(value), keep)
    return args, keep


def _dl_tensor(desc: fi_ffi.TensorDesc, keep: list[object]) -> Any:
    shape, strides = (ffi.new("int64_t[]", sizes) for sizes in (desc.shape, desc.strides))
    device, dtype = desc.device, desc.dtype
    tensor = ffi.new("DLTensor *", {
        "data": ffi.cast("void *", desc.ptr), "device_type": device.type_code,
        "device_id": device.index, "ndim": len(desc.shape), "code": dtype.code,
        "bits": dtype.bits, "lanes": dtype.lanes, "shape": shape, "strides": strides,
    })  # fmt: skip
    keep += shape, strides, tensor
    return tensor


def entry_loop(file: Path, name: str, values: Sequence[Any], stream: int) -> Run:
    """Calls from C++ of an entry of a kernel module; `stream` 0 leaves the stream as it is."""
    loop, code, result = _loop().fi_ffi_loop, ffi.new("int *"), ffi.new("TVMFFIAny *")
    args, kept = _packed(values)
    set_stream = _symbol(None, "TVMFFIEnvSetStream") if stream else ffi.NULL
    given = (_symbol(file, f"__tvm_ffi_{name}"), ffi.NULL, args, len(values), result, set_stream,
             ffi.cast("void *", stream))  # fmt: skip

    def run(calls: int) -> float:
        assert kept
        taken = loop(*given, calls, code)
        if code[0]:
            raise RuntimeError(f"the entry called from C++ returned {code[0]}")
        return float(taken)

    return run


def empty_launches(stream: int) -> Run:
    """Launches of an empty kernel; `Missing` where there is no nvcc, or it does not run."""
    nvcc = _nvcc()
    if nvcc is None:
        raise Missing("nvcc")
    launch = _compiled("empty.cu", nvcc, "-Xcompiler=-fPIC", "-arch=native").fi_ffi_launch
    code, pointer = ffi.new("int *"), ffi.cast("void *", stream)
    launch(pointer, 1, code)
    if code[0]:
        raise Missing(f"an empty kernel that runs (CUDA error {code[0]})")

    def run(calls: int) -> float:
        taken = launch(pointer, calls, code)
        if code[0]:
            raise RuntimeError(f"an empty kernel: CUDA error {code[0]}")
        return float(taken)

    return run
