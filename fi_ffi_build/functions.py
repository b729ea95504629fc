"""Builds of modules from Python functions that compile kernels of CuTe DSL.

    build_functions(["kernels.py:rmsnorm"], requirements=["quack-kernels==0.6.5"], arch="9.0a")

calls each function in a separate environment, which claims to have a GPU, and makes a library of
every kernel that the function compiles. `cute_driver.py` says how.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import SpecifierSet

from fi_ffi.catalogue.families import DEFAULT_ARCH
from fi_ffi.catalogue.requests import parse_arch
from fi_ffi.errors import ArgumentError, BuildError
from fi_ffi.loader import tvm_ffi
from fi_ffi_build import cute_install, environment
from fi_ffi_build.environment import Environment, Progress, Report, Workshop
from fi_ffi_build.questions import CUTE_DRIVER, ask

_TARGET = re.compile(r"(?P<home>[^:]+\.py|\w+(\.\w+)*):(?P<name>[^\W\d]\w*)")


@dataclass(frozen=True)
class Bench:
    """What a build of functions needs: a workshop without FlashInfer and nvcc."""

    folder: Path
    environment: Environment
    architectures: tuple[str, ...]
    cxx: str
    report: Report

    @property
    def log(self) -> Path:
        return self.folder / "build.log"

    def variables(self) -> dict[str, str]:
        return {"LC_ALL": "C"}


def compile_functions(
    workshop: Workshop | Bench,
    requests: Sequence[dict[str, object]],
    dsl: cute_install.CuteDsl,
    folder: Path,
    whose: str,
    *,
    torch: Path | None,
    others: Path | None = None,
    bare: Sequence[str] = (),
) -> Any:
    """Call functions for every architecture and return the modules and the failures.

    `torch` and `others` are the folders of torch and of other distributions. Of the packages in
    `bare` no `__init__` is run.
    """
    answers: dict[str, Any] = {"modules": [], "failed": {}}
    name, total = f"{len(requests)} of CuTe DSL", len(workshop.architectures)
    for done, architecture in enumerate(workshop.architectures):
        workshop.report(Progress("compile", name, done, total))
        major, _, minor = architecture.rstrip("af").partition(".")
        question: dict[str, object] = {
            "packages": str(dsl.packages),
            "runtime": str(dsl.runtime),
            "torch": torch and str(torch),
            "others": others and str(others),
            "bare": bare,
            "whose": whose,
            "cxx": workshop.cxx,
            "arch": f"sm_{architecture.replace('.', '')}",
            "capability": [int(major), int(minor)],
            "folder": str(folder),
            "requests": requests,
        }
        answer = ask(workshop, question, CUTE_DRIVER)
        answers["modules"] += answer["modules"]
        answers["failed"] |= answer["failed"]
    workshop.report(Progress("compile", name, total, total))
    return answers


def parse_function(text: str) -> dict[str, object]:
    """Return the request for `FILE.py:NAME` or `PACKAGE.MODULE:NAME` as the driver takes it."""
    parts = _TARGET.fullmatch(text)
    if parts is None:
        expected = "FILE.py:FUNCTION or PACKAGE.MODULE:FUNCTION"
        raise ArgumentError("build", "cute", got=repr(text), expected=expected)
    home = parts["home"]
    if home.endswith(".py"):
        if not Path(home).is_file():
            raise ArgumentError("build", "cute", got=repr(text), expected="a file that exists")
        home = str(Path(home).absolute())
    function = f"{home}:{parts['name']}"
    return {
        "text": text, "function": function, "module": parts["name"], "arguments": {}, "name": "",
    }  # fmt: skip


def _parse_requirements(texts: Iterable[str]) -> dict[str, str]:
    """Return requirements by the distribution's name."""
    found: dict[str, str] = {}
    for text in texts:
        try:
            found[re.sub(r"[-_.]+", "-", Requirement(text).name).lower()] = text
        except InvalidRequirement as error:
            expected = "a requirement such as quack-kernels==0.6.5"
            raise ArgumentError("build", "with", got=repr(text), expected=expected) from error
    return found


@contextmanager
def _open_bench(
    architectures: tuple[str, ...], torch: str | None, report: Report
) -> Iterator[Bench]:
    """Prepare an environment with a Python and libtvm_ffi, and hold the lock of a folder."""

    def say(message: str) -> None:
        report(Progress("prepare", message))

    with environment.unwritable_by_others():
        root, cxx = environment.open_root(), environment.find_cxx()
        made = Environment(root / "env-cute")
        needed = [f"{tvm_ffi.PROJECT}{tvm_ffi.ACCEPTED}", *filter(None, [torch])]

        def make() -> None:
            say(f"making a virtual environment in {made.root}")
            environment.create(made)
            environment.install(made, *needed)

        environment.make_once(made.root, made.python, {"needed": " ".join(needed)}, make)
        with environment.lock_folder(root / "cute", say):
            yield Bench(root / "cute", made, architectures, cxx, report)


def _install_others(bench: Bench, requirements: Sequence[str]) -> Path | None:
    """Install distributions into a folder, without what they require in turn."""
    if not requirements:
        return None
    digest = hashlib.sha256("\n".join(requirements).encode()).hexdigest()[:16]
    python = bench.environment.site_packages.parent.name
    folder = bench.environment.root.with_name(f"with-{digest}-{python}")

    def make() -> None:
        bench.report(Progress("prepare", f"installing {' '.join(requirements)}"))
        shutil.rmtree(folder, ignore_errors=True)
        environment.install(bench.environment, "--no-deps", "--target", str(folder), *requirements)

    content = {"requirements": "\n".join(requirements)}
    environment.make_once(folder, folder, content, make)
    return folder


def build_functions(
    functions: Sequence[str],
    *,
    requirements: Sequence[str] = (),
    arch: str | Iterable[str] = DEFAULT_ARCH,
    output: Path | str = ".",
    torch_requirement: str | None = None,
    report: Report | None = None,
) -> list[Path]:
    """Make libraries of the kernels that Python functions compile; return their paths.

    Args:
        functions: `FILE.py:NAME` or `PACKAGE.MODULE:NAME`, functions without arguments.
        requirements: distributions that the functions import besides CuTe DSL and torch. They are
            installed without what they require in turn. One of nvidia-cutlass-dsl selects its
            version.
        arch: as in FLASHINFER_CUDA_ARCH_LIST, such as "8.7" or ("9.0a",).
        output: the folder of the libraries; files of the same names are replaced.
        torch_requirement: another torch than the one of builds of CuTe DSL.
        report: called for every step, on the calling thread.

    Raises ArgumentError for a name, a requirement or an architecture that is none, and BuildError,
    with the path of a log, if a function fails or compiles nothing.
    """
    architectures = parse_arch(arch)
    requests = [parse_function(text) for text in functions]
    others = _parse_requirements(requirements)
    dsl_wanted = Requirement(others.pop(cute_install.NAME, cute_install.NAME)).specifier
    say = report or (lambda progress: None)
    with _open_bench(architectures, torch_requirement, say) as bench:
        bench.log.unlink(missing_ok=True)
        made = bench.environment

        def tell(message: str) -> None:
            say(Progress("prepare", message))

        dsl = cute_install.install_cute_dsl(made, SpecifierSet(str(dsl_wanted)), tell)
        torch = None if torch_requirement else cute_install.install_torch(made, tell)
        installed = _install_others(bench, sorted(others.values()))
        # Compiled each time: nothing tells whether what a function imports has changed.
        with tempfile.TemporaryDirectory(dir=bench.folder) as folder:
            answer = compile_functions(
                bench, requests, dsl, Path(folder), "the function", torch=torch, others=installed
            )
            for text, reason in answer["failed"].items():
                raise BuildError(f"{text}: {reason}{_hint(reason)}", str(bench.log))
            return [_keep(Path(one["library"]), Path(output)) for one in answer["modules"]]


def _hint(reason: str) -> str:
    missing = re.search(r"No module named '([\w.]+)'", reason)
    return f". --with installs what has {missing[1]}" if missing else ""


def _keep(library: Path, output: Path) -> Path:
    output.mkdir(parents=True, exist_ok=True)
    part = output / f"{library.name}.part"
    shutil.copyfile(library, part)
    os.replace(part, output / library.name)
    return output / library.name
