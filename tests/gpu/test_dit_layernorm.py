"""Layer norms of diffusion transformers on a GPU: the tests of tests/ops/test_dit_layernorm.py."""

from __future__ import annotations

import inspect

from ops import test_dit_layernorm as on_host

for _name, _test in inspect.getmembers(on_host, inspect.isfunction):
    if _name.startswith("test_"):
        globals()[_name] = _test
