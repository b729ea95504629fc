"""Modules that CuTe DSL made: the library that they are launched through, and their interface.

The library here is a stand-in of one function, installed as the real one is; what CuTe DSL
itself makes is in tests/loader/building/test_cute.py.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from pathlib import Path

import pytest

from fi_ffi.loader import cute_runtime

from tests.helpers import compiler
from tests.helpers.children import done

HERE = Path(__file__).parent

LOAD = """
import sys
import numpy as np
import fi_ffi
from fi_ffi.loader import cute_runtime, tvm_ffi

{before}
try:
    module = fi_ffi.module(sys.argv[1])
    print(module.twice(np.zeros((3, 4), np.float32), 3))
    print(fi_ffi.file_signatures(sys.argv[1])["twice"])
    print(cute_runtime.load().origin)
    print(tvm_ffi.in_process(cute_runtime.FILE).path)
    for wrong in [(), (1, 2), (np.zeros((3, 4), np.float32), "x")]:
        try:
            module.twice(*wrong)
        except fi_ffi.ArgumentTypeError as error:
            print(error)
except fi_ffi.FiFfiError as error:
    print(type(error).__name__, error)
    maps = open("/proc/self/maps").read()
    print(any(name in maps for name in ("libcute_dsl_runtime.so\\n", "cute_module")))
"""


def runtime_library(folder, answer):
    """The stand-in, under a folder of its own."""
    source, made = folder / "runtime.c", folder / cute_runtime.FILE
    folder.mkdir(parents=True, exist_ok=True)
    source.write_text(f"int CuteDSLRT_Answer(void) {{ return {answer}; }}\n")
    return compiler.library(source, made, f"-Wl,-soname,{cute_runtime.FILE}")


def installed(site, library, major=13, version="4.7.1", digest=None):
    """A distribution that has the library, as pip leaves it."""
    member = f"nvidia_cutlass_dsl/cu{major}/lib/{cute_runtime.FILE}"
    target = site / member
    target.parent.mkdir(parents=True)
    target.write_bytes(library.read_bytes())
    info = site / f"nvidia_cutlass_dsl_libs_cu{major}-{version}.dist-info"
    info.mkdir()
    name = f"nvidia-cutlass-dsl-libs-cu{major}"
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    sha256 = base64.urlsafe_b64encode(digest or hashlib.sha256(target.read_bytes()).digest())
    (info / "RECORD").write_text(f"{member},sha256={sha256.rstrip(b'=').decode()},1\n")
    return target


@pytest.fixture
def module(tmp_path):
    """A module, and the library that it is linked with and does not find by itself."""
    library = runtime_library(tmp_path / "linked", 2)
    made = tmp_path / "kernels" / "cute_module.so"
    made.parent.mkdir()
    return compiler.library(HERE / "cute_module.c", made, "-Wl,--no-as-needed", str(library))


def said(module, *sites, before="", **more):
    paths = os.pathsep.join(map(str, [*sites, HERE.parents[1]]))
    code, out, err = done(LOAD.format(before=before), str(module), PYTHONPATH=paths, **more)
    assert code == 0, err
    return out


def test_the_installed_copy_is_loaded(module, tmp_path):
    target = installed(tmp_path / "site", runtime_library(tmp_path / "own", 5))
    answer, signature, origin, path, *refusals = said(module, tmp_path / "site").splitlines()
    assert (answer, path) == ("15", str(target))
    assert signature == "_twice(x: Tensor([n0, 4], float32), factor: int32)"
    assert origin == "installed 4.7.1"
    too_few, no_tensor, no_number = refusals
    assert "got 0 of them" in too_few and "Tensor([n0, 4], float32)" in too_few
    assert "x: Tensor([n0, 4], float32)" in no_tensor
    assert "factor: int32" in no_number


def test_inspecting_it_tells_names_and_shapes(module, tmp_path):
    installed(tmp_path / "site", runtime_library(tmp_path / "own", 5))
    paths = os.pathsep.join(map(str, [tmp_path / "site", HERE.parents[1]]))
    program = "from fi_ffi.cli import main; main()"
    code, out, err = done(program, "inspect", "--json", str(module), PYTHONPATH=paths)
    assert code == 0, err
    told = json.loads(out)
    assert told["functions"] == {"twice": "(x: Tensor([n0, 4], float32), factor: int32) -> void"}
    assert told["needed"][0] == cute_runtime.FILE


def test_that_of_the_other_cuda_serves_where_it_is_alone(module, tmp_path):
    old = installed(tmp_path / "old", runtime_library(tmp_path / "own", 7), major=12)
    assert said(module, tmp_path / "old").splitlines()[0:4:3] == ["21", str(old)]
    installed(tmp_path / "new", runtime_library(tmp_path / "own", 5))
    assert said(module, tmp_path / "old", tmp_path / "new").startswith("15\n")


def test_its_absence_is_explained_and_nothing_is_loaded(module, tmp_path):
    said_so, loaded = said(module).splitlines()
    assert said_so == (
        "LoaderError the module was made by CuTe DSL and needs libcute_dsl_runtime.so, which is "
        "not installed: `pip install --no-deps 'nvidia-cutlass-dsl-libs-cu13>=4.7'` "
        "(or fi-ffi[cute])"
    )
    assert loaded == "False"


def test_one_that_will_not_do(module, tmp_path):
    library = runtime_library(tmp_path / "own", 5)
    installed(tmp_path / "old", library, version="4.5.2")
    told = said(module, tmp_path / "old")
    assert "nvidia-cutlass-dsl-libs-cu13 4.5.2 is installed, and fi_ffi works with >=4.7" in told
    installed(tmp_path / "empty", library).unlink()
    told = said(module, tmp_path / "empty")
    assert "nvidia-cutlass-dsl-libs-cu13 4.7.1 is installed without " in told
    installed(tmp_path / "changed", library, digest=bytes(32))
    told = said(module, tmp_path / "changed")
    assert told.startswith("ArtifactError ") and "the RECORD of nvidia-cutlass-dsl-libs" in told
    broken = tmp_path / "broken.so"
    broken.write_text("no library")
    installed(tmp_path / "broken", broken)
    assert "does not load: " in said(module, tmp_path / "broken")


PRELOAD = """
from fi_ffi.abi._cffi import ffi
kept = [ffi.dlopen(path, 2) for path in sys.argv[2:]]
"""


def test_a_copy_in_the_process_is_the_only_one(module, tmp_path):
    """Whoever brought it, and though its symbols served nobody else so far."""
    installed(tmp_path / "site", runtime_library(tmp_path / "own", 5))
    other = runtime_library(tmp_path / "other", 11)
    before = PRELOAD.replace("sys.argv[2:]", repr([str(other)]))
    answer, _, origin, path, *_ = said(module, tmp_path / "site", before=before).splitlines()
    assert (answer, origin, path) == ("33", "already in this process", str(other))
    another = runtime_library(tmp_path / "another", 12)
    before = PRELOAD.replace("sys.argv[2:]", repr([str(other), str(another)]))
    told = said(module, before=before)
    assert "two copies of libcute_dsl_runtime are in this process" in told
