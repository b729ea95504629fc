"""Rows for GPUs that none of these tests ever ran on, held to modules that are built for them.

Minutes a module, of nvcc and the package index, and no GPU: run with FI_FFI_ATTEST_BUILDS=1.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from fi_ffi.abi.function import probe
from fi_ffi.catalogue.requests import parse_arch, parse_requests
from fi_ffi.loader import runtime
from fi_ffi.modules import files
from fi_ffi.ops.call.row import form_on
from fi_ffi.ops.functions import OPS
from fi_ffi.ops.matmul import rows
from fi_ffi.ops.moe import interface as moe
from fi_ffi_build.build import MissingPart, run_ninja
from fi_ffi_build.environment import Workshop, open_workshop
from fi_ffi_build.questions import ask, question_of

_FP4 = ("fp4_quantize", "fp4_batched_quantize", "block_scale_interleave",
        "block_scale_interleave_reverse")  # fmt: skip
# A module, the GPU it is built for, and the ops that it serves there.
BUILDS = [
    ("fp4_quantization_100", (10, 0), _FP4),
    ("fp4_quantization_103", (10, 3), _FP4),
    ("fp4_quantization_110", (11, 0), _FP4),
    ("fp4_quantization_120f", (12, 0), _FP4),
    ("mxfp8_quantization_sm100", (10, 0), ("mxfp8_quantize",)),
    ("fp4_kv_quant", (10, 0), ("nvfp4_kv_quant",)),
    ("tgv_gemm_bf16", (10, 0), ("tgv_gemm",)),
]
# Of these the binding alone is compiled: the others of their sources take an hour.
PRODUCTS = [
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
_BINDINGS = {
    f"gemm_sm{sm}": tuple(
        f"gen_gemm_sm{sm}_{name}_sm{sm}_binding.cuda.o" for name in ("gemm", "group_gemm")
    )
    for sm in (100, 120)
}
_ATTEST = """
import sys
from fi_ffi.abi.function import probe
from fi_ffi.loader import runtime
from fi_ffi.ops.functions import OPS
from fi_ffi.ops.matmul import rows
from fi_ffi.ops.call.row import form_on
for name in sys.argv[3:]:
    forms = OPS[name].rows if name in OPS else [row for row in rows.ROWS if row.name == name]
    row = form_on(forms, (int(sys.argv[2]), 0))
    runtime.kernel_entry(sys.argv[1], row.signature, row.releases, None)
"""


needs_minutes = pytest.mark.skipif(
    os.environ.get("FI_FFI_ATTEST_BUILDS") != "1", reason="minutes: set FI_FFI_ATTEST_BUILDS=1"
)


@pytest.mark.parametrize(
    ("module", "capability", "ops"), BUILDS + PRODUCTS, ids=lambda given: str(given)
)
def test_it_is_the_module_that_the_rows_name(module, capability, ops):
    for name in ops:
        forms = OPS[name].rows if name in OPS else [row for row in rows.ROWS if row.name == name]
        row = form_on(forms, capability)
        assert row.module_on(capability) == module
        assert capability[0] in row.capabilities


@pytest.mark.parametrize(("module", "capability", "ops"), BUILDS, ids=lambda given: str(given))
@needs_minutes
def test_what_is_built_is_what_the_rows_say(module, capability, ops, tmp_path):
    arch = "{}.{}a".format(*capability)
    command = [str(Path(sys.executable).with_name("fi-ffi")), "build", "--release", "0.6.13"]
    command += ["--arch", arch, "--jobs", "1", "--output", str(tmp_path), module]
    assert subprocess.run(command, check=False).returncode == 0
    (wheel,) = tmp_path.glob("*.whl")
    attest(wheel, module, capability, ops)


def attest(kernels: Path, module: str, capability: tuple[int, int], ops: Sequence[str]) -> None:
    subprocess.run(
        [sys.executable, "-c", _ATTEST, module, str(capability[0]), *ops],
        env=os.environ | {"FI_FFI_KERNELS": str(kernels)}, check=True,
    )  # fmt: skip


_RELEASE = "0.6.13"
_REST = re.compile("tensorrt_llm|flashinfer|[Cc]utlass|[Gg]emm")  # of FlashInfer's own symbols


def bindings_of(workshop: Workshop, module: str, names: tuple[str, ...]) -> list[Path]:
    """The objects of a module's binding sources, compiled as its own build file says."""
    (request,) = parse_requests([module], workshop.architectures)
    answer = ask(workshop, {"action": "generate", "requests": [question_of(request, _RELEASE)]})
    assert not answer["failed"]
    (made,) = answer["modules"]
    folder = Path(made["ninja"]).parent
    objects = [folder / name for name in names]
    command = [workshop.environment.ninja(), "-f", made["ninja"], "-j", "1", *map(str, objects)]
    while True:
        try:
            run_ninja(command, folder, workshop.variables(), workshop.log, lambda *done: None)
        except MissingPart as error:
            workshop.fetch(error.part)
        else:
            return objects


def linked(workshop: Workshop, objects: list[Path], output: Path) -> Path:
    """A library of these objects alone.

    What the rest of the module would define is weak, and so undefined in it: the entries count
    their arguments before they use any of it.
    """
    weakened = []
    for i, one in enumerate(objects):
        listed = subprocess.run(["nm", "-u", one], capture_output=True, text=True, check=True)
        words = (line.split()[-1] for line in listed.stdout.splitlines())
        symbols = output.with_name(f"{i}.symbols")
        symbols.write_text("\n".join(filter(_REST.search, words)))
        weakened.append(output.with_name(f"{i}.o"))
        subprocess.run(["objcopy", f"--weaken-symbols={symbols}", one, weakened[-1]], check=True)
    command = [*workshop.cxx.split(), "-shared", "-o", output, *weakened, "-Wl,-z,lazy"]
    command += [f"-L{workshop.link_folder}", "-lcudart"]
    subprocess.run(command, check=True)
    return output


@pytest.mark.parametrize(("module", "capability", "ops"), PRODUCTS, ids=lambda given: str(given))
@needs_minutes
def test_signatures_of_products(module, capability, ops, tmp_path):
    arch = parse_arch("{}.{}a".format(*capability))
    (tmp_path / module).mkdir()
    with open_workshop(_RELEASE, arch, tmp_path / "build") as workshop:
        objects = _BINDINGS.get(module, (f"csrc_{module}.cuda.o",))
        found = bindings_of(workshop, module, objects)
        linked(workshop, found, tmp_path / module / f"{module}.so")
    attest(tmp_path, module, capability, ops)


# 180 to 270 sources a module: hours on a few cores.  The signatures are in two of them.
@pytest.mark.parametrize("capability", moe.MODULES, ids=str)
@needs_minutes
def test_signatures_of_experts(capability, tmp_path):
    """The functions of Blackwell's modules; their object's methods are read from the sources."""
    names = ("flashinfer_cutlass_fused_moe_binding", "deepgemm_jit_setup")
    objects = tuple(f"cutlass_backend_{name}.cuda.o" for name in names)
    arch = parse_arch("{}.{}a".format(*capability))
    with open_workshop(_RELEASE, arch, tmp_path) as workshop:
        found = bindings_of(workshop, moe.MODULES[capability], objects)
        library = linked(workshop, found, tmp_path / "bindings.so")
    loaded = files.load_file(library)
    for function in (moe.of_release(_RELEASE).init, moe.INTERLEAVE, moe.SET_INCLUDE_DIRS):
        entry = runtime.exported(loaded, function.signature.name)
        assert probe(entry).same_types(function.signature)
