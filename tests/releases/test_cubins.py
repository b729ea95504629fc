"""Device code that modules fetch themselves, through each release's own `cubin_loader.h`."""

from __future__ import annotations

import hashlib
import logging
import os
import random
import shutil
import sys
import threading
from pathlib import Path

import pytest

import fi_ffi
from fi_ffi.errors import ArtifactError, KernelError, KernelNotFoundError, LoaderError
from fi_ffi.loader import services
from fi_ffi.loader.fetch import asking as cooling
from fi_ffi.loader.fetch import cubins, http

from tests.helpers import compiler
from tests.helpers.children import done, start
from tests.helpers.remains import allowed
from tests.loader.server import File, Server, good, other_bytes, reset, status
from tests.releases.bindings import RELEASES

HEADER = "include/flashinfer/cubin_loader.h"
SOURCE = Path(__file__).with_name("asks_for_cubins.cc")
NAME = "158f6fa1/fmha/trtllm-gen/fmhaSm100aKernel_H128+PagedKv.cubin"
CONTENT = random.Random(20).randbytes(100_000) + bytes(50)  # an ELF has zeros inside
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture(scope="session")
def asking(sources, tmp_path_factory):
    """A library that asks for device code as a release's modules do; its path."""
    made: dict[str, Path] = {}

    def make(release: str = "0.6.13") -> Path:
        header = sources(release, HEADER)
        if header not in made:
            folder = tmp_path_factory.mktemp("asking")
            (folder / "cubin_loader.h").write_text(header)
            made[header] = compiler.library(SOURCE, folder / "asks.so", f"-I{folder}")
        return made[header]

    return make


@pytest.fixture
def module(asking):
    return fi_ffi.module(asking())


@pytest.fixture(autouse=True)
def nothing(tmp_path, monkeypatch):
    """No place has any device code, and nothing is fetched."""
    monkeypatch.delenv("FLASHINFER_CUBIN_DIR", raising=False)
    monkeypatch.delenv("FI_FFI_SOURCES", raising=False)
    monkeypatch.setenv("FLASHINFER_WORKSPACE_BASE", str(tmp_path / "home"))
    monkeypatch.setenv("FI_FFI_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("FI_FFI_OFFLINE", "1")


def put(root: Path, content: bytes = CONTENT) -> Path:
    path = root / NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return root


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("FLASHINFER_CUBIN_DIR", str(put(tmp_path / "cubins")))
    return tmp_path / "cubins"


@pytest.fixture
def web(monkeypatch):
    """A server with the file, and the network allowed."""
    monkeypatch.delenv("FI_FFI_OFFLINE")
    with Server({f"/base/{NAME}": File(CONTENT)}) as server:
        monkeypatch.setenv("FLASHINFER_CUBINS_REPOSITORY", server.url("/base/"))
        yield server


@pytest.mark.parametrize("release", RELEASES)
def test_every_release_is_given_its_device_code(release, asking, folder):
    module = fi_ffi.module(asking(release))
    assert module.get(NAME, SHA256) == CONTENT
    assert module.get(NAME, SHA256.upper()) == CONTENT


def test_without_the_package_that_answers(asking, tmp_path, monkeypatch):
    """The module is refused when it is loaded, and not when it is called."""
    path = Path(shutil.copy(asking(), tmp_path / "alone.so"))
    monkeypatch.setattr(services, "device_code", services.Slot(services._no_server))
    with pytest.raises(LoaderError, match=r"alone\.so asks for .* the package fi_ffi.loader.fetch"):
        fi_ffi.module(path)


def test_a_slash_too_many(module, folder):
    """FlashInfer's modules put one after a folder's name that ends with one."""
    assert module.get(NAME.replace("/", "//"), SHA256) == CONTENT


def test_a_library_that_keeps_that_it_got_nothing(module, folder):
    """As cuDNN's: it does not ask again."""
    name = "kept.cubin"
    with pytest.raises(KernelNotFoundError, match="no device code kept"):
        module.get_kept(name, SHA256)
    (folder / name).write_bytes(CONTENT)
    with pytest.raises(KernelNotFoundError, match="earlier call: start the process") as caught:
        module.get_kept(name, SHA256)
    assert "no device code kept.cubin" in str(caught.value)
    assert isinstance(caught.value.__cause__, KernelError)
    with pytest.raises(KernelError, match="not about device code"):
        module.fail()
    assert module.get_after.signature == module.entry("get_after", checked=True).signature


def test_an_installed_distribution(module, tmp_path, monkeypatch):
    put(tmp_path / "flashinfer_cubin" / "cubins")
    (tmp_path / "flashinfer_cubin" / "__init__.py").write_text("raise RuntimeError('imported')")
    (tmp_path / "flashinfer_cubin-0.6.13.dist-info").mkdir()
    with pytest.raises(KernelNotFoundError, match="flashinfer-cubin"):
        module.get(NAME, SHA256)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert module.get(NAME, SHA256) == CONTENT
    assert "flashinfer_cubin" not in sys.modules
    monkeypatch.setenv("FI_FFI_SOURCES", "jit,remote")
    with pytest.raises(KernelNotFoundError):
        module.get(NAME, SHA256)


def test_what_flashinfer_has_fetched(module, tmp_path):
    put(tmp_path / "home" / ".cache" / "flashinfer" / "cubins")
    assert module.get(NAME, SHA256) == CONTENT


def test_it_is_fetched_once(module, web, monkeypatch, caplog):
    with caplog.at_level(logging.INFO, "fi_ffi"):
        assert module.get(NAME, SHA256) == CONTENT
    assert f"fetching {NAME.rpartition('/')[2]}" in caplog.text
    asked = len(web.seen)
    monkeypatch.setenv("FI_FFI_OFFLINE", "1")
    assert module.get(NAME, SHA256) == CONTENT
    assert len(web.seen) == asked > 0


def test_a_name_too_long_for_the_cache(module, web):
    name = f"a/{'x' * 240}.cubin"
    web.files[f"/base/{name}"] = File(CONTENT)
    assert module.get(name, SHA256) == CONTENT


def test_a_good_file_behind_damaged_ones(module, folder, tmp_path, web):
    put(folder, CONTENT[::-1])
    put(tmp_path / "home" / ".cache" / "flashinfer" / "cubins", b"")
    assert module.get(NAME, SHA256) == CONTENT


def refused(module, kind, words, name=NAME, sha256=SHA256):
    """The error of a call for a file that no place has, also of one on the library's thread."""
    for entry in (module.get, module.size_on_a_thread):
        with pytest.raises(kind, match=words) as caught:
            entry(name, sha256)
        cause = caught.value.__cause__
        assert isinstance(cause, KernelError)
        assert f"Failed to load cubin for {name}" in cause.message


@pytest.mark.parametrize(
    "name", ["../k.cubin", "a/../../k.cubin", "/etc/hostname", "//", "", "a/./b", "a\nb", "a\\b"]
)
def test_paths_that_lead_elsewhere(module, folder, name):
    (folder.parent / "k.cubin").write_bytes(CONTENT)
    refused(module, ArtifactError, "which is no path", name)


@pytest.mark.parametrize("sha256", ["", SHA256[:-1], "g" * 64])
def test_what_is_no_sha256(module, folder, sha256):
    refused(module, ArtifactError, "which is no sha256", NAME, sha256)


def test_a_link_that_leads_out(module, folder, tmp_path):
    (folder / NAME).rename(tmp_path / "elsewhere")
    (folder / NAME).symlink_to(tmp_path / "elsewhere")
    refused(module, KernelNotFoundError, "leads out of")
    (folder / "inside").write_bytes(CONTENT)
    (folder / NAME).unlink()
    (folder / NAME).symlink_to(folder / "inside")
    assert module.get(NAME, SHA256) == CONTENT


def test_content_that_is_another(module, folder):
    put(folder, CONTENT[:-1])
    refused(module, KernelNotFoundError, f"the module asks for {SHA256}")


def test_what_is_no_file(module, folder):
    (folder / NAME).unlink()
    os.mkfifo(folder / NAME)
    refused(module, KernelNotFoundError, "is no file of at most 2 GiB")


@pytest.mark.parametrize(
    ("fault", "words"),
    [(other_bytes, "the address serves another file"), (status(404), "there is no such file")],
)
def test_servers_that_have_another_file_or_none(module, web, fault, words):
    web.always = fault
    refused(module, KernelNotFoundError, words)


def test_a_server_that_is_not_reached_is_not_asked_at_every_call(module, web, monkeypatch):
    """Not for that file, nor for another; later, and at another address, it is."""
    monkeypatch.setattr(http.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(cubins, "_cooldowns", {})
    web.always = reset
    refused(module, KernelNotFoundError, "gave up after")
    asked = len(web.seen)
    assert asked
    refused(module, KernelNotFoundError, "gave up after")
    refused(module, KernelNotFoundError, "gave up after", "other.cubin")
    assert len(web.seen) == asked
    web.always = good
    monkeypatch.setenv("FLASHINFER_CUBINS_REPOSITORY", web.url("/base"))
    assert module.get(NAME, SHA256) == CONTENT
    monkeypatch.setenv("FLASHINFER_CUBINS_REPOSITORY", web.url("/base/"))
    monkeypatch.setattr(cooling, "UNREACHABLE", 0.0)
    assert module.get(NAME, SHA256) == CONTENT


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("FI_FFI_OFFLINE", "1", "FI_FFI_OFFLINE=1, and"),
        ("FLASHINFER_NO_DOWNLOAD", "1", "FLASHINFER_NO_DOWNLOAD is set"),
        ("FLASHINFER_CUBINS_REPOSITORY", "http://example.org/", "only https is used"),
        ("FLASHINFER_CUBINS_REPOSITORY", "/srv/cubins", "no address of a file"),
        ("FI_FFI_SOURCES", "installed", "no place is asked"),
        ("FI_FFI_SOURCES", "nowhere", "some of"),
    ],
)
def test_nothing_is_fetched_unasked(module, web, monkeypatch, variable, value, words):
    monkeypatch.setenv(variable, value)
    refused = pytest.raises((KernelNotFoundError, fi_ffi.ArgumentError), match=words)
    with allowed("server._last"), refused:  # why the last file was not served
        module.get(NAME, SHA256)
    assert not web.seen


def test_threads_that_python_does_not_know(module, folder):
    assert module.size_on_a_thread(NAME, SHA256) == len(CONTENT)


def test_a_library_that_does_without(module, folder, caplog):
    """As cuDNN's, which asks for all its files and uses one: told, and no failure of the call."""
    assert module.size_of_any("none.cubin", SHA256) == 0
    assert "size_of_any goes without device code" in caplog.text
    with pytest.raises(KernelError, match="got int|Mismatched|Expected") as caught:
        module.entry("get", checked=False)(1, 2)
    assert "cubin" not in str(caught.value)  # an earlier call's is not this one's


def test_calls_within_calls(module, folder):
    """The inner call's failure is caught, and is not the outer one's."""
    caught = []

    def before() -> None:
        with pytest.raises(KernelNotFoundError) as inner:
            module.get("none.cubin", SHA256)
        caught.append(inner.value)

    assert module.get_after(before, NAME, SHA256) == CONTENT
    assert len(caught) == 1


def test_each_thread_has_its_own(module, folder):
    files = {}
    for number in range(4):
        content = random.Random(number).randbytes(1000 + number)
        (folder / f"{number}.cubin").write_bytes(content)
        files[f"{number}.cubin"] = content, hashlib.sha256(content).hexdigest()
    wrong = []

    def ask(name: str) -> None:
        content, sha256 = files[name]
        for turn in range(50):
            if module.get(name, sha256) != content:
                wrong.append(name)
            try:
                module.get(f"{name}.{turn}", sha256)
                wrong.append(turn)
            except KernelNotFoundError as error:
                if f"{name}.{turn} with sha256 {sha256}" not in str(error):
                    wrong.append(error)

    threads = [threading.Thread(target=ask, args=(name,)) for name in files]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong


PROGRAM = """
import os, signal, sys, threading, time
import fi_ffi
path, name, sha256 = sys.argv[1:4]
signal.signal(signal.SIGINT, signal.default_int_handler)  # a parent may have it ignored
module = fi_ffi.module(path)
"""


def run(program, asking, *more, **environment):
    code, out, err = done(PROGRAM + program, str(asking()), NAME, SHA256, *more, **environment)
    assert code == 0, out + err
    return out.split()


def test_an_interrupt_goes_on(asking, web):
    """Ctrl-C while a server is waited for: C++ is left first, and the next call is as any."""

    def interrupted(answer):
        web.faults.append(lambda answer: answer)
        children[0].send_signal(2)
        web.wait(1.0)
        return answer

    web.faults.append(interrupted)
    program = (
        PROGRAM
        + """
print("ready", flush=True)
try:
    module.get(name, sha256)
    print("not raised")
except KeyboardInterrupt as error:
    print(error.__cause__)
print(len(module.get(name, sha256)))
"""
    )
    children = [start(program, str(asking()), NAME, SHA256)]
    out, err = children[0].communicate(timeout=120)
    assert children[0].returncode == 0, out + err
    assert out.split()[0] == "ready"
    assert f"Failed to load cubin for {NAME}" in out
    assert out.split()[-1] == str(len(CONTENT))


def test_a_forked_child_is_given_it_too(asking, folder):
    program = """
child = os.fork()
if child == 0:
    os._exit(0 if len(module.get(name, sha256)) > 1000 else 3)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert run(program, asking) == ["0"]


def test_the_interpreter_ends_while_it_is_asked(asking, folder):
    program = """
for _ in range(4):
    module.ask_for_ever(name, sha256)
time.sleep(0.1)
print("ends")
"""
    for _ in range(3):
        assert run(program, asking) == ["ends"]


def test_the_callback_lives_as_long_as_the_library(asking, folder):
    program = """
import gc
entry = module.get
del module
fi_ffi.use_kernels(None)
gc.collect()
print(len(entry(name, sha256)))
print(len(fi_ffi.module(path).get(name, sha256)))
"""
    assert run(program, asking) == [str(len(CONTENT))] * 2
