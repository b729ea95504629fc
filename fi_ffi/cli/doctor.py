"""`fi-ffi doctor`: checks every part that a call needs, and says what to do."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field

import click

import fi_ffi
from fi_ffi.capability.judgement import Query
from fi_ffi.capability.known_issues import KNOWN_ISSUES
from fi_ffi.capability.matrix import Line
from fi_ffi.cli import output, upkeep
from fi_ffi.cli.names import ResolvedName, named
from fi_ffi.errors import FiFfiError, KernelNotFoundError, LoaderError
from fi_ffi.loader import cache, distributions, machine, runtime, search, seed, tvm_ffi
from fi_ffi.loader.fetch import progress, wheels_lock
from fi_ffi.loader.permission import OFFLINE, fetching, is_on, is_withheld, may_fetch
from fi_ffi.modules import files
from fi_ffi.ops.call.releases import fits
from fi_ffi.ops.call.row import Row
from fi_ffi.ops.functions import OPS
from fi_ffi.ops.table import ROWS

_UNREACHED = "build kernels with `fi-ffi build`, or name others in FI_FFI_KERNELS"
_FETCH = "the first call of a module fetches it; `fi-ffi doctor --fetch` does so now"


@dataclass(frozen=True)
class Finding:
    """The result of one check; `advice` says what to do if `status` is not "ok"."""

    check: str
    status: str
    found: str
    advice: str = ""
    # Facts of the finding, by name.
    values: Mapping[str, str] = field(default_factory=dict)


@click.command()
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option("--sm", "--arch", help="With NAME: ask for another GPU, such as 87, 9.0 or sm_90a.")
@click.option("--kernels", help="Directory or wheel of kernels (default: FI_FFI_KERNELS).")
@click.option("--fetch", is_flag=True, help="Fetch missing kernels and check them too.")
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
def doctor(
    names: tuple[str, ...], sm: str | None, kernels: str | None, fetch: bool, as_json: bool
) -> None:
    """Check the driver, GPUs, CUDA runtime, libtvm_ffi, cache and kernels.

    Exits with 1 if something is broken. A missing GPU or missing kernels are warnings, because
    calls on the CPU work without them. Nothing is fetched without --fetch.

    With NAMEs as of `fi-ffi fetch` (`rmsnorm`, `norm`, `norm.rmsnorm`,
    `BatchDecodePlan:dtype=bf16`): say whether each can be called on this GPU, and why not. Exits
    with 1 if one cannot be called, and with 2 if there is no answer.
    """
    if sm is not None and not names:
        raise click.UsageError("--sm needs a NAME")
    with fetching(fetch):
        if names:
            _answer_for(names, sm, kernels, as_json)
            return
        findings = [finding for check in _CHECKS for finding in _guarded(check, kernels)]
    if as_json:
        output.print_json([asdict(finding) for finding in findings])
    else:
        rows = [(name, f.status, found) for f in findings for name, found in [_short(f)]]
        output.print_table(f"fi_ffi {fi_ffi.__version__}", ("check", "", "found"), rows)
        todo = [(_short(f)[0], f.advice) for f in findings if f.advice]
        if todo:
            click.echo()
            output.print_table("what to do", ("check", "advice"), todo)
    if any(finding.status == "fail" for finding in findings):
        sys.exit(1)


def _short(finding: Finding) -> tuple[str, str]:
    """Return a finding's name and text; a list of several modules is replaced by their number."""
    names = finding.check.split(", ")
    if len(names) == 1:
        return finding.check, finding.found
    return output.counted(len(names), "module"), f"{finding.found}: {finding.check}"


def _guarded(
    check: Callable[[str | None], Iterator[Finding]], kernels: str | None
) -> list[Finding]:
    """Return the findings of one check; an exception becomes a finding."""
    findings = []
    try:
        for finding in check(kernels):
            findings.append(finding)
    except Exception as error:
        name = check.__name__.strip("_")
        if is_withheld(error):
            return [*findings, Finding(name, "none", "not fetched yet", _FETCH)]
        advice = "" if isinstance(error, FiFfiError) else f"unexpected {type(error).__name__}"
        findings.append(Finding(name, "fail", str(error), advice))
    return findings


def _python(kernels: str | None) -> Iterator[Finding]:
    name = wheels_lock.this_platform()
    version = f"Python {platform.python_version()} on {name}"
    served = [f"linux-{cpu}" for cpu in machine.CPUS]
    if name in served:
        yield Finding("python", "ok", version)
    else:
        yield Finding("python", "fail", version, f"fi_ffi has libraries for {' and '.join(served)}")


def _gpus(kernels: str | None) -> Iterator[Finding]:
    from fi_ffi.cli import cuda

    if kernels:
        runtime.use_source(kernels)
    version = cuda.driver_version()
    if version is None:
        advice = "install NVIDIA's driver; without it, calls run on the CPU only"
        yield Finding("driver", "warn", "no CUDA driver", advice)
        return
    text = "CUDA {}.{}".format(*version)
    needed = search.cuda_of_kernels() or min(machine.CUDA_MAJORS)
    if version[0] >= needed:
        yield Finding("driver", "ok", text)
    else:
        advice = f"update it: the kernels need CUDA {needed}.0 or later"
        if version[0] in machine.CUDA_MAJORS:
            advice += f", or `fi-ffi build --cuda {version[0]}` makes others"
        yield Finding("driver", "fail", text, advice)
    devices = cuda.gpus()
    for gpu in devices:
        memory = f"{gpu.memory / 2**30:.0f} GiB"
        yield Finding(f"cuda:{gpu.index}", "ok", f"{gpu.name}, {_sm(gpu.capability)}, {memory}")
    if not devices:
        hint = os.environ.get("CUDA_VISIBLE_DEVICES")
        advice = f"CUDA_VISIBLE_DEVICES is {hint!r}" if hint is not None else ""
        yield Finding("gpus", "warn", "the driver shows no GPU", advice)


def _sm(capability: tuple[int, int]) -> str:
    return "sm_{}{}".format(*capability)


def _cudart(kernels: str | None) -> Iterator[Finding]:
    yield Finding("cudart", "ok", machine.load_cudart()[1])
    major, driver = machine.cuda_major(), machine.driver_version()
    bindings = _version_of("cuda_bindings")
    if bindings and driver and int(bindings.partition(".")[0]) > driver[0]:
        versions = f"{bindings}, and the driver is of CUDA {driver[0]}.{driver[1]}"
        yield Finding("cuda-bindings", "fail", versions, f"`pip install 'fi-ffi[cu{driver[0]}]'`")
    torch = _torch()
    if torch and torch[1].partition(".")[0] != str(major):
        versions = f"{torch[0]} is of CUDA {torch[1]}, the kernels' runtime of CUDA {major}"
        advice = (
            f"not in one process: a torch of CUDA {major}, or kernels of CUDA "
            f"{torch[1].partition('.')[0]}"
        )
        yield Finding("torch", "warn", versions, advice)


def _version_of(name: str) -> str:
    """Return an installed distribution's version, by its metadata's name; "" if missing."""
    found = distributions.installed(f"{name}-")
    return found[0].version if found else ""


def _torch() -> tuple[str, str] | None:
    """Return the installed torch and its CUDA version, read from its files; None without either."""
    for torch in distributions.installed("torch-"):
        with contextlib.suppress(OSError):
            text = (torch.info.parent / "torch" / "version.py").read_text()
            if cuda := re.search(r"^cuda\b.*=\s*['\"]([\d.]+)['\"]", text, re.MULTILINE):
                return f"torch {_version_of('torch')}", cuda[1]
    return None


def _libtvm_ffi(kernels: str | None) -> Iterator[Finding]:
    library = tvm_ffi.ensure_tvm_ffi()
    version = ".".join(map(str, tvm_ffi.tvm_ffi_version()))
    yield Finding("libtvm_ffi", "ok", f"{library.origin}, C interface {version}: {library.path}")


def _cache(kernels: str | None) -> Iterator[Finding]:
    root = cache.cache_root()
    text = f"{root} ({upkeep.total(root) / 2**20:.1f} MiB)"
    try:
        with cache.temporary():
            pass
    except OSError as error:
        advice = "set FI_FFI_CACHE_DIR to a directory that can be written"
        yield Finding("cache", "warn", f"{text}: {error.strerror}", advice)
        return
    yield Finding("cache", "ok", text)
    seeded = seed.seed_root()
    if seeded is not None:
        yield Finding("seed cache", "ok", f"{seeded}, read-only")


def _release(kernels: str | None) -> Iterator[Finding]:
    """The release in force, whose rows calls take, and what determines it."""
    if kernels:
        runtime.use_source(kernels)
    release, by = search.decided()
    values = {"release": release, "decided_by": by}
    if release:
        yield Finding("release", "ok", f"FlashInfer {release}, by {by}", values=values)
        return
    advice = f"{search.RELEASE} names it"
    yield Finding("release", "warn", f"unknown: {by} does not say it", advice, values)


def _kernels(kernels: str | None) -> Iterator[Finding]:
    if kernels:
        runtime.use_source(kernels)
    has_kernels = False
    for place in search.places():
        name = f"kernels: {place.kind}"
        if place.source is None:
            yield Finding(name, "none", place.note)
            continue
        how = "for modules that the places above lack" if has_kernels else "used first"
        if place.kind == "remote" and is_on(OFFLINE):
            how += f", out of the cache alone ({OFFLINE}=1)"
        version = place.source.version or "of unknown release"
        text = f"FlashInfer {version}, {how}: {place.source.location}"
        if place.kind == "remote" and may_fetch():
            try:  # an address counts as a source only if it answers
                place.source.modules()
            except LoaderError as error:
                yield Finding(name, "warn", f"{text} cannot be used: {error}", _UNREACHED)
                continue
        yield Finding(name, "ok", text)
        has_kernels = True
    if not has_kernels:
        build = f"`fi-ffi build --release {search.wanted_release()} norm`"
        advice = f"{build} builds some; {search.KERNELS} or --kernels names others"
        yield Finding("kernels", "warn", "none", advice)
        return
    missing: dict[str, list[tuple[str, str]]] = {}
    first = 0 if machine.device_count() else None
    release = search.release()
    of_release = [row for row in ROWS if release is None or fits(row, release)]
    modules = sorted({_module_of(row, first) for row in of_release})
    with progress.counter("modules", len(modules), lines=may_fetch()) as count:
        for module in modules:
            count(module)
            yield from _module(module, missing)
    for names in missing.values():  # report modules that are missing for one reason together
        together = ", ".join(name for name, _ in names)
        reason = names[0][1]
        if reason == _FETCH:
            yield Finding(together, "none", "not fetched yet", _FETCH)
        else:
            yield Finding(together, "warn", "none", reason)


def _known_cases(kernels: str | None) -> Iterator[Finding]:
    """Known problems in vLLM, for the first GPU and the kernels in use."""
    if not machine.device_count():
        return
    query = Query.of(machine.capability(0))
    for issue in KNOWN_ISSUES:
        able = [support.op for support in issue.found(query) if support]
        text = f"here: {', '.join(dict.fromkeys(able)) or 'nothing'}"
        advice = "docs/matrix.md has the cause; `fi-ffi list --matrix --json` has the reasons"
        yield Finding(issue.name, "ok" if able else "none", text, "" if able else advice)


def _module(module: str, missing: dict[str, list[tuple[str, str]]]) -> Iterator[Finding]:
    """Yield where a module comes from, and what each GPU can do with it.

    A module that is not found is added to `missing` instead, under the text of the reason.
    """
    devices: list[int | None] = [*range(machine.device_count())]
    for device in devices or [None]:
        where = module if device is None else f"{module} on cuda:{device}"
        try:
            source, file, facts = search.find_module(module, device)
        except LoaderError as error:
            reason = _FETCH if is_withheld(error) else str(error)
            missing.setdefault(reason.replace(module, ""), []).append((where, reason))
            continue
        codes = ", ".join(code.name for code in facts.codes)
        text = f"{codes}, {source.version}, {source.trust}: {file.path}"
        yield Finding(where, "ok", text)
        yield from _attestation(module, device)


def _module_of(row: Row, device: int | None) -> str:
    return row.module_on(None if device is None else machine.capability(device))


def _attest_row(module: str, row: Row, device: int | None) -> None:
    """Attest a row's entry, or raise. A library that does not load without a GPU's driver is
    attested by the signatures that it told on one.
    """
    try:
        runtime.kernel_entry(module, row.signature, row.releases, device)
    except LoaderError:
        sha256 = search.find_module(module, device)[1].sha256
        record = files.recorded(sha256) if device is None else None
        told = record and record["functions"].get(row.symbol)
        if told != files.as_recorded(row.signature):
            raise


def _attestation(module: str, device: int | None) -> Iterator[Finding]:
    attested = []
    release = search.release()
    for row in ROWS:
        if _module_of(row, device) != module or (release and not fits(row, release)):
            continue
        try:
            _attest_row(module, row, device)
            attested.append(row.name)
        except FiFfiError as error:
            if is_withheld(error):
                yield Finding(f"{module} entries", "none", "not checked: needs libtvm_ffi", _FETCH)
                return
            advice = f"use kernels of {row.package} {row.releases} for this op"
            yield Finding(f"{module}: {row.name}", "fail", str(error), advice)
    if attested:
        yield Finding(f"{module} entries", "ok", f"attested: {', '.join(attested)}")


_CHECKS = (_python, _gpus, _cudart, _libtvm_ffi, _cache, _release, _kernels, _known_cases)


# Answers for named ops


@dataclass(frozen=True)
class OpReport:
    """Whether an op can be called on a GPU, and why; `build` is a command for missing kernels.

    `release` is the release in force, `place` where the kernel would come from (docs/loading.md),
    and `is_here` whether its file is on this machine.
    """

    op: str
    sm: int
    works: bool
    reason: str
    build: str | None = None
    release: str = ""
    place: str = ""
    is_here: bool = False


def _answer_for(names: Sequence[str], sm: str | None, kernels: str | None, as_json: bool) -> None:
    """Print whether each op, module or entry can be called; exit with 1 unless all can.

    For a GPU of another machine (`sm`), the kernel files' headers decide. Entries are attested in
    either case; neither needs a GPU.
    """
    if kernels:
        runtime.use_source(kernels)
    query = Query.of(sm)
    wanted = named(names, query.sources, query.release)
    if sm is None and not machine.device_count():
        raise click.UsageError("this process sees no GPU: --sm 87 asks for one that is not here")
    # This machine's driver is irrelevant for another machine's GPU.
    checks = (_python, _libtvm_ffi) if sm else (_python, _gpus, _cudart, _libtvm_ffi)
    findings = [finding for check in checks for finding in _guarded(check, kernels)]
    lacking = [
        f"{f.check}: {f.found}. {f.advice}".strip()
        for f in findings
        if f.status in ("warn", "fail")
    ]
    device = None if sm else 0
    answers = [_answer(one, line, query, device, lacking) for one in wanted for line in one.lines]
    if as_json:
        output.print_json([asdict(answer) for answer in answers])
    else:
        rows = [(a.op, f"sm_{a.sm}", "yes" if a.works else "no", a.reason) for a in answers]
        output.print_table("", ("op", "GPU", "", "why"), rows)
        for build in dict.fromkeys(a.build for a in answers if a.build and not a.works):
            output.say(f"`{build}` builds it where fi_ffi finds it.")
    if not all(answer.works for answer in answers):
        sys.exit(1)


def _answer(
    one: ResolvedName, line: Line, query: Query, device: int | None, missing: list[str]
) -> OpReport:
    assert query.capability is not None
    major, minor = query.capability
    support = line.ask(query)
    works, reason = bool(support), support.reason
    if works and missing:  # the kernel is not even loaded then
        works, reason = False, "; ".join(missing)
    elif works and support.is_here:
        try:
            reason += _exported(one, query) if one.module else ""
            reason += "; entry attested" if _attest(line.op, query.release, device) else ""
        except FiFfiError as error:
            works, reason = False, str(error)
    place, is_here = (support.place, support.is_here) if works else ("", False)
    return OpReport(
        line.name, 10 * major + minor, works, reason, support.build, support.release, place, is_here
    )


def _exported(one: ResolvedName, query: Query) -> str:
    """Return a module's exports as text; raise if the named entry is not among them."""
    from fi_ffi.modules.module import unexported

    asked = (search.ask(place, one.module, query.capability) for place in query.places)
    said = next((said for said in asked if said.status == search.HERE), None)
    if said is None or said.file is None or said.facts is None:
        return ""  # a family
    file, facts = said.file, said.facts
    if one.symbol and one.symbol not in facts.functions:
        raise KernelNotFoundError(unexported(str(file.path), one.symbol, facts.functions))
    if one.symbol:
        return "; exported"
    return f"; it exports {', '.join(facts.functions)}"


def _attest(name: str, release: str, device: int | None) -> bool:
    """Attest an op's entry, or raise; return False if there is no entry to ask."""
    rows = OPS[name].rows if name in OPS else ()
    row = next((row for row in rows if fits(row, release)), None)
    # a family, or a function returned by its module: only the file is judged
    if row is None or row.factory:
        return False
    _attest_row(_module_of(row, device), row, device)
    return True
