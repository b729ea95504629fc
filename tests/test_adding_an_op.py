"""The page that adds an op: short, and what it adds passes what every op must pass."""

from __future__ import annotations

import importlib.util
import re

import pytest

from fi_ffi.loader.fetch.wheels_lock import the_lock

from tests.helpers import adding_an_op, sampling

# Those tests that are made from rows.
OF_ROWS = [f"tests/ops/test_{name}.py" for name in ("rows", "refusals", "prepared", "every_op")]
RELEASE = f"test_rows_are_what_the_release_declares[{the_lock().default_release}]"
OF_RELEASE = f"tests/releases/test_rows.py::{RELEASE}"


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    return adding_an_op.follow(tmp_path_factory.mktemp("adding"))


def run(copy, *tests: str) -> str:
    return adding_an_op.run(copy, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests)


def test_it_takes_under_30_lines():
    texts = adding_an_op.files()
    assert len(texts) == 2
    lines = [line for text in texts.values() for line in text.splitlines() if line.strip()]
    stated = re.search(r"(\d+) lines\s+in all", adding_an_op.PAGE.read_text())
    assert len(lines) + 1 == int(stated[1]) <= 30


@pytest.mark.parametrize(
    "gate", ["ruff check .", "ruff format --check .", "mypy --cache-dir=/dev/null"]
)
def test_its_code_passes_the_gates(copy, gate):
    """What a reader copies passes what CI runs over the whole repository."""
    tool, *options = gate.split()
    if importlib.util.find_spec(tool) is None:
        pytest.skip(f"{tool} is not installed: pip install '.[lint]'")
    adding_an_op.run(copy, "-m", tool, *options)


def test_what_every_op_must_pass(copy):
    passed = int(re.search(r"(\d+) passed", run(copy, "-k", "mhc_post", *OF_ROWS))[1])
    assert passed >= 12


def test_the_repository_passes_with_it(copy):
    """The layers, all rows, and the pages, which the generators have written anew."""
    tests = ("tests/test_layers.py", "tests/ops/test_rows.py", "tests/test_docs.py")
    assert " failed" not in run(copy, *tests)


def test_the_row_is_what_the_release_declares(copy):
    """And one with an argument less is not."""
    sampling.only_in_full("downloads a release of FlashInfer")
    assert "1 passed" in run(copy, OF_RELEASE)
    row = copy / "fi_ffi" / "ops" / "table" / "mhc.py"
    text = row.read_text()
    row.write_text(re.sub(r" +Tensor\(\"post_layer_mix.*\n", "", text))
    with pytest.raises(AssertionError, match="0.6.13"):
        run(copy, OF_RELEASE)
    row.write_text(text)
