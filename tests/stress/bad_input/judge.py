"""What a refusal must be, whoever gives it."""

from __future__ import annotations

from collections.abc import Collection

import fi_ffi


def check_refusal(
    error: BaseException, ops: Collection[str], arguments: Collection[str] | None
) -> None:
    """A typed error that names the op and one of its arguments, in its fields and in its text."""
    assert isinstance(error, fi_ffi.ArgumentError), (
        f"{type(error).__name__} from the inside: {error}"
    )
    text = str(error)
    assert error.op in ops, f"of {error.op}, not of {ops}: {text}"
    assert text.startswith(f"{error.op}: argument `{error.argument}`: got "), text
    assert str(error.expected), text
    assert text.endswith(f", expected {error.expected}"), text
    assert not text.startswith(f"{error.op}: argument `{error.argument}`: got , "), text
    assert len(text) < 2000, f"{len(text)} letters: {text[:300]}"
    assert arguments is None or error.argument in arguments, text


def check_signature_error(error: TypeError, op: str) -> None:
    """Python's own words for a missing or an unknown argument name the function as well."""
    assert type(error) is TypeError
    assert str(error).startswith(f"{op}() "), str(error)
