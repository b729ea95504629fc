"""`fi-ffi lock add`: the sha256 comes from the link, and the wheel that is fetched must have it."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from fi_ffi.cli import main
from fi_ffi.errors import ArtifactError, KernelNotFoundError, LoaderError
from fi_ffi.loader import lock, runtime, search
from fi_ffi.loader.fetch import pinning, wheels_lock
from fi_ffi.loader.fetch.wheels_lock import read_lock, the_lock, this_platform

from tests.helpers import installed
from tests.loader.server import File, Server, redirect, sha256

CPU = this_platform().partition("-")[2]
RELEASE = "0.7.2.post1"
PAGE = "/whl/cu130/flashinfer-jit-cache-sm90a/"


def name_of(sm: str, release: str = RELEASE, cpu: str = CPU) -> str:
    return f"flashinfer_jit_cache_{sm}-{release}+cu130-cp39-abi3-manylinux_2_28_{cpu}.whl"


def address(name: str) -> str:
    return f"../../files/{name.replace('+', '%2B')}"


def links(*hrefs: str) -> bytes:
    rows = "".join(f'<a href="{href}">a wheel</a><br/>\n' for href in hrefs)
    return f"<!DOCTYPE html><html><body><h1>Links</h1>\n{rows}</body></html>".encode()


@pytest.fixture(scope="module")
def wheel(built_wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    norm = {"norm": installed.library_of(built_wheel, "norm")}
    return installed.provider(tmp_path_factory.mktemp("wheels"), "sm90a", norm).read_bytes()


@pytest.fixture
def web(wheel: bytes) -> Iterator[Server]:
    """An index page with two releases, two processors and another project, and a wheel."""
    here = f"#sha256={sha256(wheel)}"
    other = "x86_64" if CPU == "aarch64" else "aarch64"
    page = links(
        address(name_of("sm90a")) + here,
        address(name_of("sm90a", "0.7.1")) + "#sha256=" + "1" * 64,
        address(name_of("sm90a", cpu=other)) + "#sha256=" + "2" * 64,
        "../torch-2.9.0-py3-none-any.whl#sha256=" + "3" * 64,
        "#sha256=" + "4" * 64,
    )
    files = {f"/whl/files/{name_of('sm90a').replace('+', '%2B')}": File(wheel)}
    with Server(files | {PAGE: File(page)}) as server:
        yield server


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    for name in ("KERNELS", "SOURCES", "WHEELS", "RELEASE", "LOCK", "OFFLINE", "VERIFY"):
        monkeypatch.delenv(f"FI_FFI_{name}", raising=False)
    monkeypatch.setenv("FI_FFI_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("FI_FFI_CUDA", "cu130")
    monkeypatch.setenv("FLASHINFER_WORKSPACE_BASE", str(tmp_path / "nobody"))
    the_lock.cache_clear()
    yield tmp_path / "cache"
    monkeypatch.undo()
    the_lock.cache_clear()
    runtime.use_source(None)


Add = Callable[..., Any]


@pytest.fixture
def add() -> Add:
    def run(*arguments: str, code: int = 0, answer: str = "") -> Any:
        the_lock.cache_clear()
        done = CliRunner().invoke(main, ["lock", "add", *arguments], input=answer)
        the_lock.cache_clear()
        assert done.exit_code == code, done.output
        return json.loads(done.stdout) if "--json" in arguments and not code else done.output

    return run


def own(cache: Path) -> Path:
    return cache / "wheels.lock"


def test_a_page_pins_what_a_call_then_fetches(add, web, wheel, cache, monkeypatch):
    """No sha256 of ours: the link's own; the file that comes must have it."""
    done = add(web.url(PAGE), "--release", RELEASE, "--yes", "--json")
    entry = done["entry"]
    assert done["lock"] == str(own(cache)) and done["added"]
    assert [seen.path for seen in web.seen] == [PAGE]  # of the wheel itself nothing is asked
    assert entry["sha256"] == sha256(wheel) and entry["file"] == name_of("sm90a")
    assert (entry["release"], entry["cuda"], entry["sm"]) == (RELEASE, "cu130", "sm90a")
    assert (entry["platform"], entry["layout"]) == (this_platform(), "provider")
    assert entry["provenance"].startswith(f"the link's #sha256= in {web.url(PAGE)}, ")
    assert stat.S_IMODE(own(cache).stat().st_mode) == 0o644
    monkeypatch.setenv("FI_FFI_RELEASE", RELEASE)
    runtime.use_source(None)
    source, file, _ = search.find_module("norm")
    assert source.version == f"{RELEASE}+cu130" and source.trust == "file-verified"
    assert file.path.read_bytes() == installed.library_of(_written(wheel, cache), "norm")
    # The package's pins are there as before.
    kernels = wheels_lock.lock_in_use().kernels
    assert kernels[0].file == name_of("sm90a")
    assert kernels[1:] == read_lock(lock.lock_path()).kernels


def _written(wheel: bytes, folder: Path) -> Path:
    path = folder / "copy.whl"
    path.write_bytes(wheel)
    return path


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), OSError(28, "No space left on device"), None], ids=repr
)
def test_a_lock_that_is_not_written_stays_as_it_was(error, tmp_path, monkeypatch):
    """An interrupt or an error before it has its name, or a text that is no lock: the lock that
    was there stays, and no other file."""
    path = tmp_path / "wheels.lock"
    path.write_text(lock.lock_path().read_text())
    before = path.read_bytes()

    def replace(*_: object) -> None:
        raise error

    if error is not None:
        monkeypatch.setattr(os, "replace", replace)
    text = path.read_text() + ("\n# more\n" if error is not None else "\n[[")
    with pytest.raises((KeyboardInterrupt, LoaderError)):
        pinning.write(path, text)
    assert path.read_bytes() == before and [*tmp_path.iterdir()] == [path]


def test_it_asks_first(add, web, wheel, cache):
    told = add(web.url(PAGE), "--release", RELEASE, answer="n\n", code=1)
    assert not own(cache).exists()
    told = add(web.url(PAGE), "--release", RELEASE, answer="y\n")
    for part in (sha256(wheel), name_of("sm90a"), RELEASE, "cu130", this_platform(), web.url(PAGE)):
        assert part in told
    assert "provenance" in told and "not verified here" in told and "Pin it?" in told
    assert f"FI_FFI_RELEASE={RELEASE}" in told
    before = own(cache).read_text()
    assert "pinned already" in add(web.url(PAGE), "--release", RELEASE)
    assert own(cache).read_text() == before
    # A second wheel comes after the first.
    add(web.url(PAGE), "--release", "0.7.1", "--yes")
    assert [e.release for e in wheels_lock.lock_in_use().kernels[:2]] == [RELEASE, "0.7.1"]
    assert own(cache).read_text().startswith(before)


def test_without_an_answer_nothing_is_pinned(add, web, cache):
    assert "Aborted" in add(web.url(PAGE), "--release", RELEASE, code=1)
    assert not own(cache).exists()


def test_a_wheels_own_address(add, web, wheel, cache):
    url = web.url("/whl/files/" + name_of("sm90a").replace("+", "%2B"))
    done = add(f"{url}#sha256={sha256(wheel).upper()}", "--yes", "--json")
    assert done["entry"]["url"] == url and done["entry"]["sha256"] == sha256(wheel)
    assert "the given address" in done["entry"]["provenance"] and not web.seen


FRAGMENTS = [
    ("", "has no #sha256=, so nothing vouches for the file"),
    ("#md5=" + "0" * 32, "has only md5, so nothing vouches for the file"),
    ("#sha512=" + "0" * 128, "has only sha512, so nothing vouches for the file"),
    ("#sha256=" + "0" * 63, "has a broken #sha256="),
    ("#sha256=" + "g" * 64, "has a broken #sha256="),
    ("#egg=x", "has only egg"),
]


@pytest.mark.parametrize(("fragment", "says"), FRAGMENTS)
def test_a_link_without_a_sha256(fragment, says, add, web, cache):
    web.files[PAGE] = File(links(address(name_of("sm90a")) + fragment))
    assert says in add(web.url(PAGE), "--yes", code=1)
    direct = web.url("/" + name_of("sm90a").replace("+", "%2B")) + fragment
    assert says in add(direct, "--yes", code=1)
    assert not own(cache).exists()


def test_another_file_at_the_address_is_refused(add, web, cache, monkeypatch):
    """The index named another sha256 than the file has: nothing of it is kept."""
    web.files[PAGE] = File(links(address(name_of("sm90a")) + "#sha256=" + "5" * 64))
    add(web.url(PAGE), "--yes")
    monkeypatch.setenv("FI_FFI_RELEASE", RELEASE)
    runtime.use_source(None)
    with pytest.raises(KernelNotFoundError, match=f"pinned is {'5' * 64}"):
        search.find_module("norm")
    assert not list(cache.rglob("*.so"))
    # Nor is another sha256 of the same file taken later.
    web.files[PAGE] = File(links(address(name_of("sm90a")) + "#sha256=" + "6" * 64))
    told = add(web.url(PAGE), "--yes", code=1)
    assert f"is pinned with sha256 {'5' * 64}, and the link has {'6' * 64}" in told


def test_a_page_that_has_moved(add, web, wheel, cache):
    """Links are relative to where the page is, and that address vouches."""
    web.files["/whl/cu130/new/"] = web.files[PAGE]
    web.faults = [redirect("/whl/cu130/new/")]
    entry = add(web.url("/old/page"), "--release", RELEASE, "--yes", "--json")["entry"]
    assert entry["url"] == web.url("/whl/files/" + name_of("sm90a").replace("+", "%2B"))
    assert web.url("/whl/cu130/new/") in entry["provenance"]


def test_a_base_and_a_page_of_other_links(add, web, cache):
    """As a release's page has them: other files, other order, and a base."""
    href = f"wheels/{name_of('sm90a')}#sha256={'7' * 64}"
    web.files["/r"] = File(
        b"<base href='/deep/er/'><a>none</a><a href='http://[x'></a><a href='notes.txt'>n</a>"
        + links(href)
    )
    entry = add(web.url("/r"), "--yes", "--json")["entry"]
    assert entry["url"] == web.url("/deep/er/wheels/" + name_of("sm90a"))


def test_which_of_several_must_be_said(add, web, cache):
    told = add(web.url(PAGE), "--yes", code=1)
    assert "has links to 2 kernel wheels of platform" in told
    assert name_of("sm90a") in told and name_of("sm90a", "0.7.1") in told
    told = add(web.url(PAGE), "--release", "9.9", "--yes", code=1)
    assert "has no link to a kernel wheel of release 9.9" in told and "it has" in told
    web.files["/none"] = File(links("a.txt"))
    assert "nor to any other" in add(web.url("/none"), "--yes", code=1)
    add(web.url(PAGE), name_of("sm90a", "0.7.1"), "--yes")
    assert wheels_lock.lock_in_use().kernels[0].release == "0.7.1"


def test_a_shim_is_no_kernels(add, web, cache):
    """From 0.7.0.post1 on `flashinfer-jit-cache` itself has none; before, and built, it has."""
    shim = f"flashinfer_jit_cache-{{}}-cp39-abi3-manylinux_2_28_{CPU}.whl#sha256={'8' * 64}"
    told = add(web.url("/" + shim.format(f"{RELEASE}%2Bcu130")), "--yes", code=2)
    assert "the wheel of one SM, such as flashinfer-jit-cache-sm90a" in told
    add(web.url("/" + shim.format("0.7.0%2Bcu130")), "--yes")
    add(web.url("/" + shim.format(f"{RELEASE}%2Bcu130.sm90a")), "--yes")
    told = add(web.url("/" + shim.format("0.7.0")), "--yes", code=2)
    assert "a name with cuda" in told


@pytest.mark.parametrize("url", ["http://example.org/x/", "https://u:SECRET@h/x/", "ftp://h/", "x"])
def test_addresses_that_are_none(url, add, cache):
    assert "SECRET" not in add(url, "--yes", code=2 if "@" in url else 1)
    assert not own(cache).exists()


def test_what_the_page_may_link_to(add, web, cache):
    name = name_of("sm90a")
    web.files["/p"] = File(links(f"http://example.org/{name}#sha256={'9' * 64}"))
    assert "only https is used" in add(web.url("/p"), "--yes", code=1)
    assert "404" in add(web.url("/nothing/"), "--yes", code=1)


def test_offline_nothing_is_asked(add, web, monkeypatch):
    monkeypatch.setenv("FI_FFI_OFFLINE", "1")
    assert "FI_FFI_OFFLINE=1" in add(web.url(PAGE), "--yes", code=1)
    assert not web.seen


def test_a_lock_that_is_named_is_the_only_one(add, web, cache, tmp_path, monkeypatch):
    add(web.url(PAGE), "--release", RELEASE, "--yes")
    mine = tmp_path / "mine.lock"
    mine.write_text('schema = 1\n[kernels]\ndefault = "0.7.1"\nurl = "https://h/{file}"\n')
    monkeypatch.setenv("FI_FFI_LOCK", str(mine))
    assert wheels_lock.lock_in_use().kernels == ()
    assert add(web.url(PAGE), "--release", "0.7.1", "--yes", "--json")["lock"] == str(mine)
    assert [e.release for e in wheels_lock.lock_in_use().kernels] == ["0.7.1"]


def test_a_lock_that_others_could_write_is_refused(add, web, cache):
    """It says what may be loaded: only the user and root may say that."""
    add(web.url(PAGE), "--release", RELEASE, "--yes")
    for mode in (0o664, 0o646):
        own(cache).chmod(mode)
        with pytest.raises(ArtifactError, match="can be written by"):
            wheels_lock.lock_in_use()
    own(cache).chmod(0o644)
    target = cache / "elsewhere"
    os.rename(own(cache), target)
    own(cache).symlink_to(target)
    with pytest.raises(ArtifactError, match="is a symbolic link"):
        wheels_lock.lock_in_use()
    own(cache).unlink()
    own(cache).write_text("schema = 1\n")
    with pytest.raises(LoaderError, match="is not a readable lock"):
        wheels_lock.lock_in_use()


def test_a_cache_that_is_pruned_keeps_the_pins(add, web, cache):
    add(web.url(PAGE), "--release", RELEASE, "--yes")
    done = CliRunner().invoke(main, ["cache", "prune", "--all"])
    assert done.exit_code == 0, done.output
    assert wheels_lock.lock_in_use().kernels[0].release == RELEASE
    listed = CliRunner().invoke(main, ["lock", "verify", name_of("sm90a"), "--json"])
    assert json.loads(listed.stdout)["files"][0]["status"] == "ok", listed.output
