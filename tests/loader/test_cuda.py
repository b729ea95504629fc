"""CUDA 12 and CUDA 13: kernels of either are loaded with their runtime, and never both."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import Any

import pytest

import fi_ffi
from fi_ffi.errors import AbiError, LoaderError
from fi_ffi.loader import machine, search
from fi_ffi.loader.kernels import Facts, cuda_of

from tests.helpers import cuda_runtimes
from tests.helpers.children import done

MAJORS = (12, 13)
# What a process tells of itself: sys.argv has a program, and what the program takes.
TELLS = """
import json, sys
import fi_ffi
from fi_ffi.abi._cffi import ffi
from fi_ffi.loader import machine, runtime, search

def call(folder, name):
    fi_ffi.use_kernels(folder)
    return fi_ffi.module(name).entry("runtime_version")()

def tell(**found):
    print(json.dumps({"mapped": sorted(machine.runtimes_in_process()), **found}))

def refused(make):
    before = open("/proc/self/maps").read().count("libtvm_ffi")
    try:
        make()
    except fi_ffi.FiFfiError as error:
        now = open("/proc/self/maps").read().count("libtvm_ffi")
        return [type(error).__name__, str(error), before == now]

exec(sys.argv[1])
"""


def told(program: str, *arguments: object, **more: str) -> dict[str, Any]:
    """What a process of its own says, in which both runtimes are installed."""
    folders = [str(cuda_runtimes.folder(major)) for major in MAJORS]
    path = os.pathsep.join([*folders, os.environ.get("PYTHONPATH", "")])
    names = ("FI_FFI_KERNELS", "FI_FFI_CUDA", "FI_FFI_SOURCES")
    settings = {**dict.fromkeys(names, ""), "FI_FFI_SOURCES": "local", **more}
    code, out, err = done(TELLS, program, *map(str, arguments), PYTHONPATH=path, **settings)
    assert code == 0, err
    return json.loads(out)


@pytest.mark.parametrize("major", MAJORS)
def test_kernels_have_the_runtime_that_they_name(major: int) -> None:
    found = told(
        f"tell(version=call(sys.argv[2], 'of_cuda_{major}'), major=machine.cuda_major(), "
        "path=machine.load_cudart()[1])",
        cuda_runtimes.module(major),
    )
    assert found["version"] // 1000 == found["major"] == major
    assert found["mapped"] == [major]
    assert Path(found["path"]).name.startswith(f"libcudart.so.{major}")


@pytest.mark.parametrize("first", MAJORS)
def test_a_second_cuda_is_refused(first: int) -> None:
    """In words that name both, and nothing of it is loaded; the first serves on."""
    second = 25 - first
    found = told(
        f"""
call(sys.argv[2], 'of_cuda_{first}')
error = refused(lambda: call(sys.argv[3], 'of_cuda_{second}'))
by_path = refused(lambda: fi_ffi.module(sys.argv[3] + '/of_cuda_{second}/of_cuda_{second}.so'))
tell(error=error, by_path=by_path, version=call(sys.argv[2], 'of_cuda_{first}'))
""",
        cuda_runtimes.module(first), cuda_runtimes.module(second),
    )  # fmt: skip
    assert found["mapped"] == [first] and found["version"] // 1000 == first
    for kind, text, _ in (found["error"], found["by_path"]):
        assert kind == "AbiError"
        for words in (
            f"of_cuda_{second}.so needs libcudart.so.{second}",
            f"this process has libcudart.so.{first} (/",
            f"`fi-ffi build --cuda {first}`",
        ):
            assert words in text, text


@pytest.mark.parametrize("theirs", MAJORS)
def test_a_runtime_that_another_package_brought(theirs: int) -> None:
    """It is the process's: kernels of it are loaded with that copy, others are refused, before
    even libtvm_ffi is loaded, with the torch that brought it."""
    other = 25 - theirs
    found = told(
        f"""
import types
sys.modules["torch"] = types.SimpleNamespace(
    __version__="2.9.0+cu{theirs}8", version=types.SimpleNamespace(cuda="{theirs}.8"))
brought = ffi.dlopen(sys.argv[4])
majors = machine.majors_here()
error = refused(lambda: call(sys.argv[3], 'of_cuda_{other}'))
tell(majors=majors, error=error, path=machine.load_cudart()[1],
     version=call(sys.argv[2], 'of_cuda_{theirs}'))
""",
        cuda_runtimes.module(theirs), cuda_runtimes.module(other), cuda_runtimes.library(theirs),
    )  # fmt: skip
    assert found["majors"] == found["mapped"] == [theirs]
    assert found["version"] // 1000 == theirs
    assert Path(found["path"]).samefile(cuda_runtimes.library(theirs))
    kind, text, is_untouched = found["error"]
    assert kind == "AbiError" and is_untouched
    assert f"; torch 2.9.0+cu{theirs}8 is of CUDA {theirs}.8)" in text
    assert f"needs libcudart.so.{other}, and this process has libcudart.so.{theirs}" in text


@pytest.mark.parametrize("major", MAJORS)
def test_of_two_that_others_brought(major: int) -> None:
    """Two packages of two CUDAs: not fi_ffi's doing, and the kernels' own is in use."""
    found = told(
        "brought = [ffi.dlopen(path) for path in sys.argv[3:]]; fi_ffi.use_kernels(sys.argv[2]); "
        f"tell(major=machine.cuda_major(), version=call(sys.argv[2], 'of_cuda_{major}'))",
        cuda_runtimes.module(major), *map(cuda_runtimes.library, MAJORS),
    )  # fmt: skip
    assert found["mapped"] == [*MAJORS]
    assert found["version"] // 1000 == found["major"] == major


@pytest.mark.parametrize("major", MAJORS)
@pytest.mark.parametrize("how", ["what they need", "their version", "FI_FFI_CUDA", "a library"])
def test_memory_comes_from_the_runtime_of_the_kernels(how: str, major: int, tmp_path: Path) -> None:
    """Whatever asks first, a workspace or a stream, before any kernel is loaded."""
    kernels, more = cuda_runtimes.module(major), {}
    if how == "their version":
        kernels = tmp_path / "jit_cache"
        (kernels / "norm").mkdir(parents=True)
        (kernels / "norm" / "norm.so").write_bytes(b"is not looked at")
        (tmp_path / "_build_meta.py").write_text(f'__version__ = "0.6.13+cu{major}8.sm90a"\n')
    elif how == "FI_FFI_CUDA":
        more, kernels = {"FI_FFI_CUDA": f"cu{major}0"}, cuda_runtimes.module(25 - major)
    program = "machine.load_cudart()"
    if how == "a library":
        program = f"fi_ffi.module(sys.argv[2] + '/of_cuda_{major}/of_cuda_{major}.so')"
        more = {"FI_FFI_KERNELS": ""}
    found = told(
        f"{program}; tell(major=machine.cuda_major())",
        kernels, **{"FI_FFI_KERNELS": str(kernels), **more},
    )  # fmt: skip
    assert (found["major"], found["mapped"]) == (major, [major])


@pytest.mark.parametrize(
    ("driver", "majors"),
    [(None, (13, 12)), ((13, 0), (13, 12)), ((14, 1), (13, 12)), ((12, 6), (12,)), ((11, 8), ())],
)
def test_the_driver_says_which_kernels_it_runs(
    driver: tuple[int, int] | None, majors: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "_runtime", None)
    monkeypatch.setattr(machine, "runtimes_in_process", dict)
    monkeypatch.setattr(machine, "driver_version", lambda: driver)
    assert machine.majors_here() == majors
    for major in machine.CUDA_MAJORS:
        if driver is None or driver[0] >= major:
            machine.check_driver(major, "norm.so")
            continue
        with pytest.raises(LoaderError) as caught:
            machine.check_driver(major, "norm.so")
        text = str(caught.value)
        for part in (f"norm.so is of CUDA {major}", "driver", ".".join(map(str, driver))):
            assert part in text


def test_a_driver_that_is_too_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels of CUDA 13 on JetPack 6: refused with both in words, and not loaded."""
    facts = Facts(["libcudart.so.13"], [], [])
    file = search.ModuleFile("norm", tmp_path / "norm.so", "0" * 64)
    source = cuda_runtimes  # any object: it is not asked
    monkeypatch.setattr(search, "find_module", lambda module, device: (source, file, facts))
    monkeypatch.setattr(machine, "_runtime", None)
    monkeypatch.setattr(machine, "runtimes_in_process", dict)
    monkeypatch.setattr(machine, "driver_version", lambda: (12, 6))
    from fi_ffi.loader import runtime

    with pytest.raises(LoaderError) as caught:
        runtime.load("of an old driver", 0)
    text = str(caught.value)
    for part in (str(file.path), "of CUDA 13", "of CUDA 12.6", "--cuda 12", "fi-ffi[cu12]"):
        assert part in text


@pytest.mark.parametrize(
    ("needed", "major"),
    [
        (["libc.so.6", "libcudart.so.12"], 12),
        (["libcudart.so.13", "libc.so.6"], 13),
        (["libcudart.so.11.0"], 11),
        (["libcublas.so.12", "libmycudart.so.12"], None),
        ([], None),
    ],
)
def test_a_file_says_which_cuda_it_is_of(needed: list[str], major: int | None) -> None:
    assert cuda_of(Facts(needed, [], [])) == major
    if major == 11:
        with pytest.raises(AbiError, match=r"needs libcudart\.so\.11, .* CUDA 12 and 13"):
            machine.check_cuda(major, "norm.so")


@pytest.mark.parametrize(
    ("file", "package", "extra"),
    [
        ("libcudart.so.12", "nvidia-cuda-runtime-cu12", "cu12"),
        ("libcudart.so.13", "nvidia-cuda-runtime", "cu13"),
        ("libcublasLt.so.12", "nvidia-cublas-cu12", "gemm-cu12"),
        ("libnvrtc.so.13", "nvidia-cuda-nvrtc", "gemm"),
    ],
)
def test_a_library_that_is_lacking_is_named(
    file: str, package: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine.library, "in_process", lambda name: None)
    monkeypatch.setattr(machine, "_library_places", lambda name: [f"/none/{name}"])
    with pytest.raises(LoaderError) as caught:
        machine.load_library.__wrapped__(file)
    text, major = str(caught.value), int(file[-2:])
    for part in (file, f"'{package}>={major},<{major + 1}'", f"fi-ffi[{extra}]", "CUDA_HOME"):
        assert part in text


def test_where_a_runtime_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Installed packages of either layout, then the linker's own places, then toolkits."""
    site, conda, toolkit = (tmp_path / name for name in ("site", "conda", "toolkit"))
    lib = f"targets/{platform.machine()}-linux/lib"
    made = [
        site / "nvidia" / "cuda_runtime" / "lib" / "libcudart.so.12",
        conda / "lib" / "libcudart.so.12",
        toolkit / lib / "libcudart.so.12",
    ]
    for path in made:
        path.parent.mkdir(parents=True)
        path.touch()
    monkeypatch.setattr("sys.path", [str(site), str(site)])
    monkeypatch.setenv("CONDA_PREFIX", str(conda))
    monkeypatch.setenv("CUDA_PATH", str(tmp_path / "absent"))
    monkeypatch.setenv("CUDA_HOME", str(toolkit))
    found = [
        place for place in machine._library_places("libcudart.so.12") if "/usr/local" not in place
    ]
    assert found == [str(made[0]), "libcudart.so.12", str(made[1]), str(made[2])]
    assert next(machine._library_places("libcudart.so.13")) == "libcudart.so.13"


def test_a_tag_that_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(search.CUDA, "12.8")
    with pytest.raises(fi_ffi.ArgumentError, match=r"FI_FFI_CUDA.*12\.8.*cu130"):
        search.cuda_of_kernels()
