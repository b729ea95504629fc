"""Sixteen threads on one stream and on eight, forks after use, and exits with all of it alive."""

from __future__ import annotations

import random
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fi_ffi
from fi_ffi.abi import library
from fi_ffi.abi._cffi import ffi
from fi_ffi.ops.functions import OPS

from tests.helpers.children import done
from tests.helpers.forking import in_child
from tests.helpers.prepared_calls import norm_sets, settle
from tests.helpers.stress_strength import scaled
from tests.ops.test_threads import at_once

pytestmark = pytest.mark.usefixtures("other_threads")

RMSNORM = OPS["rmsnorm"]
THREADS = 16


def current_stream() -> int:
    return int(ffi.cast("uintptr_t", library.lib.TVMFFIEnvGetStream(2, 0)))


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("streams", [1, 8])
def test_sixteen_threads(streams: int, rng, to_gpu, machine, stream) -> None:
    """Each has its own scope, its own errors and right results, and captures a graph now and then
    on a stream that no other thread has."""
    machine.need("norm")
    made = machine.streams(streams)
    own = machine.streams(THREADS)
    norms = norm_sets(rng, to_gpu)
    sets = [norms(3, rows=3 + i, hidden=1024) for i in range(THREADS)]
    machine.synchronize()

    def work(number: int) -> None:
        mine, handle = sets[number], made[number % streams]
        loose = RMSNORM.prepare(**mine[0].descs)
        bound = RMSNORM.prepare(**mine[0].descs, stream=handle)
        for i in range(scaled(5000, 60)):
            bound.update(**mine[(i + 2) % 3].addresses)
            bound()
            RMSNORM(**mine[(i + 1) % 3].descs, stream=handle)
            with fi_ffi.stream(handle):
                loose.update(**mine[i % 3].addresses)
                loose()
                with fi_ffi.stream(own[number]):
                    RMSNORM(**mine[(i + 1) % 3].descs)
                    assert current_stream() == own[number]
                loose()
                assert current_stream() == handle
            assert current_stream() == 0
            with pytest.raises(fi_ffi.ArgumentError, match="stream"):
                loose()
            with pytest.raises(fi_ffi.ArgumentError) as caught:
                RMSNORM(**mine[0].descs, eps=-1.0 - number, stream=handle)
            assert str(-1.0 - number) in str(caught.value)
            if i % 20 == 0:
                with fi_ffi.capture(own[number]) as graph:
                    loose()
                graph.launch(own[number])
                settle(own[number])  # type: ignore[arg-type]
        settle(handle)  # type: ignore[arg-type]
        settle(own[number])  # type: ignore[arg-type]

    at_once(work, THREADS)
    machine.synchronize()
    assert all(one.is_right() for mine in sets for one in mine)


def test_a_kernels_errors_are_their_own_threads(rng, to_gpu, machine, stream) -> None:
    """An entry of the module refuses what it is given in words that tell whose it was."""
    machine.need("norm")
    entry = fi_ffi.module("norm").entry("rmsnorm", checked=False)
    arrays = [to_gpu(np.zeros((2, 8 * (i + 1)), np.float16)) for i in range(THREADS)]
    weight = to_gpu(np.zeros((3, 5, 7), np.float16))  # of no rank that it takes
    machine.synchronize()

    def work(number: int) -> None:
        x = arrays[number].desc()
        for _ in range(scaled(2000, 50)):
            with pytest.raises(fi_ffi.KernelError) as caught, fi_ffi.stream(stream):
                entry(x, x, weight.desc(), 1e-6, False)
            assert caught.value.op == "norm.rmsnorm"
        with pytest.raises(fi_ffi.KernelError):
            entry(x, stream=stream)

    at_once(work, THREADS)


def test_forks_after_use_are_refused(rng, to_gpu, machine, stream) -> None:
    """Each way in, with a reason; and the parent goes on."""
    machine.need("norm")
    norms = norm_sets(rng, to_gpu)
    (one,) = norms(1)
    call = RMSNORM.prepare(**one.descs, stream=stream)
    loose = RMSNORM.prepare(**one.descs)
    call()
    with fi_ffi.capture(stream) as graph:
        loose()
    graph.launch(stream)
    settle(stream)
    entry = fi_ffi.module("norm").entry("rmsnorm")
    values = [*one.descs.values(), 1e-6, False]

    def captured() -> None:
        with fi_ffi.capture(stream):
            pass

    def watched() -> None:
        with fi_ffi.watchdog(60):
            call()

    ways: dict[str, Any] = {
        "typed": lambda: RMSNORM(**one.descs, stream=stream), "prepared": call, "loose": loose,
        "graph": lambda: graph.launch(stream), "capture": captured, "watched": watched,
        "entry": lambda: entry(*values, stream=stream),
        "workspace": lambda: fi_ffi.Workspace.allocate("cuda:0", 1024, 1024),
        "prepare": lambda: RMSNORM.prepare(**one.descs, stream=stream)(),
    }  # fmt: skip

    def child() -> None:
        for name, way in ways.items():
            try:
                way()
            except fi_ffi.LoaderError as error:
                assert "forked from one that had used a GPU" in str(error), (name, error)
            else:
                raise AssertionError(f"{name} was let through")

    with fi_ffi.stream(stream):
        loose()
        assert in_child(child) == 0
        loose()
    settle(stream)
    assert one.is_right()


WORKER = """
    import multiprocessing, os, sys
    from tests.stress.forked_gpu import norm

    if __name__ == "__main__":
        if sys.argv[2] == "used":
            norm(1)
        context = multiprocessing.get_context(sys.argv[1])
        with context.Pool(2) as pool:
            assert pool.map(norm, range(1, 5)) == [1, 2, 3, 4]
        print("done")
"""


@pytest.mark.parametrize(
    ("method", "used"),
    [("fork", "unused"), ("spawn", "used"), ("forkserver", "used"), ("spawn", "unused")],
)
def test_multiprocessing(method: str, used: str, machine) -> None:
    machine.need("norm")
    status, out, err = done(WORKER, method, used, seconds=240)
    assert (status, out) == (0, "done\n"), err


EXIT = """
    import os, sys, threading, time
    import numpy as np
    from cuda.bindings import runtime
    import fi_ffi
    from fi_ffi.cli.cuda import DeviceArray, check
    flags = runtime.cudaStreamNonBlocking
    stream, other = (int(check(runtime.cudaStreamCreateWithFlags(flags))) for _ in range(2))
    x, out = (DeviceArray(np.ones((4, 64), np.float16)) for _ in range(2))
    w = DeviceArray(np.ones(64, np.float16))
    check(runtime.cudaDeviceSynchronize())
    descs = [array.desc() for array in (out, x, w)]
    call = fi_ffi.rmsnorm.prepare(*descs)
    scope = fi_ffi.stream(stream)
    scope.__enter__()
    call()
    with fi_ffi.capture(other) as graph:
        call()
    graph.launch(stream)
    arrays = [np.array([0, 1], np.int32), np.zeros(1, np.int32), np.array([3], np.int32)]
    try:
        plan = fi_ffi.BatchDecodePlan(*arrays, num_qo_heads=8, num_kv_heads=8, head_dim=128,
                                      page_size=16, q_data_type="float16")
    except fi_ffi.KernelNotFoundError:
        plan = None
    dog = fi_ffi.watchdog(60)
    dog.__enter__()
    log = fi_ffi.call_log(3, os.devnull)
    entered = threading.Event()

    def inside():
        entered.set()
        while True:
            fi_ffi.rmsnorm(*descs, stream=other)
            check(runtime.cudaStreamSynchronize(other))

    for _ in range(3):
        threading.Thread(target=inside, daemon=True).start()
    entered.wait()
    time.sleep(0.1)
"""
ENDS = {
    "the end": ("", 0), "sys.exit": ("sys.exit(7)", 7), "os._exit": ("os._exit(5)", 5),
    "recording": ("block = fi_ffi.capture(stream); block.__enter__(); call()", 0),
}  # fmt: skip


@pytest.mark.parametrize("end", ENDS)
def test_exits_with_all_alive(end: str, machine) -> None:
    machine.need("norm")
    code, status = ENDS[end]
    assert done(textwrap.dedent(EXIT) + code) == (status, "", "")


OVERLAP = """
    import os, threading
    import numpy as np
    from cuda.bindings import driver, runtime
    import fi_ffi
    from fi_ffi.abi._cffi import ffi
    from fi_ffi.cli.cuda import DeviceArray, check
    from fi_ffi.ops.call import cuda

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
    status, out, err = done(OVERLAP, seconds=180)
    assert (status, out) == (0, "both were right\n"), err


@pytest.mark.timeout(3600)
def test_destructors_lose_no_exception() -> None:
    """tests/stress/test_signals.py has a runtime that counts."""
    program = (Path(__file__).parents[1] / "stress" / "endings.py").read_text()
    seed = str(random.random())
    told = "0 before\n0 live\n"
    words = "", seed, str(scaled(2000, 30))
    assert done(program, *words, seconds=scaled(3000, 200)) == (0, told, ""), seed
