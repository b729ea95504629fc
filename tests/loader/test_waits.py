"""Waiting is bounded, and nobody waits for another's download who does not need it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

import fi_ffi
from fi_ffi.errors import FetchError, LoaderError
from fi_ffi.loader import cache, methods, runtime
from fi_ffi.loader.download import fetch_file
from fi_ffi.loader.http import Client
from fi_ffi.loader.remote import RemoteWheel

from tests.loader import server as faults
from tests.loader.server import NORM, QUICK, File, Server, kernel_members, make_wheel, sha256, tree

CONTENT = bytes(range(256)) * 8000
SHA256 = sha256(CONTENT)
NAME = "kernels.whl"
PART = f"downloads/{SHA256}.part"
OBJECT = f"objects/{SHA256[:2]}/{SHA256}/{NAME}"
OK = b"HTTP/1.1 200 OK\r\n"


@pytest.fixture
def web(root: Path) -> Iterator[Server]:
    with Server({"/file": File(CONTENT, etag='"one"')}) as server:
        yield server


def test_a_local_file_is_loaded_while_a_server_is_slow(
    remote_kernels: Server, testing_library: Path
) -> None:
    remote_kernels.always = faults.changed(delay=4.0)
    failures: list[Exception] = []

    def load() -> None:
        try:
            runtime.load("norm")
        except Exception as error:  # what is fetched is no library
            failures.append(error)

    thread = threading.Thread(target=load)
    thread.start()
    while not remote_kernels.seen:
        assert thread.is_alive()
        time.sleep(0.01)
    begun = time.monotonic()
    runtime.load_file(testing_library)
    assert time.monotonic() - begun < 2.0
    assert thread.is_alive()
    thread.join()
    assert failures


def test_methods_of_other_modules_do_not_wait(remote_kernels: Server) -> None:
    """An object of a module that is fetched is made under the module's lock alone."""
    remote_kernels.always = faults.changed(delay=3.0)

    def make() -> None:
        with contextlib.suppress(LoaderError):  # what is fetched is no library
            methods.made_by("norm", "init", ">=0.6")

    thread = threading.Thread(target=make)
    thread.start()
    while not remote_kernels.seen:
        time.sleep(0.01)
    assert methods._lock.acquire(timeout=1)
    methods._lock.release()
    assert thread.is_alive()
    thread.join()


def test_a_cached_member_is_there_while_another_is_fetched(web: Server) -> None:
    members = kernel_members()
    other = next(name for name in members if name != NORM)
    web.files["/kernels.whl"] = File(make_wheel(members))
    wheel = RemoteWheel(web.url("/kernels.whl"), client=Client(QUICK), verify="record")
    wheel.extract(NORM)
    web.always, asked = faults.changed(delay=0.9), len(web.seen)
    thread = threading.Thread(target=wheel.extract, args=(other,))
    thread.start()
    while len(web.seen) == asked:
        time.sleep(0.01)
    begun = time.monotonic()
    wheel.extract(NORM)
    assert time.monotonic() - begun < 0.5
    thread.join()


@contextmanager
def raw_server(answer: Callable[[socket.socket], None]) -> Iterator[str]:
    """An address where each connection gets what `answer` writes."""
    listening = socket.create_server(("127.0.0.1", 0))
    stop = threading.Event()

    def serve(connection: socket.socket) -> None:
        with connection:
            connection.recv(65536)
            try:
                while not stop.is_set():
                    answer(connection)
            except OSError:
                pass

    def accept() -> None:
        while True:
            try:
                connection = listening.accept()[0]
            except OSError:
                return
            threading.Thread(target=serve, args=(connection,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/file"
    finally:
        stop.set()
        listening.close()


def slowly(first: bytes, rest: bytes) -> Callable[[socket.socket], None]:
    """`first`, and then `rest` again and again, with pauses shorter than any timeout."""
    begun: set[int] = set()

    def answer(connection: socket.socket) -> None:
        if connection.fileno() not in begun:
            begun.add(connection.fileno())
            connection.sendall(first)
        connection.sendall(rest)
        time.sleep(0.05)

    return answer


@pytest.mark.parametrize(
    ("first", "rest", "match"),
    [
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n", "no status with its headers came in 0.5 s"),
        (b"", b" ", "no status with its headers"),
        (OK, b"X-More: a header\r\n", "no status with its headers"),
        (OK + b"X-Long: ", b"x", "no status with its headers"),
        (OK + b"Content-Length: 2048000\r\n\r\n", b"x", "only .* bytes came"),
        (OK + b"Transfer-Encoding: chunked\r\n\r\n1;", b"x", "only .* bytes came"),
    ],
)
def test_answers_without_an_end(root: Path, first: bytes, rest: bytes, match: str) -> None:
    policy = replace(QUICK, tries=2, read_timeout=0.5)
    begun = time.monotonic()
    with raw_server(slowly(first, rest)) as url, pytest.raises(FetchError, match=match):
        fetch_file(url, NAME, sha256=SHA256, client=Client(policy))
    assert time.monotonic() - begun < 5
    assert OBJECT not in tree(root)


def test_a_transfer_has_an_end(web: Server, root: Path) -> None:
    """However steadily it comes."""
    web.bandwidth = 1_000_000
    policy = replace(QUICK, transfer_timeout=0.5)
    with pytest.raises(FetchError, match=r"not all of it came in .* what is already here is kept"):
        fetch_file(web.url("/file"), NAME, sha256=SHA256, client=Client(policy))
    assert (root / PART).stat().st_size > 0
    web.bandwidth = None
    fetch_file(web.url("/file"), NAME, sha256=SHA256, client=Client(policy))
    assert web.sent < 2 * len(CONTENT)


def test_a_process_that_is_stopped_while_it_fetches(
    web: Server, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "PATIENCE", 1.0)
    web.bandwidth = 500_000
    code = (
        "import sys; from fi_ffi.loader.download import fetch_file;"
        "fetch_file(sys.argv[1], sys.argv[2], sha256=sys.argv[3])"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(fi_ffi.__file__).parents[1])}
    command = [sys.executable, "-c", code, web.url("/file"), NAME, SHA256]
    first = subprocess.Popen(command, env=environment)
    try:
        while not (root / PART).exists() or not (root / PART).stat().st_size:
            assert first.poll() is None
            time.sleep(0.01)
        first.send_signal(signal.SIGSTOP)
        web.bandwidth = None
        begun = time.monotonic()
        thread = threading.Thread(
            target=fetch_file, args=(web.url("/file"), NAME), kwargs={"sha256": SHA256}
        )
        thread.daemon = True
        thread.start()
        thread.join(10)
        assert not thread.is_alive()
        assert time.monotonic() - begun > 1.0
        assert (root / OBJECT).read_bytes() == CONTENT
        first.send_signal(signal.SIGCONT)
        assert first.wait(30) == 0
        assert (root / OBJECT).read_bytes() == CONTENT
    finally:
        first.kill()
        first.wait()


def test_a_process_that_gets_on_is_waited_for(
    web: Server, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For longer than patience: that is counted from its last byte."""
    monkeypatch.setattr(cache, "PATIENCE", 0.7)
    web.bandwidth = 1_000_000
    threads = [
        threading.Thread(
            target=fetch_file, args=(web.url("/file"), NAME), kwargs={"sha256": SHA256}
        )
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(web.seen) == 1


NO_LOCKS = ["ENOLCK", "EOPNOTSUPP", "EIO", "EINVAL", "EPERM", "EBADF", "ESTALE"]


@pytest.mark.parametrize("name", NO_LOCKS)
def test_a_file_system_without_locks(
    web: Server, root: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def flock(fd: int, operation: int) -> None:
        number = getattr(errno, name)
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    # A release of filelock that takes any error for a lock that is held waits for its end.
    monkeypatch.setattr(cache, "PATIENCE", 1.0)
    found = fetch_file(web.url("/file"), NAME, sha256=SHA256, client=Client(QUICK))
    assert found.path.read_bytes() == CONTENT
    assert tree(root) == [OBJECT]


def test_a_part_is_not_taken_for_a_file_that_nothing_pins(web: Server, root: Path) -> None:
    """However long it is, and whatever a note beside it says."""
    key = sha256(web.url("/file").encode())
    folder = root / "downloads"
    folder.mkdir(parents=True, mode=0o755)
    root.chmod(0o700)
    (folder / f"{key}.part").write_bytes(CONTENT[::-1])
    (folder / f"{key}.json").write_text(
        f'{{"total": {len(CONTENT)}, "etag": "\\"one\\"", "modified": null}}'
    )
    found = fetch_file(web.url("/file"), NAME, sha256=None, client=Client(QUICK))
    assert found.sha256 == SHA256
    assert len(web.seen) == 1
