"""The loops in C++ and CUDA, compiled when they are asked for, called through cffi."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import cffi

from fi_ffi.abi import library
from fi_ffi.abi._cffi import ffi as fi_ffi_types

from marks import Missing
from marks.timing import Run

_HERE = Path(__file__).parent
_FLAGS = ("-O2", "-std=c++17", "-shared")
ffi = cffi.FFI()
ffi.cdef("""
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


def _address(pointer: Any) -> Any:
    """A pointer or function of fi_ffi's cffi declarations, as ours has it."""
    return ffi.cast("void *", int(fi_ffi_types.cast("uintptr_t", pointer)))


def entry_loop(entry: Any, handle: Any, args: Any, count: int, result: Any, stream: int) -> Run:
    """Calls of a TVM-FFI entry from C++; `stream` 0 leaves the stream as it is."""
    loop, code = _loop().fi_ffi_loop, ffi.new("int *")
    set_stream = ffi.NULL
    if stream:
        set_stream = _address(fi_ffi_types.addressof(library.lib, "TVMFFIEnvSetStream"))
    given = (*map(_address, (entry, handle, args)), count, _address(result), set_stream,
             ffi.cast("void *", stream))  # fmt: skip

    def run(calls: int) -> float:
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
