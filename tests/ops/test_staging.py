"""Page-locked memory that copies read: when a piece of it is used again."""

from __future__ import annotations

import contextlib
import functools

import pytest

import fi_ffi
from fi_ffi.loader import machine
from fi_ffi.ops.call import cuda, memory, staging
from fi_ffi.ops.call.staging import StagePool
from fi_ffi.ops.steps import memory as tables

from tests.helpers import instructions

GPU, CPU = fi_ffi.parse_device("cuda:0"), fi_ffi.parse_device("cpu")


class Event:
    """Done when a test says so; waiting makes it done."""

    def __init__(self) -> None:
        self.done, self.waited, self.streams = True, 0, []

    def record(self, stream: int) -> None:
        self.done = False
        self.streams.append(stream)

    def is_done(self) -> bool:
        return self.done

    def wait(self) -> None:
        self.done, self.waited = True, self.waited + 1


@pytest.fixture(autouse=True)
def pretended(monkeypatch):
    monkeypatch.setattr(cuda, "Event", Event)
    monkeypatch.setattr(cuda, "current", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(cuda, "allocate_page_locked", lambda count, device: cuda._host(count))


def test_pieces_that_are_read_are_left_alone_up_to_a_number_of_them(monkeypatch):
    monkeypatch.setattr(staging, "MAX_STAGES", 3)
    pool = StagePool(GPU)
    stages = []
    for i in range(3):
        stages.append(pool.take(64))
        pool.record(stages[-1], i)
    assert len({stage.desc.ptr for stage in stages}) == 3 and pool.last is stages[2]
    oldest = pool.take(64)
    assert oldest is stages[0] and [stage.done.waited for stage in stages] == [1, 0, 0]
    pool.record(oldest, 7)
    assert pool.last is oldest and oldest.done.streams == [0, 7]
    assert pool.take(64) is stages[1]
    stages[2].done.done = oldest.done.done = True
    assert pool.take(64) is oldest, "the one that was used last goes before all others"
    oldest.done.done = False
    stages[1].done.done = False
    assert pool.take(64) is stages[2], "one that is free goes before the oldest"


def test_a_piece_that_is_too_small_is_replaced():
    pool = StagePool(GPU, least=128)
    first = pool.take(10)
    assert first.desc.numel == 128 and len(first.words) == 32
    larger = pool.take(200)
    assert larger.desc.numel >= 200 and pool.take(300) is larger


def test_pieces_that_are_given_are_all_there_are():
    memory = cuda._host(256)
    pieces = [fi_ffi.TensorDesc(memory.desc.ptr + i * 64, (64,), "uint8", device="cpu")
              for i in range(4)]  # fmt: skip
    pool = StagePool(GPU, pieces=pieces)
    seen = []
    for i in range(6):
        stage = pool.take(64)
        seen.append(stage.desc.ptr)
        pool.record(stage, i)
    assert {*seen[:4]} == {piece.ptr for piece in pieces} and seen[4:] == seen[:2]


def test_on_the_host_one_piece_is_enough():
    pool = StagePool(CPU)
    stage = pool.take(32)
    pool.record(stage, 0)
    assert pool.take(32) is stage and stage.done is None


class Copies:
    """What was copied and launched; streams are told apart by their ids."""

    def __init__(self, monkeypatch) -> None:
        self.log, self.capturing, self.ids = [], False, {}
        monkeypatch.setattr(cuda, "is_capturing", lambda stream: self.capturing)
        monkeypatch.setattr(cuda, "copy_to_device", self.copy)
        monkeypatch.setattr(cuda, "allocate", lambda count, device: cuda._host(count))
        monkeypatch.setattr(tables, "stream_key", self.key)
        monkeypatch.setattr(memory, "_owned", {})

    def key(self, device: int, stream: int) -> tuple[int, int]:
        return device, self.ids.get(stream, stream)

    def copy(self, target: int, source: int, count: int, stream: int) -> None:
        cuda.ffi.memmove(cuda.pointer(target), cuda.pointer(source), count)
        self.log.append((target, source, stream))

    def staged(self, stream: int, data: bytes = b"table") -> tuple[int, int]:
        """Where a table was brought, and where it was copied from."""
        with tables.staged(GPU, stream, memoryview(data), 64) as place:
            got = bytes(cuda.ffi.buffer(cuda.pointer(place.address), len(data)))
            assert got == data and place.scratch >= place.address + len(data)
            assert place.scratch % 256 == 0 and place.scratch_bytes == 64
        return self.log[-1][:2]


def test_tables_of_a_stream(monkeypatch):
    made = Copies(monkeypatch)
    first = made.staged(5)
    assert made.staged(5)[0] == first[0] and made.staged(5)[1] != first[1]
    assert made.staged(6)[0] != first[0]
    made.ids = {5: 99}  # another stream, that has the handle of one that is gone
    assert made.staged(5)[0] not in (first[0], made.staged(6)[0])


def test_tables_that_a_graph_keeps(monkeypatch):
    made = Copies(monkeypatch)
    made.capturing = True
    captured = [made.staged(5, b"captured") for _ in range(2)]
    made.capturing = False
    later = [made.staged(5, bytes([i]) * 8) for i in range(20)]
    assert len({*captured, *later} & {*captured}) == 2
    assert {place for place, _ in captured}.isdisjoint(place for place, _ in later)
    assert {place for _, place in captured}.isdisjoint(place for _, place in later)
    for place in (place for pair in captured for place in pair):
        assert bytes(cuda.ffi.buffer(cuda.pointer(place), 8)) == b"captured"


class _Runtime:
    """Tells ids of streams, and that none is capturing."""

    cudaGetLastError = None

    def __init__(self) -> None:
        self.ids: dict[int, int] = {}

    def cudaThreadExchangeStreamCaptureMode(self, mode):
        return 0

    def cudaStreamGetId(self, stream, number):
        number[0] = self.ids[int(cuda.ffi.cast("uintptr_t", stream))]
        return 0


def test_what_a_destroyed_stream_owned_is_given_back(monkeypatch):
    """When its handle is another's; but not what it had on another thread or device."""
    runtime = _Runtime()
    monkeypatch.setattr(machine, "load_cudart", lambda: (runtime,))
    monkeypatch.setattr(memory, "_owned", {})
    monkeypatch.setattr(memory, "_keys", {})
    freed = []

    def free(*key: int) -> int:
        freed.append(key)
        return 0

    runtime.ids = {5: 70, 6: 71}
    for device, stream in ((0, 5), (0, 6), (1, 5)):
        mine = memory.owned(memory.stream_key(device, stream))
        mine["scratch"] = cuda.Memory(cuda._host(8).desc, functools.partial(free, device, stream))
    del mine
    for _ in range(2):
        memory.stream_key(0, 5)
        assert freed == []
    runtime.ids[5] = 72
    assert memory.stream_key(0, 5) == (0, 72)
    assert freed == [(0, 5)]
    assert "scratch" not in memory.owned((0, 72)) and "scratch" in memory.owned((0, 71))


def test_ctrl_c_at_any_moment_loses_no_piece():
    """The exception arrives before each instruction of what notes that a copy was queued."""

    def interrupted(number: int) -> bool:
        left = [number]

        def tell(code, line):
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt

        pool = StagePool(GPU, pieces=[cuda._host(64).desc])
        stage = pool.take(64)
        stop = instructions.start(lambda code: code.co_filename == staging.__file__, tell)
        try:
            pool.record(stage, 1)
        except KeyboardInterrupt:
            return True
        finally:
            stop()
            assert pool.last is stage
            assert pool.take(64) is stage
        return False

    moments = 0
    while interrupted(moments):
        moments += 1
    assert moments > 20


def test_a_table_that_is_larger_than_the_last(monkeypatch):
    made = Copies(monkeypatch)
    small = made.staged(5)
    large = made.staged(5, bytes(5 << 14))
    assert large[0] != small[0]
    assert made.staged(5)[0] == large[0]
