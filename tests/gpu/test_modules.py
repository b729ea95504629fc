"""`fi_ffi.module` on a GPU: FlashInfer's own entries and objects, with no row of ours."""

from __future__ import annotations

import re
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from cuda.bindings import runtime

import fi_ffi
from fi_ffi.abi import library
from fi_ffi.abi._cffi import ffi
from fi_ffi.abi.objects import lent_count
from fi_ffi.cli.cuda import check
from fi_ffi.modules import ModuleObject
from fi_ffi.ops.functions import OPS

from tests.helpers.cases import make_case
from tests.helpers.prepared_calls import poison, settle
from tests.helpers.untyped_calls import float64, module, poisoned

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
BF16 = np.dtype(ml_dtypes.bfloat16)
DECODE = (
    "single_decode_with_kv_cache_dtype_q_f16_dtype_kv_f16_dtype_o_f16_head_dim_qk_128_"
    "head_dim_vo_128_posenc_0_use_swa_False_use_logits_cap_False"
)
DOCS = Path(__file__).parents[2] / "docs" / "modules.md"


@pytest.fixture
def on_gpu(to_gpu, rng):
    """An rmsnorm case on the GPU."""
    case = make_case(OPS["rmsnorm"].row, {"n": 96, "h": 4096}, {"T": "bfloat16"}, rng)
    return case, {name: to_gpu(array) for name, array in case.arrays.items()}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("scoped", [False, True], ids=["argument", "scope"])
def test_rmsnorm_is_the_typed_op_s_bit_for_bit(dtype, scoped, rng, to_gpu, stream):
    entry = module("norm").rmsnorm
    case = make_case(OPS["rmsnorm"].row, {"n": 33, "h": 1024}, {"T": dtype}, rng)
    arrays = {name: to_gpu(array) for name, array in case.arrays.items()}
    typed = to_gpu(case.arrays["out"])
    x, weight = arrays["input"].desc(), arrays["weight"].desc()
    fi_ffi.rmsnorm(typed.desc(), x, weight, 1e-5, stream=stream)
    settle(stream)
    if scoped:
        with fi_ffi.stream(stream):
            entry(arrays["out"].desc(), x, weight, 1e-5, False)
    else:
        entry(arrays["out"].desc(), x, weight, 1e-5, False, stream=stream)
    settle(stream)
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
    before = lent_count()
    for _ in range(50):
        poison(arrays["out"])
        descs = [arrays[arg.name].desc() for arg in OPS["layernorm"].row.tensors]
        entry(*descs, case.scalars.get("eps", 1e-6), stream=stream)
    settle(stream)
    assert case.error("out", arrays["out"].get())[1] <= 1
    assert lent_count() == before


def test_the_scope_s_stream_and_what_was_current_before(on_gpu, stream):
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


def test_host_tensors_are_refused_in_the_kernel_s_words(on_gpu, stream):
    entry, (case, arrays) = module("norm").rmsnorm, on_gpu
    out, x, weight = (array.desc() for array in arrays.values())
    host = case.arrays["input"].copy()
    for args in ((out, host, weight), (host, x, weight), (host, host, host[0])):
        with pytest.raises(fi_ffi.KernelError) as caught:
            entry(*args, 1e-6, False, stream=stream)
        assert caught.value.op == "norm.rmsnorm"
        assert "CUDA" in caught.value.message
    check(runtime.cudaDeviceSynchronize())
    assert np.isnan(float64(arrays["out"].get())).all()
    assert host.tobytes() == case.arrays["input"].tobytes()
    entry(out, x, weight, 1e-6, False, stream=stream)  # and the next call is fine
    settle(stream)
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
    check(runtime.cudaDeviceSynchronize())
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
        settle(stream)
        outs.append(out.get().tobytes() + (b"" if lse is None else lse.get().tobytes()))
        assert not np.isnan(float64(out.get())).any()
    assert outs[0] == outs[1]


def test_an_object_is_of_its_gpu(stream):
    with module("fp8_blockscale_gemm_90").init(device="cuda:0") as runner:
        run, made_on = runner.run_gemm, str(runner.device)
        assert isinstance(runner, ModuleObject) and made_on == "cuda:0"
        other = [fi_ffi.TensorDesc(4096, (64, 512), "bfloat16", device="cuda:1")] * 3
        with pytest.raises(fi_ffi.ArgumentError, match="where the object was made"):
            run(*other, None, None, stream=stream)
    with pytest.raises(fi_ffi.ArgumentError, match="released"):
        run(*other, None, None, stream=stream)


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
    settle(stream)
    expected = float64(x) @ float64(weight).T
    assert np.abs(float64(out.get()) - expected).max() < 0.1 * np.abs(expected).max()
