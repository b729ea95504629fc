"""Builds of kernel wheels from FlashInfer's sources on the package index.

    build(["norm", "page", "single_decode:head_dim=128"], arch="8.7")

makes a wheel in the layout of `flashinfer-jit-cache` with FlashInfer's own generators, which run in
a separate environment. Finished files stay in the build folder: an interrupted build continues
where it stopped.
"""

from __future__ import annotations

import os
import platform
import re
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from fi_ffi.catalogue.families import DEFAULT_ARCH, DEFAULT_RELEASE, FAMILIES
from fi_ffi.catalogue.requests import Request, parse_arch, parse_requests
from fi_ffi.errors import ArgumentError, BuildError, nearest
from fi_ffi.loader import trust
from fi_ffi.loader.kernels import open_source
from fi_ffi.loader.uris import ROWS
from fi_ffi.ops.table import ROWS as OPS
from fi_ffi_build import cute_install
from fi_ffi_build.environment import (
    Missing,
    Progress,
    Report,
    Workshop,
    missing_part,
    open_workshop,
)
from fi_ffi_build.functions import compile_functions
from fi_ffi_build.questions import ask, question_of
from fi_ffi_build.wheel_writer import WheelContents, write_wheel

# Packages whose `__init__` imports what kernels do not need.
_BARE = ("flashinfer", "flashinfer.cute_dsl")
_NINJA_STATUS = "[%f/%t] "
_STATUS = re.compile(r"\[(\d+)/(\d+)\] ")
_ERROR_LINE = re.compile(
    r"\berror\b|undefined reference|cannot find -l|No such file|Killed|out of memory|not found",
    re.IGNORECASE,
)
_MEMORY_PER_JOB = 3 << 30  # memory of one nvcc process with FlashInfer's larger sources
_KEPT = 400  # lines of output to examine after a failure
_SHOWN, _LONGEST = 8, 600  # lines of an error message, and characters of a line
_PATIENCE_S = 15.0


@dataclass(frozen=True)
class Available:
    """An item that can be built: `kind` is "family", "module" or "unavailable".

    `sources` is the number of files to compile (0 if it depends on options). `note` says what a
    family makes, or why a generator cannot be used here.
    """

    name: str
    kind: str
    sources: int = 0
    note: str = ""


def _refuse(failed: dict[str, str], names: Sequence[str], workshop: Workshop) -> None:
    """Raise ArgumentError for the first request that the driver could not resolve."""
    for text, reason in failed.items():
        if reason != "unknown":
            expected = f"a kernel that compiles, but {reason}"
            raise ArgumentError("build", "modules", got=repr(text), expected=expected)
        close = get_close_matches(text, [*names, *FAMILIES], n=3)
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        what = f"FlashInfer {workshop.release} for {' '.join(workshop.architectures)}"
        expected = f"a family or one of the {len(names)} modules of {what}{hint}"
        raise ArgumentError("build", "modules", got=repr(text), expected=expected)


def _unknown(requests: Iterable[Request]) -> Iterator[str]:
    """Say which names follow no rule: the generators, which decide, take a minute to install."""
    known, modules = {*FAMILIES, *(row.family for row in ROWS)}, {op.name: op.module for op in OPS}
    for text in (each.text for each in requests if each.exact and each.module is None):
        is_op = (
            f"; it is an op of {modules[text]}" if text in modules else nearest(text, known, 0.7)
        )
        yield f"no module {text!r} is known{is_op}"


# Ninja, on the build files that FlashInfer wrote


class MissingPart(BuildError):
    """A build lacks a part of CUDA that is on the package index."""

    def __init__(self, part: Missing, log: str) -> None:
        self.part = part
        extra, library = part
        what = f"lib{library}.so is" if library else f"headers of {extra} are"
        super().__init__(f"{what} missing", log)


def default_jobs() -> int:
    """Return the number of compilers to run: one for each processor, as far as memory suffices."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(1, min(len(os.sched_getaffinity(0)), memory // _MEMORY_PER_JOB))


def write_index(folder: Path, module_files: Iterable[Path]) -> Path:
    """Write one build file over those of all modules ever requested in `folder`.

    Ninja discards its records of outputs that its build file does not name, and would build them
    again.
    """
    known = sorted({*folder.glob("*/build.ninja"), *module_files})
    index = folder / "build.ninja"
    lines = ["ninja_required_version = 1.3", *(f"subninja {_escape(path)}" for path in known)]
    text = "\n".join(lines) + "\n"
    if not index.is_file() or index.read_text() != text:
        index.write_text(text)
    return index


def _escape(path: Path) -> str:
    return re.sub(r"([$ :])", r"$\1", str(path))


def _stop(process: subprocess.Popen[str]) -> None:
    """Stop ninja, which stops its compilers and removes incomplete outputs."""
    if process.poll() is not None:
        return
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(_PATIENCE_S)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue
        return


def run_ninja(
    command: Sequence[str],
    folder: Path,
    environment: Mapping[str, str],
    log: Path,
    step: Callable[[int, int], None],
) -> None:
    """Run ninja in `folder` and report its progress by `step(finished, total)`.

    Ninja runs in its own process group. So an interrupt reaches only this process, which then stops
    ninja in order; finished files stay for the next run.
    """
    last: deque[str] = deque(maxlen=_KEPT)
    with log.open("a") as file:
        file.write(f"# {time.strftime('%Y-%m-%d %H:%M:%S')}\n$ {' '.join(command)}\n")
        process = subprocess.Popen(
            command,
            cwd=folder,
            env={**os.environ, **environment, "NINJA_STATUS": _NINJA_STATUS},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        try:
            assert process.stdout is not None
            for line in process.stdout:
                file.write(line)
                last.append(line)
                if match := _STATUS.match(line):
                    step(int(match[1]), int(match[2]))
            code = process.wait()
        finally:
            _stop(process)
    if code == 0:
        return
    if part := missing_part("".join(last)):
        raise MissingPart(part, str(log))
    raise BuildError(_explain(last), str(log))


def _explain(output: Iterable[str]) -> str:
    """Return why a build failed: the lines that look like errors, or the last ones."""
    lines = [line.rstrip("\n") for line in output]
    failed = next((line.split()[-1] for line in lines if line.startswith("FAILED:")), None)
    what = f"compiling {Path(failed).name} failed" if failed else "ninja failed"
    short = (line for line in lines if len(line) < _LONGEST and not _STATUS.match(line))
    errors = [line for line in short if _ERROR_LINE.search(line)]
    shown = errors or [line[:_LONGEST] for line in lines if line.strip()]
    text = "\n".join([f"{what}:", *shown[-_SHOWN:]])
    if re.search(r"\bKilled\b|out of memory", text):
        text += "\nThe machine ran out of memory: use fewer --jobs."
    return text


# The build


def _compile(workshop: Workshop, answer: Any, jobs: int) -> None:
    """Compile and link the modules of `answer`; fetch missing parts of CUDA on demand."""
    index = write_index(
        Path(answer["folder"]), [Path(module["ninja"]) for module in answer["modules"]]
    )
    libraries = [module["library"] for module in answer["modules"]]
    ninja = workshop.environment.ninja()
    command = [ninja, "-f", str(index), "-j", str(jobs), *libraries]
    name = answer["modules"][0]["name"] if len(libraries) == 1 else f"{len(libraries)} modules"

    most = shown = 0  # ninja counts what is left, which is less after a part was fetched

    def step(done: int, total: int) -> None:
        nonlocal most, shown
        most = max(most, total)
        shown = max(shown, most - total + done)
        workshop.report(Progress("compile", name, shown, most))

    workshop.say(f"compiling {name}; the log is {workshop.log}")
    fetched: set[Missing] = set()
    while True:
        try:
            run_ninja(command, index.parent, workshop.variables(), workshop.log, step)
        except MissingPart as error:
            if error.part in fetched:  # the fetched part did not contain the missing file
                raise
            fetched.add(error.part)
            workshop.fetch(error.part)
        else:
            return


def _make_cute(workshop: Workshop, requests: Sequence[Request]) -> list[dict[str, str]]:
    """Compile kernels of CuTe DSL for every architecture; return their modules."""
    environment = workshop.environment
    accepted = Requirement(environment.requirement(cute_install.NAME)).specifier
    dsl = cute_install.install_cute_dsl(environment, accepted, workshop.say)
    torch = None if workshop.torch else cute_install.install_torch(environment, workshop.say)
    answer = compile_functions(
        workshop,
        [question_of(request, workshop.release) for request in requests],
        dsl,
        workshop.folder / dsl.packages.name,
        "FlashInfer",
        torch=torch,
        bare=_BARE,
    )
    _refuse(answer["failed"], [], workshop)
    return list(answer["modules"])


def _package(workshop: Workshop, answer: Any, output: Path, keep: bool) -> Path:
    libraries = {module["name"]: Path(module["library"]) for module in answer["modules"]}
    wheel = WheelContents(
        release=answer["release"],
        cuda=workshop.toolkit.release,
        architectures=tuple(answer["architectures"]),
        # Not manylinux: the compiler's own libraries were not checked for compatibility.
        platform=f"linux_{workshop.cpu or platform.machine()}",
        modules=libraries,
        git_version=answer["git_version"],
        licenses=workshop.environment.licenses(),
    )
    path = output / wheel.filename
    is_added = keep and path.exists()
    verb = "adding to" if is_added else "replacing" if path.exists() else "writing"
    if is_added:
        trust.check_owner(path)  # its modules will be packaged as if they were built here
        before = open_source(path)
        kept = {name: before.file(name).path for name in before.modules() if name not in libraries}
        wheel = replace(wheel, modules=libraries | kept)
    workshop.report(Progress("package", f"{verb} {path}"))
    return write_wheel(wheel, output)


# By prefix of module names: features that need nvcc of this release or later; "" stands for the
# whole module.
_WITH_SWITCHES = (12, 8)
_SWITCHES = {
    "fp8_blockscale_gemm_": "",
    "fused_moe_": "the modes fp8_block_scale and mxfp4 (docs/moe.md)",
    "fp4_quantization_": "numbers of 4 bits",
}


def left_out(cuda: str, names: Iterable[str]) -> list[str]:
    """Return what an older nvcc leaves out of these modules, a sentence for each.

    Raises ArgumentError for a module of which nothing would be left.
    """
    if tuple(map(int, cuda.split("."))) >= _WITH_SWITCHES:
        return []
    reasons = []
    first = ".".join(map(str, _WITH_SWITCHES))
    for name in names:
        start = next((start for start in _SWITCHES if name.startswith(start)), None)
        if start is None:
            continue
        lost = _SWITCHES[start]
        if not lost:
            expected = f"{first} or later for {name}, whose every call fails otherwise"
            raise ArgumentError("build", "cuda", got=cuda, expected=expected)
        reasons.append(f"{name}: nvcc of CUDA {cuda} leaves out {lost}, which {first} has")
    return reasons


def build(
    modules: Sequence[str],
    *,
    release: str = DEFAULT_RELEASE,
    arch: str | Iterable[str] = DEFAULT_ARCH,
    output: Path | str = ".",
    build_dir: Path | None = None,
    jobs: int | None = None,
    torch_requirement: str | None = None,
    report: Report | None = None,
    cpu: str | None = None,
    keep: bool = False,
    cuda: str | None = None,
) -> Path:
    """Build `modules` of FlashInfer `release` for the GPUs of `arch`; return the wheel's path.

    Args:
        modules: exact names, or families with options (see `available`).
        arch: as in FLASHINFER_CUDA_ARCH_LIST, such as "8.7" or ("9.0a",).
        output: the wheel's folder.
        jobs: number of compilers to run at once.
        report: called for every step, on the calling thread.
        cpu: "x86_64" or "aarch64", by default this machine's.
        keep: keep the other modules of a wheel of the same name in `output`.
        cuda: release of the toolkit, "12.8", or its major version; by default the one that this
            machine's driver supports.
        torch_requirement: a torch for the generators, such as "torch==2.13.0", which modules that
            are extensions of torch need. Without it, only kernels of CuTe DSL get one.

    Raises ArgumentError for an invalid name, release or architecture, and BuildError, with the path
    of a log, if a tool is missing or fails.
    """
    if jobs is not None and jobs < 1:
        raise ArgumentError("build", "jobs", got=jobs, expected="at least 1")
    architectures = parse_arch(arch)
    requests = parse_requests(modules, architectures)
    if cpu not in (None, platform.machine()) and any(request.is_cute for request in requests):
        expected = "this machine's, which is all that CuTe DSL compiles for here"
        raise ArgumentError("build", "cpu", got=cpu, expected=expected)
    if report is not None:
        for sentence in _unknown(requests):
            report(Progress("prepare", sentence))
    opened = open_workshop(release, architectures, build_dir, torch_requirement, report, cpu, cuda)
    with opened as workshop:
        workshop.log.unlink(missing_ok=True)
        workshop.say("asking FlashInfer's generators for the sources")
        of_cute = [request for request in requests if request.is_cute]
        others = [question_of(request, release) for request in requests if not request.is_cute]
        answer = ask(workshop, {"action": "generate", "requests": others})
        _refuse(answer["failed"], answer["names"], workshop)
        names = [module["name"] for module in answer["modules"]]
        for sentence in left_out(workshop.toolkit.release, names):
            workshop.say(sentence)
        if answer["modules"]:
            _compile(workshop, answer, jobs or default_jobs())
        if of_cute:
            answer["modules"] += _make_cute(workshop, of_cute)
        return _package(workshop, answer, Path(output), keep)


def available(
    *,
    release: str = DEFAULT_RELEASE,
    arch: str | Iterable[str] = DEFAULT_ARCH,
    build_dir: Path | None = None,
    torch_requirement: str | None = None,
    report: Report | None = None,
    cuda: str | None = None,
) -> list[Available]:
    """Return what `build` can make for `arch`: families, then FlashInfer's list of modules."""
    architectures = parse_arch(arch)
    opened = open_workshop(release, architectures, build_dir, torch_requirement, report, cuda=cuda)
    with opened as workshop:
        workshop.say("asking FlashInfer's generators what they can make")
        answer = ask(workshop, {"action": "list"})
    families = [Available(family.name, "family", note=family.doc) for family in FAMILIES.values()]
    modules = [Available(entry["name"], "module", entry["sources"]) for entry in answer["modules"]]
    missing = [
        Available(name, "unavailable", note=reason)
        for name, reason in answer["unavailable"].items()
    ]
    return [*families, *modules, *missing]
