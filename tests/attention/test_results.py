"""Attention's results against float64: the same tests on the CPU, and (tests/gpu) on a GPU."""

from __future__ import annotations

import pytest

from tests.attention.cases import check_results
from tests.attention.tables import (
    ATTENTION,
    DECODE,
    MLA,
    NVFP4,
    PREFILL,
    PREFILL_OPTIONS,
    SINGLE_DECODE,
    SINGLE_PREFILL,
    Table,
)


def of(table: Table) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("spec", table.values(), ids=table)


@of(PREFILL)
def test_prefill(spec, machine, rng, record_property):
    record_property("error_of_bound", check_results(spec, machine, rng))


@of(PREFILL_OPTIONS)
def test_prefill_options(spec, machine, rng, record_property):
    record_property("error_of_bound", check_results(spec, machine, rng))


@of(NVFP4)
def test_nvfp4(spec, machine, rng, record_property):
    record_property("error_of_bound", check_results(spec, machine, rng))


@of(DECODE)
def test_decode(spec, machine, rng, record_property):
    record_property("error_of_bound", check_results(spec, machine, rng))


@of(ATTENTION)
def test_attention(spec, machine, rng, record_property):
    record_property("error_of_bound", check_results(spec, machine, rng))


@of(MLA)
def test_mla(spec, machine, rng, record_property):
    record_property("error_of_bound", check_results(spec, machine, rng))


@of(SINGLE_PREFILL)
def test_single_prefill(spec, machine, rng, record_property):
    record_property("error_of_bound", check_results(spec, machine, rng))


@of(SINGLE_DECODE)
def test_single_decode(spec, machine, rng, record_property):
    record_property("error_of_bound", check_results(spec, machine, rng))
