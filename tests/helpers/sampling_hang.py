"""A process that keeps the greatest probabilities of a row, which some kernels never finish, under
a watchdog that ends it.

    python sampling_hang.py close|apart

`apart` has a row of the same size whose probabilities differ by more, and finishes.
"""

from __future__ import annotations

import sys

import numpy as np

import fi_ffi
from fi_ffi.cli.cuda import DeviceArray

from tests.helpers.sampling_calls import APART, CLOSE, TOP_P

SECONDS = 5.0


def main(which: str) -> None:
    probs = np.array([CLOSE if which == "close" else APART], np.float32)
    source, out = DeviceArray(probs), DeviceArray(np.zeros_like(probs))
    workspace = DeviceArray(np.zeros(1024, np.uint8))
    print("launching", flush=True)
    with fi_ffi.watchdog(SECONDS, abort=True):
        fi_ffi.top_p_renorm_probs(
            source.desc(), out.desc(), top_p_val=TOP_P, workspace=workspace.desc(), stream=0
        )
    print("finished", flush=True)
    out.get()


if __name__ == "__main__":
    main(*sys.argv[1:])
