"""Threads and streams of their own on a GPU, and that calls let go of the GIL."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import threading

import pytest

import fi_ffi
from fi_ffi.ops.functions import OPS

from tests.helpers.prepared_calls import norm_sets, settle

RMSNORM = OPS["rmsnorm"]


@pytest.fixture
def norms(rng, to_gpu):
    return norm_sets(rng, to_gpu)


def test_four_threads_on_four_streams(norms, machine):
    """A prepared call each, updated and launched many times, and typed calls in between."""
    threads, rounds, depth = 4, 100, 5
    streams, failed = machine.streams(threads), []
    sets = [norms(depth, rows=3 + i, hidden=1024) for i in range(threads)]
    machine.synchronize()
    barrier = threading.Barrier(threads)

    def work(number: int) -> None:
        try:
            mine, stream = sets[number], streams[number]
            call = RMSNORM.prepare(**mine[0].descs, stream=stream)
            loose = RMSNORM.prepare(**mine[0].descs)
            barrier.wait(60)
            for i in range(rounds):
                made = mine[i % depth]
                call.update(**made.addresses)
                call()
                with fi_ffi.stream(stream):
                    loose.update(**mine[(i + 1) % depth].addresses)
                    loose()
                    RMSNORM(**mine[(i + 2) % depth].descs)
                RMSNORM(**mine[(i + 3) % depth].descs, stream=stream)
            settle(stream)
        except BaseException as error:
            failed.append(error)

    made = [threading.Thread(target=work, args=(i,)) for i in range(threads)]
    for thread in made:
        thread.start()
    for thread in made:
        thread.join()
    assert not failed, failed
    assert all(one.is_right() for mine in sets for one in mine)


OVERLAP = """
    import os, threading
    import numpy as np
    from cuda.bindings import driver, runtime
    import fi_ffi
    from fi_ffi.abi._cffi import ffi
    from fi_ffi.cli.cuda import DeviceArray, check
    from fi_ffi.ops import cuda

    fi_ffi.use_kernels(os.environ["FI_FFI_KERNELS"])
    flags = runtime.cudaStreamNonBlocking
    held, free = (int(check(runtime.cudaStreamCreateWithFlags(flags))) for _ in range(2))
    x = [DeviceArray(np.full((4, 64), i + 1, np.float16)) for i in range(2)]
    w, out = DeviceArray(np.ones(64, np.float16)), [DeviceArray(np.zeros((4, 64), np.float16))
                                                    for _ in range(2)]
    calls = [fi_ffi.rmsnorm.prepare(out[i].desc(), x[i].desc(), w.desc(), stream=stream)
             for i, stream in enumerate((held, free))]
    for i, call in enumerate(calls):  # loaded before anything is held up
        call()
        fi_ffi.rmsnorm(out[i].desc(), x[i].desc(), w.desc(), stream=(held, free)[i])
        check(runtime.cudaStreamSynchronize((held, free)[i]))
        check(runtime.cudaMemset(out[i].ptr, 0, out[i].nbytes))
    event = cuda.Event()
    check(runtime.cudaDeviceSynchronize())
    gate = int(check(runtime.cudaHostAlloc(4096, runtime.cudaHostAllocMapped)))
    word = ffi.cast("int32_t *", gate)
    word[0] = 0
    check(driver.cuStreamWaitValue32(held, gate, 1, 0))
    entered, done = threading.Event(), threading.Event()

    def wait():
        calls[0]()  # queued behind the gate
        event.record(held)
        entered.set()
        event.wait()  # blocks in C
        done.set()

    thread = threading.Thread(target=wait)
    thread.start()
    entered.wait()
    for i in range(3000):
        calls[1]()
        if i % 3 == 0:
            fi_ffi.rmsnorm(out[1].desc(), x[1].desc(), w.desc(), stream=free)
    check(runtime.cudaStreamSynchronize(free))
    assert not done.is_set(), "the gate held nothing"
    word[0] = 1
    thread.join()
    assert done.is_set()
    for array in out:
        assert (np.abs(array.get().astype(float) - 1) < 1e-2).all()
    print("both were right")
"""


def test_calls_release_the_gil():
    """One thread waits in C for a stream that is held up until the other has launched
    thousands of calls on its own: without letting go of the GIL, neither would ever end."""
    program = textwrap.dedent(OVERLAP)
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=180, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "both were right"
