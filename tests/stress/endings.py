"""Objects end while a timer's signal comes: no exception of its handler is lost, and no resource.

The runtime is a library of runtime.c, or without one that of a GPU.
"""

# ruff: noqa: E402
from __future__ import annotations

import atexit
import functools
import random
import sys

import cffi

library, seed, rounds = sys.argv[1], sys.argv[2], int(sys.argv[3])
of_c = cffi.FFI()
of_c.cdef("int live(void); int current_mode(void);")
counts = of_c.dlopen(library) if library else None


@atexit.register
def of_exit():  # registered before those of fi_ffi, so called after them
    print(f"{live()} live")


def live():
    return counts.live() if counts else 0


import fi_ffi
from fi_ffi.abi._cffi import ffi
from fi_ffi.loader import generation, machine
from fi_ffi.ops.call import cuda

from tests.helpers.deadlines import check_arrival
from tests.helpers.forking import in_child

runtime = ffi.dlopen(library) if library else machine.load_cudart()[0]
if library:
    machine.load_cudart = lambda: (runtime, library)
    machine._device_count = 1
device, slot = fi_ffi.parse_device("cuda:0"), ffi.new("void **")
with cuda.current(device):
    assert runtime.cudaStreamCreateWithFlags(slot, 1) == 0
stream = int(ffi.cast("uintptr_t", slot[0]))


class Follower:
    def __init__(self):
        generation.follow(self)

    def forget(self):
        pass


def graph():
    with fi_ffi.capture(stream) as made:
        pass
    return made


MAKE = {
    "event": cuda.Event,
    "memory": lambda: cuda.allocate(64, device),
    "page-locked": lambda: cuda.allocate_page_locked(64, device),
    "host": lambda: cuda.allocate(64, fi_ffi.parse_device("cpu")),
    "graph": graph,
    "follower": Follower,
}  # fmt: skip
rng, held, before = random.Random(seed), [], live()
for name, make in MAKE.items():
    hold = functools.partial(lambda make: held.extend(make() for _ in range(100)), make)
    check_arrival(held.clear, rounds, rng, hold)
    held.clear()  # what an interrupt before the work left
    assert live() == before and not cuda._ends, (name, live())

held += [make() for make in MAKE.values()]
there = live()
with fi_ffi.capture(stream, into=held[list(MAKE).index("graph")]):  # not changed in place
    pass
assert live() == there


def child():
    held.clear()
    assert live() == there, "what is the parent's was given back"


if library:  # elsewhere a child would need another way to ask
    assert there > before and in_child(child) == 0
assert runtime.cudaGetLastError() == 0
assert not counts or counts.current_mode() == 0
print(f"{before} before")
