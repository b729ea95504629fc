"""Watchdogs without a GPU: calls that block on the host, and streams written for by hand."""

from __future__ import annotations

import gc
import importlib.metadata
import math
import os
import re
import signal
import threading
import time
from collections import defaultdict, deque
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import fi_ffi
from fi_ffi.abi._cffi import ffi
from fi_ffi.abi.tensor import parse_device
from fi_ffi.loader import machine as of_loader
from fi_ffi.ops.call import hooks, memory
from fi_ffi.ops.call.compiled import Variant
from fi_ffi.ops.call.releases import entry_for
from fi_ffi.ops.functions import OPS
from fi_ffi.watch import call_record, stream_progress, watching
from fi_ffi.watch import watchdog as module

from tests.helpers.forking import in_child
from tests.helpers.frames import write_tensor
from tests.helpers.hangs import Hangs, silent, until
from tests.helpers.plan_calls import Case
from tests.helpers.prepared_calls import Mine

LIMIT = 0.25
LONG = 30.0  # a limit that no test is to reach
CUDA, CPU = parse_device("cuda:0"), parse_device("cpu")


def threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("fi_ffi.watchdog")]


@pytest.fixture(autouse=True)
def _nothing_is_left():
    yield
    assert watching.inboxes == watching.logs == () and hooks.watcher is None
    assert threads() == []


def call(mine: Mine) -> None:
    mine.op(*mine.descs, factor=2.0)  # the line that reports name


THE_LINE = next(
    i
    for i, line in enumerate(Path(__file__).read_text().splitlines(), 1)
    if line.endswith("  # the line that reports name")
)


class Gpu:
    """Where a GPU would be: it has memory, streams, and does its work when it is told to.

    tests/gpu/test_watchdog.py has one of this kind around a real one, and runs all tests here that
    take a `machine` on it.
    """

    streams = 7, 8

    def __init__(self) -> None:
        self.pages: list = []
        self.queues: dict[int, deque[tuple[int, int]]] = defaultdict(deque)
        self.progress = stream_progress.StreamProgress(self.allocate, self.write)
        self.array = np.zeros((4, 16), np.float16)

    def allocate(self, count: int) -> int:
        self.pages.append(ffi.new("char[]", b"\xa5" * (count - 1)))
        return int(ffi.cast("uintptr_t", self.pages[-1]))

    def write(self, stream: int, address: int, number: int) -> None:
        self.queues[stream].append((address, number))

    def descs(self, name: str) -> dict[str, fi_ffi.TensorDesc]:
        shapes = {
            arg.name: self.array.shape[-len(arg.axis_names) :] for arg in OPS[name].row.tensors
        }
        return {
            arg: fi_ffi.TensorDesc(4096 + 256 * i, shape, "float16", device=CUDA)
            for i, (arg, shape) in enumerate(shapes.items())
        }

    def launch(
        self, name: str = "rmsnorm", stream: int = 7, returns: bool = True
    ) -> call_record.CallRecord:
        """What `launch` does with a watchdog open, but for the kernel."""
        compiled, descs = OPS[name].compiled, self.descs(name)
        kinds = {arg: desc.kind for arg, desc in descs.items()}
        variant = Variant(compiled, kinds, "NHD", CUDA)
        variant.entry = entry_for(compiled.row, CPU)
        frame = variant.new_frame()
        for i, arg in enumerate(compiled.row.args):
            if arg.name in descs:
                write_tensor(frame, i, descs[arg.name])
        call = call_record.of_frame(frame, stream)
        watching.deliver(call)
        call.cell = self.progress.cell((0, stream))
        if returns:
            call.cell, call.mark = self.progress.mark(call.cell, (0, stream), stream)
        return call

    def work(self, count: int = 1, stream: int = 7) -> None:
        """Do the next so many calls' work: their marks appear in memory."""
        for _ in range(count):
            address, number = self.queues[stream].popleft()
            ffi.cast("uint32_t *", address)[0] = number

    def left(self, stream: int = 7) -> int:
        """How many marks a stream has still to write."""
        return len(self.queues[stream])

    def check(self) -> None:
        """The calls' results are right, where there are any."""


@pytest.fixture
def gpu():
    return Gpu()


@pytest.fixture
def machine(gpu):
    return gpu


def later(seconds: float, action) -> threading.Timer:
    timer = threading.Timer(seconds, action)
    timer.start()
    return timer


# ---------------------------------------------------------------- calls on the host


def test_a_blocked_call_is_reported_while_the_main_thread_is_stuck(mine):
    gate = threading.Event()
    mine.work = lambda: gate.wait(20)
    taken = []

    def on_hang(report):
        assert threading.current_thread() is not threading.main_thread()
        taken.append(report)
        gate.set()  # nothing else lets the main thread go on

    start = time.monotonic()
    with fi_ffi.watchdog(LIMIT, on_hang=on_hang) as dog:
        call(mine)
        waited = time.monotonic() - start
    assert mine.is_done(2)
    assert LIMIT < waited < 10
    assert dog.reports == taken
    (report,) = taken
    lines = report.splitlines()
    assert re.fullmatch(
        r"fi_ffi.watchdog\(0.25\): mine_too has not returned for \d.\d\d s", lines[0]
    )
    assert lines[1].startswith(f"  called: {__file__}:{THE_LINE} in call, thread 'MainThread'")
    assert lines[2:] == [
        "  entry: fi_ffi.reference.norm.mine_too, on cpu",
        "  host: the call has not returned",
        f"  y: float16[4, 16] on cpu at {mine.y.ctypes.data:#x}",
        f"  x: float16[4, 16] on cpu at {mine.x.ctypes.data:#x}",
        "  w: None",
        "  factor: 2.0",
        "  count: 0",
        "  flag: False",
        "  kv_layout: 'NHD'",
    ]


def test_a_reported_call_that_is_over_is_kept_no_longer(mine):
    """In a server's watchdog, which stays open: neither it nor what it was given."""
    gate = threading.Event()
    mine.work = lambda: gate.wait(20)

    def records():
        gc.collect()
        return sum(type(each) is call_record.CallRecord for each in gc.get_objects())

    before = records()
    with fi_ffi.watchdog(LIMIT, on_hang=lambda report: gate.set()) as dog:
        for _ in range(4):
            gate.clear()
            call(mine)
        assert len(dog.reports) == 4
        until(lambda: records() <= before + 1)  # the last one, by the thread that reported it


def test_stderr_has_the_report_where_nobody_takes_it(mine, capsys):
    mine.work = lambda: time.sleep(3 * LIMIT)
    with fi_ffi.watchdog(LIMIT) as dog:
        call(mine)
    assert len(dog.reports) == 1, "once for a stuck call"
    assert capsys.readouterr().err == dog.reports[0] + "\n"
    mine.work = lambda: None
    with fi_ffi.watchdog(LONG) as dog:
        call(mine)
    assert mine.is_done(2)
    assert (dog.reports, capsys.readouterr().err) == ([], "")


def slowed(monkeypatch, kernels, name: str) -> list[str]:
    """Let a kernel wait for a report of it; the reports."""
    taken: list[str] = []
    kernel = getattr(kernels, name)

    def slow(*args):
        until(lambda: taken)
        return kernel(*args)

    monkeypatch.setattr(kernels, name, slow)
    return taken


def test_worker_threads_are_watched_and_waited_for(mine):
    started, gate = threading.Event(), threading.Event()
    mine.work = lambda: (started.set(), gate.wait(20))
    worker = threading.Thread(target=call, args=(mine,), name="the worker")
    try:
        with Hangs(LIMIT, on_hang=silent) as block:
            worker.start()
            started.wait(20)
    finally:
        gate.set()
        worker.join()
    assert block.error.op == "mine_too"
    assert isinstance(block.error, TimeoutError)
    for report in (str(block.error), block.error.report, *block.dog.reports):
        assert "mine_too has not returned" in report
        assert f":{THE_LINE} in call, thread 'the worker'" in report
    assert len(block.dog.reports) == 1


def test_exit_waits_for_a_worker(mine):
    started, gate = threading.Event(), threading.Event()
    mine.work = lambda: (started.set(), gate.wait(20))
    worker = threading.Thread(target=call, args=(mine,))
    with fi_ffi.watchdog(LONG):
        worker.start()
        started.wait(20)
        later(0.3, gate.set)
    assert gate.is_set(), "exit did not wait"
    worker.join()


def test_a_plans_calls_are_reported_with_the_plan(monkeypatch):
    from fi_ffi.reference.attention import plan as kernels

    case, taken = Case("decode", logits_soft_cap=8.0), slowed(monkeypatch, kernels, "save")
    with fi_ffi.watchdog(LIMIT, on_hang=taken.append):
        plan = case.plan()
    assert "BatchDecodePlan has not returned" in taken[0]
    assert "plan: BatchDecodePlan, __init__: backend" in taken[0]
    taken = slowed(monkeypatch, kernels, "load")
    with fi_ffi.watchdog(LIMIT, on_hang=taken.append):
        case.run(plan)
    case.check(logits_soft_cap=8.0)
    (report,) = taken
    assert report.startswith("fi_ffi.watchdog(0.25): BatchDecodePlan has not returned")
    assert "plan_calls.py:" in report.splitlines()[1]
    told = re.search("plan: (.*)", report)[1]
    assert told.startswith(
        "BatchDecodePlan, run: backend 'cuda cores', module batch_decode_with_kv"
    )
    for part in ("4 requests", "num_qo_heads=4", "page_size=4", "logits_soft_cap=8.0"):
        assert part in told
    assert "window_left" not in told, "the default"
    assert re.search("  plan_info_vec: an array object at 0x", report)
    assert re.search(r"  paged_k_cache: float16\[12, 4, 2, 64\] on cpu at 0x", report)


def test_single_requests_and_compiled_callers(monkeypatch):
    """The op has the caller's name for it; a function compiled from a row is no caller."""
    from fi_ffi.reference.attention import runs

    taken = slowed(monkeypatch, runs, "cuda_cores")
    q, kv, tmp = np.zeros((4, 64), np.float16), np.zeros((5, 2, 64), np.float16), np.zeros(64, "u1")
    namespace = {"fi_ffi": fi_ffi}
    exec("def compiled(*args): fi_ffi.single_decode(*args)", namespace)
    with fi_ffi.watchdog(LIMIT, on_hang=taken.append):
        namespace["compiled"](q, kv, kv, tmp, np.full_like(q, np.nan))
    lines = taken[0].splitlines()
    assert "): single_decode has not returned" in lines[0]
    assert lines[1].startswith(f"  called: {__file__}:")
    assert " in test_single_requests_and_compiled_callers, " in lines[1]
    assert lines[2].endswith("on cpu") and "entry: fi_ffi.reference.single_decode" in lines[2]


def test_a_call_after_a_refused_run_is_not_the_plans(mine):
    case, taken = Case("decode"), []
    plan = case.plan()
    mine.work = lambda: until(lambda: taken)
    with fi_ffi.watchdog(LIMIT, on_hang=taken.append):
        with pytest.raises(fi_ffi.ArgumentError):
            case.run(plan, lse=np.zeros((1, 1), np.float64))
        call(mine)
    assert "plan:" not in taken[0]
    assert "): mine_too has not" in taken[0]


@pytest.fixture
def told():
    """The calls that a watchdog would be told of."""
    inbox = deque()
    watching.add(inbox)
    yield inbox
    watching.remove(inbox)


def test_repeated_and_prepared_calls_are_recorded_too(mine, told):
    """They take short cuts where no watchdog is open."""
    watching.remove(told)
    prepared = mine.op.prepare(*mine.descs, factor=2.0)
    for way in (partial(call, mine), prepared) * 2:
        way()
    assert len(told) == 0
    watching.add(told)
    call(mine)
    prepared()
    assert [call.op for call in told] == ["mine_too", "mine_too"]
    assert all(call.is_over for call in told)
    repeated, launched = told
    assert repeated.line == THE_LINE
    assert launched.function == "test_repeated_and_prepared_calls_are_recorded_too"
    both = ([(a.name, str(a), a.value) for a in c.arguments] for c in (repeated, launched))
    assert next(both) == next(both)
    watching.remove(told)
    call(mine)
    assert len(told) == 2
    assert mine.is_done(2)


# ---------------------------------------------------------------- streams


def test_a_stuck_stream(machine, capsys):
    """The first call of it is told of, once, and what waits behind it counted."""
    one, other = machine.streams
    with Hangs(LIMIT) as block:
        for name in ("rmsnorm", "rmsnorm", "gemma_rmsnorm"):
            machine.launch(name)
        machine.launch(stream=other)
        machine.work(stream=other)
        until(lambda: block.dog.reports)
        time.sleep(2 * LIMIT)
    (report,) = block.dog.reports
    assert capsys.readouterr().err == report + "\n"
    assert (machine.left(), machine.left(other)) == (3, 0)
    for text in (report, block.error.report):
        lines = text.splitlines()
        assert re.fullmatch(
            r"fi_ffi.watchdog\(0.25\): rmsnorm has not finished, and its stream has not moved "
            r"for \d+\.\d\d s", lines[0],
        )  # fmt: skip
        assert ", thread 'MainThread', " in lines[1]
        assert lines[2].endswith(f"norm.rmsnorm, on cuda:0, stream {one:#x}")
        assert lines[3] == "  host: the call has returned, its work is queued"
        for name, desc in machine.descs("rmsnorm").items():
            assert f"  {name}: {desc.layout} at {desc.ptr:#x}" in lines
        assert lines[-1] == "  behind it: 2 later calls (1 rmsnorm, 1 gemma_rmsnorm)"
    assert block.error.op == "rmsnorm"
    machine.work(3)
    machine.check()


def test_a_call_blocked_by_what_is_stuck(gpu):
    with Hangs(LIMIT, on_hang=silent) as block:
        blocked = gpu.launch("gemma_rmsnorm", returns=False)  # by the next, which is late first
        time.sleep(LIMIT / 2)
        gpu.launch()
        until(lambda: block.dog.reports)
        time.sleep(2 * LIMIT)
    (report,) = block.dog.reports
    lines = report.splitlines()
    assert lines[-2] == "  behind it: 1 later call (1 gemma_rmsnorm)"
    assert lines[-1].startswith("    not returned: gemma_rmsnorm, ")
    assert "thread 'MainThread'" in lines[-1]
    assert block.error.op == "rmsnorm"
    assert not blocked.is_over


@pytest.mark.parametrize("first", [7, 8])
def test_the_earlier_of_two_late_calls_is_named(first, gpu):
    """Of two streams, whichever is listed first; each is reported."""
    other = 15 - first
    with Hangs(LIMIT, on_hang=silent) as block:
        gpu.launch("gemma_rmsnorm", first, returns=False)  # it lists its stream first
        time.sleep(0.01)
        gpu.launch("layernorm", other)
        time.sleep(0.01)
        gpu.launch("rmsnorm", first)
        until(lambda: len(block.dog.reports) == 2)  # from here on both are late
    assert block.error.op == "layernorm"
    assert block.error.report.startswith("fi_ffi.watchdog(0.25): layernorm has not finished")
    assert len(block.dog.reports) == 2
    assert {report.split()[1] for report in block.dog.reports} == {"layernorm", "rmsnorm"}


def test_a_chain_that_keeps_moving_is_fine(machine):
    with fi_ffi.watchdog(1.0) as dog:
        for _ in range(16):
            machine.launch()
        for _ in range(15):
            time.sleep(0.1)
            machine.work()
        last = later(0.1, machine.work)
    last.join()
    assert (dog.reports, machine.left()) == ([], 0)
    machine.check()


def test_a_call_that_does_not_return_though_its_stream_moves(gpu):
    with fi_ffi.watchdog(LIMIT, on_hang=silent) as dog:
        gpu.launch()
        blocked = gpu.launch("layernorm", returns=False)
        while not dog.reports:
            gpu.launch()
            gpu.work()
            time.sleep(LIMIT / 10)
        gpu.work()
        blocked.is_ended = True
    (report,) = dog.reports
    assert "): layernorm has not returned" in report
    assert re.search(r"behind it: [12] later calls? \([12] rmsnorm\)", report), report


def test_another_call_of_the_stream_can_get_stuck_later(machine):
    with fi_ffi.watchdog(LIMIT, on_hang=silent) as dog:
        with dog._watch._lock:  # so that it looks when both have been launched
            machine.launch()
            machine.launch("gemma_rmsnorm")
        until(lambda: len(dog.reports) == 1)
        machine.work()
        until(lambda: len(dog.reports) == 2)
        machine.work()
        until(lambda: machine.left() == 0)  # a GPU that others use takes a while
    first, second = dog.reports
    assert "): rmsnorm has not" in first and "behind it: 1 later call (1 gemma_rms" in first
    assert "): gemma_rmsnorm has not" in second and "behind it: no later call" in second


def test_exit_waits_for_the_stream(machine):
    with fi_ffi.watchdog(LONG) as dog:
        machine.launch()
        machine.launch()
        timer = later(0.2, lambda: machine.work(2))
        start = time.monotonic()
    assert 0.15 < time.monotonic() - start < 10
    timer.join()
    assert dog.reports == []
    machine.check()


def test_exit_raises_when_the_time_is_over(machine, capsys):
    """The report comes first, and nothing of it needs the launching thread."""
    start = time.monotonic()
    with Hangs(LIMIT) as block:
        machine.launch()
    assert LIMIT < time.monotonic() - start < 10
    assert len(block.dog.reports) == 1
    assert "rmsnorm has not finished" in capsys.readouterr().err
    start = time.monotonic()
    with fi_ffi.watchdog(LONG):  # what others recorded is not waited for
        pass
    assert time.monotonic() - start < LONG / 3
    machine.work()


def test_an_exception_is_not_masked_nor_anything_waited_for(machine):
    def block():
        with fi_ffi.watchdog(LONG):
            machine.launch()
            _ = 1 / 0

    start = time.monotonic()
    with pytest.raises(ZeroDivisionError):
        block()
    assert time.monotonic() - start < 5
    machine.work()


def test_nested_watchdogs_wait_for_their_own_calls(machine):
    one, other = machine.streams
    with fi_ffi.watchdog(LONG) as outer:
        machine.launch("gemma_rmsnorm", stream=one)
        start = time.monotonic()
        with Hangs(LIMIT, on_hang=silent) as inner:
            machine.launch(stream=other)
        assert inner.error.op == "rmsnorm"
        with fi_ffi.watchdog(LONG):
            pass
        assert time.monotonic() - start < 10
        timer = later(0.2, lambda: (machine.work(stream=one), machine.work(stream=other)))
    timer.join()
    assert machine.left(one) == machine.left(other) == 0, "the outer one has the inner one's too"
    assert (outer.reports, len(inner.dog.reports)) == ([], 1)


# ---------------------------------------------------------------- cells


def test_numbers_wrap_around(gpu):
    cell = gpu.progress.cell((0, 7))
    cell.issued = 2**32 - 3
    ffi.cast("uint32_t *", cell.address)[0] = cell.issued
    with fi_ffi.watchdog(LONG):
        calls = [gpu.launch() for _ in range(5)]
        assert [call.mark for call in calls] == [2**32 - 2, 2**32 - 1, 0, 1, 2]
        for done in range(6):
            assert [call.is_over for call in calls] == [True] * done + [False] * (5 - done)
            assert [call.left for call in calls[done:]] == list(range(1, 6 - done))
            if done < 5:
                gpu.work()


def test_numbers_are_queued_in_their_order():
    gpu = Gpu()

    def write(stream, address, number):
        time.sleep(0)  # lets other threads go on
        gpu.write(stream, address, number)

    gpu.progress = stream_progress.StreamProgress(gpu.allocate, write)
    cell, key = gpu.progress.cell((0, 7)), (0, 7)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: gpu.progress.mark(cell, key, 7), range(2000)))
    assert [number for _, number in gpu.queues[7]] == list(range(1, 2001))


def test_a_signal_handler_that_launches_in_between():
    """Its number is queued first: the other's is not to be lower."""
    gpu, signals = Gpu(), [2]

    def write(stream, address, number):
        if number in signals:
            signals.clear()
            gpu.progress.mark(gpu.progress.cell((0, 7)), (0, 7), 7)
        gpu.write(stream, address, number)

    gpu.progress = stream_progress.StreamProgress(gpu.allocate, write)
    cell = gpu.progress.cell((0, 7))
    for _ in range(3):
        gpu.progress.mark(cell, (0, 7), 7)
    assert [number for _, number in gpu.queues[7]] == [1, 2, 2, 3]


def test_pages_are_added_and_slots_taken_back():
    gpu = Gpu()
    cells = [gpu.progress.cell((0, stream)) for stream in range(1024)]
    assert len(gpu.pages) == 1
    assert len({cell.address for cell in cells}) == 1024
    assert all(cell.value == 0 for cell in cells), "whatever the memory held"
    for stream, cell in enumerate(cells):
        gpu.progress.mark(cell, (0, stream), stream)
    others = [gpu.progress.cell((1, stream)) for stream in range(1024)]
    assert len(gpu.pages) == 2, "every stream of the first page has something to write"
    assert len({cell.address for cell in cells + others}) == 2048
    for stream, cell in enumerate(others):
        gpu.progress.mark(cell, (1, stream), 5000 + stream)
    gpu.work(stream=500)
    taken = gpu.progress.cell((2, 0))
    assert len(gpu.pages) == 2 and taken is cells[500], "the only one that is not waited for"
    assert gpu.progress.mark(taken, (2, 0), 9999) == (taken, 2)
    # The stream that had it gets another, and writes its number there.
    cell, number = gpu.progress.mark(cells[500], (0, 500), 500)
    assert cell is gpu.progress.cell((0, 500)) and cell is not taken
    assert gpu.queues[500] == deque([(cell.address, number)])
    gpu.work(stream=500)
    assert (cell.until(number), taken.until(2)) == (0, 1)
    assert [gpu.progress.cell((0, i)) for i in range(500)] == cells[:500]


def test_an_error_of_the_write_is_raised(gpu):
    def write(stream, address, number):
        raise fi_ffi.KernelError("cuStreamWriteValue32", "RuntimeError", "CUDA error 700")

    gpu.progress = stream_progress.StreamProgress(gpu.allocate, write)
    cell = gpu.progress.cell((0, 7))
    with pytest.raises(fi_ffi.KernelError, match="cuStreamWriteValue32.*700"):
        gpu.progress.mark(cell, (0, 7), 7)
    assert cell.issued == 0


def test_without_a_gpu_cuda_errors_are_typed():
    if of_loader.device_count():
        pytest.skip("there is a GPU")
    with pytest.raises((fi_ffi.KernelError, fi_ffi.LoaderError)):
        stream_progress._allocate(4096)
    with pytest.raises((fi_ffi.KernelError, fi_ffi.LoaderError)):
        memory.stream_key(0, 0)
    with pytest.raises((fi_ffi.KernelError, fi_ffi.LoaderError)):
        stream_progress._write(0, 4096, 1)


def test_the_drivers_function_is_declared_as_cuda_h_has_it():
    header = importlib.metadata.distribution("nvidia-cuda-runtime").locate_file(
        "nvidia/cu13/include/cuda.h"
    )
    text = Path(str(header)).read_text()
    assert re.search(
        r"define cuStreamWriteValue32 +__CUDA_API_PTSZ\(cuStreamWriteValue32_v2\)", text
    )
    told = re.search(r"CUresult CUDAAPI cuStreamWriteValue32\(([^)]*)\)", text)[1]
    assert told == "CUstream stream, CUdeviceptr addr, cuuint32_t value, unsigned int flags"
    assert re.search(r"typedef unsigned long long CUdeviceptr_v2;", text)
    declarations = Path(fi_ffi.__file__).parent / "abi" / "declarations.h"
    ours = re.search(r"int cuStreamWriteValue32_v2\(([^)]*)\)", declarations.read_text())[1]
    types = [re.sub(r"\s*\w+$", "", part.strip()) for part in ours.split(",")]
    assert types == ["void *", "unsigned long long", "uint32_t", "unsigned int"]


# ---------------------------------------------------------------- the object


@pytest.mark.parametrize(
    ("argument", "values", "kind"),
    [
        ("seconds", (0, 0.0, -1, math.inf, -math.inf, math.nan, 10**400), fi_ffi.ArgumentError),
        ("seconds", (True, None, "1", 1j, [1.0], np.ones(1)), fi_ffi.ArgumentTypeError),
        ("on_hang", (3,), fi_ffi.ArgumentTypeError),
        ("abort", (1, None), fi_ffi.ArgumentTypeError),
    ],
)
def test_what_is_refused(argument, values, kind):
    for value in values:
        with pytest.raises(kind, match=f"watchdog: argument `{argument}`") as caught:
            fi_ffi.watchdog(**{"seconds": 1.0, argument: value})
        assert type(caught.value) is kind
        assert (caught.value.op, caught.value.argument) == ("watchdog", argument)


def test_seconds():
    for seconds in (1, 2.5, np.float32(2), np.int64(3), Fraction(7, 2), 1e300):
        with fi_ffi.watchdog(seconds) as dog:
            assert dog.seconds == float(seconds)


def test_an_open_one_is_refused_and_a_closed_one_opens_again(gpu):
    block = Hangs(LIMIT, on_hang=silent)
    dog = block.dog
    with pytest.raises(fi_ffi.ArgumentError, match="got a closed watchdog"):
        dog.__exit__(None, None, None)
    with block:
        gpu.launch()
        with pytest.raises(fi_ffi.ArgumentError, match="watchdog: argument `self`"), dog:
            pass
        assert len(threads()) == 1
    assert len(dog.reports) == 1
    with dog as same:
        assert same is dog
        gpu.launch(stream=9)
        gpu.work(stream=9)
    assert dog.reports == []


def test_what_on_hang_raises_is_printed_and_watching_goes_on(gpu, capsys):
    taken = []

    def on_hang(report):
        taken.append(report)
        raise SystemExit("mine_too") if len(taken) == 1 else RuntimeError("yours")

    with fi_ffi.watchdog(LIMIT, on_hang=on_hang):
        gpu.launch()
        gpu.launch()
        until(lambda: len(taken) == 1)
        gpu.work()
        until(lambda: len(taken) == 2)
        gpu.work()
    err = capsys.readouterr().err
    assert err.count("the report was not taken") == 2
    assert "SystemExit: mine" in err and "RuntimeError: yours" in err
    assert "in on_hang" in err


def test_an_on_hang_that_blocks_does_not_block_the_exit(gpu, monkeypatch, capsys):
    monkeypatch.setattr(module, "_PATIENCE", 0.3)
    gate = threading.Event()
    start = time.monotonic()
    with Hangs(LIMIT, on_hang=lambda _: gate.wait(30)):
        gpu.launch()
    assert time.monotonic() - start < 10
    assert "a report was not taken within 0.3 s" in capsys.readouterr().err
    gate.set()
    until(lambda: not threads())


def test_a_plan_that_cannot_be_told_is_no_reason_to_be_silent(gpu):
    class Plan:
        op = "OddPlan"

    with fi_ffi.watchdog(LIMIT, on_hang=silent) as dog:
        gpu.launch().plan = Plan()
        until(lambda: dog.reports)
        gpu.work()
    assert "): OddPlan has not finished" in dog.reports[0]
    assert "  plan: a Plan that cannot be told: AttributeError(" in dog.reports[0]


def test_the_hot_path_is_left_alone_where_none_is_open(mine, monkeypatch):
    monkeypatch.setattr(call_record, "CallRecord", None)
    monkeypatch.setattr(watching, "watched", None)
    call(mine)
    assert mine.is_done(2)


# ---------------------------------------------------------------- forks


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_a_forked_child_has_none_of_its_parents_watchdogs(gpu, mine):
    call(mine)

    def run():
        nonlocal dog
        assert watching.inboxes == watching.logs == () and threads() == []
        assert stream_progress.progress is not before
        assert stream_progress.progress._cells == {} and stream_progress.progress._lock.acquire(
            blocking=False
        )
        call(mine)
        taken = []
        mine.work = lambda: until(lambda: taken)
        with dog:  # the parent's object; open there, and not here
            mine.work = lambda: None
            call(mine)
        with fi_ffi.watchdog(LIMIT, on_hang=taken.append) as own:
            mine.work = lambda: until(lambda: taken)
            call(mine)
        assert len(own.reports) == 1
        assert mine.is_done(2)

    before, held = stream_progress.progress, threading.Event()
    done = threading.Event()

    def hold():
        with stream_progress.progress._lock, watching.lock:
            held.set()
            done.wait(20)

    holder = threading.Thread(target=hold)
    with fi_ffi.watchdog(LONG) as dog:
        gpu.launch()
        holder.start()
        held.wait(20)
        assert in_child(run) == 0
        done.set()
        holder.join()
        assert len(threads()) == 1
        gpu.work()
    assert dog.reports == []


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_a_child_forked_in_a_block_leaves_it_at_once(gpu):
    start = time.monotonic()
    with fi_ffi.watchdog(LONG) as dog:
        gpu.launch()
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                dog.__exit__(None, None, None)
                code = 0 if time.monotonic() - start < 5 else 2
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        gpu.work()


STEPS = {
    "starting": (threading.Thread, "start"),
    "adding": (watching, "add"),
    "removing": (watching, "remove"),
    "waiting": (module._Watch, "wait"),
    "inside": None,
}


@pytest.mark.parametrize("is_done", [False, True])
@pytest.mark.parametrize("step", STEPS)
def test_interrupts_of_a_watchdog(step, is_done, mine, monkeypatch):
    """A signal's exception that comes before a step or after it, or in the block: no call is
    recorded any more, no thread is left, and the watchdog can be opened again."""
    dog = fi_ffi.watchdog(LONG)

    def interrupted(owner, name):
        real = getattr(owner, name)

        def interrupting(*args):
            monkeypatch.setattr(owner, name, real)
            if is_done:
                real(*args)
            raise KeyboardInterrupt

        monkeypatch.setattr(owner, name, interrupting)

    if STEPS[step]:
        interrupted(*STEPS[step])

    def block():
        with dog:
            if STEPS[step] is None:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        block()
    assert watching.inboxes == () and hooks.watcher is None
    until(lambda: threads() == [])
    call(mine)
    with dog:
        assert len(watching.inboxes) == len(threads()) == 1
        assert not watching.inboxes[0]


def test_a_keyboard_interrupt_ends_the_wait(gpu):
    # A process that was started in the background ignores it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        start = time.monotonic()
        # To the thread that waits: another's would leave it waiting.
        waiting = threading.main_thread().ident
        timer = later(0.3, lambda: signal.pthread_kill(waiting, signal.SIGINT))
        with pytest.raises(KeyboardInterrupt), fi_ffi.watchdog(LONG):
            gpu.launch()
        timer.join()
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - start < 10
