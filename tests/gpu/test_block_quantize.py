"""Quantising in blocks on a GPU: the tests of tests/ops/test_block_quantize.py."""

from __future__ import annotations

import inspect

from ops import test_block_quantize as on_host

for _name, _test in inspect.getmembers(on_host, inspect.isfunction):
    if _name.startswith("test_"):
        globals()[_name] = _test
