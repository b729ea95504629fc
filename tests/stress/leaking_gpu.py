"""What tests/gpu/test_leaks.py does many times over on a GPU.

python -m tests.stress.leaking_gpu KIND COUNT
"""

from __future__ import annotations

import contextlib
import json
import sys
import threading
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np
from cuda.bindings import runtime

import fi_ffi
from fi_ffi.cli.cuda import DeviceArray, check
from fi_ffi.ops.call import cuda
from fi_ffi.ops.functions import OPS

from tests.helpers import kernels
from tests.helpers.cases import make_case
from tests.stress import gauges

Work = tuple[Callable[[int], None], Mapping[str, Callable[[], int]]]
RMSNORM = OPS["rmsnorm"]
NO_KERNELS = 77  # the exit status of a program whose kernels are not there


def need(module: str) -> None:
    if why := kernels.why_not(module):
        print(why)
        sys.exit(NO_KERNELS)


def new_streams(count: int) -> list[int]:
    flags = runtime.cudaStreamNonBlocking
    return [int(check(runtime.cudaStreamCreateWithFlags(flags))) for _ in range(count)]


def used() -> int:
    """GPU memory in use, after everything queued is done; the pool's own is given back."""
    check(runtime.cudaDeviceSynchronize())
    with contextlib.suppress(Exception):
        check(runtime.cudaMemPoolTrimTo(check(runtime.cudaDeviceGetDefaultMemPool(0)), 0))
    free, total = check(runtime.cudaMemGetInfo())
    return int(total) - int(free)


class Norms:
    """Sets of rmsnorm's arrays of one layout."""

    def __init__(self, count: int, rows: int = 5, hidden: int = 1024) -> None:
        need("norm")
        rng = np.random.default_rng()
        sizes, dtypes = {"n": rows, "h": hidden}, {"T": "bfloat16"}
        self.cases = [make_case(RMSNORM.row, sizes, dtypes, rng) for _ in range(count)]
        self.arrays = [
            {name: DeviceArray(array) for name, array in case.arrays.items()} for case in self.cases
        ]
        self.descs = [{n: a.desc() for n, a in arrays.items()} for arrays in self.arrays]
        self.addresses = [{n: a.ptr for n, a in arrays.items()} for arrays in self.arrays]
        check(runtime.cudaDeviceSynchronize())

    def wait(self, i: int, each: int = 512) -> None:
        """Let the GPU keep up."""
        if i % each == 0:
            check(runtime.cudaDeviceSynchronize())


def calls() -> Work:
    """Typed and prepared, updated and refused, on one stream."""
    norms, (stream,) = Norms(2), new_streams(1)
    call = RMSNORM.prepare(**norms.descs[0], stream=stream)

    def work(i: int) -> None:
        call.update(**norms.addresses[i % 2])
        call()
        RMSNORM(**norms.descs[i % 2], stream=stream)
        if i % 50 == 0:
            RMSNORM.prepare(**norms.descs[i % 2], stream=stream)()
            with contextlib.suppress(fi_ffi.ArgumentError):
                call.update(eps=-1.0)
        norms.wait(i)

    return work, {"gpu": used}


def pointers() -> Work:
    """Addresses described anew for each call."""
    norms, (stream,) = Norms(2), new_streams(1)

    def work(i: int) -> None:
        rows = 1 + i % 5
        addresses = norms.addresses[i % 2]
        descs = {
            name: fi_ffi.TensorDesc(
                address, (1024,) if name == "weight" else (rows, 1024), "bfloat16", device="cuda:0"
            )
            for name, address in addresses.items()
        }
        RMSNORM(**descs, stream=stream)
        norms.wait(i)

    return work, {"gpu": used}


def streams() -> Work:
    """Streams that are made, used in scopes by several threads, and destroyed."""
    norms = Norms(4)

    def on_one(number: int) -> None:
        (stream,) = new_streams(1)
        with fi_ffi.stream(stream):
            RMSNORM(**norms.descs[number])
            RMSNORM.prepare(**norms.descs[number])()
        RMSNORM(**norms.descs[number], stream=stream)
        check(runtime.cudaStreamSynchronize(stream))
        check(runtime.cudaStreamDestroy(stream))

    def work(i: int) -> None:
        if i % 10:
            on_one(i % 4)
            return
        threads = [threading.Thread(target=on_one, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    return work, {"gpu": used}


def captures() -> Work:
    """Graphs captured, launched, recorded again, and dropped."""
    norms, (stream,) = Norms(2), new_streams(1)
    call = RMSNORM.prepare(**norms.descs[0])

    def work(i: int) -> None:
        with fi_ffi.capture(stream) as graph:
            for _ in range(1 + i % 8):
                call()
        graph.launch(stream)
        with fi_ffi.capture(stream, into=graph):
            RMSNORM(**norms.descs[1])
        graph.launch(stream)
        with contextlib.suppress(ZeroDivisionError), fi_ffi.capture(stream):
            call()
            raise ZeroDivisionError
        norms.wait(i, 16)

    return work, {"gpu": used}


class Decode:
    """A batch of decode plans."""

    options: ClassVar[dict[str, Any]] = {
        "num_qo_heads": 8, "num_kv_heads": 8, "head_dim": 128, "page_size": 16,
        "q_data_type": "float16",
    }  # fmt: skip

    def __init__(self) -> None:
        self.q, self.o = (DeviceArray(np.zeros((2, 8, 128), np.float16)) for _ in range(2))
        self.k, self.v = (DeviceArray(np.ones((6, 16, 8, 128), np.float16)) for _ in range(2))
        self.tensors = {
            "q": self.q.desc(), "paged_k_cache": self.k.desc(),
            "paged_v_cache": self.v.desc(), "o": self.o.desc(),
        }  # fmt: skip
        check(runtime.cudaDeviceSynchronize())

    def arrays(self, i: int) -> dict[str, np.ndarray]:
        return {
            "indptr": np.array([0, 2, 3 + i % 3], np.int32),
            "indices": np.arange(3 + i % 3, dtype=np.int32),
            "last_page_len": np.array([1 + i % 16, 16], np.int32),
        }


def plans() -> Work:
    """Made with a workspace of their own, made again, run, run prepared, and dropped."""
    decode, (stream,) = Decode(), new_streams(1)
    workspace = fi_ffi.Workspace.allocate("cuda:0", 16 << 20, 1 << 20)
    try:
        plan = fi_ffi.BatchDecodePlan(
            **decode.arrays(0), **decode.options, workspace=workspace, stream=stream
        )
    except fi_ffi.LoaderError as error:
        if not (why := kernels.why_missing(error)):
            raise
        print(why)
        sys.exit(NO_KERNELS)
    call = fi_ffi.prepare(plan.run, **decode.tensors, stream=stream)

    def work(i: int) -> None:
        plan.replan(**decode.arrays(i), stream=stream)
        plan.run(**decode.tensors, stream=stream)
        call()
        if i % 20 == 0:
            other = fi_ffi.Workspace.allocate("cuda:0", 16 << 20, 1 << 20)
            made = fi_ffi.BatchDecodePlan(
                **decode.arrays(i), **decode.options, workspace=other, stream=stream
            )
            made.run(**decode.tensors, stream=stream)
            check(runtime.cudaStreamSynchronize(stream))

    return work, {"gpu": used}


def scratch() -> Work:
    """Memory that is taken from the device's pool, and given back."""
    (stream,) = new_streams(1)
    device = fi_ffi.parse_device("cuda:0")

    def work(i: int) -> None:
        count = 1 << (i % 20)
        memory = cuda.allocate(count, device, zeroed=bool(i % 2))
        locked = cuda.allocate_page_locked(count, device) if i % 50 == 0 else None
        address = cuda._take_in_order(count, device, stream)
        cuda._free_in_order(address, device, stream)
        event = cuda.Event()
        event.record(stream)
        event.wait()
        del memory, locked, event

    return work, {"gpu": used}


def watched() -> Work:
    """Watchdogs opened and closed over calls."""
    norms, (stream,) = Norms(1), new_streams(1)

    def work(i: int) -> None:
        with fi_ffi.watchdog(60):
            RMSNORM(**norms.descs[0], stream=stream)

    return work, {"gpu": used}


def errors() -> Work:
    """A kernel's own: rows too long for its shared memory, kept for a while."""
    norms, (stream,) = Norms(1), new_streams(1)
    long, weight = (DeviceArray(np.zeros(shape, np.float16)) for shape in ((1, 1 << 20), (1 << 20)))
    check(runtime.cudaDeviceSynchronize())
    kept: list[BaseException] = []

    def work(i: int) -> None:
        try:
            OPS["fused_add_rmsnorm"](long.desc(), long2.desc(), weight.desc(), stream=stream)
        except fi_ffi.KernelError as error:
            if i % 2:
                kept.append(error)
            if len(kept) == 20:
                kept.clear()
        else:
            print("this kernel takes rows of a million")
            sys.exit(NO_KERNELS)
        RMSNORM(**norms.descs[0], stream=stream)

    long2 = DeviceArray(np.zeros((1, 1 << 20), np.float16))

    def gone() -> int:
        kept.clear()
        return used()

    return work, {"gpu": gone}


def kept() -> Work:
    """What the gauges must find."""
    held: list[object] = []
    device = fi_ffi.parse_device("cuda:0")
    return lambda i: held.append(cuda.allocate(1 << 16, device)), {"gpu": used}


KINDS: dict[str, Callable[[], Work]] = {
    made.__name__: made
    for made in (calls, pointers, streams, captures, plans, scratch, watched, errors, kept)
}


def main(kind: str, count: int) -> None:
    work, more = KINDS[kind]()
    for i in range(max(count // 10, 50)):
        work(i)
    print(json.dumps(gauges.run(work, count, more)))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
