"""One module of a large wheel on a server: by ranges, and by downloading all of it.

    python benchmarks/fetch.py WHEEL [--size 1e9] [--mbit 100] [--module norm]

WHEEL is any flashinfer_jit_cache wheel, such as `fi-ffi build norm` makes.  A copy of
it, filled up with modules of random bytes to the size of a published one, is served on
loopback, as fast as --mbit says (0: as fast as it goes).
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import mmap
import os
import random
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(SOURCE), str(SOURCE / "tests")]

from loader.server import File, Server  # noqa: E402

from fi_ffi.loader import cache  # noqa: E402

MODULE_BYTES = 1_070_000  # about 950 of them make 1 GB

CHILD = """
import json, sys, time
begun = time.perf_counter()
from fi_ffi.loader.fetch.download import fetch_file
from fi_ffi.loader.fetch.http import Client
from fi_ffi.loader.fetch.remote import RemoteWheel
from fi_ffi.loader.wheel import Wheel
how, url, name, sha256, record, member = sys.argv[1:]
client = Client()
if how == "whole":
    Wheel(fetch_file(url, name, sha256=sha256, client=client).path).extract(member)
else:
    RemoteWheel(url, sha256=sha256, record_sha256=record, client=client).extract(member)
print(json.dumps([client.moved, client.requests, time.perf_counter() - begun]))
"""


def padded(wheel: Path, folder: Path, size: int) -> Path:
    """A copy of the wheel, of that size, with RECORD telling of the added modules."""
    target = folder / wheel.name.replace("linux_", "manylinux_2_28_")
    rng = random.Random(0)
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as new:
        [record] = [n for n in old.namelist() if n.endswith(".dist-info/RECORD")]
        lines = old.read(record).decode()
        for info in old.infolist():
            if info.filename != record:
                new.writestr(info, old.read(info))
        number = 0
        while target.stat().st_size + MODULE_BYTES < size:
            module = f"module_{number}_with_a_name_about_as_long_as_those_of_attention_kernels"
            name = f"flashinfer_jit_cache/jit_cache/{module}/{module}.so"
            content = rng.randbytes(MODULE_BYTES)
            new.writestr(name, content, compress_type=zipfile.ZIP_STORED)
            raw = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=")
            lines += f"{name},sha256={raw.decode()},{len(content)}\n"
            number += 1
        new.writestr(record, lines)
    return target


def run(how: str, root: Path, *arguments: str) -> tuple[int, int, float]:
    environment = os.environ | {"FI_FFI_CACHE_DIR": str(root), "PYTHONPATH": str(SOURCE)}
    command = [sys.executable, "-c", CHILD, how, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    moved, requests, seconds = done.stdout.strip("[]\n").split(",")
    return int(moved), int(requests), float(seconds)


def measure(server: Server, wheel: Path, member: str, folder: Path) -> None:
    with wheel.open("rb") as file:
        sha256 = cache.hash_of(file)
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        [record] = [name for name in names if name.endswith(".dist-info/RECORD")]
        pinned = hashlib.sha256(archive.read(record)).hexdigest()
        compressed = archive.getinfo(member).compress_size
        index = wheel.stat().st_size - archive.getinfo(record).header_offset
    print(f"the wheel: {wheel.stat().st_size:,} bytes, {len(names)} members")
    print(f"{member}, compressed: {compressed:,}; directory and RECORD: {index:,}\n")
    other = next(name for name in names if "/module_" in name) if len(names) > 10 else member
    pins = (server.url(f"/{wheel.name}"), wheel.name, sha256, pinned)
    print("| what | bytes | requests | seconds |\n|---|---|---|---|")
    for how, what, root, wanted in (
        ("ranges", "by ranges, empty cache", "a", member),
        ("ranges", "the same again", "a", member),
        ("ranges", "another module after it", "a", other),
        ("whole", "the whole wheel, empty cache", "b", member),
    ):
        moved, requests, seconds = run(how, folder / root, *pins, wanted)
        print(f"| {what} | {moved:,} | {requests} | {seconds:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--size", type=float, default=1e9, help="bytes of the served wheel")
    parser.add_argument("--mbit", type=float, default=100, help="Mbit/s, 0 for no limit")
    parser.add_argument("--module", default="norm")
    given = parser.parse_args()
    member = f"flashinfer_jit_cache/jit_cache/{given.module}/{given.module}.so"
    with tempfile.TemporaryDirectory() as folder:
        begun = time.perf_counter()
        wheel = padded(given.wheel, Path(folder), int(given.size))
        print(f"made in {time.perf_counter() - begun:.0f} s; {given.mbit:.0f} Mbit/s", flush=True)
        with wheel.open("rb") as file, Server() as server:
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            server.files[f"/{wheel.name}"] = File(content)  # type: ignore[arg-type]
            server.bandwidth = given.mbit * 125_000 or None
            measure(server, wheel, member, Path(folder))


if __name__ == "__main__":
    main()
