"""Modules of kernels that Python functions compile with CuTe DSL: FlashInfer's and nobody's."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from fi_ffi.cli.build import build as command
from fi_ffi.errors import ArgumentError, BuildError
from fi_ffi.loader.cache import cache_root
from fi_ffi.loader.elf import inspect_elf
from fi_ffi.loader.fatbin import architectures
from fi_ffi_build.functions import build_functions, parse_function

from tests.helpers.children import done
from tests.helpers.compiler import why_not_build

REPOSITORY = Path(__file__).parents[3]
EXAMPLE = REPOSITORY / "examples" / "cute_kernels.py"
OTHERS = ["quack-kernels==0.6.5", "flash-attn-4==4.0.0b36", "einops==0.8.2"]


def test_functions_are_named_by_file_or_by_package(tmp_path: Path) -> None:
    file = tmp_path / "some.py"
    file.touch()
    assert parse_function(f"{file}:f")["function"] == f"{file}:f"
    relative = f"{os.path.relpath(file)}:f"
    assert parse_function(relative)["function"] == f"{Path(os.path.relpath(file)).absolute()}:f"
    assert parse_function("package.module:f")["function"] == "package.module:f"
    assert parse_function("package.module:f")["module"] == "f"


@pytest.mark.parametrize("text", ["f", "package.module", "package:", ":f", "a.py:1f", "a-b:f"])
def test_what_names_no_function_is_refused(text: str) -> None:
    with pytest.raises(ArgumentError, match=r"expected FILE\.py:FUNCTION or PACKAGE\.MODULE:FUNC"):
        build_functions([text])


def test_a_file_and_a_requirement_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="expected a file that exists"):
        build_functions([f"{tmp_path}/some.py:f"])
    with pytest.raises(ArgumentError, match="argument `with`: got '=='"):
        build_functions(["json:dumps"], requirements=["=="])


def _run(*arguments: str) -> Result:
    return CliRunner().invoke(command, arguments)


@pytest.mark.parametrize(
    "given",
    [["norm"], ["--release", "0.6.13"], ["--list"], ["--jobs", "2"], ["--cpu", "aarch64"],
     ["--cuda", "13"], ["--dtype", "bf16"], ["--head-dim", "64"], ["--backend", "fa2"],
     ["--build-dir", "x"]],
    ids=lambda given: given[0],
)  # fmt: skip
def test_options_of_modules_do_not_go_with_functions(given: list[str]) -> None:
    result = _run(*given, "--cute", "json:dumps")
    assert result.exit_code == 2
    name = given[0] if given[0].startswith("-") else "NAME"
    assert f"{name} is for FlashInfer's modules" in result.output


def test_with_needs_a_function() -> None:
    result = _run("norm", "--with", "einops")
    assert result.exit_code == 2 and "name one by --cute" in result.output


# What is built: CuTe DSL and torch, as for FlashInfer's kernels, and two small distributions.


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Those of the example, by the function."""
    if reason := why_not_build():
        pytest.skip(reason)
    functions = "rmsnorm", "rmsnorm_residual", "attention", "attention_paged"
    output = tmp_path_factory.mktemp("functions")
    made = build_functions(
        [f"{EXAMPLE}:{name}" for name in functions], requirements=OTHERS, output=output
    )
    assert sorted(made) == sorted(output.iterdir())
    return dict(zip(functions, made, strict=True))


def _with_runtime(folder: Path) -> str:
    """PYTHONPATH with the runtime library's distribution, and nothing else of CuTe DSL."""
    dsl = next(path for path in (cache_root() / "build").glob("cute-dsl-*") if path.is_dir())
    for name in ("nvidia_cutlass_dsl", "nvidia_cutlass_dsl_libs_cu13-*"):
        for path in dsl.glob(name):
            (folder / path.name).symlink_to(path)
    return f"{REPOSITORY}{os.pathsep}{folder}"


CALL = """
import sys
from pathlib import Path
import ml_dtypes, numpy as np
import fi_ffi

module = fi_ffi.module(Path(sys.argv[1]))
(symbol,) = module.entries()
print(symbol, module.entry(symbol).signature)
memory = np.zeros(1 << 22, np.uint8)  # aligned as kernels want it, and on no GPU
memory = memory[-memory.ctypes.data % 128 :]

def bf16(*shape):
    return memory[: 2 * int(np.prod(shape))].view(ml_dtypes.bfloat16).reshape(shape)

x, pages = bf16(2, 4096), np.zeros((2, 4), np.int32)
q, k, paged = bf16(2, 4, 32, 128), bf16(2, 8, 8, 128), bf16(8, 128, 8, 128)
lse, scale = memory[: 2 * 32 * 4 * 4].view(np.float32).reshape(2, 32, 4), 0.1
rest = [None] * 4 + [(None, None), None, None]
given = {
    "rmsnorm": (x, x[0], None, None, x, None, None, None, 1e-6),
    "rmsnorm_residual": (x, x[0], None, x, x, x, None, None, 1e-6),
    "attention": (q, k, k, q, lse, scale, *[None] * 5, *rest),
    "attention_paged": (q, paged, paged, q, lse, scale, *[None] * 3, pages[0, :2], pages, *rest),
}[sys.argv[2]]
for wrong in [given[:-1], (None, *given[1:]), given]:
    try:
        module.entry(symbol)(*wrong)
    except (fi_ffi.ArgumentTypeError, fi_ffi.KernelError) as error:
        print(type(error).__name__, str(error).partition("backtrace")[0].strip())
"""
_ATTENTION = (
    "mQ: Tensor([n0, n1, n2, n3], bfloat16), mK: Tensor([n4, n5, n6, n7], bfloat16), "
    "mV: Tensor([n8, n9, n10, n11], bfloat16), mO: Tensor([n12, n13, n14, n15], bfloat16), "
    "mLSE: Tensor([n16, n17, n18], float32), softmax_scale: float32, "
    "mCuSeqlensQ: None, mCuSeqlensK: None, mSeqUsedQ: None, "
)
_LATER = (
    ", window_size_left: None, window_size_right: None, learnable_sink: None, "
    "blocksparse_tensors: None, aux_data: Tuple[None, None], mCuTotalMBlocks: None, "
    "mCuTotalSplitsMBlocks: None)"
)
_NORM = "mX: Tensor([n0, 4096], bfloat16), mW: Tensor([4096], bfloat16), mB: None, "
SIGNATURES = {
    "rmsnorm": f"rmsnorm_rmsnorm __call__({_NORM}mRes: None, mO: Tensor([n0, 4096], bfloat16), "
    "mResO: None, mRstd: None, mMean: None, eps: float32)",
    "rmsnorm_residual": f"rmsnorm_residual_rmsnorm __call__({_NORM}"
    "mRes: Tensor([n0, 4096], bfloat16), mO: Tensor([n0, 4096], bfloat16), "
    "mResO: Tensor([n0, 4096], bfloat16), mRstd: None, mMean: None, eps: float32)",
    "attention": f"attention_flash_attention_forward_sm90 __call__({_ATTENTION}"
    f"mSeqUsedK: None, mPageTable: None{_LATER}",
    "attention_paged": f"attention_paged_flash_attention_forward_sm90 __call__({_ATTENTION}"
    f"mSeqUsedK: Tensor([n19], int32), mPageTable: Tensor([n20, n21], int32){_LATER}",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_libraries_of_other_packages(name: str, libraries: dict[str, Path], tmp_path: Path) -> None:
    """They need the runtime and no torch, tell their signature, and refuse what it excludes."""
    library = libraries[name]
    found = inspect_elf(library)
    assert found.needed == ("libcute_dsl_runtime.so",)
    assert [code.name for code in architectures(library)] == ["sm_90a"]
    code, out, err = done(CALL, str(library), name, PYTHONPATH=_with_runtime(tmp_path))
    assert code == 0, err
    signature, too_few, no_tensor, no_gpu = out.splitlines()
    assert signature == SIGNATURES[name]
    assert too_few.startswith("ArgumentTypeError") and "of them" in too_few
    assert no_tensor.startswith("ArgumentTypeError") and "got None" in no_tensor
    assert no_gpu.startswith("KernelError") and no_gpu.endswith("expected device_type=cuda")


OWN = """
import cutlass.cute as cute

@cute.kernel
def _kernel(x: cute.Tensor, y: cute.Tensor, n: cute.Int32):
    i = cute.arch.block_idx()[0] * 128 + cute.arch.thread_idx()[0]
    if i < n:
        y[i] = x[i] + x[i]

@cute.jit
def doubled(x: cute.Tensor, y: cute.Tensor, stream):
    n = x.shape[0]
    _kernel(x, y, n).launch(grid=[cute.ceil_div(n, 128), 1, 1], block=[128, 1, 1], stream=stream)

def own():
    import cutlass
    n = cute.sym_int()
    x, y = (cute.runtime.make_fake_tensor(cutlass.Float32, (n,), stride=(1,)) for _ in "xy")
    stream = cute.runtime.make_fake_stream(use_tvm_ffi_env_stream=True)
    cute.compile(doubled, x, y, stream, options="--enable-tvm-ffi")

def nothing():
    pass

def missing():
    import no_such_package

def fails():
    raise ValueError("why it fails")
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    if reason := why_not_build():
        pytest.skip(reason)
    (tmp_path / "own.py").write_text(OWN)
    return tmp_path / "own.py"


def test_a_kernel_of_one_s_own(own: Path, tmp_path: Path) -> None:
    """For two GPUs; a build compiles again what has changed."""
    made = build_functions([f"{own}:own"], arch="8.0 9.0a", output=tmp_path / "libraries")
    assert [path.name for path in made] == [
        "own_sm80_cute_dsl_doubled.so", "own_sm90a_cute_dsl_doubled.so",
    ]  # fmt: skip
    assert [architectures(path)[0].name for path in made] == ["sm_80", "sm_90a"]
    before = made[1].read_bytes()
    own.write_text(OWN.replace("x[i] + x[i]", "x[i] * x[i] * x[i]"))
    (again,) = build_functions([f"{own}:own"], output=tmp_path / "libraries")
    assert again == made[1] and again.read_bytes() != before


def test_a_function_of_a_package(own: Path, tmp_path: Path) -> None:
    """Which is installed for the build alone, without what it requires."""
    wheel = tmp_path / "some_kernels-1.0-py3-none-any.whl"
    info = "some_kernels-1.0.dist-info"
    files = {
        "some_kernels/__init__.py": "",
        "some_kernels/norms.py": OWN,
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: some-kernels\nVersion: 1.0\n"
        "Requires-Dist: no-such-distribution\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": "",
    }
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    requirements = [f"some-kernels @ {wheel.as_uri()}"]
    given = ["some_kernels.norms:own"]
    (made,) = build_functions(given, requirements=requirements, output=tmp_path / "libraries")
    assert made.name == "own_sm90a_cute_dsl_doubled.so"
    assert inspect_elf(made).functions == ("own_doubled",)
    with pytest.raises(BuildError, match=r"No module named 'some_kernels'\. --with installs"):
        build_functions(given, output=tmp_path / "libraries")


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("nothing", "the function compiled nothing for it with CuTe DSL"),
        ("missing", "No module named 'no_such_package'. --with installs what has no_such_package"),
        ("fails", "the function or CuTe DSL refused it: why it fails"),
        ("lacks", "has no attribute 'lacks'"),
    ],
)
def test_functions_that_give_no_kernel(own: Path, tmp_path: Path, name: str, why: str) -> None:
    with pytest.raises(BuildError) as caught:
        build_functions([f"{own}:own", f"{own}:{name}"], output=tmp_path / "libraries")
    assert str(caught.value).startswith(f"{own}:{name}: ") and why in str(caught.value)
    log = Path(caught.value.log or "").read_text()
    assert name == "nothing" or "Traceback" in log
    assert not (tmp_path / "libraries").exists()
