"""From an op's rows and an artifact to an answer."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from packaging.specifiers import SpecifierSet

from fi_ffi.errors import FiFfiError
from fi_ffi.loader import machine
from fi_ffi.loader.catalogue import build_advice
from fi_ffi.loader.facts import facts_of
from fi_ffi.loader.fatbin import CudaCode
from fi_ffi.loader.kernels import KernelSource
from fi_ffi.loader.listed import in_wheel, listed_in, recorded_releases
from fi_ffi.loader.lock import the_lock
from fi_ffi.loader.uris import parse
from fi_ffi.ops.row import Arg, Tensor
from fi_ffi.ops.support.answer import BUILT, MISSING, REFUSED, RUN, UNKNOWN, Support
from fi_ffi.ops.support.called import devices_that_called
from fi_ffi.ops.support.question import Question

_COMMAND = re.compile(r"`(fi-ffi build [^`]+)` makes it")


class Judged(Protocol):
    """What is looked at of a row."""

    @property
    def releases(self) -> str: ...
    @property
    def module(self) -> str: ...
    @property
    def symbol(self) -> str: ...
    @property
    def capabilities(self) -> tuple[int, ...]: ...
    @property
    def args(self) -> tuple[Arg, ...]: ...
    @property
    def dtypes(self) -> Mapping[str, tuple[str, ...]]: ...


@dataclass(frozen=True, eq=False)
class Interface:
    """The same of an entry that has no row."""

    releases: str
    module: str
    symbol: str
    capabilities: tuple[int, ...] = ()
    args: tuple[Arg, ...] = ()
    dtypes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def judge(
    op: str,
    forms: Sequence[Judged],
    question: Question,
    module: Callable[[str], str] | None = None,
) -> Support:
    """The answer for an op with these forms of its row.

    `module` names the module in a release, where its row only names a family.
    """
    release = question.release
    row = next((form for form in forms if _fits(form.releases, release)), None)
    if row is None:
        reason = f"it is in FlashInfer {span_of(forms)}, not in {release}"
        return Support(op, REFUSED, reason, release=release)
    name = module(release) if module else row.module
    refusal = _cuda_refusal(question) or _dtype_refusal(row, question) or _sm_refusal(row, question)
    if refusal:
        build = None
        if question.cuda_major != machine.CUDA_MAJOR:
            build = _build(name, question)[0]
        return Support(op, REFUSED, refusal, build, name, release)
    status, reason, build = _available(name, question)
    ran = status == BUILT and question.capability is not None
    devices = _devices(name, row.symbol, question) if ran else []
    if devices:
        return Support(op, RUN, f"{reason}; called on {' and '.join(devices)}", None, name, release)
    if status == BUILT and question.capability is not None:
        reason += "; not run here on such a GPU"
    return Support(op, status, reason, build, name, release)


def _fits(releases: str, release: str) -> bool:
    return SpecifierSet(releases).contains(release, prereleases=True)


def span_of(forms: Sequence[Judged]) -> str:
    """The releases that any of the forms is of, without the seams between them."""
    if not all(_PLAIN.fullmatch(form.releases) for form in forms):
        return " or ".join(form.releases for form in forms)
    bounds = sorted(
        (_version(form.releases, ">="), _version(form.releases, "<") or _NEWEST) for form in forms
    )
    spans = [bounds[0]]
    for start, end in bounds[1:]:
        if start <= spans[-1][1]:
            spans[-1] = (spans[-1][0], max(end, spans[-1][1]))
        else:
            spans.append((start, end))
    return " or ".join(_span_text(*span) for span in spans)


_PLAIN = re.compile(r">=[\d.]+(,<[\d.]+)?")
_NEWEST = (10**9,)


def _version(releases: str, sign: str) -> tuple[int, ...]:
    found = re.search(rf"{sign}(\d+(?:\.\d+)*)", releases)
    return tuple(map(int, found[1].split("."))) if found else ()


def _span_text(start: tuple[int, ...], end: tuple[int, ...]) -> str:
    text = f">={'.'.join(map(str, start))}" if start else ""
    parts = [text, f"<{'.'.join(map(str, end))}" if end != _NEWEST else ""]
    return ",".join(filter(None, parts))


def _devices(name: str, symbol: str, question: Question) -> list[str]:
    return devices_that_called(name, symbol, question.capability, question.release)


def _cuda_refusal(question: Question) -> str:
    if question.cuda_major == machine.CUDA_MAJOR:
        return ""
    return (
        f"{question.cuda} kernels need libcudart.so.{question.cuda_major}, and fi_ffi runs on "
        f"{machine.CUDART}: use a wheel of the cu{machine.CUDA_MAJOR}x series"
    )


def _dtype_refusal(row: Judged, question: Question) -> str:
    fixed = {arg.dtype for arg in row.args if isinstance(arg, Tensor)} - {*row.dtypes}
    anywhere = {name for names in row.dtypes.values() for name in names} | fixed
    for variable, wanted in question.dtypes.items():
        if variable and variable not in row.dtypes:
            known = ", ".join(row.dtypes) or "none"
            return f"it has no dtype called {variable}, only {known}"
        able = row.dtypes[variable] if variable else sorted(anywhere)
        for dtype in wanted:
            if dtype not in able:
                whose = f"{variable} is" if variable else "its tensors are"
                return f"{whose} {' or '.join(able)}, not {dtype}"
    return ""


def _sm_refusal(row: Judged, question: Question) -> str:
    if question.capability is None or not row.capabilities:
        return ""
    if question.capability[0] in row.capabilities:
        return ""
    able = " or ".join(f"{known}.x" for known in row.capabilities)
    return f"it is written for GPUs of compute capability {able}"


def _available(name: str, question: Question) -> tuple[str, str, str | None]:
    """Whether the artifact has the module for the GPU: a status, why, and what builds it."""
    if not question.sources:
        return _published(name, question)
    said = []
    for source in question.sources:
        found = _modules(source, name)
        if not found:
            said.append(f"{_short(source)} has no module {name}")
            continue
        try:
            codes = {code for module in found for code in facts_of(source.file(module)).codes}
        except FiFfiError as error:
            said.append(str(error))
            continue
        if _runs(codes, question):
            return BUILT, f"{name} in {_short(source)} is compiled for {_names(codes)}", None
        said.append(f"{name} in {_short(source)} is compiled for {_names(codes)} only")
    made = _listed_codes(name, question)
    if made and not _runs(made, question):  # building it would not help
        return REFUSED, f"FlashInfer compiles {name} for {_names(made)} only", None
    return _missing("; ".join(said), name, question)


def _listed_codes(name: str, question: Question) -> tuple[CudaCode, ...] | None:
    """What FlashInfer compiles a module for, or any of a family; None where it lists none."""
    listed = listed_in(question.release)
    if listed is None:
        return None
    if parse(name, question.release) is not None:
        return listed.codes(name)
    every = [code for _, codes in listed.family(name) for code in codes]
    return tuple(dict.fromkeys(every)) or None


def _published(name: str, question: Question) -> tuple[str, str, str | None]:
    release = question.release
    if listed_in(release) is None:
        recorded = ", ".join(recorded_releases())
        reason = f"what the wheels of {release} have is not recorded, only of {recorded}"
        return UNKNOWN, reason, _build(name, question)[0]
    codes = _listed_codes(name, question)
    if codes is None:
        return _missing(f"FlashInfer {release} does not build {name} ahead of time", name, question)
    if not _runs(codes, question):
        return REFUSED, f"FlashInfer compiles {name} for {_names(codes)} only", None
    cpu = question.cpu
    if _runs(in_wheel(codes, question.cuda, cpu), question):
        where = f"FlashInfer {release}'s {question.cuda} wheels"
        return BUILT, f"{name} is in {where}{_pin(question)}", None
    others = [other for other in ("aarch64", "x86_64") if other != cpu]
    if any(_runs(in_wheel(codes, question.cuda, other), question) for other in others):
        return _missing(f"only the {others[0]} wheel has {name} for it", name, question)
    return _missing(f"the {question.cuda} wheels are not compiled for it", name, question)


def _pin(question: Question) -> str:
    """Says so where the lock pins no such wheel."""
    for file in the_lock().kernels:
        if (file.release, file.cuda) == (question.release, question.cuda):
            return ""
    return ", of which wheels.lock pins none"


def _missing(reason: str, name: str, question: Question) -> tuple[str, str, str | None]:
    build, advice = _build(name, question)
    return MISSING, reason if build or not advice else f"{reason}. {advice.rstrip('.')}", build


def _build(name: str, question: Question) -> tuple[str | None, str]:
    """The command that makes a module, and the sentence it is in, or why there is none."""
    if parse(name, question.release) is None and _is_family(name):
        arch = question.architecture or "9.0a"
        return f"fi-ffi build --release {question.release} --arch {arch} {name}", ""
    advice = build_advice(name, question.release, question.architecture)
    found = _COMMAND.search(advice)
    return (found[1] if found else None), advice


def _is_family(name: str) -> bool:
    from fi_ffi.loader.building.names import FAMILIES

    return name in FAMILIES


def _modules(source: KernelSource, name: str) -> list[str]:
    """The module of that name, or those of the family."""
    names = source.modules()
    if name in names:
        return [name]
    return [other for other in names if (found := parse(other)) and found.family == name]


def _runs(codes: Sequence[CudaCode] | set[CudaCode], question: Question) -> bool:
    if question.capability is None:
        return bool(codes)
    return any(code.runs_on(question.capability) for code in codes)


def _names(codes: Sequence[CudaCode] | set[CudaCode]) -> str:
    return ", ".join(c.name for c in sorted(codes, key=lambda c: (c.sm, c.suffix, c.kind)))


def _short(source: KernelSource) -> str:
    return Path(source.location).name or source.location
