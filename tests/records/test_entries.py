"""The records of what FlashInfer's modules export and of which it lists."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fi_ffi.catalogue.ahead_of_time import (
    ParameterGrid,
    compiles_for,
    gpus_in,
    in_wheel,
    is_recorded,
    known_releases,
    listed_in,
    published,
    recorded_releases,
    spans_of_wheels,
    wheels_of,
)
from fi_ffi.loader.fetch.wheels_lock import the_lock
from fi_ffi.loader.machine import sass_named
from fi_ffi.loader.uris import version_of
from fi_ffi.module_names import parse, uri
from tools.entries import entries_of
from tools.release import grids

DEFAULT = the_lock().default_release
NAMES = json.loads((Path(__file__).parents[1] / "loader" / "data" / "uris.json").read_text())


def names_of(release: str) -> list[str]:
    listed = NAMES["listed"].items()
    return [name for key, names in listed if release in key.split() for name in names]


def test_every_module_of_the_list_is_recorded_once():
    record = entries_of(DEFAULT)
    listed = [group for group in record if group.is_listed]
    every = [grid for group in listed for grid in group.grids]
    names = [name for grid in every for name in grids.names(grid, DEFAULT)]
    assert len(names) == len(set(names)) == sum(group.count for group in listed) == 956
    recorded = set(names)
    # The list for 9.0a was recorded by another tool.
    assert {*names_of(DEFAULT)} <= recorded
    assert {*NAMES["listed_for_every_arch"]} - recorded == set()


def test_lookups():
    record = entries_of(DEFAULT)
    assert entries_of("0.1.0") is None
    assert record.of("nothing") is None
    softmax = record.of("sampling").entries["softmax"]
    assert softmax.names[:2] == ("workspace_buffer", "logits")
    name = uri("batch_prefill", release=DEFAULT, dtype_q="f16", head_dim_qk=128)
    fa3 = record.of(f"{name}_sm90")
    assert [*record.of(name).entries] == [*fa3.entries] == ["paged_run", "plan", "ragged_run"]
    assert record.of(name) is not fa3
    assert record.of(name.replace("_128", "_96")) is None
    moe = record.of("fused_moe_90")
    assert moe.objects["FusedMoeRunner"]["run_moe"].signature.params[22] == "Optional<Array<int>>"
    assert not record.of("concat_mla").is_listed


def test_no_type_and_no_name_is_left_out():
    for group in entries_of(DEFAULT):
        assert group.entries
        assert group.sources
        for entry in group.entries.values():
            assert len(entry.names) == len(entry.signature.params)
            assert all(entry.signature.params)


@pytest.mark.parametrize("release", recorded_releases())
def test_boxes_are_the_names(release):
    names = names_of(release)
    found = grids.grids_of(names, release)
    again = sorted(name for grid in found for name in grids.names(grid, release))
    assert again == sorted(name for name in names if parse(name, release))
    assert len(found) < len(names) / 4
    assert [ParameterGrid.read(grids.write(grid)) for grid in found] == found


@given(st.sets(st.sampled_from(names_of(DEFAULT)), min_size=1, max_size=60))
@settings(max_examples=60, deadline=None)
def test_boxes_of_any_names_have_these_and_no_others(names):
    made = grids.grids_of(names, DEFAULT)
    found = [name for grid in made for name in grids.names(grid, DEFAULT)]
    assert sorted(found) == sorted(names)
    for name in names_of(DEFAULT)[::29]:
        assert any(grid.has(parse(name, DEFAULT)) for grid in made) == (name in names)


@pytest.mark.parametrize("release", recorded_releases())
def test_the_lists_have_what_the_generators_list(release):
    listed = listed_in(release)
    for name in names_of(release):
        if parse(name, release) is None:
            continue
        codes = listed.codes(name)
        assert codes, name
        assert any(code.runs_on((9, 0)) for code in codes), name


def test_codes():
    listed = listed_in(DEFAULT)
    assert listed_in("0.6.8") is None
    assert {code.sm for code in listed.codes("norm")} >= {75, 80, 90, 100, 120, 121}
    assert listed.codes("gemm_sm90") == (sass_named("sm90a"),)
    assert listed.codes("concat_mla") is None
    assert [code.name for code in listed.codes("trtllm_comm")] == ["sm_90a", "sm_100a", "sm_103a"]
    assert in_wheel(listed.codes("fp4_quantization_110"), DEFAULT, "cu130", "x86_64") == ()
    assert in_wheel(listed.codes("fp4_quantization_110"), DEFAULT, "cu130", "aarch64")
    assert sass_named("9.0a") == sass_named("sm90a")


def test_the_gpus_of_a_release():
    """By its own list and the record of its modules; nothing else is claimed."""
    assert gpus_in("0.6.15.post1") == (90, 100, 103, 110, 120, 121)
    assert gpus_in("0.6.16.post1") == gpus_in("0.7.2.post1") == (90, 100, 103, 107, 110, 120, 121)
    assert gpus_in("0.6.2") == ()
    for release in known_releases():
        assert (
            {90, 100, 103, 110, 120, 121}
            <= {*gpus_in(release)}
            <= {90, 100, 103, 107, 110, 120, 121}
        )
    rubin = [release for release in known_releases() if compiles_for(release, (10, 7))]
    assert rubin == [r for r in known_releases() if version_of(r) >= version_of("0.6.16")]
    for capability in ((7, 5), (8, 0), (8, 6), (8, 7), (8, 9), (9, 0), (11, 0), (12, 1)):
        assert compiles_for(DEFAULT, capability) and is_recorded(DEFAULT, capability)
    assert not compiles_for(DEFAULT, (13, 0)) and not compiles_for(DEFAULT, (7, 0))
    assert not is_recorded("0.7.2.post1", (10, 7)) and not is_recorded("0.6.8", (9, 0))


def test_the_wheels_of_a_release():
    assert spans_of_wheels()[0][0] == known_releases()[0]
    assert spans_of_wheels()[-1][1] == known_releases()[-1]
    assert published("0.6.17", "cu130", "x86_64") == published(DEFAULT, "cu130", "x86_64")
    assert "7.5" in published("0.6.17", "cu129", "aarch64").split()
    assert "7.5" not in published("0.6.18", "cu129", "aarch64").split()
    assert "11.0a" in published("0.6.10", "cu130", "x86_64").split()
    assert "11.0a" not in published("0.6.11", "cu130", "x86_64").split()
    assert "10.7a" in published("0.7.2.post1", "cu134", "x86_64").split()
    assert "12.1a" in published("0.7.2.post1", "cu130", "aarch64").split()
    assert published(DEFAULT, "cu134", "x86_64") == published(DEFAULT, "cu130", "riscv64") == ""
    for release in ("0.6.2", "99.0", "0.7.3"):
        assert published(release, "cu130", "x86_64") == ""
    for first, _ in spans_of_wheels():
        for lists in wheels_of(first).values():
            assert all(sass_named(text) for text in " ".join(lists).split())
