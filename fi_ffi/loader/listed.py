"""The modules that FlashInfer builds ahead of time in a release, and their GPUs.

`data/modules.json` records what the generators of some releases list, with the architectures in
their compiler flags (made by `fi-ffi release record --modules`). The generators were asked for more
architectures than published wheels have; `WHEELS` lists the published ones.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fi_ffi.loader.fatbin import CudaCode, sass_named
from fi_ffi.loader.uris import ModuleName, Value, parse

_DATA = Path(__file__).with_name("data") / "modules.json"
# Architectures that FlashInfer's release workflow compiles for, by CUDA tag and machine; not
# checked against published wheels.
_CU130 = "7.5 8.0 8.9 9.0a 10.0a 10.3a 12.0f"
WHEELS = {
    ("cu128", "x86_64"): "7.5 8.0 8.9 9.0a 10.0a 12.0a",
    ("cu128", "aarch64"): "7.5 8.0 8.9 9.0a 10.0a 12.0a",
    ("cu129", "x86_64"): _CU130,
    ("cu129", "aarch64"): _CU130,
    ("cu130", "x86_64"): _CU130,
    ("cu130", "aarch64"): "7.5 8.0 8.9 9.0a 10.0a 10.3a 11.0a 12.0f",
}


@dataclass(frozen=True)
class Box:
    """The modules of a family with every combination of these values."""

    family: str
    values: tuple[tuple[str, tuple[Value, ...]], ...]

    @classmethod
    def read(cls, data: Mapping[str, object]) -> Box:
        """Return a box from JSON: `{"family": "norm"}`, with `params` if the family has any."""
        params = data.get("params", {})
        assert isinstance(params, dict)
        return cls(str(data["family"]), tuple((k, tuple(v)) for k, v in params.items()))

    def has(self, module: ModuleName) -> bool:
        """Return whether the module is in the box."""
        return module.family == self.family and all(
            any(given == value and type(given) is type(value) for value in values)
            for name, values in self.values
            for given in (module.params[name],)
        )


@dataclass(frozen=True)
class Listed:
    """A release's own list: boxes of modules, with the machine code they are compiled to."""

    release: str
    modules: tuple[tuple[Box, tuple[CudaCode, ...]], ...]
    # Number of modules, including those whose names follow no rule.
    count: int

    def codes(self, module: str) -> tuple[CudaCode, ...] | None:
        """Return a module's architectures if all were requested; None if it is not listed."""
        parsed = parse(module, self.release)
        return None if parsed is None else self._codes(parsed)

    def _codes(self, module: ModuleName) -> tuple[CudaCode, ...] | None:
        return next((codes for box, codes in self.modules if box.has(module)), None)

    def family(self, name: str) -> list[tuple[Box, tuple[CudaCode, ...]]]:
        """Return the boxes of a family."""
        return [(box, codes) for box, codes in self.modules if box.family == name]


def in_wheel(codes: tuple[CudaCode, ...], cuda: str, machine: str) -> tuple[CudaCode, ...]:
    """Return those of a module's architectures that the published wheels of a CUDA tag have."""
    published = {sass_named(text) for text in WHEELS.get((cuda, machine), "").split()}
    return tuple(code for code in codes if code in published)


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
def listed_in(release: str) -> Listed | None:
    """Return the list of a release; None if it is not recorded."""
    about = _data()["releases"].get(release)
    if about is None:
        return None
    groups = [group for group in _data()["groups"] if release in group["releases"]]
    return Listed(release, tuple(map(_read, groups)), about["count"])


# The generators were not asked for Orin, which no wheel has; modules compiled for both of these
# neighbours can be compiled for it too.
_AROUND_ORIN, _ORIN = {sass_named("sm80"), sass_named("sm89")}, sass_named("sm87")


def _read(group: Mapping[str, Any]) -> tuple[Box, tuple[CudaCode, ...]]:
    codes = tuple(map(sass_named, group["compiled_for"].split()))
    return Box.read(group), (*codes, _ORIN) if {*codes} >= _AROUND_ORIN else codes
