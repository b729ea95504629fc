"""References of `fi_ffi.ops.norm_fused`, in numpy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

# By module, and by entry.
KERNELS: dict[str, dict[str, Callable[..., Any]]] = {}
