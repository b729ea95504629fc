"""fi_ffi/catalogue/data/flashinfer-api.toml against fi_ffi's names and the record of entries.

tests/releases/test_api.py holds it against FlashInfer's own names.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

import fi_ffi
from fi_ffi import comm
from fi_ffi.catalogue.api_map import ApiName, release, rows
from tools.entries import entries_of

OF_VLLM, OF_ENGINES = "vLLM: ", "engines: "
NAMES = [row for row in rows() if not row.section.startswith((OF_VLLM, OF_ENGINES))]
IMPORTS = [row for row in rows() if row.section.startswith(OF_ENGINES)]
RECORD = json.loads((Path(__file__).parents[2] / "tools/data/engine-names.json").read_text())
OPERATORS = [row for row in rows() if row.section.startswith(OF_VLLM)]
# How many there are in each of vLLM's groups, where a row may answer for two dtypes or directions.
GROUPS = {
    "routed to FlashInfer today": 12, "dense layers": 5, "quantised linear layers": 6,
    "attention-like layers": 6, "communication": 4, "LoRA": 3, "caches": 4, "other": 5,
}  # fmt: skip


def label(row: ApiName) -> str:
    return f"{row.section}.{row.name}"


def test_the_names_are_fi_ffis():
    for row in rows():
        for name in row.ops:
            place, _, last = name.rpartition(".")
            assert place in ("", "comm"), f"{label(row)}: no fi_ffi.{place}"
            home = comm if place else fi_ffi
            assert last in home.__all__, f"{label(row)}: no fi_ffi.{name}"
            assert getattr(home, last) is not None


def test_the_entries_are_in_the_catalogue():
    record = entries_of(release())
    for row in (*NAMES, *OPERATORS):
        for entry in row.entries:
            family, _, symbol = entry.rpartition(".")
            groups = record.of_family(family)
            assert groups, f"{label(row)}: FlashInfer {release()} has no modules of {family}"
            found = any(symbol in group.entries for group in groups)
            assert found, f"{label(row)}: {family} exports no {symbol}"


def test_each_row_answers():
    assert all(row.ops or row.entries or row.reason for row in rows())
    # Both of a name's places, where FlashInfer exports it twice, say the same.
    said: dict[str, set[tuple[object, ...]]] = {}
    for row in (*NAMES, *IMPORTS):
        said.setdefault(row.name, set()).add((row.ops, row.entries, row.reason))
    assert not {name for name, answers in said.items() if len(answers) > 1}


def test_what_engines_import_has_a_row():
    """And what no engine imports has none."""
    known = {row.name for row in NAMES}
    assert {row.name for row in IMPORTS} == {*RECORD["names"]} - known
    assert len(RECORD["names"]) > 200 and {*RECORD["engines"]} == {"vllm", "sglang"}


def test_every_operator_of_vllms_has_a_row():
    found = Counter(row.section.removeprefix(OF_VLLM) for row in OPERATORS)
    assert found == GROUPS


@pytest.mark.parametrize("text", [
    "rmsnorm", "fi_ffi rmsnorm", "none", "fi_ffi: rmsnorm and more", "entry:", "",
])  # fmt: skip
def test_what_is_no_row(text):
    with pytest.raises(ValueError, match="is none of the forms"):
        ApiName.read("flashinfer.norm", "rmsnorm", text)


def test_a_row_may_have_both():
    row = ApiName.read("a", "b", "fi_ffi: c, d entry: e.f, g.h | a remark")
    assert (row.ops, row.entries, row.remark) == (("c", "d"), ("e.f", "g.h"), "a remark")
    assert ApiName.read("a", "b", "none: a reason | more").reason == "a reason"
