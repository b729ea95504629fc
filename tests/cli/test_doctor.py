"""`fi-ffi doctor` on a bare machine: it reports what is here, and fetches what it is told to."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner
from cuda.bindings import driver

from fi_ffi.cli import cuda, main
from fi_ffi.cli import doctor as of_doctor
from fi_ffi.loader import machine, runtime, search
from fi_ffi.loader.fetch import wheels_lock
from fi_ffi.ops.table import ROWS

from tests.loader.conftest import LOCK
from tests.loader.server import File, Server, kernel_members, make_wheel, sha256

NAME = "flashinfer_jit_cache-0.6.13+cu130-cp39-abi3-linux.whl"
MODULES = sorted({row.module for row in ROWS})
OF_FLASHINFER = [name for name in MODULES if "/" not in name]


@pytest.fixture
def web() -> Iterator[Server]:
    """A server with the pinned wheel: `norm` and others, none of which is a library."""
    with Server({f"/{NAME}": File(make_wheel(kernel_members()), etag='"one"')}) as server:
        yield server


@pytest.fixture
def bare(web: Server, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """The command in a process that knows kernels from the lock alone, with an empty cache."""
    wheel = web.files[f"/{NAME}"].content
    pins = {
        "url": web.url(f"/{NAME}"),
        "platform": wheels_lock.this_platform(),
        "sha256": sha256(wheel),
    }
    (tmp_path / "wheels.lock").write_text(LOCK.replace("1.2.3", "0.6.13").format(**pins))
    library = runtime.ensure_tvm_ffi().path
    environment = {k: v for k, v in os.environ.items() if not k.startswith("FI_FFI_")} | {
        "FI_FFI_LOCK": str(tmp_path / "wheels.lock"),
        "FI_FFI_CACHE_DIR": str(tmp_path / "cache"),
        "FI_FFI_SOURCES": "remote",
    }
    # libtvm_ffi is another place's business, and already in this process.
    program = f"from fi_ffi.abi import library; library.attach({library!r})\n"
    program += "from fi_ffi.cli import main; main()"

    def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", program, *arguments]
        return subprocess.run(
            command, env=environment | variables, capture_output=True, text=True, timeout=120
        )

    return run


def test_nothing_is_fetched_unasked(bare, web, tmp_path):
    done = bare("doctor", "--json")
    assert done.returncode == 0, done.stderr
    assert not web.seen and "modules:" not in done.stderr
    assert not list((tmp_path / "cache").rglob("*.so"))
    found = {finding["check"]: finding for finding in json.loads(done.stdout)}
    assert found["kernels: remote"]["status"] == "ok"
    unfetched = found[", ".join(f"{name}{on}" for name in OF_FLASHINFER for on in on_each_gpu())]
    assert (unfetched["status"], unfetched["found"]) == ("none", "not fetched yet")
    assert "fi-ffi doctor --fetch" in unfetched["advice"]
    # The lock of this test pins no other distribution.
    others = [f"{name}{on}" for name in MODULES if "/" in name for on in on_each_gpu()]
    assert "pip install --no-deps tokenspeed-kernel" in found[", ".join(others)]["advice"]


def on_each_gpu() -> list[str]:
    return [f" on cuda:{gpu.index}" for gpu in cuda.gpus()] or [""]


def test_what_fetch_does_is_told(bare, web):
    done = bare("doctor", "--fetch", "--json")
    assert web.seen
    for number, name in enumerate(MODULES, 1):
        assert f"modules: {number} of {len(MODULES)}, {name}\n" in done.stderr
    assert "not fetched yet" not in done.stdout
    assert "norm" in [word for f in json.loads(done.stdout) for word in f["check"].split(", ")]


def test_a_place_that_cannot_be_reached_is_not_ok(bare, web):
    """Not in the run that could not reach it; what is not there says so, too."""
    web.files.clear()
    done = bare("doctor", "--fetch", "--json")
    found = {finding["check"]: finding for finding in json.loads(done.stdout)}
    assert web.seen and found["kernels: remote"]["status"] == "warn"
    assert "cannot be used: " in found["kernels: remote"]["found"]
    assert found["kernels: remote"]["advice"] and found["kernels"]["found"] == "none"


def test_offline_stays_offline_and_is_named(bare, web):
    done = bare("doctor", "--fetch", "--json", FI_FFI_OFFLINE="1")
    assert not web.seen
    assert "FI_FFI_OFFLINE=1" in done.stdout and "not fetched yet" not in done.stdout
    assert "out of the cache alone (FI_FFI_OFFLINE=1)" in done.stdout


def test_a_list_fetches_nothing_unasked(bare, web):
    done = bare("list")
    assert not web.seen and done.returncode == 1
    assert "nothing is fetched unasked" in done.stderr and "--fetch" in done.stderr
    done = bare("list", "--fetch", "--family", "norm")
    assert web.seen and done.returncode == 0, done.stderr
    assert "1 module of http://" in done.stdout


def test_an_answer_for_an_op_fetches_nothing(bare, web):
    done = bare("doctor", "rmsnorm", "--sm", "90", "--json")
    assert done.returncode == 0 and not web.seen, done.stdout + done.stderr
    (answer,) = json.loads(done.stdout)
    assert "fetched when it is first called" in answer["reason"]


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [
        ("FI_FFI_OFFLINE", "yes", "1, or 0 for off"),
        ("FI_FFI_PARANOID", "true", "1, or 0 for off"),
        ("FI_FFI_CUDA", "12", "a tag such as cu130"),
        ("FI_FFI_VERIFY", "some", "full or record"),
        ("FI_FFI_RELEASE", "newest", "a version such as 0.6.13"),
        ("FI_FFI_SOURCES", "wheel", "some of ['installed', 'jit', 'local', 'remote']"),
        ("FI_FFI_LOG_LEVEL", "2", "0 or 1 or 3 or 5"),
        ("FI_FFI_DUMP_MAX_CALLS", "many", "a number"),
    ],
)
def test_an_invalid_value_names_its_variable(variable, value, expected, bare, web, tmp_path):
    done = bare(
        "doctor", "rmsnorm", "--sm", "90", FI_FFI_DUMP_DIR=str(tmp_path), **{variable: value}
    )
    told = done.stdout + done.stderr
    assert done.returncode and not web.seen, told
    assert f"argument `{variable}`: got " in told and f"expected {expected}" in told, told


def test_a_switch_that_is_off(bare):
    done = bare("doctor", "rmsnorm", "--sm", "90", FI_FFI_OFFLINE="0", FI_FFI_PARANOID="")
    assert done.returncode == 0 and "fetched when it is first called" in done.stdout


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("BatchDecodePlan:dtype=bf16", "batch_decode_with_kv_cache_dtype_q_bf16_dtype_kv_bf16_"),
        ("batch_decode:dtype=bf16,head_dim=256", "_bf16_dtype_idx_i32_head_dim_qk_256_"),
        ("BatchPrefillPlan:backend=fa3,dtype=bf16", "_f16qk_False_sm90 "),
    ],
)
def test_an_answer_for_options(name, part, bare, web):
    done = bare("doctor", name, "--sm", "90", "--json")
    assert not web.seen
    (answer,) = json.loads(done.stdout)
    assert answer["op"] == name and part in answer["reason"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("BatchDecodePlan:dtype=f64", "expected f16 or bf16"),
        ("rmsnorm:dtype=bf16", "rmsnorm takes no options: name its module, such as norm"),
        ("batch_decode:tpye=bf16", "expected dtype=…"),
    ],
)
def test_options_that_nothing_has(name, words, bare):
    done = bare("doctor", name, "--sm", "90")
    assert done.returncode == 2 and words in done.stderr, done.stderr


class Driver:
    """A driver as cuda-python shows it: what starting it answers, its version and its GPUs."""

    CUresult = driver.CUresult

    def __init__(self, code: int | None, version: int, gpus: dict[str, int]) -> None:
        self.code, self.version, self.gpus = code, version, [*gpus.items()]

    def cuInit(self, flags: int) -> tuple[object]:
        if self.code is None:
            raise RuntimeError("libcuda.so.1 is not there")
        return (self.CUresult(self.code),)

    def cuDriverGetVersion(self) -> tuple[object, int]:
        return self.CUresult(0), self.version

    def cuDeviceGetCount(self) -> tuple[object, int]:
        return self.CUresult(self.code), len(self.gpus)

    def cuDeviceGet(self, index: int) -> tuple[object, int]:
        return self.CUresult(0), 100 + index

    def cuDeviceGetName(self, size: int, device: int) -> tuple[object, bytes]:
        return self.CUresult(0), self.gpus[device - 100][0].encode().ljust(size, b"\0")

    def cuDeviceTotalMem(self, device: int) -> tuple[object, int]:
        return self.CUresult(0), self.gpus[device - 100][1]


NO_DEVICE, MISMATCH = 100, 803
GPUS = {"NVIDIA H200": 150_754_820_096, "NVIDIA L4": 23_609_475_072}


@pytest.mark.parametrize(
    ("answer", "kernels", "told"),
    [
        ((None, 0, {}), None, {"driver": ("warn", "no CUDA driver", "calls run on the CPU only")}),
        ((MISMATCH, 13000, {}), None, {"driver": ("warn", "no CUDA driver", "install NVIDIA's")}),
        ((NO_DEVICE, 12080, {}), None,
         {"driver": ("ok", "CUDA 12.8", ""),
          "gpus": ("warn", "the driver shows no GPU", "CUDA_VISIBLE_DEVICES is '7'")}),
        ((0, 13010, GPUS), 13,
         {"driver": ("ok", "CUDA 13.1", ""), "cuda:0": ("ok", "NVIDIA H200, sm_90, 140 GiB", ""),
          "cuda:1": ("ok", "NVIDIA L4, sm_89, 22 GiB", "")}),
        ((0, 12090, {"NVIDIA L4": 2**30}), 13,
         {"driver": ("fail", "CUDA 12.9", "need CUDA 13.0 or later, or `fi-ffi build --cuda 12`"),
          "cuda:0": ("ok", "NVIDIA L4, sm_90, 1 GiB", "")}),
        ((NO_DEVICE, 11080, {}), None,
         {"driver": ("fail", "CUDA 11.8", "need CUDA 12.0 or later"),
          "gpus": ("warn", "the driver shows no GPU", "")}),
    ],
    ids=["no driver", "mismatch", "no GPU", "two GPUs", "of the kernels before", "too old"],
)  # fmt: skip
def test_the_driver_is_told_as_it_is(answer, kernels, told, monkeypatch):
    monkeypatch.setattr(cuda, "driver", Driver(*answer))
    monkeypatch.setattr(machine, "capability", lambda device: [(9, 0), (8, 9)][device])
    monkeypatch.setattr(search, "cuda_of_kernels", lambda: kernels)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    found = {one.check: one for one in of_doctor._gpus(None)}
    assert {name: (one.status, one.found) for name, one in found.items()} == {
        name: parts[:2] for name, parts in told.items()
    }
    assert all(told[name][2] in (one.advice or "") for name, one in found.items()), found
    assert all(bool(one.advice) == (one.status != "ok") for one in found.values()), found


def test_no_op_works_without_a_driver(monkeypatch, built_wheel):
    """A GPU that something else answers for: the driver's own word decides, and nothing is run."""
    monkeypatch.setattr(runtime, "kernel_entry", lambda *_: pytest.fail("it was loaded"))
    monkeypatch.setattr(cuda, "driver_version", lambda: None)
    monkeypatch.setattr(machine, "device_count", lambda: 1)
    monkeypatch.setattr(machine, "capability", lambda device: (9, 0))
    result = run("doctor", "rmsnorm", "--kernels", str(built_wheel), "--json")
    (answer,) = json.loads(result.stdout)
    assert result.exit_code == 1 and not answer["works"]
    assert "driver: no CUDA driver" in answer["reason"]


def test_one_check_that_fails_ends_with_1(monkeypatch):
    monkeypatch.setenv("FI_FFI_RELEASE", "newest")
    done = run("doctor", "--json")
    statuses = {finding["check"]: finding["status"] for finding in json.loads(done.stdout)}
    assert done.exit_code == 1 and {"ok", "fail"} <= {*statuses.values()}, statuses


@pytest.mark.parametrize("order", [1, -1])
def test_one_op_that_cannot_be_called_ends_with_1(order, built_wheel):
    """The wheel has norm and page."""
    asked = ("--sm", "90", "--kernels", str(built_wheel), "--json")
    names = {"rmsnorm": True, "merge_state": False, "append_paged_kv_cache": True}
    done = run("doctor", *[*names][::order], *asked)
    assert {each["op"]: each["works"] for each in json.loads(done.stdout)} == names
    assert done.exit_code == 1
    del names["merge_state"]
    assert run("doctor", *[*names][::order], *asked).exit_code == 0


def run(*arguments: str):
    result = CliRunner().invoke(main, arguments)
    runtime.use_source(None)
    return result


@pytest.mark.parametrize(
    ("cuda", "major", "driver", "said"),
    [
        ("'12.8'", 13, (13, 0), {"torch"}),
        ("'13.0'", 12, (13, 0), {"torch"}),
        ("'12.8'", 12, (12, 8), {"cuda-bindings"}),
        ("'13.0'", 13, (13, 0), set()),
        ("None", 13, None, set()),
    ],
)
def test_two_cudas_are_told(cuda, major, driver, said, monkeypatch, tmp_path):
    """Of an installed torch, which is not imported; and of bindings newer than the driver."""
    for name in ("torch-2.9.0.dist-info", "cuda_bindings-13.0.1.dist-info", "torch"):
        (tmp_path / name).mkdir()
    text = f"__version__ = '2.9.0'\ncuda: Optional[str] = {cuda}\n"
    (tmp_path / "torch" / "version.py").write_text(text)
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    monkeypatch.setattr(machine, "_runtime", (None, f"/x/libcudart.so.{major}", major))
    monkeypatch.setattr(machine, "driver_version", lambda: driver)
    found = {finding.check: finding for finding in of_doctor._cudart(None)}
    assert {*found} == {"cudart"} | said
    if "torch" in said:
        text = f"{found['torch'].found} {found['torch'].advice}"
        for part in ("torch 2.9.0", f"CUDA {cuda[1:-1]}", f"CUDA {major}", "not in one process"):
            assert part in text
    if "cuda-bindings" in said:
        assert "13.0.1" in found["cuda-bindings"].found
        assert "fi-ffi[cu12]" in found["cuda-bindings"].advice
