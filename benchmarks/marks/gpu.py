"""The GPU side of a row: a stream, arrays that peers see as torch tensors, and GPU time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from cuda.bindings import runtime

from fi_ffi.cli.cuda import POISON, DeviceArray, check, gpus
from fi_ffi.reference.arrays import Array
from marks import Missing
from marks.peers import Peers
from marks.timing import Run

_SLEEP_CYCLES = 20_000_000  # about 10 ms


def need_gpu() -> None:
    if not gpus():
        raise Missing("a GPU")


class _Viewed:
    """Memory as torch takes it over."""

    def __init__(self, array: DeviceArray) -> None:
        self.__cuda_array_interface__ = {
            "shape": array.host.shape,
            "typestr": array.host.dtype.str,
            "data": (array.ptr, False),
            "version": 2,
        }


class Gpu:
    """cuda:0 and one stream of it, which is torch's current one where torch is installed."""

    device = "cuda:0"

    def __init__(self, peers: Peers) -> None:
        need_gpu()
        check(runtime.cudaSetDevice(0))
        self._arrays: list[DeviceArray] = []
        self._torch = peers.need("torch") if peers.has("torch") else None
        if self._torch is None:
            flags = runtime.cudaStreamNonBlocking
            self.stream = int(check(runtime.cudaStreamCreateWithFlags(flags)))
        else:
            made = self._torch.cuda.Stream()
            self._torch.cuda.set_stream(made)
            self.stream = int(made.cuda_stream)

    def put(self, host: Array) -> DeviceArray:
        """A copy of a contiguous host array; `free` frees it."""
        self._arrays.append(DeviceArray(np.ascontiguousarray(host)))
        return self._arrays[-1]

    def nothing(self, shape: tuple[int, ...]) -> DeviceArray:
        """Room for a float16 result, of NaN."""
        return self.put(np.full(shape, np.nan, np.float16))

    def tensor(self, array: DeviceArray) -> Any:
        """The same memory as a torch tensor."""
        if self._torch is None:
            raise Missing("torch")
        return self._torch.as_tensor(_Viewed(array), device=self.device)

    def poison(self, array: DeviceArray) -> None:
        """NaN in every byte, when all that was queued is done."""
        check(runtime.cudaDeviceSynchronize())
        check(runtime.cudaMemset(array.ptr, POISON, array.nbytes))
        check(runtime.cudaDeviceSynchronize())

    def settle(self) -> None:
        """Wait for the stream."""
        check(runtime.cudaStreamSynchronize(self.stream))

    def free(self) -> None:
        """Give back what rows have put here."""
        check(runtime.cudaDeviceSynchronize())
        while self._arrays:
            self._arrays.pop().free()


def event_time(torch: Any, call: Callable[[], object]) -> Run:
    """GPU nanoseconds, between CUDA events on torch's current stream.

    The calls are all queued before the first of them starts.
    """

    def run(count: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(_SLEEP_CYCLES)
        start.record()
        for _ in range(count):
            call()
        end.record()
        end.synchronize()
        milliseconds: float = start.elapsed_time(end)
        return milliseconds * 1e6

    return run


class Cupti:
    """GPU nanoseconds inside kernels, as CUPTI records them."""

    def __init__(self) -> None:
        from cupti import cupti

        self._cupti, self._spans = cupti, list[int]()
        cupti.activity_register_callbacks(lambda: (8 * 2**20, 0), self._take)

    def _take(self, activities: list[Any]) -> None:
        self._spans += [activity.end - activity.start for activity in activities]

    def time(self, call: Callable[[], object]) -> Run:
        kind = self._cupti.ActivityKind.CONCURRENT_KERNEL

        def run(count: int) -> float:
            check(runtime.cudaDeviceSynchronize())
            self._spans.clear()
            self._cupti.activity_enable(kind)
            for _ in range(count):
                call()
            check(runtime.cudaDeviceSynchronize())
            self._cupti.activity_flush_all(1)  # CUPTI_ACTIVITY_FLAG_FLUSH_FORCED
            self._cupti.activity_disable(kind)
            if len(self._spans) < count:
                raise RuntimeError(f"CUPTI told of {len(self._spans)} kernels in {count} calls")
            return float(sum(self._spans))

        return run
