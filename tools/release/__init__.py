"""The exports of a kernel module, read from its C++ sources without running anything.

    read([Source(path, text, defines)], include)

finds every `TVM_FFI_DLL_EXPORT_TYPED_FUNC` with the function it names, and the methods of the
module objects that such functions return. Types are spelled as the binary prints them (`types.py`).
`tests/records/test_bindings.py` compares both with binaries.
"""

from __future__ import annotations

from tools.release.exports import Bindings, Function, Source, read
from tools.release.types import abi_type

__all__ = ["Bindings", "Function", "Source", "abi_type", "read"]
