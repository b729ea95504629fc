"""Sixteen threads that load, call, plan, replan and fail at once, on one stream and on several.

What is safe: docs/threads.md.  `tests/ops/test_threads.py` has each op by itself; here everything
goes on together, from a cold start on.
"""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest

import fi_ffi
from fi_ffi.abi.interop import as_desc
from fi_ffi.modules import files
from fi_ffi.ops.functions import OPS

from tests.attention.pretend import current_stream
from tests.helpers.children import done
from tests.helpers.plan_calls import KINDS, Case
from tests.helpers.prepared_calls import draw, placed
from tests.helpers.stress_strength import scaled
from tests.ops.conftest import gpu, mine  # noqa: F401  the pretended GPU, and a kernel of ours
from tests.ops.test_threads import at_once
from tests.stress.gauges import counted

pytestmark = pytest.mark.usefixtures("other_threads")

THREADS = 16
RMSNORM = OPS["rmsnorm"]


@pytest.fixture(name="counted")
def library() -> str:
    return counted()


def test_cold_loads(counted: str, tmp_path: Path) -> None:
    """All threads of a new process load at once: half of them the same library, half others."""
    others = []
    for i in range(THREADS // 2):
        others.append(tmp_path / f"other_{i}.so")
        others[-1].write_bytes(Path(counted).read_bytes())
    status, out, err = done(COLD, counted, *map(str, others))
    assert (status, err) == (0, "")
    assert out.split() == ["same", "1", "handles", str(THREADS // 2 + 1)]


COLD = """
    import sys, threading
    import numpy as np
    import fi_ffi
    from fi_ffi.abi._cffi import ffi
    from fi_ffi.modules import files
    from tests.ops.test_threads import at_once

    same, others = sys.argv[1], sys.argv[2:]
    loaded, bad = [], same + ".none"
    sys.setswitchinterval(1e-5)

    def work(number):
        path = same if number % 2 else others[number // 2]
        try:
            fi_ffi.module(bad)
        except fi_ffi.KernelNotFoundError as error:
            assert bad in str(error)
        module = fi_ffi.module(path)
        x = np.full(5, number + 1.0, np.float32)
        module.entry("scale")(x, 2.0)
        assert (x == 2 * number + 2).all()
        try:
            module.entry("fail")(1)
        except fi_ffi.KernelError as error:
            assert error.__cause__ is not None
        # And reference kernels, which none has called either.
        y, w = np.full((2, 8), np.nan, np.float16), np.ones(8, np.float16)
        fi_ffi.rmsnorm(y, np.full((2, 8), number + 1, np.float16), w, eps=0.0)
        assert (y == 1).all()
        loaded.append((number, files.load_file(path)))

    at_once(work, 2 * len(others))
    def handles(made):
        return {int(ffi.cast("uintptr_t", one.handle)) for one in made}

    print("same", len(handles(made for number, made in loaded if number % 2)),
          "handles", len(handles(made for _, made in loaded)))
"""


class Everything:
    """What one thread does in turn, and how it knows that it was right."""

    def __init__(self, number: int, counted: str, streams: int) -> None:
        self.number, self.stream = number, 0x1000 + 16 * (number % streams)
        self.rng = np.random.default_rng()
        self.module = fi_ffi.module(counted)
        self.case = Case(KINDS[number % len(KINDS)])
        self.plan = self.case.plan()
        self.prepared_run = self.case.prepared(self.plan)

    def load(self) -> None:
        with pytest.raises(fi_ffi.KernelNotFoundError, match=f"none_{self.number}"):
            fi_ffi.module(f"/nowhere/none_{self.number}.so")
        files.load_file(str(self.module.path))

    def call(self) -> None:
        expected, one = placed(draw(RMSNORM.row, {"T": "float16"}, {}), {}, 2)
        RMSNORM(**expected.values)
        call = RMSNORM.prepare(**one.values)
        call()
        assert not one.differs(expected)

    def run(self) -> None:
        self.case.memory["o"][...] = np.nan
        self.case.run(self.plan)
        self.case.check()

    def replan(self) -> None:
        self.case.memory["o"][...] = np.nan
        self.case.replan(self.plan)
        self.prepared_run()
        self.case.check()

    def make(self) -> None:
        other = Case(KINDS[self.number % len(KINDS)])
        other.run(other.plan())
        other.check()

    def refuse(self) -> None:
        with pytest.raises(fi_ffi.ArgumentError) as caught:
            RMSNORM(np.zeros((1, 8), np.float16), np.zeros((1, 8), np.float16),
                    np.ones(self.number + 9, np.float16))  # fmt: skip
        assert str(self.number + 9) in str(caught.value)

    def fail(self) -> None:
        with pytest.raises(fi_ffi.KernelError) as caught:
            self.module.entry("fail")(self.number % 3)
        assert (caught.value.__cause__ is not None) == (self.number % 3 == 1)
        assert caught.value.kind == ("RuntimeError" if self.number % 3 == 2 else "ValueError")


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("streams", [1, 8])
def test_everything_at_once(gpu, mine, counted: str, streams: int) -> None:  # noqa: F811
    """Each thread sees its own scope, its own stream's kernels and its own errors."""
    rounds = scaled(400, 4)
    found = threading.local()

    def kernel() -> None:
        found.stream = current_stream()
        if getattr(found, "is_failing", False):
            raise ValueError(f"thread {found.number}")

    mine.work = kernel

    def on_stream(one: Everything, i: int) -> None:
        """Calls on a stream, with a scope or without; every third fails."""
        x = np.full((4, 16), one.number, np.float16)
        y = np.full_like(x, np.nan)
        descs = [
            fi_ffi.TensorDesc(a.ctypes.data, a.shape, "float16", device="cuda:0") for a in (y, x)
        ]
        found.is_failing, found.number, found.stream = i % 3 == 0, one.number, None
        try:
            with fi_ffi.stream(one.stream):
                mine.op(*descs, factor=2.0)
                call = mine.op.prepare(*descs, factor=2.0)
                with fi_ffi.stream(one.stream + 1):
                    call()
        except fi_ffi.KernelError as error:
            assert found.is_failing and error.message == f"thread {one.number}"
            assert found.stream == one.stream
        else:
            assert not found.is_failing and found.stream == one.stream + 1
            assert (y == 2 * x).all()
        assert current_stream() == 0
        with pytest.raises(fi_ffi.ArgumentError, match="stream"):
            mine.op(*descs, factor=2.0)
        found.is_failing = False
        mine.op(*descs, factor=2.0, stream=one.stream + 2)
        assert found.stream == one.stream + 2 and current_stream() == 0

    def work(number: int) -> None:
        one = Everything(number, counted, streams)
        ways = [one.load, one.call, one.run, one.replan, one.make, one.refuse, one.fail]
        for i in range(rounds):
            on_stream(one, i)
            for at in one.rng.permutation(len(ways)):
                ways[at]()

    at_once(work, THREADS)


def test_a_watchdog_and_a_log_under_all(counted: str, tmp_path: Path) -> None:
    """Both come and go while threads plan, run and fail; every line of a log is whole."""
    stop, path = threading.Event(), tmp_path / "calls.log"
    rounds = scaled(300, 6)

    def work(number: int) -> None:
        if number == 0:
            out, x, weight = (as_desc(np.ones(size, np.float16)) for size in ((1, 8), (1, 8), (8,)))
            try:
                for _ in range(rounds):
                    with fi_ffi.call_log(3, path), fi_ffi.watchdog(60):
                        RMSNORM(out, x, weight)
            finally:
                stop.set()
            return
        one = Everything(number, counted, 1)
        while not stop.is_set():
            one.fail()
            one.replan()
            one.run()

    at_once(work, THREADS // 2)
    lines = path.read_text().splitlines()
    assert sum("rmsnorm" in line for line in lines) >= rounds
