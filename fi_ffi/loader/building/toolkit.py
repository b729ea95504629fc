"""Finds the CUDA toolkit and the C++ compiler, and what the linker needs.

A toolkit is taken from CUDA_HOME, CUDA_PATH or PATH.  Where there is none of the
CUDA major that the loader loads kernels for, it comes from the package index.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fi_ffi.errors import ArgumentError, BuildError
from fi_ffi.loader.machine import CUDA_MAJOR

INDEX_CUDA = "13.0"  # the toolkit taken from the package index

# Start of a header's name -> the extra of the `cuda-toolkit` distribution that has it.
HEADERS = {
    "cublas": "cublas",
    "curand": "curand",
    "nvrtc": "nvrtc",
    "cusparse": "cusparse",
    "cusolver": "cusolver",
    "nvml": "nvml",
    "nvtx3": "nvtx",
}

# What is linked with -l -> the extra of `cuda-toolkit` that has it.
LIBRARIES = {
    "cublas": "cublas",
    "cublasLt": "cublas",
    "curand": "curand",
    "nvrtc": "nvrtc",
    "cusparse": "cusparse",
    "cusolver": "cusolver",
}


@dataclass(frozen=True)
class Toolkit:
    """A CUDA toolkit: its folder and its release, such as "13.0"."""

    home: Path
    release: str

    @property
    def nvcc(self) -> Path:
        return self.home / "bin" / "nvcc"

    @property
    def major(self) -> int:
        return int(self.release.partition(".")[0])


def _output(*command: str | Path) -> str:
    """What a command prints on either stream; empty if it cannot be run."""
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
    except OSError:
        return ""
    return done.stdout


def toolkit_of(nvcc: Path) -> Toolkit | None:
    """The toolkit that `nvcc` belongs to, or None if it is not a working compiler."""
    release = re.search(r"release (\d+\.\d+),", _output(nvcc, "--version"))
    # `nvcc` on PATH may be a link or a script; the real one names its folder in a dry run.
    top = re.search(r"^#\$ TOP=(.+)$", _output(nvcc, "-dryrun", "-c", "none.cu"), re.MULTILINE)
    if release is None or top is None:
        return None
    return Toolkit(Path(top[1].strip()).resolve(), release[1])


def find_toolkits() -> list[Toolkit]:
    """The toolkits of this machine, the one that was named first before that on PATH."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    candidates = [Path(home) / "bin" / "nvcc" for home in homes if home]
    if on_path := shutil.which("nvcc"):
        candidates.append(Path(on_path))
    candidates.append(Path("/usr/local/cuda/bin/nvcc"))  # where NVIDIA's installers put it
    found = (toolkit_of(nvcc) for nvcc in candidates if nvcc.is_file())
    return list(dict.fromkeys(toolkit for toolkit in found if toolkit))


def check_architectures(toolkit: Toolkit, architectures: Iterable[str]) -> None:
    """Raise ArgumentError for an architecture that this nvcc cannot compile for."""
    known = re.findall(r"compute_(\d+)\b", _output(toolkit.nvcc, "--list-gpu-arch"))
    for architecture in architectures:
        if known and re.sub(r"\D", "", architecture) not in known:
            names = ", ".join(f"{number[:-1]}.{number[-1]}" for number in known)
            raise ArgumentError(
                "build", "arch", got=architecture, expected=f"one of {names} (CUDA "
                f"{toolkit.release}; letters such as the a of 9.0a aside)"
            )  # fmt: skip


def find_cxx(cpu: str | None = None) -> str:
    """The C++ compiler: CXX, or c++, g++ or clang++ on PATH; for another processor, its g++."""
    names, package = ["c++", "g++", "clang++"], "g++"
    if cpu is not None:
        names, package = [f"{cpu}-linux-gnu-g++"], f"g++-{cpu.replace('_', '-')}-linux-gnu"
    candidates = [os.environ["CXX"]] if os.environ.get("CXX") else names
    for name in candidates:
        if shutil.which(name.split()[0]):
            return name
    fedora = "gcc-c++" if cpu is None else f"gcc-c++-{cpu}-linux-gnu"
    raise BuildError(
        f"no C++ compiler: {' or '.join(candidates)} cannot be found. Install one "
        f"(Debian and Ubuntu: apt install {package}; Fedora: dnf install {fedora}), or name it in "
        "CXX."
    )


def header_extra(compiler_output: str) -> str | None:
    """The `cuda-toolkit` extra for the CUDA header that a compiler did not find, if it is one."""
    missing = re.search(r"fatal error: ([\w/]+)[\w./]*: No such file", compiler_output)
    if missing is None:
        return None
    return next((extra for start, extra in HEADERS.items() if missing[1].startswith(start)), None)


def missing_library(linker_output: str) -> str | None:
    """The CUDA library that a linker did not find, by the name it is linked with."""
    # GNU ld and gold, lld, mold
    told = r"(?:cannot find -l|unable to find library -l|library not found: )(\w+)"
    missing = re.search(told, linker_output)
    return missing[1] if missing and missing[1] in LIBRARIES else None


def find_library(folder: Path, file: str) -> Path | None:
    """The library whose file's name begins so, in the toolkit or package in `folder`."""
    for pattern in ("lib64", "lib", "targets/*/lib"):
        for candidate in sorted(folder.glob(f"{pattern}/{file}*")):
            return candidate
    return None


def find_cudart(folder: Path) -> Path | None:
    """The CUDA runtime library of a toolkit or package in `folder`."""
    return find_library(folder, f"libcudart.so.{CUDA_MAJOR}")


def _stub_source(cuda_h: Path) -> str:
    """C text that defines every function of the CUDA driver, to link against and never to run.

    With the names there, the linker lists libcuda.so.1 as needed in the modules that
    call it and in no other, as it would with the toolkit's own stub.
    """
    names = sorted(set(re.findall(r"\bcu[A-Z]\w+", cuda_h.read_text(errors="replace"))))
    return "".join(f"int {name}(void) {{ return 999; }}\n" for name in names)


def add_link(folder: Path, name: str, library: Path) -> None:
    """Let `-l<name>` find a library whose file's name ends with its version."""
    link = folder / f"lib{name}.so"
    link.unlink(missing_ok=True)
    link.symlink_to(library)


def make_link_folder(toolkit: Toolkit, cxx: str, cudart: Path, folder: Path) -> Path:
    """A folder for LIBRARY_PATH with libcudart.so and a stub of libcuda.so."""
    folder.mkdir(parents=True, exist_ok=True)
    add_link(folder, "cudart", cudart)
    stub = folder / "libcuda.so"
    if not stub.exists():
        source = folder / "libcuda.cpp"
        header = toolkit.home / "include" / "cuda.h"
        source.write_text(f'extern "C" {{\n{_stub_source(header)}}}\n')
        command = [*cxx.split(), "-shared", "-fPIC", "-nostdlib", "-Wl,-soname,libcuda.so.1"]
        output = _output(*command, "-o", str(stub), str(source))
        if not stub.exists():
            raise BuildError(f"the C++ compiler cannot make a library: {output.strip()}")
    return folder


def compiler_environment(
    toolkit: Toolkit, cxx: str, headers: Sequence[Path], link_folder: Path
) -> dict[str, str]:
    """The variables that FlashInfer's build files and the compilers read."""

    def prepend(name: str, folders: Sequence[Path]) -> str:
        return os.pathsep.join([*map(str, folders), *filter(None, [os.environ.get(name)])])

    return {
        "CUDA_HOME": str(toolkit.home),
        "CXX": cxx,
        # Searched after every folder on the command line, so that nothing here can
        # hide a header of the toolkit itself.
        "CPLUS_INCLUDE_PATH": prepend("CPLUS_INCLUDE_PATH", headers),
        "C_INCLUDE_PATH": prepend("C_INCLUDE_PATH", headers),
        "LIBRARY_PATH": prepend("LIBRARY_PATH", [link_folder]),
        # The compilers' messages are read for missing headers and for the cause of a failure.
        "LC_ALL": "C",
    }
