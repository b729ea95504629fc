"""The op that docs/adding-an-op.md adds, on a GPU."""

from __future__ import annotations

import os

import pytest

import fi_ffi
from fi_ffi.loader import search

from tests.helpers import adding_an_op


def test_the_pages_op_runs(tmp_path):
    if adding_an_op.NAME not in next(iter(search.sources())).modules():
        pytest.skip(f"FI_FFI_KERNELS has no module {adding_an_op.NAME}")
    assert os.environ["FI_FFI_KERNELS"] and not hasattr(fi_ffi, "mhc_post")
    copy = adding_an_op.follow(tmp_path)
    tests = "tests/gpu/test_every_op.py"
    out = adding_an_op.run(
        copy, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "mhc_post", tests
    )
    assert "2 passed" in out, out
