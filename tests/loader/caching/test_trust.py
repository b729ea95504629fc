"""Files that another user could have made or could change are never given out."""

from __future__ import annotations

import hashlib
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from fi_ffi.errors import ArtifactError, LoaderError
from fi_ffi.loader import trust

from tests.helpers.forking import in_child

OTHER = 54321


def refused(sample: Any, *words: str) -> str:
    """Neither found nor replaced behind the user's back; what was said."""
    with pytest.raises(ArtifactError) as caught:
        sample.find()
    with pytest.raises(ArtifactError):
        sample.store()
    for word in words:
        assert word in str(caught.value)
    return str(caught.value)


def test_a_link_is_refused(sample: Any, tmp_path: Path) -> None:
    path = sample.store()
    elsewhere = tmp_path / "norm.so"
    elsewhere.write_bytes(sample.content)
    path.unlink()
    path.symlink_to(elsewhere)
    refused(sample, str(path), "a symbolic link", "remove it")
    path.unlink()
    assert sample.store() == path


def test_what_is_no_file_is_refused(sample: Any) -> None:
    path = sample.store()
    path.unlink()
    os.mkfifo(path)
    refused(sample, "a pipe")
    path.unlink()
    path.mkdir()
    refused(sample, "a directory")


def test_a_file_that_all_can_write_is_refused(sample: Any) -> None:
    sample.store().chmod(0o666)
    refused(sample, "can be written by every user", "0666")


@pytest.mark.usefixtures("as_root")
def test_a_file_of_another_user_is_refused(sample: Any) -> None:
    os.chown(sample.store(), OTHER, -1)
    refused(sample, f"belongs to user {OTHER}", "under 1 names")


@pytest.mark.usefixtures("as_root")
def test_a_hard_link_to_another_users_file_is_refused(sample: Any) -> None:
    path = sample.store()
    theirs = sample.root.parent / "theirs"
    theirs.write_bytes(sample.content)
    os.chown(theirs, OTHER, -1)
    path.unlink()
    os.link(theirs, path)
    refused(sample, f"belongs to user {OTHER}", "under 2 names")


def test_an_own_file_with_two_names_is_good(sample: Any) -> None:
    """A backup made of hard links is no reason to refuse."""
    os.link(sample.store(), sample.root.parent / "backup")
    assert sample.find() == sample.path


def test_files_of_others_as_another_user_sees_them(
    sample: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if os.geteuid() == 0:
        pytest.skip("root's files are trusted")
    sample.store()
    monkeypatch.setattr(trust.os, "geteuid", lambda: OTHER)
    refused(sample, f"belongs to user {os.getuid()}", f"runs as user {OTHER}")


def test_a_root_that_all_can_write_is_refused(sample: Any) -> None:
    path = sample.store()
    sample.root.chmod(0o777)
    refused(sample, str(sample.root), "0777", f"chmod o-w {sample.root}", "FI_FFI_CACHE_DIR")
    sample.root.chmod(0o1777)  # as /tmp is: others could put `wheels` there
    refused(sample, "1777")
    sample.root.chmod(0o700)
    assert sample.find() == path


@pytest.mark.parametrize("folder", ["objects", "objects/ab", "tmp", "locks"])
def test_a_folder_that_all_can_write_is_refused(folder: str, sample: Any) -> None:
    sample.root.mkdir(mode=0o700)
    prefix = sample.sha256[:2]
    folder = folder.replace("ab", prefix)
    place = sample.root / folder
    place.mkdir(parents=True)
    place.chmod(0o1777)  # here the sticky bit does not help: names could be taken first
    with pytest.raises(ArtifactError, match="can be written by every user"):
        sample.store()
    assert not sample.path.exists()


@pytest.mark.usefixtures("as_root")
@pytest.mark.parametrize("folder", ["", "objects", "tmp", "locks"])
def test_a_folder_of_another_user_is_refused(folder: str, sample: Any) -> None:
    (sample.root / folder).mkdir(parents=True)
    os.chown(sample.root / folder, OTHER, -1)
    with pytest.raises(ArtifactError, match=f"belongs to user {OTHER}"):
        sample.store()
    assert not sample.path.exists()


def test_a_folder_that_is_a_link_is_refused(sample: Any, tmp_path: Path) -> None:
    path = sample.store()
    path.parent.rename(tmp_path / "moved")
    path.parent.symlink_to(tmp_path / "moved")
    refused(sample, "is a symbolic link, not a directory")


def test_a_root_that_is_ones_own_link_is_good(sample: Any, tmp_path: Path) -> None:
    sample.root.symlink_to(tmp_path)
    assert sample.store() == sample.find()


@pytest.mark.usefixtures("as_root")
def test_a_root_that_is_another_users_link_is_refused(sample: Any, tmp_path: Path) -> None:
    sample.root.symlink_to(tmp_path)
    sample.store()
    os.chown(sample.root, OTHER, -1, follow_symlinks=False)
    refused(sample, f"the link {sample.root} belongs to user {OTHER}")


@pytest.mark.usefixtures("as_root")
def test_another_user_uses_roots_cache_and_cannot_add_to_it(sample: Any) -> None:
    sample.root.mkdir()
    path = sample.store()

    def child() -> None:
        os.setresuid(OTHER, OTHER, OTHER)
        assert sample.find() == path
        assert sample.find(paranoid=True) == path
        lacking = type(sample)(sample.root, b"other", "0" * 64)
        assert lacking.find() is None
        with pytest.raises(LoaderError, match="can only be read, and lacks the file") as caught:
            lacking.store()
        assert "FI_FFI_CACHE_DIR" in str(caught.value)

    assert in_child(child) == 0


def test_a_cache_on_a_read_only_disk(sample: Any, small_disk: Path) -> None:
    small = type(sample)(sample.root, b"small", _sha256(b"small"))
    path = small.store()
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert small.find() == path
    assert small.find(paranoid=True) == path
    lacking = type(sample)(sample.root, b"other", _sha256(b"other"))
    with pytest.raises(LoaderError, match="can only be read, and lacks the file") as caught:
        lacking.store()
    assert str(lacking.path) in str(caught.value)
    assert "set FI_FFI_CACHE_DIR to a directory that can be written" in str(caught.value)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
