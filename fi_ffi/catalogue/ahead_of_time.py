"""The modules that FlashInfer builds ahead of time in a release, and their GPUs.

`data/modules.json` records what the generators of some releases list, with the architectures in
their compiler flags (made by `python3 -m tools.release record --modules`). The generators were
asked for `architectures`, more than published wheels have; `published` returns those of the wheels.
Of a GPU that is in no record, nothing is claimed.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fi_ffi.loader.machine import CudaCode, sass_named
from fi_ffi.loader.uris import Value, version_of
from fi_ffi.module_names import ModuleName, parse

_DATA = Path(__file__).with_name("data") / "modules.json"
# The first release whose `flashinfer-jit-cache` has no kernels, but names those of each SM.
FIRST_OF_PROVIDERS = "0.7.0.post1"
# Architectures that FlashInfer's release workflow compiles published wheels for, by the first
# release, then by CUDA tag, on x86_64 and on aarch64. The lists up to 0.6.17 are those at the
# releases' tags; later ones are pieced together from changes to the workflow. Not checked against
# published wheels.
_WHEELS: dict[str, dict[str, tuple[str, str]]] = {
    "0.6.3": {
        "cu128": ("7.5 8.0 8.9 9.0a 10.0a 12.0a",) * 2,
        "cu129": ("7.5 8.0 8.9 9.0a 10.0a 12.0a",) * 2,
        "cu130": ("7.5 8.0 8.9 9.0a 10.0a 10.3a 11.0a 12.0f",) * 2,
    },
    "0.6.6": {
        "cu128": ("7.5 8.0 8.9 9.0a 10.0a 12.0a",) * 2,
        "cu129": ("7.5 8.0 8.9 9.0a 10.0a 10.3a 12.0f",) * 2,
        "cu130": ("7.5 8.0 8.9 9.0a 10.0a 10.3a 11.0a 12.0f",) * 2,
    },
    "0.6.11": {
        "cu128": ("7.5 8.0 8.9 9.0a 10.0a 12.0a",) * 2,
        "cu129": ("7.5 8.0 8.9 9.0a 10.0a 10.3a 12.0f",) * 2,
        "cu130": (
            "7.5 8.0 8.9 9.0a 10.0a 10.3a 12.0f",
            "7.5 8.0 8.9 9.0a 10.0a 10.3a 11.0a 12.0f",
        ),
    },
    "0.6.18": {
        "cu129": ("8.0 8.9 9.0a 10.0a 10.3a 12.0f",) * 2,
        "cu130": ("8.0 8.9 9.0a 10.0a 10.3a 12.0f", "8.0 8.9 9.0a 10.0a 10.3a 11.0a 12.0f"),
        "cu134": (
            "8.0 8.9 9.0a 10.0a 10.3a 10.7a 12.0f",
            "8.0 8.9 9.0a 10.0a 10.3a 10.7a 11.0a 12.0f",
        ),
    },
    FIRST_OF_PROVIDERS: {
        "cu129": ("8.0 8.6 8.9 9.0a 10.0a 10.3a 12.0f",) * 2,
        "cu130": (
            "8.0 8.6 8.9 9.0a 10.0a 10.3a 12.0f",
            "8.0 8.6 8.9 9.0a 10.0a 10.3a 11.0a 12.0f 12.1a",
        ),
        "cu134": (
            "8.0 8.6 8.9 9.0a 10.0a 10.3a 10.7a 12.0f",
            "8.0 8.6 8.9 9.0a 10.0a 10.3a 10.7a 11.0a 12.0f 12.1a",
        ),
    },
}
CPUS = ("x86_64", "aarch64")


@dataclass(frozen=True)
class ParameterGrid:
    """The modules of a family with every combination of these values."""

    family: str
    values: tuple[tuple[str, tuple[Value, ...]], ...]

    @classmethod
    def read(cls, data: Mapping[str, object]) -> ParameterGrid:
        """Return a grid from JSON: `{"family": "norm"}`, with `params` if the family has any."""
        params = data.get("params", {})
        assert isinstance(params, dict)
        return cls(str(data["family"]), tuple((k, tuple(v)) for k, v in params.items()))

    def has(self, module: ModuleName) -> bool:
        """Return whether the module is in the grid."""
        return module.family == self.family and all(
            any(given == value and type(given) is type(value) for value in values)
            for name, values in self.values
            for given in (module.params[name],)
        )


@dataclass(frozen=True)
class AheadOfTimeList:
    """A release's own list: grids of modules, with the machine code they are compiled to."""

    release: str
    modules: tuple[tuple[ParameterGrid, tuple[CudaCode, ...]], ...]
    # Number of modules, including those whose names follow no rule.
    count: int

    def codes(self, module: str) -> tuple[CudaCode, ...] | None:
        """Return a module's architectures if all were requested; None if it is not listed."""
        parsed = parse(module, self.release)
        return None if parsed is None else self._codes(parsed)

    def _codes(self, module: ModuleName) -> tuple[CudaCode, ...] | None:
        return next((codes for grid, codes in self.modules if grid.has(module)), None)

    def family(self, name: str) -> list[tuple[ParameterGrid, tuple[CudaCode, ...]]]:
        """Return the grids of a family."""
        return [(grid, codes) for grid, codes in self.modules if grid.family == name]


def wheels_of(release: str) -> dict[str, tuple[str, str]]:
    """Return the architectures of a release's published wheels, by CUDA tag: on x86_64, on aarch64.

    Empty for a release before the first that is recorded, or after the last that is known.
    """
    last = known_releases()[-1]
    if not version_of(next(iter(_WHEELS))) <= version_of(release) <= version_of(last):
        return {}
    since = [first for first in _WHEELS if version_of(first) <= version_of(release)]
    return _WHEELS[max(since, key=version_of)]


def spans_of_wheels() -> list[tuple[str, str]]:
    """Return the first and the last known release with each set of architectures."""
    known = known_releases()
    starts = [known.index(first) for first in _WHEELS]
    ends = [*starts[1:], len(known)]
    return [(known[start], known[end - 1]) for start, end in zip(starts, ends, strict=True)]


def published(release: str, cuda: str, machine: str) -> str:
    """Return the architectures of a published wheel, as in FLASHINFER_CUDA_ARCH_LIST, or ""."""
    lists = wheels_of(release).get(cuda)
    return lists[CPUS.index(machine)] if lists and machine in CPUS else ""


def in_wheel(
    codes: tuple[CudaCode, ...], release: str, cuda: str, machine: str
) -> tuple[CudaCode, ...]:
    """Return those of a module's architectures that a release's published wheels of a tag have."""
    published_codes = {sass_named(text) for text in published(release, cuda, machine).split()}
    return tuple(code for code in codes if code in published_codes)


def is_recorded(release: str, capability: tuple[int, int]) -> bool:
    """Return whether the record of a release's modules says what it compiles for a GPU.

    Its generators were asked for some architectures only, and for Orin's neighbours.
    """
    about = _data()["releases"].get(release)
    if about is None:
        return False
    asked = (*map(sass_named, about["architectures"].split()), _ORIN)
    return any(code.runs_on(capability) for code in asked)


def gpus_in(release: str) -> tuple[int, ...]:
    """Return the GPUs from SM90 on that a known release's list of modules has cases for."""
    about = _releases().get(release)
    return tuple(about["gpus"]) if about else ()


def compiles_for(release: str, capability: tuple[int, int]) -> bool:
    """Return whether a record says that a release compiles anything for a GPU.

    That is its record of modules, or its list of them, which has cases for GPUs from SM90 on. Every
    release compiles for SM75 and SM8x.
    """
    if (7, 5) <= capability < (9, 0):
        return True
    listed = 10 * capability[0] + capability[1] in gpus_in(release)
    return listed or is_recorded(release, capability)


@functools.cache
def _data() -> Any:
    return json.loads(_DATA.read_text())


def recorded_releases() -> tuple[str, ...]:
    """Return the releases whose lists are recorded, in order."""
    return tuple(_data()["releases"])


@functools.cache
def _releases() -> Any:
    return json.loads(_DATA.with_name("releases.json").read_text())["releases"]


def known_releases() -> tuple[str, ...]:
    """Return the releases of flashinfer-python that rows are compared with, in order."""
    return tuple(_releases())


def sha256_of(release: str) -> str | None:
    """Return the sha256 of a release's wheel; None if it is unknown."""
    about = _releases().get(release)
    return str(about["sha256"]) if about else None


def entries_in(release: str) -> int:
    """Return the number of entries that a known release's sources export."""
    return int(_releases()[release]["entries"])


@functools.cache
def listed_in(release: str) -> AheadOfTimeList | None:
    """Return the list of a release; None if it is not recorded."""
    about = _data()["releases"].get(release)
    if about is None:
        return None
    groups = [group for group in _data()["groups"] if release in group["releases"]]
    return AheadOfTimeList(release, tuple(map(_read, groups)), about["count"])


# The generators were not asked for Orin, which no wheel has; modules compiled for both of these
# neighbours can be compiled for it too.
_AROUND_ORIN, _ORIN = {sass_named("sm80"), sass_named("sm89")}, sass_named("sm87")


def _read(group: Mapping[str, Any]) -> tuple[ParameterGrid, tuple[CudaCode, ...]]:
    codes = tuple(map(sass_named, group["compiled_for"].split()))
    return ParameterGrid.read(group), (*codes, _ORIN) if {*codes} >= _AROUND_ORIN else codes
