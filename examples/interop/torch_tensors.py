"""A decode step on torch tensors: fi_ffi's norm, torch's projection, fi_ffi's attention.

The tensors are made on torch's default stream and used on one of the example's own, as an
inference server does that overlaps its steps.

The rules: `stream=torch.cuda.current_stream()` is all that is needed while everything is on one
stream.  Where fi_ffi works on another stream than the one that a tensor was made on, torch must
be told twice: `wait_stream`, since nothing is ordered between streams, and `record_stream`, since
the caching allocator gives a tensor's memory to the next one of its own stream as soon as Python
lets go of it.  Gradients do not pass a call: what it writes was computed by nothing that torch saw.

With --cpu: torch's CPU tensors, and reference kernels.
"""

import argparse
from contextlib import nullcontext

import checks
import torch

import fi_ffi


def step(tensors, device, stream):
    x, residual, weight, project, k_cache, v_cache = tensors
    plan = fi_ffi.BatchDecodePlan(*checks.PAGES, **checks.SIZES, device=device, stream=stream)
    fi_ffi.fused_add_rmsnorm(x, residual, weight, stream=stream)
    q = (x @ project).view(checks.HEADS)
    out = torch.full_like(q, float("nan"))
    plan.run(q, k_cache, v_cache, out, stream=stream)
    return q, out


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cpu", action="store_true", help="reference kernels on CPU tensors")
    device = "cpu" if parser.parse_args().cpu else "cuda:0"
    tensors = [torch.from_numpy(array).to(device) for array in checks.inputs()]
    x, residual, weight, _, k_cache, v_cache = tensors
    expected = checks.rmsnorm(torch, x, residual, weight)  # x and residual change below

    side = None if device == "cpu" else torch.cuda.Stream()
    if side is not None:
        side.wait_stream(torch.cuda.current_stream())
    with nullcontext() if side is None else torch.cuda.stream(side):
        q, out = step(tensors, device, side)
    if side is not None:
        for tensor in tensors:  # made on the current stream, used on `side`
            tensor.record_stream(side)
        for tensor in (q, out):  # the other way round
            tensor.record_stream(torch.cuda.current_stream())
        torch.cuda.current_stream().wait_stream(side)

    checks.check_step(torch, expected, residual, x, q, k_cache, v_cache, out)


if __name__ == "__main__":
    main()
