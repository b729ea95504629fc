"""Kernels of CuTe DSL: what can be asked for, and one that is built, looked at and refused."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path
from typing import Any

import pytest

from fi_ffi.catalogue.advice import build_advice
from fi_ffi.catalogue.families import FAMILIES
from fi_ffi.catalogue.requests import parse_request, request_for, with_options
from fi_ffi.errors import ArgumentError
from fi_ffi.loader.cache import cache_root
from fi_ffi.loader.elf import inspect_elf
from fi_ffi.loader.fatbin import architectures
from fi_ffi_build import cute, cute_driver
from fi_ffi_build.build import build
from fi_ffi_build.environment import Progress
from fi_ffi_build.questions import question_of

from tests.helpers.children import done
from tests.helpers.compiler import why_not_build

RELEASE = "0.7.2.post1"
NAME = "rmsnorm_sm90a_cute_dsl_rmsnorm_kernel_bfloat16_512_bias1"


def asked(text: str) -> dict[str, Any]:
    """What the driver is told of a request."""
    return dict(question_of(parse_request(text), RELEASE))


@pytest.mark.parametrize("name", cute.CALLS)
def test_every_family_has_a_call_for_its_defaults(name: str) -> None:
    request = parse_request(name)
    assert request.is_cute
    question = asked(name)
    assert json.loads(json.dumps(question)) == question
    home, _, function = question["function"].partition(":")
    assert home.startswith("flashinfer.") and function.isidentifier()
    assert question["arguments"]
    assert cute.CALLS.keys() == {family.name for family in FAMILIES.values() if family.is_cute}
    # Each option makes a difference.
    for option, of in FAMILIES[name].options.items():
        values = of.values or ("7",)
        other = next(value for value in values if value != of.default)
        changed = asked(f"{name}:{option}={other}")
        assert (changed["arguments"], changed["name"]) != (
            question["arguments"], question["name"],
        ), option  # fmt: skip


def test_a_call_has_the_tensors_that_its_options_say() -> None:
    found = asked("gdn_decode:batch=3,v_heads=8,state=bf16,split=1,indices=i64")["arguments"]
    assert found["initial_state"] == {"tensor": "bfloat16", "shape": [3, 8, 128, 128]}
    assert found["output_state_indices"] == {"tensor": "int64", "shape": [3]}
    assert found["state"] is None and found["disable_state_update"] is False
    plain = asked("gdn_decode:pool=0,tokens=2")["arguments"]
    assert plain["state"]["tensor"] == "float32"
    assert "initial_state" not in plain
    kept = asked("gdn_decode:tokens=4,steps=1,update=0")["arguments"]
    assert kept["intermediate_states_buffer"]["shape"] == [64, 4, 32, 128, 128]


def test_what_flashinfer_does_not_name_is_named_by_its_options() -> None:
    names = {
        "gdn_prefill":
            "bfloat16_alpha_beta_init_float32_float32_nocheckpoints_noindices_int64",
        "gdn_prefill:alpha=0,initial_state=0,state=bf16,checkpoints=f32,indices=i32":
            "bfloat16_noalpha_beta_noinit_bfloat16_checkpoints_float32_indices_int32_int64",
        "kda_decode:gate=0,heads=8": "b64_t1_h8_d128_nogate",
        "mla_decode:dtype=e4m3,page_size=128,lengths=equal": "float8_e4m3fn_p128_equal_split",
        "rmsnorm_cute:dtype=f16,contiguous=0": "float16_4096_bias0_strided",
        "qk_rmsnorm_cute:head_size=64,weight_bias=1": "bfloat16_d64_bias1",
        "rmsnorm_fp4quant:scale=ue8m0,block_size=32,swizzled=1":
            "bfloat16_4096_ue8m0x32_swizzled",
    }  # fmt: skip
    assert {text: asked(text)["name"] for text in names} == names
    # Each option is in the name that a release without names needs.
    name = asked("gdn_decode:state=bf16,tokens=2")["name"]
    assert all(f"{option}_" in name for option in FAMILIES["gdn_decode"].options)
    assert "tokens_2_state_bf16" in name


@pytest.mark.parametrize(
    "text",
    [
        "gdn_prefill", "kda_decode", "rmsnorm_cute", "rmsnorm_fp4quant", "qk_rmsnorm_cute",
        "qk_rmsnorm_cute:dtype=f16,head_size=96,weight_bias=1",
        "gdn_prefill:state=bf16,cu_seqlens=i32,alpha=0,initial_state=0,checkpoints=f32,indices=i32",
        "gdn_prefill:dtype=f16,state=e5m2,beta=0,initial_state=e4m3",
        "kda_decode:batch=3,heads=8,head_size=64,gate=0", "rmsnorm_cute:dtype=f16,contiguous=0",
        "rmsnorm_cute:hidden_size=16,weight_bias=1", "mla_decode",
        "mla_decode:dtype=f16,page_size=1,split=0", "mla_decode:dtype=e4m3,lengths=equal",
        "rmsnorm_fp4quant:hidden_size=512,block_size=32,scale=ue8m0,swizzled=1",
    ],
)  # fmt: skip
def test_a_name_tells_what_makes_it(text: str) -> None:
    question = asked(text)
    module = f"{question['module']}_sm90a_cute_dsl_some_kernel_{question['name']}"
    assert request_for(module) == (text, "9.0a")
    line = f"`fi-ffi build --release {RELEASE} --arch 9.0a {text}` makes it"
    assert build_advice(module, RELEASE).startswith(line)


def test_names_that_tell_less() -> None:
    assert request_for("norm") is request_for("gdn_prefill_sm90") is None
    for name in ("gdn_decode_bf16_state_sm90a_cute_dsl_wide_vec_t1", "x_sm120f_cute_dsl_x"):
        asked, arch = request_for(name) or ("?", "?")
        assert (asked, arch) == ("", "12.0f" if name[0] == "x" else "9.0a")
        assert "--list` shows the families" in build_advice(name, RELEASE)


def test_kernels_of_one_call_have_names_of_their_own(tmp_path: Path) -> None:
    """Where FlashInfer names none of them."""
    question = {"arch": "sm_90a", "folder": str(tmp_path), "cxx": "c++", "runtime": "/"}
    maker = cute_driver.Maker(question)

    class TwoSteps:
        pass

    for name in ("a", "b"):
        maker.begin({"name": name, "module": "m"})
        for kernel in ("two_steps_{}", "two_steps_{}_2"):
            made = f"m_sm90a_cute_dsl_{kernel.format(name)}"
            (tmp_path / made).mkdir()
            (tmp_path / made / f"{made}.so").touch()  # it is there already
            maker.compiled(pytest.fail, TwoSteps())
            assert maker.names[-1] == made
        assert len(maker.names) == 2


def test_a_kernel_that_flashinfer_keeps_is_of_later_requests_too(tmp_path: Path) -> None:
    """Two batch sizes, for which FlashInfer compiles one kernel: it only calls the second time."""
    question = {"arch": "sm_90a", "folder": str(tmp_path), "cxx": "c++", "runtime": "/"}
    maker, made = cute_driver.Maker(question), "m_sm90a_cute_dsl_k"
    (tmp_path / made).mkdir()
    (tmp_path / made / f"{made}.so").touch()  # it is there already
    maker.begin({"name": "a", "module": "m"})
    kept = maker.cached("m", "k", pytest.fail)
    for name in ("b", "c"):
        maker.begin({"name": name, "module": "m"})
        kept()
        kept()
        assert maker.names == [made]


@pytest.mark.parametrize(
    "text",
    ["gdn_decode:batch=0", "gdn_decode:state=f16", "gdn_prefill:tokens=1", "kda_decode:gate=2"],
)
def test_options_refused(text: str) -> None:
    with pytest.raises(ArgumentError, match="argument `modules"):
        parse_request(text)


def test_a_family_is_no_module_to_be_fetched() -> None:
    with pytest.raises(ArgumentError, match="expected a module's name"):
        parse_request("gdn_decode").module_in(RELEASE)


def test_dtypes_of_a_command_reach_the_families_that_take_them() -> None:
    assert with_options(["gdn_decode", "rmsnorm_cute"], {"dtype": ["f16"]}) == [
        "gdn_decode", "rmsnorm_cute:dtype=f16",
    ]  # fmt: skip


def test_another_processor_is_refused(tmp_path: Path) -> None:
    other = "aarch64" if os.uname().machine == "x86_64" else "x86_64"
    with pytest.raises(ArgumentError, match="all that CuTe DSL compiles for here"):
        build(["rmsnorm_cute"], release=RELEASE, output=tmp_path, cpu=other)


def test_names_are_of_a_length_that_files_can_have() -> None:
    assert cute_driver.module_name("norm_sm90a_cute_dsl", "f16_4096") == (
        "norm_sm90a_cute_dsl_f16_4096"
    )
    long = [cute_driver.module_name("x_sm90a_cute_dsl", f"{'y' * 300}{end}") for end in "ab"]
    assert len(long[0]) == len(long[1]) == 200
    assert long[0] != long[1]
    assert long[0] == cute_driver.module_name("x_sm90a_cute_dsl", f"{'y' * 300}a")


# One that is built: the compiler is fetched once, 345 MB on disk.


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if reason := why_not_build():
        pytest.skip(reason)
    output = tmp_path_factory.mktemp("cute")
    return build(["rmsnorm_cute:hidden_size=512,weight_bias=1"], release=RELEASE, output=output)


@pytest.fixture(scope="module")
def module(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library, taken out of the wheel."""
    folder = tmp_path_factory.mktemp("module")
    with zipfile.ZipFile(wheel) as archive:
        member = f"flashinfer_jit_cache/jit_cache/{NAME}/{NAME}.so"
        assert (
            f"{member},sha256="
            in archive.read(
                next(name for name in archive.namelist() if name.endswith("RECORD"))
            ).decode()
        )
        return Path(archive.extract(member, folder))


@pytest.fixture
def runtime(module: Path, tmp_path: Path) -> Path:
    """A folder for PYTHONPATH that has the runtime library's distribution, and nothing else."""
    dsl = next(path for path in (cache_root() / "build").glob("cute-dsl-*") if path.is_dir())
    for name in ("nvidia_cutlass_dsl", "nvidia_cutlass_dsl_libs_cu13-*"):
        for path in dsl.glob(name):
            (tmp_path / path.name).symlink_to(path)
    return tmp_path


def test_it_is_a_module_like_the_others(module: Path) -> None:
    found = inspect_elf(module)
    assert found.needed == ("libcute_dsl_runtime.so",)
    assert found.functions == (NAME.replace("_sm90a_cute_dsl", ""),)
    assert [code.name for code in architectures(module)] == ["sm_90a"]


ASK = """
import sys
import numpy as np
import fi_ffi

try:
    module = fi_ffi.module(sys.argv[1])
except fi_ffi.LoaderError as error:
    sys.exit(str(error))
(symbol,) = module.entries()
entry = module.entry(symbol)
print(entry.signature)
memory = np.zeros(4096, np.uint8)  # aligned as the kernel wants it, and on no GPU
memory = memory[-memory.ctypes.data % 128 :][:2048].view(np.float16)
x, weight = memory.reshape(2, 512), memory[:512]
for wrong in [(x,), (x, weight, x, 2, "eps"), (x, weight, x, 2, 1e-6)]:
    try:
        entry(*wrong)
    except (fi_ffi.ArgumentTypeError, fi_ffi.KernelError) as error:
        print(type(error).__name__, str(error).partition("backtrace")[0].strip())
"""
SIGNATURE = (
    "__call__(mX: Tensor([n0, 512], bfloat16), mW: Tensor([512], bfloat16), "
    "mY: Tensor([n0, 512], bfloat16), M: int64, eps: float32)"
)


def test_it_tells_its_signature_and_refuses_other_calls(module: Path, runtime: Path) -> None:
    repository = os.fspath(Path(__file__).parents[3])
    code, out, err = done(ASK, str(module), PYTHONPATH=f"{repository}{os.pathsep}{runtime}")
    assert code == 0, err
    signature, too_few, no_number, no_gpu = out.splitlines()
    assert signature == SIGNATURE
    assert too_few.startswith("ArgumentTypeError") and "got 1 of them" in too_few
    assert "`eps: float32`" in no_number
    assert no_gpu.startswith("KernelError") and no_gpu.endswith("expected device_type=cuda")
    code, _, err = done(ASK, str(module), PYTHONPATH=repository)
    assert code == 1 and "libcute_dsl_runtime.so, which is not installed: `pip install" in err


def test_a_second_build_compiles_nothing_and_gives_the_same(wheel: Path, tmp_path: Path) -> None:
    seen: list[Progress] = []
    names = ["rmsnorm_cute:hidden_size=512,weight_bias=1"]
    again = build(names, release=RELEASE, output=tmp_path, report=seen.append)
    assert again.read_bytes() == wheel.read_bytes()
    log = cache_root() / "build" / f"{RELEASE}-9.0a" / "build.log"
    assert f"compiling {NAME}" not in log.read_text()


def test_what_cannot_be_compiled_is_told(wheel: Path, tmp_path: Path) -> None:
    """Instructions of later GPUs."""
    with pytest.raises(ArgumentError, match="CuTe DSL refused it: error: PTX assembly failed"):
        build(["rmsnorm_fp4quant"], release=RELEASE, output=tmp_path)
    assert not list(tmp_path.iterdir())
