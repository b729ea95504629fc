"""A decode step in numba's device arrays: a kernel of numba's says where new tokens go.

The numbers that `append_paged_kv_cache` reads are made on the GPU by a kernel of one's own, right
before it and on the same stream; attention comes after, and no copy to the host in between.

The rules: numba's stream 0 is the legacy default stream (the calling thread's own with
CUDA_PYTHON_CUDA_PER_THREAD_DEFAULT_STREAM=1).  `cuda.stream()` makes streams that wait for it and
it for them.  Pass a stream to everything: to kernels, copies, arrays, and fi_ffi, which takes
numba's `Stream`.  An array's memory is numba's until nothing refers to the array, and a call in
flight does not count: keep it until the stream was synchronised.  fi_ffi does not look at the
stream in `__cuda_array_interface__`: `stream=` says it all.

With --cpu arrays are numpy's, and numpy does what the kernel does.
"""

import argparse

import checks
import numpy as np

import fi_ffi


def on_gpu():
    from numba import cuda

    stream = cuda.stream()

    @cuda.jit
    def place(lengths, requests, positions):  # token i is the last of request i
        i = cuda.grid(1)
        if i < lengths.size:
            requests[i] = i
            positions[i] = lengths[i] - 1

    def get(array):
        host = array.copy_to_host(stream=stream)
        stream.synchronize()
        return host

    def put(array):
        return cuda.to_device(array, stream=stream)

    return "cuda:0", stream, put, get, place[1, 32, stream]


def on_cpu():
    def place(lengths, requests, positions):
        requests[:] = np.arange(len(lengths))
        positions[:] = lengths - 1

    return "cpu", None, np.copy, np.copy, place


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cpu", action="store_true", help="numpy arrays, reference kernels")
    device, stream, put, get, place = on_cpu() if parser.parse_args().cpu else on_gpu()
    x, residual, weight, _, k_cache, v_cache = map(put, hosts := checks.inputs())
    new = np.random.default_rng().standard_normal((2, checks.REQUESTS, checks.KV_HEADS, 128))
    keys, values = new.astype(np.float16)
    lengths = put(fi_ffi.seq_lens(checks.PAGES[0], checks.PAGES[2], checks.PAGE_SIZE))
    requests, positions = (put(np.full(checks.REQUESTS, -1, np.int32)) for _ in "ab")
    out = put(np.full(checks.HEADS, np.nan, np.float16))
    indptr, indices, last = map(put, checks.PAGES)
    d_keys, d_values = put(keys), put(values)

    place(lengths, requests, positions)
    fi_ffi.append_paged_kv_cache(
        d_keys, d_values, requests, positions, k_cache, v_cache, indices, indptr, last,
        stream=stream,
    )  # fmt: skip
    fi_ffi.fused_add_rmsnorm(x, residual, weight, stream=stream)
    plan = fi_ffi.BatchDecodePlan(*checks.PAGES, **checks.SIZES, device=device, stream=stream)
    q = x.reshape(checks.HEADS)  # the same memory
    plan.run(q, k_cache, v_cache, out, stream=stream)

    caches = get(k_cache), get(v_cache)
    for request in range(checks.REQUESTS):  # where the host would have put them
        page = checks.PAGES[1][checks.PAGES[0][request + 1] - 1]
        for cache, token in zip(hosts[4:], (keys, values), strict=True):
            cache[page, checks.PAGES[2][request] - 1] = token[request]
    for cache, host in zip(caches, hosts[4:], strict=True):
        assert (cache == host).all(), "a token is in the wrong place"
    results = get(residual), get(x), get(q)
    checks.check_step(np, checks.rmsnorm(np, *hosts[:3]), *results, *hosts[4:], get(out))


if __name__ == "__main__":
    main()
