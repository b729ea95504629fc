"""From the lock to an attested entry: a really built wheel on a server, a bare cache."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fi_ffi.loader import lock, runtime

from tests.loader.server import File, Server

PROGRAM = """
import fi_ffi
from fi_ffi.loader import runtime, search
row = fi_ffi.rmsnorm.row
entry = runtime.kernel_entry(row.module, row.signature, row.releases)
print(entry.name, search.release(), search.find_module("norm")[1].path)
"""


@pytest.fixture
def web(built_wheel) -> Iterator[Server]:
    path = "/" + built_wheel.name.replace("+", "%2B")
    with Server({path: File(built_wheel.read_bytes(), etag='"one"')}) as server:
        yield server


@pytest.fixture
def start(request, built_wheel, web, tmp_path) -> Callable[..., subprocess.CompletedProcess]:
    """A process that knows kernels from the lock alone, with a cache of its own."""
    with zipfile.ZipFile(built_wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith("/RECORD"))
        record = archive.read(name)
    pins = {
        "release": "0.6.13",
        "cuda": "cu130",
        "platform": lock.this_platform(),
        "layout": "monolithic",
        "file": built_wheel.name,
        "url": web.url(next(iter(web.files))),
        "sha256": hashlib.sha256(built_wheel.read_bytes()).hexdigest(),
        "provenance": "verified here",
    }
    if getattr(request, "param", True):
        pins["record-sha256"] = hashlib.sha256(record).hexdigest()
    text = lock.lock_path().read_text().partition("[[kernels.files]]")[0] + "[[kernels.files]]\n"
    (tmp_path / "wheels.lock").write_text(text + "".join(f'{k} = "{v}"\n' for k, v in pins.items()))
    library = runtime.ensure_tvm_ffi().path

    def run(**variables: str) -> subprocess.CompletedProcess:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("FI_FFI_")}
        environment |= {
            "FI_FFI_LOCK": str(tmp_path / "wheels.lock"),
            "FI_FFI_CACHE_DIR": str(tmp_path / "cache"),
            "FI_FFI_SOURCES": "remote",
            "PYTHONPATH": str(Path(__file__).parents[2]),
        }
        # libtvm_ffi is another file's business, and already in this process.
        program = f"from fi_ffi.abi import library; library.attach({library!r})\n" + PROGRAM
        command = [sys.executable, "-c", program]
        return subprocess.run(
            command, env=environment | variables, capture_output=True, text=True, timeout=60
        )

    return run


def test_a_first_start_fetches_the_module_and_no_more(start, web, built_wheel):
    done = start()
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("norm.rmsnorm 0.6.13 ")
    with zipfile.ZipFile(built_wheel) as archive:
        member = next(i for i in archive.infolist() if i.filename.endswith("/norm.so"))
        record = next(i for i in archive.infolist() if i.filename.endswith("/RECORD"))
        directory = sum(46 + len(i.filename) for i in archive.infolist()) + 22
    assert web.sent < 1.05 * member.compress_size + record.compress_size + directory + 1000
    before = len(web.seen)
    again = start(FI_FFI_OFFLINE="1")
    assert again.returncode == 0, again.stderr
    assert again.stdout == done.stdout
    assert len(web.seen) == before


@pytest.mark.parametrize("start", [False], indirect=True, ids=["RECORD not pinned"])
@pytest.mark.parametrize("verify", ["record", "full"])
def test_the_whole_file_only_where_it_is_asked_for(start, verify, web, built_wheel):
    done = start(FI_FFI_VERIFY=verify)
    assert done.returncode == 0, done.stderr
    assert (web.sent >= built_wheel.stat().st_size) == (verify == "full")


def test_offline_says_what_is_missing(start, web):
    done = start(FI_FFI_OFFLINE="1")
    assert done.returncode == 1
    assert "FI_FFI_OFFLINE=1" in done.stderr
    assert "KernelNotFoundError" in done.stderr
    assert not web.seen


def test_another_file_behind_the_pin_is_refused(start, web, tmp_path):
    (path,) = web.files
    content = bytearray(web.files[path].content)
    at = len(content) // 4  # inside norm.so
    content[at] ^= 1
    web.files[path] = File(bytes(content), etag='"two"')
    done = start()
    assert done.returncode == 1
    assert "Error" in done.stderr
    assert not list((tmp_path / "cache").rglob("norm.so"))


def test_a_lost_server_is_a_reason_and_not_a_crash(start, web):
    web.files.clear()
    done = start()
    assert done.returncode == 1
    assert "KernelNotFoundError" in done.stderr
    assert "404" in done.stderr
    assert "fi-ffi build --release 0.6.13 --arch 9.0a norm" in done.stderr
