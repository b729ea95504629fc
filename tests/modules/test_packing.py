"""Values of any kind into a TVM-FFI function and back, through C++ and through Python callbacks."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from fi_ffi.abi._cffi import ffi
from fi_ffi.abi.function import Entry, array_values
from fi_ffi.abi.objects import CallArena
from fi_ffi.abi.tensor import DEVICE_TYPES, Device, TensorDesc, parse_device
from fi_ffi.abi.values import make_function
from fi_ffi.errors import ArgumentTypeError, KernelError
from fi_ffi.modules.packing import call, pack, packer_of

from tests.abi.conftest import echo
from tests.abi.test_values import DESCS, VALUES, same
from tests.helpers.ids import shown

__all__ = ["echo"]

DEVICES = [parse_device(name) for name in DEVICE_TYPES] + [parse_device("cuda:7")]


@pytest.fixture(autouse=True)
def _loaded(tvm_ffi_loaded: str) -> None:
    pass


def callback(function: Any) -> Entry:
    return Entry.of(make_function("callback", function, pack_result=pack), "callback")


def test_round_trips(echo: Entry) -> None:
    """A result of a callback is made for the call, and owned by who called."""
    seen: list[object] = []
    identity = callback(lambda value: (seen.append(value), value)[1])
    for value in [*VALUES, *DEVICES]:
        assert same(call(echo, value), value) and same(call(identity, value), value), shown(value)
        assert same(seen.pop(), value), shown(value)
        with call(echo, [value, [], value]) as array:
            assert array.use_count == 1
            assert all(same(each, value) for each in array_values(array)[::2]), shown(value)
        with call(callback(lambda value=value: [value, 1])) as array:
            assert array.use_count == 1 and same(array_values(array)[0], value)


def test_a_device_made_by_hand(echo: Entry) -> None:
    assert call(echo, Device("cuda", 3)) is parse_device("cuda:3")


WITHOUT_FORM = [object(), int, {1, 2}, 1j, iter([1]), itertools.count(), [1, [object()]]]


@pytest.mark.parametrize("value", WITHOUT_FORM, ids=shown)
def test_values_without_a_form(value: object, echo: Entry) -> None:
    with pytest.raises(ArgumentTypeError, match=r"testing.echo: argument `1(\[1\]\[0\])?`: got"):
        call(echo, None, value)
    with pytest.raises(KernelError, match="ArgumentTypeError: .*`result"):
        call(callback(lambda: value))


@pytest.mark.parametrize("desc", DESCS, ids=str)
def test_tensors_in_containers(desc: TensorDesc) -> None:
    with call(callback(lambda desc: [(desc,)]), desc) as outer:  # which keeps the argument's object
        assert outer.use_count == 1
    # Without an owner it would name memory that may be gone when the caller looks.
    for result in (desc, [desc], {"a": (1, desc)}):
        with pytest.raises(KernelError, match=r"ArgumentTypeError: .*`result.*an owner"):
            call(callback(lambda _, result=result: result), desc)


def test_a_choice_that_was_not_taken_leaves_nothing() -> None:
    """Its tensors would count as the call's."""
    arena, slot = CallArena("op"), ffi.new("TVMFFIAny *")
    pack_either = packer_of("Variant<Tuple<ffi.Tensor, int>, Tuple<ffi.Tensor, str>>")
    pack_either(slot[0], (np.zeros(2), "a"), arena, "x")
    assert [where for where, _ in arena.descs] == ["x[0]"]
    arena.end()
