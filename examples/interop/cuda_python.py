"""A decode step on addresses alone, with cuda-python: cudaMalloc, a stream, and nothing else.

The rules: a `TensorDesc` is an address, a shape and a dtype, and owns nothing.  Whoever made the
memory frees it, after the stream's work on it has finished.  `stream=` takes the cudaStream_t, a
CUstream, or its number.  Nothing is ordered with the default stream, since this one was made
with cudaStreamNonBlocking: copies are on it, too.

With --cpu the addresses are of numpy's memory, and kernels the reference ones.
"""

import argparse

import checks
import numpy as np

import fi_ffi


class Memory:
    """Copies of arrays on the GPU, and a stream."""

    device = "cuda:0"

    def __init__(self):
        from cuda.bindings import runtime

        self.cudart, self.addresses = runtime, []
        self.stream = self.call("cudaStreamCreateWithFlags", runtime.cudaStreamNonBlocking)

    def call(self, name, *arguments):
        error, *values = getattr(self.cudart, name)(*arguments)
        if int(error):
            raise RuntimeError(f"{name}: {error.name}")
        return values[0] if values else None

    def copy(self, target, source, count, kind):
        kind = getattr(self.cudart.cudaMemcpyKind, kind)
        self.call("cudaMemcpyAsync", target, source, count, kind, self.stream)
        self.call("cudaStreamSynchronize", self.stream)

    def put(self, array):
        address = int(self.call("cudaMalloc", array.nbytes))
        self.addresses.append(address)
        self.copy(address, array.ctypes.data, array.nbytes, "cudaMemcpyHostToDevice")
        return fi_ffi.TensorDesc(address, array.shape, "float16", device=self.device)

    def get(self, desc):
        array = np.empty(desc.shape, np.float16)
        self.copy(array.ctypes.data, desc.ptr, array.nbytes, "cudaMemcpyDeviceToHost")
        return array

    def close(self):
        for address in self.addresses:  # `get` has waited for all that used it
            self.call("cudaFree", address)
        self.call("cudaStreamDestroy", self.stream)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cpu", action="store_true", help="numpy's memory, reference kernels")
    memory = checks.HostMemory() if parser.parse_args().cpu else Memory()
    device, stream = memory.device, memory.stream
    hosts = checks.inputs()
    x, residual, weight, _, k_cache, v_cache = map(memory.put, hosts)
    out = memory.put(np.full(checks.HEADS, np.nan, np.float16))
    plan = fi_ffi.BatchDecodePlan(*checks.PAGES, **checks.SIZES, device=device, stream=stream)

    fi_ffi.fused_add_rmsnorm(x, residual, weight, stream=stream)
    q = fi_ffi.TensorDesc(x.ptr, checks.HEADS, "float16", device=device)  # the same bytes
    plan.run(q, k_cache, v_cache, out, stream=stream)

    results = memory.get(residual), memory.get(x), memory.get(x).reshape(checks.HEADS)
    checks.check_step(np, checks.rmsnorm(np, *hosts[:3]), *results, *hosts[4:], memory.get(out))
    memory.close()


if __name__ == "__main__":
    main()
