"""What surrounds a kernel on a GPU: streams, other libraries' tensors, graphs, errors."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from cuda.bindings import driver, runtime

import fi_ffi
from fi_ffi.abi import library
from fi_ffi.abi._cffi import ffi
from fi_ffi.cli import cuda
from fi_ffi.cli.cuda import check
from fi_ffi.loader import machine, search
from fi_ffi.loader.kernels import open_source
from fi_ffi.loader.runtime import kernel_entry
from fi_ffi.ops.functions import OPS

from tests.helpers.cases import make_case
from tests.helpers.children import done


@pytest.fixture
def case(rng):
    return make_case(OPS["rmsnorm"].row, {"n": 96, "h": 4096}, {"T": "bfloat16"}, rng)


def streams(kind: str):
    """A stream object of each library, its owner, and its handle."""
    if kind == "cuda.core":
        core = pytest.importorskip("cuda.core", reason="cuda.core is not installed")
        device = core.Device(0)
        device.set_current()
        return device.create_stream()
    if kind == "cupy":
        return pytest.importorskip("cupy", reason="cupy is not installed").cuda.Stream()
    if kind == "torch":
        return pytest.importorskip("torch", reason="torch is not installed").cuda.Stream()
    made = check(runtime.cudaStreamCreate())
    return driver.CUstream(int(made)) if kind == "CUstream" else made


@pytest.mark.parametrize("kind", ["CUstream", "cudaStream_t", "cuda.core", "cupy", "torch"])
@pytest.mark.parametrize("scoped", [False, True], ids=["argument", "scope"])
def test_accepts_streams(kind, scoped, case, to_gpu):
    arrays = [to_gpu(array) for array in case.arrays.values()]
    descs = [array.desc() for array in arrays]
    made = streams(kind)
    if scoped:
        with fi_ffi.stream(made):
            fi_ffi.rmsnorm(*descs)
    else:
        fi_ffi.rmsnorm(*descs, stream=made)
    assert case.error("out", arrays[0].get())[1] <= 1


def test_scope_puts_the_outer_stream_back(case, to_gpu, stream):
    def current() -> int:
        return int(ffi.cast("uintptr_t", library.lib.TVMFFIEnvGetStream(2, 0)))

    descs = [to_gpu(array).desc() for array in case.arrays.values()]
    fi_ffi.rmsnorm(*descs, stream=stream)
    assert current() == 0
    with fi_ffi.stream(stream):
        fi_ffi.rmsnorm(*descs)
        assert current() == stream
        with pytest.raises(fi_ffi.ArgumentError):
            fi_ffi.rmsnorm(*descs, eps=-1.0)
        with fi_ffi.stream(0):
            fi_ffi.rmsnorm(*descs)
            assert current() == 0
        assert current() == stream
    assert current() == 0


@pytest.mark.parametrize("library", ["cupy", "torch", "numba"])
def test_takes_other_libraries_tensors(library, rng, stream):
    """float16 through each; the exported memory is used, not a copy."""
    made = make_case(OPS["rmsnorm"].row, {"n": 16, "h": 512}, {"T": "float16"}, rng)
    hosts = list(made.arrays.values())
    if library == "cupy":
        cupy = pytest.importorskip("cupy", reason="cupy is not installed")
        tensors, back = [cupy.asarray(h) for h in hosts], lambda t: t.get()
    elif library == "torch":
        torch = pytest.importorskip("torch", reason="torch is not installed")
        tensors, back = [torch.from_numpy(h).cuda() for h in hosts], lambda t: t.cpu().numpy()
    else:
        cuda = pytest.importorskip("numba.cuda", reason="numba is not installed")
        tensors, back = [cuda.to_device(h) for h in hosts], lambda t: t.copy_to_host()
    check(runtime.cudaDeviceSynchronize())
    fi_ffi.rmsnorm(*tensors, stream=stream)
    check(runtime.cudaStreamSynchronize(stream))
    assert made.error("out", back(tensors[0]))[1] <= 1


def test_reads_jax_arrays(case, to_gpu, stream):
    """jax arrays are not to be written, so `out` is somebody else's."""
    jax = pytest.importorskip("jax", reason="jax is not installed")
    device = jax.devices("gpu")[0]
    x, weight = (jax.device_put(case.arrays[name], device) for name in ("input", "weight"))
    out = to_gpu(case.arrays["out"])
    jax.block_until_ready((x, weight))
    fi_ffi.rmsnorm(out.desc(), x, weight, stream=stream)
    assert case.error("out", out.get())[1] <= 1


def test_takes_torch_bfloat16(case, stream):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    bits = [torch.from_numpy(h.view(np.uint16)).cuda() for h in case.arrays.values()]
    tensors = [t.view(torch.bfloat16) for t in bits]
    torch.cuda.synchronize()
    fi_ffi.rmsnorm(*tensors, stream=torch.cuda.ExternalStream(stream))
    torch.cuda.synchronize()
    got = bits[0].cpu().numpy().view(ml_dtypes.bfloat16)
    assert case.error("out", got)[1] <= 1


def test_a_kernels_own_error_is_told_and_not_sticky(rng, to_gpu, stream):
    """Rows too long for shared memory: the launch is refused, by the kernel's launcher."""
    op = OPS["fused_add_rmsnorm"]
    too_long = make_case(op.row, {"n": 2, "h": 65536}, {"T": "float16"}, rng)
    arrays = {name: to_gpu(array) for name, array in too_long.arrays.items()}
    with pytest.raises(fi_ffi.KernelError, match="FusedAddRMSNorm failed with error") as caught:
        op(*(array.desc() for array in arrays.values()), stream=stream)
    assert caught.value.op == "norm.fused_add_rmsnorm"
    assert caught.value.kind in ("InternalError", "RuntimeError")
    assert "norm.cu" in caught.value.backtrace
    for name, array in arrays.items():
        assert array.get().tobytes() == too_long.arrays[name].tobytes()
    fine = make_case(op.row, {"n": 2, "h": 4096}, {"T": "float16"}, rng)
    arrays = {name: to_gpu(array) for name, array in fine.arrays.items()}
    op(*(array.desc() for array in arrays.values()), stream=stream)
    assert fine.error("input", arrays["input"].get())[1] <= 1


def test_bad_input_leaves_the_destination(case, to_gpu, stream):
    out, x, weight = (to_gpu(array) for array in case.arrays.values())
    before = out.get().tobytes()
    shape = case.arrays["input"].shape
    bad = {
        "null": fi_ffi.TensorDesc(0, shape, "bfloat16"),
        "misaligned": fi_ffi.TensorDesc(x.ptr + 2, shape, "bfloat16"),
        "dtype": fi_ffi.TensorDesc(x.ptr, shape, "float16"),
        "rank": fi_ffi.TensorDesc(x.ptr, (*shape, 1), "bfloat16"),
        "device": fi_ffi.TensorDesc(x.ptr, shape, "bfloat16", device="cpu"),
        "other gpu": fi_ffi.TensorDesc(x.ptr, shape, "bfloat16", device="cuda:1"),
        "stride": fi_ffi.TensorDesc(x.ptr, shape, "bfloat16", strides=(shape[1] + 1, 1)),
    }
    for name, desc in bad.items():
        with pytest.raises(fi_ffi.ArgumentError) as caught:
            fi_ffi.rmsnorm(out.desc(), desc, weight.desc(), stream=stream)
        assert (caught.value.op, caught.value.argument) == ("rmsnorm", "input"), name
    with pytest.raises(fi_ffi.ArgumentError, match="stream"):
        fi_ffi.rmsnorm(out.desc(), x.desc(), weight.desc())
    assert out.get().tobytes() == before


@pytest.mark.parametrize(("last", "wraps"), [(2**31 - 8, False), (2**31, True)])
def test_the_offset_limit_is_where_the_kernel_wraps(last, wraps, to_gpu, stream):
    """norm.cuh multiplies row by stride in 32 bits: past 2**32 a row is another row."""
    rows = np.array([[1] * 8, [2] * 8, [3, 1] * 4], np.float16)
    base = check(runtime.cudaMalloc(2 * (2 * last + 8)))
    kind = runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
    for i, row in enumerate(rows):
        check(runtime.cudaMemcpy(int(base) + 2 * i * last, row.ctypes.data, row.nbytes, kind))
    out, weight = to_gpu(np.full((3, 8), np.nan, np.float16)), to_gpu(np.ones(8, np.float16))
    x = fi_ffi.TensorDesc(int(base), (3, 8), "float16", strides=(last, 1))
    args = (out.desc(), x, weight.desc())
    if wraps:
        with pytest.raises(fi_ffi.ArgumentError, match="offsets below 4294967296"):
            fi_ffi.rmsnorm(*args, stream=stream)
        row = OPS["rmsnorm"].row  # what the check saves callers from:
        kernel_entry(row.module, row.signature, row.releases)(*args, 0.0, False)
        assert out.get()[2].tolist() == [1.0] * 8, "row 2 read row 0"
    else:
        fi_ffi.rmsnorm(*args, stream=stream)
        assert np.abs(out.get()[2] - rows[2] / np.sqrt(5)).max() < 1e-3
    check(runtime.cudaFree(base))


def test_imports_nothing_it_must_not():
    program = """
import sys
from pathlib import Path
from fi_ffi.cli.cuda import DeviceArray
import numpy as np, fi_ffi
x = DeviceArray(np.ones((4, 64), np.float16)); w = DeviceArray(np.ones(64, np.float16))
fi_ffi.rmsnorm(x.desc(), x.desc(), w.desc(), stream=0)
assert (np.abs(x.get() - 1) < 1e-3).all()
bad = {"torch", "tvm_ffi", "flashinfer"} & set(sys.modules)
assert not bad, bad
"""
    status, _, err = done(program)
    assert status == 0, err


def test_kernels_for_another_gpu_are_refused_by_name(case, to_gpu, stream, sm87_wheel, tmp_path):
    """A Jetson's kernels on this GPU: said before anything is loaded or launched."""
    arrays = [to_gpu(array) for array in case.arrays.values()]
    descs = [array.desc() for array in arrays]
    before = arrays[0].get().tobytes()
    folder = tmp_path / "norm"
    folder.mkdir()
    shutil.copy(open_source(sm87_wheel).file("page").path, folder / "norm.so")
    try:
        fi_ffi.use_kernels(tmp_path)
        major, minor = machine.capability(0)
        with pytest.raises(fi_ffi.ArchitectureError) as caught:
            fi_ffi.rmsnorm(*descs, stream=stream)
        assert f"has sm_87 only; the device is sm_{major}{minor}" in str(caught.value)
        assert f"--arch {major}.{minor}" in str(caught.value)
        assert str(folder) not in Path("/proc/self/maps").read_text(errors="replace")
    finally:
        search.use_source(os.environ.get("FI_FFI_KERNELS"))
    assert arrays[0].get().tobytes() == before
    fi_ffi.rmsnorm(*descs, stream=stream)
    assert case.error("out", arrays[0].get())[1] <= 1


def test_the_machine_is_what_cuda_python_says(stream):
    found = cuda.gpus()
    assert machine.device_count() == len(found)
    assert [machine.capability(gpu.index) for gpu in found] == [gpu.capability for gpu in found]
    assert machine.driver_version() == cuda.driver_version()
    with pytest.raises(fi_ffi.LoaderError, match="there is no cuda:99"):
        machine.capability(99)
