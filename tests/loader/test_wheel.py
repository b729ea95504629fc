"""Wheels: every member checked against RECORD, and nothing believed before that.

Damaged ones at random: test_remote.py, tests/stress/test_parsers.py.
"""

from __future__ import annotations

import hashlib
import re
import struct
import time
import zipfile
from pathlib import Path

import pytest

from fi_ffi.errors import ArtifactError
from fi_ffi.loader.wheel import Wheel, parse_record

from tests.loader import server
from tests.loader.server import INFO, digest, tree

MEMBER = "kernels/jit_cache/norm/norm.so"
CONTENT = bytes(range(256)) * 300
STORED, DEFLATED = zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED


@pytest.fixture(autouse=True)
def _cache(root):
    """A cache of the test's own."""


@pytest.fixture
def path(tmp_path):
    return tmp_path / "kernels-1.2.3+cu130-cp39-abi3-linux_x86_64.whl"


def make(path, members=None, **how):
    path.write_bytes(server.make_wheel({MEMBER: CONTENT} if members is None else members, **how))
    return path


def line(content=CONTENT, size=76_800):
    """RECORD of one member."""
    return f"{MEMBER},{digest(content)},{size}\n".encode()


def damaged(path, at, change):
    """The wheel with what is at a place in it changed, in the local header or the directory's."""
    data = bytearray(path.read_bytes())
    local, central = data.find(b"PK\x03\x04"), data.find(b"PK\x01\x02")
    change(data, {"local": local, "central": central}[at])
    path.write_bytes(data)
    return path


def refused(path, root, match=None):
    with pytest.raises(ArtifactError, match=match):
        Wheel(path).extract(MEMBER)
    assert not root.exists() or tree(root) == []


@pytest.mark.parametrize("compression", [STORED, DEFLATED])
def test_a_member(path, root, compression):
    wheel = Wheel(make(path, compression=compression))
    assert wheel.version == "1.2.3+cu130"
    assert wheel.members[MEMBER] == len(CONTENT)
    found = wheel.extract(MEMBER)
    assert found.is_relative_to(root) and found.name == "norm.so"
    assert found.read_bytes() == CONTENT
    assert wheel.extract(MEMBER) == found
    with pytest.raises(ArtifactError, match="no recorded member other.so"):
        wheel.extract("other.so")


def test_an_empty_member(path):
    assert Wheel(make(path, {MEMBER: b""})).extract(MEMBER).read_bytes() == b""


RECORDS = {
    "nothing": (b"", "no recorded member"),
    "no hash": (f"{MEMBER},,{len(CONTENT)}\n".encode(), "no recorded member"),
    "no size": (f"{MEMBER},{digest(CONTENT)},\n".encode(), "no recorded member"),
    "another hash": (line(CONTENT[::-1]), f"{MEMBER}: sha256 is .*, expected"),
} | {
    f"a size of {size}": (line(size=size), f"{len(CONTENT)} bytes, {size} in RECORD")
    for size in (0, len(CONTENT) - 1, len(CONTENT) + 1, 10**17)
}


@pytest.mark.parametrize("what", RECORDS)
def test_a_record_that_does_not_fit(what, path, root):
    text, match = RECORDS[what]
    refused(make(path, record_text=text), root, match)


@pytest.mark.parametrize("count", [0, 2])
def test_a_wrong_number_of_records(path, count):
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(count):
            archive.writestr(f"{number}-{INFO}/RECORD", line())
    with pytest.raises(ArtifactError, match=f"{count} RECORD files, expected one"):
        Wheel(path)


@pytest.mark.parametrize("claimed", [100, len(CONTENT) + 5])
def test_a_member_of_another_length_than_it_says(claimed, path, root):
    """Directory and RECORD agree on a size that is not the compressed data's."""
    make(path, record_text=line(CONTENT[:claimed], claimed))
    refused(
        damaged(path, "central", lambda d, at: struct.pack_into("<I", d, at + 24, claimed)), root
    )


@pytest.mark.parametrize("compression", [STORED, DEFLATED])
def test_damaged_data(path, root, compression):
    def spoil(data, at):
        for i in range(at + 30 + len(MEMBER) + 10, at + 30 + len(MEMBER) + 60):
            data[i] ^= 0x55

    refused(damaged(make(path, compression=compression), "local", spoil), root, "cannot be read")


@pytest.mark.parametrize("compression", [STORED, DEFLATED])
def test_a_damaged_record(path, compression):
    text = b"".join(b"%d,,\n" % number for number in range(1000))
    data = bytearray(make(path, record_text=text, compression=compression).read_bytes())
    start = data.rfind(b"PK\x03\x04") + 30 + len(f"{INFO}/RECORD")
    for i in range(start + 10, start + 60):
        data[i] ^= 0x55
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match="RECORD cannot be read"):
        Wheel(path)


def test_an_encrypted_member(path, root):
    make(path)
    for where, offset in (("local", 6), ("central", 8)):
        damaged(path, where, lambda d, at, o=offset: d.__setitem__(at + o, d[at + o] | 1))
    refused(path, root, "cannot be read: .*encrypted")


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA, 99])
def test_an_unusual_compression(path, root, method):
    """Their decompressors put out what they like at once: a bomb could not be stopped."""
    make(path, compression=DEFLATED if method == 99 else method)
    if method == 99:
        for where, offset in (("local", 8), ("central", 10)):
            damaged(path, where, lambda d, at, o=offset: struct.pack_into("<H", d, at + o, 99))
    refused(path, root, f"method {method}")


@pytest.mark.parametrize("part", [0, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file(path, part):
    data = make(path).read_bytes()
    path.write_bytes(data[: int(len(data) * part)])
    with pytest.raises(ArtifactError, match=path.name.replace("+", r"\+")):
        Wheel(path)


@pytest.mark.parametrize("content", [b"PK", b"\x7fELF" * 100])
def test_other_files(path, content):
    with pytest.raises(ArtifactError, match="No such file"):
        Wheel(path)
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match="not a readable wheel"):
        Wheel(path)
    with pytest.raises(ArtifactError):
        Wheel(path.parent)


TRICKS = {
    **dict.fromkeys(
        ("../../escaped.so", "/tmp/fi-ffi-escaped.so", "a/../../../../escaped.so", "..", "a/..",
         "/", "C:\\escaped.so", "..\\..\\escaped.so"),
        "leads out of the wheel",
    ),
    **dict.fromkeys(("a/.", "a/"), "has no file name that the cache accepts"),
    "~/escaped.so": "",
}  # fmt: skip


@pytest.mark.parametrize(("member", "told"), TRICKS.items(), ids=TRICKS)
def test_names_lead_nowhere_else(path, tmp_path, root, member, told):
    """A wheel with one that leads elsewhere is refused; of others only the last part is used."""
    made = make(path, {member: CONTENT})
    if told:
        with pytest.raises(ArtifactError, match=f"{re.escape(repr(member))} {told}"):
            Wheel(made).extract(member)
    else:
        found = Wheel(made).extract(member)
        assert found.is_relative_to(root / "objects") and found.name == "escaped.so"
        assert found.read_bytes() == CONTENT
    files = [p for p in tmp_path.rglob("*") if p.is_file() and not p.is_relative_to(root)]
    assert files == [path]
    assert not Path("/tmp/fi-ffi-escaped.so").exists()


def test_a_bomb_is_not_unpacked(path, root):
    """256 MB of zeros that RECORD says are 100 bytes."""
    with zipfile.ZipFile(path, "w", DEFLATED) as archive:
        with archive.open(MEMBER, "w") as file:
            for _ in range(16):
                file.write(bytes(1 << 24))
        archive.writestr(f"{INFO}/RECORD", line(b"0" * 100, 100))
    begun = time.monotonic()
    refused(path, root, "100 in RECORD")
    assert time.monotonic() - begun < 1


def test_a_record_that_is_a_bomb(path):
    with pytest.raises(ArtifactError, match="RECORD of 134217728 bytes"):
        Wheel(make(path, record_text=bytes(1 << 27)))


GOOD = digest(b"")


@pytest.mark.parametrize(
    "line",
    [
        f"a.so,{GOOD}",
        f"a.so,{GOOD},1,2",
        f"a.so,{GOOD[:-1]},1",
        f"a.so,{GOOD},1\na.so,{GOOD},2",
        f"a.so,{GOOD},1\n\nb.so,{GOOD},1",
        f"a.so,{GOOD[:-1]}*,1",
        f"a.so,{GOOD.replace('sha256=', 'sha256=****')},1",
        f"a.so,{GOOD.replace('sha256', 'md5')},1",
        f"a.so,{GOOD.replace('sha256=', '')},1",
        "a.so,sha256=é,1",
        f"a.so,{GOOD},-1",
        f"a.so,{GOOD},٣",
        f"a.so,{GOOD}, 1",
        f"a.so,{GOOD},{'9' * 5000}",
        f'a.so,"{GOOD},1',
        f'"{"x" * 200_000}',  # longer than a field may be to the csv module
        "a,b\0,c,d",
        "\udcff",
    ],
)
def test_malformed_lines(line):
    with pytest.raises(ArtifactError, match="the wheel"):
        parse_record(line.encode(errors="surrogateescape"), "the wheel")


def test_lines():
    text = f'a.so,{GOOD},7\r\n"b,c.so",{GOOD}=,8\nRECORD,,\n'
    found = parse_record(text.encode(), "the wheel")
    assert {name: entry.size for name, entry in found.items()} == {"a.so": 7, "b,c.so": 8}
    assert found["a.so"].sha256 == hashlib.sha256(b"").hexdigest()
