"""A sum over GPUs without torch: a process for each, CUDA IPC between them, cuda-python's memory.

    python3 examples/all_reduce.py            # a rank on each of two GPUs
    python3 examples/all_reduce.py --ranks 4
    python3 examples/all_reduce.py --cpu      # the same calls on reference kernels

On a GPU it needs the kernels of vllm_comm, and is quicker with those of trtllm_comm.
"""

from __future__ import annotations

import argparse
import multiprocessing

import numpy as np

import fi_ffi
from fi_ffi import comm

SHAPE = (64, 4096)


def on_cpu(group: comm.Group, array: np.ndarray) -> np.ndarray:
    group.all_reduce(array)  # in place
    return array


def on_gpu(group: comm.Group, array: np.ndarray) -> np.ndarray:
    from cuda.bindings import runtime as cudart

    def check(result):
        if int(result[0]):
            raise RuntimeError(result[0].name)
        return result[-1]

    check(cudart.cudaSetDevice(group.rank))
    stream = int(check(cudart.cudaStreamCreate()))
    address = int(check(cudart.cudaMalloc(array.nbytes)))
    kinds = cudart.cudaMemcpyKind
    check(cudart.cudaMemcpyAsync(
        address, array.ctypes.data, array.nbytes, kinds.cudaMemcpyHostToDevice, stream
    ))  # fmt: skip
    x = fi_ffi.TensorDesc(address, array.shape, "float16", device=group.device)
    group.all_reduce(x, stream=stream)
    group.synchronize(stream)  # raises HangError where another rank does not come
    check(cudart.cudaMemcpyAsync(
        array.ctypes.data, address, array.nbytes, kinds.cudaMemcpyDeviceToHost, stream
    ))  # fmt: skip
    check(cudart.cudaStreamSynchronize(stream))
    check(cudart.cudaFree(address))
    return array


def rank(ranks: comm.Ranks, cpu: bool) -> None:
    """What each process does."""
    device = "cpu" if cpu else f"cuda:{ranks.rank}"
    with comm.Group(ranks, device=device) as group:
        mine = np.full(SHAPE, ranks.rank + 1, np.float16)
        found = (on_cpu if cpu else on_gpu)(group, mine)
        expected = sum(range(1, ranks.size + 1))
        assert (found == expected).all(), f"rank {ranks.rank} has {found.min()} to {found.max()}"
        way = group.algorithm_for(mine.nbytes, "float16")
        line = f"rank {ranks.rank} of {ranks.size} on {device}: {expected}, by {way}\n"
        print(line, end="", flush=True)  # in one piece, beside the other ranks' lines


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--cpu", action="store_true")
    options = parser.parse_args()
    if not options.cpu:
        from cuda.bindings import runtime as cudart

        count = int(cudart.cudaGetDeviceCount()[1])
        if count < options.ranks:
            raise SystemExit(f"{options.ranks} GPUs are needed, and {count} are here: --cpu?")
    spawn = multiprocessing.get_context("spawn")  # a forked child could not use CUDA
    processes = [
        spawn.Process(target=rank, args=(one, options.cpu)) for one in comm.processes(options.ranks)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise SystemExit("a rank failed")


if __name__ == "__main__":
    main()
