"""A process that launches on a sequence without tokens, under a watchdog that ends it.

    python hang.py cpu|gpu empty|full

`full` has a token more, and finishes.
"""

from __future__ import annotations

import os
import sys

import numpy as np

import fi_ffi

from tests.gdn_stress.lanes import Lane, Spec
from tests.gdn_stress.machines import Cpu, Gpu

SECONDS = 5.0


def main(kind: str, which: str) -> None:
    if kind == "gpu":
        fi_ffi.use_kernels(os.environ["FI_FFI_KERNELS"])
    machine = Gpu() if kind == "gpu" else Cpu()
    lane = Lane(machine, Spec((50, 1, 50)), np.random.default_rng())
    if which == "empty":
        starts = lane.drawn_of(0)[0]["cu_seqlens"].copy()
        starts[2] = starts[1]
        machine.write(lane.placed(0, "cu_seqlens"), starts)
    lane.reset()
    print("launching", flush=True)
    with fi_ffi.watchdog(SECONDS, abort=True):
        lane.launch(0)
    print("finished", flush=True)
    machine.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
