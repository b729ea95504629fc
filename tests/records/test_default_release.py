"""docs/default-release.md: what another default release would lose."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from fi_ffi.capability.matrix import lines
from fi_ffi.loader.fetch.wheels_lock import the_lock
from fi_ffi.ops.attention.rows import BATCH_MLA
from fi_ffi.ops.call.support import BUILT, MISSING, RUN, Support
from fi_ffi.ops.functions import OPS

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
import generate_default_release as page

DEFAULT = the_lock().default_release


def test_the_page_has_every_op_that_differs():
    text = page.TARGET.read_text()
    assert page.RELEASES[0] == DEFAULT
    assert text == page.text()
    table = text.partition("## Differences by op")[2].partition("\n## ")[0].splitlines()
    found = [page.answers(release) for release in page.RELEASES]
    for line in lines():
        served = [[sm for sm, answer in of[line.name].items() if answer] for of in found]
        differs = any(sms != served[0] for sms in served)
        assert any(row.startswith(f"| {line.name} | ") for row in table) == differs, line.name


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
    one = page.verdict(DEFAULT, "0.7.2.post1", [])
    nothing = "it has every op, but"
    assert one == f"0.7.2.post1 is not the default: {nothing} wheels.lock pins none of its wheels."
    assert page.verdict(DEFAULT, "0.6.18", []) == f"0.6.18 has all that {DEFAULT} has."
    to_build, gone = replace(answer(MISSING), build="fi-ffi build x"), answer(MISSING)
    told = page.verdict(DEFAULT, "0.6.18", [("a", to_build), ("b", gone), ("b", gone)])
    assert "1 ops would be lost, and its wheels lack 1 ops, which `fi-ffi build` can make" in told
    assert nothing not in told
    told = page.verdict(DEFAULT, "0.6.18", [("a", to_build)])
    assert f"{nothing} its wheels lack 1 ops" in told


@pytest.mark.parametrize(
    ("op", "more", "less"),
    [
        ("bmm_fp8", [], ["`cublas_handle`"]),
        ("silu_and_mul", ["without `d % 8 == 0`"], []),
        ("top_k_renorm_probs", ["`is_deterministic`"], []),
        ("rmsnorm", [], []),
    ],
)
def test_what_a_release_takes_otherwise(op, more, less):
    found = page.differences(OPS[op].rows, DEFAULT, "0.7.2.post1")
    assert found == (more, less)
    back = page.differences(OPS[op].rows, "0.7.2.post1", DEFAULT)
    assert (len(back[0]), len(back[1])) == (len(less), len(more))


def test_what_is_new():
    rows = BATCH_MLA["fa2_fp8"][1:]
    assert page.differences(rows, DEFAULT, "0.7.2.post1") == (["the entry"], [])
    assert page.differences(rows, "0.7.2.post1", DEFAULT) == ([], ["the entry"])
    more, _ = page.differences(OPS["gdn_prefill"].rows, DEFAULT, "0.7.2.post1")
    assert "`state_indices`" in more and any("`cu_seqlens`" in text for text in more)
