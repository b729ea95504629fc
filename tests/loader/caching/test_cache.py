"""Files under the hash of their content: found, made once, and hashed again when in doubt."""

from __future__ import annotations

import os
import stat
import subprocess
import time
from pathlib import Path

import pytest

from fi_ffi.cli import upkeep
from fi_ffi.errors import ArtifactError, LoaderError
from fi_ffi.loader import cache

from tests.helpers.children import start
from tests.helpers.forking import in_child

OTHER = 54321


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def test_where_it_is(sample, monkeypatch):
    assert cache.cache_root() == sample.root
    monkeypatch.setenv("FI_FFI_CACHE_DIR", "~/elsewhere")
    assert cache.cache_root() == Path.home() / "elsewhere"
    monkeypatch.setenv("XDG_CACHE_HOME", str(sample.root / "xdg"))
    monkeypatch.setenv("FI_FFI_CACHE_DIR", "")
    assert cache.cache_root() == sample.root / "xdg" / "fi-ffi"
    monkeypatch.delenv("FI_FFI_CACHE_DIR")
    assert cache.cache_root() == sample.root / "xdg" / "fi-ffi"


def test_store_and_find(sample):
    assert sample.find() is None
    assert not sample.root.exists()  # asking makes nothing
    path = sample.store()
    assert path == sample.path == sample.find() == sample.store()
    assert path.is_relative_to(sample.root)
    assert path.read_bytes() == sample.content
    assert sample.files() == [path]
    # Two modules may be one file; each is found under its own name.
    other = sample.store(name="b.so")
    assert (cache.find(sample.sha256, "b.so"), sample.find()) == (other, path)


def test_a_file_that_is_written_in_parts(sample, short_writes):
    chunks = [sample.content[:5], b"", sample.content[5:3000], sample.content[3000:]]
    path = cache.store(iter(chunks), sample.sha256, sample.name, "a test")
    assert path.read_bytes() == sample.content
    assert cache.find(sample.sha256, sample.name, paranoid=True) == path
    assert sample.files() == [path]


ASTRAY = [("0" * 64, name) for name in ("", ".", "..", "a/b.so", "/a.so", ".stamp", "a\0b")]


@pytest.mark.parametrize("key", [*ASTRAY, ("../../etc", "a"), ("A" * 64, "a"), ("", "a")])
def test_no_name_leads_out_of_the_cache(key, sample):
    for use in (cache.object_path, cache.find, lambda *key: cache.store([b"a"], *key, "a test")):
        with pytest.raises(ArtifactError, match="not a sha256 and a file name"):
            use(*key)
    assert not sample.root.exists()


def test_a_name_of_255_bytes(sample):
    name = "m" * 252 + ".so"
    assert cache.find(sample.sha256, name) is None
    path = sample.store(name=name)
    assert cache.find(sample.sha256, name) == path
    assert cache.stamp_path(path).exists()


def test_filling_gives_the_file_or_the_turn(sample):
    with cache.fill_lock(sample.sha256, sample.name) as found:
        assert found is None
        path = sample.store()  # the same thread's, so it does not wait for itself
    with cache.fill_lock(sample.sha256, sample.name) as found:
        assert found == path

    def chunks():
        raise AssertionError("the source is read where the file is there")
        yield b""

    assert cache.store(chunks(), sample.sha256, sample.name, "a test") == path


def test_a_wrong_hash_leaves_nothing_behind(sample):
    wrong = "0" * 64
    with pytest.raises(ArtifactError, match=f"a test: sha256 is {sample.sha256}, expected {wrong}"):
        sample.store(wrong)
    assert sample.files() == []
    assert cache.find(wrong, sample.name) is None


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_source_that_fails_leaves_nothing_behind(sample, error):
    def chunks():
        yield sample.content
        raise error("half way")

    with pytest.raises(error, match="half way"):
        cache.store(chunks(), sample.sha256, sample.name, "a test")
    assert sample.files() == []


@pytest.mark.parametrize("damage", [lambda c: c[:-1], lambda c: b"", lambda c: b"!" + c[1:]])
def test_a_damaged_file_is_not_found_and_is_repaired(damage, sample):
    path = sample.store()
    path.chmod(0o644)
    path.write_bytes(damage(sample.content))
    assert sample.find() is None
    assert sample.store() == path == sample.find()
    assert path.read_bytes() == sample.content
    assert mode(path) == 0o444


@pytest.mark.parametrize("obstacle", ["", "tmp", "objects", "objects/{0:.2}/{0}"])
def test_a_cache_that_cannot_be_written(sample, obstacle):
    """A file where a folder must be: unlike permissions, it stops root too."""
    path = sample.root / obstacle.format(sample.sha256)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("in the way")
    with pytest.raises(LoaderError, match="cannot be written|is a file") as caught:
        sample.store()
    assert str(sample.root) in str(caught.value)
    assert "FI_FFI_CACHE_DIR" in str(caught.value)
    assert path.read_text() == "in the way"


CHILD = """
import sys
from fi_ffi.loader import cache

sha256 = sys.argv[1]
print("ready", flush=True)
sys.stdin.readline()
for _ in range(20):
    path = cache.store((b"%1024d" % i for i in range(512)), sha256, "norm.so", "a test")
    assert path.stat().st_size == 512 * 1024
    assert cache.find(sha256, "norm.so") == path  # whole at every moment
print(path)
"""


def test_processes_at_the_same_time(sample):
    whole = type(sample)(sample.root, b"".join(b"%1024d" % i for i in range(512)))
    children = [start(CHILD, whole.sha256) for _ in range(4)]
    for child in children:
        assert child.stdout.readline() == "ready\n"
    for child in children:
        child.stdin.write("go\n")
        child.stdin.flush()
    for child in children:
        assert child.communicate(timeout=60) == (f"{whole.path}\n", "")
        assert child.returncode == 0
    assert sample.files() == [whole.path] == [whole.find()]


def test_adopting_a_finished_file(sample):
    source = sample.root / "downloads" / "a.part"
    inodes = set()
    for _ in range(2):  # the second finds a good one, which stays
        source.parent.mkdir(parents=True, exist_ok=True)
        source.write_bytes(sample.content)
        path = cache.adopt(source, sample.sha256, sample.name)
        inodes.add(path.stat().st_ino)
        assert not source.exists()
        assert sample.find() == path
        assert cache.stamp_path(path).exists()
        assert mode(path) == 0o444
    assert len(inodes) == 1
    with pytest.raises(LoaderError, match="cannot be written"):
        cache.adopt(source, sample.sha256, sample.name)


@pytest.fixture
def hashed(monkeypatch):
    """The names of the files that were hashed."""
    seen, real = [], cache.hash_of

    def hash_of(file):
        seen.append(os.readlink(f"/proc/self/fd/{file.fileno()}").rpartition("/")[2])
        return real(file)

    monkeypatch.setattr(cache, "hash_of", hash_of)
    return seen


def overwrite_in_place(path):
    """Other content of the same size, with the modification time put back."""
    before = path.stat()
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.write(b"damaged")
    path.chmod(0o444)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_paranoid_hashes_always(sample, hashed, monkeypatch):
    assert sample.store() == sample.find()
    assert hashed == []
    assert sample.find(paranoid=True) == sample.path
    monkeypatch.setenv("FI_FFI_PARANOID", "1")
    assert sample.find() == sample.path
    assert hashed == ["norm.so"] * 2
    assert sample.find(paranoid=False) == sample.path
    assert hashed == ["norm.so"] * 2


def _copied(path):
    other = path.with_name("copy")
    other.write_bytes(path.read_bytes())
    os.replace(other, path)


def _pipe(path):
    cache.stamp_path(path).unlink()
    os.mkfifo(cache.stamp_path(path))  # which is not waited for


CHANGES = {
    "no stamp": lambda path: cache.stamp_path(path).unlink(),
    "an empty stamp": lambda path: cache.stamp_path(path).write_bytes(b""),
    "a torn stamp": lambda path: cache.stamp_path(path).write_bytes(b"1 torn"),
    "a pipe for a stamp": _pipe,
    "touched": os.utime,
    "another mode": lambda path: path.chmod(0o400),
    "another inode": _copied,
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_hashed_once(change, sample, hashed):
    path = sample.store()
    CHANGES[change](path)
    assert [sample.find() for _ in range(3)] == [path] * 3
    assert hashed == ["norm.so"]
    assert cache.stamp_path(path).is_file()


def test_damage_with_the_old_size_and_time_is_found(sample):
    path = sample.store()
    overwrite_in_place(path)
    assert path.stat().st_size == len(sample.content)
    assert sample.find() is None
    assert sample.find() is None
    assert sample.store().read_bytes() == sample.content


def test_a_file_written_while_it_is_hashed_gets_no_stamp(sample, monkeypatch):
    path, real = sample.store(), cache.hash_of
    cache.stamp_path(path).unlink()

    def hash_of(file):
        digest = real(file)
        overwrite_in_place(path)
        return digest

    monkeypatch.setattr(cache, "hash_of", hash_of)
    assert sample.find() == path
    assert not cache.stamp_path(path).exists()
    monkeypatch.setattr(cache, "hash_of", real)
    assert sample.find() is None


def test_the_last_use_is_noted_once_in_a_while(sample):
    stamp = cache.stamp_path(sample.store())
    for ago, expected in ((cache.USE_GRAIN / 2, False), (cache.USE_GRAIN * 2, True)):
        then = time.time() - ago
        os.utime(stamp, (then, then))
        assert sample.find() == sample.path
        assert (stamp.stat().st_mtime > then + 1) == expected
    (item,) = upkeep.items(sample.root, "object")
    assert abs(item.last_use - time.time()) < 60


def test_a_warm_find_takes_no_lock_and_writes_nothing(sample):
    path = sample.store()

    def state():
        return sorted((str(p), p.lstat().st_mtime_ns) for p in sample.root.rglob("*"))

    for name in ("tmp", "locks"):
        for left in (sample.root / name).iterdir():
            left.unlink()
        (sample.root / name).rmdir()
    before = state()
    assert sample.find() == path
    assert state() == before


def lacks(sample):
    """Another file is not there and cannot be stored; what was said."""
    other = type(sample)(sample.root, b"other")
    assert other.find() is None
    with pytest.raises(LoaderError, match="can only be read, and lacks the file") as caught:
        other.store()
    assert str(other.path) in str(caught.value)
    assert "set FI_FFI_CACHE_DIR to a directory that can be written" in str(caught.value)


def test_another_user_uses_roots_cache_and_cannot_add_to_it(sample):
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    sample.root.mkdir()
    path = sample.store()

    def child():
        os.setresuid(OTHER, OTHER, OTHER)
        assert sample.find() == path == sample.find(paranoid=True)
        lacks(sample)

    assert in_child(child) == 0


def test_a_cache_on_a_read_only_disk(sample, small_disk):
    small = type(sample)(sample.root, b"small")
    path = small.store()
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert small.find() == path == small.find(paranoid=True)
    lacks(sample)
