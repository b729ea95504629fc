"""What ops cost in a jitted step: host microseconds, and how often XLA calls Python.

    python3 benchmarks/jax_in_jit.py [--steps 200]

A step is eight norms, each behind a fused multiply-add, or eight decodes of 16 requests of 1,024
tokens, each behind a multiplication. `recorded` is with XLA's command buffers as they are by
default; `not recorded` is without (XLA_FLAGS=--xla_gpu_enable_command_buffer=), in a process of its
own. `jax's own` is the norms in jax.numpy; jax-tvm-ffi, where it is installed, calls the same
kernel as fi_ffi.jax. Buffers repeat where each step takes the same array, and change where it takes
the result of the one before. Medians of five rounds, by turns.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
import subprocess
import sys
import time

import numpy as np

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


def peer():
    """Return jax-tvm-ffi's rmsnorm of the same kernel, or None where it is not installed."""
    if importlib.util.find_spec("jax_tvm_ffi") is None:
        return None
    import jax
    import jax_tvm_ffi
    import tvm_ffi

    from fi_ffi.loader.search import find_module

    if jax.default_backend() != "gpu":
        return None
    path = find_module("norm", 0)[1].path
    order = ["rets", "args", "attrs.eps", "attrs.enable_pdl"]
    jax_tvm_ffi.register_ffi_target(
        "peer.rmsnorm", tvm_ffi.load_module(str(path)).rmsnorm, order, "gpu", allow_cuda_graph=True
    )

    def norm(x, weight):
        kind = jax.ShapeDtypeStruct(x.shape, x.dtype)
        call = jax.ffi.ffi_call("peer.rmsnorm", kind)
        return call(x, weight, eps=np.float64(1e-6), enable_pdl=np.bool_(False))

    return norm


def attention(jax, jnp, fi_ffi):
    """Return the sides of eight decodes of 16 requests of 1,024 tokens, and their arrays."""
    requests, pages, heads, kv_heads, size = 16, 64, 32, 8, 128
    device = "cpu" if jax.default_backend() == "cpu" else "cuda:0"
    count = requests * pages
    plan = fi_ffi.BatchDecodePlan(
        np.arange(0, count + 1, pages, dtype=np.int32), np.arange(count, dtype=np.int32),
        np.full(requests, 16, np.int32), num_qo_heads=heads, num_kv_heads=kv_heads, head_dim=size,
        page_size=16, device=device, stream=0, enable_cuda_graph=True,
    )  # fmt: skip

    def own(q, k, v):
        dense = (each.reshape(requests, -1, kv_heads, size) for each in (k, v))
        return jax.nn.dot_product_attention(q[:, None], *dense)[:, 0]

    def stepped(attend):
        def step(q, k, v):
            for _ in range(8):
                q = attend(q * 1.5, k, v)
            return q

        return jax.jit(step)

    rng = np.random.default_rng(0)
    shapes = (requests, heads, size), *[(count, 16, kv_heads, size)] * 2
    arrays = [jnp.asarray(rng.standard_normal(shape, np.float32), jnp.float16) for shape in shapes]
    sides = {"fi_ffi.jax.run of a plan": stepped(lambda *arrays: fi_ffi.jax.run(plan, *arrays))}
    if device != "cpu":  # where XLA has no product of float16
        sides["jax.nn.dot_product_attention"] = stepped(own)
    return sides, arrays


def measure(name: str, steps: int) -> None:
    theirs = peer()  # before fi_ffi loads anything: there is to be one libtvm_ffi
    import jax
    import jax.numpy as jnp

    import fi_ffi.jax

    calls = [0]
    find = fi_ffi.jax.primitive.handlers._find

    def counting(function: str):
        calls[0] += 1
        return find(function)

    fi_ffi.jax.primitive.handlers._find = counting

    def own(x, weight):
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt((wide**2).mean(-1, keepdims=True) + 1e-6)
        return (wide * weight).astype(x.dtype)

    def stepped(norm):
        def step(x, weight):
            for _ in range(8):
                x = norm(x * 1.5 + 0.25, weight)
            return x

        return jax.jit(step)

    def pure(x, weight):
        kind = jax.ShapeDtypeStruct(x.shape, x.dtype)
        return jax.pure_callback(lambda x, w: x, kind, x, weight)

    sides = {
        "fi_ffi.jax": stepped(lambda x, w: fi_ffi.jax.rmsnorm(x, w, eps=1e-6)),
        "jax's own": stepped(own),
        "jax.pure_callback, which does nothing": stepped(pure),
    }
    if theirs is not None:
        sides["jax-tvm-ffi"] = stepped(theirs)
    x, weight = jnp.ones((64, 4096), jnp.bfloat16), jnp.ones(4096, jnp.bfloat16)
    given = {side: (step, x, (weight,)) for side, step in sides.items()}
    decodes, (q, *caches) = attention(jax, jnp, fi_ffi)
    given |= {side: (step, q, caches) for side, step in decodes.items()}
    times = {(side, kind): [] for side in given for kind in ("repeat", "change")}
    python = dict.fromkeys(times, 0)
    for number in range(6):
        for side, (step, first, rest) in given.items():
            for kind in ("repeat", "change"):
                count = steps // 10 if "pure" in side else steps
                y, before = jax.block_until_ready(step(first, *rest)), calls[0]
                start = time.perf_counter()
                for _ in range(count):
                    y = step(y if kind == "change" else first, *rest)
                jax.block_until_ready(y)
                if number:
                    times[side, kind].append((time.perf_counter() - start) / count * 1e6)
                    python[side, kind] = (calls[0] - before) / count
    for (side, kind), found in times.items():
        each, count = statistics.median(found), python[side, kind]
        print(f"{name:13} {side:38} {kind:7} {each:9.1f} us a step, Python {count:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--as", dest="name", default="")
    given = parser.parse_args()
    if given.name:
        measure(given.name, given.steps)
        return
    for name, flags in (("recorded", ""), ("not recorded", "--xla_gpu_enable_command_buffer=")):
        flags = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()
        environment = {**os.environ, "XLA_FLAGS": flags}
        command = [sys.executable, __file__, "--as", name, "--steps", str(given.steps)]
        subprocess.run(command, env=environment, check=True)


if __name__ == "__main__":
    main()
