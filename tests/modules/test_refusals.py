"""What is refused, before anything is run: by type, by value, by number, by device."""

from __future__ import annotations

import numpy as np
import pytest

import fi_ffi
from fi_ffi import ArgumentError, ArgumentTypeError, KernelError
from fi_ffi.abi.objects import Object

from tests.stress.bad_input.guard import check_refusal
from tests.stress.bad_input.odd import ANYTHING, NOT_TENSORS, Interface


class Odd:
    """No value of any kind."""


ODD = Odd()
X = np.zeros((2, 3), np.float32)
WRONG_TYPES = {
    "same_int": [None, True, 1.0, "1", b"1", X, ODD, [1], np.float32(1), np.True_],
    "same_float": [None, True, "1", 1j, X, ODD, [1.0]],
    "same_bool": [None, 0, 1, "True", X, ODD, np.int8(1)],
    "same_str": [None, 1, b"bytes", ["a"], X, ODD],
    "same_std_string": [None, 1, b"bytes", ODD],
    "c_text_length": [None, 1, b"bytes", ODD],
    "same_bytes": [None, 1, "text", [1], ODD],
    "same_dtype": [None, 1, "float17", ODD, int, np.dtype(">f4")],
    "same_device": [None, 0, "gpu:0", "cuda:x", "cuda:-1", ODD],
    "same_optional": ["1", 1.0, True, X, ODD],
    "same_numbers": [None, 1, "12", b"12", X, ODD, {1: 2}, {1, 2}, iter([1])],
    "same_list": [None, 1, "12", ODD],
    "same_pair": [None, 1, "ab", ODD, {"a": 1}],
    "same_named": [None, 1, "ab", [("a", [1])], ODD],
    "same_dict": [None, 1, [1], ODD],
    "same_either": [None, True, b"bytes", X, ODD, {1: 2}],
    "same_shape": [None, 1, "12", X, ODD],
    "same_pointer": [True, "1", 1.0, ODD],
    "same_tensor": [None, 1, "text", [1.0], ODD],
    "same_tensors": [None, 1, "text", X, ODD],
    "told_view": [None, 1, "text", [[1.0]], ODD],
    "told_optional": [1, "text", ODD],
    "same_object": [1, "text", X, ODD, [1]],
    "same_function": [1, "text", X, ODD, Odd, int],
    "same_module": [None, 1, "text", X, ODD],
    "takes_hidden": [None, 1, "text", X, ODD],
    "same_any": [ODD, int, 1j, {1, 2}, object()],
}


@pytest.mark.parametrize("name", WRONG_TYPES)
def test_wrong_types(every, name):
    entry = every.entry(name)
    for value in WRONG_TYPES[name]:
        with pytest.raises(ArgumentTypeError) as caught:
            entry(value)
        error = caught.value
        assert isinstance(error, TypeError)
        assert error.op == f"every_kind.{name}"
        assert error.argument == f"0: {entry.signature.params[0]}"
        assert type(value).__name__ in str(error.got) or repr(value) in str(error.got)
        assert error.expected


@pytest.mark.parametrize("name", ["same_int", "told_view", "same_numbers", "same_any", "many"])
def test_any_odd_value(every, name):
    """It is refused in words that name the function, or taken."""
    entry = every.entry(name)
    values = [made() for made in ANYTHING]
    values = [value for value in values if not isinstance(value, Interface)]
    for value in [*values, *([value] for value in values), *({"a": value} for value in values)]:
        try:
            entry(value, *[None] * (len(entry.signature.params) - 1))
        except ArgumentError as error:
            check_refusal(error, [f"every_kind.{name}"], None)
    for value in (made() for made in NOT_TENSORS):
        with pytest.raises((ArgumentError, fi_ffi.LoaderError)) as caught:
            every.told_view(on("cuda:0"), stream="no stream", device=value)
        assert "every_kind.told_view" in str(caught.value) or value is None


WITHIN = [
    ("same_numbers", [1, "2"], "0: Array<int>[1]"),
    ("same_numbers", [1, None], "0: Array<int>[1]"),
    ("same_numbers", [True], "0: Array<int>[0]"),
    ("same_nested", [1, None, 2.0], "0: Optional<Array<Optional<int>>>[2]"),
    ("same_pair", (1, 2), "0: Tuple<int, str>[1]"),
    ("same_named", {"a": [1], 2: []}, "0: Map<str, Array<int>>, key 1"),
    ("same_named", {"a": [1, None]}, "0: Map<str, Array<int>>['a'][1]"),
    ("same_tensors", [X, 3], "0: Array<ffi.Tensor>[1]"),
    ("same_tensors", [None], "0: Array<ffi.Tensor>[0]"),
    ("same_shape", [1, "2"], "0: ffi.Shape[1]"),
    ("same_any", [1, [2, ODD]], "0: Any[1][1]"),
]


def test_wrong_types_inside_containers(every):
    for name, value, argument in WITHIN:
        with pytest.raises(ArgumentTypeError) as caught:
            every.entry(name)(value)
        assert caught.value.argument == argument


WRONG_VALUES = {
    "same_int": [2**63, -(2**63) - 1, 10**5000, np.uint64(2**63)],
    "same_optional": [2**64],
    "same_numbers": [[0, 2**63]],
    "same_shape": [[2**63]],
    "same_float": [10**400],
    "same_pointer": [-1, 2**64],
    "same_pair": [[1], [1, "a", 2]],
    "same_str": ["\ud800"],
    "c_text_length": ["before \0 after"],
    "told_view": [np.zeros(3, np.complex64), np.zeros(3, ">f4")],
    "same_either": [2**63],
    "same_any": [2**63],
}


@pytest.mark.parametrize("name", WRONG_VALUES)
def test_wrong_values(every, name):
    for value in WRONG_VALUES[name]:
        with pytest.raises(ArgumentError) as caught:
            every.entry(name)(value)
        assert not isinstance(caught.value, ArgumentTypeError)
        assert caught.value.op == f"every_kind.{name}"
        assert caught.value.argument.startswith("0: ")


@pytest.mark.parametrize(
    ("name", "args"),
    [("same_int", ()), ("same_int", (1, 2)), ("nothing", (None,)), ("many", (1,) * 9)],
)
def test_wrong_numbers_of_arguments(every, name, args):
    with pytest.raises(ArgumentTypeError, match=f"got {len(args)} of them") as caught:
        every.entry(name)(*args)
    assert str(every.entry(name).signature.params[0] if args == () else "") in str(caught.value)
    assert f"every_kind.{name}(" in str(caught.value)  # the signature
    with pytest.raises(TypeError):
        every.entry(name)(value=1)


def test_nothing_is_run_and_nothing_kept(every):
    """A call that is refused at its last argument."""
    before = every.live_counters()
    keep = every.counter(0)
    count = keep.use_count
    with pytest.raises(ArgumentTypeError):
        every.many(1, 1.0, True, X, X, [X, X], "NHD", 1, [1, 2], "no bool")
    with pytest.raises(ArgumentTypeError):
        every.same_array([keep, ODD])
    assert keep.use_count == count
    keep.release()
    assert every.live_counters() == before


def test_objects_that_were_released(every):
    def tensor():
        return every.make_tensor((1,), "int8", "cpu")

    makers = {
        "same_module": lambda: every.counter(1), "same_object": every.hidden,
        "same_any": every.hidden, "takes_hidden": every.hidden, "told_view": tensor,
        "same_tensor": tensor, "same_function": lambda: every.adder(1),
        "same_numbers": lambda: every.same_numbers([1]), "same_named": lambda: every.same_named({}),
    }  # fmt: skip
    made = {name: make() for name, make in makers.items()}
    for name, value in made.items():
        value.release()
        for function, given in ((name, value), ("same_array", [value])):
            with pytest.raises(ArgumentError, match="released") as caught:
                every.entry(function)(given)
            assert caught.value.argument.startswith("0: ")
        assert type(value) is Object or "released" in repr(value)
    with pytest.raises(ArgumentError, match="released"):
        made["same_function"](1)
    for use in (lambda: made["told_view"].desc, lambda: made["told_view"].tobytes()):
        with pytest.raises(fi_ffi.FiFfiError, match="released"):
            use()


def test_objects_of_another_type(every):
    """What the type's name tells is checked here; the rest is for the function to say."""
    for name in ("same_module", "same_function", "same_numbers", "same_named", "same_pair"):
        with pytest.raises(ArgumentTypeError):
            every.entry(name)(every.hidden())
    with pytest.raises(KernelError, match="Mismatched type on argument #0") as caught:
        every.takes_hidden(every.counter(1))
    assert caught.value.kind == "TypeError"
    with pytest.raises(ArgumentTypeError):
        every.same_tensor(every.hidden())


def test_the_function_s_own_errors(every):
    for kind in ("ValueError", "RuntimeError", "MyOwnKind"):
        with pytest.raises(KernelError) as caught:
            every.fail(kind, "what it says")
        error = caught.value
        assert (error.op, error.kind, error.message) == ("every_kind.fail", kind, "what it says")
    with pytest.raises(KernelError, match="from the standard library"):
        every.fail_std()
    assert every.nothing() == 7  # and the next call is fine


def on(device, ptr=4096, shape=(4,)):
    return fi_ffi.TensorDesc(ptr, shape, "float32", device=device)


def test_a_missing_stream(every):
    for args in ((on("cuda:0"), None, None), (X[0], [X[0], on("cuda:0")], None)):
        with pytest.raises(ArgumentError) as caught:
            every.add_all(*args)
        assert caught.value.argument == "stream"
        assert caught.value.op == "every_kind.add_all"


def test_what_is_no_stream_and_no_device(every):
    for stream in ("0", 1.5, True, object(), -1, 2**64):
        with pytest.raises(ArgumentError) as caught:
            every.told_view(on("cuda:0"), stream=stream)
        assert caught.value.argument == "stream"
    for device in (0, "gpu", "cuda:x", object()):
        with pytest.raises(ArgumentTypeError) as caught:
            every.nothing(device=device)
        assert caught.value.argument == "device"


def test_two_devices(every):
    with pytest.raises(ArgumentError) as caught:
        every.add_all(on("cuda:0"), [on("cpu"), on("cuda:1")], None, stream=0)
    error = caught.value
    assert error.argument == "1: Optional<Array<ffi.Tensor>>[1]"
    assert "cuda:0, the device of `0: DLTensor*`" in str(error)
    for desc, device in (("cuda:0", "cuda:1"), ("cuda:0", "cpu"), ("cuda_managed:0", None)):
        with pytest.raises(ArgumentError) as caught:  # managed memory is of no one device
            every.told_view(on(desc), stream=0, device=device)
        assert (caught.value.argument, str(caught.value.got)) == ("device", str(device))


def test_a_device_that_is_not_there(every):
    """Far more GPUs than any machine has: nothing is called."""
    with pytest.raises(fi_ffi.LoaderError):
        every.keep(None, device="cuda:1000")
    with pytest.raises(fi_ffi.LoaderError):
        every.told_view(on("cuda:1000"), stream=0)
