"""Files that are kept open for what was loaded from them."""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path

import pytest

from fi_ffi.errors import ArtifactError
from fi_ffi.loader import cache, kernels

from tests.helpers.stress_strength import scaled
from tests.ops.test_threads import at_once

THREADS = 8


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch):
    """Files of a test are not kept longer than it lasts."""
    kept: dict[tuple[int, int], tuple[int, str]] = {}
    monkeypatch.setattr(kernels, "open_libraries", kept)
    yield kept
    for fd, _ in kept.values():
        os.close(fd)


def file_of(folder: Path, number: int) -> tuple[Path, str, cache.State]:
    path, content = folder / f"{number}.so", os.urandom(64)
    path.write_bytes(content)
    return path, hashlib.sha256(content).hexdigest(), cache.state_of(path.stat())


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_threads_that_keep_files(tmp_path, nothing_kept):
    """Each finds its own, and no descriptor is left open but those that are kept."""
    count, before = scaled(500, 60), descriptors()
    switch = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)

    def work(number: int) -> None:
        folder = tmp_path / str(number)
        folder.mkdir()
        for i in range(count):
            path, sha256, state = file_of(folder, i)
            with kernels.checked(path, sha256, state) as opened:
                if i % 3:
                    opened.keep()
            if i % 3:
                with open(kernels.descriptor(sha256), "rb", closefd=False) as file:
                    assert hashlib.sha256(file.read()).hexdigest() == sha256
                    file.seek(0)

    try:
        at_once(work, THREADS)
    finally:
        sys.setswitchinterval(switch)
    kept = THREADS * (count - len(range(0, count, 3)))
    assert len(nothing_kept) == kept
    assert descriptors() == before + kept


def test_a_file_that_was_kept_is_read_by_its_first_descriptor(tmp_path, nothing_kept):
    path, sha256, state = file_of(tmp_path, 0)
    before = descriptors()
    names = []
    for _ in range(3):
        with kernels.checked(path, sha256, state) as opened:
            opened.keep()
            names.append(opened.name)
    assert len({*names}) == 1 and descriptors() == before + 1


def test_a_refused_file_leaves_nothing_open(tmp_path):
    path, sha256, state = file_of(tmp_path, 0)
    before = descriptors()
    path.write_bytes(b"another content")
    for _ in range(2):
        with (
            pytest.raises(ArtifactError, match="after it was hashed"),
            kernels.checked(path, sha256, state),
        ):
            raise AssertionError("is not reached")
    path, sha256, state = file_of(tmp_path, 1)
    with pytest.raises(RuntimeError, match="in the block"), kernels.checked(path, sha256, state):
        raise RuntimeError("in the block")
    assert descriptors() == before
