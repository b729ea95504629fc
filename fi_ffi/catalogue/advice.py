"""Advice about a module that no place has: the nearest names, and the command that builds it.

This module is an `Adviser` of `fi_ffi.loader.services`.
"""

from __future__ import annotations

import re
from difflib import get_close_matches

from fi_ffi.catalogue.ahead_of_time import listed_in
from fi_ffi.catalogue.families import DEFAULT_ARCH, DEFAULT_RELEASE
from fi_ffi.catalogue.linker import linking_advice as linking_advice
from fi_ffi.catalogue.modules import NEAREST, difference, modules_of, nearest, parse_for
from fi_ffi.catalogue.requests import request_for
from fi_ffi.errors import ArgumentError, LoaderError
from fi_ffi.loader.kernels import KernelSource, release_of
from fi_ffi.loader.permission import fetching, is_withheld
from fi_ffi.loader.uris import Value
from fi_ffi.module_names import ModuleName, parse, uri

# The suffix of a name for one architecture: `_sm90`, `_90`, `_sm103a`.
_FOR_SM = re.compile(r"_(?:sm)?(\d{1,2})(\d)([af]?)")
# The suffix of a module whose sources FlashInfer names by their hash.
_HASHED = re.compile(r"_[0-9a-f]{16,}")
_SHOWN_FAMILIES = 12


def may_have(release: str, module: str) -> bool:
    """Return whether a release may have a module of this name; true if its names are unknown."""
    if listed_in(release) is None:
        return True
    return parse(module, release) is not None or bool(_HASHED.search(module))


def missing_module_message(source: KernelSource, module: str) -> str:
    """Return the message that a source lacks `module`, with the nearest it has.

    Nothing is fetched for it: without a source's names, those of its release count.
    """
    try:
        with fetching(False):
            return _missing_here(source, module)
    except LoaderError as error:
        if not is_withheld(error):
            return str(error)
        why = no_such_name(module, release_of(source))
        return f"{source.location} is not asked for {module}: {why}"


def _missing_here(source: KernelSource, module: str) -> str:
    wanted, near = parse_for(module, release_of(source)), nearest(source, module)
    text = f"{source.location} has no module {module}; "
    if near:
        lines = [f"\n    {other.name}{difference(wanted, other.parsed)}" for other in near]
        return text + "the nearest it has:" + "".join(lines)
    families = sorted({other.family for other in modules_of(source).values()})
    rest = len(families) - _SHOWN_FAMILIES
    more = f" and {rest} more" if rest > 0 else ""
    return f"{text}it has {', '.join(families[:_SHOWN_FAMILIES]) or 'none at all'}{more}"


def no_such_name(module: str, release: str | None) -> str:
    """Return the message that a release has no module of this name, with the nearest."""
    listed = listed_in(release) if release else None
    families = {grid.family for grid, _ in listed.modules} if listed else set()
    near = get_close_matches(module, families, NEAREST)
    shown = f"; the nearest: {', '.join(near)}" if near else ""
    return f"FlashInfer {release} has no module of this name{shown}"


def build_advice(
    module: str, release: str | None = None, arch: str | None = None, is_for_arch: bool = False
) -> str:
    """Return how to get a module built: the `fi-ffi build` command, or why there is none.

    The architecture in the module's name counts, unless the module is known to be for `arch`.
    """
    release = release or DEFAULT_RELEASE
    if (request := request_for(module)) is not None:
        return _cute_advice(*request, release)
    parsed, any_release = parse(module, release), parse(module)
    if parsed is None and any_release is not None:
        return _other_release(any_release, release)
    named = None if is_for_arch else _arch_in(module)
    build = f"fi-ffi build --release {release} --arch {named or arch or DEFAULT_ARCH[0]}"
    if parsed is None:
        return f"{no_such_name(module, release)}; `{build} --list` shows those it has."
    if parsed.params and parsed.row.generator is None:
        return (
            f"FlashInfer {release} makes it on a machine with a GPU only; fi-ffi cannot build it."
        )
    if parsed.backend == "fa3" and arch and not arch.startswith("9.0"):
        fa2 = uri(parsed.family, release=release, **{**_shared(parsed), "backend": "fa2"})
        line = f"fi-ffi build --release {release} --arch {arch} {fa2}"
        return f"fa3 is for SM90 GPUs only; `{line}` makes its fa2 counterpart for {arch}."
    return f"`{build} {module}` makes it from FlashInfer's sources."


def _cute_advice(request: str, arch: str, release: str) -> str:
    line = f"fi-ffi build --release {release} --arch {arch}"
    if request:
        return f"`{line} {request}` makes it from FlashInfer's sources in CuTe DSL."
    return (
        f"It is compiled in CuTe DSL for one kind of call: `{line} --list` shows the families "
        "that such modules are of."
    )


def _other_release(parsed: ModuleName, release: str) -> str:
    """Return the message for a name that only another release has."""
    text = f"FlashInfer {release} has no such module: the name is of a release {parsed.releases}"
    try:
        same = uri(parsed.family, release=release, **_shared(parsed))
    except ArgumentError:
        return text + "."
    return f"{text}, and {release} calls it {same}."


def _shared(parsed: ModuleName) -> dict[str, Value]:
    """Return the parameters that all releases have; the others take their defaults."""
    of_some = ("paged_kv_stride_mode", "module_surface")
    return {name: value for name, value in parsed.params.items() if name not in of_some}


def _arch_in(name: str) -> str | None:
    """Return the architecture at the end of a module's name."""
    suffix = _FOR_SM.fullmatch(name[name.rfind("_") :]) if "_" in name else None
    if suffix is None or not 75 <= int(suffix[1] + suffix[2]) <= 130:
        return None
    # From SM90 on, FlashInfer's kernels use features specific to the exact architecture.
    kind = suffix[3] or ("a" if int(suffix[1]) >= 9 else "")
    return f"{suffix[1]}.{suffix[2]}{kind}"
