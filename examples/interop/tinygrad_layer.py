"""A decoder layer on tinygrad's buffers and stream: its norms, RoPE, cache, attention and gate by
fi_ffi, its projections by tinygrad; beside the same layer in tinygrad alone.

tinygrad's CUDA device launches on the legacy default stream, so `stream=0` is the order of both.
It makes a CUDA context of its own, and no other context sees its memory.  CUDA's runtime, and with
it every kernel library, uses the primary one: tinygrad gets that one before its first tensor
(`use_primary_context`).  Its NV device talks to the GPU without CUDA: no library can share its
memory.

tinygrad computes late.  A tensor is realized before its address is taken, and fi_ffi's results are
in the memory of tensors that tinygrad has made (`Tensor.empty`): what is realized after the call
reads them.  What tinygrad has not realized before a call that writes its inputs, it computes from
what was written.

With --cpu: tinygrad's CPU device, or without clang its interpreter in Python, and reference
kernels.  With --times: microseconds of a step.
"""

import argparse
import ctypes
import os
import shutil
import time

import numpy as np
from tinygrad import Context, Device, Tensor, TinyJit, dtypes

import fi_ffi

PAGE_SIZE, HEAD_DIM, EPS, THETA = 16, 64, 1e-6, 10000.0
# Some 10 roundings to float16 add up at random: sqrt(10) * 2^-11 is 2^-9.3 of the largest element.
# A norm over the few elements that --cpu has can double that twice.
BOUND = 2.0**-7
NAMES = {dtypes.float16: "float16", dtypes.bfloat16: "bfloat16", dtypes.int32: "int32"}


def use_primary_context(device):
    """Let tinygrad's device, which has no tensors yet, use the context of CUDA's runtime."""
    from tinygrad.runtime.autogen import cuda
    from tinygrad.runtime.ops_cuda import check

    check(cuda.cuCtxDestroy_v2(device.context))
    check(cuda.cuDevicePrimaryCtxRetain(ctypes.byref(device.context), device.cu_device))
    check(cuda.cuCtxSetCurrent(device.context))


def describe(tensor):
    """What fi_ffi takes: a tensor's address, shape and dtype.  Keep the tensor."""
    tensor.realize()
    buffer = tensor.uop.buffer.ensure_allocated()
    memory = buffer.get_buf(buffer.device)
    kind = buffer.device.partition(":")[0]
    if kind == "CUDA":
        device, address = f"cuda:{Device[buffer.device].cu_device.value}", memory.value
    elif kind == "CPU":
        Device[buffer.device].synchronize()  # it computes in threads
        device, address = "cpu", memory.va_addr
    elif kind == "PYTHON":
        device, address = "cpu", np.frombuffer(memory, np.uint8).ctypes.data
    else:
        raise TypeError(f"describe: tensor: got the device {kind}, expected CUDA, CPU or PYTHON")
    return fi_ffi.TensorDesc(address, tensor.shape, NAMES[tensor.dtype], device=device)


class Layer:
    """The sizes and weights of a layer, and its pages."""

    def __init__(self, device, hidden, qo_heads, kv_heads, gate, lengths, steps):
        self.device, self.hidden, self.gate = device, hidden, gate
        self.qo_heads, self.kv_heads = qo_heads, kv_heads
        self.lengths = np.array(lengths, np.int32)
        self.stream = 0 if device == "CUDA" else None
        rng = np.random.default_rng()
        heads = (qo_heads + 2 * kv_heads) * HEAD_DIM
        shapes = {"qkv": (hidden, heads), "out": (qo_heads * HEAD_DIM, hidden),
                  "gate_up": (hidden, 2 * gate), "down": (gate, hidden)}  # fmt: skip
        weights = {n: rng.standard_normal(s, np.float32) * s[0] ** -0.5 for n, s in shapes.items()}
        for name in ("attention_norm", "gate_norm"):
            weights[name] = 1 + rng.standard_normal(hidden, np.float32) / 10
        self.weights = {name: self.tensor(a.astype(np.float16)) for name, a in weights.items()}

        count = -(-(max(lengths) + steps) // PAGE_SIZE)  # pages of a request
        self.room = count * PAGE_SIZE
        shape = len(lengths), self.room, kv_heads, HEAD_DIM
        self.keys, self.values = rng.standard_normal((2, *shape), np.float32).astype(np.float16)
        self.pages = rng.permutation(len(lengths) * count).astype(np.int32).reshape(-1, count)
        caches = np.full((2, self.pages.size, PAGE_SIZE, *shape[2:]), np.nan, np.float16)
        for cache, whole in zip(caches, (self.keys, self.values), strict=True):
            cache[self.pages] = whole.reshape(*self.pages.shape, PAGE_SIZE, *shape[2:])
        self.k_cache, self.v_cache = (self.tensor(cache) for cache in caches)
        self.inputs = rng.standard_normal((steps, 2, len(lengths), hidden), np.float32)

    def tensor(self, array):
        return Tensor(array, device=self.device).contiguous().realize()

    def empty(self, *shape):
        return Tensor.empty(*shape, dtype=dtypes.float16, device=self.device)


class ByFiFfi:
    """The layer's step; keys and values are in pages anywhere in the cache."""

    def __init__(self, layer):
        self.layer, n = layer, len(layer.lengths)
        of = layer.weights
        projections = {name: lambda x, w=of[name]: (x @ w).contiguous().realize()
                       for name in ("qkv", "out", "gate_up")}  # fmt: skip
        projections["down"] = lambda x, residual: (x @ of["down"] + residual).realize()
        jit = TinyJit if layer.device != "PYTHON" else lambda function: function
        self.project = {name: jit(function) for name, function in projections.items()}
        self.attended = layer.empty(n, layer.qo_heads * HEAD_DIM)
        self.gated = layer.empty(n, layer.gate)
        self.norms = [describe(of[name]) for name in ("attention_norm", "gate_norm")]
        self.caches = [describe(cache) for cache in (layer.k_cache, layer.v_cache)]
        self.requests = layer.tensor(np.arange(n, dtype=np.int32))
        self.plan = None

    def run(self, x, residual, positions):
        layer, stream = self.layer, self.layer.stream
        counts = positions // PAGE_SIZE + 1
        indptr = np.cumsum([0, *counts]).astype(np.int32)
        pages = [own[:count] for own, count in zip(layer.pages, counts, strict=True)]
        batch = indptr, np.concatenate(pages), positions % PAGE_SIZE + 1
        # One copy: tinygrad takes longer to make a tensor than a kernel to run.
        arrays = *batch, positions
        whole = layer.tensor(np.concatenate(arrays))
        starts = np.cumsum([0, *map(len, arrays)]).tolist()
        indptr, indices, last_page_len, on_device = map(describe(whole).rows, starts, starts[1:])
        if self.plan is None:
            self.plan = fi_ffi.BatchDecodePlan(
                *batch, page_size=PAGE_SIZE, num_qo_heads=layer.qo_heads, stream=stream,
                num_kv_heads=layer.kv_heads, head_dim=HEAD_DIM, device=indptr.device,
            )  # fmt: skip
        else:
            self.plan.replan(*batch, stream=stream)

        fi_ffi.fused_add_rmsnorm(
            describe(x), describe(residual), self.norms[0], eps=EPS, stream=stream
        )
        qkv = self.project["qkv"](x)
        q, k, v = self.heads(qkv)
        fi_ffi.apply_rope_pos_ids(q, k, q, k, on_device, rope_theta=THETA, stream=stream)
        fi_ffi.append_paged_kv_cache(
            k, v, describe(self.requests), on_device, *self.caches, indices, indptr, last_page_len,
            stream=stream,
        )  # fmt: skip
        out = describe(self.attended)
        out = fi_ffi.TensorDesc(out.ptr, q.shape, "float16", device=out.device)
        self.plan.run(q, *self.caches, out, stream=stream)
        x = self.project["out"](self.attended)
        fi_ffi.fused_add_rmsnorm(
            describe(x), describe(residual), self.norms[1], eps=EPS, stream=stream
        )
        gate_up = self.project["gate_up"](x)
        fi_ffi.silu_and_mul(describe(self.gated), describe(gate_up), stream=stream)
        return self.project["down"](self.gated, residual)

    def heads(self, qkv):
        """Queries, keys and values, in the memory of the projection."""
        whole, first = describe(qkv), 0
        for count in (self.layer.qo_heads, *[self.layer.kv_heads] * 2):
            yield fi_ffi.TensorDesc(
                whole.ptr + first * HEAD_DIM * 2, (len(qkv), count, HEAD_DIM), "float16",
                strides=(qkv.shape[1], HEAD_DIM, 1), device=whole.device,
            )  # fmt: skip
            first += count


class ByTinygrad:
    """The same without fi_ffi; each request's keys and values are side by side."""

    def __init__(self, layer, dtype, jit=False):
        self.layer, self.dtype = layer, dtype
        self.weights = {name: w.cast(dtype).realize() for name, w in layer.weights.items()}
        self.keys, self.values = (layer.tensor(a).cast(dtype).contiguous().realize()
                                  for a in (layer.keys, layer.values))  # fmt: skip
        self.step = TinyJit(self.own) if jit else self.own

    def run(self, x, residual, positions):
        return self.step(x, residual, self.layer.tensor(positions))

    def own(self, x, residual, positions):
        layer, of, (n, _) = self.layer, self.weights, x.shape
        groups = layer.qo_heads // layer.kv_heads
        x, residual = x.cast(self.dtype), residual.cast(self.dtype)

        def norm(x, weight):
            wide = x.float()
            return (wide * (wide.square().mean(-1, keepdim=True) + EPS).rsqrt()).cast(
                self.dtype
            ) * weight

        def turn(x):
            pairs = Tensor.arange(0, HEAD_DIM, 2).float() / HEAD_DIM
            angles = (positions.float().unsqueeze(1) * THETA**-pairs).unsqueeze(1)
            a, b = x.float().chunk(2, dim=-1)
            cos, sin = angles.cos(), angles.sin()
            return (a * cos - b * sin).cat(b * cos + a * sin, dim=-1).cast(self.dtype)

        residual = x + residual
        qkv = (norm(residual, of["attention_norm"]) @ of["qkv"]).reshape(n, -1, HEAD_DIM)
        q, k, v = qkv.split([layer.qo_heads, layer.kv_heads, layer.kv_heads], dim=1)
        q, k = turn(q), turn(k)
        places = Tensor.arange(layer.room).reshape(1, -1, 1, 1)
        last = positions.reshape(-1, 1, 1, 1)
        self.keys.assign((places == last).where(k.unsqueeze(1), self.keys))
        self.values.assign((places == last).where(v.unsqueeze(1), self.values))
        q = q.reshape(n, layer.kv_heads, groups, HEAD_DIM)
        logits = (q @ self.keys.permute(0, 2, 3, 1)).float() * HEAD_DIM**-0.5
        logits = (places.reshape(1, 1, 1, -1) <= last).where(logits, -float("inf"))
        attended = logits.softmax(-1).cast(self.dtype) @ self.values.permute(0, 2, 1, 3)
        residual = residual + attended.reshape(n, -1) @ of["out"]
        gate, up = (norm(residual, of["gate_norm"]) @ of["gate_up"]).chunk(2, dim=-1)
        result = residual + (gate.silu() * up) @ of["down"]
        return result.realize(self.keys, self.values)


def run(layer, of, steps):
    """What each step gives, of `ByFiFfi` or of `ByTinygrad`."""
    for step in range(steps):
        given = map(layer.tensor, layer.inputs[step].astype(np.float16))
        yield of.run(*given, layer.lengths + step).numpy()


def check(layer, expected):
    """Compare each step with what tinygrad alone gave in float32; return the largest error."""
    worst = 0.0
    for step, got in enumerate(run(layer, ByFiFfi(layer), len(expected))):
        error = np.abs(got - expected[step]).max() / np.abs(expected[step]).max()
        assert error < BOUND, f"step {step} is wrong: {error:.1e}, {BOUND:.1e} allowed"
        worst = max(worst, error)
    return worst


def times(layer, steps):
    """Microseconds of a step of each, after three that compile."""
    for name, of in (("fi_ffi", ByFiFfi(layer)),
                     ("tinygrad alone", ByTinygrad(layer, dtypes.float16, jit=True))):  # fmt: skip
        given = [[*map(layer.tensor, x.astype(np.float16))] for x in layer.inputs]
        for step in range(steps):
            if step == 3:
                Device[layer.device].synchronize()
                start = time.perf_counter()
            of.run(*given[step], layer.lengths + step).realize()
        Device[layer.device].synchronize()
        print(f"{name}: {(time.perf_counter() - start) / (steps - 3) * 1e6:,.0f} µs a step")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cpu", action="store_true", help="reference kernels on the CPU")
    parser.add_argument("--times", action="store_true", help="microseconds of a step, on a GPU")
    args = parser.parse_args()
    device, sizes = "CUDA", (1024, 8, 2, 2048, (15, 64, 33, 700), 20)
    if args.cpu:
        device, sizes = cpu(), (8, 2, 1, 8, (15, 3), 2)
    else:
        use_primary_context(Device[device])
    with Context(DEV=device):
        layer = Layer(device, *sizes)
        worst = check(layer, [*run(layer, ByTinygrad(layer, dtypes.float32), sizes[-1])])
        print(f"{sizes[-1]} steps on {device}: largest error {worst:.1e}, {BOUND:.1e} allowed")
        if args.times:
            times(Layer(device, 2048, 32, 8, 8192, [1000] * 16, 53), 53)


def cpu():
    """tinygrad's CPU device where there is clang, which it calls; else its interpreter."""
    return "CPU" if shutil.which(os.environ.get("CC", "clang")) else "PYTHON"


if __name__ == "__main__":
    main()
