"""RMSNorm on a GPU with cuda-python alone: allocate, copy, call, copy back.

Needs a GPU and kernels (FI_FFI_KERNELS, see README.md).  With --cpu it needs neither: the same call
on numpy arrays.
"""

import argparse

import numpy as np
from cuda.bindings import runtime as cudart

import fi_ffi

EPS = 1e-6


def check(result):
    error, *values = result
    if int(error):
        raise SystemExit(f"CUDA: {error.name}; `fi-ffi doctor` tells of GPUs, --cpu needs none")
    return values[0] if values else None


def on_gpu(out, x, weight) -> None:
    stream = check(cudart.cudaStreamCreate())
    d_x, d_weight, d_out = (check(cudart.cudaMalloc(a.nbytes)) for a in (x, weight, out))
    to_device = cudart.cudaMemcpyKind.cudaMemcpyHostToDevice
    check(cudart.cudaMemcpyAsync(d_x, x.ctypes.data, x.nbytes, to_device, stream))
    check(cudart.cudaMemcpyAsync(d_weight, weight.ctypes.data, weight.nbytes, to_device, stream))

    fi_ffi.rmsnorm(
        fi_ffi.TensorDesc(d_out, out.shape, "float16", device="cuda:0"),
        fi_ffi.TensorDesc(d_x, x.shape, "float16", device="cuda:0"),
        fi_ffi.TensorDesc(d_weight, weight.shape, "float16", device="cuda:0"),
        eps=EPS,
        stream=stream,
    )

    to_host = cudart.cudaMemcpyKind.cudaMemcpyDeviceToHost
    check(cudart.cudaMemcpyAsync(out.ctypes.data, d_out, out.nbytes, to_host, stream))
    check(cudart.cudaStreamSynchronize(stream))
    for pointer in (d_x, d_weight, d_out):
        check(cudart.cudaFree(pointer))
    check(cudart.cudaStreamDestroy(stream))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cpu", action="store_true", help="the reference kernel on numpy arrays")
    tokens, hidden = 32, 4096
    x = np.random.default_rng().standard_normal((tokens, hidden)).astype(np.float16)
    weight = np.ones(hidden, np.float16)
    out = np.empty_like(x)
    if parser.parse_args().cpu:
        fi_ffi.rmsnorm(out, x, weight, eps=EPS)
    else:
        on_gpu(out, x, weight)

    exact = x.astype(np.float64)
    exact /= np.sqrt((exact**2).mean(axis=1, keepdims=True) + EPS)
    error = np.abs(out - exact).max()
    print(f"{tokens} rows of {hidden}: largest error against float64 {error:.1e}")
    assert error < 2.0**-9


if __name__ == "__main__":
    main()
