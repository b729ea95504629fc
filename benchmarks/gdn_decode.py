"""`gdn_decode` beside flashinfer-python's, whose kernels its own JIT compiles, on a Hopper.

    FI_FFI_KERNELS=DIR python3 benchmarks/gdn_decode.py [--flashinfer FOLDER]

For states of bfloat16 and float32, one token and four, and 1, 64 and 512 requests: whether output
and states are the same bits; microseconds of the kernel, the median of 60 CUDA graphs of 20 calls
replayed in turns; and of the host for a call: with descriptors, with torch's tensors, prepared, and
of FlashInfer's function in Python.  Needs torch, nvidia-cutlass-dsl, and CuTe modules of release
0.7.2 or later in DIR.  FOLDER has flashinfer/ in it, of which gdn_decode.py and gdn_kernels/ are
enough; without FlashInfer the rest of the line is left out.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import sys
import time
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import fi_ffi

_HEADS, _V_HEADS, _SIZE = 16, 32, 128  # Qwen3-Next's
_CALLS, _ROUNDS = 20, 60


def flashinfer_decode(folder: Path) -> Callable[..., Any]:
    """FlashInfer's public function, with nothing of the package but what it calls."""
    for path in list(sys.path):  # as nvidia-cutlass-dsl's .pth does, where it is a plain folder
        for part in ("dsl_packages", "python_packages"):
            if (found := Path(path) / "nvidia_cutlass_dsl" / part).is_dir():
                sys.path.append(str(found))
    root = folder / "flashinfer"

    def bare(name: str, path: Path | None = None, **attributes: Any) -> None:
        made: Any = types.ModuleType(name)
        if path is not None:
            made.__path__ = [str(path)]
        vars(made).update(attributes)
        sys.modules[name] = made

    def api(function: Any = None, *, trace: object = None) -> Any:
        return function or (lambda function: function)

    bare("flashinfer", root)
    bare("flashinfer.gdn_kernels", root / "gdn_kernels")
    bare("flashinfer.jit", root / "jit")
    logger = types.SimpleNamespace(warning_once=print, info=print, debug=print)
    bare("flashinfer.jit.core", logger=logger)
    build = lambda module, name, compile_fn, **_: compile_fn()  # noqa: E731
    bare("flashinfer.jit.cute_dsl_core", build_and_load_cute_dsl_kernel=build)
    capability = torch.cuda.get_device_capability()
    bare("flashinfer.utils", get_compute_capability=lambda device: capability)
    bare("flashinfer.api_logging", flashinfer_api=api)
    bare("flashinfer.trace")
    bare("flashinfer.trace.templates")
    traces = ("gated_delta_rule_decode", "gdn_mtp", "gdn_replayssm_commit")
    bare("flashinfer.trace.templates.gdn", **dict.fromkeys(f"{name}_trace" for name in traces))
    return importlib.import_module("flashinfer.gdn_decode").gated_delta_rule_decode_pretranspose


def host_time(call: Callable[[], object], calls: int = 200, rounds: int = 7) -> float:
    """Microseconds of a call, the GPU not waited for: the median of rounds."""
    times = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(calls):
            call()
        times.append((time.perf_counter() - begin) / calls * 1e6)
        torch.cuda.synchronize()
    return statistics.median(times)


def graph_of(call: Callable[[], object]) -> torch.cuda.CUDAGraph:
    with torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(3):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(_CALLS):
            call()
    return graph


def kernel_times(graphs: Sequence[torch.cuda.CUDAGraph]) -> list[float]:
    """Microseconds of a call of each, replayed in turns."""
    found: list[list[float]] = [[] for _ in graphs]
    for graph in graphs:
        graph.replay()
    for turn in range(_ROUNDS):
        order = list(range(len(graphs)))
        for i in order if turn % 2 else reversed(order):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graphs[i].replay()
            end.record()
            end.synchronize()
            found[i].append(begin.elapsed_time(end) * 1e3 / _CALLS)
    return [statistics.median(times) for times in found]


def stream() -> int:
    return int(torch.cuda.current_stream().cuda_stream)


def compare(theirs: Callable[..., Any] | None, dtype: torch.dtype, tokens: int, b: int) -> str:
    """The line of such a call."""
    bf, on = torch.bfloat16, {"device": "cuda"}
    q, k = (torch.randn(b, tokens, _HEADS, _SIZE, **on).to(bf) for _ in range(2))
    v = torch.randn(b, tokens, _V_HEADS, _SIZE, **on).to(bf)
    a, gate = (torch.randn(b, tokens, _V_HEADS, **on).to(bf) for _ in range(2))
    a_log, dt_bias = torch.rand(_V_HEADS, **on), torch.rand(_V_HEADS, **on)
    slots = b + 7
    pools = [torch.randn(slots, _V_HEADS, _SIZE, _SIZE, **on).mul_(0.1).to(dtype)]
    pools.append(pools[0].clone())
    index = (1 + torch.randperm(slots - 1, **on)[:b]).to(torch.int32)
    outs = [torch.full((b, tokens, _V_HEADS, _SIZE), torch.nan, dtype=bf, **on) for _ in range(2)]
    given = {
        "q": q, "k": k, "v": v, "state": pools[0], "A_log": a_log, "a": a, "dt_bias": dt_bias,
        "b": gate, "output": outs[0], "initial_state_indices": index,
    }  # fmt: skip
    descs = {name: fi_ffi.as_desc(tensor) for name, tensor in given.items()}
    at = stream()
    prepared = fi_ffi.prepare(fi_ffi.gdn_decode, **descs, stream=at)
    ours = lambda: fi_ffi.gdn_decode(**given, stream=stream())  # noqa: E731
    described = lambda: fi_ffi.gdn_decode(**descs, stream=at)  # noqa: E731
    told = f"{str(dtype).removeprefix('torch.'):9}{tokens:3}{b:5} "
    ours()
    hosts = [host_time(call) for call in (described, ours, prepared)]
    of_ours = " ".join(f"{one:6.1f}" for one in hosts)
    if theirs is None:
        return f"{told} {kernel_times([graph_of(ours)])[0]:8.2f} | {of_ours}"
    pools[1].copy_(pools[0])
    more = {"initial_state": pools[1], "initial_state_indices": index, "backend": "flashinfer"}
    other = lambda: theirs(  # noqa: E731
        q, k, v, None, a_log, a, dt_bias, gate, output=outs[1], disable_state_update=False, **more
    )
    ours()
    other()
    torch.cuda.synchronize()
    bits = all(torch.equal(x.view(torch.uint8), y.view(torch.uint8)) for x, y in (outs, pools))
    assert torch.isfinite(outs[0].float()).all(), "states of no use"
    kernel, reference = kernel_times([graph_of(ours), graph_of(other)])
    host = host_time(other)
    ratios = " ".join(f"{one / host:5.2f}" for one in hosts)
    return (
        f"{told} {'same' if bits else 'NOT the same'} bits | {kernel:8.2f} / {reference:8.2f} = "
        f"{kernel / reference:.3f} | {of_ours} / {host:5.1f} = {ratios}"
    )


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--flashinfer", type=Path, metavar="FOLDER")
    folder = parser.parse_args().flashinfer
    theirs = flashinfer_decode(folder) if folder else None
    torch.manual_seed(0)
    print("states   tokens b | kernel us | host us: descriptors, torch, prepared")
    for dtype in (torch.bfloat16, torch.float32):
        for tokens in (1, 4):
            for b in (1, 64, 512):
                print(compare(theirs, dtype, tokens, b), flush=True)


if __name__ == "__main__":
    main()
