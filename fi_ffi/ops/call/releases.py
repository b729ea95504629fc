"""FlashInfer's releases: the one in force, the rows of each, and the entry that serves a row.

The facts are from the binding sources and `jit/attention/modules.py` of every release from 0.6.3 to
0.7.2.post1; `tests/releases` compares the rows with each.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, TypeVar

from fi_ffi.abi import library
from fi_ffi.abi.function import Entry
from fi_ffi.abi.tensor import Device
from fi_ffi.errors import ArchitectureError, KernelNotFoundError, LoaderError
from fi_ffi.loader import machine
from fi_ffi.loader.distributions import NUMBER, is_in, version_key
from fi_ffi.ops.call.row import Arg, Ranged, Row, Tensor

OLDEST = "0.6.3"
# The lock's default release. Its forms come first.
FIRST = "0.6.13"

# Sources whose exports make the tensors' device current by a `CUDADeviceGuard` before they use
# CUDA, and the caller's again after it, in every release that rows have. Others have no guard, or
# set the device and leave it set (`activation.py`, topk.cu, the fp8 kernels of fa3).
GUARDED = frozenset(
    f"csrc/{name}.cu"
    for name in (
        "batch_decode_jit_binding",
        "batch_mla_binding",
        "batch_mla_sm90_binding",
        "batch_pod_jit_binding",
        "batch_prefill_jit_binding",
        "concat_mla",
        "flashinfer_cascade_binding",
        "flashinfer_norm_binding",
        "flashinfer_page_binding",
        "flashinfer_rope_binding",
        "flashinfer_sampling_binding",
        "pod_jit_binding",
        "single_decode_jit_binding",
        "single_prefill_jit_binding",
        "single_prefill_sm90_jit_binding",
    )
)
_SPAN = f">=({NUMBER})(?:,<({NUMBER}))?"


def fits(row: Row, release: str) -> bool:
    """Whether the row's interface is that of a FlashInfer release, or of none of them."""
    return is_in(release, row.releases) or bool(row.distribution)


class HasReleases(Protocol):
    """One form of an entry; `releases` is a version specifier, "" for every release."""

    @property
    def releases(self) -> str: ...


_Form = TypeVar("_Form", bound=HasReleases)


def of_release(forms: Iterable[_Form], release: str) -> _Form | None:
    """Return the form of a release, or None if no form has it."""
    fitting = (form for form in forms if not form.releases or is_in(release, form.releases))
    return next(fitting, None)


def _has(item: Ranged, release: str) -> bool:
    if item.since and version_key(release) < version_key(item.since):
        return False
    return not item.until or version_key(release) < version_key(item.until)


def _dtypes_of(args: Sequence[Arg]) -> set[str]:
    return {arg.dtype for arg in args if isinstance(arg, Tensor)}


def forms_of(row: Row, later: Mapping[str, Mapping[str, Any]] | None = None) -> tuple[Row, ...]:
    """Return the forms of a row that lists all arguments and rules there ever were, that of `FIRST`
    first.

    Arguments and rules name the releases that have them. `later` has fields of the row that change
    from a release on.
    """
    later = later or {}
    span = re.fullmatch(_SPAN, row.releases)
    assert span is not None, row.releases
    begin, end = span.groups("")
    items = (*row.args, *row.rules)
    named = {*later, *(item.since for item in items), *(item.until for item in items)} - {""}
    inner = {release for release in named if version_key(release) > version_key(begin)}
    starts = sorted({begin, *inner}, key=version_key)
    forms = []
    for start, until in zip(starts, [*starts[1:], end], strict=True):
        fields: dict[str, Any] = {}
        for release in sorted(later, key=version_key):
            if version_key(release) <= version_key(start):
                fields |= later[release]
        args = tuple(arg for arg in row.args if _has(arg, start))
        names = {arg.name for arg in args}
        gone = _dtypes_of(row.args) - _dtypes_of(args)
        fields = {
            "dtypes": {name: dtypes for name, dtypes in row.dtypes.items() if name not in gone},
            "requires": tuple(
                each for each in row.requires if isinstance(each, str) or _has(each, start)
            ),
            "together": tuple(name for name in row.together if name in names),
        } | fields
        releases = f">={start},<{until}" if until else f">={start}"
        forms.append(replace(row, args=args, releases=releases, **fields))
    number = max(
        (i for i, start in enumerate(starts) if version_key(start) <= version_key(FIRST)), default=0
    )
    return (forms[number], *forms[:number], *forms[number + 1 :])


def span_of(forms: Sequence[Any]) -> str:
    """Return the releases of all the forms as one specifier, with adjacent ranges joined."""
    matches = [re.fullmatch(_SPAN, form.releases) for form in forms]
    bounds = [match.groups("") for match in matches if match]
    if len(bounds) < len(forms):
        return " or ".join(form.releases for form in forms)
    spans: list[list[str]] = []
    for start, end in sorted(bounds, key=lambda span: version_key(span[0])):
        last = spans[-1][1] if spans else "0"
        if last and version_key(start) > version_key(last):
            spans.append([start, end])
        else:
            spans[-1][1] = max(last, end, key=version_key) if last and end else ""
    return " or ".join(f">={start},<{end}" if end else f">={start}" for start, end in spans)


def release_in_force() -> str:
    """Return the FlashInfer release whose arguments ops have, on every device.

    Without a lock that can be read it is the release whose forms come first.
    """
    from fi_ffi.loader import search  # imported late: it takes as long as all the rest

    try:
        return search.decided()[0] or search.wanted_release()
    except LoaderError:
        return FIRST


def entry_for(row: Row, device: Device, module: str | None = None) -> Entry:
    """Return the row's entry, loaded and attested: its own signature is the row's.

    `module` is a module of the row's family, by default the row's own. Raises `KernelNotFoundError`
    for an op that the release in use lacks, and `ArchitectureError` on a GPU that the kernel was
    not written for.
    """
    if device.is_cuda:
        from fi_ffi.loader import runtime

        check_available(row, device)
        name = module or row.module
        if row.modules and name == row.module:
            name = row.module_on(machine.capability(device.index))
        if row.factory:
            from fi_ffi.loader.methods import method_entry

            return method_entry(name, row.factory, row.signature, row.releases, device.index)
        return runtime.kernel_entry(name, row.signature, row.releases, device.index)
    kernels: Any = reference()
    # Of most families there is one module, named as they are.
    compiled = () if module in (None, row.module) else kernels.compiled_for(module)
    entry: Entry = kernels.entry(
        row.module, row.signature, row.reference, compiled, row.formula, row.formula_names, row
    )
    return entry


def reference() -> Any:
    """Return the package of numpy kernels, which the CPU device alone needs."""
    # Imported late: numpy takes longer than all of fi_ffi.
    return library.import_whole("fi_ffi.reference")


def check_available(row: Row, device: Device) -> None:
    """Raise if the row's kernel was not written for a GPU, or is not in the release in use."""
    from fi_ffi.loader import search

    if row.capabilities:
        capability = machine.capability(device.index)
        others = row.other_gpus(capability)
        if others:
            major, minor = capability
            raise ArchitectureError(
                f"{row.name} is written for {others}; {device} has {major}.{minor}"
            )
    release = search.decided()[0]
    if release and not fits(row, release):
        raise KernelNotFoundError(
            f"{row.name} is in FlashInfer {row.releases}; the kernels in use are of {release}"
        )
