"""A seed cache: what it has is not fetched, nothing is written into it, nothing is believed."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from fi_ffi.errors import KernelNotFoundError, LoaderError
from fi_ffi.loader import cache, kernels, runtime, search, seed

from tests.loader.server import NORM, kernel_members, sha256

MEMBERS = kernel_members()
CONTENT = MEMBERS[NORM]


def everything(folder: Path) -> dict[str, tuple[float, bytes]]:
    """All that is in a folder, stamps and locks too, with the times of the last writing."""
    return {
        str(path.relative_to(folder)): (
            path.stat().st_mtime, path.read_bytes() if path.is_file() else b""
        )
        for path in [folder, *folder.rglob("*")]
    }  # fmt: skip


@pytest.fixture
def seeded(remote_kernels, root, tmp_path, monkeypatch):
    """A cache filled over the network, and now a seed; the cache in use is empty."""
    monkeypatch.setenv("FI_FFI_VERIFY", "record")
    next(iter(search.sources())).file("norm")
    kept = tmp_path / "seed"
    root.rename(kept)
    monkeypatch.setenv(seed.ENVIRONMENT, str(kept))
    # Facts are kept by what has them; here it is the files that matter.
    runtime.use_source(None)
    remote_kernels.seen.clear()
    seed._hashed.clear()
    return kept


def norm_in(kept: Path) -> Path:
    return kept / "objects" / sha256(CONTENT)[:2] / sha256(CONTENT) / "norm.so"


def found() -> tuple[Path, bytes]:
    source = next(iter(search.sources()))
    file = source.file("norm")
    with kernels.checked(file.path, file.sha256, file.state) as opened:
        assert opened.sha256 == sha256(CONTENT)
    return file.path, file.path.read_bytes()


def test_what_the_seed_has_is_not_fetched(seeded, remote_kernels, root, monkeypatch):
    before = everything(seeded)
    monkeypatch.setenv("FI_FFI_OFFLINE", "1")
    path, content = found()
    assert content == CONTENT and path == norm_in(seeded)
    assert not remote_kernels.seen
    assert everything(seeded) == before
    assert not list(root.rglob("*.so"))


def test_what_it_lacks_goes_into_the_cache(seeded, remote_kernels, root):
    before = everything(seeded)
    source = next(iter(search.sources()))
    assert source.file("module_3").path.is_relative_to(root)
    assert len(remote_kernels.seen) == 1, "the directory and RECORD are the seed's"
    assert everything(seeded) == before


def test_the_cache_comes_first(seeded, root):
    path, _ = found()
    shutil.copytree(seeded, root)
    runtime.use_source(None)
    mine, content = found()
    assert path == norm_in(seeded) and mine == norm_in(root) and content == CONTENT


def test_a_seed_that_can_only_be_read(seeded, root, monkeypatch):
    """As in an image: nothing of it can be written, nor can the cache."""
    monkeypatch.setenv("FI_FFI_OFFLINE", "1")
    for path in [*seeded.rglob("*"), seeded]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    root.mkdir()
    root.chmod(0o500)
    try:
        for _ in range(2):
            path, content = found()
            assert content == CONTENT and path == norm_in(seeded)
            runtime.use_source(None)
    finally:
        for path in [root, seeded, *seeded.rglob("*")]:
            path.chmod(0o755)


def truncated(path: Path) -> None:
    path.chmod(0o644)
    path.write_bytes(CONTENT[: len(CONTENT) // 2])


def other_bytes(path: Path) -> None:
    path.chmod(0o644)
    path.write_bytes(CONTENT[:-1] + b"\1")


def planted(path: Path) -> None:
    """Other content, with the stamp of the right one."""
    status = path.stat()
    other_bytes(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    cache._keep(cache.stamp_path(path), b"")
    stamp = cache._stamp(sha256(CONTENT), os.lstat(path))
    cache.stamp_path(path).write_bytes(stamp)


def linked(path: Path) -> None:
    target = path.with_name("elsewhere.so")
    path.rename(target)
    path.symlink_to(target)


def piped(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def foldered(path: Path) -> None:
    path.unlink()
    path.mkdir()


def gone(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize(
    "harm",
    [truncated, other_bytes, planted, linked, piped, foldered, gone],
    ids=lambda f: f.__name__,
)
def test_what_is_not_as_recorded_is_not_used(harm, seeded, remote_kernels, root):
    """It is fetched; and without a network, told."""
    harm(norm_in(seeded))
    path, content = found()
    assert content == CONTENT and path == norm_in(root)
    assert len(remote_kernels.seen) == 1


def test_what_is_damaged_is_a_reason_offline(seeded, remote_kernels, monkeypatch):
    monkeypatch.setenv("FI_FFI_OFFLINE", "1")
    truncated(norm_in(seeded))
    with pytest.raises(KernelNotFoundError, match="FI_FFI_OFFLINE=1"):
        search.find_module("norm")
    assert not remote_kernels.seen


@pytest.mark.parametrize("place", ["file", "folder", "root"])
def test_what_others_could_change_is_copied(place, seeded, remote_kernels, root, monkeypatch):
    """Its content was compared as it was copied, so that nobody can change what is loaded."""
    file = norm_in(seeded)
    index = seeded / "indexes"
    shutil.copytree(index, root / "indexes")  # which only a safe seed's is read
    changed = {"file": file, "folder": file.parent, "root": seeded}[place]
    changed.chmod(0o777)
    monkeypatch.setenv("FI_FFI_OFFLINE", "1")
    path, content = found()
    assert content == CONTENT and path == norm_in(root)
    file.chmod(0o644)
    file.write_bytes(b"something else")
    assert found() == (path, CONTENT)
    assert not remote_kernels.seen


def test_a_file_of_another_user_is_copied(seeded, root, monkeypatch):
    if os.geteuid() != 0:
        pytest.skip("only root can give a file to another user")
    file = norm_in(seeded)
    shutil.copytree(seeded / "indexes", root / "indexes")
    for path in [seeded, *seeded.rglob("*")]:
        os.chown(path, 12345, 12345)
    monkeypatch.setenv("FI_FFI_OFFLINE", "1")
    assert found() == (norm_in(root), CONTENT)
    assert file.stat().st_uid == 12345


def test_a_directory_of_another_user_is_not_believed(seeded, remote_kernels, root):
    """What its notes say of a wheel could be the other's; the network's is taken."""
    (seeded / "indexes").chmod(0o777)
    for note in (seeded / "indexes").iterdir():
        note.write_text(note.read_text()[:40])
    path, content = found()
    assert content == CONTENT and path == norm_in(seeded)
    assert remote_kernels.seen and all(path.name for path in (root / "indexes").iterdir())


def test_written_over_after_it_was_hashed(seeded):
    source = next(iter(search.sources()))
    file = source.file("norm")
    other_bytes(file.path)
    with pytest.raises(LoaderError, match="after it was hashed"), kernels.checked(
        file.path, file.sha256, file.state
    ):  # fmt: skip
        pass


def test_a_whole_wheel_in_the_seed(remote_kernels, root, tmp_path, monkeypatch):
    """Where nothing pins RECORD, the wheel itself is what vouches, and lies there."""
    next(iter(search.sources())).file("norm")
    root.rename(tmp_path / "seed")
    monkeypatch.setenv(seed.ENVIRONMENT, str(tmp_path / "seed"))
    monkeypatch.setenv("FI_FFI_OFFLINE", "1")
    runtime.use_source(None)
    source = next(iter(search.sources()))
    assert source.file("norm").path == norm_in(tmp_path / "seed")
    assert source.file("module_5").path.is_relative_to(root)
    assert source.trust == "file-verified"
    assert len(remote_kernels.seen) == 1


def test_one_who_believes_nothing_hashes_again(seeded, monkeypatch):
    """With its times put back, what was written over is as it was hashed; but for its content."""
    path, _ = found()
    assert seed.find(sha256(CONTENT), "norm.so") is not None
    state = cache.state_of(path.stat())
    path.chmod(0o644)
    path.write_bytes(CONTENT[:-1] + b"\1")
    monkeypatch.setattr(cache, "state_of", lambda status: state)  # of a disk that hides it
    assert seed.find(sha256(CONTENT), "norm.so") is not None
    monkeypatch.setenv("FI_FFI_PARANOID", "1")
    assert seed.find(sha256(CONTENT), "norm.so") is None


def test_a_seed_that_is_none(root, monkeypatch, tmp_path):
    monkeypatch.setenv(seed.ENVIRONMENT, str(tmp_path / "nothing"))
    with pytest.raises(LoaderError, match=r"FI_FFI_SEED_CACHE names .*nothing, which is no dir"):
        seed.find("0" * 64, "norm.so")
    monkeypatch.setenv(seed.ENVIRONMENT, "")
    assert seed.find("0" * 64, "norm.so") is None
