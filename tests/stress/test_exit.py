"""A process ends silently and with its own exit status, whatever is still alive in it."""

from __future__ import annotations

import textwrap

import pytest

from tests.helpers.children import done
from tests.stress.gauges import counted

# Everything that can be alive at the end, on the CPU and on a pretended GPU, kept by globals.
ALIVE = """
    import os, sys, threading, time
    import numpy as np, pytest
    import fi_ffi
    from fi_ffi.abi.objects import Tensor
    from tests.helpers.heap_text import heap_string
    from fi_ffi import graphs
    from fi_ffi.ops.call import cuda
    from tests.attention.pretend import Pretend
    from tests.helpers.plan_calls import KINDS, Case
    from tests.helpers.prepared_calls import Mine
    from fi_ffi.reference import norm

    gpu = Pretend(pytest.MonkeyPatch())
    gpu.runtime.cudaGraphExecDestroy = lambda handle: 0
    memory = [np.ones((2, 8), np.float16), np.ones((2, 8), np.float16), np.ones(8, np.float16)]
    descs = [fi_ffi.TensorDesc(a.ctypes.data, a.shape, "float16", device="cuda:0") for a in memory]
    call, loose = fi_ffi.rmsnorm.prepare(*descs, stream=0x51), fi_ffi.rmsnorm.prepare(*descs)
    scope = fi_ffi.stream(0x61)
    scope.__enter__()
    loose(), call()
    cases = [Case(kind) for kind in KINDS]
    plans = [case.plan() for case in cases]
    runs = [case.prepared(plan) for case, plan in zip(cases, plans)]
    for run in runs:
        run()
    on_gpu = cases[2].cls(**cases[2].arrays, **cases[2].options, device="cuda:0")
    event, device_memory = cuda.Event(), cuda.allocate(64, descs[0].device)
    graph = graphs.Graph(descs[0].device)
    graph._launch = lambda stream: 0
    module = fi_ffi.module(sys.argv[1])
    try:
        module.entry("fail")(1)
    except fi_ffi.KernelError as raised:
        error = raised
    text = heap_string()
    tensor = Tensor.from_desc(fi_ffi.as_desc(memory[0]))
    log = fi_ffi.call_log(3, os.devnull)
    dog = fi_ffi.watchdog(60)
    dog.__enter__()
    mine = Mine()
    norm.KERNELS["norm"][mine.row.name] = mine.kernel

    def inside():
        x = np.ones((2, 8), np.float16)
        y, d = x.copy(), None
        entered.set()
        while True:  # a daemon thread inside of calls, in Python's kernels and in compiled ones
            mine.op(mine.y, mine.x, factor=2.0)
            module.entry("scale")(numbers, 1.0)
            try:
                module.entry("fail")(0)
            except fi_ffi.KernelError:
                pass
            fi_ffi.rmsnorm(y, x, np.ones(8, np.float16))

    numbers, entered = np.ones(1 << 16, np.float32), threading.Event()
    for _ in range(3):
        threading.Thread(target=inside, daemon=True).start()
    entered.wait()
    time.sleep(0.05)
"""
# Ways to end: what is left of the program, the exit status, and what is last on stderr.
ENDS = {
    "the end": ("", 0, ""),
    "sys.exit": ("sys.exit(7)", 7, ""),
    "os._exit": ("os._exit(5)", 5, ""),
    "in a thread": (
        "t = threading.Thread(target=sys.exit, args=(3,)); t.start(); t.join()", 0, "",
    ),
    "in a kernel": ("mine.work = lambda: os._exit(9)\ntime.sleep(60)", 9, ""),
    "an exception": ("raise ValueError('nobody handles this')", 1, "ValueError: nobody handles"),
    "a kernel's": ("module.entry('fail')(2)", 1, "KernelError: counted.fail: RuntimeError: of two"),
    "in a block": ("with fi_ffi.stream(0x71), fi_ffi.watchdog(60):\n    sys.exit(4)", 4, ""),
}  # fmt: skip


@pytest.mark.parametrize("end", ENDS)
def test_silent_and_clean(end: str) -> None:
    code, status, last = ENDS[end]
    program = textwrap.dedent(ALIVE) + code
    found, out, err = done(program, counted(), seconds=60)
    assert (found, out) == (status, "")
    if not last:
        assert err == ""
    else:
        lines = err.strip().splitlines()
        assert lines[0] == "Traceback (most recent call last):"
        assert last in err
        assert err.count("Traceback") == 1 and "Exception ignored" not in err


def test_threads_that_are_waited_for() -> None:
    """Not daemons: the interpreter waits for the calls they are at, and for no more."""
    program = """
        import threading, time
        import numpy as np
        import fi_ffi
        # From 3.12 on no thread begins, not the watchdog's either, once the main one has ended.
        stop, all_watched = time.monotonic() + 0.2, threading.Barrier(5)
        x, w = np.ones((4, 8), np.float16), np.ones(8, np.float16)
        done = []

        def work():
            y = np.empty_like(x)
            with fi_ffi.watchdog(60):
                all_watched.wait()
                while time.monotonic() < stop:
                    fi_ffi.rmsnorm(y, x, w)
            done.append(1)

        import atexit
        atexit.register(lambda: print(len(done)))
        for _ in range(4):
            threading.Thread(target=work).start()
        all_watched.wait()
    """
    assert done(program) == (0, "4\n", "")


def test_forked_children_that_end_as_programs_do() -> None:
    """By sys.exit, with all of a parent's objects in them: none is freed, nothing is said."""
    program = textwrap.dedent(ALIVE) + textwrap.dedent("""
        import gc, warnings
        warnings.simplefilter("ignore", DeprecationWarning)  # of 3.12 and later, for the threads
        pid = os.fork()
        if not pid:
            freed = []
            gpu.runtime.cudaEventDestroy = gpu.runtime.cudaGraphExecDestroy = freed.append
            del call, loose, plans, runs, on_gpu, event, device_memory, graph, run
            gc.collect()
            assert not freed
            sys.exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    """)
    assert done(program, counted(), seconds=60) == (0, "", "")
