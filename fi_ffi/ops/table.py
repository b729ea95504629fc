"""The op table: the rows of every family."""

from __future__ import annotations

from fi_ffi.ops import gdn, norm, page

ROWS = (*norm.ROWS, *page.ROWS, *gdn.ROWS)
