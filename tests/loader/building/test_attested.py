"""Rows for GPUs that none of these tests ever ran on, held to modules that are built for them.

Minutes a module, of nvcc and the package index, and no GPU: run with FI_FFI_ATTEST_BUILDS=1.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fi_ffi.ops.functions import OPS
from fi_ffi.ops.matmul import rows
from fi_ffi.ops.row import form_on

_FP4 = ("fp4_quantize", "block_scale_interleave", "block_scale_interleave_reverse")
# A module, the GPU it is built for, and the ops that it serves there.
BUILDS = [
    ("fp4_quantization_100", (10, 0), _FP4),
    ("fp4_quantization_103", (10, 3), _FP4),
    ("fp4_quantization_110", (11, 0), _FP4),
    ("fp4_quantization_120f", (12, 0), _FP4),
    ("mxfp8_quantization_sm100", (10, 0), ("mxfp8_quantize",)),
    ("fp4_kv_quant", (10, 0), ("nvfp4_kv_quant",)),
    ("tgv_gemm_bf16", (10, 0), ("tgv_gemm",)),
    ("fp4_gemm_cutlass", (10, 0), ("fp4_gemm",)),
    ("fp4_gemm_cutlass_sm120", (12, 0), ("fp4_gemm",)),
    ("mxfp8_gemm_cutlass", (10, 0), ("mxfp8_gemm", "bmm_mxfp8")),
    ("mxfp8_gemm_cutlass_sm120", (12, 0), ("mxfp8_gemm", "bmm_mxfp8")),
    ("bf16_gemm_cutlass", (10, 0), ("bf16_gemm", "bmm_bf16")),
    *(
        (f"gemm_sm{sm}", (sm // 10, 0), ("gemm_fp8_nt_groupwise", "group_gemm_fp8_nt_groupwise"))
        for sm in (100, 120)
    ),
]
_ATTEST = """
import sys
from fi_ffi.loader import runtime
from fi_ffi.ops.functions import OPS
from fi_ffi.ops.matmul import rows
from fi_ffi.ops.row import form_on
for name in sys.argv[3:]:
    forms = OPS[name].rows if name in OPS else [row for row in rows.ROWS if row.name == name]
    row = form_on(forms, (int(sys.argv[2]), 0))
    runtime.kernel_entry(sys.argv[1], row.signature, row.releases, None)
"""


@pytest.mark.parametrize(("module", "capability", "ops"), BUILDS, ids=lambda given: str(given))
def test_it_is_the_module_that_the_rows_name(module, capability, ops):
    for name in ops:
        forms = OPS[name].rows if name in OPS else [row for row in rows.ROWS if row.name == name]
        row = form_on(forms, capability)
        assert row.module_on(capability) == module
        assert capability[0] in row.capabilities


@pytest.mark.parametrize(("module", "capability", "ops"), BUILDS, ids=lambda given: str(given))
@pytest.mark.skipif(
    os.environ.get("FI_FFI_ATTEST_BUILDS") != "1", reason="minutes: set FI_FFI_ATTEST_BUILDS=1"
)
def test_what_is_built_is_what_the_rows_say(module, capability, ops, tmp_path):
    arch = "{}.{}a".format(*capability)
    command = [str(Path(sys.executable).with_name("fi-ffi")), "build", "--release", "0.6.13"]
    command += ["--arch", arch, "--jobs", "1", "--output", str(tmp_path), module]
    assert subprocess.run(command, check=False).returncode == 0
    (wheel,) = tmp_path.glob("*.whl")
    subprocess.run(
        [sys.executable, "-c", _ATTEST, module, str(capability[0]), *ops],
        env=os.environ | {"FI_FFI_KERNELS": str(wheel)}, check=True,
    )  # fmt: skip
