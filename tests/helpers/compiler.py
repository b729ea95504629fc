"""Compilers of this machine: libraries that tests make, and whether kernels can be built.

A test that asks for one is skipped where there is none.  Kernels are compiled in a run of all cases
only.
"""

from __future__ import annotations

import functools
import importlib.metadata
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from fi_ffi.errors import BuildError
from fi_ffi.loader import tvm_ffi
from fi_ffi.loader.machine import CUDA_MAJORS, majors_here
from fi_ffi_build.environment import find_cxx, find_toolkits

from tests.helpers import sampling

_CXX = ["-xc++", "-std=c++17"]
_LANGUAGES = {".c": ["-xc"], ".cc": _CXX, ".cpp": _CXX}
_folder = tempfile.TemporaryDirectory(prefix="fi-ffi-compiled-")


def cxx() -> list[str]:
    """The command of a C++ compiler, or the test is skipped."""
    try:
        return find_cxx().split()
    except BuildError as error:
        pytest.skip(str(error))


def headers() -> Path:
    """The include folder of the installed apache-tvm-ffi."""
    distribution = importlib.metadata.distribution(tvm_ffi.PROJECT)
    return Path(str(distribution.locate_file("tvm_ffi/include")))


def library(source: Path, made: Path, *options: str, include: Path | None = None) -> Path:
    """A shared library of a C or C++ source, which may use tvm-ffi's headers, or those given."""
    command = [*cxx(), *_LANGUAGES[source.suffix], "-shared", "-fPIC", "-O0"]
    command += [f"-I{include or headers()}"]
    command += [str(source), "-xnone", *options, "-o", str(made)]
    subprocess.run(command, check=True, timeout=300)
    return made


@functools.cache
def compiled(source: Path, *options: str) -> Path:
    """The same, made once."""
    return library(source, Path(_folder.name) / f"{source.stem}{''.join(options)}.so", *options)


def nvcc() -> str:
    """The CUDA compiler on the path, or the test is skipped."""
    sampling.only_in_full("needs nvcc")
    return shutil.which("nvcc") or pytest.skip("there is no nvcc on this machine")


def why_not_build() -> str | None:
    """Why kernels cannot be compiled on this machine, or None if they can be."""
    sampling.only_in_full("compiles kernels")
    wanted = next(iter(majors_here()), CUDA_MAJORS[-1])
    if not any(toolkit.major == wanted for toolkit in find_toolkits()):
        return f"no nvcc of CUDA {wanted} on this machine"
    try:
        find_cxx()
    except BuildError as error:
        return str(error)
    return None
