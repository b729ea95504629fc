"""What a call is asked for besides tensors, checked."""

from __future__ import annotations

import numbers
from dataclasses import dataclass

from fi_ffi.errors import ArgumentError, ArgumentTypeError, KernelNotFoundError, printed
from fi_ffi.ops.moe.interface import ACTIVATIONS, GATED, MODULE, activation_numbers

_INT32 = 2**31
# Which of alpha, beta and limit an activation takes.
_SWIGLU = {
    "Swiglu": ("swiglu_alpha", "swiglu_beta", "swiglu_limit"),
    "SwigluBias": ("swiglu_alpha", "swiglu_beta", "swiglu_limit"),
    "SwigluStep": ("swiglu_limit",),
}


@dataclass(frozen=True)
class Parallel:
    """Which part of the whole this rank has."""

    tp_size: int = 1
    tp_rank: int = 0
    ep_size: int = 1
    ep_rank: int = 0

    @classmethod
    def checked(cls, op: str, **given: object) -> Parallel:
        """Raises unless every rank is within its size."""
        found = cls(**{name: integer(op, name, value, 0) for name, value in given.items()})
        for kind in ("tp", "ep"):
            size, rank = getattr(found, f"{kind}_size"), getattr(found, f"{kind}_rank")
            if size < 1:
                raise ArgumentError(op, f"{kind}_size", got=size, expected="1 or more")
            if rank >= size:
                expected = f"less than {kind}_size = {size}"
                raise ArgumentError(op, f"{kind}_rank", got=rank, expected=expected)
        return found

    @property
    def is_first_of_tp(self) -> bool:
        """The one of its tensor-parallel ranks that adds the second bias."""
        return self.tp_rank == 0


def integer(op: str, argument: str, value: object, low: int) -> int:
    """An int that the kernels can hold."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise ArgumentTypeError(op, argument, got=_shown(value), expected="int")
    plain = int(value)
    if not low <= plain < _INT32:
        expected = f"an int from {low} to {_INT32 - 1}"
        raise ArgumentError(op, argument, got=plain, expected=expected)
    return plain


def flag(op: str, argument: str, value: object) -> bool:
    if type(value) is not bool:
        raise ArgumentTypeError(op, argument, got=_shown(value), expected="bool")
    return value


def _shown(value: object) -> str:
    return f"{type(value).__name__} {printed(value)}"


def activation(op: str, value: object) -> str:
    """An activation's name: of a str, or of FlashInfer's `ActivationType`.

    Their numbers are others in other releases, so a plain int is none.
    """
    name = value if isinstance(value, str) else getattr(value, "name", None)
    expected = " or ".join(map(repr, ACTIVATIONS))
    if not isinstance(name, str):
        raise ArgumentTypeError(op, "activation_type", got=_shown(value), expected=expected)
    if name not in ACTIVATIONS:
        raise ArgumentError(op, "activation_type", got=printed(name), expected=expected)
    return name


def with_limits(op: str, name: str, given: tuple[str, ...]) -> str:
    """The activation that serves one with these `swiglu_` tensors; raises where it takes none.

    `Swiglu` with any of them is `SwigluBias`: said here, because releases before 0.6.13 do not
    see it for `swiglu_limit` with every other activation.
    """
    taken = _SWIGLU.get(name, ())
    for argument in given:
        if argument not in taken:
            expected = f"None: {name} takes {' and '.join(taken) or 'none of them'}"
            raise ArgumentError(op, argument, got="a tensor", expected=expected)
    return "SwigluBias" if name == "Swiglu" and given else name


def activation_number(op: str, name: str, release: str | None) -> int:
    """What a release calls it."""
    known = activation_numbers(release)
    if name not in known:
        raise KernelNotFoundError(f"{op}: {MODULE} of FlashInfer {release} has no {name}")
    return known[name]


def is_gated(name: str) -> bool:
    return name in GATED


def profile_ids(op: str, value: object, counts: tuple[int, int]) -> tuple[int, int] | None:
    """A tactic of GEMM1 and one of GEMM2, each counted from 0; -1 is the kernel's own choice."""
    if value is None:
        return None
    if not isinstance(value, (tuple, list)):
        raise ArgumentTypeError(op, "profile_ids", got=_shown(value), expected="two ints, or None")
    if len(value) != 2:
        raise ArgumentError(op, "profile_ids", got=f"{len(value)} of them", expected="two ints")
    found = [integer(op, "profile_ids", one, -1) for one in value]
    for one, count in zip(found, counts, strict=True):
        if one >= count:
            expected = f"from -1 to {counts[0] - 1} and from -1 to {counts[1] - 1}"
            raise ArgumentError(op, "profile_ids", got=tuple(found), expected=expected)
    return found[0], found[1]
