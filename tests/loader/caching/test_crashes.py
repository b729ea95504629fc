"""Full disks, processes killed at every step, and what they leave."""

from __future__ import annotations

import errno
import fcntl
import functools
import hashlib
import os
import re
import resource
import secrets
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from fi_ffi.cli import main
from fi_ffi.errors import LoaderError
from fi_ffi.loader import cache, upkeep

from tests.helpers.forking import fork, in_child, wait


def test_a_full_disk(sample: Any, small_disk: Path) -> None:
    content = secrets.token_bytes(200_000)
    sha256 = hashlib.sha256(content).hexdigest()
    pieces = [content[at : at + 10_000] for at in range(0, len(content), 10_000)]
    with pytest.raises(LoaderError) as caught:
        cache.store(pieces, sha256, "big.so", "a test", size=len(content))
    text = str(caught.value)
    assert str(cache.object_path(sha256, "big.so")) in text
    assert "No space left on device. 200,000 bytes are needed and" in text
    free = int(re.findall(r"and ([\d,]+) are free", text)[0].replace(",", ""))
    assert free < 65536
    assert "fi-ffi cache prune" in text
    assert "FI_FFI_CACHE_DIR" in text
    assert sample.temporaries() == []
    assert upkeep.items(sample.root, "object") == []
    assert cache.find(sha256, "big.so") is None
    small = b"small enough"
    digest = hashlib.sha256(small).hexdigest()
    assert cache.store([small], digest, "small.so", "a test").read_bytes() == small


def test_a_file_that_may_not_get_so_large(sample: Any) -> None:
    def child() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (70_000, 70_000))
        with pytest.raises(LoaderError, match=r"File too large. at least 102,400 bytes"):
            sample.store()
        assert sample.temporaries() == []
        assert sample.find() is None

    assert in_child(child) == 0
    assert sample.store() == sample.find()


def _damage(sample: Any) -> None:
    path = sample.store()
    path.chmod(0o644)
    path.write_bytes(b"damaged")


def _kill_at(step: int, root: Path) -> None:
    """Kill this process right before its `step`th use of a file or folder of the cache."""
    seen = 0
    within = str(root)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        # What is done to an open file (fchmod) has its number in place of a path.
        if event in ("open", "os.chmod", "os.utime") or event.startswith(("os.", "shutil.")):
            named = [a for a in arguments if isinstance(a, str | bytes | Path)]
            if any(within in os.fsdecode(a) for a in named) or event == "os.chmod":
                seen += 1
                if seen == step:
                    os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


@pytest.mark.parametrize("prepare", [lambda sample: None, _damage], ids=["cold", "damaged"])
def test_a_process_killed_at_every_step(prepare: Callable[[Any], None], sample: Any) -> None:
    def victim(step: int) -> None:
        _kill_at(step, sample.root)
        sample.store()

    def next_start() -> None:
        assert sample.store().read_bytes() == sample.content
        assert sample.find() == sample.path
        assert sample.find(paranoid=True) == sample.path

    prepare(sample)
    ended, left = 0, set()
    for step in range(1, 200):
        code = in_child(functools.partial(victim, step))
        if code == 0:
            break
        assert code == -signal.SIGKILL
        ended += 1
        left.add(len(sample.temporaries()))
        assert in_child(next_start) == 0
        upkeep.prune(upkeep.items(sample.root, "leftover"), sample.root)
        assert sample.temporaries() == []
        upkeep.prune(upkeep.items(sample.root, "object"), sample.root)
        prepare(sample)
    assert code == 0
    assert ended > 20  # steps
    assert left == {0, 1}


def test_a_cold_start_sweeps_what_ended_processes_left(sample: Any) -> None:
    def victim() -> None:
        with cache.temporary() as new:
            os.write(new.fd, b"half")
            os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(victim) == -signal.SIGKILL
    (left,) = sample.temporaries()
    sample.store()
    assert sample.temporaries() == [left]  # not yet: it could be on its way
    sample.path.unlink()
    old = time.time() - cache.ORPHAN_AGE - 1
    os.utime(sample.root / "tmp" / left, (old, old))
    sample.store()
    assert sample.temporaries() == []


def test_what_a_running_process_writes_stays_however_old(sample: Any) -> None:
    reader, writer = os.pipe()

    def slow() -> None:
        with cache.temporary():
            os.write(writer, b".")
            time.sleep(600)

    pid = fork(slow)
    try:
        os.read(reader, 1)
        (name,) = sample.temporaries()
        os.utime(sample.root / "tmp" / name, (0, 0))
        sample.store()
        upkeep.prune(upkeep.items(sample.root, "leftover"), sample.root)
        assert sample.temporaries() == [name]
        os.kill(pid, signal.SIGKILL)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        assert (
            len(upkeep.items(sample.root, "leftover")) == 1
        )  # not waited for: a zombie has ended too
    finally:
        assert wait(pid) == -signal.SIGKILL
        os.close(reader)
        os.close(writer)


@pytest.mark.parametrize(("days", "expected"), [(6.9, 0), (7.1, 1)])
def test_those_of_other_machines_stay_for_a_week(days: float, expected: int, sample: Any) -> None:
    sample.store()
    name = f"{'0' * 16}.1.1.{'0' * 16}"
    written = time.time() - days * 86400
    for left in (name, "tmpabcdefgh", "not-ours"):
        (sample.root / "tmp" / left).write_bytes(b"x")
        os.utime(sample.root / "tmp" / left, (written, written))
    found = {item.name for item in upkeep.items(sample.root, "leftover")}
    assert found == ({name, "tmpabcdefgh"} if expected else set())


def test_without_locks_only_age_tells(sample: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(fd: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    sample.store()
    left = cache.new_path(sample.root / "tmp")
    left.touch()
    for days, expected in ((0, 0), (6.9, 0), (7.1, 1)):
        then = time.time() - days * 86400
        os.utime(left, (then, then))
        assert len(upkeep.items(sample.root, "leftover")) == expected


def test_leftovers_of_a_clock_that_was_wrong(sample: Any) -> None:
    """Dated to a time to come, as no date can have it: they are listed, and removed."""
    sample.store()
    left = cache.new_path(sample.root / "tmp")
    for then in (time.time() + 400 * 86400, 8e9, -1e9):
        left.touch()
        os.utime(left, (then, then))
        os.utime(cache.stamp_path(sample.path), (then, then))
        for command in ("list", "prune"):
            result = CliRunner().invoke(main, ["cache", command])
            assert result.exit_code == 0, result.output
        assert sample.temporaries() == []
    left.touch()
    os.utime(left, (8e9, 8e9))
    sample.path.unlink()
    sample.store()  # a cold start removes it too
    assert sample.temporaries() == []


def test_two_threads_store_once(sample: Any) -> None:
    made = []

    def chunks() -> Any:
        made.append(1)
        time.sleep(0.1)
        yield sample.content

    def store() -> None:
        cache.store(chunks(), sample.sha256, sample.name, "a test")

    threads = [threading.Thread(target=store) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [1]
    assert sample.find() == sample.path


def test_a_holder_that_is_stopped_holds_nobody_up_for_ever(
    sample: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, writer = os.pipe()

    def hold() -> None:
        with cache.filling(sample.sha256, sample.name):
            os.write(writer, b".")
            time.sleep(600)

    pid = fork(hold)
    try:
        os.read(reader, 1)
        monkeypatch.setattr(cache, "PATIENCE", 0.2)
        start = time.monotonic()
        assert sample.store().read_bytes() == sample.content
        assert time.monotonic() - start >= 0.2
    finally:
        os.kill(pid, signal.SIGKILL)
        wait(pid)
        os.close(reader)
        os.close(writer)


@pytest.mark.parametrize("problem", [OSError(errno.ENOLCK, "No locks"), NotImplementedError()])
def test_without_locks(problem: Exception, sample: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import filelock

    def acquire(self: object, **options: object) -> None:
        raise problem

    monkeypatch.setattr(filelock.FileLock, "acquire", acquire)
    assert sample.store().read_bytes() == sample.content


@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP])
def test_without_hard_links(number: int, sample: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(*arguments: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", link)
    assert sample.store().read_bytes() == sample.content
    assert sample.find() == sample.path


def test_a_good_file_is_never_replaced(sample: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even by a process that sees no locks and does not see the file, as on NFS."""
    path = sample.store()
    before = path.stat().st_ino
    real, asked = cache.find, []

    def find(*arguments: Any, **how: Any) -> Path | None:
        asked.append(arguments)
        return None if len(asked) < 3 else real(*arguments, **how)

    monkeypatch.setattr(cache, "find", find)
    assert sample.store() == path
    assert len(asked) == 3
    assert path.stat().st_ino == before
    assert sample.temporaries() == []


def test_a_stale_handle_is_asked_again(sample: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path, real, failures = sample.store(), os.lstat, [errno.ESTALE] * 2

    def lstat(where: Any, **how: Any) -> os.stat_result:
        if str(where) == str(path) and failures:
            raise OSError(failures.pop(), "Stale file handle")
        return real(where, **how)

    monkeypatch.setattr(os, "lstat", lstat)
    assert sample.find() == path
    assert failures == []


def test_a_prune_between_making_the_folder_and_naming_the_file(
    sample: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, pruned = os.link, []

    def link(source: Any, path: Any) -> None:
        if not pruned:
            pruned.append(1)
            Path(path).parent.rmdir()
        real(source, path)

    monkeypatch.setattr(os, "link", link)
    assert sample.store().read_bytes() == sample.content
    assert pruned
