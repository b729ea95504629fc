"""The CUDA runtimes of both major versions: as they are installed, or from the package index."""

from __future__ import annotations

import functools
import importlib.metadata
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from fi_ffi.loader import machine

from tests.helpers import compiler, sampling

_folder = tempfile.TemporaryDirectory(prefix="fi-ffi-cuda-")
_SOURCE = """
#include <tvm/ffi/function.h>
extern "C" int cudaRuntimeGetVersion(int *version);
static int64_t runtime_version() {
  int version = 0;
  return cudaRuntimeGetVersion(&version) == 0 ? version : -1;
}
TVM_FFI_DLL_EXPORT_TYPED_FUNC(runtime_version, runtime_version);
"""


@functools.cache
def folder(major: int) -> Path:
    """The folder for sys.path in which a CUDA's runtime is installed."""
    name = machine.package("cudart", major)
    try:
        return Path(str(importlib.metadata.distribution(name).locate_file("")))
    except importlib.metadata.PackageNotFoundError:
        sampling.only_in_full(f"installs {name} from the package index")
    made = Path(_folder.name) / str(major)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile"]
    quick = ["--disable-pip-version-check", "--retries", "1", "--timeout", "20"]
    wanted = f"{name}>={major},<{major + 1}"
    done = subprocess.run(
        [*pip, *quick, "--target", str(made), wanted], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"no {wanted} in the index, or no network: {done.stderr.strip()[-200:]}")
    return made


def library(major: int) -> Path:
    """The runtime itself."""
    (found,) = folder(major).glob(f"nvidia/*/lib/libcudart.so.{major}")
    return found


@functools.cache
def module(major: int) -> Path:
    """A folder of kernels, in the jit-cache layout, whose one module tells of its runtime."""
    name, runtime = f"of_cuda_{major}", str(library(major))  # or there is none, each time
    root = Path(_folder.name) / f"kernels-{major}"
    made = root / name / f"{name}.so"
    made.parent.mkdir(parents=True)
    source = made.with_suffix(".cc")
    source.write_text(_SOURCE)
    compiler.library(source, made, "-Wl,--no-as-needed", runtime)
    source.unlink()
    return root
