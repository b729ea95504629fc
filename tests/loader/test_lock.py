"""The lock: what it pins, and how a bad one is refused."""

from __future__ import annotations

import re

import pytest
from packaging.version import Version

from fi_ffi.errors import LoaderError
from fi_ffi.loader import lock

TEXT = lock.lock_path().read_text()


def test_every_kernel_file():
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


def test_another_lock(tmp_path, monkeypatch):
    path = tmp_path / "other.lock"
    path.write_text(TEXT.replace('default = "', 'default = "9.'))
    monkeypatch.setenv("FI_FFI_LOCK", str(path))
    assert lock.lock_path() == path
    assert lock.read_lock(lock.lock_path()).default_release.startswith("9.")


def without(key):
    return re.sub(rf"^{key} = .*$", "", TEXT, flags=re.MULTILINE)


DAMAGED = {
    "empty": "",
    "no TOML": "]",
    "another schema": TEXT.replace("schema = 1", "schema = 2"),
    "no schema": without("schema"),
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
    "no table": "schema = 1\nkernels = []\n",
    "not UTF-8": None,
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_lock(name, tmp_path):
    path = tmp_path / "wheels.lock"
    text = DAMAGED[name]
    path.write_bytes(b"\xff" if text is None else text.encode())
    assert text != TEXT
    with pytest.raises(LoaderError, match=f"{path} is not a readable lock"):
        lock.read_lock(path)


def test_no_lock(tmp_path):
    with pytest.raises(LoaderError, match="No such file"):
        lock.read_lock(tmp_path / "no.lock")


def test_a_lock_without_kernels(tmp_path):
    """What is left when the last of them is taken out, before a mirror's own come in."""
    path = tmp_path / "wheels.lock"
    path.write_text(TEXT.partition("[[kernels.files]]")[0])
    found = lock.read_lock(path)
    assert found.kernels == ()


def test_sections_of_other_times(tmp_path):
    """Locks had a section for libtvm_ffi, which is a dependency now."""
    path = tmp_path / "wheels.lock"
    path.write_text(f'{TEXT}\n[libtvm-ffi]\nversion = "0.1.15"\n')
    assert lock.read_lock(path).kernels == lock.the_lock().kernels
