"""The pinned wheel as a source: what its pin vouches for, and what the user is told."""

from __future__ import annotations

import logging
import os
import zipfile
from pathlib import Path

import pytest

from fi_ffi.errors import ArgumentError, KernelNotFoundError
from fi_ffi.loader import runtime, search
from fi_ffi.loader.fetch import wheels_lock

from tests.helpers.children import done
from tests.loader.conftest import LOCK
from tests.loader.server import NORM, File, Server, kernel_members, sha256, tree


def wheel_of(server):
    return server.files["/kernels.whl"].content


def find_file(module):
    source = next(iter(search.sources()))
    return source, source.file(module).path.read_bytes()


def test_only_the_pinned_file_is_used(remote_kernels, root):
    """Where RECORD is not pinned, the server's own vouches for nothing."""
    path, found = Path(os.environ["FI_FFI_LOCK"]), sha256(wheel_of(remote_kernels))
    path.write_text(path.read_text().replace(found, "0" * 64))
    wheels_lock.the_lock.cache_clear()
    runtime.use_source(None)
    with pytest.raises(KernelNotFoundError, match=f"sha256 is {found}, pinned is 000"):
        search.find_module("norm")
    assert tree(root) == []


def test_it_is_fetched_whole_and_once(remote_kernels, capsys, caplog):
    with caplog.at_level(logging.INFO, logger="fi_ffi"):
        source, content = find_file("norm")
    assert source.trust == "file-verified"
    assert content == kernel_members()[NORM]
    assert remote_kernels.sent == len(wheel_of(remote_kernels))
    told = capsys.readouterr().err
    assert "FI_FFI_VERIFY=record" in told and "kernels.whl: " in told
    assert "fetching kernels.whl" in caplog.text
    find_file("module_3")
    runtime.use_source(None)
    find_file("module_4")
    assert len(remote_kernels.seen) == 1
    assert capsys.readouterr().err == ""


def test_the_way_out(remote_kernels, monkeypatch, caplog):
    monkeypatch.setenv("FI_FFI_VERIFY", "record")
    with caplog.at_level(logging.INFO, logger="fi_ffi"):
        source, _ = find_file("norm")
    assert source.trust == "record-unpinned"
    assert remote_kernels.sent < len(wheel_of(remote_kernels)) / 4
    assert "fetching the directory and RECORD of http://127.0.0.1" in caplog.text
    assert "fetching a member of kernels.whl" in caplog.text


def test_another_word_is_refused(remote_kernels, monkeypatch):
    monkeypatch.setenv("FI_FFI_VERIFY", "none")
    with pytest.raises(ArgumentError, match="FI_FFI_VERIFY.*got none, expected full or record"):
        search.find_module("norm")
    assert remote_kernels.seen == []


# From the lock to an attested entry, with a wheel that was really built.

PROGRAM = """
import sys
import fi_ffi
from fi_ffi.abi import library
from fi_ffi.loader import runtime, search
library.attach(sys.argv[1])  # its own search is another file's business
row = fi_ffi.rmsnorm.row
entry = runtime.kernel_entry(row.module, row.signature, row.releases)
print(entry.name, search.release(), search.find_module("norm")[1].path)
"""


@pytest.fixture
def web(built_wheel):
    path = "/" + built_wheel.name.replace("+", "%2B")
    with Server({path: File(built_wheel.read_bytes(), etag='"one"')}) as server:
        yield server


@pytest.fixture
def start(built_wheel, web, tmp_path):
    """A process that knows kernels from the lock alone, with a cache of its own."""
    with zipfile.ZipFile(built_wheel) as archive:
        record = next(archive.read(n) for n in archive.namelist() if n.endswith("/RECORD"))
    text = LOCK.replace("1.2.3", "0.6.13").format(
        url=web.url(next(iter(web.files))),
        platform=wheels_lock.this_platform(),
        sha256=sha256(built_wheel.read_bytes()),
    )
    text += f'record-sha256 = "{sha256(record)}"\n'
    (tmp_path / "wheels.lock").write_text(text)
    places = {"LOCK": tmp_path / "wheels.lock", "CACHE_DIR": tmp_path / "cache"}
    variables = {"FI_FFI_SOURCES": "remote", "FI_FFI_CUDA": "cu130", "FI_FFI_KERNELS": ""}
    variables |= {f"FI_FFI_{name}": str(path) for name, path in places.items()}
    library = runtime.ensure_tvm_ffi().path
    return lambda **more: done(PROGRAM, library, **variables | {"FI_FFI_OFFLINE": ""} | more)


def test_a_first_start_fetches_the_module_and_no_more(start, web, built_wheel):
    code, out, err = start()
    assert code == 0, err
    assert out.startswith("norm.rmsnorm 0.6.13 ")
    with zipfile.ZipFile(built_wheel) as archive:
        member = next(i for i in archive.infolist() if i.filename.endswith("/norm.so"))
        record = next(i for i in archive.infolist() if i.filename.endswith("/RECORD"))
        directory = sum(46 + len(i.filename) for i in archive.infolist()) + 22
    assert web.sent < 1.05 * member.compress_size + record.compress_size + directory + 1000
    before = len(web.seen)
    assert start(FI_FFI_OFFLINE="1") == (0, out, "")
    assert len(web.seen) == before


def test_what_is_missing_is_a_reason_and_not_a_crash(start, web):
    code, _, err = start(FI_FFI_OFFLINE="1")
    assert code == 1 and "FI_FFI_OFFLINE=1" in err and "KernelNotFoundError" in err
    assert not web.seen
    web.files.clear()
    code, _, err = start()
    assert code == 1 and "KernelNotFoundError" in err and "404" in err
    assert "fi-ffi build --release 0.6.13 --arch 9.0a norm" in err


def test_another_file_behind_the_pin_is_refused(start, web, tmp_path):
    (path,) = web.files
    content = bytearray(web.files[path].content)
    content[len(content) // 4] ^= 1  # inside norm.so
    web.files[path] = File(bytes(content), etag='"two"')
    code, _, err = start()
    assert code == 1 and "Error" in err
    assert not list((tmp_path / "cache").rglob("norm.so"))
