"""Attention of one query a request over a paged cache: `xqa` beside the plans, on a GPU.

    FI_FFI_KERNELS=DIR python3 benchmarks/decode_ways.py [--heads 16 8] [--batch 1 8 64]

Microseconds of a call in CUDA graphs of 28 over eight caches, with programmatic dependent launch;
medians of 30 rounds in turns.  All outputs are compared first.  Needs torch, and modules for
bfloat16 of `xqa` (pages of 16, head size 128, this ratio of heads), `batch_decode` and
`batch_prefill` (fa2).
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import numpy as np
import torch

import fi_ffi

_PAGE, _DIM, _LAYERS, _CACHES, _ROUNDS = 16, 128, 28, 8, 30
_LENGTHS = (33, 96, 160, 400, 2000)


def compare(heads: int, kv_heads: int, batch: int, length: int) -> str:
    """The line of a batch whose requests have that many tokens each."""
    on = {"device": "cuda", "dtype": torch.bfloat16}
    each = -(-length // _PAGE)
    count = each * batch
    caches = [torch.randn(count, 2, _PAGE, kv_heads, _DIM, **on) for _ in range(_CACHES)]
    q = torch.randn(batch, heads, _DIM, **on)
    outs = [torch.full_like(q, torch.nan) for _ in range(3)]
    pages = torch.randperm(count, device="cuda").to(torch.int32)
    lengths = torch.full((batch, 1), length, device="cuda", dtype=torch.int32).view(torch.uint32)
    stream = torch.cuda.Stream()
    at = stream.cuda_stream
    indptr = np.arange(batch + 1, dtype=np.int32) * each
    last = np.full(batch, (length - 1) % _PAGE + 1, np.int32)
    some = {
        "num_qo_heads": heads, "num_kv_heads": kv_heads, "page_size": _PAGE, "device": "cuda:0",
        "q_data_type": "bfloat16", "enable_cuda_graph": True, "max_num_indices": count,
        "stream": at,
    }  # fmt: skip
    decode = fi_ffi.BatchDecodePlan(indptr, None, last, head_dim=_DIM, **some)
    prefill = fi_ffi.BatchPrefillPlan(
        np.arange(batch + 1, dtype=np.int32), paged_kv_indptr=indptr, paged_kv_indices=None,
        paged_kv_last_page_len=last, head_dim_qk=_DIM, causal=False, backend="fa2", **some,
    )  # fmt: skip
    more = {"enable_pdl": True, "stream": at}
    table, wide = pages.view(batch, each), (batch, 1, heads, _DIM)
    ways: dict[str, Callable[..., None]] = {
        "xqa": lambda k, v: fi_ffi.xqa(
            q.view(wide), k, v, table, lengths, outs[0].view(wide), **more
        ),
        "BatchDecodePlan": lambda k, v: decode.run(
            q, k, v, outs[1], paged_kv_indices=pages, **more
        ),
        "BatchPrefillPlan": lambda k, v: prefill.paged_run(
            q, k, v, outs[2], paged_kv_indices=pages, **more
        ),
    }  # fmt: skip
    torch.cuda.synchronize()
    graphs = {}
    for name, call in ways.items():
        call(caches[0][:, 0], caches[0][:, 1])
        torch.cuda.synchronize()
        with fi_ffi.capture(at) as graphs[name]:
            for i in range(_LAYERS):
                cache = caches[i % _CACHES]
                call(cache[:, 0], cache[:, 1])
    for out in outs[1:]:
        assert (out.float() - outs[0].float()).abs().max() < 0.02, "the ways differ"
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(_ROUNDS):
        for name, graph in graphs.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record(stream)
            graph.launch(at)
            end.record(stream)
            end.synchronize()
            times[name].append(begin.elapsed_time(end) * 1e3 / _LAYERS)
    told = ", ".join(f"{name} {statistics.median(found):.2f}" for name, found in times.items())
    return f"{heads}/{kv_heads} heads, {batch} of {length}: {told} us"


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--heads", type=int, nargs=2, default=(16, 8), metavar=("Q", "KV"))
    parser.add_argument("--batch", type=int, nargs="+", default=(1, 8, 64))
    given = parser.parse_args()
    torch.manual_seed(0)
    for batch in given.batch:
        for length in _LENGTHS:
            print(compare(*given.heads, batch, length), flush=True)


if __name__ == "__main__":
    main()
