"""Whole files: resumed, hashed, in the cache only when they are the pinned ones; bounded waits."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import random
import shutil
import signal
import socket
import threading
import time
from collections import namedtuple
from dataclasses import replace

import numpy as np
import pytest
from filelock import FileLock

from fi_ffi.abi.signature import Signature
from fi_ffi.errors import ArtifactError, FetchError, LoaderError
from fi_ffi.loader import cache, methods, runtime
from fi_ffi.loader.fetch import http, progress, ranges
from fi_ffi.loader.fetch.download import Downloaded, fetch_file
from fi_ffi.loader.fetch.http import Client, Policy
from fi_ffi.loader.fetch.remote import RemoteWheel
from fi_ffi.modules import files

from tests.helpers.children import start
from tests.loader import server as faults
from tests.loader.server import (
    NORM,
    QUICK,
    File,
    Server,
    changed,
    header,
    kernel_members,
    make_wheel,
    redirect,
    sha256,
    status,
    tree,
)

CONTENT = random.Random(1).randbytes(3_000_000)
SHA256 = sha256(CONTENT)
NAME = "kernels.whl"
OBJECT = f"objects/{SHA256[:2]}/{SHA256}/{NAME}"
PART = f"downloads/{SHA256}.part"
OK = b"HTTP/1.1 200 OK\r\n"
INTERIM = "more than 10 statuses below 200 came, and no answer; gave up after 2 tries"


@pytest.fixture
def web(root):
    with Server({"/file": File(CONTENT, etag='"one"')}) as server:
        yield server


def fetch(web, sha256=SHA256, policy=QUICK, **more):
    url = web if isinstance(web, str) else web.url("/file")
    return fetch_file(url, NAME, sha256=sha256, client=Client(policy), **more)


def left_by_another(root, part):
    """What a process that ended while it fetched has left."""
    (root / "downloads").mkdir(parents=True, mode=0o755)
    root.chmod(0o700)
    (root / PART).write_bytes(part)


def together(count, work):
    threads = [threading.Thread(target=work) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_a_file(web, root):
    web.bandwidth = 10_000_000
    reports = []
    found = fetch(web, size=len(CONTENT), report=reports.append)
    assert found == Downloaded(root / OBJECT, SHA256, len(CONTENT))
    assert found.path.read_bytes() == CONTENT
    assert tree(root) == [OBJECT]
    assert fetch(web) == found
    assert len(web.seen) == 1
    done = [report.done for report in reports]
    assert done == sorted(done) and done[-1] == len(CONTENT)
    assert 2 <= len(reports) <= 10
    assert {(report.name, report.total) for report in reports} == {(NAME, len(CONTENT))}


def test_lines_of_progress(monkeypatch, capsys):
    """One in ten seconds, and the last; rates are of what came since the first."""
    clock = iter([0.0, 9.0, 12.0, 13.0, 13.0, 75.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    lines = progress.Lines(in_bytes=True)
    for done in (1_000_000, 2_000_000, 7_000_000, 10_000_000):
        lines.step("a.whl", done, 10_000_000)
    lines = progress.Lines(in_bytes=False)
    for done in (0, 62):
        lines.step("compiling", done, 93)
    assert capsys.readouterr().err.splitlines() == [
        "a.whl: 1.0 of 10.0 MB, 0.0 MB/s",
        "a.whl: 7.0 of 10.0 MB, 0.5 MB/s, about 0:06 left",
        "a.whl: 10.0 of 10.0 MB, 0.7 MB/s, about 0:00 left",
        "compiling: 0/93 in 0:00",
        "compiling: 62/93 in 1:02, about 0:31 left",
    ]


def test_an_empty_file(web):
    web.files["/file"] = File(b"")
    assert fetch(web, sha256(b"")).path.read_bytes() == b""


@pytest.mark.parametrize("fault", [faults.truncate, faults.reset, status(500), redirect("/file")])
@pytest.mark.parametrize("ranges", [True, False])
def test_what_passes(web, root, fault, ranges):
    web.files["/file"].ranges = ranges
    web.faults = [fault, fault]
    assert fetch(web).path.read_bytes() == CONTENT
    assert tree(root) == [OBJECT]
    if ranges and fault is faults.truncate:
        assert web.sent == len(CONTENT)  # nothing twice


def test_goes_on_where_another_process_stopped(web, root):
    web.always = faults.truncate
    with pytest.raises(FetchError, match="gave up after 3 tries"):
        fetch(web)
    assert tree(root) == [PART]
    done = (root / PART).stat().st_size
    assert (root / PART).read_bytes() == CONTENT[:done] != b""
    web.always, before, reports = None, web.sent, []
    fetch(web, report=reports.append)
    assert web.sent - before == len(CONTENT) - done
    assert reports[0].done > done
    assert tree(root) == [OBJECT]


def test_a_part_that_is_whole(web, root):
    """Of a process that was killed between the last byte and the name."""
    left_by_another(root, CONTENT)
    assert fetch(web).path.read_bytes() == CONTENT
    assert web.seen == []


@pytest.mark.parametrize(
    "part", [CONTENT[:1000][::-1], CONTENT + b"more", b"", CONTENT[:-1] + b"!"]
)
def test_a_part_of_something_else(web, root, part):
    left_by_another(root, part)
    assert fetch(web).path.read_bytes() == CONTENT
    assert tree(root) == [OBJECT]


def test_a_part_is_not_taken_for_a_file_that_nothing_pins(web, root):
    """However long it is, and whatever a note beside it says."""
    left_by_another(root, b"")
    key = sha256(web.url("/file").encode())
    (root / f"downloads/{key}.part").write_bytes(CONTENT[::-1])
    note = f'{{"total": {len(CONTENT)}, "etag": "\\"one\\"", "modified": null}}'
    (root / f"downloads/{key}.json").write_text(note)
    assert fetch(web, sha256=None) == Downloaded(root / OBJECT, SHA256, len(CONTENT))
    assert len(web.seen) == 1


@pytest.mark.parametrize("etags", [('"one"', '"two"'), (None, None), ('W/"one"', 'W/"two"')])
def test_a_file_that_changes_on_the_way(web, root, etags):
    """The pinned content comes in the end, also where nothing told of the change."""
    web.files["/file"] = File(bytes(255 - byte for byte in CONTENT), etag=etags[0])

    def swap(answer):
        web.files["/file"] = File(CONTENT, etag=etags[1])
        return faults.truncate(answer)

    web.faults = [swap]
    assert fetch(web).path.read_bytes() == CONTENT
    assert tree(root) == [OBJECT]


def test_another_content_than_the_pinned_one(web, root):
    web.files["/file"] = File(CONTENT[::-1])
    with pytest.raises(ArtifactError, match=f"pinned is {SHA256}: the address serves another"):
        fetch(web)
    assert (tree(root), len(web.seen)) == ([], 1)
    web.files["/file"] = File(CONTENT)
    web.faults = [faults.other_bytes]
    with pytest.raises(ArtifactError):
        fetch(web)
    assert fetch(web).path.read_bytes() == CONTENT


def test_another_size_than_the_pinned_one(web, root):
    with pytest.raises(ArtifactError, match="3000000 bytes, pinned at 3000001"):
        fetch(web, size=len(CONTENT) + 1)
    assert tree(root) == []
    assert web.sent < len(CONTENT)


@pytest.mark.parametrize(
    ("fault", "match"),
    [
        (status(404), "404"),
        (header("Content-Length", "x"), "Content-Length"),
        (redirect("http://example.com/"), "only https"),
        (changed(delay=2.0), "sends nothing; gave up"),
    ],
)
def test_errors_leave_nothing(web, root, fault, match):
    web.always = fault
    with pytest.raises(FetchError, match=match):
        fetch(web)
    assert tree(root) == []


def test_a_server_that_never_gets_further(web):
    """Each answer starts anew and breaks off after megabytes: that is no progress."""
    web.files["/file"].ranges = False
    web.always = changed(cut=2_500_000)
    with pytest.raises(FetchError, match="gave up"):
        fetch(web)
    assert len(web.seen) < 8


def test_more_than_was_announced(web, root, monkeypatch):
    """No Content-Length, and no end; or one that no file has."""
    monkeypatch.setattr(ranges, "MAX_FILE", 1_000_000)
    with pytest.raises(ArtifactError, match="has 3000000 bytes, at most 1000000"):
        fetch(web)
    web.always = header("Content-Length", "")
    with pytest.raises(FetchError, match="more than 1000000 bytes"):
        fetch(web)
    assert tree(root) == []


def test_a_body_that_ends_with_the_connection(web):
    web.always = lambda answer: changed(cut=len(answer.body))(header("Content-Length", "")(answer))
    assert fetch(web).path.read_bytes() == CONTENT


def test_a_full_disk(web, root, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1, 1, 10_000_000))
    says = "needs 3,000,000 bytes and 10,000,000 are free.*FI_FFI_CACHE_DIR"
    with pytest.raises(LoaderError, match=says) as caught:
        fetch(web)
    assert not isinstance(caught.value, FetchError)
    assert tree(root) == []
    assert web.sent < len(CONTENT)


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes where it may not")
def test_a_cache_that_cannot_be_written(web, root):
    root.mkdir(mode=0o500)
    with pytest.raises(LoaderError, match="cannot be written"):
        fetch(web)


def test_offline(web, root, monkeypatch):
    monkeypatch.setenv("FI_FFI_OFFLINE", "1")
    with pytest.raises(FetchError, match=rf"{NAME} is not in the cache at {root}"):
        fetch(web)
    assert (web.seen, root.exists()) == ([], False)


@pytest.mark.parametrize("name", ["..", "a/..", "", "a\0b", "a\\b", "x" * 300])
def test_names_that_are_none(web, root, name):
    with pytest.raises(ArtifactError):
        fetch_file(web.url("/file"), name, sha256=SHA256)
    assert not root.exists()


FETCH = """
import sys
from fi_ffi.loader.fetch.download import fetch_file
print(fetch_file(sys.argv[1], sys.argv[2], sha256=sys.argv[3]).path)
"""


@pytest.fixture
def begun(web, root):
    """A process that is fetching, slowly."""
    web.bandwidth = 500_000
    process = start(FETCH, web.url("/file"), NAME, SHA256)
    while not (root / PART).exists() or not (root / PART).stat().st_size:
        assert process.poll() is None
        time.sleep(0.01)
    yield process
    process.kill()
    process.communicate()


def test_processes_fetch_once(web, root, begun):
    """The second goes on when the first is killed, and does not start again."""
    rest = [start(FETCH, web.url("/file"), NAME, SHA256) for _ in range(2)]
    web.bandwidth = 4_000_000
    begun.kill()
    for process in rest:
        assert process.communicate(timeout=60) == (f"{root / OBJECT}\n", "")
    assert sha256((root / OBJECT).read_bytes()) == SHA256
    assert len(web.seen) == 2
    assert "Range" in web.seen[1].headers


def test_a_process_that_is_stopped_while_it_fetches(web, root, begun, monkeypatch):
    monkeypatch.setattr(cache, "PATIENCE", 1.0)
    begun.send_signal(signal.SIGSTOP)
    web.bandwidth = None
    at = time.monotonic()
    thread = threading.Thread(target=fetch, args=(web,), daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive()
    assert time.monotonic() - at > 1.0
    assert (root / OBJECT).read_bytes() == CONTENT
    begun.send_signal(signal.SIGCONT)
    assert begun.wait(30) == 0
    assert (root / OBJECT).read_bytes() == CONTENT


def test_a_process_that_gets_on_is_waited_for(web, monkeypatch):
    """For longer than patience: that is counted from its last byte."""
    monkeypatch.setattr(cache, "PATIENCE", 0.7)
    web.bandwidth = 1_500_000
    together(3, lambda: fetch(web))
    assert len(web.seen) == 1


@pytest.mark.parametrize("of", ["module", "object of it"])
def test_a_local_file_is_loaded_while_a_server_is_slow(of, remote_kernels, testing_library):
    """A module that is fetched holds its own lock alone; what is fetched is no library."""
    remote_kernels.always = changed(delay=2.0)
    failures = []

    def load():
        try:
            if of == "module":
                runtime.load("norm")
            else:
                methods.method_entry("norm", "init", Signature("run", (), "int"), ">=0.6")
        except LoaderError as error:
            failures.append(error)

    thread = threading.Thread(target=load)
    thread.start()
    while not remote_kernels.seen:
        assert thread.is_alive()
        time.sleep(0.01)
    at = time.monotonic()
    files.load_file(testing_library)
    assert methods._lock.acquire(timeout=1)
    methods._lock.release()
    assert time.monotonic() - at < 1.5
    assert thread.is_alive()
    thread.join()
    assert failures


def test_a_cached_member_is_there_while_another_is_fetched(web):
    members = kernel_members()
    other = next(name for name in members if name != NORM)
    web.files["/kernels.whl"] = File(make_wheel(members))
    wheel = RemoteWheel(web.url("/kernels.whl"), client=Client(QUICK), verify="record")
    wheel.extract(NORM)
    web.always, asked = changed(delay=0.9), len(web.seen)
    thread = threading.Thread(target=wheel.extract, args=(other,))
    thread.start()
    while len(web.seen) == asked:
        time.sleep(0.01)
    wheel.extract(NORM)
    assert thread.is_alive()
    thread.join()


@contextlib.contextmanager
def raw_server(first, rest):
    """An address where each connection gets `first`, and then `rest` again and again.

    With pauses that are shorter than any timeout.
    """
    listening = socket.create_server(("127.0.0.1", 0))
    stop = threading.Event()

    def serve(connection):
        with connection, contextlib.suppress(OSError):
            connection.recv(65536)
            connection.sendall(first)
            while not stop.wait(0.05):
                connection.sendall(rest)

    def accept():
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=serve, args=(listening.accept()[0],), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/file"
    finally:
        stop.set()
        listening.close()


@pytest.mark.parametrize(
    ("first", "rest", "match"),
    [
        *((b"", b"HTTP/1.1 %d So far\r\n\r\n" % code, INTERIM) for code in (100, 102, 103, 199)),
        (b"HTTP/1.1 103 Early Hints\r\n", b"Link: </a>\r\n", "no status with its headers came"),
        (b"", b" ", "no status with its headers"),
        (OK, b"X-More: a header\r\n", "no status with its headers"),
        (OK + b"X-Long: ", b"x", "no status with its headers"),
        (OK + b"Content-Length: 2048000\r\n\r\n", b"x", "only .* bytes came"),
        (OK + b"Transfer-Encoding: chunked\r\n\r\n1;", b"x", "only .* bytes came"),
    ],
)
def test_answers_without_an_end(root, first, rest, match):
    policy = replace(QUICK, tries=2, read_timeout=0.8)
    at = time.monotonic()
    with raw_server(first, rest) as url, pytest.raises(FetchError, match=match):
        fetch(url, policy=policy)
    assert time.monotonic() - at < 5
    assert OBJECT not in tree(root)


@pytest.mark.parametrize(
    ("first", "rest"),
    [
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
        (b"", b""),
        (OK, b"X-More: a header\r\n"),
        (OK + b"Content-Length: 2048000\r\n\r\n", b"x"),
    ],
)
def test_what_does_not_get_on_ends_with_patience(root, first, rest):
    """As the default policy has it: 60 s of patience, and 30 s for a try that has begun."""
    policy = Policy()
    assert (policy.patience, policy.read_timeout) == (60, 30)
    scaled = replace(policy, tries=20, patience=1.0, read_timeout=0.5, first_wait=0.001,
                     longest_wait=0.01)  # fmt: skip
    at = time.monotonic()
    with raw_server(first, rest) as url, pytest.raises(FetchError, match="gave up after"):
        fetch(url, policy=scaled)
    assert 1.0 <= time.monotonic() - at < 1.0 + 0.5 + 1.0


def test_waits_grow_to_the_longest_and_differ(monkeypatch):
    """Each is between half of what it may be and all of it, so that many processes spread."""
    policy, waits = Policy(tries=12), []
    monkeypatch.setattr(http.time, "sleep", waits.append)
    for _ in range(50):
        tries = http.Attempts(policy, "https://host/kernels.whl")
        for _ in range(11):
            tries.failed(http.Transient("it broke"))
        with pytest.raises(FetchError, match="gave up after 12 tries"):
            tries.failed(http.Transient("it broke"))
    most = [min(policy.first_wait * 2**number, policy.longest_wait) for number in range(11)]
    shares = np.reshape(waits, (50, 11)) / most
    assert 0.5 <= shares.min() < 0.6 and 0.9 < shares.max() <= 1


@pytest.mark.parametrize("count", [1, 10])
@pytest.mark.parametrize("code", [100, 102, 103])
def test_statuses_before_an_answer(root, code, count):
    interim = b"HTTP/1.1 %d So far\r\nLink: </a>\r\n\r\n" % code * count
    answer = OK + b"Content-Length: %d\r\n\r\n" % len(CONTENT) + CONTENT
    with raw_server(interim + answer, b"") as url:
        assert fetch(url, policy=replace(QUICK, tries=1)).path.read_bytes() == CONTENT


def test_a_ring_of_slow_redirects(web, root):
    """Each within its timeout: together they are one try."""

    def slowly(answer):
        return replace(redirect("/file")(answer), delay=0.3)

    web.always = slowly
    policy = replace(QUICK, tries=2, read_timeout=0.5)
    at = time.monotonic()
    with pytest.raises(FetchError, match=r"its redirects took 0.5 s; gave up after 2 tries"):
        fetch(web, policy=policy)
    assert time.monotonic() - at < 4
    assert len(web.seen) == 4


@pytest.mark.parametrize("bytes_each", [1, 0])
def test_a_process_that_hardly_gets_on_is_not_waited_for(root, monkeypatch, web, bytes_each):
    """A byte now and then begins no new wait, nor does a part that is written anew."""
    patience = 1.0
    monkeypatch.setattr(cache, "PATIENCE", patience)
    left_by_another(root, b"")
    part, done = root / PART, threading.Event()

    def drip():
        while not done.wait(0.02):
            if bytes_each:
                with part.open("ab") as file:
                    file.write(bytes(bytes_each))
            else:
                os.utime(part)

    dripping = threading.Thread(target=drip)
    with FileLock(part.with_suffix(".lock")):
        dripping.start()
        at = time.monotonic()
        try:
            found = fetch(web)
        finally:
            done.set()
            dripping.join()
    assert found.path.read_bytes() == CONTENT
    assert patience <= time.monotonic() - at < 2 * patience


def test_a_transfer_has_an_end(web, root):
    """However steadily it comes."""
    web.bandwidth = 1_000_000
    policy = replace(QUICK, transfer_timeout=0.5)
    with pytest.raises(FetchError, match=r"not all of it came in .* what is already here is kept"):
        fetch(web, policy=policy)
    assert (root / PART).stat().st_size > 0
    web.bandwidth = None
    fetch(web, policy=policy)
    assert web.sent < 2 * len(CONTENT)


NO_LOCKS = ["ENOLCK", "EOPNOTSUPP", "EIO", "EINVAL", "EPERM", "EBADF", "ESTALE"]


@pytest.mark.parametrize("name", NO_LOCKS)
def test_a_file_system_without_locks(web, root, monkeypatch, name):
    def flock(fd, operation):
        number = getattr(errno, name)
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    # A release of filelock that takes any error for a lock that is held waits for its end.
    monkeypatch.setattr(cache, "PATIENCE", 1.0)
    assert fetch(web).path.read_bytes() == CONTENT
    assert tree(root) == [OBJECT]
