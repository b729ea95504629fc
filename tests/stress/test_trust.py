"""Nothing unverified is loaded: docs/threat-model.md names tests of each row."""

from __future__ import annotations

import ast
import os
import re
import shutil
import stat
import zipfile
from pathlib import Path

import pytest

import fi_ffi
from fi_ffi.abi import library
from fi_ffi.abi._cffi import ffi
from fi_ffi.errors import ArtifactError, LoaderError
from fi_ffi.loader import cache, elf, kernels, runtime, search, tvm_ffi
from fi_ffi.loader.kernels import ModuleFile, open_source
from fi_ffi.loader.wheel import Wheel
from fi_ffi.modules import files

from tests.helpers import compiler
from tests.helpers.forking import in_child
from tests.helpers.pinned import TESTING_MEMBER, download_pinned_wheel, tvm_ffi_loaded
from tests.loader.server import make_wheel, record, sha256
from tests.stress.swapping import flip, in_memory, library_bytes
from tests.stress.test_trust_cache import MODULE, OTHER, another

__all__ = ["tvm_ffi_loaded"]

INFO = "flashinfer_jit_cache-0.6.13+cu130.dist-info"
DOCS = Path(fi_ffi.__file__).parents[1] / "docs"

pytestmark = pytest.mark.usefixtures("alone", "tvm_ffi_loaded")


@pytest.fixture(scope="session")
def unpacked(tmp_path_factory):
    """The pinned libtvm_ffi wheel as pip leaves it."""
    folder = tmp_path_factory.mktemp("tvm-ffi")
    with zipfile.ZipFile(download_pinned_wheel()) as archive:
        archive.extractall(folder)
    return folder


@pytest.fixture
def root(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def alone(root, monkeypatch):
    """A cache of the test's own, no network, and no kernels but the test's."""
    monkeypatch.setenv("FI_FFI_CACHE_DIR", str(root))
    monkeypatch.setenv("FI_FFI_OFFLINE", "1")
    monkeypatch.setenv("FLASHINFER_WORKSPACE_BASE", str(root.parent / "nothing"))
    for name in ("FI_FFI_KERNELS", "FI_FFI_WHEELS", "FI_FFI_PARANOID", "FI_FFI_SOURCES"):
        monkeypatch.delenv(name, raising=False)
    runtime.use_source(None)
    yield
    runtime.use_source(None)


@pytest.fixture
def good():
    return library_bytes(os.urandom(8))


@pytest.fixture
def bad():
    return library_bytes(os.urandom(8))


def in_directory(folder, content):
    """Kernels in a directory that the user names; the module's path."""
    path = folder / "kernels" / "norm" / "norm.so"
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    runtime.use_source(folder / "kernels")
    return path


def in_wheel(folder, content):
    """Kernels in a wheel that the user names; where the module is in the cache."""
    wheel = folder / "flashinfer_jit_cache-0.6.13+cu130-cp39-abi3-linux_x86_64.whl"
    wheel.write_bytes(make_wheel({MODULE: content}))
    runtime.use_source(wheel)
    return search.find_module("norm")[1].path


def installed(folder, content, monkeypatch):
    """Kernels as a distribution that pip has installed."""
    path = folder / "site" / MODULE
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    info = folder / "site" / INFO
    info.mkdir()
    (info / "METADATA").write_text("Name: flashinfer-jit-cache\nVersion: 0.6.13+cu130\n")
    (info / "RECORD").write_bytes(record({MODULE: content}))
    monkeypatch.syspath_prepend(str(folder / "site"))
    monkeypatch.setenv("FI_FFI_SOURCES", "installed")
    runtime.use_source(None)
    return path


PLACES = {"directory": in_directory, "wheel": in_wheel, "installed": installed}


@pytest.fixture(params=PLACES)
def place(request, tmp_path, good, monkeypatch):
    """A good module in each place that kernels come from, found there by fi_ffi."""
    more = (monkeypatch,) if request.param == "installed" else ()
    return PLACES[request.param](tmp_path, good, *more)


def replace(path, content):
    """Put another file into a file's place, as an update does; the old one's new name."""
    aside = path.with_name("aside")
    os.link(path, aside)
    new = path.with_name("new")
    new.write_bytes(content)
    new.chmod(0o444)
    os.replace(new, path)
    return aside


def test_a_good_module_is_loaded(place):
    """What all the others would do, were nothing swapped."""
    loaded = runtime.load("norm")
    assert loaded.file.path == place
    assert in_memory(place)
    assert loaded.facts.needed


@pytest.mark.parametrize("at", [0, 5, 4096, -1])
def test_a_swapped_byte_where_a_hash_is_known(at, tmp_path, good, monkeypatch):
    """A wheel's member, an installed file, and what a wheel has left in the cache."""
    path = installed(tmp_path, good, monkeypatch)
    flip(path, at)
    with pytest.raises(LoaderError, match=r"the RECORD of the distribution has .* reinstall"):
        runtime.load("norm")
    assert not in_memory(path)
    monkeypatch.delenv("FI_FFI_SOURCES")
    cached = in_wheel(tmp_path, good)
    flip(cached, at)
    damaged = cached.with_name("damaged")
    os.link(cached, damaged)
    assert cache.find(sha256(good), "norm.so") is None
    assert runtime.load("norm").file.path.read_bytes() == good  # made anew
    assert not in_memory(damaged)


def test_replaced_between_the_check_and_the_loading(place, bad, monkeypatch):
    asides = []
    monkeypatch.setattr(
        runtime.machine, "load_needed", lambda *_: asides.append(replace(place, bad))
    )
    with pytest.raises(LoaderError, match="was replaced or written to after"):
        runtime.load("norm")
    assert not in_memory(place)
    assert not in_memory(asides[0])


def test_replaced_while_it_is_loaded(place, bad, monkeypatch):
    """The last check is done: what is loaded is what was checked, whatever the path leads to."""
    asides, real = [], library.open_module

    def late(path, through=None):
        asides.append(replace(place, bad))
        return real(path, through)

    monkeypatch.setattr(library, "open_module", late)
    runtime.load("norm")
    assert not in_memory(place)
    assert in_memory(asides[0])


def test_written_over_while_it_is_loaded(place, monkeypatch):
    real = library.open_module

    def late(path, through=None):
        handle = real(path, through)
        place.chmod(0o644)
        with place.open("r+b") as file:  # not of its code
            file.seek(-4, os.SEEK_END)
            file.write(b"late")
        return handle

    monkeypatch.setattr(library, "open_module", late)
    with pytest.raises(LoaderError, match="while it was loaded, and nothing of it is called"):
        runtime.load("norm")


@pytest.mark.parametrize("keep_times", [False, True])
def test_written_over_in_place(keep_times, place, bad, monkeypatch):
    def write(*_):
        status = place.stat()
        place.chmod(0o644)
        with place.open("r+b") as file:
            file.write(bad)
        place.chmod(stat.S_IMODE(status.st_mode))
        if keep_times:
            os.utime(place, ns=(status.st_atime_ns, status.st_mtime_ns))

    monkeypatch.setattr(runtime.machine, "load_needed", write)
    with pytest.raises(LoaderError, match="was replaced or written to after"):
        runtime.load("norm")
    assert not in_memory(place)


def test_facts_are_of_the_file_that_was_hashed(place, unpacked, monkeypatch):
    """Another library is there while it is read, and the first one again afterwards."""
    file = search.find_module("norm")[1]
    assert elf.inspect_elf(unpacked / TESTING_MEMBER).functions
    (cache.cache_root() / kernels._FACTS.format(file.sha256)).unlink()
    real = elf.inspect_elf

    def swapped(where):
        aside = place.parent.rename(place.parent.with_name("aside"))
        place.parent.mkdir()
        shutil.copy(unpacked / TESTING_MEMBER, place)
        try:
            return real(where)
        finally:
            shutil.rmtree(place.parent)
            aside.rename(place.parent)

    monkeypatch.setattr(elf, "inspect_elf", swapped)
    assert kernels.facts_of(file).functions == []


def test_a_file_that_was_loaded_and_then_written_over(tmp_path, good):
    """The linker would give the old one for it, with the new one's pages in it."""
    path = in_directory(tmp_path, good)
    runtime.load("norm")
    end = len(good) - 4
    with path.open("r+b") as file:  # not of its code
        file.seek(end)
        file.write(b"late")
    runtime.use_source(path.parents[1])
    with pytest.raises(ArtifactError, match="after this process had loaded it; start it again"):
        runtime.load("norm")


def test_many_libraries_one_after_the_other(tmp_path):
    """Each is its own, and what is loaded again takes no further descriptor."""
    handles = {}
    for name in "abcdefgh":
        path = tmp_path / f"{name}.so"
        path.write_bytes(library_bytes(name.encode()))
        handles[name] = files.load_file(path).handle
        assert in_memory(path)
    assert len({*map(str, handles.values())}) == len(handles)
    before = len(os.listdir("/proc/self/fd"))
    files._files.clear()
    for name, handle in handles.items():
        assert files.load_file(tmp_path / f"{name}.so").handle == handle
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_library_that_needs_its_own_folder(tmp_path, monkeypatch):
    """It is opened by its path; one that was replaced meanwhile is told, and not used."""
    source, path = tmp_path / "own.c", tmp_path / "own.so"
    source.write_text("int __tvm_ffi_own(void *h, void *a, int n, void *r) { return 0; }")
    compiler.library(source, path, "-Wl,-rpath,$ORIGIN")
    real = library.open_module
    asides = []

    def late(where, through=None):
        asides.append(replace(path, path.read_bytes() + b"other"))
        return real(where, through)

    with monkeypatch.context() as patched:
        patched.setattr(library, "open_module", late)
        code = in_child(lambda: files.load_file(path))
    assert code == 1
    assert asides == []  # that was in the child
    assert files.load_file(path).facts.runpath == "$ORIGIN"
    assert in_memory(path)


@pytest.fixture
def site(unpacked, tmp_path, monkeypatch):
    """apache-tvm-ffi as it is installed, the only one; its library's path."""
    folder = tmp_path / "site"
    shutil.copytree(unpacked, folder)
    monkeypatch.setattr("sys.path", [str(folder)])
    monkeypatch.setattr(tvm_ffi, "in_process", lambda *soname: None)
    monkeypatch.setattr(tvm_ffi, "_loaded", None)
    return folder / tvm_ffi.MEMBER


def test_an_installed_libtvm_ffi(site):
    found = tvm_ffi.installed()
    assert found.path == str(site)
    flip(site)
    with pytest.raises(ArtifactError, match=r"RECORD of apache-tvm-ffi .*reinstall it"):
        tvm_ffi.installed()
    assert not in_memory(site)


def test_libtvm_ffi_that_is_replaced(site, bad, monkeypatch):
    digest, real = sha256(site.read_bytes()), tvm_ffi.installed

    def find():
        found = real()
        assert found.path == str(site) and found.sha256 == digest
        replace(site, bad)
        return found

    monkeypatch.setattr(tvm_ffi, "installed", find)
    with pytest.raises(ArtifactError, match="was replaced"):
        runtime.ensure_tvm_ffi()
    assert not in_memory(site)


def test_libtvm_ffi_that_is_replaced_while_it_is_loaded(site, bad, monkeypatch):
    """A second libtvm_ffi would end this process, so what is opened is looked at in its place."""
    opened, wanted = [], os.stat(site).st_ino

    class Linker:
        def dlopen(self, name, flags):
            replace(site, bad)
            opened.append(os.stat(name).st_ino)
            raise OSError("not now")

        def new(self, kind):
            raise AssertionError("nothing was opened")

        def __getattr__(self, name):
            return getattr(ffi, name)

    monkeypatch.setattr(library, "ffi", Linker())
    with pytest.raises(LoaderError, match="not now"):
        runtime.ensure_tvm_ffi()
    assert opened == [wanted] != [os.stat(site).st_ino]


def test_a_wheel_is_the_one_that_was_verified(tmp_path, good, bad):
    path = tmp_path / "kernels-1-py3-none-any.whl"
    path.write_bytes(make_wheel({MODULE: good}))
    wheel = Wheel(path, sha256=sha256(path.read_bytes()))
    assert wheel.trust == "file-verified"
    path.write_bytes(make_wheel({MODULE: bad}))
    with pytest.raises(ArtifactError, match="after it was verified"):
        wheel.extract(MODULE)


def test_a_pipe_in_the_place_of_a_module(place):
    search.find_module("norm")
    place.unlink()
    os.mkfifo(place)
    with pytest.raises(LoaderError):  # and not wait for somebody to write into it
        runtime.load("norm")
    with (
        pytest.raises(ArtifactError, match="no regular file"),
        kernels.checked(place, "", (0,) * 4),
    ):
        pass


@pytest.mark.parametrize("up", [0, 1, 2])
def test_what_every_user_can_write_in_a_directory(up, tmp_path, good):
    path = in_directory(tmp_path, good)
    open_to_all = [path, *path.parents][up]
    open_to_all.chmod(0o666 if open_to_all.is_file() else 0o777)
    with pytest.raises(LoaderError, match=r"can be written by every user .*chmod o-w"):
        runtime.load("norm")
    assert not in_memory(path)


def test_what_others_put_where_all_can_write(tmp_path, good):
    """A module folder that another user has put into one with the sticky bit."""
    path = in_directory(tmp_path, good)
    path.parents[1].chmod(0o1777)
    assert open_source(path.parents[1]).file("norm").path == path
    another(path.parent)
    with pytest.raises(LoaderError, match=f"was put by user {OTHER} where every user can"):
        runtime.load("norm")
    assert not in_memory(path)


OPENING = ("dlopen", "attach", "open_module", "load_nvidia_dynamic_lib")
BY_TVM_FFI = "ffi.Module.load_from_file.so"


def test_the_dlopen_calls_are_those_of_the_table():
    """docs/threat-model.md has a row for each function that opens a library."""
    package, calls = Path(fi_ffi.__file__).parent, set()
    for path in package.rglob("*.py"):
        for function in ast.walk(ast.parse(path.read_text())):
            if isinstance(function, ast.FunctionDef):
                called = {
                    getattr(node.func, "attr", getattr(node.func, "id", ""))
                    for node in ast.walk(function)
                    if isinstance(node, ast.Call)
                }
                called |= {getattr(node, "value", "") for node in ast.walk(function)} & {BY_TVM_FFI}
                if called & {*OPENING, BY_TVM_FFI}:
                    calls.add(f"{path.relative_to(package)}:{function.name}")
    text = (DOCS / "threat-model.md").read_text()
    told = set(re.findall(r"`([\w/]+\.py:\w+)`", text))
    assert calls == told


def test_another_users_module(place):
    """A place that the user names, or an installer filled, may be of anybody; the cache not."""
    another(place)
    if "objects" in place.parts:
        with pytest.raises(LoaderError, match=f"belongs to user {OTHER}"):
            runtime.load("norm")
    else:
        assert isinstance(runtime.load("norm").file, ModuleFile)
    assert search.kinds_asked()
