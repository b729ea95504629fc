"""A wheel on a server: what is fetched of it, what vouches for it, and what goes wrong."""

from __future__ import annotations

import contextlib
import io
import random
import struct
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fi_ffi.errors import ArtifactError, FetchError, LoaderError
from fi_ffi.loader import search
from fi_ffi.loader.http import Client, Policy
from fi_ffi.loader.lock import PinnedWheel
from fi_ffi.loader.remote import RemoteWheel

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


@pytest.fixture
def web(root: Path) -> Iterator[Server]:
    with Server({PATH: File(WHEEL, etag='"one"')}) as server:
        yield server


def open_wheel(web: Server, policy: Policy = QUICK, **pins: object) -> RemoteWheel:
    pins = {"verify": "record"} | pins
    return RemoteWheel(web.url(PATH), client=Client(policy), **pins)  # type: ignore[arg-type]


def size_of(wheel: bytes, member: str) -> int:
    return zipfile.ZipFile(io.BytesIO(wheel)).getinfo(member).compress_size


def overhead(wheel: bytes) -> int:
    """Bytes of the zip's directory with its end, and of RECORD with its header."""
    archive = zipfile.ZipFile(io.BytesIO(wheel))
    [record] = [name for name in archive.namelist() if name.endswith("/RECORD")]
    return len(wheel) - archive.getinfo(record).header_offset


def object_of(member: str, members: dict[str, bytes] = MEMBERS) -> str:
    name, found = member.rpartition("/")[2], sha256(members[member])
    return f"objects/{found[:2]}/{found}/{name}"


def index_of(wheel: bytes) -> str:
    return f"indexes/{sha256(wheel)}.json"


def test_a_member(web: Server, root: Path) -> None:
    wheel = open_wheel(web, sha256=sha256(WHEEL), record_sha256=RECORD, size=len(WHEEL))
    assert wheel.version == "1.2.3+cu130"
    assert wheel.members[NORM] == len(MEMBERS[NORM])
    assert (wheel.trust, wheel.record_sha256) == ("record-pinned", RECORD)
    path = wheel.extract(NORM)
    assert path.read_bytes() == MEMBERS[NORM]
    assert path.name == "norm.so"
    assert tree(root) == [index_of(WHEEL), object_of(NORM)]
    assert wheel.client.moved <= 1.05 * size_of(WHEEL, NORM) + overhead(WHEEL)
    assert wheel.client.moved == web.sent
    assert wheel.client.requests == 4  # the end, the directory, RECORD, the member
    assert wheel.extract(NORM) == path
    assert wheel.client.requests == 4


def test_the_second_module_takes_one_request(web: Server, root: Path) -> None:
    open_wheel(web, sha256=sha256(WHEEL), record_sha256=RECORD).extract(NORM)
    wheel = open_wheel(web, sha256=sha256(WHEEL), record_sha256=RECORD)
    assert wheel.client.requests == 0
    wheel.extract(OTHER)
    assert wheel.client.requests == 1
    assert wheel.client.moved <= 1.05 * size_of(WHEEL, OTHER)


def test_of_an_entry_of_the_lock(web: Server, root: Path) -> None:
    pin = PinnedWheel(
        release="1.2.3",
        cuda="cu130",
        platform="linux-x86_64",
        layout="monolithic",
        file=NAME,
        url=web.url(PATH),
        sha256=sha256(WHEEL),
        provenance="a test",
        record_sha256=RECORD,
    )
    assert RemoteWheel.of(pin).extract(NORM).read_bytes() == MEMBERS[NORM]
    whole = RemoteWheel.of(
        PinnedWheel(**{**vars(pin), "record_sha256": None, "url": web.url(PATH)}), verify="full"
    )
    assert whole.trust == "file-verified"


@pytest.mark.parametrize("comment", [b"", b"signed by nobody" * 100])
@pytest.mark.parametrize("zip64", [False, True])
def test_other_zips(web: Server, root: Path, comment: bytes, zip64: bool) -> None:
    content = make_wheel(MEMBERS, comment=comment, zip64=zip64)
    web.files[PATH] = File(content)
    assert open_wheel(web).extract(NORM).read_bytes() == MEMBERS[NORM]


def test_a_zip64_directory(web: Server, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 3)
    content = make_wheel(MEMBERS)
    assert b"PK\x06\x06" in content[-98:]
    web.files[PATH] = File(content)
    wheel = open_wheel(web)
    assert wheel.extract(NORM).read_bytes() == MEMBERS[NORM]
    assert wheel.client.moved <= 1.05 * size_of(content, NORM) + overhead(content)


def test_a_local_header_longer_than_the_directory_says(web: Server, root: Path) -> None:
    """Extra fields may be in the one and not in the other, as alignment padding is."""
    padding = b"\x99\x99" + (3000).to_bytes(2, "little") + bytes(3000)
    content = with_local_extra(padding)
    web.files[PATH] = File(content)
    assert open_wheel(web).extract(NORM).read_bytes() == MEMBERS[NORM]


def with_local_extra(extra: bytes) -> bytes:
    """A wheel whose first member's local header, and no other, has an extra field."""
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
    return out.getvalue()


def test_trust(web: Server, root: Path) -> None:
    pins = {"sha256": sha256(WHEEL)}
    assert open_wheel(web).trust == "record-unpinned"
    assert open_wheel(web, **pins).trust == "record-unpinned"
    assert open_wheel(web, **pins, record_sha256=RECORD).trust == "record-pinned"
    assert tree(root) == [index_of(WHEEL)]
    full = open_wheel(web, **pins, verify="full")
    assert full.trust == "file-verified"
    found = sha256(WHEEL)
    assert f"objects/{found[:2]}/{found}/{NAME}" in tree(root)
    requests = len(web.seen)
    again = open_wheel(web, **pins)
    assert again.trust == "file-verified"
    assert again.extract(NORM).read_bytes() == MEMBERS[NORM]
    assert len(web.seen) == requests  # the whole file is here


def test_full_verification_needs_no_whole_file_where_record_is_pinned(
    web: Server, root: Path
) -> None:
    wheel = open_wheel(web, sha256=sha256(WHEEL), record_sha256=RECORD, verify="full")
    assert wheel.trust == "record-pinned"
    assert wheel.client.moved < 5000


def test_full_verification_of_nothing_pinned(web: Server, root: Path) -> None:
    with pytest.raises(ArtifactError, match="no sha256 to verify"):
        open_wheel(web, verify="full")


def test_a_server_without_ranges(web: Server, root: Path) -> None:
    web.files[PATH].ranges = False
    with pytest.raises(FetchError, match="whole files only"):
        open_wheel(web)
    wheel = open_wheel(web, sha256=sha256(WHEEL))
    assert wheel.trust == "file-verified"
    assert wheel.extract(NORM).read_bytes() == MEMBERS[NORM]
    assert not [name for name in tree(root) if name.startswith("downloads")]


def test_a_server_that_forgets_its_ranges(web: Server, root: Path) -> None:
    wheel = open_wheel(web, sha256=sha256(WHEEL), record_sha256=RECORD)
    web.files[PATH].ranges = False
    assert wheel.extract(NORM).read_bytes() == MEMBERS[NORM]


def test_another_record_than_the_pinned_one(web: Server, root: Path) -> None:
    with pytest.raises(ArtifactError, match=f"sha256 of RECORD is {RECORD}, pinned is 0000"):
        open_wheel(web, record_sha256="0" * 64)
    assert tree(root) == []


def test_another_size_than_the_pinned_one(web: Server, root: Path) -> None:
    with pytest.raises(ArtifactError, match=f"{len(WHEEL)} bytes, pinned are {len(WHEEL) + 1}"):
        open_wheel(web, size=len(WHEEL) + 1)
    assert tree(root) == []


def test_wrong_bytes(web: Server, root: Path) -> None:
    wheel = open_wheel(web, sha256=sha256(WHEEL), record_sha256=RECORD)
    web.always = faults.other_bytes
    with pytest.raises(ArtifactError, match="norm.so"):
        wheel.extract(NORM)
    assert tree(root) == [index_of(WHEEL)]
    web.always = None
    assert wheel.extract(NORM).read_bytes() == MEMBERS[NORM]


def test_a_member_that_is_not_the_recorded_one(web: Server, root: Path) -> None:
    text = f"{NORM},{digest(MEMBERS[OTHER])},{len(MEMBERS[NORM])}\n".encode()
    web.files[PATH] = File(make_wheel(MEMBERS, record_text=text))
    with pytest.raises(ArtifactError, match="norm.so: sha256 is"):
        open_wheel(web).extract(NORM)
    assert tree(root) == []


def test_a_file_that_changes_once(web: Server, root: Path) -> None:
    """Between the directory and the member: all is read again, of the new file."""
    wheel = open_wheel(web)
    members = MEMBERS | {NORM: b"new" * 1000}
    web.files[PATH] = File(make_wheel(members), etag='"two"')
    assert wheel.extract(NORM).read_bytes() == b"new" * 1000


def test_a_file_that_changes_all_the_time(web: Server, root: Path) -> None:
    turns = iter(range(1000))

    def other(answer: faults.Answer) -> faults.Answer:
        return faults.header("ETag", f'"{next(turns)}"')(answer)

    web.always = other
    with pytest.raises(FetchError, match="changed while it was read"):
        open_wheel(web)
    assert len(web.seen) < 10
    assert tree(root) == []


def test_a_pinned_file_that_changes(web: Server, root: Path) -> None:
    wheel = open_wheel(web, sha256=sha256(WHEEL), record_sha256=RECORD)
    web.files[PATH] = File(make_wheel(MEMBERS | {NORM: b"evil" * 1000}), etag='"two"')
    with pytest.raises(ArtifactError, match="pinned is"):
        wheel.extract(NORM)
    assert tree(root) == [index_of(WHEEL)]


@pytest.mark.parametrize(
    "fault",
    [status(500), status(429), faults.truncate, faults.reset, faults.stall],
)
def test_what_passes(web: Server, root: Path, fault: faults.Fault) -> None:
    web.faults = [fault, faults.good, fault, faults.good, fault, faults.good, fault]
    assert open_wheel(web).extract(NORM).read_bytes() == MEMBERS[NORM]
    assert tree(root) == [object_of(NORM)]


@pytest.mark.parametrize(
    "fault",
    [
        status(404),
        status(403),
        status(500),
        faults.truncate,
        faults.stall,
        faults.trickle,
        faults.shifted,
        faults.longer,
    ],
)
@pytest.mark.parametrize("before", [0, 1, 2, 3])
def test_what_does_not(web: Server, root: Path, fault: faults.Fault, before: int) -> None:
    """Whatever part it hits, nothing stays but what is whole."""
    policy = Policy(tries=2, first_wait=0.01, read_timeout=0.2)
    web.faults, web.always = [faults.good] * before, fault
    with pytest.raises(FetchError, match=r"\+cu130|%2Bcu130"):
        open_wheel(web, policy, sha256=sha256(WHEEL), size=len(WHEEL)).extract(NORM)
    assert tree(root) == ([index_of(WHEEL)] if before == 3 else [])


def test_offline(web: Server, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pins = {"sha256": sha256(WHEEL), "record_sha256": RECORD}
    monkeypatch.setenv("FI_FFI_OFFLINE", "1")
    with pytest.raises(FetchError, match="the directory of kernels-1.2.3") as caught:
        open_wheel(web, **pins)
    assert str(root) in str(caught.value)
    monkeypatch.delenv("FI_FFI_OFFLINE")
    open_wheel(web, **pins).extract(NORM)
    requests = len(web.seen)
    monkeypatch.setenv("FI_FFI_OFFLINE", "1")
    wheel = open_wheel(web, **pins)
    assert wheel.extract(NORM).read_bytes() == MEMBERS[NORM]
    with pytest.raises(FetchError, match="a member of kernels-1.2.3"):
        wheel.extract(OTHER)
    assert len(web.seen) == requests


@pytest.mark.parametrize(
    "damage", [b"", b"{}", b"[1]", b"\xff", b'{"format": 2, "data": {"size": 3}}']
)
def test_a_damaged_index_is_fetched_again(web: Server, root: Path, damage: bytes) -> None:
    pins = {"sha256": sha256(WHEEL), "record_sha256": RECORD}
    open_wheel(web, **pins)
    path = root / index_of(WHEEL)
    kept = path.read_bytes()
    path.write_bytes(damage)
    assert open_wheel(web, **pins).extract(NORM).read_bytes() == MEMBERS[NORM]
    assert path.read_bytes() == kept


def test_an_index_of_another_file(web: Server, root: Path) -> None:
    """Nobody knows how it came there: the member does not fit, and all is read anew."""
    pins = {"sha256": sha256(WHEEL), "record_sha256": None}
    other = make_wheel({NORM: b"other" * 10_000, OTHER: b"o"})
    web.files[PATH] = File(other)
    open_wheel(web, **pins)
    web.files[PATH] = File(WHEEL)
    assert open_wheel(web, **pins).extract(NORM).read_bytes() == MEMBERS[NORM]


def test_a_file_address(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FI_FFI_OFFLINE", "1")  # no socket either
    path = tmp_path / "a dir" / NAME
    path.parent.mkdir()
    path.write_bytes(WHEEL)
    wheel = RemoteWheel(path.as_uri(), sha256=sha256(WHEEL), verify="record")
    assert wheel.extract(NORM).read_bytes() == MEMBERS[NORM]
    assert wheel.trust == "record-unpinned"
    assert RemoteWheel(path.as_uri(), sha256=sha256(WHEEL), verify="full").trust == "file-verified"
    with pytest.raises(ArtifactError, match="pinned is"):
        RemoteWheel(path.as_uri(), sha256="0" * 64, verify="full")
    with pytest.raises(ArtifactError, match="no such file"):
        RemoteWheel((tmp_path / "none.whl").as_uri(), verify="record")


def test_threads_fetch_a_member_once(web: Server, root: Path) -> None:
    web.bandwidth = 500_000
    wheels = [open_wheel(web, sha256=sha256(WHEEL), record_sha256=RECORD) for _ in range(4)]
    before = len(web.seen)
    threads = [threading.Thread(target=wheel.extract, args=(NORM,)) for wheel in wheels]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert tree(root) == [index_of(WHEEL), object_of(NORM)]
    assert len(web.seen) == before + 1


def test_directories_are_bounded(web: Server, root: Path) -> None:
    """A directory said to have 3 GB, in a file said to be larger still."""
    content = bytearray(make_wheel(MEMBERS))
    content[-10:-6] = (3 << 30).to_bytes(4, "little")

    web.files[PATH] = File(bytes(content))
    with pytest.raises(ArtifactError, match="not a readable wheel"):
        open_wheel(web)
    assert web.sent < 70_000


def test_a_record_that_is_a_bomb(web: Server, root: Path) -> None:
    web.files[PATH] = File(make_wheel(MEMBERS, record_text=bytes(1 << 27)))
    with pytest.raises(ArtifactError, match="RECORD of 134217728 bytes"):
        open_wheel(web)


def test_members_are_not_longer_than_they_are(web: Server, root: Path) -> None:
    """Compressed data that is far longer than the content it stands for is not fetched."""
    text = f"{NORM},{digest(b'x')},1\n".encode()
    content = bytearray(make_wheel(MEMBERS, record_text=text))
    entry = content.index(b"PK\x01\x02")
    assert zipfile.ZipFile(io.BytesIO(content)).infolist()[0].filename == NORM
    struct.pack_into("<I", content, entry + 24, 1)
    web.files[PATH] = File(bytes(content))
    wheel = open_wheel(web)
    before = wheel.client.requests
    with pytest.raises(ArtifactError, match="for a content of 1"):
        wheel.extract(NORM)
    assert wheel.client.requests == before


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Path]]:
    folder = tmp_path_factory.mktemp("fuzz")
    with pytest.MonkeyPatch.context() as patch, Server() as server:
        patch.setenv("FI_FFI_CACHE_DIR", str(folder / "cache"))
        patch.delenv("FI_FFI_OFFLINE", raising=False)
        yield server, folder


def read_all(web: Server, folder: Path, content: bytes) -> None:
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
@settings(max_examples=400, deadline=None, suppress_health_check=[*HealthCheck])
def test_any_zip(
    fuzzed: tuple[Server, Path], changes: list[tuple[int, int]], cut: int, tail: bytes
) -> None:
    content = bytearray(SMALL)
    for position, value in changes:
        content[position] = value
    if cut % 3 == 0:
        del content[cut:]
    read_all(*fuzzed, bytes(content) + (tail if cut % 5 == 0 else b""))


def test_headers_at_random(fuzzed: tuple[Server, Path]) -> None:
    rng = random.Random()
    headers = [i for i in range(len(SMALL)) if SMALL[i : i + 2] == b"PK"]
    for _ in range(500):
        content = bytearray(SMALL)
        for _ in range(rng.randint(1, 4)):
            content[(rng.choice(headers) + rng.randrange(60)) % len(SMALL)] = rng.randrange(256)
        try:
            read_all(*fuzzed, bytes(content))
        except Exception as error:
            raise AssertionError(f"{error!r} for {bytes(content).hex()}") from error


LINES = st.one_of(
    st.binary(max_size=200),
    st.text('a.so,"=\n\r\0 sh256/', max_size=100).map(str.encode),
    st.tuples(
        st.sampled_from([NORM, "a.so", "../../x.so", "/x.so", "", "a.so\0"]),
        st.sampled_from([digest(b"x"), digest(b""), "sha256=", "md5=abc", ""]),
        st.sampled_from(["1", "0", "-1", "9" * 30, "", "1e3"]),
    ).map(lambda row: ",".join(row).encode()),
)


@given(st.lists(LINES, max_size=5).map(b"\n".join))
@settings(max_examples=250, deadline=None, suppress_health_check=[*HealthCheck])
def test_any_record(fuzzed: tuple[Server, Path], text: bytes) -> None:
    members = {NORM: b"y", "a.so": b"x", "../../x.so": b"x", "/x.so": b"x"}
    read_all(*fuzzed, make_wheel(members, record_text=text))


def test_a_server_that_refused_is_not_waited_for_again_and_again(
    web: Server, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not by the next module, nor the one after that; later it is asked anew."""
    pin = PinnedWheel(
        "1.2.3", "cu130", "linux-x86_64", "monolithic", PATH.rpartition("/")[2], web.url(PATH),
        sha256(WHEEL), "a test", len(WHEEL), record_sha256=RECORD,
    )  # fmt: skip
    source = search.PinnedKernels(pin)
    web.faults, web.always = [], status(403)
    with pytest.raises(FetchError) as first:
        source.modules()
    asked = len(web.seen)
    assert asked
    web.always = faults.good
    with pytest.raises(FetchError) as second:
        source.modules()
    assert (str(second.value), len(web.seen)) == (str(first.value), asked)
    monkeypatch.setattr(search, "UNREACHABLE", 0.0)
    assert "norm" in source.modules()
    assert len(web.seen) > asked
