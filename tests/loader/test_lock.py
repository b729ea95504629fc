"""The lock: what it pins, and how a bad one is refused."""

from __future__ import annotations

import hashlib
import re
import zipfile
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from fi_ffi.errors import LoaderError
from fi_ffi.loader import lock

TEXT = lock.lock_path().read_text()


def test_the_pinned_library_is_of_the_accepted_range() -> None:
    pin = lock.tvm_ffi_pin()
    assert SpecifierSet(pin.accepted).contains(pin.version)
    # FlashInfer excludes these, and libraries before them have a shorter TVMFFIErrorCell.
    for version in ("0.1.7", "0.1.8", "0.1.8.post0"):
        assert not SpecifierSet(pin.accepted).contains(version)


def test_every_file_of_the_library() -> None:
    pin = lock.tvm_ffi_pin()
    assert {*pin.files} == {"linux-x86_64", "linux-aarch64"}
    for platform, file in pin.files.items():
        assert file.platform == platform
        assert file.file.endswith(f"{platform.removeprefix('linux-')}.whl")
        assert f"-{pin.version}-" in file.file
        assert (file.project, file.version, file.member) == (
            "apache-tvm-ffi",
            pin.version,
            pin.member,
        )
        assert file.provenance.startswith("verified")
    assert lock.tvm_ffi_pin().file_for_this_machine() is pin.files[lock.this_platform()]


def test_the_digests_are_those_of_the_file(pinned_wheel: Path) -> None:
    pin = lock.tvm_ffi_pin().file_for_this_machine()
    content = pinned_wheel.read_bytes()
    assert (pinned_wheel.name, len(content)) == (pin.file, pin.size)
    assert hashlib.sha256(content).hexdigest() == pin.sha256
    with zipfile.ZipFile(pinned_wheel) as archive:
        assert hashlib.sha256(archive.read(pin.member)).hexdigest() == pin.member_sha256
        record = next(name for name in archive.namelist() if name.endswith("/RECORD"))
        assert hashlib.sha256(archive.read(record)).hexdigest() == pin.record_sha256


def test_every_kernel_file() -> None:
    kernels = lock.the_lock().kernels
    assert len({(k.release, k.cuda, k.platform, k.sm) for k in kernels}) == len(kernels) > 0
    for kernel in kernels:
        Version(kernel.release)
        assert f"-{kernel.release}+{kernel.cuda}-" in kernel.file
        assert kernel.file.endswith(f"{kernel.platform.removeprefix('linux-')}.whl")
        assert kernel.url.startswith("https://")
        assert kernel.url.endswith(kernel.file.replace("+", "%2B"))
        assert kernel.release in kernel.url
        assert kernel.provenance
    assert lock.the_lock().default_release in {kernel.release for kernel in kernels}


def test_no_index_is_named() -> None:
    """Files of the package index are found as the user's pip is set up to find them."""
    section = TEXT.partition("[kernels]")[0]
    assert "://" not in section


def test_another_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "other.lock"
    path.write_text(TEXT.replace('default = "', 'default = "9.'))
    monkeypatch.setenv("FI_FFI_LOCK", str(path))
    assert lock.lock_path() == path
    assert lock.read_lock(lock.lock_path()).default_release.startswith("9.")


def without(key: str) -> str:
    return re.sub(rf"^{key} = .*$", "", TEXT, flags=re.MULTILINE)


DAMAGED = {
    "empty": "",
    "no TOML": "]",
    "another schema": TEXT.replace("schema = 1", "schema = 2"),
    "no schema": without("schema"),
    "no version": without("version"),
    "no accepted": without("accepted"),
    "no sha256": without("sha256"),
    "no file": without("file"),
    "no provenance": without("provenance"),
    "no url": without("url"),
    "no default": without("default"),
    "an unknown key": TEXT.replace("provenance = ", 'sha512 = "0"\nprovenance = '),
    "a short hash": re.sub(r'(sha256 = "[0-9a-f]{63})[0-9a-f]', r"\1", TEXT),
    "an upper-case hash": re.sub(
        r'(sha256 = ")([0-9a-f]*)', lambda match: match[1] + match[2].upper(), TEXT
    ),
    "a hash with a letter too far": TEXT.replace('sha256 = "', 'sha256 = "g'),
    "no table": 'schema = 1\nlibtvm-ffi = "here"\nkernels = []\n',
    "not UTF-8": None,
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_lock(name: str, tmp_path: Path) -> None:
    path = tmp_path / "wheels.lock"
    text = DAMAGED[name]
    path.write_bytes(b"\xff" if text is None else text.encode())
    assert text != TEXT
    with pytest.raises(LoaderError, match=f"{path} is not a readable lock"):
        lock.read_lock(path)


def test_no_lock(tmp_path: Path) -> None:
    with pytest.raises(LoaderError, match="No such file"):
        lock.read_lock(tmp_path / "no.lock")


def test_a_platform_that_is_not_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    with pytest.raises(LoaderError, match="no libtvm_ffi for linux-riscv64, only .*linux-x86_64"):
        lock.tvm_ffi_pin().file_for_this_machine()


def test_a_lock_without_kernels(tmp_path: Path) -> None:
    """What is left when the last of them is taken out, before a mirror's own come in."""
    path = tmp_path / "wheels.lock"
    path.write_text(TEXT.partition("[[kernels.files]]")[0])
    found = lock.read_lock(path)
    assert found.kernels == ()
    assert found.libtvm_ffi == lock.read_lock(lock.lock_path()).libtvm_ffi
