"""Types as signatures spell them, and the packers that they lead to."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fi_ffi.abi.signature import Signature, TypeExpr, parse_signature, parse_type
from fi_ffi.abi.values import packer_of
from fi_ffi.errors import AbiError

SPELLED = {
    "int": TypeExpr("int"),
    "ffi.Array": TypeExpr("Array"),
    "std::string": TypeExpr("str"),
    "const char*": TypeExpr("const char*"),
    "Optional<int>": TypeExpr("Optional", (TypeExpr("int"),)),
    "Optional<Array<ffi.Tensor>>": TypeExpr(
        "Optional", (TypeExpr("Array", (TypeExpr("ffi.Tensor"),)),)
    ),
    "Map<str, Array<int>>": TypeExpr(
        "Map", (TypeExpr("str"), TypeExpr("Array", (TypeExpr("int"),)))
    ),
    "Tuple<int, str, DLTensor*>": TypeExpr(
        "Tuple", (TypeExpr("int"), TypeExpr("str"), TypeExpr("DLTensor*"))
    ),
    "(0: int, 1: Array<int>) -> void": TypeExpr("ffi.Function"),
    "Array<(0: int, 1: float) -> Map<str, int>>": TypeExpr("Array", (TypeExpr("ffi.Function"),)),
    "Map<str, (0: int) -> int>": TypeExpr("Map", (TypeExpr("str"), TypeExpr("ffi.Function"))),
    "std::function<void(int, float)>": TypeExpr("ffi.Function"),
    "std::array<int, 3>": TypeExpr("Array", (TypeExpr("int"),)),
    "std::vector<std::optional<int>>": TypeExpr(
        "Array", (TypeExpr("Optional", (TypeExpr("int"),)),)
    ),
    "Tuple<>": TypeExpr("Tuple"),
    "RValueRef<ffi.Module>": TypeExpr("ffi.Module"),
    "my.Object": TypeExpr("my.Object"),
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


@given(st.text(alphabet="<>(),-: *aT0", max_size=20))
def test_no_text_is_anything_else(text: str) -> None:
    try:
        packer_of(text)
    except AbiError:
        pass
