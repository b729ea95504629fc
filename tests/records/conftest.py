"""What the tests of the records share."""

from __future__ import annotations

from tests.helpers.pinned import pinned_wheel, tvm_ffi_loaded

__all__ = ["pinned_wheel", "tvm_ffi_loaded"]
