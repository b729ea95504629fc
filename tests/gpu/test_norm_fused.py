"""Fused kernels of diffusion transformers on a GPU: what tests/ops does not have."""

from __future__ import annotations

from tests.helpers.prepared_calls import OnGpu
from tests.ops import test_norm as on_host


def test_a_graph_turns_by_the_last_numbers_of_any_call(machine, rng, to_gpu):
    """docs/norm_fused.md: a device has one table of frequencies, which recorded calls read."""
    machine.need("norm")
    made = on_host.case(rng, interleave=True)
    ours = OnGpu(made, to_gpu)

    def launch(base: float) -> None:
        on_host.OP(**ours.descs, **(made.scalars | {"base": base}), stream=machine.stream)

    results = []
    for base in (200.0, 10000.0):
        launch(base)
        results.append(ours.arrays["q_out"].get().tobytes())
    assert ours.is_right() and results[0] != results[1]
    replay = machine.capture(lambda: launch(10000.0))
    replay()
    machine.synchronize()
    assert ours.arrays["q_out"].get().tobytes() == results[1]
    launch(200.0)
    replay()
    machine.synchronize()
    assert ours.arrays["q_out"].get().tobytes() == results[0], "the table is the recorded call's"


def test_many_tokens(machine, rng):
    machine.need("norm")
    made = on_host.case(rng, 20_003, (8, 8, 8), ppf=13, pph=30, ppw=52)
    ours = OnGpu(made, machine._to_gpu)
    on_host.OP(**ours.descs, **made.scalars, stream=machine.stream)
    assert ours.is_right()
