"""What a build needs before it can start: environment, toolkit, and a folder of its own."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from fi_ffi.errors import ArgumentError, BuildError
from fi_ffi.loader import cache, trust
from fi_ffi.loader.building import env
from fi_ffi.loader.building import toolkit as cuda
from fi_ffi.loader.building.names import parse_release
from fi_ffi.loader.machine import CPUS, CUDA_MAJOR


@dataclass(frozen=True)
class Progress:
    """Where a build stands.

    `stage` is "prepare", "compile" or "package"; `done` of `total` compiler and
    linker runs are finished; times are in seconds, `remaining` None while unknown.
    """

    stage: str
    message: str
    done: int = 0
    total: int = 0
    elapsed: float = 0.0
    remaining: float | None = None


Report = Callable[[Progress], None]


@dataclass(frozen=True)
class Workshop:
    """All that a build needs but the modules' names."""

    release: str
    architectures: tuple[str, ...]
    folder: Path
    environment: env.Environment
    toolkit: cuda.Toolkit
    cxx: str
    link_folder: Path
    report: Report
    # The processor that is compiled for, where it is not this machine's.
    cpu: str | None = None

    @property
    def log(self) -> Path:
        return self.folder / "build.log"

    def say(self, message: str) -> None:
        self.report(Progress("prepare", message))

    def variables(self) -> dict[str, str]:
        headers = env.header_folders(self.environment, self.toolkit)
        return {
            **cuda.compiler_environment(self.toolkit, self.cxx, headers, self.link_folder),
            "FLASHINFER_CUDA_ARCH_LIST": " ".join(self.architectures),
            "FLASHINFER_WORKSPACE_BASE": str(self.folder),
            # A compiler for another processor does not look into LIBRARY_PATH.
            **({"NVCC_CCBIN": self.cxx.split()[0]} if self.cpu else {}),
        }


def _ignore(progress: Progress) -> None:
    del progress


def _choose_toolkit(environment: env.Environment, say: env.Say) -> cuda.Toolkit:
    """A toolkit of this machine if one is of the right major, else the package index's."""
    found = cuda.find_toolkits()
    for toolkit in found:
        if toolkit.major == CUDA_MAJOR:
            return toolkit
    for toolkit in found:
        say(f"{toolkit.nvcc} is of CUDA {toolkit.release}, not of CUDA {CUDA_MAJOR}: not used")
    return env.install_toolkit(environment, say)


def _foreign(cpu: str | None) -> str | None:
    """A processor that is named, or None where it is this machine's."""
    if cpu not in (None, *CPUS):
        raise ArgumentError("build", "cpu", got=cpu, expected=" or ".join(CPUS))
    return None if cpu == platform.machine() else cpu


@contextmanager
def _unwritable_by_others() -> Iterator[None]:
    """What a build makes, or the programs that it runs, is for this user alone to write."""
    before = os.umask(0o077)
    os.umask(before | 0o022)
    try:
        yield
    finally:
        os.umask(before)


def _open_root() -> Path:
    """The cache's folder for builds, made if it is not there.

    A Python, compilers and build files in it are run, so nobody else may have put them there.
    """
    with cache.writing(cache.cache_root() / "build"):
        root = cache.make_folder("build")
    trust.check_tree(root)
    return root


@contextmanager
def _locked(folder: Path, say: env.Say) -> Iterator[None]:
    """One build at a time in `folder`: a second waits, and finds what the first made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = error.strerror
        raise BuildError(f"{folder} cannot be made: {reason}; name another --build-dir") from error
    trust.check_named(folder)
    trust.check_tree(folder)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        say(f"waiting for another build in {folder}")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def open_workshop(
    release: str,
    architectures: tuple[str, ...],
    build_dir: Path | None,
    torch: str = env.DEFAULT_TORCH,
    report: Report | None = None,
    cpu: str | None = None,
) -> Iterator[Workshop]:
    """Prepare the environment, the toolkit and the build folder, and hold the latter."""
    cpu = _foreign(cpu)
    release = parse_release(release)
    if sys.platform != "linux":
        raise BuildError("kernels can be built on Linux only")
    report = report or _ignore

    def say(message: str) -> None:
        report(Progress("prepare", message))

    with _unwritable_by_others():
        root = _open_root()
        cxx = cuda.find_cxx(cpu)
        environment = env.prepare_environment(root, release, torch, say)
        toolkit = _choose_toolkit(environment, say)
        cuda.check_architectures(toolkit, architectures)
        say(f"using {toolkit.nvcc} of CUDA {toolkit.release}")
        parts = [release, *architectures, *filter(None, [cpu])]
        folder = (build_dir or root / "-".join(parts)).absolute()
        with _locked(folder, say):
            own = None if cpu else cuda.find_cudart(toolkit.home)
            cudart = own or cuda.find_cudart(env.install_cudart(environment, toolkit, say, cpu))
            if cudart is None:
                raise BuildError(f"no libcudart.so.{CUDA_MAJOR} for {toolkit.home}")
            link_folder = cuda.make_link_folder(toolkit, cxx, cudart, folder / "link")
            if cpu:
                cxx = f"{cxx} -L{link_folder}"
            yield Workshop(
                release, architectures, folder, environment, toolkit, cxx, link_folder, report, cpu
            )
