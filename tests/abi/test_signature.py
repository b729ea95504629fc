"""Signatures and the types in them: TVM-FFI's own spelling, read back."""

from __future__ import annotations

import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fi_ffi.abi.signature import (
    Signature,
    parse_signature,
    signature_from_mismatch,
)
from fi_ffi.errors import AbiError
from fi_ffi.modules.packing import packer_of
from fi_ffi.modules.types import TypeExpr, parse_type

# Printed by functions of FlashInfer 0.6.13 and of libtvm_ffi_testing: parameters and result.
REAL = {
    "rmsnorm(0: DLTensor*, 1: float, 2: bool) -> void": (("DLTensor*", "float", "bool"), "void"),
    "plan(0: DLTensor*, 1: Array<int>, 2: Optional<ffi.Tensor>) -> Array<int>": (
        ("DLTensor*", "Array<int>", "Optional<ffi.Tensor>"), "Array<int>",
    ),
    "f(0: Map<str, Array<int>>, 1: Variant<int, str, Array<int>>) -> Optional<Any>": (
        ("Map<str, Array<int>>", "Variant<int, str, Array<int>>"), "Optional<Any>",
    ),
    "apply(0: (0: int, 1: float) -> str, 1: int) -> (0: int) -> void": (
        ("(0: int, 1: float) -> str", "int"), "(0: int) -> void",
    ),
    "nothing() -> void": ((), "void"),
    "spaced ( 0 : int , 1 : float ) -> Map<int, int>": (("int", "float"), "Map<int, int>"),
}  # fmt: skip


@pytest.mark.parametrize("text", REAL)
def test_parse(text: str) -> None:
    assert parse_signature(text) == Signature(text.partition("(")[0].strip(), *REAL[text])


MALFORMED = """
    |f|f(|f(0: int|f(0: Array<int) -> void|f(0: int)|f(0: int) void|f(0: int) ->|f(1: int) -> void
    |f(0: int, 0: int) -> void|f(0: int, 2: int) -> void|f(int) -> void|f(0:) -> void
    |f(0: int,) -> void|f(, 0: int) -> void|f(0: int)) -> void"""


@pytest.mark.parametrize("text", [part.strip() for part in MALFORMED.split("|")])
def test_malformed(text: str) -> None:
    with pytest.raises(AbiError):
        parse_signature(text)


NAMES = st.text(string.ascii_letters + string.digits + "_.", min_size=1)
TYPES = st.recursive(
    st.sampled_from(["int", "float", "bool", "DLTensor*", "ffi.Tensor", "str", "Any"]),
    lambda inner: st.one_of(
        st.builds("Array<{}>".format, inner),
        st.builds("Map<{}, {}>".format, inner, inner),
        st.builds("(0: {}, 1: {}) -> {}".format, inner, inner, inner),
    ),
    max_leaves=8,
)
MISMATCH = "Mismatched number of arguments when calling: `{}`. Expected {} but got 512 arguments"


@settings(max_examples=40)
@given(st.builds(Signature, NAMES, st.lists(TYPES, max_size=12).map(tuple), TYPES))
def test_round_trip(signature: Signature) -> None:
    assert parse_signature(str(signature)) == signature
    refusal = MISMATCH.format(signature, len(signature.params))
    assert signature_from_mismatch(refusal) == signature


@pytest.mark.parametrize(
    "message",
    [
        "", "CUDA error", MISMATCH.format("f(0: int) -> void", 2), MISMATCH.format("f(", 0),
        MISMATCH.format("f() -> void", "9" * 5000),  # longer than Python converts to an int
        MISMATCH.format("f() -> void", "٠"),
    ],
    ids=ascii,
)  # fmt: skip
def test_refusals_without_a_signature(message: str) -> None:
    with pytest.raises(AbiError):
        signature_from_mismatch(message)


# As functions that CuTe DSL 4.7.1 made say it.
CUTE = {
    "run(h0: Tensor([n0, 32, 128, 128], float32), b: Tensor([n1, n2, n3], bfloat16))": (
        "DLTensor*", "DLTensor*",
    ),
    "__call__(a: None, scale: float32, heads: int32, cached: bool, g: Tensor([n4], uint8))": (
        "None", "float", "int", "bool", "DLTensor*",
    ),
    "f(at: DataPointer, on: Stream, n: Shape([n0, 4]), two: Tuple[Tensor([8], uint8), Int(3)])": (
        "void*", "void*", "ffi.Shape", "Tuple<DLTensor*, int>",
    ),
}  # fmt: skip
EXPECTS = "Expects {} parameters when calling: `{}`"


@pytest.mark.parametrize("text", CUTE)
def test_what_cute_says(text: str) -> None:
    found = signature_from_mismatch(EXPECTS.format(len(CUTE[text]), text))
    assert (found.params, found.result) == (CUTE[text], "void")
    # Names and shapes are kept, and are what it is printed by.
    assert str(found) == text
    assert parse_signature(text) == found
    assert f"{found.name}({', '.join(found.spelled)})" == text
    assert found.same_types(Signature("any", CUTE[text]))
    assert all(callable(packer_of(param)) for param in found.params)


@pytest.mark.parametrize(
    "text",
    [
        "f(x: Tensor([1], int8)", "f(x: Thing(1))", "f(x: Tensor([1], int8)) -> void", "f(x: )",
        "f(0: Tensor([1], int8))", f"f(x: {'Tuple[' * 50}int32{']' * 50})", "f(x: Tuple[int32)",
    ],
    ids=ascii,
)  # fmt: skip
def test_what_cute_does_not_say(text: str) -> None:
    with pytest.raises(AbiError):
        parse_signature(text)
    with pytest.raises(AbiError):
        signature_from_mismatch(EXPECTS.format(1, text))


def test_cute_counts_its_parameters() -> None:
    with pytest.raises(AbiError, match="1 parameters in the refusal"):
        signature_from_mismatch(EXPECTS.format(2, "f(x: int32)"))


def test_same_types_ignores_the_name() -> None:
    ours = Signature("run", ("int",))
    assert ours.same_types(Signature("ragged_run", ("int",)))
    assert not ours.same_types(Signature("run", ("int",), "int"))
    assert not ours.same_types(Signature("run", ("int", "int")))


def typed(name: str, *args: TypeExpr | str) -> TypeExpr:
    return TypeExpr(name, tuple(TypeExpr(arg) if isinstance(arg, str) else arg for arg in args))


SPELLED = {
    "int": typed("int"),
    "ffi.Array": typed("Array"),
    "std::string": typed("str"),
    "const char*": typed("const char*"),
    "Optional<int>": typed("Optional", "int"),
    "Optional<Array<ffi.Tensor>>": typed("Optional", typed("Array", "ffi.Tensor")),
    "Map<str, Array<int>>": typed("Map", "str", typed("Array", "int")),
    "Tuple<int, str, DLTensor*>": typed("Tuple", "int", "str", "DLTensor*"),
    "(0: int, 1: Array<int>) -> void": typed("ffi.Function"),
    "Array<(0: int, 1: float) -> Map<str, int>>": typed("Array", "ffi.Function"),
    "Map<str, (0: int) -> int>": typed("Map", "str", "ffi.Function"),
    "std::function<void(int, float)>": typed("ffi.Function"),
    "std::array<int, 3>": typed("Array", "int"),
    "std::vector<std::optional<int>>": typed("Array", typed("Optional", "int")),
    "Tuple<>": typed("Tuple"),
    "RValueRef<ffi.Module>": typed("ffi.Module"),
    "my.Object": typed("my.Object"),
}


@pytest.mark.parametrize("text", SPELLED)
def test_types(text: str) -> None:
    assert parse_type(text) == SPELLED[text]
    assert callable(packer_of(text))
    # As one parameter among others, too.
    signature = Signature("f", ("int", text, "bool"), text)
    assert parse_signature(str(signature)) == signature


@pytest.mark.parametrize(
    "text", ["Optional<int", "Map<str,>", "Optional<int>>", "A<B<C>", "int>", "a, b", "a)"]
)
def test_what_is_no_type(text: str) -> None:
    with pytest.raises(AbiError, match="not a TVM-FFI type"):
        packer_of(text)
