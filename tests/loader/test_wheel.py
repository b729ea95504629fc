"""Wheels: every member checked against RECORD, and nothing believed before that."""

from __future__ import annotations

import base64
import contextlib
import csv
import hashlib
import io
import random
import struct
import time
import zipfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from fi_ffi.errors import ArtifactError, LoaderError
from fi_ffi.loader.wheel import Wheel, parse_record

from tests.loader.server import extract_all

INFO = "kernels-1.2.3+cu130.dist-info"
MEMBER = "kernels/jit_cache/norm/norm.so"
CONTENT = bytes(range(256)) * 300


def digest(content: bytes) -> str:
    raw = hashlib.sha256(content).digest()
    return "sha256=" + base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def record(members: dict[str, bytes]) -> bytes:
    lines = io.StringIO()
    rows = [(name, digest(content), len(content)) for name, content in members.items()]
    csv.writer(lines).writerows([*rows, (f"{INFO}/RECORD", "", "")])
    return lines.getvalue().encode()


def make_wheel(
    path: Path,
    members: dict[str, bytes] | None = None,
    records: dict[str, bytes] | None = None,
    compression: int = zipfile.ZIP_DEFLATED,
) -> Path:
    members = {MEMBER: CONTENT} if members is None else members
    records = {f"{INFO}/RECORD": record(members)} if records is None else records
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in (members | records).items():
            archive.writestr(name, content)
    return path


@pytest.fixture(autouse=True)
def cache_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "cache"
    monkeypatch.setenv("FI_FFI_CACHE_DIR", str(root))
    return root


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "kernels-1.2.3+cu130-cp39-abi3-linux_x86_64.whl"


def stored(root: Path) -> list[Path]:
    return [path for path in root.rglob("*") if path.is_file()]


COMPRESSIONS = [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]
UNUSUAL = [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]  # no wheel has them


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_a_member(path: Path, cache_root: Path, compression: int) -> None:
    wheel = Wheel(make_wheel(path, compression=compression))
    assert wheel.version == "1.2.3+cu130"
    assert wheel.members[MEMBER] == len(CONTENT)
    found = wheel.extract(MEMBER)
    assert found.is_relative_to(cache_root)
    assert found.name == "norm.so"
    assert found.read_bytes() == CONTENT
    assert wheel.extract(MEMBER) == found


def test_an_empty_member(path: Path) -> None:
    wheel = Wheel(make_wheel(path, {MEMBER: b""}))
    assert wheel.extract(MEMBER).read_bytes() == b""


def test_no_such_member(path: Path) -> None:
    with pytest.raises(ArtifactError, match="no recorded member other.so"):
        Wheel(make_wheel(path)).extract("other.so")


def test_a_member_that_record_does_not_list(path: Path, cache_root: Path) -> None:
    rows = {
        "nothing": b"",
        "no hash": f"{MEMBER},,{len(CONTENT)}\n".encode(),
        "no size": f"{MEMBER},{digest(CONTENT)},\n".encode(),
    }
    for row in rows.values():
        wheel = Wheel(make_wheel(path, records={f"{INFO}/RECORD": row}))
        with pytest.raises(ArtifactError, match="no recorded member"):
            wheel.extract(MEMBER)
    assert stored(cache_root) == []


@pytest.mark.parametrize("count", [0, 2])
def test_a_wrong_number_of_records(path: Path, count: int) -> None:
    records = {f"{i}-{INFO}/RECORD": record({MEMBER: CONTENT}) for i in range(count)}
    with pytest.raises(ArtifactError, match=f"{count} RECORD files, expected one"):
        Wheel(make_wheel(path, records=records))


def test_a_wrong_hash(path: Path, cache_root: Path) -> None:
    wrong = record({MEMBER: CONTENT[::-1]})
    with pytest.raises(ArtifactError, match=f"{MEMBER}: sha256 is .*, expected"):
        Wheel(make_wheel(path, records={f"{INFO}/RECORD": wrong})).extract(MEMBER)
    assert stored(cache_root) == []


@pytest.mark.parametrize("size", [0, len(CONTENT) - 1, len(CONTENT) + 1, 10**17])
def test_a_wrong_size(path: Path, cache_root: Path, size: int) -> None:
    line = f"{MEMBER},{digest(CONTENT)},{size}\n".encode()
    wheel = Wheel(make_wheel(path, records={f"{INFO}/RECORD": line}))
    with pytest.raises(ArtifactError, match=f"{len(CONTENT)} bytes, {size} in RECORD"):
        wheel.extract(MEMBER)
    assert stored(cache_root) == []


def central_entry(data: bytearray, member: str) -> int:
    """Where the central directory's entry of a member begins."""
    position = data.find(b"PK\x01\x02")
    while data[position + 46 :][: len(member)] != member.encode():
        position = data.find(b"PK\x01\x02", position + 1)
        assert position >= 0
    return position


def test_a_member_that_is_longer_than_it_says(path: Path, cache_root: Path) -> None:
    """Directory and RECORD agree on a size that the compressed data goes past."""
    claimed = 100
    line = f"{MEMBER},{digest(CONTENT[:claimed])},{claimed}\n".encode()
    data = bytearray(make_wheel(path, records={f"{INFO}/RECORD": line}).read_bytes())
    struct.pack_into("<I", data, central_entry(data, MEMBER) + 24, claimed)
    path.write_bytes(data)
    with pytest.raises(ArtifactError):
        Wheel(path).extract(MEMBER)
    assert stored(cache_root) == []


def test_a_member_that_is_shorter_than_it_says(path: Path, cache_root: Path) -> None:
    line = f"{MEMBER},{digest(CONTENT)},{len(CONTENT) + 5}\n".encode()
    data = bytearray(make_wheel(path, records={f"{INFO}/RECORD": line}).read_bytes())
    struct.pack_into("<I", data, central_entry(data, MEMBER) + 24, len(CONTENT) + 5)
    path.write_bytes(data)
    with pytest.raises(ArtifactError):
        Wheel(path).extract(MEMBER)
    assert stored(cache_root) == []


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_damaged_data(path: Path, cache_root: Path, compression: int) -> None:
    data = bytearray(make_wheel(path, compression=compression).read_bytes())
    start = data.find(b"PK\x03\x04") + 30 + len(MEMBER)
    for i in range(start + 10, start + 60):
        data[i] ^= 0x55
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match="norm.so cannot be read"):
        Wheel(path).extract(MEMBER)
    assert stored(cache_root) == []


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_a_damaged_record(path: Path, compression: int) -> None:
    text = b"".join(b"%d,,\n" % number for number in range(1000))
    data = bytearray(
        make_wheel(path, records={f"{INFO}/RECORD": text}, compression=compression).read_bytes()
    )
    start = data.rfind(b"PK\x03\x04") + 30 + len(f"{INFO}/RECORD")
    for i in range(start + 10, start + 60):
        data[i] ^= 0x55
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match="RECORD cannot be read"):
        Wheel(path)


def test_an_encrypted_member(path: Path, cache_root: Path) -> None:
    data = bytearray(make_wheel(path).read_bytes())
    for position in (data.find(b"PK\x03\x04") + 6, central_entry(data, MEMBER) + 8):
        data[position] |= 1
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match="cannot be read: .*encrypted"):
        Wheel(path).extract(MEMBER)
    assert stored(cache_root) == []


def test_an_unknown_compression(path: Path) -> None:
    data = bytearray(make_wheel(path).read_bytes())
    struct.pack_into("<H", data, data.find(b"PK\x03\x04") + 8, 99)
    struct.pack_into("<H", data, central_entry(data, MEMBER) + 10, 99)
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match="method 99"):
        Wheel(path).extract(MEMBER)


@pytest.mark.parametrize("compression", UNUSUAL)
def test_an_unusual_compression(path: Path, compression: int) -> None:
    """Their decompressors put out what they like at once: a bomb could not be stopped."""
    with pytest.raises(ArtifactError, match=f"method {compression}"):
        Wheel(make_wheel(path, compression=compression))


@pytest.mark.parametrize("part", [0, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file(path: Path, part: float) -> None:
    data = make_wheel(path).read_bytes()
    path.write_bytes(data[: int(len(data) * part)])
    with pytest.raises(ArtifactError, match=path.name.replace("+", r"\+")):
        Wheel(path)


@pytest.mark.parametrize("content", [b"", b"PK", b"not a zip", b"\x7fELF" * 100])
def test_other_files(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match="not a readable wheel"):
        Wheel(path)


def test_no_file(path: Path) -> None:
    with pytest.raises(ArtifactError, match="No such file"):
        Wheel(path)
    with pytest.raises(ArtifactError):
        Wheel(path.parent)


TRICKS = [
    "../../escaped.so",
    "/tmp/fi-ffi-escaped.so",
    "a/../../../../escaped.so",
    "..",
    "a/..",
    "a/.",
    "a/",
    "/",
    "~/escaped.so",
    "C:\\escaped.so",
    "..\\..\\escaped.so",
]


@pytest.mark.parametrize("member", TRICKS)
def test_names_lead_nowhere_else(path: Path, tmp_path: Path, cache_root: Path, member: str) -> None:
    """A wheel with one that leads elsewhere is refused; of others only the last part is used."""
    try:
        wheel = Wheel(make_wheel(path, {member: CONTENT}))
        assert wheel.extract(member).resolve().is_relative_to(cache_root / "objects")
    except LoaderError:
        pass
    assert [p for p in stored(tmp_path) if not p.is_relative_to(cache_root)] == [path]
    assert not Path("/tmp/fi-ffi-escaped.so").exists()


def test_a_bomb_is_not_unpacked(path: Path, cache_root: Path) -> None:
    """256 MB of zeros that RECORD says are 100 bytes."""
    line = f"{MEMBER},{digest(b'0' * 100)},100\n".encode()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open(MEMBER, "w") as file:
            for _ in range(16):
                file.write(bytes(1 << 24))
        archive.writestr(f"{INFO}/RECORD", line)
    begun = time.monotonic()
    with pytest.raises(ArtifactError, match="100 in RECORD"):
        Wheel(path).extract(MEMBER)
    assert time.monotonic() - begun < 1
    assert stored(cache_root) == []


def test_a_record_that_is_a_bomb(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"{INFO}/RECORD", bytes(1 << 27))
    with pytest.raises(ArtifactError, match="RECORD of 134217728 bytes"):
        Wheel(path)


GOOD = digest(b"")


@pytest.mark.parametrize(
    "line",
    [
        f"a.so,{GOOD}",
        f"a.so,{GOOD},1,2",
        "a.so",
        f"a.so,{GOOD[:-1]},1",
        f"a.so,{GOOD},1\n\nb.so,{GOOD},1",
        f"a.so,{GOOD[:-1]}*,1",
        f"a.so,{GOOD.replace('sha256', 'md5')},1",
        f"a.so,{GOOD.replace('sha256=', '')},1",
        "a.so,sha256=,1",
        "a.so,sha256=é,1",
        f"a.so,{GOOD},-1",
        f"a.so,{GOOD},1.0",
        f"a.so,{GOOD},٣",
        f"a.so,{GOOD}, 1",
        f"a.so,{GOOD},1e3",
        f"a.so,{GOOD},{'9' * 5000}",
        f'a.so,"{GOOD},1',
    ],
)
def test_malformed_lines(line: str) -> None:
    with pytest.raises(ArtifactError, match="the wheel"):
        parse_record(line.encode(), "the wheel")


def test_lines() -> None:
    text = f'a.so,{GOOD},7\r\n"b,c.so",{GOOD}=,8\nRECORD,,\n'
    found = parse_record(text.encode(), "the wheel")
    assert {name: entry.size for name, entry in found.items()} == {"a.so": 7, "b,c.so": 8}
    assert found["a.so"].sha256 == hashlib.sha256(b"").hexdigest()


@given(
    st.one_of(st.binary(), st.text().map(str.encode), st.text('a",=\n\r\0 sh256').map(str.encode))
)
@example(b'"' + b"x" * 200_000)  # longer than a field may be to the csv module
@example(b"\xff")
@example(b"a,b\0,c")
def test_any_record(text: bytes) -> None:
    try:
        for entry in parse_record(text, "the wheel").values():
            assert len(entry.sha256) == 64
            assert entry.size >= 0
    except ArtifactError:
        pass


@given(
    st.sampled_from(COMPRESSIONS + UNUSUAL),
    st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 255)), min_size=1, max_size=8),
    st.one_of(st.none(), st.integers(0, 2000)),
)
@settings(
    max_examples=400, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_mutated_wheels(
    tmp_path: Path, compression: int, changes: list[tuple[int, int]], cut: int | None
) -> None:
    """Whatever the bytes: a member as RECORD has it, or an error of ours, in bounded time."""
    content = b"\x7fELF" + b"kernel code " * 20
    wheel = make_wheel(tmp_path / "fuzz.whl", {MEMBER: content}, compression=compression)
    data = bytearray(wheel.read_bytes())
    for position, value in changes:
        data[position % len(data)] = value
    wheel.write_bytes(data[:cut])
    read_all(wheel)


def read_all(path: Path) -> None:
    with contextlib.suppress(ArtifactError):
        extract_all(Wheel(path))


def test_many_mutations_of_the_structure(tmp_path: Path) -> None:
    """Random bytes in the headers, where they matter most."""
    rng = random.Random()
    wheel = make_wheel(tmp_path / "fuzz.whl", {MEMBER: b"kernel"}, compression=zipfile.ZIP_STORED)
    original = wheel.read_bytes()
    headers = [i for i in range(len(original)) if original[i : i + 2] == b"PK"]
    begun = time.monotonic()
    for _ in range(1500):
        data = bytearray(original)
        for _ in range(rng.randint(1, 4)):
            position = rng.choice(headers) + rng.randrange(60)
            data[position % len(data)] = rng.randrange(256)
        wheel.write_bytes(data)
        try:
            read_all(wheel)
        except Exception as error:
            raise AssertionError(f"{error!r} for {bytes(data).hex()}") from error
    assert time.monotonic() - begun < 60
