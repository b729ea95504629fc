"""The machine and the software that figures were taken with."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from pathlib import Path

from fi_ffi.cli import cuda
from fi_ffi.errors import FiFfiError
from fi_ffi.loader import search

_PACKAGES = (
    "cffi", "cuda-bindings", "numpy", "apache-tvm-ffi", "torch", "flashinfer-python",
    "cupti-python", "nvmath-python",
)  # fmt: skip


def about() -> dict[str, str]:
    """Name and value of what figures depend on."""
    driver = cuda.driver_version()
    return {
        "gpu": ", ".join(gpu.name for gpu in cuda.gpus()) or "none",
        "visible": str(len(cuda.gpus())),
        "driver": f"CUDA {driver[0]}.{driver[1]}" if driver else "none",
        "cpu": f"{_processor()}, {len(os.sched_getaffinity(0))} cores",
        "system": f"{platform.system()} {platform.release()}",
        "python": sys.version.split()[0],
        "packages": ", ".join(filter(None, map(_version, _PACKAGES))),
        "kernels": _kernels(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.machine())


def _version(package: str) -> str:
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return ""


def _kernels() -> str:
    try:
        return f"FlashInfer {search.release()}"
    except FiFfiError as error:
        return f"none ({error})"
