"""The cache: files under the hash of their content."""

from __future__ import annotations

import hashlib
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fi_ffi.errors import ArtifactError, LoaderError
from fi_ffi.loader import cache

CONTENT = b"not quite a library" * 1000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    chosen = tmp_path / "cache"
    monkeypatch.setenv("FI_FFI_CACHE_DIR", str(chosen))
    return chosen


def store(content: bytes = CONTENT, sha256: str = SHA256, name: str = "norm.so") -> Path:
    return cache.store([content[:100], content[100:]], sha256, name, "a test")


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def files(root: Path) -> list[Path]:
    """All files but for stamps."""
    found = (path for path in root.rglob("*") if path.is_file())
    return sorted(path for path in found if path.suffix != ".stamp")


def test_where_it_is(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache.cache_root() == root
    monkeypatch.setenv("FI_FFI_CACHE_DIR", "~/elsewhere")
    assert cache.cache_root() == Path.home() / "elsewhere"
    monkeypatch.setenv("XDG_CACHE_HOME", str(root / "xdg"))
    for unset in ("", None):
        if unset is None:
            monkeypatch.delenv("FI_FFI_CACHE_DIR")
        else:
            monkeypatch.setenv("FI_FFI_CACHE_DIR", unset)
        assert cache.cache_root() == root / "xdg" / "fi-ffi"


def test_asking_makes_nothing(root: Path) -> None:
    assert cache.find(SHA256, "norm.so") is None
    assert not root.exists()


def test_store_and_find(root: Path) -> None:
    path = store()
    assert path == cache.object_path(SHA256, "norm.so")
    assert path.is_relative_to(root)
    assert path.read_bytes() == CONTENT
    assert cache.find(SHA256, "norm.so") == path
    assert files(root) == [path]


def test_what_is_made_is_for_reading_and_the_root_for_its_user(root: Path) -> None:
    before = os.umask(0)
    try:
        path = store()
    finally:
        os.umask(before)
    assert mode(path) == 0o444
    assert mode(root) == 0o700
    assert {mode(folder) for folder in root.rglob("*") if folder.is_dir()} == {0o755}


@pytest.mark.parametrize(
    ("sha256", "name"),
    [("../../etc", "a.so"), (SHA256.upper(), "a.so"), ("", "a.so")]
    + [(SHA256, name) for name in ("", ".", "..", "a/b.so", "/a.so", ".stamp", "a\0b")],
)
def test_no_name_leads_out_of_the_cache(sha256: str, name: str, root: Path) -> None:
    for use in (cache.object_path, cache.find, lambda *key: cache.store([CONTENT], *key, "a test")):
        with pytest.raises(ArtifactError, match="not a sha256 and a file name"):
            use(sha256, name)
    assert not root.exists()


def test_a_name_of_255_bytes(root: Path) -> None:
    name = "m" * 252 + ".so"
    assert cache.find(SHA256, name) is None
    path = store(name=name)
    assert cache.find(SHA256, name) == path
    assert cache.stamp_path(path).exists()


def test_the_source_is_not_read_where_the_file_is_there(root: Path) -> None:
    path = store()

    def chunks() -> Iterator[bytes]:
        raise AssertionError("read")
        yield b""

    assert cache.store(chunks(), SHA256, "norm.so", "a test") == path


def test_filling_gives_the_file_or_the_turn(root: Path) -> None:
    with cache.filling(SHA256, "norm.so") as found:
        assert found is None
        path = store()  # the same thread's, so it does not wait for itself
    with cache.filling(SHA256, "norm.so") as found:
        assert found == path


def test_storing_again_again_changes_nothing(root: Path) -> None:
    assert store() == store()
    assert len(files(root)) == 1


def test_the_same_content_under_two_names(root: Path) -> None:
    """Two modules may be one file; each is found, and found under its own name."""
    first, second = store(name="a.so"), store(name="b.so")
    assert (first.name, second.name) == ("a.so", "b.so")
    assert cache.find(SHA256, "a.so") == first
    assert cache.find(SHA256, "b.so") == second


def test_a_folder_left_empty_is_filled(root: Path) -> None:
    cache.object_path(SHA256, "norm.so").parent.mkdir(parents=True)
    assert store().read_bytes() == CONTENT


def test_a_wrong_hash_leaves_nothing_behind(root: Path) -> None:
    wrong = "0" * 64
    with pytest.raises(ArtifactError, match=f"a test: sha256 is {SHA256}, expected {wrong}"):
        store(sha256=wrong)
    assert files(root) == []
    assert cache.find(wrong, "norm.so") is None


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, ArtifactError])
def test_a_source_that_fails_leaves_nothing_behind(root: Path, error: type[BaseException]) -> None:
    def chunks() -> Iterator[bytes]:
        yield CONTENT
        raise error("half way")

    with pytest.raises(error, match="half way"):
        cache.store(chunks(), SHA256, "norm.so", "a test")
    assert files(root) == []


@pytest.mark.parametrize(
    "damage",
    [lambda content: content[:-1], lambda content: b"", lambda content: b"!" + content[1:]],
)
def test_a_damaged_file_is_not_found_and_is_repaired(damage: object, root: Path) -> None:
    path = store()
    path.chmod(0o644)
    path.write_bytes(damage(CONTENT))  # type: ignore[operator]
    assert cache.find(SHA256, "norm.so") is None
    assert store() == path
    assert path.read_bytes() == CONTENT
    assert cache.find(SHA256, "norm.so") == path
    assert mode(path) == 0o444


def test_what_a_killed_process_left_is_no_hindrance(root: Path) -> None:
    (root / "tmp" / "left" / "new").mkdir(parents=True)
    assert cache.find(SHA256, "norm.so") is None
    assert store().read_bytes() == CONTENT


@pytest.mark.parametrize("obstacle", ["", "tmp", "objects", f"objects/{SHA256[:2]}/{SHA256}"])
def test_a_cache_that_cannot_be_written(root: Path, obstacle: str) -> None:
    """A file where a folder must be: unlike permissions, it stops root too."""
    path = root / obstacle
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("in the way")
    with pytest.raises(LoaderError, match="cannot be written|is a file") as caught:
        store()
    assert str(root) in str(caught.value)
    assert "FI_FFI_CACHE_DIR" in str(caught.value)
    assert path.read_text() == "in the way"


PROCESSES = 8
CHILD = """
import sys
from fi_ffi.loader import cache

sha256, size = sys.argv[1], int(sys.argv[2])
print("ready", flush=True)
sys.stdin.readline()
for _ in range(20):
    chunks = (bytes([65 + i % 26]) * 1024 for i in range(size))
    path = cache.store(chunks, sha256, "norm.so", "a test")
    assert path.stat().st_size == 1024 * size
    assert cache.find(sha256, "norm.so") == path  # whole at every moment
print(path)
"""


def test_processes_at_the_same_time(root: Path) -> None:
    size = 512
    content = b"".join(bytes([65 + i % 26]) * 1024 for i in range(size))
    sha256 = hashlib.sha256(content).hexdigest()
    command = [sys.executable, "-c", CHILD, sha256, str(size)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    children = [subprocess.Popen(command, text=True, **pipes) for _ in range(PROCESSES)]  # type: ignore[call-overload]
    for child in children:
        assert child.stdout.readline() == "ready\n"
    for child in children:
        child.stdin.write("go\n")
        child.stdin.flush()
    for child in children:
        out, err = child.communicate(timeout=60)
        assert (child.returncode, err) == (0, "")
        assert out.strip() == str(cache.object_path(sha256, "norm.so"))
    assert files(root) == [cache.object_path(sha256, "norm.so")]
    assert cache.find(sha256, "norm.so") is not None


def test_adopting_a_finished_file(root: Path) -> None:
    source = root / "downloads" / "a.part"
    for _ in range(2):  # the second finds a good one, which stays
        source.parent.mkdir(parents=True, exist_ok=True)
        source.write_bytes(CONTENT)
        path = cache.adopt(source, SHA256, "norm.so")
        inode = path.stat().st_ino
        assert not source.exists()
        assert cache.find(SHA256, "norm.so") == path
        assert cache.stamp_path(path).exists()
        assert mode(path) == 0o444
    assert path.stat().st_ino == inode
    with pytest.raises(LoaderError, match="cannot be written"):
        cache.adopt(source, SHA256, "norm.so")
