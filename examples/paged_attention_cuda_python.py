"""An inference runtime's loop over a paged KV cache, with cuda-python alone.

Requests with prompts of different lengths are prefilled together, then decoded token by
token: each step appends keys and values to the cache, plans on the host, and runs.  Random
numbers stand for the model; numpy checks every output.

Needs a GPU and kernels (FI_FFI_KERNELS, see README.md).  With --cpu it needs neither: the
same calls run the reference kernels on numpy arrays.
"""

import argparse
import time
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

import numpy as np

import fi_ffi

DTYPE = np.float16
STEPS = 64
# Output and softmax weights are rounded to float16, each by 2^-11 of its size; twice that.
# The error is told in parts of the sum that is rounded: weights times |values|.
TOLERANCE = 2.0**-9


@dataclass(frozen=True)
class Model:
    qo_heads: int
    kv_heads: int
    head_dim: int
    page_size: int
    num_pages: int
    prompts: tuple[int, ...]


ON_GPU = Model(32, 8, 128, 16, 512, (1, 37, 300, 700))
ON_CPU = Model(8, 2, 64, 4, 160, (1, 6, 40))


class Gpu:
    """Named buffers on cuda:0 that grow when they must, and a stream."""

    device = "cuda:0"

    def __init__(self):
        from cuda.bindings import runtime

        self.cudart = runtime
        self.stream = self.check(runtime.cudaStreamCreate())
        self.buffers = {}

    @staticmethod
    def check(result):
        error, *values = result
        if int(error):
            raise RuntimeError(error.name)
        return values[0] if values else None

    def empty(self, name, shape, dtype):
        """Memory of NaN (every byte 0xFF), the same as before where it is large enough."""
        count = int(np.prod(shape)) * np.dtype(dtype).itemsize
        pointer, room = self.buffers.get(name, (0, 0))
        if room < count:
            self.check(self.cudart.cudaFree(pointer))
            pointer = self.check(self.cudart.cudaMalloc(count))
            self.buffers[name] = pointer, count
        self.check(self.cudart.cudaMemsetAsync(pointer, 0xFF, count, self.stream))
        return fi_ffi.TensorDesc(pointer, shape, dtype, device=self.device)

    def put(self, name, array):
        desc = self.empty(name, array.shape, array.dtype)
        source = np.ascontiguousarray(array)
        self.copy(desc.ptr, source.ctypes.data, source.nbytes, "cudaMemcpyHostToDevice")
        return desc

    def get(self, desc):
        array = np.empty(desc.shape, DTYPE)
        self.copy(array.ctypes.data, desc.ptr, array.nbytes, "cudaMemcpyDeviceToHost")
        self.wait()
        return array

    def copy(self, target, source, count, kind):
        kind = getattr(self.cudart.cudaMemcpyKind, kind)
        self.check(self.cudart.cudaMemcpyAsync(target, source, count, kind, self.stream))

    def wait(self):
        self.check(self.cudart.cudaStreamSynchronize(self.stream))

    def close(self):
        for pointer, _ in self.buffers.values():
            self.check(self.cudart.cudaFree(pointer))
        self.check(self.cudart.cudaStreamDestroy(self.stream))


class Cpu:
    """The same of numpy arrays, which calls take as they are."""

    device, stream = "cpu", None

    def empty(self, name, shape, dtype):
        return np.full(shape, np.nan, dtype)

    def put(self, name, array):
        return array

    def get(self, array):
        return array

    def wait(self):
        pass

    def close(self):
        pass


class Pages:
    """Which pages each request has, and which nobody has."""

    def __init__(self, count, page_size, requests):
        self.free = list(range(count))
        np.random.default_rng().shuffle(self.free)  # pages of a request need not be neighbours
        self.page_size = page_size
        self.lengths = [0] * requests
        self.of = [[] for _ in range(requests)]

    def grow(self, counts):
        """Make room for so many more tokens of each request."""
        for request, count in enumerate(counts):
            self.lengths[request] += count
            while len(self.of[request]) * self.page_size < self.lengths[request]:
                self.of[request].append(self.free.pop())

    def tables(self):
        """What kernels and plans take: see docs/paged-kv-cache.md."""
        indptr = starts([len(pages) for pages in self.of])
        indices = np.array([page for pages in self.of for page in pages], np.int32)
        last = [(length - 1) % self.page_size + 1 for length in self.lengths]
        return indptr, indices, np.array(last, np.int32)


def starts(counts):
    return np.cumsum([0, *counts]).astype(np.int32)


class Runtime:
    """A cache, its pages, and the tokens so far as the check knows them."""

    def __init__(self, model, memory):
        self.model, self.memory = model, memory
        self.rng = np.random.default_rng()
        self.pages = Pages(model.num_pages, model.page_size, len(model.prompts))
        shape = (model.num_pages, 2, model.page_size, model.kv_heads, model.head_dim)
        self.k_cache, self.v_cache = fi_ffi.split_paged_kv_cache(
            memory.empty("cache", shape, DTYPE)
        )
        self.keys = [np.empty((0, model.kv_heads, model.head_dim), DTYPE) for _ in model.prompts]
        self.values = list(self.keys)
        self.worst = 0.0

    def project(self, counts):
        """Queries, keys and values of new tokens, as a model would compute them."""
        model, total = self.model, sum(counts)
        heads = (model.qo_heads, model.kv_heads, model.kv_heads)
        shapes = [(total, count, model.head_dim) for count in heads]
        return [self.rng.standard_normal(shape, np.float32).astype(DTYPE) for shape in shapes]

    def append(self, k, v, counts):
        """Give the new tokens' keys and values their places in the cache."""
        self.pages.grow(counts)
        tables = self.pages.tables()
        requests, positions = fi_ffi.batch_indices_positions(starts(counts), self.pages.lengths)
        put = self.memory.put
        fi_ffi.append_paged_kv_cache(
            put("k", k), put("v", v), put("requests", requests), put("positions", positions),
            self.k_cache, self.v_cache,
            put("indices", tables[1]), put("indptr", tables[0]), put("last", tables[2]),
            stream=self.memory.stream,
        )  # fmt: skip
        return tables

    def check(self, q, k, v, out, counts):
        """Every row of the output against attention in float64."""
        where = starts(counts)
        for i, (start, stop) in enumerate(pairwise(where)):
            self.keys[i] = np.concatenate([self.keys[i], k[start:stop]])
            self.values[i] = np.concatenate([self.values[i], v[start:stop]])
            exact, magnitude = attention(q[start:stop], self.keys[i], self.values[i])
            error = np.abs(out[start:stop] - exact) / magnitude
            assert error.max() < TOLERANCE, f"request {i}: {error.max()}"  # false for NaN as well
            self.worst = max(self.worst, error.max())


def attention(q, k, v):
    """Causal attention of one request's last tokens in float64, and what bounds its rounding."""
    group = q.shape[1] // k.shape[1]
    q, k, v = (np.swapaxes(x, 0, 1).astype(np.float64) for x in (q, k, v))
    k, v = np.repeat(k, group, 0), np.repeat(v, group, 0)
    logits = q @ np.swapaxes(k, 1, 2) / np.sqrt(q.shape[2])
    last_seen = np.arange(q.shape[1])[:, None] + k.shape[1] - q.shape[1]
    logits = np.where(np.arange(k.shape[1]) <= last_seen, logits, -np.inf)
    weights = np.exp(logits - logits.max(2, keepdims=True))
    weights /= weights.sum(2, keepdims=True)
    return np.swapaxes(weights @ v, 0, 1), np.swapaxes(weights @ np.abs(v), 0, 1)


def prefill(runtime):
    """All prompts at once; seconds taken."""
    model, memory, counts = runtime.model, runtime.memory, runtime.model.prompts
    q, k, v = runtime.project(counts)
    memory.wait()
    began = time.perf_counter()
    indptr, indices, last = runtime.append(k, v, counts)
    plan = fi_ffi.BatchPrefillPlan(
        starts(counts), paged_kv_indptr=indptr, paged_kv_indices=indices,
        paged_kv_last_page_len=last, page_size=model.page_size, num_qo_heads=model.qo_heads,
        num_kv_heads=model.kv_heads, head_dim_qk=model.head_dim, q_data_type=DTYPE, causal=True,
        device=memory.device, stream=memory.stream,
    )  # fmt: skip
    out = memory.empty("out", q.shape, DTYPE)
    d_q = memory.put("q", q)
    plan.paged_run(d_q, runtime.k_cache, runtime.v_cache, out, stream=memory.stream)
    memory.wait()
    seconds = time.perf_counter() - began
    runtime.check(q, k, v, memory.get(out), counts)
    return seconds


def decode(runtime, steps):
    """A token of every request in each step; the seconds each took, checks not counted."""
    model, memory, plan, seconds = runtime.model, runtime.memory, None, []
    counts = [1] * len(model.prompts)
    for _ in range(steps):
        q, k, v = runtime.project(counts)
        memory.wait()
        began = time.perf_counter()
        tables = runtime.append(k, v, counts)
        if plan is None:
            plan = fi_ffi.BatchDecodePlan(
                *tables, page_size=model.page_size, num_qo_heads=model.qo_heads,
                num_kv_heads=model.kv_heads, head_dim=model.head_dim, q_data_type=DTYPE,
                device=memory.device, stream=memory.stream,
            )  # fmt: skip
        else:
            plan.replan(*tables, stream=memory.stream)
        out = memory.empty("out", q.shape, DTYPE)
        d_q = memory.put("q", q)
        plan.run(d_q, runtime.k_cache, runtime.v_cache, out, stream=memory.stream)
        memory.wait()
        seconds.append(time.perf_counter() - began)
        runtime.check(q, k, v, memory.get(out), counts)
    return seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cpu", action="store_true", help="reference kernels on numpy arrays")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"tokens to decode ({STEPS})")
    options = parser.parse_args()
    memory, model = (Cpu(), ON_CPU) if options.cpu else (Gpu(), ON_GPU)
    runtime = Runtime(model, memory)
    first = prefill(runtime)
    print(f"prefill: {sum(model.prompts)} tokens of {len(model.prompts)} requests, "
          f"{first * 1e3:.1f} ms (kernels were loaded in it)")  # fmt: skip
    seconds = median(decode(runtime, options.steps))
    used = sum(len(pages) for pages in runtime.pages.of)
    print(f"decode: {options.steps} steps of {len(model.prompts)} tokens, "
          f"{seconds * 1e3:.3f} ms a step")  # fmt: skip
    print(f"cache: {sum(runtime.pages.lengths)} tokens in {used} of {model.num_pages} pages")
    print(f"largest error: {runtime.worst:.1e} of the magnitude ({TOLERANCE:.1e} allowed)")
    memory.close()


if __name__ == "__main__":
    main()
