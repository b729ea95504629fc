"""`fi-ffi fetch` and the names of `fi-ffi doctor`: over a server on loopback, with real modules."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from fi_ffi.cli import fetch as command
from fi_ffi.cli import main
from fi_ffi.cli.fetch import REFUSED
from fi_ffi.errors import KernelNotFoundError
from fi_ffi.loader import machine, runtime
from fi_ffi.loader.fetch import wheels_lock

from tests.loader.conftest import LOCK
from tests.loader.server import File, Server, sha256

Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def web(built_wheel: Path) -> Iterator[Server]:
    """A server with a wheel that was really built."""
    path = "/" + built_wheel.name.replace("+", "%2B")
    with Server({path: File(built_wheel.read_bytes(), etag='"one"')}) as server:
        yield server


@pytest.fixture
def fetch(web: Server, tmp_path: Path) -> Command:
    """The command in a process of its own that knows kernels from the lock alone."""
    (path,) = web.files
    content = web.files[path].content
    (tmp_path / "wheel.whl").write_bytes(content)
    with zipfile.ZipFile(tmp_path / "wheel.whl") as archive:
        record = next(archive.read(n) for n in archive.namelist() if n.endswith("/RECORD"))

    text = LOCK.replace("1.2.3", "0.6.13").format(
        url=web.url(path), platform=wheels_lock.this_platform(), sha256=sha256(content)
    )
    (tmp_path / "wheels.lock").write_text(text + f'record-sha256 = "{sha256(record)}"\n')
    environment = {k: v for k, v in os.environ.items() if not k.startswith("FI_FFI_")} | {
        "FI_FFI_LOCK": str(tmp_path / "wheels.lock"),
        "FI_FFI_CACHE_DIR": str(tmp_path / "cache"),
        "FI_FFI_CUDA": "cu130",
    }

    def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        program = "from fi_ffi.cli import main; main()"
        return subprocess.run(
            [sys.executable, "-c", program, *arguments], env=environment | variables,
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip

    return run


def test_what_was_fetched_needs_no_network(fetch, web, tmp_path):
    """An op, its module and an entry of it are one module; the second time it is there."""
    done = fetch("fetch", "rmsnorm", "norm", "norm.layernorm", "--arch", "9.0a", "--json")
    assert done.returncode == 0, done.stderr
    (put,) = json.loads(done.stdout)["modules"]
    assert (put["module"], put["status"], put["problem"]) == ("norm", "fetched", "")
    file = Path(put["path"])
    assert file.is_relative_to(tmp_path / "cache") and file.stat().st_size == put["size"]
    assert sha256(file.read_bytes()) == put["sha256"] and put["architectures"] == ["sm_90a"]
    assert "modules: 1 of 1, norm" in done.stderr
    seen = len(web.seen)
    done = fetch("fetch", "norm", FI_FFI_OFFLINE="1")
    assert done.returncode == 0 and len(web.seen) == seen, done.stderr
    assert "there" in done.stdout and "0 bytes of them new" in done.stdout
    # And a program finds it.
    answer = fetch("doctor", "rmsnorm", "--sm", "90", FI_FFI_OFFLINE="1")
    assert "yes" in answer.stdout and answer.returncode == 0, answer.stdout
    assert "modules" not in fetch("fetch", "norm", "-q").stderr


def test_an_image_whose_cache_is_a_seed(fetch, web, tmp_path):
    """Filled while an image is made, then read by whoever runs it, with a cache of their own."""
    assert fetch("fetch", "norm").returncode == 0
    (tmp_path / "cache").rename(tmp_path / "baked")
    seen = len(web.seen)
    done = fetch(
        "fetch", "norm", "--json", FI_FFI_OFFLINE="1", FI_FFI_SEED_CACHE=str(tmp_path / "baked")
    )
    assert done.returncode == 0, done.stderr
    (put,) = json.loads(done.stdout)["modules"]
    assert put["status"] == "there" and put["path"].startswith(str(tmp_path / "baked"))
    assert len(web.seen) == seen
    told = fetch("doctor", "--json", FI_FFI_SEED_CACHE=str(tmp_path / "baked"))
    found = {one["check"]: one for one in json.loads(told.stdout)}
    assert found["seed cache"]["found"] == f"{tmp_path / 'baked'}, read-only"
    told = fetch("doctor", "--json", FI_FFI_SEED_CACHE=str(tmp_path / "nothing"))
    found = {one["check"]: one for one in json.loads(told.stdout)}
    assert "which is no directory" in found["cache"]["found"] and told.returncode == 1


def test_one_that_is_not_there_hides_no_other(fetch):
    done = fetch("fetch", "comm", "norm", "--json")
    assert done.returncode == 1
    lacks, norm = json.loads(done.stdout)["modules"]
    assert (lacks["module"], lacks["status"]) == ("comm", "fail")
    assert "has no module comm" in lacks["problem"]
    assert (norm["module"], norm["status"]) == ("norm", "fetched")


def test_a_gpu_that_the_wheel_has_nothing_for(fetch):
    done = fetch("fetch", "norm", "--arch", "10.0a", "--json")
    assert done.returncode == 1
    (put,) = json.loads(done.stdout)["modules"]
    assert "sm_90a" in put["problem"] and put["status"] == "fail"


@pytest.mark.parametrize(("arguments", "code", "words"), [
    (("rmsnrm",), 2, "no op, module or entry 'rmsnrm'; the nearest: rmsnorm"),
    (("run",), 2, "'run' is an entry of several modules: name batch_"),
    ((), 2, "Missing argument"),
    (("norm", "--arch", "hopper"), 2, "argument `arch`: got 'hopper'"),
    (("norm", "--release", "0.6.4"), 1, "`fi-ffi build --release 0.6.4 ...` makes"),
    (("gdn_prefill", "--arch", "10.0a"), 1, "it is written for GPUs of compute capability 9.x"),
    (("batch_prefill:backend=fa4",), 2, "expected fa2 or fa3"),
    (("BatchDecodePlan:dtype=f64",), 2, "expected f16 or bf16"),
])  # fmt: skip
def test_what_cannot_be_fetched(arguments, code, words, fetch, web):
    done = fetch("fetch", *arguments)
    assert done.returncode == code, done.stdout + done.stderr
    assert words in done.stderr


def test_offline_and_not_there(fetch, web):
    done = fetch("fetch", "norm", FI_FFI_OFFLINE="1")
    assert done.returncode == 1 and not web.seen
    assert "FI_FFI_OFFLINE=1" in done.stdout + done.stderr


# The names that `fi-ffi doctor` answers for


def ask(*arguments: str):
    result = CliRunner().invoke(main, ["doctor", *arguments])
    runtime.use_source(None)
    return result


ANSWERS = [
    ("norm", 90, True, "it exports "),
    ("norm.rmsnorm", 90, True, "; exported"),
    ("norm", 80, False, "norm in"),
    ("norm.rmsnrom", 90, False, "exports no 'rmsnrom'; the nearest: rmsnorm"),
    ("comm.moe_comm", 90, False, "has no module comm"),
    ("moe_comm", 90, False, "has no module comm"),
    ("batch_prefill", 90, False, "has no module batch_prefill"),
]


@pytest.mark.parametrize(("name", "sm", "works", "words"), ANSWERS)
def test_modules_and_entries(name, sm, works, words, built_wheel, monkeypatch):
    monkeypatch.setattr(machine, "device_count", lambda: 0)
    result = ask(name, "--sm", str(sm), "--kernels", str(built_wheel), "--json")
    (answer,) = json.loads(result.output)
    assert (answer["op"], answer["works"]) == (name, works), answer
    assert words in answer["reason"] and result.exit_code == (0 if works else 1)
    # What builds a module that is not there is said.
    assert bool(answer["build"]) == ("has no module" in answer["reason"] or sm == 80)


@pytest.mark.parametrize(("name", "words"), [
    ("rmsnrm", "the nearest: rmsnorm"), ("norm.rmsnorm.x", "the nearest: norm.rmsnorm"),
    ("fused_moe_9", "fused_moe"), ("BatchPrefilPlan", "BatchPrefillPlan"),
    ("plan", "is an entry of several modules: name "), ("qqqqqq", "the ops are rmsnorm, "),
])  # fmt: skip
def test_a_name_that_stands_for_nothing(name, words):
    result = ask(name, "--sm", "90")
    assert result.exit_code == 2 and words in result.output


def test_an_op_that_no_gpu_has(monkeypatch):
    """Its reason is told, not an empty list of modules."""
    answers = {80: matrix_answer(REFUSED, "needs SM90"), 90: matrix_answer("works", "")}
    line = types.SimpleNamespace(ask=lambda query: answers[query.sm])
    monkeypatch.setattr(command.Query, "of", lambda sm, release: types.SimpleNamespace(sm=sm))
    one = types.SimpleNamespace(lines=[line])
    assert command._of_op(one, "0.6.13", [80, 90]) == ["norm"]
    with pytest.raises(KernelNotFoundError, match="needs SM90"):
        command._of_op(one, "0.6.13", [80])


def matrix_answer(status, told):
    class Answer(types.SimpleNamespace):
        def __str__(self) -> str:
            return told

    return Answer(status=status, module="norm")
