"""A decode step on jax arrays: fi_ffi's norm, a jitted projection, fi_ffi's attention.

jax's arrays are immutable, and its compiler counts on it.  Reading one is right as soon as it is
ready.  Writing into one is right only for a buffer that nobody else has, jax included:
- make it for the purpose (`jnp.array(..., copy=True)`, `jnp.zeros`), and write before it is given
  to anything else.  `jnp.asarray` may return its argument, or an array in its memory;
- never one that was printed or given to numpy: jax keeps that copy, and shows it ever after;
- a donated array is gone: jax refuses to hand it out.

jax works on streams of its own and knows nothing of anybody else's work: wait on the host both
ways, with `block_until_ready` before fi_ffi's calls, and for the stream after them.  That is dear
in every layer; what runs inside a jitted function goes through jax.ffi, which this is not.
jax takes most of the GPU's memory when it starts: XLA_PYTHON_CLIENT_PREALLOCATE=false leaves room.

With --cpu: jax's CPU arrays, and reference kernels.
"""

import argparse
import os

import checks
import numpy as np

import fi_ffi


class Stream:
    """A stream of this program's, with cuda-python; on the CPU none."""

    def __init__(self, cpu):
        self.handle = None
        if not cpu:
            from cuda.bindings import runtime

            self.cudart = runtime
            error, self.handle = runtime.cudaStreamCreateWithFlags(runtime.cudaStreamNonBlocking)
            assert not int(error), error.name

    def wait(self):
        if self.handle is not None:
            (error,) = self.cudart.cudaStreamSynchronize(self.handle)
            assert not int(error), error.name


def step(jax, device, stream):
    jnp = jax.numpy
    x, residual, weight, project, k_cache, v_cache = (
        jnp.array(array, copy=True) for array in checks.inputs()
    )
    expected = jax.jit(checks.rmsnorm, static_argnums=0)(jnp, x, residual, weight)
    plan = fi_ffi.BatchDecodePlan(
        *checks.PAGES, **checks.SIZES, device=device, stream=stream.handle
    )

    # `rmsnorm` still reads x and residual until `expected` is ready.
    jax.block_until_ready((x, residual, weight, expected))
    fi_ffi.fused_add_rmsnorm(x, residual, weight, stream=stream.handle)
    stream.wait()
    q = jax.jit(jnp.matmul)(x, project).reshape(checks.HEADS)
    out = jnp.full(q.shape, np.nan, q.dtype)
    jax.block_until_ready((q, k_cache, v_cache, out))
    plan.run(q, k_cache, v_cache, out, stream=stream.handle)
    stream.wait()

    checks.check_step(jnp, expected, residual, x, q, k_cache, v_cache, out)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cpu", action="store_true", help="CPU arrays, reference kernels")
    cpu = parser.parse_args().cpu
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # before jax starts
    import jax

    if cpu:
        jax.config.update("jax_platforms", "cpu")
    with jax.default_matmul_precision("highest"):  # float32 and not TF32, for the check
        step(jax, "cpu" if cpu else "cuda:0", Stream(cpu))


if __name__ == "__main__":
    main()
