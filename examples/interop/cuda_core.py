"""A decode step in cuda.core's buffers, on its streams: the cache arrives on a second stream.

The rules: a `Buffer` has bytes and no dtype, so a `TensorDesc` of `int(buffer.handle)` says what
is in it.  `stream=` takes a cuda.core `Stream` (anything with `__cuda_stream__`).  Its streams do
not wait for the default stream, nor for one another: `stream.wait(other)` orders them.  Memory is
of the device's pool, in stream order: `close(stream)` frees it after that stream's work so far,
and letting go of a buffer on the stream that it was made on, which need not be the last to use it.

With --cpu numpy's memory is in place of buffers, and there are no streams.
"""

import argparse

import checks
import numpy as np

import fi_ffi


class Memory:
    """Buffers of cuda:0, each with a page-locked one to copy through."""

    device = "cuda:0"

    def __init__(self):
        from cuda import core

        device = core.Device(0)
        device.set_current()
        self.stream, self.copies = device.create_stream(), device.create_stream()
        self.allocate, self.pinned = device.allocate, core.LegacyPinnedMemoryResource()
        self.buffers = {}

    def put(self, array, stream):
        """A copy on the device, made on `stream`."""
        staged = self.pinned.allocate(array.nbytes)
        np.from_dlpack(staged).view(array.dtype)[:] = array.reshape(-1)
        buffer = self.allocate(array.nbytes, stream=stream)
        staged.copy_to(buffer, stream=stream)
        self.buffers[int(buffer.handle)] = buffer, staged  # both live while they are used
        return fi_ffi.TensorDesc(int(buffer.handle), array.shape, array.dtype, device=self.device)

    def get(self, desc, stream):
        buffer, staged = self.buffers[desc.ptr]
        buffer.copy_to(staged, stream=stream)
        stream.sync()
        return np.from_dlpack(staged).view(np.float16).reshape(desc.shape).copy()

    def close(self, stream):
        for buffer, staged in self.buffers.values():
            buffer.close(stream)
            staged.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cpu", action="store_true", help="numpy's memory, reference kernels")
    memory = checks.HostMemory() if parser.parse_args().cpu else Memory()
    device, stream, copies = memory.device, memory.stream, getattr(memory, "copies", None)
    hosts = checks.inputs()
    k_cache, v_cache = (memory.put(array, copies) for array in hosts[4:])
    x, residual, weight = (memory.put(array, stream) for array in hosts[:3])
    out = memory.put(np.full(checks.HEADS, np.nan, np.float16), stream)
    plan = fi_ffi.BatchDecodePlan(*checks.PAGES, **checks.SIZES, device=device, stream=stream)

    fi_ffi.fused_add_rmsnorm(x, residual, weight, stream=stream)  # while the cache arrives
    if stream is not None:
        stream.wait(copies)
    q = fi_ffi.TensorDesc(x.ptr, checks.HEADS, "float16", device=device)  # the same bytes
    plan.run(q, k_cache, v_cache, out, stream=stream)

    results = [memory.get(desc, stream) for desc in (residual, x, x, out)]
    results[2] = results[2].reshape(checks.HEADS)
    checks.check_step(np, checks.rmsnorm(np, *hosts[:3]), *results[:3], *hosts[4:], results[3])
    memory.close(stream)


if __name__ == "__main__":
    main()
