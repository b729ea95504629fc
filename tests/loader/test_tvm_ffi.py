"""libtvm_ffi: which copy is used, and that there is only one."""

from __future__ import annotations

import shutil
import threading
import time
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

from fi_ffi.loader import runtime, tvm_ffi

from tests.ops.test_threads import at_once

OLDEST = next(s.version for s in SpecifierSet(tvm_ffi.ACCEPTED) if s.operator == ">=")
NEWEST = "0.1.15.post2"  # that was tried
TOO_OLD = "0.1.7"

FIND = """
    import sys
    from fi_ffi.errors import LoaderError
    from fi_ffi.loader import runtime, tvm_ffi

    assert tvm_ffi.in_process() is None  # importing loads nothing
    try:
        found = tvm_ffi.in_process() or tvm_ffi.installed()
        print(found.origin, found.path, sep="\\n")
    except LoaderError as error:
        print(error)
    assert "tvm_ffi" not in sys.modules
"""
LOAD = """
    from fi_ffi.abi import library
    from fi_ffi.abi._cffi import ffi
    from fi_ffi.errors import LoaderError
    from fi_ffi.loader import runtime
    {before}
    for _ in range(2):
        try:
            print(runtime.ensure_tvm_ffi().origin)
        except LoaderError as error:
            print(error)
"""


def test_what_is_loaded_is_used(tvm_ffi_loaded):
    found = tvm_ffi.in_process() or tvm_ffi.installed()
    assert (found.path, found.origin) == (tvm_ffi_loaded, "already in this process")
    assert runtime.ensure_tvm_ffi().path == tvm_ffi_loaded
    assert tvm_ffi.tvm_ffi_version() > (0, 1, 0)


def test_threads_load_it_once(monkeypatch):
    """Those that come while one loads it wait, and have its copy."""
    loaded = []

    class Slow:
        def load(self, attach):
            loaded.append(self)
            time.sleep(0.2)
            return (0, 1, 2)

    monkeypatch.setattr(tvm_ffi, "_loaded", None)
    monkeypatch.setattr(tvm_ffi, "_version", None)
    monkeypatch.setattr(tvm_ffi, "in_process", lambda: None)
    monkeypatch.setattr(tvm_ffi, "installed", Slow)
    found = [None] * 4

    def ask(number):
        found[number] = tvm_ffi.ensure_tvm_ffi()

    at_once(ask, len(found))
    assert len(loaded) == 1 and {*found} == {*loaded}
    assert tvm_ffi.tvm_ffi_version() == (0, 1, 2)


def test_what_is_loaded_waits_for_no_other_library(tvm_ffi_loaded):
    """Another thread may be opening one, for as long as it takes."""
    with tvm_ffi.linking:
        asked = threading.Thread(target=tvm_ffi.ensure_tvm_ffi, daemon=True)
        asked.start()
        asked.join(10)
        assert not asked.is_alive()


def test_an_installed_copy(child, install, tmp_path):
    """Of the accepted range, and with its library."""
    folder = install(f"apache-tvm-ffi=={OLDEST}")
    told = child(FIND, folder).splitlines()
    assert told == [f"installed {OLDEST}", str(folder / tvm_ffi.MEMBER)]
    said = child(FIND, install(f"apache-tvm-ffi=={TOO_OLD}"))
    assert f"apache-tvm-ffi {TOO_OLD} is installed" in said
    assert f"`pip install 'apache-tvm-ffi{tvm_ffi.ACCEPTED}'`" in said
    broken = Path(shutil.copytree(folder, tmp_path / "broken"))
    (broken / tvm_ffi.MEMBER).unlink()
    assert "pip install --force-reinstall 'apache-tvm-ffi" in child(FIND, broken)


BARE = """
    import sys

    from fi_ffi.loader import distributions

    def audit(event, arguments):
        assert event not in ("socket.connect", "subprocess.Popen", "os.exec"), event

    sys.addaudithook(audit)
    distributions.installed = lambda name: []
"""


def test_nothing_is_installed(child):
    """Nothing is fetched then, and no installer is run."""
    assert child(BARE + FIND) == (
        "apache-tvm-ffi is not installed, which has libtvm_ffi: "
        f"`pip install 'apache-tvm-ffi{tvm_ffi.ACCEPTED}'`"
    )


def test_the_accepted_range_is_the_dependency():
    text = (Path(tvm_ffi.__file__).parents[2] / "pyproject.toml").read_text()
    assert f'"{tvm_ffi.PROJECT}{tvm_ffi.ACCEPTED}",' in text
    # FlashInfer excludes these, and libraries before them have a shorter TVMFFIErrorCell.
    for version in ("0.1.7", "0.1.8", "0.1.8.post0"):
        assert not SpecifierSet(tvm_ffi.ACCEPTED).contains(version)


@pytest.mark.parametrize("order", [("tvm_ffi", "ours"), ("ours", "tvm_ffi")])
def test_the_tvm_ffi_packages_own_copy_is_shared(order, child, install):
    """Whichever is imported first, there is one library, and it serves both."""
    folder = install(f"apache-tvm-ffi=={NEWEST}")
    first = {"tvm_ffi": "import tvm_ffi", "ours": "runtime.ensure_tvm_ffi()"}
    code = f"""
        from fi_ffi.loader import runtime
        from fi_ffi.loader.tvm_ffi import in_process
        {"; ".join(first[name] for name in order)}
        from fi_ffi.abi.function import global_function, register
        from fi_ffi.abi.signature import Signature
        register("of.fi_ffi", Signature("f", ("int",), "int"), lambda x: x + 1)
        assert tvm_ffi.get_global_func("of.fi_ffi")(2) == 3
        tvm_ffi.register_global_func("of.tvm_ffi", lambda x: x + 2)
        assert global_function("of.tvm_ffi")(2) == 4
        print(in_process().path)
    """
    assert child(code, folder, install("typing_extensions")) == str(folder / tvm_ffi.MEMBER)


def test_a_copy_in_the_process_that_is_too_old(child, install):
    """Its errors are laid out otherwise, and reading one would crash."""
    path = install(f"apache-tvm-ffi=={TOO_OLD}") / tvm_ffi.MEMBER
    told = child(LOAD.format(before=f"old = ffi.dlopen({str(path)!r})")).splitlines()
    assert len(told) == 2
    for said in told:
        assert str(path) in said and f"libtvm_ffi {TOO_OLD}" in said


def test_two_copies_are_refused(child, tvm_ffi_loaded, tmp_path):
    copies = [tmp_path / name / "libtvm_ffi.so" for name in ("one", "the other")]
    for copy in copies:
        copy.parent.mkdir()
        shutil.copy(tvm_ffi_loaded, copy)
    # Mapped, not loaded: two that are loaded may abort before anything can be said.
    mapped = (
        f"import mmap; files = [open(path, 'rb') for path in {list(map(str, copies))!r}]; "
        "maps = [mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) for file in files]"
    )
    said = child(LOAD.format(before=mapped))
    assert "two copies" in said
    assert all(str(copy) in said for copy in copies)


def test_a_copy_whose_file_was_replaced(child, tvm_ffi_loaded, tmp_path):
    """As an upgrade in place does; the new file would be a second copy."""
    copy = tmp_path / "here" / "libtvm_ffi.so"
    copy.parent.mkdir()
    shutil.copy(tvm_ffi_loaded, copy)
    replaced = (
        f"import os, shutil; first = ffi.dlopen({str(copy)!r}); "
        f"shutil.copy({str(copy)!r}, {str(copy)!r} + '.new'); "
        f"os.replace({str(copy)!r} + '.new', {str(copy)!r})"
    )
    code = f"""{LOAD.format(before=replaced)}
    text = open("/proc/self/maps").read().splitlines()
    print(len({{line.split()[4] for line in text if "libtvm_ffi.so" in line}}))
    same = [ffi.cast("intptr_t", lib.TVMFFIGetVersion) for lib in (first, library.lib)]
    assert same[0] == same[1]
    """
    assert child(code) == "already in this process\n" * 2 + "1"


SERVE = """
    import numpy as np
    from packaging.specifiers import SpecifierSet

    import fi_ffi
    from fi_ffi.errors import KernelError
    from fi_ffi.loader import runtime
    from fi_ffi.ops.table import ROWS

    x = np.random.default_rng().standard_normal((4, 256)).astype(np.float16)
    out, weight = np.zeros_like(x), np.ones(256, np.float16)
    fi_ffi.rmsnorm(out, x, weight)
    wide = x.astype(np.float64)
    expected = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-6)
    assert np.abs(out - expected).max() < 5e-3

    fi_ffi.use_kernels({wheel!r})
    rows = [row for row in ROWS if row.module == "norm" and "0.6.13" in SpecifierSet(row.releases)]
    assert len(rows) > 5
    entries = {{row.name: runtime.kernel_entry("norm", row.signature, "") for row in rows}}
    tensors = [fi_ffi.as_desc(a) for a in (out, x, weight)]
    try:
        entries["rmsnorm"](*tensors, 1e-6, False)
    except KernelError as error:
        assert "must be a CUDA tensor" in error.message, error
        assert error.__cause__ is None
    else:
        raise AssertionError("a CUDA kernel took host memory")
    print(runtime.ensure_tvm_ffi().origin)
"""


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
def test_both_ends_of_the_accepted_range_serve_kernels(version, child, install, built_wheel):
    folder = install(f"apache-tvm-ffi=={version}")
    assert child(SERVE.format(wheel=str(built_wheel)), folder) == f"installed {version}"


def test_a_file_that_is_no_library(child, tmp_path):
    """An installed library that does not load is told by its path."""
    info = tmp_path / "broken" / f"apache_tvm_ffi-{OLDEST}.dist-info"
    info.mkdir(parents=True)
    metadata = f"Metadata-Version: 2.1\nName: apache-tvm-ffi\nVersion: {OLDEST}\n"
    (info / "METADATA").write_text(metadata)
    library = tmp_path / "broken" / tvm_ffi.MEMBER
    library.parent.mkdir(parents=True)
    library.write_text("not a library")
    said = child(LOAD.format(before=""), tmp_path / "broken")
    assert str(library) in said
    assert "does not load as libtvm_ffi" in said


REFUSED = """
    from fi_ffi.abi import library
    from fi_ffi.errors import LoaderError
    from fi_ffi.loader import runtime, tvm_ffi
    import os

    oldest, library._OLDEST = library._OLDEST, (0, 1, 10**6)
    try:
        runtime.ensure_tvm_ffi()
    except LoaderError as error:
        print("works with" in str(error))
    library._OLDEST = oldest
    path = (tvm_ffi.in_process() or tvm_ffi.installed()).path
    print(os.path.samefile(f"/proc/self/fd/{os.dup(0) - 1}", path))
"""


def test_one_that_is_refused_is_taken_for_no_other(child):
    """The linker knows it by its descriptor's name: that is not given to another file."""
    assert child(REFUSED).split() == ["True", "True"]
