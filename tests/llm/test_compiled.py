"""The kernels of examples/llm in CUDA, by the compilers that there are; a hash settles it."""

from __future__ import annotations

import subprocess

import pytest
from cuda.pathfinder import DynamicLibNotFoundError
from engine import glue

from tests.helpers import compiler
from tests.helpers.compiler import why_not_build

FLOATS = ("float16", "bfloat16")


# ptxas for GPUs before SM90 crashed on a kernel that was named `mask`.
@pytest.mark.parametrize("arch", [80, 87, 89, 90, 100, 120])
def test_nvcc_compiles_the_kernels(arch, tmp_path):
    """NVRTC is what runs them; where only nvcc is, it says whether they are CUDA."""
    reason = why_not_build()
    if reason is not None:
        pytest.skip(reason)

    source = tmp_path / "glue.cu"
    source.write_text(glue.SOURCE)
    nvcc = compiler.nvcc()
    for dtype in FLOATS if arch == 90 else ["bfloat16"]:
        flags = ["-DFLOAT16"] if dtype == "float16" else []
        flags += [f"-arch=sm_{arch}", "-o", str(tmp_path / "o")]
        subprocess.run([nvcc, "-cubin", *flags, str(source)], check=True, timeout=120)
        code = (tmp_path / "o").read_bytes()
        assert all(name.encode() in code for name in glue.KERNELS)


def test_nvrtc_compiles_the_kernels():
    try:
        for dtype in FLOATS:
            assert glue.cubin(dtype, (9, 0))[:4] == b"\x7fELF"
    except DynamicLibNotFoundError:
        pytest.skip("NVRTC is not installed: fi-ffi[llm-gpu]")
