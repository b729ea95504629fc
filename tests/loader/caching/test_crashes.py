"""Full disks, processes killed at every step, and what they leave."""

from __future__ import annotations

import contextlib
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
from pathlib import Path

import filelock
import pytest
from click.testing import CliRunner

from fi_ffi.cli import main, upkeep
from fi_ffi.errors import LoaderError
from fi_ffi.loader import cache

from tests.helpers.forking import fork, in_child, wait


def failing(number):
    """A function of the system that fails."""

    def fail(*arguments, **options):
        raise OSError(number, os.strerror(number))

    return fail


def leftovers(sample):
    return upkeep.items(sample.root, "leftover")


@contextlib.contextmanager
def held(what):
    """The id of a child that is inside `what()`, and stays there until it is killed."""
    reader, writer = os.pipe()

    def hold():
        with what():
            os.write(writer, b".")
            time.sleep(600)

    pid = fork(hold)
    try:
        os.read(reader, 1)
        yield pid
    finally:
        os.kill(pid, signal.SIGKILL)
        assert wait(pid) == -signal.SIGKILL
        os.close(reader)
        os.close(writer)


def test_a_full_disk(sample, small_disk):
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
    assert "fi-ffi cache prune" in text and "FI_FFI_CACHE_DIR" in text
    assert sample.temporaries() == upkeep.items(sample.root, "object") == []
    assert cache.find(sha256, "big.so") is None
    assert type(sample)(sample.root, b"small enough").store().read_bytes() == b"small enough"


def test_a_file_that_may_not_get_so_large(sample):
    def child():
        resource.setrlimit(resource.RLIMIT_FSIZE, (70_000, 70_000))
        with pytest.raises(LoaderError, match=r"File too large. at least 102,400 bytes"):
            sample.store()
        assert sample.temporaries() == []
        assert sample.find() is None

    assert in_child(child) == 0
    assert sample.store() == sample.find()


def _damage(sample):
    path = sample.store()
    path.chmod(0o644)
    path.write_bytes(b"damaged")


def _kill_at(step, root):
    """Kill this process right before its `step`th use of a file or folder of the cache."""
    seen, within = 0, str(root)

    def hook(event, arguments):
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
def test_a_process_killed_at_every_step(prepare, sample):
    def victim(step):
        _kill_at(step, sample.root)
        sample.store()

    def next_start():
        assert sample.store().read_bytes() == sample.content
        assert sample.find() == sample.find(paranoid=True) == sample.path

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
        upkeep.prune(leftovers(sample), sample.root)
        assert sample.temporaries() == []
        upkeep.prune(upkeep.items(sample.root, "object"), sample.root)
        prepare(sample)
    assert code == 0
    assert ended > 20  # steps
    assert left == {0, 1}


def test_a_cold_start_sweeps_what_ended_processes_left(sample):
    def victim():
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


def test_what_a_running_process_writes_stays_however_old(sample):
    with held(cache.temporary) as pid:
        (name,) = sample.temporaries()
        os.utime(sample.root / "tmp" / name, (0, 0))
        sample.store()
        upkeep.prune(leftovers(sample), sample.root)
        assert sample.temporaries() == [name]
        os.kill(pid, signal.SIGKILL)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        assert len(leftovers(sample)) == 1  # not waited for: a zombie has ended too


@pytest.mark.parametrize(("days", "expected"), [(6.9, 0), (7.1, 1)])
def test_those_of_other_machines_stay_for_a_week(days, expected, sample):
    sample.store()
    name = f"{'0' * 16}.1.1.{'0' * 16}"
    written = time.time() - days * 86400
    for left in (name, "tmpabcdefgh", "not-ours"):
        (sample.root / "tmp" / left).write_bytes(b"x")
        os.utime(sample.root / "tmp" / left, (written, written))
    found = {item.name for item in leftovers(sample)}
    assert found == ({name, "tmpabcdefgh"} if expected else set())


def test_without_locks_only_age_tells(sample, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", failing(errno.ENOLCK))
    sample.store()
    left = cache.new_path(sample.root / "tmp")
    left.touch()
    for days, expected in ((0, 0), (6.9, 0), (7.1, 1)):
        then = time.time() - days * 86400
        os.utime(left, (then, then))
        assert len(leftovers(sample)) == expected


def test_leftovers_of_a_clock_that_was_wrong(sample):
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


def test_two_threads_store_once(sample):
    made = []

    def chunks():
        made.append(1)
        time.sleep(0.1)
        yield sample.content

    def store():
        cache.store(chunks(), sample.sha256, sample.name, "a test")

    threads = [threading.Thread(target=store) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [1]
    assert sample.find() == sample.path


def test_a_holder_that_is_stopped_holds_nobody_up_for_ever(sample, monkeypatch):
    with held(lambda: cache.fill_lock(sample.sha256, sample.name)):
        monkeypatch.setattr(cache, "PATIENCE", 0.2)
        start = time.monotonic()
        assert sample.store().read_bytes() == sample.content
        assert time.monotonic() - start >= 0.2


def test_who_waited_in_vain_does_not_wait_again(sample, monkeypatch):
    """Storing, inside the wait for it, is the same wait."""
    with held(lambda: cache.fill_lock(sample.sha256, sample.name)):
        monkeypatch.setattr(cache, "PATIENCE", 1.0)
        start = time.monotonic()
        with cache.fill_lock(sample.sha256, sample.name) as found:
            assert found is None
            assert sample.store().read_bytes() == sample.content
        assert 1.0 <= time.monotonic() - start < 1.8


def _no_locks(*arguments, **options):
    raise NotImplementedError


WITHOUT = {
    "locks": (filelock.FileLock, "acquire", failing(errno.ENOLCK)),
    "locks at all": (filelock.FileLock, "acquire", _no_locks),
    "hard links": (os, "link", failing(errno.EPERM)),
    "hard links here": (os, "link", failing(errno.EOPNOTSUPP)),
}


@pytest.mark.parametrize("what", WITHOUT)
def test_file_systems_without(what, sample, monkeypatch):
    monkeypatch.setattr(*WITHOUT[what])
    assert sample.store().read_bytes() == sample.content
    assert sample.find() == sample.path


def test_a_good_file_is_never_replaced(sample, monkeypatch):
    """Not even by a process that sees no locks and does not see the file, as on NFS."""
    path = sample.store()
    before = path.stat().st_ino
    real, asked = cache.find, []

    def find(*arguments, **how):
        asked.append(arguments)
        return None if len(asked) < 3 else real(*arguments, **how)

    monkeypatch.setattr(cache, "find", find)
    assert sample.store() == path
    assert len(asked) == 3
    assert path.stat().st_ino == before
    assert sample.temporaries() == []


def test_a_stale_handle_is_asked_again(sample, monkeypatch):
    path, real, failures = sample.store(), os.lstat, [errno.ESTALE] * 2

    def lstat(where, **how):
        if str(where) == str(path) and failures:
            raise OSError(failures.pop(), "Stale file handle")
        return real(where, **how)

    monkeypatch.setattr(os, "lstat", lstat)
    assert sample.find() == path
    assert failures == []


def test_a_prune_between_making_the_folder_and_naming_the_file(sample, monkeypatch):
    real, pruned = os.link, []

    def link(source, path):
        if not pruned:
            pruned.append(1)
            Path(path).parent.rmdir()
        real(source, path)

    monkeypatch.setattr(os, "link", link)
    assert sample.store().read_bytes() == sample.content
    assert pruned


def test_who_waits_for_a_process_that_is_killed_takes_over(sample):
    """Two of a cold cache do not both extract; nor does the second wait for ever."""
    with held(lambda: cache.fill_lock(sample.sha256, sample.name)) as pid:
        waiting = fork(sample.store)
        time.sleep(0.3)
        assert os.waitid(os.P_PID, waiting, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
        os.kill(pid, signal.SIGKILL)
        assert wait(waiting) == 0
    assert sample.find() == sample.path
