"""Where the same test runs: the reference kernels on the host, or kernels on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

import fi_ffi
from fi_ffi.loader import machine as of_loader
from fi_ffi.ops.attention.backends import (
    Kernel,
    Target,
    choose_backend,
    decode_groups,
    fa2_lacks,
    fa3_lacks,
)
from fi_ffi.ops.call.releases import release_in_force
from fi_ffi.ops.call.row import Row

from tests.helpers import kernels
from tests.helpers.calls import HostArray

POISON = 0xFF


class Nothing:
    """A tensor without elements, at an address that is no memory."""

    def __init__(self, host: np.ndarray, device: str) -> None:
        self.host, self.device = host, device

    def desc(self) -> fi_ffi.TensorDesc:
        return fi_ffi.TensorDesc(4096, self.host.shape, self.host.dtype.name, device=self.device)

    def get(self) -> np.ndarray:
        return self.host

    def intact(self) -> bool:
        return True


class Cpu:
    """The reference kernels; sizes are kept small."""

    device, stream, is_gpu = "cpu", None, False
    most_keys, most_requests = 90, 12

    def place(self, host: np.ndarray) -> Any:
        return HostArray(host) if host.size else Nothing(host, self.device)

    def need(self, module: str | Row) -> None:
        """Skip the test where the kernels in use lack a module, or an op."""

    def backend(
        self, op: str, asked: str, kernel: Kernel, custom_mask: bool, is_paged: bool = False
    ) -> str:
        """The backend that is served when `asked` is."""
        target = Target.of(op, fi_ffi.parse_device(self.device))
        return choose_backend(target, asked, kernel, custom_mask, is_paged)[0]

    def need_group(self, group: int) -> None:
        """Skip the test where the kernels in use are not for so many heads for one of keys."""

    def rounds(self, count: int) -> int:
        """How often to do what a GPU test does `count` times."""
        return max(count // 10, 3)

    def streams(self, count: int) -> list[int | None]:
        return [None] * count

    def synchronize(self) -> None: ...

    def check_order(self, *streams: int | None) -> None:
        """Each kernel and copy on these waits for all before it; a GPU tells by its results."""

    def check_apart(self, *streams: int | None) -> None:
        """None of these waits for another."""

    def delay(self, stream: object) -> None:
        """Give a stream some milliseconds of work."""

    def capture(self, launch: Callable[[], object]) -> Callable[[], object]:
        """Record what `launch` does, once; what repeats it.  Here there is nothing to record."""
        launch()
        return launch

    def poison(self, placed: Any, stream: object) -> None:
        """Make every byte of a placed array poison."""
        placed.array[...] = POISON if placed.array.dtype.kind in "iub" else np.nan

    def bytes_for_one(self, size: Callable[..., int], *sizes: int) -> int:
        """What `single_*_workspace_size` tells of this device."""
        return 1 << 20  # it asks the CUDA runtime, which has no say here


class Gpu(Cpu):
    """A GPU through cuda-python, by the fixtures of tests/gpu/conftest.py."""

    device, is_gpu = "cuda:0", True
    most_keys, most_requests = 1 << 20, 1 << 20

    def __init__(self, to_gpu: Callable[..., Any], stream: int) -> None:
        self.stream = stream  # type: ignore[assignment]
        self._to_gpu = to_gpu
        self._made: list[int] = []
        self._busy: list[int] = []
        self._graphs: list[Any] = []

    def place(self, host: np.ndarray) -> Any:
        if not host.size:
            return Nothing(host, self.device)
        return self._to_gpu(host)

    def backend(
        self, op: str, asked: str, kernel: Kernel, custom_mask: bool, is_paged: bool = False
    ) -> str:
        if asked == "fa3" and of_loader.capability(0) != (9, 0):
            pytest.skip("fa3 is for SM90 GPUs")
        of, later = release_in_force(), ""
        if asked != "fa2":
            later = fa3_lacks(kernel, custom_mask, is_paged, of)
            later = "" if fa3_lacks(kernel, custom_mask, is_paged) else later
        if asked == "fa2" or (asked == "auto" and later):
            later = "" if fa2_lacks(kernel) else fa2_lacks(kernel, of)
        if later:
            pytest.skip(later)
        return super().backend(op, asked, kernel, custom_mask, is_paged)

    def need(self, module: str | Row) -> None:
        kernels.need(module)

    def need_group(self, group: int) -> None:
        if group not in decode_groups(release_in_force()):
            pytest.skip(f"decode of FlashInfer {release_in_force()} has no group of {group}")

    def rounds(self, count: int) -> int:
        return count

    def streams(self, count: int) -> list[int | None]:
        from cuda.bindings import runtime

        from fi_ffi.cli.cuda import check

        flags = runtime.cudaStreamNonBlocking
        made = [int(check(runtime.cudaStreamCreateWithFlags(flags))) for _ in range(count)]
        self._made += made
        return [*made]

    def synchronize(self) -> None:
        from cuda.bindings import runtime

        from fi_ffi.cli.cuda import check

        check(runtime.cudaDeviceSynchronize())

    def delay(self, stream: object) -> None:
        from cuda.bindings import runtime

        from fi_ffi.cli.cuda import check

        size = 1 << 29
        while len(self._busy) < 2:
            self._busy.append(int(check(runtime.cudaMalloc(size))))
        kind = runtime.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        for _ in range(30):  # about 10 ms
            check(runtime.cudaMemcpyAsync(*self._busy, size, kind, stream))

    def poison(self, placed: Any, stream: object) -> None:
        from cuda.bindings import runtime

        from fi_ffi.cli.cuda import check

        check(runtime.cudaMemsetAsync(placed.ptr, POISON, placed.nbytes, stream))

    def capture(self, launch: Callable[[], object]) -> Callable[[], object]:
        from cuda.bindings import runtime

        from fi_ffi.cli.cuda import check

        mode = runtime.cudaStreamCaptureMode.cudaStreamCaptureModeRelaxed
        check(runtime.cudaStreamBeginCapture(self.stream, mode))
        try:
            launch()
        finally:
            graph = check(runtime.cudaStreamEndCapture(self.stream))
        executable = check(runtime.cudaGraphInstantiate(graph, 0))
        check(runtime.cudaGraphDestroy(graph))
        self._graphs.append(executable)

        def replay() -> None:
            check(runtime.cudaGraphLaunch(executable, self.stream))

        return replay

    def bytes_for_one(self, size: Callable[..., int], *sizes: int) -> int:
        return size(*sizes, device=0)

    def close(self) -> None:
        """Give back streams and memory; everything that was queued is done first."""
        from cuda.bindings import runtime

        from fi_ffi.cli.cuda import check

        check(runtime.cudaDeviceSynchronize())
        for graph in self._graphs:
            check(runtime.cudaGraphExecDestroy(graph))
        for stream in self._made:
            check(runtime.cudaStreamDestroy(stream))
        for address in self._busy:
            check(runtime.cudaFree(address))


def part(placed: Any, count: int, device: str) -> fi_ffi.TensorDesc:
    """The first bytes of a placed array of bytes."""
    return fi_ffi.TensorDesc(placed.desc().ptr, (count,), "uint8", device=device)


def intact(placed: Sequence[Any]) -> bool:
    """Whether nothing beside the elements of any was written."""
    return all(array.intact() for array in placed)
