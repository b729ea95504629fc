"""Facts are remembered by content, checked when in doubt, and never a reason to fail.

And users without a home, names that lead nowhere, files that only look like files.
"""

from __future__ import annotations

import json
import os
import pwd
import stat

import pytest
from click.testing import CliRunner

import fi_ffi
from fi_ffi.cli import main
from fi_ffi.errors import ArtifactError, BuildError, KernelNotFoundError, LoaderError
from fi_ffi.loader import cache, kernels, lock, search
from fi_ffi.loader.kernels import open_source
from fi_ffi.modules import files
from fi_ffi.modules.files import KernelFile
from fi_ffi.ops.functions import OPS
from fi_ffi_build import environment

from tests.helpers.children import done
from tests.helpers.forking import in_child
from tests.loader.server import sha256

SHA256 = "0123456789abcdef" * 4
LONG = "/tmp/" + "x" * 300

ATTEST = """
import sys
from fi_ffi.abi import function
from fi_ffi.loader import runtime
from fi_ffi.ops.table import ROWS
asked = []
probe = function.probe
runtime.probe = lambda entry: (asked.append(entry.name), probe(entry))[1]
for name in ("rmsnorm", "layernorm"):
    row = next(row for row in ROWS if row.name == name)
    runtime.kernel_entry(row.module, row.signature, row.releases)
print(len(asked), "elftools" in sys.modules)
"""


def test_a_second_process_asks_nothing_again(built_wheel, root):
    where = {"FI_FFI_CACHE_DIR": str(root), "FI_FFI_KERNELS": str(built_wheel)}
    # What a new cache needs of libtvm_ffi is not what is looked at here.
    assert done(ATTEST, **where)[1].startswith("2 ")
    assert done(ATTEST, **where) == (0, "0 False\n", "")
    assert done(ATTEST, FI_FFI_PARANOID="1", **where) == (0, "2 True\n", "")


def test_facts_are_the_files(built_wheel, root):
    norm = open_source(built_wheel).file("norm")
    found = kernels.facts_of(norm)
    assert [code.name for code in found.codes] == ["sm_90a"]
    assert any(name.startswith("libcudart.so.1") for name in found.needed)
    norm_rows = [op.row for op in OPS.values() if op.row.module == "norm"]
    assert {row.symbol for row in norm_rows} <= set(found.functions)
    assert kernels.facts_of(norm) == found


def note(**data):
    facts = {"needed": [], "functions": [], "codes": [], "runpath": None, "signatures": {}}
    return json.dumps({"format": kernels._FORMAT, "data": facts | data})


NOTES = {
    ascii(text[:50]): text for text in (
        "", "{", "[]", "null", "3", "\0", "[" * 100_000, '{"format": 3}',
        '{"format": 0, "data": {}}', '{"format": 3, "data": null}',
        '{"format": 3, "data": {"codes": 7}}',
    )
} | {
    ascii(data): note(**data) for data in (
        {"needed": 3}, {"needed": [7]}, {"functions": [None]}, {"runpath": 5},
        {"signatures": {"rmsnorm": 1}}, {"needed": ["\ud800"]}, {"functions": ["\ud800"]},
        {"codes": [{"kind": []}]}, {"codes": [{"kind": "sass", "sm": "90", "suffix": "a"}]},
        {"codes": [{"kind": "cubin", "sm": 90, "suffix": "a"}]},
        {"codes": [{"kind": "sass", "sm": 90, "suffix": "z"}]},
    )
}  # fmt: skip


@pytest.mark.parametrize("text", NOTES.values(), ids=NOTES)
def test_a_damaged_note_is_made_anew(text, root, testing_library):
    """Also one that JSON reads, and that is of this format."""
    file = KernelFile(testing_library).file()
    expected = kernels.facts_of(file)
    path = cache.cache_root() / kernels._FACTS.format(file.sha256)
    whole = path.read_bytes()
    path.write_bytes(text.encode(errors="surrogatepass"))
    assert kernels.facts_of(file) == expected
    assert path.read_bytes() == whole


def test_a_cache_that_cannot_be_written_does_not_matter(testing_library, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FI_FFI_CACHE_DIR", str(tmp_path / "file" / "below"))
    assert kernels.facts_of(KernelFile(testing_library).file()).functions


@pytest.fixture
def homeless(monkeypatch):
    """As in a container that was started with `--user`."""

    def unknown(uid):
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    for name in ("HOME", "XDG_CACHE_HOME", "FI_FFI_CACHE_DIR", "FLASHINFER_WORKSPACE_BASE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("homeless")
def test_no_home(testing_library):
    with pytest.raises(LoaderError, match="this user has no home directory.*set FI_FFI_CACHE_DIR"):
        cache.find(SHA256, "norm.so")
    for command in (["cache", "list"], ["cache", "prune"], ["cache", "verify"], ["build", "norm"]):
        result = CliRunner().invoke(main, command)
        assert result.exit_code == 1
        assert "set FI_FFI_CACHE_DIR to a directory" in result.output.replace("\n", " ")
    for look in (search._local, search._jit):
        with pytest.raises(LoaderError, match="home directory"):
            [*look()]
    # Kernels that are named need no cache: what would be noted there is asked for again.
    assert kernels.facts_of(KernelFile(testing_library).file()).functions
    assert files.load_file(testing_library).facts.functions


def test_a_home_that_nobody_has(monkeypatch):
    monkeypatch.setenv("FI_FFI_CACHE_DIR", "~nosuchuser/cache")
    with pytest.raises(LoaderError, match="FI_FFI_CACHE_DIR is '~nosuchuser/cache'.*whole path"):
        cache.cache_root()
    for use in (open_source, files.load_file):
        with pytest.raises(LoaderError, match="'~nosuchuser/a'.*whole path"):
            use("~nosuchuser/a")
    monkeypatch.setenv("FI_FFI_LOCK", "~nosuchuser/wheels.lock")
    with pytest.raises(LoaderError, match="FI_FFI_LOCK is '~nosuchuser/wheels.lock'.*whole path"):
        lock.lock_path()


def test_names_that_are_too_long(root, monkeypatch, tmp_path):
    with pytest.raises(KernelNotFoundError, match="no such file or directory"):
        open_source(LONG)
    with pytest.raises(KernelNotFoundError, match="File name too long"):
        files.load_file(LONG)
    with pytest.raises(KernelNotFoundError, match="null byte"):
        files.load_file("a\0b.so")
    locked = environment.lock_folder(type(tmp_path)(LONG), print)
    with pytest.raises(BuildError, match="File name too long; name another --build-dir"), locked:
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
        path = cache.store([b"a"], sha256(b"a"), "a.so", "a test")
        assert cache.find(path.parent.name, "a.so") == path

    assert in_child(child) == 0
    for folder in (root, root.parent, root.parent.parent):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700, folder
    for path in root.rglob("*"):
        assert not path.stat().st_mode & 0o022, path


def test_a_damaged_note_of_a_build(tmp_path):
    folder, made = tmp_path / "made", []
    folder.mkdir()
    for content in (b"", b"\xff\xfe", b"{"):
        folder.with_name("made.json").write_bytes(content)
        environment.make_once(folder, folder, {"a": "b"}, lambda: made.append(1))
    environment.make_once(folder, folder, {"a": "b"}, lambda: made.append(1))
    assert len(made) == 3
