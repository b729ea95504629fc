"""What others could have put, or could change, is not taken: caches, zips, addresses, settings."""

from __future__ import annotations

import io
import itertools
import json
import os
import shutil
import socket
import stat
import struct
import time
import warnings
import zipfile

import pytest
from urllib3.util import parse_url

from fi_ffi.errors import ArtifactError, FetchError, FiFfiError, LoaderError
from fi_ffi.loader import cache, kernels, runtime, search
from fi_ffi.loader.fetch.download import fetch_file
from fi_ffi.loader.fetch.http import Client
from fi_ffi.loader.fetch.urls import check_url, redirected
from fi_ffi.loader.fetch.wheels_lock import lock_in_use
from fi_ffi.loader.kernels import ModuleFile
from fi_ffi.loader.wheel import Wheel
from fi_ffi_build import environment as building
from fi_ffi_build.build import build

from tests.loader.server import QUICK, File, Server, make_wheel, record, redirect, sha256

OTHER = 54321
CONTENT = os.urandom(5000)
SHA256 = sha256(CONTENT)
MODULE = "flashinfer_jit_cache/jit_cache/norm/norm.so"
WHEEL = "flashinfer_jit_cache-0.6.13+cu130-cp39-abi3-linux_x86_64.whl"


@pytest.fixture
def root(tmp_path, monkeypatch):
    for name in ("FI_FFI_WHEELS", "FI_FFI_PARANOID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("FI_FFI_CACHE_DIR", str(tmp_path / "above" / "cache"))
    return tmp_path / "above" / "cache"


def stored():
    return cache.store([CONTENT], SHA256, "norm.so", "a test")


def another(path):
    if os.geteuid() != 0:
        pytest.skip("only root can give files to another user")
    os.chown(path, OTHER, -1, follow_symlinks=False)


def other_kind(make):
    def change(path):
        path.rename(path.with_name("aside"))
        make(path)

    return change


def device(path):
    try:
        os.mknod(path, stat.S_IFCHR | 0o444, os.makedev(1, 5))  # zeros without end
    except OSError as error:
        pytest.skip(f"no device can be made here: {error}")


def hard_link(path):
    shutil.copy(path.with_name("aside"), path.with_name("theirs"))
    another(path.with_name("theirs"))
    os.link(path.with_name("theirs"), path)


def linked(path):
    path.symlink_to(path.with_name("aside"))


FILES = {
    "all can write": (lambda path: path.chmod(0o446), "written by every user.*remove it"),
    "the group can write": (lambda path: path.chmod(0o464), "written by all of group.*remove it"),
    "another user's": (another, f"belongs to user {OTHER}.*Remove it"),
    "a symbolic link": (other_kind(linked), "is a symbolic link.*remove it"),
    "another's, by a hard link": (other_kind(hard_link), "under 2 names.*Remove it"),
    "a pipe": (other_kind(os.mkfifo), "is a pipe.*remove it"),
    "a device": (other_kind(device), "is a device.*remove it"),
    "a directory": (other_kind(os.mkdir), "is a directory.*remove it"),
}
FOLDERS = {
    "all can write": (lambda path: path.chmod(0o707), "written by every user.*remove it"),
    "all, with the sticky bit": (lambda path: path.chmod(0o1707), "written by every user"),
    "the group can write": (lambda path: path.chmod(0o770), "written by all of group.*remove it"),
    "another user's": (another, f"belongs to user {OTHER}"),
    "a symbolic link": (other_kind(linked), "is a symbolic link.*remove it"),
}


def refused(match):
    """Neither found, nor put right behind the user's back."""
    for use in (lambda: cache.find(SHA256, "norm.so"), stored):
        with pytest.raises(ArtifactError, match=match):
            use()


@pytest.mark.parametrize("how", FILES)
def test_files_of_the_cache_that_are_refused(how, root):
    change, match = FILES[how]
    change(stored())
    refused(match)


def sock(path):
    folder = os.open(path.parent, os.O_RDONLY)
    with socket.socket(socket.AF_UNIX) as server:  # whose path may have 107 bytes
        server.bind(f"/proc/self/fd/{folder}/s")
    os.close(folder)
    path.with_name("s").rename(path)


def elsewhere(path):
    target = path.parents[2] / "elsewhere"
    target.write_bytes(b"another's")
    path.symlink_to(target)


def anothers(path):
    path.write_bytes(b"")
    another(path)


KINDS = {
    "a pipe": os.mkfifo, "a directory": os.mkdir, "a device": device, "a socket": sock,
    "a symbolic link": elsewhere, "belongs to user": anothers,
}  # fmt: skip
# What is written or opened for writing, where names are known before: who uses it, and where.
PLACES = {
    "a download": (f"downloads/{SHA256}.part", lambda: fetch_file(NOWHERE, "a", sha256=SHA256)),
    "its lock": (f"downloads/{SHA256}.lock", lambda: fetch_file(NOWHERE, "a", sha256=SHA256)),
    "a lock": (f"locks/{SHA256}.lock", stored),
    "a cached file": (f"objects/{SHA256[:2]}/{SHA256}/norm.so", stored),
    "the same": (f"objects/{SHA256[:2]}/{SHA256}/norm.so", lambda: cache.find(SHA256, "norm.so")),
    "the user's pins": ("wheels.lock", lock_in_use),
    "a wheel": (f"wheels/{WHEEL}", lambda: [*search._local()]),
    "a build's file": ("build/env-1/build.ninja", building.open_root),
}
NOWHERE = "http://127.0.0.1:9/a"


# A link of one's own may lead to one's own wheel; a build has links and directories.
ALLOWED = {
    ("a wheel", "a symbolic link"), ("a build's file", "a symbolic link"),
    ("a build's file", "a directory"),
}  # fmt: skip


@pytest.mark.parametrize(("place", "kind"), sorted({*itertools.product(PLACES, KINDS)} - ALLOWED))
def test_what_is_no_plain_file_of_ours_is_refused(place, kind, root, monkeypatch):
    """At once, with its path; it stays as it is, and so does what a link leads to."""
    monkeypatch.delenv("FI_FFI_OFFLINE", raising=False)
    monkeypatch.delenv("FI_FFI_LOCK", raising=False)
    name, use = PLACES[place]
    path = root / name
    cache.make_root()
    path.parent.mkdir(parents=True, exist_ok=True)
    KINDS[kind](path)
    before, begun = os.lstat(path), time.monotonic()
    with pytest.raises(ArtifactError, match=f"{kind}") as caught:
        use()
    assert str(path) in str(caught.value) and time.monotonic() - begun < 5
    after = os.lstat(path)
    assert (after.st_mode, after.st_ino, after.st_size) == (
        before.st_mode, before.st_ino, before.st_size,
    )  # fmt: skip
    if kind == "a symbolic link":
        assert path.read_bytes() == b"another's"


@pytest.mark.parametrize("kind", KINDS)
def test_a_note_that_is_no_plain_file_is_not_read(kind, root):
    """It only saves work: it is written anew, or not at all, and nobody waits."""
    name = f"indexes/{SHA256}.json"
    (cache.make_root() / "indexes").mkdir()
    KINDS[kind](root / name)
    begun = time.monotonic()
    assert cache.read_note(name, 1) is None
    cache.write_note(name, 1, ["a"])
    assert cache.read_note(name, 1) in (["a"], None)
    assert time.monotonic() - begun < 5
    assert kind != "a symbolic link" or (root.parent / "elsewhere").read_bytes() == b"another's"


@pytest.mark.parametrize("how", FOLDERS)
@pytest.mark.parametrize("up", [0, 1, 2])
def test_folders_of_the_cache_that_are_refused(how, up, root):
    change, match = FOLDERS[how]
    change(stored().parents[up])
    refused(match)


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o703])
def test_cache_directories_that_are_refused(mode, root):
    stored()
    root.chmod(mode)
    refused("can be written by every user.*set FI_FFI_CACHE_DIR")
    root.chmod(0o770)  # a group's: what its members put there is refused as theirs
    assert cache.find(SHA256, "norm.so")
    another(root)
    refused(f"belongs to user {OTHER}")


@pytest.mark.parametrize("folder", ["tmp", "locks"])
@pytest.mark.parametrize("how", FOLDERS)
def test_folders_to_write_in_that_are_refused(how, folder, root):
    """Where names could be taken first; what is only read is not asked of them."""
    stored().unlink()
    change, match = FOLDERS[how]
    change(root / folder)
    with pytest.raises(ArtifactError, match=match):
        stored()


def test_what_other_names_and_links_are_good(root, tmp_path):
    """A backup made of hard links, and a link of one's own to another disk; not another user's."""
    os.link(stored(), tmp_path / "backup")
    assert cache.find(SHA256, "norm.so")
    root.rename(tmp_path / "elsewhere")
    root.symlink_to(tmp_path / "elsewhere")
    assert stored() == cache.find(SHA256, "norm.so")
    another(root)
    refused(f"the link {root} belongs to user {OTHER}")


def test_files_of_others_as_another_user_sees_them(root, monkeypatch):
    if os.geteuid() == 0:
        pytest.skip("root's files are trusted")
    stored()
    monkeypatch.setattr(os, "geteuid", lambda: OTHER)
    refused(f"belongs to user {os.getuid()}.*runs as user {OTHER}")


def test_directories_above_the_cache_that_are_refused(root, tmp_path):
    stored()
    root.parent.chmod(0o777)
    refused("above can be written by every user.*chmod o-w")
    root.parent.chmod(0o1777)  # as /tmp is: others cannot rename what is ours there
    assert cache.find(SHA256, "norm.so")
    tmp_path.chmod(0o777)
    refused("can be written by every user")
    tmp_path.chmod(0o700)


def test_a_link_to_a_cache_where_all_can_write(root, tmp_path, monkeypatch):
    stored()
    link = tmp_path / "link"
    link.symlink_to(root)
    monkeypatch.setenv("FI_FFI_CACHE_DIR", str(link))
    assert cache.find(SHA256, "norm.so")
    root.parent.chmod(0o777)
    refused("above can be written by every user")


def test_notes_of_others_are_not_believed(root):
    """A note that tells a file's signatures is as good as the file."""
    file = ModuleFile("norm", stored(), SHA256)
    kernels.remember(file, kernels.Facts(["libc.so.6"], ["forged"], []))
    assert kernels.facts_of(file).functions == ["forged"]
    for change in (lambda path: path.chmod(0o666), lambda path: path.parent.chmod(0o777), another):
        kernels.remember(file, kernels.Facts(["libc.so.6"], ["forged"], []))
        note = cache.cache_root() / kernels._FACTS.format(SHA256)
        change(note)
        with pytest.raises(ArtifactError, match="not an ELF file"):  # the file itself is asked
            kernels.facts_of(file)
        note.parent.chmod(0o755)


@pytest.mark.parametrize("what", ["wheels", "wheel", "link", "open"])
def test_wheels_that_another_user_put_into_the_cache(what, root):
    """Nobody named them: they are found because they lie there."""
    wheel = root / "wheels" / WHEEL
    wheel.parent.mkdir(parents=True)
    wheel.write_bytes(make_wheel({MODULE: CONTENT}))
    assert [place.source is not None for place in search._local()] == [True]
    if what == "link":
        elsewhere = root.parent / "theirs.whl"
        wheel.rename(elsewhere)
        wheel.symlink_to(elsewhere)
        another(elsewhere)
    elif what == "open":
        wheel.chmod(0o666)
    else:
        another(wheel if what == "wheel" else wheel.parent)
    with pytest.raises(ArtifactError, match=r"belongs to user|can be written by every user"):
        [*search._local()]


def script(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def open_to_all(path):
    path.chmod(0o777)


PLANTED = {
    "the cache": ("", open_to_all, "can be written by every user"),
    "its owner": ("", another, f"belongs to user {OTHER}"),
    "build": ("build", open_to_all, "can be written by every user"),
    "an environment": ("build/env-0.6.13", another, f"belongs to user {OTHER}"),
    "its bin": ("build/env-0.6.13/bin", open_to_all, "can be written by every user"),
    "its python": ("build/env-0.6.13/bin/python", another, f"belongs to user {OTHER}"),
    "its pip": ("build/env-0.6.13/lib/python3.11/site-packages/pip/a.py", open_to_all,
                "can be written by every user"),
    "build files": ("build/0.6.13-9.0a/build.ninja", another, f"belongs to user {OTHER}"),
}  # fmt: skip


@pytest.mark.parametrize("what", PLANTED)
def test_programs_that_others_could_plant_are_not_run(what, root, tmp_path, monkeypatch):
    """What a build runs out of the cache: Python, pip, nvcc, ninja's files."""
    home = tmp_path / "cuda"
    says = f'echo "release 13.0, V13.0.1"; echo "#$ TOP={home}"; echo compute_90'
    script(home / "bin" / "nvcc", says)
    monkeypatch.setenv("CUDA_HOME", str(home))
    monkeypatch.setenv("CXX", "sh")
    ran = tmp_path / "ran"
    environment = root / "build" / "env-0.6.13"
    script(environment / "bin" / "python", f"touch {ran}; exit 1")
    for name in ("lib/python3.11/site-packages/pip/a.py", "../0.6.13-9.0a/build.ninja"):
        script(environment / name, "")
    needed = " ".join(building._NEEDED)
    content = json.dumps({"needed": needed, "torch": ""}, indent=1)
    environment.with_name("env-0.6.13.json").write_text(content)
    with pytest.raises(FiFfiError):  # as it is, it is used
        build(["norm"], output=tmp_path)
    assert ran.exists()
    ran.unlink()
    where, change, match = PLANTED[what]
    change(root / where)
    with pytest.raises(ArtifactError, match=match):
        build(["norm"], output=tmp_path)
    assert not ran.exists()


def test_a_build_folder_of_another_user(root, tmp_path):
    folder = tmp_path / "theirs"
    folder.mkdir()
    another(folder)
    with (
        pytest.raises(ArtifactError, match=f"belongs to user {OTHER}"),
        building.lock_folder(folder, print),
    ):
        pass


def test_the_folder_of_compiled_kernels(tmp_path, monkeypatch):
    """A name in /tmp that anybody could take, where HOME is not set."""
    monkeypatch.setenv(runtime.DEEPGEMM_FOLDER, str(tmp_path / "compiled"))
    runtime.check_deepgemm_folder()
    another(tmp_path / "compiled" / "cache")
    with pytest.raises(LoaderError, match=f"user {OTHER}.*{runtime.DEEPGEMM_FOLDER} may name"):
        runtime.check_deepgemm_folder()


def write_zip(path, members):
    """A wheel whose RECORD vouches for all of its members."""
    contents = {getattr(info, "filename", info): content for info, content in members}
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        warnings.simplefilter("ignore")  # of names that are there twice
        for info, content in members:
            archive.writestr(info, content)
        archive.writestr("kernels-1.dist-info/RECORD", record(contents))
    return path


def of_kind(kind):
    info = zipfile.ZipInfo(MODULE)
    info.external_attr = (kind | 0o777) << 16
    return info


ZIPS = {
    "up": ([(f"../{MODULE}", b"a")], "leads out of the wheel"),
    "up in the middle": ([(f"a/../../{MODULE}", b"a")], "leads out of the wheel"),
    "absolute": ([(f"/{MODULE}", b"a")], "leads out of the wheel"),
    "a drive": ([(f"C:/{MODULE}", b"a")], "leads out of the wheel"),
    "backslashes": ([("..\\jit_cache\\norm\\norm.so", b"a")], "leads out of the wheel"),
    "twice": ([(MODULE, b"a"), (MODULE, b"b")], "has the same name"),
    "another case": ([(MODULE, b"a"), (MODULE.replace("norm", "NORM"), b"b")], "has the same name"),
    "a symbolic link": ([(of_kind(stat.S_IFLNK), b"/etc/passwd")], "is no regular file"),
    "a device": ([(of_kind(stat.S_IFCHR), b"")], "is no regular file"),
    "a pipe": ([(of_kind(stat.S_IFIFO), b"")], "is no regular file"),
}


@pytest.mark.parametrize("how", ZIPS)
def test_wheels_that_are_refused(how, tmp_path, root):
    members, match = ZIPS[how]
    path = write_zip(tmp_path / WHEEL, members)
    with pytest.raises(ArtifactError, match=f"{match}.*get it from its publisher"):
        Wheel(path)
    assert not root.exists()


def test_a_bomb_that_its_record_vouches_for(tmp_path, root):
    path = write_zip(tmp_path / WHEEL, [(MODULE, bytes(64 << 20))])
    with pytest.raises(ArtifactError, match="no library is.*get it from its publisher"):
        Wheel(path).extract(MODULE)
    assert not list(root.rglob("*.so"))


@pytest.mark.parametrize("declared", [100, 64 << 20])
def test_a_bomb_that_does_not_say_so(declared, tmp_path, root):
    """Sizes of the directory, of the local header and of RECORD that are not the content's."""
    data = bytearray(write_zip(tmp_path / WHEEL, [(MODULE, bytes(64 << 20))]).read_bytes())
    real = struct.pack("<I", 64 << 20)
    assert data.count(real) >= 2
    data = data.replace(real, struct.pack("<I", declared))
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert archive.infolist()[0].file_size == declared
    (tmp_path / WHEEL).write_bytes(data)
    with pytest.raises(ArtifactError, match=r"in RECORD|no library is"):
        Wheel(tmp_path / WHEEL).extract(MODULE)
    assert not list(root.rglob("*.so"))


REFUSED = [
    "http://example.com/a", "http://127.0.0.1@evil.example/a", "http://localhost@evil.example/a",
    "http://localhost:80@evil.example/a", "http://localhost.evil.example/a",
    "http://127.0.0.1.evil.example/a", "http://127.0.0.1%00.evil.example/a",
    "http://127.0.0.1%2f@evil.example/a", "http://evil.example#@127.0.0.1/a",
    "http://evil.example?@127.0.0.1/a", "http://evil.example\\@127.0.0.1/a",
    "http://127.0.0.1\\@evil.example/a", "http://[::1]@evil.example/a", "http://[::2]/a",
    "http://[::ffff:8.8.8.8]/a", "http://[::127.0.0.1]/a", "http://[fe80::1]/a",
    "http://[::1]evil.example/a", "http://134744072/a", "http://2130706433/a", "http://0x7f.1/a",
    "http://0177.0.0.1/a", "http://127.1/a", "http://0/a", "http://0.0.0.0/a",
    "http://localhost\t.evil.example/a", "http://１２７.0.0.1/a", "http://ⓛocalhost/a", "ftp://127.0.0.1/a",
    "gopher://localhost/a", "data:,a", "javascript:1", "//localhost/a", "localhost/a", "http:///a",
    "https:a", "", "http+unix://localhost/a", "s3://bucket/a",
]  # fmt: skip


@pytest.mark.parametrize("url", REFUSED)
def test_addresses_that_are_refused(url):
    with pytest.raises(FetchError):
        check_url(url)
    client = Client(QUICK)
    with pytest.raises(FetchError), client.open(url):
        pass
    assert client.requests == 0


@pytest.mark.parametrize("url", [
    "https://example.com/a", "https://127.0.0.1@example.com/a", "http://127.0.0.1:8/a",
    "http://127.8.9.1/a", "http://[::1]:8/a", "http://LOCALHOST/a", "http://u:p@localhost/a",
    "https://134744072/a",
])  # fmt: skip
def test_addresses_that_are_used_lead_where_they_were_checked(url):
    """What sends the request reads the host as what checks it does."""
    check_url(url)
    parsed = parse_url(url)
    if parsed.scheme == "http":
        assert parsed.host in ("127.0.0.1", "127.8.9.1", "[::1]", "localhost")
    else:
        assert parsed.host in ("example.com", "134744072")


@pytest.mark.parametrize("target", [
    "http://evil.example/a", "http://127.0.0.1@evil.example/a", "//evil.example/a",
    "ftp://127.0.0.1/a", "file:///etc/passwd",
])  # fmt: skip
def test_redirects_that_are_refused(target):
    with Server({"/file.whl": File(CONTENT)}) as web:
        web.faults.append(redirect(target))
        client = Client(QUICK)
        with pytest.raises(FetchError), client.open(web.url("/file.whl")):
            pass
        assert client.requests == 1
    if not target.startswith("//"):
        with pytest.raises(FetchError, match="redirects from https"):
            redirected("https://example.com/a", target)


def test_a_link_below_the_cache(root, tmp_path):
    """Nothing is written through a link that another user could have put there."""
    root.mkdir(parents=True, mode=0o700)
    (root / "tmp").symlink_to(tmp_path)
    with pytest.raises(ArtifactError, match="is a symbolic link"):
        stored()
    assert {*os.listdir(tmp_path)} == {"above"}
