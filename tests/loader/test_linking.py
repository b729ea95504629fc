"""Symbols that a library leaves to others, of libraries that are compiled here."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

import fi_ffi
from fi_ffi.errors import LoaderError
from fi_ffi.loader import machine, runtime, tvm_ffi
from fi_ffi.loader.elf import inspect_elf
from tools.record_symbols import symbols_of

from tests.helpers import compiler
from tests.loader.test_tvm_ffi import NEWEST, OLDEST

NEEDS = """
#include <tvm/ffi/c_api.h>
extern {weak} int needed(void) __asm__("{symbol}");
{before}
__attribute__((visibility("default"))) int __tvm_ffi_found(void *self, const TVMFFIAny *args,
                                                           int32_t count, TVMFFIAny *result) {{
  result->type_index = kTVMFFIInt;
  result->v_int64 = needed ? needed() : -1;
  return 0;
}}
"""
# Runs as the library is loaded.
MARKS = """
#include <stdio.h>
__attribute__((constructor)) static void mark(void) {{ fclose(fopen("{}", "w")); }}
"""
DEFINES = "int {symbol}(void) {{ return 7; }}"


@pytest.fixture
def compiled(tmp_path):
    """Compiles a source into a library of this name."""

    def make(name: str, text: str, *options: str) -> Path:
        source = (tmp_path / name).with_suffix(".c")
        source.write_text(text)
        return compiler.library(source, tmp_path / name, *options)

    return make


@pytest.fixture
def needing(compiled):
    """Compiles a library that needs a symbol, and is not loaded by tests twice."""

    def make(symbol: str, *options: str, name: str = "needing.so", weak=False, before="") -> Path:
        attribute = "__attribute__((weak))" if weak else ""
        text = NEEDS.format(symbol=symbol, weak=attribute, before=before)
        return compiled(name, text, *options)

    return make


def is_mapped(path: Path) -> bool:
    return str(path) in Path("/proc/self/maps").read_text(errors="replace")


@pytest.mark.parametrize("symbol", ["TVMFFINoSuch", "_ZN3tvm3ffi6NoSuchEv"])
def test_a_symbol_that_no_libtvm_ffi_has(symbol, needing, tmp_path):
    path = needing(symbol, before=MARKS.format(tmp_path / "mark"))
    oldest, *_, newest = tvm_ffi.releases_record()["releases"]
    for _ in range(2):  # the second time by what is remembered of the file
        with pytest.raises(LoaderError) as caught:
            fi_ffi.module(path)
        told = str(caught.value)
        assert told.startswith(f"{path} needs {symbol}, which the libtvm_ffi of this process lacks")
        assert runtime.ensure_tvm_ffi().path in told
        assert f"no apache-tvm-ffi from {oldest} to {newest} has {symbol}" in told
        assert "`pip install -U apache-tvm-ffi`" in told
        assert not is_mapped(path)
    assert not (tmp_path / "mark").exists()


def test_all_that_are_missing_are_named(needing):
    another = "int TVMFFINorThis(void); int another(void) { return TVMFFINorThis(); }"
    path = needing("TVMFFINoSuch", before=another)
    with pytest.raises(LoaderError, match="needs TVMFFINoSuch, TVMFFINorThis, which"):
        fi_ffi.module(path)


def test_a_weak_one_may_be_missing(needing):
    path = needing("TVMFFINoSuch", weak=True)
    assert inspect_elf(path).requires == ()
    assert fi_ffi.module(path).found() == -1


def test_one_that_another_library_defines(needing, compiled):
    """One that it needs: in its own folder, or in this process under its name."""
    symbol = "TVMFFIDefinedElsewhere"
    named = "-Wl,-soname,libelsewhere.so"
    other = compiled("libelsewhere.so", DEFINES.format(symbol=symbol), named)
    beside = needing(symbol, str(other), "-Wl,-rpath,$ORIGIN")
    assert inspect_elf(beside).requires == (symbol,)
    assert fi_ffi.module(beside).found() == 7
    # Its NEEDED entry has a name alone, which leads to the one that is here.
    without = needing(symbol, str(other), name="another.so")
    assert fi_ffi.module(without).found() == 7


def test_one_that_a_needed_library_lacks(needing, compiled, tmp_path):
    """Whether it has it the dynamic linker finds out: it knows where it lies."""
    symbol = "TVMFFINotThere"
    options = (f"-L{tmp_path}", "-l:libold.so", "-Wl,-rpath,$ORIGIN")
    old = compiled("libold.so", DEFINES.format(symbol=symbol), "-Wl,-soname,libold.so")
    path = needing(symbol, *options, before=MARKS.format(tmp_path / "mark"))
    compiled("libold.so", DEFINES.format(symbol="other"), "-Wl,-soname,libold.so")
    with pytest.raises(LoaderError, match=f"{path.name} needs {symbol}, which the libtvm_ffi"):
        fi_ffi.module(path)
    old.unlink()
    with pytest.raises(LoaderError, match="does not load: libold.so: cannot open shared object"):
        fi_ffi.module(path)
    assert not (tmp_path / "mark").exists()


LOAD = """
    import fi_ffi
    from fi_ffi.errors import LoaderError

    for path in PATHS.split(","):
        try:
            print(fi_ffi.module(path).entries())
        except LoaderError as error:
            print(error)
"""


def test_an_older_libtvm_ffi(child, install, needing):
    """What FlashInfer's wheels need that were compiled with 0.1.13: a class of exceptions."""
    allocator = needing("TVMFFIGetCustomAllocator", name="allocator.so")
    error = needing("_ZTIN3tvm3ffi5ErrorE", name="error.so")
    program = LOAD.replace("PATHS", repr(f"{allocator},{error}"))
    folder = install(f"apache-tvm-ffi=={OLDEST}")
    lines = child(program, folder).splitlines()
    for path, symbol, told in zip(
        (allocator, error), ("TVMFFIGetCustomAllocator", "_ZTIN3tvm3ffi5ErrorE"), lines, strict=True
    ):
        assert told.startswith(f"{path} needs {symbol}, which the libtvm_ffi of this process lacks")
        assert f"({folder / tvm_ffi.MEMBER}, installed {OLDEST})" in told
        assert "apache-tvm-ffi>=0.1.13 has it" in told
        assert "`pip install 'apache-tvm-ffi>=0.1.13,<0.2'`" in told
    assert child(program, install(f"apache-tvm-ffi=={NEWEST}")) == "('found',)\n('found',)"


def test_the_record_of_symbols_is_libtvm_ffis():
    """Of the installed one; tools/record_symbols.py reads those of all."""
    installed = importlib.metadata.distribution(tvm_ffi.PROJECT)
    assert installed.version in tvm_ffi.releases_record()["releases"]
    has = symbols_of(Path(str(installed.locate_file(tvm_ffi.MEMBER))))
    assert "TVMFFIGetVersion" in has and len(has) > 60
    symbols = tvm_ffi.releases_record()["symbols"].items()
    assert has == {name for name, of in symbols if SpecifierSet(of).contains(installed.version)}
    assert len([name for name, of in symbols if of]) > 10


def test_a_span_of_releases():
    every = ["0.1", "0.2", "0.3", "0.4", "0.5"]
    for of in ("0.1 0.2 0.3 0.4 0.5", "0.3", "0.1 0.2", "0.4 0.5", "0.1 0.2 0.5", "0.2 0.4"):
        span = tvm_ffi.span(of.split(), every)
        assert [one for one in every if SpecifierSet(span).contains(one)] == of.split()
    assert tvm_ffi.span(every, every) == "" and tvm_ffi.span(every[1:], every) == ">=0.2"


# Libraries that a compiler made with the headers of one release, beside the libtvm_ffi of another.

HERE = Path(__file__).parent
ASK = """
    {before}
    import fi_ffi
    from fi_ffi.errors import LoaderError

    try:
        module = fi_ffi.module({path!r})
        made = {call}
        print(made)
    except LoaderError as error:
        print(error)
"""
CALLS = {
    "own_module.cc": "[module.ask(module.make(), name) for name in ('seven', 'eight')], '[7, -1]'",
    "writes_json.cc": "module.text([1, None, 'two']), '[1,null,\"two\"]'",
}
BY_VALUE = "_ZN3tvm3ffi4json9StringifyERKNS0_3AnyENS0_8OptionalIivEE"
BY_REFERENCE = "_ZN3tvm3ffi4json9StringifyERKNS0_3AnyERKNS0_8OptionalIivEE"
WITHDRAWN = "0.1.13"


@pytest.fixture
def compiled_with(install, tmp_path):
    """Compiles a source of this folder with a release's headers."""

    def make(source: str, release: str) -> Path:
        folder = install(f"{tvm_ffi.PROJECT}=={release}")
        made = tmp_path / f"{release}-{source}.so"
        return compiler.library(HERE / source, made, include=folder / "tvm_ffi" / "include")

    return make


@pytest.mark.parametrize(
    ("source", "headers", "release", "lacks"),
    [
        ("own_module.cc", OLDEST, OLDEST, None),
        ("own_module.cc", OLDEST, NEWEST, None),
        ("own_module.cc", NEWEST, NEWEST, None),
        ("own_module.cc", NEWEST, OLDEST, None),
        ("writes_json.cc", OLDEST, OLDEST, None),
        ("writes_json.cc", OLDEST, NEWEST, (BY_VALUE, "<=0.1.12")),
        ("writes_json.cc", NEWEST, NEWEST, None),
        ("writes_json.cc", NEWEST, OLDEST, (BY_REFERENCE, ">=0.1.13")),
    ],
)
def test_headers_of_one_release_and_the_library_of_another(
    source, headers, release, lacks, compiled_with, child, install
):
    path = compiled_with(source, headers)
    program = ASK.format(before="", path=str(path), call=CALLS[source])
    told = child(program, install(f"{tvm_ffi.PROJECT}=={release}"))
    if lacks is None:
        got, expected = eval(told)
        assert str(got) == expected
    else:
        symbol, versions = lacks
        assert told.startswith(f"{path} needs {symbol}, which the libtvm_ffi of this process")
        assert f"installed {release}" in told
        assert f"{tvm_ffi.PROJECT}{versions} has it: `pip install '" in told
    assert headers in tvm_ffi.compiled_for(path, inspect_elf(path).requires)


@pytest.mark.parametrize(
    ("headers", "refused"),
    [
        (OLDEST, False),  # of 0.1.13 by its symbols, perhaps
        (WITHDRAWN, False),
        (NEWEST, True),
    ],
)
def test_a_symbol_that_means_something_else(headers, refused, compiled_with, child, install):
    """What a mangled name leaves out: 0.1.13 returns twice as much from `GetFunction`.

    Refused is what was certainly compiled for other releases. What might be of that one is loaded,
    and not called here.
    """
    path = compiled_with("own_module.cc", headers)
    library = install(f"{tvm_ffi.PROJECT}=={WITHDRAWN}") / tvm_ffi.MEMBER
    before = f"from fi_ffi.abi._cffi import ffi; ffi.dlopen({str(library)!r})"
    told = child(ASK.format(before=before, path=str(path), call="module.entries()"))
    assert (WITHDRAWN in tvm_ffi.compiled_for(path, inspect_elf(path).requires)) != refused
    if not refused:
        assert told == "('ask', 'make')"
        return
    assert told.startswith(f"{path} needs _ZN3tvm3ffi9ModuleObj11GetFunctionERKNS0_6StringEb as ")
    assert "apache-tvm-ffi>=0.1.15.post1 has it (ModuleObj::GetFunction returns 8 bytes)" in told
    assert f"{WITHDRAWN}, ModuleObj::GetFunction returns 16 bytes ({library}, already in" in told
    assert "`pip install 'apache-tvm-ffi>=0.1.15.post1,<0.2'`" in told


ASKS = """
#include <stdlib.h>
__attribute__((constructor)) static void ask(void) { abort(); }
__attribute__((visibility("default"))) int __tvm_ffi_xqa_wrapper_mla(void) { return -1; }
"""


def test_a_module_that_asks_its_gpu_as_it_is_loaded(child, compiled):
    """It ends the process, as here, where the GPU is not its own; also of a machine without one."""
    path = compiled("asks.so", ASKS)
    told = child(LOAD.replace("PATHS", repr(str(path))))
    assert told.startswith("the module asks its GPU when it is loaded, and would end the process")
    assert "sees none" in told or "has no device code" in told


# What the dynamic linker refuses.


def test_an_older_libstdcxx(needing, compiled, tmp_path):
    """Linked with a later one than this machine's."""
    versions = tmp_path / "versions"
    versions.write_text("GLIBCXX_3.4.999 { global: later; };")
    later = compiled(
        "libstdc++.so.6", DEFINES.format(symbol="later"), f"-Wl,--version-script={versions}",
        "-Wl,-soname,libstdc++.so.6",
    )  # fmt: skip
    path = needing("later", str(later))
    with pytest.raises(LoaderError) as caught:
        fi_ffi.module(path)
    told = str(caught.value)
    assert f"{path} does not load: " in told and "version `GLIBCXX_3.4.999' not found" in told
    library = next(line.split()[-1] for line in maps() if "/libstdc++.so" in line)
    assert Path(told.partition(" has GLIBCXX up to 3.4.")[0].rpartition(" ")[2]).samefile(library)
    assert "libstdcxx-ng" in told and "`fi-ffi build`" in told


def maps() -> list[str]:
    return Path("/proc/self/maps").read_text(errors="replace").splitlines()


def test_an_older_cuda_runtime(needing, compiled, tmp_path):
    versions = tmp_path / "versions"
    versions.write_text("libcudart.so.13 { global: cudaNoSuch; };")
    later = compiled(
        "libcudart.so.13", DEFINES.format(symbol="cudaNoSuch"), f"-Wl,--version-script={versions}",
        "-Wl,-soname,libcudart.so.13",
    )  # fmt: skip
    with pytest.raises(LoaderError, match="undefined symbol: cudaNoSuch, version") as caught:
        fi_ffi.module(needing("cudaNoSuch", str(later)))
    assert f"{machine.load_cudart()[1]} lacks it" in str(caught.value)
    assert "`pip install -U 'nvidia-cuda-runtime>=13,<14'`" in str(caught.value)


def test_an_older_driver(needing):
    with pytest.raises(LoaderError, match="undefined symbol: cuNoSuch.*NVIDIA driver's libcuda"):
        fi_ffi.module(needing("cuNoSuch"))


def test_any_other_symbol(needing):
    with pytest.raises(LoaderError, match="does not load: .*undefined symbol: no_such$"):
        fi_ffi.module(needing("no_such"))


VARIANTS = """
#include <tvm/ffi/c_api.h>
extern int variant(void) __asm__("_ZN10flashinfer7VariantILj32EEEiv");
extern int other(void) __asm__("{other}");
__attribute__((visibility("default"))) int __tvm_ffi_found(void *self, const TVMFFIAny *args,
                                                           int32_t count, TVMFFIAny *result) {{
  result->type_index = kTVMFFIInt;
  result->v_int64 = count == 0 ? 7 : count == 1 ? variant() : other();
  return 0;
}}
"""


def test_a_variant_that_flashinfer_leaves_out(compiled):
    """As in batch_prefill of 0.7: dispatched to, chosen by no planner, and not compiled."""
    text = VARIANTS.format(other="_ZN10flashinfer7VariantILj48EEEiv")
    assert fi_ffi.module(compiled("variants.so", text)).found() == 7


def test_what_else_it_lacks_is_refused(compiled):
    text = VARIANTS.format(other="nobody_has_this")
    with pytest.raises(LoaderError, match="does not load: undefined symbol: nobody_has_this"):
        fi_ffi.module(compiled("variants_and_more.so", text)).found()
