"""A wheel on a server: what is fetched of it, what vouches for it, and what goes wrong."""

from __future__ import annotations

import contextlib
import io
import random
import struct
import threading
import time
import zipfile
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fi_ffi.errors import ArtifactError, FetchError, LoaderError
from fi_ffi.loader.fetch import asking, pinned_wheels
from fi_ffi.loader.fetch.http import Client
from fi_ffi.loader.fetch.remote import RemoteWheel
from fi_ffi.loader.fetch.wheels_lock import PinnedWheel

from tests.loader import server as faults
from tests.loader.server import (
    INFO,
    NORM,
    QUICK,
    File,
    Server,
    digest,
    kernel_members,
    make_wheel,
    sha256,
    status,
    tree,
)

MEMBERS = kernel_members()
WHEEL = make_wheel(MEMBERS)
PATH = "/kernels-1.2.3%2Bcu130-cp39-abi3-linux_x86_64.whl"
NAME = "kernels-1.2.3+cu130-cp39-abi3-linux_x86_64.whl"
RECORD = sha256(faults.record(MEMBERS))
OTHER = "flashinfer_jit_cache/jit_cache/module_3/module_3.so"
BY_FILE = {"sha256": sha256(WHEEL)}
PINS = BY_FILE | {"record_sha256": RECORD}
INDEX = f"indexes/{sha256(WHEEL)}.json"


@pytest.fixture
def web(root):
    with Server({PATH: File(WHEEL, etag='"one"')}) as server:
        yield server


def open_wheel(web, policy=QUICK, **pins):
    return RemoteWheel(web.url(PATH), client=Client(policy), **{"verify": "record"} | pins)


def is_right(wheel, member=NORM):
    return wheel.extract(member).read_bytes() == MEMBERS[member]


def fetched_at_most(wheel, content=WHEEL, member=NORM):
    """The member, the zip's directory with its end, and RECORD with its header."""
    archive = zipfile.ZipFile(io.BytesIO(content))
    [record] = [name for name in archive.namelist() if name.endswith("/RECORD")]
    overhead = len(content) - archive.getinfo(record).header_offset
    return wheel.client.moved <= 1.05 * archive.getinfo(member).compress_size + overhead


def object_of(member):
    found = sha256(MEMBERS[member])
    return f"objects/{found[:2]}/{found}/{member.rpartition('/')[2]}"


def pin_of(web, **more):
    return PinnedWheel(
        release="1.2.3",
        cuda="cu130",
        platform="linux-x86_64",
        layout="monolithic",
        file=NAME,
        url=web.url(PATH),
        provenance="a test",
        **PINS | more,
    )


def test_a_member(web, root):
    wheel = open_wheel(web, **PINS, size=len(WHEEL))
    assert wheel.version == "1.2.3+cu130"
    assert wheel.members[NORM] == len(MEMBERS[NORM])
    assert (wheel.trust, wheel.record_sha256) == ("record-pinned", RECORD)
    path = wheel.extract(NORM)
    assert path.read_bytes() == MEMBERS[NORM]
    assert path.name == "norm.so"
    assert tree(root) == [INDEX, object_of(NORM)]
    assert fetched_at_most(wheel)
    assert wheel.client.moved == web.sent
    assert wheel.client.requests == 4  # the end, the directory, RECORD, the member
    assert wheel.extract(NORM) == path
    assert wheel.client.requests == 4
    # The next process asks for the member alone.
    wheel = open_wheel(web, **PINS)
    assert wheel.client.requests == 0
    assert is_right(wheel, OTHER)
    assert wheel.client.requests == 1


@pytest.mark.parametrize("comment", [b"", b"signed by nobody" * 100])
@pytest.mark.parametrize("zip64", [False, True])
def test_other_zips(web, comment, zip64):
    web.files[PATH] = File(make_wheel(MEMBERS, comment=comment, zip64=zip64))
    assert is_right(open_wheel(web))


def test_a_zip64_directory(web, monkeypatch):
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 3)
    content = make_wheel(MEMBERS)
    assert b"PK\x06\x06" in content[-98:]
    web.files[PATH] = File(content)
    wheel = open_wheel(web)
    assert is_right(wheel)
    assert fetched_at_most(wheel, content)


def test_a_local_header_longer_than_the_directory_says(web):
    """Extra fields may be in the one and not in the other, as alignment padding is."""
    extra = b"\x99\x99" + (3000).to_bytes(2, "little") + bytes(3000)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(NORM, MEMBERS[NORM])
        # The next member is written behind a gap; the first one's data is moved into it.
        end = out.tell()
        data = out.getvalue()[30 + len(NORM) :]
        header = bytearray(out.getvalue()[:30])
        struct.pack_into("<H", header, 28, len(extra))
        out.seek(0)
        out.write(bytes(header) + NORM.encode() + extra + data)
        archive.start_dir = end + len(extra)
        archive.writestr(f"{INFO}/RECORD", faults.record({NORM: MEMBERS[NORM]}))
    web.files[PATH] = File(out.getvalue())
    assert is_right(open_wheel(web))


def test_trust(web, root):
    assert open_wheel(web).trust == "record-unpinned"
    assert open_wheel(web, **BY_FILE).trust == "record-unpinned"
    assert open_wheel(web, **PINS).trust == "record-pinned"
    full = open_wheel(web, **PINS, verify="full")  # takes no whole file where RECORD is pinned
    assert (full.trust, full.client.moved) == ("record-pinned", 0)
    assert tree(root) == [INDEX]
    assert open_wheel(web, **BY_FILE, verify="full").trust == "file-verified"
    found = sha256(WHEEL)
    assert f"objects/{found[:2]}/{found}/{NAME}" in tree(root)
    requests = len(web.seen)
    again = open_wheel(web, **BY_FILE)
    assert again.trust == "file-verified"
    assert is_right(again)
    assert len(web.seen) == requests  # the whole file is here


@pytest.mark.parametrize(
    ("pins", "match"),
    [
        ({"verify": "full"}, "no sha256 to verify"),
        ({"record_sha256": "0" * 64}, f"sha256 of RECORD is {RECORD}, pinned is 0000"),
        ({"size": len(WHEEL) + 1}, f"{len(WHEEL)} bytes, pinned at {len(WHEEL) + 1}"),
    ],
)
def test_pins_that_do_not_fit(web, root, pins, match):
    with pytest.raises(ArtifactError, match=match):
        open_wheel(web, **pins)
    assert tree(root) == []


def test_a_server_without_ranges(web, root):
    wheel = open_wheel(web, **PINS)
    web.files[PATH].ranges = False
    with pytest.raises(FetchError, match="whole files only"):
        open_wheel(web)
    assert is_right(wheel)  # that had them before
    assert open_wheel(web, **BY_FILE).trust == "file-verified"
    assert not [name for name in tree(root) if name.startswith("downloads")]


def test_wrong_bytes(web, root):
    wheel = open_wheel(web, **PINS)
    web.always = faults.other_bytes
    with pytest.raises(ArtifactError, match="norm.so"):
        wheel.extract(NORM)
    assert tree(root) == [INDEX]
    web.always = None
    assert is_right(wheel)


def test_a_file_that_changes_once(web):
    """Between the directory and the member: all is read again, of the new file."""
    wheel = open_wheel(web)
    web.files[PATH] = File(make_wheel(MEMBERS | {NORM: b"new" * 1000}), etag='"two"')
    assert wheel.extract(NORM).read_bytes() == b"new" * 1000


def test_a_file_that_changes_all_the_time(web, root):
    turns = iter(range(1000))
    web.always = lambda answer: faults.header("ETag", f'"{next(turns)}"')(answer)
    with pytest.raises(FetchError, match="changed while it was read"):
        open_wheel(web)
    assert len(web.seen) < 10
    assert tree(root) == []


def test_a_pinned_file_that_changes(web, root):
    wheel = open_wheel(web, **PINS)
    web.files[PATH] = File(make_wheel(MEMBERS | {NORM: b"evil" * 1000}), etag='"two"')
    with pytest.raises(ArtifactError, match="pinned is"):
        wheel.extract(NORM)
    assert tree(root) == [INDEX]


@pytest.mark.parametrize("fault", [status(500), faults.truncate])
def test_what_passes(web, root, fault):
    web.faults = [fault, faults.good] * 3 + [fault]
    assert is_right(open_wheel(web))
    assert tree(root) == [object_of(NORM)]


@pytest.mark.parametrize("fault", [status(404), faults.truncate, faults.stall, faults.shifted])
@pytest.mark.parametrize("before", [0, 1, 2, 3])
def test_what_does_not(web, root, fault, before):
    """Whatever part it hits, nothing stays but what is whole."""
    policy = replace(QUICK, tries=2, read_timeout=0.3)
    web.faults, web.always = [faults.good] * before, fault
    with pytest.raises(FetchError, match=r"\+cu130|%2Bcu130"):
        open_wheel(web, policy, **BY_FILE, size=len(WHEEL)).extract(NORM)
    assert tree(root) == ([INDEX] if before == 3 else [])


def test_offline(web, root, monkeypatch):
    monkeypatch.setenv("FI_FFI_OFFLINE", "1")
    with pytest.raises(FetchError, match=f"the directory of kernels-1.2.3.*{root}"):
        open_wheel(web, **PINS)
    monkeypatch.delenv("FI_FFI_OFFLINE")
    open_wheel(web, **PINS).extract(NORM)
    requests = len(web.seen)
    monkeypatch.setenv("FI_FFI_OFFLINE", "1")
    wheel = open_wheel(web, **PINS)
    assert is_right(wheel)
    with pytest.raises(FetchError, match="a member of kernels-1.2.3"):
        wheel.extract(OTHER)
    assert len(web.seen) == requests


@pytest.mark.parametrize(
    "damage", [b"", b"{}", b"[1]", b"\xff", b'{"format": 3, "data": {"size": 3}}']
)
def test_a_damaged_index_is_fetched_again(web, root, damage):
    open_wheel(web, **PINS)
    kept = (root / INDEX).read_bytes()
    (root / INDEX).write_bytes(damage)
    assert is_right(open_wheel(web, **PINS))
    assert (root / INDEX).read_bytes() == kept


def test_an_index_of_another_file(web):
    """Nobody knows how it came there: the member does not fit, and all is read anew."""
    web.files[PATH] = File(make_wheel({NORM: b"other" * 10_000, OTHER: b"o"}))
    open_wheel(web, **BY_FILE)
    web.files[PATH] = File(WHEEL)
    assert is_right(open_wheel(web, **BY_FILE))


def test_a_file_address(root, tmp_path, monkeypatch):
    monkeypatch.setenv("FI_FFI_OFFLINE", "1")  # no socket either
    path = tmp_path / "a dir" / NAME
    path.parent.mkdir()
    path.write_bytes(WHEEL)
    wheel = RemoteWheel(path.as_uri(), **BY_FILE, verify="record")
    assert is_right(wheel)
    assert wheel.trust == "record-unpinned"
    assert RemoteWheel(path.as_uri(), **BY_FILE, verify="full").trust == "file-verified"
    with pytest.raises(ArtifactError, match="pinned is"):
        RemoteWheel(path.as_uri(), sha256="0" * 64, verify="full")
    with pytest.raises(ArtifactError, match="no such file"):
        RemoteWheel((tmp_path / "none.whl").as_uri(), verify="record")


def test_threads_fetch_a_member_once(web, root):
    web.bandwidth = 500_000
    wheels = [open_wheel(web, **PINS) for _ in range(4)]
    before = len(web.seen)
    threads = [threading.Thread(target=wheel.extract, args=(NORM,)) for wheel in wheels]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert tree(root) == [INDEX, object_of(NORM)]
    assert len(web.seen) == before + 1


def test_directories_are_bounded(web):
    """A directory said to have 3 GB, in a file said to be larger still."""
    content = bytearray(make_wheel(MEMBERS))
    content[-10:-6] = (3 << 30).to_bytes(4, "little")
    web.files[PATH] = File(bytes(content))
    with pytest.raises(ArtifactError, match="not a readable wheel"):
        open_wheel(web)
    assert web.sent < 70_000


def test_members_are_not_longer_than_they_are(web):
    """Compressed data that is far longer than the content it stands for is not fetched."""
    text = f"{NORM},{digest(b'x')},1\n".encode()
    content = bytearray(make_wheel(MEMBERS, record_text=text))
    assert zipfile.ZipFile(io.BytesIO(content)).infolist()[0].filename == NORM
    struct.pack_into("<I", content, content.index(b"PK\x01\x02") + 24, 1)
    web.files[PATH] = File(bytes(content))
    wheel = open_wheel(web)
    before = wheel.client.requests
    with pytest.raises(ArtifactError, match="for a content of 1"):
        wheel.extract(NORM)
    assert wheel.client.requests == before


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    with pytest.MonkeyPatch.context() as patch, Server() as server:
        patch.setenv("FI_FFI_CACHE_DIR", str(folder / "cache"))
        patch.delenv("FI_FFI_OFFLINE", raising=False)
        yield server, folder


def read_all(web, folder, content):
    """Members as RECORD has them, or errors of ours; nothing outside the cache."""
    web.files[PATH] = File(content)
    begun = time.monotonic()
    with contextlib.suppress(LoaderError):
        faults.extract_all(open_wheel(web))
    assert time.monotonic() - begun < 5
    assert [path.name for path in folder.iterdir() if path.name != "cache"] == []


SMALL = make_wheel({NORM: b"\x7fELF" + b"kernel code " * 20, "a.so": b"x"})


@given(
    st.lists(st.tuples(st.integers(0, len(SMALL) - 1), st.integers(0, 255)), max_size=8),
    st.integers(0, len(SMALL)),
    st.binary(max_size=30),
)
@settings(max_examples=200, deadline=None, suppress_health_check=[*HealthCheck])
def test_any_zip(fuzzed, changes, cut, tail):
    content = bytearray(SMALL)
    for position, value in changes:
        content[position] = value
    if cut % 3 == 0:
        del content[cut:]
    read_all(*fuzzed, bytes(content) + (tail if cut % 5 == 0 else b""))


def test_headers_at_random(fuzzed):
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    headers = [i for i in range(len(SMALL)) if SMALL[i : i + 2] == b"PK"]
    for _ in range(250):
        content = bytearray(SMALL)
        for _ in range(rng.randint(1, 4)):
            content[(rng.choice(headers) + rng.randrange(60)) % len(SMALL)] = rng.randrange(256)
        read_all(*fuzzed, bytes(content))


def test_a_server_that_refused_is_not_waited_for_again_and_again(web, monkeypatch):
    """Not by the next module, nor the one after that; later it is asked anew."""
    source = pinned_wheels.PinnedKernels(pin_of(web))
    web.always = status(403)
    said = []
    for _ in range(2):
        with pytest.raises(FetchError) as caught:
            source.modules()
        said.append((str(caught.value), len(web.seen)))
    assert said[0] == said[1] and said[0][1]
    web.always = faults.good
    monkeypatch.setattr(asking, "UNREACHABLE", 0.0)
    assert "norm" in source.modules()
