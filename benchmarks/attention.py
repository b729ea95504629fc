"""GPU time of attention, beside flashinfer-python's on the same kernel files.

    python3 benchmarks/attention.py [--rounds 15] [--calls 20]

Needs a GPU, torch, flashinfer-python of the kernels' release and the kernel wheel
installed (`pip install flashinfer_jit_cache-….whl`), so that both load the same files.
One process; each round times `--calls` calls of one, then of the other, with CUDA
events; the ratio is of the medians.  Also compares which backend each chooses.
"""

from __future__ import annotations

import argparse
import functools
import itertools
from collections.abc import Callable, Iterator

import flashinfer
import numpy as np
import torch
from flashinfer.utils import determine_attention_backend
from marks.batches import HEADS, KV_HEADS, PAGE
from marks.gpu import event_time
from marks.timing import Effort, Side, measure

import fi_ffi
from fi_ffi.abi.tensor import parse_device
from fi_ffi.ops.attention.backends import POS_ENCODING_MODES, Kernel, Target, choose_backend

Pair = tuple[str, Callable[[], object], Callable[[], object]]


def random(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float32, device="cuda").to(dtype)


def host(values: list[int]) -> np.ndarray:
    return np.array(values, np.int32)


def on_device(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array).cuda()


def workspace() -> torch.Tensor:
    return torch.empty(256 * 2**20, dtype=torch.uint8, device="cuda")


def ragged(stream: int, tokens: int, head_dim: int, backend: str) -> Pair:
    q = random(tokens, HEADS, head_dim)
    k, v = random(tokens, KV_HEADS, head_dim), random(tokens, KV_HEADS, head_dim)
    mine, theirs = torch.empty_like(q), torch.empty_like(q)
    indptr = host([0, tokens])
    plan = fi_ffi.BatchPrefillPlan(
        indptr, kv_indptr=indptr, num_qo_heads=HEADS, num_kv_heads=KV_HEADS,
        head_dim_qk=head_dim, causal=True, backend=backend, stream=stream,
    )  # fmt: skip
    wrapper = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(workspace(), "NHD", backend=backend)
    wrapper.plan(on_device(indptr), on_device(indptr), HEADS, KV_HEADS, head_dim, causal=True)
    assert wrapper._backend == plan.backend
    name = f"ragged prefill {tokens}, head_dim {head_dim}, {backend}: {plan.backend}"
    mine_run = lambda: plan.ragged_run(q, k, v, mine, stream=stream)  # noqa: E731
    return compared(name, mine, theirs, mine_run, lambda: wrapper.run(q, k, v, out=theirs))


def pages(batch: int, kv_len: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    each = -(-kv_len // PAGE)
    indptr = host([i * each for i in range(batch + 1)])
    indices = np.random.default_rng().permutation(batch * each).astype(np.int32)
    return indptr, indices, host([kv_len - (each - 1) * PAGE] * batch), batch * each


def paged(stream: int, batch: int, qo_len: int, kv_len: int, backend: str) -> Pair:
    indptr, indices, last, count = pages(batch, kv_len)
    qo_indptr = host([i * qo_len for i in range(batch + 1)])
    q, cache = random(batch * qo_len, HEADS, 128), random(count, 2, PAGE, KV_HEADS, 128)
    mine, theirs = torch.empty_like(q), torch.empty_like(q)
    plan = fi_ffi.BatchPrefillPlan(
        qo_indptr, paged_kv_indptr=indptr, paged_kv_indices=indices, paged_kv_last_page_len=last,
        page_size=PAGE, num_qo_heads=HEADS, num_kv_heads=KV_HEADS, head_dim_qk=128, causal=True,
        backend=backend, stream=stream,
    )  # fmt: skip
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace(), "NHD", backend=backend)
    wrapper.plan(
        *map(on_device, (qo_indptr, indptr, indices, last)), HEADS, KV_HEADS, 128, PAGE, causal=True
    )
    assert wrapper._backend == plan.backend
    name = f"paged prefill {batch} x {qo_len} of {kv_len}, {backend}: {plan.backend}"
    k, v = fi_ffi.split_paged_kv_cache(cache)
    mine_run = lambda: plan.paged_run(q, k, v, mine, stream=stream)  # noqa: E731
    return compared(name, mine, theirs, mine_run, lambda: wrapper.run(q, cache, out=theirs))


def decode(stream: int, batch: int, kv_len: int) -> Pair:
    indptr, indices, last, count = pages(batch, kv_len)
    q, cache = random(batch, HEADS, 128), random(count, 2, PAGE, KV_HEADS, 128)
    mine, theirs = torch.empty_like(q), torch.empty_like(q)
    plan = fi_ffi.BatchDecodePlan(
        indptr, indices, last, num_qo_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=128,
        page_size=PAGE, stream=stream,
    )  # fmt: skip
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace(), "NHD")
    wrapper.plan(*map(on_device, (indptr, indices, last)), HEADS, KV_HEADS, 128, PAGE)
    k, v = fi_ffi.split_paged_kv_cache(cache)
    mine_run = lambda: plan.run(q, k, v, mine, stream=stream)  # noqa: E731
    name = f"decode {batch} of {kv_len}"
    return compared(name, mine, theirs, mine_run, lambda: wrapper.run(q, cache, out=theirs))


def mla(stream: int, batch: int, kv_len: int, backend: str) -> Pair:
    indptr, indices, _, count = pages(batch, kv_len)
    dtype, qo_indptr, lens = torch.bfloat16, host(list(range(batch + 1))), host([kv_len] * batch)
    q, q_pe = random(batch, 128, 512, dtype=dtype), random(batch, 128, 64, dtype=dtype)
    ckv, kpe = random(count, PAGE, 512, dtype=dtype), random(count, PAGE, 64, dtype=dtype)
    mine, theirs = torch.empty_like(q), torch.empty_like(q)
    plan = fi_ffi.BatchMlaPlan(
        qo_indptr, indptr, indices, lens, num_heads=128, page_size=PAGE, backend=backend,
        stream=stream,
    )  # fmt: skip
    wrapper = flashinfer.mla.BatchMLAPagedAttentionWrapper(workspace(), backend=backend)
    scale = 192**-0.5
    wrapper.plan(
        *map(on_device, (qo_indptr, indptr, indices, lens)), 128, 512, 64, PAGE, False, scale,
        dtype, dtype,
    )  # fmt: skip
    assert wrapper._backend == plan.backend
    name = f"MLA {batch} of {kv_len}, {backend}: {plan.backend}"
    mine_run = lambda: plan.run(q, q_pe, ckv, kpe, mine, stream=stream, sm_scale=scale)  # noqa: E731
    return compared(
        name, mine, theirs, mine_run, lambda: wrapper.run(q, q_pe, ckv, kpe, out=theirs)
    )


def single(stream: int, tokens: int, backend: str) -> Pair:
    q = random(tokens, HEADS, 128)
    k, v = random(tokens, KV_HEADS, 128), random(tokens, KV_HEADS, 128)
    mine, tmp = torch.empty_like(q), workspace()
    mine_run = lambda: fi_ffi.single_prefill(  # noqa: E731
        q, k, v, tmp, mine, causal=True, backend=backend, stream=stream
    )
    theirs = flashinfer.single_prefill_with_kv_cache(q, k, v, causal=True, backend=backend)
    theirs_run = lambda: flashinfer.single_prefill_with_kv_cache(  # noqa: E731
        q, k, v, causal=True, backend=backend
    )
    return compared(f"single prefill {tokens}, {backend}", mine, theirs, mine_run, theirs_run)


def compared(
    name: str,
    mine: torch.Tensor,
    theirs: torch.Tensor,
    mine_run: Callable[[], object],
    theirs_run: Callable[[], object],
) -> Pair:
    """Both, after one call of each gave the same bits."""
    mine_run()
    theirs_run()
    torch.cuda.synchronize()
    assert torch.equal(mine, theirs), f"{name}: not the same result"
    return name, mine_run, theirs_run


def compare_choices() -> tuple[int, int, list[str]]:
    """How many of all that one could ask for fi_ffi's "auto" serves and refuses, and where
    it serves otherwise than FlashInfer's."""
    target, differences, served, refused = Target.of("benchmark", parse_device("cuda:0")), [], 0, 0
    names = {
        "float16": torch.float16,
        "bfloat16": torch.bfloat16,
        "float8_e4m3fn": torch.float8_e4m3fn,
    }
    for q, kv, encoding, mask, fp16 in itertools.product(
        names, names, POS_ENCODING_MODES, (False, True), (False, True)
    ):
        kernel = Kernel("batch_prefill", q, kv, "float16", 128, 128, encoding, False, False, fp16)
        theirs = determine_attention_backend(
            torch.device("cuda:0"), POS_ENCODING_MODES[encoding], fp16, mask, names[q], names[kv]
        )
        try:
            mine = choose_backend(target, "auto", kernel, mask)[0]
        except fi_ffi.ArgumentError:
            refused += 1  # what no kernel can do; FlashInfer names one without a look
            continue
        served += 1
        if mine != theirs:
            asked = f"{q} {kv} {encoding} mask={mask} fp16={fp16}"
            differences.append(f"{asked}: {mine}, FlashInfer {theirs}")
    return served, refused, differences


def pairs(stream: int) -> Iterator[Pair]:
    for backend, head_dim in itertools.product(("auto", "fa2"), (64, 128, 256)):
        yield ragged(stream, 4096, head_dim, backend)
    for backend in ("auto", "fa2"):
        yield paged(stream, 16, 256, 4096, backend)
        yield mla(stream, 64, 4096, backend)
        yield single(stream, 4096, backend)
    yield decode(stream, 64, 4096)
    yield decode(stream, 256, 2048)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--calls", type=int, default=20)
    arguments = parser.parse_args()
    effort = Effort(arguments.rounds, arguments.calls, arguments.calls)
    timer = functools.partial(event_time, torch)
    stream = torch.cuda.Stream()
    torch.cuda.set_stream(stream)
    print(torch.cuda.get_device_name(), f"flashinfer-python {flashinfer.__version__}")
    print("| case | fi_ffi ms | flashinfer ms | ratio |\n|---|---|---|---|")
    for name, mine, theirs in pairs(stream.cuda_stream):
        sides = [Side("fi_ffi", timer(mine), mine), Side("flashinfer", timer(theirs), theirs)]
        figures = measure(sides, effort, stream.synchronize).values()
        a, b = (figure.median / 1e6 for figure in figures)
        print(f"| {name} | {a:.4f} | {b:.4f} | {a / b:.3f} |", flush=True)
    served, refused, differences = compare_choices()
    print(f"backends: {served} combinations served, {len(differences)} by another than FlashInfer")
    print(f"{refused} refused, which no kernel can do")
    print("\n".join(differences))


if __name__ == "__main__":
    main()
