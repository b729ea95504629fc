"""Errors that can be made without a GPU and that no other test makes, or whose words are put
together of several; each with its entry of a page.

`RAISED` has the heading of docs/troubleshooting.md, the class, and a function whose arguments are
fixtures' names (`patch` is pytest's monkeypatch).
"""

from __future__ import annotations

import errno
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fi_ffi
from fi_ffi import errors
from fi_ffi.abi import library, streams
from fi_ffi.abi.signature import parse_signature
from fi_ffi.abi.tensor import parse_device
from fi_ffi.loader import (
    cache,
    held,
    lock,
    machine,
    runtime,
    search,
    trust,
    tvm_ffi,
    urls,
)  # fmt: skip
from fi_ffi.loader.building import environment
from fi_ffi.loader.kernels import KernelFile, open_source
from fi_ffi.ops import cuda, providers
from fi_ffi.ops.call.op import Op
from fi_ffi.ops.functions import OPS
from fi_ffi.ops.row import Row, Tensor

from tests.helpers.plan_calls import Case

X, W = np.ones((4, 64), np.float16), np.ones(64, np.float16)
OUT = np.empty_like(X)
CUDA = parse_device("cuda:0")


def desc(ptr: int, shape: tuple[int, ...], device: str = "cuda:0") -> fi_ffi.TensorDesc:
    return fi_ffi.TensorDesc(ptr, shape, "float16", device=device)


def rmsnorm(out: object = OUT, x: object = X, weight: object = W, **more: Any) -> None:
    fi_ffi.rmsnorm(out, x, weight, **more)


def read_only() -> None:
    out = np.empty_like(X)
    out.flags.writeable = False
    rmsnorm(out)


def overlapping() -> None:
    gate = np.ones((4, 128), np.float16)
    fi_ffi.silu_and_mul(gate[:, 32:96], gate)


def small_workspace() -> None:
    Case("decode").plan(workspace=fi_ffi.Workspace(np.zeros(2**20, np.uint8), aligned(16)))


def aligned(size: int) -> np.ndarray:
    memory = np.zeros(size + 256, np.uint8)
    start = -memory.ctypes.data % 256
    return memory[start : start + size]


def stale_plan() -> None:
    workspace = fi_ffi.Workspace.allocate("cpu", 2**20, 2**20)
    cases = [Case("decode") for _ in range(2)]
    plans = [case.plan(workspace=workspace) for case in cases]
    cases[0].run(plans[0])


def another_page_size() -> None:
    case = Case("paged")
    plan = case.plan()
    q = np.ones((sum(case.qo_lens), 4, 64), np.float16)
    pages = np.ones((12, 8, 2, 64), np.float16)
    plan.paged_run(q, pages, pages, np.empty_like(q))


def in_use() -> None:
    call = OPS["rmsnorm"].prepare(OUT, X, W)
    frame = call.take()
    try:
        call()
    finally:
        call.give(frame)


def another_gpus_stream(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(streams, "device_of", lambda handle: 1)
    rmsnorm(desc(4096, (4, 64)), desc(65536, (4, 64)), desc(8192, (64,)), stream=0x5000)


def unknown_sources(patch: pytest.MonkeyPatch) -> None:
    patch.setenv(search.SOURCES, "somewhere")
    search.kinds_asked()


def no_kernels(patch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    search.use_source(tmp_path)
    search.find_module("norm")


def other_release(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(search, "release", lambda: "0.5.0")
    providers.check_available(OPS["rmsnorm"].row, CUDA)


def no_function(built_wheel: Path) -> None:
    search.use_source(built_wheel)
    fi_ffi.module("norm").entry("rmsnormm")


def for_another_gpu(patch: pytest.MonkeyPatch, built_wheel: Path) -> None:
    patch.setattr(machine, "capability", lambda device: (8, 7))
    search.use_source(built_wheel)
    search.find_module("norm", 0)


def written_for_others(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(machine, "capability", lambda device: (8, 7))
    row = next(op.row for op in OPS.values() if op.row.capabilities)
    providers.check_available(row, CUDA)


def for_another_processor(built_wheel: Path, tmp_path: Path) -> None:
    data = bytearray(open_source(built_wheel).file("page").path.read_bytes())
    data[18:20] = (62 + 183 - int.from_bytes(data[18:20], "little")).to_bytes(2, "little")
    file = tmp_path / "page.so"
    file.write_bytes(data)
    runtime.load_file(file)


def another_interface(built_wheel: Path) -> None:
    search.use_source(built_wheel)
    wrong = parse_signature("(0: DLTensor*) -> void")
    runtime.kernel_entry("norm", type(wrong)("rmsnorm", wrong.params, wrong.result), ">=0", None)


def installed_and_changed(tmp_path: Path) -> None:
    file = tmp_path / "libtvm_ffi.so"
    file.write_bytes(b"another")
    line = f"{tvm_ffi.MEMBER},sha256={'A' * 43},7\n"
    tvm_ffi._recorded(line, file)


def writable(tmp_path: Path, mode: int, check: Callable[[Path], object]) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    folder.chmod(mode)
    check(folder)


def writable_object(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    file.chmod(0o666)
    trust.check_object(file, file.lstat())


def no_wheel(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    file.write_bytes(b"no zip archive")
    open_source(file).modules()


def no_library(tmp_path: Path) -> None:
    file = tmp_path / "x.so"
    file.write_bytes(b"no library")
    held.facts_of(KernelFile(file).file())


def offline(patch: pytest.MonkeyPatch) -> None:
    patch.setenv("FI_FFI_OFFLINE", "1")
    urls.refuse_offline("norm.so")


def no_tvm_ffi(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(sys, "path", [])
    tvm_ffi.installed()


def install_tvm_ffi(folder: Path, version: str, patch: pytest.MonkeyPatch) -> None:
    info = folder / f"apache_tvm_ffi-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Name: apache-tvm-ffi\nVersion: {version}\n")
    patch.setattr(sys, "path", [str(folder)])


def other_tvm_ffi(tmp_path: Path, patch: pytest.MonkeyPatch) -> None:
    install_tvm_ffi(tmp_path, "0.2", patch)
    tvm_ffi.installed()


def tvm_ffi_without_its_library(tmp_path: Path, patch: pytest.MonkeyPatch) -> None:
    install_tvm_ffi(tmp_path, "0.1.15", patch)
    tvm_ffi.installed()


def no_gpu() -> None:
    machine._attribute.__wrapped__(machine.device_count(), 75)


def no_cudart(patch: pytest.MonkeyPatch) -> None:
    import cuda.pathfinder

    def nowhere(name: str) -> None:
        raise cuda.pathfinder.DynamicLibNotFoundError("nowhere")

    patch.setattr(cuda.pathfinder, "load_nvidia_dynamic_lib", nowhere)
    machine.load_cudart.__wrapped__()


def old_tvm_ffi(patch: pytest.MonkeyPatch) -> None:
    path = runtime.ensure_tvm_ffi().path
    patch.setattr(library, "_OLDEST", (0, 1, 10**6))
    library.attach(path)


def after_a_fork(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(machine, "_is_cut_off", True)
    machine.refuse_after_fork()


def full_disk() -> None:
    with cache.writing(Path("norm.so"), 10**6):
        raise OSError(errno.ENOSPC, "No space left on device")


def read_only_disk() -> None:
    with cache.writing(Path("norm.so"), 10**6):
        raise OSError(errno.EROFS, "Read-only file system")


def no_lock(tmp_path: Path) -> None:
    file = tmp_path / "wheels.lock"
    file.write_text("no = 1")
    lock.read_lock(file)


def no_cuda_bindings(patch: pytest.MonkeyPatch) -> None:
    patch.setitem(sys.modules, "cuda.bindings", None)
    cuda._runtime()


def fails_without_words() -> None:
    call = OPS["rmsnorm"].prepare(OUT.copy(), X, W)
    frame = call.take()
    call.give(frame)
    frame.invoke = lambda: -1
    call()


class _Slow:
    row = Row("slow", "norm", "slow", "here", "Slow.", (
        Tensor("y", "n h", "T", "result", writes=True, reads=False),
        Tensor("x", "n h", "T", "argument"),
    ), {"T": ("float16",)}, ">=0")  # fmt: skip


def hang(patch: pytest.MonkeyPatch) -> None:
    from fi_ffi.reference import norm

    def slow(y: np.ndarray, x: np.ndarray) -> None:
        time.sleep(0.4)
        y[...] = x

    patch.setitem(norm.KERNELS["norm"], "slow", slow)
    op = Op(_Slow.row)
    reports: list[str] = []
    with fi_ffi.watchdog(0.1, on_hang=reports.append):
        op(OUT.copy(), X)
    raise errors.HangError("slow", reports[0])


def no_compiler(patch: pytest.MonkeyPatch) -> None:
    patch.setenv("CXX", "no-such-compiler")
    environment.find_cxx()


def not_linux(patch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    patch.setattr(environment.sys, "platform", "darwin")
    with environment.open_workshop("0.6.13", ("8.7",), tmp_path, "torch", None):
        pass


def no_ensurepip(patch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    patch.setattr(environment.importlib.util, "find_spec", lambda name: None)
    patch.setenv("PATH", "")
    environment._create(environment.Environment(tmp_path / "env"))


LAST_AXIS = "A tensor whose last axis is not contiguous"
DAMAGED = "A file that is damaged, or no wheel at all"
TVM_FFI = "libtvm_ffi is missing, too old, or there twice"
DISK = "A disk that is full, or cannot be written"
HERE = tuple[str, type[errors.FiFfiError], Callable[..., object]]
RAISED: list[HERE] = [
    (LAST_AXIS, errors.ArgumentError, lambda: rmsnorm(x=np.ones((4, 128), np.float16)[:, ::2])),
    ("A misaligned or null address", errors.ArgumentError,
     lambda: rmsnorm(desc(4096, (4, 64)), desc(4098, (4, 64)), desc(8192, (64,)))),
    ("A misaligned or null address", errors.ArgumentError,
     lambda: rmsnorm(desc(4096, (4, 64)), desc(0, (4, 64)), desc(8192, (64,)))),
    ("Tensors on different devices", errors.ArgumentError,
     lambda: rmsnorm(desc(4096, (4, 64)), X, desc(8192, (64,)))),
    ("Tensors on different devices", errors.ArgumentError, another_gpus_stream),
    ("A wrong dtype", errors.ArgumentError, lambda: rmsnorm(x=X.astype(np.float64))),
    ("A wrong dtype", errors.ArgumentError, lambda: fi_ffi.BatchDecodePlan(
        np.array([0, 1]), np.array([0]), np.array([1]), num_qo_heads=1, num_kv_heads=1,
        head_dim=64, page_size=16, device="cpu")),
    ("A wrong rank or size", errors.ArgumentError, lambda: rmsnorm(weight=W[:32])),
    ("A wrong rank or size", errors.ArgumentError, lambda: rmsnorm(x=X[0])),
    ("A number that cannot be", errors.ArgumentError, lambda: rmsnorm(eps=float("nan"))),
    ("Memory that is read-only or overlaps", errors.ArgumentError, read_only),
    ("No stream", errors.ArgumentError,
     lambda: rmsnorm(desc(4096, (4, 64)), desc(65536, (4, 64)), desc(8192, (64,)))),
    ("A workspace that is too small", errors.ArgumentError, small_workspace),
    ("A plan that is stale", errors.ArgumentError, stale_plan),
    ("Another batch, or another cache, than was planned", errors.ArgumentError, another_page_size),
    ("A prepared call in two threads", errors.ArgumentError, in_use),
    ("Capture refused", errors.ArgumentError, lambda: fi_ffi.capture(0)),
    ("A name of `supports` or `build` that is none", errors.ArgumentError,
     lambda: fi_ffi.rmsnorm.supports(sm="hopper")),
    ("An environment variable that cannot be", errors.ArgumentError, unknown_sources),
    ("ArgumentTypeError", errors.ArgumentTypeError, lambda: rmsnorm(x=[1, 2])),
    ("ArgumentTypeError", errors.ArgumentTypeError, lambda: fi_ffi.TensorDesc(64, (1,), "half")),
    ("ArgumentTypeError", errors.ArgumentTypeError,
     lambda: fi_ffi.TensorDesc(64, (1,), "float16", device="gpu")),
    ("ArgumentTypeError", errors.ArgumentTypeError,
     lambda: fi_ffi.TensorDesc("0x40", (1,), "float16", device="cpu")),
    ("No kernels of a module", errors.KernelNotFoundError, no_kernels),
    ("A place that is not there", errors.KernelNotFoundError, lambda: open_source("/none")),
    ("A place that is not there", errors.KernelNotFoundError, lambda: runtime.load_file("/")),
    ("A release mismatch", errors.KernelNotFoundError, other_release),
    ("A function that is not in the library", errors.KernelNotFoundError, no_function),
    ("Kernels for another GPU", errors.ArchitectureError, for_another_gpu),
    ("An op that was written for other GPUs", errors.ArchitectureError, written_for_others),
    ("A library for another processor", errors.ArchitectureError, for_another_processor),
    ("An interface that is not the declared one", errors.AbiError, another_interface),
    ("A sha256 that is another", errors.ArtifactError, installed_and_changed),
    ("Permission refused", errors.ArtifactError,
     lambda tmp_path: writable(tmp_path, 0o777, trust.check_root)),
    ("Permission refused", errors.ArtifactError,
     lambda tmp_path: writable(tmp_path, 0o777, trust.check_folder)),
    ("Permission refused", errors.ArtifactError,
     lambda tmp_path: writable(tmp_path, 0o777, trust.check_named)),
    ("Permission refused", errors.ArtifactError, writable_object),
    (DAMAGED, errors.ArtifactError, lambda tmp_path: no_wheel(tmp_path, "kernels.txt")),
    (DAMAGED, errors.ArtifactError, lambda tmp_path: no_wheel(tmp_path, "kernels.whl")),
    (DAMAGED, errors.ArtifactError, no_library),
    ("Offline", errors.FetchError, offline),
    ("No GPU", errors.LoaderError, no_gpu),
    ("libcudart is missing", errors.LoaderError, no_cudart),
    (TVM_FFI, errors.LoaderError, old_tvm_ffi),
    (TVM_FFI, errors.LoaderError, no_tvm_ffi),
    (TVM_FFI, errors.LoaderError, other_tvm_ffi),
    (TVM_FFI, errors.LoaderError, tvm_ffi_without_its_library),
    (TVM_FFI, errors.LoaderError, lambda: library.attach("/none.so")),
    ("After a fork", errors.LoaderError, after_a_fork),
    ("A library that does not load", errors.LoaderError, lambda: library.open_module("/none.so")),
    (DISK, errors.LoaderError, full_disk),
    (DISK, errors.LoaderError, read_only_disk),
    ("A lock that cannot be read", errors.LoaderError, no_lock),
    ("What else a call needs", errors.LoaderError, no_cuda_bindings),
    ("KernelError", errors.KernelError, fails_without_words),
    ("KernelError", errors.KernelError, lambda: cuda.check(1, "cudaMemcpyAsync")),
    ("DeviceError", errors.DeviceError, lambda: cuda.check(700, "cudaEventRecord")),
    ("HangError", errors.HangError, hang),
    ("BuildError", errors.BuildError, no_compiler),
    ("BuildError", errors.BuildError, not_linux),
    ("BuildError", errors.BuildError, no_ensurepip),
]  # fmt: skip
