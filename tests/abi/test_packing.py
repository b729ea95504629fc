"""Types as signatures spell them, and the packers that they lead to."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fi_ffi.abi.packing import packer_of
from fi_ffi.abi.signature import Signature, parse_signature
from fi_ffi.abi.spelling import Spelled, parse_type
from fi_ffi.errors import AbiError

SPELLED = {
    "int": Spelled("int"),
    "ffi.Array": Spelled("Array"),
    "std::string": Spelled("str"),
    "const char*": Spelled("const char*"),
    "Optional<int>": Spelled("Optional", (Spelled("int"),)),
    "Optional<Array<ffi.Tensor>>": Spelled(
        "Optional", (Spelled("Array", (Spelled("ffi.Tensor"),)),)
    ),
    "Map<str, Array<int>>": Spelled("Map", (Spelled("str"), Spelled("Array", (Spelled("int"),)))),
    "Tuple<int, str, DLTensor*>": Spelled(
        "Tuple", (Spelled("int"), Spelled("str"), Spelled("DLTensor*"))
    ),
    "(0: int, 1: Array<int>) -> void": Spelled("ffi.Function"),
    "Array<(0: int, 1: float) -> Map<str, int>>": Spelled("Array", (Spelled("ffi.Function"),)),
    "Map<str, (0: int) -> int>": Spelled("Map", (Spelled("str"), Spelled("ffi.Function"))),
    "std::function<void(int, float)>": Spelled("ffi.Function"),
    "std::array<int, 3>": Spelled("Array", (Spelled("int"),)),
    "std::vector<std::optional<int>>": Spelled("Array", (Spelled("Optional", (Spelled("int"),)),)),
    "Tuple<>": Spelled("Tuple"),
    "RValueRef<ffi.Module>": Spelled("ffi.Module"),
    "my.Object": Spelled("my.Object"),
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
