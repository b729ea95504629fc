"""Entries: registering, probing, calling."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest

from fi_ffi.abi import library
from fi_ffi.abi.function import Entry, global_function, probe, register
from fi_ffi.abi.objects import lent_count
from fi_ffi.abi.signature import Signature
from fi_ffi.errors import AbiError, KernelError, LoaderError


def test_a_registered_function_is_global() -> None:
    signature = Signature("add", ("int", "int"), "int")
    register("fi_ffi.tests.add", signature, lambda a, b: a + b)
    found = global_function("fi_ffi.tests.add")
    assert found(2, 3) == 5
    assert probe(found) == signature


def test_registering_again_replaces() -> None:
    signature = Signature("which", (), "int")
    first = register("fi_ffi.tests.which", signature, lambda: 1)
    register("fi_ffi.tests.which", signature, lambda: 2)
    assert global_function("fi_ffi.tests.which")() == 2
    assert first() == 1  # and who has the first keeps it


def test_a_registered_function_stays_while_it_can_be_called() -> None:
    class Held:
        def __call__(self) -> int:
            return 5

    held, signature = Held(), Signature("stays", (), "int")
    gone = weakref.ref(held)
    register("fi_ffi.tests.stays", signature, held)
    del held
    gc.collect()
    lent_count()
    assert global_function("fi_ffi.tests.stays")() == 5
    register("fi_ffi.tests.stays", signature, lambda: 6)
    lent_count()
    gc.collect()
    assert gone() is None
    assert global_function("fi_ffi.tests.stays")() == 6


@pytest.mark.parametrize("count", [0, 1, 2, 4, 100])
def test_a_wrong_number_of_arguments(count: int, callback: Callable[..., Entry]) -> None:
    entry = callback(lambda *args: None, 3)
    with pytest.raises(KernelError, match=f"Expected 3 but got {count} arguments"):
        entry(*range(count))


@pytest.mark.parametrize("parameters", [0, 1, 3, 64, 500])
def test_probing_runs_nothing(parameters: int, callback: Callable[..., Entry]) -> None:
    ran: list[object] = []
    entry = callback(lambda *args: ran.append(args), parameters)
    signature = probe(entry)
    assert signature == Signature("callback", ("Any",) * parameters, "Any")
    assert ran == []


def test_probing_a_compiled_function_without_parameters(testing_library: object) -> None:
    for name in ("testing.schema_no_args", "testing.schema_no_args_no_return"):
        assert probe(global_function(name)).params == ()


COMPILED = {
    "testing.add_one": Signature("testing.add_one", ("int",), "int"),
    "testing.test_raise_error": Signature("testing.test_raise_error", ("str", "str")),
    "testing.schema_id_float": Signature("testing.schema_id_float", ("float",), "float"),
    "testing.schema_id_dltensor": Signature(
        "testing.schema_id_dltensor", ("DLTensor*",), "DLTensor*"
    ),
    "testing.schema_id_tensor": Signature(
        "testing.schema_id_tensor", ("ffi.Tensor",), "ffi.Tensor"
    ),
    "testing.schema_id_opt_int": Signature(
        "testing.schema_id_opt_int", ("Optional<int>",), "Optional<int>"
    ),
    "testing.schema_id_map_str_int": Signature(
        "testing.schema_id_map_str_int", ("Map<str, int>",), "Map<str, int>"
    ),
}


@pytest.mark.parametrize("name", COMPILED)
def test_probing_compiled_functions(name: str, testing_library: object) -> None:
    assert probe(global_function(name)) == COMPILED[name]


def test_every_typed_function_of_the_library_parses(testing_library: object) -> None:
    names = Entry.of(global_function("ffi.FunctionListGlobalNamesFunctor")(), "names")
    count = names(-1)
    told = 0
    for index in range(count):
        name = names(index)
        # Tests register functions of their own, and ffi.* has packed ones that would run.
        if name.startswith("testing.schema_") and name != "testing.schema_packed":
            signature = probe(global_function(name))
            told += len(signature.params)
    assert told > 30


@pytest.mark.parametrize("name", ["testing.nop", "testing.schema_packed", "testing.echo"])
def test_a_packed_function_has_no_signature(name: str, testing_library: object) -> None:
    with pytest.raises(AbiError, match=f"{name} takes any arguments"):
        probe(global_function(name))


def test_a_function_that_refuses_otherwise_has_no_signature(
    callback: Callable[..., Entry], testing_library: object
) -> None:
    with pytest.raises(AbiError, match="tells no signature"):
        probe(global_function("ffi.MakeObjectFromPackedArgs"))  # packed, and None is no type


def test_exported_symbols(testing_library: Path) -> None:
    module = library.open_module(str(testing_library))
    symbol = "__tvm_ffi_testing_dll_test_add_with_docstring"
    address = library.find_symbol(module, symbol)
    entry = Entry("add", address)
    assert probe(entry).params == ("int", "int")
    assert entry(2, 3) == 5
    assert library.find_symbol(module, "__tvm_ffi_no_such") is None


RACE = """
import threading
from fi_ffi.abi.function import global_function, register
from fi_ffi.abi.signature import Signature
from fi_ffi.loader import runtime

runtime.ensure_tvm_ffi()
begin, failures = threading.Barrier(6), []

def write(number):
    for i in range(6000):
        register(f"fi_ffi.tests.{number}.{i}", Signature("f", ()), lambda: None)

def read():
    for i in range(6000):
        global_function("ffi.ArraySize")

def run(function, *args):
    begin.wait()
    try:
        function(*args)
    except BaseException as error:
        failures.append(error)

work = [(write, 0), (write, 1), (write, 2), (read,), (read,), (read,)]
threads = [threading.Thread(target=run, args=each) for each in work]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert not failures, failures
for number in (0, 1, 2):
    for i in range(6000):
        global_function(f"fi_ffi.tests.{number}.{i}")
"""


def test_the_global_table_is_locked() -> None:
    """libtvm_ffi does not lock it; unlocked, this loses entries or crashes."""
    done = subprocess.run([sys.executable, "-c", RACE], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_files_that_are_no_libraries(tmp_path: Path) -> None:
    path = tmp_path / "no.so"
    with pytest.raises(LoaderError, match="no.so does not load: .*No such file"):
        library.open_module(str(path))
    path.write_bytes(b"\x7fELF and no more")
    with pytest.raises(LoaderError, match=r"no.so does not load: .*(file too short|invalid)"):
        library.open_module(str(path))
    with pytest.raises(LoaderError, match="does not load as libtvm_ffi"):
        library.attach(str(path))
