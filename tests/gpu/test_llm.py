"""examples/llm on a GPU: the tests of tests/llm, the small kernels, and graphs."""

from __future__ import annotations

import inspect
import json
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from engine import Sampling, load
from engine.device import Gpu, columns, view
from engine.products import Norm
from engine.weights import Blocks
from tiny import make_tiny

import fi_ffi
from fi_ffi.cli.cuda import gpus

from tests.helpers.children import ROOT, done, environment
from tests.llm import (
    conftest,
    test_client,
    test_glue,
    test_host,
    test_hostile,
    test_logits,
    test_processors,
    test_ranks,
    test_scheduling,
    test_serve,
    test_serving,
    test_structured,
)
from tests.llm.serving import KINDS
from tests.llm.test_glue import FLOATS, TEXT
from tests.llm.test_logits import FAULTS
from tests.llm.test_processors import log_softmax

serve, served = conftest.serve, test_serve.served
servers, server, client = conftest.servers, test_client.server, test_client.client
target, own = test_hostile.target, test_hostile.own
hosted, hosts = test_host.hosted, test_host.hosts
test_texts_with_and_without_preemption = test_scheduling.test_texts_with_and_without_preemption
structured, asks = test_structured.structured, test_structured.asks

# Those that are of the host alone.
_HOST = (
    "test_pages_by_themselves", "test_begun", "test_wrong_parameters", "_compiles_the_kernels",
    "_make_up_the_whole", "_that_ranks_share", "_share_of_bytes", "_rows_of_the_file",
    "_does_not_divide", "_ranks_than_gpus", "_that_ray_gives",
    "test_wrong_numbers", "test_checkpoints_that_lie", "_as_there_is_memory_for",
)  # fmt: skip
for _module in (
    test_client, test_glue, test_host, test_hostile, test_logits, test_processors, test_ranks,
    test_serve, test_serving, test_structured,
):  # fmt: skip
    for _name, _test in inspect.getmembers(_module, inspect.isfunction):
        if _name.startswith("test_") and not _name.endswith(_HOST):
            globals()[_name] = _test


# What kinds of models need besides.
_NEEDS = {
    "fp8": "fp8_blockscale_gemm_90", "moe": "fused_moe_90", "gpt_oss": "fused_moe_90",
    "mixtral": "fused_moe_90", "qwen3_next": "fused_moe_90", "gemma3": "gelu_tanh_and_mul",
}  # fmt: skip


# Fixtures whose engines run in other threads or processes, where no test sees what they raise.
_APART = {"asks", "hosted", "own", "served", "server", "target"}
_ONE_EACH = ('"threads"', '"ray"', '"--tp"')  # ranks that cannot share a GPU, or do not


@pytest.fixture(scope="session")
def tried(tmp_path_factory):
    """A llama has drawn tokens in this thread: a kernel module that its kind lacks skips tests."""
    model = make_tiny(tmp_path_factory.mktemp("tried"), "llama", num_hidden_layers=1)
    engine = load(model, "cuda:0", num_pages=64, max_batch=8)
    try:
        engine.submit([1, 2, 3], Sampling(top_k=5, top_p=0.9, max_tokens=4, ignore_eos=True))
        engine.run()
    finally:
        engine.close()


@pytest.fixture
def where(request, machine):
    pytest.importorskip("nvmath", reason="nvmath-python is not installed: fi-ffi[llm-gpu]")
    callspec = getattr(request.node, "callspec", None)
    drawn = [*map(str, callspec.params.values())] if callspec else []
    drawn = " ".join([*drawn, *(FAULTS[name][0] for name in drawn if name in FAULTS)])
    drawn += inspect.getsource(request.function).partition("def ")[2]  # without other cases
    more = [module for word, module in _NEEDS.items() if word in drawn]
    for module in ("norm", "page", "rope", "silu_and_mul", "sampling", *more):
        machine.need(module)
    if "qwen3_next" in drawn and not (found := fi_ffi.gdn_prefill.supports()):
        pytest.skip(found.reason)  # the module's name depends on the release
    if _APART.intersection(request.fixturenames):
        request.getfixturevalue("tried")
    return "cuda:0"


@pytest.fixture
def split(serve, machine, request):
    """As in tests/llm/test_ranks.py; processes share GPUs where there are too few."""
    size = request.node.callspec.params.get("size", 2) if hasattr(request.node, "callspec") else 2
    count = len(gpus())
    if count < size and any(way in inspect.getsource(request.function) for way in _ONE_EACH):
        pytest.skip(f"needs {size} GPUs")
    for module in ("trtllm_comm", "vllm_comm"):
        machine.need(module)

    def make(kind, **changes):
        made = serve(kind, **test_ranks.SIZES.get(kind, {}) | changes)
        made.options["gpus"] = min(count, size)
        return made

    return make


def test_graphs_of_two_ranks(split, where):
    """Sizes of batch that come and go: recorded on both, and as right as eager calls."""
    serving = split("llama")
    prompts = [serving.prompt(n) for n in (3, 30, 17, 50, 9)]
    lengths = (5, 30, 20, 12, 26)
    for use_graphs in (True, False):
        engine = serving.engine(use_graphs=use_graphs, tp=2, way="processes")
        requests = [
            engine.submit(p, Sampling(seed=i, max_tokens=n, ignore_eos=True))
            for i, (p, n) in enumerate(zip(prompts, lengths, strict=True))
        ]
        engine.run()
        assert bool(engine.runner.graphs) == use_graphs
        assert all(serving.error(request) <= 1 for request in requests)


@pytest.fixture
def machines():
    """Ray over two nodes with a GPU each and host names of their own, which make them two machines
    to fi_ffi and to NCCL: the settings of a process that uses it.
    """
    pytest.importorskip("ray", reason="ray is not installed")
    if subprocess.run(["unshare", "--uts", "hostname", "fi-ffi"], check=False).returncode:
        pytest.skip("unshare --uts, which needs root, may not change the host's name")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = tempfile.TemporaryDirectory()  # a short path: it holds sockets
    settings = {"RAY_ADDRESS": f"127.0.0.1:{port}", "RAY_USAGE_STATS_ENABLED": "0",
                "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32),
                "RAY_TMPDIR": folder.name}  # fmt: skip
    head = ["--head", f"--port={port}", "--include-dashboard=false"]
    nodes = []
    try:
        for gpu, role in enumerate((head, [f"--address=127.0.0.1:{port}"])):
            start = ["ray.scripts.scripts", "start", "--block", "--num-cpus=2", "--num-gpus=1"]
            renamed = ["unshare", "--uts", "sh", "-c", f'hostname machine-{gpu} && exec "$@"', ""]
            command = [*renamed, sys.executable, "-m", *start, *role]
            nodes.append(
                subprocess.Popen(
                    command, env=environment(CUDA_VISIBLE_DEVICES=str(gpu), **settings)
                )
            )
            _reached(port)
        yield settings
    finally:
        for node in reversed(nodes):
            node.terminate()
            node.wait(60)
        folder.cleanup()


def _reached(port):
    end = time.monotonic() + 60
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port)).close()
        except ConnectionRefusedError:
            assert time.monotonic() < end
            time.sleep(0.2)


ON_MACHINES = """
    import json
    import sys

    folder, path, where, prompts = sys.argv[1:]
    sys.path.insert(0, folder)
    from engine import Sampling, load

    engine = load(path, where, num_pages=64, max_batch=8, tp=2, way="ray")
    some = Sampling(temperature=0, logprobs=1, max_tokens=12, ignore_eos=True)
    requests = [engine.submit(prompt, some) for prompt in json.loads(prompts)]
    engine.run()
    engine.close()
    told = [([value for value, *_ in x.logprobs], x.tokens) for x in requests]
    print(json.dumps(told))
"""


@pytest.mark.timeout(300)
def test_actors_on_two_machines(split, machines, where):
    """Sums by NCCL: greedy tokens, and their log probabilities, are those of the float64 model."""
    serving = split("llama")
    prompts = [serving.prompt(n) for n in (7, 30)]
    given = [str(ROOT / "examples" / "llm"), str(serving.path), where, json.dumps(prompts)]
    status, out, err = done(ON_MACHINES, *given, seconds=240, **machines)
    assert status == 0, err[-3000:]
    for prompt, (told, tokens) in zip(prompts, json.loads(out.splitlines()[-1]), strict=True):
        rows, near = serving.expected(prompt, tokens)
        assert len(told) == len(tokens) == 12
        for row, error, token, value in zip(rows, 10 * near, tokens, told, strict=True):
            assert row.max() - row[token] <= error
            assert abs(value - log_softmax(row)[token]) <= error


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
        threads, block = _threads(name, args)
        device.launch(name, threads, *(desc for desc, _ in sent), block=block)
        for x, (_, there) in zip(args, sent, strict=True):
            if there is not None:
                whole = x if x.base is None else x.base
                whole[...] = device.get(there)

    yield SimpleNamespace(run=run)
    device.close()


def _threads(name, args):
    """As the engine launches each: threads along x and rows of them; and those of a block."""
    if name in ("take", "give"):
        return (args[5 if name == "take" else 4], len(args[2])), 256
    if name == "joined":
        return (args[3], len(args[0])), 256
    if name == "convolve":
        return (args[8], len(args[4])), 256
    if name == "decays":
        return (args[5] * args[6], 1), 256
    if name == "combined":
        return (args[3], len(args[0])), 256
    if name == "place":
        threads = args[17] // 8 * (args[15] + 2 * args[16]) if args[14] else 128
        return (threads, len(args[7])), 128
    if name == "merged":
        return (128 * args[0].shape[1], len(args[0])), 128
    if name == "penalise":
        return (args[6], len(args[0])), 256
    if name in ("count", "add"):
        return (args[3], 1), 256
    if name == "allow":
        return (args[3], len(args[1])), 256
    if name == "draw":
        return (32 * 1024, len(args[0])), 1024
    block = 32 if name == "route" else 1024
    return (block, len(args[0])), block


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
        assert bool(engine.runner.graphs) == use_graphs
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
    sizes = {size for size, *_ in engine.runner.graphs}
    assert sizes == {2} | ({1} & sizes)


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

    def in_fp8(self, width, inner):
        """A matrix in fp8 on the device, with scales of its blocks; and as float64."""
        values = self.rng.standard_normal((width, inner)) * 100
        values = values.clip(-448, 448).astype(ml_dtypes.float8_e4m3fn)
        grid = -(-width // 128), inner // 128
        scales = (self.rng.uniform(0.5, 2, grid) / 100).astype(np.float32)
        wide = np.kron(scales.astype(np.float64), np.ones((128, 128)))[:width]
        return self.device.put(Blocks(values, scales)), values.astype(np.float64) * wide

    def out(self, count, width, dtype):
        """Room for a row and 8 columns more than `count` by `width`."""
        whole = self.device.put(np.full((count + 1, width + 8), np.nan, dtype))
        return whole, columns(whole.rows(0, count), 0, width)

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
@pytest.mark.parametrize("to", ["the same", "float32"])
@pytest.mark.parametrize("count", [1, 3, 8])
@pytest.mark.parametrize("size", [(16, 128), (192, 384), (4096, 2176), (256, 14336)], ids=str)
def test_products_with_weights_in_fp8(dtype, to, count, size, products):
    """Of few rows, which are not rounded to fp8; numbers below the normal ones are among them."""
    (width, inner), to = size, dtype if to == "the same" else to
    x, xs = products.drawn(count, inner, 8)
    weight, ws = products.in_fp8(width, inner)
    whole, out = products.out(count, width, np.float32 if to == "float32" else products.kind)
    products.device.linear(out, x, weight)
    got, exact = products.result(whole, count, width), xs @ ws.T
    bound = _half_step(to) * np.abs(exact) + 2.0**-18 * (np.abs(xs) @ np.abs(ws.T))
    assert (np.abs(got - exact) <= bound).all()


@TEXT
@pytest.mark.parametrize("count", [1, 5, 8])
@pytest.mark.parametrize(
    ("width", "inner", "weights"),
    [(8, 128, "16 bits"), (40, 384, "16 bits"), (3072, 2176, "16 bits"),
     (128, 128, "fp8"), (3072, 2176, "fp8")],
)  # fmt: skip
def test_products_gated(dtype, count, width, inner, weights, products):
    x, xs = products.drawn(count, inner, 8, inner**-0.5)
    of_weights = products.in_fp8 if weights == "fp8" else products.drawn
    weight, ws = of_weights(2 * width, inner)
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
@pytest.mark.parametrize("size", [(16, 128), (192, 384), (256, 14336)], ids=str)
@pytest.mark.parametrize(
    ("count", "weights"),
    [(1, "16 bits"), (3, "16 bits"), (8, "16 bits"), (9, "16 bits"), (1, "fp8"), (8, "fp8")],
)
def test_products_onto_what_is_there(dtype, size, count, weights, products):
    """Rounded once, except perhaps by cuBLAS."""
    width, inner = size
    x, xs = products.drawn(count, inner, 8)
    of_weights = products.in_fp8 if weights == "fp8" else products.drawn
    weight, ws = of_weights(width, inner)
    host = np.full((count + 1, width + 8), np.nan, products.kind)
    host[:count, :width] = products.rng.standard_normal((count, width)) * 30
    whole, before = products.device.put(host), host[:count, :width].astype(np.float64)
    out = columns(whole.rows(0, count), 0, width)
    products.device.linear(out, x, weight, adds=True)
    got, exact = products.result(whole, count, width), before + xs @ ws.T
    bound = 2.0**-18 * (np.abs(xs) @ np.abs(ws.T)) + 2.0**-22 * np.abs(before)
    rounded = np.abs(exact) + (np.abs(xs @ ws.T) if count > 8 else 0)
    assert (np.abs(got - exact) <= _half_step(dtype) * rounded + bound).all()


@TEXT
def test_copies(dtype, products):
    """To the GPU and back: of a few words, of odd bytes, and of more."""
    device = products.device
    for size in (4, 12, 36, 5, 16384, 16388, 100_000):
        host, back = (device.pinned((size,), "uint8") for _ in range(2))
        values = products.rng.integers(0, 256, size, np.uint8)
        np.asarray(host)[:], np.asarray(back)[:] = values, ~values
        there = device.empty((size + 64,), "uint8")
        device.write(there, np.full(size + 64, 7, np.uint8))
        device.copy(there.rows(0, size), host)
        device.copy(back, there.rows(0, size))
        device.wait(device.mark())
        assert (np.asarray(back) == values).all()
        assert (device.get(there)[size:] == 7).all()


@TEXT
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("inner", [128, 384, 2176])
@pytest.mark.parametrize("weights", ["16 bits", "fp8"])
@pytest.mark.parametrize("is_gated", [False, True])
def test_products_of_norms(dtype, count, inner, weights, is_gated, products):
    device, width = products.device, 256
    x, xs = products.drawn(count, inner, 8, 3.0)
    norm = device.put((1 + products.rng.standard_normal(inner) * 0.1).astype(products.kind))
    of_weights = products.in_fp8 if weights == "fp8" else products.drawn
    weight, ws = of_weights(width, inner)
    given = Norm(x, norm, 1e-5)
    whole, out = products.out(count, width // (1 + is_gated), products.kind)
    (device.linear_silu if is_gated else device.linear)(out, given, weight)
    got = products.result(whole, count, width // (1 + is_gated))
    normed = xs / np.sqrt((xs**2).mean(1, keepdims=True) + 1e-5)
    # Each number of the norm is rounded.
    normed = normed * device.get(norm).astype(np.float64)
    exact, sizes = normed @ ws.T, np.sqrt(normed**2 @ ws.T**2)
    near = 8 * _half_step(dtype) * sizes + 1e-6  # rounded each by chance
    if is_gated:
        (gate, up), (near_gate, near_up) = (np.split(part, 2, axis=1) for part in (exact, near))
        exact = gate / (1 + np.exp(-gate)) * up
        near = 1.1 * near_gate * (np.abs(up) + near_up) + np.abs(gate) * near_up
    assert (np.abs(got - exact) <= near + _half_step(dtype) * np.abs(exact)).all()


@TEXT
def test_a_row_does_not_depend_on_the_others(dtype, products):
    """Of few rows: to the bit."""
    x, _ = products.drawn(8, 4224)
    weight, _ = products.drawn(1024, 4224)
    together, alone = (products.device.empty((n, 1024), "float32") for n in (8, 1))
    products.device.linear(together, x, weight)
    got = products.device.get(together)
    for i in range(8):
        products.device.linear(alone, x.rows(i, i + 1), weight)
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


@TEXT
@pytest.mark.parametrize("count", [3, 40])
def test_products_after_norms_in_a_graph(dtype, count, products, monkeypatch):
    """FlashInfer's kernel makes way at its end: what follows begins before that."""
    device, hastened = products.device, []
    x, xs = products.drawn(count, 2048)
    norm, ns = products.drawn(1, 2048)
    weights = [products.drawn(2048, 2048, 0, 2048**-0.5) for _ in range(4)]
    normed, steps = ([device.empty((count, 2048), dtype) for _ in weights] for _ in "ns")
    taken = device.empty((count, 2048), dtype)
    index = device.put(np.arange(count, dtype=np.int32)[::-1].copy())
    hasten = device._hasten
    monkeypatch.setattr(device, "_hasten", lambda: hastened.append(hasten()) or hastened[-1])
    with device.scope():
        for out, (weight, _) in zip(steps, weights, strict=True):  # cuBLAS loads what it needs
            device.linear(out, x, weight)
        with fi_ffi.capture(device.stream) as graph:
            device.is_frozen = True
            for source, out, to, (weight, _) in zip(
                [x, *steps], normed, steps, weights, strict=False
            ):
                fi_ffi.rmsnorm(out, source, view(norm, 2048), 1e-5)
                device.linear(to, out, weight)
            device.take(taken, steps[-1], index)  # after cuBLAS or a kernel of the engine's
        device.is_frozen = False
        assert hastened == ([True] * 4 + [False] if count <= 8 else [True])
        for _ in range(20):
            fresh = products.rng.standard_normal(xs.shape).astype(products.kind)
            for there in (*normed, *steps, taken):
                device.zero(there)
            device.write(x, fresh)
            graph.launch()
            sources = [fresh, *map(device.get, steps)]
            for (_, ws), source, mid, got in zip(
                weights, sources, map(device.get, normed), sources[1:], strict=False
            ):
                source, mid = source.astype(np.float64), mid.astype(np.float64)
                exact = source / np.sqrt((source**2).mean(1, keepdims=True) + 1e-5) * ns
                near = 1.1 * _half_step(dtype) * np.abs(exact) + 2.0**-25  # float16's least step
                assert (np.abs(mid - exact) <= near).all()
                exact, sizes = mid @ ws.T, np.abs(mid) @ np.abs(ws.T)
                bound = _half_step(dtype) * np.abs(exact) + 2.0**-18 * sizes
                assert (np.abs(got.astype(np.float64) - exact) <= bound).all()
            assert np.array_equal(device.get(taken), sources[-1][::-1])


@pytest.mark.parametrize("heads", [(4, 4), (8, 2), (6, 1), (8, 1)], ids=str)
def test_heads_that_share_a_key_head(serve, heads, where):
    """Decoding on CUDA cores and on tensor cores, in graphs."""
    query, key = heads
    serving = serve("qwen3", num_attention_heads=query, num_key_value_heads=key)
    engine = serving.engine()
    some = Sampling(max_tokens=24, ignore_eos=True)
    requests = [engine.submit(serving.prompt(n), some) for n in (3, 90, 17)]
    engine.run()
    assert engine.runner.graphs
    assert all(serving.error(request) <= 1 for request in requests)


def test_pages_fill_the_memory_that_is_left(serve, where):
    """Up to as many as requests in all slots can have, which of a tiny model is less."""
    serving = serve("llama")
    engine = serving.engine(num_pages=None, max_batch=2)
    assert engine.pages.total == 2 * 2048 // engine.page_size
    device = engine.model.device
    free, total = device.cuda.cudaMemGetInfo()[1:]
    assert 0 <= device.fitting(1 << 20) << 20 < free <= total
    request = engine.submit(serving.prompt(40), Sampling(temperature=0, max_tokens=20))
    engine.run()
    assert serving.error(request) <= 1
