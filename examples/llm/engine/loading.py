"""Weights on their way to a GPU, beside what else a process begins with."""

import os
import queue
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from .glue import check

PIECE = 8 << 20  # bytes
FEW = 1 << 20  # bytes that are not worth a thread
THREADS = max(2, min(8, os.cpu_count() or 1))


class Loader:
    """Threads that copy arrays piece by piece into page-locked memory, and from there to a GPU.

    A file that is mapped is read by all of them at once, and while the GPU copies.
    """

    def __init__(self, gpu):
        self.gpu, self.pool = gpu, ThreadPoolExecutor(THREADS)
        self.rooms = queue.SimpleQueue()  # page-locked memory, and what waits until it is free
        self.made, self.pending = [], []
        for _ in range(THREADS + 1):
            self.rooms.put(None)

    def write(self, target, host):
        """Copy an array to an address; it is there after `finish`."""
        data = host.reshape(-1).view(np.uint8)
        for at in range(0, len(data), PIECE):
            part = data[at : at + PIECE]
            self.pending.append(self.pool.submit(self._piece, target + at, part))

    def _piece(self, target, data):
        gpu, cuda = self.gpu, self.gpu.cuda
        check(cuda.cudaSetDevice(gpu.index))
        room = self.rooms.get()
        if room is None:
            event = check(cuda.cudaEventCreateWithFlags(cuda.cudaEventDisableTiming))
            self.made.append(room := (gpu.pinned((PIECE,), "uint8"), event))
        host, event = room
        try:
            check(cuda.cudaEventSynchronize(event))
            np.copyto(np.asarray(host)[: len(data)], data)
            gpu.copy_bytes(target, host.ptr, len(data))
            check(cuda.cudaEventRecord(event, gpu.stream))
        finally:
            self.rooms.put(room)

    def finish(self):
        for copied in self.pending:
            copied.result()
        gpu = self.gpu
        gpu.wait(gpu.mark())
        for host, event in self.made:
            gpu.free(host)
            check(gpu.cuda.cudaEventDestroy(event))
