"""Many threads at once, on the CPU: what docs/threads.md says is safe.

With a GIL they take turns at any bytecode; without one (3.14t) they do run at once.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable
from itertools import count, cycle
from types import SimpleNamespace

import numpy as np
import pytest

import fi_ffi
from fi_ffi.abi.interop import as_desc
from fi_ffi.loader import generation
from fi_ffi.ops.call import compiled, prepared
from fi_ffi.ops.call.op import Op

from tests.helpers.children import done
from tests.helpers.plan_calls import KINDS, Case
from tests.helpers.prepared_calls import EVERY_OP, draw, full, placed
from tests.helpers.remains import allowed

THREADS, ROUNDS = 8, 30


@pytest.fixture(autouse=True)
def _often():
    """Threads take turns as often as can be."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def at_once(work: Callable[[int], None], threads: int = THREADS) -> None:
    """Do it in each of so many threads, all let go together; raises what one of them raised."""
    barrier, failed = threading.Barrier(threads), []

    def run(number: int) -> None:
        barrier.wait(60)
        try:
            work(number)
        except BaseException as error:
            failed.append(error)

    made = [threading.Thread(target=run, args=(i,)) for i in range(threads)]
    for thread in made:
        thread.start()
    for thread in made:
        thread.join()
    if failed:
        raise failed[0]


@pytest.mark.parametrize(("op", "dtypes", "more"), EVERY_OP)
def test_first_calls(op, dtypes, more):
    """Nothing is known of the op yet, and every thread finds that out at once."""
    case = draw(op.row, dtypes, more)
    expected, *mine = placed(case, more, THREADS + 1)
    full(op.row, expected)
    fresh = Op(*op.rows)
    at_once(lambda i: fresh(**mine[i].values))
    for made in mine:
        assert not made.differs(expected)


def test_many_sizes_while_variants_are_forgotten(mine, monkeypatch):
    """Variants that fill up, and are dropped, under calls that are being made."""
    monkeypatch.setattr(compiled, "_MAX_VARIANTS", 2)
    ended = []

    def work(number: int) -> None:
        if number == 0:
            releases = cycle(["0.6.13", "0.7.0"])
            while len(ended) < THREADS - 1:
                mine.op.select_release(next(releases))
                mine.op.forget()
            return
        try:
            call_with_many_sizes()
        finally:
            ended.append(number)

    def call_with_many_sizes() -> None:
        rng = np.random.default_rng()
        for _ in range(ROUNDS):
            rows, pad = int(rng.integers(1, 9)), 8 * int(rng.integers(0, 9))
            x = rng.standard_normal((rows, 16 + pad)).astype(np.float16)[:, :16]
            y = np.full((rows, 16), np.nan, np.float16)
            factor = float(rng.integers(1, 9))
            x.flags.writeable = bool(rng.integers(2))  # a variant each
            mine.op(as_desc(y), x, factor=factor, kv_layout="NHD" if rows % 2 else "HND")
            assert (y == x * np.float16(factor)).all()
            call = mine.op.prepare(y, as_desc(x), factor=1.0)
            call.update(factor=factor + 1)
            call()
            assert (y == x * np.float16(factor + 1)).all()

    at_once(work)


def test_a_prepared_call_that_is_shared(mine):
    """One thread has it at a time; the others are told, and nothing of theirs is launched."""
    inside, launched, refused = [], count(), count()
    call = mine.op.prepare(mine.y, mine.x, factor=2.0)

    def work():
        inside.append(1)
        assert len(inside) == 1
        next(launched)
        inside.pop()

    mine.work = work

    def use(number: int) -> None:
        for i in range(10 * ROUNDS):
            try:
                if number == 0 and i % 50 == 0:  # it is found again by one of them, and by no two
                    with contextlib.suppress(IndexError):
                        call.take()
                if i % 3:
                    call()
                else:
                    call.update(factor=float(1 + (number + i) % 4))
            except fi_ffi.ArgumentError as error:
                assert error.argument == "self"
                next(refused)

    at_once(use)
    assert next(launched) + next(refused) >= THREADS * 10 * ROUNDS * 2 // 3 - THREADS
    mine.y[...] = np.nan
    call.update(factor=2.0)
    call()
    assert mine.is_done(2)


def test_kinds_are_one_object_whoever_asks():
    """Variants are found by them: two of one kind would be two variants."""
    found: list[set[int]] = [set() for _ in range(THREADS)]

    def work(number: int) -> None:
        for i in range(20 * ROUNDS):
            shape = (i % 50 + 1, number % 3 + 1)
            desc = fi_ffi.TensorDesc(64, shape, "float8_e5m2", device=f"cuda:{i % 7}")
            assert desc.shape == shape and desc.strides == (shape[1], 1)
            found[number].add(id(desc.kind))

    at_once(work)
    assert len(set.union(*found)) == 7


@pytest.mark.parametrize("kind", KINDS)
def test_one_plan_that_many_threads_run(kind):
    """Into outputs of their own, while nobody plans."""
    case = Case(kind)
    plan = case.plan()
    case.run(plan)
    expected = case.memory["o"].tobytes(), case.memory["lse"].tobytes()

    def work(number: int) -> None:
        o, lse = np.full_like(case.memory["o"], np.nan), np.full_like(case.memory["lse"], np.nan)
        descs = {name: as_desc(case.memory[name]) for name in case.run_names}
        descs |= {"o": as_desc(o), "lse": as_desc(lse)}
        for _ in range(ROUNDS):
            o[...] = np.nan
            case.run(plan, **descs)
            assert (o.tobytes(), lse.tobytes()) == expected

    at_once(work)


def test_kernels_that_are_forgotten_under_plans():
    stop = threading.Event()

    def work(number: int) -> None:
        if number == 0:
            for _ in range(20 * ROUNDS):
                generation.advance()
            stop.set()
            return
        case, is_last = Case(KINDS[number % len(KINDS)]), False
        while not is_last:
            is_last = stop.is_set()  # one run at least, however quick the other thread is
            case.memory["o"][...] = np.nan
            case.run(case.plan())
            case.check()

    at_once(work)


GIL = """
    import ctypes, sys, threading, time
    import numpy as np
    import fi_ffi
    from fi_ffi.abi._cffi import ffi
    from fi_ffi.abi.function import Entry
    from fi_ffi.loader.runtime import ensure_tvm_ffi
    from fi_ffi.ops.call import compiled, prepared

    ensure_tvm_ffi()
    libc = ctypes.CDLL(None)
    semaphore = ctypes.create_string_buffer(64)
    libc.sem_init(semaphore, 0, 1)
    # A kernel that waits in C, on the semaphore that it is handed first.
    wait = ctypes.cast(libc.sem_wait, ctypes.c_void_p).value
    handle = ffi.cast("void *", ctypes.addressof(semaphore))
    entry = Entry("wait", ffi.cast("void *", wait), handle)
    compiled.entry_for = lambda *_: entry
    x, w = np.ones((2, 8), np.float16), np.ones(8, np.float16)
    descs = [fi_ffi.as_desc(array) for array in (x, x, w)]
    fi_ffi.rmsnorm(*descs)  # not made to wait
    call = fi_ffi.rmsnorm.prepare(*descs)
    ways = {"prepared": call, "of descriptors": lambda: fi_ffi.rmsnorm(*descs),
            "of arrays": lambda: fi_ffi.rmsnorm(x, x, w)}
    for name, way in ways.items():
        thread = threading.Thread(target=way)
        thread.start()
        end, turns = time.monotonic() + 0.2, 0
        while time.monotonic() < end or turns < 1000:
            turns += 1
        assert thread.is_alive(), name
        libc.sem_post(semaphore)
        thread.join()
    print("done")
"""


def test_calls_release_the_gil():
    """While one thread's call waits in C another goes on; else neither would ever end."""
    status, out, err = done(GIL)
    assert (status, out) == (0, "done\n"), err


COLLECTED = """
import ctypes, gc, sys
import fi_ffi

DEFINING = {f"/fi_ffi/{name}" for name in ("reference/", "ops/attention/", "ops/plans/")}
memory = [(ctypes.c_uint16 * 64)(*[0x3C00] * 64) for _ in range(3)]
shapes = [(1, 64), (1, 64), (64,)]
out, *read = [
    fi_ffi.TensorDesc(ctypes.addressof(each), shape, "float16", device="cpu")
    for each, shape in zip(memory, shapes)
]
told, is_calling = [], False

class Cycle:
    def __init__(self):
        self.itself = self

    def __del__(self):
        global is_calling
        if is_calling:
            return
        is_calling = True
        try:
            memory[0][:] = [0] * 64
            fi_ffi.rmsnorm(out, *read, eps=0.0)
            told.append({*memory[0]} == {0x3C00} and callable(fi_ffi.BatchDecodePlan))
        except BaseException as error:
            told.append(repr(error))
        is_calling = False

def profile(frame, event, value):
    if not is_calling and any(part in frame.f_code.co_filename for part in DEFINING):
        Cycle()

gc.set_threshold(1)
sys.setprofile(profile)
fi_ffi.rmsnorm(out, *read, eps=0.0)
fi_ffi.BatchDecodePlan
sys.setprofile(None)
assert gc.isenabled() and len(told) > 50 and {*told} == {True}, {*told}
"""


def test_garbage_calls_while_modules_are_imported():
    """Those of `fi_ffi.reference` and of plans, which the first use imports."""
    assert done(COLLECTED) == (0, "", "")


HANDLED = """
import signal, sys
import numpy as np
import fi_ffi

rows, told = np.ones((3, 1, 64), np.float16), []

def handler(number, frame):
    try:
        fi_ffi.rmsnorm(*rows[:2], rows[2, 0])
    except fi_ffi.LoaderError as error:
        told.append(str(error))

def profile(frame, event, value):
    if not told and frame.f_code.co_filename.endswith("/reference/arrays.py"):
        signal.raise_signal(signal.SIGUSR1)

signal.signal(signal.SIGUSR1, handler)
sys.setprofile(profile)
fi_ffi.rmsnorm(*rows[:2], rows[2, 0])
sys.setprofile(None)
handler(0, None)
print(*told)
"""


def test_a_signal_handler_calls_while_modules_are_imported():
    expected = "fi_ffi.reference is still being imported by this thread: call again after it\n"
    assert done(HANDLED) == (0, expected, "")


class Quit(BaseException):
    """What a debugger's trace function raises."""


def test_a_trace_function_raises_anywhere(rng):
    """While a lost frame is looked for: no other call of the process waits, and this one works."""
    rows = rng.standard_normal((4, 64)).astype(np.float16)
    call, other = (
        fi_ffi.rmsnorm.prepare(np.empty_like(rows), rows, np.ones(64, np.float16)) for _ in range(2)
    )
    code, raised = type(call).reclaim.__code__, 0

    def trace(frame, event, arg):
        nonlocal left
        if frame.f_code is not code:
            return None
        left -= 1
        if not left:
            raise Quit
        return trace

    def called(one, works):
        works.append(one())

    for at in count(1):
        left = at
        with contextlib.suppress(IndexError):
            call.take()  # and lost
        sys.settrace(trace)
        try:
            call()
        except Quit:
            raised += 1
        finally:
            sys.settrace(None)
        if left > 0:
            break
        works = []
        for each in (call, other):
            thread = threading.Thread(target=called, args=(each, works), daemon=True)
            thread.start()
            thread.join(20)
        assert len(works) == 2, f"after event {at}"
    assert raised > 5


def held_after(call, code, lock):
    """Whether a trace function that raises leaves a lock held, by the event at which it does."""
    held, at, left = [], 0, 0

    def trace(frame, event, arg):
        nonlocal left
        if frame.f_code is not code:
            return None
        left -= 1
        if not left:
            raise Quit
        return trace

    while left <= 0:
        at = left = at + 1
        sys.settrace(trace)
        try:
            call()
        except Quit:
            held.append(lock.locked())
            if lock.locked():
                lock.release()
        finally:
            sys.settrace(None)
    return held


def test_a_trace_function_that_raises_can_leave_any_lock_held():
    """At the end of a block, and nowhere else."""
    lock, seen = threading.Lock(), []

    class Follower:
        def forget(self):
            pass

    def block():
        with lock:
            seen.append(1)

    follower = Follower()
    pythons = held_after(block, block.__code__, lock)
    follow = generation.follow.__code__
    ours = held_after(lambda: generation.follow(follower), follow, generation._lock)
    assert pythons == ours and ours.count(True) == 1


def test_one_of_many_gets_a_lost_frame(monkeypatch):
    """Also where another takes it after this one found it lost."""
    rows = np.ones((4, 64), np.float16)
    call = fi_ffi.rmsnorm.prepare(np.empty_like(rows), rows, np.ones(64, np.float16))
    taken = []

    def count_references(frame):
        if not taken:
            taken.append(None)
            taken.append(call.reclaim())
        return 2

    for _ in range(3):
        call.take()
        with monkeypatch.context() as patch:
            patch.setattr(prepared, "sys", SimpleNamespace(getrefcount=count_references))
            with allowed("taken", "call.lost"), pytest.raises(fi_ffi.ArgumentError, match="in use"):
                call.reclaim()
        call.give(taken.pop())
        taken.clear()
        call()
