"""`fi-ffi build`: builds a wheel of kernels from FlashInfer's sources."""

from __future__ import annotations

import platform
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import click
from click.core import ParameterSource

from fi_ffi.catalogue.families import DEFAULT_ARCH, FAMILIES, OPTIONS, BuildOption
from fi_ffi.catalogue.requests import parse_arch, with_options
from fi_ffi.cli.group import INTERRUPTED
from fi_ffi.cli.output import print_json, say
from fi_ffi.errors import printable
from fi_ffi.loader.cache import cache_root
from fi_ffi.loader.fetch.progress import shown
from fi_ffi.loader.machine import CPUS
from fi_ffi.loader.search import wanted_release
from fi_ffi_build.build import Available, available
from fi_ffi_build.build import build as build_wheel
from fi_ffi_build.environment import Progress
from fi_ffi_build.functions import build_functions


@contextmanager
def _reporter(quiet: bool) -> Iterator[Callable[[Progress], None] | None]:
    with shown(quiet) as display:

        def report(progress: Progress) -> None:
            assert display is not None
            if progress.stage == "compile":
                display.step(f"compiling {progress.message}", progress.done, progress.total)
            else:
                display.say(progress.message)

        yield report if display else None


def _families_json() -> list[dict[str, Any]]:
    return [
        {
            "name": family.name,
            "doc": family.doc,
            "options": {
                name: {"default": option.default, "values": option.expected}
                for name, option in family.options.items()
            },
        }
        for family in FAMILIES.values()
    ]


def _print_json(entries: list[Available], release: str, arch: tuple[str, ...]) -> None:
    document = {
        "release": release,
        "arch": list(arch),
        "families": _families_json(),
        "modules": [
            {"name": entry.name, "sources": entry.sources}
            for entry in entries
            if entry.kind == "module"
        ],
        "unavailable": {entry.name: entry.note for entry in entries if entry.kind == "unavailable"},
    }
    print_json(document)


def _print_options(title: str, options: Mapping[str, BuildOption]) -> None:
    say(title)
    for name, option in options.items():
        values = f"{option.expected} (default {option.default})"
        say(f"  {name}={values}" + (f": {option.doc}" if option.values else ""))


def _print_list(entries: list[Available], release: str, arch: tuple[str, ...]) -> None:
    say(f"FlashInfer {release} for {' '.join(arch)}")
    say("Families, to be followed by options as in `single_decode:dtype=bf16`:")
    for family in FAMILIES.values():
        say(f"  {family.name:<18}{family.doc}; {', '.join(family.options)}", hang=18)
    _print_options("Options:", OPTIONS)
    for family in FAMILIES.values():
        if family.is_cute:
            _print_options(f"Options of {family.name}:", family.options)
    say("Modules, with the number of files to compile:")
    for entry in entries:
        if entry.kind == "module":
            say(f"  {entry.sources:>4}  {entry.name}")
    for entry in entries:
        if entry.kind == "unavailable":
            say(f"  not here: {entry.name}: {entry.note}")


def _terminated(number: int, frame: FrameType | None) -> NoReturn:
    """Turn SIGTERM into KeyboardInterrupt, so that the compilers are ended too."""
    raise KeyboardInterrupt


@contextmanager
def _interruptible() -> Iterator[None]:
    """On Ctrl-C, say that the build can be resumed, and exit with the status that shells expect."""
    previous = signal.signal(signal.SIGTERM, _terminated)
    try:
        yield
    except KeyboardInterrupt:
        click.echo("Stopped. The same command continues from here.", err=True)
        sys.exit(INTERRUPTED)
    finally:
        signal.signal(signal.SIGTERM, previous)


# What `--cute` has no use for: options of FlashInfer's modules.
_OF_MODULES = ["names", "release", "cuda", "dtype", "head_dim", "backend", "cpu", "jobs"]
_OF_MODULES += ["build_dir", "list_only"]


def _build_functions(
    functions: tuple[str, ...],
    requirements: tuple[str, ...],
    output: Path | None,
    as_json: bool,
    quiet: bool,
    settings: Mapping[str, Any],
) -> None:
    if not functions:
        raise click.UsageError("--with is for functions: name one by --cute")
    context = click.get_current_context()
    for parameter in context.command.get_params(context):
        source = context.get_parameter_source(str(parameter.name))
        if parameter.name in _OF_MODULES and source == ParameterSource.COMMANDLINE:
            name = parameter.opts[0] if parameter.opts[0][0] == "-" else "NAME"
            raise click.UsageError(
                f"{name} is for FlashInfer's modules and does not go with --cute"
            )
    with _interruptible(), _reporter(quiet) as report:
        libraries = build_functions(
            functions,
            requirements=requirements,
            arch=settings["arch"],
            output=output or Path("."),
            torch_requirement=settings["torch_requirement"],
            report=report,
        )
    if as_json:
        print_json({"libraries": list(map(str, libraries)), "arch": settings["arch"]})
    else:
        for library in libraries:
            click.echo(printable(str(library)))


@click.command()
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option(
    "--release",
    default=wanted_release,
    show_default="FI_FFI_RELEASE, or that of wheels.lock",
    help="FlashInfer release.",
)
@click.option(
    "--arch",
    "--sm",
    multiple=True,
    default=DEFAULT_ARCH,
    show_default=True,
    help="GPU architecture, such as 9.0a, 8.7 or sm_87. Repeat it, or give a list, for several.",
)
@click.option(
    "--cuda",
    metavar="RELEASE",
    help="CUDA of the kernels, such as 12.8, or 12 for any release of it (default: what the "
    "driver runs).",
)
@click.option("--dtype", multiple=True, help="For families: f16 or bf16.")
@click.option("--head-dim", multiple=True, help="For families: 64, 128, 256 or 192x128.")
@click.option("--backend", multiple=True, help="For prefill and MLA families: fa2 or fa3.")
@click.option(
    "--cpu",
    type=click.Choice(CPUS),
    help="Processor that will run the kernels (default: this machine's). The wheel of another "
    "one goes to the current folder.",
)
@click.option("--jobs", type=click.IntRange(min=1), help="Number of compilers that run at once.")
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for the wheel (default: `wheels` in the cache, where fi_ffi finds it; earlier "
    "builds stay).",
)
@click.option(
    "--build-dir",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for compiled files (default: one in the cache).",
)
@click.option(
    "--torch",
    "torch_requirement",
    metavar="REQUIREMENT",
    help="Install this torch, such as torch==2.13.0, for modules that need it (default: none, "
    "except for CuTe DSL).",
)
@click.option(
    "--cute",
    "functions",
    multiple=True,
    metavar="FUNCTION",
    help="Make libraries of the kernels of CuTe DSL that a function compiles, FILE.py:NAME or "
    "PACKAGE.MODULE:NAME, in --output (default: the current folder). Only --arch, --with, --torch "
    "and --output go with it.",
)
@click.option(
    "--with",
    "requirements",
    multiple=True,
    metavar="REQUIREMENT",
    help="A distribution that the function of --cute imports, without what it requires in turn.",
)
@click.option("--list", "list_only", is_flag=True, help="List what can be built.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.option("--quiet", "-q", is_flag=True, help="Show no progress.")
def build(
    names: tuple[str, ...],
    arch: tuple[str, ...],
    list_only: bool,
    as_json: bool,
    quiet: bool,
    dtype: tuple[str, ...],
    head_dim: tuple[str, ...],
    backend: tuple[str, ...],
    jobs: int | None,
    cpu: str | None,
    output: Path | None,
    functions: tuple[str, ...],
    requirements: tuple[str, ...],
    **settings: Any,
) -> None:
    """Build kernel modules from FlashInfer's sources into a wheel.

    A NAME is a module, such as `norm`, or a family with or without options, such as
    `batch_prefill` or `batch_prefill:backend=fa3,dtype=bf16`. A build that was stopped
    continues where it was.
    """
    settings["arch"] = parse_arch(arch)
    if functions or requirements:
        _build_functions(functions, requirements, output, as_json, quiet, settings)
        return
    if list_only:
        with _interruptible(), _reporter(quiet) as report:
            entries = available(report=report, **settings)
        show = _print_json if as_json else _print_list
        show(entries, settings["release"], settings["arch"])
        return
    if not names:
        raise click.UsageError("name what to build, or use --list")
    modules = with_options(names, {"dtype": dtype, "head_dim": head_dim, "backend": backend})
    with _interruptible(), _reporter(quiet) as report:
        # The folder that this machine's loader searches; wheels for another processor stay out of
        # it.
        is_found = output is None and cpu in (None, platform.machine())
        folder = cache_root().absolute() / "wheels" if is_found else output or Path(".")
        settings |= {"cpu": cpu, "keep": is_found}
        wheel = build_wheel(modules, output=folder, jobs=jobs, report=report, **settings)
        if report is not None and is_found:
            report(Progress("package", "fi_ffi finds it there"))
    if as_json:
        built = {"wheel": str(wheel), "release": settings["release"], "arch": settings["arch"]}
        print_json({**built, "modules": modules})
    else:
        click.echo(printable(str(wheel)))
