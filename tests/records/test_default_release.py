"""docs/default-release.md: what another default release would lose."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from fi_ffi.loader.lock import the_lock
from fi_ffi.ops.capability.judgement import BUILT, MISSING, RUN, Support
from fi_ffi.ops.capability.matrix import lines

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
import generate_default_release as page

DEFAULT = the_lock().default_release


def test_the_page_has_every_op_of_every_release():
    text = page.TARGET.read_text()
    assert page.RELEASES[0] == DEFAULT
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")]
    assert {line.name for line in lines()} <= {row[0].removeprefix("| ") for row in rows}
    assert text == page.text()


def answer(status: str, reason: str = "why") -> Support:
    return Support("op", status, reason, module="norm", release=DEFAULT)


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ({90: RUN, 100: BUILT}, {90: BUILT, 100: RUN}, []),
        ({90: RUN, 100: BUILT}, {90: MISSING, 100: RUN}, [("op", [90])]),
        ({90: MISSING, 100: BUILT}, {90: MISSING, 100: MISSING}, [("op", [100])]),
        ({90: MISSING, 100: MISSING}, {90: BUILT, 100: BUILT}, []),
    ],
)
def test_what_is_lost(before, after, expected):
    """Only what was there; that nobody ran it is no loss."""
    found = page.lost(
        {"op": {sm: answer(status) for sm, status in before.items()}},
        {"op": {sm: answer(status) for sm, status in after.items()}},
    )
    assert [(name, sms) for name, sms, _ in found] == expected


def test_reasons_are_told_apart():
    after = {90: answer(MISSING, "a"), 100: answer(MISSING, "b"), 120: answer(MISSING, "a")}
    found = page.lost({"op": dict.fromkeys(after, answer(BUILT))}, {"op": after})
    assert [(sms, one.reason) for _, sms, one in found] == [([90, 120], "a"), ([100], "b")]


def test_real_releases():
    """From 0.6.18 on no wheel has `single_decode`; of 0.7.2.post1 no sha256 is known."""
    found = page.answers(DEFAULT)
    assert not [*page.lost(found, found)]
    lost = {name: sms for name, sms, _ in page.lost(found, page.answers("0.6.18"))}
    assert lost["single_decode"] == page.GPUS and "rmsnorm" not in lost
    assert "single_decode" in page.gone(DEFAULT, "0.6.18")
    assert page.pins(DEFAULT) and page.pins("0.6.18") and not page.pins("0.7.2.post1")
    told = page.verdict(DEFAULT, "0.7.2.post1", 0)
    assert told == "0.7.2.post1 is not the default: no wheel of it is pinned."
    assert page.verdict(DEFAULT, "0.6.18", 0) == f"0.6.18 has all that {DEFAULT} has."
