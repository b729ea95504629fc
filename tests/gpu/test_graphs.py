"""Graphs through `fi_ffi.capture`: recorded, replayed, changed in place."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

import fi_ffi
from fi_ffi.ops.call import cuda
from fi_ffi.ops.functions import OPS

from tests.helpers.cases import make_case
from tests.helpers.prepared_calls import poison, settle

RMSNORM = OPS["rmsnorm"]


@pytest.fixture
def chain(rng, to_gpu):
    """An rmsnorm and a call that takes what it gives, and what comes out."""
    case = make_case(RMSNORM.row, {"n": 7, "h": 512}, {"T": "bfloat16"}, rng)
    arrays = {name: to_gpu(array) for name, array in case.arrays.items()}
    after = to_gpu(np.full_like(case.arrays["out"], np.nan))

    def calls() -> None:
        descs = {name: array.desc() for name, array in arrays.items()}
        fi_ffi.rmsnorm(**descs)
        fi_ffi.gemma_rmsnorm(after.desc(), descs["out"], descs["weight"])

    return case, arrays, after, calls


def check(chain, graph, stream: int) -> None:
    """What a launch of the graph gives."""
    case, arrays, after, _ = chain
    poison(arrays["out"], after)
    graph.launch(stream)
    settle(stream)
    assert case.error("out", arrays["out"].get())[1] <= 1


def test_a_recorded_chain(chain, stream):
    _, arrays, after, calls = chain
    with fi_ffi.stream(stream):
        calls()
    settle(stream)
    expected = after.get()
    poison(arrays["out"], after)
    with fi_ffi.capture(stream) as graph:
        calls()
    settle(stream)
    assert np.isnan(arrays["out"].get().astype(float)).all(), "recorded, and not made"
    assert graph.nodes == 2
    for _ in range(3):
        check(chain, graph, stream)
        assert after.get().tobytes() == expected.tobytes()
    poison(arrays["out"], after)
    with fi_ffi.stream(stream):
        graph.launch()
    settle(stream)
    assert after.get().tobytes() == expected.tobytes()


def test_changed_in_place(chain, stream, rng, to_gpu):
    _, _, _, calls = chain
    with fi_ffi.capture(stream) as graph:
        calls()
    case = make_case(RMSNORM.row, {"n": 7, "h": 512}, {"T": "bfloat16"}, rng)
    arrays = {name: to_gpu(array) for name, array in case.arrays.items()}
    with fi_ffi.capture(stream, into=graph) as same:
        for _ in range(2):
            fi_ffi.rmsnorm(**{name: array.desc() for name, array in arrays.items()})
    assert same is graph and graph.nodes == 2
    graph.launch(stream)
    settle(stream)
    assert case.error("out", arrays["out"].get())[1] <= 1

    updates = graph.updates
    another = make_case(RMSNORM.row, {"n": 7, "h": 512}, {"T": "bfloat16"}, rng)
    arrays = {name: to_gpu(array) for name, array in another.arrays.items()}
    with fi_ffi.capture(stream, into=graph):
        for _ in range(2):
            fi_ffi.rmsnorm(**{name: array.desc() for name, array in arrays.items()})
    assert graph.updates == updates + 1, "the same kernels with other addresses"
    graph.launch(stream)
    settle(stream)
    assert another.error("out", arrays["out"].get())[1] <= 1


def test_a_graph_of_another_shape(chain, stream):
    calls = chain[-1]
    with fi_ffi.capture(stream) as graph:
        calls()
    with fi_ffi.capture(stream, into=graph):
        for _ in range(5):
            calls()
    assert (graph.nodes, graph.updates) == (10, 0)
    check(chain, graph, stream)


@pytest.mark.parametrize("how", ["prepared", "entry"])
def test_other_calls_are_recorded(how, chain, stream):
    _, arrays, _, _ = chain
    descs = {name: array.desc() for name, array in arrays.items()}
    call = fi_ffi.rmsnorm.prepare(**descs)
    if how == "entry":
        call = partial(fi_ffi.module("norm").rmsnorm, *descs.values(), 1e-6, False)
    with fi_ffi.stream(stream):
        call()
    settle(stream)
    poison(arrays["out"])
    with fi_ffi.capture(stream) as graph:
        for _ in range(100):
            call()
    assert graph.nodes == 100
    assert np.isnan(arrays["out"].get().astype(float)).all(), "recorded, and not made"
    check(chain, graph, stream)


def test_an_exception_inside(chain, stream):
    calls = chain[-1]
    with fi_ffi.capture(stream) as graph:
        calls()
    block = fi_ffi.capture(stream, into=graph)
    block.__enter__()
    calls()
    block.__exit__(RuntimeError, RuntimeError("mine"), None)
    check(chain, graph, stream)  # what it was before
    with fi_ffi.stream(stream):  # and the stream is no longer recording
        calls()
    settle(stream)


def test_a_plan_in_a_block_is_refused(stream):
    indptr, last = np.array([0, 1], np.int32), np.array([3], np.int32)
    options = {"num_qo_heads": 8, "num_kv_heads": 8, "head_dim": 128, "page_size": 16}
    match = "plan before the capture"
    with fi_ffi.capture(stream), pytest.raises(fi_ffi.ArgumentError, match=match):
        fi_ffi.BatchDecodePlan(
            indptr, np.zeros(1, np.int32), last, **options, q_data_type="float16", stream=stream
        )


def test_what_is_let_go_in_a_block_does_not_spoil_it(chain, stream):
    """The graph of that name before, events, memory: CUDA forbids to free while it records."""
    calls = chain[-1]
    device = fi_ffi.parse_device("cuda:0")
    with fi_ffi.stream(stream):
        calls()
    for _ in range(3):
        held = [cuda.Event(), cuda.allocate(1000, device), cuda.allocate_page_locked(1000, device)]
        held.append(fi_ffi.Workspace.allocate("cuda:0", 1 << 20, 1 << 20))
        held[0].record(stream)
        settle(stream)
        with fi_ffi.capture(stream) as graph:  # lets go of the one before, after the first time
            calls()
            held.clear()
            calls()
        assert graph.nodes == 4
        check(chain, graph, stream)
