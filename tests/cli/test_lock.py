"""`fi-ffi lock verify` and tools/pins.py, on a lock of its own and a server on loopback."""

from __future__ import annotations

import datetime
import importlib.util
import json
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from fi_ffi.cli import main
from fi_ffi.errors import ArgumentError
from fi_ffi.loader import cache
from fi_ffi.loader.fetch.download import fetch_file
from fi_ffi.loader.fetch.wheels_lock import PinnedWheel, read_lock
from fi_ffi.loader.lock import lock_path

from tests.loader import server as faults
from tests.loader.server import File, Server, kernel_members, make_wheel, record, sha256, status

_TOOL = Path(__file__).parents[2] / "tools" / "pins.py"
_spec = importlib.util.spec_from_file_location("pins", _TOOL)
assert _spec is not None and _spec.loader is not None
pins = importlib.util.module_from_spec(_spec)
sys.modules["pins"] = pins  # where dataclasses look for annotations
_spec.loader.exec_module(pins)

MEMBERS = kernel_members(5)
WHEEL = make_wheel(MEMBERS)
NAME = "flashinfer_jit_cache-0.6.13+cu130-cp39-abi3-manylinux_2_28_x86_64.whl"
BUILT = "flashinfer_jit_cache-0.6.13+cu130.sm90a-cp39-abi3-linux_x86_64.whl"
PATH = "/store/flashinfer_jit_cache-0.6.13%2Bcu130-cp39-abi3-manylinux_2_28_x86_64.whl"
TODAY = datetime.date.today().isoformat()

TAGS = {
    "release": "0.6.13", "cuda": "cu130", "platform": "linux-x86_64", "layout": "monolithic",
    "file": NAME,
}  # fmt: skip
LOCK = f"""\
# a comment at the top
schema = 1

[kernels]
default = "0.6.13"  # and one beside a value
url = "https://example.invalid/v{{release}}/{{file}}"

# about the first

[[kernels.files]]
release = "0.6.12"
cuda = "cu130"
platform = "linux-aarch64"
layout = "monolithic"
file = "first.whl"
sha256 = "{"0" * 64}"
provenance = "nobody"
"""


Run = Callable[..., Any]


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FI_FFI_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("FI_FFI_OFFLINE", raising=False)
    return tmp_path / "cache"


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    file = tmp_path / "my.lock"
    file.write_text(LOCK)
    return file


@pytest.fixture
def web() -> Iterator[Server]:
    with Server({PATH: File(WHEEL)}) as server:
        yield server


@pytest.fixture
def run(path: Path) -> Run:
    def lock(*arguments: object, code: int = 0, json_too: bool = True) -> Any:
        words = [*map(str, arguments), "--lock", str(path), *(["--json"] if json_too else [])]
        if words[0] == "verify":
            result = CliRunner().invoke(main, ["lock", *words])
        else:
            result = CliRunner().invoke(pins.main, words)
        assert result.exit_code == code, result.output
        return json.loads(result.stdout) if json_too and code == 0 else result.output

    return lock


def entry_of(path: Path, file: str = NAME) -> PinnedWheel:
    [entry] = [entry for entry in read_lock(path).kernels if entry.file == file]
    return entry


def test_add_a_file(run: Run, path: Path, tmp_path: Path) -> None:
    path.chmod(0o640)
    (tmp_path / NAME).write_bytes(WHEEL)
    done = run("add", tmp_path / NAME)
    assert done["updated"] is False
    assert path.read_text().startswith(LOCK + "\n[[kernels.files]]\nrelease = ")
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert entry_of(path) == PinnedWheel(
        **TAGS, url=f"https://example.invalid/v0.6.13/{PATH.rpartition('/')[2]}",
        sha256=sha256(WHEEL), size=len(WHEEL), record_sha256=sha256(record(MEMBERS)),
        provenance=f"hashed here, {TODAY}",
    )  # fmt: skip


def test_add_what_was_built_here(run: Run, path: Path, tmp_path: Path) -> None:
    (tmp_path / BUILT).write_bytes(WHEEL)
    run("add", tmp_path / BUILT)
    entry = entry_of(path, BUILT)
    assert (entry.sm, entry.url) == ("sm90a", (tmp_path / BUILT).as_uri())
    assert run("verify", BUILT, "--full")["files"][0]["status"] == "ok"
    (tmp_path / BUILT).write_bytes(WHEEL + b"!")
    assert "fail" in run("verify", BUILT, code=1)
    (tmp_path / BUILT).unlink()
    assert "unreachable" in run("verify", BUILT, code=1)


def test_options_win(run: Run, path: Path, tmp_path: Path) -> None:
    other = tmp_path / "kernels-1.0-py3-none-any.whl"
    other.write_bytes(WHEEL)
    text = run("add", other, code=1)
    assert "--cuda --layout --platform" in text
    assert path.read_text() == LOCK
    given = ["--release", "0.6.3", "--cuda", "cu130", "--platform", "linux-x86_64"]
    given += ["--layout", "provider", "--sm", "sm87", "--provenance", "me"]
    run("add", other, *given, "--url", "https://mine.invalid/k.whl")
    entry = entry_of(path, other.name)
    assert (entry.release, entry.layout, entry.sm) == ("0.6.3", "provider", "sm87")
    assert (entry.provenance, entry.url) == ("me", "https://mine.invalid/k.whl")


def test_add_an_address(run: Run, path: Path, web: Server) -> None:
    text = run("add", web.url(PATH), json_too=False)
    assert f"added {NAME}" in text
    entry = entry_of(path)
    assert (entry.url, entry.sha256, entry.size) == (web.url(PATH), sha256(WHEEL), len(WHEEL))
    assert cache.find(sha256(WHEEL), NAME) is not None
    assert "no password" in run("add", "https://a:b@example.invalid/x.whl", code=1)
    assert "404" in run("add", web.url("/none.whl"), code=1)


def test_a_bar_where_there_is_a_terminal(
    run: Run, web: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    web.bandwidth = 500_000
    text = run("add", web.url(PATH), json_too=False)
    assert "kB" in text
    assert "/s" in text


def test_adding_again(run: Run, path: Path, tmp_path: Path) -> None:
    """An entry that others vouched for gets what only the file tells."""
    text = LOCK.replace("first.whl", NAME).replace("0" * 64, sha256(WHEEL))
    text = text.replace("nobody", "published by somebody; not verified here")
    path.write_text(text + "# the end\n")
    (tmp_path / NAME).write_bytes(WHEEL)
    assert run("add", tmp_path / NAME)["updated"] is True
    entry = entry_of(path)
    assert entry.provenance == f"published by somebody; verified here, {TODAY}"
    assert (entry.size, entry.record_sha256) == (len(WHEEL), sha256(record(MEMBERS)))
    assert "# the end" in path.read_text()
    (tmp_path / NAME).write_bytes(make_wheel(MEMBERS, comment=b"!"))
    before = path.read_text()
    assert f"is pinned with sha256 {sha256(WHEEL)}" in run("add", tmp_path / NAME, code=1)
    assert path.read_text() == before


def test_what_is_no_wheel(run: Run, path: Path, tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(b"no zip")
    assert "not a readable wheel" in run("add", tmp_path / NAME, code=1)
    assert "No such file" in run("add", tmp_path / "none.whl", code=1)
    assert path.read_text() == LOCK


def test_a_lock_that_cannot_be_read(run: Run, path: Path, tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(WHEEL)
    for text in ("schema = 2", "[", "\xff"):
        path.write_text(text, encoding="latin-1")
        assert "not a readable lock" in run("add", tmp_path / NAME, code=1)
    path.unlink()
    assert "not a readable lock" in run("verify", code=1)


def pin(path: Path, web: Server, **more: str) -> None:
    keys = TAGS | {"url": web.url(PATH), "sha256": sha256(WHEEL), "provenance": "a test"} | more
    lines = "".join(f'{key} = "{value}"\n' for key, value in keys.items())
    path.write_text(f"{LOCK}\n[[kernels.files]]\n{lines}")


def test_verify(run: Run, path: Path, web: Server) -> None:
    pin(path, web)
    [found] = run("verify", NAME)["files"]
    got = [found[key] for key in ("status", "size", "record", "sha256")]
    assert got == ["ok", "not pinned", "not pinned", "not checked"]
    assert web.sent < 3000
    pin(path, web, **{"record-sha256": sha256(record(MEMBERS))})
    [found] = run("verify", web.url(PATH), "--full")["files"]
    assert (found["status"], found["record"], found["sha256"]) == ("ok", "ok", "ok")
    assert "ok" in run("verify", "0.6.13", json_too=False)


def test_verify_what_differs(run: Run, path: Path, web: Server) -> None:
    pin(path, web, **{"record-sha256": "1" * 64})
    assert '"record": "wrong"' in run("verify", NAME, code=1)
    pin(path, web, sha256="1" * 64)
    assert run("verify", NAME)["files"][0]["status"] == "ok"
    assert '"sha256": "wrong"' in run("verify", NAME, "--full", code=1)
    path.write_text(path.read_text() + "size = 17\n")
    assert '"size": "wrong"' in run("verify", NAME, code=1)


def test_verify_what_cannot_be_reached(run: Run, path: Path, web: Server) -> None:
    pin(path, web)
    web.always = status(403)
    text = run("verify", NAME, code=1)
    assert '"unreachable"' in text
    assert "403" in text
    web.always = None
    assert run("verify", NAME)["files"][0]["status"] == "ok"


def test_verify_fails_where_it_cannot_look(run: Run, path: Path, web: Server) -> None:
    pin(path, web)
    web.files[PATH].ranges = False
    text = run("verify", NAME, code=1)
    assert '"status": "not checked"' in text
    assert "the server has no ranges: `--full` fetches the whole file" in text
    assert run("verify", NAME, "--full")["files"][0]["status"] == "ok"


def test_verify_fails_where_one_of_two_cannot_be_reached(run: Run, path: Path, web: Server) -> None:
    pin(path, web)
    path.write_text(
        path.read_text().replace("https://example.invalid", web.url("/nothing"))
        .replace("linux-aarch64", "linux-x86_64")
    )  # fmt: skip
    text = run("verify", "--all", code=1)
    assert ('"unreachable"' in text, '"ok"' in text) == (True, True)


def test_addresses_that_are_none(run: Run, path: Path) -> None:
    for url in ("https://[", "https://h:port/x.whl", "https://", "https:///x.whl", "ftp://h/x.whl",
                "http://h/x"):  # fmt: skip
        assert run("add", url, code=1).startswith("Error: ")
    assert path.read_text() == LOCK


def test_no_password_is_shown(run: Run) -> None:
    for url in ("https://u:SECRET@h/x.whl", "https://u:SECRET/PW@h/x.whl", "https://u:SEC#RET@h"):
        for command in ("add", "verify", "pin-record"):
            text = run(command, url, code=2 if command == "verify" else 1)
            assert "SEC" not in text and "RET" not in text and "PW" not in text


def test_pin_record(run: Run, path: Path, web: Server) -> None:
    pin(path, web)
    text = run("pin-record", NAME, json_too=False)
    assert "trusts what the server sent today" in text
    assert web.sent < 3000
    assert entry_of(path).record_sha256 == sha256(record(MEMBERS))
    assert path.read_text().count("record-sha256") == 1
    assert "already pinned" in run("pin-record", web.url(PATH), json_too=False)
    web.files[PATH] = File(make_wheel(kernel_members(4)))
    assert "pinned is" in run("pin-record", NAME, code=1)


def test_pin_record_of_a_verified_file(run: Run, path: Path, web: Server) -> None:
    pin(path, web)
    fetch_file(web.url(PATH), NAME, sha256=sha256(WHEEL))
    web.always = faults.other_bytes
    [found] = run("pin-record", NAME)["files"]
    assert (found["trust"], found["changed"]) == ("file-verified", True)
    assert entry_of(path).record_sha256 == sha256(record(MEMBERS))


def test_unknown_names(run: Run) -> None:
    for command in ("verify", "pin-record"):
        assert "first.whl" in run(command, "nothing.whl", code=2 if command == "verify" else 1)


def test_the_lock_in_use(path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FI_FFI_LOCK", str(path))
    assert lock_path() == path
    (tmp_path / NAME).write_bytes(WHEEL)
    result = CliRunner().invoke(pins.main, ["add", str(tmp_path / NAME)])
    assert result.exit_code == 0, result.output
    assert entry_of(path).sha256 == sha256(WHEEL)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (NAME, "0.6.13 linux-x86_64 monolithic cu130"),
        (BUILT, "0.6.13 linux-x86_64 monolithic cu130 sm90a"),
        (BUILT.replace("sm90a", "sm87.sm90a"), "0.6.13 linux-x86_64 monolithic cu130"),
        ("flashinfer_jit_cache_sm90a-0.7.0.post1+cu134-cp39-abi3-manylinux_2_28_aarch64.whl",
         "0.7.0.post1 linux-aarch64 provider cu134 sm90a"),
        ("flashinfer_jit_cache-0.7.0.post1-py3-none-any.whl", "0.7.0.post1 monolithic"),
        ("other-1.0+local-py3-none-any.whl", "1.0"),
    ],
)  # fmt: skip
def test_names(name: str, expected: str) -> None:
    assert " ".join(pins.describe(name).values()) == expected


def test_names_that_are_none() -> None:
    for name in ("x.whl", "a.zip", "", "a-b-c-d-e.whl"):
        with pytest.raises(ArgumentError):
            pins.describe(name)
