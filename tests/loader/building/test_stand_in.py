"""The stand-in for torch, under FlashInfer's own generators and beside torch itself."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from fi_ffi.catalogue.requests import parse_request
from fi_ffi.cli import main, upkeep
from fi_ffi.errors import BuildError
from fi_ffi_build import build as building
from fi_ffi_build import cute_install, driver, environment, stand_in
from fi_ffi_build.questions import question_of

from tests.helpers.compiler import why_not_build
from tests.helpers.sampling import only_in_full

# Prints what a process sees of torch after the stand-in was installed in it.
_SEEN = """
import json, runpy, sys
names = runpy.run_path(sys.argv[1])
names["install"]()
import torch
from torch.utils.cpp_extension import check_compiler_is_gcc, get_cxx_compiler
from torch.torch_version import TorchVersion, __version__
kinds = {name: [str(of), of.itemsize] for name, of in vars(torch).items()
         if isinstance(of, torch.dtype)}
json.dump({
    "kinds": kinds, "abi": int(torch._C._GLIBCXX_USE_CXX11_ABI), "cuda": torch.version.cuda,
    "gpu": torch.cuda.is_available(), "gcc": check_compiler_is_gcc(get_cxx_compiler()),
    "clang": check_compiler_is_gcc(sys.argv[2]), "none": check_compiler_is_gcc("/no/compiler"),
    "new": TorchVersion(__version__) > TorchVersion("2.4"), "file": getattr(torch, "__file__", ""),
}, sys.stdout)
"""


def seen(python: str, tmp_path: Path, *path: str) -> dict[str, Any]:
    """What a Python with these folders on its path sees of torch."""
    clang = tmp_path / "clang++"
    clang.write_text("#!/bin/sh\necho 'clang version 18.1.3' >&2\n")
    clang.chmod(0o755)
    done = subprocess.run(
        [python, "-c", _SEEN, stand_in.__file__, str(clang)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path), "CXX": "g++"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return dict(json.loads(done.stdout))


def test_without_torch_the_stand_in_answers(tmp_path: Path) -> None:
    (tmp_path / "tvm_ffi.py").write_text("import sys\nassert 'torch' not in sys.modules\n")
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError('no torch here', name='torch')\n")
    found = seen(sys.executable, tmp_path, str(tmp_path), *filter(None, sys.path))
    assert not found["file"]
    kinds = found["kinds"]
    assert kinds["half"] == kinds["float16"] == ["torch.float16", 2]
    assert kinds["long"] == ["torch.int64", 8] and kinds["float8_e4m3fn"] == [
        "torch.float8_e4m3fn",
        1,
    ]
    assert (found["abi"], found["cuda"], found["gpu"], found["new"]) == (1, None, False, True)
    assert found["gcc"] is (shutil.which("g++") is not None)
    assert found["clang"] is found["none"] is False


@pytest.mark.parametrize(
    ("statement", "reason"),
    [
        ("import torch.distributed", driver.NEEDS_TORCH),
        ("from torch.utils.cpp_extension import include_paths", driver.NEEDS_TORCH),
        ("import torch; torch.zeros(3)", driver.NEEDS_TORCH),
        ("import numpyx", "No module named 'numpyx'"),
        ("raise ValueError('head_dim 7\\nis odd')", "head_dim 7"),
    ],
)
def test_what_needs_torch_itself_is_told(statement: str, reason: str) -> None:
    """As the driver says of a generator."""
    code = (
        "import runpy, sys, types\n"
        "sys.modules['tvm_ffi'] = types.ModuleType('tvm_ffi')\n"
        "sys.modules['torch'] = None\n"
        "driver = runpy.run_path(sys.argv[1])\n"
        "runpy.run_path(str(driver['_STAND_IN']))['install']()\n"
        f"try:\n    exec({statement!r})\n"
        "except Exception as error:\n    print(driver['reason'](error))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, driver.__file__], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == reason


def test_a_failed_environment_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A release that no index has: pip itself refuses it."""
    monkeypatch.setenv("FI_FFI_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("UV_OFFLINE", "1")
    result = CliRunner().invoke(main, ["build", "--release", "9.9.9", "norm"])
    assert result.exit_code == 1 and "flashinfer-python==9.9.9" in result.output
    assert "Full log" not in result.output  # which is gone
    assert [*(tmp_path / "cache").rglob("*")] == [tmp_path / "cache" / "build"]
    assert not upkeep.items(tmp_path / "cache", "build")


def test_a_failed_change_leaves_what_was_there(tmp_path: Path) -> None:
    folder, evidence = tmp_path / "env-1.0", tmp_path / "env-1.0" / "python"

    def make(*, fails: bool) -> None:
        folder.mkdir(exist_ok=True)
        evidence.touch()
        folder.with_name("env-1.0.log").write_text("$ pip\n")
        if fails:
            raise BuildError("pip failed", "env-1.0.log")

    with pytest.raises(BuildError, match="^pip failed$") as raised:
        environment.make_once(folder, evidence, {"a": "1"}, lambda: make(fails=True))
    assert raised.value.log is None and not [*tmp_path.iterdir()]
    environment.make_once(folder, evidence, {"a": "1"}, lambda: make(fails=False))
    with pytest.raises(BuildError, match=r"pip failed\nFull log: env-1.0.log"):
        environment.make_once(folder, evidence, {"a": "2"}, lambda: make(fails=True))
    assert evidence.exists() and folder.with_name("env-1.0.log").exists()


REQUESTS = (
    "norm", "page", "batch_prefill:dtype=bf16,kv_dtype=e4m3,use_sliding_window=1", "batch_mla",
    "batch_prefill:backend=fa3,head_dim=192x128", "single_decode:use_logits_soft_cap=1",
)  # fmt: skip


@pytest.fixture(scope="module")
def beside_torch() -> Path:
    """The folder of a torch that was installed for CuTe DSL."""
    only_in_full("installs torch")
    why = why_not_build()
    if why:
        pytest.skip(why)
    with environment.open_workshop("0.6.13", ("9.0a",), None) as workshop:
        return cute_install.install_torch(workshop.environment, workshop.say)


@pytest.mark.parametrize("release", ["0.6.13", "0.7.2.post1"])
def test_generators_write_the_same_with_torch(release: str, beside_torch: Path) -> None:
    """Names, sources and build files, byte by byte, from the release's own generators."""
    requests = [question_of(parse_request(text), release) for text in REQUESTS]
    question: dict[str, object] = {"action": "generate", "requests": requests}
    written = []
    with environment.open_workshop(release, ("9.0a",), None) as workshop:
        for path in (None, beside_torch):
            script = workshop.folder / "driver_with_torch.py"
            text = (
                Path(driver.__file__)
                .read_text()
                .replace("Path(__file__)", f"Path({driver.__file__!r})")
            )
            if path is not None:
                text = re.sub(
                    r"(?m)^import types$",
                    f"import types\nsys.path.append({str(path)!r})\nimport torch\n"
                    "torch.zeros(3)  # torch itself",
                    text,
                )
            script.write_text(text)
            answer = building.ask(workshop, question, script)
            assert not answer["failed"]
            folder = Path(answer["folder"])
            names = [module["name"] for module in answer["modules"]]
            files = [
                file
                for base in (folder, folder.parent / "generated")
                for name in names
                for file in (base / name).rglob("*")
                if file.suffix in (".ninja", ".cu", ".inc", ".cuh", ".h")
            ]
            assert len(files) > len(REQUESTS) and sum(f.suffix == ".ninja" for f in files) == len(
                names
            )
            written.append((names, {file: file.read_bytes() for file in files}))
            for file in files:
                if "generated" in file.parts:
                    file.unlink()
            script.unlink()
    assert written[0] == written[1]
