"""Many processes on a cold cache, and processes killed while they extract.

A short version runs always; FI_FFI_STRESS=long runs 32 processes and 200 kills and
prints what happened (`pytest -s`).
"""

from __future__ import annotations

import base64
import collections
import hashlib
import os
import random
import signal
import statistics
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from fi_ffi.loader import cache, upkeep
from fi_ffi.loader.wheel import Wheel

from tests.helpers.forking import fork, in_child, wait
from tests.helpers.stress_strength import LONG, scaled

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
    digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
    record = "flashinfer_jit_cache-1+cu130.dist-info/RECORD"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(MEMBER, content)
        archive.writestr(record, f"{MEMBER},sha256={digest},{len(content)}\n{record},,\n")
    return path


def _say(text):
    if LONG:
        print(f"\n{text}")


def _norm(wheel):
    return next(name for name in Wheel(wheel).members if name.endswith("/norm.so"))


@pytest.mark.parametrize("which", ["norm", "big"])
def test_processes_on_a_cold_cache_extract_once(which, root, tmp_path, request):
    wheel: Path = request.getfixturevalue("built_wheel" if which == "norm" else "big_wheel")
    member = _norm(wheel) if which == "norm" else MEMBER
    recorded = Wheel(wheel).record[member]
    log = tmp_path / "log"
    command = [sys.executable, "-c", EXTRACT, str(wheel), member, str(log)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    children = [subprocess.Popen(command, **pipes) for _ in range(PROCESSES)]  # type: ignore[call-overload]
    for child in children:
        assert child.stdout.readline() == "ready\n"
    start = time.perf_counter()
    for child in children:
        child.stdin.close()
    answers = [child.stdout.readline().split() for child in children]
    seconds = time.perf_counter() - start
    assert [child.wait() for child in children] == [0] * PROCESSES
    for child in children:
        child.stdout.close()
    inode = cache.object_path(recorded.sha256, member.rpartition("/")[2]).stat().st_ino
    assert answers == [[str(inode), recorded.sha256]] * PROCESSES
    extractions = len(log.read_text().split())
    assert extractions == 1
    assert os.listdir(root / "tmp") == []
    _say(
        f"{PROCESSES} processes, {recorded.size:,} bytes: {extractions} extraction, {seconds:.2f} s"
    )


def test_kills_leave_what_the_next_start_repairs(big_wheel, root):
    recorded = Wheel(big_wheel).record[MEMBER]
    path = cache.object_path(recorded.sha256, "big.so")
    chance = random.Random(time.time_ns())

    def extract():
        assert Wheel(big_wheel).extract(MEMBER) == path

    def start():
        """A start: the right bytes, whatever was left."""
        extract()
        with path.open("rb") as file:
            assert cache.hash_of(file) == recorded.sha256

    took = statistics.median(_seconds(extract, path) for _ in range(5))
    begun, met, number = time.perf_counter(), collections.Counter[str](), 0
    # As long as chance wants to have met a share of them while they write.
    while number < KILLS or met["while writing"] < KILLS / 20:
        number += 1
        assert number <= 20 * KILLS, met
        # Every other victim has company, which then has to take over.
        others = [fork(start)] if number % 2 else []
        before = {*temporaries(root)}
        victim = fork(extract)
        time.sleep(chance.uniform(0, 1.1 * took * (1 + len(others))))
        os.kill(victim, signal.SIGKILL)
        code = wait(victim)
        assert [wait(other) for other in others] == [0] * len(others)
        met[_state(code, {*temporaries(root)} - before, path, bool(others))] += 1
        assert in_child(start) == 0
        _forget(path)
    seconds = time.perf_counter() - begun
    _say(
        f"{number} kills in {seconds:.1f} s, extraction takes {took * 1e3:.0f} ms; met: {dict(met)}"
    )
    left = os.listdir(root / "tmp")
    assert len(left) >= met["while writing"]
    size = sum(item.size for item in upkeep.items(root, "leftover"))
    _say(f"{len(left)} temporaries left of {size:,} bytes")
    _check_cleaning(left, root, start)


def _seconds(extract, path):
    begun = time.perf_counter()
    assert in_child(extract) == 0  # type: ignore[arg-type]
    seconds = time.perf_counter() - begun
    _forget(path)
    return seconds


def _forget(path):
    """Make the cache cold again, its folders and stamp as they were left."""
    path.unlink()


def temporaries(root):
    return os.listdir(root / "tmp") if (root / "tmp").exists() else []


def _state(code, left, path, had_company):
    """What the victim was at when it was killed; `left` are its temporaries."""
    if code == 0:
        return "after the end"
    assert code == -signal.SIGKILL
    if left:
        return "while writing"
    return "before or after" if had_company else "after naming" if path.exists() else "before"


def _check_cleaning(left, root, start):
    """A start removes half of them, old enough; a prune the others at once."""
    old = time.time() - cache.ORPHAN_AGE - 1
    half = left[: len(left) // 2]
    for name in half:
        os.utime(root / "tmp" / name, (old, old))
    assert in_child(start) == 0  # type: ignore[arg-type]
    assert set(os.listdir(root / "tmp")) == set(left) - set(half)
    upkeep.prune(upkeep.items(root, "leftover"), root)
    assert os.listdir(root / "tmp") == []
    assert [verdict.problem for verdict in upkeep.verify(root)] == [""]
