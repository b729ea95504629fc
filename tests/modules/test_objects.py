"""Objects that functions return and keep: methods, functions, references."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest

import fi_ffi
from fi_ffi.abi import library, objects
from fi_ffi.abi._cffi import ffi
from fi_ffi.abi.signature import Signature
from fi_ffi.errors import AbiError, ArgumentError, KernelError, KernelNotFoundError
from fi_ffi.modules import FunctionObject, ModuleEntry, ModuleObject
from fi_ffi.ops.call import cuda

from tests.helpers.children import done
from tests.helpers.numpys import versioned_dlpack
from tests.helpers.remains import allowed
from tests.ops.test_threads import at_once
from tests.stress.gauges import leaves_nothing


def lent():
    """Numbers of objects that anybody refers to; those of other tests may go meanwhile."""
    objects.lent_count()
    return {*objects._lent}


@pytest.fixture(autouse=True)
def balanced(every):
    """Every test leaves as many objects as it found."""
    rows = np.ones((2, 1, 8), np.float16)
    fi_ffi.rmsnorm(*rows, np.ones(8, np.float16))  # its kernel is registered for good
    gc.collect()
    before, others = (every.live_counters(), cuda.kernel_memory().count), lent()
    yield
    every.keep(None)
    gc.collect()
    assert (every.live_counters(), cuda.kernel_memory().count) == before
    assert not lent() - others


def floats(count=3):
    return np.random.default_rng().standard_normal(count).astype(np.float32)


def test_methods_have_signatures(every):
    counter = every.counter(10)
    assert isinstance(counter, ModuleObject)
    add = counter.method("add")
    assert isinstance(add, ModuleEntry)
    assert add.signature == Signature("", ("int",), "int")
    assert repr(add) == "every_kind.counter().add(0: int) -> int"
    assert counter.sum.signature.params == ("Array<ffi.Tensor>", "Optional<Array<int>>")
    assert repr(counter) == "<test_counter of every_kind.counter()>"
    assert (counter.kind, counter.device) == ("test_counter", None)
    assert add(5) == 15
    before = every.lookups()
    assert counter.add is counter.method("add") is add  # looked up once
    assert not hasattr(counter, "__array_interface__") and not hasattr(counter, "_private")
    assert every.lookups() == before  # and no protocol asks an object for one
    assert counter.add(-1) == 14
    with pytest.raises(KernelNotFoundError, match="no method 'subtract'"):
        counter.method("subtract")
    with pytest.raises(AttributeError, match="no method 'subtract'"):
        _ = counter.subtract
    with pytest.raises(fi_ffi.ArgumentTypeError):
        counter.method(3)
    assert counter.value() == 14


def test_methods_take_and_refuse_as_functions_do(every):
    counter = every.counter(0)
    x, y = floats(), floats(5)
    expected = float(x.astype(np.float64).sum() + y.astype(np.float64).sum())
    assert counter.sum([x, y], None) == pytest.approx(expected, abs=1e-5)
    with pytest.raises(fi_ffi.ArgumentTypeError) as caught:
        counter.sum([x, 3], None)
    assert caught.value.op == "every_kind.counter().sum"
    assert caught.value.argument == "0: Array<ffi.Tensor>[1]"
    with pytest.raises(KernelError) as error:
        counter.fail("in its own words")
    assert (error.value.kind, error.value.message) == ("ValueError", "in its own words")
    assert error.value.op == "every_kind.counter().fail"


def test_a_packed_method(every):
    """Only running it tells that it takes anything."""
    counter = every.counter(0)
    count = counter.method("count", checked=False)
    assert count.signature is None
    assert counter.value() == 0  # it was not asked
    assert count(1, "two", [3], floats()) == 4
    assert count() == 0
    assert counter.value() == 2
    assert counter.method("count").signature is None  # it was asked, and ran
    assert counter.value() == 3
    assert counter.count() == 0
    assert counter.value() == 4
    with pytest.raises(AbiError, match="takes any arguments"):
        counter.method("count", checked=True)
    with pytest.raises(AbiError, match="takes any arguments"):
        count.probe()


def test_release(every):
    """An object lives as long as it or its methods, or until it is released."""
    before = every.live_counters()
    add = every.counter(1).add
    gc.collect()
    assert every.live_counters() == before + 1 and add(1) == 2
    del add
    gc.collect()
    assert every.live_counters() == before
    with every.counter(1) as counter:
        add = counter.add
        assert every.live_counters() == before + 1
    assert every.live_counters() == before
    with pytest.raises(ArgumentError, match="released") as caught:
        add(1)
    assert (caught.value.op, caught.value.argument) == ("every_kind.counter().add", "self")
    with pytest.raises(ArgumentError, match="released"):
        add.probe()
    with pytest.raises(fi_ffi.FiFfiError, match="released"):
        counter.method("value")
    assert repr(counter) == "<released object of every_kind.counter()>"
    counter.release()


def test_objects_are_arguments_too(every):
    counter = every.counter(1)
    assert counter.use_count == 1
    same = every.same_module(counter)
    assert same.add(1) == 2
    assert counter.value() == 2
    assert counter.use_count == 2
    same.release()
    assert counter.use_count == 1
    every.keep(counter)
    assert counter.use_count == 2
    assert every.kept_value().value() == 2
    every.keep([counter, {"a": counter}])
    assert counter.use_count == 3
    every.keep(None)
    assert counter.use_count == 1


def test_arrays_and_other_objects(every):
    both = every.two_counters()
    assert [counter.value() for counter in both] == [1, 2]
    assert [counter.add(10) for counter in both] == [11, 12]
    second = both[1]
    both.release()
    gc.collect()
    assert second.value() == 12
    hidden = every.hidden()
    assert every.takes_hidden(hidden) is True
    assert every.same_object(hidden).use_count == 2
    assert hidden.use_count == 1


def test_functions_that_are_returned(every):
    add = every.adder(5)
    assert isinstance(add, FunctionObject)
    assert add.signature is None
    assert add(1) == 6
    with pytest.raises(KernelError, match="Mismatched number of arguments"):
        add(1, 2)
    assert add.probe() == Signature("", ("int",), "int")
    assert add.signature == add.probe()
    with pytest.raises(fi_ffi.ArgumentTypeError):
        add(1, 2)
    with pytest.raises(fi_ffi.ArgumentTypeError):
        add("1")
    assert every.apply_typed(add, 2) == 7
    assert every.apply(add, [3]) == 8
    assert every.same_function(add)(4) == 9


def test_python_functions_as_arguments(every):
    def twice(value):
        return 2 * value

    assert every.apply_typed(twice, 21) == 42
    assert every.apply(lambda *args: len(args), [1, "two", None]) == 3
    assert every.apply(max, [3, 9, 4]) == 9
    assert every.is_null(None) is True
    assert every.is_null(twice) is False

    def fails(value):
        raise LookupError(f"not {value}")

    with pytest.raises(KernelError, match="not 3") as caught:
        every.apply_typed(fails, 3)
    assert caught.value.kind == "LookupError"


class Adds:
    def __init__(self, more):
        self.more = more

    def __call__(self, value):
        return value + self.more


def called(found):
    assert found(1) == 6


def read(found):
    assert found.tobytes() == np.arange(5, dtype=np.float32).tobytes()


@pytest.mark.parametrize(
    ("make", "keep", "use"),
    [(lambda: Adds(5), "keep", called), (lambda: np.arange(5, dtype="f4"), "keep_tensor", read)],
    ids=["a function", "a tensor"],
)
def test_what_a_callee_keeps(every, make, keep, use):
    """Its memory stays as long as the callee refers to it, and no longer."""
    made = make()
    gone, before = weakref.ref(made), lent()
    every.entry(keep)(made)
    del made
    gc.collect()
    assert len(lent() - before) == 1
    found = every.kept_value()
    use(found)
    found.release()
    assert len(lent() - before) == 1
    every.keep(None)
    assert not lent() - before
    gc.collect()
    assert gone() is None


def test_a_call_holds_its_tensors_no_longer_than_it_takes(every):
    """None of them waits until there are many."""
    counter, parts = every.counter(0), [floats(), floats()]
    before = lent()
    for _ in range(3):
        assert counter.sum(parts, None) == pytest.approx(float(np.sum(parts)), abs=1e-5)
        assert {*objects._lent} <= before
    with pytest.raises(ArgumentError, match="argument `1: "):
        counter.sum(parts, "two")
    assert {*objects._lent} <= before


def test_a_result_that_is_an_argument(every):
    x = floats(4)
    gone = weakref.ref(x)
    before = lent()
    same = every.same_tensor(x)
    assert same.desc.ptr == x.__array_interface__["data"][0]
    assert len(lent() - before) == 1
    del x
    gc.collect()
    assert gone() is not None
    with_array = every.same_tensors([floats(2), same])
    assert [tensor.shape for tensor in with_array] == [(2,), (4,)]
    same.release()
    with_array.release()
    assert not lent() - before
    assert gone() is None


@pytest.mark.parametrize("way", ["tensor", "its desc"])
@pytest.mark.parametrize(
    "export", [np.asarray, pytest.param(np.from_dlpack, marks=versioned_dlpack)]
)
def test_what_is_exported_outlives_the_object(every, way, export):
    """`release` gives back the object's own reference; the array has another."""
    allocator = cuda.kernel_memory()
    before = allocator.count
    made = every.make_tensor((3, 5), "float32", "cpu")
    array = export(made if way == "tensor" else made.desc)
    array[...] = 7
    assert made.tobytes() == array.tobytes() == np.full((3, 5), 7, np.float32).tobytes()
    made.release()
    gc.collect()
    assert allocator.count == before + 1 and (array == 7).all()
    del made, array
    gc.collect()
    assert allocator.count == before


def test_a_released_tensor_is_not_exported(every, rng):
    """Its descriptor is, which has the memory still."""
    allocator, expected = cuda.kernel_memory(), rng.standard_normal(3).astype(np.float32)
    before, made = allocator.count, every.make_tensor((3,), "float32", "cpu")
    np.asarray(made.desc)[...] = expected
    desc = made.desc
    made.release()
    for export in (np.asarray, np.from_dlpack):
        with pytest.raises(fi_ffi.FiFfiError, match="released"):
            export(made)
        assert (export(desc) == expected).all()
    assert allocator.count == before + 1
    del desc
    assert allocator.count == before


def wrapped(kind, item):
    make = fi_ffi.function(kind)
    return {
        "ffi.Array": lambda: make(item),
        "ffi.List": lambda: make([item]),
        "ffi.Map": lambda: make("at", item),
        "ffi.Dict": lambda: make("at", {"in": [item]}),
    }[kind]()


WAYS = {
    "ffi.Array": [0],
    "ffi.List": [0, 0],
    "ffi.Map": ["at"],
    "ffi.Dict": ["at", "in", 0],
}


def as_deep_as_can_be(kind, made):
    for depth in range(5000):
        try:
            made = wrapped(kind, made)
        except ArgumentError:
            return made, depth
    return made, 5000


@pytest.mark.parametrize("kind", WAYS)
def test_results_that_are_nested(every, kind):
    """Their deletion recurses in C++: endless nesting would end the process."""
    way = WAYS[kind]
    made, depth = as_deep_as_can_be(kind, 7)
    assert 1000 - len(way) <= depth * len(way) <= 1000
    with pytest.raises(ArgumentError, match="expected containers nested 1000 deep at most"):
        wrapped(kind, made)
    # What comes back is no deeper, however often it was passed.
    wide = every.same_array([[1, 2]] * 20)
    for _ in range(2500):
        wide = every.same_array(wide)
    assert [*map(list, wide)] == [[1, 2]] * 20
    for _ in range(3 * depth // 4):
        for at in way:
            made = made[at]
    _, more = as_deep_as_can_be(kind, made)
    assert abs(more - 3 * depth // 4) <= 2


class Releasing(int):
    """A number that releases an object while it is packed, as another thread could."""

    def __int__(self):
        self.release()
        return int.__index__(self)


class Weight:
    """An array that does so."""

    def __init__(self, release):
        self.release, self.ones = release, np.ones(4, np.float16)

    @property
    def __array_interface__(self):
        self.release()
        return self.ones.__array_interface__


def normalised(made, release):
    out = np.zeros((2, 4), np.float16)
    fi_ffi.rmsnorm(out, made, Weight(release), eps=0.0)
    return out.tolist()


def tensor_of_fives(every):
    return every.same_tensor(np.full((2, 4), 5, np.float16))


def apart(*parts):
    return fi_ffi.function("ffi.Array")(*parts)


RELEASED_IN_A_CALL = {
    "a method": (lambda every: every.counter(3), lambda every, made, n: made.add(n(2)), 5),
    "a module": (
        lambda every: every.counter(3),
        lambda every, made, n: apart(made, n(2))[0].value(),
        3,
    ),
    "a function": (lambda every: every.adder(3), lambda every, made, n: made(n(2)), 5),
    "a callback": (
        lambda every: every.adder(3),
        lambda every, made, n: every.apply(made, [n(2)]),
        5,
    ),
    "an array": (
        lambda every: every.two_counters(),
        lambda every, made, n: fi_ffi.function("ffi.ArrayGetItem")(made, n(1)).value(),
        2,
    ),
    "a map": (
        lambda every: fi_ffi.function("ffi.Map")(2, "two"),
        lambda every, made, n: fi_ffi.function("ffi.MapGetItem")(made, n(2)),
        "two",
    ),
    "an object": (
        lambda every: every.hidden(),
        lambda every, made, n: every.takes_hidden(apart(made, n(1))[0]),
        True,
    ),
    "a tensor": (
        tensor_of_fives,
        lambda every, made, n: np.asarray(apart(made, n(2))[0]).tolist(),
        [[5] * 4] * 2,
    ),
    "a tensor of an op": (
        tensor_of_fives,
        lambda every, made, n: normalised(made, n(1).release),
        [[1] * 4] * 2,
    ),
    "a reflected object": (
        lambda every: fi_ffi.object_type("testing.TestObjectDerived")(
            v_i64=3, v_f64=0.5, v_str="", v_map={}, v_array=[]
        ),
        lambda every, made, n: made.add_i64(n(2)),
        5,
    ),
}


@pytest.mark.parametrize("kind", RELEASED_IN_A_CALL)
def test_what_is_released_in_a_call(every, kind, testing_library):
    """The call that reads it holds a reference; after the call it is gone."""
    fi_ffi.module(testing_library)
    make, call, expected = RELEASED_IN_A_CALL[kind]
    made = make(every)
    seen = objects.Object(ffi.cast("TVMFFIObjectHandle", made.handle))
    library.lib.TVMFFIObjectIncRef(seen.handle)
    before, during = seen.use_count, []

    def number(value):
        found = Releasing(value)
        found.release = lambda: made.release() or during.append(seen.use_count)
        return found

    assert call(every, made, number) == expected
    assert during and min(during) >= before
    gc.collect()
    assert seen.use_count == before - 1


def test_returned_tensors_are_tensors_to_numpy_and_to_ops(every):
    x = floats(8).astype(np.float16).reshape(2, 4)
    made = every.same_tensor(x)
    assert np.asarray(made).dtype == np.float16 and (np.asarray([made, made])[1] == x).all()
    out, expected = (np.zeros((2, 4), np.float16) for _ in range(2))
    weight = np.ones(4, np.float16)
    fi_ffi.rmsnorm(out, made, weight)
    fi_ffi.rmsnorm(expected, x, weight)
    assert (out == expected).all() and out.any()


def test_many_calls_leave_nothing(every):
    """By several threads; of objects, references and memory."""
    x, y, keep = floats(16), floats(16), every.counter(0)
    others, big = lent(), "x" * 100_000
    before = every.live_counters(), cuda.kernel_memory().count, keep.use_count

    def calls():
        out = floats(16)
        every.add_all(out, [y, y, y], [1, 2, 3])
        with every.counter(5) as made:
            assert made.add(1) == 6
            made.scratch(1000)
            every.same_any([made, {"key": [x, "text"]}, lambda: None, b"bytes"])
            assert every.same_module(keep).kind == "test_counter"
        every.make_tensor((3,), "uint8", "cpu").desc  # noqa: B018  which keeps its tensor
        every.same_tensor(x)
        seen = []
        every.apply(lambda tensor, made: seen.append((tensor.ptr, tensor.shape)), [x, keep])
        assert seen == [(x.__array_interface__["data"][0], (16,))]
        every.same_std_string(big), every.same_bytes(big.encode()), every.same_array([big, x])
        with pytest.raises(fi_ffi.ArgumentError):
            every.many(1, 1.0, True, x, y, [x, y], "NHD", 1, [1, 2], None)
        with pytest.raises(KernelError):
            every.fail("ValueError", "each time")

    shared = "allocations", "open descriptors", "held locks", "threads", "every._entries"
    with allowed(*shared):  # what other threads do at the time
        at_once(lambda _: [calls() for _ in range(20)], 6)
    leaves_nothing(calls, 600, 20 << 20)
    gc.collect()
    assert (every.live_counters(), cuda.kernel_memory().count, keep.use_count) == before
    assert not lent() - others


AT_EXIT = """
import sys
import numpy as np
import fi_ffi

every = fi_ffi.module(sys.argv[1])
x = np.arange(8, dtype=np.float32)
mode = sys.argv[2]
if mode == "kept tensor":
    every.keep_tensor(x)
elif mode == "kept function":
    every.keep(lambda: None)
elif mode == "kept object":
    every.keep(every.counter(1))
elif mode == "held":
    held = [every.counter(1), every.counter(2).add, every.make_tensor((3,), "int8", "cpu")]
    held += [every.same_tensors([x]), every.adder(1), every.same_named({"a": [1]})]
elif mode == "scratch":
    held = every.counter(1)
    held.scratch(100)
    every.keep(held)
print("done")
"""


@pytest.mark.parametrize("mode", ["kept tensor", "kept function", "kept object", "held", "scratch"])
def test_what_is_left_at_exit(every, mode):
    """libtvm_ffi and the library outlive the interpreter."""
    assert done(AT_EXIT, str(every.path), mode) == (0, "done\n", "")
