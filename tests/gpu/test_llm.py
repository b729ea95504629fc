"""examples/llm on a GPU: the tests of tests/llm, the small kernels, and graphs."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import numpy as np
import pytest
from engine import Sampling
from engine.device import Gpu
from llm import conftest, test_glue, test_logits, test_serve, test_serving
from llm.serving import KINDS

import fi_ffi

serve, served = conftest.serve, test_serve.served

# Those that are of the host alone.
_HOST = ("test_pages_by_themselves", "test_begun", "test_wrong_parameters", "_compiles_the_kernels")
for _module in (test_glue, test_logits, test_serve, test_serving):
    for _name, _test in inspect.getmembers(_module, inspect.isfunction):
        if _name.startswith("test_") and not _name.endswith(_HOST):
            globals()[_name] = _test


@pytest.fixture
def where(machine):
    pytest.importorskip("nvmath", reason="nvmath-python is not installed: fi-ffi[llm-gpu]")
    for module in ("norm", "page", "rope", "silu_and_mul", "sampling", "gdn_prefill_sm90"):
        machine.need(module)
    return "cuda:0"


@pytest.fixture
def on(request):
    """The small kernels on the GPU, with memory whose every byte was 0xFF."""
    pytest.importorskip("nvmath", reason="nvmath-python is not installed: fi-ffi[llm-gpu]")
    callspec = getattr(request.node, "callspec", None)
    device = Gpu(callspec.params.get("dtype", "float16") if callspec else "float16")

    def placed(x):
        if not isinstance(x, np.ndarray):
            return x, None
        # The whole of what a view is of, so that steps between rows are what they were.
        whole = x if x.base is None else x.base
        there = device.put(np.ascontiguousarray(whole))
        offset = x.ctypes.data - whole.ctypes.data
        strides = [step // x.itemsize for step in x.strides]
        return fi_ffi.TensorDesc(there.ptr + offset, x.shape, str(x.dtype), strides=strides,
                                 device=device.name), there  # fmt: skip

    def run(name, args):
        sent = [placed(x) for x in args]
        grid, block = _grid(name, args)
        device.launch(name, grid, block, *(desc for desc, _ in sent))
        for x, (_, there) in zip(args, sent, strict=True):
            if there is not None:
                whole = x if x.base is None else x.base
                whole[...] = device.get(there)

    yield SimpleNamespace(run=run)
    device.close()


def _grid(name, args):
    """As the engine launches each."""
    if name in ("take", "give"):
        return (1, len(args[2])), 256
    if name == "resolve":
        return (1, 1), 256
    if name == "convolve":
        return (-(-args[8] // 256), len(args[4])), 256
    if name == "decays":
        return (-(-args[5] * args[6] // 256), 1), 256
    if name == "gated":
        return (-(-args[3] // 256), len(args[0])), 256
    return (len(args[0]), 1), 1024


@pytest.mark.parametrize("kind", KINDS)
def test_graphs_give_the_bits_of_eager_calls(serve, kind, where):
    """The same batches, grown and shrunk, with graphs and without."""
    serving = serve(kind)
    prompts = [serving.prompt(n) for n in (3, 30, 17, 50, 9)]
    lengths = (5, 30, 20, 12, 26)
    got = []
    for use_graphs in (True, False):
        engine = serving.engine(use_graphs=use_graphs)
        requests = [
            engine.submit(p, Sampling(seed=i, max_tokens=n, ignore_eos=True))
            for i, (p, n) in enumerate(zip(prompts, lengths, strict=True))
        ]
        engine.run()
        assert bool(engine.steps.graphs) == use_graphs
        got.append(requests)
    for one, two in zip(*got, strict=True):
        assert one.tokens == two.tokens
        assert np.array_equal(serving.logits[one], serving.logits[two])
        assert serving.error(one) <= 1


def test_graphs_over_other_requests(serve, where):
    """A recorded size serves other requests, longer ones, other slots and pages."""
    serving = serve("qwen3")
    engine = serving.engine(max_batch=4)
    for lengths in ((5, 9), (100, 3), (40, 200)):
        requests = [
            engine.submit(serving.prompt(n), Sampling(max_tokens=25, ignore_eos=True))
            for n in lengths
        ]
        engine.run()
        assert all(serving.error(request) <= 1 for request in requests)
    assert set(engine.steps.graphs) == {2} | ({1} & set(engine.steps.graphs))


def test_the_gpu_is_not_waited_for(serve, where):
    """A step is queued before the one before it has been read."""
    serving = serve("llama")
    engine = serving.engine()
    engine.steps.on_logits = None
    request = engine.submit(serving.prompt(5), Sampling(max_tokens=30, ignore_eos=True))
    for _ in range(6):
        engine.step()
        assert request.drawn == len(request.tokens) + 1
    engine.run()
    assert len(request.tokens) == 30
