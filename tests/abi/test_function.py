"""Entries: registering, probing, calling."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest

from fi_ffi.abi import library
from fi_ffi.abi.function import Entry, global_function, probe, register
from fi_ffi.abi.objects import lent_count
from fi_ffi.abi.signature import Signature
from fi_ffi.errors import AbiError, KernelError, LoaderError

from tests.helpers.children import done


def test_a_registered_function_stays_while_it_can_be_called() -> None:
    """Another takes its place in the table; who has the first keeps it."""

    class Held:
        def __call__(self) -> int:
            return 5

    held, signature = Held(), Signature("stays", (), "int")
    gone = weakref.ref(held)
    first = register("fi_ffi.tests.stays", signature, held)
    del held
    gc.collect()
    lent_count()
    found = global_function("fi_ffi.tests.stays")
    assert (found(), probe(found)) == (5, signature)
    register("fi_ffi.tests.stays", signature, lambda: 6)
    lent_count()
    assert (first(), global_function("fi_ffi.tests.stays")()) == (5, 6)
    del first, found
    gc.collect()
    lent_count()
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("count", [0, 2, 4, 100])
def test_a_wrong_number_of_arguments(count: int, callback: Callable[..., Entry]) -> None:
    entry = callback(lambda *args: None, 3)
    with pytest.raises(KernelError, match=f"Expected 3 but got {count} arguments"):
        entry(*range(count))


@pytest.mark.parametrize("parameters", [0, 1, 64, 500])
def test_probing_runs_nothing(parameters: int, callback: Callable[..., Entry]) -> None:
    ran: list[object] = []
    signature = probe(callback(lambda *args: ran.append(args), parameters))
    assert signature == Signature("callback", ("Any",) * parameters, "Any")
    assert ran == []


COMPILED = {
    "add_one": (("int",), "int"),
    "test_raise_error": (("str", "str"), "void"),
    "schema_no_args": ((), "int"),
    "schema_no_args_no_return": ((), "void"),
    "schema_id_tensor": (("ffi.Tensor",), "ffi.Tensor"),
    "schema_id_opt_int": (("Optional<int>",), "Optional<int>"),
    "schema_id_map_str_int": (("Map<str, int>",), "Map<str, int>"),
}


@pytest.mark.parametrize("name", COMPILED)
def test_probing_compiled_functions(name: str, testing_library: object) -> None:
    found = probe(global_function(f"testing.{name}"))
    assert found == Signature(f"testing.{name}", *COMPILED[name])


def test_every_typed_function_of_the_library_parses(testing_library: object) -> None:
    names = Entry.of(global_function("ffi.FunctionListGlobalNamesFunctor")(), "names")
    told = 0
    for name in map(names, range(names(-1))):
        # Tests register functions of their own, and ffi.* has packed ones that would run.
        if name.startswith("testing.schema_") and name != "testing.schema_packed":
            told += len(probe(global_function(name)).params)
    assert told > 30


def test_what_has_no_signature(testing_library: object) -> None:
    for name in ("testing.nop", "testing.schema_packed", "testing.echo"):
        with pytest.raises(AbiError, match=f"{name} takes any arguments"):
            probe(global_function(name))
    with pytest.raises(AbiError, match="contains no signature"):
        probe(global_function("ffi.MakeObjectFromPackedArgs"))  # packed, and None is no type


def test_exported_symbols(testing_library: Path) -> None:
    module = library.open_module(str(testing_library))
    symbol = "__tvm_ffi_testing_dll_test_add_with_docstring"
    entry = Entry("add", library.find_symbol(module, symbol))
    assert probe(entry).params == ("int", "int")
    assert entry(2, 3) == 5
    assert library.find_symbol(module, "__tvm_ffi_no_such") is None


RACE = """
import threading
from fi_ffi.abi.function import global_function, register
from fi_ffi.abi.signature import Signature
from fi_ffi.loader import runtime
from tests.ops.test_threads import at_once

runtime.ensure_tvm_ffi()

def work(number):
    for i in range(6000):
        if number < 3:
            register(f"fi_ffi.tests.{number}.{i}", Signature("f", ()), lambda: None)
        else:
            global_function("ffi.ArraySize")

at_once(work, 6)
for number in (0, 1, 2):
    for i in range(6000):
        global_function(f"fi_ffi.tests.{number}.{i}")
"""


def test_the_global_table_is_locked() -> None:
    """libtvm_ffi does not lock it; unlocked, this loses entries or crashes."""
    assert done(RACE) == (0, "", "")


def test_files_that_are_no_libraries(tmp_path: Path) -> None:
    path = tmp_path / "no.so"
    with pytest.raises(LoaderError, match="no.so does not load: .*No such file"):
        library.open_module(str(path))
    path.write_bytes(b"\x7fELF and no more")
    with pytest.raises(LoaderError, match=r"no.so does not load: .*(file too short|invalid)"):
        library.open_module(str(path))
    with pytest.raises(LoaderError, match="does not load as libtvm_ffi"):
        library.attach(str(path))
