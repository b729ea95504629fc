"""Plans over time: the same tests on the CPU, and (tests/gpu) on a GPU."""

from __future__ import annotations

import pytest

from tests.attention import serving
from tests.attention.tables import FIXED_SPLIT, GRAPHS, REFUSED_OR_RIGHT, SERVED

SERVICES = pytest.mark.parametrize("spec", SERVED.values(), ids=SERVED)


@SERVICES
@pytest.mark.parametrize("more", [{}, {"enable_cuda_graph": True}], ids=["plain", "graph"])
def test_exact_workspace(spec, more, machine, rng):
    serving.check_exact_workspace(spec, machine, rng, **more)


@SERVICES
def test_stale_plans(spec, machine, rng):
    serving.check_stale(spec, machine, rng)


@SERVICES
def test_many_replans(spec, machine, rng):
    serving.check_many_replans(spec, machine, rng)


@SERVICES
def test_another_stream(spec, machine, rng):
    serving.check_another_stream(spec, machine, rng)


@pytest.mark.parametrize(
    "names", [("prefill fa2", "prefill fa3"), ("decode", "prefill fa2"), ("mla fa2", "mla fa3")]
)
def test_two_plans_interleaved(names, machine, rng):
    serving.check_interleaved(tuple(SERVED[name] for name in names), machine, rng)


@pytest.mark.parametrize("spec", FIXED_SPLIT.values(), ids=FIXED_SPLIT)
def test_fixed_split_size_does_not_depend_on_the_batch(spec, machine, rng):
    serving.check_fixed_split(spec, machine, rng)


@pytest.mark.parametrize("spec", GRAPHS.values(), ids=GRAPHS)
def test_graphs(spec, machine, rng):
    serving.check_graph(spec, machine, rng)


@pytest.mark.parametrize("spec", REFUSED_OR_RIGHT.values(), ids=REFUSED_OR_RIGHT)
def test_refused_or_right(spec, machine, rng):
    serving.check_refused_or_right(spec, machine, rng)
