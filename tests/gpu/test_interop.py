"""The examples of examples/interop on a GPU, each where its library is installed and works."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import embedding, kernels

EXAMPLES = Path(__file__).parents[2] / "examples" / "interop"
# test_jax.py, test_tinygrad.py and test_transformers.py have the others.
_OTHERS = "checks", "jax_in_jit", "tinygrad_layer", "transformers_attention"
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.py") if path.stem not in _OTHERS)

# The library alone: what fails already is not fi_ffi's matter.
ALONE = {
    "cuda_python": "from cuda.bindings import runtime\nassert int(runtime.cudaFree(0)[0]) == 0",
    "cuda_core": "from cuda import core\ncore.Device(0).set_current()\n"
    "core.Device(0).create_stream().sync()",
    "cupy": "import cupy\nassert (cupy.ones(4) + 1).get().sum() == 8",
    "jax": "import jax\nassert float((jax.numpy.ones(4) + 1).sum()) == 8\njax.devices('gpu')",
    "numba": """
from numba import cuda
import numpy as np
@cuda.jit
def one_more(a):
    i = cuda.grid(1)
    if i < a.size:
        a[i] += 1
a = cuda.to_device(np.zeros(4, np.int32))
one_more[1, 32](a)
assert a.copy_to_host().sum() == 4
""",
    "torch": "import torch\nassert (torch.ones(4, device='cuda') + 1).sum().item() == 8",
}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    # jax takes most of the GPU's memory otherwise, with other tests' processes beside it.
    env = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)


@pytest.fixture(scope="module")
def works() -> dict[str, str | None]:
    """Why a library is left out, of those that were asked for."""
    return {}


def library(name: str, works: dict[str, str | None]) -> None:
    kind = name if name in ALONE else name.partition("_")[0]
    if kind not in works:
        done = run("-c", ALONE[kind])
        last = (done.stderr.strip() or "no reason told").splitlines()[-1]
        works[kind] = f"{kind} alone: {last}" if done.returncode else None
    if works[kind] is not None:
        pytest.skip(works[kind])


@pytest.mark.parametrize("name", NAMES)
def test_runs(name, works):
    library(name, works)
    done = run(str(EXAMPLES / f"{name}.py"))
    kernels.skip_if_missing(done.stderr)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "request 2: largest error" in done.stdout


@pytest.mark.parametrize("name", NAMES)
def test_its_check_can_fail(name, works):
    """On what the GPU gave: another norm's result is told from the right one."""
    library(name, works)
    program = f"""
import sys
sys.path.insert(0, {str(EXAMPLES)!r})
import fi_ffi
fi_ffi.fused_add_rmsnorm = fi_ffi.gemma_fused_add_rmsnorm
import {name} as example
example.main()
"""
    done = run("-c", program)
    kernels.skip_if_missing(done.stderr)
    assert done.returncode == 1
    assert "AssertionError: normalised is wrong" in done.stderr, done.stderr


def toolkit() -> Path:
    nvcc = shutil.which("nvcc")
    places = [os.environ.get("CUDA_HOME"), nvcc and Path(nvcc).resolve().parents[1]]
    for place in map(Path, filter(None, [*places, "/usr/local/cuda"])):
        if (place / "include" / "cuda_runtime_api.h").exists() and list(
            (place / "lib64").glob("libcudart.so*")
        ):
            return place
    pytest.skip("there is no CUDA toolkit: no cuda_runtime_api.h and libcudart.so")


def test_a_c_program(tmp_path):
    """With memory of cudaMalloc and a stream for each of three threads."""
    script = embedding.lines(embedding.WITH_CUDA)
    # The paths of the first block's; its program is for the CPU.
    paths = [line for line in embedding.lines(embedding.FIRST).splitlines() if "export" in line]
    script = "\n".join([script, *paths, "./c_program"])
    done = embedding.run(script, tmp_path, CUDA_HOME=str(toolkit()))
    kernels.skip_if_missing(done.stderr)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    assert done.stdout.count("20 calls, largest error 0.") == 3
    assert "refused with code 1" in done.stdout
