"""Errors that can be made without a GPU and that no other test makes, or whose words are put
together of several; each with its entry of a page.

`RAISED` has the heading of docs/troubleshooting.md, the class, and a function whose arguments are
fixtures' names (`patch` is pytest's monkeypatch).
"""

from __future__ import annotations

import errno
import os
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
    cute_runtime,
    kernels,
    machine,
    runtime,
    search,
    trust,
    tvm_ffi,
)
from fi_ffi.loader.fetch import asking, wheels_lock
from fi_ffi.loader.kernels import open_source
from fi_ffi.modules import files
from fi_ffi.modules.files import KernelFile
from fi_ffi.ops.call import cuda, releases
from fi_ffi.ops.call.op import Op
from fi_ffi.ops.call.row import Row, Tensor
from fi_ffi.ops.functions import OPS
from fi_ffi_build import environment

from tests.helpers.plan_calls import Case, aligned

X, W = np.ones((4, 64), np.float16), np.ones(64, np.float16)
OUT = np.empty_like(X)
CUDA = parse_device("cuda:0")


def desc(ptr: int, shape: tuple[int, ...], device: str = "cuda:0") -> fi_ffi.TensorDesc:
    return fi_ffi.TensorDesc(ptr, shape, "float16", device=device)


def rmsnorm(out: object = OUT, x: object = X, weight: object = W, **more: Any) -> None:
    fi_ffi.rmsnorm(out, x, weight, **more)


def patched(target: object, name: str, value: object, call: Callable[[], object]) -> Callable:
    """A call while an attribute is another."""

    def made(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(target, name, value)
        call()

    return made


def in_environment(name: str, value: str, call: Callable[[], object]) -> Callable:
    def made(patch: pytest.MonkeyPatch) -> None:
        patch.setenv(name, value)
        call()

    return made


def of_file(text: bytes, call: Callable[[Path], object], mode: int = 0o644) -> Callable:
    """A call of a file with this text."""

    def made(tmp_path: Path) -> None:
        file = tmp_path / "file.so"
        file.write_bytes(text)
        file.chmod(mode)
        call(file)

    return made


def disk(number: int) -> None:
    with cache.as_loader_error(Path("norm.so"), 10**6):
        raise OSError(number, os.strerror(number))


def read_only() -> None:
    out = np.empty_like(X)
    out.flags.writeable = False
    rmsnorm(out)


def small_workspace() -> None:
    Case("decode").plan(workspace=fi_ffi.Workspace(np.zeros(2**20, np.uint8), aligned(16)))


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


def no_kernels(patch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    search.use_source(tmp_path)
    search.find_module("norm")


def no_function(built_wheel: Path) -> None:
    search.use_source(built_wheel)
    fi_ffi.module("norm").entry("rmsnormm")


def for_another_gpu(patch: pytest.MonkeyPatch, built_wheel: Path) -> None:
    patch.setattr(machine, "capability", lambda device: (8, 7))
    search.use_source(built_wheel)
    search.find_module("norm", 0)


def for_another_processor(built_wheel: Path, tmp_path: Path) -> None:
    data = bytearray(open_source(built_wheel).file("page").path.read_bytes())
    data[18:20] = (62 + 183 - int.from_bytes(data[18:20], "little")).to_bytes(2, "little")
    file = tmp_path / "page.so"
    file.write_bytes(data)
    files.load_file(file)


def another_interface(built_wheel: Path) -> None:
    search.use_source(built_wheel)
    wrong = parse_signature("(0: DLTensor*) -> void")
    runtime.kernel_entry("norm", type(wrong)("rmsnorm", wrong.params, wrong.result), ">=0", None)


def installed_and_changed(tmp_path: Path) -> None:
    file, info = tmp_path / tvm_ffi.MEMBER, tmp_path / "apache_tvm_ffi-0.1.15.dist-info"
    for folder in (file.parent, info):
        folder.mkdir(parents=True)
    file.write_bytes(b"another")
    (info / "METADATA").write_text("Name: apache-tvm-ffi\nVersion: 0.1.15\n")
    (info / "RECORD").write_text(f"{tvm_ffi.MEMBER},sha256={'A' * 43},7\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(tmp_path), *sys.path])
        tvm_ffi.installed()


def writable(tmp_path: Path, mode: int, check: Callable[[Path], object]) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    folder.chmod(mode)
    check(folder)


def no_wheel(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    file.write_bytes(b"no zip archive")
    open_source(file).modules()


def with_tvm_ffi(version: str) -> Callable:
    """Look for it where there is one of this version, without its library."""

    def made(tmp_path: Path, patch: pytest.MonkeyPatch) -> None:
        info = tmp_path / f"apache_tvm_ffi-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Name: apache-tvm-ffi\nVersion: {version}\n")
        patch.setattr(sys, "path", [str(tmp_path)])
        tvm_ffi.installed()

    return made


def no_cudart(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(machine.library, "in_process", lambda file: None)
    patch.setattr(machine, "_library_places", lambda file: ["/nowhere.so"])
    machine.load_library.__wrapped__("libcudart.so.12")


def with_another_cuda(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(machine, "_runtime", (None, "/x/libcudart.so.13", 13))
    machine.check_cuda(12, "norm.so")


def with_an_old_driver(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(machine, "driver_version", lambda: (12, 6))
    machine.check_driver(13, "norm.so")


def no_old_nvcc(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(environment, "find_toolkits", list)
    environment.choose_toolkit(environment.Environment(Path("/none")), "12.8", print)


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


def not_linux(patch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    patch.setattr(environment.sys, "platform", "darwin")
    with environment.open_workshop("0.6.13", ("8.7",), tmp_path, "torch", None):
        pass


def no_ensurepip(patch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    patch.setattr(environment.importlib.util, "find_spec", lambda name: None)
    patch.setenv("PATH", "")
    environment.create(environment.Environment(tmp_path / "env"))


LAST_AXIS = "Last axis not contiguous"
ANOTHER_CUDA = "CUDA 12 and CUDA 13"
DAMAGED = "Damaged file or wheel"
TVM_FFI = "libtvm_ffi is missing, too old or loaded twice"
DISK = "Full or unwritable disk"
HERE = tuple[str, type[errors.FiFfiError], Callable[..., object]]
RAISED: list[HERE] = [
    (LAST_AXIS, errors.ArgumentError, lambda: rmsnorm(x=np.ones((4, 128), np.float16)[:, ::2])),
    ("Misaligned or null address", errors.ArgumentError,
     lambda: rmsnorm(desc(4096, (4, 64)), desc(4098, (4, 64)), desc(8192, (64,)))),
    ("Misaligned or null address", errors.ArgumentError,
     lambda: rmsnorm(desc(4096, (4, 64)), desc(0, (4, 64)), desc(8192, (64,)))),
    ("Tensors on different devices", errors.ArgumentError,
     lambda: rmsnorm(desc(4096, (4, 64)), X, desc(8192, (64,)))),
    ("Tensors on different devices", errors.ArgumentError,
     patched(streams, "device_of", lambda handle: 1, lambda: rmsnorm(
         desc(4096, (4, 64)), desc(65536, (4, 64)), desc(8192, (64,)), stream=0x5000))),
    ("Wrong dtype", errors.ArgumentError, lambda: rmsnorm(x=X.astype(np.float64))),
    ("Wrong dtype", errors.ArgumentError, lambda: fi_ffi.BatchDecodePlan(
        np.array([0, 1]), np.array([0]), np.array([1]), num_qo_heads=1, num_kv_heads=1,
        head_dim=64, page_size=16, device="cpu")),
    ("Wrong rank or size", errors.ArgumentError, lambda: rmsnorm(weight=W[:32])),
    ("Wrong rank or size", errors.ArgumentError, lambda: rmsnorm(x=X[0])),
    ("Number out of range", errors.ArgumentError, lambda: rmsnorm(eps=float("nan"))),
    ("Memory that is read-only or overlaps", errors.ArgumentError, read_only),
    ("No stream", errors.ArgumentError,
     lambda: rmsnorm(desc(4096, (4, 64)), desc(65536, (4, 64)), desc(8192, (64,)))),
    ("Workspace too small", errors.ArgumentError, small_workspace),
    ("Stale plan", errors.ArgumentError, stale_plan),
    ("Batch or cache differs from the plan", errors.ArgumentError, another_page_size),
    ("Prepared call in use", errors.ArgumentError, in_use),
    ("Capture refused", errors.ArgumentError, lambda: fi_ffi.capture(0)),
    ("Unknown architecture, release or module", errors.ArgumentError,
     lambda: fi_ffi.rmsnorm.supports(sm="hopper")),
    ("Invalid environment variable", errors.ArgumentError,
     in_environment(search.SOURCES, "somewhere", search.kinds_asked)),
    ("Wrong rank or size", errors.ArgumentError, lambda: fi_ffi.sampling_from_probs(
        np.ones((2, 4), np.float32), np.zeros(2, np.int32), np.zeros(2, bool),
        maybe_seed_arr=np.zeros(3, np.int64))),
    ("Missing argument", errors.ArgumentTypeError,
     lambda: fi_ffi.softmax(np.ones((2, 4), np.float32))),
    ("ArgumentTypeError", errors.ArgumentTypeError, lambda: rmsnorm(x=[1, 2])),
    ("ArgumentTypeError", errors.ArgumentTypeError, lambda: fi_ffi.TensorDesc(64, (1,), "half")),
    ("ArgumentTypeError", errors.ArgumentTypeError,
     lambda: fi_ffi.TensorDesc(64, (1,), "float16", device="gpu")),
    ("ArgumentTypeError", errors.ArgumentTypeError,
     lambda: fi_ffi.TensorDesc("0x40", (1,), "float16", device="cpu")),
    ("No kernels of a module", errors.KernelNotFoundError, no_kernels),
    ("Missing file or directory", errors.KernelNotFoundError, lambda: open_source("/none")),
    ("Missing file or directory", errors.KernelNotFoundError, lambda: files.load_file("/")),
    ("Release mismatch", errors.KernelNotFoundError,
     patched(search, "decided", lambda: ("0.5.0", ""),
             lambda: releases.check_available(OPS["rmsnorm"].row, CUDA))),
    ("Function not in the library", errors.KernelNotFoundError, no_function),
    ("Kernels for another GPU", errors.ArchitectureError, for_another_gpu),
    ("Op written for other GPUs", errors.ArchitectureError,
     patched(machine, "capability", lambda device: (8, 7), lambda: releases.check_available(
         next(op.row for op in OPS.values() if op.row.capabilities), CUDA))),
    ("Library for another processor", errors.ArchitectureError, for_another_processor),
    ("Interface differs from the declared one", errors.AbiError, another_interface),
    ("Wrong sha256", errors.ArtifactError, installed_and_changed),
    ("Unsafe permissions", errors.ArtifactError,
     lambda tmp_path: writable(tmp_path, 0o777, trust.check_root)),
    ("Unsafe permissions", errors.ArtifactError,
     lambda tmp_path: writable(tmp_path, 0o777, trust.check_folder)),
    ("Unsafe permissions", errors.ArtifactError,
     lambda tmp_path: writable(tmp_path, 0o777, trust.check_user_path)),
    ("Unsafe permissions", errors.ArtifactError,
     of_file(b"", lambda file: trust.check_object(file, file.lstat()), 0o666)),
    (DAMAGED, errors.ArtifactError, lambda tmp_path: no_wheel(tmp_path, "kernels.txt")),
    (DAMAGED, errors.ArtifactError, lambda tmp_path: no_wheel(tmp_path, "kernels.whl")),
    (DAMAGED, errors.ArtifactError,
     of_file(b"no library", lambda file: kernels.facts_of(KernelFile(file).file()))),
    ("Offline", errors.FetchError,
     in_environment("FI_FFI_OFFLINE", "1", lambda: asking.check_permission("norm.so"))),
    ("No GPU", errors.LoaderError,
     lambda: machine._attribute.__wrapped__(machine.device_count(), 75)),
    ("A CUDA library is missing", errors.LoaderError, no_cudart),
    (ANOTHER_CUDA, errors.AbiError, with_another_cuda),
    (ANOTHER_CUDA, errors.AbiError, lambda: machine.check_cuda(11, "norm.so")),
    (ANOTHER_CUDA, errors.LoaderError, with_an_old_driver),
    (TVM_FFI, errors.LoaderError, patched(library, "_OLDEST", (0, 1, 10**6),
                                          lambda: library.attach(runtime.ensure_tvm_ffi().path))),
    (TVM_FFI, errors.LoaderError, patched(sys, "path", [], tvm_ffi.installed)),
    (TVM_FFI, errors.LoaderError, with_tvm_ffi("0.2")),
    (TVM_FFI, errors.LoaderError, with_tvm_ffi("0.1.15")),
    (TVM_FFI, errors.LoaderError, lambda: library.attach("/none.so")),
    ("CuTe DSL's runtime is missing", errors.LoaderError,
     patched(sys, "path", [], cute_runtime.installed)),
    ("After a fork", errors.LoaderError,
     patched(machine, "_forked_after_cuda", True, machine.refuse_after_fork)),
    ("Library that does not load", errors.LoaderError, lambda: library.open_module("/none.so")),
    (DISK, errors.LoaderError, lambda: disk(errno.ENOSPC)),
    (DISK, errors.LoaderError, lambda: disk(errno.EROFS)),
    ("Unreadable lock", errors.LoaderError,
     of_file(b"no = 1", wheels_lock.read_lock)),
    ("KernelError", errors.KernelError, fails_without_words),
    ("KernelError", errors.KernelError, lambda: cuda.check(1, "cudaMemcpyAsync")),
    ("DeviceError", errors.DeviceError, lambda: cuda.check(700, "cudaEventRecord")),
    ("HangError", errors.HangError, hang),
    ("BuildError", errors.BuildError, no_old_nvcc),
    ("BuildError", errors.BuildError,
     in_environment("CXX", "no-such-compiler", environment.find_cxx)),
    ("BuildError", errors.BuildError, not_linux),
    ("BuildError", errors.BuildError, no_ensurepip),
]  # fmt: skip
