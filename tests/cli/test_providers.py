"""FI_FFI_RELEASE of a release whose wheels are of one SM each, pinned and not."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fi_ffi.loader.fetch.wheels_lock import the_lock, this_platform

from tests.helpers import children
from tests.loader.server import File, Server, make_wheel, sha256

RELEASE = "0.7.2.post1"
Command = Callable[..., subprocess.CompletedProcess[str]]


def member(sm: str, module: str) -> str:
    """Where a provider has a module."""
    return f"flashinfer_jit_cache_{sm}/jit_cache/{module}/{module}.so"


def name_of(sm: str) -> str:
    cpu = this_platform().partition("-")[2]
    return f"flashinfer_jit_cache_{sm}-{RELEASE}+cu134-cp39-abi3-manylinux_2_28_{cpu}.whl"


@pytest.fixture(scope="module")
def wheels(built_wheel: Path) -> dict[str, bytes]:
    """The providers of two GPUs, by their SM; only that of SM90 has libraries."""
    with zipfile.ZipFile(built_wheel) as archive:
        norm = next(archive.read(n) for n in archive.namelist() if n.endswith("/norm.so"))
    made = {"sm100a": ("mine", b"no library"), "sm90a": ("norm", norm)}
    return {
        sm: wheel({member(sm, module): content}, f"_{sm}") for sm, (module, content) in made.items()
    }


def wheel(members: dict[str, bytes], of: str = "") -> bytes:
    return make_wheel(members, info=f"flashinfer_jit_cache{of}-{RELEASE}+cu134.dist-info")


@pytest.fixture
def web(wheels: dict[str, bytes]) -> Iterator[Server]:
    files = {f"/{name_of(sm).replace('+', '%2B')}": File(w) for sm, w in wheels.items()}
    with Server(files) as server:
        yield server


@pytest.fixture
def command(web: Server, wheels: dict[str, bytes], tmp_path: Path) -> Command:
    """A command in a process of its own; `pins` are the SMs whose wheels the lock has."""

    def run(
        *arguments: str, pins: tuple[str, ...] = ("sm100a", "sm90a"), **variables: str
    ) -> subprocess.CompletedProcess[str]:
        text = 'schema = 1\n[kernels]\ndefault = "0.6.13"\nurl = "https://example.org/{file}"\n'
        for sm in pins:
            entry = {
                "release": RELEASE, "cuda": "cu134", "platform": this_platform(), "sm": sm,
                "layout": "provider", "file": name_of(sm), "sha256": sha256(wheels[sm]),
                "url": web.url(f"/{name_of(sm).replace('+', '%2B')}"), "provenance": "a test",
            }  # fmt: skip
            text += "[[kernels.files]]\n" + "".join(f'{k} = "{v}"\n' for k, v in entry.items())
        (tmp_path / "wheels.lock").write_text(text)
        environment = {k: v for k, v in os.environ.items() if not k.startswith("FI_FFI_")} | {
            "FI_FFI_LOCK": str(tmp_path / "wheels.lock"),
            "FI_FFI_CACHE_DIR": str(tmp_path / "cache"),
            "FI_FFI_CUDA": "cu134",
            "FI_FFI_RELEASE": RELEASE,
            "FLASHINFER_WORKSPACE_BASE": str(tmp_path),
        }
        return subprocess.run(
            [sys.executable, "-c", "from fi_ffi.cli import main; main()", *arguments],
            env=environment | variables, capture_output=True, text=True, timeout=120,
        )  # fmt: skip

    return run


def test_a_gpus_own_wheel_is_fetched(command, web, tmp_path):
    """By the variable alone; of the other GPU's wheel nothing is asked."""
    done = command("fetch", "norm", "--arch", "9.0a", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    document = json.loads(done.stdout)
    assert document["release"] == RELEASE
    (put,) = document["modules"]
    assert (put["module"], put["status"], put["architectures"]) == ("norm", "fetched", ["sm_90a"])
    assert web.seen
    assert not [seen for seen in web.seen if "sm100a" in seen.path]
    # Both, where both are asked for.
    done = command("fetch", "norm", "--arch", "9.0a", "--arch", "10.0a", "--json")
    found = [(put["module"], put["status"]) for put in json.loads(done.stdout)["modules"]]
    assert found == [("norm", "there"), ("norm", "fail")]
    assert "has no module norm; it has mine" in done.stdout
    # A GPU that no wheel is for.
    done = command("fetch", "norm", "--arch", "8.0")
    assert done.returncode == 1
    assert f"pins no kernels of FlashInfer {RELEASE} that this machine" in done.stderr
    assert "compute capability 8.0" in done.stderr
    assert f"{RELEASE} cu134 {this_platform()} sm90a" in done.stderr


def test_an_answer_for_an_op(command, web):
    """Of the release that is wanted, and only where there is a wheel to fetch it out of."""
    (answer,) = json.loads(command("doctor", "rmsnorm", "--sm", "90", "--json").stdout)
    assert answer["works"] and f"FlashInfer {RELEASE}" in answer["reason"], answer
    assert "pins none" not in answer["reason"]
    assert "fetched when it is first called" in answer["reason"]
    for sm, pins in (("80", ("sm100a", "sm90a")), ("90", ())):
        done = command("doctor", "rmsnorm", "--sm", sm, "--json", pins=pins)
        (answer,) = json.loads(done.stdout)
        assert not answer["works"] and done.returncode == 1, answer
        assert f"pins no kernels of FlashInfer {RELEASE}" in answer["reason"]
        arch = {"80": "8.0", "90": "9.0a"}[sm]
        assert answer["build"] == f"fi-ffi build --release {RELEASE} --arch {arch} norm"
    done = command("doctor", "rmsnorm", "--sm", "90", "--json", FI_FFI_SOURCES="local")
    (answer,) = json.loads(done.stdout)
    assert not answer["works"] and "FI_FFI_SOURCES leaves out `remote`" in answer["reason"]
    assert not web.seen


def test_a_release_that_nothing_is_pinned_of(command):
    """What is told leads to kernels of that release, and not of the default one."""
    build = f"`fi-ffi build --release {RELEASE} norm`"
    refusal = f"pins no kernels of FlashInfer {RELEASE}, so none are fetched; it has those of no"
    done = command("doctor", "--json", pins=())
    found = {one["check"]: one for one in json.loads(done.stdout)}
    assert refusal in found["kernels: remote"]["found"]
    assert build in found["kernels"]["advice"]
    done = command("list", pins=())
    assert refusal in done.stderr and build in done.stderr
    done = command("fetch", "norm", pins=())
    assert done.returncode == 1 and refusal in done.stderr
    names = f"no kernels of module 'norm'.*fi-ffi build --release {RELEASE} --arch 9.0a norm"
    load = "from fi_ffi.loader import search; search.find_module('norm')"
    _, _, err = children.done(load, FI_FFI_RELEASE=RELEASE, FI_FFI_SOURCES="", FI_FFI_KERNELS="")
    assert names.partition(".*")[0] in err and names.partition(".*")[2] in err


def test_provider_wheels_in_a_folder(command, wheels, tmp_path):
    """Downloaded by somebody: a shim without kernels, and those of two GPUs."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    for sm, content in wheels.items():
        (folder / name_of(sm)).write_bytes(content)
    shim = f"flashinfer_jit_cache-{RELEASE}+cu134-py3-none-any.whl"
    (folder / shim).write_bytes(wheel({"flashinfer_jit_cache/__init__.py": b""}))
    where = {"FI_FFI_WHEELS": str(folder)}
    (answer,) = json.loads(command("doctor", "norm", "--sm", "90", "--json", **where).stdout)
    assert answer["works"] and "it exports" in answer["reason"], answer
    done = command("list", "--json", **where)
    assert json.loads(done.stdout)["modules"], done.stderr
    shutil.rmtree(folder)


def test_the_lock_pins_only_what_has_a_digest():
    """Also of the releases that have no entry: nobody published the sha256 of their wheels."""
    for file in the_lock().kernels:
        assert len(file.sha256) == 64
    assert RELEASE not in {file.release for file in the_lock().kernels}
