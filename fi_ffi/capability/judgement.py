"""Judges whether an op can be called, from its rows, a GPU, a release, and kernels or their
record."""

from __future__ import annotations

import functools
import json
import os
import platform
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fi_ffi import catalogue
from fi_ffi.catalogue.advice import build_advice
from fi_ffi.catalogue.ahead_of_time import (
    CPUS,
    compiles_for,
    in_wheel,
    is_recorded,
    listed_in,
    published,
    recorded_releases,
    wheels_of,
)
from fi_ffi.catalogue.families import FAMILIES
from fi_ffi.catalogue.modules import members
from fi_ffi.errors import FiFfiError, printed
from fi_ffi.loader import machine, search
from fi_ffi.loader.distributions import split
from fi_ffi.loader.fetch import pinned_wheels
from fi_ffi.loader.fetch.published import PinnedLibraries
from fi_ffi.loader.fetch.wheels_lock import PinnedWheel, the_lock
from fi_ffi.loader.kernels import KernelSource, release_of
from fi_ffi.loader.machine import CudaCode, architecture_named, sass_named
from fi_ffi.loader.permission import fetching
from fi_ffi.loader.runtime import check_version
from fi_ffi.loader.search import Candidate, wanted_release
from fi_ffi.module_names import parse
from fi_ffi.modules import files
from fi_ffi.ops.call.arguments import Refusal
from fi_ffi.ops.call.releases import fits, span_of
from fi_ffi.ops.call.row import Row, Tensor, form_on
from fi_ffi.ops.call.support import BUILT, MISSING, REFUSED, RUN, UNKNOWN, Support

# The entries that the GPU tests have called; tools/record_called.py merges their records.
GPU_RUNS = Path(catalogue.__file__).with_name("data") / "called.json"
_refuse = Refusal("supports")
_COMMAND = re.compile(r"`(fi-ffi build [^`]+)` makes it")
_CUDA = re.compile(r"cu(\d{2})(\d)")
_FETCHED = "nothing is here yet: it is fetched when it is first called, from the pinned wheel"
DEFAULT_CUDA = f"cu{machine.CUDA_MAJORS[0]}0"
Sm = int | float | str | tuple[int, int] | None


def capability_of(sm: Sm) -> tuple[int, int] | None:
    """Parse a compute capability: 90, 9.0, "9.0", "sm_90a" and (9, 0) are the same."""
    if sm is None:
        return None
    if isinstance(sm, tuple) and len(sm) == 2 and all(type(part) is int for part in sm):
        return sm
    architecture = architecture_named(str(sm)) if isinstance(sm, (int, float, str)) else None
    if architecture is None or isinstance(sm, bool) or not 5 <= architecture[0] < 20:
        raise _refuse("sm", printed(sm), "such as 90, '9.0' or 'sm90a'")
    return architecture[:2]


@dataclass(frozen=True)
class Query:
    """A GPU, a release, a CUDA tag and kernels to look at, with defaults filled in."""

    capability: tuple[int, int] | None
    release: str
    cuda: str
    # Places to search, as a call would; if empty, the record of what FlashInfer builds counts.
    places: tuple[Candidate, ...]
    # Dtypes by the row's variables, or under "" for any of its tensors.
    dtypes: Mapping[str, tuple[str, ...]]
    # The wheels' CPU, x86_64 or aarch64.
    cpu: str = field(default_factory=platform.machine)

    @classmethod
    def of(
        cls,
        sm: Sm = None,
        release: str | None = None,
        cuda: str | None = None,
        dtypes: object = None,
        kernels: str | os.PathLike[str] | None = None,
    ) -> Query:
        """Make a query. Without `sm`, it is about the first GPU, and on a machine without one about
        any."""
        if cuda is not None and not _CUDA.fullmatch(cuda):
            raise _refuse("cuda", printed(cuda), "a tag such as cu130")
        capability = capability_of(sm) if sm is not None else _first_gpu()
        places: tuple[Candidate, ...] = ()
        if kernels is not None:
            places = (*search.candidates(kernels),)
        elif release is None and cuda is None:
            places = (*pinned_wheels.places_for(capability),)
        sources = [place.source for place in places if place.source is not None]
        release = release or next(filter(None, map(release_of, sources)), None) or wanted_release()
        tag = cuda or _tag(sources) or DEFAULT_CUDA
        return cls(capability, release, tag, places, _dtype_names(dtypes))

    @property
    def sources(self) -> tuple[KernelSource, ...]:
        """The places that have kernels."""
        return tuple(place.source for place in self.places if place.source is not None)

    @property
    def cuda_major(self) -> int:
        match = _CUDA.fullmatch(self.cuda)
        assert match is not None
        return int(match[1])

    @property
    def architecture(self) -> str | None:
        """The GPU's architecture as in FLASHINFER_CUDA_ARCH_LIST."""
        if self.capability is None:
            return None
        major, minor = self.capability
        # From SM90 on, FlashInfer's kernels use architecture-specific features.
        return f"{major}.{minor}" + ("a" if major >= 9 else "")


def _first_gpu() -> tuple[int, int] | None:
    try:
        return machine.capability(0) if machine.device_count() else None
    except FiFfiError:
        return None


def _tag(sources: Sequence[KernelSource]) -> str | None:
    """Return the CUDA tag in a version such as 0.6.13+cu130.sm90a."""
    for source in sources:
        match = _CUDA.search((source.version or "").partition("+")[2])
        if match:
            return match[0]
    return None


def _dtype_names(dtypes: object) -> dict[str, tuple[str, ...]]:
    if dtypes is None:
        return {}
    if isinstance(dtypes, Mapping):
        return {str(name): _names_of(value) for name, value in dtypes.items()}
    return {"": _names_of(dtypes)}


def _names_of(dtypes: object) -> tuple[str, ...]:
    from fi_ffi.abi.tensor import DType, parse_dtype

    values = dtypes if isinstance(dtypes, (list, tuple, set, frozenset)) else (dtypes,)
    return tuple(
        (v if isinstance(v, DType) else parse_dtype(v, op="supports", argument="dtypes")).name
        for v in values
    )


@dataclass(frozen=True)
class GpuRun:
    """The entries that were called on one kind of GPU, as (family, entry)."""

    device: str
    capability: tuple[int, int]
    # The FlashInfer release of the kernels.
    release: str
    entries: frozenset[tuple[str, str]]
    # The major version of the kernels' CUDA.
    cuda: int = 13


@functools.cache
def gpu_runs() -> tuple[GpuRun, ...]:
    """Return the entries that this project has called on GPUs."""
    data = json.loads(GPU_RUNS.read_text()) if GPU_RUNS.exists() else {"runs": []}
    return tuple(map(_gpu_run, data["runs"]))


def _gpu_run(run: dict[str, Any]) -> GpuRun:
    major, minor = run["capability"]
    entries = frozenset((family, e) for family, names in run["entries"].items() for e in names)
    return GpuRun(run["device"], (major, minor), run["release"], entries, run.get("cuda", 13))


def key_of(module: str, symbol: str) -> tuple[str, str]:
    """Return the family of a module (with its backend, if any), and an entry of it."""
    parsed = parse(module)
    if parsed is None:
        return module, symbol
    return f"{parsed.family}:{parsed.backend}" if parsed.backend else parsed.family, symbol


def entry_row(
    module: str,
    symbol: str,
    releases: str = ">=0.6.3",
    capabilities: tuple[int, ...] = (),
    modules: Mapping[tuple[int, int], str] | None = None,
) -> Row:
    """Return a row that suffices to judge an entry without a row of its own."""
    name = f"{module}.{symbol}"
    more: dict[str, Any] = {"capabilities": capabilities, "modules": modules or {}}
    return Row(name, module, symbol, "", "", (), {}, releases, **more)


def judge(
    op: str,
    forms: Sequence[Row],
    query: Query,
    module: Callable[[str], str] | None = None,
) -> Support:
    """Judge whether an op with these forms of its row can be called.

    `module` returns the module's name in a release, for rows that only name a family.
    """
    release = query.release
    fitting = [form for form in forms if fits(form, release)]
    if not fitting:
        reason = f"it is in FlashInfer {span_of(forms)}, not in {release}"
        return Support(op, REFUSED, reason, release=release)
    row = form_on(fitting, query.capability)
    if row.distribution:
        return _in_distribution(op, row, query)
    name = module(release) if module else row.module_on(query.capability)
    refusal = _cuda_refusal(query) or _dtype_refusal(row, query) or _sm_refusal(row, query)
    if refusal:
        is_other_cuda = query.cuda_major not in machine.CUDA_MAJORS
        build = how_built(name, query)[0] if is_other_cuda else None
        return Support(op, REFUSED, refusal, build, name, release)
    answer = replace(_available(name, query), op=op, module=name, release=release)
    return _with_devices(answer, row.symbol, query)


def _in_distribution(op: str, row: Row, query: Query) -> Support:
    """Judge an op whose kernel is in another distribution's library: it is in no release of
    FlashInfer, and no build makes it.
    """
    refusal = _dtype_refusal(row, query) or _sm_refusal(row, query)
    if refusal:
        return Support(op, REFUSED, refusal, None, row.module)
    said = []
    with fetching(False):
        for asked in _asked_for_library(row, query):
            answer = _in_library(asked, row, query)
            if answer.status in (RUN, BUILT, UNKNOWN):
                return replace(answer, op=op, module=row.module)
            said.append(answer.reason)
    reason = "; ".join(said) or f"no wheel of {row.distribution} for {query.cpu} is pinned"
    advice = search.installing(row.distribution).rstrip(".")
    return Support(op, MISSING, f"{reason}. {advice}", None, row.module)


def _asked_for_library(row: Row, query: Query) -> Iterator[search.Answer]:
    """Ask each place for the library of a row; without places, take the pinned wheel for the CPU as
    it is recorded, whatever is here."""
    if query.places:
        for place in search.places_of(row.module, query.places):
            yield search.ask(place, row.module, query.capability)
        return
    for pin in the_lock().distributions:
        if (pin.name, pin.platform) == (row.distribution, f"linux-{query.cpu}"):
            yield search.Answer(Candidate("remote", PinnedLibraries(pin)), search.LATER)


def _in_library(said: search.Answer, row: Row, query: Query) -> Support:
    """Judge by what a place says of a row's library."""
    source = said.place.source
    if source is None or said.status in (search.FAILS, search.LACKS):
        return _answered(MISSING, said.reason)
    try:
        check_version(row.module, source, row.releases)
    except FiFfiError as error:
        return _answered(MISSING, str(error))
    text = f"{row.module} of {source.version or source.location}"
    if said.facts is not None and said.file is not None:
        record, codes, how = files.recorded(said.file.sha256), said.facts.codes, ""
    else:
        assert isinstance(source, PinnedLibraries)
        record = files.recorded_as(f"{source.location}: {split(row.module)[1]}")
        how = f", and {_FETCHED}" if query.places else ", in the pinned wheel"
        how += f" {source.pin.file}"
        if record is None:
            reason = f"what {text} is compiled for is not recorded; a call fetches it, and looks"
            return _answered(UNKNOWN, reason)
        codes = [*map(sass_named, record["architectures"])]
    text += f" is compiled for {_code_names(codes)}"
    if not _runs(codes, query):
        return _answered(MISSING, f"{text} only")
    support = replace(_answered(BUILT, text + how), place=said.place.kind, is_here=not how)
    support = replace(support, release=source.version or "")
    key = record["library"].replace(": ", "/") if record else row.module
    return _with_devices(replace(support, module=key), row.symbol, query)


def _with_devices(answer: Support, symbol: str, query: Query) -> Support:
    """Add to an answer on which devices of the GPU's kind the entry was called."""
    if answer.status == BUILT and query.capability is not None:
        devices = _devices_that_called(answer.module, symbol, query)
        ran = f"called on {' and '.join(devices)}" if devices else "not run here on such a GPU"
        status = RUN if devices else BUILT
        answer = replace(answer, status=status, reason=f"{answer.reason}; {ran}")
    return answer


def _devices_that_called(module: str, symbol: str, query: Query) -> list[str]:
    """Return the devices of the GPU's compute capability on which the release's entry was called;
    without a symbol, any entry of the module."""
    family, symbol = key_of(module, symbol)
    if "/" in module:  # another distribution's library, named with its version
        runs = (run for run in gpu_runs() if run.capability == query.capability)
        return [run.device for run in runs if (module, symbol) in run.entries]
    wanted = query.capability, query.release, query.cuda_major
    return [
        run.device
        for run in gpu_runs()
        if (run.capability, run.release, run.cuda) == wanted
        # A family without a backend stands for all its backends.
        and any(
            symbol in ("", entry) and family in (known, known.partition(":")[0])
            for known, entry in run.entries
        )
    ]


def _cuda_refusal(query: Query) -> str:
    if query.cuda_major in machine.CUDA_MAJORS:
        return ""
    served = " and ".join(f"cu{major}x" for major in sorted(machine.CUDA_MAJORS))
    return (
        f"{query.cuda} kernels need libcudart.so.{query.cuda_major}, and fi_ffi serves those of "
        f"{served} wheels"
    )


def _dtype_refusal(row: Row, query: Query) -> str:
    fixed = {arg.dtype for arg in row.args if isinstance(arg, Tensor)} - {*row.dtypes}
    anywhere = {name for names in row.dtypes.values() for name in names} | fixed
    for variable, wanted in query.dtypes.items():
        if variable and variable not in row.dtypes:
            known = ", ".join(row.dtypes) or "none"
            return f"it has no dtype called {variable}, only {known}"
        able = row.dtypes[variable] if variable else sorted(anywhere)
        for dtype in wanted:
            if dtype not in able:
                whose = f"{variable} is" if variable else "its tensors are"
                return f"{whose} {' or '.join(able)}, not {dtype}"
    return ""


def _sm_refusal(row: Row, query: Query) -> str:
    others = row.other_gpus(query.capability)
    return f"it is written for {others}" if others else ""


def _available(name: str, query: Query) -> Support:
    """Ask each place for the module, in order, as a call does; without places, ask the record.

    Nothing is fetched. What a wheel has that is not here, the record of its release tells.
    """
    if not query.places:
        return _published(name, query)
    said, is_unknown = [], False
    with fetching(False):
        for place in query.places:
            answer = _in_place(place, name, query)
            if answer.status == BUILT:
                return answer
            is_unknown |= answer.status == UNKNOWN
            said += [answer.reason] if answer.reason else []
    if not any(place.kind in ("explicit", "remote") for place in query.places):
        said.append(f"{search.SOURCES} leaves out `remote`, from which it could be fetched")
    reason = "; ".join(said)
    if is_unknown:
        return _answered(UNKNOWN, reason, how_built(name, query)[0])
    codes = listed_codes(name, query.release)
    # A build would have no code for the GPU either.
    if codes and _is_recorded(query) and not _runs(codes, query):
        return _answered(REFUSED, _compiled_for(name, codes))
    return _missing(reason, name, query)


def _in_place(place: Candidate, name: str, query: Query) -> Support:
    """Ask a place; without a `reason`, it has nothing to say."""
    try:
        answer = search.ask(place, name, query.capability, members)
    except FiFfiError as error:
        return _answered(MISSING, str(error))
    source, status = place.source, answer.status
    if status == search.LATER and isinstance(source, pinned_wheels.PinnedKernels):
        return _in_pinned(source.pin, name, query)
    if source is None or status == search.FAILS:
        return _answered(MISSING, "" if place.is_empty else answer.reason)
    if status == search.LACKS:
        return _answered(MISSING, f"{_short(source)} has no module {name}")
    if answer.facts is None:  # a place for another GPU, by its name
        return _answered(MISSING, f"{_short(source)} is for another GPU")
    text = f"{name} in {_short(source)} is compiled for {_code_names(answer.facts.codes)}"
    if status == search.OTHER_GPU:
        return _answered(MISSING, f"{text} only")
    return replace(_answered(BUILT, text), place=place.kind, is_here=True)


def _in_pinned(pin: PinnedWheel, name: str, query: Query) -> Support:
    """Judge a pinned wheel that is not here, by the record of its release."""
    answer = _published(name, replace(query, release=pin.release, cuda=pin.cuda), pin)
    if answer.status == BUILT:
        reason = f"{answer.reason}, and {_FETCHED} {pin.file}"
        return replace(answer, reason=reason, place="remote")
    if answer.status == UNKNOWN:
        reason = f"{answer.reason}; a call fetches the pinned wheel {pin.file}, and looks"
        return replace(answer, reason=reason)
    return answer


def _answered(status: str, reason: str, build: str | None = None) -> Support:
    """Return an answer; `judge` fills in what it is about."""
    return Support("", status, reason, build)


def listed_codes(name: str, release: str) -> tuple[CudaCode, ...] | None:
    """Return the architectures for which FlashInfer compiles a module, or any of a family; None if
    it lists none."""
    listed = listed_in(release)
    if listed is None:
        return None
    if parse(name, release) is not None:
        return listed.codes(name)
    every = [code for _, codes in listed.family(name) for code in codes]
    return tuple(dict.fromkeys(every)) or None


def _published(name: str, query: Query, pin: PinnedWheel | None = None) -> Support:
    """Judge by the record of what FlashInfer builds: its published wheels, or the pinned one."""
    release, cpu = query.release, query.cpu
    if listed_in(release) is None:
        recorded = ", ".join(recorded_releases())
        reason = f"what the wheels of {release} have is not recorded, only of {recorded}"
        return _answered(UNKNOWN, reason, how_built(name, query)[0])
    codes = listed_codes(name, release)
    if codes is None:
        return _missing(f"FlashInfer {release} does not build {name} ahead of time", name, query)
    if _is_recorded(query) and not _runs(codes, query):
        return _answered(REFUSED, _compiled_for(name, codes))
    if pin is not None and pin.sm is not None:
        architectures = [sass_named(pin.sm)]
    else:
        architectures = [*map(sass_named, published(release, query.cuda, cpu).split())]
    if not _runs(architectures, query):
        return _missing(_left_out(name, codes, query, pin), name, query)
    if not _is_recorded(query):
        reason = f"there is no record of what FlashInfer {release} compiles {name} for"
        return _answered(UNKNOWN, f"{reason} on {_sm(query)}", how_built(name, query)[0])
    if _runs([code for code in codes if code in architectures], query):
        where = f"FlashInfer {release}'s {query.cuda} wheels"
        return _answered(BUILT, f"{name} is in {where}{'' if pin is not None else _pin(query)}")
    return _missing(f"the {query.cuda} wheels have {name} for other GPUs only", name, query)


def _left_out(name: str, codes: tuple[CudaCode, ...], query: Query, pin: PinnedWheel | None) -> str:
    """Return the reason why a wheel has nothing for the GPU."""
    if pin is not None and pin.sm is not None:
        return f"the pinned wheel {pin.file} is for {pin.sm}"
    (other,) = (cpu for cpu in CPUS if cpu != query.cpu)
    if _runs(in_wheel(codes, query.release, query.cuda, other), query):
        return f"only the {other} wheel has {name} for it"
    if query.cuda not in wheels_of(query.release):
        return f"FlashInfer {query.release} publishes no {query.cuda} wheels"
    return f"the {query.cuda} wheels lack code for this GPU"


def _is_recorded(query: Query) -> bool:
    """Return whether the record of the release's modules is about the GPU."""
    return query.capability is None or is_recorded(query.release, query.capability)


def _sm(query: Query) -> str:
    assert query.capability is not None
    return "sm_{}{}".format(*query.capability)


def _compiled_for(name: str, codes: Sequence[CudaCode]) -> str:
    return f"FlashInfer compiles {name} for {_code_names(codes)} only"


def _pin(query: Query) -> str:
    """Remark that the lock pins no such wheel, of this CUDA or of another minor version."""
    cuda = f"cu{query.cuda_major}"
    for file in the_lock().kernels:
        if file.release == query.release and file.cuda.startswith(cuda):
            return ""
    return ", of which wheels.lock pins none"


def _missing(reason: str, name: str, query: Query) -> Support:
    if query.capability is not None and not compiles_for(query.release, query.capability):
        remark = f"there is no record that FlashInfer {query.release} compiles for {_sm(query)}"
        if reason.endswith(remark):
            remark = ""
        return _answered(MISSING, ", and ".join(filter(None, (reason, remark))))
    build, advice = how_built(name, query)
    text = reason if build or not advice else f"{reason}. {advice.rstrip('.')}"
    return _answered(MISSING, text, build)


def how_built(name: str, query: Query) -> tuple[str | None, str]:
    """Return the command that makes a module and a sentence with it, or None and the reason."""
    if parse(name, query.release) is None and name in FAMILIES:
        arch = query.architecture or "9.0a"
        return f"fi-ffi build --release {query.release} --arch {arch} {name}", ""
    codes = listed_codes(name, query.release) or ()
    # Whether the GPU is one that FlashInfer compiles the module for.
    is_for_it = query.capability is not None and _runs(codes, query)
    advice = build_advice(name, query.release, query.architecture, is_for_arch=is_for_it)
    match = _COMMAND.search(advice)
    return (match[1] if match else None), advice


def _runs(codes: Sequence[CudaCode] | set[CudaCode], query: Query) -> bool:
    if query.capability is None:
        return bool(codes)
    return any(code.runs_on(query.capability) for code in codes)


def _code_names(codes: Sequence[CudaCode] | set[CudaCode]) -> str:
    return ", ".join(c.name for c in sorted(codes, key=lambda c: (c.sm, c.suffix, c.kind)))


def _short(source: KernelSource) -> str:
    """Return a wheel's name, or the folder of other kernels."""
    is_wheel = source.location.endswith(".whl")
    return Path(source.location).name if is_wheel else source.location
