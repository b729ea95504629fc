"""The modules of an artifact, as their names describe them, and the nearest to a missing one.

Nothing is extracted or fetched.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from fi_ffi.loader.kernels import KernelDirectory, KernelSource, release_of
from fi_ffi.loader.uris import Value
from fi_ffi.loader.wheel import Wheel
from fi_ffi.module_names import ModuleName, parse

NEAREST = 3  # modules that an error lists
_HEAD_DIM = "head_dim"


@dataclass(frozen=True)
class ArtifactModule:
    """A module of an artifact; `size` in bytes, None if only fetching would tell."""

    name: str
    parsed: ModuleName | None
    size: int | None

    @property
    def family(self) -> str:
        """The family, or the whole name if it follows no rule."""
        return self.parsed.family if self.parsed else self.name


def modules_of(source: KernelSource) -> dict[str, ArtifactModule]:
    """Return the modules of a source, by name, sorted."""
    release, names, sizes = release_of(source), source.modules(), _sizes(source)
    return {name: ArtifactModule(name, parse_for(name, release), sizes.get(name)) for name in names}


def members(source: KernelSource, name: str) -> list[str]:
    """Return the module of that name, or those of the family."""
    names = source.modules()
    if name in names:
        return [name]
    return [other for other in names if (parsed := parse(other)) and parsed.family == name]


def nearest(source: KernelSource, name: str, count: int = NEAREST) -> list[ArtifactModule]:
    """Return the modules of a source that are most similar to `name`, the nearest first.

    Modules of the same family are ordered by the number of different parameters, then by head
    sizes. For a name of no known family, modules with similar spelling are returned.
    """
    modules, wanted = modules_of(source), parse_for(name, release_of(source))
    related = [m for m in modules.values() if wanted and m.family == wanted.family]
    if not related and not (wanted and wanted.params):
        return [modules[close] for close in get_close_matches(name, modules, count)]
    params = wanted.params if wanted else {}
    return sorted(related, key=lambda module: _distance(params, module))[:count]


def parse_for(name: str, release: str | None) -> ModuleName | None:
    """Parse a name by the release's rules, or else by any release's."""
    return (parse(name, release) if release else None) or parse(name)


def difference(wanted: ModuleName | None, other: ModuleName | None) -> str:
    """Return what another module of the family has instead of what is wanted, in brackets."""
    if wanted is None or other is None or wanted.family != other.family:
        return ""
    others = _differing(wanted.params, other.params)
    said = "; ".join(f"{key} {has}, not {asked}" for key, (asked, has) in others.items())
    return f" ({said})" if said else ""


def _distance(wanted: Mapping[str, Value], module: ArtifactModule) -> tuple[int, int, str]:
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
