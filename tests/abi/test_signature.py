"""Signatures: TVM-FFI's own spelling, read back."""

from __future__ import annotations

import contextlib
import string

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fi_ffi.abi.signature import Signature, parse_signature, signature_from_mismatch
from fi_ffi.errors import AbiError

# Printed by functions of FlashInfer 0.6.13 and of libtvm_ffi_testing.
REAL = {
    "rmsnorm(0: DLTensor*, 1: DLTensor*, 2: DLTensor*, 3: float, 4: bool) -> void": Signature(
        "rmsnorm", ("DLTensor*", "DLTensor*", "DLTensor*", "float", "bool")
    ),
    "plan(0: DLTensor*, 1: Array<int>, 2: Optional<ffi.Tensor>) -> Array<int>": Signature(
        "plan", ("DLTensor*", "Array<int>", "Optional<ffi.Tensor>"), "Array<int>"
    ),
    "f(0: Map<str, Array<int>>, 1: Variant<int, str, Array<int>>) -> Optional<Any>": Signature(
        "f", ("Map<str, Array<int>>", "Variant<int, str, Array<int>>"), "Optional<Any>"
    ),
    "apply(0: (0: int, 1: float) -> str, 1: int) -> (0: int) -> void": Signature(
        "apply", ("(0: int, 1: float) -> str", "int"), "(0: int) -> void"
    ),
    "nothing() -> void": Signature("nothing", ()),
    "spaced ( 0 : int , 1 : float ) -> Map<int, int>": Signature(
        "spaced", ("int", "float"), "Map<int, int>"
    ),
}


@pytest.mark.parametrize("text", REAL)
def test_parse(text: str) -> None:
    assert parse_signature(text) == REAL[text]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "rmsnorm",
        "rmsnorm(",
        "rmsnorm(0: int",
        "rmsnorm(0: Array<int) -> void",
        "rmsnorm(0: int)",
        "rmsnorm(0: int) void",
        "rmsnorm(0: int) ->",
        "rmsnorm(1: int) -> void",
        "rmsnorm(0: int, 0: int) -> void",
        "rmsnorm(0: int, 2: int) -> void",
        "rmsnorm(int) -> void",
        "rmsnorm(0:) -> void",
        "rmsnorm(0: int,) -> void",
        "rmsnorm(, 0: int) -> void",
        "rmsnorm(0: int)) -> void",
    ],
)
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


@given(st.builds(Signature, NAMES, st.lists(TYPES, max_size=40).map(tuple), TYPES))
def test_round_trip(signature: Signature) -> None:
    assert parse_signature(str(signature)) == signature
    count = len(signature.params)
    refusal = (
        f"Mismatched number of arguments when calling: `{signature}`. "
        f"Expected {count} but got 512 arguments"
    )
    assert signature_from_mismatch(refusal) == signature


@given(st.one_of(st.text(), st.text("f(<[{0:, int->)>]}")))
def test_any_text(text: str) -> None:
    with contextlib.suppress(AbiError):
        assert isinstance(parse_signature(text), Signature)


MISMATCH = "Mismatched number of arguments when calling: `{}`. Expected {} but got 0 arguments"


@given(st.text(), st.text(string.digits))
@example("f() -> void", "9" * 5000)  # longer than Python converts to an int
@example("f() -> void", "٠")
def test_any_refusal(text: str, count: str) -> None:
    with contextlib.suppress(AbiError):
        assert isinstance(signature_from_mismatch(MISMATCH.format(text, count)), Signature)


@pytest.mark.parametrize(
    "message",
    ["", "CUDA error", MISMATCH.format("f(0: int) -> void", 2), MISMATCH.format("f(", 0)],
)
def test_refusals_without_a_signature(message: str) -> None:
    with pytest.raises(AbiError):
        signature_from_mismatch(message)


def test_same_types_ignores_the_name() -> None:
    ours = Signature("run", ("int",))
    assert ours.same_types(Signature("ragged_run", ("int",)))
    assert not ours.same_types(Signature("run", ("int",), "int"))
    assert not ours.same_types(Signature("run", ("int", "int")))
