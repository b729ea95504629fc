"""What tests/stress/test_leaks.py does many times over, each in a process of its own:

    python -m tests.stress.leaking LIBRARY KIND COUNT [KIND COUNT]...

prints what `gauges.run` found of each, as JSON.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

import fi_ffi
from fi_ffi.abi import tensor
from fi_ffi.abi.objects import Object
from fi_ffi.loader import runtime
from fi_ffi.ops.functions import OPS
from fi_ffi.reference import norm

from tests.abi.test_interop import ArrayInterface, Legacy
from tests.helpers.forking import in_child
from tests.helpers.plan_calls import KINDS, Case
from tests.helpers.prepared_calls import Mine, draw, placed
from tests.stress import gauges

Work = tuple[Callable[[int], None], Mapping[str, Callable[[], int]]]
RMSNORM = OPS["rmsnorm"]
EXPECTED = (fi_ffi.FiFfiError, OSError)


def refused(call: Callable[[], object]) -> None:
    with contextlib.suppress(fi_ffi.ArgumentError):
        call()


def described(array: np.ndarray, shape: tuple[int, ...], at: int = 0) -> fi_ffi.TensorDesc:
    return fi_ffi.TensorDesc(array.ctypes.data + at, shape, "float16", device="cpu")


def calls(_: str) -> Work:
    """An op: with descriptors, with arrays, by name, with addresses described anew, refused; and
    prepared: launched, updated by address and by tensor, refused, made anew."""
    sets = placed(draw(RMSNORM.row, {"T": "float16"}, {}), {}, 2)
    call = RMSNORM.prepare(**sets[0].values)
    memory, variants = np.ones(1 << 16, np.float16), RMSNORM.compiled.variants

    def work(i: int) -> None:
        one = sets[i % 2]
        RMSNORM(*one.descs.values())
        # Every tenth has sizes of its own.
        rows, width = (1 + i // 10 % 40, 8) if i % 10 else (1 + i % 2000, 8 * (1 + i // 2000 % 4))
        out, x = (described(memory, (rows, width), at) for at in (0, 1 << 16))
        if i % 10:
            RMSNORM(out, x, described(memory, (8,), 1 << 15))
        call.update(**one.addresses)
        call()
        if i % 10 == 0:
            RMSNORM(*one.arrays.values())
            RMSNORM(**one.values)
            call.update(**one.arrays)
            RMSNORM.prepare(**one.values)()
            refused(lambda: call.update(eps=-1.0))
            refused(lambda: RMSNORM(*one.descs.values(), eps=-1.0))

    def uses() -> int:
        """References to the entries' function objects."""
        owners = {id(v.entry): v.entry.owner for v in variants.values() if v.entry is not None}
        return sum(owner.use_count for owner in owners.values() if isinstance(owner, Object))

    return work, {
        "uses": uses, "frames": lambda: sum(len(v.frames) for v in variants.values()),
        "names": lambda: len(tensor._NAMED), "kinds": lambda: len(tensor._KINDS),
    }  # fmt: skip


def untyped(library: str) -> Work:
    """Functions of a module that no row describes, found again each time or kept."""
    module = fi_ffi.module(library)
    scale, give, live = (module.entry(name) for name in ("scale", "give", "live"))
    x = np.ones(8, np.float32)
    desc = fi_ffi.as_desc(x)

    def work(i: int) -> None:
        scale(x if i % 5 == 0 else desc, 1.0)
        assert len(give()) == 37
        if i % 100 == 0:
            fi_ffi.module(library).entry("scale")(desc, 1.0)

    return work, {"live": live}


def plans(_: str) -> Work:
    """Every kind of plan: made, made again for another batch, run, run prepared."""
    cases = [Case(kind) for kind in KINDS]
    kept = [case.plan() for case in cases]
    calls = [case.prepared(plan) for case, plan in zip(cases, kept, strict=True)]

    def work(i: int) -> None:
        turn, at = divmod(i, len(KINDS))
        case, made = cases[at], None if turn % 3 else cases[at].plan()
        case.replan(kept[at])  # the workspace is taken from the plan that had it
        if turn % 30 == 1:
            calls[at]()
        elif turn % 30 == 0:
            refused(lambda: case.run(made))
            case.run(kept[at])

    return work, {}


def errors(library: str) -> Work:
    """A compiled kernel's: dropped at once, kept for a while, with causes; and an op's."""
    module = fi_ffi.module(library)
    fail, live = module.entry("fail"), module.entry("live")
    mine, kept = Mine(), list[BaseException]()
    norm.KERNELS["norm"][mine.row.name] = mine.kernel

    def odd() -> None:
        mine.given.clear()
        raise ValueError("a kernel in Python")

    mine.work = odd
    call = mine.op.prepare(mine.y, mine.x)
    ways = [*(functools.partial(fail, n) for n in range(3)), call, lambda: mine.op(*mine.descs)]

    def work(i: int) -> None:
        try:
            ways[i % 5]()
        except fi_ffi.KernelError as error:
            assert (error.__cause__ is not None) == (i % 5 == 1)
            kept.extend([error] * (i % 2))
            if len(kept) == 50:
                kept.clear()
        else:
            raise AssertionError("nothing was raised")

    def alive() -> int:
        kept.clear()
        gc.collect()
        return int(live())

    return work, {"live": alive}


def loads(library: str) -> Work:
    """Files that cannot be loaded, each again and again; a wheel with a bad member."""
    from tests.loader.server import NORM, make_wheel, record

    runtime.ensure_tvm_ffi()  # which may be in the usual cache
    kept = tempfile.TemporaryDirectory(prefix="fi-ffi-bad-")
    folder, good = Path(kept.name), Path(library).read_bytes()
    os.environ["FI_FFI_CACHE_DIR"] = str(folder / "cache")
    # The machine in the ELF header: another's.
    machine = (183 if good[18:20] != b"\xb7\0" else 62).to_bytes(2, "little")
    bad = {
        "truncated": good[: len(good) // 2], "head": good[:70], "empty": b"",
        "text": b"a wheel this is not\n" * 50, "noise": os.urandom(5000),
        "arch": good[:18] + machine + good[20:],
    }  # fmt: skip
    for name, content in bad.items():
        (folder / f"{name}.so").write_bytes(content)
    # Of which a member is not what its RECORD says.
    wheel = folder / "flashinfer_jit_cache-0.6.13+cu130-py3-none-any.whl"
    text = record({NORM: b"what was recorded"})
    wheel.write_bytes(make_wheel({NORM: b"other bytes 1234!"}, record_text=text))
    files = [*(folder / f"{name}.so" for name in [*bad, "none"]), folder, wheel]

    def work(i: int) -> None:
        assert kept.name  # the files are there as long as this is
        file = files[i % len(files)]
        try:
            if file != wheel:
                fi_ffi.module(file)
            else:
                fi_ffi.use_kernels(wheel)
                runtime.load("norm")
        except EXPECTED:
            return
        raise AssertionError(f"{file} was loaded")

    return work, {"left": lambda: len([*(folder / "cache" / "tmp").glob("*")])}


def scopes(_: str) -> Work:
    """Stream scopes, empty and in use on a pretended GPU, nested and failing; watchdogs; logs."""
    import pytest

    from tests.attention.pretend import Pretend, current_stream

    gpu = Pretend(pytest.MonkeyPatch())
    memory = [np.zeros((2, 8), np.float16), np.ones((2, 8), np.float16), np.ones(8, np.float16)]
    descs = [fi_ffi.TensorDesc(a.ctypes.data, a.shape, "float16", device="cuda:0") for a in memory]
    call = RMSNORM.prepare(*descs)

    def work(i: int) -> None:
        with contextlib.suppress(ZeroDivisionError), fi_ffi.stream(0x100 + i % 5000):
            if i % 3 == 0:
                call()
                with fi_ffi.stream(0x51):
                    RMSNORM(*descs)
            if i % 7 == 0:
                raise ZeroDivisionError
        if i % 20 == 0:
            with fi_ffi.watchdog(60):
                pass
        if i % 100 == 0:
            with fi_ffi.call_log(1, os.devnull), fi_ffi.stream(0x61):
                RMSNORM(*descs, stream=0x71)
        gpu.seen.clear()
        gpu.runtime.log.clear()
        gpu.runtime.work.clear()

    return work, {"stream": lambda: current_stream(0)}


def descriptors(_: str) -> Work:
    """Tensors of other kinds, described; what they keep alive is let go of with them."""
    x = np.ones((4, 8), np.float32)

    def work(i: int) -> None:
        for other in (x, ArrayInterface(x, version=3), Legacy(x), x[i % 3 :]):
            fi_ffi.as_desc(other)
        if i % 10 == 0:
            refused(lambda: fi_ffi.as_desc(object()))
            fi_ffi.TensorDesc(x.ctypes.data, (i % 7 + 1,), "bfloat16", device="cuda:0")

    return work, {"references": lambda: sys.getrefcount(x)}


def leaky(_: str) -> Work:
    """What the gauges must find: eight bytes and an object kept by each call."""
    kept: list[float] = []
    return lambda i: kept.append(float(i)), {}


MADE = (calls, untyped, plans, errors, loads, scopes, descriptors, leaky)
KINDS_OF_WORK: dict[str, Callable[[str], Work]] = {made.__name__: made for made in MADE}


def main(kind: str, count: int, library: str) -> None:
    work, more = KINDS_OF_WORK[kind](library)
    # Whatever is made when something is first done, is made by then.
    for i in range(max(count // 10, min(count, 1000))):
        work(i)
    print(json.dumps({"kind": kind, **gauges.run(work, count, more)}), flush=True)


if __name__ == "__main__":
    for name, number in zip(sys.argv[2::2], sys.argv[3::2], strict=True):
        if in_child(functools.partial(main, name, int(number), sys.argv[1])):
            sys.exit(f"{name} failed")
