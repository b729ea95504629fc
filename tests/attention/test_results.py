"""Attention's results against float64: the same tests on the CPU, and (tests/gpu) on a GPU."""

from __future__ import annotations

import pytest

from tests.attention.bodies import check_one, check_results
from tests.attention.tables import (
    DECODE,
    MLA,
    PREFILL,
    PREFILL_OPTIONS,
    SINGLE_DECODE,
    SINGLE_PREFILL,
)


@pytest.mark.parametrize("spec", PREFILL.values(), ids=PREFILL)
def test_prefill(spec, machine, rng, record_property):
    record_property("error_of_bound", check_results(spec, machine, rng))


@pytest.mark.parametrize("spec", PREFILL_OPTIONS.values(), ids=PREFILL_OPTIONS)
def test_prefill_options(spec, machine, rng, record_property):
    record_property("error_of_bound", check_results(spec, machine, rng))


@pytest.mark.parametrize("spec", DECODE.values(), ids=DECODE)
def test_decode(spec, machine, rng, record_property):
    record_property("error_of_bound", check_results(spec, machine, rng))


@pytest.mark.parametrize("spec", MLA.values(), ids=MLA)
def test_mla(spec, machine, rng, record_property):
    record_property("error_of_bound", check_results(spec, machine, rng))


@pytest.mark.parametrize("spec", SINGLE_PREFILL.values(), ids=SINGLE_PREFILL)
def test_single_prefill(spec, machine, rng, record_property):
    record_property("error_of_bound", check_one(spec, machine, rng))


@pytest.mark.parametrize("spec", SINGLE_DECODE.values(), ids=SINGLE_DECODE)
def test_single_decode(spec, machine, rng, record_property):
    record_property("error_of_bound", check_one(spec, machine, rng))
