"""What a process holds: memory, descriptors, Python's blocks, TVM-FFI objects; and its growth."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

_PAGE = os.sysconf("SC_PAGE_SIZE")
_libc = ctypes.CDLL(None)

# What may be there at the end that was not at a fifth of the way.  Memory is given to Python and
# taken from it in arenas, so that a little comes and goes; one object kept by each call is more
# than either bound allows.
FREE_BYTES, BYTES_PER_CALL = 2 << 20, 1.0
# 33 to 245 blocks were more after 2,000 calls, and 92 after 30,000: it is no number of calls.
FREE_BLOCKS = 400
FREE_GPU_BYTES = 4 << 20  # the driver takes memory in pieces of 2 MB


def counted() -> str:
    """counted.c as a library, which knows how many of its errors are alive."""
    from tests.helpers.compiler import compiled

    return str(compiled(Path(__file__).with_name("counted.c")))


def read(more: Mapping[str, Callable[[], int]]) -> dict[str, int]:
    """The state now, after everything that nobody refers to is gone; `more` may let go of more."""
    told = {name: count() for name, count in more.items()}
    for _ in range(3):
        gc.collect()
    _libc.malloc_trim(0)
    return {
        "rss": int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE,
        "descriptors": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count(),
        "blocks": sys.getallocatedblocks(),
        "objects": len(gc.get_objects()),
        **told,
    }


def run(
    work: Callable[[int], None], count: int, more: Mapping[str, Callable[[], int]]
) -> dict[str, object]:
    """Do `work(i)` so often; what there was at a fifth of the way, and at the end."""
    marks = []
    for part in range(5):
        for i in range(count * part // 5, count * (part + 1) // 5):
            work(i)
        if part in (0, 4):
            marks.append(read(more))
    return {"count": count, "early": marks[0], "late": marks[1]}


def excess(found: Mapping[str, object]) -> list[str]:
    """What grew by more than the bounds, in words."""
    early, late, count = found["early"], found["late"], found["count"]
    assert isinstance(early, dict) and isinstance(late, dict) and isinstance(count, int)
    bounds = {
        "rss": max(FREE_BYTES, int(BYTES_PER_CALL * count)),
        "gpu": FREE_GPU_BYTES,
        "blocks": FREE_BLOCKS, "objects": FREE_BLOCKS,
    }  # fmt: skip
    grown = {name: late[name] - early[name] for name in early}
    return [
        f"{name} grew by {more} from {early[name]} in {count * 4 // 5} calls"
        for name, more in grown.items()
        if more > bounds.get(name, 0)
    ]


def leaves_nothing(work: Callable[[], object], count: int, most: int = 4 << 20) -> None:
    """Done so often, it takes few bytes more of memory than after its first times."""
    for _ in range(200):
        work()
    before = read({})["rss"]
    for _ in range(count):
        work()
    assert read({})["rss"] - before < most
