"""The pinned wheel as a source: what its pin vouches for, and what the user is told."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from fi_ffi.errors import ArgumentError, KernelNotFoundError
from fi_ffi.loader import lock, runtime, search

from tests.loader.server import Server, kernel_members, sha256, tree


def wheel_of(server: Server) -> bytes:
    return server.files["/kernels.whl"].content


def test_only_the_pinned_file_is_used(remote_kernels: Server, root: Path) -> None:
    """Where RECORD is not pinned, the server's own vouches for nothing."""
    path, found = Path(os.environ["FI_FFI_LOCK"]), sha256(wheel_of(remote_kernels))
    path.write_text(path.read_text().replace(found, "0" * 64))
    lock.the_lock.cache_clear()
    runtime.use_source(None)
    with pytest.raises(KernelNotFoundError, match=f"sha256 is {found}, pinned is 000"):
        search.find_module("norm")
    assert tree(root) == []


def test_it_is_fetched_whole_and_once(
    remote_kernels: Server,
    root: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO, logger="fi_ffi"):
        source, file, _ = find_file("norm")
    assert source.trust == "file-verified"
    assert file == kernel_members()["flashinfer_jit_cache/jit_cache/norm/norm.so"]
    assert remote_kernels.sent == len(wheel_of(remote_kernels))
    told = capsys.readouterr().err
    assert "FI_FFI_VERIFY=record" in told
    assert "kernels.whl: " in told
    assert "fetching kernels.whl" in caplog.text
    find_file("module_3")
    runtime.use_source(None)
    find_file("module_4")
    assert len(remote_kernels.seen) == 1
    assert capsys.readouterr().err == ""


def find_file(module: str) -> tuple[search.KernelSource, bytes, Path]:
    source = next(iter(search.sources()))
    path = source.file(module).path
    return source, path.read_bytes(), path


def test_the_way_out(
    remote_kernels: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("FI_FFI_VERIFY", "record")
    with caplog.at_level(logging.INFO, logger="fi_ffi"):
        source, _, _ = find_file("norm")
    assert source.trust == "record-unpinned"
    assert remote_kernels.sent < len(wheel_of(remote_kernels)) / 4
    assert "fetching the directory and RECORD of http://127.0.0.1" in caplog.text
    assert "fetching a member of kernels.whl" in caplog.text


def test_another_word_is_refused(remote_kernels: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FI_FFI_VERIFY", "none")
    with pytest.raises(ArgumentError, match="FI_FFI_VERIFY.*got none, expected full or record"):
        search.find_module("norm")
    assert remote_kernels.seen == []
