"""What tests/stress/test_leaks.py does many times over, each in a process of its own:

    python -m tests.stress.leaking LIBRARY KIND COUNT [KIND COUNT]...

prints what `gauges.run` found of each, as JSON.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

import fi_ffi
from fi_ffi.abi import tensor
from fi_ffi.abi.objects import Object
from fi_ffi.loader import runtime
from fi_ffi.ops.call.op import Op
from fi_ffi.ops.functions import OPS

from tests.abi.test_interop import ArrayInterface, Legacy
from tests.helpers.forking import in_child
from tests.helpers.plan_calls import KINDS, Case
from tests.helpers.prepared_calls import Mine, draw, placed
from tests.stress import gauges

Work = tuple[Callable[[int], None], Mapping[str, Callable[[], int]]]
RMSNORM = OPS["rmsnorm"]
EXPECTED = (fi_ffi.FiFfiError, OSError)


def _sets(count: int = 2):
    return placed(draw(RMSNORM.row, {"T": "float16"}, {}), {}, count)


def _uses(op: Op = RMSNORM) -> Mapping[str, Callable[[], int]]:
    """How many references to the entries' function objects there are."""
    variants = op.compiled.variants

    def count() -> int:
        entries = {id(v.entry): v.entry for v in variants.values() if v.entry is not None}
        return sum(
            entry.owner.use_count for entry in entries.values() if isinstance(entry.owner, Object)
        )

    return {"uses": count, "frames": lambda: sum(len(v.frames) for v in variants.values())}


def typed(_: str) -> Work:
    """An op with descriptors, with arrays, by name, and refused."""
    sets = _sets()
    descs = [[*made.descs.values()] for made in sets]
    arrays = [[*made.arrays.values()] for made in sets]

    def work(i: int) -> None:
        if i % 4 == 0:
            RMSNORM(*arrays[i % 2])
        elif i % 4 == 3:
            RMSNORM(**sets[i % 2].values)
        else:
            RMSNORM(*descs[i % 2])
        if i % 50 == 0:
            with contextlib.suppress(fi_ffi.ArgumentError):
                RMSNORM(*descs[0], eps=-1.0)

    return work, _uses()


def prepared(_: str) -> Work:
    """Launched, updated by address and by tensor, refused, and made anew."""
    sets = _sets()
    call = RMSNORM.prepare(**sets[0].values)

    def work(i: int) -> None:
        call.update(**sets[i % 2].addresses)
        call()
        if i % 10 == 0:
            call.update(**sets[i % 2].arrays)
            RMSNORM.prepare(**sets[i % 2].values)()
            with contextlib.suppress(fi_ffi.ArgumentError):
                call.update(eps=-1.0)

    return work, _uses()


def pointers(_: str) -> Work:
    """Addresses described anew for each call; every tenth has sizes of its own."""
    memory = np.ones(1 << 16, np.float16)
    start = memory.ctypes.data

    def work(i: int) -> None:
        assert memory.size  # which is alive as long as this is
        rows = 1 + i // 10 % 40 if i % 10 else 1 + i % 2000
        width = 8 if i % 10 else 8 * (1 + i // 2000 % 4)
        out, x = (
            fi_ffi.TensorDesc(start + at, (rows, width), "float16", device="cpu")
            for at in (0, 1 << 16)
        )
        weight = fi_ffi.TensorDesc(start, (width,), "float16", device="cpu")
        if i % 10:
            RMSNORM(out, x, fi_ffi.TensorDesc(start + (1 << 15), (8,), "float16", device="cpu"))
        else:
            fi_ffi.as_desc(weight)

    known = {"names": lambda: len(tensor._NAMED), "kinds": lambda: len(tensor._KINDS)}
    return work, _uses() | known


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
    calls = []
    for case, plan in zip(cases, kept, strict=True):
        method = {"ragged": "ragged_run", "paged": "paged_run"}.get(case.kind, "run")
        tensors = {name: case.memory[name] for name in case.run_names}
        calls.append(fi_ffi.prepare(getattr(plan, method), **tensors))

    def work(i: int) -> None:
        at = i % len(KINDS)
        case = cases[at]
        if i // len(KINDS) % 3:
            case.replan(kept[at])
            if i // len(KINDS) % 30 == 1:
                calls[at]()
        else:
            made = case.plan()
            # The workspace is taken from the plan that had it.
            case.replan(kept[at])
            if i // len(KINDS) % 30 == 0:
                with contextlib.suppress(fi_ffi.ArgumentError):
                    case.run(made)
                case.run(kept[at])

    return work, {}


def errors(library: str) -> Work:
    """A compiled kernel's: dropped at once, kept for a while, with causes; and an op's."""
    module = fi_ffi.module(library)
    fail, live = module.entry("fail"), module.entry("live")
    mine, kept = Mine(), list[BaseException]()
    from fi_ffi.reference import norm

    norm.KERNELS["norm"][mine.row.name] = mine.kernel

    def odd() -> None:
        mine.given.clear()
        raise ValueError("a kernel in Python")

    mine.work = odd
    call = mine.op.prepare(mine.y, mine.x)

    def work(i: int) -> None:
        try:
            if i % 5 < 3:
                fail(i % 5)
            elif i % 5 == 3:
                call()
            else:
                mine.op(*mine.descs)
        except fi_ffi.KernelError as error:
            assert (error.__cause__ is not None) == (i % 5 == 1)
            if i % 2:
                kept.append(error)
            if len(kept) == 50:
                kept.clear()
        else:
            raise AssertionError("nothing was raised")

    def alive() -> int:
        kept.clear()
        gc.collect()
        return int(live())

    return work, {"live": alive}


def _bad_files(folder: Path, library: str) -> list[Path]:
    """Files that look like libraries, and cannot be."""
    good = Path(library).read_bytes()
    made = {
        "truncated": good[: len(good) // 2], "head": good[:70], "empty": b"",
        "text": b"a wheel this is not\n" * 50, "noise": os.urandom(5000),
        # The machine in the ELF header: another's.
        "arch": good[:18] + (183 if good[18:20] != b"\xb7\0" else 62).to_bytes(2, "little")
        + good[20:],
    }  # fmt: skip
    for name, content in made.items():
        (folder / f"{name}.so").write_bytes(content)
    return [folder / f"{name}.so" for name in made] + [folder / "none.so", folder]


def _bad_wheel(folder: Path) -> Path:
    """A wheel with a member that is not what its RECORD says."""
    from tests.loader.server import NORM, make_wheel, record

    path = folder / "flashinfer_jit_cache-0.6.13+cu130-py3-none-any.whl"
    text = record({NORM: b"what was recorded"})
    path.write_bytes(make_wheel({NORM: b"other bytes 1234!"}, record_text=text))
    return path


def loads(library: str) -> Work:
    """Files that cannot be loaded, each again and again; a wheel with a bad member."""
    runtime.ensure_tvm_ffi()  # which may be in the usual cache
    folder = Path(tempfile.mkdtemp(prefix="fi-ffi-bad-"))
    os.environ["FI_FFI_CACHE_DIR"] = str(folder / "cache")
    files, wheel = _bad_files(folder, library), _bad_wheel(folder)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)

    def work(i: int) -> None:
        at = i % (len(files) + 1)
        try:
            if at < len(files):
                fi_ffi.module(files[at])
            else:
                fi_ffi.use_kernels(wheel)
                runtime.load("norm")
        except EXPECTED:
            return
        raise AssertionError(f"{files[at] if at < len(files) else wheel} was loaded")

    def left() -> int:
        return sum(1 for path in (folder / "cache" / "tmp").glob("*"))

    return work, {"left": left}


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

    return work, {"stream": lambda: current_stream(0)}


def descriptors(_: str) -> Work:
    """Tensors of other kinds, described; what they keep alive is let go of with them."""
    x = np.ones((4, 8), np.float32)

    def work(i: int) -> None:
        for other in (x, ArrayInterface(x, version=3), Legacy(x), x[i % 3 :]):
            fi_ffi.as_desc(other)
        if i % 10 == 0:
            with contextlib.suppress(fi_ffi.ArgumentTypeError):
                fi_ffi.as_desc(object())
            fi_ffi.TensorDesc(x.ctypes.data, (i % 7 + 1,), "bfloat16", device="cuda:0")

    return work, {"references": lambda: sys.getrefcount(x)}


def leaky(_: str) -> Work:
    """What the gauges must find: eight bytes and an object kept by each call."""
    kept: list[float] = []
    return lambda i: kept.append(float(i)), {}


KINDS_OF_WORK: dict[str, Callable[[str], Work]] = {
    made.__name__: made
    for made in (
        typed, prepared, pointers, untyped, plans, errors, loads, scopes, descriptors, leaky,
    )
}  # fmt: skip


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
