"""What random calls of a family's ops are made of."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fi_ffi.ops.call.row import Row
from fi_ffi.reference.arrays import Array


@dataclass
class Call:
    """A call that is being made up: its `tables` are the tensors that are not simply random,
    those that were given among them; then all sizes by axis, and the numbers."""

    row: Row
    tables: dict[str, Array]
    sizes: dict[str, int]
    scalars: dict[str, Any]
    without: Collection[str]
    rng: np.random.Generator

    def default(self, **tables: Any) -> None:
        """Tensors, where they were not given."""
        self.tables = {**tables, **self.tables}


@dataclass(frozen=True)
class Inputs:
    """Sizes of calls, and inputs that depend on one another.

    `small` are sizes by axis of calls with few elements, `usual` larger ones.  `make` fills in a
    call.  `variants` are shapes that an op's calls come in, by name: what `make_case` is told.
    `of_dtypes` gives numbers that follow from the dtypes of the row's variables.
    """

    small: Mapping[str, int]
    usual: Mapping[str, int]
    make: Callable[[Call], None] | None = None
    variants: Mapping[str, Mapping[str, Any]] | None = None
    of_dtypes: Callable[[Mapping[str, str]], Mapping[str, Any]] | None = None
