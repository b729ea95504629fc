"""The environment of a build: FlashInfer's generators, the CUDA toolkit, and a build folder.

The generators run in a separate environment for each release. It is made once and reused, by any
Python, until its requirements change. Its path is in every compiler command, so another path would
mean compiling everything again. The toolkit is taken from CUDA_HOME, CUDA_PATH or PATH. Parts of
CUDA that the machine lacks are installed from the package index, into separate folders, so that
they cannot conflict with torch's. The index has nvcc from CUDA 13 on; for CUDA 12 it has headers,
libraries and ptxas.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout
from packaging.requirements import Requirement

from fi_ffi.errors import ArgumentError, BuildError
from fi_ffi.loader import cache, machine, trust
from fi_ffi.loader.machine import CPUS, CUDA_MAJORS, majors_here
from fi_ffi.loader.search import parse_release

INDEX_CUDA = "13.0"  # toolkit of the package index if no other is requested
_FIRST_INDEXED = 13  # first major version with an nvcc on the index
_FIRST_OF_FAMILIES = (12, 9)  # first nvcc that compiles for a family such as 12.0f

# Imports of FlashInfer's generators besides torch, for which `stand_in.py` stands in; its other
# dependencies only run kernels. The release's own requirements determine the versions.
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

# A library's `-l` name, or the start of its headers' names -> the extra of the `cuda-toolkit`
# distribution that provides it.
PARTS = {
    "cublas": "cublas",
    "cublasLt": "cublas",
    "curand": "curand",
    "nvrtc": "nvrtc",
    "cusparse": "cusparse",
    "cusolver": "cusolver",
    "nvml": "nvml",
    "nvtx3": "nvtx",
}


@dataclass(frozen=True)
class Progress:
    """Progress of a build.

    `stage` is "prepare", "compile" or "package"; `done` of `total` compiler and linker runs are
    finished.
    """

    stage: str
    message: str
    done: int = 0
    total: int = 0


Report = Callable[[Progress], None]
Say = Callable[[str], None]


# The toolkit and the compiler


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

    @property
    def tag(self) -> str:
        """The CUDA tag in names of wheels: cu130."""
        return "cu" + self.release.replace(".", "")


def _output(*command: str | Path) -> str:
    """Return a command's output on both streams; "" if it cannot be run."""
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
    except OSError:
        return ""
    return done.stdout


def toolkit_of(nvcc: Path) -> Toolkit | None:
    """Return the toolkit that `nvcc` belongs to, or None if it does not work."""
    release = re.search(r"release (\d+\.\d+),", _output(nvcc, "--version"))
    # `nvcc` on PATH may be a link or a script; a dry run prints the real folder.
    top = re.search(r"^#\$ TOP=(.+)$", _output(nvcc, "-dryrun", "-c", "none.cu"), re.MULTILINE)
    if release is None or top is None:
        return None
    return Toolkit(Path(top[1].strip()).resolve(), release[1])


def find_toolkits() -> list[Toolkit]:
    """Return this machine's toolkits: named ones, then the one on PATH, then installed ones."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    candidates = [Path(home) / "bin" / "nvcc" for home in homes if home]
    if on_path := shutil.which("nvcc"):
        candidates.append(Path(on_path))
    # The default folders of NVIDIA's installers.
    candidates.append(Path("/usr/local/cuda/bin/nvcc"))
    candidates += sorted(Path("/usr/local").glob("cuda-*/bin/nvcc"), reverse=True)
    toolkits = (toolkit_of(nvcc) for nvcc in candidates if nvcc.is_file())
    return list(dict.fromkeys(toolkit for toolkit in toolkits if toolkit))


def check_architectures(toolkit: Toolkit, architectures: Iterable[str]) -> None:
    """Raise ArgumentError for an architecture that this nvcc cannot compile for."""
    known = re.findall(r"compute_(\d+)\b", _output(toolkit.nvcc, "--list-gpu-arch"))
    has_families = tuple(map(int, toolkit.release.split("."))) >= _FIRST_OF_FAMILIES
    for architecture in architectures:
        if architecture.endswith("f") and not has_families:
            expected = (
                f"one architecture such as {architecture[:-1]}a: nvcc of CUDA {toolkit.release} "
                "knows no families, which came with 12.9"
            )
            raise ArgumentError("build", "arch", got=architecture, expected=expected)
        if known and re.sub(r"\D", "", architecture) not in known:
            names = ", ".join(f"{number[:-1]}.{number[-1]}" for number in known)
            aside = "letters such as the a of 9.0a aside"
            expected = f"one of {names} (CUDA {toolkit.release}; {aside})"
            raise ArgumentError("build", "arch", got=architecture, expected=expected)


def find_cxx(cpu: str | None = None) -> str:
    """Return the C++ compiler: CXX, or one on PATH; for another `cpu`, its cross compiler."""
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


Missing = tuple[str, str]
"""A part of CUDA that was not found: an extra of `cuda-toolkit`, and the library's name for `-l`
("" where the compiler looked for a header)."""


def missing_part(output: str) -> Missing | None:
    """Return the part of CUDA that is missing according to a build's output, or None."""
    header = re.search(r"fatal error: ([\w/]+)[\w./]*: No such file", output)
    for start, extra in PARTS.items():
        if header and header[1].startswith(start):
            return extra, ""
    # messages of GNU ld and gold, lld, and mold
    pattern = r"(?:cannot find -l|unable to find library -l|library not found: )(\w+)"
    name = re.search(pattern, output)
    return (PARTS[name[1]], name[1]) if name and name[1] in PARTS else None


def find_library(folder: Path, file: str) -> Path | None:
    """Return the library whose file name starts with `file`, in a toolkit or package."""
    for pattern in ("lib64", "lib", "targets/*/lib"):
        for candidate in sorted(folder.glob(f"{pattern}/{file}*")):
            return candidate
    return None


def _stub_source(cuda_h: Path) -> str:
    """Return C code that defines every function of the CUDA driver, for linking only.

    With these symbols the linker adds libcuda.so.1 to the needed libraries of just the modules that
    call it, as with the toolkit's own stub.
    """
    names = sorted(set(re.findall(r"\bcu[A-Z]\w+", cuda_h.read_text(errors="replace"))))
    return "".join(f"int {name}(void) {{ return 999; }}\n" for name in names)


def add_link(folder: Path, name: str, library: Path) -> None:
    """Let `-l<name>` find a library whose file name ends with its version."""
    link = folder / f"lib{name}.so"
    link.unlink(missing_ok=True)
    link.symlink_to(library)


def make_link_folder(toolkit: Toolkit, cxx: str, cudart: Path, folder: Path) -> Path:
    """Make a folder for LIBRARY_PATH with libcudart.so and a stub of libcuda.so."""
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


# The environment of the generators, and parts of CUDA beside it


@dataclass(frozen=True)
class Environment:
    """A virtual environment with a release of flashinfer-python."""

    root: Path

    @property
    def python(self) -> Path:
        return self.root / "bin" / "python"

    @property
    def log(self) -> Path:
        return self.root.with_name(self.root.name + ".log")

    @property
    def site_packages(self) -> Path:
        # The environment's Python need not be the one that runs this.
        folders = sorted(self.root.glob("lib/python3.*/site-packages"))
        return folders[0] if folders else self.root / "lib"

    def ninja(self) -> str:
        own = self.root / "bin" / "ninja"
        path = str(own) if own.exists() else shutil.which("ninja")
        if path is None:
            raise BuildError(f"the environment {self.root} has no ninja", str(self.log))
        return path

    def requirement(self, name: str) -> str:
        """Return flashinfer-python's requirement on the distribution `name`."""
        for text in self._flashinfer().requires or ():
            requirement = Requirement(text)
            if requirement.name == name and requirement.marker is None:
                return str(requirement)
        return name

    def licenses(self) -> dict[str, Path]:
        """Return FlashInfer's licence texts, which a wheel of its kernels must carry."""
        files = self._flashinfer().files or ()
        paths = (Path(str(file.locate())) for file in files if "/licenses/" in str(file))
        return {path.name: path for path in paths if path.is_file()}

    def _flashinfer(self) -> importlib.metadata.Distribution:
        distributions = importlib.metadata.distributions(
            name="flashinfer-python", path=[str(self.site_packages)]
        )
        for distribution in distributions:
            return distribution
        raise BuildError(f"flashinfer-python is not in {self.root}", str(self.log))


def _run(what: str, command: Sequence[str], log: Path) -> None:
    """Run an installer with its output in `log`; BuildError quotes the last lines."""
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
        errors = [line for line in lines if "error" in line.lower()] or lines
        detail = "\n".join(errors[-_ERROR_LINES:])
        raise BuildError(f"{what} failed:\n{detail}", str(log))


def create(environment: Environment) -> None:
    """Create the empty environment, with uv if this Python has no ensurepip."""
    shutil.rmtree(environment.root, ignore_errors=True)
    environment.root.parent.mkdir(parents=True, exist_ok=True)
    what, uv = f"making the environment {environment.root}", shutil.which("uv")
    if importlib.util.find_spec("ensurepip") is not None:
        command = [sys.executable, "-m", "venv"]
    elif uv is not None:
        command = [uv, "venv", "--python", sys.executable]
    else:
        raise BuildError(
            "this Python has no ensurepip and there is no uv on PATH; install either "
            "(Debian and Ubuntu: apt install python3-venv)"
        )
    _run(what, [*command, str(environment.root)], environment.log)


def install(environment: Environment, *arguments: str) -> None:
    """Run `pip install` by the environment's own pip, or by uv if uv created it."""
    if (environment.site_packages / "pip").is_dir():
        command = [str(environment.python), "-I", "-m", "pip", "install"]
    else:
        uv = shutil.which("uv")
        if uv is None:
            raise BuildError(f"{environment.root} has no pip, and there is no uv on PATH")
        command = [uv, "pip", "install", "--python", str(environment.python)]
    wanted = [text for text in arguments if not text.startswith(("-", "/"))]
    _run(f"installing {' '.join(wanted)}", [*command, *arguments], environment.log)


def make_once(
    result: Path, evidence: Path, content: Mapping[str, str], make: Callable[[], None]
) -> None:
    """Make the folder `result`, unless `evidence` exists and the same `content` was recorded.

    The marker that records the content is written last, so an interrupted run is repeated. If the
    first making fails, as for a release that does not exist, nothing is left of it.
    """
    marker = result.with_name(result.name + ".json")
    text = json.dumps(dict(content), indent=1, sort_keys=True)
    marker.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{marker}.lock"):
        if evidence.exists() and marker.is_file() and marker.read_bytes() == text.encode():
            return
        is_first = not marker.is_file()
        marker.unlink(missing_ok=True)
        try:
            make()
        except BuildError as error:
            if not is_first:
                raise
            shutil.rmtree(result, ignore_errors=True)
            for suffix in (".log", ".json.lock"):
                result.with_name(result.name + suffix).unlink(missing_ok=True)
            raise BuildError(error.message) from error
        temporary = marker.with_name(marker.name + ".part")
        temporary.write_text(text)
        os.replace(temporary, marker)


def prepare_environment(root: Path, release: str, torch: str | None, say: Say) -> Environment:
    """Return the environment for `release` under the folder `root`; create it if needed.

    With `torch`, a requirement, it has torch too. A failure leaves no environment.
    """
    environment = Environment(root / f"env-{release}")

    def make() -> None:
        # an environment interrupted earlier would have no pip
        created = environment.root / "created"
        if not (created.exists() and environment.python.exists()):
            say(f"making a virtual environment in {environment.root}")
            create(environment)
            created.touch()
        say(f"installing flashinfer-python {release}")
        install(environment, "--no-deps", f"flashinfer-python=={release}")
        say(f"installing {f'{torch} and ' if torch else ''}what FlashInfer's generators import")
        wanted = map(environment.requirement, _NEEDED)
        install(environment, *filter(None, [torch]), *wanted)

    content = {"torch": torch or "", "needed": " ".join(_NEEDED)}
    # The environment's Python is a link, which breaks when the Python that made it is removed.
    make_once(environment.root, environment.python, content, make)
    return environment


def _unpack(
    environment: Environment,
    name: str,
    requirement: str,
    say: Say,
    *options: str,
    libraries: bool = True,
) -> Path:
    """Install NVIDIA's packages into the folder `name` beside the environment.

    Without `libraries`, which are large, only the headers are kept.
    """
    folder = environment.root.with_name(name)

    def make() -> None:
        say(f"installing {requirement}")
        shutil.rmtree(folder, ignore_errors=True)
        install(environment, "--target", str(folder), *options, requirement)
        if not libraries:
            for unused in folder.glob("nvidia/*/lib"):
                shutil.rmtree(unused)

    make_once(folder, folder, {"requirement": requirement}, make)
    if not _cuda_roots(folder):
        raise BuildError(f"{requirement} has no headers in {folder}", str(environment.log))
    return folder


def _cuda_roots(folder: Path) -> list[Path]:
    """Return the folders with an `include` below a folder of NVIDIA's packages.

    CUDA 13's packages share one; each of CUDA 12's has its own.
    """
    return sorted(root for root in folder.glob("nvidia/*") if (root / "include").is_dir())


def _find_in(folder: Path, file: str) -> Path | None:
    """Return the library whose file name starts with `file`, in a folder of NVIDIA's packages."""
    libraries = (find_library(root, file) for root in _cuda_roots(folder))
    return next(filter(None, libraries), None)


def _unpack_extra(
    environment: Environment, extra: str, release: str, say: Say, part: str = ""
) -> Path:
    """Install an extra of `cuda-toolkit`.

    A library's headers and (`part` "-lib") the whole package are in separate folders, so that a
    compiler that uses one does not see the other.
    """
    name = f"cuda-{release}-{extra.replace(',', '-')}{part}"
    whole = part == "-lib" or extra not in PARTS.values()
    requirement = f"cuda-toolkit[{extra}]=={release}.*"
    return _unpack(environment, name, requirement, say, libraries=whole)


def install_headers(environment: Environment, extra: str, toolkit: Toolkit, say: Say) -> None:
    """Install the headers of a CUDA library that the toolkit lacks."""
    _unpack_extra(environment, extra, toolkit.release, say)


def install_library(environment: Environment, name: str, toolkit: Toolkit, say: Say) -> Path:
    """Install a CUDA library that the toolkit lacks; return the file for `-l<name>`."""
    folder = _unpack_extra(environment, PARTS[name], toolkit.release, say, "-lib")
    library = _find_in(folder, f"lib{name}.so.")
    if library is None:
        raise BuildError(f"there is no lib{name}.so in {folder}", str(environment.log))
    return library


def _unpack_cudart(environment: Environment, toolkit: Toolkit, say: Say, cpu: str | None) -> Path:
    """Install the package with the CUDA runtime; for another processor, it is only linked with."""
    release = toolkit.release
    if cpu is None:
        return _unpack_extra(environment, "cudart", release, say)
    options = ["--only-binary=:all:", "--no-deps"]
    if (environment.site_packages / "pip").is_dir():
        options += [f"--platform=manylinux{tag}_{cpu}" for tag in ("2014", "_2_17", "_2_28")]
    else:
        options.append(f"--python-platform={cpu}-manylinux_2_28")
    requirement = f"{machine.package('cudart', toolkit.major)}=={release}.*"
    name = f"cuda-{release}-cudart-{cpu}"
    return _unpack(environment, name, requirement, say, *options)


def _find_cudart(environment: Environment, toolkit: Toolkit, say: Say, cpu: str | None) -> Path:
    """Return the CUDA runtime library: the toolkit's own, or else the package index's."""
    file = f"libcudart.so.{toolkit.major}"
    own = None if cpu else find_library(toolkit.home, file)
    library = own or _find_in(_unpack_cudart(environment, toolkit, say, cpu), file)
    if library is None:
        raise BuildError(f"no {file} for {toolkit.home}")
    return library


def parse_cuda(text: str | None) -> str:
    """Check a release of CUDA such as "12.8", or a major version, "12".

    The default is the major version that kernels of this process should have.
    """
    if text is None:
        return str(next(iter(majors_here()), CUDA_MAJORS[-1]))
    match = re.fullmatch(r"(\d+)(?:\.(\d+))?", text)
    if match is None or int(match[1]) not in CUDA_MAJORS:
        expected = "a release of CUDA 12 or 13, such as 12.8 or 13.0, or 12 or 13 for any"
        raise ArgumentError("build", "cuda", got=text, expected=expected)
    return text


def choose_toolkit(environment: Environment, cuda: str, say: Say) -> Toolkit:
    """Return a toolkit of this machine with the requested release, or else the package index's."""
    toolkits = find_toolkits()
    for toolkit in toolkits:
        if cuda in (toolkit.release, str(toolkit.major)):
            return toolkit
    for toolkit in toolkits:
        say(f"{toolkit.nvcc} is of CUDA {toolkit.release}, not of CUDA {cuda}: not used")
    if int(cuda.partition(".")[0]) < _FIRST_INDEXED:
        here = ", ".join(toolkit.release for toolkit in toolkits) or "none"
        raise BuildError(
            f"no nvcc of CUDA {cuda} on this machine (there is: {here}), and the package index has "
            f"none before CUDA {_FIRST_INDEXED}: install NVIDIA's CUDA {cuda} toolkit and name its "
            "folder in CUDA_HOME. JetPack has one in /usr/local/cuda"
        )
    release = cuda if "." in cuda else INDEX_CUDA
    folder = _unpack_extra(environment, "nvcc,cccl", release, say)
    for root in _cuda_roots(folder):
        indexed = toolkit_of(root / "bin" / "nvcc")
        if indexed is not None:
            return indexed
    raise BuildError(f"nvcc from the package index does not run: {folder}/nvidia/*/bin/nvcc")


# The workshop


@dataclass(frozen=True)
class Workshop:
    """Everything that a build needs except the modules' names."""

    release: str
    architectures: tuple[str, ...]
    folder: Path
    environment: Environment
    toolkit: Toolkit
    cxx: str
    link_folder: Path
    report: Report
    # The target processor, if it is not this machine's.
    cpu: str | None = None
    # The torch that was asked for, which is in the environment.
    torch: str | None = None

    @property
    def log(self) -> Path:
        return self.folder / "build.log"

    def say(self, message: str) -> None:
        self.report(Progress("prepare", message))

    def fetch(self, missing: Missing) -> None:
        """Install what the compiler or the linker did not find."""
        extra, library = missing
        if library:
            path = install_library(self.environment, library, self.toolkit, self.say)
            add_link(self.link_folder, library, path)
        else:
            install_headers(self.environment, extra, self.toolkit, self.say)

    def variables(self) -> dict[str, str]:
        """Return the variables that FlashInfer's build files and the compilers read."""
        folders = (
            self.environment.root.with_name(f"cuda-{self.toolkit.release}-{extra}")
            for extra in dict.fromkeys(PARTS.values())
        )
        headers = [root / "include" for folder in folders for root in _cuda_roots(folder)]

        def prepend(name: str, folders: Sequence[Path]) -> str:
            return os.pathsep.join([*map(str, folders), *filter(None, [os.environ.get(name)])])

        return {
            "CUDA_HOME": str(self.toolkit.home),
            "CXX": self.cxx,
            # Searched after every folder on the command line, so that nothing here hides a header
            # of the toolkit itself.
            "CPLUS_INCLUDE_PATH": prepend("CPLUS_INCLUDE_PATH", headers),
            "C_INCLUDE_PATH": prepend("C_INCLUDE_PATH", headers),
            "LIBRARY_PATH": prepend("LIBRARY_PATH", [self.link_folder]),
            # The compilers' messages are parsed.
            "LC_ALL": "C",
            "FLASHINFER_CUDA_ARCH_LIST": " ".join(self.architectures),
            "FLASHINFER_WORKSPACE_BASE": str(self.folder),
            # A cross compiler does not search LIBRARY_PATH.
            **({"NVCC_CCBIN": self.cxx.split()[0]} if self.cpu else {}),
        }


@contextmanager
def unwritable_by_others() -> Iterator[None]:
    """Let only this user write to the build's files, some of which are run."""
    before = os.umask(0o077)
    os.umask(before | 0o022)
    try:
        yield
    finally:
        os.umask(before)


def open_root() -> Path:
    """Return the cache's folder for builds; create it if needed.

    Programs and build files in it are run, so no other user may have put them there.
    """
    with cache.as_loader_error(cache.cache_root() / "build"):
        root = cache.make_folder("build")
    _check_tree(root)
    return root


@contextmanager
def lock_folder(folder: Path, say: Say) -> Iterator[None]:
    """Lock `folder`: a second build waits, and then finds the first one's files."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = error.strerror
        raise BuildError(f"{folder} cannot be made: {reason}; name another --build-dir") from error
    trust.check_user_path(folder)
    _check_tree(folder)
    lock = FileLock(folder / ".lock")
    try:
        held = lock.acquire(timeout=0)
    except Timeout:
        say(f"waiting for another build in {folder}")
        held = lock.acquire()
    with held:
        yield


@contextmanager
def open_workshop(
    release: str,
    architectures: tuple[str, ...],
    build_dir: Path | None,
    torch: str | None = None,
    report: Report | None = None,
    cpu: str | None = None,
    cuda: str | None = None,
) -> Iterator[Workshop]:
    """Prepare the environment, the toolkit and the build folder, and hold the folder's lock."""
    if cpu not in (None, *CPUS):
        raise ArgumentError("build", "cpu", got=cpu, expected=" or ".join(CPUS))
    cpu = None if cpu == platform.machine() else cpu
    release, cuda = parse_release(release), parse_cuda(cuda)
    if sys.platform != "linux":
        raise BuildError("kernels can be built on Linux only")

    def say(message: str) -> None:
        if report:
            report(Progress("prepare", message))

    with unwritable_by_others():
        root = open_root()
        cxx = find_cxx(cpu)
        environment = prepare_environment(root, release, torch, say)
        toolkit = choose_toolkit(environment, cuda, say)
        check_architectures(toolkit, architectures)
        say(f"using {toolkit.nvcc} of CUDA {toolkit.release}")
        # Another nvcc gets another folder: each change of nvcc would compile everything again.
        tag = [] if toolkit.release == INDEX_CUDA else [toolkit.tag]
        parts = [release, *architectures, *filter(None, [cpu]), *tag]
        folder = (build_dir or root / "-".join(parts)).absolute()
        with lock_folder(folder, say):
            cudart = _find_cudart(environment, toolkit, say, cpu)
            link_folder = make_link_folder(toolkit, cxx, cudart, folder / "link")
            yield Workshop(
                release,
                architectures,
                folder,
                environment,
                toolkit,
                f"{cxx} -L{link_folder}" if cpu else cxx,
                link_folder,
                report or (lambda progress: None),
                cpu,
                torch,
            )


def _check_tree(folder: Path) -> None:
    """Raise `ArtifactError` if others could have added or could change anything below a folder.

    Used for files that are run without being hashed: environments and compilers' folders of builds.
    """
    trust.check_folder(folder)
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = os.path.join(parent, name)  # of tens of thousands: a Path costs more
            with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                status = os.lstat(path)
                if stat.S_ISDIR(status.st_mode):
                    trust.check_folder(path)
                elif stat.S_ISLNK(status.st_mode):  # its target is decided by its owner
                    trust.check_owned(path, status)
                else:
                    trust.check_object(path, status)
