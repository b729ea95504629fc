"""What random calls of a family's ops are made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fi_ffi.reference.arrays import Array

# Tensors that are not simply random, every size, and the numbers.
Made = tuple[Mapping[str, Array], Mapping[str, int], dict[str, Any]]


@dataclass(frozen=True)
class Inputs:
    """Sizes of calls, and inputs that depend on one another.

    `small` are sizes by axis of calls with few elements, `usual` larger ones.
    `make(row, tables, sizes, scalars, without, rng)` gives tensors by name that are not simply
    random (the given `tables` among them), all sizes, and the numbers.  `variants` are shapes
    that an op's calls come in, by name: what `make_case` is told.  `of_dtypes` gives numbers that
    follow from the dtypes of the row's variables.
    """

    small: Mapping[str, int]
    usual: Mapping[str, int]
    make: Callable[..., Made] | None = None
    variants: Mapping[str, Mapping[str, Any]] | None = None
    of_dtypes: Callable[[Mapping[str, str]], Mapping[str, Any]] | None = None
