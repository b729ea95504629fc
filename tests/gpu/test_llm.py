"""examples/llm on a GPU: the tests of tests/llm, the small kernels, and graphs."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import numpy as np
import pytest
from engine import Sampling
from engine.device import Gpu, columns, rows

import fi_ffi
from fi_ffi.ops.functions import OPS

from tests.llm import conftest, test_glue, test_logits, test_serve, test_serving
from tests.llm.serving import KINDS
from tests.llm.test_glue import FLOATS, TEXT

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
    gdn = OPS["gdn_prefill"].row.module_on((9, 0))
    for module in ("norm", "page", "rope", "silu_and_mul", "sampling", gdn):
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


class Products:
    """A device of a dtype, tensors whose rows lie apart, and results that were NaN before."""

    def __init__(self, dtype, rng):
        self.device, self.kind, self.rng = Gpu(dtype), FLOATS[dtype], rng

    def drawn(self, count, width, more=0, scale=1.0):
        """Random rows on the device, with `more` numbers between them; and as float64."""
        wide = (self.rng.standard_normal((count, width + more)) * scale).astype(self.kind)
        return columns(self.device.put(wide), 0, width), wide[:, :width].astype(np.float64)

    def out(self, count, width, dtype):
        """Room for a row and 8 columns more than `count` by `width`."""
        whole = self.device.put(np.full((count + 1, width + 8), np.nan, dtype))
        return whole, columns(rows(whole, 0, count), 0, width)

    def result(self, whole, count, width):
        """What was written, as float64; that nothing else was."""
        got = self.device.get(whole).astype(np.float64)
        assert np.isnan(got[count:]).all()
        assert np.isnan(got[:, width:]).all()
        return got[:count, :width]


@pytest.fixture
def products(request, machine, rng):
    pytest.importorskip("nvmath", reason="nvmath-python is not installed: fi-ffi[llm-gpu]")
    made = Products(request.node.callspec.params["dtype"], rng)
    yield made
    made.device.close()


def _half_step(dtype):
    return {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24}[dtype]


@TEXT
@pytest.mark.parametrize("to", ["the same", "float32"])
@pytest.mark.parametrize("count", [1, 3, 8, 9])
@pytest.mark.parametrize(
    "size", [(16, 128), (48, 384), (4096, 2176), (32, 14336), (257, 128), (64, 72)], ids=str
)
def test_products(dtype, to, count, size, products):
    """Of few rows and of many, and of sizes that are cuBLAS's alone."""
    (width, inner), to = size, dtype if to == "the same" else to
    x, xs = products.drawn(count, inner, 8)
    weight, ws = products.drawn(width, inner)
    whole, out = products.out(count, width, np.float32 if to == "float32" else products.kind)
    products.device.linear(out, x, weight)
    got, exact = products.result(whole, count, width), xs @ ws.T
    bound = _half_step(to) * np.abs(exact) + 2.0**-18 * (np.abs(xs) @ np.abs(ws.T))
    assert (np.abs(got - exact) <= bound).all()
    assert products.device.is_few(x, weight) == (
        count <= 8 and width % 16 == 0 and inner % 128 == 0
    )


@TEXT
@pytest.mark.parametrize("count", [1, 5, 8])
@pytest.mark.parametrize("size", [(8, 128), (40, 384), (3072, 2176)], ids=str)
def test_products_gated(dtype, count, size, products):
    width, inner = size
    x, xs = products.drawn(count, inner, 8, inner**-0.5)
    weight, ws = products.drawn(2 * width, inner)
    whole, out = products.out(count, width, products.kind)
    products.device.linear_silu(out, x, weight)
    got = products.result(whole, count, width)
    gate, up = np.split(xs @ ws.T, 2, axis=1)
    near_gate, near_up = np.split(2.0**-18 * (np.abs(xs) @ np.abs(ws.T)), 2, axis=1)
    exact = gate / (1 + np.exp(-gate)) * up
    bound = (_half_step(dtype) + 2.0**-18) * np.abs(exact)
    bound += 1.1 * near_gate * (np.abs(up) + near_up) + np.abs(gate) * near_up
    bound += 2.0**-25  # half a step of float16 near 0
    assert (np.abs(got - exact) <= bound).all()


@TEXT
def test_a_row_does_not_depend_on_the_others(dtype, products):
    """Of few rows: to the bit."""
    x, _ = products.drawn(8, 4224)
    weight, _ = products.drawn(1024, 4224)
    together, alone = (products.device.empty((n, 1024), "float32") for n in (8, 1))
    products.device.linear(together, x, weight)
    got = products.device.get(together)
    for i in range(8):
        products.device.linear(alone, rows(x, i, i + 1), weight)
        assert np.array_equal(products.device.get(alone)[0], got[i])


@TEXT
def test_products_one_after_another_in_a_graph(dtype, products):
    """Each waits for the one before, although it may begin earlier."""
    device = products.device
    x, xs = products.drawn(2, 2048)
    weights = [products.drawn(2048, 2048, 0, 2048**-0.5) for _ in range(6)]
    steps = [device.empty((2, 2048), dtype) for _ in weights]
    with device.scope():
        with fi_ffi.capture(device.stream) as graph:
            for out in steps:
                device.zero(out)
            for (weight, _), source, out in zip(weights, [x, *steps], steps, strict=False):
                device.linear(out, source, weight)
        for _ in range(20):
            fresh = products.rng.standard_normal(xs.shape).astype(products.kind)
            device.write(x, fresh)
            graph.launch()
            sources = [fresh, *(device.get(out) for out in steps)]
            for (_, ws), source, got in zip(weights, sources, sources[1:], strict=False):
                source = source.astype(np.float64)
                exact, sizes = source @ ws.T, np.abs(source) @ np.abs(ws.T)
                bound = _half_step(dtype) * np.abs(exact) + 2.0**-18 * sizes
                assert (np.abs(got.astype(np.float64) - exact) <= bound).all()


@pytest.mark.parametrize("heads", [(4, 4), (8, 2), (6, 1), (8, 1)], ids=str)
def test_heads_that_share_a_key_head(serve, heads, where):
    """Decoding on CUDA cores and on tensor cores, in graphs."""
    query, key = heads
    serving = serve("qwen3", num_attention_heads=query, num_key_value_heads=key)
    engine = serving.engine()
    some = Sampling(max_tokens=24, ignore_eos=True)
    requests = [engine.submit(serving.prompt(n), some) for n in (3, 90, 17)]
    engine.run()
    assert engine.steps.graphs
    assert all(serving.error(request) <= 1 for request in requests)
