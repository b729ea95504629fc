"""The throw-away environment in which FlashInfer's generators run.

One per release: it is made once and used again, by any Python, until its requirements
change; its path is in every compiler command, so another one would mean compiling all
over.  CUDA pieces that the machine lacks go into folders of their own beside it, so
that they cannot disagree with those that torch brings.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock
from packaging.requirements import Requirement

from fi_ffi.errors import BuildError
from fi_ffi.loader.building.toolkit import (
    HEADERS,
    INDEX_CUDA,
    LIBRARIES,
    Toolkit,
    find_library,
    toolkit_of,
)

DEFAULT_TORCH = "torch==2.13.0"

# What FlashInfer's generators import, beside torch; its other dependencies are for
# running kernels.  Versions are taken from the requirements of the release.
_NEEDED = (
    "apache-tvm-ffi",
    "filelock",
    "jinja2",
    "ninja",
    "nvidia-ml-py",
    "packaging",
    "requests",
)
_ERROR_LINES = 6

Say = Callable[[str], None]


@dataclass(frozen=True)
class Environment:
    """A virtual environment with a release of flashinfer-python in it."""

    root: Path

    @property
    def python(self) -> Path:
        return self.root / "bin" / "python"

    @property
    def log(self) -> Path:
        return self.root.with_name(self.root.name + ".log")

    @property
    def site_packages(self) -> Path:
        # Of the Python that made the environment, which need not be the one running this.
        found = sorted(self.root.glob("lib/python3.*/site-packages"))
        return found[0] if found else self.root / "lib"

    def ninja(self) -> str:
        own = self.root / "bin" / "ninja"
        found = str(own) if own.exists() else shutil.which("ninja")
        if found is None:
            raise BuildError(f"the environment {self.root} has no ninja", str(self.log))
        return found

    def requirement(self, name: str) -> str:
        """What flashinfer-python says about the distribution `name`."""
        for text in self._flashinfer().requires or ():
            requirement = Requirement(text)
            if requirement.name == name and requirement.marker is None:
                return str(requirement)
        return name

    def licenses(self) -> dict[str, Path]:
        """FlashInfer's licence texts, which a wheel of its kernels must carry."""
        files = self._flashinfer().files or ()
        paths = (Path(str(file.locate())) for file in files if "/licenses/" in str(file))
        return {path.name: path for path in paths if path.is_file()}

    def _flashinfer(self) -> importlib.metadata.Distribution:
        found = importlib.metadata.distributions(
            name="flashinfer-python", path=[str(self.site_packages)]
        )
        for distribution in found:
            return distribution
        raise BuildError(f"flashinfer-python is not in {self.root}", str(self.log))


def _run(what: str, command: Sequence[str], log: Path) -> None:
    """Run an installer with its output in `log`; BuildError with its last words."""
    with log.open("a") as file:
        file.write(f"$ {' '.join(command)}\n")
        file.flush()
        start = file.tell()
        code = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, check=False
        ).returncode
    if code:
        with log.open(errors="replace") as text:
            text.seek(start)
            lines = [line.rstrip() for line in text if line.strip()]
        telling = [line for line in lines if "error" in line.lower()] or lines
        detail = "\n".join(telling[-_ERROR_LINES:])
        raise BuildError(f"{what} failed:\n{detail}", str(log))


def _create(environment: Environment) -> None:
    """Make the empty environment, with uv where this Python cannot do it by itself."""
    shutil.rmtree(environment.root, ignore_errors=True)
    environment.root.parent.mkdir(parents=True, exist_ok=True)
    what, uv = f"making the environment {environment.root}", shutil.which("uv")
    if importlib.util.find_spec("ensurepip") is not None:
        try:
            _run(what, [sys.executable, "-m", "venv", str(environment.root)], environment.log)
        except BuildError:
            if uv is None:
                raise
            shutil.rmtree(environment.root, ignore_errors=True)
        else:
            return
    if uv is None:
        raise BuildError(
            "this Python has no ensurepip and there is no uv on PATH; install either "
            "(Debian and Ubuntu: apt install python3-venv)"
        )
    _run(what, [uv, "venv", "--python", sys.executable, str(environment.root)], environment.log)


def _install(environment: Environment, *arguments: str) -> None:
    """`pip install` by the environment's own pip, or by uv in one that uv made."""
    if (environment.site_packages / "pip").is_dir():
        command = [str(environment.python), "-I", "-m", "pip", "install"]
    else:
        uv = shutil.which("uv")
        if uv is None:
            raise BuildError(f"{environment.root} has no pip, and there is no uv on PATH")
        command = [uv, "pip", "install", "--python", str(environment.python)]
    wanted = [text for text in arguments if not text.startswith(("-", "/"))]
    _run(f"installing {' '.join(wanted)}", [*command, *arguments], environment.log)


def _once(
    result: Path, telling: Path, content: Mapping[str, str], make: Callable[[], None]
) -> None:
    """Make the folder `result` unless `telling` is there and was made from the same `content`.

    The marker beside it is written last: what was interrupted is done again.
    """
    marker = result.with_name(result.name + ".json")
    text = json.dumps(dict(content), indent=1, sort_keys=True)
    marker.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{marker}.lock"):
        if telling.exists() and marker.is_file() and marker.read_bytes() == text.encode():
            return
        marker.unlink(missing_ok=True)
        make()
        temporary = marker.with_name(marker.name + ".part")
        temporary.write_text(text)
        os.replace(temporary, marker)


def prepare_environment(root: Path, release: str, torch: str, say: Say) -> Environment:
    """The environment for `release` under the folder `root`, made if it is not there."""
    environment = Environment(root / f"env-{release}")

    def make() -> None:
        created = environment.root / "created"  # interrupted before, it would have no pip
        if not (created.exists() and environment.python.exists()):
            say(f"making a virtual environment in {environment.root}")
            _create(environment)
            created.touch()
        say(f"installing flashinfer-python {release}")
        _install(environment, "--no-deps", f"flashinfer-python=={release}")
        say(f"installing {torch} and what FlashInfer's generators import")
        _install(environment, torch, *map(environment.requirement, _NEEDED))

    content = {"torch": torch, "needed": " ".join(_NEEDED)}
    # Its Python is a link, and leads nowhere once the Python that made it is gone.
    _once(environment.root, environment.python, content, make)
    return environment


def _cuda_folder(
    environment: Environment, extra: str, release: str, *, libraries: bool = True
) -> Path:
    ending = "-lib" if libraries and extra in HEADERS.values() else ""
    return environment.root.with_name(f"cuda-{release}-{extra.replace(',', '-')}{ending}")


def _cuda_root(folder: Path) -> Path | None:
    """The folder that has `include`, in one that NVIDIA's packages were installed to."""
    return next((root for root in folder.glob("nvidia/*") if (root / "include").is_dir()), None)


def _install_cuda(
    environment: Environment, extra: str, release: str, say: Say, *, libraries: bool = True
) -> Path:
    """Install an extra of NVIDIA's `cuda-toolkit` to a folder of its own; the root in it.

    Without its `libraries`, which are large, it is another folder: neither takes from a
    compiler what it is reading in the other.
    """
    folder = _cuda_folder(environment, extra, release, libraries=libraries)
    requirement = f"cuda-toolkit[{extra}]=={release}.*"

    def make() -> None:
        say(f"installing {requirement}")
        shutil.rmtree(folder, ignore_errors=True)
        _install(environment, "--target", str(folder), requirement)
        if not libraries:
            for unused in folder.glob("nvidia/*/lib"):
                shutil.rmtree(unused)

    _once(folder, folder, {"requirement": requirement}, make)
    root = _cuda_root(folder)
    if root is None:
        raise BuildError(f"{requirement} has no headers in {folder}", str(environment.log))
    return root


def install_toolkit(environment: Environment, say: Say) -> Toolkit:
    """nvcc and its companions from the package index."""
    home = _install_cuda(environment, "nvcc,cccl", INDEX_CUDA, say)
    toolkit = toolkit_of(home / "bin" / "nvcc")
    if toolkit is None:
        raise BuildError(f"nvcc from the package index does not run: {home}/bin/nvcc")
    return toolkit


def install_cudart(
    environment: Environment, toolkit: Toolkit, say: Say, cpu: str | None = None
) -> Path:
    """A folder with the CUDA runtime library, for a toolkit that came without it.

    Of another processor, it is what is linked with and never loaded.
    """
    if cpu is None:
        return _install_cuda(environment, "cudart", toolkit.release, say)
    folder = environment.root.with_name(f"cuda-{toolkit.release}-cudart-{cpu}")
    requirement = f"nvidia-cuda-runtime=={toolkit.release}.*"
    tags = ["--only-binary=:all:", "--no-deps"]
    if (environment.site_packages / "pip").is_dir():
        tags += [f"--platform=manylinux{tag}_{cpu}" for tag in ("2014", "_2_17", "_2_28")]
    else:
        tags.append(f"--python-platform={cpu}-manylinux_2_28")

    def make() -> None:
        say(f"installing {requirement} of {cpu}")
        shutil.rmtree(folder, ignore_errors=True)
        _install(environment, "--target", str(folder), *tags, requirement)

    _once(folder, folder, {"requirement": requirement, "cpu": cpu}, make)
    return _cuda_root(folder) or folder


def install_headers(environment: Environment, extra: str, toolkit: Toolkit, say: Say) -> None:
    """The headers of a CUDA library that the toolkit came without."""
    _install_cuda(environment, extra, toolkit.release, say, libraries=False)


def install_library(environment: Environment, name: str, toolkit: Toolkit, say: Say) -> Path:
    """A CUDA library that the toolkit came without, as it is linked with `-l<name>`."""
    root = _install_cuda(environment, LIBRARIES[name], toolkit.release, say)
    found = find_library(root, f"lib{name}.so.")
    if found is None:
        raise BuildError(f"there is no lib{name}.so in {root}", str(environment.log))
    return found


def header_folders(environment: Environment, toolkit: Toolkit) -> list[Path]:
    """The include folders that `install_headers` has made for this release of CUDA."""
    folders = (
        _cuda_folder(environment, extra, toolkit.release, libraries=False)
        for extra in HEADERS.values()
    )
    roots = (_cuda_root(folder) for folder in folders)
    return [root / "include" for root in roots if root is not None]
