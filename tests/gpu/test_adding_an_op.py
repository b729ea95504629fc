"""The op that docs/adding-an-op.md adds, on a GPU."""

from __future__ import annotations

import fi_ffi

from tests.helpers import adding_an_op, kernels


def test_the_pages_op_runs(tmp_path):
    kernels.need(adding_an_op.NAME)
    assert not hasattr(fi_ffi, "mhc_post")
    copy = adding_an_op.follow(tmp_path)
    tests = "tests/gpu/test_every_op.py"
    out = adding_an_op.run(
        copy, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "mhc_post", tests
    )
    assert "2 passed" in out, out
