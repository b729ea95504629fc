"""The op table: the rows of every family."""

from __future__ import annotations

from fi_ffi.ops import norm, page

ROWS = (*norm.ROWS, *page.ROWS)
