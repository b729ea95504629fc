"""Watchdogs on a GPU: streams that are held up by what they wait for, and let go again."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import fi_ffi
from fi_ffi.ops import cuda
from fi_ffi.ops.call import memory
from fi_ffi.ops.functions import OPS
from fi_ffi.ops.watch import stream_progress, watching

from tests.helpers.cases import make_case
from tests.helpers.hangs import Hangs, silent, until

LIMIT, LONG = 0.5, 60.0


@pytest.fixture
def streams(stream):
    """Two streams that wait for no other."""
    from cuda.bindings import runtime

    from fi_ffi.cli.cuda import check

    other = check(runtime.cudaStreamCreateWithFlags(runtime.cudaStreamNonBlocking))
    yield stream, int(other)
    check(runtime.cudaStreamSynchronize(other))
    check(runtime.cudaStreamDestroy(other))


class Calls:
    """Calls of an op with inputs of their own on the GPU, each with what it must give."""

    def __init__(self, to_gpu, rng, name: str = "rmsnorm", rows: int = 96) -> None:
        self.op = OPS[name]
        self.case = make_case(self.op.row, {"n": rows, "h": 4096}, {"T": "bfloat16"}, rng)
        self.arrays = [to_gpu(array) for array in self.case.arrays.values()]
        self.descs = [array.desc() for array in self.arrays]

    def __call__(self, stream: int) -> None:
        self.op(*self.descs, stream=stream)  # the line reported

    def poison(self) -> None:
        from cuda.bindings import runtime

        from fi_ffi.cli.cuda import POISON, check

        check(runtime.cudaMemset(self.arrays[0].ptr, POISON, self.arrays[0].nbytes))
        check(runtime.cudaDeviceSynchronize())

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


@pytest.fixture(autouse=True)
def _nothing_is_left():
    yield
    assert watching.hooks == ()
    assert not [t.name for t in threading.enumerate() if t.name.startswith("fi_ffi.watchdog")]


def slot_of(stream: int) -> stream_progress.Slot | None:
    return stream_progress.progress._slots.get(memory.stream_key(0, stream))


# ---------------------------------------------------------------- what is fine


def test_a_chain_of_200_calls_on_two_streams(to_gpu, rng, streams, capsys):
    """No report; every call is marked; the results are there when the block ends."""
    of_streams = [Calls(to_gpu, rng, rows=rows) for rows in (96, 130)]
    with fi_ffi.watchdog(10.0) as dog:
        for i in range(200):
            of_streams[i % 2](streams[i % 2])
    slots = [slot_of(stream) for stream in streams]
    assert [(slot.issued, slot.value) for slot in slots] == [(100, 100), (100, 100)]
    assert dog.reports == []
    assert capsys.readouterr().err == ""
    for call in of_streams:
        call.check()


def test_the_end_of_the_block_waits_for_the_stream(calls, stream):
    from cuda.bindings import runtime

    from fi_ffi.cli.cuda import check

    size = 1 << 30
    big = [check(runtime.cudaMalloc(size)) for _ in range(2)]
    kind = runtime.cudaMemcpyKind.cudaMemcpyDeviceToDevice
    event = cuda.Event()
    with fi_ffi.watchdog(LONG) as dog:
        for _ in range(100):  # some 70 ms
            check(runtime.cudaMemcpyAsync(big[0], big[1], size, kind, stream))
        event.record(stream)
        calls[0](stream)
        assert not event.is_done(), "the block does not end before the stream has done its work"
    assert event.is_done()
    assert dog.reports == []
    calls[0].check()
    for pointer in big:
        check(runtime.cudaFree(pointer))


def test_a_stream_that_gets_on_is_never_late(calls, stream, gate):
    """Eight calls that finish one after the other, in more than twice the limit in all."""
    steps = 8

    def let_go():
        for i in range(1, steps + 1):
            time.sleep(0.15)
            gate.open(i)

    start = time.monotonic()
    with fi_ffi.watchdog(LIMIT) as dog:
        for i in range(1, steps + 1):
            gate.hold(stream, i)
            calls[0](stream)
        thread = threading.Thread(target=let_go)
        thread.start()
    assert time.monotonic() - start > 2 * LIMIT
    thread.join()
    assert dog.reports == []
    calls[0].check()


def test_threads_that_share_streams(calls, streams):
    """Marks of one stream come from several threads; watchdogs open and close meanwhile."""
    failures = []

    def run(stream, watches):
        try:
            for i in range(200):
                if watches and i % 10 == 0:
                    with fi_ffi.watchdog(LONG):
                        calls[0](stream)
                else:
                    calls[0](stream)
        except BaseException as error:
            failures.append(error)

    before = [slot_of(stream).issued for stream in streams]
    with fi_ffi.watchdog(LONG) as dog:
        jobs = [(stream, watches) for stream in streams for watches in (False, True)]
        threads = [threading.Thread(target=run, args=job) for job in jobs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert failures == [] and dog.reports == []
    for stream, issued in zip(streams, before, strict=True):
        assert slot_of(stream).issued == slot_of(stream).value == issued + 400
    calls[0].check()


def test_default_streams(calls):
    """0 and 1 are the legacy one; 2 is each thread's own, and so are its marks."""
    keys = []

    def run():
        for handle in (0, 1, 2):
            calls[0](handle)
        keys.append(memory.stream_key(0, 2))

    with fi_ffi.watchdog(LONG) as dog:
        threads = [threading.Thread(target=run) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert dog.reports == []
    assert len(set(keys)) == 2
    calls[0].check()


def test_scopes(calls, stream):
    issued = slot_of(stream).issued
    with fi_ffi.watchdog(LONG), fi_ffi.stream(stream):
        calls[0].op(*calls[0].descs)
    assert slot_of(stream).issued == issued + 1
    calls[0].check()


def test_repeated_and_prepared_calls_are_marked_too(calls, stream):
    """They take short cuts where no watchdog is open."""
    prepared = fi_ffi.prepare(calls[0].op, *calls[0].descs, stream=stream)
    issued = slot_of(stream).issued
    for _ in range(3):
        calls[0](stream)
        prepared()
    assert slot_of(stream).issued == issued
    with fi_ffi.watchdog(LONG):
        for _ in range(3):
            calls[0](stream)
            prepared()
    assert slot_of(stream).issued == slot_of(stream).value == issued + 6
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


def test_a_stuck_stream_is_reported_and_everything_finishes_later(calls, streams, gate):
    rms, gemma = calls
    stuck, other = streams
    gate.hold(stuck)
    begin = time.monotonic()
    with Hangs(LIMIT, on_hang=silent) as block:
        rms(stuck)
        for call in (rms, gemma, rms, rms, gemma):
            call(stuck)
        gemma(other)  # which is not stuck
        until(lambda: block.dog.reports)
        assert LIMIT < time.monotonic() - begin < 2.0
        time.sleep(max(0.0, begin + 2.0 - time.monotonic()))
    assert len(block.dog.reports) == 1, "once, however long"
    assert block.error.op == "rmsnorm"
    slot = slot_of(stuck)
    assert (slot.issued - slot.value) == 6, "nothing has moved"
    assert slot_of(other).issued == slot_of(other).value

    source = Path(__file__).read_text().splitlines()
    line = next(i for i, text in enumerate(source, 1) if text.endswith("  # the line reported"))
    for report in (block.dog.reports[0], block.error.report):
        lines = report.splitlines()
        assert re.fullmatch(
            r"fi_ffi.watchdog\(0.5\): rmsnorm has not finished, and its stream has not moved "
            r"for \d\.\d\d s", lines[0],
        )  # fmt: skip
        assert lines[1].startswith(f"  called: {__file__}:{line} in __call__, thread 'MainThread'")
        assert lines[2] == f"  entry: norm.rmsnorm, on cuda:0, stream {stuck:#x}"
        assert lines[3] == "  host: the call has returned, its work is queued"
        for name, array in zip(rms.case.arrays, rms.arrays, strict=True):
            layout = array.desc().layout
            assert f"  {name}: {layout} at {array.ptr:#x}" in lines
        assert "  eps: 1e-06" in lines
        assert lines[-1] == "  behind it: 5 later calls (3 rmsnorm, 2 gemma_rmsnorm)"

    gate.open()
    with fi_ffi.watchdog(LONG) as dog:
        rms(stuck)
    assert dog.reports == []
    for call in calls:
        call.check()


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


def test_exit_raises_though_nothing_was_reported_before(calls, stream, gate, capsys):
    gate.hold(stream)
    begin = time.monotonic()
    with Hangs(LIMIT):
        calls[0](stream)
    assert LIMIT < time.monotonic() - begin < 4 * LIMIT
    assert f"rmsnorm, on cuda:0, stream {stream:#x}" in capsys.readouterr().err
    gate.open()
    calls[0].check()


def test_an_exception_in_the_block_waits_for_no_stream(calls, stream, gate):
    def block():
        with fi_ffi.watchdog(LONG):
            calls[0](stream)
            raise ZeroDivisionError

    gate.hold(stream)
    begin = time.monotonic()
    with pytest.raises(ZeroDivisionError):
        block()
    assert time.monotonic() - begin < 5
    gate.open()
    calls[0].check()


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


def test_nested_watchdogs_wait_for_their_own_calls(calls, streams, gate):
    stuck, other = streams
    gate.hold(stuck)
    with fi_ffi.watchdog(LONG) as outer:
        calls[0](stuck)
        with fi_ffi.watchdog(LIMIT) as inner:
            calls[1](other)
            time.sleep(2 * LIMIT)
        assert inner.reports == [], "the stuck call is not of its block"
        gate.open()
    assert outer.reports == []
    for call in calls:
        call.check()


def test_a_plans_run(to_gpu, rng, stream, gate):
    """The report has the plan; the run's result is the one of a run that is not held up."""
    heads, kv_heads, dim, page, pages = 8, 2, 128, 16, 5
    indptr, last = np.array([0, 2, pages], np.int32), np.array([7, page], np.int32)
    indices = rng.permutation(pages).astype(np.int32)
    try:
        plan = fi_ffi.BatchDecodePlan(
            indptr, indices, last, num_qo_heads=heads, num_kv_heads=kv_heads, head_dim=dim,
            page_size=page, device="cuda:0", stream=stream,
        )  # fmt: skip
    except fi_ffi.KernelNotFoundError as error:
        pytest.skip(str(error))
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
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (124, "held\n"), done.stderr
    assert "fi_ffi.watchdog(0.5): rmsnorm has not finished" in done.stderr
    assert "most recent call first" in done.stderr and " in __exit__\n" in done.stderr


# ---------------------------------------------------------------- graphs


def capture(stream: int, launch):
    """What replays a graph of what `launch` does, captured so that no thread may allocate."""
    from cuda.bindings import runtime

    from fi_ffi.cli.cuda import check

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
    issued = slot_of(stream).issued
    with fi_ffi.watchdog(LONG) as dog:
        replay, nodes = capture(stream, lambda: [call(stream) for call in calls])
        assert slot_of(stream).issued == issued
        replay()
        calls[0](stream)
    assert nodes == 2, "a kernel for each call, and no other node"
    assert slot_of(stream).issued == issued + 1
    assert dog.reports == []
    for call in calls:
        call.check()


def test_a_captured_call_may_be_the_first_that_is_watched(calls, stream, monkeypatch):
    """No memory is allocated for a stream that is capturing."""
    fresh = stream_progress.StreamProgress(stream_progress._allocate, stream_progress._write)
    monkeypatch.setattr(stream_progress, "progress", fresh)
    with fi_ffi.watchdog(LONG):
        replay, _ = capture(stream, lambda: calls[0](stream))
    assert fresh._slots == {} and fresh._free == []
    replay()
    calls[0].check()


def test_memory_for_marks_may_be_needed_while_another_stream_captures(calls, streams, monkeypatch):
    """Allocating is forbidden then, but to a thread that says it knows what it does."""
    capturing, other = streams
    fresh = stream_progress.StreamProgress(stream_progress._allocate, stream_progress._write)
    monkeypatch.setattr(stream_progress, "progress", fresh)

    def launch():
        calls[0](capturing)
        assert fresh._slots == {}
        calls[1](other)
        assert len(fresh._slots) == 1

    with fi_ffi.watchdog(LONG) as dog:
        replay, nodes = capture(capturing, launch)
    assert (nodes, dog.reports) == (1, [])
    replay()
    for call in calls:
        call.check()


# ---------------------------------------------------------------- more than one GPU, and time


def test_two_devices_write_their_marks(calls, stream, rng):
    from cuda.bindings import runtime

    from fi_ffi.cli.cuda import DeviceArray, check, gpus, on_device

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


def test_time_of_a_call(to_gpu, rng, stream, capsys):
    """Printed: the host's microseconds a call, without a watchdog and with one or two."""
    from cuda.bindings import runtime

    from fi_ffi.cli.cuda import check

    call, count = Calls(to_gpu, rng, rows=1), 300

    def measured() -> float:
        best = float("inf")
        for _ in range(20):
            check(runtime.cudaStreamSynchronize(stream))
            start = time.perf_counter()
            for _ in range(count):
                call(stream)
            best = min(best, time.perf_counter() - start)
        check(runtime.cudaStreamSynchronize(stream))
        return best / count * 1e6

    measured()
    without = measured()
    with fi_ffi.watchdog(LONG):
        one = measured()
        with fi_ffi.watchdog(LONG):
            two = measured()
    again = measured()
    with capsys.disabled():
        print(
            f"\nrmsnorm on the host: {without:.2f} us without a watchdog ({again:.2f} after), "
            f"{one:.2f} with one (+{one - without:.2f}), {two:.2f} with two (+{two - without:.2f})"
        )
    assert one - without < 100, "microseconds"
    call.check()
