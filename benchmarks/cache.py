"""What the cache costs: finding a file that is there, and extracting one that is not.

    python benchmarks/cache.py WHEEL [--member norm.so] [--repeat 200] [--json]

WHEEL is a wheel of kernels, such as `fi-ffi build norm` makes.  The cache is a new
one in a temporary directory; `--folder` puts that on another file system.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from fi_ffi.loader import cache
from fi_ffi.loader.wheel import Wheel


def milliseconds(run: Callable[[], object], prepare: Callable[[], object], repeat: int) -> float:
    """The median over `repeat` runs, each after `prepare`."""
    times = []
    for _ in range(repeat):
        prepare()
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3


def measure(wheel: Wheel, member: str, repeat: int) -> dict[str, float]:
    sha256, name = wheel.record[member].sha256, member.rpartition("/")[2]
    path = cache.object_path(sha256, name)
    cold = max(repeat // 10, 3)

    def nothing() -> None: ...

    def stamp_gone() -> None:
        cache.stamp_path(path).unlink(missing_ok=True)

    def find() -> None:
        assert cache.find(sha256, name) == path

    first = milliseconds(lambda: wheel.extract(member), nothing, 1)
    return {
        "first extraction, with its imports": first,
        "extraction": milliseconds(lambda: wheel.extract(member), path.unlink, cold),
        "find, by the stamp": milliseconds(find, nothing, repeat),
        "find, paranoid": milliseconds(
            lambda: cache.find(sha256, name, paranoid=True), nothing, repeat
        ),
        "find, hashed and stamped again": milliseconds(find, stamp_gone, repeat),
        "find, not there": milliseconds(lambda: cache.find("0" * 64, name), nothing, repeat),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--member", default="norm.so", help="the end of a member's name")
    parser.add_argument("--repeat", type=int, default=200)
    parser.add_argument("--folder", help="where the temporary cache is made")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    wheel = Wheel(arguments.wheel)
    member = next(name for name in wheel.members if name.endswith(arguments.member))
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        os.environ["FI_FFI_CACHE_DIR"] = f"{folder}/cache"
        found = measure(wheel, member, arguments.repeat)
    size = wheel.members[member]
    if arguments.json:
        print(json.dumps({"member": member, "size": size, "milliseconds": found}, indent=2))
        return
    print(f"{member}: {size:,} bytes")
    for what, value in found.items():
        print(f"{what:<36}{value:>10.3f} ms")


if __name__ == "__main__":
    main()
