"""Everything in this folder runs against the real libtvm_ffi."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from fi_ffi.abi import library
from fi_ffi.abi._cffi import ffi
from fi_ffi.abi.function import Entry, register
from fi_ffi.abi.objects import lent_count
from fi_ffi.abi.signature import Signature

from tests.helpers.compiler import compiled
from tests.helpers.pinned import pinned_wheel, testing_library, tvm_ffi_loaded

__all__ = ["callback", "echo", "pinned_wheel", "testing_library", "tvm_ffi_loaded"]

_numbers = count()
settings.register_profile("no deadline", deadline=None)  # other work may have the processors
settings.load_profile("no deadline")


@pytest.fixture(autouse=True)
def _loaded(tvm_ffi_loaded: str) -> None:
    pass


@pytest.fixture
def callback() -> Iterator[Callable[..., Entry]]:
    """Registers a Python function of some number of parameters under a fresh name; the function
    and what it refers to go with the test."""
    functions: list[Callable[..., Any]] = []

    def make(function: Callable[..., Any], parameters: int = 1) -> Entry:
        signature, at = Signature("callback", ("Any",) * parameters, "Any"), len(functions)
        functions.append(function)
        name = f"fi_ffi.tests.{next(_numbers)}"
        return register(name, signature, lambda *args: functions[at](*args))

    yield make
    functions.clear()


@pytest.fixture(scope="session")
def echo(testing_library: object) -> Entry:
    """libtvm_ffi_testing's own C++ function that returns its argument."""
    from fi_ffi.abi.function import global_function

    return global_function("testing.echo")


def cell(*fields: int) -> bytes:
    """What abuse.c puts behind an object's header."""
    return b"".join(field.to_bytes(8, "little") for field in fields)


class Abuse:
    """abuse.c: an attribute is one of its functions, unchecked and undecorated."""

    def __init__(self) -> None:
        self.path = str(compiled(Path(__file__).with_name("abuse.c"), "-pthread"))
        self._module = library.open_module(self.path)

    def __getattr__(self, name: str) -> Entry:
        made = Entry(name, library.find_symbol(self._module, f"__tvm_ffi_{name}"))
        setattr(self, name, made)
        return made

    @contextlib.contextmanager
    def balanced(self) -> Iterator[None]:
        """The block leaves no object of abuse.c's behind."""
        before = self.alive()
        yield
        gc.collect()
        assert self.alive() == before, f"{self.alive() - before} objects more"


@pytest.fixture(scope="session")
def abuse(tvm_ffi_loaded: str) -> Abuse:
    return Abuse()


@pytest.fixture
def silent(capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    """cffi tells on stderr of an exception that escaped a callback, where nobody hears it."""
    yield
    assert capfd.readouterr().err == ""


_HEAPS: list[Heap] = []


class Heap:
    """The C library, and the blocks that were taken from it and not freed, by address."""

    def __init__(self, c: Any) -> None:
        self._c = c
        self.blocks: dict[int, int] = {}
        self._freed: set[int] = set()
        # Called by Python, and by C++ as the deleter of a Tensor object's block.
        self.free = ffi.callback("void(void *)", self._free)
        _HEAPS.append(self)  # objects that outlive the test call it

    def __getattr__(self, name: str) -> Any:
        return getattr(self._c, name)

    def aligned_alloc(self, alignment: int, size: int) -> Any:
        block = self._c.aligned_alloc(alignment, size)
        if block != ffi.NULL:
            self.blocks[library.address_of(block)] = size
            self._freed.discard(library.address_of(block))
        return block

    def _free(self, block: Any) -> None:
        address = library.address_of(block)
        assert address not in self._freed, "a block is freed twice"
        if self.blocks.pop(address, None) is not None:
            self._freed.add(address)
        self._c.free(block)


@pytest.fixture
def heap(monkeypatch: pytest.MonkeyPatch) -> Iterator[Heap]:
    """The blocks of libc's memory that a test takes; none of them may be left."""
    made = Heap(library.c_library)
    monkeypatch.setattr(library, "c_library", made)
    yield made
    for _ in range(2):  # what a callee let go of is freed by the second
        gc.collect()
        lent_count()
    assert not made.blocks, f"blocks of {[*made.blocks.values()]} bytes are left"
