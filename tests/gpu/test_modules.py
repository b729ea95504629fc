"""`fi_ffi.module` on a GPU: FlashInfer's own entries and objects, with no row of ours."""

from __future__ import annotations

import re
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import fi_ffi
from fi_ffi.ops.functions import OPS
from fi_ffi.ops.modules import ModuleObject

from tests.helpers.cases import make_case

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
BF16 = np.dtype(ml_dtypes.bfloat16)
DECODE = (
    "single_decode_with_kv_cache_dtype_q_f16_dtype_kv_f16_dtype_o_f16_head_dim_qk_128_"
    "head_dim_vo_128_posenc_0_use_swa_False_use_logits_cap_False"
)
DOCS = Path(__file__).parents[2] / "docs" / "modules.md"


def module(name):
    try:
        return fi_ffi.module(name)
    except fi_ffi.KernelNotFoundError as error:
        pytest.skip(str(error).splitlines()[0])


def synchronise(stream=None):
    from cuda.bindings import runtime

    from fi_ffi.cli.cuda import check

    if stream is None:
        check(runtime.cudaDeviceSynchronize())
    else:
        check(runtime.cudaStreamSynchronize(stream))


def poisoned(shape, dtype):
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.full(size, 0xFF, np.uint8).view(dtype).reshape(shape)


def float64(array):
    return array.astype(np.float64)


def worst(got, expected, bound):
    """The largest error as a fraction of its bound; NaN where something was not written."""
    return float(np.max(np.abs(float64(got) - expected) / bound))


@pytest.fixture
def on_gpu(to_gpu, rng):
    """An rmsnorm case on the GPU."""
    case = make_case(OPS["rmsnorm"].row, {"n": 96, "h": 4096}, {"T": "bfloat16"}, rng)
    return case, {name: to_gpu(array) for name, array in case.arrays.items()}


def poison(array):
    from cuda.bindings import runtime

    from fi_ffi.cli.cuda import POISON, check

    check(runtime.cudaMemset(array.ptr, POISON, array.nbytes))
    synchronise()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("scoped", [False, True], ids=["argument", "scope"])
def test_rmsnorm_is_the_typed_op_s_bit_for_bit(dtype, scoped, rng, to_gpu, stream):
    entry = module("norm").rmsnorm
    case = make_case(OPS["rmsnorm"].row, {"n": 33, "h": 1024}, {"T": dtype}, rng)
    arrays = {name: to_gpu(array) for name, array in case.arrays.items()}
    typed = to_gpu(case.arrays["out"])
    x, weight = arrays["input"].desc(), arrays["weight"].desc()
    fi_ffi.rmsnorm(typed.desc(), x, weight, 1e-5, stream=stream)
    synchronise(stream)
    if scoped:
        with fi_ffi.stream(stream):
            entry(arrays["out"].desc(), x, weight, 1e-5, False)
    else:
        entry(arrays["out"].desc(), x, weight, 1e-5, False, stream=stream)
    synchronise(stream)
    got = arrays["out"].get()
    assert not np.isnan(float64(got)).any()
    assert got.tobytes() == typed.get().tobytes()
    assert all(array.intact() for array in arrays.values())


def test_tensor_objects(rng, to_gpu, stream):
    """layernorm takes Tensor objects, not views."""
    entry = module("norm").layernorm
    assert entry.signature.params.count("ffi.Tensor") == 4
    case = make_case(OPS["layernorm"].row, {"n": 33, "h": 1024}, {"T": "bfloat16"}, rng)
    arrays = {name: to_gpu(array) for name, array in case.arrays.items()}
    for _ in range(50):
        poison(arrays["out"])
        descs = [arrays[arg.name].desc() for arg in OPS["layernorm"].row.tensors]
        entry(*descs, case.scalars.get("eps", 1e-6), stream=stream)
    synchronise(stream)
    assert case.error("out", arrays["out"].get())[1] <= 1
    from fi_ffi.abi.objects import lent_count

    assert lent_count() == 0


def test_the_scope_s_stream_and_what_was_current_before(on_gpu, stream):
    from fi_ffi.abi import library
    from fi_ffi.abi._cffi import ffi

    def current():
        return int(ffi.cast("uintptr_t", library.lib.TVMFFIEnvGetStream(2, 0)))

    entry, (_, arrays) = module("norm").rmsnorm, on_gpu
    descs = [array.desc() for array in arrays.values()]
    before = current()
    entry(*descs, 1e-6, False, stream=stream)
    assert current() == before
    with fi_ffi.stream(stream):
        entry(*descs, 1e-6, False)
        assert current() == stream
        with pytest.raises(fi_ffi.KernelError):
            entry(*descs[:2], descs[0], 1e-6, False)  # a weight of rank 2
        assert current() == stream
    assert current() == before


def test_two_streams_are_two_streams(on_gpu, to_gpu, stream):
    """The input arrives after a queue of copies: the call on its stream waits, another's not."""
    from cuda.bindings import runtime

    from fi_ffi.cli.cuda import check

    entry, (case, arrays) = module("norm").rmsnorm, on_gpu
    late, size = to_gpu(case.arrays["input"]), 1 << 30
    big = [check(runtime.cudaMalloc(size)) for _ in range(2)]
    other = check(runtime.cudaStreamCreateWithFlags(runtime.cudaStreamNonBlocking))
    kind = runtime.cudaMemcpyKind.cudaMemcpyDeviceToDevice
    out, x, weight = arrays.values()
    seen = {}
    for name, launch_on in (("same", stream), ("other", int(other))):
        poison(x)
        poison(out)
        for _ in range(30):  # about 20 ms of work
            check(runtime.cudaMemcpyAsync(big[0], big[1], size, kind, stream))
        check(runtime.cudaMemcpyAsync(x.ptr, late.ptr, x.nbytes, kind, stream))
        entry(out.desc(), x.desc(), weight.desc(), 1e-6, False, stream=launch_on)
        synchronise(launch_on)
        seen[name] = out.get()
    for pointer in big:
        check(runtime.cudaFree(pointer))
    check(runtime.cudaStreamDestroy(other))
    assert case.error("out", seen["same"])[1] <= 1
    assert np.isnan(float64(seen["other"])).all(), "the control saw the late input"


def test_a_graph_captures_it(on_gpu, stream):
    entry, (case, arrays) = module("norm").rmsnorm, on_gpu
    descs = [array.desc() for array in arrays.values()]
    entry(*descs, 1e-6, False, stream=stream)  # loads the kernel
    synchronise(stream)
    expected = arrays["out"].get()
    poison(arrays["out"])
    with fi_ffi.capture(stream) as graph:
        entry(*descs, 1e-6, False)
    synchronise(stream)
    assert np.isnan(float64(arrays["out"].get())).all(), "recorded, and not made"
    for _ in range(3):
        poison(arrays["out"])
        graph.launch(stream)
        synchronise(stream)
        assert arrays["out"].get().tobytes() == expected.tobytes()
    assert case.error("out", expected)[1] <= 1


def test_host_tensors_are_refused_in_the_kernel_s_words(on_gpu, stream):
    entry, (case, arrays) = module("norm").rmsnorm, on_gpu
    out, x, weight = (array.desc() for array in arrays.values())
    host = case.arrays["input"].copy()
    for args in ((out, host, weight), (host, x, weight), (host, host, host[0])):
        with pytest.raises(fi_ffi.KernelError) as caught:
            entry(*args, 1e-6, False, stream=stream)
        assert caught.value.op == "norm.rmsnorm"
        assert "CUDA" in caught.value.message
    synchronise()
    assert np.isnan(float64(arrays["out"].get())).all()
    assert host.tobytes() == case.arrays["input"].tobytes()
    entry(out, x, weight, 1e-6, False, stream=stream)  # and the next call is fine
    synchronise(stream)
    assert case.error("out", arrays["out"].get())[1] <= 1


def test_what_is_refused_before(on_gpu, stream):
    entry, (_, arrays) = module("norm").rmsnorm, on_gpu
    out, x, weight = (array.desc() for array in arrays.values())
    other = fi_ffi.TensorDesc(x.ptr, x.shape, "bfloat16", device="cuda:1")
    with pytest.raises(fi_ffi.ArgumentError, match="stream"):
        entry(out, x, weight, 1e-6, False)
    with pytest.raises(fi_ffi.ArgumentError, match="the device of `0: DLTensor"):
        entry(out, other, weight, 1e-6, False, stream=stream)
    with pytest.raises(fi_ffi.ArgumentTypeError, match="`4: bool`"):
        entry(out, x, weight, 1e-6, 0, stream=stream)
    # Of several GPUs it is known that the stream is another's.
    with pytest.raises((fi_ffi.LoaderError, fi_ffi.ArgumentError)):
        entry(*[fi_ffi.TensorDesc(4096, (8, 8), "bfloat16", device="cuda:999")] * 3, 1e-6, False,
              stream=stream)  # fmt: skip
    synchronise()
    assert np.isnan(float64(arrays["out"].get())).all()


def test_kernels_of_another_architecture(sm87_wheel, tmp_path):
    import zipfile

    with zipfile.ZipFile(sm87_wheel) as archive:
        member = next(name for name in archive.namelist() if name.endswith("/page.so"))
        path = Path(archive.extract(member, tmp_path))
    entry = fi_ffi.module(path).append_paged_kv_cache  # its signature needs no GPU
    args = [fi_ffi.TensorDesc(4096, (4,), "float16")] * 9
    with pytest.raises(fi_ffi.ArchitectureError, match="sm_87"):
        entry(*args, 0, stream=0)


@pytest.mark.parametrize("kv_len", [1, 129, 4000])
@pytest.mark.parametrize("with_lse", [False, True])
def test_single_decode_is_the_typed_op_s_bit_for_bit(kv_len, with_lse, rng, to_gpu, stream):
    run = module(DECODE).run
    heads, kv_heads, dim = 8, 2, 128
    q = to_gpu(rng.standard_normal((heads, dim)).astype(np.float16))
    k, v = (to_gpu(rng.standard_normal((kv_len, kv_heads, dim)).astype(np.float16)) for _ in "kv")
    size = fi_ffi.single_decode_workspace_size(kv_len, heads, kv_heads, dim)
    outs = []
    for way in ("typed", "module"):
        tmp = to_gpu(poisoned((max(size, 1),), np.uint8))
        out = to_gpu(poisoned((heads, dim), np.float16))
        lse = to_gpu(poisoned((heads,), np.float32)) if with_lse else None
        told = None if lse is None else lse.desc()
        descs = [array.desc() for array in (q, k, v, tmp, out)]
        if way == "typed":
            fi_ffi.single_decode(*descs, told, stream=stream)
        else:
            run(*descs, told, 0, -1, None, 0.0, dim**-0.5, 1.0, 1e-4, stream=stream)
        synchronise(stream)
        outs.append(out.get().tobytes() + (b"" if lse is None else lse.get().tobytes()))
        assert not np.isnan(float64(out.get())).any()
    assert outs[0] == outs[1]


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("of_each", [False, True])
def test_softmax(temperature, of_each, rng, to_gpu, stream):
    entry = module("sampling").softmax
    logits = (4 * rng.standard_normal((7, 3000))).astype(np.float32)
    temperatures = rng.uniform(0.3, 2, 7).astype(np.float32)
    out = to_gpu(poisoned(logits.shape, np.float32))
    workspace = to_gpu(poisoned((1 << 20,), np.uint8))
    x, each = to_gpu(logits), to_gpu(temperatures)
    entry(workspace.desc(), x.desc(), out.desc(), each.desc() if of_each else None, temperature,
          False, stream=stream)  # fmt: skip
    synchronise(stream)
    scaled = float64(logits) / (float64(temperatures)[:, None] if of_each else temperature)
    expected = np.exp(scaled - scaled.max(-1, keepdims=True))
    expected /= expected.sum(-1, keepdims=True)
    assert worst(out.get(), expected, 2e-5 * expected + 1e-9) <= 1
    assert out.intact()


def test_sampling(rng, to_gpu, stream):
    """A row with one token that can be drawn has that token; the same seed draws the same."""
    entry = module("sampling").sampling_from_probs
    rows, vocabulary = 64, 1000
    wanted = rng.integers(0, vocabulary, rows)
    sure = np.zeros((rows, vocabulary), np.float32)
    sure[np.arange(rows), wanted] = 1

    def draw(probs, seed):
        out = to_gpu(poisoned((rows,), np.int32))
        valid = to_gpu(np.zeros(rows, np.bool_))
        entry(to_gpu(probs).desc(), out.desc(), valid.desc(), None, True, None, seed, None, 0,
              stream=stream)  # fmt: skip
        synchronise(stream)
        assert valid.get().all()
        return out.get()

    assert (draw(sure, 1) == wanted).all()
    even = np.full((rows, vocabulary), 1 / vocabulary, np.float32)
    first = draw(even, 5)
    assert ((first >= 0) & (first < vocabulary)).all()
    assert (draw(even, 5) == first).all()
    assert (draw(even, 6) != first).any()


def test_a_gemm_runner(rng, to_gpu, stream):
    """An object with methods: quantises, is given a workspace, multiplies."""
    found = module("fp8_blockscale_gemm_90")
    m, n, k = 64, 256, 512
    with found.init(device="cuda:0") as runner:
        assert isinstance(runner, ModuleObject)
        assert str(runner.device) == "cuda:0"
        assert runner.run_gemm.signature.params == ("DLTensor*",) * 3 + ("Optional<DLTensor*>",) * 2
        x = rng.standard_normal((m, k)).astype(BF16)
        weight = (rng.uniform(-1, 1, (n, k)) * 400).astype(E4M3)
        scales = rng.uniform(0.5, 2, (n // 128, k // 128)).astype(np.float32)
        gpu = {"x": to_gpu(x), "weight": to_gpu(weight), "scales": to_gpu(scales)}
        # Quantised: a scale for each 128 of a row, stored by column.
        q = to_gpu(poisoned((m, k), np.uint8).view(E4M3))
        q_scales = to_gpu(poisoned((k // 128, m), np.float32))
        runner.fp8_quantize_1x128(gpu["x"].desc(), q.desc(), q_scales.desc(), False, stream=stream)
        synchronise(stream)
        blocks = float64(x).reshape(m, k // 128, 128)
        largest = np.abs(blocks).max(-1)
        np.testing.assert_allclose(float64(q_scales.get()).T, largest / 448, rtol=1e-5)
        wide = np.repeat(float64(q_scales.get()).T, 128, axis=1)
        back = float64(q.get()) * wide
        assert worst(back, float64(x), 2.0**-4 * 1.001 * np.abs(float64(x)) + wide * 2.0**-10) <= 1
        # Multiplied: both ways, the bf16 input being quantised by the runner.
        size = runner.get_workspace_size(m, n, k)
        assert size > 0
        workspace = to_gpu(poisoned((size,), np.uint8))
        runner.configure_workspace(workspace.desc(), stream=stream)
        dense = float64(weight) * np.repeat(np.repeat(float64(scales), 128, 0), 128, 1)
        expected, magnitude = back @ dense.T, np.abs(back) @ np.abs(dense).T
        bound = 2.0**-8 * np.abs(expected) + 2.0**-9 * magnitude
        assert worst(1.05 * expected, expected, bound) > 1, "the check sees a scale 5 % off"
        ways = {"fp8": (q, q_scales.desc()), "bf16": (gpu["x"], None)}
        for way, (given, of_given) in ways.items():
            out = to_gpu(poisoned((m, n), BF16))
            runner.run_gemm(given.desc(), gpu["weight"].desc(), out.desc(), of_given,
                            gpu["scales"].desc(), stream=stream)  # fmt: skip
            synchronise(stream)
            assert worst(out.get(), expected, bound) <= 1, way
            assert out.intact()
        with pytest.raises(fi_ffi.KernelError, match="scales_a is required") as caught:
            runner.run_gemm(q.desc(), gpu["weight"].desc(), out.desc(), None,
                            gpu["scales"].desc(), stream=stream)  # fmt: skip
        assert caught.value.op == "fp8_blockscale_gemm_90.init().run_gemm"
        other = fi_ffi.TensorDesc(4096, (m, k), "bfloat16", device="cuda:1")
        with pytest.raises(fi_ffi.ArgumentError, match="where the object was made"):
            runner.run_gemm(other, other, other, None, None, stream=stream)
        run = runner.run_gemm
    with pytest.raises(fi_ffi.ArgumentError, match="released"):
        run(q.desc(), gpu["weight"].desc(), out.desc(), None, None, stream=stream)


def moe_reference(x, chosen, weights, fc1, fc2):
    """The output, what its terms add up to, and each expert's part, in float64."""
    out = np.zeros((len(x), fc2.shape[1]))
    magnitude, parts = np.zeros_like(out), np.zeros_like(out)
    for token, experts in enumerate(chosen):
        for expert, weight in zip(experts, weights[token], strict=True):
            linear, gate = np.split(float64(fc1[expert]) @ float64(x[token]), 2)
            hidden = linear * gate / (1 + np.exp(-gate))
            part = float(weight) * (float64(fc2[expert]) @ hidden)
            out[token] += part
            parts[token] += np.abs(part)
            magnitude[token] += float(weight) * (np.abs(float64(fc2[expert])) @ np.abs(hidden))
    return out, magnitude, parts


MOE_NUMBERS = (True, 1, 0, 1, 0, 1, 0, False, False)  # swizzled scales, then parallelism: none
SWIGLU = 3


@pytest.mark.parametrize("tokens", [1, 5, 130])
@pytest.mark.parametrize("profiles", [None, [-1, -1], [0, 0], "absolute"])
def test_a_fused_moe_runner(tokens, profiles, rng, to_gpu, stream):
    """It allocates its own workspace, from the pool and in the stream's order."""
    from fi_ffi.ops import cuda

    found = module("fused_moe_90")
    experts, top_k, hidden, inter = 8, 2, 256, 512
    x = rng.standard_normal((tokens, hidden)).astype(BF16)
    fc1 = (rng.standard_normal((experts, 2 * inter, hidden)) / 16).astype(BF16)
    fc2 = (rng.standard_normal((experts, hidden, inter)) / 16).astype(BF16)
    chosen = np.stack([rng.permutation(experts)[:top_k] for _ in range(tokens)]).astype(np.int32)
    weights = rng.uniform(0.1, 1, (tokens, top_k)).astype(np.float32)
    gpu = [to_gpu(array) for array in (x, chosen, weights, fc1, fc2)]
    gx, gchosen, gweights, gfc1, gfc2 = (array.desc() for array in gpu)
    before = cuda.kernel_memory().count
    runner = found.init(*["bfloat16"] * 3, False, False, False, False, device="cuda:0")
    run = runner.run_moe
    assert run.signature.params[8] == "Optional<Array<ffi.Tensor>>"
    counts = runner.get_gemm1_tactic_count(), runner.get_gemm2_tactic_count()
    assert min(counts) > 0 and sum(counts) == runner.get_tactic_num()
    ids = [0, counts[0]] if profiles == "absolute" else profiles
    expected, magnitude, parts = moe_reference(x, chosen, weights, fc1, fc2)
    bound = 2.0**-8 * np.maximum(parts, 2.0**-10) + 2.0**-9 * magnitude
    assert worst(1.05 * expected, expected, bound) > 1, "the check sees a scale 5 % off"
    for scales in (None, []):
        out = to_gpu(poisoned((tokens, hidden), BF16))
        run(out.desc(), gx, gchosen, gweights, gfc1, None, gfc2, None, scales, None, None, None,
            None, *MOE_NUMBERS, ids, False, SWIGLU, stream=stream)  # fmt: skip
        synchronise(stream)
        assert worst(out.get(), expected, bound) <= 1
        assert out.intact()
    assert cuda.kernel_memory().count == before
    with pytest.raises(fi_ffi.KernelError, match="Invalid gemm1 profile id"):
        run(out.desc(), gx, gchosen, gweights, gfc1, None, gfc2, None, None, None, None, None,
            None, *MOE_NUMBERS, [counts[0] + 5, 0], False, SWIGLU, stream=stream)  # fmt: skip
    with pytest.raises(fi_ffi.ArgumentTypeError, match=r"`8: Optional<Array<ffi.Tensor>>\[1\]`"):
        run(out.desc(), gx, gchosen, gweights, gfc1, None, gfc2, None, [gx, 1.0], None, None, None,
            None, *MOE_NUMBERS, None, False, SWIGLU, stream=stream)  # fmt: skip
    runner.release()
    with pytest.raises(fi_ffi.KernelError):  # no kernels for this combination
        found.init("float32", "float32", "float32", False, False, False, False, device="cuda:0")


def test_the_example_in_the_docs(to_gpu, rng, stream):
    """The one with an object; the other runs without a GPU."""
    module("fp8_blockscale_gemm_90")
    (block,) = (
        block
        for block in re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
        if "fp8_blockscale_gemm_90" in block
    )
    m, n, k = 64, 256, 512
    x = rng.standard_normal((m, k)).astype(BF16)
    weight = rng.standard_normal((n, k)).astype(E4M3)
    scales = np.ones((n // 128, k // 128), np.float32)
    out = to_gpu(poisoned((m, n), BF16))
    given = {"x": to_gpu(x), "weight": to_gpu(weight), "scales": to_gpu(scales)}
    names = {name: array.desc() for name, array in given.items()} | {"out": out.desc()}

    def allocate(size):
        return to_gpu(poisoned((size,), np.uint8)).desc()

    exec(block, names | {"stream": stream, "m": m, "n": n, "k": k, "allocate": allocate})
    synchronise(stream)
    expected = float64(x) @ float64(weight).T
    assert np.abs(float64(out.get()) - expected).max() < 0.1 * np.abs(expected).max()
