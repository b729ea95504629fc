"""Streams of typed and of prepared calls, on a pretended GPU: the way is a GPU's, to the kernel."""

from __future__ import annotations

import contextlib
import itertools
import signal
import sys

import numpy as np
import pytest

import fi_ffi
from fi_ffi import reference
from fi_ffi.abi import streams
from fi_ffi.loader import machine
from fi_ffi.ops.call import launch, memory
from fi_ffi.ops.call.op import Op
from fi_ffi.ops.call.row import Row, Tensor
from fi_ffi.ops.functions import OPS
from fi_ffi.reference import norm

from tests.attention.pretend import current_stream
from tests.helpers.prepared_calls import EVERY_OP, Calls, Mine, draw, full, placed
from tests.helpers.remains import allowed

HANDLES = [0, 1, 2, 0x51, 2**63, 2**64 - 1]


class Stream:
    def __init__(self, handle):
        self.handle = handle

    def __cuda_stream__(self):
        return (0, self.handle)


def given_on_gpu(name, **more):
    """An op, a call's arguments as if on cuda:0, and what keeps their memory."""
    op = OPS[name]
    (made,) = placed(draw(op.row, {"T": "float16"}, more), {}, 1)
    descs = {
        name: fi_ffi.TensorDesc(d.ptr, d.shape, d.dtype, device="cuda:0")
        for name, d in made.descs.items()
    }
    return op, made.scalars | descs, made


@pytest.mark.parametrize("handle", HANDLES)
def test_the_stream_of_a_call(handle, gpu, mine):
    calls = Calls(mine)
    for way in calls.ways * 2:
        for stream in (handle, Stream(handle), np.uint64(handle)):
            gpu.seen.clear()
            way(stream)
            assert {*gpu.seen} == {handle} and mine.is_done(2)
            assert current_stream() == 0


@pytest.mark.parametrize("outer", [0, 0x51])
def test_scopes(outer, gpu, mine):
    calls = Calls(mine)

    def check(handle, stream=None):
        for way in calls.ways * 2:
            gpu.seen.clear()
            way(stream)
            assert {*gpu.seen} == {handle} and mine.is_done(2)

    with fi_ffi.stream(outer):
        check(outer)
        check(0x77, 0x77)
        check(outer)
        with fi_ffi.stream(0x99):
            check(0x99)
            check(outer, outer)
            with fi_ffi.stream(outer):
                check(outer)
            check(0x99)
        with fi_ffi.stream(0x88):
            pass
        check(outer)
    assert current_stream() == 0
    for way in calls.ways:
        with pytest.raises(fi_ffi.ArgumentError, match="`stream`.*an open fi_ffi.stream") as caught:
            way(None)
        assert caught.value.op == "mine_too"


def test_wrong_streams(gpu, mine):
    calls = Calls(mine)
    wrongs, told = (-1, 2**64, "default", 1.5, True, np.zeros(2), object(), Stream("x")), {}
    for way in calls.ways * 2:
        way(0x51)
        for i, wrong in enumerate(wrongs):
            with pytest.raises(fi_ffi.ArgumentError, match="`stream`") as caught:
                way(wrong)
            assert told.setdefault(i, str(caught.value)) == str(caught.value)
            assert current_stream() == 0
    assert not np.isnan(mine.y).any()


def test_a_kernel_that_fails_puts_the_stream_back(gpu, mine):
    calls = Calls(mine)

    def fail():
        raise ValueError("no")

    for way in calls.ways * 2:
        mine.work = lambda: None
        way(0x51)
        mine.work = fail
        with pytest.raises(fi_ffi.KernelError, match="no"):
            way(0x51)
        assert current_stream() == 0
        with fi_ffi.stream(0x99):
            with pytest.raises(fi_ffi.KernelError, match="no"):
                way(None)
            assert current_stream() == 0x99
            with pytest.raises(fi_ffi.KernelError, match="no"):
                way(0x51)
            assert current_stream() == 0x99
        assert current_stream() == 0


def test_a_kernel_that_calls_on_another_stream(gpu, mine):
    """Inside of a call, calls of other streams: each is put back as it found it."""
    calls, handles = Calls(mine), [0x51, 0x61, 0x71, 0x81]
    seen = []

    def again():
        seen.append(current_stream())
        if len(seen) < len(handles):
            calls.typed(handles[len(seen)])
        seen.append(current_stream())

    calls.typed(0x51)
    mine.work = again
    calls.typed(handles[0])
    assert seen == handles + handles[::-1]


@pytest.mark.parametrize(("op", "dtypes", "more"), EVERY_OP)
def test_every_op_on_a_stream(op, dtypes, more, gpu, monkeypatch):
    """The same bits as on the CPU, prepared and typed, on a stream and in a scope."""
    monkeypatch.setattr(machine, "multiprocessors", lambda _: 1)  # as scratch on the CPU is for
    monkeypatch.setattr(machine, "shared_memory", lambda _: 227 << 10)
    case = draw(op.row, dtypes, more)
    expected, first, second, third, fourth = placed(case, more, 5)
    full(op.row, expected)

    def there(made):
        return made.scalars | {
            name: fi_ffi.TensorDesc(d.ptr, d.shape, d.dtype, strides=d.strides, device="cuda:0")
            for name, d in made.descs.items()
        }

    gpu.seen.clear()
    op(**there(first), stream=0x51)
    call = op.prepare(**there(second))
    with fi_ffi.stream(0x51):
        call()
        op(**there(third))
        call.update(**{n: a for n, a in fourth.addresses.items() if n in second.arrays})
        call()
    assert {*gpu.seen} == {0x51}
    for made in (first, second, third, fourth):
        assert not made.differs(expected)
    with pytest.raises(fi_ffi.ArgumentError, match="`stream`"):
        call()
    with pytest.raises(fi_ffi.ArgumentError, match="`stream`"):
        op(**there(first))


def test_scratch_of_each_stream(gpu, monkeypatch):
    """A prepared call has its own; calls that are not have one for each stream."""
    monkeypatch.setattr(memory, "_owned", {})
    op, values, _kept = given_on_gpu("gdn_prefill", without=("workspace_buffer",))
    calls = [op.prepare(**values, stream=stream) for stream in (0x51, 0x51, None)]
    assert len({call.arguments["workspace_buffer"].ptr for call in calls}) == 3
    for call in calls[:2]:
        call()
    handles = {0x51: 0, 0x61: 0}
    for handle in [*handles] * 2:
        op(**values, stream=handle)
    memories = {number: m for (_, number), own in memory._owned.items() for m in own.values()}
    assert {*handles} <= {*memories} and len({m.desc.ptr for m in memories.values()}) > 1


def counting(name):
    """A row of two scratch arguments, one of which begins as zeros."""
    return Row(
        name, "norm", name, "here", "Counts its calls.",
        (
            Tensor("y", "n", "float32", "how many there were", writes=True, reads=False),
            Tensor("counts", "c", "uint8", "", contiguous=True, bytes=64, zeroed=True, writes=True),
            Tensor("marks", "m", "uint8", "", contiguous=True, writes=True,
                   bytes_for=lambda sizes: 64 * sizes["n"]),
        ),
        {}, ">=0",
    )  # fmt: skip


def count(y, counts, marks):
    y[...] = counts[0]
    counts[0] += 1
    marks[...] = 0xFF


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_scratch_of_each_op(device, gpu, monkeypatch):
    """What one leaves on a stream is there at its next call, and no other op's, argument's or
    stream's; also when one of them grew."""
    monkeypatch.setattr(memory, "_owned", {})
    ops = []
    for name in ("counts_one", "counts_two"):
        monkeypatch.setitem(norm.KERNELS["norm"], name, count)
        ops.append(Op(counting(name)))
    monkeypatch.setattr(reference, "_entries", {})
    calls = dict.fromkeys(itertools.product((0x51, 0x61), (0, 1)), 0)
    for size in (1, 3, 1 << 15, 2):
        y = np.full(size, np.nan, np.float32)
        desc = fi_ffi.TensorDesc(y.ctypes.data, y.shape, "float32", device=device)
        for (stream, which), _ in itertools.product(list(calls), range(2)):
            key = (stream if device != "cpu" else 0x51, which)
            ops[which](desc, stream=stream)
            assert (y == calls[key]).all(), (size, stream, which)
            calls[key] += 1


def test_several_gpus(gpu, monkeypatch):
    """The tensors' device is current in a call, and what was before is after it."""
    gpu.with_devices(2)
    seen = []
    mine = Mine()
    mine.op = Op(mine.row)
    monkeypatch.setitem(norm.KERNELS["norm"], mine.row.name, mine.kernel)
    monkeypatch.setattr(reference, "_entries", {})
    mine.work = lambda: seen.append((gpu.runtime.device, current_stream(gpu.runtime.device)))
    calls = {index: Calls(mine, f"cuda:{index}") for index in (0, 1)}
    for before in (0, 1):
        for index, which in itertools.product((0, 1, 1, 0), range(3)):
            gpu.runtime.device = before
            seen.clear()
            calls[index].ways[which](0x51)
            assert seen == [(index, 0x51)] and gpu.runtime.device == before
            with fi_ffi.stream(0x61):
                seen.clear()
                calls[index].ways[which](None)
                assert seen == [(index, 0x61)] and gpu.runtime.device == before
                with pytest.raises(fi_ffi.ArgumentError, match=f"in use on cuda:{index}"):
                    calls[1 - index].ways[which](None)
                assert gpu.runtime.device == before

    def fail():
        raise ValueError("no")

    mine.work = fail
    gpu.runtime.device = 0
    for way in calls[1].ways:
        # A prepared call's frame is its own, and goes with it.
        with allowed("free frames"), pytest.raises(fi_ffi.KernelError):
            way(0x51)
        assert gpu.runtime.device == 0


def test_who_asks_for_the_current_device(gpu, monkeypatch):
    """Nobody for a single GPU or an entry with a guard of its own; each other call asks once."""
    asked = []
    real = gpu.runtime.cudaGetDevice
    monkeypatch.setattr(gpu.runtime, "cudaGetDevice", lambda at: asked.append(1) or real(at))
    for devices, name, each in [(1, "silu_and_mul", 0), (2, "rmsnorm", 0), (2, "silu_and_mul", 1)]:
        gpu.with_devices(devices)
        gpu.forget()
        op, values, _kept = given_on_gpu(name)
        prepared = op.prepare(**values)
        with fi_ffi.stream(0x51):
            prepared()
            op(**values, stream=0x61)
            asked.clear()
            for call in (prepared, lambda: op(**values), lambda: op(**values, stream=0x61)):  # noqa: B023
                call()
        assert len(asked) == 3 * each, (devices, name)


@pytest.mark.parametrize("name", ["rmsnorm", "silu_and_mul"])
def test_the_callers_device_after_a_first_call(name, gpu):
    """With or without a guard of its own: each new stream, scope and thread begins with it."""
    gpu.with_devices(2)
    launch._thread.pointers.clear()  # of other tests, which gave this thread a context
    op, values, _kept = given_on_gpu(name)
    gpu.runtime.device = 1
    for handle in (0x51, 0x61, 0):
        op(**values, stream=handle)
        assert gpu.runtime.device == 1
        with fi_ffi.stream(handle):
            op.prepare(**values)()
            assert gpu.runtime.device == 1
    assert 0 in machine.thread.bound, "the thread was given the GPU's context"


def test_a_stream_that_is_known_for_one_gpu_is_refused_for_the_other(gpu, monkeypatch):
    """By an op of either kind, however often it was launched on; a default stream is of both."""
    gpu.with_devices(2)
    launch._thread.pointers.clear()  # of other tests, whose streams were of either GPU
    streams.thread.checked.clear()
    monkeypatch.setattr(streams, "device_of", lambda handle: {0x51: 0, 0x61: 1}.get(handle))
    for name in ("rmsnorm", "silu_and_mul"):
        op, values, _kept = given_on_gpu(name)
        there = {
            name: fi_ffi.TensorDesc(v.ptr, v.shape, v.dtype, device="cuda:1")
            if isinstance(v, fi_ffi.TensorDesc) else v
            for name, v in values.items()
        }  # fmt: skip
        for handle, mine, theirs in ((0x51, values, there), (0x61, there, values)):
            for _ in range(3):
                op(**mine, stream=handle)
                with pytest.raises(fi_ffi.ArgumentError, match="`stream`.*a stream of cuda"):
                    op(**theirs, stream=handle)
        machine.thread.bound.clear()
        launch._thread.pointers.clear()
        op(**values, stream=0)
        op(**there, stream=0)
        assert {*machine.thread.bound} == {0, 1}, "the thread has both GPUs' contexts"


def test_more_streams_than_are_remembered(gpu, mine, monkeypatch):
    monkeypatch.setattr(launch, "_MAX_HANDLES", 10)
    calls = Calls(mine)
    for handle in [*range(100), *range(100)]:
        gpu.seen.clear()
        calls.typed(handle)
        assert {*gpu.seen} == {handle}
    assert len(launch._thread.pointers[0]) <= 10


def test_a_stream_that_cannot_be_set(gpu, mine, monkeypatch):
    """The code of setting it is looked at: the kernel is not called on another stream."""
    calls = Calls(mine)
    for way in calls.ways:
        way(0x51)
    mine.given.clear()
    mine.op.forget()
    calls = Calls(mine)
    made = launch.LaunchTarget.__init__

    def failing(target, *args):
        made(target, *args)
        target.set_stream = lambda handle, before: -1

    with monkeypatch.context() as patch:
        patch.setattr(launch.LaunchTarget, "__init__", failing)
        mine.op.forget()
        for way in (calls.typed, calls.in_full):
            with pytest.raises(fi_ffi.KernelError):
                way(0x51)
    assert not mine.given
    mine.op.forget()
    calls.typed(0x51)
    assert mine.given


class Stopped(Exception):
    """What the signal raises."""


@pytest.mark.parametrize("number", [signal.SIGALRM, signal.SIGINT])
@pytest.mark.parametrize("scope", [None, 0x61])
def test_interrupts_leave_no_stream_set(number, scope, gpu, mine, monkeypatch):
    """400 of them, at any place of a call or an update: what was current before is, right after,
    and a prepared call is no less usable."""
    # pytest's keeps what was raised where it cannot be, and so every frame below.
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)
    calls, rng = Calls(mine), np.random.default_rng()
    # The timer's signal, or Ctrl-C's by way of it.
    stop = {signal.SIGALRM: Stopped, signal.SIGINT: KeyboardInterrupt}[number]
    left, rounds = [], itertools.count()

    def interrupt(*_):
        raise stop

    def work():
        signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-6, 4e-4))
        for _ in range(2000):  # an exception may be lost, in a destructor say
            calls.typed(0x51)
            calls.call.update(factor=2.0)
            calls.call()

    outer = fi_ffi.stream(scope) if scope else contextlib.nullcontext()
    call = calls.mine.op.prepare(*calls.descs, factor=2.0, stream=0x71)
    calls.call = call
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with outer:
            if scope:
                calls.typed(None)
            for _ in range(400):
                with contextlib.suppress(stop, fi_ffi.KernelError):  # wherever it was stopped
                    work()
                signal.setitimer(signal.ITIMER_REAL, 0)
                next(rounds)
                if current_stream() != (scope or 0):
                    left.append(current_stream())
                    calls.typed(None if scope else 0x51)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert next(rounds) == 400 and left == []
    mine.y[...] = np.nan
    calls.typed(0x51)
    assert mine.is_done(2)
    call()
    assert mine.is_done(2)
