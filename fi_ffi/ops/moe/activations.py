"""The activations of experts: their names, their numbers in each release, and what they take."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from fi_ffi.errors import printed
from fi_ffi.loader.distributions import is_in
from fi_ffi.ops.call.arguments import Refusal

# `ActivationType` of nv_internal/.../cutlass_kernels/include/common.h, and the releases that have a
# name. A name's number is its index among the names that a release has.
_RELEASES = {
    "Gelu": "",
    "Relu": "",
    "Silu": "",
    "Swiglu": "",
    "Geglu": "",
    "SwigluBias": "",
    "Relu2": "",
    "SwigluStep": ">=0.6.13",
    "GegluTanh": ">=0.6.14",
    "Identity": "",
}
ACTIVATIONS = tuple(_RELEASES)
GATED = frozenset({"Swiglu", "Geglu", "SwigluBias", "SwigluStep", "GegluTanh"})
# Optional tensors of some activations.
SWIGLU = ("swiglu_alpha", "swiglu_beta", "swiglu_limit")
_TAKEN = {"Swiglu": SWIGLU, "SwigluBias": SWIGLU, "SwigluStep": SWIGLU[2:]}


@functools.cache
def activation_numbers(release: str | None) -> dict[str, int]:
    """Return the activations of a release with their numbers; for None all of them, with the
    numbers of the CPU's reference."""
    every = _RELEASES.items()
    had = [name for name, since in every if not (since and release) or is_in(release, since)]
    return {name: number for number, name in enumerate(had)}


def activation_name(refuse: Refusal, value: object) -> str:
    """Return an activation's name, from a str or FlashInfer's `ActivationType`.

    A plain int is refused: the numbers differ between releases.
    """
    name = value if isinstance(value, str) else getattr(value, "name", None)
    if isinstance(name, str) and name in ACTIVATIONS:
        return name
    expected = " or ".join(map(repr, ACTIVATIONS))
    if not isinstance(name, str):
        raise refuse.type("activation_type", value, expected)
    raise refuse("activation_type", printed(name), expected)


def with_limits(refuse: Refusal, name: str, arguments: Mapping[str, Any]) -> str:
    """Return the activation to use with a call's `swiglu_` tensors; refuse those that it does not
    take.

    `Swiglu` with any of them becomes `SwigluBias` here: releases before 0.6.13 do that themselves,
    but overlook `swiglu_limit` with all other activations.
    """
    taken = _TAKEN.get(name, ())
    for argument in SWIGLU:
        if arguments[argument] is not None and argument not in taken:
            expected = f"None: {name} takes {' and '.join(taken) or 'none of them'}"
            raise refuse(argument, "a tensor", expected)
    return "SwigluBias" if name == "Swiglu" else name
