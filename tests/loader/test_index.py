"""The address of a pinned file, from whatever pip or uv answers."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from fi_ffi.errors import ArtifactError, FetchError
from fi_ffi.loader import index, lock
from fi_ffi.loader.index import Installer, resolve
from fi_ffi.loader.urls import redact

PIN = lock.tvm_ffi_pin().file_for_this_machine()
URL = f"https://files.example/a/{PIN.file}"


@pytest.fixture(autouse=True)
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FI_FFI_OFFLINE", raising=False)


def test_from_the_package_index() -> None:
    """As this machine's own pip has it, for this platform and the other."""
    for pin in lock.tvm_ffi_pin().files.values():
        url = resolve(pin)
        assert url.startswith(("https://", "file:"))
        assert redact(url).endswith(pin.file)


def answering(monkeypatch: pytest.MonkeyPatch, folder: Path, kind: Any, text: str) -> Path:
    """An installer that writes down its arguments and prints `text`."""
    program, seen = folder / "program", folder / "arguments"
    (folder / "answer").write_text(text)
    program.write_text(f'#!/bin/sh\necho "$@" > {seen}\ncat {folder}/answer\n')
    program.chmod(0o755)
    monkeypatch.setattr(index, "installer", lambda pin: Installer(kind, (str(program),)))
    return seen


def report(url: str = URL, sha256: str | None = PIN.sha256) -> str:
    hashes = {"archive_info": {"hashes": {"sha256": sha256}}} if sha256 else {}
    return json.dumps({"version": "1", "install": [{"download_info": {"url": url} | hashes}]})


def pylock(url: str = URL, sha256: str = PIN.sha256) -> str:
    other = '{ url = "https://files.example/other.whl", hashes = {sha256 = "00"} }'
    wheel = f'{{ url = "{url}", hashes = {{sha256 = "{sha256}"}} }}'
    return f'lock-version = "1.0"\n[[packages]]\nname = "x"\nwheels = [{other}, {wheel}]\n'


def test_pips_answer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen = answering(monkeypatch, tmp_path, "pip", report())
    assert resolve(PIN) == URL
    words = seen.read_text()
    assert "install --dry-run --ignore-installed --no-deps" in words
    assert f"--python-version 3.11 --platform manylinux_2_24_{os.uname().machine}" in words
    assert f"{PIN.project}=={PIN.version}" in words


def test_uvs_answer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen = answering(monkeypatch, tmp_path, "uv", pylock())
    assert resolve(PIN) == URL
    assert f"--python-platform {os.uname().machine}-manylinux_2_28" in seen.read_text()
    answering(monkeypatch, tmp_path, "uv", f'[[packages]]\nwheels = [{{path = "/m/{PIN.file}"}}]')
    assert resolve(PIN) == f"file:///m/{PIN.file}"


def test_a_file_of_another_hash(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for kind, text in (("pip", report(sha256="0" * 64)), ("uv", pylock(sha256="0" * 64))):
        answering(monkeypatch, tmp_path, kind, text)
        with pytest.raises(ArtifactError, match=f"sha256 0000.*, not {PIN.sha256}"):
            resolve(PIN)


def test_an_index_that_tells_no_hash(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    answering(monkeypatch, tmp_path, "pip", report(sha256=None))
    assert resolve(PIN) == URL


def test_another_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for url in ("https://files.example/apache_tvm_ffi-9.whl", "https://files.example/a?b"):
        answering(monkeypatch, tmp_path, "pip", report(url))
        with pytest.raises(FetchError, match="pip found .* instead"):
            resolve(PIN)


@pytest.mark.parametrize(
    "text",
    ["", "not json", "[]", "{}", '{"install": [{}]}', '{"install": 3}', '{"install": [{"a": 1}]}']
    + ['{"install": [{"download_info": {"url": 3}}]}', '{"install": [{"download_info": null}]}'],
)
def test_answers_that_make_no_sense(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str
) -> None:
    for kind in ("pip", "uv"):
        answering(monkeypatch, tmp_path, kind, text)
        with pytest.raises(FetchError, match=PIN.file):
            resolve(PIN)


def test_a_failure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    answering(monkeypatch, tmp_path, "pip", "")
    (tmp_path / "program").write_text("#!/bin/sh\necho no such thing >&2\nexit 3\n")
    with pytest.raises(FetchError, match="(?s)pip could not find or fetch it:.*no such thing"):
        resolve(PIN)
    (tmp_path / "program").unlink()
    with pytest.raises(FetchError, match="cannot be run"):
        resolve(PIN)


def test_no_patience(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(index, "TIMEOUT", 0.1)
    slow = Installer("pip", (sys.executable, "-c", "import time; time.sleep(60)"))
    with pytest.raises(FetchError, match=r"longer than"):
        slow.run([], PIN.file)


def test_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FI_FFI_OFFLINE", "1")
    with pytest.raises(FetchError, match=PIN.file):
        resolve(dataclasses.replace(PIN, version="0"))


def test_tries_are_told_once() -> None:
    tries = "Retrying (total=4) at 0x7f1a: no route\nRetrying (total=3) at 0x7fcc: no route\n"
    words = tries + "ERROR: none\n"
    assert index._once(words) == "Retrying (total=3) at 0x7fcc: no route\nERROR: none"
