"""Arguments that change or lie while they are packed, and objects that must have one owner."""

from __future__ import annotations

import copy
import gc
import itertools
import pickle
import traceback
from collections.abc import Mapping, Sequence

import numpy as np
import pytest

import fi_ffi
from fi_ffi import ArgumentError, ArgumentTypeError
from fi_ffi.abi.function import Entry, global_function, make_array, probe
from fi_ffi.abi.objects import CallArena, Function, Object, Tensor
from fi_ffi.modules.entry import HandleGuard
from fi_ffi.modules.packing import call

from tests.helpers.heap_text import heap_string
from tests.helpers.remains import allowed

MANY = 100_000


class Int(int):
    """An int that does something when it is converted."""

    def __new__(cls, act):
        made = super().__new__(cls, 7)
        made.act = act
        return made

    def __int__(self):
        self.act()
        return 7


def changing(act, make):
    """A container that changes while its 7 is converted."""
    made = make(Int(lambda: act(made)))
    return made


@pytest.mark.parametrize("act", [lambda x: x.extend(range(MANY)), lambda x: x.clear()])
def test_lists_that_change_while_they_are_packed(every, act):
    """What is packed are the elements that it had; past its room there is other memory."""
    ends = {"same_pair": ["text"], "same_shape": [1, 2]}
    for name in ("same_numbers", "same_list", "same_array", "same_any", *ends):
        rest = ends.get(name, [1, 2])
        values = changing(act, lambda seven, rest=rest: [seven, *rest])
        assert list(every.entry(name)(values)) == [7, *rest]


@pytest.mark.parametrize(
    "act", [lambda x: x.update((str(i), i) for i in range(MANY)), lambda x: x.clear()]
)
def test_dicts_that_change_while_they_are_packed(every, act):
    for name in ("same_dict", "same_any"):
        values = changing(act, lambda seven: {"a": seven, "b": 1})
        assert dict(every.entry(name)(values)) == {"a": 7, "b": 1}


class Lies(Sequence):
    """Another length than it has elements; `count` of None is no end of them."""

    def __init__(self, told, count):
        self.told, self.count = told, count

    def __len__(self):
        return self.told

    def __getitem__(self, index):
        if self.count is not None and index >= self.count:
            raise IndexError(index)
        return index


class Grows(Lies):
    def __getitem__(self, index):
        self.told += 1
        return index


class LyingMap(Mapping):
    def __init__(self, told, keys):
        self.told, self.keys_ = told, keys

    def __len__(self):
        return self.told

    def __iter__(self):
        return iter(self.keys_)

    def __getitem__(self, key):
        return 1


LIES = [Lies(3, None), Lies(0, None), Lies(5, 3), Lies(3, 5), Lies(2**40, 3), Lies(2**62, None)]
LYING_MAPS = [LyingMap(1, itertools.count()), LyingMap(3, "ab"), LyingMap(2**50, "ab")]


def test_containers_that_lie(every):
    for names, lies in (
        (("same_numbers", "same_shape", "same_any"), [*LIES, Grows(3, None)]),
        (("same_dict", "same_any"), LYING_MAPS),
    ):
        for name, value in itertools.product(names, lies):
            refused = pytest.raises(ArgumentError, match="as many elements as its length")
            with allowed("value.told"), refused:  # it grows as it is read
                every.entry(name)(value)
    assert list(every.same_numbers(Lies(4, 4))) == [0, 1, 2, 3]
    assert dict(every.same_dict(LyingMap(2, "ab"))) == {"a": 1, "b": 1}


@pytest.mark.parametrize("name", ["same_numbers", "same_list", "same_shape", "same_pair"])
def test_what_has_no_end_is_no_sequence(every, name):
    for value in (itertools.count(), iter([1]), (i for i in itertools.count()), {1, 2}):
        with pytest.raises(ArgumentTypeError, match="expected a sequence"):
            every.entry(name)(value)


def tensor_of(array):
    return Tensor.from_desc(fi_ffi.as_desc(array))


X = np.zeros((2, 3), np.float32)
OWNERS = {
    "Module": lambda every: every,
    "ModuleEntry": lambda every: every.same_int,
    "ModuleObject": lambda every: every.counter(1),
    "method": lambda every: every.counter(1).add,
    "FunctionObject": lambda every: every.adder(1),
    "ArrayObject": lambda every: every.same_numbers([1]),
    "MapObject": lambda every: every.same_named({"a": [1]}),
    "TensorObject": lambda every: every.same_tensor(X),
    "Object": lambda every: every.hidden(),
    "Array": lambda every: make_array([1]),
    "Entry": lambda every: global_function("ffi.ArraySize"),
    "Function": lambda every: global_function("ffi.ArraySize").owner,
    "String": lambda every: heap_string(),
    "Tensor": lambda every: tensor_of(X),
    "CallArena": lambda every: CallArena("call"),
    "HandleGuard": lambda every: HandleGuard(None),
}


@pytest.mark.parametrize("kind", OWNERS)
def test_an_owner_is_not_copied(every, kind):
    """Two owners of one reference would release it twice."""
    owner = OWNERS[kind](every)
    before = owner.use_count if isinstance(owner, Object) else None
    ways = [copy.copy, copy.deepcopy, lambda o: copy.deepcopy([o]), pickle.dumps]
    for way in (*ways, lambda o: pickle.dumps(o, 0), lambda o: pickle.dumps({"in": o})):
        with pytest.raises(TypeError, match="no copy, and no pickle"):
            way(owner)
    gc.collect()
    if before is not None:
        assert owner.use_count == before


def test_a_signature_is_copied(every):
    """It owns nothing."""
    signature = every.same_int.signature
    for made in (copy.copy(signature), copy.deepcopy(signature)):
        assert made == signature
    assert pickle.loads(pickle.dumps(signature)) == signature


@pytest.mark.parametrize("name", ["same_any", "same_array"])
def test_values_inside_themselves(every, name):
    """And inside so many others that there is no stack left: both are refused by name."""
    ring, deep, looped = [], [], {}
    ring.append(ring)
    looped["again"] = looped
    for _ in range(100_000):
        deep = [deep]
    for value in (ring, deep, [looped]):
        with pytest.raises(ArgumentError, match="endlessly nested values, expected values"):
            every.entry(name)(value)
        with pytest.raises(RecursionError):
            call(global_function("ffi.Array"), value)
    one, inner = every.entry(name)([1, [2]])
    assert (one, [*inner]) == (1, [2])


def raises(error):
    raise error


FAILURES = {
    "no signature": lambda every: probe(global_function("testing.echo")),
    "another refusal": lambda every: probe(global_function("ffi.MakeObjectFromPackedArgs")),
    "endless": lambda every: every.same_any((lambda x: x.append(x) or x)([])),
    "released": lambda every: every.same_any((lambda x: x.release() or x)(every.hidden())),
    "int64": lambda every: every.same_int(2**63),
    "float64": lambda every: every.same_float(10**400),
    "surrogate": lambda every: every.same_str("\ud800"),
    "address": lambda every: every.same_pointer("1"),
    "variant": lambda every: every.same_either(b"bytes"),
    "no method": lambda every: every.counter(1).subtract,
    "no function": lambda every: every.subtract,
    "no key": lambda every: every.same_named({})["a"],
    "no key's type": lambda every: every.same_named({})[object()],
    "a failure": lambda every: every.fail("ValueError", "words"),
    "a callback's": lambda every: every.apply_typed(lambda x: raises(ValueError(x)), 1),
    "an exit": lambda every: every.apply_typed(lambda x: raises(SystemExit(x)), 1),
}


@pytest.mark.parametrize("name", FAILURES)
def test_no_traceback_is_of_two_errors(every, testing_library, name):
    with pytest.raises(BaseException) as caught:  # noqa: PT011
        FAILURES[name](every)
    if isinstance(caught.value, SystemExit):
        assert caught.value.code == 1
        assert isinstance(caught.value.__cause__, fi_ffi.KernelError)
    text = "".join(traceback.format_exception(caught.value))
    assert "During handling of the above exception" not in text, text


def test_what_a_callback_returns_is_packed_as_an_argument_is(every):
    first, second = every.apply(lambda: [1, {"a": (2, None)}], [])
    assert (first, list(second["a"])) == (1, [2, None])
    assert every.apply(lambda: np.int16(3), []) == 3
    with every.apply(lambda: X, []) as tensor:
        assert tensor.desc.ptr == X.__array_interface__["data"][0]
    function = every.apply(lambda: len, [])
    assert isinstance(function, Function)
    assert function("ab") == 2
    assert Entry.of(function, "len")("abc") == 3
