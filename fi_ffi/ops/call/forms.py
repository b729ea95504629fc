"""Which form of an entry is in force: of its row, its mode or its order of weights.

An entry whose arguments changed between FlashInfer's releases has a form for each span of releases.
The one in force is that of the kernels in use (`releases.release_in_force`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

from fi_ffi.abi.tensor import Device
from fi_ffi.errors import KernelNotFoundError
from fi_ffi.ops.call.releases import HasReleases, of_release, release_in_force, span_of


class Form(HasReleases, Protocol):
    """One form of an entry, with the name that errors use."""

    @property
    def name(self) -> str: ...


_Form = TypeVar("_Form", bound=Form)


def in_force(forms: Sequence[_Form], device: Device) -> _Form:
    """Return the form of the release in force.

    If no form has that release, raises `KernelNotFoundError` for a GPU. The CPU's reference then
    has the first form.
    """
    release = release_in_force()
    if not device.is_cuda:
        return of_release(forms, release) or forms[0]
    return form_of(forms, release)


def form_of(forms: Sequence[_Form], release: str) -> _Form:
    """Return the form of a release; `KernelNotFoundError` if no form has it."""
    form = of_release(forms, release)
    if form is not None:
        return form
    raise KernelNotFoundError(
        f"{forms[0].name} can be called in FlashInfer {span_of(forms)}; "
        f"the kernels in use are of {release}"
    )
