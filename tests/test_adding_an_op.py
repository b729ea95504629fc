"""The page that adds an op: short, and what it adds passes what every op must pass."""

from __future__ import annotations

import re

import pytest

from tests.helpers import adding_an_op


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    return adding_an_op.follow(tmp_path_factory.mktemp("adding"))


def test_it_takes_under_30_lines():
    texts = adding_an_op.files()
    assert len(texts) == 2
    lines = [line for text in texts.values() for line in text.splitlines() if line.strip()]
    said = re.search(r"(\d+) lines\s+in all", adding_an_op.PAGE.read_text())
    assert len(lines) + 1 == int(said[1]) < 30
    assert max(map(len, lines)) <= 100


def test_what_every_op_must_pass(copy):
    """Those tests that are made from rows, of the new op."""
    tests = ["tests/ops/test_rows.py", "tests/ops/test_refusals.py", "tests/ops/test_prepared.py",
             "tests/ops/test_every_op.py"]  # fmt: skip
    out = adding_an_op.run(
        copy, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "mhc_post", *tests
    )
    passed = int(re.search(r"(\d+) passed", out)[1])
    assert passed >= 16, out


def test_the_row_is_what_the_release_declares(copy):
    tests = "tests/releases/test_rows.py"
    out = adding_an_op.run(copy, "-m", "pytest", "-q", "-p", "no:cacheprovider", tests,
                           "-k", "releases_declare or release_declares")  # fmt: skip
    assert " passed" in out


def test_a_wrong_row_does_not_pass(copy, tmp_path):
    """An argument less, and a formula that is another's."""
    row = copy / "fi_ffi" / "ops" / "table" / "mhc.py"
    text = row.read_text()
    try:
        row.write_text(re.sub(r" +Tensor\(\"post_layer_mix.*\n", "", text))
        with pytest.raises(AssertionError, match="0.6.13"):
            test_the_row_is_what_the_release_declares(copy)
    finally:
        row.write_text(text)
