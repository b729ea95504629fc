"""Concatenating MLA's keys on a GPU: the tests of tests/ops/test_concat.py."""

from __future__ import annotations

import inspect

from ops import test_concat as on_host

for _name, _test in inspect.getmembers(on_host, inspect.isfunction):
    if _name.startswith("test_"):
        globals()[_name] = _test
