"""Kernels compiled against an older TVM-FFI's headers load and attest with the pinned library.

The wheels FlashInfer publishes were compiled with whichever apache-tvm-ffi was current;
0.1.6 is the oldest that its releases ask for.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import fi_ffi
from fi_ffi.abi import library
from fi_ffi.abi.function import Entry
from fi_ffi.loader.elf import FUNCTION_PREFIX
from fi_ffi.loader.kernels import open_source
from fi_ffi.loader.tvm_ffi import tvm_ffi_version
from fi_ffi.modules.files import file_signatures
from fi_ffi_build.build import run_ninja
from fi_ffi_build.environment import open_workshop

OLDEST = "0.1.6"
pytestmark = pytest.mark.skipif(
    not os.environ.get("FI_FFI_STRESS"), reason="compiles for a minute: FI_FFI_STRESS runs it"
)


def headers(folder: Path) -> Path:
    """The include folder of the oldest release."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest"]
    command += [str(folder), "--only-binary=:all:", "--python-version", "3.11"]
    command += ["--platform", "manylinux_2_28_x86_64", f"apache-tvm-ffi=={OLDEST}"]
    subprocess.run(command, check=True, timeout=300)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as archive:
        archive.extractall(folder)
    return folder / "tvm_ffi" / "include"


@pytest.fixture(scope="module")
def page(built_wheel_sm87, tmp_path_factory) -> Path:
    """page.so by FlashInfer's own build file, with nothing but the headers changed."""
    folder = tmp_path_factory.mktemp("older")
    include = headers(folder)
    with open_workshop("0.6.13", ("8.7",), None) as workshop:
        built = next(workshop.folder.rglob("cached_ops/page/build.ninja"))
        text, found = re.subn(r"\S+/site-packages/tvm_ffi/include", str(include), built.read_text())
        assert found
        text = text.replace(str(built.parent), str(folder))
        (folder / "build.ninja").write_text(text)
        command = [workshop.environment.ninja(), "-C", str(folder)]
        variables, log = workshop.variables(), folder / "log"
        run_ninja(command, folder, variables, log, lambda done, total: None)
    return next(folder.rglob("page.so"))


def test_loads_and_tells_the_same_signatures(page, built_wheel_sm87):
    usual = open_source(built_wheel_sm87).file("page").path
    assert page.read_bytes() != usual.read_bytes()
    found = file_signatures(page)
    assert found == file_signatures(usual)
    assert len(found) == 2
    assert tvm_ffi_version() > tuple(map(int, OLDEST.split(".")))


def test_its_errors_are_decoded(page):
    name = "append_paged_kv_cache"
    handle = library.open_module(str(page))
    entry = Entry(name, library.find_symbol(handle, FUNCTION_PREFIX + name), owner=handle)
    tensor = fi_ffi.TensorDesc(4096, (4,), "float16")
    with pytest.raises(fi_ffi.KernelError) as caught:
        entry(*[tensor] * 9, 0)
    assert caught.value.message
    assert "page.cu" in caught.value.backtrace
    with pytest.raises(fi_ffi.KernelError, match="Mismatched type on argument #") as caught:
        entry(*[1] * 10)
    assert caught.value.kind == "TypeError"
