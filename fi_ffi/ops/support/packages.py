"""Rows that are no ops of the table: those of packages in `fi_ffi/ops` with a `rows` module.

Their functions do something around the entries they call, and have docs of their own.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from collections.abc import Iterator

from fi_ffi import ops
from fi_ffi.ops.row import Row

_ATTENTION = "attention"  # whose options name modules: `support.attention`


def packages() -> dict[str, tuple[Row, ...]]:
    """The rows of each package but attention's, by its name."""
    found = {}
    for info in pkgutil.iter_modules(ops.__path__):
        name = f"fi_ffi.ops.{info.name}.rows"
        if info.ispkg and info.name != _ATTENTION and importlib.util.find_spec(name):
            rows = getattr(importlib.import_module(name), "ROWS", ())
            if rows:
                found[info.name] = tuple(rows)
    return found


def forms_of_packages() -> Iterator[tuple[str, str, tuple[Row, ...]]]:
    """Package, name and forms: rows of one name and module are forms of one entry."""
    for package, rows in packages().items():
        forms: dict[tuple[str, str], list[Row]] = {}
        for row in rows:
            forms.setdefault((row.name, row.module), []).append(row)
        for (name, module), found in forms.items():
            several = sum(other == name for other, _ in forms) > 1
            yield package, f"{name} ({module})" if several else name, tuple(found)
