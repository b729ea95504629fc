"""Users without a home, names that lead nowhere, and files that only look like files."""

from __future__ import annotations

import os
import pwd
import stat
from pathlib import Path

import pytest
from click.testing import CliRunner

import fi_ffi
from fi_ffi.cli import main
from fi_ffi.errors import ArtifactError, BuildError, KernelNotFoundError, LoaderError
from fi_ffi.loader import cache, held, lock, runtime, search
from fi_ffi.loader.building import environment
from fi_ffi.loader.kernels import ModuleFile, open_source

from tests.helpers.forking import in_child

SHA256 = "0123456789abcdef" * 4
LONG = "/tmp/" + "x" * 300


@pytest.fixture
def homeless(monkeypatch):
    """As in a container that was started with `--user`."""

    def unknown(uid):
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    for name in ("HOME", "XDG_CACHE_HOME", "FI_FFI_CACHE_DIR", "FLASHINFER_WORKSPACE_BASE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("homeless")
def test_no_home(tmp_path):
    says = "this user has no home directory.*set FI_FFI_CACHE_DIR"
    with pytest.raises(LoaderError, match=says):
        cache.find(SHA256, "norm.so")
    for command in (["cache", "list"], ["cache", "prune"], ["cache", "verify"], ["build", "norm"]):
        result = CliRunner().invoke(main, command)
        assert result.exit_code == 1
        assert "set FI_FFI_CACHE_DIR to a directory" in result.output.replace("\n", " ")
    for look in (search._local, search._jit):
        with pytest.raises(LoaderError, match="home directory"):
            [*look(None)]


@pytest.mark.usefixtures("homeless")
def test_no_home_and_kernels_that_are_named(testing_library, tmp_path):
    """Which need no cache: what would be noted there is asked for again."""
    file = ModuleFile("a", testing_library, cache.hash_of(testing_library.open("rb")),
                      cache.state_of(testing_library.stat()))  # fmt: skip
    assert held.facts_of(file).functions
    assert runtime.load_file(testing_library).facts.functions


def test_a_home_that_nobody_has(monkeypatch):
    monkeypatch.setenv("FI_FFI_CACHE_DIR", "~nosuchuser/cache")
    with pytest.raises(LoaderError, match="FI_FFI_CACHE_DIR is '~nosuchuser/cache'.*whole path"):
        cache.cache_root()
    for use in (open_source, runtime.load_file):
        with pytest.raises(LoaderError, match="'~nosuchuser/a'.*whole path"):
            use("~nosuchuser/a")
    monkeypatch.setenv("FI_FFI_LOCK", "~nosuchuser/wheels.lock")
    with pytest.raises(LoaderError, match="FI_FFI_LOCK is '~nosuchuser/wheels.lock'.*whole path"):
        lock.lock_path()


def test_names_that_are_too_long(root, monkeypatch):
    with pytest.raises(KernelNotFoundError, match="no such file or directory"):
        open_source(LONG)
    with pytest.raises(KernelNotFoundError, match="File name too long"):
        runtime.load_file(LONG)
    with pytest.raises(KernelNotFoundError, match="null byte"):
        runtime.load_file("a\0b.so")
    with pytest.raises(BuildError, match="File name too long; name another --build-dir"), \
            environment._locked(Path(LONG), print):  # fmt: skip
        pass
    monkeypatch.setenv("FI_FFI_CACHE_DIR", LONG)
    assert cache.find(SHA256, "norm.so") is None
    with pytest.raises(LoaderError, match="File name too long; set FI_FFI_CACHE_DIR"):
        cache.store([b""], SHA256, "norm.so", "a test")
    for command in ("list", "prune", "verify"):
        result = CliRunner().invoke(main, ["cache", command])
        assert result.exit_code == 1
        assert "File name too long" in result.output


def test_a_file_that_cannot_be_read():
    with pytest.raises(ArtifactError, match="mem cannot be read: Input/output error"):
        fi_ffi.module("/proc/self/mem")


def test_what_is_made_is_for_its_user_alone(tmp_path, monkeypatch):
    """Also where nothing is taken from modes, and the folders above are not there."""
    root = tmp_path / "home" / ".cache" / "fi-ffi"
    monkeypatch.setenv("FI_FFI_CACHE_DIR", str(root))

    def child():
        os.umask(0)
        path = cache.store([b"a"], cache.hashlib.sha256(b"a").hexdigest(), "a.so", "a test")
        assert cache.find(path.parent.name, "a.so") == path

    assert in_child(child) == 0
    for folder in (root, root.parent, root.parent.parent):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700, folder
    for path in root.rglob("*"):
        assert not path.stat().st_mode & 0o022, path


NOTES = ["", "{", "[]", "null", "3", '{"format": 3}', '{"format": 3, "data": null}', "[" * 100_000,
         '{"format": 3, "data": {"needed": 3, "functions": [], "codes": []}}',
         '{"format": 3, "data": {"needed": ["\\ud800"], "functions": [], "codes": []}}',
         '{"format": 3, "data": {"needed": [], "functions": ["\\ud800"], "codes": []}}',
         '{"format": 3, "data": {"needed": [], "functions": [], "codes": [{"kind": []}]}}',
]  # fmt: skip


@pytest.mark.parametrize("text", NOTES, ids=range(len(NOTES)))
def test_a_damaged_note(text, root, testing_library):
    file = ModuleFile("a", testing_library, cache.hash_of(testing_library.open("rb")),
                      cache.state_of(testing_library.stat()))  # fmt: skip
    expected = held.facts_of(file)
    held._path(file.sha256).write_bytes(text.encode(errors="surrogatepass"))
    assert held.facts_of(file) == expected


def test_a_damaged_note_of_a_build(tmp_path):
    folder, made = tmp_path / "made", []
    folder.mkdir()
    for content in (b"", b"\xff\xfe", b"{"):
        folder.with_name("made.json").write_bytes(content)
        environment._once(folder, folder, {"a": "b"}, lambda: made.append(1))
    environment._once(folder, folder, {"a": "b"}, lambda: made.append(1))
    assert len(made) == 3
