"""When a cached file is hashed again, and when its stamp is enough."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fi_ffi.loader import cache, upkeep


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that were hashed."""
    seen: list[str] = []
    real = cache.hash_of

    def hash_of(file: Any) -> str:
        seen.append(os.readlink(f"/proc/self/fd/{file.fileno()}").rpartition("/")[2])
        return real(file)

    monkeypatch.setattr(cache, "hash_of", hash_of)
    return seen


def overwrite_in_place(path: Path) -> None:
    """Other content of the same size, with the modification time put back."""
    before = path.stat()
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.write(b"damaged")
    path.chmod(0o444)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_a_warm_find_hashes_nothing(sample: Any, hashed: list[str]) -> None:
    path = sample.store()
    assert sample.find() == path
    assert hashed == []


def test_paranoid_hashes_always(
    sample: Any, hashed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sample.store()
    assert sample.find(paranoid=True) == sample.path
    monkeypatch.setenv("FI_FFI_PARANOID", "1")
    assert sample.find() == sample.path
    assert hashed == ["norm.so"] * 2
    assert sample.find(paranoid=False) == sample.path
    assert hashed == ["norm.so"] * 2


@pytest.mark.parametrize(
    "change",
    [
        lambda path: cache.stamp_path(path).unlink(),
        lambda path: cache.stamp_path(path).write_bytes(b""),
        lambda path: cache.stamp_path(path).write_bytes(b"1 torn"),
        lambda path: os.utime(path),
        lambda path: path.chmod(0o400),
        lambda path: os.replace(_copy(path), path),
    ],
    ids=["no stamp", "an empty stamp", "a torn stamp", "touched", "another mode", "another inode"],
)
def test_a_change_is_hashed_once(
    change: Callable[[Path], object], sample: Any, hashed: list[str]
) -> None:
    path = sample.store()
    change(path)
    assert [sample.find() for _ in range(3)] == [path] * 3
    assert hashed == ["norm.so"]


def _copy(path: Path) -> Path:
    other = path.with_name("copy")
    other.write_bytes(path.read_bytes())
    return other


def test_damage_with_the_old_size_and_time_is_found(sample: Any, hashed: list[str]) -> None:
    path = sample.store()
    overwrite_in_place(path)
    assert path.stat().st_size == len(sample.content)
    assert sample.find() is None
    assert sample.find() is None
    assert sample.store().read_bytes() == sample.content


def test_a_file_written_while_it_is_hashed_gets_no_stamp(
    sample: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, real = sample.store(), cache.hash_of
    cache.stamp_path(path).unlink()

    def hash_of(file: Any) -> str:
        digest = real(file)
        overwrite_in_place(path)
        return digest

    monkeypatch.setattr(cache, "hash_of", hash_of)
    assert sample.find() == path
    assert not cache.stamp_path(path).exists()
    monkeypatch.setattr(cache, "hash_of", real)
    assert sample.find() is None


def test_a_stamp_that_is_a_pipe_is_not_waited_for(sample: Any) -> None:
    path = sample.store()
    cache.stamp_path(path).unlink()
    os.mkfifo(cache.stamp_path(path))
    assert sample.find() == path
    assert cache.stamp_path(path).is_file()


def test_the_last_use_is_noted_once_in_a_while(sample: Any) -> None:
    path = sample.store()
    stamp = cache.stamp_path(path)
    for ago, expected in ((cache.USE_GRAIN / 2, False), (cache.USE_GRAIN * 2, True)):
        then = time.time() - ago
        os.utime(stamp, (then, then))
        assert sample.find() == path
        assert (stamp.stat().st_mtime > then + 1) == expected
    (item,) = upkeep.items(sample.root, "object")
    assert abs(item.last_use - time.time()) < 60


def test_a_warm_find_takes_no_lock_and_writes_nothing(sample: Any) -> None:
    path = sample.store()

    def state() -> list[tuple[str, int]]:
        return sorted((str(p), p.lstat().st_mtime_ns) for p in sample.root.rglob("*"))

    for name in ("tmp", "locks"):
        for left in (sample.root / name).iterdir():
            left.unlink()
        (sample.root / name).rmdir()
    before = state()
    assert sample.find() == path
    assert state() == before
