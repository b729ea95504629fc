"""A CUDA graph of 100 captured rmsnorm calls: what one replay costs the host."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import fi_ffi
from fi_ffi import TensorDesc
from marks.bench import Bench
from marks.norms import HIDDEN, ROWS, Norm, checked
from marks.report import Line
from marks.timing import Side, repeated, with_turns

CALLS = 100
_MANY = 4


def replay(bench: Bench) -> Iterator[Line]:
    """Both with the same kernels, of rows of one input each; one replay, then it is awaited."""
    norm, torch = Norm(bench.gpu, CALLS * ROWS, HIDDEN), bench.peers.need("torch")
    flashinfer = bench.peers.flashinfer(fi_ffi.rmsnorm.row.module)
    graph, theirs = _captured(bench, norm), _captured_by_torch(torch, flashinfer, norm)
    stream, launch = bench.gpu.stream, graph.launch

    def launches(turns: list[None]) -> None:
        for _ in turns:
            launch(stream)

    mine = with_turns(launches, [None])
    sides = [
        Side("replay", mine, checked([norm], functools.partial(mine, 1))),
        Side("torch.cuda.CUDAGraph.replay", repeated(theirs), checked([norm], theirs)),
    ]
    for key, what, chunk in (
        ("graph", "", 1),
        ("", f"the same, {_MANY} replays before they are awaited", _MANY),
    ):
        figure, peer = bench.measure(sides, bench.less(4, chunk)).values()
        yield Line(key, figure, peer, what)


def _captured(bench: Bench, norm: Norm) -> fi_ffi.Graph:
    """Prepared calls in a graph."""
    stream, size = bench.gpu.stream, ROWS * HIDDEN * 2
    out, x, weight = norm.descs
    calls = []
    for i in range(CALLS):
        rows = [TensorDesc(d.ptr + i * size, (ROWS, HIDDEN), "float16") for d in (out, x)]
        calls.append(fi_ffi.prepare(fi_ffi.rmsnorm, *rows, weight, norm.eps, False))
    with fi_ffi.stream(stream):
        calls[0]()  # what is loaded or set up at first is not part of the graph
    bench.gpu.settle()
    with fi_ffi.capture(stream) as graph:
        for call in calls:
            call()
    assert graph.nodes == CALLS, f"{graph.nodes} nodes of {CALLS} calls"
    return graph


def _captured_by_torch(torch: Any, flashinfer: Any, norm: Norm) -> Callable[[], object]:
    out, x, weight = norm.tensors
    outs, inputs = out.split(ROWS), x.split(ROWS)
    flashinfer.rmsnorm(inputs[0], weight, norm.eps, outs[0], False)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        for one, rows in zip(outs, inputs, strict=True):
            flashinfer.rmsnorm(rows, weight, norm.eps, one, False)
    replay: Callable[[], object] = graph.replay
    return replay
