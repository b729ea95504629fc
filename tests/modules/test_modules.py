"""Finding a library and its functions, and what is asked of a function before it is called."""

from __future__ import annotations

import contextlib
import inspect
import os
import pydoc
import random
import re
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest

import fi_ffi
from fi_ffi.abi.signature import Signature
from fi_ffi.loader.elf import inspect_elf
from fi_ffi.modules.files import file_signatures, load_file
from fi_ffi.modules.module import AtPath

from tests.helpers.children import ROOT, done
from tests.helpers.stress_strength import scaled
from tests.stress.swapping import library_bytes


@pytest.fixture
def fresh(every, tmp_path):
    """The library as a file that nobody has seen before: nothing of it is remembered."""
    path = tmp_path / "fresh.so"
    path.write_bytes(every.path.read_bytes() + os.urandom(16))
    return path


@pytest.fixture
def kernels(built_wheel):
    fi_ffi.use_kernels(built_wheel)
    yield built_wheel
    from fi_ffi.loader import runtime

    runtime.use_source(None)


def test_by_path(every, monkeypatch):
    monkeypatch.chdir(every.path.parent)
    for path in (every.path, str(every.path), "./every_kind.so", "every_kind.so"):
        found = fi_ffi.module(path)
        assert found.path.samefile(every.path)
        assert (found.name, found.version) == ("every_kind", None)
        assert found.same_int(3) == 3


def test_entries(every):
    assert every.entries() == inspect_elf(every.path).functions
    assert {"same_int", "counter", "packed_count"} <= {*every.entries()}
    assert {*every.entries()} <= {*dir(every)}
    assert every.entry("same_int") is every.same_int
    assert every.same_int.name == "every_kind.same_int"


def test_signatures_are_the_binary_s(every, tmp_path):
    """Also of one without symbols: then the words of the refusal tell that functions are typed."""
    asked = {name: found for name, found in every.signatures().items() if found}
    assert {*every.entries()} - {*asked} == {"packed_count"}
    told = file_signatures(every.path)
    assert asked == {name: found for name, found in told.items() if isinstance(found, Signature)}
    path = tmp_path / "stripped.so"
    if subprocess.run(["strip", "-o", str(path), str(every.path)], check=False).returncode == 0:
        assert fi_ffi.module(path).same_int.signature == asked["same_int"]


def test_what_is_printed(every, by_hand, testing_library):
    assert repr(every.many).startswith("every_kind.many(0: int, 1: float, 2: bool, 3: Optional<DL")
    assert repr(every.same_int) == "every_kind.same_int(0: int) -> int"
    assert repr(by_hand.scale) == "by_hand.scale(*args), unchecked"
    assert repr(every) == f"<module every_kind, {len(every.entries())} functions, of {every.path}>"
    text = str(every)
    assert text.startswith(repr(every))
    assert all(repr(every.entry(name)) in text for name in every.entries())
    assert "every_kind.same_int(0: int) -> int" in pydoc.plain(pydoc.render_doc(every.same_int))
    theirs = fi_ffi.module(testing_library)
    documented = theirs.testing_dll_test_add_with_docstring
    assert "Add two integers and return the sum." in pydoc.plain(pydoc.render_doc(documented))
    assert documented(2, 3) == 5
    with pytest.raises(fi_ffi.KernelNotFoundError):  # a companion is no entry
        theirs.entry("_metadata_testing_dll_schema_id_int")
    parameters = inspect.signature(every.many).parameters.values()
    assert [p.annotation for p in parameters][:3] == ["int", "float", "bool"]
    assert [*inspect.signature(every.packed_count).parameters] == ["args", "stream", "device"]


@pytest.mark.parametrize("name", ["same_imt", "Same_int", "same-int", "", "no such"])
def test_an_unknown_entry(every, name):
    with pytest.raises(fi_ffi.KernelNotFoundError, match="it exports: add_all, adder") as caught:
        every.entry(name)
    assert isinstance(caught.value, LookupError)
    assert ("the nearest: same_int" in str(caught.value)) == (name[1:].startswith("ame"))
    with pytest.raises(AttributeError, match="it exports: add_all"):
        getattr(every, name)
    assert not hasattr(every, "__array_interface__")


@pytest.mark.parametrize(
    "name", [3, None, b"norm", object(), ""], ids=lambda value: type(value).__name__
)
def test_what_is_no_name(every, name):
    kind = fi_ffi.ArgumentError if name == "" else fi_ffi.ArgumentTypeError
    with pytest.raises(kind):
        fi_ffi.module(name)
    if name != "":
        with pytest.raises(kind):
            every.entry(name)


def test_no_file(tmp_path):
    for missing in (tmp_path / "no.so", tmp_path / "none" / "no.so", "./no.so", "no.so"):
        with pytest.raises(fi_ffi.KernelNotFoundError, match=r"no\.so"):
            fi_ffi.module(missing)
    with pytest.raises(fi_ffi.KernelNotFoundError, match="is no file"):
        fi_ffi.module(tmp_path)


def test_files_that_are_no_libraries(tmp_path, every):
    text = tmp_path / "text.so"
    text.write_text("no library at all")
    cut = tmp_path / "cut.so"
    cut.write_bytes(every.path.read_bytes()[:5000])
    for path in (text, cut):
        with pytest.raises(fi_ffi.LoaderError, match=path.name):
            fi_ffi.module(path)


def test_a_library_of_no_functions():
    from fi_ffi.loader.machine import load_cudart

    found = fi_ffi.module(Path(load_cudart()[1]))
    assert found.entries() == ()
    with pytest.raises(fi_ffi.KernelNotFoundError, match="it exports: none"):
        found.entry("cudaMalloc")


def test_another_file_at_the_same_place(every, by_hand, tmp_path):
    path = tmp_path / "replaced.so"
    path.write_bytes(every.path.read_bytes())
    first = fi_ffi.module(path)
    path.unlink()
    path.write_bytes(by_hand.path.read_bytes())
    second = fi_ffi.module(path)
    assert {*second.entries()} == {"runs", "scale"}
    assert second.runs() == 0
    assert first.same_int(5) == 5


def test_functions_of_no_known_kind_are_not_run(by_hand):
    """Asking them would crash this process."""
    assert by_hand.entries() == ("runs", "scale")
    assert by_hand.signatures() == {"runs": None, "scale": None}
    runs = by_hand.runs()
    x = np.arange(4, dtype=np.float32)
    by_hand.scale(x, 2.5)
    assert x.tolist() == [0, 2.5, 5, 7.5]
    desc = fi_ffi.as_desc(x)
    by_hand.entry("scale", checked=False)(desc, 2.0)
    assert x.tolist() == [0, 5, 10, 15]
    assert by_hand.runs() == runs + 2


def test_unchecked_calls_still_know_tensors_and_values(by_hand):
    with pytest.raises(fi_ffi.ArgumentTypeError) as caught:
        by_hand.scale(np.zeros(3, np.float32), {1, 2})
    assert (caught.value.op, caught.value.argument) == ("by_hand.scale", "1")
    with pytest.raises(fi_ffi.ArgumentError) as missing:
        by_hand.scale(fi_ffi.TensorDesc(4096, (3,), "float32"), 1.0)
    assert missing.value.argument == "stream"


def test_a_packed_function_among_typed_ones_is_not_run(fresh):
    found = fi_ffi.module(fresh)
    assert found.signatures()["packed_count"] is None
    str(found)
    assert found.runs() == 0
    assert found.packed_count(1, None, "three") == 3
    assert found.runs() == 1


def test_a_packed_function_is_run_for_its_signature_if_that_is_wanted_once(fresh):
    found = fi_ffi.module(fresh)
    for _ in range(3):
        with pytest.raises(fi_ffi.AbiError, match="packed_count takes any arguments"):
            found.entry("packed_count", checked=True)
        assert found.runs() == 1
    assert fi_ffi.module(fresh).packed_count() == 0
    assert found.runs() == 2


def test_probe_makes_an_unchecked_entry_checked(every):
    entry = every.entry("same_int", checked=False)
    assert entry.signature is None
    with pytest.raises(fi_ffi.KernelError, match="Mismatched type on argument #0"):
        entry("1")
    assert entry.probe() == every.same_int.signature
    with pytest.raises(fi_ffi.ArgumentTypeError):
        entry("1")


REMEMBERS = """
import sys
import fi_ffi
from fi_ffi.loader import runtime

asked = []
probe = runtime.probe
runtime.probe = lambda entry: asked.append(entry) or probe(entry)
every = fi_ffi.module(sys.argv[1])
assert every.same_int(3) == 3
assert every.same_int.signature.params == ("int",)
print(len(asked))
"""


def test_signatures_are_remembered_by_the_file_s_hash(fresh, tmp_path):
    own = {"FI_FFI_CACHE_DIR": str(tmp_path / "cache")}
    for more, expected in [(own, "1"), (own, "0"), ({**own, "FI_FFI_PARANOID": "1"}, "1")]:
        assert done(REMEMBERS, str(fresh), **more) == (0, f"{expected}\n", "")


def test_flashinfer_s_modules(kernels):
    norm = fi_ffi.module("norm")
    assert norm.rmsnorm.signature == fi_ffi.rmsnorm.row.signature
    assert norm.layernorm.signature.params.count("ffi.Tensor") == 4
    assert "rmsnorm" in norm.entries()
    page = fi_ffi.module("page")
    assert page.append_paged_kv_cache.signature == fi_ffi.append_paged_kv_cache.row.signature
    assert norm.version == page.version
    assert norm.version.startswith("0.6.13")


def test_flashinfer_s_own_refusals(kernels):
    """Host tensors reach the kernel, which says itself that it wants them on a GPU."""
    x, w = np.ones((4, 64), np.float16), np.ones(64, np.float16)
    out = np.full_like(x, np.nan)
    with pytest.raises(fi_ffi.KernelError, match="must be a CUDA tensor") as caught:
        fi_ffi.module("norm").rmsnorm(out, x, w, 1e-6, False)
    assert caught.value.op == "norm.rmsnorm"
    assert np.isnan(out).all()
    with pytest.raises(fi_ffi.ArgumentTypeError, match="`3: float`"):
        fi_ffi.module("norm").rmsnorm(out, x, w, "1e-6", False)
    with pytest.raises(fi_ffi.ArgumentTypeError, match=r"got 4 of them, expected 5"):
        fi_ffi.module("norm").rmsnorm(out, x, w, 1e-6)
    with pytest.raises(fi_ffi.KernelError, match="CUDA"):
        fi_ffi.module("norm").layernorm(out, x, w.astype("f4"), w.astype("f4"), 1e-6)


def test_an_unknown_module(kernels):
    with pytest.raises(fi_ffi.KernelNotFoundError) as caught:
        fi_ffi.module("nrom")
    assert "norm" in str(caught.value)
    with pytest.raises(fi_ffi.KernelNotFoundError, match=r"fi-ffi build .* sampling"):
        fi_ffi.module("sampling")
    with pytest.raises(fi_ffi.KernelNotFoundError, match="the nearest: rmsnorm"):
        fi_ffi.module("norm").entry("rmsnrom")


def test_a_module_stays_after_the_kernels_are_others(kernels, built_wheel_sm87):
    norm = fi_ffi.module("norm")
    fi_ffi.use_kernels(built_wheel_sm87)
    assert norm.rmsnorm.signature is not None
    with pytest.raises(fi_ffi.KernelNotFoundError):
        fi_ffi.module("norm")
    assert "append_paged_kv_cache" in fi_ffi.module("page").entries()


# What tells typed functions from packed ones is read out of the very file that was loaded.

STATIC = b"_ZZ16__tvm_ffi_abcdefk\0"


def test_it_is_of_the_file_that_was_loaded(tmp_path: Path, tvm_ffi_loaded: object) -> None:
    path = tmp_path / "a.so"
    path.write_bytes(library_bytes(b"one") + STATIC)
    found = AtPath(load_file(path))
    new = tmp_path / "new.so"
    new.write_bytes(library_bytes(b"two") + b"Mismatched number of arguments when calling")
    os.replace(new, path)
    assert found._evidence == (False, {"abcdef"})


def test_an_interruption_while_it_is_read(tmp_path: Path, tvm_ffi_loaded: object) -> None:
    path = tmp_path / "many.so"
    path.write_bytes(library_bytes(os.urandom(8)) + STATIC * 300_000)
    found = AtPath(load_file(path))

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    raised = []
    try:
        for _ in range(scaled(200, 20)):
            signal.setitimer(signal.ITIMER_REAL, random.uniform(0.005, 0.03))
            try:
                AtPath._evidence.func(found)
            except BaseException as error:
                raised.append(type(error))
            finally:
                with contextlib.suppress(KeyboardInterrupt):
                    signal.setitimer(signal.ITIMER_REAL, 0)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert {*raised} == {KeyboardInterrupt}


def test_every_type_in_the_page_s_table_is_taken():
    from fi_ffi.modules.packing import packer_of

    text = (ROOT / "docs" / "modules.md").read_text()
    table = text.partition("| type | takes | gives |")[2].partition("\n\n")[0]
    spelled = re.findall(r"`([^`]+)`", "\n".join(r.split(" | ")[0] for r in table.splitlines()))
    assert len(spelled) > 20
    for text in spelled:
        text = text.replace("<T>", "<int>").replace("<K, V>", "<str, int>").replace("...", "int")
        assert callable(packer_of(text))
