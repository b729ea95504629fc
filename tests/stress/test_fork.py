"""Forks: after a GPU was used every way in is refused, with a reason; before, all is well.

The GPU is a pretended one; tests/gpu/test_threads_stress.py has the real one.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest

import fi_ffi
from fi_ffi import graphs
from fi_ffi.loader import machine as of_loader
from fi_ffi.loader import runtime
from fi_ffi.ops.call import cuda
from fi_ffi.ops.functions import OPS

from tests.helpers.children import done
from tests.helpers.forking import in_child
from tests.helpers.plan_calls import KINDS, Case
from tests.ops.conftest import gpu  # noqa: F401
from tests.stress.gauges import counted

RMSNORM = OPS["rmsnorm"]
REASON = "forked from one that had used a GPU"


def described(*arrays: np.ndarray, device: str) -> list[fi_ffi.TensorDesc]:
    return [fi_ffi.TensorDesc(a.ctypes.data, a.shape, "float16", device=device) for a in arrays]


class Ways:
    """Every public way to a kernel, of objects made before the fork."""

    def __init__(self, stream: int = 0x51) -> None:
        self.stream = stream
        self.memory = [np.full((2, 8), n, np.float16) for n in (7, 1)] + [np.ones(8, np.float16)]
        self.descs = described(*self.memory, device="cuda:0")
        RMSNORM(*self.descs, stream=stream)
        self.call = RMSNORM.prepare(*self.descs, stream=stream)
        self.loose = RMSNORM.prepare(*self.descs)
        self.module = fi_ffi.module(counted())
        self.graph = graphs.Graph(fi_ffi.parse_device("cuda:0"))
        self.graph._launch = lambda _: 0
        graphs._graphs.add(weakref.ref(self.graph))
        with fi_ffi.stream(stream):
            self.loose()
        self.memory[0][...] = 7

    def all(self) -> dict[str, Callable[[], object]]:
        def typed() -> None:
            RMSNORM(*self.descs, stream=self.stream)

        def within(scope: Callable[[], Any], call: Callable[[], object]) -> Callable[[], None]:
            def way() -> None:
                with scope():
                    call()

            return way

        def scope() -> Any:
            return fi_ffi.stream(self.stream)

        return {
            "typed": typed,
            "typed in a scope": within(scope, lambda: RMSNORM(*self.descs)),
            "another layout": lambda: RMSNORM(
                *(described(a[:1], device="cuda:0")[0] for a in self.memory[:2]),
                self.descs[2], stream=self.stream,
            ),
            "another op": lambda: fi_ffi.gemma_rmsnorm(*self.descs, stream=self.stream),
            "prepared": self.call,
            "prepared, in a scope": within(scope, self.loose),
            "prepare": lambda: RMSNORM.prepare(*self.descs, stream=self.stream)(),
            "module entry": lambda: self.module.entry("scale")(
                self.descs[2], 1.0, stream=self.stream
            ),
            "graph": lambda: self.graph.launch(self.stream),
            "capture": within(lambda: fi_ffi.capture(self.stream), lambda: None),
            "watchdog": within(lambda: fi_ffi.watchdog(60), typed),
            "call log": within(lambda: fi_ffi.call_log(3, os.devnull), self.call),
            "memory": lambda: fi_ffi.Workspace.allocate("cuda:0", 1024, 1024),
        }  # fmt: skip


def refused(way: Callable[[], object]) -> str:
    """What was wrong with a refusal; "" where it is as it should be."""
    try:
        way()
    except fi_ffi.LoaderError as error:
        text = str(error)
        return "" if REASON in text and "spawn" in text and "forkserver" in text else text
    except BaseException as error:
        return repr(error)
    return "it was let through"


def check(ways: dict[str, Callable[[], object]]) -> None:
    wrong = {name: told for name, way in ways.items() if (told := refused(way))}
    assert not wrong, wrong


def test_every_way_in_is_refused(gpu) -> None:  # noqa: F811
    """And nothing is written, nor is what the parent has freed."""
    ways = Ways()
    real = {name: way for name, way in ways.all().items() if name != "memory"}
    freed: list[object] = []
    gpu.runtime.cudaEventDestroy = freed.append
    event = cuda.Event()

    def child() -> None:
        nonlocal event
        for _ in range(2):  # what is once refused stays so
            check(real)
        assert (ways.memory[0] == 7).all()
        del event
        assert not freed
        assert in_child(lambda: check(real)) == 0  # a child's child

    with fi_ffi.stream(0x61):
        ways.loose()
        ways.memory[0][...] = 7
        assert in_child(child) == 0
        assert in_child(lambda: check({"open scope": ways.loose})) == 0
    for way in ("typed", "prepared", "prepared, in a scope", "graph"):
        ways.all()[way]()
    assert (ways.memory[0] != 7).all()


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_plans_are_refused(gpu, kind: str, devices: int) -> None:  # noqa: F811
    gpu.with_devices(devices)
    case = Case(kind)

    def descs(names: list[str]) -> dict[str, fi_ffi.TensorDesc]:
        return {
            name: fi_ffi.TensorDesc(a.ctypes.data, a.shape, a.dtype.name, device="cuda:0")
            for name, a in ((name, case.memory[name]) for name in names)
        }

    with fi_ffi.stream(0x51):
        plan = case.cls(**case.arrays, **case.options, device="cuda:0")
        run, tensors = case.run_of(plan), descs(case.run_names)
        run(**tensors)
        call = fi_ffi.prepare(run, **tensors)
        call()
        case.check()
    loose = {"run": lambda: run(**tensors), "prepared": call,
             "replan": lambda: plan.replan(**case.arrays)}  # fmt: skip
    loose["plan"] = lambda: case.cls(**case.arrays, **case.options, device="cuda:0")

    def child() -> None:
        case.memory["o"][...] = np.nan
        with fi_ffi.stream(0x51):
            check(loose)
        with fi_ffi.stream(0x61):
            check(loose)
        assert np.isnan(case.memory["o"]).all()

    assert in_child(child) == 0


def on_cpu() -> None:
    out, x, weight = np.full((2, 8), np.nan, np.float16), np.ones((2, 8), np.float16), np.ones(8)
    RMSNORM(out, x, weight.astype(np.float16), eps=0.0)
    assert (out == 1).all()
    case = Case("decode")
    case.run(case.plan())
    case.check()


def test_the_cpu_serves_on(gpu) -> None:  # noqa: F811
    """A child may use what needs no GPU."""
    RMSNORM(*Ways().descs, stream=0x51)
    assert in_child(on_cpu) == 0


def test_forks_before_use() -> None:
    """fi_ffi imported, and used on the CPU, before the fork."""
    assert not of_loader._device_count
    on_cpu()

    def child() -> None:
        assert not of_loader.forked_after_cuda()
        on_cpu()
        module = fi_ffi.module(counted())
        x = np.ones(4, np.float32)
        module.entry("scale")(x, 3.0)
        assert (x == 3).all()

    for _ in range(3):
        assert in_child(child) == 0


def test_locks_of_other_threads() -> None:
    """Another thread was loading, or looking an entry up, when this one forked."""
    from fi_ffi.abi import library
    from fi_ffi.loader import methods, search, tvm_ffi
    from fi_ffi.loader.fetch import pinned_wheels, remote
    from fi_ffi.ops.call import memory

    places = [(tvm_ffi, "linking"), (search, "_lock"), (methods, "_lock"),
              (library, "tables"), (memory, "_lock")]  # fmt: skip
    has, leave = threading.Event(), threading.Event()

    def locks() -> list[threading.RLock]:
        modules = remote, pinned_wheels, runtime
        by_name = [module._locks.setdefault("norm", threading.RLock()) for module in modules]
        return [*(getattr(module, name) for module, name in places), *by_name]

    def hold() -> None:
        held = locks()
        for lock in held:
            lock.acquire()
        has.set()
        leave.wait(60)
        for lock in held:
            lock.release()

    thread = threading.Thread(target=hold)
    thread.start()
    has.wait(60)

    def child() -> None:
        assert all(lock.acquire(timeout=5) for lock in locks())

    try:
        assert in_child(child) == 0
    finally:
        leave.set()
        thread.join()


def test_another_librarys_use_is_told_of(monkeypatch) -> None:
    """CUDA was used before the fork by somebody else: its error 3 says no more than that."""

    class Runtime:
        def __getattr__(self, name: str):
            return lambda *_: 3

    monkeypatch.setattr(of_loader, "load_cudart", lambda: (Runtime(), ""))
    monkeypatch.setattr(of_loader, "load_driver", Runtime)
    of_loader._attribute.cache_clear()
    for ask in (lambda: of_loader.capability(0), lambda: of_loader.make_current(0)):
        with pytest.raises(fi_ffi.LoaderError, match="forked from a process that had used CUDA"):
            ask()


def test_no_runtime_is_looked_for(monkeypatch) -> None:
    """Neither that of the kernels nor one of either version, nor are the kernels asked; what the
    parent has is given up, and no error is examined by it."""
    asked: list[object] = []
    monkeypatch.setattr(of_loader, "_device_count", 1)
    monkeypatch.setattr(of_loader, "_runtime", None)
    monkeypatch.setattr(of_loader.failure, "examine", None)
    monkeypatch.setattr(of_loader, "runtimes_in_process", dict)
    monkeypatch.setattr(of_loader, "load_library", lambda file: (asked.append(file), file))
    monkeypatch.setattr(of_loader, "ask_kernels", lambda: asked.append("kernels"))
    ways = {f"CUDA {major}": partial(of_loader.use_cuda, major) for major in of_loader.CUDA_MAJORS}
    ways |= {"any CUDA": of_loader.load_cudart, "a device": of_loader.current_device}

    def child() -> None:
        before = [*asked]
        check(ways)
        assert (asked, of_loader._runtime, of_loader.failure.examine) == (before, None, None)

    assert in_child(child) == 0
    assert of_loader.use_cuda(13) == (None, "libcudart.so.13")  # this process may
    assert of_loader.failure.examine is of_loader.root_cause
    assert in_child(child) == 0


MULTI = """
    import multiprocessing, sys
    import numpy as np
    import fi_ffi
    from tests.stress.forked import square

    if __name__ == "__main__":
        if sys.argv[2] == "used":
            square(1)
        context = multiprocessing.get_context(sys.argv[1])
        with context.Pool(3) as pool:
            assert pool.map(square, range(1, 20)) == [i * i for i in range(1, 20)]
        print("done")
"""


@pytest.mark.parametrize("used", ["used", "unused"])
@pytest.mark.parametrize("method", multiprocessing.get_all_start_methods())
def test_multiprocessing(method: str, used: str) -> None:
    assert done(MULTI, method, used) == (0, "done\n", "")
