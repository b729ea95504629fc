"""The modules of an artifact, as their names describe them, and the nearest to a missing one.

Nothing is extracted or fetched.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from fi_ffi.errors import ArgumentError, LoaderError
from fi_ffi.loader.kernels import KernelDirectory, KernelSource, release_of
from fi_ffi.loader.listed import listed_in
from fi_ffi.loader.permission import fetching, is_withheld
from fi_ffi.loader.uris import ModuleName, Value, parse, uri
from fi_ffi.loader.wheel import Wheel

_NEAREST = 3  # modules that an error lists
# The suffix of a name for one architecture: `_sm90`, `_90`, `_sm103a`.
_FOR_SM = re.compile(r"_(?:sm)?(\d{1,2})(\d)([af]?)")
_HEAD_DIM = "head_dim"
# The suffix of a module whose sources FlashInfer names by their hash.
_HASHED = re.compile(r"_[0-9a-f]{16,}")


@dataclass(frozen=True)
class Module:
    """A module of an artifact; `size` in bytes, None if only fetching would tell."""

    name: str
    parsed: ModuleName | None
    size: int | None

    @property
    def family(self) -> str:
        """The family, or the whole name if it follows no rule."""
        return self.parsed.family if self.parsed else self.name


def modules_of(source: KernelSource) -> dict[str, Module]:
    """Return the modules of a source, by name, sorted."""
    release, names, sizes = release_of(source), source.modules(), _sizes(source)
    return {name: Module(name, _read(name, release), sizes.get(name)) for name in names}


def nearest(source: KernelSource, name: str, count: int = _NEAREST) -> list[Module]:
    """Return the modules of a source that are most similar to `name`, the nearest first.

    Modules of the same family are ordered by the number of different parameters, then by head
    sizes. For a name of no known family, modules with similar spelling are returned.
    """
    modules, wanted = modules_of(source), _read(name, release_of(source))
    related = [m for m in modules.values() if wanted and m.family == wanted.family]
    if not related and not (wanted and wanted.params):
        return [modules[close] for close in get_close_matches(name, modules, count)]
    params = wanted.params if wanted else {}
    return sorted(related, key=lambda module: _distance(params, module))[:count]


def members(source: KernelSource, name: str) -> list[str]:
    """Return the module of that name, or those of the family."""
    names = source.modules()
    if name in names:
        return [name]
    return [other for other in names if (found := parse(other)) and found.family == name]


def may_have(release: str, module: str) -> bool:
    """Return whether a release may have a module of this name; true if its names are unknown."""
    if listed_in(release) is None:
        return True
    return parse(module, release) is not None or bool(_HASHED.search(module))


def without(source: KernelSource, module: str) -> str:
    """Return the message that a source lacks `module`, with the nearest it has.

    Nothing is fetched for it: without a source's names, those of its release count.
    """
    try:
        with fetching(False):
            return _without(source, module)
    except LoaderError as error:
        if not is_withheld(error):
            return str(error)
        why = no_such_name(module, release_of(source))
        return f"{source.location} is not asked for {module}: {why}"


def no_such_name(module: str, release: str | None) -> str:
    """Return the message that a release has no module of this name, with the nearest."""
    listed = listed_in(release) if release else None
    families = {box.family for box, _ in listed.modules} if listed else set()
    near = get_close_matches(module, families, _NEAREST)
    shown = f"; the nearest: {', '.join(near)}" if near else ""
    return f"FlashInfer {release} has no module of this name{shown}"


def _without(source: KernelSource, module: str) -> str:
    wanted, near = _read(module, release_of(source)), nearest(source, module)
    text = f"{source.location} has no module {module}; "
    if near:
        lines = [f"\n    {found.name}{_difference(wanted, found.parsed)}" for found in near]
        return text + "the nearest it has:" + "".join(lines)
    families = sorted({found.family for found in modules_of(source).values()})
    more = f" and {len(families) - 12} more" if len(families) > 12 else ""
    return f"{text}it has {', '.join(families[:12]) or 'none at all'}{more}"


def build_advice(
    module: str, release: str | None = None, arch: str | None = None, is_for_arch: bool = False
) -> str:
    """Return how to get a module built: the `fi-ffi build` command, or why there is none.

    The architecture in the module's name counts, unless the module is known to be for `arch`.
    """
    # Imported here: this is the only dependency on the build.
    from fi_ffi_build.cute import request_for
    from fi_ffi_build.names import DEFAULT_ARCH, DEFAULT_RELEASE

    release = release or DEFAULT_RELEASE
    if (request := request_for(module)) is not None:
        asked, of = request
        line = f"fi-ffi build --release {release} --arch {of}"
        if asked:
            return f"`{line} {asked}` makes it from FlashInfer's sources in CuTe DSL."
        return (
            f"It is compiled in CuTe DSL for one kind of call: `{line} --list` shows the families "
            "that such modules are of."
        )
    found, any_release = parse(module, release), parse(module)
    named = None if is_for_arch else _arch_in(module)
    given, arch = arch, named or arch or DEFAULT_ARCH[0]
    if found is None and any_release is not None:
        return _other_release(any_release, release)
    build = f"fi-ffi build --release {release} --arch {arch}"
    if found is None:
        return f"{no_such_name(module, release)}; `{build} --list` shows those it has."
    if found.params and found.row.generator is None:
        return (
            f"FlashInfer {release} makes it on a machine with a GPU only; fi-ffi cannot build it."
        )
    if found.backend == "fa3" and given and not given.startswith("9.0"):
        fa2 = uri(found.family, release=release, **{**_shared(found), "backend": "fa2"})
        line = f"fi-ffi build --release {release} --arch {given} {fa2}"
        return f"fa3 is for SM90 GPUs only; `{line}` makes its fa2 counterpart for {given}."
    return f"`{build} {module}` makes it from FlashInfer's sources."


def _read(name: str, release: str | None) -> ModuleName | None:
    """Parse a name by the release's rules, or else by any release's."""
    return (parse(name, release) if release else None) or parse(name)


def _other_release(found: ModuleName, release: str) -> str:
    """Return the message for a name that only another release has."""
    text = f"FlashInfer {release} has no such module: the name is of a release {found.releases}"
    try:
        same = uri(found.family, release=release, **_shared(found))
    except ArgumentError:
        return text + "."
    return f"{text}, and {release} calls it {same}."


def _shared(found: ModuleName) -> dict[str, Value]:
    """Return the parameters that all releases have; the others take their defaults."""
    return {
        k: v for k, v in found.params.items() if k not in ("paged_kv_stride_mode", "module_surface")
    }


def _arch_in(name: str) -> str | None:
    found = _FOR_SM.fullmatch(name[name.rfind("_") :]) if "_" in name else None
    if found is None or not 75 <= int(found[1] + found[2]) <= 130:
        return None
    # From SM90 on, FlashInfer's kernels use features specific to the exact architecture.
    suffix = found[3] or ("a" if int(found[1]) >= 9 else "")
    return f"{found[1]}.{found[2]}{suffix}"


def _distance(wanted: Mapping[str, Value], module: Module) -> tuple[int, int, str]:
    params = module.parsed.params if module.parsed else {}
    gaps = (
        abs(int(value or 0) - int(params.get(key) or 0))
        for key, value in wanted.items()
        if key.startswith(_HEAD_DIM)
    )
    return len(_differing(wanted, params)), sum(gaps), module.name


def _differing(one: Mapping[str, Value], other: Mapping[str, Value]) -> dict[str, tuple[str, str]]:
    """Return the differing parameters; all head sizes count as one."""
    ours, theirs = _facts(one), _facts(other)
    keys = [key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)]
    return {key: (ours.get(key, "unset"), theirs.get(key, "unset")) for key in keys}


def _facts(params: Mapping[str, Value]) -> dict[str, str]:
    dims = "x".join(str(value) for key, value in params.items() if key.startswith(_HEAD_DIM))
    others = {key: str(value) for key, value in params.items() if not key.startswith(_HEAD_DIM)}
    return others | ({_HEAD_DIM: dims} if dims else {})


def _difference(wanted: ModuleName | None, found: ModuleName | None) -> str:
    if wanted is None or found is None or wanted.family != found.family:
        return ""
    others = _differing(wanted.params, found.params)
    said = "; ".join(f"{key} {has}, not {asked}" for key, (asked, has) in others.items())
    return f" ({said})" if said else ""


def _sizes(source: KernelSource) -> dict[str, int]:
    """Return the modules' sizes that are known without fetching."""
    if isinstance(source, KernelDirectory):
        root = source.root
        return {name: (root / name / f"{name}.so").stat().st_size for name in source.modules()}
    path = Path(source.location)
    if path.suffix != ".whl" or not path.is_file():
        return {}
    members = Wheel(path).members
    return {Path(member).stem: size for member, size in members.items() if member.endswith(".so")}
