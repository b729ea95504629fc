"""What is asked: a GPU, a release, a CUDA tag, and kernels to look at."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from fi_ffi.errors import ArgumentError, FiFfiError, printed
from fi_ffi.loader import machine
from fi_ffi.loader.kernels import KernelSource, open_source, release_of
from fi_ffi.loader.lock import the_lock

_SM = re.compile(r"(?:sm_?)?(\d{1,2})\.?(\d)[af]?")
_CUDA = re.compile(r"cu(\d{2})(\d)")
DEFAULT_CUDA = f"cu{machine.CUDA_MAJOR}0"
# Places that are on this machine: asking them fetches nothing.
_LOCAL = ("explicit", "installed", "jit", "local")

Sm = int | float | str | tuple[int, int] | None


def capability_of(sm: Sm) -> tuple[int, int] | None:
    """A compute capability: 90, 9.0, "9.0", "sm_90a" and (9, 0) are the same."""
    if sm is None:
        return None
    if isinstance(sm, tuple) and len(sm) == 2 and all(type(part) is int for part in sm):
        return sm
    found = _SM.fullmatch(str(sm)) if isinstance(sm, (int, float, str)) else None
    if found is None or isinstance(sm, bool) or not 5 <= int(found[1]) < 20:
        raise ArgumentError(
            "supports", "sm", got=printed(sm), expected="such as 90, '9.0' or 'sm90a'"
        )
    return int(found[1]), int(found[2])


@dataclass(frozen=True)
class Question:
    """What is asked, with what was left open filled in."""

    capability: tuple[int, int] | None
    release: str
    cuda: str
    # Where to look; none: the record of what FlashInfer builds.
    sources: tuple[KernelSource, ...]
    # By the row's variables, or under "" those that any of its tensors may have.
    dtypes: Mapping[str, tuple[str, ...]]
    # Whose wheels are meant, x86_64's or aarch64's.
    cpu: str = field(default_factory=platform.machine)

    @classmethod
    def of(
        cls,
        sm: Sm = None,
        release: str | None = None,
        cuda: str | None = None,
        dtypes: object = None,
        kernels: str | os.PathLike[str] | None = None,
    ) -> Question:
        """Without `sm`, the first GPU there is; without a GPU, any."""
        if cuda is not None and not _CUDA.fullmatch(cuda):
            raise ArgumentError(
                "supports", "cuda", got=printed(cuda), expected="a tag such as cu130"
            )
        sources: tuple[KernelSource, ...] = ()
        if kernels is not None:
            sources = (open_source(kernels),)
        elif release is None and cuda is None:
            sources = _in_use()
        found = release or next(filter(None, map(release_of, sources)), None)
        capability = capability_of(sm) if sm is not None else _first_gpu()
        return cls(
            capability, found or the_lock().default_release, cuda or _tag(sources) or DEFAULT_CUDA,
            sources, _dtypes(dtypes),
        )  # fmt: skip

    @property
    def cuda_major(self) -> int:
        found = _CUDA.fullmatch(self.cuda)
        assert found is not None
        return int(found[1])

    @property
    def architecture(self) -> str | None:
        """As FLASHINFER_CUDA_ARCH_LIST has it."""
        if self.capability is None:
            return None
        major, minor = self.capability
        # From SM90 on FlashInfer's kernels use what only the very architecture has.
        return f"{major}.{minor}" + ("a" if major >= 9 else "")


def _in_use() -> tuple[KernelSource, ...]:
    from fi_ffi.loader import search

    found = []
    for place in search.places():
        if place.kind not in _LOCAL:
            break
        if place.source is not None:
            found.append(place.source)
    return tuple(found)


def _first_gpu() -> tuple[int, int] | None:
    try:
        return machine.capability(0) if machine.device_count() else None
    except FiFfiError:
        return None


def _tag(sources: tuple[KernelSource, ...]) -> str | None:
    """The CUDA tag in a version such as 0.6.13+cu130.sm90a."""
    for source in sources:
        found = _CUDA.search((source.version or "").partition("+")[2])
        if found:
            return found[0]
    return None


def _dtypes(given: object) -> dict[str, tuple[str, ...]]:
    if given is None:
        return {}
    if isinstance(given, Mapping):
        return {str(name): _names(value) for name, value in given.items()}
    return {"": _names(given)}


def _names(given: object) -> tuple[str, ...]:
    from fi_ffi.abi.tensor import DType, parse_dtype

    values = given if isinstance(given, (list, tuple, set, frozenset)) else (given,)
    return tuple(
        (v if isinstance(v, DType) else parse_dtype(v, op="supports", argument="dtypes")).name
        for v in values
    )
