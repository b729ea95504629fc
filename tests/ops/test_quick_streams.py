"""Streams of quick and of prepared calls, on a pretended GPU: the way is a GPU's, to the kernel."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

import fi_ffi
from fi_ffi.loader import machine
from fi_ffi.ops import memory
from fi_ffi.ops.functions import OPS
from fi_ffi.ops.op import Op

from attention.pretend import current_stream
from prepared_calls import EVERY_OP, Calls, Mine, draw, full, placed

HANDLES = [0, 1, 2, 0x51, 2**63, 2**64 - 1]


class Stream:
    def __init__(self, handle):
        self.handle = handle

    def __cuda_stream__(self):
        return (0, self.handle)


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


def test_the_first_call_of_a_scope_may_be_any(gpu, mine):
    """It is what makes the scope's stream current."""
    calls = Calls(mine)
    for first, then in itertools.permutations(calls.ways, 2):
        with fi_ffi.stream(0x51):
            for way in (first, then):
                gpu.seen.clear()
                way(None)
                assert {*gpu.seen} == {0x51}
        assert current_stream() == 0


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
    monkeypatch.setattr(memory, "_scratch", {})
    op = OPS["gdn_prefill"]
    case = draw(op.row, {"T": "float16"}, {"without": ("workspace_buffer",)})
    (made,) = placed(case, {}, 1)
    values = made.scalars | {
        name: fi_ffi.TensorDesc(d.ptr, d.shape, d.dtype, device="cuda:0")
        for name, d in made.descs.items()
    }
    at = [arg.name for arg in op.row.args].index("workspace_buffer")
    calls = [op.prepare(**values, stream=stream) for stream in (0x51, 0x51, None)]
    assert len({call.values[at] for call in calls}) == 3
    for call in calls[:2]:
        call()
    handles = {0x51: 0, 0x61: 0}
    for handle in [*handles] * 2:
        op(**values, stream=handle)
    memories = {
        handle: m for (_, _, device, handle), m in memory._scratch.items() if device.is_cuda
    }
    assert {*handles} <= {*memories} and len({m.desc.ptr for m in memories.values()}) > 1


def test_several_gpus(gpu, monkeypatch):
    """The tensors' device is current in a call, and what was before is after it."""
    gpu.with_devices(2)
    seen = []
    from fi_ffi import reference
    from fi_ffi.reference import norm

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
        with pytest.raises(fi_ffi.KernelError):
            way(0x51)
        assert gpu.runtime.device == 0


def test_more_streams_than_are_remembered(gpu, mine, monkeypatch):
    from fi_ffi.ops import launch

    monkeypatch.setattr(launch, "_MOST_HANDLES", 10)
    calls = Calls(mine)
    for handle in [*range(100), *range(100)]:
        gpu.seen.clear()
        calls.typed(handle)
        assert {*gpu.seen} == {handle}
    assert len(launch._thread.pointers) <= 10
