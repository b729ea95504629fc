"""A decode step on cupy arrays: fi_ffi's norm, cupy's projection, fi_ffi's attention.

fi_ffi takes cupy arrays as they are and writes into them.  All three are on one stream, so that
nobody waits for anybody.

The rule: call on the stream that is current in cupy.  Its memory pool keeps what an array leaves
for the next array made on the same stream, at once and without waiting.  On that stream this is
the right order.  On another one, keep each array until that stream has done its work, or has been
waited for (`cupy.cuda.get_current_stream().wait_event(other.record())`).

With --cpu: the same lines with numpy for cupy, and reference kernels.
"""

import argparse
from contextlib import nullcontext

import checks

import fi_ffi


def step(xp, device, stream):
    x, residual, weight, project, k_cache, v_cache = map(xp.asarray, checks.inputs())
    expected = checks.rmsnorm(xp, x, residual, weight)  # x and residual change below
    plan = fi_ffi.BatchDecodePlan(*checks.PAGES, **checks.SIZES, device=device, stream=stream)

    fi_ffi.fused_add_rmsnorm(x, residual, weight, stream=stream)
    q = (x @ project).reshape(checks.HEADS)
    out = xp.full_like(q, xp.nan)
    plan.run(q, k_cache, v_cache, out, stream=stream)

    checks.check_step(xp, expected, residual, x, q, k_cache, v_cache, out)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cpu", action="store_true", help="reference kernels on numpy arrays")
    if parser.parse_args().cpu:
        import numpy as xp

        device, stream = "cpu", None
    else:
        import cupy as xp

        device, stream = "cuda:0", xp.cuda.Stream(non_blocking=True)
    with stream or nullcontext():
        step(xp, device, stream)


if __name__ == "__main__":
    main()
