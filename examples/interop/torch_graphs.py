"""A decode step captured with `torch.cuda.graph`, and replayed as the requests grow.

The rules:
- Tensors that are captured stay where they are: new inputs are copied into them.
- Once before the capture the step is run, on a stream of its own as torch wants it: kernels are
  loaded by the first call, which a capture forbids.
- Plan and replan outside of the capture, with `enable_cuda_graph=True` and `max_num_indices` for
  the most pages to come; a plan in a capture is refused.  A replan copies its arrays on the stream
  it is given: give it the one that the graph is replayed on, and the order is right.
- Prepared calls without a stream are on that of the open scope: the capture's, here.
- A plan's workspace is not torch's memory: keep the plan as long as the graph.

With --cpu there are no graphs: the step itself is run each time.
"""

import argparse

import checks
import numpy as np
import torch

import fi_ffi


def current(device):
    return None if device == "cpu" else torch.cuda.current_stream()


def captured(step, device):
    """What makes the step again: the replay of a graph, or on the CPU the step."""
    if device == "cpu":
        return lambda: step(0)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(side)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(torch.cuda.current_stream())  # which inside the block is the capture's
    return graph.replay


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cpu", action="store_true", help="CPU tensors, and no graph")
    device = "cpu" if parser.parse_args().cpu else "cuda:0"
    tensors = [torch.from_numpy(array).to(device) for array in checks.inputs()]
    x, residual, weight, project, k_cache, v_cache = tensors
    q = torch.empty(checks.HEADS, dtype=x.dtype, device=device)
    out = torch.empty_like(q)
    plan = fi_ffi.BatchDecodePlan(
        *checks.PAGES, **checks.SIZES, enable_cuda_graph=True, max_num_indices=checks.NUM_PAGES,
        device=device, stream=current(device),
    )  # fmt: skip
    norm = fi_ffi.fused_add_rmsnorm.prepare(x, residual, weight)
    decode = fi_ffi.prepare(plan.run, q, k_cache, v_cache, out)

    def step(stream):
        with fi_ffi.stream(stream):
            norm()
            torch.mm(x, project, out=q.view(x.shape))
            decode()

    replay = captured(step, device)
    for longer in range(3):  # a token more of each request, where its last page has room
        indptr, indices, last = checks.PAGES
        lengths = np.minimum(last + longer, checks.PAGE_SIZE).astype(np.int32)
        plan.replan(indptr, indices, lengths, stream=current(device))
        for tensor, array in zip((x, residual), checks.inputs(), strict=False):
            tensor.copy_(torch.from_numpy(array))
        out.fill_(float("nan"))
        expected = checks.rmsnorm(torch, x, residual, weight)
        replay()
        checks.check_step(torch, expected, residual, x, q, k_cache, v_cache, out, lengths)


if __name__ == "__main__":
    main()
