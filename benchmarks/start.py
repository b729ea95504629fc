"""How long a process takes from its start to an attested kernel entry.

    python3 benchmarks/start.py KERNELS [--runs 15]

Each run is a fresh interpreter.  "cold" has an empty cache; "warm" has
the cache that an earlier run left; "python" is the interpreter alone.  Times are wall
milliseconds, medians over the runs; the stages are read inside the process.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

STAGES = """
import time; t0 = time.perf_counter()
import fi_ffi; t1 = time.perf_counter()
from fi_ffi.loader import machine, runtime
row = fi_ffi.rmsnorm.row
runtime.ensure_tvm_ffi(); t2 = time.perf_counter()
machine.load_cudart(); t3 = time.perf_counter()
runtime.kernel_entry(row.module, row.signature, row.releases); t4 = time.perf_counter()
print(t1 - t0, t2 - t1, t3 - t2, t4 - t3)
"""
NAMES = ("import fi_ffi", "libtvm_ffi", "libcudart", "norm.rmsnorm, attested")


def run(program: str, cache: Path, kernels: str) -> tuple[float, list[float]]:
    environment = os.environ | {"FI_FFI_CACHE_DIR": str(cache), "FI_FFI_KERNELS": kernels}
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    return time.perf_counter() - start, [float(word) for word in done.stdout.split()]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("kernels", help="directory or wheel with the norm module")
    parser.add_argument("--runs", type=int, default=15)
    arguments = parser.parse_args()
    kernels = str(Path(arguments.kernels).resolve())
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder) / "cache"
        results: dict[str, list[tuple[float, list[float]]]] = {"python": [], "cold": [], "warm": []}
        for _ in range(arguments.runs):
            shutil.rmtree(cache, ignore_errors=True)
            results["python"].append(run("", cache, kernels))
            results["cold"].append(run(STAGES, cache, kernels))
            results["warm"].append(run(STAGES, cache, kernels))
    for name, runs in results.items():
        whole = statistics.median(seconds for seconds, _ in runs)
        stages = [statistics.median(column) for column in zip(*(s for _, s in runs), strict=True)]
        parts = ", ".join(f"{n} {1e3 * s:.1f}" for n, s in zip(NAMES, stages, strict=False))
        print(f"{name:7} {1e3 * whole:6.1f} ms  inside {1e3 * sum(stages):6.1f} ms: {parts}")


if __name__ == "__main__":
    main()
