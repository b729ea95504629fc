"""All-reduces of a group beside NCCL's, in graphs: a process for each GPU of this machine.

    FI_FFI_KERNELS=WHEEL python3 benchmarks/comm.py [--ranks 2] [--output DIR]

Two tables, of microseconds a call, the slowest rank's median of some replays, in which the ways
take turns: all-reduces of float16 from 512 B to 64 MiB by every algorithm there is, and all-reduce
+ residual + RMSNorm in one kernel beside NCCL's all-reduce and `fused_add_rmsnorm`; where the
kernels' release allows it (0.7.1), also with programmatic dependent launch.  NCCL is nccl4py's, or
torch's where that is not installed.  Every cell's result is compared with the sum first.  Needs a
GPU for each rank, and kernels: vllm_comm, trtllm_comm, norm.  With --gpus 1 ranks share one, by
turns and without NCCL: that tries the program out, and its times mean nothing.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from packaging.version import Version

import fi_ffi
from fi_ffi import comm
from fi_ffi.comm.memory import copy
from fi_ffi.errors import ArgumentError
from fi_ffi.loader import search
from fi_ffi.ops.call import cuda

KIB, MIB = 1 << 10, 1 << 20
SIZES = (512, 2 * KIB, 8 * KIB, 32 * KIB, 64 * KIB, 128 * KIB, 256 * KIB, 512 * KIB, MIB, 2 * MIB,
         4 * MIB, 8 * MIB, 16 * MIB, 32 * MIB, 64 * MIB)  # fmt: skip
ROWS = ((4096, 1), (4096, 4), (4096, 16), (4096, 64), (6144, 6), (6144, 138))
WAYS = ("oneshot", "twoshot", "vllm", "buffer", "auto", "nccl")
FUSED = ("fused", "with pdl", "nccl + norm")
# Before, a kernel that begins early may read a residual that is not there yet.
PDL_SINCE = Version("0.7.1")
NORM = comm.AllReduceFusionPattern.kARResidualRMSNorm
Call = Callable[[], None]


class TorchNccl:
    """torch's NCCL, on a group's stream."""

    def __init__(self, rank: int, size: int, store: str, stream: int) -> None:
        import torch
        import torch.distributed as dist

        torch.cuda.set_device(rank)
        dist.init_process_group(
            "nccl", init_method=f"file://{store}", rank=rank, world_size=size,
            device_id=torch.device("cuda", rank),
        )  # fmt: skip
        self._torch, self._dist = torch, dist
        self._stream = torch.cuda.ExternalStream(stream, device=rank)

    def tensor(self, desc: fi_ffi.TensorDesc) -> Any:
        return self._torch.from_dlpack(desc)

    def all_reduce(self, tensor: Any) -> None:
        with self._torch.cuda.stream(self._stream):
            self._dist.all_reduce(tensor)


class Rank:
    """One rank: its group, its memory and its stream."""

    def __init__(self, ranks: comm.Ranks, store: str, replays: int, gpus: int) -> None:
        from cuda.bindings import runtime

        from fi_ffi.cli.cuda import check

        self.ranks, self.rank, self.replays = ranks, ranks.rank, replays
        self.index = self.rank % gpus
        self.device = f"cuda:{self.index}"
        check(runtime.cudaSetDevice(self.index))
        self.stream = int(check(runtime.cudaStreamCreateWithFlags(runtime.cudaStreamNonBlocking)))
        self._kept: list[Any] = []
        self.group = comm.Group(
            ranks, device=self.device, max_bytes=SIZES[-1], fusion=comm.FusionSize(8192, 4096)
        )
        self._torch: TorchNccl | None = None
        self._has_nccl = gpus >= ranks.size  # which refuses ranks that share a GPU
        try:
            if self._has_nccl:
                self.group.all_reduce(self.put(np.zeros(8)), algorithm="nccl", stream=self.stream)
        except ArgumentError:  # nccl4py is not installed
            self._torch = TorchNccl(self.rank, ranks.size, store, self.stream)

    def put(self, array: np.ndarray) -> fi_ffi.TensorDesc:
        from fi_ffi.cli.cuda import DeviceArray

        self._kept.append(DeviceArray(array.astype(np.float16), device=self.index))
        return self._kept[-1].desc()

    def free(self) -> None:
        for array in self._kept:
            array.free()
        self._kept = []

    def first(self, desc: fi_ffi.TensorDesc) -> tuple[float, float]:
        """The first and the last element."""
        from cuda.bindings import runtime

        from fi_ffi.cli.cuda import check

        self.group.synchronize(self.stream)
        got = np.empty(2, np.float16)
        kind = runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        for i, at in enumerate((0, desc.span_bytes - 2)):
            address = got[i:].ctypes.data
            check(runtime.cudaMemcpyAsync(address, desc.ptr + at, 2, kind, self.stream))
        check(runtime.cudaStreamSynchronize(self.stream))
        return float(got[0]), float(got[1])

    def nccl(self, x: fi_ffi.TensorDesc, out: fi_ffi.TensorDesc) -> Call:
        """An all-reduce by NCCL; torch's is in place."""
        if self._torch is None:
            return self.reduce(x, out, "nccl")
        torch, tensor = self._torch, self._torch.tensor(x)
        return lambda: torch.all_reduce(tensor)

    def microseconds(self, calls: dict[str, Call], count: int) -> dict[str, float]:
        """The median time of each call in a graph of so many; the graphs are replayed in turn."""
        graphs = {}
        for name, call in calls.items():
            call()  # what is loaded or allocated at the first is no part of a graph
            self.group.synchronize(self.stream)
            with fi_ffi.capture(self.stream, device=self.device) as graphs[name]:
                for _ in range(count):
                    call()
        times: dict[str, list[float]] = {name: [] for name in calls}
        for number in range(self.replays + 3):
            for name, graph in graphs.items():
                self.ranks.barrier()
                with cuda.current(self.group.device):
                    start, end = cuda.Event(timing=True), cuda.Event(timing=True)
                start.record(self.stream)
                graph.launch(self.stream)
                end.record(self.stream)
                self.group.synchronize(self.stream)
                if number >= 3:
                    times[name].append(end.milliseconds_since(start) * 1e3 / count)
        return {name: statistics.median(each) for name, each in times.items()}

    def all_reduce(self, nbytes: int) -> dict[str, float]:
        """The time of each way that there is for a size."""
        count = nbytes // 2
        ones, size = np.ones(count, np.float16), float(self.ranks.size)
        calls: dict[str, Call] = {}
        for way in WAYS:
            if way == "nccl" and not self._has_nccl:
                continue
            x, out = self.put(ones), self.put(np.zeros(count))
            if way == "nccl":
                call, out = self.nccl(x, out), x if self._torch else out
            elif way == "buffer":
                x = self.group.buffer((count,), "float16")
                call = self.reduce(x, out, "vllm")
                copy(x.ptr, self.put(ones).ptr, nbytes, self.group.device, self.stream)
            else:
                call = self.reduce(x, out, way)
            try:
                call()
            except ArgumentError:  # alike on all ranks
                continue
            got = self.first(out)
            assert got == (size, size), (way, nbytes, got)
            if way == "nccl" and self._torch:  # in place: zeros stay zeros
                call = self.nccl(self.put(np.zeros(count)), x)
            calls[way] = call
        found = self.microseconds(calls, 100 if nbytes <= MIB else 20)
        self.free()
        return found

    def reduce(self, x: Any, out: Any, algorithm: str) -> Call:
        return lambda: self.group.all_reduce(x, out, algorithm=algorithm, stream=self.stream)

    def fused(self, hidden: int, rows: int) -> dict[str, float]:
        """In one kernel, and by NCCL and a norm; each writes the residual that the next reads."""
        # Small ones, for the residual grows with each call.
        drawn = np.random.default_rng().standard_normal((rows, hidden)) / 1024
        x, total, residual, norm = (self.put(drawn) for _ in range(4))
        gamma = self.put(np.ones(hidden))

        def one(**options: bool) -> None:
            self.group.allreduce_fusion(
                x, pattern=NORM, residual_in=residual, residual_out=residual, norm_out=norm,
                rms_gamma=gamma, stream=self.stream, **options,
            )  # fmt: skip

        reduce = self.nccl(x, total)

        def two() -> None:
            reduce()
            added = x if self._torch else total
            fi_ffi.fused_add_rmsnorm(added, residual, gamma, enable_pdl=True, stream=self.stream)

        calls: dict[str, Call] = {"fused": one}
        if Version(search.release() or "0") >= PDL_SINCE:
            pdl = {"launch_with_pdl": True, "trigger_completion_at_end": False}
            calls["with pdl"] = lambda: one(**pdl)
        if self._has_nccl:
            calls["nccl + norm"] = two
        found = self.microseconds(calls, 100)
        self.free()
        return found


def measure(ranks: comm.Ranks, store: str, replays: int, gpus: int, results: Any) -> None:
    """All of one rank; what it found goes into a queue."""
    one = Rank(ranks, store, replays, gpus)
    reduced = {size: one.all_reduce(size) for size in SIZES}
    chosen = {size: one.group.algorithm_for(size, "float16") for size in SIZES}
    fused = {shape: one.fused(*shape) for shape in ROWS}
    one.group.close()
    results.put((ranks.rank, reduced, chosen, fused))


def slowest(found: list[dict[str, float]]) -> dict[str, float]:
    return {way: max(each[way] for each in found) for way in found[0]}


def text(nbytes: int) -> str:
    return f"{nbytes // MIB} MiB" if nbytes >= MIB else f"{nbytes / KIB:g} KiB"


def cells(row: dict[str, float], ways: tuple[str, ...]) -> list[str]:
    return [f"{row[way]:.1f}" if way in row else "" for way in ways]


def ratio(row: dict[str, float], one: str, other: str) -> str:
    return f"{row[one] / row[other]:.2f}" if one in row and other in row else ""


def tables(found: list[tuple[Any, ...]]) -> tuple[list[str], dict[str, Any]]:
    """What all ranks found, as lines and as data."""
    lines = ["| message | " + " | ".join(WAYS) + " | auto is | auto / nccl |", "|---" * 9 + "|"]
    data: dict[str, Any] = {"all_reduce": {}, "fused": {}}
    chosen = found[0][2]
    for size in SIZES:
        row = slowest([each[1][size] for each in found])
        line = [text(size), *cells(row, WAYS), chosen[size], ratio(row, "auto", "nccl")]
        lines.append(f"| {' | '.join(line)} |")
        data["all_reduce"][size] = row | {"chosen": chosen[size]}
    lines += ["", f"| hidden, rows | {' | '.join(FUSED)} | ratio | ratio |", "|---" * 6 + "|"]
    for shape in ROWS:
        row = slowest([each[3][shape] for each in found])
        ratios = (ratio(row, way, FUSED[-1]) for way in FUSED[:-1])
        line = [f"{shape[0]}, {shape[1]}", *cells(row, FUSED), *ratios]
        lines.append(f"| {' | '.join(line)} |")
        data["fused"]["x".join(map(str, shape))] = row
    return lines, data


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--ranks", type=int, default=2, help="GPUs, of which each is one")
    parser.add_argument("--gpus", type=int, help="that ranks take in turn (default: one each)")
    parser.add_argument("--replays", type=int, default=30, help="of each graph")
    parser.add_argument("--output", type=Path, help="folder for the JSON")
    options = parser.parse_args(arguments)
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        children = [
            context.Process(
                target=measure,
                args=(ranks, store, options.replays, options.gpus or options.ranks, results),
            )
            for ranks in comm.processes(options.ranks)
        ]
        for child in children:
            child.start()
        found = []
        while len(found) < len(children):
            if any(child.exitcode for child in children):
                for child in children:
                    child.terminate()
                return 1
            try:
                found.append(results.get(timeout=1))
            except Exception:  # queue.Empty: a rank may have ended
                continue
        for child in children:
            child.join()
    lines, data = tables(sorted(found, key=lambda each: each[0]))
    print(f"{options.ranks} ranks; microseconds a call, in a graph\n")
    print("\n".join(lines))
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        path = options.output / f"comm-{options.ranks}.json"
        path.write_text(json.dumps(data, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
