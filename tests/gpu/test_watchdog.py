"""Watchdogs on a GPU: the streams of tests/ops/test_watchdog.py, and what only a GPU has."""

from __future__ import annotations

import contextlib
import itertools
import re
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from cuda.bindings import runtime

import fi_ffi
from fi_ffi.cli.cuda import DeviceArray, check, gpus, on_device
from fi_ffi.ops.call import memory
from fi_ffi.ops.functions import OPS
from fi_ffi.watch import stream_progress

from tests.helpers import children
from tests.helpers.bodies import bodies_of
from tests.helpers.cases import make_case
from tests.helpers.hangs import Hangs, silent, until
from tests.helpers.prepared_calls import or_skip, poison
from tests.ops import test_watchdog
from tests.ops.test_watchdog import _nothing_is_left  # noqa: F401  a fixture

globals().update(bodies_of(test_watchdog))
LIMIT, LONG = 0.5, 60.0


class Calls:
    """Calls of an op with inputs of their own on the GPU, each with what it must give."""

    def __init__(self, to_gpu, rng, name: str = "rmsnorm", rows: int = 96) -> None:
        self.op = OPS[name]
        self.case = make_case(self.op.row, {"n": rows, "h": 4096}, {"T": "bfloat16"}, rng)
        self.arrays = [to_gpu(array) for array in self.case.arrays.values()]
        self.descs = [array.desc() for array in self.arrays]

    def __call__(self, stream: int) -> None:
        self.op(*self.descs, stream=stream)

    def poison(self) -> None:
        poison(self.arrays[0])

    def check(self) -> None:
        """The result is right; waits for the device."""
        assert self.case.error("out", self.arrays[0].get())[1] <= 1


@pytest.fixture
def calls(to_gpu, rng, streams):
    """rmsnorm and gemma_rmsnorm: loaded, run with a watchdog, and poisoned again."""
    made = [Calls(to_gpu, rng, name) for name in ("rmsnorm", "gemma_rmsnorm")]
    with fi_ffi.watchdog(LONG) as dog:
        for call in made:
            for stream in streams:
                call(stream)
    assert dog.reports == []
    for call in made:
        call.check()
        call.poison()
    return made


class Machine:
    """Streams that are stuck before each call until they are told to do its work."""

    def __init__(self, calls, streams, gates) -> None:
        self.calls, self.streams = {call.op.row.name: call for call in calls}, streams
        self._gates = dict(zip(streams, gates, strict=True))
        self._launched, self._done = Counter(), Counter()

    def descs(self, name: str) -> dict[str, fi_ffi.TensorDesc]:
        call = self.calls[name]
        return dict(zip(call.case.arrays, call.descs, strict=True))

    def launch(self, name: str = "rmsnorm", stream: int | None = None) -> None:
        stream = stream or self.streams[0]
        self._launched[stream] += 1
        self._gates[stream].hold(stream, self._launched[stream])
        self.calls[name](stream)

    def work(self, count: int = 1, stream: int | None = None) -> None:
        """Let the next so many calls go."""
        stream = stream or self.streams[0]
        self._done[stream] += count
        self._gates[stream].open(self._done[stream])

    def left(self, stream: int | None = None) -> int:
        """How many marks a stream has still to write."""
        cell = cell_of(stream or self.streams[0])
        return cell.issued - cell.value

    def check(self) -> None:
        """The results of what was called are right; waits for the device."""
        assert all(self._launched[stream] == self._done[stream] for stream in self.streams)
        self.calls["rmsnorm"].check()


@pytest.fixture
def machine(calls, streams, gate):
    other = type(gate)()
    yield Machine(calls, streams, (gate, other))
    for one in (gate, other):
        one.open()
    check(runtime.cudaDeviceSynchronize())
    check(runtime.cudaFreeHost(other.address))


def cell_of(stream: int) -> stream_progress.ProgressCell | None:
    return stream_progress.progress._cells.get(memory.stream_key(0, stream))


# ---------------------------------------------------------------- what is fine


def test_a_chain_of_200_calls_on_two_streams(to_gpu, rng, streams, capsys):
    """No report; every call is marked; the results are there when the block ends."""
    of_streams = [Calls(to_gpu, rng, rows=rows) for rows in (96, 130)]
    with fi_ffi.watchdog(10.0) as dog:
        for i in range(200):
            of_streams[i % 2](streams[i % 2])
    cells = [cell_of(stream) for stream in streams]
    assert [(cell.issued, cell.value) for cell in cells] == [(100, 100), (100, 100)]
    assert dog.reports == []
    assert capsys.readouterr().err == ""
    for call in of_streams:
        call.check()


def test_threads_that_share_streams(calls, streams):
    """Marks of one stream come from several threads; watchdogs open and close meanwhile."""

    def run(job):
        stream, watches = job
        for i in range(200):
            with fi_ffi.watchdog(LONG) if watches and i % 10 == 0 else contextlib.nullcontext():
                calls[0](stream)

    before = [cell_of(stream).issued for stream in streams]
    with fi_ffi.watchdog(LONG) as dog, ThreadPoolExecutor(4) as pool:
        list(pool.map(run, itertools.product(streams, (False, True))))
    assert dog.reports == []
    for stream, issued in zip(streams, before, strict=True):
        assert cell_of(stream).issued == cell_of(stream).value == issued + 400
    calls[0].check()


def test_default_streams(calls):
    """0 and 1 are the legacy one; 2 is each thread's own, and so are its marks."""
    together = threading.Barrier(2)

    def run(_):
        together.wait()
        for handle in (0, 1, 2):
            calls[0](handle)
        return memory.stream_key(0, 2)

    with fi_ffi.watchdog(LONG) as dog, ThreadPoolExecutor(2) as pool:
        keys = list(pool.map(run, range(2)))
    assert dog.reports == []
    assert len(set(keys)) == 2
    calls[0].check()


def test_repeated_and_prepared_calls_are_marked_too(calls, stream):
    """They take short cuts where no watchdog is open."""
    prepared = fi_ffi.prepare(calls[0].op, *calls[0].descs, stream=stream)
    issued = cell_of(stream).issued
    for _ in range(3):
        calls[0](stream)
        prepared()
    assert cell_of(stream).issued == issued
    with fi_ffi.watchdog(LONG), fi_ffi.stream(stream):
        for _ in range(3):
            calls[0](stream)
            prepared()
            calls[0].op(*calls[0].descs)
    assert cell_of(stream).issued == cell_of(stream).value == issued + 9
    calls[0].check()


def test_a_call_that_fails_is_not_waited_for(rng, to_gpu, stream):
    op = OPS["fused_add_rmsnorm"]
    too_long = make_case(op.row, {"n": 2, "h": 65536}, {"T": "float16"}, rng)
    arrays = [to_gpu(array) for array in too_long.arrays.values()]
    descs = [array.desc() for array in arrays]
    with (
        fi_ffi.watchdog(LONG) as dog,
        pytest.raises(fi_ffi.KernelError, match="FusedAddRMSNorm failed"),
    ):
        op(*descs, stream=stream)
    assert dog.reports == []


# ---------------------------------------------------------------- what is stuck


def test_a_module_s_call_that_is_stuck(calls, streams, gate):
    """No row describes it: its arguments are told by their numbers."""
    rms, _ = calls
    stuck, _ = streams
    entry = fi_ffi.module("norm").entry("rmsnorm")
    entry(*rms.descs, 1e-6, False, stream=stuck)  # kernels are loaded
    gate.hold(stuck)
    with Hangs(LIMIT, on_hang=silent) as block:
        entry(*rms.descs, 1e-6, False, stream=stuck)
        rms(stuck)
        until(lambda: block.dog.reports)
    assert block.error.op == "norm.rmsnorm"
    lines = block.dog.reports[0].splitlines()
    assert lines[2] == f"  entry: norm.rmsnorm, on cuda:0, stream {stuck:#x}"
    for number, array in enumerate(rms.arrays):
        assert f"  {number}: {array.desc().layout} at {array.ptr:#x}" in lines
    assert "  3: 1e-06" in lines
    assert lines[-1].startswith("  behind it: ") and lines[-1].endswith("1 rmsnorm)")
    gate.open()
    with fi_ffi.watchdog(LONG) as dog:
        entry(*rms.descs, 1e-6, False, stream=stuck)
    assert dog.reports == []
    rms.check()


def test_a_launch_that_blocks_behind_a_stuck_stream(calls, stream, gate):
    """The queue of a stream is not endless: the thread that fills it is told of too."""
    stop, launched = threading.Event(), []

    def fill():
        while not stop.is_set() and len(launched) < 100_000:
            calls[0](stream)
            launched.append(1)

    gate.hold(stream)
    worker = threading.Thread(target=fill, name="the filler")
    with fi_ffi.watchdog(LIMIT, on_hang=silent) as dog:
        worker.start()
        try:
            # No call of CUDA from this thread: the other may be blocked inside the driver.
            until(lambda: dog.reports)
            count = len(launched)
            time.sleep(0.2)
            assert len(launched) == count, "the launch does not block"
        finally:
            stop.set()
            gate.open()
            worker.join(30)
    (report,) = dog.reports
    assert "): rmsnorm has not finished" in report
    behind, blocked = report.splitlines()[-2:]
    assert behind == f"  behind it: {count} later calls ({count} rmsnorm)"
    assert blocked.startswith("    not returned: rmsnorm, ") and "thread 'the filler'" in blocked
    print(f"{count} calls were queued before a launch blocked")
    calls[0].check()


def test_a_plans_run(to_gpu, rng, stream, gate):
    """The report has the plan; the run's result is the one of a run that is not held up."""
    heads, kv_heads, dim, page, pages = 8, 2, 128, 16, 5
    indptr, last = np.array([0, 2, pages], np.int32), np.array([7, page], np.int32)
    indices = rng.permutation(pages).astype(np.int32)
    plan = or_skip(
        fi_ffi.BatchDecodePlan, indptr, indices, last, num_qo_heads=heads, num_kv_heads=kv_heads,
        head_dim=dim, page_size=page, device="cuda:0", stream=stream,
    )  # fmt: skip
    hosts = [rng.standard_normal(shape).astype(np.float16) for shape in (
        (2, heads, dim), (pages, page, kv_heads, dim), (pages, page, kv_heads, dim))]  # fmt: skip
    poison = np.full((2, heads, dim), np.nan, np.float16)
    inputs = [to_gpu(host).desc() for host in hosts]
    outs = [to_gpu(poison) for _ in range(2)]
    with fi_ffi.watchdog(LONG) as dog:
        plan.run(*inputs, outs[0].desc(), stream=stream)
        plan.replan(indptr, indices, last, stream=stream)
    assert dog.reports == []
    assert np.isfinite(outs[0].get()).all()

    gate.hold(stream)
    with Hangs(LIMIT, on_hang=silent) as block:
        plan.run(*inputs, outs[1].desc(), stream=stream)
        until(lambda: block.dog.reports)
    (report,) = block.dog.reports
    assert block.error.op == "BatchDecodePlan"
    assert "): BatchDecodePlan has not finished" in report
    assert f", on cuda:0, stream {stream:#x}" in report
    assert f"  entry: {plan.module}.run" in report
    told = re.search("  plan: (.*)", report)[1]
    assert told.startswith(f"BatchDecodePlan, run: backend 'cuda cores', module {plan.module}, ")
    for part in ("2 requests", "num_qo_heads=8", "num_kv_heads=2", "head_dim=128", "page_size=16"):
        assert part in told
    gate.open()
    assert outs[1].get().tobytes() == outs[0].get().tobytes()


def test_abort_ends_a_process_whose_stream_is_stuck():
    program = """
    import threading
    import numpy as np
    from cuda.bindings import driver, runtime
    import fi_ffi
    from fi_ffi.cli.cuda import DeviceArray, check

    x, w = DeviceArray(np.ones((4, 64), np.float16)), DeviceArray(np.ones(64, np.float16))
    stream = int(check(runtime.cudaStreamCreateWithFlags(runtime.cudaStreamNonBlocking)))
    with fi_ffi.watchdog(30.0):
        fi_ffi.rmsnorm(x.desc(), x.desc(), w.desc(), stream=stream)
    word = int(check(runtime.cudaHostAlloc(4096, 3)))
    check(driver.cuStreamWaitValue32(stream, word, 123456789, 1))  # until it is this, exactly
    print("held", flush=True)
    with fi_ffi.watchdog(0.5, abort=True):
        fi_ffi.rmsnorm(x.desc(), x.desc(), w.desc(), stream=stream)
    print("never")
    """
    status, out, err = children.done(program)
    assert (status, out) == (124, "held\n"), err
    assert "fi_ffi.watchdog(0.5): rmsnorm has not finished" in err
    assert "most recent call first" in err and " in __exit__\n" in err


# ---------------------------------------------------------------- graphs


def capture(stream: int, launch):
    """What replays a graph of what `launch` does, captured so that no thread may allocate."""
    mode = runtime.cudaStreamCaptureMode.cudaStreamCaptureModeGlobal
    check(runtime.cudaStreamBeginCapture(stream, mode))
    try:
        launch()
    finally:
        graph = check(runtime.cudaStreamEndCapture(stream))
    executable = check(runtime.cudaGraphInstantiate(graph, 0))
    nodes = check(runtime.cudaGraphGetNodes(graph, 0))[1]

    def replay():
        check(runtime.cudaGraphLaunch(executable, stream))
        check(runtime.cudaStreamSynchronize(stream))
        check(runtime.cudaGraphExecDestroy(executable))
        check(runtime.cudaGraphDestroy(graph))

    return replay, nodes


def test_a_capture_is_not_marked_nor_waited_for(calls, stream):
    issued = cell_of(stream).issued
    with fi_ffi.watchdog(LONG) as dog:
        replay, nodes = capture(stream, lambda: [call(stream) for call in calls])
        assert cell_of(stream).issued == issued
        replay()
        calls[0](stream)
    assert nodes == 2, "a kernel for each call, and no other node"
    assert cell_of(stream).issued == issued + 1
    assert dog.reports == []
    for call in calls:
        call.check()


def test_a_captured_call_may_be_the_first_that_is_watched(calls, stream, monkeypatch):
    """No memory is allocated for a stream that is capturing."""
    fresh = stream_progress.StreamProgress(stream_progress._allocate, stream_progress._write)
    monkeypatch.setattr(stream_progress, "progress", fresh)
    with fi_ffi.watchdog(LONG):
        replay, _ = capture(stream, lambda: calls[0](stream))
    assert fresh._cells == {} and fresh._free == []
    replay()
    calls[0].check()


def test_memory_for_marks_may_be_needed_while_another_stream_captures(calls, streams, monkeypatch):
    """Allocating is forbidden then, but to a thread that says it knows what it does."""
    capturing, other = streams
    fresh = stream_progress.StreamProgress(stream_progress._allocate, stream_progress._write)
    monkeypatch.setattr(stream_progress, "progress", fresh)

    def launch():
        calls[0](capturing)
        assert fresh._cells == {}
        calls[1](other)
        assert len(fresh._cells) == 1

    with fi_ffi.watchdog(LONG) as dog:
        replay, nodes = capture(capturing, launch)
    assert (nodes, dog.reports) == (1, [])
    replay()
    for call in calls:
        call.check()


# ---------------------------------------------------------------- more than one GPU


def test_two_devices_write_their_marks(calls, stream, rng):
    if len(gpus()) < 2:
        pytest.skip("needs two GPUs")
    case = make_case(OPS["rmsnorm"].row, {"n": 33, "h": 1024}, {"T": "float16"}, rng)
    arrays = [DeviceArray(array, device=1) for array in case.arrays.values()]
    with on_device(1):
        theirs = int(check(runtime.cudaStreamCreateWithFlags(runtime.cudaStreamNonBlocking)))
    check(runtime.cudaSetDevice(0))
    with fi_ffi.watchdog(10.0) as dog:
        for _ in range(50):
            fi_ffi.rmsnorm(*(array.desc() for array in arrays), stream=theirs)
            calls[0](stream)
        assert check(runtime.cudaGetDevice()) == 0
    assert dog.reports == []
    calls[0].check()
    assert case.error("out", arrays[0].get())[1] <= 1
    for array in arrays:
        array.free()
    with on_device(1):
        check(runtime.cudaStreamDestroy(theirs))
