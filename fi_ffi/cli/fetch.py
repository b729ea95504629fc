"""`fi-ffi fetch`: puts modules of the pinned wheel into the cache, for example of an image."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import click

from fi_ffi.capability.judgement import Query, capability_of
from fi_ffi.catalogue.advice import may_have, missing_module_message
from fi_ffi.catalogue.families import FAMILIES
from fi_ffi.catalogue.requests import parse_arch, parse_request
from fi_ffi.cli import output
from fi_ffi.cli.names import ResolvedName, named
from fi_ffi.errors import ArchitectureError, FiFfiError, KernelNotFoundError, LoaderError
from fi_ffi.loader import cache, machine, search
from fi_ffi.loader.distributions import split
from fi_ffi.loader.fetch import progress
from fi_ffi.loader.fetch.pinned_wheels import PinnedKernels, pinned
from fi_ffi.loader.fetch.published import PinnedLibraries, libraries
from fi_ffi.loader.kernels import KernelSource, facts_of
from fi_ffi.loader.permission import fetching
from fi_ffi.loader.search import wanted_release
from fi_ffi.module_names import parse
from fi_ffi.ops.call.support import REFUSED

_FEW = 3  # members of a family that an error lists

Capability = tuple[int, int]


@dataclass(frozen=True)
class Put:
    """A module that is in the cache, or the reason why it is not."""

    module: str
    status: str  # "fetched", "there" or "fail"
    path: str = ""
    sha256: str = ""
    size: int = 0
    architectures: tuple[str, ...] = ()
    problem: str = ""


@click.command()
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@click.option("--release", help="FlashInfer release (default: that of the kernels in use).")
@click.option("--arch", "--sm", multiple=True, help="GPU that is needed, such as 9.0a or sm_87.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.option("--quiet", "-q", is_flag=True, help="Show no progress.")
def fetch(
    names: tuple[str, ...], release: str | None, arch: tuple[str, ...], as_json: bool, quiet: bool
) -> None:
    """Put kernel modules into the cache, so that calls need no network. Needs no GPU.

    A NAME is an op (`rmsnorm`), a module (`norm`), an entry (`norm.rmsnorm`), or a family or a plan
    with the options of `fi-ffi build` (`BatchDecodePlan:dtype=bf16`). Modules come from the wheel
    that wheels.lock pins, and those of other distributions from theirs. Those in the cache are not
    fetched again.

    Exits with 1 if a module could not be fetched, and with 2 if a name is unknown.
    """
    release = release or search.release() or wanted_release()
    wanted = [capability_of(text) for text in parse_arch(arch)] if arch else []
    capabilities = [one for one in wanted if one is not None]
    sources = _sources(release, capabilities)
    modules = _modules(names, sources, release, capabilities)
    wanted_of: list[tuple[KernelSource, str]] = []
    for module in modules:
        distribution = split(module)[0]
        having = [libraries(distribution)] if distribution else sources
        wanted_of += [(source, module) for source in having]
    results = []
    with progress.counter("modules", len(wanted_of), quiet) as count:
        for source, module in wanted_of:
            count(module)
            results.append(_put(source, module, capabilities if len(sources) == 1 else []))
    if as_json:
        document = {"cache": str(cache.cache_root()), "release": release}
        output.print_json(document | {"modules": [asdict(one) for one in results]})
    else:
        _print(results)
    if any(one.status == "fail" for one in results):
        sys.exit(1)


def _print(results: Sequence[Put]) -> None:
    rows = [
        (
            one.module,
            one.status,
            f"{one.size:,}" if one.size else "",
            one.sha256[:12],
            one.problem or " ".join(one.architectures),
        )
        for one in results
    ]
    columns = ("module", "", "bytes", "sha256", "compiled for")
    output.print_table("", columns, rows, numbers=["bytes"])
    there = [one for one in results if one.status != "fail"]
    new = sum(one.size for one in there if one.status == "fetched")
    many = output.counted(len(there), "module")
    output.say(f"{many} in {cache.cache_root()}, {new:,} bytes of them new")


def _sources(release: str, capabilities: Sequence[Capability]) -> list[PinnedKernels]:
    """Return the pinned wheels: one, or one for each architecture if wheels hold a single SM."""
    try:
        pins = [pinned(release, one) for one in capabilities] or [pinned(release)]
    except LoaderError as error:
        made = f"`fi-ffi build --release {release} ...` makes modules of it"
        raise type(error)(f"{error}. {made}") from error
    return [PinnedKernels(pin) for pin in dict.fromkeys(pins)]


def _modules(
    names: Sequence[str],
    sources: Sequence[PinnedKernels],
    release: str,
    capabilities: Sequence[Capability],
) -> list[str]:
    """Return the modules that the names stand for, without duplicates."""
    modules: list[str] = []
    for name in names:
        family = FAMILIES.get(name.partition(":")[0])
        # no wheel contains modules built by CuTe DSL
        if family is not None and not family.is_cute:
            modules.append(parse_request(name).module_in(release))
            continue
        # Names that follow the naming rules are known without reading the wheel.
        is_known = ":" in name or parse(name.rpartition(".")[0] or name, release) is not None
        # Nor is it read for a name that the release's modules cannot have.
        module = name.rpartition(".")[0] or name
        ask = any(one.names_of is None or may_have(one.names_of, module) for one in sources)
        with fetching(ask):
            (one,) = named([name], () if is_known else sources, release)
        modules += [one.module] if one.module else _of_op(one, release, capabilities)
    for module in modules:
        if parse(module, release) is None and not split(module)[0]:
            _refuse_families(module, sources)
    return [*dict.fromkeys(modules)]


def _refuse_families(name: str, sources: Sequence[PinnedKernels]) -> None:
    """Raise `UsageError` for a name that many modules share, and list some of them."""
    every = {module for source in sources for module in source.modules()}
    members = sorted(one for one in every if (parsed := parse(one)) and parsed.family == name)
    if name not in every and members:
        some = "".join(f"\n  {module}" for module in members[:_FEW])
        raise click.UsageError(
            f"{name} is a family of {len(members)} modules: name those you need, such as{some}\n"
            f"`fi-ffi list --fetch --family {name}` has all"
        )


def _of_op(one: ResolvedName, release: str, capabilities: Sequence[Capability]) -> list[str]:
    """Return the modules of an op, for each of its variants that some GPU supports."""
    asked: list[Capability | None] = [*capabilities] or [None]
    answers = [line.ask(Query.of(sm, release)) for line in one.lines for sm in asked]
    able = [answer.module for answer in answers if answer.status != REFUSED]
    if not able:
        raise KernelNotFoundError(str(answers[0]))
    return able


def _put(source: KernelSource, module: str, capabilities: Sequence[Capability]) -> Put:
    """Put a module into the cache; report an error as this module's result."""
    name = split(module)[1]
    try:
        if name not in source.modules():
            raise KernelNotFoundError(missing_module_message(source, name))
        was_there = True  # an installed distribution's
        if isinstance(source, (PinnedKernels, PinnedLibraries)):
            was_there = source.kept(name) is not None
        file = source.file(name)
        codes = facts_of(file).codes
        for capability in capabilities:
            reason = machine.unfit(codes, capability)
            if reason:
                raise ArchitectureError(f"{module} {reason}")
    except FiFfiError as error:
        return Put(module, "fail", problem=str(error))
    return Put(
        module,
        "there" if was_there else "fetched",
        str(file.path),
        file.sha256,
        file.path.stat().st_size,
        tuple(code.name for code in codes),
    )
