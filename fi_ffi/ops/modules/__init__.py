"""Any function of any TVM-FFI library: docs/modules.md."""

from fi_ffi.ops.modules.entry import ModuleEntry
from fi_ffi.ops.modules.module import Module, module
from fi_ffi.ops.modules.objects import (
    ArrayObject,
    FunctionObject,
    MapObject,
    ModuleObject,
    TensorObject,
)

__all__ = [
    "ArrayObject",
    "FunctionObject",
    "MapObject",
    "Module",
    "ModuleEntry",
    "ModuleObject",
    "TensorObject",
    "module",
]
