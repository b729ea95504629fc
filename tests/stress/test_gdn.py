"""The gated delta rule's prefill under stress: gdn_stress/scenarios.py, on every machine.

Every scenario plays its launches alone, each waited for, and then twice together; what is not
held against float64 must be the same bits. `-m sanitizer` is a small one of each kind.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.gdn_stress import findings, hang, scenarios
from tests.gdn_stress.lanes import Lane, Spec
from tests.gdn_stress.machines import OP, Cpu
from tests.gdn_stress.plays import check
from tests.gdn_stress.scenarios import EVERY, GQA, GVA
from tests.helpers.children import environment

DTYPES = pytest.mark.parametrize("dtype", OP.row.dtypes["T"])
PLACES = pytest.mark.parametrize("in_place", [False, True], ids=["two places", "in place"])


# What each is checked with, beside a dtype.
SCENARIOS = {
    "lengths_singly": (scenarios.check_singly, [()]),
    "lengths_mixed": (scenarios.check_lengths_mixed, [()]),
    "single_tokens": (scenarios.check_single_tokens, [(n,) for n in (64, 128, 256, 512, 1024)]),
    "a_long_sequence": (scenarios.check_long_among_single_tokens, [()]),
    "heads": (scenarios.check_heads, [(pair,) for pair in GQA + GVA]),
    "options": (scenarios.check_options, [(of, n) for n in EVERY for of in ((4, 2), (2, 4))]),
    "checkpoints": (scenarios.check_checkpoints, [(n,) for n in EVERY if n]),
    "back_to_back": (scenarios.check_back_to_back, [(50,), (500,)]),
    "production": (scenarios.check_production, [()]),
}
CASES = [(name, given) for name, (_, each) in SCENARIOS.items() for given in each]


@DTYPES
@pytest.mark.parametrize(("name", "given"), CASES, ids=lambda part: str(part).strip("(),"))
def test_scenario(machine, rng, name, given, dtype, record_property):
    record_property("error_of_bound", SCENARIOS[name][0](machine, rng, dtype, *given))


@DTYPES
@PLACES
@pytest.mark.parametrize(("steps", "exact"), [(20, 20), (200, 3)], ids=["20", "200"])
def test_chain(machine, rng, steps, exact, in_place, dtype, record_property):
    worst, carried = scenarios.check_long_chain(machine, rng, dtype, steps, in_place, exact)
    record_property("error_of_bound", worst)
    record_property("carried_error_of_bound", carried)


@DTYPES
def test_the_state_in_place_or_apart(machine, rng, dtype):
    scenarios.check_in_place(machine, rng, dtype)


@pytest.mark.parametrize("threads", [False, True], ids=["one thread", "a thread each"])
@pytest.mark.parametrize("count", [4, 16])
def test_streams(machine, rng, count, threads, record_property):
    """Of both dtypes."""
    record_property("error_of_bound", scenarios.check_streams(machine, rng, count, threads))


@DTYPES
@PLACES
def test_graph(machine, rng, in_place, dtype, record_property):
    record_property("error_of_bound", scenarios.check_graph(machine, rng, dtype, in_place))


@DTYPES
def test_overlaps(machine, rng, dtype):
    scenarios.check_overlaps(machine, rng, dtype)


# Findings: what the kernel does, and the reference does not.


@DTYPES
@pytest.mark.parametrize("length", [1, 65])
def test_checkpoints_as_flashinfer_counts_them(machine, rng, length, dtype):
    findings.check_flashinfers_count(machine, rng, dtype, length)


@DTYPES
@pytest.mark.parametrize("name", findings.LEAKS)
def test_nan_of_a_neighbour(machine, rng, name, dtype):
    findings.check_nan_of_a_neighbour(machine, rng, dtype, name)


@DTYPES
def test_tokens_after_the_end(machine, rng, dtype):
    findings.check_tokens_after_the_end(machine, rng, dtype)


def child(machine: Cpu, which: str) -> tuple[int, str, str]:
    """Status, stdout and stderr of gdn_stress/hang.py, killed when its watchdog does not."""
    command = [sys.executable, hang.__file__, "gpu" if machine.is_gpu else "cpu", which]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=environment(),
    ) as process:  # fmt: skip
        try:
            out, err = process.communicate(timeout=hang.SECONDS + 60)
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
    return process.returncode, out, err


def test_a_sequence_without_tokens(machine, rng):
    """The kernel never ends; a watchdog tells of it, and the GPU serves others as before."""
    status, out, err = child(machine, "full")
    assert (status, out.split()) == (0, ["launching", "finished"]), err
    status, out, err = child(machine, "empty")
    assert out.split() == ["launching"], err
    if machine.is_gpu:
        assert status == 124, f"{status}, not ended by its watchdog: {err}"
        assert "gdn_prefill has not finished" in err
        assert "cu_seqlens: int64[4]" in err
        assert "stream 0x" in err
    else:
        assert status == 1
        assert "a GPU would never end" in err
    check(machine, [Lane(machine, Spec((50, 1, 50)), rng)])


# A small one of each kind, for compute-sanitizer.

SMALL = {
    "options GQA": [Spec((65, 1, 3), 2, 1, "bfloat16", every=64, scale=0.3, workspace=True)],
    "options GVA": [Spec((65, 1, 3), 1, 2, "float16", every=64)],
    "no options": [Spec((1, 66), 1, 2, "bfloat16", ("input_state", "alpha", "beta"))],
    "chain": [Spec((2, 65), 1, 2, "bfloat16", chained=True)],
    "chain in place": [Spec((2, 65), 2, 1, "float16", chained=True, in_place=True)],
    "streams": [Spec((65, 1), 1, 2, "bfloat16"), Spec((3, 64), 2, 1, "float16", chained=True)],
    "single tokens": [Spec((1,) * 9, 1, 1, "bfloat16")],
}


@pytest.mark.sanitizer
@pytest.mark.parametrize("kind", SMALL)
def test_small(machine, rng, kind):
    specs = SMALL[kind]
    for spec in specs:
        scenarios.need_checkpoints(spec.every)
    streams = machine.streams(len(specs))
    check(machine, [
        Lane(machine, spec, rng, steps=2, stream=stream)
        for spec, stream in zip(specs, streams, strict=True)
    ])  # fmt: skip


@pytest.mark.sanitizer
def test_small_graph(machine, rng):
    scenarios.check_graph(machine, rng, "bfloat16", in_place=False, steps=2)
