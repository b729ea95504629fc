"""Whole files: resumed, hashed, and in the cache only when they are the pinned ones."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import subprocess
import sys
import threading
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import pytest

import fi_ffi
from fi_ffi.errors import ArtifactError, FetchError, LoaderError
from fi_ffi.loader import ranges
from fi_ffi.loader.download import Downloaded, Report, fetch_file
from fi_ffi.loader.http import Client

from tests.loader import server as faults
from tests.loader.server import QUICK, File, Server, changed, header, redirect, sha256, status, tree

CONTENT = random.Random(1).randbytes(3_000_000)
SHA256 = sha256(CONTENT)
NAME = "kernels.whl"
OBJECT = f"objects/{SHA256[:2]}/{SHA256}/{NAME}"
PART = f"downloads/{SHA256}.part"


@pytest.fixture
def web(root: Path) -> Iterator[Server]:
    with Server({"/file": File(CONTENT, etag='"one"')}) as server:
        yield server


def fetch(web: Server, sha256: str | None = SHA256, **more: object) -> Downloaded:
    client = Client(QUICK)
    return fetch_file(web.url("/file"), NAME, sha256=sha256, client=client, **more)  # type: ignore[arg-type]


def test_a_file(web: Server, root: Path) -> None:
    found = fetch(web, size=len(CONTENT))
    assert found == Downloaded(root / OBJECT, SHA256, len(CONTENT))
    assert found.path.read_bytes() == CONTENT
    assert tree(root) == [OBJECT]
    assert fetch(web) == found
    assert len(web.seen) == 1


def test_a_file_that_nothing_pins(web: Server, root: Path) -> None:
    assert fetch(web, sha256=None) == Downloaded(root / OBJECT, SHA256, len(CONTENT))
    assert tree(root) == [OBJECT]


def test_an_empty_file(web: Server, root: Path) -> None:
    web.files["/file"] = File(b"")
    assert fetch(web, sha256(b"")).path.read_bytes() == b""


@pytest.mark.parametrize(
    "fault",
    [status(500), status(429), faults.truncate, faults.reset, faults.stall, redirect("/file")],
)
@pytest.mark.parametrize("ranges", [True, False])
def test_what_passes(web: Server, root: Path, fault: faults.Fault, ranges: bool) -> None:
    web.files["/file"].ranges = ranges
    web.faults = [fault, fault]
    assert fetch(web).path.read_bytes() == CONTENT
    assert tree(root) == [OBJECT]


def test_nothing_is_fetched_twice(web: Server, root: Path) -> None:
    web.faults = [faults.truncate, faults.truncate]
    fetch(web)
    assert web.sent == len(CONTENT)
    assert [seen.headers.get("If-Range") for seen in web.seen] == [None, '"one"', '"one"']


def test_goes_on_where_another_process_stopped(web: Server, root: Path) -> None:
    web.always = faults.truncate
    with pytest.raises(FetchError, match="gave up after 3 tries"):
        fetch(web)
    assert tree(root) == [PART]
    done = (root / PART).stat().st_size
    assert 0 < done < len(CONTENT)
    web.always, before = None, web.sent
    reports: list[Report] = []
    fetch(web, report=reports.append)
    assert web.sent - before == len(CONTENT) - done
    assert reports[0].done > done
    assert tree(root) == [OBJECT]


def test_a_part_that_is_whole(web: Server, root: Path) -> None:
    """Of a process that was killed between the last byte and the name."""
    web.faults = [faults.truncate, status(404)]
    with pytest.raises(FetchError):
        fetch(web)
    (root / PART).write_bytes(CONTENT)
    web.seen.clear()
    assert fetch(web).path.read_bytes() == CONTENT
    assert web.seen == []


@pytest.mark.parametrize(
    "part", [CONTENT[:1000][::-1], CONTENT + b"more", b"", CONTENT[:-1] + b"!"]
)
def test_a_part_of_something_else(web: Server, root: Path, part: bytes) -> None:
    web.faults = [faults.truncate, status(404)]
    with pytest.raises(FetchError):
        fetch(web)
    (root / PART).write_bytes(part)
    assert fetch(web).path.read_bytes() == CONTENT
    assert tree(root) == [OBJECT]


@pytest.mark.parametrize("etags", [('"one"', '"two"'), (None, None), ('W/"one"', 'W/"two"')])
def test_a_file_that_changes_on_the_way(
    web: Server, root: Path, etags: tuple[str | None, str | None]
) -> None:
    """The pinned content comes in the end, also where nothing told of the change."""
    other = bytes(255 - byte for byte in CONTENT)
    web.files["/file"] = File(other, etag=etags[0])

    def swap(answer: faults.Answer) -> faults.Answer:
        web.files["/file"] = File(CONTENT, etag=etags[1])
        return faults.truncate(answer)

    web.faults = [swap]
    assert fetch(web).path.read_bytes() == CONTENT
    assert tree(root) == [OBJECT]


def test_another_content_than_the_pinned_one(web: Server, root: Path) -> None:
    web.files["/file"] = File(CONTENT[::-1])
    with pytest.raises(ArtifactError, match=f"pinned is {SHA256}: the address serves another"):
        fetch(web)
    assert tree(root) == []
    assert len(web.seen) == 1
    web.files["/file"] = File(CONTENT)
    web.faults = [faults.other_bytes]
    with pytest.raises(ArtifactError):
        fetch(web)
    assert fetch(web).path.read_bytes() == CONTENT


def test_another_size_than_the_pinned_one(web: Server, root: Path) -> None:
    with pytest.raises(ArtifactError, match="3000000 bytes, pinned are 3000001"):
        fetch(web, size=len(CONTENT) + 1)
    assert tree(root) == []
    assert web.sent < len(CONTENT)


@pytest.mark.parametrize(
    ("fault", "match"),
    [
        (status(404), "404"),
        (status(403), "netrc"),
        (status(401), "netrc"),
        (status(500), "gave up after 3"),
        (header("Content-Length", "x"), "Content-Length"),
        (header("Content-Encoding", "gzip"), "encoded"),
        (redirect("/file"), "redirects"),
        (redirect("http://example.com/"), "only https"),
        (changed(delay=2.0), "sends nothing; gave up"),
    ],
)
def test_errors_leave_nothing(web: Server, root: Path, fault: faults.Fault, match: str) -> None:
    web.always = fault
    with pytest.raises(FetchError, match=match):
        fetch(web)
    assert tree(root) == []


@pytest.mark.parametrize("fault", [faults.stall, faults.truncate, faults.trickle, faults.reset])
def test_errors_leave_a_part(web: Server, root: Path, fault: faults.Fault) -> None:
    web.always = fault
    with pytest.raises(FetchError, match="gave up after 3 tries"):
        fetch(web)
    assert tree(root) == [PART]
    part = (root / PART).read_bytes()
    assert part == CONTENT[: len(part)]


def test_a_server_that_goes_on_elsewhere(web: Server, root: Path) -> None:
    web.faults = [faults.truncate, faults.shifted]
    with pytest.raises(FetchError, match="asked for bytes 1500000-2999999"):
        fetch(web)


def test_a_server_that_never_gets_further(web: Server, root: Path) -> None:
    """Each answer starts anew and breaks off after megabytes: that is no progress."""
    web.files["/file"].ranges = False
    web.always = changed(cut=2_500_000)
    with pytest.raises(FetchError, match="gave up"):
        fetch(web)
    assert len(web.seen) < 8


def test_more_than_was_announced(web: Server, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No Content-Length, and no end."""
    monkeypatch.setattr(ranges, "MAX_FILE", 1_000_000)
    web.always = header("Content-Length", "")
    with pytest.raises(FetchError, match="more than 1000000 bytes"):
        fetch(web)
    assert tree(root) == []


def test_a_body_that_ends_with_the_connection(web: Server, root: Path) -> None:
    web.always = lambda answer: changed(cut=len(answer.body))(header("Content-Length", "")(answer))
    assert fetch(web).path.read_bytes() == CONTENT


def test_a_full_disk(web: Server, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1, 1, 10_000_000))
    with pytest.raises(
        LoaderError, match="needs 3,000,000 bytes and 10,000,000 are free"
    ) as caught:
        fetch(web)
    assert "FI_FFI_CACHE_DIR" in str(caught.value)
    assert not isinstance(caught.value, FetchError)
    assert tree(root) == []
    assert web.sent < len(CONTENT)


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes where it may not")
def test_a_cache_that_cannot_be_written(web: Server, root: Path) -> None:
    root.mkdir(mode=0o500)
    with pytest.raises(LoaderError, match="cannot be written"):
        fetch(web)


def test_offline(web: Server, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FI_FFI_OFFLINE", "1")
    with pytest.raises(FetchError, match=rf"{NAME} is not in the cache at {root}"):
        fetch(web)
    assert (web.seen, root.exists()) == ([], False)


@pytest.mark.parametrize("name", ["..", "a/..", "", "a\0b", "a\\b", "x" * 300])
def test_names_that_are_none(web: Server, root: Path, name: str) -> None:
    with pytest.raises(ArtifactError):
        fetch_file(web.url("/file"), name, sha256=SHA256)
    assert not root.exists()


def test_reports(web: Server, root: Path) -> None:
    web.bandwidth = 10_000_000
    reports: list[Report] = []
    fetch(web, report=reports.append)
    done = [report.done for report in reports]
    assert done == sorted(done)
    assert done[-1] == len(CONTENT)
    assert 2 <= len(reports) <= 10
    assert {(report.name, report.total) for report in reports} == {(NAME, len(CONTENT))}
    assert reports[-1].remaining == 0
    assert 2_000_000 < reports[-1].rate < 30_000_000


def test_threads_fetch_once(web: Server, root: Path) -> None:
    web.bandwidth = 10_000_000
    found: list[Downloaded] = []
    threads = [threading.Thread(target=lambda: found.append(fetch(web))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({each.path for each in found}) == 1 == len(found) - 3
    assert len(web.seen) == 1


def test_processes_fetch_once(web: Server, root: Path) -> None:
    """The second goes on when the first is killed, and does not start again."""
    web.bandwidth = 4_000_000
    code = (
        "import sys; from fi_ffi.loader.download import fetch_file;"
        "print(fetch_file(sys.argv[1], sys.argv[2], sha256=sys.argv[3]).path)"
    )
    command = [sys.executable, "-c", code, web.url("/file"), NAME, SHA256]
    environment = os.environ | {"PYTHONPATH": str(Path(fi_ffi.__file__).parents[1])}
    first = subprocess.Popen(command, env=environment)
    while not (root / PART).exists() or not (root / PART).stat().st_size:
        assert first.poll() is None
    rest = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    first.kill()
    first.wait()
    for process in rest:
        assert process.communicate(timeout=60)[0].strip() == str(root / OBJECT)
    assert hashlib.sha256((root / OBJECT).read_bytes()).hexdigest() == SHA256
    assert len(web.seen) == 2
    assert "Range" in web.seen[1].headers
