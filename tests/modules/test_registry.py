"""The registry of functions and types: `function`, `object_type`, fields and methods."""

from __future__ import annotations

import gc
import itertools

import numpy as np
import pytest

import fi_ffi
from fi_ffi.abi.function import register
from fi_ffi.abi.objects import Object, find_global
from fi_ffi.abi.signature import Signature
from fi_ffi.errors import AbiError, ArgumentError, ArgumentTypeError, KernelError
from fi_ffi.modules import ReflectedObject, reflection

from tests.helpers.children import done
from tests.ops.test_threads import at_once
from tests.stress.gauges import leaves_nothing

_later = itertools.count()  # in names that are registered once in a process


@pytest.fixture(autouse=True)
def _testing(testing_library):
    fi_ffi.module(testing_library)


@pytest.fixture(scope="module")
def hostile(compile_library):
    """registered.cc: a type whose getters and names misbehave."""
    return fi_ffi.module(compile_library("registered.cc"))


def test_functions():
    names = fi_ffi.functions()
    assert list(names) == sorted(names) and {"ffi.Array", "testing.echo"} <= {*names}
    assert fi_ffi.functions("testing.") == tuple(n for n in names if n.startswith("testing."))
    echo = fi_ffi.function("testing.echo")
    assert [*echo([1, "two", None])] == [1, "two", None]
    add_one = fi_ffi.function("testing.add_one")
    assert add_one.signature == Signature("testing.add_one", ("int",), "int")
    assert add_one(4) == 5
    with pytest.raises(ArgumentTypeError, match="argument `0: int`: got str 'x'") as caught:
        add_one("x")
    assert caught.value.op == "testing.add_one"
    unchecked = fi_ffi.function("testing.add_one", checked=False)
    assert unchecked.signature is None
    with pytest.raises(KernelError, match="Mismatched type"):
        unchecked("x")


def test_a_packed_function_is_not_asked():
    """Its metadata has no types: it would be run."""
    assert not reflection.function_is_typed("ffi.Array")
    array = fi_ffi.function("ffi.Array")
    assert array.signature is None and [*array(1, 2)] == [1, 2]
    with pytest.raises(AbiError, match="takes any arguments"):
        fi_ffi.function("ffi.Array", checked=True)


def test_an_error_that_is_kept_keeps_nothing_of_its_call(hostile):
    """Containers that were made of the arguments are gone, though the traceback has the frames."""
    pair = fi_ffi.object_type("testing.TestIntPair")(2, 5)
    odd = fi_ffi.object_type("fi_ffi_tests.Odd")(5)
    make = fi_ffi.object_type("testing.TestObjectDerived")
    made = make(v_i64=7, v_f64=0.5, v_str="text", v_map={"a": 1}, v_array=[])
    apply = fi_ffi.function("testing.apply")
    add_one = fi_ffi.function("testing.add_one", checked=False)
    for call in (
        lambda: odd.packed(1, [pair], object()),
        lambda: add_one([pair]),
        lambda: made.set_field("v_i64", [pair]),
        lambda: made.set_field("v_array", [[pair], object()]),
        lambda: apply(lambda: [[pair], object()]),
        lambda: make([pair], v_i64=object()),
    ):
        with pytest.raises((KernelError, ArgumentError)) as caught:
            call()
        assert pair.use_count == 1, caught.value
        assert made.use_count == odd.use_count == 1


def test_what_is_not_registered():
    with pytest.raises(fi_ffi.KernelNotFoundError) as caught:
        fi_ffi.function("testing.add_on")
    assert "no function is registered as 'testing.add_on'; the nearest: testing.add_one" in str(
        caught.value
    )
    with pytest.raises(fi_ffi.KernelNotFoundError, match="the nearest: testing.TestIntPair"):
        fi_ffi.object_type("testing.TestIntPai")
    for call in (fi_ffi.function, fi_ffi.functions, fi_ffi.object_type, fi_ffi.object_types):
        with pytest.raises(ArgumentTypeError, match="argument `name`: got int 3, expected a str"):
            call(3)


def test_types():
    assert {"ffi.Object", "testing.TestIntPair"} <= {*fi_ffi.object_types()}
    pair = fi_ffi.object_type("testing.TestIntPair")
    assert (pair.key, pair.fields) == ("testing.TestIntPair", ("a", "b"))
    assert "sum" in pair.methods
    made = pair(2, 5)
    assert isinstance(made, ReflectedObject) and made.type_key == pair.key
    assert (made.a, made.b, made.sum()) == (2, 5, 7)
    assert repr(made) == "<testing.TestIntPair of testing.TestIntPair.__ffi_init__()>"
    with pytest.raises(ArgumentTypeError, match="got 1 of them, expected 2"):
        pair(2)
    with pytest.raises(ArgumentTypeError, match="argument `1: int`"):
        pair(2, "5")
    with pytest.raises(AttributeError, match="`sum` is of the objects of testing.TestIntPair"):
        _ = pair.sum
    with pytest.raises(AttributeError, match="no static method 'summ'; the nearest: sum"):
        _ = pair.summ
    with pytest.raises(fi_ffi.KernelNotFoundError, match="has no constructor"):
        fi_ffi.object_type("ffi.Object")()


def test_fields_by_name():
    """A constructor that libtvm_ffi made of the fields."""
    kind = fi_ffi.object_type("testing.TestCxxAutoInit")
    made = kind(1, 4, c=3)
    assert [made.field(name) for name in "abcd"] == [1, 42, 3, 4]
    made = kind(1, c=3, d=5)
    assert (made.a, made.c, made.d) == (1, 3, 5)
    with pytest.raises(KernelError, match="c"):
        kind(1)


def test_a_type_has_its_ancestors_members():
    make = fi_ffi.object_type("testing.TestObjectDerived")
    made = make(v_i64=7, v_f64=0.5, v_str="text", v_map={"a": 1}, v_array=[1, "two"])
    assert made.add_i64(3) == 10
    assert (made.v_i64, made.v_f64, made.v_str) == (7, 0.5, "text")
    assert dict(made.v_map) == {"a": 1} and [*made.v_array] == [1, "two"]
    assert {"add_i64", "v_array", "v_f64", "release"} <= {*dir(made)}
    base = fi_ffi.object_type("testing.TestObjectBase")
    assert "v_array" not in base.fields and {*base.fields} < {*make.fields}


def registered(what, *args):
    """registered.cc registers it now."""
    fi_ffi.function(f"fi_ffi_tests.register_{what}")(*args)


@pytest.mark.parametrize("what", ["field", "method"])
@pytest.mark.parametrize("key", ["fi_ffi_tests.Growing", "fi_ffi_tests.Grown"])
def test_members_that_are_registered_later(hostile, key, what):
    """Of a type, or of its ancestor, whose members were looked at before, on each object."""
    kind = fi_ffi.object_type("fi_ffi_tests.Grown")
    made = kind()
    for _ in range(2):
        name, value = f"later_{next(_later)}", [7] if what == "method" else []
        assert name not in {*kind.fields, *kind.methods, *dir(made)}
        with pytest.raises(AttributeError, match=name):
            getattr(made, name)
        registered(what, key, name, *value)
        found = getattr(made, name)
        assert (found() if value else found) == 7
        assert name in (kind.methods if value else kind.fields) and name in dir(made)
        assert (made.first, made.second) == (1, 2)


def test_a_type_s_own_members_go_before_its_ancestors(hostile):
    kind = fi_ffi.object_type("fi_ffi_tests.Grown")
    made, own, theirs = kind(), ("fi_ffi_tests.Grown", 8), ("fi_ffi_tests.Growing", 9)
    for order in ((own, theirs), (theirs, own)):
        name = f"later_{next(_later)}"
        for at, (key, value) in enumerate(order, 1):
            registered("method", key, name, value)
            assert getattr(made, name)() == (8 if own in order[:at] else 9)
            assert name in kind.methods


def test_types_and_functions_that_are_registered_later(hostile):
    key = f"fi_ffi_tests.Later{next(_later)}"
    assert key not in fi_ffi.object_types("fi_ffi_tests.")
    with pytest.raises(fi_ffi.KernelNotFoundError, match=key):
        fi_ffi.object_type(key)
    registered("type", key)
    assert key in fi_ffi.object_types("fi_ffi_tests.")
    assert fi_ffi.object_type(key).fields == () and repr(fi_ffi.object_type(key)) == f"<type {key}>"
    name = f"fi_ffi_tests.later_{next(_later)}"
    with pytest.raises(fi_ffi.KernelNotFoundError, match=name):
        fi_ffi.function(name)
    for value in (1, 2):  # the second in place of the first
        register(name, Signature(name, (), "int"), lambda value=value: value)
        assert fi_ffi.function(name)() == value and name in fi_ffi.functions("fi_ffi_tests.")


def test_setting_fields():
    make = fi_ffi.object_type("testing.TestObjectDerived")
    made = make(v_i64=7, v_f64=0.5, v_str="text", v_map={}, v_array=[])
    made.v_i64 = 8
    made.set_field("v_str", "a longer text than seven bytes")
    made.v_array = [np.int32(5), [None]]
    assert (made.v_i64, made.v_str) == (8, "a longer text than seven bytes")
    assert made.v_array[0] == 5 and [*made.v_array[1]] == [None]
    with pytest.raises(AttributeError, match="`v_f64` of a testing.TestObjectDerived is read-only"):
        made.v_f64 = 1.0
    with pytest.raises(KernelError, match="int") as caught:
        made.v_i64 = "text"
    assert caught.value.op == "testing.TestObjectDerived.v_i64"
    with pytest.raises(ArgumentTypeError, match="argument `value`: got object"):
        made.v_i64 = object()
    with pytest.raises(AttributeError, match="no field 'v_i6'; the nearest: v_i64"):
        made.v_i6 = 3
    with pytest.raises(AttributeError, match="has no 'v_i6'"):
        _ = made.v_i6
    assert (made.v_i64, made.v_f64) == (8, 0.5)


def test_fields_that_hold_objects(hostile):
    make = fi_ffi.object_type("testing.TestObjectDerived")
    made = make(v_i64=8, v_f64=0.5, v_str="text", v_map={}, v_array=[])
    holder = fi_ffi.object_type("fi_ffi_tests.Holder")(made, None)
    assert holder.optional_value is None and holder.value.v_i64 == 8
    holder.optional_value = made
    assert made.use_count == 3
    holder.release()
    assert made.use_count == 1


def test_released_objects():
    made = fi_ffi.object_type("testing.TestIntPair")(2, 5)
    total = made.sum
    made.release()
    assert repr(made).startswith("<released testing.TestIntPair")
    with pytest.raises(fi_ffi.FiFfiError, match="released"):
        _ = made.a
    with pytest.raises(ArgumentError, match="argument `self`: got one that was released"):
        total()
    with pytest.raises(ArgumentError, match="argument `self`: got one that was released"):
        made.sum()


def test_a_method_keeps_its_object():
    made = fi_ffi.object_type("testing.TestIntPair")(2, 5)
    holder = fi_ffi.object_type("testing.TestObjectDerived")
    assert holder.fields
    total = made.sum
    assert made.use_count == 1
    del made
    gc.collect()
    assert total() == 7


def test_hostile_types(hostile):
    """A getter that fails, names that Python's side has, a method that takes anything."""
    odd = fi_ffi.object_type("fi_ffi_tests.Odd")(5)
    with pytest.raises(KernelError, match="no value today") as caught:
        _ = odd.fails
    assert (caught.value.op, caught.value.kind) == ("fi_ffi_tests.Odd.fails", "ValueError")
    with pytest.raises(KernelError, match="no value today"):
        odd.fails = 3
    # Python's own goes first, and the explicit form reaches the library's.
    assert odd.field("release") == 5 and callable(odd.release)
    assert odd.field("_handle") == 6 and odd.method("field")() == 7
    odd.set_field("release", 9)
    assert odd.field("release") == 9 and odd.use_count == 1
    assert odd.packed.signature is None and odd.packed(1, "two") == 3 and odd.packed() == 1
    with pytest.raises(ArgumentTypeError, match="argument `1`: got object"):
        odd.packed(1, object())
    assert odd.either.signature is None  # of two forms
    assert (odd.either(2), odd.either("text")) == (2, 4)
    assert not hasattr(odd, "__array_interface__") and not hasattr(odd, "__len__")
    twin = odd.itself()
    assert twin.use_count == 2
    twin.release()
    assert odd.use_count == 1
    with pytest.raises(TypeError, match="no copy, and no pickle"):
        __import__("copy").copy(odd)
    del odd


def test_an_object_outlives_what_loaded_it(compile_library):
    """A library stays loaded: nothing depends on the module's Python object."""
    made = fi_ffi.module(compile_library("registered.cc"))
    odd = fi_ffi.object_type("fi_ffi_tests.Odd")(1)
    del made
    gc.collect()
    assert odd.method("field")() == 7


def test_objects_of_types_that_nobody_registered():
    """libtvm_ffi aborts the process where it is asked for a type that it has not."""
    assert reflection.type_info(2**20) is None
    assert reflection.type_info(-1) is None
    assert type(find_global("ffi.Array")) is not Object


def test_values_that_are_callbacks_arguments():
    """Objects come to a Python function as they come from a call."""
    seen = []
    apply = fi_ffi.function("testing.apply")
    pair = fi_ffi.object_type("testing.TestIntPair")(2, 5)
    apply(lambda *args: seen.append((args[0].sum(), [*args[1]], dict(args[2]))), pair, [1], {1: 2})
    assert seen == [(7, [1], {1: 2})]


def test_many_calls_leave_nothing(hostile):
    make = fi_ffi.object_type("testing.TestObjectDerived")
    kept = make(v_i64=7, v_f64=0.5, v_str="text" * 10, v_map={"a": 1}, v_array=[1])
    odd = fi_ffi.object_type("fi_ffi_tests.Odd")(5)

    def calls():
        made = make(v_i64=7, v_f64=0.5, v_str="x" * 1000, v_map={"a": kept}, v_array=[kept])
        assert made.v_array[0].v_str == "text" * 10 and made.add_i64(1) == 8
        made.v_array = [np.zeros(100), "y" * 1000]
        made.v_str = "z" * 1000
        with pytest.raises(KernelError):
            made.v_i64 = "text"
        with pytest.raises(KernelError):
            _ = odd.fails
        with pytest.raises(AttributeError):
            _ = made.nothing
        assert fi_ffi.function("testing.add_one")(1) == 2

    at_once(lambda _: [calls() for _ in range(10)], 4)
    leaves_nothing(calls, 500, 20 << 20)
    gc.collect()
    assert kept.use_count == odd.use_count == 1


AT_EXIT = """
import sys
import fi_ffi

fi_ffi.module(sys.argv[1])
made = fi_ffi.object_type("testing.TestIntPair")(2, 5)
total = made.sum
kept = fi_ffi.object_type("testing.TestObjectDerived")
fi_ffi.function("testing.echo")([made, total])
print(total())
"""


def test_what_is_left_at_exit(testing_library):
    assert done(AT_EXIT, str(testing_library)) == (0, "7\n", "")


def test_the_log_numbers_a_method_s_arguments(hostile, tmp_path):
    odd = fi_ffi.object_type("fi_ffi_tests.Odd")(5)
    with_log = """
import sys
import numpy as np
import fi_ffi

fi_ffi.module(sys.argv[1])
odd = fi_ffi.object_type("fi_ffi_tests.Odd")(5)
fi_ffi.call_log(3, sys.argv[2])
assert odd.packed(np.zeros((2, 3), np.float32), 7) == 3
"""
    log = tmp_path / "log"
    assert done(with_log, str(hostile.path), str(log)) == (0, "", "")
    lines = [line.strip() for line in log.read_text().splitlines()]
    assert any(line.startswith("0: float32[2, 3] on cpu") for line in lines) and "1: 7" in lines
    assert odd.use_count == 1
