"""Many processes on a cold cache, and processes killed while they extract.

A short version runs always; FI_FFI_STRESS=long runs 32 processes and 200 kills and
prints what happened (`pytest -s`).
"""

from __future__ import annotations

import collections
import os
import random
import signal
import statistics
import time

import pytest

from fi_ffi.loader import cache, upkeep
from fi_ffi.loader.wheel import Wheel

from tests.helpers.children import start
from tests.helpers.forking import fork, in_child, wait
from tests.helpers.stress_strength import LONG, scaled
from tests.loader.server import make_wheel

PROCESSES = scaled(32, 8)
KILLS = scaled(200, 20)
MEMBER_SIZE = 6 << 20
MEMBER = "flashinfer_jit_cache/jit_cache/big/big.so"

# Extracts a member and says where it is; every time that the source is really read,
# a line is added to the log.
EXTRACT = """
import os, sys
from pathlib import Path
from fi_ffi.loader import cache
from fi_ffi.loader.wheel import Wheel

wheel, member, log = sys.argv[1:]
store = cache.store

def logged(chunks):
    with open(log, "a") as file:
        file.write(f"{os.getpid()}\\n")
    yield from chunks

cache.store = lambda chunks, *rest, **more: store(logged(chunks), *rest, **more)
print("ready", flush=True)
sys.stdin.read()
path = Wheel(Path(wheel)).extract(member)
print(path.stat().st_ino, cache.hash_of(path.open("rb")), flush=True)
"""


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("FI_FFI_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("FI_FFI_PARANOID", raising=False)
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def big_wheel(tmp_path_factory):
    """A wheel with a member of some MB that is work to decompress."""
    path = tmp_path_factory.mktemp("big") / "flashinfer_jit_cache-1+cu130-py3-none-any.whl"
    noise = random.Random(7)
    content = b"".join(noise.randbytes(32) * 4 for _ in range(MEMBER_SIZE // 128))
    path.write_bytes(make_wheel({MEMBER: content}))
    return path


def say(text):
    if LONG:
        print(f"\n{text}")


def test_processes_on_a_cold_cache_extract_once(root, tmp_path, big_wheel):
    recorded, log = Wheel(big_wheel).record[MEMBER], tmp_path / "log"
    children = [start(EXTRACT, str(big_wheel), MEMBER, str(log)) for _ in range(PROCESSES)]
    for child in children:
        assert child.stdout.readline() == "ready\n"
    begun = time.perf_counter()
    for child in children:
        child.stdin.close()
        child.stdin = None
    answers = {child.communicate(timeout=120) for child in children}
    seconds = time.perf_counter() - begun
    inode = cache.object_path(recorded.sha256, "big.so").stat().st_ino
    assert answers == {(f"{inode} {recorded.sha256}\n", "")}
    assert len(log.read_text().split()) == 1
    assert os.listdir(root / "tmp") == []
    say(f"{PROCESSES} processes, {recorded.size:,} bytes: 1 extraction, {seconds:.2f} s")


def test_kills_leave_what_the_next_start_repairs(big_wheel, root):
    recorded = Wheel(big_wheel).record[MEMBER]
    path = cache.object_path(recorded.sha256, "big.so")
    seed = time.time_ns()
    print(f"seed {seed}")
    chance = random.Random(seed)

    def extract():
        assert Wheel(big_wheel).extract(MEMBER) == path

    def whole():
        """A start: the right bytes, whatever was left."""
        extract()
        with path.open("rb") as file:
            assert cache.hash_of(file) == recorded.sha256

    def seconds():
        begun = time.perf_counter()
        assert in_child(extract) == 0
        path.unlink()  # cold again, its folders and stamp as they were left
        return time.perf_counter() - begun

    took = statistics.median(seconds() for _ in range(5))
    begun, met, number = time.perf_counter(), collections.Counter(), 0
    # As long as chance wants to have met a share of them while they write.
    while number < KILLS or met["while writing"] < KILLS / 20:
        number += 1
        assert number <= 20 * KILLS, met
        # Every other victim has company, which then has to take over.
        others = [fork(whole)] if number % 2 else []
        before = temporaries(root)
        victim = fork(extract)
        time.sleep(chance.uniform(0, 1.1 * took * (1 + len(others))))
        os.kill(victim, signal.SIGKILL)
        code = wait(victim)
        assert code in (0, -signal.SIGKILL)
        assert [wait(other) for other in others] == [0] * len(others)
        was_writing = temporaries(root) - before
        met["after the end" if code == 0 else "while writing" if was_writing else "else"] += 1
        assert in_child(whole) == 0
        path.unlink()
    say(f"{number} kills in {time.perf_counter() - begun:.1f} s, one takes {took * 1e3:.0f} ms")
    say(f"met: {dict(met)}; left: {sum(i.size for i in upkeep.items(root, 'leftover')):,} bytes")
    left = temporaries(root)
    assert len(left) >= met["while writing"]
    # A start removes half of them, old enough; a prune the others at once.
    old, half = time.time() - cache.ORPHAN_AGE - 1, {*sorted(left)[: len(left) // 2]}
    for name in half:
        os.utime(root / "tmp" / name, (old, old))
    assert in_child(whole) == 0
    assert temporaries(root) == left - half
    upkeep.prune(upkeep.items(root, "leftover"), root)
    assert temporaries(root) == set()
    assert [verdict.problem for verdict in upkeep.verify(root)] == [""]


def temporaries(root):
    return {*os.listdir(root / "tmp")} if (root / "tmp").exists() else set()
